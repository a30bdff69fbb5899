"""Ordered dropout, which trains narrow models within the full one, and widths within a budget."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.runtime.onnx import OnnxRuntime
from export.bases.narrow import narrow
from export.bundles.writer import Tier, export_bundles
from export.cutting.seeded_random import PRIME, SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel, statistics
from export.errors import ExportError
from server_hub.methods.baselines.ordered_dropout import ordered_dropout
from server_hub.methods.baselines.widths import step_flops, widths_within
from tests.lib.models import (
    MeanHead,
    conv_model,
    example,
    open_bundle,
)
from tests.lib.widths import (
    CLASSES,
    MODELS,
    WIDTHS,
    Basic,
    batch_norm,
    group_norm,
    leading,
    loss_of,
    make,
)


def drawn(widths: tuple[float, ...], seed: int) -> float:
    """Return the width that a step with this seed draws."""
    with SeededDropout(torch.tensor(seed)) as seeded:
        return seeded.choice(widths).item()


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, PRIME - 1))
def test_a_masked_step_is_a_step_of_the_narrow_model(name: str, seed: int) -> None:
    """Loss, gradients and statistics equal autograd of the narrow model, in float64."""
    masked_step_equals_narrow_step(name, seed, MODELS[name][2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_masked_step_at_each_width(name: str, place: int) -> None:
    """Every model is checked at its narrowest, a middle and its full width."""
    masked_step_equals_narrow_step(name, 5, (MODELS[name][2][place],))


def masked_step_equals_narrow_step(name: str, seed: int, widths: tuple[float, ...]) -> None:
    """Check that a masked step and a step of the narrow model are equal."""
    model, x = make(name, seed % 100)
    width = drawn(widths, seed)
    part = narrow(model, width, x.float()).train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    ordered_dropout(model, widths, x.float())
    with SeededDropout(torch.tensor(seed)):
        loss = loss_of(model.train(), x)
    want = loss_of(part, x)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    loss.backward()
    want.backward()
    scale = max(p.grad.abs().max().item() for p in part.parameters())
    for (n, p), q in zip(model.named_parameters(), part.parameters(), strict=True):
        expected = torch.zeros_like(p)
        leading(expected, q).copy_(q.grad)
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * scale, msg=n)
    for (n, b), c in zip(model.named_buffers(), part.buffers(), strict=True):
        expected = statistics[n] if b.dim() else c
        leading(expected, c).copy_(c)
        torch.testing.assert_close(b, expected, msg=n)


def test_nothing_is_masked_in_evaluation_or_without_a_seed() -> None:
    """Without a seed and in evaluation, the model has its own parameters."""
    model, x = make("resnet-gn")
    names = [n for n, _ in model.named_parameters()]
    want, state = loss_of(model.eval(), x), list(model.state_dict())
    ordered_dropout(model, (0.5,), x.float())
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == state
    assert torch.equal(loss_of(model, x), want)
    assert torch.equal(loss_of(model.train(), x), want)
    with SeededDropout(torch.tensor(1)) as seeded:
        assert torch.equal(loss_of(model.eval(), x), want)
        assert seeded.calls == 0
        assert not torch.equal(loss_of(model.train(), x), want)
        assert seeded.calls == 1


@pytest.mark.parametrize("name", ["resnet-bn", "rows"])
def test_copies_are_masked_alike(name: str) -> None:
    """Deep copies and pickles are masked with the same width."""
    model, x = make(name)
    ordered_dropout(model, (0.5,), x.float())
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    losses = []
    for twin in copies:
        with SeededDropout(torch.tensor(3)):
            losses.append(loss_of(twin.train(), x))
    assert losses[0] == losses[1] == losses[2]
    for twin in copies[1:]:
        for b, c in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(b, c)
            assert b is not c


def test_widths_can_be_replaced() -> None:
    """The second call replaces the widths of the first, and a refused call changes nothing."""
    model, x = make("resnet-gn")
    ordered_dropout(model, (0.25,), x.float())
    ordered_dropout(model, (0.5,), x.float())
    with pytest.raises(ExportError):
        ordered_dropout(model, (1.0, 0.3), x.float())
    want = loss_of(narrow(model, 0.5, x.float()).train(), x)
    with SeededDropout(torch.tensor(0)):
        torch.testing.assert_close(loss_of(model.train(), x), want)


def test_every_width_is_as_likely() -> None:
    """Chi-square over consecutive seeds; adjacent seeds draw independently."""
    draws = torch.tensor([drawn(WIDTHS, seed) for seed in range(2000)])
    counts = torch.stack([(draws == w).sum() for w in WIDTHS]).double()
    assert counts.sum() == 2000
    assert ((counts - 500) ** 2 / 500).sum() < 20  # three degrees of freedom: 1 in 5000
    pairs = torch.stack([((draws[1:] == a) & (draws[:-1] == b)).sum() for a in WIDTHS
                         for b in WIDTHS]).double()  # fmt: skip
    assert ((pairs - 125) ** 2 / 125).sum() < 45  # fifteen degrees of freedom: 1 in 10000


def test_dropouts_keep_their_masks() -> None:
    """Masks do not depend on draws of widths; nested seeds have their own masks."""
    ones = torch.ones(50)

    def masks(choices: tuple[int, ...]) -> Tensor:
        kept = []
        with SeededDropout(torch.tensor(7)) as seeded:
            for place in range(3):
                if place in choices:
                    assert SeededDropout.active() is seeded
                    seeded.choice(WIDTHS)
                    seeded.choice(WIDTHS)
                kept.append(dropout(ones, 0.5))
        assert seeded.calls == 3 + bool(choices)
        return torch.stack(kept)

    assert torch.equal(masks(()), masks((0,)))
    assert torch.equal(masks(()), masks((1, 2)))
    assert SeededDropout.active() is None
    with SeededDropout(torch.tensor(0)) as outer:
        with SeededDropout(torch.tensor(1)) as inner:
            assert SeededDropout.active() is inner
        assert SeededDropout.active() is outer


@pytest.mark.parametrize("norm", [pytest.param(group_norm, marks=pytest.mark.slow), batch_norm])
def test_a_step_with_ordered_dropout_is_exported(norm: Any, tmp_path: Path) -> None:
    """The exported graph, with the seed as an input, makes the steps of the narrow models.

    Without weight decay, weights beyond the width do not change.
    """
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), norm(4), nn.ReLU())
    model = SplitModel(stem, [Basic(4, 4, 1, norm), nn.ReLU()], MeanHead(4, CLASSES))
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4)
    model.add_heads([1], x, CLASSES)
    ordered_dropout(model, (0.5, 1.0), x)
    index = export_bundles(model, {"all": Tier(1)}, tmp_path / "out", example=x, classes=CLASSES)
    bundle = open_bundle(index, "all")
    roles = {n: {port.role for port in g.inputs} for n, g in bundle.manifest.graphs.items()}
    assert {n for n, found in roles.items() if "seed" in found} == {"train"}
    runtime = OnnxRuntime(bundle)
    for seed in range(4):
        part = ClientSegment(narrow(model, drawn((0.5, 1.0), seed), x), 1).train()
        loss = cross_entropy(part(x)[1][0], y)
        loss.backward()
        runtime.set_state(bundle.initial_state)
        scalars = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
        batch = {n: np.asarray(value, np.float32) for n, value in scalars.items()}
        batch |= {"x": x.numpy(), "y": y.numpy(), "seed": np.asarray(seed, np.int64)}
        assert runtime.run("train", batch)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        state = runtime.get_state()
        tensors = {n: p.detach() - 0.5 * p.grad for n, p in part.named_parameters()}
        for n, t in {**tensors, **statistics(part)}.items():
            want = torch.tensor(bundle.initial_state[n])
            leading(want, t).copy_(t)
            torch.testing.assert_close(torch.from_numpy(state[n]), want, rtol=1e-4, atol=1e-5)
    assert {drawn((0.5, 1.0), seed) for seed in range(4)} == {0.5, 1.0}


def test_weight_decay_moves_what_is_beyond_the_width() -> None:
    """The gradient beyond the width is zero, but the step is not."""
    model, x = make("plain")
    ordered_dropout(model, (0.5,), x.float())
    before = model.stem.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    with SeededDropout(torch.tensor(0)):
        loss_of(model.train(), x).backward()
    optimizer.step()
    torch.testing.assert_close(model.stem.weight[4:], before[4:] * 0.99)


def test_flops_are_those_of_forward_and_backward() -> None:
    """Operations are per example, for any number of examples, without auxiliary heads."""
    model, x = make("resnet-bn")
    for width in (0.5, 1.0):
        part = narrow(model, width, x).train()
        with FlopCounterMode(display=False) as counter:
            part(x).sum().backward()
        assert step_flops(part, x) == counter.get_total_flops() / len(x)
        assert all(p.grad is None for p in part.aux.parameters())


def test_the_largest_width_within_a_budget() -> None:
    """The budget equals the operations of a width, or is just below them."""
    model, x = make("resnet-gn")
    needs = {w: step_flops(narrow(model, w, x), x) for w in WIDTHS}
    assert sorted(needs.values()) == list(needs.values())
    budgets = {f"at {w}": n for w, n in needs.items()}
    budgets |= {f"below {w}": n - 1 for w, n in needs.items() if w > 0.25}
    chosen = widths_within(model, budgets, WIDTHS[::-1], x)
    assert chosen == {f"at {w}": w for w in WIDTHS} | {
        "below 0.5": 0.25,
        "below 0.75": 0.5,
        "below 1.0": 0.75,
    }
    with pytest.raises(ExportError, match=r"tier 'tiny' has 10 FLOPs .* width, 0\.5, takes \d+"):
        widths_within(model, {"large": 1e12, "tiny": 10}, (1.0, 0.5), x)


def test_a_refusal_leaves_the_model_as_it_is() -> None:
    """A model that cannot be narrowed gets no hooks, whatever the first widths are."""
    model = conv_model()
    with pytest.raises(ExportError, match=r"norm is a GroupNorm with 2 groups of 3"):
        ordered_dropout(model, (1.0, 1 / 3), example((1, 8, 8)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_widths_are_refused() -> None:
    """An empty list of widths is refused in a draw and in a choice."""
    model = conv_model()
    with pytest.raises(ExportError, match="no widths"):
        ordered_dropout(model, (), example((1, 8, 8)))
    with pytest.raises(ExportError, match="no widths"):
        widths_within(model, {"a": 1}, (), example((1, 8, 8)))
