"""Functional steps: what a device does, as pure functions of tensors that can be traced.

Loss, gradients and optimizer update of a client segment become one function
``(state, x, y, hyper) -> (state', loss, correct, packed activations)``. Nothing is kept between
calls, so an inference runtime can run it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from edge_sdk.bundle import Port, StateSpec
from edge_sdk.protocol.tensors import TensorSpec
from export.optimizers import Optimizer
from export.packing import Codec
from export.split import ClientSegment


@dataclass(frozen=True)
class Step:
    """A traceable step.

    Attributes:
        name: name of the graph.
        function: takes tensors in the order of ``inputs``, returns a tuple in that of ``outputs``.
        inputs: ports, state first.
        outputs: ports, state first; a state output is called ``next/NAME``.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def local_loss(logits_HBC: Tensor, y: Tensor) -> Tensor:
    """FedSplitX's loss of a device: mean over the batch of the summed cross-entropy of its heads.

    Written as one-hot times log-softmax: ``nll_loss`` comes out of ONNX export with gradients
    that are wrong by a factor of the batch size.
    """
    classes = torch.arange(logits_HBC.shape[-1], device=y.device)
    onehot_BC = (y.unsqueeze(1) == classes).to(logits_HBC.dtype)
    return -(onehot_BC * torch.log_softmax(logits_HBC, -1)).sum((0, 2)).mean()


class ClientSteps:
    """The steps of one client segment.

    Args:
        segment: the segment with its heads.
        optimizer: traced into ``train``.
        codec: traced into all of them; it sees detached activations only.
        example: one input batch, for dtype and shape.
        classes: number of classes.
    """

    def __init__(
        self,
        segment: ClientSegment,
        optimizer: Optimizer,
        codec: Codec,
        example: Tensor,
        classes: int,
    ) -> None:
        self.segment, self.optimizer, self.codec = segment, optimizer, codec
        self.parameters = {n: p.detach().clone() for n, p in segment.named_parameters()}
        self.slots = optimizer.slots(self.parameters)
        with torch.no_grad():
            h, _ = segment(example)
        self.packed = codec.specs(tuple(h.shape[1:]))
        self.x = TensorSpec("x", _dtype(example), ("batch", *example.shape[1:]))
        self.classes = classes

    @property
    def state(self) -> tuple[StateSpec, ...]:
        """The state in graph order: parameters, then optimizer slots."""
        parameters = [StateSpec(_spec(n, p), "parameter") for n, p in self.parameters.items()]
        return (*parameters, *(StateSpec(_spec(n, s), "slot") for n, s in self.slots.items()))

    def all(self) -> list[Step]:
        """Every step of the bundle."""
        return [self.predict(), self.train(), self.forward()]

    def predict(self) -> Step:
        """``(parameters, x) -> logits (heads, batch, classes), packed activations``."""

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            *values, x = tensors
            h, logits_HBC = self._call(dict(zip(self.parameters, values, strict=True)), x)
            return logits_HBC, *self._pack(h)

        logits = TensorSpec("logits", "float32", (len(self.segment.heads), "batch", self.classes))
        return Step(
            "predict", function, self._inputs(), (Port(logits, "result"), *self._packed_ports())
        )

    def forward(self) -> Step:
        """``(parameters, x) -> packed activations``."""

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            *values, x = tensors
            h, _ = self._call(dict(zip(self.parameters, values, strict=True)), x)
            return self._pack(h)

        return Step("forward", function, self._inputs(), self._packed_ports())

    def train(self) -> Step:
        """``(state, x, y, hyper) -> state', loss, correct, packed activations``: one local step.

        ``correct`` counts the rows that the mean of the heads' softmax gets right.
        """
        names, slot_names = list(self.parameters), list(self.slots)
        hyper_names = list(self.optimizer.hyper)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            parameters = {n: next(given).detach().requires_grad_() for n in names}
            slots = {n: next(given) for n in slot_names}
            x, y = next(given), next(given)
            hyper = {n: next(given) for n in hyper_names}
            h, logits_HBC = self._call(parameters, x)
            loss = local_loss(logits_HBC, y)
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            with torch.no_grad():
                new_parameters, new_slots = self.optimizer.step(
                    {n: p.detach() for n, p in parameters.items()},
                    dict(zip(names, gradients, strict=True)),
                    slots,
                    hyper,
                )
                answers = torch.softmax(logits_HBC, -1).mean(0).argmax(-1)
                correct = (answers == y).to(torch.float32).sum()
                return (
                    *new_parameters.values(),
                    *new_slots.values(),
                    loss.detach(),
                    correct,
                    *self._pack(h),
                )

        state = [entry.spec for entry in self.state]
        inputs = (
            *(Port(spec, "state") for spec in state),
            Port(self.x, "batch"),
            Port(TensorSpec("y", "int64", ("batch",)), "batch"),
            *(Port(TensorSpec(n, "float32", ()), "hyper") for n in hyper_names),
        )
        outputs = (
            *(Port(TensorSpec(f"next/{s.name}", s.dtype, s.shape), "state") for s in state),
            Port(TensorSpec("loss", "float32", ()), "result"),
            Port(TensorSpec("correct", "float32", ()), "result"),
            *self._packed_ports(),
        )
        return Step("train", function, inputs, outputs)

    def _call(self, parameters: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = functional_call(self.segment, parameters, (x,))
        return result

    def _pack(self, h: Tensor) -> tuple[Tensor, ...]:
        parts = self.codec.pack(h)
        return tuple(parts[spec.name] for spec in self.packed)

    def _inputs(self) -> tuple[Port, ...]:
        parameters = (Port(_spec(n, p), "state") for n, p in self.parameters.items())
        return (*parameters, Port(self.x, "batch"))

    def _packed_ports(self) -> tuple[Port, ...]:
        return tuple(Port(spec, "packed") for spec in self.packed)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _dtype(tensor), tuple(tensor.shape))
