"""Bundles: manifests, content-addressed blobs, and checks before anything is used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnxruntime import InferenceSession
from torch import Tensor, nn

from edge_sdk.bundle.index import INDEX, BundleIndex
from edge_sdk.bundle.manifest import (
    FORMAT,
    GRAPHS,
    MINOR,
    Bundle,
    Constants,
    Graph,
    Manifest,
    Port,
    StateSpec,
)
from edge_sdk.bundle.store import BlobStore, sha256, verify_blob, write_atomically
from edge_sdk.errors import BundleError
from edge_sdk.protocol.frames import pack_tensors, unpack_tensors
from edge_sdk.protocol.tensors import TensorSpec
from edge_sdk.runtime import load_runtime
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import ClientSegment, SplitModel
from tests.lib.models import BUILD, CLASSES, IMAGE, build, example, open_bundle


def manifest() -> Manifest:
    """A small manifest with every kind of port, written by hand."""
    weight = TensorSpec("stem.weight", "float32", (2, 3))
    mean = TensorSpec("stem.running_mean", "float32", (3,))
    x = Port(TensorSpec("x", "int64", ("batch", "seq")), "batch")
    packed = (TensorSpec("h.q", "int8", ("batch", 2)), TensorSpec("h.scale", "float32", (1, 2)))
    graph = Graph(
        "ab" * 32,
        (
            Port(weight, "state"),
            x,
            Port(TensorSpec("bases/stem.weight", "float32", (3, 2, 3)), "bases"),
            Port(TensorSpec("lr", "float32", ()), "hyper"),
            Port(TensorSpec("seed", "int64", ()), "seed"),
        ),
        (
            Port(TensorSpec("next/stem.weight", "float32", (2, 3)), "state"),
            Port(TensorSpec("loss", "float32", ()), "result"),
            *(Port(spec, "packed") for spec in packed),
        ),
        ("stem.table",),
    )
    return Manifest(
        tier="small",
        cut=1,
        runtime="onnx",
        task="tokens",
        classes=4,
        limits={"batch": 16, "seq": 8},
        heads=("aux.1",),
        optimizer="sgd",
        codec="int8",
        packed=packed,
        state=(
            StateSpec(weight, "parameter"),
            StateSpec(mean, "statistic"),
            StateSpec(weight, "slot"),
        ),
        graphs=dict.fromkeys(
            (*GRAPHS, "mix_4", "mix_1", "mix_2", "mix_6", "adversarial_train"), graph
        ),
        initial_state="cd" * 32,
        constants=(
            Constants(
                "ef" * 32,
                (TensorSpec("stem.table", "int8", (3,)), TensorSpec("stem.shift", "float32", (1,))),
                (0, 64),
            ),
        ),
        blobs={"ab" * 32: 10, "cd" * 32: 24, "ef" * 32: 68},
        bases=6,
        whole=True,
        base_states=("cd" * 32,),
    )


def changed(**fields: Any) -> bytes:
    """Return the manifest's JSON with some fields replaced."""
    return json.dumps({**json.loads(manifest().to_bytes()), **fields}).encode()


def test_manifest_round_trip() -> None:
    """A manifest that is read equals the written one, byte for byte."""
    read = Manifest.from_bytes(manifest().to_bytes())
    assert read == manifest()
    assert read.to_bytes() == manifest().to_bytes()
    assert read.x == TensorSpec("x", "int64", ("batch", "seq"))
    assert [spec.name for spec in read.exchanged()] == ["stem.weight", "stem.running_mean"]
    assert read.mixture_sizes == [1, 2, 4, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"blobs": {"../../home/user/file": 3}}, "no sha256"),
        ({"blobs": {"/etc/passwd": 3}}, "no sha256"),
        ({"blobs": {"AB" * 32: 3}}, "no sha256"),
        ({"initial_state": "12" * 32}, "does not list its blob"),
        ({"blobs": {"cd" * 32: 24, "ef" * 32: 68}}, "does not list its blob 'abab"),
        ({"blobs": {"ab" * 32: 10, "cd" * 32: 24}}, "does not list its blob 'efef"),
        ({"base_states": ["12" * 32]}, "does not list its blob '1212"),
        ({"graphs": {}}, "lacks the graph"),
    ],
)
def test_manifest_names_only_its_own_blobs(fields: dict[str, Any], message: str) -> None:
    """A blob's name becomes a file name on the device, so only a hash is accepted."""
    with pytest.raises(BundleError, match=message):
        Manifest.from_bytes(changed(**fields))


