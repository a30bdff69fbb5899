"""The benchmark of a step measures the step that a device makes."""

from __future__ import annotations

import numpy as np

from benchmarks.device_step import bare_call
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.runtime import load_runtime
from tests.lib.harness import examples
from tests.lib.models import open_bundle

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0, "max_norm": 0.0}


def test_the_bare_call_is_the_step_without_its_result(bundles: BundleIndex) -> None:
    """It runs as often as one likes, and the device's state stays."""
    bundle = open_bundle(bundles, "small")
    runtime = load_runtime(bundle)
    data = examples(8)
    names = {port.spec.name for port in bundle.manifest.graphs["train"].inputs}
    batch = {"x": data.x, "y": data.y, **{n: np.float32(v)[...] for n, v in HYPER.items()}}
    batch = {name: array for name, array in batch.items() if name in names}
    runtime.run("train", batch)
    before = runtime.get_state(slots=True)
    bare = bare_call(runtime, batch)
    for _ in range(3):
        bare()
    after = runtime.get_state(slots=True)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    runtime.run("train", batch)
    moved = runtime.get_state(slots=True)
    assert any(not np.array_equal(moved[name], before[name]) for name in before)
