"""Verifies every graph of a tier before it is written, in two steps.

*Mathematics*: the traced graph, executed in float64, equals eager PyTorch's autograd and
``torch.optim``. *Rounding*: the runtime, as a device runs it, equals the traced graph within the
rounding of float32. ``docs/exactness.md`` says what is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from export.errors import ExportError, reason
from export.lowering.verification.compare import (
    Expected,
    expected,
    mathematical_error,
    rounding_error,
)
from export.lowering.verification.draws import Source, draw_inputs
from export.lowering.verification.float64 import Eager, Float64
from export.lowering.verification.records import Compared, Verified, verification_key
from export.lowering.verification.traced import Outputs, TracedGraph, widened
from export.steps.client_steps import ClientSteps
from export.steps.step import Step, Tensors
from export.tensor_names import layer_of

REDRAWS = 2
"""Largest number of further draws for a graph whose values rounding may carry over a kink."""

_CANDIDATES = 4
"""Number of draws among which the one with the fewest values near a kink is chosen."""

_THREADS = (1, 2)
"""Numbers of threads with which runtimes are verified."""

_ROWS = 8
"""Largest batch for a runtime without a limit."""

_VALUES = 2**23
"""Largest number of logits of a batch that is compared, which bounds the memory."""

OpenRuntime = Callable[[int], Runtime]
"""Opens the runtime of the bundle, as a device does, with a number of threads."""


@dataclass
class Report:
    """What was verified.

    Attributes:
        graphs: number of graphs.
        draws: number of draws that were compared.
        redraws: number of draws that were repeated, because rounding carried a value over a kink.
    """

    graphs: int = 0
    draws: int = 0
    redraws: int = 0

    def __str__(self) -> str:
        repeated = f", {self.redraws} repeated" if self.redraws else ""
        return f"{self.graphs} graphs verified on {self.draws} draws{repeated}"


@dataclass(frozen=True)
class Verifier:
    """Verifies the graphs of one tier.

    Attributes:
        steps: steps of the segment.
        source: where inputs and labels come from.
        report: counts what was verified.
    """

    steps: ClientSteps
    source: Source
    report: Report = field(default_factory=Report)
    _drawn: dict[tuple[str, int, int | None, int], Tensors] = field(
        default_factory=dict, repr=False
    )
    _compared: list[Compared] = field(default_factory=list, repr=False)

    def verify(self, step: Step, program: ExportedProgram, open_runtime: OpenRuntime) -> Verified:
        """Verify one graph.

        Args:
            step: the graph's step.
            program: its traced program, from which the graph was lowered.
            open_runtime: opens the runtime of the lowered graph.

        Returns:
            What it was compared with.

        Raises:
            ExportError: the graph fails or differs; the message names the first tensor that
                differs, and its layer.
        """
        graph = TracedGraph(step, program)
        self.report.graphs += 1
        self._drawn.clear()
        self._compared.clear()
        redraws, draws = self.report.redraws, []
        for number, (rows, length) in enumerate(self.shapes(step)):
            seed, wide = self._clear_of_kinks(step, graph, rows, length, number)
            draw = self.mathematics(step, graph, rows, length, seed, wide)
            if draw is not None:
                draws.append(draw)
        for threads in _THREADS:
            runtime = open_runtime(threads)
            for draw in draws:
                self._rounding(step, graph, draw, runtime, threads)
        return Verified(tuple(self._compared), self.report.redraws - redraws)

    def holds(self, step: Step, verified: Verified) -> bool:
        """Whether a graph that was verified would be compared with the same values again.

        The inputs are drawn and the step's reference, the model's own code in eager PyTorch, runs
        on all of them. If their bits are those of last time, the comparison would be as well, for
        the same traced graph and the same file.

        Args:
            step: the graph's step.
            verified: what an equal graph was compared with.
        """
        self._drawn.clear()
        for before in verified.draws:
            given = self._inputs(step, before.rows, before.length, before.seed)
            want = self._reference(step, given, before.rows)
            if Compared.of(before.rows, before.length, before.seed, given, want) != before:
                return False
        self.report.graphs += 1
        self.report.draws += sum(bool(draw.outputs) for draw in verified.draws)
        self.report.redraws += verified.redraws
        return True

    def key(self, step: Step, content: str, manifest: Manifest) -> str:
        """Key of the verification of a graph in the cache.

        Args:
            step: the graph's step.
            content: hash of the traced step, see :func:`export.lowering.content.step_digest`.
            manifest: manifest of the bundle, from which the runtime opens the graph.
        """
        settings = list(self.shapes(step)), self.axes(step), dict(step.verified_at)
        return verification_key(content, step.name, manifest, settings)

    def shapes(self, step: Step) -> Iterator[tuple[int, int | None]]:
        """Batch sizes and lengths: one row, some, and the limit; texts beyond the example's."""
        limit = step.limits.get("batch", _ROWS)
        batches = sorted({1, min(3, limit), limit})
        if self.steps.x.shape[1:] != ("seq",):
            yield from ((rows, None) for rows in batches)
            return
        usual = self.steps.example_length
        longest = min(step.limits.get("seq", usual + usual // 2 + 1), usual + usual // 2 + 1)
        for rows, length in zip(batches, (longest, usual, 2), strict=False):
            # a vocabulary makes the logits large
            most = max(2, _VALUES // (rows * self.steps.classes * len(self.steps.segment.heads)))
            yield rows, max(min(length, most, longest), 1)

    def mathematics(
        self,
        step: Step,
        graph: TracedGraph,
        rows: int,
        length: int | None,
        seed: int,
        wide: Outputs | None = None,
    ) -> Draw | None:
        """Compare the traced graph in float64 with the step's reference.

        Args:
            step: step of the graph.
            graph: its traced graph.
            rows: number of rows.
            length: number of positions of texts; None for other inputs.
            seed: seed of the draw.
            wide: outputs of the graph in float64 for this draw; None to run it.

        Returns:
            The draw with the outputs of the traced graph; None if the model itself refuses the
            batch, as batch norms do with one value per channel.

        Raises:
            ExportError: the graph fails or differs.
        """
        given = self._inputs(step, rows, length, seed)
        place = _place(rows, length, seed)
        want = self._reference(step, given, rows)
        self._compared.append(Compared.of(rows, length, seed, given, want))
        if want is None:
            return None
        try:
            wide = graph.run(given, wide=True) if wide is None else wide
        except Exception as error:  # operators raise errors of any class
            raise ExportError(
                f"the graph {step.name!r} fails for {place} ({reason(error)}); nothing was written"
            ) from error
        self.report.draws += 1
        wrong = mathematical_error(wide, want)
        if wrong is not None:
            raise self._differs(step, wrong, place, "in float64")
        del want  # a state in float64
        narrow = graph.run(given, wide=False)
        return Draw(rows, length, seed, expected(step.outputs, wide, narrow, self.axes(step)))

    def _reference(self, step: Step, given: Tensors, rows: int) -> Tensors | None:
        """Outputs of a step in eager PyTorch; None if the model itself refuses the batch."""
        assert step.reference is not None
        try:
            with Eager(), Float64(), sdpa_kernel(SDPBackend.MATH):
                want = step.reference(widened(given))
        except ValueError as error:
            if rows == 1 and "more than 1 value per channel" in str(error):
                return None
            raise
        return {name: t.detach().double() for name, t in want.items()}

    def _clear_of_kinks(
        self, step: Step, graph: TracedGraph, rows: int, length: int | None, number: int
    ) -> tuple[int, Outputs | None]:
        """A draw with few values near a kink, before a runtime is asked.

        Returns:
            Its seed, and the outputs of the graph in float64 if they are known.
        """
        if not graph.has_kinks:
            return number, None
        best, fewest = number, -1
        for seed in range(number, number + 100 * _CANDIDATES, 100):
            wide, found = graph.run_counting(self._inputs(step, rows, length, seed))
            if not found:
                return seed, wide
            del wide  # a state in float64
            if fewest < 0 or found < fewest:
                best, fewest = seed, found
        return best, None

    def _inputs(self, step: Step, rows: int, length: int | None, seed: int) -> Tensors:
        """Inputs of a draw. Labels are answers of the model, and so everything but the state is
        kept for the next time."""
        known = self._drawn.get((step.name, rows, length, seed), {})
        given = draw_inputs(self.steps, step, self.source, rows, length, seed, known)
        own = {p.spec.name for p in step.inputs if p.role not in ("state", "bases")}
        self._drawn[step.name, rows, length, seed] = {n: t for n, t in given.items() if n in own}
        return given

    def _rounding(
        self, step: Step, graph: TracedGraph, draw: Draw, runtime: Runtime, threads: int
    ) -> None:
        """Compare the runtime with the traced graph; repeat a draw with kinks at most twice."""
        for again in range(REDRAWS + 1):
            place = f"{_place(draw.rows, draw.length, draw.seed)}, {threads} threads"
            given = self._inputs(step, draw.rows, draw.length, draw.seed)
            try:
                got = run_on(runtime, step, given)
            except Exception as error:  # runtimes raise errors of any class
                raise ExportError(
                    f"the graph {step.name!r} fails for {place} ({reason(error)}); nothing was "
                    "written"
                ) from error
            wrong = rounding_error(got, draw.expected)
            if wrong is None:
                return
            if not graph.has_kinks or again == REDRAWS:
                raise self._differs(step, wrong, place, "more than rounding explains")
            self.report.redraws += 1
            other = self.mathematics(
                step, graph, draw.rows, draw.length, draw.seed + 1000 * (again + 1)
            )
            assert other is not None
            draw = other

    def axes(self, step: Step) -> dict[str, int]:
        """Axis of the channels of outputs that are no state."""
        axes = {"logits": 1}
        for port in step.outputs:
            if port.role == "packed":
                deep = step.name == "finish"
                axis = self.steps.features_axis if deep else self.steps.axis
                axes[port.spec.name] = axis + port.spec.name.startswith("bases.")
        return axes

    def _differs(self, step: Step, wrong: tuple[str, float], place: str, how: str) -> ExportError:
        name, difference = wrong
        parameter = name.split("/")[-1]
        layer = f" of layer {layer_of(parameter)}" if parameter in self.steps.parameters else ""
        return ExportError(
            f"the graph {step.name!r} differs from eager PyTorch in {name}{layer} by "
            f"{difference:.2g}, {how} ({place}); nothing was written"
        )


@dataclass(frozen=True)
class Draw:
    """A draw of the inputs of a step, which its seed repeats, and what the graph makes of them.

    Attributes:
        rows: number of rows.
        length: number of positions of texts; None for other inputs.
        seed: seed of the draw.
        expected: outputs of a runtime by name.
    """

    rows: int
    length: int | None
    seed: int
    expected: dict[str, Expected]


def run_on(runtime: Runtime, step: Step, given: Tensors) -> dict[str, Tensor]:
    """Run a graph on a runtime as a device does; outputs by name, the state after it included."""
    state = {p.spec.name for p in step.inputs if p.role == "state"}
    arrays = {name: _array(tensor) for name, tensor in given.items()}
    runtime.set_state({n: a for n, a in arrays.items() if n in state} | _missing(runtime, state))
    batch = {n: a for n, a in arrays.items() if n not in state}
    outputs: Mapping[str, Array] = runtime.run(step.name, batch)
    after = {f"next/{n}": a for n, a in runtime.get_state(slots=True).items()}
    both = {**outputs, **after}
    return {p.spec.name: torch.from_numpy(np.array(both[p.spec.name])) for p in step.outputs}


def _missing(runtime: Runtime, given: Sequence[str] | set[str]) -> dict[str, Array]:
    """Parts of the state that a graph does not take: with mixtures, it takes none."""
    return {n: a for n, a in runtime.get_state().items() if n not in given}


def _array(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()


def _place(rows: int, length: int | None, seed: int) -> str:
    positions = "" if length is None else f", length {length}"
    return f"batch {rows}{positions}, seed {seed}"
