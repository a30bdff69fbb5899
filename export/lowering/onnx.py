"""Lowering to ONNX."""

from __future__ import annotations

import logging
import warnings

import torch

from export.errors import ExportError
from export.lowering.trace import trace
from export.steps import Step

logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


def lower(step: Step) -> bytes:
    """An ONNX file of standard operators whose inputs and outputs are the step's ports.

    Raises:
        ExportError: an operator has no translation.
    """
    program = trace(step)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.onnx.export(
                program,
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[port.spec.name for port in step.inputs],
                output_names=[port.spec.name for port in step.outputs],
            )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"no ONNX translation: {_reason(error)}") from error
    assert exported is not None
    model = exported.model_proto
    # What the exporter notes for debugging makes the file about ten times larger.
    model.graph.ClearField("value_info")
    model.ClearField("metadata_props")
    model.graph.ClearField("metadata_props")
    for node in model.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _reason(error: BaseException) -> str:
    """The innermost cause, in one line: exporter errors wrap the useful one several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
