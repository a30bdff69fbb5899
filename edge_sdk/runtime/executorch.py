"""Step graphs on ExecuTorch: graphs are methods of ``.pte`` files, most of them of one.

ExecuTorch's Python binding deals in torch tensors, so it needs torch
(``pip install 'cutlayer[executorch]'``); both are imported when a bundle for ExecuTorch is opened.
On a phone the same file runs through ExecuTorch's Java or C++ interface, without torch.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_sdk.bundle.manifest import Bundle, Port
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import DTYPES, Array
from edge_sdk.runtime.executorch_binding import load_binding, quiet
from edge_sdk.runtime.quantize import check_weights, has_weights


class ExecutorchRuntime:
    """Implements :class:`edge_sdk.runtime.Runtime`.

    A step's outputs live in memory that the next step overwrites, so the binding copies them; the
    copies are the state, or belong to the caller. A method is loaded when it is first run. Calls
    from several threads take turns.

    Args:
        bundle: a verified bundle whose graphs are methods of files.
        threads: size of XNNPACK's thread pool, of which a process has only one: the runtime opened
            last sets it for all.

    Raises:
        BundleError: ExecuTorch is not installed, or cannot read the file.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        binding = load_binding()
        self._torch = binding.torch
        self.manifest = bundle.manifest
        # modules read the files in place: freeing the bytes would crash the process
        graphs = self.manifest.graphs
        self._files = {graphs[name].blob: file for name, file in bundle.graphs.items()}
        with quiet():
            binding.set_threads(threads)
            try:
                self._modules = {blob: binding.open(f) for blob, f in self._files.items()}
                methods = {blob: m.method_names() for blob, m in self._modules.items()}
            except RuntimeError as error:
                raise BundleError(
                    f"ExecuTorch cannot read the bundle's file ({error}): it is damaged or for "
                    "another version of ExecuTorch; export it with the version that runs it"
                ) from error
        for name, graph in graphs.items():
            if name not in methods[graph.blob]:
                raise BundleError(f"the bundle's file has no method {name!r}; export it again")
        self._initial_state = bundle.initial_state
        self._with_weights = {n for n in graphs if has_weights(self.manifest, n)}
        self._checked = False  # whether the state is the initial one, as those graphs have it
        self._state: dict[str, Any] = {}
        self._turn = threading.Lock()
        self._loaded: set[str] = set()
        self.loading_s = 0.0
        """Seconds spent on loading methods so far, their first run included."""
        self.set_state(bundle.initial_state)

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        values = self.manifest.fresh_state(tensors)
        with self._turn:
            self._state = {name: self._torch.from_numpy(value) for name, value in values.items()}
            self._checked = False

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        with self._turn:
            return self._exchanged(slots)

    def _exchanged(self, slots: bool = False) -> dict[str, Array]:
        return {
            spec.name: self._state[spec.name].numpy().copy()
            for spec in self.manifest.exchanged(slots)
        }

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph on ``batch`` (inputs other than state); outputs other than state.

        State outputs become the state.

        Raises:
            DataError: an input is missing, has another dtype or shape, or is larger than the
                memory that the file plans for it.
            BundleError: the graph holds weights of the export, and the state has others; or a
                method cannot be loaded or fails.
        """
        spec = self.manifest.graphs[graph]
        given = {
            port.spec.name: self._input(graph, port, batch)
            for port in spec.inputs
            if port.role != "state"
        }
        with self._turn:
            if graph in self._with_weights and not self._checked:
                check_weights(self.manifest, graph, self._exchanged(), self._initial_state)
                self._checked = True
            inputs = [
                (self._state if port.role == "state" else given)[port.spec.name]
                for port in spec.inputs
            ]
            try:
                # a method is loaded when it is first run, and XNNPACK logs while it loads
                began, first = time.perf_counter(), graph not in self._loaded
                with quiet() if first else contextlib.nullcontext():
                    outputs = self._modules[spec.blob].run_method(graph, inputs)
                if first:
                    self._loaded.add(graph)
                    self.loading_s += time.perf_counter() - began
            except RuntimeError as error:
                raise BundleError(
                    f"ExecuTorch cannot run the graph {graph!r} ({error}); export the bundle "
                    "again with the version of ExecuTorch that runs it"
                ) from error
            results: dict[str, Array] = {}
            states = iter(self.manifest.state)
            for port, output in zip(spec.outputs, outputs, strict=True):
                if port.role == "state":
                    self._state[next(states).spec.name] = output
                    self._checked = False
                else:
                    results[port.spec.name] = output.numpy()
            return results

    def _input(self, graph: str, port: Port, batch: Mapping[str, Array]) -> Any:
        """One checked input as a torch tensor. The binding itself accepts wrong ones silently."""
        spec = port.spec
        if spec.name not in batch:
            raise DataError(f"the graph {graph!r} needs the input {spec.name!r}")
        value = np.asarray(batch[spec.name])
        fits = value.dtype == DTYPES[spec.dtype] and value.ndim == len(spec.shape)
        for size, wanted in zip(value.shape, spec.shape, strict=False):
            if not isinstance(wanted, str):
                fits = fits and size == wanted
                continue
            limit = self.manifest.limits.get(wanted)
            if size < 1 or (limit is not None and size > limit):
                raise DataError(
                    f"{spec.name} has a {wanted} of {size}; the bundle was exported for "
                    f"1 to {limit}: use a smaller one, or export with a higher limit"
                )
        if not fits:
            raise DataError(
                f"{spec.name} is {value.dtype} {list(value.shape)}, "
                f"must be {spec.dtype} {list(spec.shape)}"
            )
        if not value.flags.writeable or not value.flags.c_contiguous:
            value = np.array(value, order="C")  # torch wants neither
        return self._torch.from_numpy(value)
