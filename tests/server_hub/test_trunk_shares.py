"""What one device may do to a step by labels, rows and gradients, against plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from edge_sdk.protocol.batch import HeadGradient
from export.cutting.split_model import SplitModel
from export.packing import codecs as packing
from server_hub.trunk import bounds
from server_hub.trunk.bounds import FACTOR, GradientBound, shares
from server_hub.trunk.interface import StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from server_hub.trunk.vmapped import VmappedTrainer
from tests.lib.codecs import Double
from tests.lib.decay import optimizer_of
from tests.lib.trunk_models import (
    DEPTH,
    activations,
    dense_model,
    plain_row_losses,
    state_of,
    step_input,
    tensors_of,
    unpacked,
)

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
U_SHAPED = TrunkPlan("sgd", HYPER, returned=True, u_shaped=True)
GREEDY = 3
"""Number of the device that wants more than its share."""


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations travel in float64."""
    monkeypatch.setitem(packing.CODECS, "float64", Double())


def model_in_double() -> SplitModel:
    """Return a model away from its initial weights."""
    model = dense_model().double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return model


def batch(device: int, cut: int, rows: int, seed: int, weight: float = 1.0) -> StepInput:
    """Return a batch in float64."""
    h, labels = activations(dense_model(), rows, seed)
    parts = {"h": h.double().numpy()}
    return step_input(
        f"device-{device}", "shared", cut, "float64", parts, labels.numpy(), weight
    )  # fmt: skip


# --- shares of a step -----------------------------------------------------------------------------


@given(
    owners=st.lists(st.integers(0, 4), min_size=1, max_size=12),
    data=st.data(),
)
def test_no_device_has_most_of_a_step_but_by_a_single_batch(
    owners: list[int], data: st.DataObject
) -> None:
    devices = [str(owner) for owner in owners]
    weights = [data.draw(st.floats(0.0, 100.0, allow_subnormal=False)) for _ in devices]
    factors = shares(devices, weights)
    assert all(0.0 < f <= 1.0 for f in factors)
    totals = {d: sum(w for w, o in zip(weights, devices, strict=True) if o == d) for d in devices}
    bounded = {d for d, f in zip(devices, factors, strict=True) if f < 1}
    if sum(total > 0 for total in totals.values()) < 3:
        assert not bounded
        return
    assert len(bounded) <= 1
    for device in devices:
        others = sum(total for d, total in totals.items() if d != device)
        largest = max(w for w, o in zip(weights, devices, strict=True) if o == device)
        after = totals[device] * factors[devices.index(device)]
        assert after <= max(others, largest) * (1 + 1e-9) + 1e-9
        if device not in bounded:
            assert after == totals[device]


def greedy_steps() -> list[list[StepInput]]:
    """Return two steps of four devices, one of which has most of the batches."""
    steps = []
    for step in range(2):
        seeds = range(100 * step, 100 * step + 9)
        honest = [batch(d, 1 + d, 2 + d, seeds[d], weight=0.5 + d / 4) for d in range(3)]
        greedy = [batch(GREEDY, 2, 5, seed) for seed in seeds[3:]]
        steps.append([greedy[0], *honest, *greedy[1:]])
    return steps


def test_labels_of_a_greedy_device_weigh_less_and_all_else_is_plain_pytorch() -> None:
    model, reference = model_in_double(), model_in_double()
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin(state_of(model), TrunkPlan("sgd", HYPER))
    optimizer = optimizer_of(reference, HYPER)
    for inputs in greedy_steps():
        report = trainer.step(inputs)
        assert report.rows == sum(i.rows for i in inputs), "rows are counted as they are"
        weighs = {d: sum(i.weight * i.rows for i in inputs if i.device == f"device-{d}")
                  for d in range(4)}  # fmt: skip
        factor = (weighs[0] + weighs[1] + weighs[2]) / weighs[GREEDY]
        assert factor < 0.5
        factors = [factor if i.device == f"device-{GREEDY}" else 1.0 for i in inputs]
        counted = sum(f * i.rows for f, i in zip(factors, inputs, strict=True))
        optimizer.zero_grad()
        for f, i in zip(factors, inputs, strict=True):
            losses = plain_row_losses(reference, *unpacked(i), i.cut)
            (losses.sum() * f * i.weight / counted).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert_trained(trainer, reference)


def assert_trained(trainer: TrunkTrainer, reference: SplitModel, tolerance: float = 1e-12) -> None:
    """Check that a trainer has trained what a reference has."""
    want = state_of(reference)
    got = tensors_of(trainer.finish())
    assert got
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor, want[name], tolerance, tolerance, err_msg=name)


