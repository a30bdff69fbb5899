"""The exporter finds ranges of inputs, and refuses what both sides of a cut would train."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edge_sdk.errors import DataError
from edge_sdk.training.data import Examples
from export.bundles.quantized import LossCheck
from export.bundles.tier_table import TiersConfig, TierTable
from export.bundles.writer import Tier, export_bundles, make_steps, segment_of
from export.cutting.checks import check_sharing
from export.cutting.input_ranges import InputRanges, find_ranges
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.planning.cost import Failure
from export.planning.planner import Planner
from tests.lib.models import (
    CLASSES,
    FEATURES,
    AttentionBlock,
    MeanHead,
    TokenBlock,
    conv_model,
    example,
    text_model,
    token_model,
)

WIDTH = 8


class Stem(nn.Module):
    """Token embeddings with learned positions, read by index or as a slice."""

    def __init__(self, words: int, positions: int, offset: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.positions = nn.Embedding(positions, WIDTH)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, positions, channels)."""
        length = x.shape[1]
        if self.offset is None:
            return self.embedding(x) + self.positions.weight[:length]
        places = torch.arange(length, device=x.device) + self.offset
        return self.embedding(x) + self.positions(places)


class OneHot(nn.Module):
    """A linear layer on one-hot tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, positions, channels)."""
        result: Tensor = self.linear(nn.functional.one_hot(x, 20).float())
        return result


class Columns(nn.Module):
    """A table for each column of categories."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Embedding(10, WIDTH), nn.Embedding(30, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, channels)."""
        result: Tensor = self.one(x[:, 0]) + self.other(x[:, 1])
        return result


class Numbers(nn.Module):
    """A linear layer on integers as numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Activations (batch, channels)."""
        result: Tensor = self.linear(x.float())
        return result


class Mask(nn.Module):
    """A causal mean, with a table of 33 x 33 for the mask."""

    def __init__(self) -> None:
        super().__init__()
        self.block = TokenBlock(WIDTH)
        self.register_buffer("mask", torch.ones(33, 33).tril())

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        length = h.shape[1]
        result: Tensor = self.block(self.mask[:length, :length] @ h / length)
        return result


def cut_at(stem: nn.Module, *blocks: nn.Module) -> SplitModel:
    """A classifier of a stem and three blocks, the last ones of which are given."""
    blocks = (*(TokenBlock(WIDTH) for _ in range(3 - len(blocks))), *blocks)
    return SplitModel(stem, list(blocks), MeanHead(WIDTH, 4))


def ids(high: int, *shape: int) -> Tensor:
    """Random integers below a bound."""
    return torch.randint(high, (4, *shape), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "x", "highest", "longest"),
    [
        (lambda: conv_model(), example((1, 8, 8)), (), None),
        (lambda: text_model(words=12), ids(12, 9), (11,), None),
        (lambda: cut_at(Stem(12, 24)), ids(12, 9), (11,), 24),
        (lambda: cut_at(Stem(12, 9)), ids(12, 9), (11,), 9),
        (lambda: cut_at(Stem(12, 26, offset=2)), ids(12, 9), (11,), 24),
        (lambda: cut_at(OneHot()), ids(20, 9), (19,), None),
        (lambda: cut_at(nn.Embedding(12, WIDTH), Mask()), ids(12, 9), (11,), 33),
        (lambda: cut_at(Columns()), ids(10, 2), (9, 29), None),
        (lambda: cut_at(Numbers()), ids(100, 2), (), None),
    ],
)
def test_ranges_are_found(model: object, x: Tensor, highest: object, longest: object) -> None:
    """From what the model accepts: tables of tokens and positions, one-hot, masks, columns."""
    built = model()  # type: ignore[operator]
    modes = [m.training for m in built.modules()]
    assert find_ranges(built, x) == InputRanges(highest, longest)  # type: ignore[arg-type]
    assert [m.training for m in built.modules()] == modes


