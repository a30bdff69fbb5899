"""The steps of Split-Mix, against their definitions in float64.

The reference replaces norms by the copies in use and calls the modules itself; autograd computes
the gradients. Steps run in float64 too, so that rounding explains little.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Protocol

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from export.bases.dual_norms import noise_tensors, with_dual_norms
from export.bases.exported import without_trunk
from export.bases.split_width import split_width
from export.bundles.writer import Tier, export_bundles, make_steps
from export.cutting.split_model import ClientSegment, SplitModel, statistics
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName, lower
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.losses import local_loss, masked
from export.steps.mixtures import mixed_at_once
from export.steps.step import Step
from export.steps.torch_runtime import TorchRuntime
from export.steps.train import train
from tests.lib.decay import optimizer_of
from tests.lib.dual_norms import only, shaken, torch_runtime
from tests.lib.graph_runs import run_eagerly, run_files, verify
from tests.lib.models import (
    CLASSES,
    FEATURES,
    IMAGE,
    MeanHead,
    conv_model,
    example,
    open_bundle,
    text_model,
    token_model,
)
from tests.lib.transformers_models import gpt2

WORDS = 12
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
PLAIN = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
ADAMW = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "max_norm": 0.0}
HYPER = {"sgd": SGD, "adamw": ADAMW}


class BatchNormBlock(nn.Module):
    """A residual block of convolution, BatchNorm and tanh, which is smooth."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = h + torch.tanh(self.norm(self.conv(h)))
        return result


def batch_model() -> SplitModel:
    """Return blocks with BatchNorm for :data:`IMAGE`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [BatchNormBlock(4) for _ in range(2)]
        return SplitModel(nn.Conv2d(1, 4, 3, padding=1), blocks, MeanHead(4, CLASSES))


def words(rows: int, seed: int = 0, length: int = 5) -> Tensor:
    """Return random integers for an embedding."""
    return torch.randint(WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))


def pictures(rows: int, seed: int = 0) -> Tensor:
    """Return random images."""
    return example(IMAGE, rows, seed)


def vectors(rows: int, seed: int = 0) -> Tensor:
    """Return random vectors."""
    return example(FEATURES, rows, seed)


Draw = Callable[[int, int], Tensor]
MODELS: dict[str, tuple[Callable[[], SplitModel], Draw]] = {
    "convolutions": (conv_model, pictures),
    "batch norms": (batch_model, pictures),
    "vectors": (token_model, vectors),
}


def steps_of(
    name: str, optimizer: str = "sgd", *, whole: bool = True, seed: int = 1
) -> tuple[ClientSteps, Draw]:
    """Return steps of a model whose norm copies differ: whole, or cut with two or three heads."""
    build, draw = MODELS[name]
    model = with_dual_norms(build())
    if whole:
        model = without_trunk(model)
    else:
        model.add_heads(range(1, model.depth), draw(8, 0), CLASSES)
    with torch.no_grad():
        for n, t in shaken(model.trained(), seed).items():
            model.trained()[n].copy_(t)
    tier = Tier(model.depth - 1, "fp16", bases=3, graphs=["adversarial_train"])
    return make_steps(ClientSegment(model, tier.cut), tier, draw(8, 0), CLASSES, optimizer), draw


def run(step: Step, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run a step in float64."""
    return step.function(
        {n: wide(t) for n, t in step.constants.items()},
        {port.spec.name: wide(feeds[port.spec.name]) for port in step.inputs},
    )


