"""The private parts of ExecuTorch's Python binding; nothing else imports it, or torch, in the SDK.

Written for ExecuTorch 1.4.1. ``tests/export/test_internals.py`` compares every name with the
signature that it had there. The public ``executorch.runtime`` has no thread pool; it opens files
through the same private functions.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_sdk.errors import BundleError


@dataclass(frozen=True)
class Binding:
    """ExecuTorch's Python binding.

    Attributes:
        torch: torch, in whose tensors the binding deals.
        library: the binding's module.
    """

    torch: Any
    library: Any

    def open(self, file: bytes) -> Any:
        """Open a ``.pte`` file, which is read in place: the bytes must outlive the result.

        Returns:
            An object with ``method_names()`` and ``run_method(name, inputs)``.

        Raises:
            RuntimeError: the file is damaged, or for another version.
        """
        return self.library._load_for_executorch_from_buffer(file)

    def set_threads(self, threads: int) -> None:
        """Set the size of XNNPACK's thread pool, of which a process has only one."""
        if self.library._threadpool_get_thread_count() != threads:
            self.library._unsafe_reset_threadpool(threads)

    def kernels(self) -> set[str]:
        """Names of the operators that run without XNNPACK, such as ``aten::add.out``."""
        return set(self.library._get_operator_names())


def load_binding() -> Binding:
    """Import torch and the binding; :class:`BundleError` if they are not installed."""
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            import torch
            from executorch.extension.pybindings import portable_lib
        except ImportError as error:
            raise BundleError(
                f"the bundle is for ExecuTorch, which is not installed ({error}); "
                "run pip install 'cutlayer[executorch]', or export the tier for onnx"
            ) from error
    return Binding(torch, portable_lib)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide what ExecuTorch's C++ code logs; errors are raised as exceptions as well."""
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
