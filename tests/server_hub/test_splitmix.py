"""Split-Mix on the hub: assignment and averages of bases, and the accuracy of mixtures."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_sdk.bundle.manifest import tensor_of
from edge_sdk.errors import ConfigError, CutlayerError
from edge_sdk.inference.mixture import Mixture
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.adversarial import Attack
from export.bases.dual_norms import noise_tensors, robustness, with_dual_norms
from export.bases.exported import whole_bases, without_trunk
from export.bases.split_width import split_width
from export.bundles.writer import Tier
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.per_base import PerBase
from server_hub.methods.base_assignment import BaseAssignment
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable, SplitMixTable
from server_hub.simulation.partition import PartitionTable
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import read_records
from server_hub.trunk.adversarial import hard_examples, mixed_logits
from server_hub.trunk.evaluator import Evaluator, finished
from server_hub.trunk.interface import TrunkCopy
from server_hub.trunk.settings import TrunkTraining
from tests.lib.decay import optimizer_of
from tests.lib.dual_norms import only, shaken, torch_runtime
from tests.lib.models import CLASSES, IMAGE, MeanHead, example
from tests.lib.simulations import Interrupted, assert_alike, simulate, stop_after

DEPTH = 3


class Block(nn.Module):
    """A residual block: convolution, norm, ReLU."""

    def __init__(self, norm: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = norm

    def forward(self, h: Tensor) -> Tensor:
        result: Tensor = h + torch.relu(self.norm(self.conv(h)))
        return result


def wide(norms: tuple[nn.Module, ...]) -> SplitModel:
    """Return a model of images at half size, with blocks of 8 channels and a norm in the head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stem = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU())
        head = nn.Sequential(nn.GroupNorm(4, 8), MeanHead(8, CLASSES))
        return SplitModel(stem, [Block(norm) for norm in norms], head)


def build_wide() -> SplitModel:
    """Return a model with group norms."""
    return wide(tuple(nn.GroupNorm(4, 8) for _ in range(DEPTH)))


def build_batch_norms() -> SplitModel:
    """Return a model with batch norms."""
    return wide(tuple(nn.BatchNorm2d(8) for _ in range(DEPTH)))


def build_batch_norm_below() -> SplitModel:
    """Return a model with a batch norm in the first block only."""
    return wide((nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.GroupNorm(4, 8)))


