"""The trunk of several base networks; each base against a plain PyTorch model in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.tensors import Array
from export.bases.dual_norms import has_dual_norms, noise_tensors, with_dual_norms
from export.bases.exported import without_trunk
from export.cutting.split_model import SplitModel
from export.packing.codecs import CODECS
from server_hub.trunk.interface import StepInput, TrunkCopy, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from server_hub.trunk.vmapped import VmappedTrainer
from tests.lib.decay import optimizer_of
from tests.lib.dual_norms import only
from tests.lib.models import CLASSES, FEATURES, IMAGE, conv_model, example, token_model
from tests.lib.trunk_models import dense_model, inputs, step_input
from tests.lib.trunk_texts import VOCABULARY, language_model, some_texts

BASES = 4
# Halves and quarters, because the trunk has its hyper-parameters in float32.
SGD = TrunkPlan("sgd", {"lr": 0.125, "momentum": 0.75, "weight_decay": 0.0625}, bases=BASES)
ADAMW = TrunkPlan(
    "adamw",
    {"lr": 2**-6, "beta1": 0.75, "beta2": 0.875, "eps": 2**-8, "weight_decay": 0.25},
    bases=BASES,
)


class Exact:
    """A codec without loss, so that all values are in float64."""

    name = "exact"

    def unpack(self, parts: dict[str, Tensor]) -> Tensor:
        return parts["h"]


@pytest.fixture(autouse=True, scope="module")
def _exact() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CODECS, "exact", Exact())  # type: ignore[arg-type]
        yield


def hub_model(kind: str, dual: bool = False) -> SplitModel:
    """Return one base as the hub has it: no head of its own, but a head at every depth."""
    build, x, classes = {
        "vectors": (token_model, example(FEATURES), CLASSES),
        "pictures": (conv_model, example(IMAGE), CLASSES),
        "texts": (language_model, torch.zeros(1, 2, dtype=torch.int64), VOCABULARY),
    }[kind]
    model = build()
    depth = model.depth
    hub = without_trunk(with_dual_norms(model) if dual else model)
    hub.add_heads(range(1, depth), x, classes)
    return hub.double()


def states_of(model: SplitModel, seed: int = 0, bases: int = BASES) -> dict[str, Array]:
    """Return the initial states of the bases, which all differ; tensors are (bases, ...)."""
    rng = np.random.default_rng(seed)
    return {
        name: np.stack(
            [t.detach().numpy() + 0.2 * rng.standard_normal(t.shape) for _ in range(bases)]
        )
        for name, t in model.trained().items()
    }


@dataclass(frozen=True)
class Sent:
    """A batch; ``there`` has the classes of its device, None for all classes."""

    base: int
    cut: int
    rows: int
    weight: float = 1.0
    noise: bool = False
    there: tuple[int, ...] | None = None
    length: int = 5
    device: str = ""


def arrival_of(model: SplitModel, kind: str, sent: Sent, seed: int) -> StepInput:
    """Return an arrival with random activations."""
    rng = np.random.default_rng(seed)
    if kind == "texts":
        x, y = some_texts(sent.rows, sent.length, seed)
        labels = y.numpy()
    else:
        x = example({"vectors": FEATURES, "pictures": IMAGE}[kind], sent.rows, seed).double()
        labels = rng.choice(sent.there or CLASSES, sent.rows)
    with torch.no_grad():
        h = model.segment(x, sent.cut).numpy()
    present = None
    if sent.there is not None:
        present = np.isin(np.arange(CLASSES), sent.there).astype(np.float32)
    return step_input(
        sent.device or f"device-{seed}", "shared", sent.cut, "exact",
        {"h": h + 0.3 * rng.standard_normal(h.shape)}, labels,
        sent.weight, base=sent.base, present=present, noise=sent.noise,
    )  # fmt: skip


class Eager:
    """One base alone: a plain model, an optimizer of torch, and a backward pass per arrival."""

    def __init__(
        self, template: SplitModel, state: dict[str, Array], base: int, plan: TrunkPlan
    ) -> None:
        self.model = copy.deepcopy(template).train()
        own = {n: torch.from_numpy(t[base].copy()) for n, t in state.items()}
        assert not self.model.load_state_dict(own, strict=False).unexpected_keys
        self.model.stem.requires_grad_(False)
        self.tied = self.model.task == "tokens"  # heads read the table
        if self.tied:
            self.model.get_parameter("stem.embedding.weight").requires_grad_()
        self.optimizer = optimizer_of(self.model, plan.hyper)
        self.max_norm, self.dual = plan.max_norm, has_dual_norms(template)
        self.samples: dict[str, int] = {}

    def loss(self, arrival: StepInput) -> Tensor:
        """Return the cross-entropy, summed over labels that count and over heads above the cut."""
        h, labels = (
            torch.from_numpy(arrival.batch.parts["h"]),
            torch.from_numpy(arrival.batch.labels),
        )
        total = torch.zeros((), dtype=torch.float64)
        copied = "noise" if arrival.batch.noise else "clean"
        with only(self.model, copied) if self.dual else nullcontext():
            for depth in range(arrival.cut, self.model.depth):
                h = self.model.block[depth](h)
                if str(depth + 1) not in self.model.aux:
                    continue
                z = self.model.answer(depth + 1, h)
                for logits, label in zip(
                    z.reshape(-1, z.shape[-1]), labels.flatten().tolist(), strict=True
                ):
                    if label < 0:
                        continue
                    there = (
                        list(range(len(logits))) if arrival.batch.present is None
                        else np.flatnonzero(arrival.batch.present).tolist()
                    )  # fmt: skip
                    right = torch.tensor(there.index(label))
                    total = total + cross_entropy(logits[there], right)
        return total

    def step(self, arrivals: Sequence[StepInput]) -> list[float]:
        """Make one step; return the loss of each arrival."""
        counts = [int((a.batch.labels >= 0).sum()) for a in arrivals]
        total = sum(a.weight * n for a, n in zip(arrivals, counts, strict=True))
        self.optimizer.zero_grad()
        losses = [self.loss(arrival) for arrival in arrivals]
        for arrival, loss in zip(arrivals, losses, strict=True):
            (arrival.weight / total * loss).backward()
        noise = noise_tensors(self.model)
        lowest = min(a.cut for a in arrivals)
        for name, p in self.model.named_parameters():
            if not any(a.batch.noise for a in arrivals) and name in noise:
                p.grad = None
            elif p.requires_grad and name.startswith(
                tuple(f"{layer}." for layer in self.passed(lowest))
            ):
                # clean rows do not reach the noise copy, nor noise rows the clean one
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)
        self.optimizer.step()
        for a in arrivals:
            for layer in () if a.batch.noise else self.passed(a.cut):
                self.samples[layer] = self.samples.get(layer, 0) + a.rows
        return [loss.item() for loss in losses]

    def passed(self, cut: int) -> set[str]:
        """Return the layers above a cut that have trained tensors."""
        depth = self.model.depth - 1  # the block behind the last one does nothing
        blocks = {f"block.{i}" for i in range(cut, depth)}
        heads = {f"aux.{d}" for d in range(cut + 1, depth + 1)}
        return blocks | heads | ({"stem"} if self.tied else set())

    def tensors(self, layers: Sequence[str]) -> dict[str, Array]:
        """Return the tensors of some layers."""
        return {
            name: p.detach().numpy() for name, p in self.model.named_parameters()
            if name.startswith(tuple(f"{layer}." for layer in layers)) and p.requires_grad
        }  # fmt: skip


def of_base(copies: Sequence[TrunkCopy], base: int) -> dict[str, Array]:
    """Return all tensors of a base."""
    return {n: t for c in copies if c.base == base for n, t in c.tensors.items()}


def assert_close(got: dict[str, Array], want: dict[str, Array], tolerance: float = 1e-6) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, tolerance, tolerance, err_msg=name)


def check(
    kind: str, plan: TrunkPlan, steps: Sequence[Sequence[Sent]], *, dual: bool = False,
    seed: int = 0,
) -> None:  # fmt: skip
    """Check that every base learns as it does alone, and that untrained layers have no copy."""
    model = hub_model(kind, dual)
    state = states_of(model, seed)
    before = {name: tensor.copy() for name, tensor in state.items()}
    trunk = VmappedTrainer(model, state, plan, torch.device("cpu"))
    alone = [Eager(model, state, base, plan) for base in range(BASES)]
    hardened: set[int] = set()
    for number, sents in enumerate(steps):
        arrivals = [
            arrival_of(model, kind, sent, 1000 * seed + 10 * number + i)
            for i, sent in enumerate(sents)
        ]
        report = trunk.step(arrivals)
        assert report.refused == {}
        want: dict[int, list[float]] = {}
        for base in {a.batch.base for a in arrivals}:
            mine = [a for a in arrivals if a.batch.base == base]
            want[base] = alone[base].step(mine)
            hardened |= {base} if any(a.batch.noise for a in mine) else set()
        expected = [want[a.batch.base].pop(0) for a in arrivals]
        counts = [int((a.batch.labels >= 0).sum()) for a in arrivals]
        losses = [found for found in report.losses if found is not None]
        assert [loss for loss, _ in losses] == pytest.approx(expected, rel=1e-5)
        assert [count for _, count in losses] == counts
        assert report.rows == sum(counts)
        assert report.loss == pytest.approx(sum(expected) / sum(counts), rel=1e-5)
    copies = trunk.finish()
    noise = noise_tensors(model)
    for base, reference in enumerate(alone):
        found = {c.layer: c.samples for c in copies if c.base == base}
        assert found == reference.samples
        assert all(c.part is (c.layer == "stem") for c in copies)
        tensors = reference.tensors(list(found)) if found else {}
        if base not in hardened:
            tensors = {n: t for n, t in tensors.items() if n not in noise}
        assert_close(of_base(copies, base), tensors)
    for name, tensor in before.items():
        np.testing.assert_array_equal(state[name], tensor)


# --- independent steps of bases -------------------------------------------------------------------


def sents(kind: str, depth: int, **changes: st.SearchStrategy[object]) -> st.SearchStrategy[Sent]:
    """Batches for some bases and cuts."""
    return st.builds(
        Sent,
        base=st.integers(0, BASES - 1),
        cut=st.integers(1, depth - 1),
        rows=st.integers(1, 4),
        weight=st.floats(0.1, 3.0),
        length=st.integers(1, 9),
        **changes,
    )


def two_steps(sent: st.SearchStrategy[Sent]) -> st.SearchStrategy[list[list[Sent]]]:
    return st.lists(st.lists(sent, min_size=1, max_size=6), min_size=2, max_size=2)


PLANS = st.sampled_from([SGD, ADAMW])
CLIPPED = st.sampled_from([math.inf, 1e6, 0.3])


@settings(max_examples=15, deadline=None)
@given(plan=PLANS, norm=CLIPPED, steps=two_steps(sents("vectors", 3)), seed=st.integers(0, 99))
def test_a_step_trains_each_base_as_if_it_were_alone(
    plan: TrunkPlan, norm: float, steps: list[list[Sent]], seed: int
) -> None:
    check("vectors", replace(plan, max_norm=norm), steps, seed=seed)


@pytest.mark.parametrize("plan", [SGD, ADAMW], ids=lambda plan: plan.optimizer)
def test_bases_of_convolutions_learn_from_unequal_rows_at_several_cuts(plan: TrunkPlan) -> None:
    first = [Sent(0, 1, 5), Sent(2, 3, 1, 2.0), Sent(0, 2, 2), Sent(2, 1, 3), Sent(3, 3, 4)]
    second = [Sent(2, 3, 2), Sent(0, 3, 1, 0.5)]  # shallow blocks and their momentum do not change
    third = [Sent(2, 1, 2), Sent(0, 2, 3)]
    check("pictures", replace(plan, max_norm=1.0), [first, second, third])


@settings(max_examples=8, deadline=None)
@given(plan=PLANS, steps=two_steps(sents("texts", 4)), seed=st.integers(0, 99))
def test_texts_of_any_length_count_as_they_do_alone(
    plan: TrunkPlan, steps: list[list[Sent]], seed: int
) -> None:
    check("texts", plan, steps, seed=seed)


THERE = st.sets(st.integers(0, CLASSES - 1), min_size=1).map(lambda s: tuple(sorted(s)))


@settings(max_examples=10, deadline=None)
@given(plan=PLANS, steps=two_steps(sents("vectors", 3, there=THERE)), seed=st.integers(0, 99))
def test_the_loss_is_over_the_classes_that_a_device_has(
    plan: TrunkPlan, steps: list[list[Sent]], seed: int
) -> None:
    check("vectors", plan, steps, seed=seed)


def hardened(steps: list[list[Sent]], weight: float) -> list[list[Sent]]:
    """Return the batches of devices with adversarial examples: every batch twice."""
    return [
        [
            replace(sent, weight=share, noise=noise)
            for sent in step
            for noise, share in ((False, 1 - weight), (True, weight))
        ]
        for step in steps
    ]


@settings(max_examples=8, deadline=None)
@given(
    plan=PLANS,
    weight=st.sampled_from([0.25, 0.5, 0.9]),
    steps=two_steps(sents("vectors", 3)),
    seed=st.integers(0, 99),
)
def test_clean_and_noisy_rows_count_by_their_weights_and_train_norms_of_their_own(
    plan: TrunkPlan, weight: float, steps: list[list[Sent]], seed: int
) -> None:
    check("vectors", plan, hardened(steps, weight), dual=True, seed=seed)


@settings(max_examples=8, deadline=None)
@given(steps=two_steps(sents("vectors", 3, noise=st.booleans())), seed=st.integers(0, 99))
def test_noise_norms_rest_where_no_noise_has_arrived(steps: list[list[Sent]], seed: int) -> None:
    check("vectors", replace(SGD, max_norm=0.5), steps, dual=True, seed=seed)


def test_noise_norms_of_texts() -> None:
    steps = [[Sent(0, 1, 2, length=7), Sent(1, 2, 3, length=3)], [Sent(0, 2, 1, length=2)]]
    check("texts", ADAMW, hardened(steps, 0.5), dual=True)


def test_the_weighted_loss_is_the_mean_of_both_by_their_weight() -> None:
    """The loss is ``(1 - l) mean clean loss + l mean noise loss`` for equal numbers of rows."""
    model = hub_model("vectors", dual=True)
    state = states_of(model)
    arrivals = [arrival_of(model, "vectors", s, 7) for s in hardened([[Sent(0, 1, 4)]], 0.25)[0]]
    eager = Eager(model, state, 0, SGD)
    clean, noisy = (eager.loss(a) / 4 for a in arrivals)
    gradients = torch.autograd.grad(
        0.75 * clean + 0.25 * noisy, [p for _, p in named(eager)], allow_unused=True
    )
    plain = replace(SGD, hyper={"lr": 1.0, "momentum": 0.0, "weight_decay": 0.0})
    trunk = VmappedTrainer(model, state, plain, torch.device("cpu"))
    trunk.step(arrivals)
    got = of_base(trunk.finish(), 0)
    want = {
        name: state[name][0] - gradient.numpy()
        for (name, _), gradient in zip(named(eager), gradients, strict=True)
        if gradient is not None
    }
    assert_close(got, want, 1e-9)


def named(eager: Eager) -> list[tuple[str, Tensor]]:
    return [(n, p) for n, p in eager.model.named_parameters() if p.requires_grad]


def test_a_device_that_weighs_nothing_does_not_stop_the_step() -> None:
    """With all weight on adversarial examples, clean ones may be in a step of their own."""
    model = hub_model("vectors", dual=True)
    state = states_of(model)
    trunk = VmappedTrainer(model, state, SGD, torch.device("cpu"))
    clean, noisy = hardened([[Sent(1, 1, 3)]], 1.0)[0]
    other = Sent(0, 1, 2)
    report = trunk.step([arrival_of(model, "vectors", s, i) for i, s in enumerate((clean, other))])
    assert report.refused == {}
    assert all(math.isfinite(found[0]) for found in report.losses if found is not None)
    trunk.step([arrival_of(model, "vectors", noisy, 2)])
    assert all(np.isfinite(t).all() for c in trunk.finish() for t in c.tensors.values())


# --- layers without training ----------------------------------------------------------------------


def test_a_base_without_arrivals_stays_bit_for_bit() -> None:
    model = hub_model("vectors")
    state = states_of(model)
    both, first = (VmappedTrainer(model, state, ADAMW, torch.device("cpu")) for _ in range(2))
    start = [arrival_of(model, "vectors", Sent(base, 1, 3), base) for base in (0, 2)]
    both.step(start)
    first.step(start)
    both.step([arrival_of(model, "vectors", Sent(2, 2, 3), 9)])
    got, want = both.finish(), first.finish()
    assert {c.base for c in got} == {0, 2}
    for name, tensor in of_base(want, 0).items():
        np.testing.assert_array_equal(of_base(got, 0)[name], tensor)
    assert any((of_base(got, 2)[n] != t).any() for n, t in of_base(want, 2).items())


def test_what_is_trained_lies_above_the_lowest_cut_alone() -> None:
    model = hub_model("pictures")
    trunk = VmappedTrainer(model, states_of(model), SGD, torch.device("cpu"))
    trunk.step([arrival_of(model, "pictures", Sent(1, 3, 2), 0)])
    trunk.step([arrival_of(model, "pictures", Sent(1, 2, 3), 1)])
    found = {c.layer: c.samples for c in trunk.finish()}
    assert found == {"block.2": 3, "block.3": 5, "aux.3": 3, "aux.4": 5}


def test_noise_does_not_count_an_example_twice() -> None:
    model = hub_model("vectors", dual=True)
    trunk = VmappedTrainer(model, states_of(model), SGD, torch.device("cpu"))
    steps = hardened([[Sent(0, 1, 3), Sent(0, 2, 2)]], 0.5)
    trunk.step([arrival_of(model, "vectors", s, i) for i, s in enumerate(steps[0])])
    found = {c.layer: c.samples for c in trunk.finish()}
    assert found == {"block.1": 3, "block.2": 5, "aux.2": 3, "aux.3": 5}


def test_a_step_without_arrivals_does_nothing() -> None:
    model = hub_model("vectors")
    trunk = VmappedTrainer(model, states_of(model), SGD, torch.device("cpu"))
    report = trunk.step([])
    assert math.isnan(report.loss)
    assert (report.rows, report.refused, trunk.finish()) == (0, {}, [])


def test_a_round_of_the_trunk_with_bases_is_that_of_the_stack() -> None:
    model = hub_model("vectors")
    state = states_of(model)
    core = TrunkTrainer(model, "cpu")
    core.begin(state, SGD)
    trunk = VmappedTrainer(model, state, SGD, torch.device("cpu"))
    arrivals = [arrival_of(model, "vectors", Sent(base, 1, 3), base) for base in (0, 3)]
    assert core.step(arrivals).loss == trunk.step(arrivals).loss
    got, want = core.finish(), trunk.finish()
    for base in (0, 3):
        assert_close(of_base(got, base), of_base(want, base), 0.0)


# --- refusals -------------------------------------------------------------------------------------


def dense(model: SplitModel, base: int, cut: int, seed: int, spoil: float = 0.0) -> StepInput:
    """Return activations for :func:`dense_model`; one value may be changed."""
    x, labels = inputs(model, 3, seed)
    with torch.no_grad():
        h = model.segment(torch.from_numpy(x).double(), cut).numpy()
    if spoil:
        h[1, 2] = spoil
    name = "bad" if spoil else f"device-{seed}"
    return step_input(name, "shared", cut, "exact", {"h": h}, labels, base=base)


BAD = {
    "not finite": (math.nan, "not finite"),
    "infinite": (math.inf, "not finite"),
    "the loss overflows": (1.7e308, "overflow"),
    "the gradient overflows": (1e250, "overflow"),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_bad_arrival_is_refused_and_all_others_learn_once_as_without_it(
    what: str, at: int
) -> None:
    model = dense_model().double()
    spoil, reason = BAD[what]
    state = states_of(model)
    plan = replace(SGD, max_norm=5.0)
    trunk, without = (VmappedTrainer(model, state, plan, torch.device("cpu")) for _ in range(2))
    for step in range(2):
        good = [dense(model, *pair, seed=10 * step + i) for i, pair in enumerate(
            ((0, 1), (1, 2), (1, 1), (2, 3), (0, 2)))]  # fmt: skip
        bad = dense(model, 1, 2, seed=99, spoil=spoil)
        report = trunk.step([*good[:at], bad, *good[at:]])
        want = without.step(good)
        assert report.refused.keys() == {"bad"}
        assert reason in report.refused["bad"]
        assert report.losses[at] is None
        others = [found for i, found in enumerate(report.losses) if i != at]
        assert_losses(others, want.losses)
        assert (report.loss, report.rows) == (pytest.approx(want.loss, rel=1e-12), want.rows)
    got, expected = trunk.finish(), without.finish()
    assert [(c.base, c.layer, c.samples) for c in sorted_(got)] == [
        (c.base, c.layer, c.samples) for c in sorted_(expected)
    ]
    for base in range(3):
        assert_close(of_base(got, base), of_base(expected, base), 1e-12)


def sorted_(copies: Sequence[TrunkCopy]) -> list[TrunkCopy]:
    return sorted(copies, key=lambda c: (c.base, c.layer))


def assert_losses(
    got: Sequence[tuple[float, int] | None], want: Sequence[tuple[float, int] | None]
) -> None:
    for mine, reference in zip(got, want, strict=True):
        assert mine is not None
        assert mine == pytest.approx(reference, rel=1e-12)


def test_a_base_with_nothing_but_bad_arrivals_rests() -> None:
    model = dense_model().double()
    trunk = VmappedTrainer(model, states_of(model), SGD, torch.device("cpu"))
    bad = [replace(dense(model, 0, 1, i, spoil), device=f"bad-{i}") for i, spoil in enumerate(
        (math.nan, 1.7e308, 1e250))]  # fmt: skip
    report = trunk.step([*bad, dense(model, 1, 1, 9)])
    assert report.refused.keys() == {"bad-0", "bad-1", "bad-2"}
    assert report.rows == 3
    assert {c.base for c in trunk.finish()} == {1}


def test_noise_of_a_refused_arrival_leaves_the_noise_norms() -> None:
    model = hub_model("vectors", dual=True)
    trunk = VmappedTrainer(model, states_of(model), SGD, torch.device("cpu"))
    clean, noisy = (
        arrival_of(model, "vectors", sent, 3) for sent in hardened([[Sent(0, 1, 3)]], 0.5)[0]
    )
    noisy.batch.parts["h"][:] = math.nan
    report = trunk.step([clean, noisy])
    assert report.refused.keys() == {"device-3"}
    names = of_base(trunk.finish(), 0).keys()
    assert names
    assert not names & noise_tensors(model)


@pytest.mark.parametrize("what", ["a label", "a codec"])
def test_a_batch_that_makes_the_step_fail_is_refused_and_the_others_learn(what: str) -> None:
    model = dense_model().double()
    states = states_of(model)
    good = [dense(model, base, 1, base) for base in range(BASES)]
    bad = replace(dense(model, 1, 1, 9), device="bad")
    if what == "a codec":
        bad = replace(bad, codec="zip")
    else:
        bad = replace(bad, batch=replace(bad.batch, labels=np.full_like(bad.batch.labels, 99)))
    trainer = VmappedTrainer(model, states, SGD, torch.device("cpu"))
    report = trainer.step([good[0], bad, *good[1:]])
    assert report.refused.keys() == {"bad"}
    assert [loss is None for loss in report.losses] == [False, True] + [False] * (BASES - 1)
    assert {copy.base for copy in trainer.finish()} == set(range(BASES))
