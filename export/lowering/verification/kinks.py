"""Counts values so close to a kink that float32 may round them to its other side.

A ReLU, a maximum or a comparison has another gradient on either side of a point. If rounding
carries a value over that point, the gradients of two exact programs differ. Such values are counted
on the traced graph, before a runtime is asked, and a draw with few of them is preferred.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

aten = torch.ops.aten

_NEAR = 1e-6
"""Distance to a kink, as a fraction of the values' root mean square, that rounding may carry."""


def run_counting(
    module: fx.GraphModule, inputs: list[Tensor], near: Collection[str]
) -> tuple[list[Tensor], int]:
    """Run a graph, and count the values near a kink.

    Args:
        module: traced graph.
        inputs: its inputs, in order.
        near: names of the nodes whose values are counted.

    Returns:
        The results, and the number of values near a kink.
    """
    counter = _Counter(module, near)
    return list(counter.run(*inputs)), counter.found


class _Counter(fx.Interpreter):
    """Runs a graph and counts values near kinks."""

    def __init__(self, module: fx.GraphModule, near: Collection[str]) -> None:
        super().__init__(module)
        self._near = near
        self._counts = False
        self.found = 0

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, whose values count if it is among those near kinks."""
        self._counts = n.name in self._near
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator, and count its inputs near a kink."""
        distance = _DISTANCES.get(target) if self._counts else None
        if distance is not None:
            self.found += _near(distance(*args), args[0])
        return super().call_function(target, args, kwargs)


def _near(distances: list[Tensor], values: Tensor) -> int:
    if not values.is_floating_point():
        return 0
    reach = _NEAR * values.square().mean().sqrt()
    # a value exactly at a kink is there in every program: padding, or the maximum itself
    return sum(int(((d != 0) & (d.abs() < reach)).sum()) for d in distances)


def _to_zero(x: Tensor, *_: Any) -> list[Tensor]:
    return [x]


def _between(x: Tensor, y: Any, *_: Any) -> list[Tensor]:
    return [x - y]


def _to_bounds(x: Tensor, *bounds: Any) -> list[Tensor]:
    return [x - bound for bound in bounds if bound is not None]


def _of_the_best(x: Tensor, axis: int | None = None, *_: Any) -> list[Tensor]:
    if axis is None or x.shape[axis] < 2:
        return []
    best = x.topk(2, axis).values
    return [best.select(axis, 0) - best.select(axis, 1)]


_COMPARED = ("le", "lt", "ge", "gt", "eq", "ne")

_DISTANCES: dict[Any, Callable[..., list[Tensor]]] = {
    aten.relu.default: _to_zero,
    aten.abs.default: _to_zero,
    aten.sign.default: _to_zero,
    aten.clamp.default: _to_bounds,
    aten.clamp.Tensor: _to_bounds,
    aten.hardtanh.default: _to_bounds,
    aten.maximum.default: _between,
    aten.minimum.default: _between,
    aten.argmax.default: _of_the_best,
    **{getattr(getattr(aten, n), of): _between for n in _COMPARED for of in ("Scalar", "Tensor")},
}