def build_words() -> SplitModel:
    """Return a small GPT-2 for bytes."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return from_transformers(
            transformers.GPT2Config(
                n_embd=8, n_layer=2, n_head=2, vocab_size=256, n_positions=8, bos_token_id=1,
                eos_token_id=1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        )  # fmt: skip


# --- assignment of bases --------------------------------------------------------------------------

BUDGETS = st.sampled_from([0.125, 0.2, 0.25, 0.5, 0.7, 1.0])


@given(
    bases=st.integers(8, 12),
    budgets=st.lists(BUDGETS, min_size=1, max_size=5),
    number=st.integers(1, 30),
    seed=st.integers(0, 99),
)
def test_a_device_trains_as_many_bases_as_its_budget_pays_for_and_none_twice(
    bases: int, budgets: list[float], number: int, seed: int
) -> None:
    mixing = BaseAssignment(bases, {f"t{i}": b for i, b in enumerate(budgets)}, seed=seed)
    tiers = {f"d{i}": f"t{i % (len(budgets) + 1)}" for i in range(7)}  # one tier has no budget
    drawn = mixing.draw(number, 7 * (number - 1), tiers)
    assert drawn.keys() == tiers.keys()
    for device, own in drawn.items():
        place = int(tiers[device][1:])
        budget = budgets[place] if place < len(budgets) else 1.0
        assert len(own) == math.floor(budget * bases + 1e-6)
        assert len(set(own)) == len(own)
        assert set(own) <= set(range(bases))


@given(
    bases=st.integers(1, 9),
    members=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    seed=st.integers(0, 99),
)
def test_every_base_comes_first_once_before_any_comes_again(
    bases: int, members: list[int], seed: int
) -> None:
    """Rounds may have different numbers of members."""
    mixing = BaseAssignment(bases, {"t": 1 / bases}, seed=seed)
    firsts: list[int] = []
    for number, devices in enumerate(members, start=1):
        tiers = {f"d{i:02}": "t" for i in range(devices)}
        firsts += [own[0] for own in mixing.draw(number, len(firsts), tiers).values()]
    for start in range(0, len(firsts), bases):
        part = firsts[start : start + bases]
        assert len(set(part)) == len(part)


def test_draws_go_by_seed_and_round_and_not_by_who_is_named_first() -> None:
    mixing = BaseAssignment(8, {"t": 0.5}, seed=3)
    tiers = {f"d{i}": "t" for i in range(6)}
    assert mixing.draw(2, 6, tiers) == mixing.draw(2, 6, dict(reversed(tiers.items())))
    assert mixing.draw(2, 6, tiers) == BaseAssignment(8, {"t": 0.5}, seed=3).draw(2, 6, tiers)
    assert mixing.draw(2, 6, tiers) != mixing.draw(3, 12, tiers)
    assert mixing.draw(2, 6, tiers) != replace(mixing, seed=4).draw(2, 6, tiers)


def test_all_bases_are_trained_equally_often() -> None:
    mixing = BaseAssignment(4, {"t": 0.5})
    tiers = {f"d{i}": "t" for i in range(5)}
    counts = Counter(
        b
        for number in range(1, 401)
        for own in mixing.draw(number, 5 * (number - 1), tiers).values()
        for b in own
    )
    # half of the draws are exact by the queue; the others have a variance below 500
    assert all(abs(counts[b] - 1000) < 100 for b in range(4))


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_a_budget_is_some_of_the_model(budget: float) -> None:
    with pytest.raises(ConfigError, match="'poor' has a budget"):
        BaseAssignment(8, {"poor": budget})


def test_a_budget_below_one_base_is_told_with_what_one_takes() -> None:
    mixing = BaseAssignment(8, {"poor": 0.1, "rich": 0.125})
    assert mixing.count("rich") == 1
    with pytest.raises(ConfigError, match=r"'poor' has a budget of 0\.1 .* takes 0\.125"):
        mixing.count("poor")


# --- averages -------------------------------------------------------------------------------------

SHAPES = {
    "stem.weight": (2, 3), "block.0.norm.clean.weight": (3,), "block.0.norm.noise.weight": (3,),
    "block.1.weight": (3, 3), "aux.2.bias": (2,),
}  # fmt: skip
ON_DEVICE = ("stem.weight", "block.0.norm.clean.weight", "block.0.norm.noise.weight")


def random_state(rng: np.random.Generator, *leading: int) -> dict[str, Array]:
    return {
        name: rng.standard_normal((*leading, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }


@settings(deadline=None)
@given(
    drawn=st.lists(st.sets(st.integers(0, 3), min_size=1), min_size=1, max_size=5),
    hardens=st.lists(st.booleans(), min_size=5, max_size=5),
    seed=st.integers(0, 999),
)
def test_a_base_becomes_the_weighted_mean_of_its_copies(
    drawn: list[set[int]], hardens: list[bool], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    initial = random_state(rng, 4)
    store = PerBase(initial)
    updates, sums = [], {}
    for i, (own, noisy) in enumerate(zip(drawn, hardens, strict=False)):
        samples, state = int(rng.integers(1, 50)), {}
        for base in own:
            for name in ON_DEVICE:
                if noisy or ".noise." not in name:
                    tensor = rng.standard_normal(SHAPES[name]).astype(np.float32)
                    state[tensor_of(base, name)] = tensor
                    total, weight = sums.get((base, name), (0.0, 0))
                    sums[base, name] = (
                        total + samples * tensor.astype(np.float64), weight + samples
                    )  # fmt: skip
        updates.append(DeviceUpdate(f"d{i}", state, samples, {}))
    deep = rng.standard_normal(SHAPES["block.1.weight"]).astype(np.float32)
    store.commit(updates, [TrunkCopy("shared", "block.1", {"block.1.weight": deep}, 9, base=2)])
    after = store.trunk_state()
    assert after.keys() == initial.keys()
    for name, before in initial.items():
        for base in range(4):
            want = before[base]
            if (base, name) in sums:
                total, weight = sums[base, name]
                want = total / weight
            elif (base, name) == (2, "block.1.weight"):
                want = deep
            np.testing.assert_allclose(after[name][base], want, 1e-6, 1e-6)
            if want is before[base]:
                np.testing.assert_array_equal(after[name][base], want)


def test_copies_of_the_trunk_count_beside_those_of_devices() -> None:
    """One device trains a base as a whole, and the trunk trains the cut ones."""
    rng = np.random.default_rng(0)
    store = PerBase(random_state(rng, 2))
    whole, deep = (rng.standard_normal((3, 3)).astype(np.float32) for _ in range(2))
    update = DeviceUpdate("d", {tensor_of(1, "block.1.weight"): whole}, 30, {})
    store.commit([update], [TrunkCopy("shared", "block.1", {"block.1.weight": deep}, 10, base=1)])
    np.testing.assert_allclose(
        store.trunk_state()["block.1.weight"][1], 0.75 * whole + 0.25 * deep, 1e-6, 1e-6
    )


def test_the_state_of_a_base_does_not_depend_on_others_with_more_digits() -> None:
    """``base.1.`` is not a prefix of ``base.10.``."""
    initial = {"stem.weight": np.zeros((11, 2), np.float32)}
    store = PerBase(initial)
    store.commit(
        [DeviceUpdate("d", {tensor_of(10, "stem.weight"): np.ones(2, np.float32)}, 1, {})], []
    )
    assert store.trunk_state()["stem.weight"].sum(1).tolist() == [0.0] * 10 + [2.0]


def test_stores_go_back_to_what_they_were() -> None:
    rng = np.random.default_rng(1)
    store, other = PerBase(random_state(rng, 3)), PerBase(random_state(rng, 3))
    other.trunk_state()
    other.restore(store.stores())
    for name, tensor in store.trunk_state().items():
        np.testing.assert_array_equal(other.trunk_state()[name], tensor)


# --- a job is the paper's loop --------------------------------------------------------------------

LOCAL = LocalTraining(epochs=2, batch_size=16, hyper={"lr": 0.05, "momentum": 0.9})


def job(**changes: Any) -> Job:
    """Return a job of three devices that train two of four bases, or all, as a whole."""
    given: dict[str, Any] = {
        "model": f"{__name__}:build_wide",
        "data": DataTable("digits", train=90, test=50, scale="unit"),
        "tiers": {
            "half": FleetTier(clients=2, cut=DEPTH, budget=0.5),
            "full": FleetTier(clients=1, cut=DEPTH),
        },
        "method": "splitmix",
        "mix": SplitMixTable(bases=4),
        "rounds": RoundsTable(count=2),
        "local": LOCAL,
        "schedule": "constant",
    }
    return Job(**given | changes)


def bases_in(folder: Path, bases: int) -> list[dict[str, Array]]:
    """Return the trained bases of a run."""
    return [load_file(folder / f"model.base-{b}.safetensors") for b in range(bases)]


def papers_loop(task: Job, simulation: Simulation) -> list[dict[str, Array]]:
    """Return the bases after all rounds, by plain loops with torch's optimizer in float64."""
    states = [
        {name: torch.from_numpy(t[base]).double() for name, t in simulation.fleet.bases.items()}
        for base in range(task.mix.bases)
    ]
    owners = {client.name: client for client in simulation.clients}
    for number in range(1, task.rounds.count + 1):
        drawn = task.mixing.draw(
            number, len(owners) * (number - 1), {n: c.tier for n, c in owners.items()}
        )
        copies: dict[int, list[tuple[int, dict[str, Tensor]]]] = {}
        for order, name in enumerate(sorted(owners)):
            client = owners[name]
            x = torch.from_numpy(simulation.data.train.x[client.rows]).double()
            y = torch.from_numpy(simulation.data.train.y[client.rows]).long()
            there = y.unique() if task.mix.masked else torch.arange(CLASSES)
            for base in drawn[name]:
                model = copy.deepcopy(simulation.fleet.models[client.tier]).double().train()
                model.load_state_dict(states[base], strict=False)
                hyper = {"weight_decay": 5e-4, **task.local.hyper}
                optimizer = optimizer_of(model, hyper)
                rng = np.random.default_rng(number * 1_000_003 + order)
                for _ in range(task.local.epochs):
                    for rows in np.array_split(
                        rng.permutation(len(y)), range(16, len(y), task.local.batch_size)
                    ):
                        h = model.stem(x[rows])
                        for block in model.block:
                            h = block(h)
                        logits = model.aux[str(DEPTH)](h)[:, there]
                        labels = torch.searchsorted(there, y[rows])
                        optimizer.zero_grad()
                        cross_entropy(logits, labels).backward()
                        optimizer.step()
                trained = {n: model.state_dict()[n].clone() for n in states[base]}
                copies.setdefault(base, []).append((len(y), trained))
        for base, group in copies.items():
            total = sum(samples for samples, _ in group)
            states[base] = {
                n: sum((samples / total * state[n] for samples, state in group), torch.zeros(()))
                for n in states[base]
            }
    return [{n: t.numpy() for n, t in state.items()} for state in states]