def test_manifest_bytes_are_canonical() -> None:
    """Spaces and the order of keys do not change the bytes; their SHA-256 identifies the bundle."""
    written = manifest().to_bytes()
    other = json.dumps(dict(reversed(json.loads(written).items())), indent=2).encode()
    assert other != written
    assert Manifest.from_bytes(other).to_bytes() == written
    assert json.loads(written)["format"] == FORMAT
    assert b" " not in written


def test_exported_manifests_round_trip(bundles: BundleIndex) -> None:
    """For every tier, the blobs are those that the manifest names, with the sizes that it gives."""
    for tier, entry in bundles.tiers.items():
        data = bundles.blobs().read(entry.manifest)
        read = bundles.manifest(tier)
        assert read.to_bytes() == data
        assert (read.tier, read.cut, read.codec) == (tier, entry.cut, entry.codec)
        assert set(read.graphs) == set(GRAPHS)
        named = {graph.blob for graph in read.graphs.values()} | {read.initial_state}
        assert named == set(read.blobs)
        for name, size in read.blobs.items():
            assert len(bundles.blobs().read(name)) == size


def test_exported_ports_fit_each_other(bundles: BundleIndex) -> None:
    """State ports come first, in the manifest's order; train's state outputs match its inputs."""
    for tier in bundles.tiers:
        read = bundles.manifest(tier)
        train = read.graphs["train"]
        state = [entry.spec for entry in read.state]
        assert [port.spec for port in train.inputs if port.role == "state"] == state
        assert [port.spec for port in train.inputs[: len(state)]] == state
        after = [port.spec for port in train.outputs[: len(state)]]
        assert [spec.name for spec in after] == [f"next/{spec.name}" for spec in state]
        assert [(s.dtype, s.shape) for s in after] == [(s.dtype, s.shape) for s in state]
        for graph in read.graphs.values():
            packed = tuple(port.spec for port in graph.outputs if port.role == "packed")
            assert packed == read.packed
        heads, batch, classes = read.graphs["predict"].outputs[0].spec.shape
        assert (heads, batch, classes) == (len(read.heads), "batch", CLASSES)
        initial = unpack_tensors(bundles.blobs().read(read.initial_state))
        shapes = {spec.name: spec.shape for spec in read.exchanged()}
        assert {name: array.shape for name, array in initial.items()} == shapes


def test_states_of_zeros() -> None:
    """Optimizer slots start from zeros."""
    zeros = StateSpec(TensorSpec("momentum/w", "float32", (2, 3)), "slot").zeros()
    assert zeros.dtype == np.float32
    assert zeros.shape == (2, 3)
    assert not zeros.any()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (FORMAT + 1, "update cutlayer"),
        (FORMAT - 1, "export again"),
        (0, "export again"),
        (str(FORMAT), "export again"),
        (float(FORMAT), "export again"),
        (None, "export again"),
    ],
)
def test_other_formats_are_refused(number: Any, remedy: str) -> None:
    """The error names the format and says which side to update."""
    reads = rf"the bundle has format {number}, this version reads {FORMAT}; {remedy}"
    with pytest.raises(BundleError, match=reads):
        Manifest.from_bytes(changed(format=number))


def test_the_graph_of_adversarial_training_had_another_name() -> None:
    """Bundles from before the second minor version call it ``harden``; others have none."""
    both = manifest().graphs
    assert manifest().adversarial_graph == "adversarial_train"
    for name in ("harden", None):
        graphs = {n: g for n, g in both.items() if n != "adversarial_train"}
        if name is not None:
            graphs[name] = both["train"]
        assert replace(manifest(), graphs=graphs).adversarial_graph == name


