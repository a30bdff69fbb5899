"""Runs a traced graph as it is lowered, in float64 or in float32."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from export.lowering.verification.float64 import Float64
from export.lowering.verification.kinks import run_counting
from export.steps.adversarial import GRADIENT
from export.steps.losses import SCORES
from export.steps.step import Step, Tensors

aten = torch.ops.aten


@dataclass(frozen=True)
class Outputs:
    """Outputs of a graph by name.

    Attributes:
        values: outputs as they are.
        unrounded: packed outputs before rounding; outputs that are not rounded are the same. What
            an output hides is among them: of an attack :data:`export.steps.adversarial.GRADIENT`,
            before its sign is taken, and of ``correct`` :data:`export.steps.losses.SCORES`, before
            the largest is chosen.
    """

    values: Tensors
    unrounded: Tensors


class TracedGraph:
    """The traced program of a step, executed as it is, without another trace.

    Args:
        step: step of the program.
        program: its traced program, which is not changed.
    """

    def __init__(self, step: Step, program: ExportedProgram) -> None:
        self._step = step
        self._fixed = [*step.constants.values(), *cast(Tensors, program.constants).values()]
        graph = copy.deepcopy(program.graph)
        results = cast(tuple[fx.Node, ...], graph.output_node().args[0])
        hidden = _hidden(step, results)
        self._hidden = list(hidden)
        before = (*map(_before_rounding, results), *hidden.values())
        graph.output_node().args = ((*results, *before),)
        self._module = fx.GraphModule(program.graph_module, graph)
        self._near = self._with_loss(results)

    def _with_loss(self, results: tuple[fx.Node, ...]) -> set[str]:
        """Names of the nodes that outputs with kinks depend on.

        The state after a step has them, and so has an attack. Packed activations and logits are
        continuous functions of inputs and state.
        """
        if not any(p.spec.name.startswith(("next/", "x_adv")) for p in self._step.outputs):
            return set()
        return {
            source.name
            for port, node in zip(self._step.outputs, results, strict=False)
            if port.role != "packed"
            for source in _upstream(node)
        }

    @property
    def has_kinks(self) -> bool:
        """Whether rounding may carry a value over a kink."""
        return bool(self._near)

    def run(self, given: Tensors, *, wide: bool) -> Outputs:
        """Run the graph.

        Args:
            given: inputs by name, in the dtypes of their ports.
            wide: whether to compute in float64 (:class:`.float64.Float64`), or in float32.
        """
        with torch.no_grad():
            if not wide:
                return self._named(self._module(*self._arguments(given)))
            with Float64():
                return self._named(_widest(self._module(*self._arguments(given))))

    def run_counting(self, given: Tensors) -> tuple[Outputs, int]:
        """Run the graph in float64, and count values that rounding might carry over a kink.

        Args:
            given: inputs by name, in the dtypes of their ports.
        """
        with torch.no_grad(), Float64():
            results, found = run_counting(self._module, self._arguments(given), self._near)
            return self._named(_widest(results)), found

    def _named(self, results: Sequence[Tensor]) -> Outputs:
        names = [port.spec.name for port in self._step.outputs]
        return Outputs(
            dict(zip(names, results, strict=False)),
            dict(zip([*names, *self._hidden], results[len(names) :], strict=True)),
        )

    def _arguments(self, given: Tensors) -> list[Tensor]:
        """Constants and inputs; what is float32 is converted where it is used."""
        return [*self._fixed, *(given[port.spec.name] for port in self._step.inputs)]


def _widest(results: Sequence[Tensor]) -> list[Tensor]:
    """Results with those that only pass a float32 tensor on converted."""
    return [t.double() if t.dtype is torch.float32 else t for t in results]


def widened(tensors: Tensors) -> Tensors:
    """The tensors with float32 converted to float64."""
    return {n: t.double() if t.dtype is torch.float32 else t for n, t in tensors.items()}


def _hidden(step: Step, results: tuple[fx.Node, ...]) -> dict[str, fx.Node]:
    """Nodes of the values that outputs hide, by the names of these values."""
    found = {}
    for port, node in zip(step.outputs, results, strict=False):
        if port.spec.name == "x_adv":
            sign = next((n for n in _upstream(node) if n.target is aten.sign.default), None)
            if sign is not None:
                found[GRADIENT] = cast(fx.Node, sign.args[0])
        elif port.spec.name == "correct":
            scores = _scores(node)
            if scores is not None:
                found[SCORES] = scores
    return found


def _scores(correct: fx.Node) -> fx.Node | None:
    """The node of the scores whose largest is chosen, in any shape.

    :func:`export.steps.losses.largest` chooses among the largest scores of blocks first. What it
    reads then is all scores; what it chooses in a block depends on that.
    """
    read = [cast(fx.Node, n.args[0]) for n in _upstream(correct) if n.target is aten.argmax.default]
    if len(read) > 1 and read[1].target is aten.amax.default:
        return cast(fx.Node, read[1].args[0])
    return read[0] if read else None


def _upstream(node: fx.Node) -> Iterator[fx.Node]:
    """A node and all that it depends on, nearest first."""
    seen, waiting = {node}, deque([node])
    while waiting:
        yield (nearest := waiting.popleft())
        for source in nearest.all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)


def _before_rounding(node: fx.Node) -> fx.Node:
    """The node whose value a packed output rounds; the node itself if it is not rounded."""
    if node.target is not aten._to_copy.default or node.meta["val"].dtype not in _ROUNDED:
        return node
    source = cast(fx.Node, node.args[0])
    inner = cast(fx.Node, source.args[0]) if source.target in _CLAMPS else source
    return cast(fx.Node, inner.args[0]) if inner.target is aten.round.default else source


_CLAMPS = (aten.clamp.default, aten.clamp.Tensor)

_ROUNDED = (torch.int8, torch.uint8, torch.float16)
