"""Lowers traced steps to ExecuTorch with XNNPACK: one file with a method per graph."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch.export import ExportedProgram

from edge_sdk.runtime.executorch_binding import load_binding
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
            from export.lowering.executorch_internals import to_executorch
        except ImportError as error:
            raise ExportError(
                f"ExecuTorch is not installed ({error}); run pip install 'cutlayer[executorch]'"
            ) from error
        try:
            data, operators = to_executorch({n: rewrite(programs[n]) for n in sorted(programs)})
            missing = sorted(operators - load_binding().kernels())
            if missing:
                raise ExportError(f"no kernel for {missing[0]}")
        except Exception as error:  # ExecuTorch's passes raise errors of any class
            raise ExportError(
                f"no ExecuTorch translation for its training step ({reason(error)}); replace it "
                "by convolutions, linear layers, norms, attention and elementwise functions, or "
                "export the tier for onnx"
            ) from error
    return data


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
