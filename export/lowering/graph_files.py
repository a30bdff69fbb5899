"""Lowers the steps of a tier to the files that its runtime runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch.export import ExportedProgram

from export.lowering import onnx
from export.lowering.trace import trace
from export.steps.step import Step

RuntimeName = Literal["onnx", "executorch", "torch"]
"""Name of a runtime: ``onnx`` or ``executorch`` on a device, ``torch`` in a simulation."""


@dataclass(frozen=True)
class GraphFiles:
    """The lowered graphs of a tier.

    Attributes:
        files: content of the file of each graph, by name of the graph. ExecuTorch has one file
            for all graphs; a file for torch holds only the name of the graph.
        constants: names of the constants that each file refers to, by name of the graph.
        programs: the traced programs that were lowered, by name of the graph; none for torch.
    """

    files: Mapping[str, bytes]
    constants: Mapping[str, tuple[str, ...]]
    programs: Mapping[str, ExportedProgram] = field(default_factory=dict)


def lower(
    runtime: RuntimeName, steps: Sequence[Step], places: Mapping[str, onnx.Place]
) -> GraphFiles:
    """Lower steps for a runtime.

    Args:
        runtime: runtime to lower for.
        steps: steps of a tier.
        places: storage of the constants that ONNX files refer to; a ``.pte`` file contains all
            constants.

    Raises:
        ExportError: a step cannot be traced, or has an operator that cannot be lowered.
    """
    if runtime == "torch":
        files = {step.name: f"cutlayer step {step.name}\n".encode() for step in steps}
        return GraphFiles(files, dict.fromkeys(files, ()))
    programs = {}
    if runtime == "onnx":
        files = {}
        for step in steps:
            programs[step.name] = onnx.traced(step)
            files[step.name] = onnx.lower(step, programs[step.name], places)
        constants = {name: tuple(onnx.referred(data)) for name, data in files.items()}
        return GraphFiles(files, constants, programs)
    from export.lowering import executorch

    programs = {step.name: trace(step) for step in steps}
    data = executorch.lower(programs)
    return GraphFiles(dict.fromkeys(programs, data), dict.fromkeys(programs, ()), programs)
