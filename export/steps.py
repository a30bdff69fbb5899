"""Functional steps: what a device does, as pure functions of tensors that can be traced.

Loss, gradients and optimizer update of a client segment become one function
``(state, x, y, hyper) -> (state', loss, correct, packed activations)``. Nothing is kept between
calls, so an inference runtime can run it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from edge_sdk.bundle import Port, StateSpec
from edge_sdk.protocol.tensors import TensorSpec
from export.dropout import SeededDropout
from export.optimizers import Optimizer
from export.packing import Codec
from export.split import ClientSegment, channel_axis, statistics

NO_LABEL = -1
"""Label of a position that does not count: padding, or a token that nothing is asked about."""


@dataclass(frozen=True)
class Step:
    """A traceable step.

    Attributes:
        name: name of the graph.
        function: takes the constants as a dictionary, then tensors in the order of ``inputs``;
            returns a tuple in that of ``outputs``.
        inputs: ports, state first.
        outputs: ports, state first; a state output is called ``next/NAME``.
        constants: tensors that are the same in every call: frozen weights, tables.
        limits: largest size of a symbolic dimension, where there is one.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropy of each row of logits (rows, classes), with as few passes as there can be.

    ``nll_loss`` comes out of ONNX export with gradients that are wrong by a factor of the batch
    size; one-hot times log-softmax is right, but with a vocabulary for classes its backward pass
    takes longer than a transformer block.
    """

    @staticmethod
    def forward(ctx: Any, logits_NC: Tensor, y_N: Tensor) -> Tensor:
        log_p_NC = torch.log_softmax(logits_NC, 1)
        ctx.save_for_backward(log_p_NC, y_N)
        return -log_p_NC.gather(1, y_N.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        log_p_NC, y_N = ctx.saved_tensors
        classes = torch.arange(log_p_NC.shape[1], device=y_N.device)
        onehot_NC = (y_N.unsqueeze(1) == classes).to(log_p_NC.dtype)
        return (log_p_NC.exp() - onehot_NC) * grad_N.unsqueeze(1), None


def _cross_entropy(logits_NC: Tensor, y_N: Tensor) -> Tensor:
    result: Tensor = _CrossEntropy.apply(logits_NC, y_N)  # type: ignore[no-untyped-call]
    return result


def local_loss(logits: Tensor, y: Tensor) -> Tensor:
    """FedSplitX's loss of a device: the sum over its heads of their mean cross-entropy.

    Args:
        logits: (heads, batch, classes), or (heads, batch, positions, vocabulary).
        y: labels (batch,) or (batch, positions); in a text, positions with the label
            :data:`NO_LABEL` do not count.
    """
    heads, rows_N = len(logits), y.reshape(-1)
    counted_N = None
    if y.dim() == 2:
        counted_N = (rows_N >= 0).to(logits.dtype)
        rows_N = rows_N.clamp(min=0)
    all_rows = rows_N if heads == 1 else rows_N.repeat(heads)
    losses_N = _cross_entropy(logits.reshape(-1, logits.shape[-1]), all_rows)
    losses_N = losses_N.reshape(heads, -1).sum(0)
    if counted_N is None:
        return losses_N.mean()
    return (losses_N * counted_N).sum() / counted_N.sum().clamp(min=1)


class ClientSteps:
    """The steps of one client segment.

    Args:
        segment: the segment with its heads.
        optimizer: traced into ``train``.
        codec: traced into all of them; it sees detached activations only.
        example: one input batch, for dtype and shape.
        classes: number of classes; for tokens the size of the vocabulary.
        limits: largest batch (and ``seq``, for tokens) that a graph must take, where there is one.
    """

    def __init__(
        self,
        segment: ClientSegment,
        optimizer: Optimizer,
        codec: Codec,
        example: Tensor,
        classes: int,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.segment, self.optimizer, self.codec = segment, optimizer, codec
        self.classes, self.limits = classes, dict(limits or {})
        self.parameters = {
            n: p.detach().clone() for n, p in segment.named_parameters() if p.requires_grad
        }
        self.statistics = {n: b.detach().clone() for n, b in statistics(segment).items()}
        self.slots = optimizer.slots(self.parameters)
        everything = {**dict(segment.named_parameters()), **dict(segment.named_buffers())}
        self.constants = {
            n: t.detach()
            for n, t in everything.items()
            if n not in self.parameters and n not in self.statistics and not _counts(n)
        }
        self._counters = [n for n in everything if _counts(n)]
        shape: tuple[int | str, ...] = ("batch", *example.shape[1:])
        if segment.task == "tokens" or self._takes_any_length(example):
            shape = ("batch", "seq")
        self.x = TensorSpec("x", _dtype(example), shape)
        self.y = TensorSpec("y", "int64", shape if segment.task == "tokens" else ("batch",))
        with torch.no_grad(), SeededDropout(torch.zeros((), dtype=torch.int64)) as dropout:
            h, _ = self._call(
                training=True,
                tensors={**self.constants, **self.parameters, **_copies(self.statistics)},
                x=example,
            )
        self.seeded = dropout.calls > 0
        self.axis = channel_axis(h, segment.channels_first)
        self.packed = codec.specs(self._symbolic(h, example), self.axis)

    def _takes_any_length(self, example: Tensor) -> bool:
        """Whether the input is a text, and the segment takes shorter ones as well."""
        if example.is_floating_point() or example.dim() != 2 or example.shape[1] < 2:
            return False
        tensors = {**self.constants, **self.initial}
        try:
            with torch.no_grad():
                self._call(False, tensors, example[:, :-1])
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    def _symbolic(self, h: Tensor, example: Tensor) -> tuple[int | str, ...]:
        """The shape of activations, with the symbols of ``x``."""
        seq = ["seq"] if self.x.shape[1:2] == ("seq",) and h.shape[1] == example.shape[1] else []
        return ("batch", *seq, *h.shape[1 + len(seq) :])

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The state in graph order: parameters, statistics of batch norms, optimizer slots."""
        kinds = (
            ("parameter", self.parameters),
            ("statistic", self.statistics),
            ("slot", self.slots),
        )
        return tuple(StateSpec(_spec(n, t), kind) for kind, ts in kinds for n, t in ts.items())

    @property
    def initial(self) -> dict[str, Tensor]:
        """Parameters and statistics to start from."""
        return {**self.parameters, **self.statistics}

    def all(self) -> list[Step]:
        """Every step of the bundle."""
        return [self.predict(), self.train(), self.forward()]

    def predict(self) -> Step:
        """``(parameters, statistics, x) -> logits, packed activations``, in evaluation mode.

        Logits are (heads, batch, classes), or (heads, batch, positions, vocabulary) for tokens.
        """

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            *values, x = tensors
            named = dict(zip(self.initial, values, strict=True))
            h, logits = self._call(False, {**constants, **named}, x)
            return logits, *self._pack(h)

        shape = (len(self.segment.heads), *self.y.shape, self.classes)
        logits = Port(TensorSpec("logits", "float32", shape), "result")
        return self._step("predict", function, self._inputs(), (logits, *self._packed_ports()))

    def forward(self) -> Step:
        """``(parameters, statistics, x) -> packed activations``, in evaluation mode."""

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            *values, x = tensors
            named = dict(zip(self.initial, values, strict=True))
            h, _ = self._call(False, {**constants, **named}, x)
            return self._pack(h)

        return self._step("forward", function, self._inputs(), self._packed_ports())

    def train(self) -> Step:
        """``(state, x, y, hyper) -> state', loss, correct, packed activations``: one local step.

        In training mode: batch norms use the batch and move their statistics, dropouts draw from
        the input ``seed`` if there are any. ``correct`` counts the labels that the mean of the
        heads' softmax gets right.
        """
        hyper_names = list(self.optimizer.hyper)

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            parameters = {n: next(given).detach().requires_grad_() for n in self.parameters}
            moved = {n: next(given).clone() for n in self.statistics}
            slots = {n: next(given) for n in self.slots}
            x, y = next(given), next(given)
            hyper = {n: next(given) for n in hyper_names}
            seed = next(given) if self.seeded else torch.zeros((), dtype=torch.int64)
            with SeededDropout(seed):
                h, logits = self._call(True, {**constants, **parameters, **moved}, x)
            loss = local_loss(logits, y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                new_parameters, new_slots = self.optimizer.step(
                    {n: p.detach() for n, p in parameters.items()},
                    dict(zip(parameters, gradients, strict=True)),
                    slots,
                    hyper,
                )
                return (
                    *new_parameters.values(),
                    *moved.values(),
                    *new_slots.values(),
                    loss.detach(),
                    _correct(logits, y),
                    *self._pack(h),
                )

        state = [entry.spec for entry in self.state]
        inputs = (
            *(Port(spec, "state") for spec in state),
            Port(self.x, "batch"),
            Port(self.y, "batch"),
            *(Port(TensorSpec(n, "float32", ()), "hyper") for n in hyper_names),
            *([Port(TensorSpec("seed", "int64", ()), "seed")] if self.seeded else []),
        )
        outputs = (
            *(Port(TensorSpec(f"next/{s.name}", s.dtype, s.shape), "state") for s in state),
            Port(TensorSpec("loss", "float32", ()), "result"),
            Port(TensorSpec("correct", "float32", ()), "result"),
            *self._packed_ports(),
        )
        return self._step("train", function, inputs, outputs)

    def _step(
        self,
        name: str,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
    ) -> Step:
        return Step(name, function, inputs, outputs, self.constants, self.limits)

    def _call(self, training: bool, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        self.segment.train(training)
        counters = {n: torch.zeros((), dtype=torch.int64) for n in self._counters}
        with _without_onednn():
            result: tuple[Tensor, Tensor] = functional_call(
                self.segment, {**tensors, **counters}, (x,)
            )
        return result

    def _pack(self, h: Tensor) -> tuple[Tensor, ...]:
        parts = self.codec.pack(h, self.axis)
        return tuple(parts[spec.name] for spec in self.packed)

    def _inputs(self) -> tuple[Port, ...]:
        state = (Port(_spec(n, t), "state") for n, t in self.initial.items())
        return (*state, Port(self.x, "batch"))

    def _packed_ports(self) -> tuple[Port, ...]:
        return tuple(Port(spec, "packed") for spec in self.packed)


@contextmanager
def _without_onednn() -> Iterator[None]:
    """LSTM in terms of matrix products: oneDNN's has no translation.

    Its ``flags`` would do the same, and warn of settings for graphics cards.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _correct(logits: Tensor, y: Tensor) -> Tensor:
    scores = torch.softmax(logits, -1).mean(0) if len(logits) > 1 else logits[0]
    return (scores.argmax(-1) == y).to(torch.float32).sum()


def _counts(name: str) -> bool:
    """Whether a buffer counts the batches of a batch norm: nothing we export reads it."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _dtype(tensor), tuple(tensor.shape))