def test_the_returned_gradient_of_a_greedy_device_is_that_of_its_own_mean_loss() -> None:
    model = model_in_double()
    (inputs, _) = greedy_steps()
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin(state_of(model), TrunkPlan("sgd", HYPER, returned=True))
    for i, gradient in zip(inputs, trainer.step(inputs).gradients, strict=True):
        h, labels = unpacked(i)
        losses = plain_row_losses(headless(), h.requires_grad_(), labels, i.cut)
        losses.mean().backward()  # type: ignore[no-untyped-call]
        assert gradient is not None
        assert h.grad is not None
        np.testing.assert_allclose(gradient["h"], h.grad.numpy(), 1e-9, 1e-12)


def headless() -> SplitModel:
    """Return the model without auxiliary heads, which gradients that go back leave out."""
    model = model_in_double()
    model.aux.clear()
    return model


def test_base_networks_have_shares_of_their_own() -> None:
    """A greedy device has most of the first base's batches, and shares the second one evenly."""
    model, reference = dense_model(), dense_model()
    both = {n: np.stack([t, t]) for n, t in state_of(model).items()}

    def fp32(i: StepInput, base: int) -> StepInput:
        parts = {"h": i.batch.parts["h"].astype(np.float16)}
        return replace(i, cut=1, codec="fp16", weight=1.0,
                       batch=replace(i.batch, parts=parts, base=base))  # fmt: skip

    greedy = [fp32(i, 0) for i in greedy_steps()[0]]
    even = [fp32(batch(d, 1, 3, 50 + d), 1) for d in range(4)]
    trainer = VmappedTrainer(model, both, TrunkPlan("sgd", HYPER, bases=2), torch.device("cpu"))
    assert trainer.step([*greedy, *even]).refused == {}
    tensors = {(c.base, n): t for c in trainer.finish() for n, t in c.tensors.items()}
    for base, inputs in enumerate((greedy, even)):
        mine = copy.deepcopy(reference)
        optimizer = optimizer_of(mine, HYPER)
        rows = {d: sum(i.rows for i in inputs if i.device == d) for d in {i.device for i in inputs}}
        factors = {d: min(1.0, (sum(rows.values()) - n) / n) for d, n in rows.items()}
        assert (factors[f"device-{GREEDY}"] < 1) == (base == 0)
        total = sum(factors[d] * n for d, n in rows.items())
        for i in inputs:
            losses = plain_row_losses(mine, *unpacked(i), i.cut)
            (losses.sum() * factors[i.device] / total).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, tensor in state_of(mine).items():
            if (base, name) in tensors:
                np.testing.assert_allclose(tensors[base, name], tensor, 1e-4, 2e-6, err_msg=name)


# --- gradients of features ------------------------------------------------------------------------


def unlabelled(i: StepInput, gradient: Tensor, labels: int) -> StepInput:
    """Return a batch whose labels stay on the device, with the gradient that the device sends."""
    given = HeadGradient({"h": gradient.detach().numpy()}, labels)
    return replace(i, batch=replace(i.batch, labels=None), label_shape=(i.rows,),
                   head_gradient=given)  # fmt: skip


def features_of(model: SplitModel, i: StepInput) -> Tensor:
    h, _ = unpacked(i)
    for depth in range(i.cut, DEPTH):
        h = model.block[depth](h)
    return h


def head_gradient(model: SplitModel, i: StepInput) -> Tensor:
    """Return the gradient of the features of the mean loss, which an honest device sends."""
    features = features_of(model, i).detach().requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.head(features), unpacked(i)[1])
    (gradient,) = torch.autograd.grad(loss, features)
    return gradient


def u_shaped_step(
    trainer: TrunkTrainer, reference: SplitModel, step: int, louder: float
) -> tuple[list[StepInput], list[Tensor]]:
    """Make a step in which one device sends gradients that are too large."""
    inputs = [batch(d, 1 + d % 3, 3 + d, 10 * step + d) for d in range(4)]
    gradients = [head_gradient(reference, i) for i in inputs]
    gradients[GREEDY] = gradients[GREEDY] * louder
    given = [unlabelled(i, g, i.rows) for i, g in zip(inputs, gradients, strict=True)]
    for i in given:
        assert trainer.features(i) is not None
    assert trainer.step(given).refused == {}
    return inputs, gradients


def rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1).sqrt()


