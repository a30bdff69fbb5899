"""The private parts of ExecuTorch that the lowering uses; nothing else imports one.

Written for ExecuTorch 1.4.1, which ``pyproject.toml`` pins. ``tests/export/test_internals.py``
compares every name with the signature that it had there. The private parts of the runtime are in
:mod:`edge_sdk.runtime.executorch_binding`.

Publicly there are ``to_edge`` and ``XnnpackPartitioner()``. They decompose and trace every program
again, run passes that change nothing, store weights once for every method, and leave slices of
tensors with symbolic dimensions and constant convolutions to portable kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
from executorch.backends.xnnpack import _passes as passes
from executorch.backends.xnnpack import xnnpack_preprocess as preprocess
from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import (
    EdgeCompileConfig,
    EdgeProgramManager,
    ExecutorchBackendConfig,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from executorch.exir.program._program import _generate_edge_program
from torch.export import ExportedProgram


def to_executorch(programs: Mapping[str, ExportedProgram]) -> tuple[bytes, set[str]]:
    """Lower programs of core operators to a file with a method for each.

    Args:
        programs: programs by the name of their method.

    Returns:
        Content of the file, and the names of the operators that XNNPACK does not run.

    Raises:
        Exception: a pass fails on a program.
    """
    # to_edge would also decompose, which takes as long as everything else
    config = EdgeCompileConfig(
        _check_ir_validity=False,
        _skip_dim_order=True,
        preserve_ops=[torch.ops.aten.linear.default],
    )
    edge = EdgeProgramManager(
        {
            name: _generate_edge_program(config, program, preserve_ops=config.preserve_ops)
            for name, program in programs.items()
        },
        compile_config=config,
    )
    edge = edge.transform([RemoveCloneOpsTransform(preserve_input_output_copies=True)])
    with _few_passes():
        edge = edge.to_backend(_partitioner())
    # inputs are read where they are, instead of being copied into planned memory
    planning = MemoryPlanningPass(alloc_graph_input=False)
    lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return lowered.buffer, _operators(lowered)


def to_inference_file(
    program: ExportedProgram, constant_methods: Mapping[str, str]
) -> tuple[bytes, set[str]]:
    """Lower a program of ``torch.export`` for inference, by ExecuTorch's own passes.

    Weights are packed when the file is loaded, and batch norms are joined with convolutions.

    Args:
        program: the program, which becomes the method ``forward``.
        constant_methods: texts that further methods return, by their names.

    Returns:
        Content of the file, and the names of the operators that XNNPACK does not run.

    Raises:
        Exception: a pass fails on the program.
    """
    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
        constant_methods=dict(constant_methods),
    ).to_executorch()
    return lowered.buffer, _operators(lowered)


def _operators(lowered: Any) -> set[str]:
    """Names of the operators of a program that XNNPACK does not run."""
    return {
        f"{operator.name}.{operator.overload}".removesuffix(".")
        for plan in lowered.executorch_program.execution_plan
        for operator in plan.operators
    }


def _partitioner() -> Any:
    """XNNPACK's partitioner, extended by slices and products that XNNPACK can run.

    Weights of linear layers are inputs of the delegate even if they are constant: then they are
    stored once, instead of once per method, forward and backward. Packing them in each call takes
    little time beside the product of a batch.
    """

    class AnySlice(SliceCopyConfig):  # type: ignore[misc]
        """Accepts slices of tensors with symbolic dimensions, which XNNPACK clips to the tensor."""

        def check_constraints(self, node: Any, ep: ExportedProgram) -> bool:
            step = node.args[4] if len(node.args) > 4 else 1
            axis = node.args[1] if len(node.args) > 1 else 0
            fixed = isinstance(node.args[0].meta["val"].shape[axis], int)
            return step == 1 and fixed and bool(self.check_common_constraints(node, ep))

    class ConstantConvolution(ConvolutionConfig):  # type: ignore[misc]
        """Keeps weight and bias as constants: the option below is for linear layers only."""

        def __init__(self, **_: Any) -> None:
            super().__init__()

    own = {SliceCopyConfig: AnySlice, ConvolutionConfig: ConstantConvolution}
    configs = [own.get(config, config) for config in ALL_PARTITIONER_CONFIGS]
    return XnnpackPartitioner(configs=configs, force_non_static_weights_for_f32_linear=True)


@contextmanager
def _few_passes() -> Iterator[None]:
    """Restrict XNNPACK to the passes that change a partition.

    Every pass traces the partition again, even if it changes nothing, and that is most of the time
    of lowering. Step graphs need no passes for quantization or batch norms.
    """
    layout = passes.ChannelsLastTaggedReshapePass
    nhwc = {op.__name__ for op in layout.memory_sensitive_ops_nhwc}
    needed = {
        passes.XNNPACKRemoveCloneOpsTransform: {"aten.clone.default"},
        passes.FuseActivationPass: {"aten.relu.default", "aten.hardtanh.default"},
        passes.DecomposeConcatenate: {"aten.cat.default"},
        passes.RemoveGetItemPass: {"aten.max_pool2d_with_indices.default", "aten.max.dim"},
        passes.Conv1dUnsqueezePass: {"aten.convolution.default"},
        passes.PReLUReshapePass: {"aten.prelu.default"},
        layout: nhwc,
        passes.RemoveRedundantCopyPass: nhwc,
    }

    class FewPasses(passes.XNNPACKPassManager):  # type: ignore[misc]
        def __init__(self, program: ExportedProgram, passes: Any = None) -> None:
            super().__init__(program, passes)
            calls = [node for node in program.graph.nodes if node.op == "call_function"]
            names = {node.target.__name__ for node in calls}
            self.passes = [p for p, operators in needed.items() if operators & names]

    original = preprocess.XNNPACKPassManager
    preprocess.XNNPACKPassManager = FewPasses
    try:
        yield
    finally:
        preprocess.XNNPACKPassManager = original
