"""Fixtures that all tests may use."""

from __future__ import annotations

import pytest
import torch

from edge_sdk.bundle.index import BundleIndex
from export.split import SplitModel
from export.writer import WEIGHTS, Tier, export_bundles
from tests.lib.models import BUILD, CLASSES, IMAGE, build, example

TIERS = {"small": Tier(1, "int8"), "medium": Tier(2, "fp16"), "large": Tier(3, "int8")}

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> BundleIndex:
    """Bundles of ``tests.lib.models:build`` for three tiers, exported once; not to be changed."""
    folder = tmp_path_factory.mktemp("export") / "bundles"
    return export_bundles(
        build(), TIERS, folder, example=example(IMAGE), classes=CLASSES, model_path=BUILD
    )


@pytest.fixture
def model(bundles: BundleIndex) -> SplitModel:
    """The model that ``bundles`` were exported from, with its auxiliary heads."""
    model = build()
    model.load(bundles.folder / WEIGHTS)
    return model