@pytest.mark.parametrize("minor", [MINOR, MINOR + 1, 1000, 2**63])
def test_additions_of_later_minor_versions_are_ignored(minor: int) -> None:
    """Keys that are new, at every level, and graphs that are new change nothing."""
    raw = json.loads(changed(minor=minor, hints={"heat": [1, {"more": None}]}))
    raw["packed"][0]["note"] = "new"
    raw["state"][0]["share"] = 0.5
    for graph in raw["graphs"].values():
        graph["cost"] = 17
        graph["inputs"][0]["alias"] = "first"
    raw["graphs"]["polish"] = raw["graphs"]["train"]
    read = Manifest.from_bytes(json.dumps(raw).encode())
    assert read.graphs.pop("polish") == read.graphs["train"]
    assert read == manifest()


def test_a_manifest_without_a_minor_version() -> None:
    """Bundles that were exported before there was one are as good."""
    raw = json.loads(manifest().to_bytes())
    del raw["minor"]
    assert Manifest.from_bytes(json.dumps(raw).encode()) == manifest()


@pytest.mark.parametrize("minor", [-1, 1.0, "1", None, True])
def test_a_minor_version_is_a_number(minor: Any) -> None:
    with pytest.raises(BundleError, match=r"the manifest is damaged \(minor"):
        Manifest.from_bytes(changed(minor=minor))


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"not JSON", manifest().to_bytes()[:-1]])
def test_what_is_not_json(data: bytes) -> None:
    """Truncated JSON and other bytes are refused."""
    with pytest.raises(BundleError, match="the manifest is not JSON; export the bundle again"):
        Manifest.from_bytes(data)


@pytest.mark.parametrize("data", [b"[]", b"1", b"null", b'"x"', b"{}", b'{"tier": "small"}'])
def test_json_that_is_no_manifest(data: bytes) -> None:
    """JSON without a format number is refused."""
    with pytest.raises(BundleError, match="no format number"):
        Manifest.from_bytes(data)


OPTIONAL = {"minor", "highest", "memory", "sample"}


@pytest.mark.parametrize(
    "field", sorted({*json.loads(manifest().to_bytes())} - {"format"} - OPTIONAL)
)
def test_missing_fields(field: str) -> None:
    """The error names the missing field."""
    raw = json.loads(manifest().to_bytes())
    del raw[field]
    with pytest.raises(BundleError, match=rf"the manifest is damaged \('{field}'\)"):
        Manifest.from_bytes(json.dumps(raw).encode())


@pytest.mark.parametrize(
    "fields",
    [
        {"cut": "one"},
        {"cut": None},
        {"bases": "some"},
        {"bases": [8]},
        {"classes": []},
        {"heads": 3},
        {"packed": {"name": "h"}},
        {"packed": [{"name": "h", "dtype": "float64", "shape": []}]},
        {"packed": [{"name": "h", "dtype": "float32", "shape": [None]}]},
        {"packed": [{"name": "h", "dtype": ["float32"], "shape": [1]}]},
        {"packed": [1]},
        {"state": [{"kind": "parameter"}]},
        {"state": [{"kind": "buffer", "spec": {"name": "w", "dtype": "int8", "shape": [1]}}]},
        {"limits": {"batch": "many"}},
        {"limits": [16]},
        {"constants": 1},
        {"packed": [{"name": "h", "dtype": "float32", "shape": ["batch", -1]}]},
        {"constants": [{"blob": "ef" * 32, "tensors": [], "offsets": [0]}]},
        {"constants": [{"blob": "ef" * 32, "tensors": [1], "offsets": [0]}]},
        {"graphs": []},
        {"graphs": {"train": None}},
        {
            "graphs": {
                "train": {"blob": "x", "inputs": [{"spec": {}, "role": "king"}], "outputs": []}
            }
        },
        {"blobs": {"x": "many"}},
        {"blobs": [1]},
    ],
)
def test_wrong_fields(fields: dict[str, Any]) -> None:
    """Wrong types and unknown dtypes or roles raise BundleError."""
    with pytest.raises(BundleError, match="the manifest is damaged"):
        Manifest.from_bytes(changed(**fields))


