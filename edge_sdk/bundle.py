"""Bundles: what a tier downloads. A manifest and blobs, addressed by sha256 and verified first.

The manifest names every input and output of every step graph with dtype, shape and role, so that
a client in any language knows what to feed without guessing. Its bytes are canonical JSON; its
own sha256 is the identity of the bundle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows, where devices do not share a cache
    fcntl = None  # type: ignore[assignment]

from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import DTYPES, Array, TensorSpec

FORMAT = 1
"""Version of the manifest format."""

_HASH = re.compile(r"[0-9a-f]{64}")

GRAPHS = ("predict", "train", "forward")
ROLES = ("state", "batch", "hyper", "packed", "result")


def sha256(data: bytes) -> str:
    """Hexadecimal sha256."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Port:
    """An input or output of a step graph.

    Attributes:
        spec: name, dtype and shape.
        role: ``state`` (trainable tensors and optimizer slots), ``batch`` (x and y), ``hyper``
            (scalars of the optimizer), ``packed`` (a part of the packed activations) or
            ``result`` (loss, correct, logits).
    """

    spec: TensorSpec
    role: str


@dataclass(frozen=True)
class Graph:
    """A step graph: where its file is, and what goes in and comes out, in order."""

    blob: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


@dataclass(frozen=True)
class StateSpec:
    """A tensor of the state. ``parameter`` travels to the hub, ``slot`` stays on the device."""

    spec: TensorSpec
    kind: str

    def zeros(self) -> Array:
        """A state tensor of zeros. States have no symbolic dimension."""
        return np.zeros([int(n) for n in self.spec.shape], DTYPES[self.spec.dtype])


