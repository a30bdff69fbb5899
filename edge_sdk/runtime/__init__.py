"""Runtimes: they run the step graphs of a bundle and hold its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import Array

MAX_THREADS = 1024
"""Largest number of threads that a setting may ask for."""


class Runtime(Protocol):
    """Runs the step graphs of one bundle and owns its state.

    The state stays inside the runtime between steps; :meth:`get_state` copies it out.
    """

    @property
    def loading_s(self) -> float:
        """Seconds spent on loading graphs so far. A graph is loaded when it is first run."""

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        """Replace parameters and statistics. Optimizer slots that are not given become zero."""

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        """A copy of parameters and statistics by name; with ``slots`` also the optimizer slots."""

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph. Its state outputs become the state.

        Args:
            graph: name of the graph.
            batch: the inputs other than state, by name.

        Returns:
            The outputs other than state, by name.
        """


def load_runtime(bundle: Bundle, threads: int = 1) -> Runtime:
    """The runtime that a bundle was exported for.

    Args:
        bundle: a verified bundle.
        threads: threads within one operator.

    Raises:
        BundleError: this version does not have the runtime, or its library is not installed.
    """
    if bundle.manifest.runtime == "onnx":
        from edge_sdk.runtime.onnx import OnnxRuntime

        return OnnxRuntime(bundle, threads)
    if bundle.manifest.runtime == "executorch":
        from edge_sdk.runtime.executorch import ExecutorchRuntime

        return ExecutorchRuntime(bundle, threads)
    raise BundleError(
        f"the bundle is for the runtime {bundle.manifest.runtime!r}; this version has onnx and "
        "executorch: upgrade cutlayer on the device"
    )
