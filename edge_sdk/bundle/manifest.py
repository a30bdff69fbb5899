"""Bundles: what a tier downloads. A manifest and blobs, addressed by sha256 and verified first.

The manifest names every input and output of every step graph with dtype, shape and role, so that
a client in any language knows what to feed without guessing. Its bytes are canonical JSON; its
own sha256 is the identity of the bundle.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edge_sdk.bundle.ranges import MAX_POSITIONS, Ranges
from edge_sdk.errors import BundleError, DataError, ProtocolError
from edge_sdk.protocol.checks import MAX_BASES
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.tensors import DTYPES, Array, TensorSpec

FORMAT = 3
"""Version of the manifest format. A reader refuses any other."""

MINOR = 4
"""Version of what was added to the format, and what a reader that does not know it can ignore.

1: ``highest``. 2: ``harden`` is called ``adversarial_train``; a reader that does not know the name
trains on clean examples only. 3: ``memory``. 4: ``sample``.
"""

MAX_MANIFEST = 64 * 2**20
"""Largest size of a manifest, in bytes."""

_BESIDE = 128
"""Largest size of what a blob of tensors holds beside names and elements, per tensor, in bytes."""

_HASH = re.compile(r"[0-9a-f]{64}")

GRAPHS = ("predict", "train", "forward")
KINDS = ("parameter", "statistic", "slot")
ROLES = ("state", "bases", "batch", "hyper", "seed", "packed", "result")


def canonical_json(fields: dict[str, Any]) -> bytes:
    """JSON in ASCII, keys sorted, no spaces: the same fields give the same bytes."""
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def check_format(found: object, what: str) -> None:
    """Check the format number of a manifest or an index.

    Raises:
        BundleError: it is another one than :data:`FORMAT`; the error says which side to update.
    """
    if found == FORMAT and type(found) is int:
        return
    newer = type(found) is int and found > FORMAT
    remedy = (
        "update cutlayer (pip install -U cutlayer, or the app that contains it)"
        if newer
        else "export again with a cutlayer of this version"
    )
    raise BundleError(f"{what} has format {found}, this version reads {FORMAT}; {remedy}")


def tensor_of(base: int, name: str) -> str:
    """Name of a tensor of base network ``base`` where tensors of several are together."""
    return f"base.{base}.{name}"


@dataclass(frozen=True)
class Port:
    """An input or output of a step graph.

    Attributes:
        spec: name, dtype and shape.
        role: ``state`` (trainable tensors, statistics, optimizer slots), ``bases`` (stacked
            parameters and statistics of some base networks), ``batch`` (x, y and other inputs of a
            batch), ``hyper`` (scalar hyper-parameters), ``seed`` (of dropout), ``packed`` (a part
            of the packed activations, or of their gradient) or ``result`` (loss, correct, logits).
    """

    spec: TensorSpec
    role: str


@dataclass(frozen=True)
class Graph:
    """A step graph.

    Attributes:
        blob: sha256 of its file. For ``executorch`` a graph is the method of the same name in the
            file, and several graphs may share one file.
        inputs: inputs in order.
        outputs: outputs in order.
        constants: names of the frozen tensors that the file refers to.
    """

    blob: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    constants: tuple[str, ...] = ()


@dataclass(frozen=True)
class StateSpec:
    """A tensor of the state.

    Attributes:
        spec: name, dtype and shape.
        kind: ``parameter`` and ``statistic`` (of a batch norm) travel to the hub; ``slot`` (of the
            optimizer) starts each round at zero, or travels if the method keeps slots over rounds.
    """

    spec: TensorSpec
    kind: str

    def zeros(self) -> Array:
        """A state tensor of zeros. States have no symbolic dimension."""
        return np.zeros([int(n) for n in self.spec.shape], DTYPES[self.spec.dtype])


@dataclass(frozen=True)
class Constants:
    """Frozen tensors of a layer, one after the other in a blob that every graph refers to.

    In an ONNX file they are external data whose ``location`` is the blob's name, so a folder of
    blobs is all that a stock runtime needs.

    Attributes:
        blob: raw little-endian tensors, each at its offset.
        tensors: name, dtype and shape of each.
        offsets: where each begins, in bytes.
    """

    blob: str
    tensors: tuple[TensorSpec, ...]
    offsets: tuple[int, ...]

    def open(self, data: bytes) -> dict[str, Array]:
        """The tensors by name, views into ``data``."""
        return {
            spec.name: np.frombuffer(
                data, DTYPES[spec.dtype], count=math.prod(map(int, spec.shape)), offset=offset
            ).reshape([int(n) for n in spec.shape])
            for spec, offset in zip(self.tensors, self.offsets, strict=True)
        }


@dataclass(frozen=True)
class Manifest:
    """The manifest of one tier's bundle.

    Attributes:
        tier: name of the tier.
        cut: cut layer: the device holds the stem and blocks ``0..cut-1``.
        runtime: the runtime of the graphs: ``onnx`` or ``executorch``; ``torch`` in a simulation.
        task: ``classes`` (a label per example) or ``tokens`` (a label per position; -1 for none).
        classes: number of classes, or of tokens; labels are ``0..classes-1``.
        limits: largest ``batch`` and ``seq`` that the graphs accept, if there is one; ``seq`` is
            that of the whole model.
        heads: auxiliary heads that the device holds, shallowest first.
        optimizer: ``sgd`` or ``adamw``.
        codec: name of the codec of the activations.
        packed: the tensors of packed activations, as they travel.
        state: the state, in the order in which graphs take it.
        graphs: step graphs by name.
        initial_state: blob with the initial parameters and statistics.
        constants: frozen tensors by layer, for graphs that do not hold them.
        blobs: size in bytes of every blob, by sha256.
        bases: number of base networks that the model is one of; 0 if it is a single model.
        whole: whether all of the model is on the device, and nothing on the hub.
        base_states: blobs with the states of trained base networks, best first; empty in bundles
            that a hub serves for training, where the hub names the states.
        highest: largest values of an integer ``x``, see :class:`Ranges`; empty if not known.
        memory: ``normal``, or ``low`` for a step that takes less memory and more time.
        sample: blob with inputs ``x`` and the ``logits`` that ``predict`` has for them with the
            initial state, in bundles of a trained model; empty in others.
    """

    tier: str
    cut: int
    runtime: str
    task: str
    classes: int
    limits: dict[str, int]
    heads: tuple[str, ...]
    optimizer: str
    codec: str
    packed: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    graphs: dict[str, Graph]
    initial_state: str
    constants: tuple[Constants, ...]
    blobs: dict[str, int]
    bases: int = 0
    whole: bool = False
    base_states: tuple[str, ...] = ()
    highest: tuple[int, ...] = ()
    memory: str = "normal"
    sample: str = ""

    def exchanged(self, slots: bool = False) -> tuple[TensorSpec, ...]:
        """The state tensors that travel: parameters and statistics, with ``slots`` also slots."""
        return tuple(entry.spec for entry in self.state if slots or entry.kind != "slot")

    @property
    def adversarial_graph(self) -> str | None:
        """Name of the graph that trains on adversarial examples; None if there is none.

        Bundles of minor versions up to 1 call it ``harden``.
        """
        return next((n for n in ("adversarial_train", "harden") if n in self.graphs), None)

    @property
    def state_bytes(self) -> int:
        """Largest size of a blob with the state of the model, or of a base network, in bytes."""
        tensors = (entry.spec for entry in self.state)
        return _BESIDE + sum(s.nbytes() + len(s.name.encode()) + _BESIDE for s in tensors)

    @property
    def features(self) -> tuple[TensorSpec, ...]:
        """The tensors of packed features; empty unless the device holds the model's head."""
        outputs = self.graphs["finish"].outputs if "finish" in self.graphs else ()
        return tuple(
            TensorSpec(p.spec.name.removeprefix("grad."), p.spec.dtype, p.spec.shape)
            for p in outputs
            if p.role == "packed"
        )

    @property
    def mixture_sizes(self) -> list[int]:
        """Numbers of base networks that one call can mix, in ascending order."""
        return sorted(int(name[4:]) for name in self.graphs if re.fullmatch("mix_[0-9]+", name))

    @property
    def x(self) -> TensorSpec:
        """Name, dtype and shape of the inputs ``x``."""
        return next(port.spec for port in self.graphs["predict"].inputs if port.spec.name == "x")

    @property
    def ranges(self) -> Ranges:
        """What examples may hold."""
        longest = min(self.limits.get("seq", MAX_POSITIONS), MAX_POSITIONS)
        return Ranges(self.x, self.task, self.classes, self.highest, longest)

    def check_robustness(self, robustness: float) -> None:
        """Check that the bundle can answer with a weight of the noise norms.

        Raises:
            DataError: the weight is not from 0 to 1, or is not 0 and the model has no dual norms.
        """
        if not 0 <= robustness <= 1:
            raise DataError(f"robustness is {robustness:g}; it must be from 0 to 1")
        names = [port.spec.name for port in self.graphs["predict"].inputs]
        if robustness and "robustness" not in names:
            raise DataError(
                f"robustness is {robustness:g}, and the model has no dual norms; export it with "
                "dual_norms = true, or leave robustness at 0"
            )

    def fresh_state(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """A copy of ``tensors`` in the state's dtypes; slots that are not given are zero.

        Raises:
            BundleError: a tensor is missing or has another shape.
        """
        values = {}
        for entry in self.state:
            name, dtype = entry.spec.name, DTYPES[entry.spec.dtype]
            if entry.kind == "slot" and name not in tensors:
                values[name] = entry.zeros()
            elif name in tensors and tensors[name].shape == entry.spec.shape:
                values[name] = np.array(tensors[name], dtype, order="C")
            else:
                found = f"has shape {tensors[name].shape}" if name in tensors else "is missing"
                raise BundleError(f"state tensor {name} {found}, must be {entry.spec.shape}")
        return values

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same manifest gives the same bytes."""
        body = {"format": FORMAT, "minor": MINOR, **asdict(self)}
        return canonical_json(body)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and check a manifest. Keys that are not known here are ignored.

        Raises:
            BundleError: not JSON, another format, or a field that is missing or wrong.
        """
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BundleError("the manifest is not JSON; export the bundle again") from error
        if not isinstance(raw, dict) or "format" not in raw:
            raise BundleError("the manifest has no format number; export the bundle again")
        check_format(raw["format"], "the bundle")
        minor = raw.get("minor", 0)  # manifests from before there were minor versions have none
        if type(minor) is not int or minor < 0:
            raise BundleError(f"the manifest is damaged (minor {minor!r}); export again")
        try:
            manifest = cls(
                tier=str(raw["tier"]),
                cut=int(raw["cut"]),
                runtime=str(raw["runtime"]),
                task=str(raw["task"]),
                classes=int(raw["classes"]),
                limits={str(name): int(size) for name, size in raw["limits"].items()},
                heads=tuple(raw["heads"]),
                optimizer=str(raw["optimizer"]),
                codec=str(raw["codec"]),
                packed=tuple(_spec(part) for part in raw["packed"]),
                state=tuple(_state(entry) for entry in raw["state"]),
                graphs={name: _graph(graph) for name, graph in raw["graphs"].items()},
                initial_state=str(raw["initial_state"]),
                constants=tuple(_constants(entry) for entry in raw["constants"]),
                blobs={str(name): int(size) for name, size in raw["blobs"].items()},
                bases=int(raw["bases"]),
                whole=bool(raw["whole"]),
                base_states=tuple(map(str, raw["base_states"])),
                highest=tuple(map(int, raw.get("highest", ()))),
                memory=str(raw.get("memory", "normal")),
                sample=str(raw.get("sample", "")),
            )
            _check_sizes(manifest)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the manifest is damaged ({error}); export again") from error
        for name in manifest.blobs:
            if not _HASH.fullmatch(name):  # it becomes a file name
                raise BundleError(f"the manifest names a blob {name[:80]!r}, which is no sha256")
        used = [g.blob for g in manifest.graphs.values()] + [c.blob for c in manifest.constants]
        named = [manifest.sample] if manifest.sample else []
        for name in (manifest.initial_state, *manifest.base_states, *named, *used):
            if name not in manifest.blobs:
                raise BundleError(f"the manifest does not list its blob {name[:80]!r}")
        for name in GRAPHS:
            if name not in manifest.graphs:
                raise BundleError(f"the bundle lacks the graph {name!r}; export again")
        return manifest


def _check_sizes(manifest: Manifest) -> None:
    """Raise ValueError for a number that is out of range."""
    least = {"cut": (manifest.cut, 1), "classes": (manifest.classes, 1)}
    least |= {f"limit of {name}": (size, 1) for name, size in manifest.limits.items()}
    least |= {f"size of blob {name[:80]}": (size, 0) for name, size in manifest.blobs.items()}
    least |= {f"highest {i}": (value, 0) for i, value in enumerate(manifest.highest)}
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ValueError(f"{name} is {value}")
    if not 0 <= manifest.bases <= MAX_BASES:
        raise ValueError(f"bases is {manifest.bases}")
    x = manifest.graphs["predict"].inputs if "predict" in manifest.graphs else ()
    wide = [port.spec.shape[-1] for port in x if port.spec.name == "x" and port.spec.shape]
    if len(manifest.highest) > 1 and wide != [len(manifest.highest)]:
        raise ValueError(f"{len(manifest.highest)} largest values for an x of other columns")


def _spec(raw: dict[str, Any]) -> TensorSpec:
    if raw["dtype"] not in DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r} of {raw['name']}")
    shape = tuple(n if isinstance(n, str) else int(n) for n in raw["shape"])
    if any(isinstance(n, int) and n < 0 for n in shape):
        raise ValueError(f"shape {list(shape)} of {raw['name']}")
    return TensorSpec(str(raw["name"]), str(raw["dtype"]), shape)


