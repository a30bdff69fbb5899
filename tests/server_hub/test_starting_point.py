"""A job that goes on with the model of a finished one: hub and simulation, all kinds of sources."""

from __future__ import annotations

import asyncio
import copy
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.cli.main import main
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import Blob, BlobGet
from edge_sdk.protocol.tensors import Array, State
from export.adapters_lora.lora import Lora, add_lora
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import WEIGHTS, SplitModel
from export.tensor_names import is_slot
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.fleet import JobOutline
from server_hub.methods.method import Method
from server_hub.methods.registry import simulated_methods
from server_hub.methods.settings import LocalTraining, MethodConfig
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation.checkpoint import Checkpoint
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable, SplitMixTable
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RoundRecord, RunFolder, read_records
from server_hub.storage.starting_point import CHECKPOINT, StartingPoint, start_from
from server_hub.trunk.settings import TrunkTraining
from tests.lib import adapted_gpt2
from tests.lib.commands import refusal
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.models import BUILD, build
from tests.lib.simulations import simulate
from tests.lib.tasks import run

TIERS = {"small": FleetTier(clients=2, cut=1), "large": FleetTier(clients=1, cut=2)}
RATE = {"lr": 0.05, "momentum": 0.9}
STILL = {"lr": 0.0, "momentum": 0.0}
"""Training that changes nothing: the evaluation after a round is that of its start."""


def build_bytes() -> SplitModel:
    """Return a GPT-2 of three small blocks for bytes, with adapters."""
    config = transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=258, n_positions=16, bos_token_id=1,
        eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    return add_lora(from_transformers(config), Lora(rank=4), "gpt2")


def job(method: str, folder: Path, **changes: Any) -> Job:
    """Return a job of three devices and one round."""
    given: dict[str, Any] = {
        "model": BUILD,
        "data": DataTable("digits", train=60, test=40),
        "tiers": TIERS,
        "method": method,
        "rounds": RoundsTable(count=1),
        "local": LocalTraining(batch_size=8, hyper=RATE),
        "trunk": TrunkTraining(hyper=RATE),
    }
    if method.startswith("splitft"):
        (folder / "some.txt").write_text("the quick brown fox jumps over the lazy dog\n\n" * 12)
        data = DataTable(str(folder / "some.txt"), train=8, test=4, length=12)
        given |= {"model": f"{__name__}:build_bytes", "data": data}
    if method == "splitmix":
        given |= {
            "model": "tests.server_hub.test_splitmix:build_wide",
            "mix": SplitMixTable(bases=2),
            "tiers": {"a": FleetTier(clients=2, cut=1), "b": FleetTier(clients=1, cut=3)},
        }
    return Job(**given | changes)


def still(task: Job, **changes: Any) -> Job:
    """Return a job of one round that trains nothing."""
    return replace(
        task,
        rounds=RoundsTable(count=1),
        local=replace(task.local, hyper=STILL),
        trunk=replace(task.trunk, hyper=STILL),
        **changes,
    )


def models_in(folder: Path) -> dict[str, State]:
    """Return the saved models of a run, by file name."""
    return {path.name: load_file(path) for path in sorted(folder.glob("model*.safetensors"))}


def assert_equal(
    found: Mapping[str, Array], wanted: Mapping[str, Array], atol: float = 0.0
) -> None:
    """Check that states are equal bit for bit, or within ``atol``."""
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=atol, err_msg=name)


# --- simulations ----------------------------------------------------------------------------------

