"""Simplifies a traced graph, for every runtime."""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from export.torch_internals import always_true, without_repetition

aten = torch.ops.aten

_RENAMES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
_SHAPED = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)


def simplify(module: GraphModule) -> None:
    """Remove nodes that only rename a tensor, repeat another node, or are unused.

    A single symbolic size in the shape of a view becomes -1, so that it is not computed. A graph
    with a symbolic batch then has no shape arithmetic.
    """
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RENAMES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        elif node.target in _SHAPED:
            _infer_one_size(node)
        elif node.target is aten.select.int:
            _squeeze(node)
        elif node.target is aten.constant_pad_nd.default:
            _pad_less(node)
        elif node.target is aten.sym_numel.default:
            _multiply_sizes(node)
    module.graph.eliminate_dead_code()
    module.graph = without_repetition(module.graph)
    module.recompile()


def _infer_one_size(node: Node) -> None:
    shape = [n if isinstance(n, int) else -1 for n in node.meta["val"].shape]
    if shape.count(-1) == 1:
        node.args = (node.args[0], shape)


def _squeeze(node: Node) -> None:
    """Turn the selection of an only entry into a view: ONNX Runtime would copy the tensor."""
    tensor, dim, _ = node.args
    assert isinstance(tensor, Node)
    if always_true(tensor.meta["val"].shape[dim] == 1):
        node.target, node.args = aten.squeeze.dim, (tensor, dim)


def _pad_less(node: Node) -> None:
    """Let a convolution pad less, instead of cropping what it returns.

    So it is in the gradient of a padding that is not the convolution's own.
    """
    source, widths = cast(tuple[Node, list[int]], node.args[:2])
    if source.target is not aten.convolution.default or len(source.users) > 1:
        return
    x, weight, bias, stride, padding, dilation, transposed, *rest = cast(Any, source.args)
    crops = [-n for n in reversed(widths[::2])]
    crops = [0] * (len(padding) - len(crops)) + crops
    less = [p - c for c, p in zip(crops, padding, strict=False)]
    plain = not transposed and all(s == 1 for s in stride) and len(crops) == len(padding)
    if plain and widths[::2] == widths[1::2] and min(crops) >= 0 and min(less) >= 0:
        node.target = aten.convolution.default
        node.args = (x, weight, bias, stride, less, dilation, transposed, *rest)


def _multiply_sizes(node: Node) -> None:
    """Replace ``sym_numel`` by a product of ``sym_size``, which ONNX export can translate."""
    tensor = node.args[0]
    assert isinstance(tensor, Node)
    shape = tensor.meta["val"].shape
    with node.graph.inserting_before(node):
        count: Node | int = math.prod(n for n in shape if isinstance(n, int))
        for axis, size in enumerate(shape):
            if not isinstance(size, int):
                factor = node.graph.call_function(aten.sym_size.int, (tensor, axis))
                factor.meta["val"] = size
                product = node.graph.call_function(operator.mul, (factor, count))
                product.meta["val"] = size * (
                    count if isinstance(count, int) else count.meta["val"]
                )
                count = product
    if isinstance(count, Node):
        node.replace_all_uses_with(count)
        node.graph.erase_node(node)
