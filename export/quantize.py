"""The graph ``predict_int8``: inference with the weights as constants, matrices in 8 bits.

Matrices of linear layers, convolutions and embeddings are int8 with a float32 scale for each output
channel; activations and everything else are float32. The weights are those at export: this graph
does not follow training.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from edge_sdk.bundle import Manifest
from edge_sdk.data import Examples
from edge_sdk.device import softmax
from edge_sdk.learner import Learner
from edge_sdk.protocol.tensors import Array
from export.errors import ExportError
from export.lowering.lowered import Run
from export.lowering.verify import verify
from export.split import ClientSegment
from export.steps import ClientSteps, Step

INT8 = "predict_int8"
"""Name of the graph."""

MAX_LOSS = 0.01

_LARGEST = 127


@dataclass(frozen=True)
class Quantized:
    """A tensor as ``codes * scale``.

    Attributes:
        codes: int8, from -127 to 127, in the shape of the tensor.
        scale: float32 of each channel, in a shape that broadcasts.
    """

    codes: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The float32 tensor."""
        return self.codes.to(torch.float32) * self.scale


def quantize(weight: Tensor, axis: int = 0) -> Quantized:
    """Round a float32 tensor to 8 bits, symmetrically, with a scale for each channel of ``axis``.

    ``scale = max|w| / 127``; an element changes by half of it at most. A channel of zeros has the
    scale 1.

    Raises:
        ExportError: an element is not finite.
    """
    if not torch.isfinite(weight).all():
        raise ExportError("it holds values that are not finite (NaN or infinity)")
    others = [d for d in range(weight.dim()) if d != axis]
    largest = weight.abs().amax(others, keepdim=True)
    # a scale that is subnormal has lost bits: such a channel is as good as zero
    scale = torch.where(largest < _LARGEST * torch.finfo().tiny, 1.0, largest / _LARGEST)
    codes = torch.round(weight / scale).clamp(-_LARGEST, _LARGEST).to(torch.int8)
    return Quantized(codes, scale)


def matrices(segment: nn.Module) -> dict[str, int]:
    """Names of the weights to quantize, with the axis of their output channels."""
    found = {}
    for path, module in segment.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found[f"{prefix}in_proj_weight"] = 0
        elif isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            found[f"{prefix}weight"] = 0
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer, (in, out)
            found[f"{prefix}weight"] = 1
        elif isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            found[f"{prefix}weight"] = 1
    return found
