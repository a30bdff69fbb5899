"""Replaces a node of a graph by the operators that a function runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from export.torch_internals import GraphShapes, flatten, unflatten


class Declined(Exception):
    """A rule does not apply to the given tensors."""


def replace(
    node: fx.Node,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    graph: fx.Graph,
    shapes: GraphShapes,
) -> None:
    """Replace ``node`` by the operators that ``function`` runs, unless it declines."""
    leaves, layout = flatten((args, kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def run(*values: Any) -> Any:
        given = list(leaves)
        for place, value in zip(places, values, strict=True):
            given[place] = value
        a, k = unflatten(given, layout)
        return function(*a, **k)

    try:
        traced = shapes.trace(run, [node.meta["val"] for node in nodes])
    except Declined:
        return
    values: dict[fx.Node, Any] = {}
    given = iter(nodes)
    with graph.inserting_before(node):
        for part in traced.graph.nodes:
            if part.op == "placeholder":
                values[part] = next(given)
            elif part.op == "output":
                result = values[part.args[0]]
            else:
                values[part] = graph.node_copy(part, lambda n: values[n])
    node.replace_all_uses_with(result)
    graph.erase_node(node)