def wide(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64, unless it has integers."""
    return tensor.double() if tensor.is_floating_point() else tensor


def scalars(values: Mapping[str, float]) -> dict[str, Tensor]:
    """Return hyper-parameters as a step takes them."""
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


ADVERSARIAL = "adversarial_train"


def by_name(steps: ClientSteps, name: str) -> Step:
    """Return a step by the name of its graph."""
    return next(step for step in all_steps(steps) if step.name == name)


def some_classes(seed: int) -> tuple[Tensor, list[int]]:
    """Draw the classes that are present; return a mask and a list."""
    drawn = np.random.default_rng(seed)
    there = sorted(int(n) for n in drawn.choice(CLASSES, drawn.integers(1, CLASSES + 1), False))
    present = torch.zeros(CLASSES)
    present[there] = 1
    return present, there


def labels_of(there: list[int], rows: int, seed: int) -> Tensor:
    """Return random labels of present classes."""
    drawn = np.random.default_rng(seed).choice(there, rows)
    return torch.from_numpy(drawn.astype(np.int64))


def cross_entropy(logits: Tensor, y: Tensor, there: list[int]) -> Tensor:
    """Return the sum over heads of the mean ``log sum exp z - z_y`` over the present classes."""
    columns = torch.tensor([there.index(int(n)) for n in y])
    loss = torch.zeros((), dtype=torch.float64)
    for head in logits[..., there]:
        loss = loss + (head.exp().sum(1).log() - head[torch.arange(len(y)), columns]).mean()
    return loss


class Reference:
    """A device's steps by definition."""

    def __init__(self, steps: ClientSteps, hyper: dict[str, float], trained: set[str]) -> None:
        self.segment = copy.deepcopy(steps.segment).double().train()
        self.parameters = dict(self.segment.named_parameters())
        self.statistics = statistics(self.segment)
        given = [p for n, p in self.parameters.items() if n in trained]
        self.optimizer = optimizer_of(self.segment, hyper, given)

    def logits(self, x: Tensor, copied: str = "clean") -> Tensor:
        """Return the logits with one copy of the norms."""
        with only(self.segment, copied):
            logits: Tensor = self.segment(wide(x))[1]
        return logits

    def step(self, loss: Tensor) -> None:
        """Update the model once."""
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()

    def assert_state(self, found: Mapping[str, Tensor]) -> None:
        """Check that parameters and statistics are equal."""
        for name, want in (self.parameters | self.statistics).items():
            torch.testing.assert_close(found[name], want.detach(), rtol=1e-8, atol=1e-9, msg=name)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.integers(1, 5),
    heads=st.integers(1, 3),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 9999),
)
def test_classes_that_are_not_there_have_no_part_in_the_loss(
    rows: int, heads: int, scale: float, seed: int
) -> None:
    """Value and gradient are those of the present classes; other gradients are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(heads, rows, CLASSES, generator=generator)
    present, there = some_classes(seed)
    y = labels_of(there, rows, seed)
    given = logits.clone().requires_grad_()
    loss = local_loss(masked(given, present), y)
    want = cross_entropy(logits.double(), y, there)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(loss, given)
    closed = torch.zeros(heads, rows, CLASSES, dtype=torch.float64)
    closed[..., there] = logits.double()[..., there].softmax(-1)
    closed[:, torch.arange(rows), y] -= 1
    torch.testing.assert_close(gradient.double(), closed / rows, rtol=1e-4, atol=1e-6)
    absent = [n for n in range(CLASSES) if n not in there]
    assert not gradient[..., absent].any()


@pytest.mark.parametrize("optimizer", HYPER)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_training_goes_by_the_classes_that_are_there(
    name: str, whole: bool, optimizer: str
) -> None:
    """Loss, answers and three updates, each with other classes and rows; noise copies stay."""
    steps, draw = steps_of(name, optimizer, whole=whole)
    noise = noise_tensors(steps.segment)
    hyper = HYPER[optimizer]
    reference = Reference(steps, hyper, set(steps.parameters) - noise)
    state = {n: t.double() for n, t in (steps.initial | steps.slots).items()}
    step = train(steps)
    for seed, rows in enumerate((5, 2, 8)):
        x, (present, there) = draw(rows, seed), some_classes(seed)
        y = labels_of(there, rows, seed)
        logits = reference.logits(x)
        loss = cross_entropy(logits, y, there)
        reference.step(loss)
        got = run(step, {**state, "x": x, "y": y, "present": present, **scalars(hyper)})
        torch.testing.assert_close(got["loss"], loss.detach())
        mean = logits.detach()[..., there].softmax(-1).mean(0)
        answers = torch.tensor(there)[mean.argmax(1)]
        assert got["correct"] == (answers == y).sum()
        state = {n: got[f"next/{n}"] for n in state}
        reference.assert_state(state)


@pytest.mark.parametrize("name", MODELS)
def test_rows_of_absent_classes_stay(name: str) -> None:
    """Without weight decay the rows are equal bit for bit, and their momenta are zero."""
    steps, draw = steps_of(name)
    (weight,) = [n for n in steps.parameters if n.startswith("aux") and n.endswith("out.weight")]
    bias = weight.replace("weight", "bias")
    present, there = some_classes(3)
    absent = [n for n in range(CLASSES) if n not in there]
    assert there
    assert absent
    state = steps.initial | steps.slots
    hyper = scalars({"lr": 0.5, "momentum": 0.9, "weight_decay": 0.0, "max_norm": 0.0})
    for seed in range(3):
        y = labels_of(there, 6, seed)
        got = run(train(steps), {**state, "x": draw(6, seed), "y": y, "present": present, **hyper})
        state = {n: got[f"next/{n}"] for n in state}
    for tensor in (weight, bias):
        assert torch.equal(state[tensor][absent], steps.initial[tensor][absent].double())
        assert not state[f"momentum/{tensor}"][absent].any()
        assert (state[tensor][there] - steps.initial[tensor][there]).abs().min() > 1e-4


@pytest.mark.parametrize("optimizer", HYPER)
@pytest.mark.parametrize("name", MODELS)
def test_training_leaves_noise_copies_and_their_slots(name: str, optimizer: str) -> None:
    """With momentum, decay and slots that are not zero, the noise copies stay bit for bit."""
    steps, draw = steps_of(name, optimizer)
    noise = noise_tensors(steps.segment) & (steps.initial.keys())
    assert noise
    generator = torch.Generator().manual_seed(0)
    state = steps.initial | {
        n: torch.rand(t.shape, generator=generator) for n, t in steps.slots.items()
    }
    resting = noise | {n for n in steps.slots if n.partition("/")[2] in noise}
    assert len(resting) > len(noise)
    feeds = {"x": draw(6, 0), "y": torch.arange(6), "present": torch.ones(CLASSES)}
    got = run(train(steps), {**state, **feeds, **scalars(HYPER[optimizer])})
    for n, t in state.items():
        assert torch.equal(got[f"next/{n}"], t.double()) == (n in resting), n


@pytest.mark.parametrize("optimizer", HYPER)
@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_hardening_is_training_on_both_losses(name: str, whole: bool, optimizer: str) -> None:
    """Three updates by ``(1 - l) loss(x) + l loss(x_adv)``; clean statistics are of ``x``."""
    steps, draw = steps_of(name, optimizer, whole=whole)
    hyper = HYPER[optimizer]
    reference = Reference(steps, hyper, set(steps.parameters))
    state = {n: t.double() for n, t in (steps.initial | steps.slots).items()}
    harden = by_name(steps, ADVERSARIAL)
    for seed, (rows, weight) in enumerate(((5, 0.3), (2, 0.8), (8, 0.5))):
        x, x_adv = draw(rows, seed), 2 + 3 * draw(rows, 100 + seed)
        present, there = some_classes(seed)
        y = labels_of(there, rows, seed)
        logits = reference.logits(x)
        clean = cross_entropy(logits, y, there)
        loss = (1 - weight) * clean
        loss = loss + weight * cross_entropy(reference.logits(x_adv, "noise"), y, there)
        reference.step(loss)
        feeds = {"x": x, "y": y, "x_adv": x_adv, "present": present}
        got = run(harden, {**state, **feeds, **scalars(hyper | {"robustness": weight})})
        torch.testing.assert_close(got["loss"], loss.detach())
        mean = logits.detach()[..., there].softmax(-1).mean(0)
        assert got["correct"] == (torch.tensor(there)[mean.argmax(1)] == y).sum()
        state = {n: got[f"next/{n}"] for n in state}
        reference.assert_state(state)


@pytest.mark.parametrize("name", MODELS)
def test_hardening_without_dual_norms_is_plain_adversarial_training(name: str) -> None:
    """Both losses use the same norms; statistics change first by ``x``, then by ``x_adv``."""
    build, draw = MODELS[name]
    model = without_trunk(build())
    tier = Tier(model.depth - 1, graphs=["adversarial_train"])
    steps = make_steps(ClientSegment(model, tier.cut), tier, draw(8, 0), CLASSES, "sgd")
    assert not steps.dual
    reference = Reference(steps, SGD, set(steps.parameters))
    state = {n: t.double() for n, t in (steps.initial | steps.slots).items()}
    everything = list(range(CLASSES))
    for seed, weight in enumerate((0.3, 0.7)):
        x, x_adv, y = draw(4, seed), draw(4, 50 + seed), labels_of(everything, 4, seed)
        loss = (1 - weight) * cross_entropy(reference.logits(x), y, everything)
        loss = loss + weight * cross_entropy(reference.logits(x_adv), y, everything)
        reference.step(loss)
        feeds = {"x": x, "y": y, "x_adv": x_adv, **scalars(SGD | {"robustness": weight})}
        got = run(by_name(steps, ADVERSARIAL), {**state, **feeds})
        torch.testing.assert_close(got["loss"], loss.detach())
        state = {n: got[f"next/{n}"] for n in state}
        reference.assert_state(state)


def test_hardening_packs_what_both_passes_give() -> None:
    """Outputs have the activations of ``x``, and under ``noise`` those of ``x_adv``."""
    steps, draw = steps_of("batch norms", whole=False)
    reference = Reference(steps, SGD, set(steps.parameters))
    x, x_adv = draw(5, 1), draw(5, 2)
    feeds = {"x": x, "y": torch.arange(5), "x_adv": x_adv, "present": torch.ones(CLASSES)}
    state = steps.initial | steps.slots
    got = run(
        by_name(steps, ADVERSARIAL), {**state, **feeds, **scalars(SGD | {"robustness": 0.5})}
    )  # fmt: skip
    for prefix, copied, given_ in (("", "clean", x), ("noise.", "noise", x_adv)):
        with only(reference.segment, copied), torch.no_grad():
            h, _ = reference.segment(given_.double())
        torch.testing.assert_close(got[f"{prefix}h"], h.half(), rtol=2e-3, atol=1e-3)


def test_statistics_are_each_of_their_own_inputs() -> None:
    """For every weight, a first norm's mean is that of its own input, ``x`` or ``x_adv``."""
    steps, draw = steps_of("batch norms")
    x, x_adv = draw(6, 1), 5 + draw(6, 2)
    for weight in (0.0, 0.4, 1.0):
        feeds = {"x": x, "y": torch.arange(6), "x_adv": x_adv, "present": torch.ones(CLASSES)}
        state = steps.initial | steps.slots
        got = run(
            by_name(steps, ADVERSARIAL),
            {**state, **feeds, **scalars(PLAIN | {"robustness": weight})},
        )
        first = copy.deepcopy(steps.segment).double()
        for copied, given_ in (("clean", x), ("noise", x_adv)):
            with torch.no_grad():
                h = first.block[0].conv(first.stem(given_.double()))
            old = steps.initial[f"block.0.norm.{copied}.running_mean"].double()
            want = 0.9 * old + 0.1 * h.mean((0, 2, 3))
            found = got[f"next/block.0.norm.{copied}.running_mean"]
            torch.testing.assert_close(found, want)
            old = steps.initial[f"block.0.norm.{copied}.running_var"].double()
            want = 0.9 * old + 0.1 * h.var((0, 2, 3))
            torch.testing.assert_close(got[f"next/block.0.norm.{copied}.running_var"], want)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("weight", "resting"), [(0.0, "noise"), (1.0, "clean")])
