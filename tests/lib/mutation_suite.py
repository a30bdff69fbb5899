"""The mutation suite: errors planted in correct graphs, and whether verification refuses them.

``python -m tests.lib.mutation_suite`` plants the errors of :mod:`tests.lib.planted_errors` and a
number of random edits, and prints a table and every survivor. An edit that survives is executed on
twenty more draws: if no output of the graph ever changes, it is equivalent.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.export import ExportedProgram

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.runtime import Runtime, load_runtime
from export.errors import ExportError
from export.lowering import onnx
from export.lowering.verification.draws import Like, draw_inputs
from export.lowering.verification.traced import TracedGraph
from export.lowering.verification.verify import Verifier, run_on
from export.steps.client_steps import ClientSteps
from export.steps.step import Step, Tensors
from tests.lib.graph_mutations import edit_file, edit_program
from tests.lib.mutation_models import SUBJECTS, Subject
from tests.lib.step_runtimes import manifest_of

_SAME = 1e-12
"""Largest relative change of an output of an equivalent graph, in float64."""

_MORE_DRAWS = 20


@dataclass(frozen=True)
class Outcome:
    """What became of one planted error.

    Attributes:
        subject: name of the model.
        graph: name of the graph.
        error: what was planted, and where.
        outcome: ``refused``, ``does not run``, ``equivalent`` or ``survived``.
        message: the refusal; or the largest change of an output of a survivor.
    """

    subject: str
    graph: str
    error: str
    outcome: str
    message: str


@dataclass(frozen=True)
class Correct:
    """A correct graph with what is needed to verify copies of it."""

    name: str
    subject: Subject
    steps: ClientSteps
    step: Step
    program: ExportedProgram
    file: bytes


def correct_graphs(names: list[str]) -> list[Correct]:
    """All graphs of some subjects, traced and lowered."""
    found = []
    for name in names:
        subject = SUBJECTS[name]
        steps = subject.steps()
        for step in subject.graphs(steps):
            program = onnx.traced(step)
            found.append(Correct(name, subject, steps, step, program, onnx.lower(step, program)))
    return found


def verify_program(correct: Correct, program: ExportedProgram) -> None:
    """Verify the mathematics of a program; raises ExportError if it is refused."""
    verifier = Verifier(correct.steps, Like(correct.subject.inputs()))
    graph = TracedGraph(correct.step, program)
    for number, (rows, length) in enumerate(verifier.shapes(correct.step)):
        verifier.mathematics(correct.step, graph, rows, length, number)


def verify_file(correct: Correct, file: bytes) -> None:
    """Verify a file against the correct program; raises ExportError if it is refused."""
    verifier = Verifier(correct.steps, Like(correct.subject.inputs()))
    verifier.verify(correct.step, correct.program, partial(runtime_of, correct, file))


def by_program(correct: Correct, seed: int) -> Outcome | None:
    """One random edit of the traced program; None if no edit applies."""
    edit = edit_program(correct.program, random.Random(seed))
    if edit is None:
        return None
    program, what = edit
    said = partial(Outcome, correct.name, correct.step.name, f"{what}, seed {seed}")
    try:
        verify_program(correct, program)
    except ExportError as error:
        return said("does not run" if "fails for" in str(error) else "refused", str(error))
    change = largest_change(correct, program)
    return said("equivalent" if change <= _SAME else "survived", f"changes outputs by {change:.1e}")


def largest_change(correct: Correct, program: ExportedProgram) -> float:
    """The largest relative change of an output on more draws, in float64."""
    right, wrong = TracedGraph(correct.step, correct.program), TracedGraph(correct.step, program)
    most = 0.0
    for given in more_draws(correct):
        want, got = right.run(given, wide=True), wrong.run(given, wide=True)
        for name, tensor in want.unrounded.items():
            size = max(tensor.abs().max().item(), 1e-9)
            change = (got.unrounded[name] - tensor).double().abs().max().item() / size
            most = math.inf if math.isnan(change) else max(most, change)
    return most


def more_draws(correct: Correct) -> Iterator[Tensors]:
    """Inputs of other sizes and seeds than those of the verification."""
    source = Like(correct.subject.inputs())
    texts = correct.steps.x.shape[1:] == ("seq",)
    for seed in range(1000, 1000 + _MORE_DRAWS):
        length = 3 + seed % 9 if texts else None
        yield draw_inputs(correct.steps, correct.step, source, 1 + seed % 9, length, seed)


def runtime_of(correct: Correct, file: bytes, threads: int = 1) -> Runtime:
    """A device's runtime, that of the subject's tier, with a file of one graph."""
    manifest = manifest_of(correct.steps, correct.subject.tier.runtime, [correct.step])
    initial = {n: t.numpy() for n, t in correct.steps.initial.items()}
    return load_runtime(Bundle(manifest, {correct.step.name: file}, initial), threads)


def by_file(correct: Correct, seed: int) -> Outcome | None:
    """One random edit of the ONNX file; None if no edit applies."""
    edit = edit_file(correct.file, random.Random(seed))
    if edit is None:
        return None
    file, what = edit
    said = partial(Outcome, correct.name, correct.step.name, f"ONNX: {what}, seed {seed}")
    try:
        verify_file(correct, file)
    except ExportError as error:
        return said("does not run" if "fails for" in str(error) else "refused", str(error))
    same = runs_alike(correct, file)
    return said("equivalent" if same else "survived", "" if same else "outputs differ")


def runs_alike(correct: Correct, file: bytes) -> bool:
    """Whether a file gives the same bits as the correct one on more draws."""
    both = [runtime_of(correct, each) for each in (correct.file, file)]
    for given in more_draws(correct):
        one, other = (run_on(runtime, correct.step, given) for runtime in both)
        if any(not torch.equal(one[name], other[name]) for name in one):
            return False
    return True


def random_edits(graphs: list[Correct], count: int, seed: int) -> Iterator[Outcome]:
    """Plant random edits in graph after graph: every third in the file, the others before."""
    rng = random.Random(seed)
    found = 0
    while found < count:
        correct = graphs[found % len(graphs)]
        plant = by_file if rng.random() < 1 / 3 else by_program
        outcome = plant(correct, rng.randrange(2**31))
        if outcome is not None:
            found += 1
            yield outcome


def table(outcomes: list[Outcome], title: str) -> Table:
    """Numbers of outcomes by subject and graph."""
    result = Table(title=title)
    kinds = ("refused", "does not run", "equivalent", "survived")
    for column in ("model", "graph", "planted", *kinds):
        result.add_column(column, justify="left" if column in ("model", "graph") else "right")
    rows: dict[tuple[str, str], Counter[str]] = {}
    for o in outcomes:
        rows.setdefault((o.subject, o.graph), Counter())[o.outcome] += 1
    for (subject, graph), counts in rows.items():
        result.add_row(subject, graph, str(counts.total()), *(str(counts[kind]) for kind in kinds))
    total = Counter(o.outcome for o in outcomes)
    result.add_section()
    result.add_row("all", "", str(total.total()), *(str(total[kind]) for kind in kinds))
    return result


def main(arguments: list[str] | None = None) -> int:
    """Run the suite; the exit status is 1 if an error survives that is not equivalent."""
    from tests.lib.planted_errors import by_hand

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500, help="number of random edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", action="append", choices=list(SUBJECTS), help="default: all")
    parser.add_argument("--json", type=Path, help="write every outcome to a file")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console(stderr=True)
    names = given.model or list(SUBJECTS)
    hand = list(track(by_hand(names), "errors by hand", console=console))
    graphs = correct_graphs(names)
    edits = track(
        random_edits(graphs, given.count, given.seed), "random edits", given.count, console=console
    )
    program = list(edits)
    print_table = Console(width=110)
    print_table.print(table(hand, "errors planted by hand"))
    print_table.print(table(program, f"random edits, seed {given.seed}"))
    left = [o for o in (*hand, *program) if o.outcome in ("survived", "equivalent")]
    for o in left:
        print_table.print(
            f"{o.outcome}: {o.subject} {o.graph}: {o.error} ({o.message})", markup=False
        )
    survived = sum(o.outcome == "survived" for o in left)
    wrong = len(hand) + len(program) - sum(o.outcome == "equivalent" for o in left)
    print_table.print(f"{1 - survived / max(wrong, 1):.2%} of {wrong} errors were refused")
    if given.json is not None:
        found = {"by hand": [asdict(o) for o in hand], "by program": [asdict(o) for o in program]}
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