@pytest.mark.parametrize(
    ("model", "masked"), [("build_wide", True), ("build_wide", False), ("build_batch_norms", True)]
)
def test_a_simulated_job_is_the_loop_of_the_paper(tmp_path: Path, model: str, masked: bool) -> None:
    """Every device lacks several classes, which the loss leaves out or not."""
    task = job(
        model=f"{__name__}:{model}",
        mix=SplitMixTable(bases=4, masked=masked),
        partition=PartitionTable(kind="shards", classes_per_client=2, seed=1),
    )
    with Simulation(task, tmp_path / "run") as simulation:
        shares = [set(simulation.data.train.y[c.rows]) for c in simulation.clients]
        assert all(len(share) < CLASSES for share in shares)
        simulation.run()
        want = papers_loop(task, simulation)
        start = simulation.fleet.bases
    for base, state in enumerate(bases_in(tmp_path / "run", 4)):
        assert state.keys() >= want[base].keys()
        for name, tensor in want[base].items():
            np.testing.assert_allclose(state[name], tensor, 1e-4, 2e-5, err_msg=name)
        moved = max(np.abs(state[name] - start[name][base]).max() for name in start)
        assert moved > 0.01


# --- jobs from end to end -------------------------------------------------------------------------

HARD = Attack(epsilon=0.1, step_size=0.05, steps=1)
TOGETHER = {
    "cut": FleetTier(clients=2, cut=1, codec="fp16", budget=0.5),
    "whole": FleetTier(clients=1, cut=DEPTH),
}


