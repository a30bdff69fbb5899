"""A bundle of a trained model has a sample, which a device answers before it uses the bundle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.errors import BundleError
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.learner import Learner
from edge_sdk.training.self_check import check_sample
from tests.lib.models import IMAGE, example, open_bundle


def opened(bundles: BundleIndex) -> tuple[Learner, dict[str, Array]]:
    """Return a learner with the initial state, and a sample of its answers."""
    bundle = open_bundle(bundles, "small")
    learner = Learner(bundle.manifest, load_runtime(bundle))
    x = example(IMAGE, 2).numpy()
    return learner, {"x": x, "logits": learner.predict(x)[0]}


def test_the_same_answers_pass(bundles: BundleIndex) -> None:
    """Also with the rounding of another processor; without a sample nothing is checked."""
    learner, sample = opened(bundles)
    check_sample(learner, sample)
    check_sample(learner, {})
    rounded = sample["logits"] * np.float32(1 + 1e-5)
    check_sample(learner, {**sample, "logits": rounded})


@pytest.mark.parametrize("change", ["another state", "other logits", "not a number", "shape", "x"])
def test_other_answers_are_refused(change: str, bundles: BundleIndex) -> None:
    learner, sample = opened(bundles)
    if change == "another state":
        state = learner.runtime.get_state()
        learner.runtime.set_state({n: 1.1 * t + 0.01 for n, t in state.items()})
    elif change == "other logits":
        sample["logits"] = sample["logits"] * np.float32(1.01)
    elif change == "not a number":
        sample["logits"] = np.full_like(sample["logits"], np.nan)
    elif change == "shape":
        sample["logits"] = sample["logits"][..., :-1]
    else:
        del sample["x"]
    with pytest.raises(BundleError, match=r"does not answer its sample here|sample that does not"):
        check_sample(learner, sample)


def test_a_manifest_names_its_sample(bundles: BundleIndex) -> None:
    """The blob is one of the bundle's, and a bundle opens it; other manifests have none."""
    learner, sample = opened(bundles)
    data = pack_tensors(sample)
    name = "ab" * 32
    manifest = replace(
        learner.manifest, sample=name, blobs={**learner.manifest.blobs, name: len(data)}
    )
    again = Manifest.from_bytes(manifest.to_bytes())
    assert again == manifest
    read = bundles.blobs().read
    found = Bundle.open(again, lambda blob: data if blob == name else read(blob))
    np.testing.assert_array_equal(found.sample["logits"], sample["logits"])
    assert open_bundle(bundles, "small").sample == {}
    with pytest.raises(BundleError, match="does not list its blob"):
        Manifest.from_bytes(replace(manifest, blobs=learner.manifest.blobs).to_bytes())
