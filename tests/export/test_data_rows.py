"""Graphs are verified on rows of the user's data: in the dtypes of the graphs, and with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_sdk.errors import DataError
from edge_sdk.training.data import Examples
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import ClientSegment, SplitModel
from export.lowering.verification.draws import Rows
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from tests.lib.harness import examples
from tests.lib.models import CLASSES, IMAGE, build, example

POSITIONS = 5
"""Positions of the texts."""


def exported(data: Examples, out: Path) -> None:
    """Export the model of images for a tier, verified on the data."""
    tiers = {"a": Tier(1)}
    export_bundles(build(), tiers, out, example=example(IMAGE), classes=CLASSES, data=data)


def test_data_in_other_dtypes_are_converted(tmp_path: Path) -> None:
    """As on devices: float64 inputs and int32 labels are data of the model."""
    good = examples(8)
    exported(Examples(good.x.astype(np.float64), good.y.astype(np.int32)), tmp_path / "out")
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("change", ["x has shape", "is nan", "is the label 10"])
def test_data_that_do_not_fit_are_refused(change: str, tmp_path: Path) -> None:
    """Without a tier of int8, too; nothing is written."""
    good = examples(4)
    x, y = good.x.copy(), good.y.copy()
    if change == "x has shape":
        x = x[:, :, :3]
    elif change == "is nan":
        x[2, 0, 1, 1] = np.nan
    else:
        y[3] = 10
    with pytest.raises(DataError, match=change):
        exported(Examples(x, y), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def steps() -> ClientSteps:
    """Steps of any segment: rows are drawn alike for all."""
    model: SplitModel = build()
    model.add_heads([1], example(IMAGE), CLASSES)
    given = (get_optimizer("sgd"), get_codec("fp16"), example(IMAGE), CLASSES)
    return ClientSteps(ClientSegment(model, 1), *given)


@pytest.mark.parametrize("length", [1, 3, POSITIONS, 12])
def test_a_text_that_is_cut_keeps_a_label(length: int, steps: ClientSteps) -> None:
    """Prompts have no labels. A draw without any would have no loss to compare."""
    x = torch.arange(4 * POSITIONS).reshape(4, POSITIONS)
    y = torch.full_like(x, -1)
    y[0, -1], y[1, 2:], y[3, 0] = 70, torch.tensor([71, 72, 73]), 74
    generator = torch.Generator().manual_seed(0)
    drawn, labels = Rows(x, y).draw(steps, 40, length, generator)
    assert labels is not None
    assert drawn.shape == labels.shape == (40, length)
    assert (labels >= 0).any(1).all()
    assert torch.equal(labels, y.flatten()[drawn])  # tokens are numbers of places
    assert set((drawn[:, 0] // POSITIONS).tolist()) == {0, 1, 3}


def test_labels_of_whole_texts_stay_with_their_texts(steps: ClientSteps) -> None:
    """A text with one label is cut or repeated from its beginning."""
    x = torch.arange(4 * POSITIONS).reshape(4, POSITIONS)
    generator = torch.Generator().manual_seed(0)
    drawn, labels = Rows(x, torch.arange(4)).draw(steps, 20, 7, generator)
    assert labels is not None
    assert torch.equal(drawn[:, 0], labels * POSITIONS)
    assert torch.equal(drawn[:, 5], drawn[:, 0])