def together(**changes: Any) -> Job:
    """Return devices that train whole and cut bases, also on adversarial examples."""
    given = {
        "tiers": TOGETHER,
        "mix": SplitMixTable(bases=4, robustness=0.5, attack=HARD),
        "data": DataTable("digits", train=48, test=50, scale="unit"),
        "local": replace(LOCAL, epochs=1),
    }
    return job(**given | changes)


def test_tiers_that_are_whole_and_tiers_that_are_cut_train_the_same_bases(tmp_path: Path) -> None:
    task = together()
    with Simulation(task, tmp_path / "run") as simulation:
        records = simulation.run()
        fleet, held_out = simulation.fleet, simulation.data.held_out
    assert [r.round for r in records] == [1, 2]
    states = bases_in(tmp_path / "run", 4)
    for record in records:
        assert record.dropped == {}
        assert sorted(record.order) == [0, 1, 2, 3]
        assert record.mixed.keys() == {"1", "2", "3", "4"}
        assert record.trunk_loss is not None
        assert math.isfinite(record.trunk_loss)
        assert record.accuracy == {tier: {"mix": record.mixed["4"]} for tier in TOGETHER}
    for name, start in fleet.bases.items():
        if "num_batches" not in name:
            assert all((states[b][name] != start[b]).any() for b in range(4)), name
    assert any(".noise." in name for name in fleet.bases)

    models = [copy.deepcopy(fleet.model).eval() for _ in states]
    for model, state in zip(models, states, strict=True):
        model.load_state_dict({n: torch.from_numpy(t) for n, t in state.items()})
    order, mixed = by_definition(
        [plain_answers(m, torch.from_numpy(held_out.x)) for m in models],
        torch.from_numpy(held_out.y),
    )
    assert records[-1].order == order
    assert {int(n): v for n, v in records[-1].mixed.items()} == pytest.approx(mixed)


