"""Rewrites a step graph to the operators that ExecuTorch accelerates with XNNPACK.

XNNPACK multiplies two computed matrices only as ``bmm`` or ``linear``, convolves only with constant
weights, slices only with a step of 1, reshapes with at most one symbolic dimension, and has neither
comparisons nor sums. All other operators run on portable kernels, which are 10 to 50 times slower.
A rule replaces an operator by operators that XNNPACK supports. It is a function of tensors with the
signature of that operator, and raises :class:`Declined` if it does not apply. All rules are exact
up to float32 rounding.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, TensorArgument
from torch.nn.functional import linear

from export.torch_internals import GraphShapes, flatten, unflatten, with_graph

aten = torch.ops.aten

Size = int | torch.SymInt

_LARGEST = torch.finfo(torch.float32).max


class Declined(Exception):
    """A rule does not apply to the given tensors."""


# matrix products


def mm(a: Tensor, b: Tensor) -> Tensor:
    """A matrix product as a batched product with one batch."""
    return torch.bmm(a.unsqueeze(0), b.unsqueeze(0)).squeeze((0,))


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """A matrix product as a batched product with one batch, and an addition."""
    product = mm(a, b)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


# convolutions


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor:
    """A 1-D or 2-D convolution as matrix products over shifted inputs, channels last.

    The shifted inputs of one kernel row are concatenated as channels and multiplied with the
    weights of that row in one product; the products of the rows are summed. This is im2col without
    its copies along the kernel's rows. A transposed convolution is a convolution over the input
    with zeros between its elements.
    """
    if any(not isinstance(n, int) for n in x.shape[2:]) or weight.dim() not in (3, 4):
        raise Declined
    if weight.dim() == 3:
        y = convolution(
            x.unsqueeze(2), weight.unsqueeze(2), bias, [1, *stride], [0, *padding],
            [1, *dilation], transposed, [0, *output_padding], groups,
        )  # fmt: skip
        return y.squeeze((2,))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    x = x.permute(0, 2, 3, 1)
    if transposed:
        for axis in (1, 2):
            x = _spread(x, axis, stride[axis - 1])
        before = [r - p for r, p in zip(reach, padding, strict=True)]
        # _spread adds surplus zeros behind the last element
        after = [
            b + extra - (s - 1) for b, extra, s in zip(before, output_padding, stride, strict=True)
        ]
        stride = [1, 1]
        weight = weight.flip((2, 3)).reshape(groups, -1, *weight.shape[1:])
        weight = weight.permute(0, 2, 1, 3, 4).reshape(-1, weight.shape[1], *weight.shape[3:])
    else:
        before = after = list(padding)
    for axis in (1, 2):
        x = _resize(x, axis, before[axis - 1], after[axis - 1])
    if weight.shape[1] == 1 and groups > 1:
        y = _depthwise(x, weight, stride, dilation)
    elif groups > 1:
        c_in, c_out = weight.shape[1], weight.shape[0] // groups
        parts = [
            _dense(
                _part(x, 3, g * c_in, c_in), _part(weight, 0, g * c_out, c_out), stride, dilation
            )
            for g in range(groups)
        ]
        y = torch.cat(parts, 3)
    else:
        y = _dense(x, weight, stride, dilation)
    if bias is not None:
        y = y + bias
    return y.permute(0, 3, 1, 2)


def _dense(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """Convolution without groups of a padded input (N, H, W, C), to (N, H', W', C')."""
    c_out, c_in, rows, columns = weight.shape
    out = _out_size(x, weight, stride, dilation)
    shifted = [
        _window(x, 2, j * dilation[1], out[1], stride[1]) for j in range(columns)
    ]  # each (N, H, OW, C)
    wide = _cat(shifted, 3)
    by_row = weight.permute(0, 2, 3, 1).reshape(c_out, rows, columns * c_in)
    products = [
        linear(
            _window(wide, 1, i * dilation[0], out[0], stride[0]),
            by_row[:, i : i + 1].reshape(c_out, columns * c_in),
        )
        for i in range(rows)
    ]
    return _sum(products)


def _depthwise(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> Tensor:
    """Depthwise convolution of a padded input (N, H, W, C) with weights (C * M, 1, KH, KW)."""
    channels, (rows, columns) = x.shape[3], weight.shape[2:]
    out = _out_size(x, weight, stride, dilation)
    # (KH * KW, M, C): M passes over the channels give the M outputs of each channel
    passes = weight.reshape(channels, -1, rows * columns).permute(2, 1, 0)
    windows = [
        _window(
            _window(x, 2, j * dilation[1], out[1], stride[1]),
            1, i * dilation[0], out[0], stride[0],
        )
        for i, j in itertools.product(range(rows), range(columns))
    ]  # fmt: skip
    results = [
        _sum([w * passes[k : k + 1, m : m + 1] for k, w in enumerate(windows)]).unsqueeze(4)
        for m in range(passes.shape[1])
    ]
    return _cat(results, 4).reshape(x.shape[0], *out, -1)


def _out_size(x: Tensor, weight: Tensor, stride: list[int], dilation: list[int]) -> list[int]:
    return [
        (x.shape[1 + i] - dilation[i] * (weight.shape[2 + i] - 1) - 1) // stride[i] + 1
        for i in range(2)
    ]


def _window(x: Tensor, axis: int, start: int, size: int, step: int) -> Tensor:
    """``size`` elements of an axis from ``start`` on, ``step`` apart, by slices with step 1.

    The axis is folded into rows of ``step`` elements, and one column is selected.
    """
    if step == 1:
        return _part(x, axis, start, size)
    first, column = divmod(start, step)
    missing = (first + size) * step - x.shape[axis]
    x = _resize(x, axis, 0, missing)
    folded = x.reshape(*x.shape[:axis], first + size, step, *x.shape[axis + 1 :])
    picked = _part(folded, axis + 1, column, 1).squeeze((axis + 1,))
    return _part(picked, axis, first, size) if first else picked


def _spread(x: Tensor, axis: int, step: int) -> Tensor:
    """Insert ``step - 1`` zeros behind every element of an axis."""
    if step == 1:
        return x
    apart = _resize(x.unsqueeze(axis + 1), axis + 1, 0, step - 1)
    return apart.reshape(*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :])


def _resize(x: Tensor, axis: int, before: int, after: int, value: float = 0.0) -> Tensor:
    """Pad both ends of an axis with a value; negative numbers crop."""
    if before < 0 or after < 0:
        start = max(-before, 0)
        x = _part(x, axis, start, x.shape[axis] - start - max(-after, 0))
    if before > 0 or after > 0:
        pad = [0, 0] * (x.dim() - 1 - axis) + [max(before, 0), max(after, 0)]
        x = aten.constant_pad_nd.default(x, pad, value)
    return x


def _part(x: Tensor, axis: int, start: int, size: int) -> Tensor:
    """``size`` elements of an axis from ``start`` on; all of them must exist."""
    return x if size == x.shape[axis] else aten.slice.Tensor(x, axis, start, start + size)


def _cat(tensors: Sequence[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), axis)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def slice_(
    x: Tensor, axis: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Tensor:
    """A slice with a step above 1 along an axis of known length."""
    length = x.shape[axis]
    if step == 1 or not isinstance(length, int) or not x.is_floating_point():
        raise Declined
    first, last, _ = slice(start, end).indices(length)
    size = len(range(first, last, step))
    if size == 0:
        raise Declined
    # elements behind the last row of the fold would be padded needlessly
    stop = min(length, (first // step + size) * step)
    return _window(_part(x, axis, 0, stop), axis % x.dim(), first, size, step)


def constant_pad_nd(x: Tensor, pad: list[int], value: float = 0.0) -> Tensor:
    """Padding with negative widths or with an infinity, which XNNPACK does not support."""
    if all(n >= 0 for n in pad) and math.isfinite(value):
        raise Declined
    value = min(max(value, -_LARGEST), _LARGEST)
    if all(n >= 0 for n in pad):
        return cast(Tensor, aten.constant_pad_nd.default(x, pad, value))
    for place in range(0, len(pad), 2):
        x = _resize(x, x.dim() - 1 - place // 2, pad[place], pad[place + 1], value)
    return x


# sums


def sum_(
    x: Tensor, dims: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """A sum over the last or the first dimensions, or both, as a product with ones."""
    return _reduce(x, dims, keepdim, dtype, mean=False)


def mean(
    x: Tensor, dims: list[int] | None = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    """A mean over the last dimensions, as a product with a constant."""
    return _reduce(x, dims, keepdim, dtype, mean=True)


def _reduce(x: Tensor, dims: list[int] | None, keepdim: bool, dtype: Any, mean: bool) -> Tensor:
    wanted = sorted(d % x.dim() for d in dims) if dims else list(range(x.dim()))
    if x.dtype != torch.float32 or dtype not in (None, x.dtype) or x.dim() == 0:
        raise Declined
    head = 0
    while head in wanted:
        head += 1
    tail = x.dim()
    while tail > head and tail - 1 in wanted:
        tail -= 1
    lasting = x.shape[head:tail]
    rest = x.shape[tail:]
    if wanted != [*range(head), *range(tail, x.dim())] or not all(_fixed(n) for n in rest):
        raise Declined
    if mean and head:
        raise Declined
    kept = [1 if d in wanted else n for d, n in enumerate(x.shape)]
    y = x
    if rest:
        n = math.prod(rest)
        weights = torch.full((1, n), 1 / n if mean else 1.0, device=x.device)
        y = linear(y.reshape(-1, n), weights)
    if head:
        columns = math.prod(lasting)
        if not _fixed(columns):
            raise Declined
        rows = math.prod(x.shape[:head])
        y = torch.bmm(torch.full((1, 1, rows), 1.0, device=x.device), y.reshape(1, rows, columns))
    return y.reshape(kept if keepdim else lasting)


def _fixed(size: Size) -> bool:
    return isinstance(size, int)


# elementwise functions


def erf(x: Tensor) -> Tensor:
    """The error function computed by GELU: ``gelu(a) / a = (1 + erf(a / √2)) / 2``.

    It is evaluated at ``|x|``, at least 1e-6, and gets the sign of ``x``. All graphs add 1 to the
    result, so the error near zero is within rounding.
    """
    size = (x.abs() * math.sqrt(2)).clamp(min=1e-6)
    positive: Tensor = aten.gelu.default(size) / size * 2 - 1
    return positive * (x * 1e30).clamp(-1.0, 1.0)


_RULES: dict[Any, Callable[..., Tensor]] = {
    aten.mm.default: mm,
    aten.addmm.default: addmm,
    aten.convolution.default: convolution,
    aten.constant_pad_nd.default: constant_pad_nd,
    aten.slice.Tensor: slice_,
    aten.sum.dim_IntList: sum_,
    aten.mean.dim: mean,
    aten.erf.default: erf,
}


# the graph


def rewrite(program: ExportedProgram) -> ExportedProgram:
    """A copy of ``program`` with all rewrites applied; inputs, outputs and constants stay."""
    module = fx.GraphModule(program.graph_module, copy.deepcopy(program.graph))
    graph = module.graph
    shapes = GraphShapes(graph)
    constants = _constants(program)
    _drop_copies(graph)
    _use_linear(graph, shapes)
    for node in list(graph.nodes):
        _fill(node)
        _use_masks(node, graph, shapes)
        _round_late(node, graph, shapes)
    for node in list(graph.nodes):
        rule = _RULES.get(node.target) if node.op == "call_function" else None
        if rule is not None and not _native(node, constants):
            _replace(node, rule, node.args, node.kwargs, graph, shapes)
    _use_views(graph)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return with_graph(program, module, _signature(program, graph))


def _signature(program: ExportedProgram, graph: fx.Graph) -> ExportGraphSignature:
    """The signature of ``program`` with the names of the output nodes of ``graph``."""
    signature = program.graph_signature
    nodes = cast(tuple[fx.Node, ...], graph.output_node().args[0])
    outputs = [
        dataclasses.replace(spec, arg=TensorArgument(name=node.name))
        for spec, node in zip(signature.output_specs, nodes, strict=True)
    ]
    return ExportGraphSignature(signature.input_specs, outputs)


def _constants(program: ExportedProgram) -> set[str]:
    """Names of the placeholders that are constants, not inputs."""
    signature = program.graph_signature
    return {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }


def _native(node: fx.Node, constants: set[str]) -> bool:
    """Whether a node is a convolution with constant weight and bias, which XNNPACK supports."""
    if node.target is not aten.convolution.default:
        return False
    return all(n is None or cast(fx.Node, n).name in constants for n in node.args[1:3])


def _replace(
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


def _drop_copies(graph: fx.Graph) -> None:
    """Remove clones, and expansions that broadcasting makes unnecessary."""
    elementwise = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.op != "call_function" or node in outputs:
            continue
        if node.target is aten.clone.default:
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten.expand.default:
            source, shape = node.args[0], list(node.meta["val"].shape)
            if list(source.meta["val"].shape) == shape or all(
                user.target in elementwise
                and any(
                    n is not node and list(n.meta["val"].shape) == shape
                    for n in user.all_input_nodes
                )
                for user in node.users
            ):
                node.replace_all_uses_with(source)


def _use_linear(graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace ``mm`` and ``addmm`` with a transposed second factor by ``linear``."""
    for node in list(graph.nodes):
        if node.target not in (aten.mm.default, aten.addmm.default) or node.kwargs:
            continue
        *bias, a, b = node.args
        vector = all(n.meta["val"].shape == node.meta["val"].shape[1:] for n in bias)
        if vector and b.target is aten.permute.default and list(b.args[1]) == [1, 0]:
            _replace(node, aten.linear.default, (a, b.args[0], *bias), {}, graph, shapes)


def _fill(node: fx.Node) -> None:
    """Replace uninitialised memory by zeros: ExecuTorch has no kernel for ``new_empty_strided``."""
    if node.target is aten.new_empty_strided.default:
        dtype = node.meta["val"].dtype
        node.target, node.args, node.kwargs = aten.full.default, (node.args[1], 0), {"dtype": dtype}


def _use_masks(node: fx.Node, graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace the gradient of ReLU, ``where(x <= 0, 0, g)``, by ``g`` times a mask of 0 and 1."""
    if node.target is not aten.where.self:
        return
    condition, zero, gradient = (cast(fx.Node, n) for n in node.args)
    if condition.target is not aten.le.Scalar or condition.args[1] != 0:
        return
    if zero.target is not aten.scalar_tensor.default or zero.args[0] != 0:
        return

    def masked(x: Tensor, g: Tensor) -> Tensor:
        return g * x.ceil().clamp(0.0, 1.0)

    _replace(node, masked, (condition.args[0], gradient), {}, graph, shapes)


_MAGIC = 1.5 * 2**23
"""Adding this number to a small float32 and subtracting it again rounds half to even."""


def _round_late(node: fx.Node, graph: fx.Graph, shapes: GraphShapes) -> None:
    """Replace ``clamp(round(x), -n, n)``, for a small integer n: clamp, then round by addition."""
    if node.target is not aten.clamp.default:
        return
    inner = cast(fx.Node, node.args[0])
    bounds = node.args[1:]
    if inner.target is not aten.round.default or len(bounds) != 2:
        return
    if not all(isinstance(b, int | float) and b == int(b) and abs(b) < 2**22 for b in bounds):
        return

    def rounded(x: Tensor) -> Tensor:
        return x.clamp(float(bounds[0]), float(bounds[1])) + _MAGIC - _MAGIC  # type: ignore[arg-type]

    _replace(node, rounded, (inner.args[0],), {}, graph, shapes)


_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_SQUEEZES = (aten.squeeze.dims, aten.squeeze.dim, aten.unsqueeze.default)


def _use_views(graph: fx.Graph) -> None:
    """Replace views and squeezes by ``view_copy``, with -1 for a single symbolic dimension.

    A view would be wrong after :func:`_drop_copies`, since the strides may not allow it.
    """
    outputs = set(graph.output_node().all_input_nodes)
    for node in list(graph.nodes):
        if node.target not in (*_VIEWS, *_SQUEEZES):
            continue
        source, shape = node.args[0], list(node.meta["val"].shape)
        symbolic = [i for i, n in enumerate(shape) if not isinstance(n, int)]
        if list(source.meta["val"].shape) == shape and node not in outputs:
            node.replace_all_uses_with(source)
        elif len(symbolic) <= 1:
            for i in symbolic:
                shape[i] = -1
            node.target, node.args = aten.view_copy.default, (source, shape)
        elif node.target in _VIEWS:  # its arguments compute the symbolic dimensions
            node.target = aten.view_copy.default
