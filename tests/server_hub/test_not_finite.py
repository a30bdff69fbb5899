"""NaN and infinity in the activations of a device reach the hub, which refuses them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime, load_runtime
from export import Tier, export_bundles
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from server_hub.trunk.errors import TrunkRefused
from server_hub.trunk.evaluator import Evaluator
from server_hub.trunk.interface import Query, StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.models import CLASSES, FEATURES, IMAGE, conv_model, example, token_model

PLAN = TrunkPlan("sgd", {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0})
KINDS = {"images": (conv_model, IMAGE), "vectors": (token_model, FEATURES)}


@pytest.fixture(scope="module", params=list(KINDS))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A model with its bundles, one for each codec."""
    build, shape = KINDS[request.param]
    model, folder = build(), tmp_path_factory.mktemp("bundles")
    tiers = {name: Tier(1, codec=name) for name in ("int8", "fp16")}
    x = example(shape)
    return model, export_bundles(model, tiers, folder, example=x, classes=CLASSES), x


def runtime_of(index: BundleIndex, tier: str) -> Runtime:
    return load_runtime(Bundle.open(index.manifest(tier), index.blobs().read))


@pytest.mark.parametrize("codec", ["int8", "fp16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_activations_that_are_not_finite_are_refused(
    exported: tuple[SplitModel, BundleIndex, torch.Tensor], codec: str, bad: float
) -> None:
    """One row of one device is enough; the others' step is made, and a question is refused."""
    model, index, x = exported
    rows = x[:4].numpy().copy()
    good = runtime_of(index, codec).run("forward", {"x": rows})
    rows[2] = bad
    poisoned = runtime_of(index, codec).run("forward", {"x": rows})
    labels = np.arange(4) % CLASSES
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin({n: t.detach().numpy().copy() for n, t in model.trained().items()}, PLAN)
    report = trainer.step(
        [
            StepInput("honest", "shared", 1, codec, Batch(good, labels)),
            StepInput("broken", "shared", 1, codec, Batch(poisoned, labels)),
        ]
    )
    assert report.refused == {"broken": "the activations are not finite"}
    assert report.rows == 4
    evaluator = Evaluator(model, "cpu")
    evaluator.serve({1: {n: t.detach().numpy().copy() for n, t in model.trained().items()}})
    evaluator.answer(Query(1, codec, good))
    with pytest.raises(TrunkRefused, match="the activations are not finite"):
        evaluator.answer(Query(1, codec, poisoned))


@pytest.mark.parametrize("codec", ["int8", "fp16"])
def test_a_gradient_of_features_that_is_not_finite_is_refused(
    exported: tuple[SplitModel, BundleIndex, torch.Tensor], codec: str
) -> None:
    model, index, x = exported
    parts = runtime_of(index, codec).run("forward", {"x": x[:4].numpy()})
    with torch.no_grad():
        features = model.features(x[:4])
    axis = 1
    specs = get_codec(codec).specs(("batch", *features.shape[1:]), axis)
    gradient = torch.full_like(features, 0.01)
    gradient[1].flatten()[3] = float("nan")
    packed = {n: p.numpy() for n, p in get_codec(codec).pack(gradient, axis).items()}
    trainer = TrunkTrainer(model, "cpu")
    state = {n: t.detach().numpy().copy() for n, t in model.trained().items()}
    trainer.begin(state, replace(PLAN, returned=True, u_shaped=True))
    asked = StepInput(
        "broken", "shared", 1, codec, Batch(parts, None), label_shape=(4,), features=specs
    )
    got = trainer.features(asked)
    assert got is not None
    assert {name: part.shape for name, part in got.items()} == {
        spec.name: tuple(4 if n == "batch" else n for n in spec.shape) for spec in specs
    }
    report = trainer.step([replace(asked, head_gradient=HeadGradient(packed, 4))])
    assert "gradients of their features, are not finite" in report.refused["broken"]


def test_a_gradient_comes_back_as_the_activations_came() -> None:
    """A bundle of an earlier version, with one scale per channel of a batch, gets such scales."""
    model = conv_model()
    h = torch.randn(3, model.stem.out_channels, 8, 8)
    state = {n: t.detach().numpy().copy() for n, t in model.trained().items()}
    width = h.shape[1]
    for scales in ((1, width, 1, 1), (3, width, 1, 1), (3, 1, 1, 1)):
        packed = get_codec("int8").pack_as(
            h, {"h.scale": ["batch" if n == 3 else n for n in scales]}
        )
        parts: dict[str, Array] = {name: part.numpy() for name, part in packed.items()}
        assert parts["h.scale"].shape == scales
        trainer = TrunkTrainer(model, "cpu")
        trainer.begin(state, replace(PLAN, returned=True))
        report = trainer.step(
            [StepInput("a", "shared", 1, "int8", Batch(parts, np.arange(3) % CLASSES))]
        )
        (gradient,) = report.gradients
        assert gradient is not None
        assert {n: p.shape for n, p in gradient.items()} == {n: p.shape for n, p in parts.items()}
