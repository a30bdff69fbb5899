"""What the steps of a client segment have in common: its tensors, its ports and its calls.

Loss, gradients and optimizer update of a device become one function of tensors,
``(state, x, y, hyper) -> (state', loss, correct, packed activations)``. It keeps nothing between
calls, so an inference runtime can run it. The families of graphs are the other modules of this
package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port, StateSpec
from edge_sdk.bundle.ranges import MAX_POSITIONS, Ranges
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import has_dual_norms, noise_tensors, robustness
from export.cutting.channels import channel_axis
from export.cutting.checks import is_recurrent
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment, statistics
from export.errors import ExportError
from export.packing.codecs import Codec
from export.steps.clipping import MAX_NORM, clipped
from export.steps.graph_names import with_needed
from export.steps.optimizers import Optimizer
from export.steps.shapes import find_shapes
from export.steps.step import Step, Tensors
from export.steps.weight_decay import decayed_names
from export.tensor_names import WAITING, is_below_heads

ROBUSTNESS = Port(TensorSpec("robustness", "float32", ()), "hyper")
"""Weight of the noise norms, from 0 to 1."""


class ClientSteps:
    """The common part of the steps of one client segment.

    Args:
        segment: the segment with its heads.
        optimizer: optimizer of the training graphs.
        codec: codec of the activations, which are detached before packing.
        example: inputs (batch, ...), for dtype and shape.
        classes: number of classes; for tokens the size of the vocabulary.
        limits: upper bounds of ``batch``, and of ``seq`` for tokens, if there are any.
        graphs: names of the optional graphs, see :data:`export.steps.graph_names.NEEDS`; those
            that they need are added.
        distill: weight of the distillation between heads, see
            :func:`export.steps.losses.local_loss`.
        bases: number of base networks, of which the segment is one; 0 for an ordinary model. Adds
            ``mix_N``, and the class mask ``present`` (classes,) as an input of training graphs.
        highest: largest values of an integer ``x``, see :class:`edge_sdk.bundle.ranges.Ranges`.
        decay: which parameters weight decay applies to, see
            :func:`export.steps.weight_decay.decayed_names`.

    Attributes:
        clip: clips the gradients of a step by their global norm.

    Raises:
        ExportError: ``decay`` is unknown; ``distill`` is not a number from 0 up; or gradients are
            returned and every parameter below the heads is frozen.
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
        graphs: Iterable[str] = (),
        distill: float = 0.0,
        bases: int = 0,
        highest: tuple[int, ...] = (),
        decay: str = "matrices",
    ) -> None:
        if not 0 <= distill < math.inf:
            raise ExportError(f"distill is {distill}; the weight must be 0 or more")
        self.segment, self.optimizer, self.codec = segment, optimizer, codec
        self.classes, self.limits = classes, dict(limits or {})
        self.graphs = with_needed(graphs)
        self.distill, self.bases, self.highest = distill, bases, highest
        self.dual = has_dual_norms(segment)
        self.parameters = {
            n: p.detach().clone() for n, p in segment.named_parameters() if p.requires_grad
        }
        self.statistics = {n: b.detach().clone() for n, b in statistics(segment).items()}
        self.noise = {n for n in self.parameters if n in noise_tensors(segment)}
        self.decayed = decayed_names(segment, decay)
        self.clip: Callable[[Tensors, Tensor], Tensors] = clipped
        self.waiting = _waiting(segment) if "backward" in self.graphs else {}
        """For each tensor that the stem and the head on the device share, the slot in which the
        head's part of its gradient waits for the part of the stem."""
        self.slots = optimizer.slots(self.parameters) | {
            slot: torch.zeros_like(self.parameters[n]) for n, slot in self.waiting.items()
        }
        below = any(is_below_heads(name) for name in self.parameters)
        if self.graphs & {"backward", "fuse"} and not below:
            raise ExportError(
                "returned gradients have nothing to train: every parameter before cut "
                f"{segment.cut} is frozen; cut deeper, or leave backward and fuse out of graphs"
            )
        everything = {**dict(segment.named_parameters()), **dict(segment.named_buffers())}
        self.constants = {
            n: t.detach()
            for n, t in everything.items()
            if n not in self.parameters and n not in self.statistics and not _counts(n)
        }
        self._counters = [n for n in everything if _counts(n)]
        self._blocks = _Blocks(segment)
        self._modules = list(segment.modules())
        self._tied = _tied(segment)
        # a graph has a copy of a recurrent cell for each position
        shapes = find_shapes(self._outputs, example, segment.task, one_length=is_recurrent(segment))
        self.x = TensorSpec("x", _dtype(example), shapes.x)
        self.example_length = example.shape[1] if example.dim() > 1 else 1
        self.y = TensorSpec("y", "int64", shapes.x if segment.task == "tokens" else ("batch",))
        with torch.no_grad(), SeededDropout(torch.zeros((), dtype=torch.int64)) as dropout:
            h, _ = self.call(
                training=True,
                tensors={**self.constants, **self.parameters, **_copies(self.statistics)},
                x=example[:2],
            )
        self.random_calls = dropout.calls
        """Number of random masks that a training step of the segment draws."""
        self.axis = channel_axis(h, segment.find_channels(example))
        self.packed = codec.specs(shapes.outputs[0], self.axis)
        self.features: tuple[TensorSpec, ...] = ()
        if segment.features is not None:
            with torch.no_grad():
                deep = segment.features(example[:1])
            self.features_axis = channel_axis(deep, segment.feature_channels)
            self.features = codec.specs(shapes.outputs[1], self.features_axis)

    def _outputs(self, x: Tensor) -> list[Tensor]:
        """Activations at the cut, and features where the model's head is on the device."""
        h, _ = self.call(False, {**self.constants, **self.initial}, x)
        return [h, *([] if self.segment.features is None else [self.segment.features(x)])]

    # the state

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
    def initial(self) -> Tensors:
        """Initial parameters and statistics by name."""
        return {**self.parameters, **self.statistics}

    # calls of the segment, for functions that are traced

    def inference_tensors(self, constants: Tensors, given: Tensors) -> Tensors:
        """Constants, parameters and statistics by name."""
        return {**constants, **{n: given[n] for n in self.initial}}

    def training_tensors(
        self, constants: Tensors, given: Tensors, trained: Iterable[str]
    ) -> tuple[Tensors, Tensors]:
        """The tensors of a training step: all tensors by name, and those that the step changes.

        Args:
            constants: constants by name.
            given: inputs of the step by name.
            trained: names of the parameters that need a gradient.

        Returns:
            Constants, parameters and statistics; and the parameters and statistics alone. The
            statistics are copies, which the forward pass changes.
        """
        wanted = set(trained)
        own = {n: given[n].detach().requires_grad_(n in wanted) for n in self.parameters}
        own |= {n: given[n].clone() for n in self.statistics}
        return {**constants, **own}, own

    def stepped(self, own: Tensors, gradients: Tensors, given: Tensors) -> Tensors:
        """The outputs ``next/NAME``: the state after an optimizer step on clipped gradients.

        Args:
            own: parameters before the step, and new statistics, by name.
            gradients: gradients by name; parameters without one stay.
            given: inputs of the step by name, with slots and hyper-parameters.
        """
        with torch.no_grad():
            parameters, slots = self.optimizer.step(
                {n: own[n].detach() for n in gradients},
                self.clip(gradients, given["max_norm"]),
                {n: given[n] for n in self.slots},
                {n: given[n] for n in self.optimizer.hyper},
                self.decayed,
            )
        after = {n: given[n] for n in self.slots} | {n: t.detach() for n, t in own.items()}
        after |= parameters | slots
        return {f"next/{entry.spec.name}": after[entry.spec.name] for entry in self.state}

    def call(self, training: bool, tensors: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations and logits of the segment with the given tensors."""
        result: tuple[Tensor, Tensor] = self.apply(self.segment, training, tensors, x)
        return result

    def activations(self, tensors: Tensors, x: Tensor) -> Tensor:
        """Activations at the cut in training mode, without the heads."""
        h: Tensor = self.apply(self._blocks, True, tensors, x)
        return h

    def apply(self, module: nn.Module, training: bool, tensors: Tensors, x: Tensor) -> Any:
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

    @contextmanager
    def random(self, given: Tensors, after: int = 0) -> Iterator[None]:
        """Context in which random masks are drawn from the input ``seed``, if there is one.

        Args:
            given: inputs of the step by name.
            after: number of masks that other graphs have drawn from the same seed.
        """
        if not self.random_calls:
            yield
            return
        with SeededDropout(given["seed"], after):
            yield

    def robust(self, given: Tensors) -> AbstractContextManager[None]:
        """Context with the input ``robustness``, if there are dual norms."""
        return robustness(given["robustness"]) if self.dual else nullcontext()

    def pack(self, h: Tensor, prefix: str = "") -> Tensors:
        """Packed activations by name, with a prefix."""
        return {f"{prefix}{n}": part for n, part in self.codec.pack(h, self.axis).items()}

    def unpack(self, given: Tensors, prefix: str, specs: Sequence[TensorSpec]) -> Tensor:
        """Unpack the inputs that are called ``prefix`` and the name of a spec."""
        return self.codec.unpack({spec.name: given[f"{prefix}{spec.name}"] for spec in specs})

    # ports

    def step(
        self,
        name: str,
        function: Callable[[Tensors, Tensors], Tensors],
        inputs: Iterable[Port],
        outputs: Iterable[Port],
        reference: Callable[[Tensors], Tensors],
        verified_at: Mapping[str, float] | None = None,
    ) -> Step:
        """A step with the constants and limits of the segment."""
        return Step(
            name,
            function,
            tuple(inputs),
            tuple(outputs),
            self.constants,
            self.limits,
            reference,
            verified_at or {},
        )

    def inference_ports(self) -> list[Port]:
        """Ports of parameters, statistics and ``x``."""
        return [
            *(Port(_spec(n, t), "state") for n, t in self.initial.items()),
            Port(self.x, "batch"),
        ]

    def training_ports(self, *given: Port, hyper: Sequence[str] = (), x: bool = True) -> list[Port]:
        """Ports of state, ``x``, further inputs, hyper-parameters and seed.

        Args:
            given: ports between ``x`` and the hyper-parameters.
            hyper: names of hyper-parameters besides those of the optimizer and ``max_norm``.
            x: whether the step takes ``x``.
        """
        return [
            *(Port(entry.spec, "state") for entry in self.state),
            *([Port(self.x, "batch")] if x else []),
            *given,
            *(_hyper_port(n) for n in self.optimizer.hyper),
            MAX_NORM,
            *(_hyper_port(n) for n in hyper),
            *self.seed_port(),
        ]

    def logits_port(self) -> Port:
        """Port of the logits (heads, batch, classes), or (heads, batch, positions, vocabulary)."""
        shape = (len(self.segment.heads), *self.y.shape, self.classes)
        return Port(TensorSpec("logits", "float32", shape), "result")

    def result_ports(self) -> list[Port]:
        """Ports of ``loss`` and ``correct``."""
        return [Port(TensorSpec(n, "float32", ()), "result") for n in ("loss", "correct")]

    def present_port(self) -> list[Port]:
        """Port of the class mask; empty if training graphs take none."""
        masks = self.bases > 0 and self.segment.task == "classes"
        return [Port(TensorSpec("present", "float32", (self.classes,)), "batch")] if masks else []

    def robustness_port(self) -> list[Port]:
        """Port of the robustness; empty without dual norms."""
        return [ROBUSTNESS] if self.dual else []

    def seed_port(self) -> list[Port]:
        """Port of the seed; empty if nothing is random."""
        return [Port(TensorSpec("seed", "int64", ()), "seed")] if self.random_calls else []

    def next_state_ports(self) -> list[Port]:
        """Ports of the new state, ``next/NAME``."""
        specs = (entry.spec for entry in self.state)
        return [Port(replace(s, name=f"next/{s.name}"), "state") for s in specs]

    def packed_ports(self, prefix: str = "") -> list[Port]:
        """Ports of packed activations, or of what is packed like them, with a prefix."""
        return packed_ports(self.packed, prefix)


def packed_ports(specs: Sequence[TensorSpec], prefix: str) -> list[Port]:
    """Ports of packed tensors, whose names get a prefix."""
    return [Port(replace(spec, name=f"{prefix}{spec.name}"), "packed") for spec in specs]


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


def _hyper_port(name: str) -> Port:
    return Port(TensorSpec(name, "float32", ()), "hyper")


def _waiting(segment: ClientSegment) -> dict[str, str]:
    """Names of slots by the names of trained tensors of the stem that the model's head reads."""
    if segment.features is None:
        return {}
    read = {id(p) for p in segment.head.parameters() if p.requires_grad}
    own = segment.stem.named_parameters("stem")
    return {name: f"{WAITING}/{name}" for name, p in own if id(p) in read}


def _copies(tensors: Mapping[str, Tensor]) -> Tensors:
    return {n: t.clone() for n, t in tensors.items()}


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, _dtype(tensor), tuple(tensor.shape))
