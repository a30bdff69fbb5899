"""A tier whose steps take less memory: the session's options, and the same results."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.runtime.onnx import OnnxRuntime
from export.bundles.writer import Tier, export_bundles
from tests.lib.models import CLASSES, IMAGE, build, example, open_bundle

NO_PREPACKING = "session.disable_prepacking"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    index = export_bundles(
        build(), {"t": Tier(2, memory="low")}, tmp_path_factory.mktemp("low") / "bundles",
        example=example(IMAGE), classes=CLASSES,
    )  # fmt: skip
    return open_bundle(BundleIndex.read(index.folder), "t")


def trained(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], list[bool]]:
    """Return the state after two steps, and for each session whether it packs weights."""
    packs = []
    original = ort.InferenceSession

    def session(file: bytes, options: Any, **more: Any) -> Any:
        try:
            packs.append(options.get_session_config_entry(NO_PREPACKING) != "1")
        except RuntimeError:  # the entry was never set
            packs.append(True)
        return original(file, options, **more)

    monkeypatch.setattr(ort, "InferenceSession", session)
    runtime = OnnxRuntime(bundle)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "max_norm": 0.0}
    given = {n: np.asarray(v, np.float32) for n, v in hyper.items()}
    for step in range(2):
        x = example(IMAGE, 8, step).numpy()
        runtime.run("train", {"x": x, "y": np.arange(8) % CLASSES, **given})
    monkeypatch.undo()
    return runtime.get_state(), packs


def test_the_session_keeps_no_packed_copies(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways give the same training step, within rounding."""
    assert bundle.manifest.memory == "low"
    low, packs = trained(bundle, monkeypatch)
    assert packs == [False]
    usual = replace(bundle, manifest=replace(bundle.manifest, memory="normal"))
    normal, packs = trained(usual, monkeypatch)
    assert packs == [True]
    assert low.keys() == normal.keys()
    for name, tensor in normal.items():
        np.testing.assert_allclose(low[name], tensor, rtol=1e-5, atol=1e-6, err_msg=name)


def test_older_manifests_and_later_words(bundle: Bundle, tmp_path: Path) -> None:
    """It is a hint: without it, or with a word that is not known here, memory is as usual."""
    raw = json.loads(bundle.manifest.to_bytes())
    del raw["memory"]
    assert Manifest.from_bytes(json.dumps(raw).encode()).memory == "normal"
    raw["memory"] = "tiny"
    assert Manifest.from_bytes(json.dumps(raw).encode()).memory == "tiny"
