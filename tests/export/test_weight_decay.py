"""Weight decay and clipping in the steps of a device, against ``torch.optim``.

Every state is drawn at random, with optimizer slots that are in use.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.protocol.batch import HeadGradient
from edge_sdk.protocol.tensors import Array
from export.bases.dual_norms import with_dual_norms
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.steps.client_steps import ClientSteps
from export.steps.clipping import clipped
from export.steps.optimizers import get_optimizer
from export.steps.torch_runtime import TorchRuntime
from export.steps.weight_decay import decay_of_bundles, decayed_names
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.codecs import Exact
from tests.lib.decay import optimizer_of
from tests.lib.models import CLASSES, conv_model, text_model
from tests.lib.returned_models import HYPER, lora_model, words
from tests.lib.step_runtimes import manifest_of, runtime_of
from tests.lib.trunk_models import step_input

OPTIMIZERS = pytest.mark.parametrize("optimizer", ["sgd", "adamw"])


class ViTEmbeddings(nn.Module):
    """Holds a class token and positions itself, as the stem of a vision transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.position_embeddings = nn.Parameter(torch.randn(1, 5, 4))
        self.projection = nn.Conv2d(3, 4, 2)


def test_decay_is_decided_by_the_kind_of_a_module() -> None:
    part = nn.ModuleDict(
        {
            "table": nn.Embedding(5, 4),
            "vision": ViTEmbeddings(),
            "norm_of_pictures": nn.LayerNorm([3, 4, 4]),
            "embedding_like": nn.Linear(4, 4),
            "rnn": nn.LSTM(4, 4),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    part["tied"] = nn.Linear(4, 5, bias=False)
    part["tied"].weight = part["table"].weight
    assert decayed_names(part, "matrices") == {
        "vision.projection.weight",
        "embedding_like.weight",
        "rnn.weight_ih_l0",
        "rnn.weight_hh_l0",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert decayed_names(part, "all") == {n for n, _ in part.named_parameters()}
    with pytest.raises(ExportError, match="'some'; it must be one of matrices, all"):
        decayed_names(part, "some")


def test_adapters_decay_and_both_copies_of_norms_do_not() -> None:
    adapted = lora_model()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad}
    assert trained
    assert trained <= decayed_names(adapted, "matrices")
    dual = with_dual_norms(conv_model())
    assert not any("norm" in name for name in decayed_names(dual, "matrices"))


def test_the_hub_reads_the_setting_of_the_bundles() -> None:
    assert decay_of_bundles({"decay": "matrices"}) == "matrices"
    assert decay_of_bundles({"lora": None}) == "all", "older bundles decay everything"
    with pytest.raises(ExportError, match="export again"):
        decay_of_bundles({"decay": 3})


def steps_of(optimizer: str, decay: str = "matrices") -> tuple[SplitModel, ClientSteps]:
    """Return a text model, cut after its second block; no tensor has a special value."""
    model, x = text_model(), words(4) % 12
    model.add_heads([1, 2], x, CLASSES)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    steps = ClientSteps(
        ClientSegment(model, 2), get_optimizer(optimizer), Exact(), x, CLASSES,
        decay=decay, graphs=["backward"],
    )  # fmt: skip
    return model, steps


def scalars(hyper: dict[str, float], **more: float) -> dict[str, Array]:
    return {n: np.asarray(v, np.float32) for n, v in {**hyper, **more}.items()}


@OPTIMIZERS
@pytest.mark.parametrize(
    ("runtime", "decay"), [("onnx", "matrices"), ("torch", "matrices"), ("torch", "all")]
)
def test_steps_are_those_of_torch(optimizer: str, runtime: Any, decay: str) -> None:
    """Three steps: without a bound, with one that bites, and with one that does not."""
    _, steps = steps_of(optimizer, decay)
    device = runtime_of(steps, runtime, ["train"])
    eager = copy.deepcopy(steps.segment).double().train()
    reference = optimizer_of(eager, HYPER[optimizer])
    if decay == "all":
        for group in reference.param_groups:
            group["weight_decay"] = HYPER[optimizer]["weight_decay"]
    bites = []
    for number, bound in enumerate((0.0, 0.05, 1e6)):
        x = words(5, number) % 12
        y = torch.randint(CLASSES, (5,), generator=torch.Generator().manual_seed(number))
        loss = sum(nn.functional.cross_entropy(z, y) for z in eager(x)[1])
        reference.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        norm = nn.utils.clip_grad_norm_(eager.parameters(), bound or float("inf"))
        bites.append(bool(norm > bound) if bound else None)
        reference.step()
        given = {"x": x.numpy(), "y": y.numpy()}
        device.run("train", {**given, **scalars(HYPER[optimizer], max_norm=bound)})
        after = device.get_state()
        for name, p in eager.named_parameters():
            np.testing.assert_allclose(
                after[name], p.detach().numpy(), rtol=1e-4, atol=2e-6, err_msg=name
            )
    assert bites == [None, True, False]


@OPTIMIZERS
@pytest.mark.parametrize("decay", ["matrices", "all"])
def test_a_block_decays_alike_on_device_and_hub(optimizer: str, decay: Any) -> None:
    """All gradients are zero, so that weight decay alone moves the blocks."""
    hyper = HYPER[optimizer] | {"weight_decay": 0.5}
    model, steps = steps_of(optimizer, decay)
    start = {n: p.detach().numpy().copy() for n, p in model.named_parameters()}
    device = TorchRuntime(manifest_of(steps, "torch"), steps)
    x = words(3) % 12
    back = {"grad.h": np.zeros((3, x.shape[1], 8), np.float32)}
    device.run("backward", {"x": x.numpy(), **back, **scalars(hyper)})
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    trunk.begin(start, TrunkPlan(optimizer, hyper, returned=True, u_shaped=True, decay=decay))
    h = {"h": model.stem(x).detach().half().numpy()}
    nothing = HeadGradient({"h": np.zeros_like(h["h"])}, 3)
    trunk.step([step_input("d", "all", 0, "fp16", h, None, shape=(3,), head_gradient=nothing)])
    on_hub = {n: t for c in trunk.finish() for n, t in c.tensors.items()}
    on_device = device.get_state()
    both = [n for n in on_device if n.startswith("block.")]
    for name in both:
        np.testing.assert_allclose(on_device[name], on_hub[name], 1e-6, err_msg=name)
    moved = {n for n in both if np.abs(on_device[n] - start[n]).max() > 0}
    assert moved == {n for n in both if decay == "all" or start[n].ndim == 2}


def gradients_at(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {str(n): torch.randn(3, n + 1, generator=generator).double() for n in range(4)}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("bound", [1e-3, 2.0, 1e9])
def test_clipping_is_that_of_torch(seed: int, bound: float) -> None:
    gradients = gradients_at(seed)
    parameters = [nn.Parameter(g) for g in gradients.values()]
    for p, g in zip(parameters, gradients.values(), strict=True):
        p.grad = g.clone()
    nn.utils.clip_grad_norm_(parameters, bound)
    found = clipped(gradients, torch.tensor(bound, dtype=torch.float64))
    for p, g in zip(parameters, found.values(), strict=True):
        torch.testing.assert_close(g, p.grad, rtol=1e-14, atol=0)


def test_the_norm_of_a_large_matrix_is_not_rounded_away() -> None:
    """ONNX Runtime adds one element after the other: of 8 million squares 4e-4 was lost."""
    model = SplitModel(nn.Linear(4096, 2048), [nn.Tanh(), nn.Tanh()], nn.Linear(2048, CLASSES))
    x = torch.randn(4, 4096, generator=torch.Generator().manual_seed(0))
    model.add_heads([1], x, CLASSES)
    steps = ClientSteps(ClientSegment(model, 1), get_optimizer("sgd"), Exact(), x, CLASSES)
    device = runtime_of(steps, "onnx", ["train"])
    before = device.get_state()
    plain = {"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    given = {"x": x.numpy(), "y": np.arange(4)}
    device.run("train", {**given, **scalars(plain, max_norm=0.01)})
    slots = device.get_state(slots=True)
    squares = [np.square(slots[f"momentum/{n}"].astype(np.float64)).sum() for n in before]
    assert np.sqrt(sum(squares)) == pytest.approx(0.01, rel=2e-6)


@pytest.mark.parametrize("bound", [0.0, 1e9])
def test_without_a_bound_gradients_are_the_same_bit_for_bit(bound: float) -> None:
    gradients = gradients_at(1) | {"zero": torch.zeros(2).double()}
    for name, g in clipped(gradients, torch.tensor(bound)).items():
        assert torch.equal(g, gradients[name])


@pytest.mark.parametrize("runtime", ["onnx", "torch"])
def test_what_is_not_a_number_stays_so(runtime: Any) -> None:
    _, steps = steps_of("sgd")
    device = runtime_of(steps, runtime, ["train"])
    state = device.get_state()
    name = "block.1.out.weight"
    state[name][0, 0] = np.nan
    for bound in (0.0, 0.5):
        device.set_state(state)
        given = {"x": (words(3) % 12).numpy(), "y": np.arange(3)}
        device.run("train", {**given, **scalars(HYPER["sgd"], max_norm=bound)})
        after = device.get_state()
        assert np.isnan(after[name]).all()
        if bound:  # as in PyTorch, the norm of all gradients is not a number
            assert all(np.isnan(t).all() for t in after.values())
