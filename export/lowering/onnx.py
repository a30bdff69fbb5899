"""Lowering to ONNX."""

from __future__ import annotations

import logging
import re
import warnings

import torch

from export.errors import ExportError, reason
from export.lowering.trace import trace
from export.steps import Step

logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)

_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def lower(step: Step) -> bytes:
    """An ONNX file of standard operators whose inputs and outputs are the step's ports.

    Raises:
        ExportError: what is traced fixes the batch size, cannot be traced, or has an operator
            without a translation. The message is about the module that is to blame, which
            :func:`export.exact.find_culprit` finds.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.onnx.export(
                trace(step),
                dynamo=True,
                optimize=False,
                verbose=False,
                input_names=[port.spec.name for port in step.inputs],
                output_names=[port.spec.name for port in step.outputs],
            )
        except ExportError:
            raise
        except Exception as error:  # a model's code is traced: anything can come out
            missing = _MISSING.search(reason(error))
            why = f"{missing[1]} has none" if missing else reason(error)
            raise ExportError(
                f"no ONNX translation for its training step ({why}); replace it by convolutions, "
                "linear layers, norms, attention and elementwise functions, or cut before it"
            ) from error
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
