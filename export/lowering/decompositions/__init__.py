"""Decomposes backward operators into forward operators, which inference runtimes can run.

This package has only the operators that torch's core decompositions leave out, or compute in many
passes over large tensors. Each function has the signature of its operator and is exact up to
rounding; ``tests/export/test_decompositions.py`` compares it with eager autograd over random
shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.export import default_decompositions

from export.lowering.decompositions.activations import (
    gelu,
    gelu_backward,
    hardtanh_backward,
    silu,
    silu_backward,
    threshold_backward,
)
from export.lowering.decompositions.convolution import convolution_backward
from export.lowering.decompositions.indexing import (
    embedding_dense_backward,
    empty_permuted,
    index_put,
    pow_scalar,
    put,
    select_backward,
    slice_backward,
    squeeze_dims,
    unfold_backward,
)
from export.lowering.decompositions.norms import (
    batch_norm,
    batch_norm_eval,
    batch_norm_no_stats,
    group_norm_by_layer_norm,
    native_batch_norm_backward,
    native_group_norm,
    native_group_norm_backward,
    native_layer_norm_backward,
    vector_norm,
    weight_norm_backward,
)
from export.lowering.decompositions.padding import (
    reflection_pad,
    reflection_pad_backward,
    replication_pad_backward,
)
from export.lowering.decompositions.pooling import (
    adaptive_avg_pool2d,
    adaptive_avg_pool2d_backward,
    adaptive_max_pool2d,
    adaptive_max_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d_with_indices_backward,
)

aten = torch.ops.aten

__all__ = [
    "FORWARD",
    "convolution_backward",
    "decompositions",
    "native_group_norm",
    "native_group_norm_backward",
]


FORWARD: dict[Any, Callable[..., Any]] = {
    aten.gelu.default: gelu,
    aten.native_group_norm.default: group_norm_by_layer_norm,
}
"""Decompositions for ONNX Runtime alone; XNNPACK has a faster GELU, and no LayerNorm."""


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Decompositions by operator, for tracing: torch's core table, with some entries replaced."""
    ours: dict[Any, Callable[..., Any]] = {
        aten.threshold_backward.default: threshold_backward,
        aten.hardtanh_backward.default: hardtanh_backward,
        aten.silu.default: silu,
        aten.silu_backward.default: silu_backward,
        aten.gelu_backward.default: gelu_backward,
        aten.convolution_backward.default: convolution_backward,
        aten.native_group_norm.default: native_group_norm,
        aten.native_group_norm_backward.default: native_group_norm_backward,
        aten.native_layer_norm_backward.default: native_layer_norm_backward,
        aten._native_batch_norm_legit.default: batch_norm,
        aten._native_batch_norm_legit.no_stats: batch_norm_no_stats,
        aten._native_batch_norm_legit_no_training.default: batch_norm_eval,
        aten.native_batch_norm_backward.default: native_batch_norm_backward,
        aten._weight_norm_interface_backward.default: weight_norm_backward,
        aten.linalg_vector_norm.default: vector_norm,
        aten.max_pool2d_with_indices_backward.default: max_pool2d_with_indices_backward,
        aten.avg_pool2d.default: avg_pool2d,
        aten.avg_pool2d_backward.default: avg_pool2d_backward,
        aten._adaptive_avg_pool2d.default: adaptive_avg_pool2d,
        aten._adaptive_avg_pool2d_backward.default: adaptive_avg_pool2d_backward,
        aten.adaptive_max_pool2d.default: adaptive_max_pool2d,
        aten.adaptive_max_pool2d_backward.default: adaptive_max_pool2d_backward,
        aten.reflection_pad1d.default: reflection_pad,
        aten.reflection_pad2d.default: reflection_pad,
        aten.reflection_pad1d_backward.default: reflection_pad_backward,
        aten.reflection_pad2d_backward.default: reflection_pad_backward,
        aten.replication_pad1d_backward.default: replication_pad_backward,
        aten.replication_pad2d_backward.default: replication_pad_backward,
        aten.slice_backward.default: slice_backward,
        aten.unfold_backward.default: unfold_backward,
        aten.select_backward.default: select_backward,
        aten.embedding_dense_backward.default: embedding_dense_backward,
        aten.empty_permuted.default: empty_permuted,
        aten.index_put.default: index_put,
        aten.put.default: put,
        aten.pow.Tensor_Scalar: pow_scalar,
        aten.squeeze.dims: squeeze_dims,
    }
    table = {**_core(), **ours}
    table.pop(aten.squeeze.dim, None)  # torch would decompose it to squeeze.dims
    return table


@cache
def _core() -> dict[Any, Callable[..., Any]]:
    """Torch's core table, which is the same for every step and takes torch a while to build."""
    return dict(default_decompositions())
