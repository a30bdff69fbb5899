"""Dropout by a seed: masks have the distribution of dropout and differ from step to step."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import MAX_SEED, Learner
from edge_sdk.training.plan import LocalPlan
from export.cutting.seeded_random import PRIME, SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.returned import activate
from export.steps.u_shaped import finish
from tests.lib.codecs import Exact

COUNT = 100_000
Z = 5.0
"""Bound of a normal deviate. Seeds are fixed, so a test always gives the same result."""


def kept(seed: int, p: float, shape: tuple[int, ...] = (COUNT,), calls: int = 1) -> Tensor:
    """Return masks (calls, *shape) with 1 for kept elements."""
    ones = torch.ones(shape, dtype=torch.float64)
    with SeededDropout(torch.tensor(seed)):
        masks = [F.dropout(ones, p) for _ in range(calls)]
    return (torch.stack(masks) != 0).double()


def z_of_rate(mask: Tensor, p: float) -> float:
    """Return the deviation of the number of kept elements, in standard deviations."""
    n = mask.numel()
    return (mask.sum().item() - n * (1 - p)) / math.sqrt(n * p * (1 - p))


def z_of_correlation(a: Tensor, b: Tensor, p: float) -> float:
    """Return the deviation of the correlation of two masks from zero, in standard deviations."""
    product = ((a - (1 - p)) * (b - (1 - p))).sum().item()
    return product / (p * (1 - p) * math.sqrt(a.numel()))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 1, 12345, PRIME - 1])
def test_as_many_are_kept_as_asked(p: float, seed: int) -> None:
    """The rate holds for all elements and for every stretch: chi-square over 100 stretches."""
    mask = kept(seed, p)[0]
    assert abs(z_of_rate(mask, p)) < Z
    square = sum(z_of_rate(stretch, p) ** 2 for stretch in mask.reshape(100, -1))
    assert abs(square - 100) / math.sqrt(200) < Z


@pytest.mark.parametrize("distance", [1, 2, 7, 8, 64, 1000])
@pytest.mark.parametrize("seed", [0, 1, PRIME - 1])
def test_neighbours_are_independent(distance: int, seed: int) -> None:
    """This holds for adjacent elements, and for adjacent rows of a larger tensor."""
    mask = kept(seed, 0.4)[0]
    assert abs(z_of_correlation(mask[distance:], mask[:-distance], 0.4)) < Z


def test_patterns_of_eight_are_all_as_likely() -> None:
    """Chi-square over the 256 patterns of eight neighbours also tests more than pairs."""
    bits = kept(3, 0.5, (20_000, 8))[0]
    codes = (bits * 2.0 ** torch.arange(8)).sum(1).long()
    counts = torch.bincount(codes, minlength=256).double()
    want = len(bits) / 256
    square = ((counts - want) ** 2 / want).sum().item()
    assert abs(square - 255) / math.sqrt(2 * 255) < Z


@pytest.mark.parametrize(
    ("one", "other"),
    [(0, 1), (1, 2), (7, 8), (0, PRIME - 1), (5, PRIME // 2), (1_103_515_245, 0)],
)
def test_seeds_are_independent(one: int, other: int) -> None:
    """Adjacent seeds, seeds at both ends, and a seed that equals a round key; also shifted."""
    a, b = kept(one, 0.5)[0], kept(other, 0.5)[0]
    for shift in (0, 1, 2):
        assert abs(z_of_correlation(a[shift:], b[: len(b) - shift], 0.5)) < Z
        assert abs(z_of_correlation(b[shift:], a[: len(a) - shift], 0.5)) < Z


def test_an_element_is_kept_as_often_over_many_seeds() -> None:
    """Over the steps of a training, with one seed each, no element is always dropped."""
    masks = torch.stack([kept(seed, 0.3, (64,))[0] for seed in range(2000)])
    rates = [z_of_rate(masks[:, i], 0.3) for i in range(64)]
    assert max(map(abs, rates)) < Z
    assert abs(z_of_correlation(masks[1:], masks[:-1], 0.3)) < Z


def test_calls_are_independent() -> None:
    """The masks of several dropouts of one step are pairwise independent."""
    for a, b in itertools.combinations(kept(11, 0.5, calls=6), 2):
        assert abs(z_of_correlation(a, b, 0.5)) < Z
        assert abs(z_of_correlation(a[1:], b[:-1], 0.5)) < Z


def test_the_same_seed_gives_the_same_masks() -> None:
    """The caller's random number generator is not changed."""
    torch.manual_seed(1)
    want = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(kept(5, 0.5, calls=3), kept(5, 0.5, calls=3))
    assert torch.equal(torch.rand(1), want)
    assert not torch.equal(kept(5, 0.5), kept(6, 0.5))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.75])
