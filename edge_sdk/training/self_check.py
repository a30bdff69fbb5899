"""A device's own check of a bundle: it answers the stored sample as the manifest's blob says."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.learner import Learner

LARGEST_DIFFERENCE = 1e-3
"""Largest norm of the difference of the logits, as a fraction of their norm. Processors round in
other orders, which changes logits by a millionth; another model changes all of them."""


def relative_difference(got: Array, want: Array) -> float:
    """Norm of the difference of two tensors as a fraction of the norm of the second."""
    wide = want.astype(np.float64)
    return float(np.linalg.norm(got - wide) / max(float(np.linalg.norm(wide)), 1e-30))


def check_sample(learner: Learner, sample: Mapping[str, Array]) -> None:
    """Check that a bundle with its initial state answers the stored sample.

    Args:
        learner: the learner of the bundle, whose state is the initial one.
        sample: inputs ``x`` (rows, ...) and ``logits`` (heads, rows, ...); nothing is checked if it
            is empty, as in bundles for training.

    Raises:
        BundleError: the answer is another, is not finite, or there is none.
    """
    if not sample:
        return
    tier = learner.manifest.tier
    try:
        x, wanted = sample["x"], sample["logits"]
        got, _ = learner.predict(x)
        fraction = relative_difference(got, wanted)
    except (KeyError, ValueError, DataError) as error:
        raise BundleError(f"the bundle of tier {tier!r} has a sample that does not fit") from error
    except BundleError:
        raise
    except Exception as error:  # each runtime has its own
        raise BundleError(
            f"the bundle of tier {tier!r} cannot answer its sample here: {error}"
        ) from error
    if not fraction <= LARGEST_DIFFERENCE:
        raise BundleError(
            f"the bundle of tier {tier!r} does not answer its sample here: the logits differ by "
            f"{fraction:.2g} of their size; export it again for this device"
        )
