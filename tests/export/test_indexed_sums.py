"""Gradients that add up at indices are right on several threads of ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from export.cutting.split_model import ClientSegment, SplitModel
from export.lowering.decompositions import indexing
from export.lowering.graph_files import lower
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.train import train
from tests.lib.operators import Case, steps_of, vectors

WORDS, WIDE, ROWS, LENGTH, STEPS = 100, 256, 32, 128, 60


class Table(nn.Module):
    """A stem that only looks up tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDE)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions) -> (batch, positions, width)."""
        h: Tensor = self.embedding(x)
        return h


def test_an_embedding_trains_right_on_two_threads() -> None:
    """Every one of 60 steps on 4,096 tokens gives the table that eager PyTorch gives."""
    torch.manual_seed(0)
    model = SplitModel(Table(), [nn.Identity(), nn.Identity()], nn.Identity())
    x, y = torch.randint(WORDS, (ROWS, LENGTH)), torch.randint(3, (ROWS,))
    model.add_heads([1], x, 3)
    segment = ClientSegment(model, 1)
    steps = ClientSteps(segment, get_optimizer("sgd"), get_codec("fp16"), x, 3)
    data = lower("onnx", [train(steps)], {}).files["train"]
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    table = model.stem.embedding.weight
    loss = nn.functional.cross_entropy(segment(x)[1][0], y)
    (change,) = torch.autograd.grad(loss, [table])
    feeds = {n: t.numpy() for n, t in (steps.initial | steps.slots).items()}
    hyper = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    feeds |= {"x": x.numpy(), "y": y.numpy()}
    feeds |= {n: np.asarray(v, np.float32) for n, v in hyper.items()}
    want, bound = (table - change).detach().numpy(), 1e-3 * change.abs().max().item()
    name = "next/stem.embedding.weight"
    wrong = sum(
        bool(np.abs(session.run([name], feeds)[0] - want).max() > bound) for _ in range(STEPS)
    )
    assert wrong == 0


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield all nodes of a graph and of its inner graphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


PLACES = torch.tensor([0, 1, 1, 2, 3, 3, 3, 0])

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "index": lambda h: h[:, PLACES],
    "index of two dimensions": lambda h: h.view(-1, 2, 4)[:, PLACES % 2, PLACES],
    "index_select": lambda h: h.index_select(1, PLACES),
    "repeat_interleave": lambda h: h.repeat_interleave(PLACES, 1),
    "gather": lambda h: h.gather(1, (h > 0).long()),
    "take": lambda h: torch.take(h, (h > 0).long()),
    "put": lambda h: torch.zeros(2, 2).put((h > 0).long(), h, accumulate=True)[0, :1] + h,
    "index_put": lambda h: (
        h.new_zeros(4, h.shape[0]).index_put((PLACES,), h.t(), accumulate=True).t()
    ),
    "index_add": lambda h: h.new_zeros(h.shape[0], 4).index_add(1, PLACES, h),
    "index_add in place": lambda h: h.new_zeros(h.shape[0], 4).index_add_(1, PLACES, h),
    "scatter_add": lambda h: torch.zeros_like(h).scatter_add(1, (h > 0).long(), h),
    "scatter_reduce": lambda h: torch.zeros_like(h).scatter_reduce(1, (h > 0).long(), h, "sum"),
    "bilinear": lambda h: nn.functional.interpolate(
        h.view(-1, 1, 2, 4), scale_factor=1.5, mode="bilinear"
    ).flatten(1),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_sum_at_indices_runs_on_several_threads(name: str) -> None:
    """ScatterND adds on several threads without atomics; ScatterElements runs on one."""
    steps, _ = steps_of(Case("", "", vectors(FUNCTIONS[name])), "onnx")
    data = lower("onnx", [train(steps)], {}).files["train"]
    nodes = [n for n in nodes_of(onnx.load_model_from_string(data).graph) if "Scatter" in n.op_type]
    assert {n.op_type for n in nodes} == {"ScatterElements"}


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.lists(st.booleans(), min_size=4, max_size=4),
    st.integers(0, 2**31),
)
def test_index_put(shape: list[int], indexed: list[bool], seed: int) -> None:
    """Equal indices add up, negative ones count from the end, and indices are broadcast."""
    generator = torch.Generator().manual_seed(seed)
    indexed = indexed[: len(shape)]
    indices = [
        torch.randint(-n, n, (2, 3) if i % 2 else (3,), generator=generator) if at else None
        for i, (n, at) in enumerate(zip(shape, indexed, strict=True))
    ]
    if not any(indexed):
        return
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    values = torch.randn(x[tuple(slice(None) if i is None else i for i in indices)].shape,
                         generator=generator, dtype=torch.float64)  # fmt: skip
    want = torch.ops.aten.index_put(x, indices, values, True)
    torch.testing.assert_close(indexing.index_put(x, indices, values, True), want)


@pytest.mark.parametrize("accumulate", [False, True])
def test_put(accumulate: bool) -> None:
    """Places count in the flattened tensor, also from the end."""
    x, source = torch.randn(3, 4), torch.randn(2, 3)
    index = torch.tensor([[0, -1, 5], [2, 7, -1 if accumulate else 3]])
    want = torch.ops.aten.put(x, index, source, accumulate)
    torch.testing.assert_close(indexing.put(x, index, source, accumulate), want)