@pytest.mark.parametrize("louder", [1.0, 1e2, 1e9])
def test_a_u_shaped_step_is_that_of_plain_pytorch_with_long_gradients_shortened(
    louder: float,
) -> None:
    """Two honest steps come first, so that momentum and what the bound remembers count."""
    model, reference = model_in_double(), model_in_double()
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin(state_of(model), U_SHAPED)
    blocks = [p for block in reference.block for p in block.parameters()]
    optimizer = optimizer_of(reference, HYPER, blocks)
    longest = dict.fromkeys(range(4), 0.0)
    for step, loud in enumerate((1.0, 1.0, louder)):
        inputs, gradients = u_shaped_step(trainer, reference, step, loud)
        sums = [g * i.rows for g, i in zip(gradients, inputs, strict=True)]
        longest = {d: max(longest[d], float(rms(sums[d]).max())) for d in range(4)}
        limit = FACTOR * sorted(longest.values())[1]
        shortened = [g * (limit / rms(s)).clamp(max=1.0)[:, None]
                     for g, s in zip(gradients, sums, strict=True)]  # fmt: skip
        changed = [not torch.equal(a, b) for a, b in zip(shortened, gradients, strict=True)]
        assert changed == [False, False, False, loud > 1]
        total = sum(i.rows for i in inputs)
        optimizer.zero_grad()
        for i, g in zip(inputs, shortened, strict=True):
            features_of(reference, i).backward(g * i.rows / total)  # type: ignore[no-untyped-call]
        optimizer.step()
    # the norms of rows are taken in float32
    assert_trained(trainer, reference, 1e-12 if louder == 1.0 else 1e-6)


def test_without_a_bound_that_is_reached_nothing_changes_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for factor in (FACTOR, math.inf):
        monkeypatch.setattr(bounds, "FACTOR", factor)
        model = model_in_double()
        trainer = TrunkTrainer(model, "cpu")
        trainer.begin(state_of(model), U_SHAPED)
        reference = model_in_double()
        for step in range(3):
            u_shaped_step(trainer, reference, step, 1.0)
        found.append(tensors_of(trainer.finish()))
    for name, tensor in found[0].items():
        np.testing.assert_array_equal(tensor, found[1][name], err_msg=name)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_refused_with_this_reason(value: float) -> None:
    model = model_in_double()
    trainer = TrunkTrainer(model, "cpu")
    trainer.begin(state_of(model), U_SHAPED)
    inputs = [batch(d, 1, 3, d) for d in range(3)]
    gradients = [head_gradient(model, i) for i in inputs]
    gradients[1][0, 0] = value
    report = trainer.step(
        [unlabelled(i, g, i.rows) for i, g in zip(inputs, gradients, strict=True)]
    )
    reason = "the activations, or the gradients of their features, are not finite"
    assert report.refused == {"device-1": reason}
    assert report.rows == 6


def gradient_rows(*norms: float) -> Tensor:
    return torch.tensor(norms)[:, None] * torch.tensor([1.0, -1.0, 1.0, -1.0])


def bounded(bound: GradientBound, given: Sequence[tuple[str, Tensor]], labels: int) -> list[Tensor]:
    devices, gradients = [d for d, _ in given], [g for _, g in given]
    found = bound.shortened_gradients(devices, gradients, [labels] * len(given))
    bound.keep()
    return found


def test_a_row_that_a_model_is_wrong_about_is_no_larger_than_usual() -> None:
    """Later batches with small gradients alone do not make such a row an exception."""
    bound = GradientBound(torch.device("cpu"))
    wrong, right = gradient_rows(1e-3, 1.0), gradient_rows(1e-3, 1e-3)
    bounded(bound, [("a", wrong), ("b", wrong), ("c", wrong)], 2)
    for step in ([("a", right), ("b", wrong), ("c", right)], [("a", right), ("d", wrong)]):
        for (_, before), after in zip(step, bounded(bound, step, 2), strict=True):
            assert torch.equal(before, after)
    bound.begin()
    found = bounded(bound, [("e", gradient_rows(100.0, 1.0))], 2)
    torch.testing.assert_close(found[0], gradient_rows(FACTOR, 1.0))


def test_devices_whose_gradients_are_zero_have_no_vote() -> None:
    bound = GradientBound(torch.device("cpu"))
    zero, own = gradient_rows(0.0, 0.0), gradient_rows(0.0, 1.0)
    for step in ([("a", zero), ("b", zero)], [("a", zero), ("b", zero), ("c", own)]):
        for (_, before), after in zip(step, bounded(bound, step, 2), strict=True):
            assert torch.equal(before, after)


def test_gradients_are_compared_as_those_of_a_label() -> None:
    """A mean over many labels has smaller gradients than one over few."""
    bound = GradientBound(torch.device("cpu"))
    few, many = gradient_rows(1.0, 1.0), gradient_rows(*[0.01] * 200)
    found = bound.shortened_gradients(["a", "b", "c"], [many, many, few], [200, 200, 2])
    assert all(torch.equal(a, b) for a, b in zip(found, [many, many, few], strict=True))
