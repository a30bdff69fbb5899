"""Functional steps: training and inference of a client segment as pure, traceable functions.

Loss, gradients and optimizer update become one function
``(state, x, y, hyper) -> (state', loss, correct, packed activations)``. It keeps nothing between
calls, so an inference runtime can run it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port, StateSpec
from edge_sdk.bundle.ranges import MAX_POSITIONS, Ranges
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import has_dual_norms, noise_tensors, robustness
from export.cutting.channels import channel_axis
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment, statistics
from export.errors import ExportError
from export.packing.codecs import Codec
from export.steps.losses import correct, local_loss, masked
from export.steps.optimizers import Optimizer
from export.tensor_names import in_head, is_below_heads

ROBUSTNESS = Port(TensorSpec("robustness", "float32", ()), "hyper")
"""Weight of the noise norms, from 0 to 1."""


@dataclass(frozen=True)
class Step:
    """A traceable step.

    Attributes:
        name: name of the graph.
        function: takes the constants by name, then tensors in the order of ``inputs``; returns
            tensors in the order of ``outputs``.
        inputs: ports, state first.
        outputs: ports, state first; a state output is called ``next/NAME``.
        constants: tensors that are the same in every call, such as frozen weights.
        limits: upper bounds of symbolic dimensions by name, if there are any.
    """

    name: str
    function: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


class ClientSteps:
    """The steps of one client segment.

    Args:
        segment: the segment with its heads.
        optimizer: optimizer of the training graphs.
        codec: codec of the activations, which are detached before packing.
        example: inputs (batch, ...), for dtype and shape.
        classes: number of classes; for tokens the size of the vocabulary.
        limits: upper bounds of ``batch``, and of ``seq`` for tokens, if there are any.
        returned: whether the hub returns gradients: adds ``activate`` and ``backward``.
        fused: whether returned gradients are fused with those of the heads: adds ``activate`` and
            ``fuse``.
        distill: weight of the distillation between heads, see
            :func:`export.steps.losses.local_loss`.
        bases: number of base networks, of which the segment is one; 0 for an ordinary model. Adds
            ``mix_N``, and the class mask ``present`` (classes,) as an input of training graphs.
        adversarial: whether the device trains on adversarial examples, through the noise norms if
            the segment has dual norms: adds ``attack`` and ``harden``.
        highest: largest values of an integer ``x``, see :class:`edge_sdk.bundle.ranges.Ranges`.

    Raises:
        ExportError: ``distill`` is not a number from 0 up; or gradients are returned and every
            parameter below the heads is frozen.
    """

    def __init__(
        self,
        segment: ClientSegment,
        optimizer: Optimizer,
        codec: Codec,
        example: Tensor,
        classes: int,
        limits: Mapping[str, int] | None = None,
        *,
        returned: bool = False,
        fused: bool = False,
        distill: float = 0.0,
        bases: int = 0,
        adversarial: bool = False,
        highest: tuple[int, ...] = (),
    ) -> None:
        if not 0 <= distill < math.inf:
            raise ExportError(f"distill is {distill}; the weight must be 0 or more")
        self.segment, self.optimizer, self.codec = segment, optimizer, codec
        self.classes, self.limits = classes, dict(limits or {})
        self.returned, self.fused, self.distill = returned, fused, distill
        self.bases, self.adversarial, self.highest = bases, adversarial, highest
        self.dual = has_dual_norms(segment)
        self.parameters = {
            n: p.detach().clone() for n, p in segment.named_parameters() if p.requires_grad
        }
        self.statistics = {n: b.detach().clone() for n, b in statistics(segment).items()}
        self.noise = {n for n in self.parameters if n in noise_tensors(segment)}
        self.slots = optimizer.slots(self.parameters)
        if (returned or fused) and not any(is_below_heads(name) for name in self.parameters):
            raise ExportError(
                "returned gradients have nothing to train: every parameter before cut "
                f"{segment.cut} is frozen; cut deeper, or leave out returned and fused"
            )
        everything = {**dict(segment.named_parameters()), **dict(segment.named_buffers())}
        self.constants = {
            n: t.detach()
            for n, t in everything.items()
            if n not in self.parameters and n not in self.statistics and not _counts(n)
        }
        self._counters = [n for n in everything if _counts(n)]
        self._blocks = _Blocks(segment)
        self.head = _Head(segment) if segment.features is not None else None
        self._modules = list(segment.modules())
        self._tied = _tied(segment)
        shape: tuple[int | str, ...] = ("batch", *example.shape[1:])
        if segment.task == "tokens" or self._takes_any_length(example):
            shape = ("batch", "seq")
        self.x = TensorSpec("x", _dtype(example), shape)
        self.y = TensorSpec("y", "int64", shape if segment.task == "tokens" else ("batch",))
        with torch.no_grad(), SeededDropout(torch.zeros((), dtype=torch.int64)) as dropout:
            h, _ = self.call(
                training=True,
                tensors={**self.constants, **self.parameters, **_copies(self.statistics)},
                x=example,
            )
        self.seeded = dropout.calls > 0
        self.axis = channel_axis(h, segment.channels)
        self.packed = codec.specs(self._symbolic(h, example), self.axis)
        self.features: tuple[TensorSpec, ...] = ()
        if segment.features is not None:
            with torch.no_grad():
                deep = segment.features(example)
            self.features_axis = channel_axis(deep, segment.feature_channels)
            self.features = codec.specs(self._symbolic(deep, example), self.features_axis)

    def _takes_any_length(self, example: Tensor) -> bool:
        """Whether inputs are texts, and the segment also accepts shorter ones."""
        if example.is_floating_point() or example.dim() != 2 or example.shape[1] < 2:
            return False
        tensors = {**self.constants, **self.initial}
        try:
            with torch.no_grad():
                self.call(False, tensors, example[:, :-1])
        except (RuntimeError, ValueError, IndexError):
            return False
        return True

    def _symbolic(self, h: Tensor, example: Tensor) -> tuple[int | str, ...]:
        """The shape of activations with the symbolic dimensions of ``x``."""
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
    def ranges(self) -> Ranges:
        """What examples may hold."""
        longest = self.limits.get("seq", MAX_POSITIONS)
        return Ranges(self.x, self.segment.task, self.classes, self.highest, longest)

    @property
    def initial(self) -> dict[str, Tensor]:
        """Initial parameters and statistics by name."""
        return {**self.parameters, **self.statistics}

    def predict(self) -> Step:
        """``(parameters, statistics, x) -> logits, packed activations``, in evaluation mode.

        Logits are (heads, batch, classes), or (heads, batch, positions, vocabulary) for tokens.
        """

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            named = {n: next(given) for n in self.initial}
            x = next(given)
            with self.robust(given):
                h, logits = self.call(False, {**constants, **named}, x)
            return logits, *self.pack(h)

        inputs = (*self.inputs(), *self.robustness_port())
        return self.step("predict", function, inputs, (self.logits_port(), *self.packed_ports()))

    def forward(self) -> Step:
        """``(parameters, statistics, x) -> packed activations``, in evaluation mode."""

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            *values, x = tensors
            named = dict(zip(self.initial, values, strict=True))
            h, _ = self.call(False, {**constants, **named}, x)
            return self.pack(h)

        return self.step("forward", function, self.inputs(), self.packed_ports())

    def train(self) -> Step:
        """``(state, x, y, hyper) -> state', loss, correct, packed activations``: one local step.

        The segment runs in training mode: batch norms use the batch and update their running
        statistics, and dropouts draw their masks from the input ``seed``. ``correct`` is the
        number of labels that the mean of the heads' softmax predicts.
        """
        hyper_names = list(self.optimizer.hyper)

        def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            parameters = {n: next(given).detach().requires_grad_() for n in self.parameters}
            moved = {n: next(given).clone() for n in self.statistics}
            slots = {n: next(given) for n in self.slots}
            x, y = next(given), next(given)
            present = [next(given) for _ in self.present_port()]
            hyper = {n: next(given) for n in hyper_names}
            with self.seeded_by(given):
                h, logits = self.call(True, {**constants, **parameters, **moved}, x)
            logits = masked(logits, *present)
            loss = local_loss(logits, y, self.distill)
            trained = [n for n in parameters if not in_head(n) and n not in self.noise]
            gradients = torch.autograd.grad(loss, [parameters[n] for n in trained])
            found = dict(zip(trained, gradients, strict=True))
            state = self.stepped(parameters, found, moved, slots, hyper)
            return *state, loss.detach(), correct(logits, y), *self.pack(h)

        inputs = self.training_inputs(Port(self.y, "batch"), *self.present_port())
        outputs = (
            *self.next_state(),
            *self.results(),
            *self.packed_ports(),
        )
        return self.step("train", function, inputs, outputs)

    def stepped(
        self,
        parameters: dict[str, Tensor],
        gradients: dict[str, Tensor],
        moved: dict[str, Tensor],
        slots: dict[str, Tensor],
        hyper: dict[str, Tensor],
    ) -> tuple[Tensor, ...]:
        """The state after an optimizer step, in graph order.

        Args:
            parameters: all parameters by name.
            gradients: gradients by name; parameters without one stay.
            moved: new running statistics.
            slots: optimizer slots before the step.
            hyper: hyper-parameters of the optimizer.
        """
        with torch.no_grad():
            new_parameters, new_slots = self.optimizer.step(
                {n: parameters[n].detach() for n in gradients}, gradients, slots, hyper
            )
            results = {n: p.detach() for n, p in parameters.items()} | new_parameters
            results |= moved | slots | new_slots
            return tuple(results[entry.spec.name] for entry in self.state)

    def step(
        self,
        name: str,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: tuple[Port, ...],
        outputs: tuple[Port, ...],
    ) -> Step:
        """A step with the constants and limits of the segment."""
        return Step(name, function, inputs, outputs, self.constants, self.limits)

    def call(self, training: bool, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and logits of the segment with the given tensors."""
        result: tuple[Tensor, Tensor] = self.apply(self.segment, training, tensors, x)
        return result

    def activations(self, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        """Activations at the cut in training mode, without the heads."""
        h: Tensor = self.apply(self._blocks, True, tensors, x)
        return h

    def apply(
        self, module: nn.Module, training: bool, tensors: dict[str, Tensor], x: Tensor
    ) -> Any:
        """Call a module with the given tensors; its own tensors and its mode stay.

        Args:
            module: the segment, its blocks or its head.
            training: whether the module runs in training mode.
            tensors: parameters and buffers by name.
            x: input of the module.
        """
        given = tensors | {n: torch.zeros((), dtype=torch.int64) for n in self._counters}
        given |= {name: given[first] for name, first in self._tied.items()}
        children = dict(module.named_children())
        given = {n: t for n, t in given.items() if n.partition(".")[0] in children}
        modes = [(part, part.training) for part in self._modules]
        try:
            module.train(training)  # a module may override train(), as a frozen batch norm does
            return functional_call(module, given, (x,), tie_weights=False)
        finally:
            for part, mode in modes:
                part.training = mode

    def seeded_by(self, given: Iterator[Tensor]) -> AbstractContextManager[object]:
        """Context in which dropouts draw their masks from the next input, if there are any."""
        return SeededDropout(next(given)) if self.seeded else nullcontext()

    def pack(self, h: Tensor) -> tuple[Tensor, ...]:
        """Packed activations, in the order of ``packed``."""
        parts = self.codec.pack(h, self.axis)
        return tuple(parts[spec.name] for spec in self.packed)

    def inputs(self) -> tuple[Port, ...]:
        """Ports of parameters, statistics and ``x``."""
        state = (Port(_spec(n, t), "state") for n, t in self.initial.items())
        return (*state, Port(self.x, "batch"))

    def training_inputs(
        self, *given: Port, own: tuple[str, ...] = (), x: bool = True
    ) -> tuple[Port, ...]:
        """Ports of state, ``x``, further inputs, hyper-parameters and seed.

        Args:
            given: ports between ``x`` and the hyper-parameters.
            own: names of hyper-parameters besides those of the optimizer.
            x: whether the step takes ``x``.
        """
        hyper = [*self.optimizer.hyper, *own]
        return (
            *(Port(entry.spec, "state") for entry in self.state),
            *((Port(self.x, "batch"),) if x else ()),
            *given,
            *(Port(TensorSpec(n, "float32", ()), "hyper") for n in hyper),
            *self.seed_port(),
        )

    def logits_port(self) -> Port:
        """Port of the logits (heads, batch, classes), or (heads, batch, positions, vocabulary)."""
        shape = (len(self.segment.heads), *self.y.shape, self.classes)
        return Port(TensorSpec("logits", "float32", shape), "result")

    def results(self) -> tuple[Port, ...]:
        """Ports of ``loss`` and ``correct``."""
        return tuple(Port(TensorSpec(n, "float32", ()), "result") for n in ("loss", "correct"))

    def present_port(self) -> tuple[Port, ...]:
        """Port of the class mask; empty if training graphs take none."""
        masks = self.bases > 0 and self.segment.task == "classes"
        return (Port(TensorSpec("present", "float32", (self.classes,)), "batch"),) if masks else ()

    def robustness_port(self) -> tuple[Port, ...]:
        """Port of the robustness; empty without dual norms."""
        return (ROBUSTNESS,) if self.dual else ()

    def robust(self, given: Iterator[Tensor]) -> AbstractContextManager[None]:
        """Context in which the next input is the robustness, if there are dual norms."""
        return robustness(next(given)) if self.dual else nullcontext()

    def seed_port(self) -> tuple[Port, ...]:
        """Port of the seed; empty without dropout."""
        return (Port(TensorSpec("seed", "int64", ()), "seed"),) if self.seeded else ()

    def next_state(self) -> tuple[Port, ...]:
        """Ports of the new state, ``next/NAME``."""
        specs = (entry.spec for entry in self.state)
        return tuple(Port(replace(s, name=f"next/{s.name}"), "state") for s in specs)

    def packed_ports(self) -> tuple[Port, ...]:
        """Ports of the packed activations."""
        return tuple(Port(spec, "packed") for spec in self.packed)


class _Blocks(nn.Module):
    """A segment without its heads, under the same names."""

    def __init__(self, segment: ClientSegment) -> None:
        super().__init__()
        self.stem, self.block = segment.stem, segment.block

    def forward(self, x: Tensor) -> Tensor:
        """Activations at the cut."""
        h: Tensor = self.stem(x)
        for block in self.block:
            h = block(h)
        return h


class _Head(nn.Module):
    """The model's head on a U-shaped segment, under the same names."""

    def __init__(self, segment: ClientSegment) -> None:
        super().__init__()
        self.head = segment.head

    def forward(self, h: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(h)
        return logits


def _counts(name: str) -> bool:
    """Whether a buffer counts the batches of a batch norm; exported graphs do not read it."""
    return name.rpartition(".")[2] == "num_batches_tracked"


def _tied(module: nn.Module) -> dict[str, str]:
    """First name of each tied tensor by its further names; a shared module has one path."""
    first: dict[int, str] = {}
    names = {
        name: first.setdefault(id(tensor), name)
        for path, part in module.named_modules()
        for own in (part.named_parameters, part.named_buffers)
        for name, tensor in own(path, recurse=False, remove_duplicate=False)
    }
    return {name: other for name, other in names.items() if name != other}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in tensors.items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _dtype(tensor), tuple(tensor.shape))
