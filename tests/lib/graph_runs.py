"""Runs lowered graphs without a bundle, and verifies them with errors planted in their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor
from torch.export import ExportedProgram

from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.executorch_binding import load_binding, quiet
from export.lowering.graph_files import GraphFiles, RuntimeName, lower
from export.lowering.trace import trace
from export.lowering.verification.draws import Like
from export.lowering.verification.verify import Report, Verifier
from export.steps.client_steps import ClientSteps
from export.steps.step import Step

Run = Callable[[Step, dict[str, Array]], dict[str, Array]]
"""Runs the graph of a step: inputs by name to outputs by name."""


def run_of(runtime: RuntimeName, steps: Sequence[Step]) -> Run:
    """Lower steps without places of constants, and return what runs them."""
    return run_files(runtime, lower(runtime, steps, {}))


def run_files(runtime: RuntimeName, lowered: GraphFiles) -> Run:
    """Return what runs lowered graphs."""
    if runtime == "torch":
        return run_eagerly
    if runtime == "onnx":
        return partial(_run_onnx, lowered, {})
    with quiet():
        data = next(iter(lowered.files.values()))
        module = load_binding().open(data)
    return partial(_run_pte, module, data)


def run_eagerly(step: Step, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Run the function of a step in eager PyTorch."""
    given = {p.spec.name: _tensor(feeds[p.spec.name]) for p in step.inputs}
    outputs = step.function(dict(step.constants), given)
    return {p.spec.name: outputs[p.spec.name].detach().numpy() for p in step.outputs}


def _run_onnx(
    lowered: GraphFiles,
    sessions: dict[str, ort.InferenceSession],
    step: Step,
    feeds: dict[str, Array],
) -> dict[str, Array]:
    if step.name not in sessions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        external = list(lowered.constants[step.name])
        values = [ort.OrtValue.ortvalue_from_numpy(step.constants[n].numpy()) for n in external]
        options.add_external_initializers(external, values)
        sessions[step.name] = ort.InferenceSession(
            lowered.files[step.name], options, providers=["CPUExecutionProvider"]
        )
    names = [port.spec.name for port in step.outputs]
    return dict(zip(names, sessions[step.name].run(names, feeds), strict=True))


def _run_pte(module: Any, data: bytes, step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
    with quiet():
        inputs = [_tensor(feeds[port.spec.name]) for port in step.inputs]
        outputs = module.run_method(step.name, inputs)
    names = [port.spec.name for port in step.outputs]
    return {n: t.detach().numpy().copy() for n, t in zip(names, outputs, strict=True)}


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array, order="C"))


_TRACED: dict[int, tuple[Step, ExportedProgram]] = {}
"""A few steps that were traced last: tests verify one step with several errors."""


def _traced(step: Step) -> ExportedProgram:
    if id(step) not in _TRACED:
        while len(_TRACED) > 3:
            _TRACED.pop(next(iter(_TRACED)))
        _TRACED[id(step)] = step, trace(step)
    return _TRACED[id(step)][1]


class _Runtime:
    """A runtime of the SDK around a function that runs one step, which may be wrong."""

    loading_s = 0.0

    def __init__(self, steps: ClientSteps, step: Step, run: Run) -> None:
        self._step, self._run = step, run
        self._state = {n: t.numpy() for n, t in {**steps.initial, **steps.slots}.items()}

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        self._state |= tensors

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        return dict(self._state)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        feeds = {**self._state, **batch}
        names = [port.spec.name for port in self._step.inputs]
        outputs = self._run(self._step, {n: feeds[n] for n in names})
        after = {n: outputs.pop(n) for n in list(outputs) if n.startswith("next/")}
        self._state |= {n.removeprefix("next/"): a for n, a in after.items()}
        return outputs


def verify(steps: ClientSteps, step: Step, run: Run, example: Tensor) -> Report:
    """Verify a step whose graph is run by a function; return what was verified.

    Raises:
        ExportError: the graph fails or differs.
    """
    verifier = Verifier(steps, Like(example))
    verifier.verify(step, _traced(step), lambda threads: _Runtime(steps, step, run))
    return verifier.report
