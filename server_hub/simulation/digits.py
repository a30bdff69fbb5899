"""The handwritten digits that scikit-learn bundles: 1,797 images of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np

from edge_sdk.training.data import Examples

CLASSES = 10


def load() -> tuple[Examples, Examples]:
    """Return training and held-out digits, 80 % and 20 %; the split is always the same.

    Returns:
        Two sets of examples: x (n, 1, 8, 8) float32 in [0, 1], y (n,) from 0 to 9.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = (x / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(y))
    cut = len(y) // 5
    test, train = order[:cut], order[cut:]
    return Examples(images[train], y[train]), Examples(images[test], y[test])