def plain_answers(model: SplitModel, x: Tensor) -> Tensor:
    """Return the logits of the whole model by its own head."""
    with torch.no_grad():
        h = model.stem(x)
        for block in model.block:
            h = block(h)
        return model.answer(model.depth - 1, h)


def accuracy(logits: Tensor, y: Tensor) -> float:
    return (logits.argmax(-1) == y).float().mean().item()


def perplexity(logits: Tensor, y: Tensor) -> float:
    counted = y >= 0
    return cross_entropy(logits[counted].double(), y[counted]).exp().item()


def by_definition(
    logits: list[Tensor], y: Tensor, texts: bool = False
) -> tuple[list[int], dict[int, float]]:
    """Rank bases on every fifth example; measure the mean of the best on the other examples."""
    measure = perplexity if texts else accuracy
    fifth = torch.arange(len(y)) % 5 == 0
    scores = [measure(z[fifth], y[fifth]) for z in logits]
    order = sorted(range(len(logits)), key=lambda b: (scores[b] if texts else -scores[b], b))
    mixed = {
        n: measure(torch.stack([logits[b][~fifth] for b in order[:n]]).mean(0), y[~fifth])
        for n in range(1, len(order) + 1)
    }
    return order, mixed


def test_a_tier_that_has_opted_out_does_not_dilute_the_noise_norms_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three devices train all bases, and one of them trains on adversarial examples too."""
    tiers = {
        "hard": FleetTier(clients=1, cut=DEPTH),
        "out": FleetTier(clients=1, cut=DEPTH, adversarial=False),
        "cut": FleetTier(clients=1, cut=1, adversarial=False),
    }
    came: dict[str, DeviceUpdate] = {}
    commit = PerBase.commit

    def noted(self: PerBase, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        came.update({u.device: u for u in updates})
        commit(self, updates, copies)

    monkeypatch.setattr(PerBase, "commit", noted)
    task = together(tiers=tiers, rounds=RoundsTable(count=1))
    with Simulation(task, tmp_path / "run") as simulation:
        noise = noise_tensors(simulation.fleet.model) & simulation.fleet.bases.keys()
        simulation.run()
        start = simulation.fleet.bases
    assert noise
    assert came.keys() == {"hard-1", "out-1", "cut-1"}
    hard, out = came["hard-1"], came["out-1"]
    for base, state in enumerate(bases_in(tmp_path / "run", 4)):
        for name in noise:
            np.testing.assert_array_equal(state[name], hard.state[tensor_of(base, name)])
            assert (state[name] != start[name][base]).any()
            clean = name.replace(".noise.", ".clean.")
            if clean.startswith("aux."):  # the trunk has copies of these too
                continue
            assert (state[clean] != hard.state[tensor_of(base, clean)]).any()
            assert (state[clean] != out.state[tensor_of(base, clean)]).any()


@pytest.mark.parametrize("dual", [True, False])
def test_all_weight_may_be_on_hard_examples(tmp_path: Path, dual: bool) -> None:
    """Steps of the trunk are so small that clean rows are in steps of their own."""
    task = together(
        mix=SplitMixTable(bases=4, robustness=1.0, dual_norms=dual, attack=HARD),
        trunk=TrunkTraining(max_rows=1, wait_s=0.0),
        rounds=RoundsTable(count=1),
        tiers={"cut": TOGETHER["cut"]},
    )
    [record] = simulate(task, tmp_path / "run")
    assert record.dropped == {}
    assert record.trunk_loss is not None
    names = bases_in(tmp_path / "run", 1)[0]
    assert any(".noise." in name for name in names) == dual


@pytest.mark.parametrize("every", [1, 2])
def test_an_interrupted_job_goes_on_to_the_same_end(tmp_path: Path, every: int) -> None:
    task = together(
        rounds=RoundsTable(count=3, per_round=2), mix=SplitMixTable(bases=4), evaluate_every=every
    )
    whole = simulate(task, tmp_path / "whole")
    with pytest.raises(Interrupted):
        simulate(task, tmp_path / "halves", on_round=stop_after(every))
    halves = simulate(task, tmp_path / "halves")
    assert_alike(halves, whole)
    assert read_records(tmp_path / "halves") == halves
    for a, b in zip(bases_in(tmp_path / "halves", 4), bases_in(tmp_path / "whole", 4), strict=True):
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=name)
    for mine, other in zip(halves, whole, strict=True):
        assert mine.order == other.order
        assert mine.mixed == pytest.approx(other.mixed, abs=1.5 / 40)  # accuracy on 40 examples


def test_bases_with_batch_norms_lie_on_devices_as_a_whole(tmp_path: Path) -> None:
    """Statistics are averaged by base too, and the noise copies have their own."""
    task = job(
        model=f"{__name__}:build_batch_norms",
        mix=SplitMixTable(bases=2, robustness=0.5, attack=HARD),
        data=DataTable("digits", train=60, test=50, scale="unit"),
    )
    records = simulate(task, tmp_path / "run")
    assert all(r.dropped == {} for r in records)
    state = bases_in(tmp_path / "run", 2)[0]
    clean, noise = (state[f"block.0.norm.{copied}.running_mean"] for copied in ("clean", "noise"))
    assert np.abs(clean).max() > 0
    assert np.abs(noise).max() > 0
    assert (clean != noise).any()


def test_batch_norms_above_a_cut_are_refused_in_a_sentence(tmp_path: Path) -> None:
    task = job(model=f"{__name__}:build_batch_norms", tiers={"cut": FleetTier(clients=2, cut=1)})
    with pytest.raises(CutlayerError, match=r"batch norms above cut 1 of tier 'cut'") as error:
        simulate(task, tmp_path / "run")
    assert "\n" not in str(error.value)


def test_batch_norms_below_a_cut_are_trained(tmp_path: Path) -> None:
    task = job(
        model=f"{__name__}:build_batch_norm_below",
        tiers={"cut": FleetTier(clients=2, cut=1)},
        local=replace(LOCAL, epochs=1),
    )
    records = simulate(task, tmp_path / "run")
    assert all(r.dropped == {} for r in records)
    assert np.abs(bases_in(tmp_path / "run", 1)[0]["block.0.norm.running_mean"]).max() > 0


def test_bases_of_a_language_model_are_trained_and_mixed(tmp_path: Path) -> None:
    text = "\n\n".join(f"A paragraph, number {i}, of some length." for i in range(30))
    (tmp_path / "text.txt").write_text(text)
    task = Job(
        model=f"{__name__}:build_words",
        data=DataTable(str(tmp_path / "text.txt"), length=8),
        tiers={
            "cut": FleetTier(clients=2, cut=1, budget=0.5, codec="fp16"),
            "whole": FleetTier(clients=1, cut=2),
        },
        method="splitmix",
        mix=SplitMixTable(bases=2),
        rounds=RoundsTable(count=3),
        local=LocalTraining(batch_size=16, hyper={"lr": 0.3}),
        trunk=TrunkTraining(hyper={"lr": 0.3}),
    )
    records = simulate(task, tmp_path / "run")
    assert all(r.dropped == {} and r.metric == "perplexity" for r in records)
    assert records[-1].mixed["2"] < records[0].mixed["2"] < 300
    assert records[-1].trunk_loss is not None


def test_heterofl_trains_nested_widths_by_budget(tmp_path: Path) -> None:
    task = job(method="heterofl", mix=SplitMixTable(), tiers={
        "half": FleetTier(clients=2, cut=DEPTH, budget=0.5),
        "full": FleetTier(clients=1, cut=DEPTH),
    })  # fmt: skip
    with Simulation(task, tmp_path / "run") as simulation:
        widths = {n: m.stem[0].out_channels for n, m in simulation.fleet.models.items()}
        records = simulation.run()
        before = build_wide().state_dict()
    assert widths == {"half": 4, "full": 8}
    assert all(r.dropped == {} and not r.mixed and r.accuracy for r in records)
    after = load_file(tmp_path / "run" / "model.safetensors")["stem.0.weight"]
    moved = (after != before["stem.0.weight"].numpy()).any((1, 2, 3))
    assert moved.all()
    assert records[-1].accuracy.keys() == widths.keys()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tiers": {"poor": FleetTier(clients=1, cut=DEPTH, budget=0.1)}}, "'poor' has a budget"),
        ({"mix": SplitMixTable(bases=3)}, "3"),
        ({"tiers": {"deep": FleetTier(clients=1, cut=DEPTH + 1)}}, f"cut {DEPTH + 1}"),
    ],
)
def test_a_job_that_cannot_be_is_told_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(CutlayerError, match=says) as error:
        Simulation(job(**changes), tmp_path / "run")
    assert "\n" not in str(error.value)


# --- accuracy of mixtures -------------------------------------------------------------------------


def hub_bases(bases: int = 4, seed: int = 0) -> tuple[SplitModel, dict[str, Array]]:
    """Return one base as the hub has it, and states whose answers differ."""
    found = whole_bases(
        split_width(build_wide(), bases, example(IMAGE)).with_dual_norms(),
        [1, 2], example(IMAGE), CLASSES,
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    states = {
        n: (t + 0.7 * rng.standard_normal(t.shape)).astype(np.float32)
        for n, t in found.states.items()
    }
    return found.hub, states


@pytest.mark.parametrize("seed", range(4))
def test_bases_are_put_in_order_by_some_examples_and_measured_by_the_others(seed: int) -> None:
    model, states = hub_bases(seed=seed)
    x, y = example(IMAGE, 83, seed), torch.randint(CLASSES, (83,))
    evaluator = Evaluator(model, "cpu", (x.numpy(), y.numpy()))
    evaluator.serve(dict.fromkeys((1, 3), states), 4)
    report = finished(evaluator.evaluate({"a": (1, "int8"), "b": (3, "int8")}, ["mix"]))
    logits = [plain_answers(m, x) for m in each(model, states)]
    order, mixed = by_definition(logits, y)
    assert report.order == order
    assert report.mixed == pytest.approx(mixed)
    assert report.accuracy == {tier: {"mix": report.mixed[4]} for tier in "ab"}


def each(model: SplitModel, states: Mapping[str, Array]) -> list[SplitModel]:
    """Return a module for each base."""
    models = []
    for base in range(len(next(iter(states.values())))):
        own = copy.deepcopy(model).eval()
        own.load_state_dict({n: torch.from_numpy(t[base]) for n, t in states.items()}, strict=False)
        models.append(own)
    return models


def test_mixtures_of_texts_are_measured_by_perplexity() -> None:
    x = torch.randint(256, (43, 8), generator=torch.Generator().manual_seed(0))
    y = torch.roll(x, -1, 1)
    y[:, -1] = -1
    y[::4, 3:] = -1
    found = whole_bases(split_width(build_words(), 2, x), [1], x, 256)
    rng = np.random.default_rng(0)
    states = {
        n: (t + 0.3 * rng.standard_normal(t.shape)).astype(np.float32)
        for n, t in found.states.items()
    }
    evaluator = Evaluator(found.hub, "cpu", (x.numpy(), y.numpy()))
    evaluator.serve({1: states}, 2)
    report = finished(evaluator.evaluate({"a": (1, "int8")}, ["mix"]))
    logits = [plain_answers(m, x) for m in each(found.hub, states)]
    order, mixed = by_definition(logits, y, texts=True)
    assert report.order == order
    assert report.mixed == pytest.approx(mixed, rel=1e-4)


# --- adversarial examples -------------------------------------------------------------------------


def double_bases(seed: int = 0) -> list[SplitModel]:
    model, states = hub_bases(3 + 1, seed)
    return [m.double() for m in each(model, states)][:3]


def unit_pictures(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *IMAGE, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


@settings(max_examples=8, deadline=None)
@given(
    epsilon=st.sampled_from([0.01, 0.1, 0.6]),
    robust=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
def test_hard_examples_stay_near_and_inside_and_raise_the_loss(
    epsilon: float, robust: float, seed: int
) -> None:
    bases = double_bases(seed)
    x, y = unit_pictures(6, seed)
    attack = Attack(epsilon=epsilon, step_size=epsilon / 4, steps=8, low=0.0, high=0.9)
    x = x.clamp(max=0.9)
    hard = hard_examples(bases, x, y, attack, robust, seed)
    assert (hard - x).abs().max() <= epsilon + 1e-12
    assert hard.min() >= 0.0
    assert hard.max() <= 0.9

    def loss(at: Tensor) -> float:
        with torch.no_grad():
            return cross_entropy(mixed_logits(bases, at, robust), y).item()

    assert loss(hard) > loss(x)


@pytest.mark.parametrize("robust", [0.0, 1.0])
def test_hard_examples_go_along_the_gradient_of_the_norms_that_are_asked_for(
    robust: float,
) -> None:
    bases = double_bases()
    x, y = unit_pictures(5, 1)
    one = Attack(epsilon=0.1, step_size=0.03, steps=1)
    steps = [hard_examples(bases, x, y, replace(one, steps=n), robust, seed=7) for n in (1, 2)]
    at = steps[0].detach().clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for base in bases:
        with only(base, "noise" if robust else "clean"):
            h = base.stem(at)
            for block in base.block:
                h = block(h)
            total = total + base.answer(base.depth - 1, h)
    cross_entropy(total / 3, y).backward()
    assert at.grad is not None
    want = (steps[0] + 0.03 * at.grad.sign()).clamp(min=0.0, max=1.0)
    want = torch.minimum(torch.maximum(want, x - 0.1), x + 0.1)
    torch.testing.assert_close(steps[1], want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("robust", [0.0, 0.4, 1.0])
def test_a_mixture_is_the_mean_of_logits_through_the_norms_that_are_asked_for(
    robust: float,
) -> None:
    bases = double_bases()
    x, _ = unit_pictures(4, 2)
    spoiled = copy.deepcopy(bases)
    for base in spoiled:
        for name, p in base.named_parameters():
            if ".noise." in name:
                p.data.add_(1.0)
    with torch.no_grad():
        got, other = mixed_logits(bases, x, robust), mixed_logits(spoiled, x, robust)
        with robustness(robust):
            want = sum((plain_answers(base, x) for base in bases), torch.zeros(())) / 3
    torch.testing.assert_close(got, want)
    assert torch.equal(got, other) == (robust == 0.0)


# --- serving --------------------------------------------------------------------------------------


def build_batch_norms_throughout() -> SplitModel:
    """Return a model with batch norms only."""
    model = build_batch_norms()
    model.head = MeanHead(8, CLASSES)
    return model


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("build", [build_wide, build_batch_norms_throughout])
def test_an_example_alone_gets_the_answer_that_it_gets_among_others(
    build: Any, whole: bool, tmp_path: Path
) -> None:
    base = split_width(build(), 4, example(IMAGE)).model
    model = with_dual_norms(base)
    model = without_trunk(model)
    depth = DEPTH if whole else 2
    if not whole:
        model.add_heads([2], example(IMAGE), CLASSES)
    tier = Tier(depth, "fp16", bases=4)
    runtime, steps = torch_runtime(model, tier, example(IMAGE), CLASSES, tmp_path / "out")
    mix = Mixture(runtime.manifest, runtime)
    mix.offer({str(b): f"version {b}" for b in (2, 0, 3, 1)})
    states = {b: shaken(steps.initial, 5 + b) for b in range(4)}
    for b, state in states.items():
        mix.put(b, f"version {b}", {n: t.numpy() for n, t in state.items()})
    x = example(IMAGE, 6, seed=3).numpy()
    for weight in (0.0, 0.4, 1.0):
        for count in (1, 3, 4):
            batch = mix.answer(x, count, weight).logits
            for i in range(len(x)):
                one = mix.answer(x[i : i + 1], count, weight).logits
                np.testing.assert_allclose(one[:, 0], batch[:, i], 1e-4, 1e-5)
            want = torch.zeros((), dtype=torch.float64)
            for b in (2, 0, 3, 1)[:count]:
                reference = copy.deepcopy(model).double().eval()
                reference.load_state_dict(states[b], strict=False)
                with torch.no_grad(), robustness(weight):
                    h = reference.segment(torch.from_numpy(x).double(), depth)
                    want = want + reference.answer(depth, h) / count
            np.testing.assert_allclose(batch[-1], want.numpy(), 1e-4, 1e-5)
