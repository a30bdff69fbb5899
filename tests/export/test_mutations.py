"""Verification refuses errors that are planted in correct graphs."""

from __future__ import annotations

import pytest

from tests.lib.mutation_models import SUBJECTS
from tests.lib.mutation_suite import by_program, correct_graphs, random_edits
from tests.lib.planted_errors import PLANTED, outcome

QUICK = [p for i, p in enumerate(PLANTED) if i % 20 == 0]


def test_there_is_an_error_for_every_family_of_graphs() -> None:
    assert len(PLANTED) >= 60
    families = {p.graph for p in PLANTED}
    assert families == {
        "predict", "forward", "train", "activate", "backward", "fuse", "finish", "attack",
        "adversarial_train", "mix_2",
    }  # fmt: skip
    assert {p.subject for p in PLANTED} == set(SUBJECTS)


@pytest.mark.parametrize("planted", QUICK, ids=lambda p: f"{p.graph}: {p.error}")
def test_an_error_is_refused(planted: object) -> None:
    assert outcome(planted).outcome == "refused"  # type: ignore[arg-type]


@pytest.mark.slow
def test_every_third_error_is_refused() -> None:
    """The suite plants all of them."""
    found = [outcome(planted) for planted in PLANTED[1::3]]
    assert [o.error for o in found if o.outcome != "refused"] == []


@pytest.mark.slow
def test_right_graphs_are_not_refused_and_edits_of_them_are() -> None:
    """A few random edits; the suite has hundreds."""
    graphs = correct_graphs(["text"])
    assert {g.step.name for g in graphs} >= {"train", "backward", "predict_int8"}
    found = list(random_edits(graphs, 12, seed=5))
    assert [o for o in found if o.outcome == "survived"] == []
    assert sum(o.outcome == "refused" for o in found) > 6


@pytest.mark.slow
def test_an_edit_is_the_same_for_its_seed() -> None:
    (graph, *_) = correct_graphs(["text"])
    assert by_program(graph, 7) == by_program(graph, 7)
