"""The private parts of torch's ONNX exporter that the lowering uses; nothing else imports one.

Written for torch 2.13 and onnxscript 0.7.2. ``tests/export/test_internals.py`` compares every name
with the signature that it had there.

The public ``torch.onnx.export`` decomposes a program again, and runs every node again to find its
dtype. That takes longer than everything else, and changes nothing: tracing has left core operators
only, and the result of every node with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import onnx
from onnxscript import ir
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.onnx._internal.exporter import _core, _registration
from torch.onnx._internal.fx.passes import InsertTypePromotion, type_promotion

for _part in (_registration, _core):
    logging.getLogger(_part.__name__).setLevel(logging.ERROR)

_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")


def to_onnx(program: ExportedProgram) -> ir.Model:
    """Translate a program of core operators, after :func:`convert_explicitly`, to ONNX.

    Raises:
        Exception: an operator has no translation (:func:`untranslated`), or a translation fails.
    """
    with _signatures_read_once():
        return _core._exported_program_to_onnx_program(
            program, registry=_registry(), lower="at_conversion"
        ).model


@contextmanager
def _signatures_read_once() -> Iterator[None]:
    """Let the exporter read the schema of an ONNX operator once, and not for every node.

    A schema does not change; reading it takes a quarter of the time of a translation.
    """
    original = ir.schemas.OpSignature.from_op_schema

    def read(schema: onnx.defs.OpSchema) -> Any:
        key = schema.domain, schema.name, schema.since_version
        if key not in _SIGNATURES:
            _SIGNATURES[key] = original(schema)
        return _SIGNATURES[key]

    with patch.object(ir.schemas.OpSignature, "from_op_schema", read):
        yield


_SIGNATURES: dict[tuple[str, str, int], Any] = {}


def untranslated(message: str) -> str | None:
    """The operator without a translation that an error of :func:`to_onnx` names, if it does."""
    found = _MISSING.search(message)
    return found[1] if found else None


@cache
def _registry() -> _registration.ONNXRegistry:
    return _registration.ONNXRegistry.from_torchlib()


def convert_explicitly(module: GraphModule) -> None:
    """Insert conversions where the inputs of an operator have different dtypes.

    ONNX operators do not convert by themselves. Torch's pass would run every node of the graph;
    only nodes that change are run here.
    """
    promotion = InsertTypePromotion(module)
    promotion.interpreter = _Promotion(module, promotion.interpreter.type_promotion_table)
    promotion.run()


class _Promotion(type_promotion._TypePromotionInterpreter):
    """Torch's pass, with the results that tracing has left."""

    def run_node(self, n: Node) -> Any:
        """The result of a node, after the conversions that it needs."""
        if n.op != "call_function" or "val" not in n.meta:
            return super().run_node(n)
        with self._set_current_node(n):
            rule = type_promotion.get_type_promotion_rule(n, self.type_promotion_table)
            if rule is not None:
                self._maybe_promote_node(n, rule)
        return n.meta["val"]
