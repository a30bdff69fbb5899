"""A step that fails: the culprit is refused with the reason, and nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.protocol.batch import HeadGradient
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from server_hub.trunk.errors import TrunkRefused
from server_hub.trunk.evaluator import Evaluator
from server_hub.trunk.interface import Query, StepInput, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.trunk_models import (
    CLASSES,
    POISON,
    WIDTH,
    DenseBlock,
    PooledHead,
    arrival_of,
    poisoned,
    state_of,
    step_input,
    tensors_of,
)

SGD = TrunkPlan("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4})


class Choosy(DenseBlock):
    """A block that raises an exception on some inputs.

    Args:
        raises: the exception.
        wrong: whether the block raises it on an input (rows, width).
    """

    def __init__(self, raises: Exception, wrong: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.raises, self.wrong = raises, wrong

    def forward(self, h: Tensor) -> Tensor:
        if self.wrong(h):
            raise self.raises
        return super().forward(h)


def has_poison(h: Tensor) -> bool:
    return bool((h == POISON).any())


def choosy_model(raises: Exception, wrong: Callable[[Tensor], bool] = has_poison) -> SplitModel:
    torch.manual_seed(0)
    blocks = [DenseBlock(), DenseBlock(), Choosy(raises, wrong)]
    return SplitModel(nn.Linear(5, WIDTH), blocks, nn.Linear(WIDTH, CLASSES))


def begun(model: SplitModel, plan: TrunkPlan = SGD) -> TrunkTrainer:
    trainer = TrunkTrainer(model, "cpu")
    statistics = {n: b.numpy().copy() for n, b in model.named_buffers() if "running" in n}
    trainer.begin(state_of(model) | statistics, plan)
    return trainer


def some(model: SplitModel, number: int, rows: int = 2) -> list[StepInput]:
    return [arrival_of(model, 2, rows, seed, codec="fp16") for seed in range(number)]


def assert_same(got: dict[str, Array], want: dict[str, Array]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


EXCEPTIONS = {
    "cuda memory": (torch.OutOfMemoryError("CUDA out of memory"), "does not fit into the memory"),
    "host memory": (MemoryError(), "does not fit into the memory"),
    "a bug": (IndexError("index 99 is out\nof range"), "IndexError: index 99 is out of range"),
}


@pytest.mark.parametrize("what", EXCEPTIONS)
@pytest.mark.parametrize("epochs", [1, 2])
def test_the_batch_that_raises_is_refused_and_the_others_are_trained(
    what: str, epochs: int
) -> None:
    raises, reason = EXCEPTIONS[what]
    model = choosy_model(raises)
    good = some(model, 4)
    bad = poisoned(arrival_of(model, 2, 2, 9, "bad", codec="fp16"))
    trainer = begun(model, replace(SGD, epochs=epochs))
    report = trainer.step([*good[:1], bad, *good[1:]])
    assert report.refused.keys() == {"bad"}
    assert reason in report.refused["bad"]
    assert report.rows == 8
    assert [loss is None for loss in report.losses] == [False, True, False, False, False]
    (copy,) = {c.samples for c in trainer.finish()}
    assert copy == 8


def test_a_batch_that_raises_leaves_nothing_behind() -> None:
    """Momentum, batch statistics and parameters are those of a round without it."""
    model = choosy_model(ValueError("no"))
    good = some(model, 3)
    bad = poisoned(arrival_of(model, 2, 2, 9, "bad", codec="fp16"))
    with_it, without = begun(model), begun(model)
    for batch in good:
        assert with_it.step([bad]).refused.keys() == {"bad"}
        assert with_it.step([batch]).loss == without.step([batch]).loss
    assert_same(tensors_of(with_it.finish()), tensors_of(without.finish()))


def test_a_step_that_is_too_large_is_divided_until_it_fits() -> None:
    model = choosy_model(
        RuntimeError("DefaultCPUAllocator: can't allocate memory"), lambda h: len(h) > 4
    )
    batches = some(model, 8)
    trainer, halves = begun(model), begun(model)
    report = trainer.step(batches)
    assert report.refused == {}
    assert report.rows == 16
    for i in range(0, 8, 2):
        halves.step(batches[i : i + 2])
    assert_same(tensors_of(trainer.finish()), tensors_of(halves.finish()))


def test_a_query_that_raises_fails_alone() -> None:
    model = choosy_model(IndexError("no such row"))
    evaluator = Evaluator(model, "cpu")
    evaluator.serve({2: state_of(model)})
    fine, bad = some(model, 1)[0], poisoned(some(model, 1)[0])
    with pytest.raises(TrunkRefused, match="IndexError: no such row"):
        evaluator.answer(Query(2, "fp16", bad.batch.parts))
    for value in (math.nan, math.inf):
        endless = poisoned(fine, value)
        with pytest.raises(TrunkRefused, match="the activations are not finite"):
            evaluator.answer(Query(2, "fp16", endless.batch.parts))
    assert evaluator.answer(Query(2, "fp16", fine.batch.parts)).shape == (1, 2, CLASSES)


# --- batch norms ----------------------------------------------------------------------------------


class NormBlock(nn.Module):
    """A 1x1 convolution with BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(self.norm(self.conv(h)))


