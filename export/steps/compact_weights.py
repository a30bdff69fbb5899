"""Weights that a graph holds in fewer bits than float32, as constants.

A tensor is restored to float32 in the graph. ONNX Runtime computes that once, when it loads the
graph, and then runs as fast as with float32 constants. Rows of an embedding are looked up before
they are restored, so that the table stays small in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edge_sdk.runtime.quantize import quantize as quantized
from export.errors import ExportError
from export.steps.step import Tensors
from export.torch_internals import ConvolutionBase, TransposedConvolutionBase


@dataclass(frozen=True)
class Quantized:
    """A float32 tensor as ``codes * scale``.

    Attributes:
        codes: int8 from -127 to 127, in the shape of the tensor.
        scale: one float32 per channel, in a shape that broadcasts.
    """

    codes: Tensor
    scale: Tensor

    def restore(self) -> Tensor:
        """The float32 tensor."""
        return self.codes.to(torch.float32) * self.scale

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table (rows, width) by number, float32 (*ids.shape, width)."""
        return Quantized(F.embedding(ids, self.codes), F.embedding(ids, self.scale)).restore()


@dataclass(frozen=True)
class Half:
    """A float32 tensor as float16.

    Attributes:
        half: float16, in the shape of the tensor.
    """

    half: Tensor

    def restore(self) -> Tensor:
        """The float32 tensor."""
        return self.half.to(torch.float32)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of a table (rows, width) by number, float32 (*ids.shape, width)."""
        return F.embedding(ids, self.half).to(torch.float32)


Compact = Quantized | Half
"""A tensor in fewer bits."""


def quantize(weight: Tensor, *axes: int) -> Quantized:
    """Quantize a finite float32 tensor to 8 bits, symmetrically, with one scale per channel.

    ``scale = max|w| / 127`` over a channel, so no element changes by more than half of the scale. A
    channel whose scale would be subnormal (below 1.2e-38) becomes zero.

    Args:
        weight: the tensor.
        axes: axes whose positions are channels; 0 if none is given.
    """
    kept = axes or (0,)
    shape = [n if axis in kept else 1 for axis, n in enumerate(weight.shape)]
    # a device quantizes the weights that it has trained in the same way
    codes, scale = quantized(weight.detach().numpy(), shape)
    return Quantized(torch.from_numpy(codes), torch.from_numpy(scale))


def halve(name: str, weight: Tensor) -> Half:
    """Round a float32 tensor to float16.

    Raises:
        ExportError: a value is beyond 65504; the message names the tensor.
    """
    half = weight.to(torch.float16)
    if not torch.equal(half.isfinite(), weight.isfinite()):
        raise ExportError(f"{name} has values beyond 65504, the largest of float16")
    return Half(half)


def matrix_axes(module: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Names of the matrices in a module, their modules, and the axis of their output channels.

    These are the weights of linear layers, convolutions and embeddings. An embedding with
    ``max_norm`` is left out: a look-up changes its table.
    """
    for path, part in module.named_modules():
        matrix = _matrix(part)
        if matrix is not None:
            yield f"{path}.{matrix[0]}", part, matrix[1]


def is_grouped(module: nn.Module) -> bool:
    """Whether a module is a convolution in several groups."""
    return isinstance(module, ConvolutionBase) and module.groups > 1


def _matrix(module: nn.Module) -> tuple[str, int] | None:
    """The name of a module's matrix and the axis of its output channels, if it has one."""
    match module:
        case nn.MultiheadAttention() if module.in_proj_weight is not None:
            return "in_proj_weight", 0
        case nn.Embedding() if module.max_norm is not None:
            return None
        case TransposedConvolutionBase():
            return "weight", 1
        case nn.Linear() | nn.Embedding() | ConvolutionBase():
            return "weight", 0
    # the linear layer of GPT-2 in transformers has weights (in, out)
    return ("weight", 1) if type(module).__name__ == "Conv1D" else None


def constants_of(compact: Mapping[str, Compact]) -> Tensors:
    """The tensors that a graph holds for compact ones, by ``NAME/PART``."""
    return {
        f"{name}/{part.name}": getattr(tensor, part.name)
        for name, tensor in compact.items()
        for part in fields(tensor)
    }


@contextmanager
def restored(constants: Tensors, compact: Mapping[str, Compact]) -> Iterator[Tensors]:
    """All tensors of a graph by name, compact ones restored.

    Inside the block, look-ups in a restored table read the compact one.

    Args:
        constants: constants of the graph, with those of :func:`constants_of`.
        compact: compact tensors by name, for their kinds.
    """
    values, tables = dict(constants), {}
    for name, tensor in compact.items():
        held = type(tensor)(*(values.pop(f"{name}/{part.name}") for part in fields(tensor)))
        values[name] = held.restore()
        tables[id(values[name])] = held
    with _LookUp(tables):
        yield values


class _LookUp(TorchFunctionMode):
    """While active, looks up rows of a compact table before restoring them.

    Args:
        tables: compact tables by the id of the restored tensor.
    """

    def __init__(self, tables: Mapping[int, Compact]) -> None:
        super().__init__()
        self._tables = tables

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[Any],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.embedding and len(args) > 1 and id(args[1]) in self._tables:
            return self._tables[id(args[1])].rows(args[0])
        return function(*args, **(kwargs or {}))
