"""The steps of a device in a runtime of the SDK, without a bundle on disk."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from edge_sdk.bundle.manifest import Bundle, Graph, Manifest
from edge_sdk.runtime import Runtime
from edge_sdk.runtime.executorch import ExecutorchRuntime
from edge_sdk.runtime.onnx import OnnxRuntime
from export.lowering.graph_files import RuntimeName, lower
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.step import Step
from export.steps.torch_runtime import TorchRuntime


def manifest_of(steps: ClientSteps, runtime: str, chosen: Sequence[Step] | None = None) -> Manifest:
    """A manifest for graphs in memory; every graph has its own blob, ExecuTorch's have one."""
    segment = steps.segment
    return Manifest(
        "test", segment.cut, runtime, segment.task, steps.classes, dict(steps.limits),
        tuple(segment.heads), steps.optimizer.name, steps.codec.name, steps.packed, steps.state,
        {
            s.name: Graph("0" if runtime == "executorch" else s.name, s.inputs, s.outputs)
            for s in (all_steps(steps) if chosen is None else chosen)
        },
        "", (), {},
    )  # fmt: skip


def runtime_of(
    steps: ClientSteps, name: RuntimeName, graphs: Collection[str] | None = None
) -> Runtime:
    """The steps in a runtime of the SDK; only those named in ``graphs``, or all."""
    chosen = [step for step in all_steps(steps) if graphs is None or step.name in graphs]
    manifest = manifest_of(steps, name, chosen)
    if name == "torch":
        return TorchRuntime(manifest, steps)
    files = dict(lower(name, chosen, {}).files)
    bundle = Bundle(manifest, files, {n: t.numpy() for n, t in steps.initial.items()})
    return OnnxRuntime(bundle) if name == "onnx" else ExecutorchRuntime(bundle)
