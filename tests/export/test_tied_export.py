"""Bundles of models whose head is the token table: trained in full, or frozen under adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from export.adapters_lora.lora import Lora, add_lora
from export.bundles.writer import Tier, export_bundles
from export.cutting.checks import check_sharing
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel
from export.cutting.tied import tied_tensors
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.returned import backward
from export.steps.torch_runtime import TorchRuntime
from export.steps.u_shaped import finish
from tests.lib.graph_runs import run_of, verify
from tests.lib.models import CLASSES, FEATURES, example, token_model
from tests.lib.returned_models import HYPER
from tests.lib.step_runtimes import manifest_of
from tests.lib.transformers_models import WORDS, gpt2, llama

TABLE = "stem.embedding.weight"
FAMILIES: dict[str, Callable[[], SplitModel]] = {
    "gpt2": lambda: gpt2(n_layer=3),
    "llama": lambda: llama(tie_word_embeddings=True, num_hidden_layers=3),
}
TEXTS = torch.randint(WORDS, (8, 6), generator=torch.Generator().manual_seed(0))


def built(family: str, adapted: bool) -> SplitModel:
    """A model of three blocks with one table of tokens."""
    torch.manual_seed(0)
    model = FAMILIES[family]()
    return add_lora(model, Lora(rank=2), family) if adapted else model


@pytest.mark.parametrize(
    ("family", "adapted", "runtime"),
    [
        *((family, adapted, "torch") for family in FAMILIES for adapted in (False, True)),
        pytest.param("gpt2", False, "onnx", marks=pytest.mark.slow),
        pytest.param("llama", True, "onnx", marks=pytest.mark.slow),
        pytest.param("gpt2", True, "executorch", marks=pytest.mark.slow),
    ],
)
def test_every_graph_is_exported_and_verified(
    family: str, adapted: bool, runtime: RuntimeName, tmp_path: Path
) -> None:
    tier = Tier(1, "int8", runtime, 8, graphs=["finish", "fuse"])
    index = export_bundles(
        built(family, adapted), {"t": tier}, tmp_path / "out", example=TEXTS, classes=WORDS,
        verified=runtime != "torch",
    )  # fmt: skip
    manifest = index.manifest("t")
    state = {e.spec.name: e.kind for e in manifest.state if TABLE in e.spec.name}
    wanted = {TABLE: "parameter", f"momentum/{TABLE}": "slot", f"waiting/{TABLE}": "slot"}
    assert state == ({} if adapted else wanted)
    tables = [n for n, t in load_file(index.folder / WEIGHTS).items() if len(t) == WORDS]
    assert tables == [TABLE]


def steps_of(model: SplitModel, optimizer: str = "sgd") -> ClientSteps:
    """The steps of a device with the model's head."""
    model.add_heads([1], TEXTS, WORDS)
    return ClientSteps(
        ClientSegment(model, 1, u_shaped=True), get_optimizer(optimizer), get_codec("int8"),
        TEXTS, WORDS, {"seq": 6, "batch": 8}, graphs=["finish"],
    )  # fmt: skip


@pytest.mark.parametrize("make", [finish, pytest.param(backward, marks=pytest.mark.slow)])
def test_a_gradient_that_does_not_wait_or_is_not_used_is_refused(make: object) -> None:
    steps = steps_of(built("gpt2", adapted=False))
    step = make(steps)  # type: ignore[operator]
    run = run_of("torch", [step])
    verify(steps, step, run, TEXTS)

    def bent(_: object, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return run(step, feeds) | {f"next/waiting/{TABLE}": feeds[f"waiting/{TABLE}"]}

    with pytest.raises(ExportError, match=f"differs .* in next/waiting/{TABLE}"):
        verify(steps, step, bent, TEXTS)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_frozen_head_gives_its_gradient_and_stays(optimizer: str) -> None:
    """Nothing of the head is trained, in eager PyTorch for simulations."""
    steps = steps_of(built("gpt2", adapted=True), optimizer)
    runtime = TorchRuntime(manifest_of(steps, "torch"), steps)
    before = runtime.get_state(slots=True)
    sizes = {"batch": 8, "seq": 6}
    features = {
        spec.name: np.ones([sizes[n] if isinstance(n, str) else n for n in spec.shape])
        for spec in steps.features
    }
    outputs = runtime.run(
        "finish",
        {
            **{f"features.{n}": v.astype("int8" if n == "h.q" else "float32")
               for n, v in features.items()},
            "y": TEXTS.numpy(),
            **{n: np.asarray(v, np.float32) for n, v in HYPER[optimizer].items()},
        },
    )  # fmt: skip
    assert outputs["grad.h.q"].any()
    assert outputs["loss"] > 0
    for name, tensor in runtime.get_state(slots=True).items():
        np.testing.assert_array_equal(tensor, before[name])


def test_what_stem_and_heads_share_may_be_cut_and_what_heads_share_may_not() -> None:
    model = built("gpt2", adapted=False)
    model.add_heads([1, 2], TEXTS, WORDS)
    check_sharing(model, 1)
    assert tied_tensors(model) == {TABLE: ["aux.1", "aux.2", "head"]}
    assert tied_tensors(built("gpt2", adapted=True)) == {}
    shared = token_model()
    shared.add_heads([1], example(FEATURES), CLASSES)
    shared.aux["1"].out = shared.head.out
    with pytest.raises(ExportError, match="are the same tensor at cut 1"):
        check_sharing(shared, 1)
