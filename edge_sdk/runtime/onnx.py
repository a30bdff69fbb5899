"""Step graphs on ONNX Runtime, with the state kept in OrtValues between steps."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnxruntime as ort

from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.quantize import check_weights, constants_from, has_weights, of_state

ort.set_default_logger_severity(3)

_ONNX_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10}
"""Numbers of dtypes in TensorProto.DataType."""


def _ort_value(tensor: Array) -> Any:
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(tensor, _ONNX_TYPES[tensor.dtype.name])


class _Sessions:
    """Sessions of a bundle's graphs, each loaded when it is first needed.

    All sessions share one copy of the frozen tensors. They keep no state: any number of threads may
    run them.
    """

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._manifest = bundle.manifest
        self._threads = threads
        self._files = dict(bundle.graphs)
        self._constants = {n: _ort_value(tensor) for n, tensor in bundle.constants.items()}
        self._loaded: dict[str, Any] = {}
        self._loading = threading.Lock()
        self.seconds = 0.0
        """Seconds spent on loading so far."""

    def get(self, graph: str) -> Any:
        """The session of a graph; :class:`BundleError` if ONNX Runtime cannot load it."""
        with self._loading:
            if graph not in self._loaded:
                began = time.perf_counter()
                self._loaded[graph] = self._load(graph)
                self.seconds += time.perf_counter() - began
                del self._files[graph]  # the session has its own copy
            return self._loaded[graph]

    def follow(self, graph: str, state: Mapping[str, Array]) -> Any:
        """A session of a graph whose constants are computed from a state.

        The session has its own copy of them.
        """
        own = constants_from(self._manifest, graph, state)
        with self._loading:
            began = time.perf_counter()
            session = self._load(graph, {name: _ort_value(array) for name, array in own.items()})
            self.seconds += time.perf_counter() - began
            return session

    def _load(self, graph: str, own: Mapping[str, Any] = MappingProxyType({})) -> Any:
        """Load a graph, with some constants of the caller in place of the bundle's."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        # its planned blocks hold more than is in use at any time: a third of a step's memory
        options.enable_mem_pattern = False
        if self._manifest.memory == "low":  # packed copies of weights and constants are not made
            options.add_session_config_entry("session.disable_prepacking", "1")
        constants = {n: self._constants[n] for n in self._manifest.graphs[graph].constants}
        # the first satisfies the file's references, with a copy for each session; the second has
        # the session read ours instead, and the copy is never made
        options.add_external_initializers([*constants], list({**constants, **own}.values()))
        for name in constants.keys() - own.keys():
            options.add_initializer(name, constants[name])
        try:
            return ort.InferenceSession(
                self._files[graph], options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises bare pybind exceptions
            raise BundleError(f"ONNX Runtime cannot load the graph {graph!r}: {error}") from error


@dataclass(frozen=True)
class _Bound:
    """A loaded graph.

    Attributes:
        session: its session.
        bindings: two I/O bindings, one for each set of buffers that it may read.
        changes: number of changes of the state before it was loaded.
    """

    session: Any
    bindings: list[Any]
    changes: int


class OnnxRuntime:
    """Implements :class:`edge_sdk.runtime.Runtime`.

    Two sets of buffers hold the state. A step reads one and writes the other, bound once through
    I/O binding, so no parameter is copied or allocated per step. Calls from several threads (a
    prediction while training goes on) take turns, step by step. A graph is loaded when it is first
    run.
    """

    def __init__(self, bundle: Bundle, threads: int = 1) -> None:
        self._start(bundle.manifest, bundle.initial_state, _Sessions(bundle, threads))

    def _start(
        self, manifest: Manifest, initial_state: Mapping[str, Array], sessions: _Sessions
    ) -> None:
        self.manifest = manifest
        self._initial_state = initial_state
        self._sessions = sessions
        self._names = [entry.spec.name for entry in manifest.state]
        self._bound: dict[str, _Bound] = {}
        self._buffers = [
            {
                entry.spec.name: ort.OrtValue.ortvalue_from_numpy(entry.zeros())
                for entry in manifest.state
            }
            for _ in range(2)
        ]
        self._current = 0
        self._changes = 0  # how many times the state has been replaced or trained
        self._with_weights = {n for n in manifest.graphs if has_weights(manifest, n)}
        self._turn = threading.Lock()
        self.set_state(initial_state)

    def fork(self) -> OnnxRuntime:
        """Another runtime of the same bundle, with the bundle's initial state.

        It shares the loaded graphs and the frozen tensors and has a state of its own. A further
        device in the same process therefore costs two copies of its state.
        """
        other = OnnxRuntime.__new__(OnnxRuntime)
        other._start(self.manifest, self._initial_state, self._sessions)
        return other

    def _bind(self, graph: str, session: Any, side: int) -> Any:
        """An I/O binding that reads the state from one set of buffers and writes the other."""
        spec = self.manifest.graphs[graph]
        binding = session.io_binding()
        for port in spec.inputs:
            if port.role == "state":
                binding.bind_ortvalue_input(port.spec.name, self._buffers[side][port.spec.name])
        states = iter(self._names)
        for port in spec.outputs:
            if port.role == "state":
                binding.bind_ortvalue_output(port.spec.name, self._buffers[1 - side][next(states)])
        return binding

    def _ready(self, graph: str) -> _Bound:
        """A graph that is loaded and bound, with the weights of the present state."""
        bound, changing = self._bound.get(graph), graph in self._with_weights
        if bound is not None and (bound.changes == self._changes or not changing):
            return bound
        if not changing:
            session = self._sessions.get(graph)
        elif of_state(self.manifest, graph):
            session = self._sessions.follow(graph, self._exchanged())
        else:
            check_weights(self.manifest, graph, self._exchanged(), self._initial_state)
            session = self._sessions.get(graph)
        bindings = [self._bind(graph, session, side) for side in range(2)]
        self._bound[graph] = _Bound(session, bindings, self._changes)
        return self._bound[graph]

    @property
    def loading_s(self) -> float:
        """Seconds spent on loading graphs so far."""
        return self._sessions.seconds

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        with self._turn:
            for name, value in self.manifest.fresh_state(tensors).items():
                self._buffers[self._current][name].update_inplace(value)
            self._changes += 1

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        with self._turn:
            return self._exchanged(slots)

    def _exchanged(self, slots: bool = False) -> dict[str, Array]:
        buffers = self._buffers[self._current]
        return {
            spec.name: buffers[spec.name].numpy().copy() for spec in self.manifest.exchanged(slots)
        }

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        with self._turn:
            return self._run(graph, batch)

    def _run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        spec = self.manifest.graphs[graph]
        bound = self._ready(graph)
        binding = bound.bindings[self._current]
        for port in spec.inputs:
            if port.role != "state":
                if port.spec.name not in batch:
                    raise DataError(f"the graph {graph!r} needs the input {port.spec.name!r}")
                binding.bind_cpu_input(port.spec.name, batch[port.spec.name])
        for port in spec.outputs:
            if port.role != "state":  # bound anew: the last step's outputs belong to the caller
                binding.bind_output(port.spec.name, "cpu")
        bound.session.run_with_iobinding(binding)
        results = {
            port.spec.name: value
            for port, value in zip(spec.outputs, binding.get_outputs(), strict=True)
            if port.role != "state"
        }
        if len(results) < len(spec.outputs):
            self._current = 1 - self._current
            self._changes += 1
        return {name: value.numpy() for name, value in results.items()}
