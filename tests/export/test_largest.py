"""The class with the largest score, found by blocks, is that of argmax."""

from __future__ import annotations

import pytest
import torch

from export.steps.losses import largest


@pytest.mark.parametrize("classes", [1, 2, 7, 10, 63, 64, 72, 97, 1024, 50257])
@pytest.mark.parametrize("seed", range(3))
def test_largest(classes: int, seed: int) -> None:
    """Also with ties, of which the first counts, and with scores that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(9, classes, generator=generator)
    scores[1:4] = scores[1:4].round()
    scores[4] = 0
    scores[5, seed % classes :] = torch.nan
    scores[6] = -torch.inf
    assert torch.equal(largest(scores), scores.argmax(1))
    assert largest(scores[:1]).shape == (1,)
