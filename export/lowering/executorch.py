"""Lowers traced steps to ExecuTorch with XNNPACK: one file with a method per graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.export import ExportedProgram

from export.errors import ExportError, reason
from export.lowering.rewrites import rewrite


def lower(programs: Mapping[str, ExportedProgram]) -> bytes:
    """Lower programs to a ``.pte`` file with a method for each, deterministically.

    ExecuTorch plans memory for the upper bound of every symbolic dimension, so bounds should be
    no larger than the batches of devices. Constants are stored once for all methods.

    Args:
        programs: traced steps by the name of their graph.

    Returns:
        Content of the file.

    Raises:
        ExportError: ExecuTorch is not installed, or cannot lower an operator.
    """
    with _quiet():
        try:
            from executorch.backends.transforms.remove_clone_ops import RemoveCloneOpsTransform
            from executorch.exir import (
                EdgeCompileConfig,
                EdgeProgramManager,
                ExecutorchBackendConfig,
            )
            from executorch.exir.passes import MemoryPlanningPass
            from executorch.exir.program._program import _generate_edge_program
        except ImportError as error:
            raise ExportError(
                f"ExecuTorch is not installed ({error}); run pip install 'cutlayer[executorch]'"
            ) from error
        try:
            # to_edge would also decompose, which takes as long as everything else
            config = EdgeCompileConfig(
                _check_ir_validity=False,
                _skip_dim_order=True,
                preserve_ops=[torch.ops.aten.linear.default],
            )
            edge = EdgeProgramManager(
                {
                    name: _generate_edge_program(
                        config, rewrite(programs[name]), preserve_ops=config.preserve_ops
                    )
                    for name in sorted(programs)
                },
                compile_config=config,
            )
            edge = edge.transform([RemoveCloneOpsTransform(preserve_input_output_copies=True)])
            with _few_passes():
                edge = edge.to_backend(_partitioner())
            # inputs are read where they are, instead of being copied into planned memory
            planning = MemoryPlanningPass(alloc_graph_input=False)
            lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
            _check_kernels(lowered.executorch_program)
            data: bytes = lowered.buffer
        except Exception as error:  # ExecuTorch's passes raise errors of any class
            raise ExportError(
                f"no ExecuTorch translation for its training step ({reason(error)}); replace it "
                "by convolutions, linear layers, norms, attention and elementwise functions, or "
                "export the tier for onnx"
            ) from error
    return data


def _check_kernels(program: Any) -> None:
    """Raise :class:`ExportError` if ExecuTorch has no kernel for an operator of ``program``."""
    from executorch.extension.pybindings.portable_lib import _get_operator_names

    known = set(_get_operator_names())
    for plan in program.execution_plan:
        for operator in plan.operators:
            name = f"{operator.name}.{operator.overload}".removesuffix(".")
            if name not in known:
                raise ExportError(f"no kernel for {name}")


def _partitioner() -> Any:
    """XNNPACK's partitioner, extended by slices and products that XNNPACK can run.

    Weights of linear layers are inputs of the delegate even if they are constant: then they are
    stored once, instead of once per method, forward and backward. Packing them in each call takes
    little time beside the product of a batch.
    """
    from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
    from executorch.backends.xnnpack.partition.config.gemm_configs import ConvolutionConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import SliceCopyConfig
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

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
    from executorch.backends.xnnpack import _passes as passes
    from executorch.backends.xnnpack import xnnpack_preprocess as preprocess

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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warnings of ExecuTorch's modules."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
