"""Replaces a node of a graph by the operators that a function runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx


class Declined(Exception):
    """A rule does not apply to the given tensors."""


def replace(
    node: fx.Node,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    graph: fx.Graph,
    mode: FakeTensorMode,
) -> None:
    """Replace ``node`` by the operators that ``function`` runs, unless it declines."""
    leaves, layout = torch.utils._pytree.tree_flatten((args, kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def run(*values: Any) -> Any:
        given = list(leaves)
        for place, value in zip(places, values, strict=True):
            given[place] = value
        a, k = torch.utils._pytree.tree_unflatten(given, layout)
        return function(*a, **k)

    try:
        # before dispatch, where linear and reshape are still operators
        with mode, enable_python_dispatcher(), torch.no_grad():
            traced = make_fx(run, pre_dispatch=True)(*(node.meta["val"] for node in nodes))
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
