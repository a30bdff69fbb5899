"""Mixtures of base networks on a device and over the wire, against the mean of single answers."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.bundle.manifest import Bundle, tensor_of
from edge_sdk.device import Device
from edge_sdk.errors import BundleError, DataError, ProtocolError
from edge_sdk.inference.metrics import softmax
from edge_sdk.inference.mixture import Mixture
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.messages import Activations, Error, Infer, Message, Update, Welcome
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.onnx import OnnxRuntime
from edge_sdk.training.adversarial import Attack
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import LocalPlan, LocalResult, Outgoing, advance
from edge_sdk.transport.link import open_websocket
from export.bases.dual_norms import robustness as noise_norms
from export.cutting.split_model import WEIGHTS, SplitModel
from export.lowering.graph_files import lower
from export.steps.graph_set import all_steps
from server_hub.config import HubConfig
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.settings import LocalTraining, MethodConfig, SplitMixConfig
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import EvaluationReport
from server_hub.trunk.local import LocalTrunk
from tests.lib.harness import hub_config, save_npz, served
from tests.lib.mixture_models import DEPTH, Made, made, vectors
from tests.lib.raw_client import RawClient, raw


class Counting:
    """A runtime that records the graphs that it runs."""

    def __init__(self, runtime: Any) -> None:
        self.runtime = runtime
        self.calls: list[tuple[str, Mapping[str, Array]]] = []
        self.loading_s = 0.0

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append((graph, batch))
        found: dict[str, Array] = self.runtime.run(graph, batch)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    @property
    def graphs(self) -> list[str]:
        """The graphs that were run, in order."""
        return [graph for graph, _ in self.calls]


def version(base: int, number: int = 0) -> str:
    """Return a hash that represents a state."""
    return f"{number:032x}{base:032x}"


def mix_of(
    export: Made, tier: str, order: list[int], runtime: Any = None, seed: int = 0
) -> tuple[Mixture, Counting]:
    """Return a mixture with all bases, offered in an order and present on the device."""
    counting = Counting(export.runtime(tier) if runtime is None else runtime)
    mix = Mixture(export.index.manifest(tier), counting)
    mix.offer({str(base): version(base) for base in order})
    states = export.states(tier, seed)
    for base in order:
        mix.put(base, version(base), states[base])
    return mix, counting


def singles(
    export: Made, tier: str, x: Array, robust: float, seed: int = 0
) -> tuple[list[Array], list[dict[str, Array]]]:
    """Run ``predict`` of each base alone; return logits in float64, and packed activations."""
    runtime = export.runtime(tier)
    logits, parts = [], []
    for state in export.states(tier, seed):
        runtime.set_state(state)
        found = runtime.run("predict", {"x": x, "robustness": np.asarray(robust, np.float32)})
        logits.append(found.pop("logits").astype(np.float64))
        parts.append(found)
    return logits, parts


def assert_mixture(
    export: Made, tier: str, mix: Mixture, order: list[int], n: int, x: Array, robust: float,
    seed: int = 0,
) -> None:  # fmt: skip
    """Check that ``n`` bases answer with their mean, and pack the activations of each base."""
    logits, parts = singles(export, tier, x, robust, seed)
    found = mix.answer(x, n, robust)
    want = np.mean([logits[base] for base in order[:n]], axis=0)
    np.testing.assert_allclose(found.logits, want, rtol=1e-5, atol=1e-5)
    if export.index.manifest(tier).whole:
        assert found.parts == {}
        return
    assert list(found.parts) == order[:n]
    for base, own in found.parts.items():
        assert own.keys() == parts[base].keys()
        for name, part in own.items():
            want = parts[base][name]
            assert (part.dtype, part.shape) == (want.dtype, want.shape)
            np.testing.assert_allclose(part.astype(float), want.astype(float), rtol=2e-3, atol=2e-3)


# -- on the device


@settings(max_examples=40, deadline=None)
@given(
    bases=st.sampled_from([1, 3, 8]),
    tier=st.sampled_from(["whole", "cut"]),
    rows=st.integers(1, 5),
    robust=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
def test_an_answer_is_the_mean_of_the_bases(
    bases: int, tier: str, rows: int, robust: float, data: st.DataObject
) -> None:
    """The first bases in the offered order answer, for every number; each packs its activations."""
    export = made(bases)
    order = data.draw(st.permutations(range(bases)))
    n = data.draw(st.integers(1, bases))
    seed = data.draw(st.integers(0, 99))
    mix, _ = mix_of(export, tier, order, seed=seed)
    assert mix.held == order
    assert_mixture(export, tier, mix, order, n, vectors(rows, seed).x, robust, seed)


@pytest.mark.parametrize(
    ("bases", "graphs"),
    [
        (1, ["mix_1"]),
        (2, ["mix_2"]),
        (3, ["mix_2", "mix_1"]),
        (4, ["mix_4"]),
        (5, ["mix_4", "mix_1"]),
        (6, ["mix_4", "mix_2"]),
        (7, ["mix_4", "mix_2", "mix_1"]),
        (8, ["mix_8"]),
    ],
)
def test_few_calls_answer(bases: int, graphs: list[str]) -> None:
    """Eight bases take one call; seven take one call each for four, two and one base."""
    mix, counting = mix_of(made(8), "cut", list(range(8)))
    mix.answer(vectors(2).x, bases)
    assert counting.graphs == graphs


def test_onnx_runtime_mixes(tmp_path: Path) -> None:
    """ONNX Runtime mixes every number of eight bases on the exported graphs."""
    export, order = made(8), [3, 0, 7, 5, 1, 6, 2, 4]
    steps = [step for step in all_steps(export.steps["cut"]) if step.name.startswith("mix_")]
    manifest = export.index.manifest("cut")
    lowered = lower("onnx", steps, {})
    state = export.states("cut")[0]
    runtime = OnnxRuntime(Bundle(manifest, dict(lowered.files), state))
    mix, counting = mix_of(export, "cut", order, runtime)
    for n in range(1, 9):
        for robust in (0.0, 0.4):
            assert_mixture(export, "cut", mix, order, n, vectors(3, n).x, robust)
    assert counting.graphs.count("mix_8") == 2
    assert all((runtime.get_state()[name] == t).all() for name, t in state.items())


def test_only_what_is_not_here_is_missing() -> None:
    """An additional base needs one download; a new version of a base needs that base again."""
    export = made(4)
    mix = Mixture(export.index.manifest("cut"), export.runtime("cut"))
    states = export.states("cut")
    mix.offer({str(base): version(base) for base in (2, 0, 3, 1)})
    assert mix.missing(1) == [(2, version(2))]
    mix.put(2, version(2), states[2])
    assert mix.missing(1) == []
    assert mix.missing(3) == [(0, version(0)), (3, version(3))]
    mix.put(3, version(3), states[3])
    assert mix.held == [2, 3]
    with pytest.raises(DataError, match="base 0 is not here yet; fetch it"):
        mix.answer(vectors(1).x, 2)
    mix.put(0, version(0), states[0])
    assert_mixture(export, "cut", mix, [2, 0, 3], 3, vectors(2).x, 0.0)
    mix.offer({"3": version(3), "2": version(2, 1), "0": version(0), "1": version(1)})
    assert mix.held == [3, 0]
    assert mix.missing(4) == [(2, version(2, 1)), (1, version(1))]
    assert_mixture(export, "cut", mix, [3], 1, vectors(2).x, 0.0)


def test_versions_do_not_mix() -> None:
    """A base of another version, of another model or without an offer is refused."""
    export = made(4)
    mix, _ = mix_of(export, "cut", [0, 1, 2, 3])
    states = export.states("cut")
    with pytest.raises(BundleError, match=r"base 1 is here in version .*versions do not mix"):
        mix.put(1, version(1, 5), states[1])
    with pytest.raises(BundleError, match="versions do not mix"):
        mix.put(9, version(9), states[1])
    name = "block.0.linear.weight"
    for wrong in (
        {n: t for n, t in states[1].items() if n != name},
        states[1] | {name: states[1][name][:1]},
        states[1] | {name: states[1][name].astype(np.float16)},
    ):
        with pytest.raises(BundleError, match=f"base 1 lacks a fitting {name}"):
            mix.put(1, version(1), wrong)
    assert_mixture(export, "cut", mix, [0, 1, 2, 3], 4, vectors(2).x, 0.0)


@pytest.mark.parametrize("bases", [0, -1, 5, 64])
def test_so_many_bases_are_not_there(bases: int) -> None:
    mix, counting = mix_of(made(4), "whole", [0, 1, 2, 3])
    with pytest.raises(DataError, match=rf"{bases} bases are to be mixed; there are 4, so ask"):
        mix.answer(vectors(1).x, bases)
    assert not counting.calls


@pytest.mark.parametrize("robust", [-0.1, 1.5, float("nan"), float("inf")])
def test_robustness_is_a_weight(robust: float) -> None:
    mix, _ = mix_of(made(4), "whole", [0, 1, 2, 3])
    with pytest.raises(DataError, match=r"robustness is \S+; it must be from 0 to 1"):
        mix.answer(vectors(1).x, 2, robust)


def test_robustness_takes_dual_norms() -> None:
    """Without dual norms, only robustness 0 is possible."""
    export = made(4, dual=False)
    mix, _ = mix_of(export, "cut", [0, 1, 2, 3])
    assert_mixture(export, "cut", mix, [0, 1, 2, 3], 3, vectors(2).x, 0.0)
    with pytest.raises(DataError, match="the model has no dual norms; export it with dual_norms"):
        mix.answer(vectors(1).x, 2, 0.5)
    with pytest.raises(DataError, match="no dual norms"):
        export.index.manifest("whole").check_robustness(1.0)


def test_answers_may_overlap() -> None:
    """Bases that arrive while others are mixed do not change the running answer."""
    export, order = made(4), [1, 3, 0, 2]
    states, x = export.states("cut"), vectors(3).x
    logits, _ = singles(export, "cut", x, 0.0)
    mix = Mixture(export.index.manifest("cut"), export.runtime("cut"))
    mix.offer({str(base): version(base) for base in order})
    mix.put(1, version(1), states[1])
    with ThreadPoolExecutor(4) as threads:
        answers = []
        for n, base in enumerate(order, 1):
            mix.put(base, version(base), states[base])
            answers += [(m, threads.submit(mix.answer, x, m)) for m in range(1, n + 1)] * 4
        for m, answer in answers:
            want = np.mean([logits[base] for base in order[:m]], axis=0)
            assert list(answer.result().parts) == order[:m]
            np.testing.assert_allclose(answer.result().logits, want, rtol=1e-5, atol=1e-5)


# -- local training


def plan(hyper: Mapping[str, float] | None = None, epochs: int = 2) -> LocalPlan:
    """Return a plan with SGD with momentum."""
    sgd = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
    return LocalPlan(epochs, 8, sgd | dict(hyper or {}), "train", 5)


def trained(training: Any) -> tuple[LocalResult, list[tuple[int, Batch]]]:
    """Return the result of local training, and the batches that it sends."""
    sent = []
    while not isinstance(step := advance(training), LocalResult):
        if isinstance(step, Outgoing):
            assert isinstance(step.batch, Batch)
            sent.append((step.number, step.batch))
    return step, sent


def same_parts(a: Batch, b: Batch) -> bool:
    """Return whether two batches have equal tensors."""
    return a.parts.keys() == b.parts.keys() and all(
        np.array_equal(a.parts[n], b.parts[n]) for n in a.parts
    )


ATTACK = Attack(epsilon=0.2, step_size=0.1, steps=3, low=0.0, high=1.0)


@pytest.mark.parametrize("tier", ["whole", "cut"])
@pytest.mark.parametrize("robust", [0.0, 0.5])
def test_bases_are_trained_as_each_alone(tier: str, robust: float) -> None:
    """States, activations by base number and mean metrics equal those of single bases."""
    export, data = made(4), vectors(20, seed=1)
    data = Examples(data.x, np.where(data.y == 1, 0, data.y))  # no example of class 1
    hyper = {"robustness": robust, **ATTACK.to_hyper()} if robust else {}
    learner = Learner(export.index.manifest(tier), export.runtime(tier))
    states = {base: export.states(tier)[base] for base in (2, 0)}
    result, sent = trained(learner.training_bases(states, data, plan(hyper)))
    assert result.samples == 20
    metrics, rest = [], list(sent)
    for base, state in states.items():
        alone, own = trained(learner.training(state, data, plan(hyper)))
        metrics.append(alone.metrics)
        for name, tensor in alone.state.items():
            assert np.array_equal(result.state[tensor_of(base, name)], tensor)
            assert not np.array_equal(tensor, state[name]) or ".noise." in name
        mine, rest = rest[: len(own)], rest[len(own) :]
        for (number, batch), (want_number, want) in zip(mine, own, strict=True):
            assert (batch.base, number, batch.noise) == (base, want_number, want.noise)
            assert same_parts(batch, want)
            assert batch.present is not None
            assert batch.present.tolist() == [1, 0, 1]
    assert not rest
    hardens = tier == "whole" and robust > 0
    assert [batch.noise for _, batch in sent] == ([False, True] if hardens else [False]) * (len(sent) // (1 + hardens))  # noqa: E501  # fmt: skip
    assert len(result.state) == 2 * len(states[0])
    for name in ("loss", "accuracy"):
        assert result.metrics[name] == pytest.approx(np.mean([m[name] for m in metrics]))


def test_the_plan_says_how_examples_are_made_hard() -> None:
    """For every batch the attack runs all its steps, each from the last result, before training."""
    export, data = made(4), vectors(20, seed=1)
    counting = Counting(export.runtime("whole"))
    learner = Learner(export.index.manifest("whole"), counting)
    hyper = {"robustness": 0.5, **ATTACK.to_hyper()}
    trained(learner.training(export.states("whole")[0], data, plan(hyper, 1)))
    assert counting.graphs == ["attack", "attack", "attack", "adversarial_train"] * 3
    x_adv: Array | None = None
    for graph, given_ in counting.calls:
        if graph == "attack":
            numbers = {n: float(given_[n]) for n in ("epsilon", "rate", "low", "high")}
            assert numbers == pytest.approx({"epsilon": 0.2, "rate": 0.1, "low": 0, "high": 1})
            if x_adv is not None:
                continue
            assert np.abs(given_["start"] - given_["x"]).max() <= 0.2 + 1e-6
            x_adv = given_["start"]
        else:
            assert float(given_["robustness"]) == 0.5
            assert np.abs(given_["x_adv"] - given_["x"]).max() <= 0.2 + 1e-6
            assert x_adv is not None
            assert not np.array_equal(given_["x_adv"], x_adv)
            x_adv = None


def test_tiers_that_do_not_harden_take_no_notice() -> None:
    """An attack in the plan has no effect on such tiers, nor on other tiers with robustness 0."""
    export, data = made(4), vectors(20, seed=1)
    told = {"robustness": 0.5, **ATTACK.to_hyper()}
    for tier, hyper in (("cut", told), ("whole", {**told, "robustness": 0.0})):
        counting = Counting(export.runtime(tier))
        learner = Learner(export.index.manifest(tier), counting)
        state = export.states(tier)[0]
        result, sent = trained(learner.training(state, data, plan(hyper)))
        assert set(counting.graphs) == {"train"}
        plainly, sent_plainly = trained(learner.training(state, data, plan()))
        assert all(np.array_equal(result.state[n], t) for n, t in plainly.state.items())
        assert len(sent) == len(sent_plainly)
        assert all(same_parts(a, b) for (_, a), (_, b) in zip(sent, sent_plainly, strict=True))


def test_a_round_that_does_not_say_how_is_refused() -> None:
    """The error names the missing number in one sentence."""
    export = made(4)
    learner = Learner(export.index.manifest("whole"), export.runtime("whole"))
    hyper = {"robustness": 0.5, **ATTACK.to_hyper()}
    del hyper["attack_steps"]
    with pytest.raises(ProtocolError, match="hyper lacks attack_steps"):
        trained(learner.training(export.states("whole")[0], vectors(4), plan(hyper)))


# -- over the wire


def config_of(folder: Path, export: Made, count: int = 2, **changes: Any) -> HubConfig:
    """Return a configuration of Split-Mix on two devices; tier ``whole`` trains adversarially."""
    return hub_config(
        folder,
        export.index,
        method=MethodConfig(name="splitmix"),
        rounds=RoundRules(count=count, min_devices=2, deadline_s=30),
        local=LocalTraining(batch_size=8, hyper={"lr": 0.05, "momentum": 0.9}),
        held_out=save_npz(folder / "held_out.npz", vectors(60, seed=7)),
        keep_serving=True,
        **({"mix": SplitMixConfig(robustness=0.5, attack=ATTACK)} | changes),
    )


@asynccontextmanager
async def serving(
    config: HubConfig, export: Made, first: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[tuple[Hub, str]]:
    """Run a hub in this process; yield it with its address. ``first`` runs before evaluations."""
    held_out = vectors(60, seed=7)
    model = copy.deepcopy(export.bases.hub)
    model.load(config.bundles / WEIGHTS)
    trunk = LocalTrunk(model, "cpu", (held_out.x, held_out.y))
    tiers = {name: (entry.cut, entry.codec) for name, entry in export.index.tiers.items()}

    async def later() -> EvaluationReport:
        assert first is not None
        await first()
        return await trunk.evaluate(tiers, ["mix"])

    waiting = None if first is None else lambda: asyncio.ensure_future(later())
    hub = Hub(config, model, trunk, evaluate=waiting)
    async with served(hub) as url:
        yield hub, url


async def join(
    config: HubConfig, export: Made, url: str, name: str, tier: str, data: Examples | None = None
) -> Device:
    """Return a device that runs the functional steps."""
    device = Device(
        lambda: open_websocket(url),
        export.load,
        token=TokenFile(config.tokens).issue(name),
        tier=tier,
        data=data,
        cache=config.run.parent / "cache" / name,
        patience_s=5,
    )
    await device.join()
    return device


def fetches(device: Device) -> list[str]:
    """Return the list of states that the device will request, also those that the hub lacks."""
    seen: list[str] = []
    fetch = device._downloader.state

    async def noting(name: str, limit: int) -> bytes:
        seen.append(name)
        return await fetch(name, limit)

    device._downloader.state = noting  # type: ignore[method-assign]
    return seen


def final_bases(hub: Hub, export: Made) -> list[SplitModel]:
    """Return the trained bases of the run, best first."""
    models = []
    for base in hub.run.records[-1].order:
        model = copy.deepcopy(export.bases.hub)
        model.load(hub.config.run / f"model.base-{base}.safetensors")
        models.append(model.eval())
    return models


@torch.no_grad()
def logits_of(models: list[SplitModel], x: Array, robust: float) -> tuple[Array, Array]:
    """Return means over the bases: of the head at cut 1, and of the whole models."""
    early, late = [], []
    with noise_norms(robust):
        for model in models:
            h = model.segment(torch.from_numpy(x), 1)
            early.append(model.aux["1"](h).numpy())
            late.append(model.aux[str(DEPTH)](model.segment(torch.from_numpy(x), DEPTH)).numpy())
    return np.stack(early).mean(0, dtype=np.float64), np.stack(late).mean(0, dtype=np.float64)


def test_a_job_with_a_whole_and_a_cut_tier(tmp_path: Path) -> None:
    """After the job, one, three and all bases answer correctly, on the device and over the hub."""
    export = made(4)

    async def job() -> None:
        config = config_of(tmp_path, export, count=3)
        x = vectors(9, seed=3).x
        async with serving(config, export) as (hub, url):
            devices = [
                await join(config, export, url, tier, tier, vectors(24, seed))
                for seed, tier in enumerate(("whole", "cut"))
            ]
            reports = await asyncio.gather(*(device.train() for device in devices))
            assert [[r.round for r in report.rounds] for report in reports] == [[1, 2, 3]] * 2
            records = hub.run.records
            assert all(record.devices == 2 and not record.dropped for record in records)
            assert all(record.trunk_steps and record.trunk_loss for record in records)
            assert set(records[-1].mixed) == {"1", "2", "3", "4"}
            models = final_bases(hub, export)
            for base, model in zip(records[-1].order, models, strict=True):
                for name, tensor in model.trained().items():
                    same = np.array_equal(tensor.detach(), export.bases.states[name][base])
                    # the head at the cut was not trained on adversarial examples
                    assert same == (name.startswith("aux.1.") and ".noise." in name), name

            guest = await join(config, export, url, "guest", "whole")
            seen = fetches(guest)
            for bases, fetched in ((1, 1), (3, 3), (2, 3), (4, 4)):
                answer = await guest.predict(x, confidence=2.0, bases=bases)
                assert not answer.by_hub.any()  # all bases are on the device
                _, whole = logits_of(models[:bases], x, 0.0)
                assert answer.probabilities == pytest.approx(softmax(whole), abs=1e-5)
                assert len(seen) == len(set(seen)) == fetched
            mixed = await guest.predict(x, bases=3, robustness=0.7)
            assert mixed.probabilities == pytest.approx(
                softmax(logits_of(models[:3], x, 0.7)[1]), abs=1e-5
            )

            for device, robust in ((devices[1], 0.0), (devices[1], 0.6)):
                own = await device.predict(x, confidence=0.0, robustness=robust)
                early, whole = logits_of(models, x, robust)
                assert own.probabilities == pytest.approx(softmax(early), abs=1e-4)
                through = await device.predict(x, confidence=2.0, robustness=robust)
                assert through.by_hub.all()
                by_hub = 2 * through.probabilities - own.probabilities  # mean of both heads
                assert by_hub == pytest.approx(softmax(whole), abs=5e-3)
                assert np.abs(softmax(whole) - softmax(early)).max() > 0.02
            evaluation = await guest.evaluate(vectors(60, seed=7))
            assert evaluation.device_alone == evaluation.through_hub == evaluation.ensemble
            for device in (*devices, guest):
                await device.close()

    asyncio.run(asyncio.wait_for(job(), 60))


def test_what_is_as_it_was_is_not_fetched_again(tmp_path: Path) -> None:
    """After the job, a device that answered during it still has the bases that did not change."""
    export = made(4)

    async def job() -> None:
        budgets = {"whole": 0.25, "cut": 0.25}
        config = config_of(tmp_path, export, count=1, mix=SplitMixConfig(budgets=budgets))
        x = vectors(4).x
        async with serving(config, export) as (hub, url):
            devices = [
                await join(config, export, url, tier, tier, vectors(16, seed))
                for seed, tier in enumerate(("whole", "cut"))
            ]
            before = await devices[0].predict(x, bases=4)
            seen = fetches(devices[0])
            await asyncio.gather(*(device.train() for device in devices))
            trained_ = len(seen)
            after = await devices[0].predict(x, bases=4)
            assert len(seen) - trained_ == 2  # one base for each device was trained
            assert not np.array_equal(before.probabilities, after.probabilities)
            _, whole = logits_of(final_bases(hub, export), x, 0.0)
            assert after.probabilities == pytest.approx(softmax(whole), abs=1e-5)
            for device in devices:
                await device.close()

    asyncio.run(asyncio.wait_for(job(), 60))


def test_a_device_that_asks_when_rounds_went_by(tmp_path: Path) -> None:
    """The hub no longer has the offered states; it offers new ones, which the device mixes."""
    export = made(4)

    async def job() -> None:
        config = config_of(tmp_path, export, count=5)
        x = vectors(4).x
        evaluating, joined = asyncio.Event(), asyncio.Event()

        async def held_up() -> None:
            evaluating.set()
            await joined.wait()

        async with serving(config, export, held_up) as (hub, url):
            devices = [
                await join(config, export, url, tier, tier, vectors(24, seed))
                for seed, tier in enumerate(("whole", "cut"))
            ]
            training = [asyncio.create_task(device.train()) for device in devices]
            await evaluating.wait()
            late = await join(config, export, url, "late", "whole")
            joined.set()
            told = dict(late._connection.welcome.bases or {})
            await asyncio.gather(*training)
            seen = fetches(late)
            answer = await late.predict(x, bases=2)
            assert seen[0] == next(iter(told.values()))
            assert len(seen) == 3  # one that is gone, and two new ones
            _, whole = logits_of(final_bases(hub, export)[:2], x, 0.0)
            assert answer.probabilities == pytest.approx(softmax(whole), abs=1e-5)
            for device in (*devices, late):
                await device.close()

    asyncio.run(asyncio.wait_for(job(), 60))


def test_what_cannot_be_asked_for(tmp_path: Path) -> None:
    """Each impossible request gets one sentence before anything is downloaded."""
    export = made(4, dual=False)

    async def job() -> None:
        config = config_of(tmp_path, export, mix=SplitMixConfig())
        x = vectors(2).x
        async with serving(config, export) as (_, url):
            device = await join(config, export, url, "phone", "cut")
            seen = fetches(device)
            for wanted, message in (
                ({"bases": 5}, "5 bases are to be mixed; there are 4"),
                ({"bases": 0}, "0 bases are to be mixed; there are 4"),
                ({"robustness": 0.5}, "the model has no dual norms"),
                ({"robustness": 2.0}, "robustness is 2; it must be from 0 to 1"),
                ({"bases": 2, "precision": "int8"}, "leave out bases or precision"),
            ):
                with pytest.raises(DataError, match=message):
                    await device.predict(x, **wanted)
            assert not seen
            await device.close()

    asyncio.run(asyncio.wait_for(job(), 60))


def test_bases_of_a_model_without_bases() -> None:
    """The error says that no bases were offered."""
    mix = Mixture(made(4).index.manifest("cut"), made(4).runtime("cut"))
    mix.offer({})
    with pytest.raises(DataError, match="2 bases are to be mixed, and the hub has named none"):
        mix.missing(2)


# -- messages that the hub refuses


def activations(export: Made, base: int, **changes: Any) -> Activations:
    """Return a valid batch of the cut tier, with some fields changed."""
    rows = 8
    parts: dict[str, Array] = {}
    for spec in export.index.manifest("cut").packed:
        shape = [rows if n == "batch" else int(n) for n in spec.shape]
        parts[spec.name] = np.random.default_rng(0).random(shape).astype(spec.dtype)
    labels = np.array([0, 2] * (rows // 2))
    present = np.array([1, 0, 1], np.float32)
    message = Activations(1, 0, parts, labels, base=base, present=present)
    return replace(message, **changes)


def update(export: Made, bases: list[int]) -> Update:
    """Return an update with all tensors of some bases."""
    states = export.states("cut")
    tensors = {tensor_of(b, n): t for b in bases for n, t in states[b].items()}
    return Update(1, tensors, True, 32, {"loss": 1.0, "accuracy": 0.5})


def without(message: Update, name: str) -> Update:
    """Return the update without one tensor."""
    return replace(message, tensors={n: t for n, t in message.tensors.items() if n != name})


WEIGHT = "block.0.linear.weight"

BAD: dict[str, tuple[Callable[[Made, list[int], int], Message], str, str]] = {
    "a base that was not drawn": (
        lambda e, drawn, other: activations(e, other), "bad_message", "base"),
    "a base that there is not": (
        lambda e, drawn, other: activations(e, 40), "bad_message", "base"),
    "noise from a tier that does not harden": (
        lambda e, drawn, other: activations(e, drawn[0], noise=True), "bad_message", "noise"),
    "present is missing": (
        lambda e, drawn, other: activations(e, drawn[0], present=None), "bad_message", "present"),
    "present has another dtype": (
        lambda e, drawn, other: activations(e, drawn[0], present=np.ones(3)[:3].astype(np.int64)),
        "bad_tensor", "present"),
    "present has another shape": (
        lambda e, drawn, other: activations(e, drawn[0], present=np.ones((1, 3), np.float32)),
        "bad_tensor", "present"),
    "present is neither 0 nor 1": (
        lambda e, drawn, other: activations(
            e, drawn[0], present=np.array([1, np.nan, 1], np.float32)),
        "bad_tensor", "present"),
    "labels of a class that is not present": (
        lambda e, drawn, other: activations(
            e, drawn[0], present=np.array([1, 1, 0], np.float32)),
        "bad_labels", "labels"),
    "no labels": (
        lambda e, drawn, other: activations(e, drawn[0], labels=None), "bad_labels", "labels"),
    "an answer of a base that there is not": (
        lambda e, drawn, other: Infer(1, activations(e, 0).parts, base=4), "bad_message", "base"),
    "an answer more robust than can be": (
        lambda e, drawn, other: Infer(1, activations(e, 0).parts, robustness=2.0),
        "bad_message", "robustness"),
    "an answer less robust than can be": (
        lambda e, drawn, other: Infer(1, activations(e, 0).parts, robustness=-0.5),
        "bad_message", "robustness"),
    "an answer of what is not on the hub": (
        lambda e, drawn, other: Infer(1, activations(e, 0).parts, "whole"),
        "bad_tensor", "h"),
    "a tensor of a base is missing": (
        lambda e, drawn, other: without(update(e, drawn), tensor_of(drawn[1], WEIGHT)),
        "bad_tensor", "base.{1}." + WEIGHT),
    "a base is missing": (
        lambda e, drawn, other: update(e, drawn[:1]), "bad_tensor", "base.{1}.stem.weight"),
    "a base more than was drawn": (
        lambda e, drawn, other: update(e, [*drawn, other]),
        "bad_tensor", "base.{2}.stem.weight"),
    "tensors of no base": (
        lambda e, drawn, other: replace(update(e, drawn), tensors=e.states("cut")[0]),
        "bad_tensor", "stem.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_message_is_refused_and_the_job_goes_on(tmp_path: Path, case: str) -> None:
    """The error names the field, and the round completes with the other device."""
    export = made(4)
    spoiled, code, field = BAD[case]

    async def job() -> None:
        mix = SplitMixConfig(budgets={"cut": 0.5}, robustness=0.5, attack=ATTACK)
        config = replace(config_of(tmp_path, export, count=1, mix=mix), held_out=None)
        async with serving(config, export) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            device = await join(config, export, url, "good", "whole", vectors(16))
            training = asyncio.create_task(device.train())
            hello_token = TokenFile(config.tokens).issue("evil", "cut")
            task = await _join_raw(client, hello_token)
            assert task.state is None
            assert task.bases is not None
            assert "robustness" not in task.hyper
            drawn = [int(base) for base in task.bases]
            assert len(drawn) == 2
            other = next(base for base in range(4) if base not in drawn)
            await client.say(spoiled(export, drawn, other))
            error = await client.hear(Error)
            named = field.replace("{1}", str(drawn[1])).replace("{2}", str(other))
            assert (error.code, error.field, error.fatal) == (code, named, True)
            assert await client.closed()
            report = await training
            assert len(report.rounds) == 1
            (record,) = hub.run.records
            assert record.devices == 1
            assert list(record.dropped) == ["evil"]
            for store in hub.method.aggregation.stores().values():
                assert all(np.isfinite(t).all() for t in store.values())
            await device.close()

    asyncio.run(asyncio.wait_for(job(), 30))


async def _join_raw(client: RawClient, token: str) -> Any:
    """Return a round for a client whose token gives its tier."""
    from edge_sdk.protocol.messages import Hello, Ready, Round

    await client.say(Hello(version=1, token=token))
    welcome = await client.hear(Welcome)
    assert welcome.state is None
    assert len(welcome.bases) == 4
    await client.say(Ready(samples=32))
    return await client.hear(Round)


def test_whole_models_send_no_activations(tmp_path: Path) -> None:
    """The hub has no layers for these activations; it refuses them and its trunk stays the same."""
    export = made(4)

    async def job() -> None:
        config = replace(config_of(tmp_path, export, count=1), held_out=None)
        async with serving(config, export) as (hub, url), raw(url) as connection:
            client = RawClient(connection)
            device = await join(config, export, url, "good", "cut", vectors(16))
            training = asyncio.create_task(device.train())
            task = await _join_raw(client, TokenFile(config.tokens).issue("evil", "whole"))
            assert task.activations == "none"
            assert task.hyper["robustness"] == 0.5
            assert Attack.of(task.hyper) == ATTACK
            parts = {
                "h.q": np.zeros((8, 4), np.int8),
                "h.scale": np.ones((1, 4), np.float32),
            }
            await client.say(activations(export, int(next(iter(task.bases))), parts=parts))
            error = await client.hear(Error)
            assert (error.code, error.field) == ("bad_message", "parts")
            report = await training
            assert len(report.rounds) == 1
            assert hub.run.records[0].devices == 1
            await device.close()

    asyncio.run(asyncio.wait_for(job(), 30))