# Constants, and bundles put together.


def constants_of(*tensors: tuple[str, str, tuple[int, ...]], offsets: tuple[int, ...]) -> Constants:
    """Return constants in the blob ``ef...``."""
    return Constants("ef" * 32, tuple(TensorSpec(*t) for t in tensors), offsets)


def test_constants_lie_at_their_offsets() -> None:
    """Constants have several dtypes and gaps between them, also a scalar and an empty tensor."""
    data = bytes([1, 2, 255]) + bytes(61) + np.arange(4, dtype="<f4").tobytes()
    found = constants_of(
        ("a", "int8", (3,)),
        ("b", "float32", (2, 2)),
        ("c", "float32", ()),
        ("d", "float32", (0, 2)),
        offsets=(0, 64, 76, 64),
    ).open(data)
    assert found["a"].tolist() == [1, 2, -1]
    assert found["b"].tolist() == [[0, 1], [2, 3]]
    assert found["c"] == 3
    assert found["d"].shape == (0, 2)


@pytest.mark.parametrize(("shape", "offset"), [((4,), 64), ((3,), 60), ((3,), 1000), ((3,), -8)])
def test_constants_beyond_their_blob(shape: tuple[int, ...], offset: int) -> None:
    """A blob that is too short raises an error; no other tensor's bytes are read."""
    made = manifest()
    constants = (constants_of(("a", "float32", shape), offsets=(offset,)),)
    blobs = {"ab" * 32: b"graph", "cd" * 32: pack_tensors({}), "ef" * 32: bytes(68)}
    with pytest.raises(BundleError, match="a blob of the bundle is damaged"):
        Bundle.open(replace(made, constants=constants), blobs.__getitem__)


def test_a_bundle_is_put_together_from_its_blobs() -> None:
    """Every blob is read once, and the graphs of one file share it."""
    state = {"stem.weight": np.ones((2, 3), np.float32)}
    blobs = {"ab" * 32: b"graph", "cd" * 32: pack_tensors(state), "ef" * 32: bytes(64) + b"\0\0 A"}
    read: list[str] = []

    def once(name: str) -> bytes:
        read.append(name)
        return blobs[name]

    bundle = Bundle.open(manifest(), once)
    assert sorted(read) == sorted(blobs)
    assert bundle.graphs == dict.fromkeys(manifest().graphs, b"graph")
    assert bundle.initial_state["stem.weight"].tolist() == state["stem.weight"].tolist()
    assert bundle.constants["stem.shift"].tolist() == [10.0]
    blobs["cd" * 32] = b"no tensors"
    with pytest.raises(BundleError, match="a blob of the bundle is damaged"):
        Bundle.open(manifest(), blobs.__getitem__)


class FrozenStem(nn.Module):
    """A frozen Linear layer, large enough to be stored outside the graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(16, 24).requires_grad_(False)
        self.register_buffer("mixing", torch.full((24, 24), 0.5, dtype=torch.float16))
        self.register_buffer("order", torch.arange(23, -1, -1).repeat(12))
        self.register_buffer("small", torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 16) -> (batch, 24)."""
        h = self.base(x)[:, self.order[:24]]
        return h @ self.mixing.to(h.dtype) * self.small


def frozen_model() -> SplitModel:
    """Return a model with a frozen stem, a frozen first block and a trained one."""
    torch.manual_seed(0)
    blocks = [nn.Linear(24, 24).requires_grad_(False), nn.Linear(24, 24), nn.Linear(24, 24)]
    return SplitModel(FrozenStem(), blocks, nn.Linear(24, 3))