def test_what_is_kept_is_scaled(p: float) -> None:
    """Values and their gradients are scaled by 1 / (1 - p), so the mean does not change."""
    x = torch.rand(COUNT, dtype=torch.float64).add(1).requires_grad_()
    with SeededDropout(torch.tensor(4)):
        y = F.dropout(x, p)
    y.sum().backward()
    assert x.grad is not None
    scale = torch.where(y != 0, 1 / (1 - p), 0.0).double()
    torch.testing.assert_close(y, x * scale)
    torch.testing.assert_close(x.grad, scale)


def test_nothing_is_drawn_without_need() -> None:
    """With p = 0 and in evaluation the output is the input, and no mask is counted."""
    x = torch.randn(3, 4)
    with SeededDropout(torch.tensor(0)) as seeded:
        assert F.dropout(x, 0.0) is x
        assert F.dropout(x, 0.5, training=False) is x
        assert nn.Dropout(0.5).eval()(x) is x
        assert seeded.calls == 0
        nn.Dropout(0.5)(x)
        nn.Dropout2d(0.5)(x.reshape(1, 3, 2, 2))
        assert seeded.calls == 2


def test_all_is_dropped_for_one() -> None:
    """With p = 1 the output is zero, not infinity times zero."""
    x = torch.randn(100, requires_grad=True)
    with SeededDropout(torch.tensor(3)):
        y = F.dropout(x, 1.0)
    assert torch.equal(y, torch.zeros(100))
    y.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("function", "shape"),
    [(F.dropout1d, (200, 50, 6)), (F.dropout2d, (200, 50, 3, 4)), (F.dropout2d, (200, 50, 2, 1))],
)
def test_channels_are_dropped_as_a_whole(function: Any, shape: tuple[int, ...]) -> None:
    """Each (example, channel) is dropped with probability p."""
    with SeededDropout(torch.tensor(9)):
        y = function(torch.ones(shape), 0.3)
    flat = y.flatten(2)
    assert (flat == flat[:, :, :1]).all()
    assert abs(z_of_rate((flat[:, :, 0] != 0).double(), 0.3)) < Z
    assert y.max().item() == pytest.approx(1 / 0.7)


@pytest.mark.parametrize(
    ("function", "shape"),
    [(F.dropout1d, (50, 60)), (F.dropout2d, (50, 60)), (F.dropout2d, (50, 60, 5))],
)
def test_channels_with_fewer_dimensions(function: Any, shape: tuple[int, ...]) -> None:
    """Then the channel is the dimension that torch chooses, with its warning."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = function(torch.ones(shape), 0.5) != 0
        with SeededDropout(torch.tensor(9)):
            got = function(torch.ones(shape), 0.5) != 0
    for axis in range(1, len(shape)):
        along = [(mask.movedim(axis, -1) == mask.movedim(axis, -1)[..., :1]).all()
                 for mask in (got, want)]  # fmt: skip
        assert along[0] == along[1], axis
    assert 0.3 < got.double().mean() < 0.7


@pytest.mark.parametrize("form", ["plain", "causal", "boolean", "added", "grouped", "scaled"])
def test_attention_without_dropout_is_torchs(form: str) -> None:
    """This holds for the form with dropout at a rate that drops nothing, and for p = 0."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 5, 4, generator=generator, dtype=torch.float64)
               for heads in ((4, 2, 2) if form == "grouped" else (3, 3, 3)))  # fmt: skip
    given: dict[str, Any] = {
        "plain": {},
        "causal": {"is_causal": True},
        "boolean": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
        "added": {"attn_mask": torch.randn(5, 5, generator=generator, dtype=torch.float64)},
        "grouped": {"enable_gqa": True, "is_causal": True},
        "scaled": {"scale": 0.3},
    }[form]
    want = F.scaled_dot_product_attention(q, k, v, **given)
    with SeededDropout(torch.tensor(0)) as seeded:
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, dropout_p=0.0, **given), want
        )
        assert seeded.calls == 0
        torch.testing.assert_close(
            F.scaled_dot_product_attention(q, k, v, dropout_p=1e-12, **given), want
        )
        assert seeded.calls == 1
        nothing = F.scaled_dot_product_attention(q, k, v, dropout_p=1.0, **given)
    assert torch.equal(nothing, torch.zeros_like(want))