def _state(raw: dict[str, Any]) -> StateSpec:
    if raw["kind"] not in KINDS:
        raise ValueError(f"state of kind {raw['kind']!r}")
    return StateSpec(_spec(raw["spec"]), raw["kind"])


def _constants(raw: dict[str, Any]) -> Constants:
    tensors, offsets = raw["tensors"], raw["offsets"]
    if len(tensors) != len(offsets):
        raise ValueError("constants with and without an offset")
    return Constants(str(raw["blob"]), tuple(map(_spec, tensors)), tuple(map(int, offsets)))


def _graph(raw: dict[str, Any]) -> Graph:
    def ports(entries: list[dict[str, Any]]) -> tuple[Port, ...]:
        for entry in entries:
            if entry["role"] not in ROLES:
                raise ValueError(f"role {entry['role']!r}")
        return tuple(Port(_spec(entry["spec"]), entry["role"]) for entry in entries)

    constants = tuple(map(str, raw["constants"]))
    return Graph(str(raw["blob"]), ports(raw["inputs"]), ports(raw["outputs"]), constants)


@dataclass(frozen=True)
class Bundle:
    """A manifest with its blobs, all verified.

    Attributes:
        manifest: the manifest.
        graphs: the file of each graph.
        initial_state: parameters and statistics to start from.
        constants: frozen tensors by name.
        sample: inputs ``x`` and the ``logits`` for them; empty if the manifest names none.
    """

    manifest: Manifest
    graphs: dict[str, bytes]
    initial_state: dict[str, Array]
    constants: dict[str, Array] = field(default_factory=dict)
    sample: dict[str, Array] = field(default_factory=dict)

    @classmethod
    def open(cls, manifest: Manifest, read: Callable[[str], bytes]) -> Bundle:
        """Assemble a bundle from verified blobs.

        Args:
            manifest: the manifest.
            read: the verified content of a blob by its name; called once for each.

        Raises:
            BundleError: a blob does not hold what the manifest says.
        """
        blobs = {name: read(name) for name in manifest.blobs}
        try:
            return cls(
                manifest,
                {name: blobs[graph.blob] for name, graph in manifest.graphs.items()},
                unpack_tensors(blobs[manifest.initial_state]),
                {n: t for c in manifest.constants for n, t in c.open(blobs[c.blob]).items()},
                unpack_tensors(blobs[manifest.sample]) if manifest.sample else {},
            )
        except (ProtocolError, ValueError) as error:
            raise BundleError(f"a blob of the bundle is damaged ({error}); export again") from error
