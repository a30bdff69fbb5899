"""The trunk's arithmetic: depth-merged training, refusals, replays, answers and evaluation."""

from __future__ import annotations

import gc
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from export.packing.codecs import CODECS, get_codec
from server_hub.methods.method import ALL_PATHS
from server_hub.trunk.depth_merge import Entering, depth_merged_loss
from server_hub.trunk.evaluator import Evaluator, finished
from server_hub.trunk.interface import Query, StepInput, StepReport, TrunkCopy, TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.decay import optimizer_of
from tests.lib.trunk_models import (
    CLASSES,
    DEPTH,
    activations,
    arrival_of,
    by_layer,
    conv_model,
    dense_model,
    inputs,
    layers_above,
    plain_logits,
    plain_row_losses,
    plain_step,
    state_of,
    step_input,
    tensors_of,
    unpacked,
)
from tests.lib.trunk_texts import language_model, some_texts

MODELS = {"dense": dense_model, "conv": conv_model}
SGD = TrunkPlan("sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4})
ADAMW = TrunkPlan(
    "adamw", {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-4, "weight_decay": 0.1}
)


def core_of(model: SplitModel, plan: TrunkPlan = SGD) -> TrunkTrainer:
    """Return a trunk that has begun a round with the model's own weights."""
    core = TrunkTrainer(model, "cpu")
    core.begin(state_of(model), plan)
    return core


def assert_same(got: dict[str, Array], want: dict[str, Array]) -> None:
    """Check that tensors are equal bit for bit."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_array_equal(got[name], tensor, err_msg=name)


def assert_close(got: dict[str, Array], want: dict[str, Array], tolerance: float = 2e-6) -> None:
    """Check that tensors are equal up to rounding in float32."""
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        np.testing.assert_allclose(got[name], tensor, 1e-4, tolerance, err_msg=name)


# --- the merged loss ------------------------------------------------------------------------------


def check_gradients(
    model: SplitModel, entering: Sequence[tuple[int, int, float]], device: str = "cpu"
) -> None:
    """Compare the merged loss with every arrival alone, in float64.

    Args:
        model: the model.
        entering: cut, number of rows and weight of each arrival.
        device: where to calculate.
    """
    model = model.double().to(device)
    arrivals: dict[int, list[Entering]] = {}
    for seed, (cut, rows, weight) in enumerate(entering):
        h, labels = activations(model, rows, seed)
        h = h.double().to(device).requires_grad_()
        weights = torch.full((rows,), weight, dtype=torch.float64, device=device)
        arrivals.setdefault(cut, []).append(Entering(h, labels.to(device), weights))

    expected: dict[str, Tensor] = {}
    expected_h, expected_losses = [], []
    expected_loss = 0.0
    parameters = dict(model.named_parameters())
    for cut in sorted(arrivals):
        for h, labels, weights, *_ in arrivals[cut]:
            losses = plain_row_losses(model, h, labels, cut)
            alone = torch.autograd.grad(
                losses.sum(), [h, *parameters.values()], materialize_grads=True
            )
            weight = weights[0]
            expected_h.append(weight * alone[0])
            for name, gradient in zip(parameters, alone[1:], strict=True):
                expected[name] = expected.get(name, torch.zeros_like(gradient)) + weight * gradient
            expected_losses.append(losses.detach())
            expected_loss += float(weight * losses.detach().sum())

    loss, row_losses = depth_merged_loss(model, arrivals)
    loss.backward()  # type: ignore[no-untyped-call]

    assert loss.item() == pytest.approx(expected_loss, rel=1e-9, abs=1e-12)
    assert not row_losses.requires_grad
    torch.testing.assert_close(row_losses, torch.cat(expected_losses), rtol=1e-9, atol=1e-12)
    passed = layers_above(model, min(arrivals))
    for name, p in parameters.items():
        if ".".join(name.split(".")[:2]) in passed or name.split(".")[0] in passed:
            assert p.grad is not None, name
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-11, msg=name)
        else:
            assert p.grad is None, f"{name} is below every cut"
    got_h = [h.grad for cut in sorted(arrivals) for h, *_ in arrivals[cut]]
    for got, want in zip(got_h, expected_h, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


ENTERING = st.lists(
    st.tuples(
        st.integers(0, DEPTH - 1),
        st.integers(1, 4),
        st.floats(0.0, 10.0, allow_subnormal=False),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(sorted(MODELS)),
    heads=st.sets(st.integers(1, DEPTH - 1)),
    entering=ENTERING,
    seed=st.integers(0, 5),
)
def test_the_merged_gradient_is_the_weighted_sum_of_every_arrivals_own(
    kind: str, heads: set[int], entering: list[tuple[int, int, float]], seed: int
) -> None:
    check_gradients(MODELS[kind](heads, seed), entering)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_merged_gradient_on_a_gpu() -> None:
    check_gradients(conv_model(), [(2, 3, 0.5), (1, 2, 1.0), (3, 4, 2.0), (1, 1, 1.5)], "cuda")


def test_every_row_has_a_weight_of_its_own() -> None:
    model = dense_model().double()
    h, labels = activations(model, 5, seed=0)
    weights = torch.tensor([0.0, 1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    loss, row_losses = depth_merged_loss(model, {2: [Entering(h.double(), labels, weights)]})
    want = plain_row_losses(model, h.double(), labels, 2)
    torch.testing.assert_close(row_losses, want.detach())
    assert loss.item() == pytest.approx(float((want.detach() * weights).sum()))


def test_row_losses_come_by_cut_and_then_by_arrival() -> None:
    model = dense_model().double()
    order = [(3, 2), (1, 3), (3, 1), (1, 1), (2, 2)]
    entering: dict[int, list[Entering]] = {}
    for seed, (cut, rows) in enumerate(order):
        h, labels = activations(model, rows, seed)
        weights = torch.ones(rows, dtype=torch.float64)
        entering.setdefault(cut, []).append(Entering(h.double(), labels, weights))
    _, row_losses = depth_merged_loss(model, entering)
    want = []
    for seed, cut in ((1, 1), (3, 1), (4, 2), (0, 3), (2, 3)):
        h, labels = activations(model, dict(enumerate(order))[seed][1], seed)
        want.append(plain_row_losses(model, h.double(), labels, cut))
    torch.testing.assert_close(row_losses, torch.cat(want).detach())
    assert len(set(row_losses.tolist())) == 9, "the order would not show otherwise"


# --- steps ----------------------------------------------------------------------------------------


def steps_of(model: SplitModel, codec: str = "int8") -> list[list[StepInput]]:
    """Return steps with changing cuts: the third leaves out shallow blocks, the fourth does not."""
    plan = [[(1, 3), (2, 2)], [(2, 4)], [(3, 2), (3, 3)], [(3, 1), (1, 5), (2, 2)], [(2, 3)]]
    seeds = itertools.count()
    return [
        [
            arrival_of(model, cut, rows, seed := next(seeds), codec=codec, weight=1 + seed % 3)
            for cut, rows in step
        ]
        for step in plan
    ]


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("plan", [SGD, ADAMW], ids=lambda plan: str(plan.optimizer))
def test_steps_are_those_of_an_eager_loop(kind: str, codec: str, plan: TrunkPlan) -> None:
    model = MODELS[kind]()
    core, reference = core_of(model, plan), MODELS[kind]()
    optimizer = optimizer_of(reference, plan.hyper)
    samples: dict[str, int] = {}
    for arrivals in steps_of(model, codec):
        report = core.step(arrivals)
        want = plain_step(reference, optimizer, arrivals)
        assert report.loss == pytest.approx(want, rel=1e-4)
        assert report.rows == sum(a.rows for a in arrivals)
        assert report.refused == {}
        for arrival in arrivals:
            for layer in layers_above(model, arrival.cut):
                samples[layer] = samples.get(layer, 0) + arrival.rows
    copies = core.finish()
    trained = {
        name: tensor
        for name, tensor in state_of(reference).items()
        if name.split(".")[0] == "head" or ".".join(name.split(".")[:2]) in samples
    }
    assert_close(tensors_of(copies), trained, 2e-5)
    assert {copy.layer: copy.samples for copy in copies} == samples
    initial = state_of(model)
    assert all(not np.array_equal(trained[name], initial[name]) for name in trained)


def test_a_round_starts_from_the_given_state_and_without_momentum() -> None:
    model = dense_model(seed=1)
    steps = steps_of(model)
    core = core_of(model)
    for arrivals in steps:
        core.step(arrivals)
    first = tensors_of(core.finish())
    assert core.finish() == []
    core.begin(state_of(model), SGD)
    for arrivals in steps:
        core.step(arrivals)
    assert_same(tensors_of(core.finish()), first)

    other = state_of(dense_model(seed=2))
    core.begin(other, SGD)
    core.step(steps[0])
    fresh = core_of(dense_model(seed=2))
    fresh.step(steps[0])
    assert_same(tensors_of(core.finish()), tensors_of(fresh.finish()))


def test_the_given_state_and_the_model_are_left_as_they_are() -> None:
    model = dense_model()
    state, before = state_of(model), state_of(model)
    core = TrunkTrainer(model, "cpu")
    core.begin(state, SGD)
    for arrivals in steps_of(model):
        core.step(arrivals)
    core.finish()
    assert_same(state, before)
    assert_same(state_of(model), before)


def test_what_a_round_has_trained_is_not_changed_by_the_next() -> None:
    model = dense_model()
    core = core_of(model)
    core.step(steps_of(model)[0])
    copies = core.finish()
    kept = {name: tensor.copy() for name, tensor in tensors_of(copies).items()}
    core.begin(tensors_of(copies), SGD)
    core.step(steps_of(model)[0])
    core.finish()
    assert_same(tensors_of(copies), kept)


# --- refusals -------------------------------------------------------------------------------------


def poisoned(arrival: StepInput, part: str, value: float) -> StepInput:
    """Return an arrival with one value of a part replaced."""
    parts = {name: np.array(tensor) for name, tensor in arrival.batch.parts.items()}
    parts[part].flat[0] = value
    return replace(arrival, batch=replace(arrival.batch, parts=parts))


def per_channel(arrival: StepInput) -> StepInput:
    """Return an arrival as earlier bundles pack it: one scale per channel of the batch."""
    h, _ = unpacked(arrival)
    shape = [n if axis == 1 else 1 for axis, n in enumerate(h.shape)]
    packed = get_codec("int8").pack_as(h, {"h.q": h.shape, "h.scale": shape})
    parts = {name: part.numpy() for name, part in packed.items()}
    return replace(arrival, batch=replace(arrival.batch, parts=parts))


BAD: dict[str, Callable[[SplitModel], StepInput]] = {
    "fp16 nan": lambda m: poisoned(arrival_of(m, 2, 3, 99, "bad", codec="fp16"), "h", math.nan),
    "fp16 inf": lambda m: poisoned(arrival_of(m, 2, 3, 99, "bad", codec="fp16"), "h", math.inf),
    "int8 nan": lambda m: poisoned(arrival_of(m, 2, 3, 99, "bad"), "h.scale", math.nan),
    "int8 inf": lambda m: poisoned(arrival_of(m, 1, 3, 99, "bad"), "h.scale", -math.inf),
    "int8 product": lambda m: poisoned(arrival_of(m, 1, 3, 99, "bad"), "h.scale", 3e38),
    "loss overflows": lambda m: poisoned(arrival_of(m, 1, 3, 99, "bad"), "h.scale", 2.5e36),
    "gradient overflows": lambda m: poisoned(
        per_channel(arrival_of(m, 3, 3, 99, "bad")), "h.scale", 1e30
    ),
}


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("what", BAD)
def test_a_bad_arrival_is_refused_and_the_others_step_as_without_it(what: str, kind: str) -> None:
    model = MODELS[kind]()
    bad = BAD[what](model)
    with_it, without = core_of(model), core_of(model)
    for number, good in enumerate(steps_of(model)):
        if number in (0, 2, 3):
            report = with_it.step([*good[:1], bad, *good[1:]])
            assert report.refused.keys() == {"bad"}
            reason = "loss overflow" if "overflows" in what else "not finite"
            assert reason in report.refused["bad"]
        else:
            report = with_it.step(good)
            assert report.refused == {}
        want = without.step(good)
        assert (report.loss, report.rows) == (want.loss, want.rows)
        assert math.isfinite(report.loss)
    got, expected = with_it.finish(), without.finish()
    assert_same(tensors_of(got), tensors_of(expected))
    assert [(c.layer, c.samples) for c in got] == [(c.layer, c.samples) for c in expected]
    assert all(np.isfinite(tensor).all() for tensor in tensors_of(got).values())


def test_the_bad_arrivals_are_bad_in_the_way_that_their_names_say() -> None:
    model = dense_model()

    def measure(arrival: StepInput) -> tuple[bool, bool, bool]:
        parts = {name: torch.from_numpy(part) for name, part in arrival.batch.parts.items()}
        h = get_codec(arrival.codec).unpack(parts)
        model.zero_grad()
        losses = plain_row_losses(model, h, torch.from_numpy(arrival.batch.labels), arrival.cut)
        losses.mean().backward()
        squares = sum(float(p.grad.double().square().sum())
                      for p in model.parameters() if p.grad is not None)  # fmt: skip
        norm = np.float32(math.sqrt(squares)) ** 2 if math.isfinite(squares) else np.inf
        return bool(h.isfinite().all()), bool(losses.isfinite().all()), bool(np.isfinite(norm))

    for what in ("fp16 nan", "fp16 inf", "int8 nan", "int8 inf", "int8 product"):
        assert measure(BAD[what](model))[0] is False
    assert measure(BAD["loss overflows"](model))[:2] == (True, False)
    with np.errstate(over="ignore"):
        assert measure(BAD["gradient overflows"](model)) == (True, True, False)


@pytest.mark.parametrize("what", BAD)
def test_a_step_of_nothing_but_bad_arrivals_changes_nothing(what: str) -> None:
    model = dense_model()
    good = steps_of(model)
    core, without = core_of(model), core_of(model)
    core.step(good[0])
    without.step(good[0])
    report = core.step([BAD[what](model)])
    assert report.refused.keys() == {"bad"}
    assert report.rows == 0
    assert math.isnan(report.loss)
    core.step(good[1])
    without.step(good[1])
    assert_same(tensors_of(core.finish()), tensors_of(without.finish()))


def test_a_round_of_bad_arrivals_trains_no_layer() -> None:
    model = dense_model()
    core = core_of(model)
    for bad in BAD.values():
        assert core.step([bad(model)]).rows == 0
    assert core.finish() == []


def test_several_bad_devices_are_all_named_and_no_others() -> None:
    model = dense_model()
    core, without = core_of(model), core_of(model)
    good = [arrival_of(model, cut, 2, cut, f"good-{cut}") for cut in (1, 2, 3)]
    bad = [
        poisoned(arrival_of(model, 1, 2, 50, "nan"), "h.scale", math.nan),
        poisoned(arrival_of(model, 2, 2, 51, "loss"), "h.scale", 2.5e36),
        poisoned(per_channel(arrival_of(model, 3, 2, 52, "gradient")), "h.scale", 1e30),
    ]
    report = core.step([bad[2], good[0], bad[0], good[1], good[2], bad[1]])
    assert report.refused.keys() == {"nan", "loss", "gradient"}
    want = without.step(good)
    assert (report.loss, report.rows) == (want.loss, want.rows)
    assert_same(tensors_of(core.finish()), tensors_of(without.finish()))


@pytest.mark.parametrize("first", [True, False])
def test_a_device_may_send_a_good_batch_beside_one_that_overflows(first: bool) -> None:
    """The two batches are from one device and in one step, and differ only in their values."""
    model = dense_model()
    good = arrival_of(model, 2, 3, 1, "mixed")
    bad = poisoned(arrival_of(model, 2, 3, 2, "mixed"), "h.scale", 2.5e36)
    other = arrival_of(model, 1, 2, 3, "other")
    core, without = core_of(model), core_of(model)
    report = core.step([bad, good, other] if first else [good, bad, other])
    assert report.refused.keys() == {"mixed"}
    want = without.step([good, other])
    assert (report.loss, report.rows) == (want.loss, want.rows)
    assert_same(tensors_of(core.finish()), tensors_of(without.finish()))


def test_a_bad_device_does_not_touch_the_replicas_of_others() -> None:
    model = dense_model()
    a, b = (arrival_of(model, 1, 3, seed, name, name) for seed, name in enumerate("ab"))
    bad = poisoned(arrival_of(model, 1, 3, 7, "c", "c"), "h.scale", 2.5e36)
    core, without = core_of(model), core_of(model)
    report = core.step([a, bad, b])
    assert report.refused.keys() == {"c"}
    assert (report.loss, report.rows) == (without.step([a, b]).loss, 6)
    got, want = core.finish(), without.finish()
    assert {copy.replica for copy in got} == {"a", "b"}
    for name in "ab":
        assert_same(tensors_of(got, name), tensors_of(want, name))


# --- several passes -------------------------------------------------------------------------------


def with_epochs(epochs: int, max_rows: int = 256, seed: int = 0) -> TrunkPlan:
    """Return SGD with several passes over the round's activations."""
    return TrunkPlan("sgd", SGD.hyper, epochs, max_rows, seed)


def replayed(
    model: SplitModel, plan: TrunkPlan, steps: Sequence[Sequence[StepInput]]
) -> list[TrunkCopy]:
    """Run a round; return its copies."""
    core = core_of(model, plan)
    for arrivals in steps:
        core.step(arrivals)
    return core.finish()


def test_later_passes_merge_all_arrivals_up_to_max_rows() -> None:
    model, reference = dense_model(), dense_model()
    steps = steps_of(model)
    everything = [arrival for arrivals in steps for arrival in arrivals]
    optimizer = optimizer_of(reference, SGD.hyper)
    for arrivals in steps:
        plain_step(reference, optimizer, arrivals)
    for _ in range(2):
        plain_step(reference, optimizer, everything)
    got = tensors_of(replayed(model, with_epochs(3), steps))
    want = state_of(reference)
    assert_close(got, {name: want[name] for name in got}, 1e-5)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_later_passes_take_each_arrival_once_in_some_order(seed: int) -> None:
    model = dense_model()
    arrivals = [arrival_of(model, cut, 3, cut) for cut in (1, 2, 3)]
    got = tensors_of(replayed(model, with_epochs(2, 3, seed), [[a] for a in arrivals]))
    matches = []
    for order in itertools.permutations(arrivals):
        reference = dense_model()
        optimizer = optimizer_of(reference, SGD.hyper)
        for arrival in (*arrivals, *order):
            plain_step(reference, optimizer, [arrival])
        want = state_of(reference)
        matches.append(all(np.allclose(got[n], want[n], 1e-5, 1e-6) for n in got))
    assert matches.count(True) == 1


def test_the_order_of_later_passes_depends_on_the_seed_alone() -> None:
    model = dense_model()
    steps = [[arrival_of(model, cut, 3, seed)] for seed, cut in enumerate((1, 2, 3, 1, 2, 3))]
    first = tensors_of(replayed(model, with_epochs(2, 3, seed=0), steps))
    assert_same(tensors_of(replayed(model, with_epochs(2, 3, seed=0), steps)), first)
    others = [tensors_of(replayed(model, with_epochs(2, 3, seed), steps)) for seed in (1, 2, 3)]
    assert any(not np.array_equal(o["head.weight"], first["head.weight"]) for o in others)


@pytest.mark.parametrize("epochs", [1, 2, 3])
@pytest.mark.parametrize("max_rows", [1, 4, 256])
def test_an_example_counts_once_however_many_passes_there_are(epochs: int, max_rows: int) -> None:
    model = dense_model()
    steps = steps_of(model)
    want: dict[str, int] = {}
    for arrival in itertools.chain(*steps):
        for layer in layers_above(model, arrival.cut):
            want[layer] = want.get(layer, 0) + arrival.rows
    copies = replayed(model, with_epochs(epochs, max_rows), steps)
    assert {copy.layer: copy.samples for copy in copies} == want


def test_a_refused_arrival_is_refused_in_every_pass() -> None:
    model = dense_model()
    steps = steps_of(model)
    bad = [BAD["int8 nan"](model), BAD["loss overflows"](model)]
    got = replayed(model, with_epochs(3), [[*steps[0], *bad], *steps[1:]])
    want = replayed(model, with_epochs(3), steps)
    assert_close(tensors_of(got), tensors_of(want))
    assert {c.layer: c.samples for c in got} == {c.layer: c.samples for c in want}


def test_a_round_keeps_nothing_of_the_one_before() -> None:
    model = dense_model()
    steps = steps_of(model)
    core = core_of(model, with_epochs(2))
    core.step(steps[0])  # a round that is abandoned
    core.begin(state_of(model), with_epochs(2))
    core.step(steps[1])
    assert_same(tensors_of(core.finish()), tensors_of(replayed(model, with_epochs(2), steps[1:2])))
    assert core.finish() == []


@pytest.mark.parametrize("epochs", [1, 2])
def test_replicas_are_independent_of_each_other(epochs: int) -> None:
    model = dense_model()
    plan = with_epochs(epochs)

    def both(seed_of_b: int) -> list[TrunkCopy]:
        steps = [
            [
                arrival_of(model, 1, 3, step, "a", "a"),
                arrival_of(model, 2, 4, seed_of_b + step, "b", "b"),
            ]
            for step in range(3)
        ]
        return replayed(model, plan, steps)

    one, two = both(100), both(200)
    assert_same(tensors_of(one, "a"), tensors_of(two, "a"))
    assert not np.array_equal(
        tensors_of(one, "b")["head.weight"], tensors_of(two, "b")["head.weight"]
    )
    alone = replayed(model, plan, [[arrival_of(model, 1, 3, s, "a", "a")] for s in range(3)])
    assert_close(tensors_of(one, "a"), tensors_of(alone, "a"))
    assert {c.layer: c.samples for c in by_layer(one, "b").values()} == dict.fromkeys(
        layers_above(model, 2), 12
    )


def test_the_report_covers_all_replicas() -> None:
    model = dense_model()
    a, b = arrival_of(model, 1, 2, 0, "a", "a"), arrival_of(model, 3, 5, 1, "b", "b")
    alone = [core_of(model).step([arrival]) for arrival in (a, b)]
    report = core_of(model).step([a, b])
    assert report.rows == 7
    assert report.loss == pytest.approx((2 * alone[0].loss + 5 * alone[1].loss) / 7)


def test_a_step_without_arrivals_does_nothing() -> None:
    core = core_of(dense_model())
    report: StepReport = core.step([])
    assert math.isnan(report.loss)
    assert (report.rows, report.refused, core.finish()) == (0, {}, [])


# --- answering ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("codec", sorted(CODECS))
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_answers_are_those_of_the_plain_model(kind: str, codec: str, cut: int) -> None:
    model, trained = MODELS[kind](heads=(1, 3)), MODELS[kind](heads=(1, 3), seed=5)
    evaluator = Evaluator(model, "cpu")
    evaluator.serve(dict.fromkeys((1, 2, 3), state_of(trained)))
    x, _ = inputs(model, 7, seed=3)
    with torch.no_grad():
        h = trained.segment(torch.from_numpy(x), cut)
        parts = get_codec(codec).pack(h, 1)
        want = torch.stack(plain_logits(trained, get_codec(codec).unpack(parts), cut)).numpy()
    packed = {name: part.numpy() for name, part in parts.items()}
    got = evaluator.answer(Query(cut, codec, packed))
    assert got.shape == (1 + (cut < 3), 7, CLASSES)
    np.testing.assert_allclose(got, want, 1e-5, 1e-6)


def plain_accuracy(model: SplitModel, x: Array, y: Array, cut: int, codec: str) -> dict[str, float]:
    """Return the accuracy of the three paths, example by example if the codec allows it."""
    with torch.no_grad():
        h, own = model.stem(torch.from_numpy(x)), []
        for depth in range(cut):
            h = model.block[depth](h)
            if str(depth + 1) in model.aux:
                own.append(model.aux[str(depth + 1)](h).softmax(1).numpy())
        seen = get_codec(codec).unpack(get_codec(codec).pack(h, 1))
        hub = [z.softmax(1).numpy() for z in plain_logits(model, seen, cut)]
    answers = {"device_alone": own, "through_hub": hub[-1:], "ensemble": own + hub}
    return {path: float((np.mean(p, axis=0).argmax(1) == y).mean()) for path, p in answers.items()}


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_evaluation_is_that_of_the_plain_model(kind: str) -> None:
    model = MODELS[kind]()
    shallow, deep = MODELS[kind](seed=7), MODELS[kind](seed=8)
    for p in itertools.chain(shallow.parameters(), deep.parameters()):
        p.data.mul_(2)  # so that answers differ from row to row
    for rows, codec in ((300, "fp16"), (200, "int8")):
        x, y = inputs(model, rows, seed=1)
        evaluator = Evaluator(model, "cpu", (x, y))
        state = state_of(deep)
        evaluator.serve({1: state_of(shallow), 2: state, 3: state})
        tiers = {"s": (1, codec), "m": (2, codec), "l": (3, codec)}
        got = finished(evaluator.evaluate(tiers, ALL_PATHS)).accuracy
        want = {
            "s": plain_accuracy(shallow, x, y, 1, codec),
            "m": plain_accuracy(deep, x, y, 2, codec),
            "l": plain_accuracy(deep, x, y, 3, codec),
        }
        assert got == want
        assert len({a for paths in want.values() for a in paths.values()}) >= 3


def live_models() -> int:
    """Return the number of models in memory."""
    gc.collect()
    return sum(isinstance(found, SplitModel) for found in gc.get_objects())


def test_one_model_serves_all_cuts_that_have_the_same_state() -> None:
    model = dense_model()
    evaluator = Evaluator(model, "cpu")
    shared, own = state_of(model), state_of(model)
    before = live_models()
    evaluator.serve({1: shared, 2: own, 3: shared})
    assert live_models() - before == 2


def test_what_is_served_changes_with_serve_alone() -> None:
    model = dense_model()
    asked = arrival_of(model, 2, 4, seed=9)
    question = Query(asked.cut, asked.codec, asked.batch.parts)
    core, undisturbed, evaluator = core_of(model), core_of(model), Evaluator(model, "cpu")
    evaluator.serve({2: state_of(model)})
    before = evaluator.answer(question)
    steps = steps_of(model)
    for arrivals in steps:
        core.step(arrivals)
        undisturbed.step(arrivals)
        np.testing.assert_array_equal(evaluator.answer(question), before)
    copies = core.finish()
    assert_same(tensors_of(copies), tensors_of(undisturbed.finish()))
    np.testing.assert_array_equal(evaluator.answer(question), before)
    evaluator.serve({2: {**state_of(model), **tensors_of(copies)}})
    assert not np.allclose(evaluator.answer(question), before)


# --- texts ----------------------------------------------------------------------------------------


def text_loss(
    model: SplitModel, h: Tensor, labels: Tensor, cut: int, auxiliary: bool = True
) -> Tensor:
    """Return the mean over labels that count of the summed losses of the heads above ``cut``.

    Without ``auxiliary``, only the last head counts.
    """
    loss = torch.zeros((), dtype=h.dtype)
    for depth in range(cut, model.depth):
        h = model.block[depth](h)
        if depth + 1 < model.depth and not auxiliary:
            continue
        z = model.answer(depth + 1, h) if depth + 1 < model.depth else model.head(h)
        for row, position in (labels >= 0).nonzero().tolist():
            label = labels[row, position]
            loss = loss + z[row, position].logsumexp(0) - z[row, position, label]
    return loss / (labels >= 0).sum()


TEXTS = st.lists(
    st.tuples(st.integers(0, 3), st.integers(1, 3), st.integers(1, 9), st.floats(0.1, 5.0)),
    min_size=1,
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(entering=TEXTS, seed=st.integers(0, 99))
def test_merged_texts_of_any_length_learn_as_each_does_alone(
    entering: list[tuple[int, int, int, float]], seed: int
) -> None:
    model = language_model(seed).double()
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("stem.pos")}
    batches: dict[int, list[Entering]] = {}
    arrivals = []
    for number, (cut, rows, length, weight) in enumerate(entering):
        x, labels = some_texts(rows, length, seed + number)
        h = model.segment(x, cut).detach().requires_grad_()
        arrivals.append((cut, h, labels, weight))
    counted = sum(int((labels >= 0).sum()) for _, _, labels, _ in arrivals)
    for cut, h, labels, weight in arrivals:
        weights = torch.full((len(h),), weight / counted, dtype=torch.float64)
        batches.setdefault(cut, []).append(Entering(h, labels, weights))

    loss, row_losses = depth_merged_loss(model, batches)
    sources = [h for _, h, _, _ in arrivals]
    got = torch.autograd.grad(loss, [*sources, *parameters.values()], materialize_grads=True)

    alone = [text_loss(model, h, labels, cut) for cut, h, labels, _ in arrivals]
    shares = [weight * int((labels >= 0).sum()) / counted for _, _, labels, weight in arrivals]
    want_loss = sum(share * mean for share, mean in zip(shares, alone, strict=True))
    assert isinstance(want_loss, Tensor)
    want = torch.autograd.grad(want_loss, [*sources, *parameters.values()], materialize_grads=True)
    assert loss.item() == pytest.approx(want_loss.item(), rel=1e-10)
    for mine, reference in zip(got, want, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
    total = sum(
        m.item() * int((y >= 0).sum()) for m, (_, _, y, _) in zip(alone, arrivals, strict=True)
    )
    assert row_losses.sum().item() == pytest.approx(total, rel=1e-10)


def text_arrival(
    model: SplitModel, cut: int, rows: int, length: int, seed: int, weight: float = 1.0
) -> StepInput:
    """Return an input of random texts, as from a device."""
    x, labels = some_texts(rows, length, seed)
    parts = get_codec("fp16").pack(model.segment(x, cut), 2)
    packed = {name: part.numpy() for name, part in parts.items()}
    return step_input(f"device-{seed}", "shared", cut, "fp16", packed, labels.numpy(), weight)


def test_a_step_on_texts_reports_by_label_and_returns_gradients_of_their_own_length() -> None:
    model, reference = language_model(), language_model()
    core = core_of(model, replace(SGD, returned=True))
    arrivals = [
        text_arrival(model, cut, rows, length, seed)
        for seed, (cut, rows, length) in enumerate(((2, 3, 9), (1, 2, 4), (2, 1, 6)))
    ]
    report = core.step(arrivals)
    counts = [int((a.batch.labels >= 0).sum()) for a in arrivals]
    reference.stem.requires_grad_(False)
    reference.get_parameter("stem.embedding.weight").requires_grad_()
    losses = []
    for arrival, gradient, count in zip(arrivals, report.gradients, counts, strict=True):
        h, labels = unpacked(arrival)
        loss = text_loss(reference, h.requires_grad_(), labels, arrival.cut, auxiliary=False)
        (loss * count / sum(counts)).backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        assert gradient is not None
        assert h.grad is not None
        want = (h.grad * sum(counts) / count).half().numpy()
        assert gradient["h"].shape == (*arrival.batch.labels.shape, 8)
        np.testing.assert_allclose(gradient["h"], want, 2e-3, 1e-5)
    assert report.rows == sum(counts)
    assert report.loss == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    trained = [p for p in reference.parameters() if p.grad is not None]
    optimizer_of(reference, SGD.hyper, trained).step()
    copies = core.finish()
    assert_close(tensors_of(copies), {n: state_of(reference)[n] for n in tensors_of(copies)})
    assert {c.layer: c.samples for c in copies}["block.1"] == 2
    assert {c.layer: c.samples for c in copies}["head"] == 6
    (part,) = [c for c in copies if c.part]
    assert (part.layer, part.samples) == ("stem", 6)
    assert part.tensors.keys() == {"stem.embedding.weight"}


def test_evaluation_of_texts_is_perplexity() -> None:
    model = language_model()
    x, y = some_texts(40, 9, seed=3)
    evaluator = Evaluator(model, "cpu", (x.numpy(), y.numpy()))
    evaluator.serve(dict.fromkeys((1, 3), state_of(model)))
    tiers = {"s": (1, "fp16"), "l": (3, "fp16")}
    got = finished(evaluator.evaluate(tiers, ALL_PATHS)).accuracy
    with torch.no_grad():
        hub = torch.log_softmax(model(x), 2)
        heads = [
            torch.log_softmax(model.answer(depth, model.segment(x, depth)), 2)
            for depth in (1, 2, 3)
        ]
    for tier, own in (("s", heads[:1]), ("l", heads)):
        for path, parts in {
            "device_alone": own, "through_hub": [hub], "ensemble": [*heads, hub]
        }.items():  # fmt: skip
            p = torch.stack(parts).exp().mean(0)
            picked = [p[i, t, y[i, t]].item() for i, t in (y >= 0).nonzero().tolist()]
            want = math.exp(-np.log(picked).mean())
            assert got[tier][path] == pytest.approx(want, rel=2e-3), (tier, path)
