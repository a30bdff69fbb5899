"""A segment in eager PyTorch in float64, for the references of steps.

It shares only the modules with the traced functions: their own code runs, autograd differentiates,
and ``torch.optim`` updates.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from export.cutting.calls import forget_computed_weights
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment, statistics
from export.steps.client_steps import ClientSteps
from export.steps.step import Tensors
from export.tensor_names import layer_of

_LARGE = 2**20
"""Bytes of a frozen tensor from which it is shared in float32, and not copied to float64."""


class EagerSegment:
    """A copy of a segment with the tensors of one call of a step.

    Trained tensors are in float64, and so are small frozen ones. Large frozen tensors are those of
    the segment, in float32: :class:`export.lowering.verification.float64.Float64` converts them
    where they are used, so that there is never a second copy of a frozen model.

    Args:
        steps: steps of the segment.
        given: inputs of the step by name, floats in float64. Parameters and statistics that are
            not among them have their initial values.
        trains: whether the step trains a parameter, by its name.
        training: whether the modules are in training mode.

    Attributes:
        segment: the copy.
        parameters: its parameters by name, those that the step trains and all others.
        trained: those that the step trains.
        statistics: its running statistics by name.
    """

    def __init__(
        self,
        steps: ClientSteps,
        given: Tensors,
        trains: Callable[[str], bool] = lambda name: False,
        *,
        training: bool = False,
    ) -> None:
        self._steps, self._given = steps, given
        self.segment = _copied(steps, given).train(training)
        self.parameters = {
            n: p for n, p in self.segment.named_parameters() if n in steps.parameters
        }
        self.trained = {n: p.requires_grad_() for n, p in self.parameters.items() if trains(n)}
        self.statistics = statistics(self.segment)

    @contextmanager
    def random(self, after: int = 0) -> Iterator[None]:
        """Context in which random masks are drawn from the input ``seed``, if there is one."""
        if "seed" not in self._given:
            yield
            return
        with SeededDropout(self._given["seed"], after):
            yield

    def activations(self) -> Tensor:
        """Activations at the cut, without the heads."""
        with self.random():
            h: Tensor = self.segment.stem(self._given["x"])
            for block in self.segment.block:
                h = block(h)
        return h

    def unrounded(self, h: Tensor, prefix: str = "", axis: int | None = None) -> Tensors:
        """The packed tensors of ``h`` before rounding, by name, with a prefix."""
        axis = self._steps.axis if axis is None else axis
        parts = self._steps.codec.unrounded(h.detach(), axis)
        return {f"{prefix}{n}": part for n, part in parts.items()}

    def stepped(self) -> Tensors:
        """The outputs ``next/NAME`` after a step of ``torch.optim`` on clipped gradients."""
        slots = {n: self._given[n] for n in self._steps.slots}
        if self.trained:
            slots |= self._optimized(slots)
        after = self.parameters | self.statistics | slots
        return {
            f"next/{entry.spec.name}": after[entry.spec.name].detach()
            for entry in self._steps.state
        }

    def _optimized(self, slots: Mapping[str, Tensor]) -> Tensors:
        rule, decayed = self._steps.optimizer, self._steps.decayed
        max_norm = float(self._given["max_norm"])
        if max_norm > 0:
            nn.utils.clip_grad_norm_(self.trained.values(), max_norm)
        hyper = {n: float(self._given[n]) for n in rule.hyper}
        optimizer = rule.reference(
            [p for n, p in self.trained.items() if n in decayed],
            hyper,
            [p for n, p in self.trained.items() if n not in decayed],
        )
        places = {
            (name, theirs): f"{slot}/{layer_of(name) if slot in rule.shared else name}"
            for name in self.trained
            for slot, theirs in rule.torch_names.items()
        }
        for (name, theirs), slot in places.items():
            optimizer.state[self.trained[name]][theirs] = slots[slot].clone()
        optimizer.step()
        return {
            slot: optimizer.state[self.trained[name]][theirs]
            for (name, theirs), slot in places.items()
        }


def _copied(steps: ClientSteps, given: Tensors) -> ClientSegment:
    segment = steps.segment
    forget_computed_weights(segment)
    known: dict[int, object] = {}
    for name, p in segment.named_parameters():
        value = given.get(name, p).detach()
        if name in steps.parameters or p.nbytes < _LARGE:
            known[id(p)] = nn.Parameter(value.to(torch.float64, copy=True), requires_grad=False)
        else:
            known[id(p)] = nn.Parameter(value, requires_grad=False)  # the same memory
    for name, buffer in segment.named_buffers():
        value = given.get(name, buffer)
        if name in steps.statistics or value.nbytes < _LARGE:
            wide = value.is_floating_point() and value.dtype == torch.float32
            known[id(buffer)] = value.to(torch.float64 if wide else value.dtype, copy=True)
        else:
            known[id(buffer)] = value
    for module in segment.modules():  # tensors that a module computes, such as a normed weight
        for value in vars(module).values():
            if isinstance(value, Tensor):
                known[id(value)] = value.detach().clone()
    if segment.features is not None:  # a method of the whole model
        known[id(segment.features)] = segment.features
    return copy.deepcopy(segment, known)
