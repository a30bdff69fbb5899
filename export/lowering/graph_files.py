"""Lowers the steps of a tier for its runtime, and runs the lowered graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import torch

from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.executorch_binding import load_binding, quiet
from export.lowering import onnx
from export.lowering.trace import trace
from export.steps.client_steps import Step

RuntimeName = Literal["onnx", "executorch", "torch"]
"""Name of a runtime: ``onnx`` or ``executorch`` on a device, ``torch`` in a simulation."""

Run = Callable[[Step, dict[str, Array]], dict[str, Array]]
"""Runs the lowered graph of a step: inputs by name to outputs by name."""


@dataclass(frozen=True)
class Lowered:
    """The lowered graphs of a tier.

    Attributes:
        files: content of the file of each graph, by name of the graph. ExecuTorch has one file
            for all graphs; a file for torch holds only the name of the graph.
        constants: names of the constants that each file refers to, by name of the graph.
        run: runs the graph of a step as a device does.
    """

    files: Mapping[str, bytes]
    constants: Mapping[str, tuple[str, ...]]
    run: Run


def lower(runtime: RuntimeName, steps: Sequence[Step], places: Mapping[str, onnx.Place]) -> Lowered:
    """Lower steps for a runtime.

    Args:
        runtime: runtime to lower for.
        steps: steps of a tier.
        places: storage of the constants that ONNX files refer to; a ``.pte`` file contains all
            constants.

    Raises:
        ExportError: a step cannot be traced, or has an operator that cannot be lowered.
    """
    if runtime == "onnx":
        files = {step.name: onnx.lower(step, places) for step in steps}
        constants = {name: tuple(onnx.referred(data)) for name, data in files.items()}
        return Lowered(files, constants, partial(_run_onnx, files, constants, {}))
    if runtime == "torch":
        files = {step.name: f"cutlayer step {step.name}\n".encode() for step in steps}
        return Lowered(files, dict.fromkeys(files, ()), _run_eagerly)
    from export.lowering import executorch

    data = executorch.lower({step.name: trace(step) for step in steps})
    names = [step.name for step in steps]
    with quiet():
        module = load_binding().open(data)
    return Lowered(dict.fromkeys(names, data), dict.fromkeys(names, ()), partial(_run_pte, module))


def _run_onnx(
    files: Mapping[str, bytes],
    constants: Mapping[str, tuple[str, ...]],
    sessions: dict[str, ort.InferenceSession],
    step: Step,
    feeds: dict[str, Array],
) -> dict[str, Array]:
    if step.name not in sessions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        external = list(constants[step.name])
        values = [ort.OrtValue.ortvalue_from_numpy(step.constants[n].numpy()) for n in external]
        options.add_external_initializers(external, values)
        sessions[step.name] = ort.InferenceSession(
            files[step.name], options, providers=["CPUExecutionProvider"]
        )
    names = [port.spec.name for port in step.outputs]
    return dict(zip(names, sessions[step.name].run(names, feeds), strict=True))


def _run_pte(module: Any, step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
    inputs = [torch.from_numpy(np.array(feeds[p.spec.name], order="C")) for p in step.inputs]
    with quiet():
        outputs = module.run_method(step.name, inputs)
    names = [port.spec.name for port in step.outputs]
    return {n: t.detach().numpy().copy() for n, t in zip(names, outputs, strict=True)}


def _run_eagerly(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
    inputs = [torch.from_numpy(np.array(feeds[p.spec.name], order="C")) for p in step.inputs]
    outputs = step.function(dict(step.constants), *inputs)
    names = [port.spec.name for port in step.outputs]
    return {n: t.detach().numpy() for n, t in zip(names, outputs, strict=True)}