def test_the_manifest_says_them(tmp_path: Path) -> None:
    """Wrong data of ``export --data`` are refused before anything is lowered."""
    model, x = cut_at(Stem(12, 24)), ids(12, 9)
    tiers = {"a": Tier(1, precision="int8")}

    def check(x: Tensor) -> LossCheck:
        return LossCheck(Examples(x.numpy(), torch.zeros(len(x), dtype=torch.int64).numpy()), 1)

    for wrong, says in ((ids(12, 9) - 1, "is -1; the model takes 0 to 11"),
                        (ids(12, 25), "texts of 25 tokens; the model takes 24")):  # fmt: skip
        lines: list[str] = []
        with pytest.raises(DataError, match=says):
            export_bundles(
                model, tiers, tmp_path / "out", example=x, classes=4, int8=check(wrong),
                progress=lines.append,
            )  # fmt: skip
        assert lines == []
        assert list(tmp_path.iterdir()) == []
    index = export_bundles(
        model,
        {"a": Tier(1, runtime="torch")},
        tmp_path / "out",
        example=x,
        classes=4,
        verified=False,
    )
    ranges = index.manifest("a").ranges
    assert (ranges.highest, ranges.longest) == ((11,), 24)


def test_classes_are_those_of_the_head(tmp_path: Path) -> None:
    """Auxiliary heads of another width could not be joined with the model's head."""
    for classes in (CLASSES - 1, CLASSES + 1):
        with pytest.raises(ExportError, match="the model's head gives 10 logits"):
            export_bundles(
                token_model(), {"a": Tier(1)}, tmp_path / "out",
                example=example(FEATURES), classes=classes,
            )  # fmt: skip
        with pytest.raises(ExportError, match="the model's head gives 10 logits"):
            Planner(TiersConfig({"a": TierTable()}), token_model(), example(FEATURES), classes)
    assert list(tmp_path.iterdir()) == []


def shared(first: int, last: int) -> SplitModel:
    """A model of five blocks, some of which are one and the same."""
    block = TokenBlock(WIDTH)
    blocks = [block if first <= i <= last else TokenBlock(WIDTH) for i in range(5)]
    return SplitModel(nn.Linear(FEATURES[0], WIDTH), blocks, MeanHead(WIDTH, CLASSES))


def test_layers_that_share_over_the_cut_are_refused(tmp_path: Path) -> None:
    """Each side would train a copy of its own; `plan` finds the cuts that are possible."""
    model = shared(1, 2)
    with pytest.raises(ExportError, match=r"block\.1\..* and block\.2\..* are the same tensor"):
        export_bundles(
            model, {"a": Tier(2), "b": Tier(1)}, tmp_path / "out",
            example=example(FEATURES), classes=CLASSES,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []
    settings = TiersConfig({"a": TierTable()})
    with Planner(settings, model, example(FEATURES), CLASSES) as planner:
        found = planner.plan([1, 2, 3])
    impossible = [cost.tier.cut for cost in found.costs if isinstance(cost, Failure)]
    assert impossible == [2]


@pytest.mark.parametrize("sides", [(0, 1), (2, 4)])
def test_layers_that_share_on_one_side_stay_one(sides: tuple[int, int], tmp_path: Path) -> None:
    """On a device their gradients add up, as in the uncut model."""
    model = shared(*sides)
    export_bundles(
        model, {"a": Tier(2)}, tmp_path / "out", example=example(FEATURES), classes=CLASSES
    )
    names = {entry.spec.name for entry in make_steps(
        segment_of(model, Tier(2)), Tier(2), example(FEATURES), CLASSES, "sgd"
    ).state}  # fmt: skip
    assert ("block.1.wide.weight" in names) == (sides == (2, 4))


def test_what_is_frozen_or_copied_may_be_on_both_sides(tmp_path: Path) -> None:
    """A frozen layer has one value everywhere."""
    frozen, apart = shared(1, 2), shared(1, 2)
    frozen.block[1].requires_grad_(False)
    apart.block[2] = copy.deepcopy(apart.block[1])
    for i, model in enumerate((frozen, apart)):
        export_bundles(
            model, {"a": Tier(2, runtime="torch")}, tmp_path / str(i),
            example=example(FEATURES), classes=CLASSES, verified=False,
        )  # fmt: skip


def test_a_shared_norm_is_found() -> None:
    """Running statistics are trained, too, even without weights."""
    norm = nn.BatchNorm1d(WIDTH, affine=False)
    blocks = [nn.Sequential(nn.Linear(WIDTH, WIDTH), norm) for _ in range(3)]
    model = SplitModel(nn.Linear(FEATURES[0], WIDTH), blocks, MeanHead(WIDTH, CLASSES))
    with pytest.raises(ExportError, match=r"block\.0\.1\.running_mean"):
        check_sharing(model, 1)


def test_attention_has_no_longest_text() -> None:
    """Blocks without a table take any length."""
    model = cut_at(nn.Embedding(12, WIDTH), AttentionBlock(WIDTH))
    assert find_ranges(model, ids(12, 6)).longest is None