def norm_model() -> SplitModel:
    torch.manual_seed(0)
    blocks = [NormBlock(), NormBlock(), NormBlock()]
    return SplitModel(nn.Conv2d(1, WIDTH, 1), blocks, PooledHead(WIDTH, CLASSES))


def pictures(rows: int, seed: int, size: int, scale: float = 1.0, device: str = "") -> StepInput:
    rng = np.random.default_rng(seed)
    h = rng.integers(-127, 128, (rows, WIDTH, size, size)).astype(np.int8)
    parts = {"h.q": h, "h.scale": np.full((1, WIDTH, 1, 1), scale / 127, np.float32)}
    labels = rng.integers(0, CLASSES, rows)
    return step_input(device or f"device-{seed}", "shared", 1, "int8", parts, labels)


@pytest.mark.parametrize("scale", [1e20, 1e18, 1e10])
def test_batch_statistics_change_with_accepted_batches_alone(scale: float) -> None:
    model = norm_model()
    bad = pictures(4, 9, 3, scale, "bad")
    with_it, without = begun(model), begun(model)
    for seed in range(3):
        good = [pictures(4, 10 * seed + i, 3) for i in range(2)]
        report = with_it.step([good[0], bad, good[1]])
        assert report.refused.keys() == {"bad"}
        assert "batch statistics" in report.refused["bad"]
        assert report.loss == without.step(good).loss
    assert with_it.step([bad]).rows == 0
    got = tensors_of(with_it.finish())
    assert_same(got, tensors_of(without.finish()))
    assert any(name.endswith("running_var") for name in got)


def test_activations_that_are_shortened_do_not_throw_the_batch_statistics_off() -> None:
    """A million times too long: the batch counts, with rows as long as those of others."""
    model = norm_model()
    bad = pictures(4, 9, 3, 1e6, "bad")
    with_it, without = begun(model), begun(model)
    good = [pictures(4, i, 3) for i in range(2)]
    report = with_it.step([good[0], bad, good[1]])
    assert report.refused == {}
    assert report.rows == 12
    without.step(good)
    got, want = tensors_of(with_it.finish()), tensors_of(without.finish())
    for name in got:
        if "running" in name:
            assert np.abs(got[name]).max() < 20 * max(np.abs(want[name]).max(), 1.0), name


def test_batches_that_are_fine_alone_and_not_together_are_divided() -> None:
    """A device with a mean far off does not have others refused."""
    model = norm_model()
    far = pictures(4, 9, 3, 2e6, "far")
    far.batch.parts["h.q"][:] = 127
    batches = [far, *(pictures(4, i, 3) for i in range(3))]
    assert [begun(model).step([batch]).refused for batch in batches] == [{}] * 4
    report = begun(model).step(batches)
    assert report.refused == {}
    assert report.rows == 16


def test_large_activations_of_honest_devices_are_trained_on() -> None:
    model = norm_model()
    assert begun(model).step([pictures(4, 1, 3, 255.0)]).refused == {}


def test_a_single_row_is_trained_with_frozen_batch_statistics() -> None:
    model = norm_model()
    trainer = begun(model)
    report = trainer.step([pictures(1, 0, 1)])
    assert report.refused == {}
    assert report.rows == 1
    assert math.isfinite(report.loss)
    copies = tensors_of(trainer.finish())
    before = {n: b.numpy() for n, b in model.named_buffers()}
    for name, tensor in copies.items():
        if "running" in name:
            np.testing.assert_array_equal(tensor, before[name])
    assert not np.array_equal(copies["block.1.conv.weight"], state_of(model)["block.1.conv.weight"])


def test_after_a_single_row_batch_statistics_are_learned_again() -> None:
    model = norm_model()
    with_it, without = begun(model), begun(model)
    with_it.step([pictures(1, 0, 1)])
    for trainer in (with_it, without):
        trainer.step([pictures(4, 1, 1)])
    got, want = tensors_of(with_it.finish()), tensors_of(without.finish())
    moved = "block.1.norm.running_var"
    assert not np.array_equal(want[moved], np.ones(WIDTH, np.float32))
    np.testing.assert_allclose(got[moved], want[moved], rtol=0.1)


def test_features_leave_batch_statistics_as_they_are() -> None:
    model = norm_model()
    plan = replace(SGD, returned=True, u_shaped=True)
    specs = get_codec("int8").specs(("batch", WIDTH, 3, 3), 1)
    asked = replace(pictures(4, 0, 3), label_shape=(4,), features=specs)
    asked = replace(asked, batch=replace(asked.batch, labels=None))
    with_it, without = begun(model, plan), begun(model, plan)
    for _ in range(3):
        features = with_it.features(asked)
    assert features is not None
    gradient = HeadGradient(features, 4)
    for trainer in (with_it, without):
        assert trainer.step([replace(asked, head_gradient=gradient)]).refused == {}
    assert_same(tensors_of(with_it.finish()), tensors_of(without.finish()))


def test_features_that_cannot_be_computed_are_refused() -> None:
    model = choosy_model(IndexError("no such row"))
    trainer = begun(model, replace(SGD, returned=True, u_shaped=True))
    with pytest.raises(TrunkRefused, match="no such row"):
        trainer.features(poisoned(some(model, 1)[0]))
    assert trainer.features(some(model, 1)[0]) is not None
