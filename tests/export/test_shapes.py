"""Which axes of activations are the batch and the length of a text."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from export.cutting.split_model import ClientSegment, SplitModel, Task
from export.errors import ExportError
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.shapes import find_shapes

WORDS = 12


class Turned(nn.Module):
    """Channels before positions, for convolutions."""

    def forward(self, h_BTC: Tensor) -> Tensor:
        return h_BTC.transpose(1, 2)


class Largest(nn.Module):
    """Largest value over the positions, then Linear."""

    def __init__(self, width: int, last: bool) -> None:
        super().__init__()
        self.out, self.last = nn.Linear(width, 3), last

    def forward(self, h: Tensor) -> Tensor:
        return self.out(h.amax(1 if self.last else 2))


def text_cnn(width: int, padding: int = 1, stride: int = 1) -> SplitModel:
    """A text CNN: (batch, channels, positions) between its blocks."""
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Embedding(WORDS, width), Turned())
    blocks = [
        nn.Sequential(nn.Conv1d(width, width, 3, stride, padding), nn.ReLU()) for _ in range(2)
    ]
    return SplitModel(stem, blocks, Largest(width, last=False))


class Words(nn.Module):
    """Embeds tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)

    def forward(self, x_BT: Tensor) -> Tensor:
        h: Tensor = self.embedding(x_BT)
        return h


class OverPositions(nn.Module):
    """A convolution over (batch, positions, channels)."""

    def __init__(self, width: int, padding: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, stride, padding)

    def forward(self, h_BTC: Tensor) -> Tensor:
        return torch.relu(self.conv(h_BTC.transpose(1, 2)).transpose(1, 2))


def text_rows(width: int, padding: int = 1, stride: int = 1, task: Task = "classes") -> SplitModel:
    """A text CNN with (batch, positions, channels) between its blocks."""
    torch.manual_seed(0)
    blocks = [OverPositions(width, padding, stride) for _ in range(2)]
    head = nn.Linear(width, WORDS) if task == "tokens" else Largest(width, last=True)
    return SplitModel(Words(width), blocks, head, task)


def steps_of(model: SplitModel, length: int) -> ClientSteps:
    x = torch.randint(WORDS, (4, length), generator=torch.Generator().manual_seed(0))
    classes = WORDS if model.task == "tokens" else 3
    model.add_heads([1], x, classes)
    return ClientSteps(ClientSegment(model, 1), get_optimizer("sgd"), get_codec("int8"), x, classes)


@pytest.mark.parametrize("width", [16, 64, 63, 32, 31])
def test_a_length_that_looks_like_the_channels_is_not_taken_for_them(width: int) -> None:
    """With channels first the length is that of the example, however many channels there are."""
    steps = steps_of(text_cnn(width), 64)
    assert steps.x.shape == ("batch", 64)
    assert steps.packed[0].shape == ("batch", width, 64)
    rows = steps_of(text_rows(width), 64)
    assert rows.x.shape == ("batch", "seq")
    assert rows.packed[0].shape == ("batch", "seq", width)


@pytest.mark.parametrize(("padding", "stride", "after"), [(0, 1, 62), (1, 2, 32)])
@pytest.mark.parametrize("build", [text_cnn, text_rows])
def test_another_length_behind_a_layer_fixes_the_length(
    build: Callable[..., SplitModel], padding: int, stride: int, after: int
) -> None:
    """``seq`` - 2 and ``seq`` / 2 have no symbol: the model is exported for texts of one length."""
    steps = steps_of(build(16, padding, stride), 64)
    assert steps.x.shape == ("batch", 64)
    wanted = ("batch", 16, after) if build is text_cnn else ("batch", after, 16)
    assert steps.packed[0].shape == wanted


def test_a_model_of_tokens_must_keep_the_positions() -> None:
    """It has a label for each position, so the length cannot change."""
    assert steps_of(text_rows(16, task="tokens"), 8).packed[0].shape == ("batch", "seq", 16)
    with pytest.raises(ExportError, match=r"are \[1, 6, 16\] for a text of 8 positions"):
        steps_of(text_rows(16, padding=0, task="tokens"), 8)


def test_a_result_that_does_not_depend_on_the_length() -> None:
    x = torch.zeros(2, 9, dtype=torch.int64)
    shapes = find_shapes(lambda x: [x.float().sum(1, keepdim=True).expand(-1, 9)], x, "classes")
    assert (shapes.x, shapes.outputs) == (("batch", "seq"), (("batch", 9),))


def test_columns_that_are_read_one_by_one_have_no_other_length() -> None:
    x = torch.zeros(2, 9, dtype=torch.int64)
    shapes = find_shapes(lambda x: [x[:, [0, 8]].float()], x, "classes")
    assert (shapes.x, shapes.outputs) == (("batch", 9), (("batch", 2),))


@pytest.mark.parametrize(
    "run",
    [
        lambda x: [x @ x.T],
        lambda x: [x.flatten()[:, None]],
        lambda x: [x.expand(2, -1) if len(x) == 1 else x],
    ],
)
def test_another_axis_than_the_first_may_not_depend_on_the_batch(
    run: Callable[[Tensor], list[Tensor]],
) -> None:
    with pytest.raises(ExportError, match="only the first axis may depend on the batch"):
        find_shapes(run, torch.zeros(4, 5), "classes")
