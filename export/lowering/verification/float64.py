"""Runs float32 code in float64: the traced graph and eager PyTorch, by one rule.

The rule: every operation that would compute with float32 computes with float64. A float32 input is
converted where it is used, a conversion to float32 is one to float64, and a tensor that would be
created in float32 is created in float64. Other dtypes stay: integers, booleans, float16, bfloat16.
So a cast to float32 inside a model (an RMSNorm, rotary embeddings) reads as float64 on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from export.torch_internals import OperatorMode, map_leaves, schema

aten = torch.ops.aten

_CHUNK = 2**20
"""Largest number of bytes of a float32 tensor that is converted at once.

So much stays in a processor's cache. Parts of 32 MiB take twice as long: each is new memory.
"""


class Float64(OperatorMode):  # type: ignore[no-untyped-call]
    """While active, operations on float32 tensors compute in float64.

    Views of float32 tensors stay float32, since they compute nothing. A large float32 factor of a
    matrix product is converted in parts, and of a table only the rows that are looked up, so a
    frozen model is never in memory as float64.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if _is_view(function):
            return function(*args, **kwargs)
        if function in _BY_PARTS and (done := _BY_PARTS[function](*args, **kwargs)) is not None:
            return done
        _check_mutation(function, args)
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args, kwargs = map_leaves(_widened, args), map_leaves(_widened, kwargs)
        if kwargs.get("dtype") is torch.float16 and function is aten._to_copy.default:
            # torch rounds to float32 on the way, which moves values near a tie
            return torch.from_numpy(args[0].numpy().astype(np.float16))
        result = function(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            # created in the default dtype: created anew, since a conversion would keep its rounding
            takes_dtype = any(a.name == "dtype" for a in schema(function).arguments)
            if takes_dtype and "dtype" not in kwargs:
                return function(*args, **kwargs, dtype=torch.float64)
            return result.double()
        return result


class Eager(TorchFunctionMode):
    """While active, functions that depend on the dtype itself are those of float32.

    ``rms_norm`` without an epsilon takes that of the dtype. The kernels of hardsigmoid and
    hardswish multiply with a sixth that is rounded to float32, also in float64.
    """

    def __torch_function__(
        self,
        function: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _OF_FLOAT32.get(function, function)(*args, **(kwargs or {}))


def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    eps = torch.finfo(torch.float32).eps if eps is None else eps
    return F.rms_norm(input, normalized_shape, weight, eps)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3) / 6


def _hardswish(input: Tensor, inplace: bool = False) -> Tensor:
    return input * F.relu6(input + 3) / 6


_OF_FLOAT32: dict[Any, Callable[..., Tensor]] = {
    F.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    F.hardsigmoid: _hardsigmoid,
    F.hardswish: _hardswish,
}


def _is_view(function: Any) -> bool:
    """Whether an operator only returns another view of its input."""
    returns = schema(function).returns
    return function in _COPIES_NOTHING or bool(
        returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    )


_COPIES_NOTHING = (aten.detach.default, aten.alias.default, aten.lift_fresh.default)


def _widened(value: Any) -> Any:
    wide = isinstance(value, Tensor) and value.dtype is torch.float32
    return value.double() if wide else value


def _check_mutation(function: Any, args: tuple[Any, ...]) -> None:
    """A converted copy would be changed in place of the tensor: nothing may change float32."""
    for argument, value in zip(schema(function).arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write:
            assert not isinstance(value, Tensor) or value.dtype is not torch.float32, (
                f"{function} changes a float32 tensor; it must be float64"
            )


def _mm(a: Tensor, b: Tensor) -> Tensor | None:
    """A product with a large float32 factor, which is converted in parts."""
    if _is_large(b):
        rows = max(1, _CHUNK // (4 * b.shape[1])) if b.shape[0] > b.shape[1] else 0
        if rows:  # sum over parts of the inner dimension
            total: Tensor | None = None
            for part, factor in zip(torch.split(a, rows, 1), torch.split(b, rows, 0), strict=True):
                product = _widened(part) @ factor.double()
                total = product if total is None else total.add_(product)
            return total
        columns = max(1, _CHUNK // (4 * b.shape[0]))
        wide = _widened(a)
        return torch.cat([wide @ part.double() for part in torch.split(b, columns, 1)], 1)
    if _is_large(a):
        product = _mm(b.t(), a.t())
        return None if product is None else product.t()
    return None


def _addmm(
    bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor | None:
    product = _mm(a, b)
    return None if product is None else beta * _widened(bias) + alpha * product


def _embedding(table: Tensor, rows: Tensor, *_: Any, **__: Any) -> Tensor | None:
    return table[rows].double() if _is_large(table) else None


def _is_large(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.nbytes > _CHUNK


_BY_PARTS: dict[Any, Callable[..., Tensor | None]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.embedding.default: _embedding,
}