def test_a_weight_of_all_leaves_the_other_copy(name: str, weight: float, resting: str) -> None:
    """The other copy has no gradient: without decay it stays, and its momenta are zero."""
    steps, draw = steps_of(name)
    hyper = scalars(
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "max_norm": 0.0, "robustness": weight}
    )
    feeds = {"x": draw(6, 1), "y": torch.arange(6), "x_adv": draw(6, 2)}
    state = steps.initial | steps.slots
    got = run(
        by_name(steps, ADVERSARIAL), {**state, **feeds, "present": torch.ones(CLASSES), **hyper}
    )  # fmt: skip
    for n, p in steps.parameters.items():
        rests = f".{resting}." in n
        assert torch.equal(got[f"next/{n}"], p.double()) == rests, n
        assert got[f"next/momentum/{n}"].any() != rests, n


# -- adversarial examples


def attacked(
    steps: ClientSteps, x: Tensor, start: Tensor, seed: int, **scalars_: float
) -> tuple[Tensor, Tensor, list[int]]:
    """Return the result of ``attack``, the labels, and the present classes."""
    present, there = some_classes(seed)
    y = labels_of(there, len(x), seed)
    feeds = {"x": x, "y": y, "start": start, "present": present}
    (x_adv,) = run(
        by_name(steps, "attack"), {**steps.initial, **feeds, **scalars(scalars_)}
    ).values()
    return x_adv, y, there


