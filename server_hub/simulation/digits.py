"""scikit-learn's bundled handwritten digits: 1,797 images of 8 x 8 pixels."""

from __future__ import annotations

import numpy as np

from edge_sdk.training.data import Examples

CLASSES = 10


def load() -> tuple[Examples, Examples]:
    """Training and held-out digits, 80 % and 20 %, pixels in [0, 1], the same split every time."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    images = (x / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(y))
    cut = len(y) // 5
    test, train = order[:cut], order[cut:]
    return Examples(images[train], y[train]), Examples(images[test], y[test])