OTHERS = sorted(simulated_methods().keys() - {"fedsplitx", "fjord", "splitft-u"})
"""Methods for this file's models: FjORD takes other widths, and U-shaped SplitFT a trained head."""
METHODS = ["fedsplitx", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
"""Names of methods; other quick tests have slots, adapters, both stores, and base networks."""


@pytest.mark.parametrize("method", METHODS)
def test_a_job_starts_where_another_has_ended(tmp_path: Path, method: str) -> None:
    """A round that trains nothing has accuracy and model of the finished job, bit for bit.

    SplitFT averages products of adapters, so that a round rounds them.
    """
    task, first = job(method, tmp_path), tmp_path / "first"
    last = simulate(task, first)[-1]
    models, rounded = models_in(first), 1e-6 if method.startswith("splitft") else 0.0
    for kind, slots in (("checkpoint", "optimizer slots taken over"), ("models", "start at zero")):
        lines: list[str] = []
        run_folder = tmp_path / kind
        with Simulation(still(task, start_from=first), run_folder) as simulation:
            (record,) = simulation.run(on_start=lines.append)
        assert (record.round, record.mixed) == (1, last.mixed)
        for tier, paths in last.accuracy.items():
            assert record.accuracy[tier] == pytest.approx(paths, rel=rounded, abs=0)
        found = models_in(run_folder)
        assert found.keys() == models.keys()
        for name, wanted in models.items():
            assert_equal(found[name], wanted, rounded)
        assert lines[0].startswith(f"started from {first}")
        assert (slots in lines[0]) == method.startswith("splitft")
        (first / CHECKPOINT).unlink(missing_ok=True)


def test_more_rounds_with_a_new_device_and_new_data(tmp_path: Path) -> None:
    """A tier with a cut of its own joins; it gets a new head, and the run can be interrupted."""
    task = job("fedsplitx", tmp_path)
    simulate(task, tmp_path / "first")
    more = replace(
        task,
        rounds=RoundsTable(count=2),
        start_from=tmp_path / "first",
        data=DataTable("digits", train=120, test=40),
        tiers=TIERS | {"new": FleetTier(clients=1, cut=3)},
    )
    lines: list[str] = []
    with Simulation(more, tmp_path / "second") as simulation:
        records = simulation.run(on_start=lines.append)
    assert "aux.3 start as exported" in lines[0]
    assert [(r.round, r.devices) for r in records] == [(1, 4), (2, 4)]
    after = load_file(tmp_path / "second" / "model.safetensors")
    before = load_file(tmp_path / "first" / "model.safetensors")
    assert not np.array_equal(after["stem.weight"], before["stem.weight"])
    shutil.rmtree(tmp_path / "first")  # a run that resumes reads its own checkpoint
    with Simulation(more, tmp_path / "second") as simulation:
        assert simulation.run(on_start=lines.append) == records
    assert len(lines) == 1


def test_optimizer_slots_and_ranks_come_from_the_checkpoint(tmp_path: Path) -> None:
    """The state that the next job starts from is the checkpoint, slots included."""
    task = job("splitft", tmp_path)
    simulate(task, tmp_path / "first")
    last = Checkpoint.read(tmp_path / "first")
    assert last is not None
    assert any(is_slot(n) and t.any() for n, t in last.stores["all"].items())
    model = build_bytes()
    model.add_heads([1, 2], torch.zeros(2, 12, dtype=torch.int64), 258)
    method = composed("splitft", model, "sgd")
    start_from(tmp_path / "first" / CHECKPOINT, method, model, {"small": 1, "large": 2})
    assert_equal(method.aggregation.stores()["all"], last.stores["all"])
    method = composed("splitft", model, "adamw")
    started = start_from(tmp_path / "first", method, model, {"small": 1, "large": 2})
    assert "of another optimizer" in str(started)
    slots = [t for n, t in method.aggregation.stores()["all"].items() if is_slot(n)]
    assert slots
    assert not any(t.any() for t in slots)


def test_a_simulation_that_cannot_start_writes_nothing(tmp_path: Path) -> None:
    task = job("fedsplitx", tmp_path, start_from=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="nowhere"):
        simulate(task, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_has_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toml = tmp_path / "job.toml"
    toml.write_text(
        f'model = "{BUILD}"\n[data]\nsource = "digits"\ntrain = 60\ntest = 40\n'
        "[rounds]\ncount = 1\n[tiers.small]\nclients = 2\ncut = 1\n"
    )
    monkeypatch.chdir(tmp_path)

    for options in (["--run", "first"], ["--run", "second", "--start-from", "first"]):
        with pytest.raises(SystemExit) as stopped:
            main(["simulate", str(toml), *options])
        assert stopped.value.code == 0
    assert "taken over" in capsys.readouterr().out
    report = (tmp_path / "second" / "report.md").read_text()
    assert f"Started from {tmp_path / 'first'}." in report
    told = refusal(capsys, "simulate", str(toml), "--run", "second", "--start-from", "second")
    assert "--start-from second" in told


# --- the hub --------------------------------------------------------------------------------------


async def finished_job(tmp_path: Path, bundles: BundleIndex) -> Path:
    """Run a job of two rounds with one device; return its run folder."""
    config = hub_config(tmp_path, bundles)
    token = TokenFile(config.tokens).issue("phone")
    async with (
        running_hub(config) as (_, url),
        await Device.connect(
            url, token=token, tier="small", data=examples(40), cache=tmp_path / "cache"
        ) as device,
    ):
        await device.train()
    return config.run


def test_a_hub_goes_on_with_a_finished_job(tmp_path: Path, bundles: BundleIndex) -> None:
    """Devices download the saved state bit for bit; then a new device trains with the old one."""

    async def test() -> None:
        first = await finished_job(tmp_path, bundles)
        saved = load_file(first / "model.safetensors")
        config = hub_config(
            tmp_path,
            bundles,
            run=tmp_path / "second",
            start_from=first,
            rounds=RoundRules(count=2, min_devices=2),
        )
        tokens = TokenFile(config.tokens)
        async with running_hub(config) as (hub, url):
            for tier, manifest in hub.manifests.items():
                state = hub.gateway.blobs.offer(tier).state
                assert state is not None
                piece = hub.gateway.blobs.piece(BlobGet(hash=state, offset=0))
                assert isinstance(piece, Blob)
                assert len(piece.data) == piece.size
                wanted = {spec.name: saved[spec.name] for spec in manifest.exchanged()}
                assert_equal(unpack_tensors(piece.data), wanted)
            devices = [
                await Device.connect(
                    url,
                    token=tokens.issue(name),
                    tier=tier,
                    data=examples(40, seed=seed),
                    cache=tmp_path / "cache",
                )
                for name, tier, seed in (("phone", "small", 0), ("laptop", "large", 9))
            ]
            async with devices[0], devices[1]:
                await asyncio.gather(*(device.train() for device in devices))
        records = read_records(config.run)
        assert [(r.round, r.devices) for r in records] == [(1, 2), (2, 2)]

    run(test(), 60)


def test_a_hub_refuses_the_same_folder_and_says_what_to_do(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    config = hub_config(tmp_path, bundles)
    config.run.mkdir()
    (config.run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match=f"--start-from {config.run}"):
        Hub(config, build())


def test_the_command_of_a_hub_refuses_what_does_not_fit(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence names the tensor and both shapes; no run folder appears."""
    weights = load_file(bundles.folder / WEIGHTS)
    name = next(n for n in weights if n.startswith("block.1"))
    weights[name] = np.zeros((3, 7), np.float32)
    save_file(weights, tmp_path / "other.safetensors")
    TokenFile(tmp_path / "tokens.toml").issue("phone")
    told = refusal(
        capsys, "hub", "--bundles", str(bundles.folder), "--run", str(tmp_path / "run"),
        "--tokens", str(tmp_path / "tokens.toml"),
        "--start-from", str(tmp_path / "other.safetensors"),
    )  # fmt: skip
    shape = list(load_file(bundles.folder / WEIGHTS)[name].shape)
    assert f"{name} is float32 [3, 7] there and float32 {shape} in the model" in told
    assert not (tmp_path / "run").exists()


# --- what fits, and what does not -----------------------------------------------------------------


def composed(name: str, model: SplitModel, optimizer: str = "sgd") -> Method:
    """Compose a method for a model."""
    initial = {n: t.detach().numpy().copy() for n, t in model.trained().items()}
    return simulated_methods()[name].compose(initial, JobOutline(2, optimizer=optimizer))


def with_heads(cuts: list[int], seed: int = 0) -> SplitModel:
    """Return a small model with heads at the cuts."""
    torch.manual_seed(seed)
    model = build()
    model.add_heads(cuts, torch.zeros(2, 1, 8, 8), 10)
    return model


def saved(tensors: Mapping[str, Array], path: Path) -> Path:
    """Write tensors to a file."""
    save_file(dict(tensors), path)
    return path


def shaken(model: SplitModel) -> State:
    """Return the tensors of a model, each changed."""
    return {n: t.detach().numpy() + np.float32(0.5) for n, t in model.tensors().items()}


def test_a_folder_of_bundles_and_a_file_are_weights(tmp_path: Path) -> None:
    model = with_heads([1, 2])
    wanted = shaken(model)
    (tmp_path / "bundles").mkdir()
    saved(wanted, tmp_path / "bundles" / WEIGHTS)
    for path in (tmp_path / "bundles", tmp_path / "bundles" / WEIGHTS):
        method = composed("fedsplitx", model)
        started = start_from(path, method, model, {"small": 1, "large": 2})
        assert (started.tensors, started.slots) == (len(wanted), 0)
        assert_equal(method.aggregation.trunk_state(), wanted)


def test_a_head_that_no_tier_needs_is_left_out(tmp_path: Path) -> None:
    path = saved(shaken(with_heads([1, 2, 3])), tmp_path / "model.safetensors")
    model = with_heads([1])
    method = composed("fedsplitx", model)
    started = start_from(path, method, model, {"small": 1})
    assert list(started.left) == ["aux.2", "aux.3"]
    assert method.aggregation.trunk_state().keys() == model.trained().keys()


def without(tensors: State, name: str) -> State:
    """Return a state that lacks a tensor."""
    return {n: t for n, t in tensors.items() if n != name}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: without(t, "stem.weight"), "stem.weight is nothing there and float32"),
        (
            lambda t: t | {"block.9.weight": np.zeros((2, 3), np.float32)},
            r"block.9.weight is float32 \[2, 3\] there and nothing in the model",
        ),
        (
            lambda t: t | {"stem.weight": t["stem.weight"].astype(np.float16)},
            "stem.weight is float16",
        ),
        (
            lambda t: t | {"stem.weight": t["stem.weight"] * np.float32("nan")},
            "not finite",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    tmp_path: Path, change: Any, told: str
) -> None:
    model = with_heads([1, 2])
    wanted = shaken(model)
    assert "stem.weight" in wanted
    path = saved(change(wanted), tmp_path / "model.safetensors")
    method = composed("fedsplitx", model)
    before = dict(method.aggregation.trunk_state())
    with pytest.raises(ConfigError, match=told):
        start_from(path, method, model, {"small": 1, "large": 2})
    assert_equal(method.aggregation.trunk_state(), before)


def test_adapters_of_another_base_are_refused(tmp_path: Path) -> None:
    """The frozen weights are in the bundles; adapters fit only those that they were trained on."""
    model = adapted_gpt2.build()
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(p for p in other.parameters() if not p.requires_grad).add_(1.0)
    other.save(tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match="is frozen"):
        start_from(tmp_path, composed("splitft", model), model, {"a": 1})


def test_adapters_of_a_lower_rank_fit_and_of_a_higher_rank_do_not(tmp_path: Path) -> None:
    """A store of SplitFT holds adapters of any rank; devices get theirs with the same product."""
    low, high = adapted_gpt2.build(rank=2), adapted_gpt2.build(rank=4)
    low.save(tmp_path / "low.safetensors")
    high.save(tmp_path / "high.safetensors")
    method = composed("splitft", high)
    start_from(tmp_path / "low.safetensors", method, high, {"a": 1})
    state, old = method.aggregation.path_state(high, 1), low.tensors()
    pairs = [n for n in state if ".lora_A." in n and not is_slot(n)]
    assert pairs
    for a in pairs:
        b = a.replace("lora_A", "lora_B")
        product = old[b].detach().numpy() @ old[a].detach().numpy() / 2
        np.testing.assert_allclose(state[b] @ state[a] / 4, product, atol=1e-6)
    with pytest.raises(ConfigError, match=r"lora_.* is float32 .*4.* there"):
        start_from(tmp_path / "high.safetensors", composed("splitft", low), low, {"a": 1})


def test_a_single_model_does_not_become_base_networks(tmp_path: Path) -> None:
    """One base for all bases would make them equal; the run folder is needed."""
    task = job("splitmix", tmp_path)
    simulate(task, tmp_path / "first")
    more = replace(task, start_from=tmp_path / "first" / "model.base-0.safetensors")
    with pytest.raises(ConfigError, match="base 0, base 1"):
        simulate(more, tmp_path / "second")
    with pytest.raises(ConfigError, match="base 0, base 1"):
        simulate(job("fedsplitx", tmp_path, start_from=tmp_path / "first"), tmp_path / "second")


@pytest.mark.parametrize("damage", ["cut off", "empty", "a text"])
def test_a_damaged_source_is_refused(tmp_path: Path, damage: str) -> None:
    model = with_heads([1])
    path = saved(shaken(model), tmp_path / "model.safetensors")
    data = path.read_bytes()
    path.write_bytes({"cut off": data[:-9], "empty": b"", "a text": b"thesis" * 9}[damage])
    for source in (path, tmp_path):
        with pytest.raises(ConfigError, match="cannot start from"):
            start_from(source, composed("fedsplitx", model), model, {"small": 1})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="there is no model in"):
        start_from(tmp_path / "empty", composed("fedsplitx", model), model, {"small": 1})


def test_the_order_of_bases_is_read_from_a_record_of_a_round(tmp_path: Path) -> None:
    """One that is damaged is refused in a sentence; a single model needs none."""
    for name in ("base-0", "base-1"):
        saved(shaken(with_heads([1])), tmp_path / f"model.{name}.safetensors")
    record = RoundRecord(1, 0.0, 0.0, 1, {}, None, None, None, 0, {}, {}, order=[1, 0])
    run_folder = RunFolder(tmp_path)
    run_folder.add(record)
    run_folder.write()
    assert StartingPoint.read(tmp_path, []).order == [1, 0]
    (tmp_path / "metrics.jsonl").write_text("garbage\n")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1, is no record of a round"):
        StartingPoint.read(tmp_path, [])
    saved(shaken(with_heads([1])), tmp_path / "model.safetensors")
    assert StartingPoint.read(tmp_path, []).models.keys() == {None}


def test_the_papers_form_is_a_setting_of_the_hub(tmp_path: Path, bundles: BundleIndex) -> None:
    """A single model starts both of its stores; its models per tier start no merged store."""
    weights = load_file(bundles.folder / WEIGHTS)
    paper = MethodConfig(form="paper")
    config = hub_config(tmp_path, bundles, method=paper, start_from=bundles.folder)
    stores = Hub(config, build()).method.aggregation.stores()
    for store in stores.values():
        assert_equal(store, {n: weights[n] for n in store})
    for tier in bundles.tiers:
        saved(weights, tmp_path / f"model.{tier}.safetensors")
    Hub(replace(config, run=tmp_path / "2", start_from=tmp_path), build())
    merged = hub_config(tmp_path, bundles, run=tmp_path / "3", start_from=tmp_path)
    with pytest.raises(ConfigError, match="same method"):
        Hub(merged, build())