@dataclass(frozen=True)
class Manifest:
    """The manifest of one tier's bundle.

    Attributes:
        tier: name of the tier.
        cut: cut layer: the device holds the stem and blocks ``0..cut-1``.
        runtime: what runs the graphs (``onnx``).
        classes: number of classes; labels are ``0..classes-1``.
        heads: auxiliary heads that the device holds, shallowest first.
        optimizer: ``sgd`` or ``adamw``.
        codec: name of the codec of the activations.
        packed: the tensors of packed activations, as they travel.
        state: the state, in the order in which graphs take it.
        graphs: step graphs by name.
        initial_state: blob with the initial parameters.
        blobs: size in bytes of every blob, by sha256.
    """

    tier: str
    cut: int
    runtime: str
    classes: int
    heads: tuple[str, ...]
    optimizer: str
    codec: str
    packed: tuple[TensorSpec, ...]
    state: tuple[StateSpec, ...]
    graphs: dict[str, Graph]
    initial_state: str
    blobs: dict[str, int]

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        """The state tensors that are trained and exchanged with the hub."""
        return tuple(entry.spec for entry in self.state if entry.kind == "parameter")

    @property
    def x(self) -> TensorSpec:
        """What an input batch must be."""
        return next(port.spec for port in self.graphs["predict"].inputs if port.spec.name == "x")

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same manifest gives the same bytes."""
        body = {"format": FORMAT, **asdict(self)}
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: not JSON, a newer format, or a field that is missing or wrong.
        """
        try:
            raw = json.loads(data)
        except ValueError as error:
            raise BundleError("the manifest is not JSON; export the bundle again") from error
        if not isinstance(raw, dict) or "format" not in raw:
            raise BundleError("the manifest has no format number; export the bundle again")
        if raw["format"] != FORMAT:
            raise BundleError(
                f"the bundle has format {raw['format']}, this version reads {FORMAT}; "
                "upgrade cutlayer on the device"
            )
        try:
            manifest = cls(
                tier=str(raw["tier"]),
                cut=int(raw["cut"]),
                runtime=str(raw["runtime"]),
                classes=int(raw["classes"]),
                heads=tuple(raw["heads"]),
                optimizer=str(raw["optimizer"]),
                codec=str(raw["codec"]),
                packed=tuple(_spec(part) for part in raw["packed"]),
                state=tuple(StateSpec(_spec(e["spec"]), str(e["kind"])) for e in raw["state"]),
                graphs={name: _graph(graph) for name, graph in raw["graphs"].items()},
                initial_state=str(raw["initial_state"]),
                blobs={str(name): int(size) for name, size in raw["blobs"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"the manifest is damaged ({error}); export again") from error
        for name in manifest.blobs:
            if not _HASH.fullmatch(name):  # it becomes a file name
                raise BundleError(f"the manifest names a blob {name[:80]!r}, which is no sha256")
        for name in (manifest.initial_state, *(g.blob for g in manifest.graphs.values())):
            if name not in manifest.blobs:
                raise BundleError(f"the manifest does not list its blob {name[:80]!r}")
        for name in GRAPHS:
            if name not in manifest.graphs:
                raise BundleError(f"the bundle lacks the graph {name!r}; export again")
        return manifest


def _spec(raw: dict[str, Any]) -> TensorSpec:
    if raw["dtype"] not in DTYPES:
        raise ValueError(f"dtype {raw['dtype']!r} of {raw['name']}")
    shape = tuple(n if isinstance(n, str) else int(n) for n in raw["shape"])
    return TensorSpec(str(raw["name"]), str(raw["dtype"]), shape)


def _graph(raw: dict[str, Any]) -> Graph:
    def ports(entries: list[dict[str, Any]]) -> tuple[Port, ...]:
        for entry in entries:
            if entry["role"] not in ROLES:
                raise ValueError(f"role {entry['role']!r}")
        return tuple(Port(_spec(entry["spec"]), entry["role"]) for entry in entries)

    return Graph(str(raw["blob"]), ports(raw["inputs"]), ports(raw["outputs"]))


def verify_blob(name: str, data: bytes) -> bytes:
    """Return ``data`` if its sha256 is ``name``; else raise :class:`BundleError`."""
    found = sha256(data)
    if found != name:
        raise BundleError(
            f"blob {name[:12]}… has sha256 {found[:12]}…: it was changed or damaged; "
            "delete it and fetch the bundle again"
        )
    return data


class BlobStore:
    """A folder of blobs, one file each, named by sha256. Writes are atomic.

    A download in progress is ``HASH.part``; :meth:`partial` says how much is there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def __contains__(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def read(self, name: str) -> bytes:
        """The verified content of a blob; :class:`BundleError` if missing or changed."""
        try:
            data = (self.folder / name).read_bytes()
        except FileNotFoundError:
            raise BundleError(
                f"blob {name[:12]}… is missing from {self.folder}; export the bundle again"
            ) from None
        return verify_blob(name, data)

    def write(self, data: bytes) -> str:
        """Store a blob and return its name."""
        name = sha256(data)
        if name not in self:
            write_atomically(self.folder / name, data)
        return name

    def remove(self, name: str) -> None:
        """Remove a blob, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def claim(self) -> Iterator[bool]:
        """Whether unfinished downloads are ours to add to; no other process may meanwhile."""
        if fcntl is None:
            yield True
            return
        with open(self.folder / ".lock", "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
            else:
                yield True

    def partial(self, name: str) -> int:
        """Bytes of an unfinished download that are already here."""
        part = self.folder / f"{name}.part"
        return part.stat().st_size if part.is_file() else 0

    def append(self, name: str, data: bytes) -> None:
        """Add a piece to an unfinished download."""
        with open(self.folder / f"{name}.part", "ab") as file:
            file.write(data)

    def finish(self, name: str) -> bytes:
        """Verify a download, give it its name and return it.

        Raises:
            BundleError: the content does not match; the partial file is removed.
        """
        part = self.folder / f"{name}.part"
        data = part.read_bytes() if part.is_file() else b""
        try:
            verify_blob(name, data)
        except BundleError:
            part.unlink(missing_ok=True)
            raise
        write_atomically(self.folder / name, data)
        part.unlink(missing_ok=True)
        return data


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old content or the new, never a part."""
    temporary = path.with_name(f".write-{secrets.token_hex(8)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class Bundle:
    """A manifest with the blobs of its graphs and initial state, all verified."""

    manifest: Manifest
    graphs: dict[str, bytes]
    initial_state: dict[str, Array]
