"""Lowers the steps of a tier to the files that its runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from torch.export import ExportedProgram

from export.lowering import onnx
from export.lowering.content import step_digest
from export.lowering.export_cache import ExportCache, digest
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
        keys: hashes of the traced steps by name of the graph, see
            :func:`export.lowering.content.step_digest`; graphs without one are not cached.
    """

    files: Mapping[str, bytes]
    constants: Mapping[str, tuple[str, ...]]
    programs: Mapping[str, ExportedProgram] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)


def lower(
    runtime: RuntimeName,
    steps: Sequence[Step],
    places: Mapping[str, onnx.Place],
    cache: ExportCache | None = None,
) -> GraphFiles:
    """Lower steps for a runtime.

    Steps are traced in any case. What was traced decides whether a file in the cache is that of a
    step.

    Args:
        runtime: runtime to lower for.
        steps: steps of a tier.
        places: storage of the constants that ONNX files refer to; a ``.pte`` file contains all
            constants.
        cache: files that were lowered before; None to lower all.

    Raises:
        ExportError: a step cannot be traced, or has an operator that cannot be lowered.
    """
    if runtime == "torch":
        named = {step.name: f"cutlayer step {step.name}\n".encode() for step in steps}
        return GraphFiles(named, dict.fromkeys(named, ()))
    programs: dict[str, ExportedProgram] = {}
    keys: dict[str, str] = {}
    files: dict[str, bytes] = {}
    known: dict[int, str] = {}
    for step in steps:
        program = programs[step.name] = onnx.traced(step) if runtime == "onnx" else trace(step)
        key = None if cache is None else step_digest(step, program, places, known)
        if key is not None:
            keys[step.name] = key
        if runtime == "onnx":
            make = partial(onnx.lower, step, program, places)
            files[step.name] = _cached(cache, key, make)
    if runtime == "onnx":
        constants = {name: tuple(onnx.referred(data)) for name, data in files.items()}
        return GraphFiles(files, constants, programs, keys)
    from export.lowering import executorch

    key = digest(*keys.values()) if len(keys) == len(programs) else None
    data = _cached(cache, key, partial(executorch.lower, programs))
    return GraphFiles(dict.fromkeys(programs, data), dict.fromkeys(programs, ()), programs, keys)


def _cached(cache: ExportCache | None, key: str | None, make: Callable[[], bytes]) -> bytes:
    """A file from the cache, or else the file that ``make`` returns, which is then kept."""
    if cache is None or key is None:
        return make()
    key = digest("file", key)
    data = cache.get(key)
    if data is None:
        data = make()
        cache.put(key, data)
    return data