def test_frozen_tensors_are_stored_once(tmp_path: Path) -> None:
    """Each layer has one blob that all graphs and tiers share; small tensors are in the graphs."""
    model, x = frozen_model(), example((16,))
    tiers = {"a": Tier(1), "b": Tier(2), "c": Tier(2, "fp16")}
    index = export_bundles(model, tiers, tmp_path / "out", example=x, classes=3)
    small, large = index.manifest("a"), index.manifest("b")
    names = [[spec.name for spec in c.tensors] for c in large.constants]
    assert sorted(names) == [["block.0.weight"], ["stem.base.weight", "stem.mixing", "stem.order"]]
    assert small.constants == large.constants == index.manifest("c").constants
    for graph in large.graphs.values():
        assert set(graph.constants) == {name for layer in names for name in layer}
    trained = {"block.1.weight", "block.1.bias"}
    assert {n for n in (s.name for s in large.exchanged()) if n.startswith("block")} == trained
    bundle = open_bundle(index, "b")
    np.testing.assert_array_equal(bundle.constants["stem.mixing"], np.full((24, 24), 0.5))
    runtime = load_runtime(bundle)
    with torch.no_grad():
        want = ClientSegment(model, 2)(x)[1]
    got = runtime.run("predict", {"x": x.numpy()})["logits"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_files_of_a_folder_run_by_themselves(tmp_path: Path) -> None:
    """A stock ONNX Runtime finds the frozen tensors beside the graph, without the manifest."""
    model, x = frozen_model(), example((16,))
    index = export_bundles(model, {"a": Tier(1)}, tmp_path / "out", example=x, classes=3)
    manifest = index.manifest("a")
    graph = manifest.graphs["predict"]
    session = InferenceSession(index.folder / "blobs" / graph.blob)
    state = unpack_tensors(index.blobs().read(manifest.initial_state))
    with torch.no_grad():
        want = ClientSegment(model, 1)(x)[1]
    got = session.run(["logits"], {**state, "x": x.numpy()})[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Blobs.


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """An empty store."""
    return BlobStore(tmp_path / "a" / "blobs")


DATA = bytes(range(256)) * 40


def test_blobs_are_named_by_content(store: BlobStore) -> None:
    """Writing the same content twice stores one blob."""
    name = store.write(DATA)
    assert name == sha256(DATA)
    assert store.write(DATA) == name
    assert name in store
    assert store.read(name) == DATA
    assert [path.name for path in store.folder.iterdir()] == [name]
    assert store.write(b"") != name
    assert store.read(sha256(b"")) == b""


def test_missing_blob(store: BlobStore) -> None:
    """The error names the blob and the folder."""
    name = sha256(b"never written")
    assert name not in store
    with pytest.raises(BundleError, match=rf"blob {name[:12]}… is missing from .*blobs"):
        store.read(name)


@pytest.mark.parametrize("damage", [DATA[:-1], DATA + b"\0", b"", DATA[:100] + b"\1" + DATA[101:]])
def test_damaged_blobs(store: BlobStore, damage: bytes) -> None:
    """A truncated, extended, emptied or changed blob is never used."""
    name = store.write(DATA)
    (store.folder / name).write_bytes(damage)
    with pytest.raises(BundleError, match=rf"blob {name[:12]}… has sha256 .* changed or damaged"):
        store.read(name)
    with pytest.raises(BundleError):
        verify_blob(name, damage)
    assert verify_blob(name, DATA) == DATA


def test_a_tampered_manifest_is_refused(bundles: BundleIndex, tmp_path: Path) -> None:
    """A manifest is a blob too, so a changed manifest has another name."""
    store = BlobStore(tmp_path / "blobs")
    entry = bundles.tiers["small"]
    data = bundles.blobs().read(entry.manifest)
    store.folder.mkdir()
    (store.folder / entry.manifest).write_bytes(data.replace(b'"cut":1', b'"cut":2'))
    index = BundleIndex(tmp_path, BUILD, CLASSES, "sgd", {"small": entry})
    with pytest.raises(BundleError, match="changed or damaged"):
        index.manifest("small")


def test_download_in_pieces(store: BlobStore) -> None:
    """A download resumes, also in another process; the blob exists only when it is complete."""
    name = sha256(DATA)
    assert store.partial(name) == 0
    for start in range(0, 6000, 1000):
        assert store.partial(name) == start
        store.append(name, DATA[start : start + 1000])
        assert name not in store
    resumed = BlobStore(store.folder)
    assert resumed.partial(name) == 6000
    resumed.append(name, DATA[6000:])
    assert resumed.finish(name) == DATA
    assert name in resumed
    assert resumed.partial(name) == 0
    assert [path.name for path in store.folder.iterdir()] == [name]


@pytest.mark.parametrize("pieces", [[], [DATA[:-1]], [DATA[1:]], [DATA, b"more"]])
def test_a_wrong_download_starts_anew(store: BlobStore, pieces: list[bytes]) -> None:
    """Bytes that do not match the hash are dropped, so the download can start again."""
    name = sha256(DATA)
    for piece in pieces:
        store.append(name, piece)
    with pytest.raises(BundleError, match="changed or damaged"):
        store.finish(name)
    assert name not in store
    assert store.partial(name) == 0
    store.append(name, DATA)
    assert store.finish(name) == DATA


def test_writes_replace_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails midway keeps the old content and leaves no other file."""
    path = tmp_path / "file"
    write_atomically(path, b"old")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:

            def fail(*args: Any) -> None:
                raise OSError("disk full")

            patch.setattr(os, failing, fail)
            with pytest.raises(OSError, match="disk full"):
                write_atomically(path, b"half")
        assert path.read_bytes() == b"new"
        assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_blob_appears_only_when_it_is_complete(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob is not visible before the rename."""
    name, seen = sha256(DATA), []
    replace = os.replace

    def watched(source: str, target: Path) -> None:
        seen.append((name in store, Path(source).read_bytes() == DATA))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    store.write(DATA)
    assert seen == [(False, True)]
    assert store.read(name) == DATA


# The index.


def test_index_is_read_back(bundles: BundleIndex) -> None:
    """The index that is read equals the one that the export returned."""
    read = BundleIndex.read(bundles.folder)
    assert read == bundles
    assert read.model == BUILD
    assert {name: (e.cut, e.codec) for name, e in read.tiers.items()} == {
        "small": (1, "int8"),
        "medium": (2, "fp16"),
        "large": (3, "int8"),
    }


def test_no_index(tmp_path: Path) -> None:
    """The error says what to do."""
    with pytest.raises(BundleError, match=r"no bundles in .*run cutlayer export first"):
        BundleIndex.read(tmp_path)
    with pytest.raises(BundleError, match="no bundles in"):
        BundleIndex.read(tmp_path / "missing")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 3}', "\udcff", '{"format": 3, "tiers": 3}']
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    """A file that is no JSON, or JSON that is no index, is refused."""
    (tmp_path / INDEX).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BundleError, match=r"index\.json is damaged"):
        BundleIndex.read(tmp_path)


