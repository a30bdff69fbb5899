"""Frozen tensors are stored beside the graphs: as bytes at their places, and never copied."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import torch

from edge_sdk.bundle.manifest import Port
from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.tensors import TensorSpec
from export.bundles.constants import store_constants
from export.lowering.onnx import Place, lower, traced
from export.steps.step import Step, Tensors


def test_tensors_of_a_layer_are_one_blob(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    tensors = {
        "block.0.weight": torch.randn(40, 30).t(),  # not contiguous
        "block.0.codes": torch.randint(-9, 9, (1031,), dtype=torch.int8),
        "block.0.scale": torch.tensor(2.0),  # too small: it stays in the graphs
        "block.1.weight": torch.randn(16, 32),
        "stem.mask": torch.ones(2000, dtype=torch.bool),  # no dtype of a manifest
        "stem.table": torch.randn(300, 4).half(),
    }
    stored = store_constants(tensors, blobs)
    assert set(stored.places) == set(tensors) - {"block.0.scale", "stem.mask"}
    for entry in stored.entries:
        data = blobs.read(entry.blob)
        assert stored.sizes[entry.blob] == len(data)
        for name, array in entry.open(data).items():
            np.testing.assert_array_equal(array, tensors[name].numpy())
            place = stored.places[name]
            assert place.blob == entry.blob
            assert place.offset % 64 == 0
            assert data[place.offset :][: place.length] == array.tobytes()
    assert len(stored.entries) == 3
    assert {path.name for path in tmp_path.iterdir()} == set(stored.sizes)


def test_equal_layers_share_a_blob(tmp_path: Path) -> None:
    tensor = torch.randn(500)
    stored = store_constants({"block.0.w": tensor, "block.1.w": tensor}, BlobStore(tmp_path))
    assert len(stored.entries) == 2
    assert len(stored.sizes) == 1


def test_storing_copies_nothing(tmp_path: Path) -> None:
    table = torch.ones(8 * 2**20)
    tracemalloc.start()
    try:
        store_constants({"stem.table": table}, BlobStore(tmp_path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < table.nbytes / 8


def test_a_file_may_refer_to_more_than_it_could_hold() -> None:
    """A protobuf holds 2 GB. The constant has one element in memory and claims 2.4 GB."""
    huge = torch.ones(1).expand(600, 1_000_000)

    def function(constants: Tensors, given: Tensors) -> Tensors:
        return {"y": constants["stem.table"][given["rows"], 0] * 2}

    step = Step(
        "look",
        function,
        (Port(TensorSpec("rows", "int64", ("batch",)), "batch"),),
        (Port(TensorSpec("y", "float32", ("batch",)), "result"),),
        {"stem.table": huge},
    )
    data = lower(step, traced(step), {"stem.table": Place("0" * 64, 128, huge.nbytes)})
    assert len(data) < 10_000
    (held,) = (
        t for t in onnx.load_model_from_string(data).graph.initializer if t.name == "stem.table"
    )
    assert held.data_location == onnx.TensorProto.EXTERNAL
    assert list(held.dims) == [600, 1_000_000]
    assert {entry.key: entry.value for entry in held.external_data} == {
        "location": "0" * 64,
        "offset": "128",
        "length": str(huge.nbytes),
    }