STEPS = {name: steps_of(name) for name in MODELS}


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(MODELS)),
    rows=st.integers(1, 4),
    epsilon=st.floats(0, 2),
    rate=st.floats(0, 3),
    low=st.floats(-2, 0),
    high=st.floats(0, 2),
    far=st.sampled_from([0.0, 0.5, 10.0]),
    seed=st.integers(0, 9999),
)
def test_hard_examples_stay_near_and_inside(
    name: str, rows: int, epsilon: float, rate: float, low: float, high: float, far: float,
    seed: int,
) -> None:  # fmt: skip
    """Examples stay within ``epsilon`` of ``x`` and from ``low`` to ``high``, for every start."""
    steps, draw = STEPS[name]
    x = draw(rows, seed).double().clamp(low, high)
    start = x + far * draw(rows, seed + 1).double()
    x_adv, _, _ = attacked(
        steps, x, start, seed, epsilon=epsilon, rate=rate, low=low, high=high
    )  # fmt: skip
    assert x_adv.shape == x.shape
    assert (x_adv - x).abs().max() <= epsilon + 1e-12
    assert low <= x_adv.min()
    assert x_adv.max() <= high


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_hard_examples_go_along_the_sign_of_the_gradient(name: str, whole: bool) -> None:
    """Every coordinate moves by ``rate`` up the loss with noise norms, in evaluation mode."""
    steps, draw = steps_of(name, whole=whole)
    reference = Reference(steps, SGD, set(steps.parameters))
    reference.segment.eval()
    for seed in range(3):
        x, rate = draw(4, seed), 1e-6
        start = x.double() + 0.1
        x_adv, y, there = attacked(
            steps, x, start, seed, epsilon=math.inf, rate=rate, low=-math.inf, high=math.inf
        )
        if len(there) == 1:  # the loss of a single class is zero
            assert torch.equal(x_adv, start)
            continue
        there_ = start.clone().requires_grad_()
        loss = cross_entropy(reference.logits(there_, "noise"), y, there)
        (gradient,) = torch.autograd.grad(loss, [there_])
        steep = gradient.abs() > 1e-9 * gradient.abs().max()
        assert steep.double().mean() > 0.9
        want = start + rate * gradient.sign()
        torch.testing.assert_close(x_adv[steep], want[steep], rtol=0, atol=1e-12)
        with torch.no_grad():
            rise = cross_entropy(reference.logits(x_adv, "noise"), y, there) - loss
        assert rise > 0
        torch.testing.assert_close(rise / rate, gradient.abs().sum(), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_steps_of_ascent_make_examples_harder(name: str) -> None:
    """Several steps, each from the last result, raise the loss within ``epsilon``."""
    steps, draw = steps_of(name)
    reference = Reference(steps, SGD, set(steps.parameters))
    reference.segment.eval()
    x = draw(6, 5).double()
    there = x
    losses = []
    for _ in range(8):
        there, y, classes = attacked(
            steps, x, there, 1, epsilon=0.1, rate=0.02, low=-9.0, high=9.0
        )  # fmt: skip
        with torch.no_grad():
            losses.append(cross_entropy(reference.logits(there, "noise"), y, classes))
    with torch.no_grad():
        first = cross_entropy(reference.logits(x, "noise"), y, classes)
    assert first < losses[0] < losses[3]
    assert losses[3] <= losses[-1] * (1 + 1e-3)
    assert (there - x).abs().max() <= 0.1 + 1e-12


# -- mixtures


@pytest.mark.parametrize(
    ("bases", "numbers"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (0, [])],
)
def test_numbers_that_are_mixed_at_once(bases: int, numbers: list[int]) -> None:
    """The numbers are powers of two, and the number of all bases."""
    assert mixed_at_once(bases) == numbers


@given(bases=st.integers(1, 300), part=st.floats(0, 1))
def test_every_number_is_a_sum_of_a_few(bases: int, part: float) -> None:
    """If the largest fitting number comes first, the binary digits bound the number of graphs."""
    left = wanted = round(1 + part * (bases - 1))
    calls = 0
    while left:
        left -= max(n for n in mixed_at_once(bases) if n <= left)
        calls += 1
    assert calls <= wanted.bit_length()


def arrays(feeds: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return the inputs as a runtime takes them."""
    return {n: t.float().numpy() if t.is_floating_point() else t.numpy() for n, t in feeds.items()}


class ShuffleBuffer(Protocol):
    """The interface of a runtime for mixtures."""

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of a graph."""


def assert_mixes(
    runtime: TorchRuntime, mixer: ShuffleBuffer, steps: ClientSteps, bases: int, x: Tensor,
    weights: tuple[float, ...], tolerance: float = 1e-5,
) -> None:  # fmt: skip
    """Check that ``mix_N`` of ``mixer`` is the mean of ``predict`` over the states."""
    states = [arrays(shaken(steps.initial, 10 + base)) for base in range(bases)]
    for weight in weights:
        extra = {"robustness": np.asarray(weight, np.float32)} if steps.dual else {}
        answers, packed = [], []
        for state in states:
            runtime.set_state(state)
            found = runtime.run("predict", {"x": x.numpy(), **extra})
            answers.append(found.pop("logits"))
            packed.append(found)
        for n in mixed_at_once(bases):
            stacked = {
                f"bases/{key}": np.stack([state[key] for state in states[:n]]) for key in states[0]
            }
            got = mixer.run(f"mix_{n}", {**stacked, "x": x.numpy(), **extra})
            want = np.mean(answers[:n], 0, dtype=np.float64)
            np.testing.assert_allclose(got.pop("logits"), want, rtol=tolerance, atol=tolerance)
            assert got.keys() == (
                set() if steps.segment.whole else {f"bases.{key}" for key in packed[0]}
            )
            for key, part in got.items():
                each = np.stack([p[key.removeprefix("bases.")] for p in packed[:n]])
                assert part.dtype == each.dtype
                assert part.shape == each.shape
                loose = 1 if part.dtype == np.int8 else 2e-3  # one unit in the last place
                np.testing.assert_allclose(
                    part.astype(float), each.astype(float), rtol=2e-3, atol=loose
                )
        if steps.dual and weight in (0.0, 1.0):
            reference = copy.deepcopy(steps.segment).double().eval()
            for state, answer in zip(states, answers, strict=True):
                reference.load_state_dict(
                    {k: torch.from_numpy(v) for k, v in state.items()}, strict=False
                )
                with torch.no_grad(), only(reference, "noise" if weight else "clean"):
                    logits = reference(wide(x))[1]
                np.testing.assert_allclose(answer, logits.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", [*MODELS, "words"])
def test_a_mixture_is_the_mean_of_the_answers(name: str, whole: bool, tmp_path: Path) -> None:
    """For each number of bases and robustness, the answer is the mean; cut bases pack theirs."""
    build, draw = {**MODELS, "words": (text_model, words)}[name]
    model = with_dual_norms(build())
    if whole:
        model = without_trunk(model)
    tier = Tier(model.depth - 1, "int8", bases=6)
    runtime, steps = torch_runtime(model, tier, draw(8, 0), CLASSES, tmp_path / "out")
    for rows in (1, 5):
        assert_mixes(runtime, runtime, steps, 6, draw(rows, rows), (0.0, 0.3, 1.0))


def test_what_is_frozen_is_shared(tmp_path: Path) -> None:
    """A frozen stem is a constant of the graph; bases have trained tensors only."""
    model = conv_model()
    model.stem.requires_grad_(False)
    model = without_trunk(model)
    runtime, steps = torch_runtime(
        model, Tier(model.depth - 1, bases=2), pictures(8), CLASSES, tmp_path / "out"
    )
    mix = by_name(steps, "mix_2")
    assert set(steps.constants) == {"stem.weight", "stem.bias"}
    assert [p.spec.name for p in mix.inputs] == [*(f"bases/{n}" for n in steps.initial), "x"]
    assert_mixes(runtime, runtime, steps, 2, pictures(3), (0.0,))


# -- exported


def conv_base() -> SplitModel:
    """Return one of three bases of a wide model with dual norms, for devices with whole models."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    model = SplitModel(nn.Conv2d(1, 6, 3, padding=1), [block, nn.Tanh()], MeanHead(6, CLASSES))
    return without_trunk(split_width(model, 3, pictures(8)).with_dual_norms().model)


@pytest.mark.parametrize("runtime", ["onnx", pytest.param("executorch", marks=pytest.mark.slow)])
def test_a_base_is_exported(runtime: RuntimeName, tmp_path: Path) -> None:
    """Every graph equals PyTorch on a device's runtime, for every batch size."""
    model = conv_base()
    tier = Tier(model.depth - 1, "fp16", runtime, batch=8, bases=3, graphs=["adversarial_train"])
    index = export_bundles(
        model, {"t": tier}, tmp_path / "out", example=pictures(8), classes=CLASSES
    )  # fmt: skip
    bundle = open_bundle(index, "t")
    device = load_runtime(bundle)
    eager, steps = torch_runtime(model, tier, pictures(8), CLASSES, tmp_path / "eager")
    assert set(bundle.graphs) >= {
        "attack",
        "adversarial_train",
        "mix_1",
        "mix_2",
        "mix_3",
        "train",
        "predict",
    }
    assert len(bundle.manifest.graphs) == 8
    state = arrays(shaken(steps.initial, 3))
    device.set_state(state)
    eager.set_state(state)
    sgd = {n: np.asarray(v, np.float32) for n, v in SGD.items()}
    for seed, rows in enumerate((8, 1, 3, 5)):
        present, there = some_classes(seed)
        x = pictures(rows, seed).numpy()
        y = labels_of(there, rows, seed).numpy()
        known = {"x": x, "y": y, "present": present.numpy()}
        weight = np.asarray(0.3, np.float32)
        limits = {"epsilon": 0.1, "rate": 0.05, "low": -3.0, "high": 3.0}
        ball = {n: np.asarray(v, np.float32) for n, v in limits.items()}
        x_adv = eager.run("attack", {**known, "start": x, **ball})["x_adv"]
        for graph, feeds in (
            ("attack", {**known, "start": x, **ball}),
            ("predict", {"x": x, "robustness": weight}),
            ("forward", {"x": x}),
            ("train", {**known, **sgd}),
            ("adversarial_train", {**known, **sgd, "x_adv": x_adv, "robustness": weight}),
        ):
            got, want = device.run(graph, feeds), eager.run(graph, feeds)
            assert got.keys() == want.keys()
            for n, array in want.items():
                assert got[n].shape == array.shape
                if graph == "attack":  # a gradient that is zero up to rounding has any sign
                    assert np.mean(np.abs(got[n] - array) > 1e-5) < 0.01
                    continue
                loose = 4e-3 if array.dtype == np.float16 else 1e-4
                np.testing.assert_allclose(got[n], array, rtol=loose, atol=loose, err_msg=n)
        found, wanted = device.get_state(slots=True), eager.get_state(slots=True)
        assert found.keys() == wanted.keys()
        for n, array in wanted.items():
            np.testing.assert_allclose(found[n], array, rtol=1e-4, atol=1e-4, err_msg=n)
    for rows in (1, 5, 8):
        assert_mixes(eager, device, steps, 3, pictures(rows, 9), (0.0, 0.3, 1.0), 1e-4)


class Lowered:
    """Runs lowered mixtures as a runtime does."""

    def __init__(self, steps: ClientSteps, x: Tensor) -> None:
        self.steps = {step.name: step for step in all_steps(steps) if step.name.startswith("mix_")}
        self.lowered = lower("onnx", list(self.steps.values()), {})
        self._run = run_files("onnx", self.lowered)
        for step in self.steps.values():
            verify(steps, step, self._run, x)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs of a mixture."""
        return self._run(self.steps[graph], dict(batch))


@pytest.mark.slow
def test_bases_of_a_language_model_are_mixed(tmp_path: Path) -> None:
    """GPT-2 with dual norms runs on ONNX Runtime for texts of any length, without class masks."""
    model = without_trunk(split_width(gpt2(), 2, words(8)).with_dual_norms().model)
    tier = Tier(model.depth - 1, bases=2)
    eager, steps = torch_runtime(model, tier, words(8), WORDS, tmp_path / "eager")
    assert not steps.present_port()
    assert "present" not in [port.spec.name for port in train(steps).inputs]
    mixer = Lowered(steps, words(8))
    for rows, length in ((1, 5), (4, 3), (3, 5)):
        assert_mixes(eager, mixer, steps, 2, words(rows, rows, length), (0.0, 0.3, 1.0), 1e-4)


@pytest.mark.slow
def test_a_base_of_a_language_model_is_exported(tmp_path: Path) -> None:
    """All graphs are exported, in a bundle that opens."""
    model = without_trunk(split_width(gpt2(), 2, words(8)).with_dual_norms().model)
    tier = Tier(model.depth - 1, bases=2)
    index = export_bundles(
        model, {"t": tier}, tmp_path / "out", example=words(8), classes=WORDS
    )  # fmt: skip
    device = load_runtime(open_bundle(index, "t"))
    eager, steps = torch_runtime(model, tier, words(8), WORDS, tmp_path / "eager")
    assert_mixes(eager, device, steps, 2, words(3, 1), (0.3,), 1e-4)


def test_bases_of_a_text_model_pack_their_activations(tmp_path: Path) -> None:
    """Attention and layer norms run on ONNX Runtime, with the cut before the last block."""
    model, tier = text_model(), Tier(2, "int8", bases=2)
    eager, steps = torch_runtime(model, tier, words(8), CLASSES, tmp_path / "eager")
    mixer = Lowered(steps, words(8))
    for rows in (1, 4):
        assert_mixes(eager, mixer, steps, 2, words(rows, rows), (0.0,), 1e-4)


# -- verification, and refusals


@cache
def normed(graph: str) -> tuple[ClientSteps, Step, Draw]:
    """Return a graph of a model with batch norms, traced once for several errors."""
    steps, draw = steps_of("batch norms")
    return steps, by_name(steps, graph), draw


@pytest.mark.parametrize(
    ("graph", "output", "change"),
    [
        ("mix_2", "logits", lambda t: 2 * t),
        ("attack", "x_adv", lambda t: t + 0.01),
        ("adversarial_train", "noise.h", lambda t: t + t.dtype.type(0.5)),
        ("adversarial_train", "next/block.0.norm.noise.weight", lambda t: t + np.float32(0.01)),
        (
            "adversarial_train",
            "next/block.0.norm.noise.running_mean",
            lambda t: t + np.float32(0.01),
        ),
        ("adversarial_train", "loss", lambda t: t * np.float32(1.1)),
        ("train", "next/block.0.norm.noise.weight", lambda t: t * np.float32(0.99)),
        ("train", "next/momentum/block.0.norm.noise.bias", lambda t: t * np.float32(0.9)),
        ("train", "next/block.0.norm.noise.running_var", lambda t: t * np.float32(0.9)),
    ],
)
def test_a_graph_that_differs_is_refused(
    graph: str, output: str, change: Callable[[Array], Array]
) -> None:
    """The error names the tensor that differs."""
    steps, step, draw = normed(graph)

    def wrong(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = run_eagerly(step, feeds)
        assert output in outputs
        return outputs | {output: change(outputs[output])}

    verify(steps, step, run_eagerly, draw(8, 0))
    with pytest.raises(ExportError, match=f"{graph!r} differs from eager PyTorch in {output}"):
        verify(steps, step, wrong, draw(8, 0))


def test_tokens_have_no_adversarial_examples(tmp_path: Path) -> None:
    """Tokens have no gradient, so the export is refused and nothing is written."""
    model = without_trunk(with_dual_norms(text_model()))
    tier = Tier(model.depth - 1, graphs=["adversarial_train"])
    with pytest.raises(ExportError, match="gradient of inputs, and these are int64; leave out"):
        export_bundles(
            model, {"t": tier}, tmp_path / "out", example=words(8), classes=CLASSES
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_steps_of_split_mix_are_only_where_they_are_asked_for() -> None:
    """Without bases there are no mixtures and masks; a tier that opts out trains no noise norms."""
    model = with_dual_norms(conv_model())
    model.add_heads([1], pictures(8), CLASSES)
    steps = make_steps(ClientSegment(model, 1), Tier(1), pictures(8), CLASSES, "sgd")
    assert [step.name for step in all_steps(steps)] == ["predict", "train", "forward"]
    names = [port.spec.name for step in all_steps(steps) for port in step.inputs]
    assert "present" not in names
    assert names.count("robustness") == 1