def test_index_of_another_format(bundles: BundleIndex, tmp_path: Path) -> None:
    """The index of a later version is refused."""
    raw = json.loads((bundles.folder / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps(raw | {"format": FORMAT + 1}))
    with pytest.raises(BundleError, match=f"has format {FORMAT + 1}, .*reads {FORMAT}; update"):
        BundleIndex.read(tmp_path)


def test_exporting_twice_gives_the_same_bytes(bundles: BundleIndex, tmp_path: Path) -> None:
    """The same model gives the same manifest, and so the same graphs and initial state."""
    again = export_bundles(
        build(),
        {"small": Tier(1, "int8")},
        tmp_path / "out",
        example=example(IMAGE),
        classes=CLASSES,
    )
    first, second = bundles.manifest("small"), again.manifest("small")
    assert second.graphs == first.graphs
    assert second.initial_state == first.initial_state
    assert again.tiers["small"].manifest == bundles.tiers["small"].manifest


def test_the_fixture_exports_what_it_says(bundles: BundleIndex, model: SplitModel) -> None:
    """The tiers share one model: a deeper tier starts from the same tensors as a shallower one."""
    states = {}
    for tier in bundles.tiers:
        read = bundles.manifest(tier)
        states[tier] = unpack_tensors(bundles.blobs().read(read.initial_state))
    for name, array in states["small"].items():
        np.testing.assert_array_equal(states["large"][name], array)
        np.testing.assert_array_equal(dict(model.named_parameters())[name].detach(), array)
    assert states["small"].keys() < states["medium"].keys() < states["large"].keys()
