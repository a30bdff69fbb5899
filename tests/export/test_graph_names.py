"""The names of optional graphs, and what asks for them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.steps.graph_names import NEEDS, with_needed
from export.steps.graph_set import OPTIONAL
from server_hub.methods.registry import simulated_methods


def test_every_name_has_a_step() -> None:
    assert OPTIONAL.keys() == NEEDS.keys()


@given(st.lists(st.sampled_from(sorted(NEEDS))))
def test_a_graph_comes_with_those_that_it_needs(names: list[str]) -> None:
    """The result has the given names and all needed ones, and nothing that nobody needs."""
    found = with_needed(names)
    assert found >= set(names)
    assert all(found >= set(NEEDS[name]) for name in found)
    assert all(n in names or any(n in NEEDS[other] for other in found) for n in found)
    assert with_needed(found) == found


@pytest.mark.parametrize("name", ["train", "mix_2", "returned", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="there are activate, backward, finish, fuse, attack"):
        with_needed(["backward", name])


def test_methods_name_graphs_that_there_are() -> None:
    asked = {name: recipe.graphs for name, recipe in simulated_methods().items() if recipe.graphs}
    assert asked.keys() == {"splitft", "splitft-u", "supersfl", "splitfed-v1", "splitfed-v2"}
    for graphs in asked.values():
        with_needed(graphs)
