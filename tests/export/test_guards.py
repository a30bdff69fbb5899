"""Code that decides on a size is refused, unless it decides alike for all sizes of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn

from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.trace import trace
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.predict import forward
from tests.lib.operators import WIDTH, WORDS, Stem


class Apply(nn.Module):
    """A linear layer and a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(WIDTH, WIDTH), function

    def forward(self, h: Tensor) -> Tensor:
        """Activations (batch, positions, width)."""
        return self.function(self.layer(h))


def traced(function: Callable[[Tensor], Tensor], limits: Mapping[str, int] | None = None) -> None:
    """Trace a graph of texts with the function in its block."""
    blocks = [Apply(function), nn.Identity()]
    model = SplitModel(Stem(), blocks, nn.Identity(), channels="last")
    x = torch.randint(WORDS, (8, 6))
    model.add_heads([1], x, 3)
    given = (ClientSegment(model, 1), get_optimizer("sgd"), get_codec("fp16"), x, 3)
    steps = ClientSteps(*given, limits)
    assert steps.x.shape == ("batch", "seq")
    trace(forward(steps))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda h: h * 2 if h.shape[1] > 32 else h, "what is right for seq <= 32, and seq = 33"),
        (lambda h: h * 2 if h.shape[1] >= 3 else h, "what is right for seq >= 3, and seq = 1"),
        (lambda h: h * 2 if h.shape[1] % 2 else h, "and seq = 2 is another case"),
        (lambda h: h * 2 if h.shape[1] == 1 else h, "and seq = 1 is another case"),
        (lambda h: h * 2 if h.shape[1] == 5000 else h, "and seq = 5000 is another case"),
        (lambda h: h * 2 if h.shape[0] == 1 else h, "decides on the batch size"),
        (lambda h: h * 2 if h.shape[0] > 1 else h, "and batch = 1 is another case"),
        (lambda h: h * 2 if h.shape[0] > h.shape[1] else h, "the batch size and the length"),
        (lambda h: h[:, : max(3, h.shape[1])], "decides on the length of the text"),
        (lambda h: h + h.shape[1] // 2 if h.shape[1] // 2 == 2 else h, "decides on the length"),
    ],
)
def test_decisions_on_sizes_are_refused(function: Callable[[Tensor], Tensor], said: str) -> None:
    """The message says which dimension, which condition, where, and what to do."""
    with pytest.raises(ExportError) as caught:
        traced(function)
    assert said in str(caught.value)
    assert "(test_guards.py, line " in str(caught.value)
    assert str(caught.value).endswith("with torch.where or a mask")


@pytest.mark.parametrize(
    ("function", "limits"),
    [
        (lambda h: h if h.shape[1] > 0 else h * 2, {}),
        (lambda h: h if h.shape[0] >= 1 else h * 2, {}),
        (lambda h: h if h.shape[1] <= 64 else h * 2, {"seq": 64}),
        (lambda h: h * 2 if h.shape[1] > 64 else h, {"seq": 64}),
        (lambda h: h if h.shape[0] < 33 else h * 2, {"batch": 32}),
        (lambda h: h + h[:, -1:], {}),
        (lambda h: h + h.flip(1) + h.roll(1, 1), {}),
        (lambda h: h + h.amax(1, keepdim=True), {}),
    ],
)
def test_decisions_that_no_size_changes(
    function: Callable[[Tensor], Tensor], limits: Mapping[str, int]
) -> None:
    """A decision that is the same from 1 to the limit is right in the graph."""
    traced(function, limits)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * int(h.shape[1]),
        lambda h: h.reshape(len(h), -1, WIDTH),
        lambda h: torch.stack([h[:, i] for i in range(h.shape[1])], 1),
    ],
)
def test_sizes_that_are_frozen_at_the_examples(function: Callable[[Tensor], Tensor]) -> None:
    """A number made of a symbolic size would stay in the graph."""
    with pytest.raises(ExportError, match="it fixes the "):
        traced(function)
