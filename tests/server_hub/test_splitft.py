"""SplitFT against the same model without a cut: cuts that move, and late gradients."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.messages import Gradient
from edge_sdk.protocol.tensors import Array, TensorSpec
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import LocalPlan, LocalResult, Outgoing, ReplyRequest, advance
from export.adapters_lora.lora import Lora, add_lora, set_ranks
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import ClientSegment, SplitModel
from export.packing import codecs as packing
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.returned import activate, backward
from export.steps.torch_runtime import TorchRuntime
from server_hub.aggregation.adapters import MergedAdapters, at_ranks
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import CutsTable, FleetTier, Job, RoundsTable
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RoundRecord
from server_hub.trunk.interface import TrunkCopy, TrunkPlan
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.step import TrunkTrainer
from tests.lib.adapted_gpt2 import DEPTH, LENGTH, WORDS, build, texts
from tests.lib.codecs import Double, Exact
from tests.lib.decay import optimizer_of
from tests.lib.returned_models import HYPER
from tests.lib.step_runtimes import manifest_of
from tests.lib.trunk_models import step_input

ADAMW = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "weight_decay": 0.1, "max_norm": 0.0}


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels that count."""
    return cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1), ignore_index=-1)


# --- staleness 0 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("seed", range(4))
def test_at_staleness_0_every_step_is_that_of_the_uncut_model(
    optimizer: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with random cuts that change at every step; slots move with the blocks."""
    monkeypatch.setitem(packing.CODECS, "float64", Double())
    hyper = (
        ADAMW
        if optimizer == "adamw"
        else {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
    )
    model = build(seed=seed).double()
    uncut = copy.deepcopy(model)
    rule = get_optimizer(optimizer)
    reference = optimizer_of(uncut, hyper)
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    held = {n: p.detach().numpy().copy() for n, p in model.trained().items()}
    held |= {n: t.numpy() for n, t in rule.slots(model.trained()).items()}
    rng = np.random.default_rng(seed)
    for _ in range(6):
        cut = int(rng.integers(1, DEPTH))
        x, y = texts(int(rng.integers(1, 5)), int(rng.integers(1000)))
        reference.zero_grad()
        loss_of(uncut(x), y).backward()  # type: ignore[no-untyped-call]
        reference.step()

        split = copy.deepcopy(model)
        split.add_heads([cut], x, WORDS)
        split = split.double()
        steps = ClientSteps(
            ClientSegment(split, cut),
            rule,
            Double(),
            x,
            WORDS,
            {"seq": LENGTH},
            graphs=["backward"],
        )
        here = {**{n: t.numpy() for n, t in steps.initial.items()}, **held}
        state = {
            e.spec.name: torch.from_numpy(np.array(here[e.spec.name]))
            if e.spec.name in here
            else torch.zeros([int(n) for n in e.spec.shape], dtype=torch.float64)
            for e in steps.state
        }
        constants = dict(steps.constants)
        h = activate(steps).function(constants, {**state, "x": x})["h"]
        plan = TrunkPlan(optimizer, hyper, returned=True, keeps_slots=True)
        trunk.begin(held, plan)
        arrival = step_input("d", "all", cut, "float64", {"h": h.numpy()}, y.numpy())
        report = trunk.step([arrival])
        (gradient,) = report.gradients
        assert gradient is not None
        rates = {n: torch.tensor(hyper[n], dtype=torch.float64) for n in hyper}
        sent = torch.from_numpy(np.array(gradient["h"]))
        after = backward(steps).function(constants, {**state, "x": x, "grad.h": sent, **rates})
        for copied in trunk.finish():
            held |= {n: np.array(t) for n, t in copied.tensors.items()}
        for entry in steps.state:
            if entry.spec.name in held:
                held[entry.spec.name] = after[f"next/{entry.spec.name}"].detach().numpy()
        for name, tensor in uncut.trained().items():
            np.testing.assert_allclose(
                held[name], tensor.detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=name
            )


# --- staleness ------------------------------------------------------------------------------------


def runtime_at(cut: int) -> tuple[SplitModel, TorchRuntime, ClientSteps]:
    """Return the steps of a device in float32 with unpacked activations."""
    model = build()
    model.add_heads([cut], texts(2, 0)[0], WORDS)
    steps = ClientSteps(
        ClientSegment(model, cut), get_optimizer("sgd"), Exact(), texts(2, 0)[0], WORDS,
        {"seq": LENGTH, "batch": 2}, graphs=["backward"],
    )  # fmt: skip
    return model, TorchRuntime(manifest_of(steps, "torch"), steps), steps


def drive(
    learner: Learner, data: Examples, plan: LocalPlan, hub: Any, late: bool
) -> tuple[LocalResult, int]:
    """Train against a hub; a late hub returns gradients only when the device waits for them."""
    training = learner.training(learner.runtime.get_state(), data, plan)
    sent: dict[int, dict[str, Array]] = {}
    most = 0
    gradient: Gradient | None = None
    while True:
        step = advance(training, gradient)
        gradient = None
        if isinstance(step, LocalResult):
            assert not sent
            return step, most
        if isinstance(step, Outgoing):
            assert isinstance(step.batch, Batch)
            sent[step.number] = hub(step.batch)
            most = max(most, len(sent))
        elif isinstance(step, ReplyRequest) and (step.wait or not late):
            gradient = Gradient(1, step.number, sent.pop(step.number))


@pytest.mark.parametrize("staleness", [0, 1, 3, 20])
def test_gradients_are_as_old_as_the_staleness_allows_and_no_older(staleness: int) -> None:
    """With a late hub, steps equal those of a loop that delays gradients in a queue."""
    cut, batch, rows = 2, 2, 12
    model, runtime, _ = runtime_at(cut)
    x, y = texts(rows, 3)
    data = Examples(x.numpy(), y.numpy())
    hyper = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.0, "max_norm": 0.0}
    plan = LocalPlan(2, batch, hyper, "returned", seed=5, staleness=staleness)
    shown: list[tuple[Array, Array]] = []

    def gradient_at(h: Tensor, labels: Tensor) -> Tensor:
        h = h.detach().requires_grad_()
        deep = h
        for block in model.block[cut:]:
            deep = block(deep)
        (gradient,) = torch.autograd.grad(loss_of(model.head(deep), labels), h)
        return gradient

    def hub(batch: Batch) -> dict[str, Array]:
        shown.append((batch.parts["h"], batch.labels))
        return {
            "h": gradient_at(torch.tensor(batch.parts["h"]), torch.tensor(batch.labels)).numpy()
        }

    def batches() -> Iterator[Tensor]:
        """Yield the inputs of the batches, found by their labels."""
        for _, labels in shown:
            (row,) = {
                i for i in range(rows) if (y[i, : labels.shape[1]].numpy() == labels[0]).all()
            }
            others = [
                i for label in labels for i in range(rows)
                if (y[i, : labels.shape[1]].numpy() == label).all()
            ]  # fmt: skip
            assert others[0] == row
            yield x[others, : labels.shape[1]]

    result, most = drive(Learner(runtime.manifest, runtime), data, plan, hub, late=True)
    assert most == min(staleness + 1, 2 * rows // batch)

    twin = copy.deepcopy(model)
    held = [p for n, p in twin.named_parameters() if p.requires_grad
            and n.startswith(("block.0.", "block.1."))]  # fmt: skip
    optimizer = optimizer_of(twin, hyper, held)
    waiting: deque[tuple[Tensor, Tensor]] = deque()

    def land() -> None:
        inputs, gradient = waiting.popleft()
        optimizer.zero_grad()
        twin.segment(inputs, cut).backward(gradient)  # type: ignore[no-untyped-call]
        optimizer.step()

    for inputs, (sent, labels) in zip(batches(), shown, strict=True):
        h = twin.segment(inputs, cut)
        np.testing.assert_allclose(sent, h.detach().numpy(), rtol=1e-4, atol=1e-5)
        waiting.append((inputs, gradient_at(h, torch.tensor(labels))))
        if len(waiting) > staleness:
            land()
    while waiting:
        land()
    for name, parameter in twin.named_parameters():
        if name in result.state and not name.startswith("aux."):
            np.testing.assert_allclose(
                result.state[name], parameter.detach().numpy(), rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_gradients_that_are_there_are_used_at_once() -> None:
    """If the hub answers at once, steps are exact for every staleness."""
    found = []
    for staleness in (0, 3):
        model, runtime, _ = runtime_at(2)
        x, y = texts(8, 1)

        def hub(batch: Batch, model: SplitModel = model) -> dict[str, Array]:
            h = torch.tensor(batch.parts["h"]).requires_grad_()
            deep = h
            for block in model.block[2:]:
                deep = block(deep)
            loss = loss_of(model.head(deep), torch.tensor(batch.labels))
            return {"h": torch.autograd.grad(loss, h)[0].numpy()}

        hyper = HYPER["sgd"] | {"weight_decay": 0.0}
        plan = LocalPlan(1, 2, hyper, "returned", 0, staleness)
        learner = Learner(runtime.manifest, runtime)
        result, most = drive(learner, Examples(x.numpy(), y.numpy()), plan, hub, late=False)
        assert most == 1
        found.append(result.state)
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


# --- one store ------------------------------------------------------------------------------------


def state_of(model: SplitModel) -> dict[str, Array]:
    """Return the trained tensors."""
    return {n: t.detach().numpy().copy() for n, t in model.trained().items()}


def product(state: Mapping[str, Array], block: int) -> Array:
    """Return the adapter product of a block's attention, without ``alpha``."""
    a = state[f"block.{block}.layer.attn.c_attn.lora_A.default.weight"]
    b = state[f"block.{block}.layer.attn.c_attn.lora_B.default.weight"]
    result: Array = b.astype(np.float64) @ a / len(a)
    return result


def noisy(state: Mapping[str, Array], seed: int) -> dict[str, Array]:
    """Return the state with other adapters, and slots above zero."""
    rng = np.random.default_rng(seed)
    return {
        n: (np.abs(rng.standard_normal(t.shape)) if "/" in n
            else t + 0.1 * rng.standard_normal(t.shape)).astype(t.dtype)
        for n, t in state.items()
    }  # fmt: skip


def layers_between(state: Mapping[str, Array], first: int, last: int) -> dict[str, Array]:
    """Return the tensors of some blocks."""
    return {n: t for n, t in state.items() if any(
        n.rpartition("/")[2].startswith(f"block.{i}") for i in range(first, last))}  # fmt: skip


def test_adapters_of_different_ranks_are_averaged_as_products() -> None:
    """One device has a block at its cut, with a lower rank; another and the trunk have it whole.

    The part that the lower rank could not hold at the start counts as unchanged.
    """
    full = build(4)
    store = MergedAdapters(state_of(full), "adamw", cut_rank=2)
    lower = build(4)
    set_ranks(lower, {1: 2})
    specs = [TensorSpec(n, "float32", t.shape) for n, t in state_of(lower).items()
             if n.startswith(("block.0", "block.1"))]  # fmt: skip
    at_cut = store.device_state(specs)
    assert {n: t.shape for n, t in at_cut.items()} == {s.name: s.shape for s in specs}
    u, s, vt = np.linalg.svd(product(store.trunk_state(), 1))
    np.testing.assert_allclose(product(at_cut, 1), (u[:, :2] * s[:2]) @ vt[:2], atol=1e-6)
    everything = store.trunk_state()
    small = noisy(at_cut | at_ranks({n: t for n, t in everything.items() if "/" in n}, {}), 1)
    small = layers_between(small, 0, 2) | {
        n: np.abs(np.random.default_rng(2).standard_normal(at_cut[n.partition("/")[2]].shape))
        .astype(np.float32)
        for n in everything if n.partition("/")[2] in at_cut
    }  # fmt: skip
    large = layers_between(noisy(everything, 3), 0, 3)
    deep = layers_between(noisy(everything, 4), 2, 4)
    copies = [TrunkCopy("shared", f"block.{i}", layers_between(deep, i, i + 1), 5) for i in (2, 3)]
    store.commit([DeviceUpdate("a", small, 3), DeviceUpdate("b", large, 1)], copies)
    after = store.trunk_state()
    kept = product(everything, 1) - product(at_cut, 1)
    assert np.abs(kept).max() > 1e-3
    for block, parts in {0: [(small, 3), (large, 1)], 1: [(small, 3), (large, 1)],
                         2: [(large, 1), (deep, 5)], 3: [(deep, 5)]}.items():  # fmt: skip
        mean = sum(
            w * (product(state, block) + (kept if block == 1 and state is small else 0))
            for state, w in parts
        ) / sum(w for _, w in parts)
        u, s, vt = np.linalg.svd(mean)
        np.testing.assert_allclose(product(after, block), (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5)
    slot = "mean/block.{}.layer.attn.c_attn.lora_A.default.weight"
    np.testing.assert_allclose(
        after[slot.format(0)], (3 * small[slot.format(0)] + large[slot.format(0)]) / 4, rtol=1e-5
    )
    # The device with the block at its cut has slots for another basis.
    np.testing.assert_allclose(after[slot.format(1)], large[slot.format(1)], rtol=1e-6)
    entered = store.trunk_state(cuts=[2])
    ranks = [len(entered[f"block.{i}.layer.attn.c_attn.lora_A.default.weight"]) for i in range(4)]
    assert ranks == [4, 4, 2, 4]
    assert not entered[slot.format(2)].any()
    assert entered[slot.format(3)].any()


def test_where_all_copies_have_a_lower_rank_it_stays_and_so_do_the_slots() -> None:
    """The rank is not reduced again in every round; the whole model is saved at its full ranks."""
    store = MergedAdapters(state_of(build(4)), "adamw", cut_rank=2)
    lower = build(4)
    set_ranks(lower, {1: 2})
    specs = [TensorSpec(n, "float32", t.shape) for n, t in state_of(lower).items()
             if n.startswith("block.1")]  # fmt: skip
    rule = get_optimizer("adamw")
    own = {s.name: torch.zeros([int(n) for n in s.shape]) for s in specs}
    specs += [TensorSpec(n, "float32", tuple(t.shape)) for n, t in rule.slots(own).items()]
    for seed in range(2):  # after the first average the store has the rank
        sent = noisy(store.device_state(specs), seed)
        store.commit([DeviceUpdate("a", sent, 3), DeviceUpdate("b", dict(sent), 1)], [])
    back = store.device_state(specs)
    assert back.keys() == sent.keys()
    for name in sent:
        np.testing.assert_allclose(back[name], sent[name], rtol=1e-3, atol=1e-5, err_msg=name)
    whole = store.path_state(lower, 1)
    assert whole is store.path_state(lower, 2)
    assert {n: t.shape for n, t in whole.items() if "/" not in n} == {
        n: t.shape for n, t in state_of(build(4)).items()
    }
    np.testing.assert_allclose(product(whole, 1), product(sent, 1), rtol=1e-3, atol=1e-5)


# --- jobs -----------------------------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n\n" * 12


def build_bytes() -> SplitModel:
    """Return a GPT-2 of four small blocks for bytes, with adapters on a base with content."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=DEPTH, n_head=2, vocab_size=258, n_positions=32, bos_token_id=1,
        eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = from_transformers(config)
    return add_lora(model, Lora(rank=4), "gpt2")


def job(folder: Path, **changes: Any) -> Job:
    """Return a job of one or more devices on a text."""
    (folder / "some.txt").write_text(TEXT)
    settings: dict[str, Any] = {
        "model": "tests.server_hub.test_splitft:build_bytes",
        "data": DataTable(str(folder / "some.txt"), train=12, test=4, length=24),
        "tiers": {"a": FleetTier(clients=1, cut=1, codec="fp16", gflops=0.001)},
        "method": "splitft",
        "optimizer": "adamw",
        "rounds": RoundsTable(4),
        "local": LocalTraining(1, 4, {"lr": 0.01}),
        "trunk": TrunkTraining(optimizer="adamw", hyper={"lr": 0.01}),
        "schedule": "constant",
    }
    return Job(**settings | changes)


def run(task: Job, folder: Path) -> tuple[list[Any], dict[str, Array]]:
    """Run a job; return the records and the model."""
    with Simulation(task, folder) as simulation:
        records = simulation.run()
    tensors: dict[str, Array] = load_file(folder / "model.safetensors")
    return records, tensors


def test_a_job_whose_cuts_move_ends_where_one_with_fixed_cuts_ends(tmp_path: Path) -> None:
    """With one device, the steps are those of the uncut model at every cut, over all rounds."""
    fixed, want = run(job(tmp_path), tmp_path / "fixed")
    assert all(record.cuts == {"a-1": 1} and not record.moves for record in fixed)
    # a slow second device sets a bound that lets the first go deeper
    moving = CutsTable(policy="latency", options=[1, 2, 3])
    deeper = job(tmp_path, cuts=moving, tiers={
        "a": FleetTier(clients=1, cut=2, codec="fp16", gflops=0.001)})  # fmt: skip
    records, got = run(deeper, tmp_path / "moving")
    assert [record.cuts["a-1"] for record in records] == [2, 1, 1, 1]
    (move,) = records[0].moves
    assert (move["device"], move["cut"], move["to"]) == ("a-1", 2, 1)
    assert "a round takes it" in move["reason"]
    trained = [n for n in want if "lora" in n]
    assert len(trained) == 2 * DEPTH
    start = {n: t.detach().numpy() for n, t in build_bytes().named_parameters()}
    moved = np.concatenate([(want[n] - start[n]).ravel() for n in trained])
    error = np.concatenate([(got[n] - want[n]).ravel() for n in trained])
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(moved)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hub_gflops", "fast"), [pytest.param(None, 2, marks=pytest.mark.slow), (0.003, 3)]
)
def test_a_fleet_finds_its_cuts_and_learns(
    hub_gflops: float | None, fast: int, tmp_path: Path
) -> None:
    """Slow devices get fewer blocks, and fast ones get more if the hub is overloaded.

    Perplexity falls, and two runs are equal.
    """
    tiers = {
        "slow": FleetTier(clients=1, cut=2, codec="fp16", gflops=0.001),
        "fast": FleetTier(clients=2, cut=2, codec="fp16", gflops=0.01),
    }
    task = job(
        tmp_path, tiers=tiers, cuts=CutsTable(policy="adaptive", options=[1, 2, 3], rank=2),
        rounds=RoundsTable(8), local=LocalTraining(1, 4, {"lr": 0.02}, staleness=1),
        trunk=TrunkTraining(optimizer="adamw", hyper={"lr": 0.02}), hub_gflops=hub_gflops,
    )  # fmt: skip
    records, model = run(task, tmp_path / "one")
    assert records[0].cuts == {"slow-1": 2, "fast-1": 2, "fast-2": 2}
    assert records[-1].cuts == {"slow-1": 1, "fast-1": fast, "fast-2": fast}
    assert sum(len(record.moves) for record in records) == 2 * fast - 3
    perplexity = [record.accuracy["slow"]["through_hub"] for record in records]
    assert perplexity[-1] < 0.95 * perplexity[0]
    assert records[-1].metric == "perplexity"
    again, same = run(task, tmp_path / "two")
    assert [r.cuts for r in again] == [r.cuts for r in records]
    for name in model:
        np.testing.assert_array_equal(model[name], same[name])


class Interrupted(Exception):
    """Raised by a test to interrupt a run."""


def unequal(folder: Path, **changes: Any) -> Job:
    """Return a fleet whose cuts move: the slow device to cut 1, the fast ones to cut 3."""
    tiers = {
        "slow": FleetTier(clients=1, cut=2, codec="fp16", gflops=0.001),
        "fast": FleetTier(clients=2, cut=2, codec="fp16", gflops=0.01),
    }
    cuts = CutsTable(policy="adaptive", options=[1, 2, 3])
    rounds = RoundsTable(changes.pop("count", 6))
    settings = {"tiers": tiers, "cuts": cuts, "rounds": rounds, "hub_gflops": 0.003}
    return job(folder, **settings | changes)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> list[RoundRecord]:
    """The rounds of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    records, _ = run(unequal(folder), folder / "run")
    assert [len(record.moves) for record in records] == [0, 1, 0, 2, 0, 0]
    assert [record.cuts["slow-1"] for record in records] == [2, 2, 1, 1, 1, 1]
    assert [record.cuts["fast-1"] for record in records] == [2, 2, 2, 2, 3, 3]
    return records


@pytest.mark.slow
@pytest.mark.parametrize("last", [1, 2, 4])
def test_a_run_that_was_interrupted_goes_on_with_its_cuts(
    last: int, uninterrupted: list[RoundRecord], tmp_path: Path
) -> None:
    """Runs stop after a target's first round, at one device's move, and at the others' moves.

    Links take no time here, so the clocks agree. Handshakes happen twice, and bundles are not
    downloaded twice, so only the bytes of training are the same.
    """

    def stop(record: RoundRecord) -> None:
        if record.round == last:
            raise Interrupted

    task = unequal(tmp_path)
    with pytest.raises(Interrupted), Simulation(task, tmp_path / "run") as simulation:
        simulation.run(stop)
    with Simulation(task, tmp_path / "run") as simulation:
        records = simulation.run()
    assert len(records) == len(uninterrupted)
    for found, wanted in zip(records, uninterrupted, strict=True):
        assert (found.round, found.cuts, found.devices) == (
            wanted.round, wanted.cuts, wanted.devices,
        )  # fmt: skip
        assert without_reasons(found) == without_reasons(wanted)
        assert found.clock == pytest.approx(wanted.clock, rel=1e-6)
        assert found.seconds == pytest.approx(wanted.seconds, rel=1e-6)
        for kind in ("activations", "gradient", "update", "round"):
            assert found.bytes[kind] == wanted.bytes[kind]
        for tier, paths in wanted.accuracy.items():
            assert found.accuracy[tier] == pytest.approx(paths, rel=1e-3)
        assert found.trunk_loss == pytest.approx(wanted.trunk_loss, rel=1e-4)


def without_reasons(record: RoundRecord) -> list[tuple[str, int, int]]:
    """Return the moves without their reasons, which have times of three digits."""
    return [(move["device"], move["cut"], move["to"]) for move in record.moves]


def test_a_device_that_was_away_comes_back_at_the_cut_that_it_had(tmp_path: Path) -> None:
    """A cut changes only in rounds whose record has the move."""
    tiers = {
        "slow": FleetTier(clients=1, cut=2, codec="fp16", gflops=0.001),
        "fast": FleetTier(
            clients=2, cut=3, codec="fp16", gflops=0.002, online_s=300.0, offline_s=30.0
        ),
    }
    homes = {"slow-1": 2, "fast-1": 3, "fast-2": 3}
    records, _ = run(unequal(tmp_path, count=9, tiers=tiers), tmp_path / "run")
    cuts, gone, back = dict(homes), set(), set()
    for before, record in pairwise(records):
        cuts |= {device: to for device, _, to in without_reasons(before)}
        assert record.cuts.items() <= cuts.items()
        gone |= {device for device in before.dropped if cuts[device] != homes[device]}
        back |= gone & record.cuts.keys()
    assert back, "the job is made so that somebody who has moved is away"