def test_attention_drops_weights() -> None:
    """If the values are the identity, the result is the matrix of dropped weights."""
    q = torch.zeros(50, 1, 40, 4)
    v = torch.eye(40).expand(50, 1, 40, 40)
    with SeededDropout(torch.tensor(2)):
        weights = F.scaled_dot_product_attention(q, q, v, dropout_p=0.25)
    assert abs(z_of_rate((weights != 0).double(), 0.25)) < Z
    assert weights.max().item() == pytest.approx(1 / 40 / 0.75)


@pytest.mark.parametrize("seed", [0, 1, PRIME - 1])
def test_arithmetic_stays_within_int64(seed: int) -> None:
    """The masks equal those of Python's integers, also for the largest elements of a step."""
    with SeededDropout(torch.tensor(seed)) as seeded:
        seeded.calls = 40
        got = F.dropout(torch.ones(300), 0.5) != 0
    for i, mine in enumerate(got.tolist()):
        x = i + 1_299_709_357 * 40 % PRIME
        for key in (0, 1_103_515_245, 824_287_391):
            x = pow(x + seed + key, 3, PRIME)
        assert mine == (x >= round(0.5 * PRIME)), i


def test_seeds_of_devices_are_within_the_prime() -> None:
    """``edge_sdk`` does not import torch, so it has its own copy of the bound."""
    assert 0 < MAX_SEED <= PRIME
    assert PRIME < 2**31
    assert PRIME % 3 == 2


class Recorder:
    """A runtime that records the seeds it gets."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.loading_s = 0.0

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        """Ignore the state."""

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        """Return no state."""
        return {}

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Return a loss; the seed must be a scalar that a graph accepts."""
        assert graph == "train"
        seed = batch["seed"]
        assert seed.shape == ()
        assert seed.dtype == np.int64
        self.seeds.append(int(seed))
        return {"loss": np.float32(0), "correct": np.float32(0)}


def seeds_of_a_round(seed: int) -> list[int]:
    """Return the seeds of the training steps in a round of three epochs of four batches."""
    recorder = Recorder()
    port = SimpleNamespace(role="seed", spec=SimpleNamespace(name="seed"))
    manifest: Any = SimpleNamespace(
        graphs={"train": SimpleNamespace(inputs=[port])}, limits={}, task="classes", state=()
    )
    data = Examples(np.zeros((16, 2), np.float32), np.zeros(16, np.int64))
    plan = LocalPlan(3, 4, {"lr": 0.1}, "none", seed)
    Learner(manifest, recorder).train({}, data, plan, lambda *_: None)
    return recorder.seeds


def test_every_step_has_a_seed_of_its_own() -> None:
    """Seeds differ within a round and between rounds; a repeated round has the same seeds."""
    rounds = [seeds_of_a_round(seed) for seed in range(20)]
    seeds = [seed for steps in rounds for seed in steps]
    assert len(set(seeds)) == len(seeds) == 20 * 12
    assert all(0 <= seed < PRIME for seed in seeds)
    assert seeds_of_a_round(3) == rounds[3]


@pytest.mark.parametrize("seed", [0, 5, 1_000_003])
def test_masks_of_the_head_on_the_device_are_not_those_of_the_stem(seed: int) -> None:
    """The graphs ``activate`` and ``finish`` of a batch have the same seed; shapes are equal."""
    width = 40
    stem = nn.Sequential(nn.Linear(width, width), nn.Dropout(0.5))
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 3))
    model = SplitModel(stem, [nn.Linear(width, width), nn.Linear(width, width)], head)
    x = torch.randn(50, width)
    with torch.no_grad():
        for linear in (stem[0], *model.block):
            linear.weight.copy_(torch.eye(width))
            linear.bias.zero_()
    model.add_heads([1], x, 3)
    steps = ClientSteps(
        ClientSegment(model, 1, u_shaped=True),
        get_optimizer("sgd"),
        Exact(),
        x,
        3,
        graphs=["finish"],
    )
    given = {**steps.initial, **steps.slots, "seed": torch.tensor(seed), "y": torch.arange(50) % 3}
    given |= {n: torch.tensor(v) for n, v in {**steps.optimizer.hyper, "max_norm": 0.0}.items()}
    given |= {"x": x, "features.h": x}
    in_stem = activate(steps).function(dict(steps.constants), given)["h"] != 0
    in_head = finish(steps).function(dict(steps.constants), given)["grad.h"] != 0
    for mask in (in_stem, in_head):
        assert abs(z_of_rate(mask.double(), 0.5)) < Z
    assert abs(z_of_correlation(in_stem.double(), in_head.double(), 0.5)) < Z
