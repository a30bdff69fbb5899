"""The class with the largest score, found by blocks, is that of argmax."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import SplitModel
from export.errors import ExportError
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


@pytest.mark.parametrize(
    "classes", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (72, 23))]
)
@pytest.mark.parametrize("task", ["classes", "tokens"])
def test_scores_of_several_heads_are_compared(
    task: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by blocks or not: a graph that leaves out the softmax of the heads is refused."""
    x = torch.randint(0, classes, (8, 5)) if task == "tokens" else torch.randn(8, 3)
    stem = Table(classes) if task == "tokens" else nn.Linear(3, 8)
    blocks = [nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(3)]
    model = SplitModel(stem, blocks, nn.Linear(8, classes), task)  # type: ignore[arg-type]
    model.add_heads([1, 2], x, classes)
    tiers = {"a": Tier(2)}
    export_bundles(model, tiers, tmp_path / "right", example=x, classes=classes)
    monkeypatch.setattr(
        torch,
        "softmax",
        lambda scores, dim: scores * 1.0,  # as if it was left out
    )
    with pytest.raises(
        ExportError, match=r"'train' differs from eager PyTorch in (scores|correct)"
    ):
        export_bundles(model, tiers, tmp_path / "wrong", example=x, classes=classes)


class Table(nn.Module):
    """The stem of a model of tokens."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, positions, 8)."""
        h: Tensor = self.embedding(x)
        return h
