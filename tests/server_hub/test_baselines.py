"""Training methods in simulated jobs, against plain PyTorch loops over the same batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.tensors import Array, State, TensorSpec
from edge_sdk.training.data import Examples
from export.bases.exported import without_trunk
from export.bases.narrow import narrow
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from export.steps.losses import local_loss
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.nested import Nested
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.prepare import Client
from server_hub.simulation.simulate import Simulation
from server_hub.trunk.interface import StepInput, StepReport
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.step import TrunkTrainer
from tests.lib.decay import optimizer_of
from tests.lib.models import BUILD, CLASSES, build

EPOCHS, BATCH = 2, 16
LR, TRUNK_LR = 0.05, 0.03
MOMENTUM, DECAY = 0.9, 5e-4


def job(method: str, **changes: Any) -> Job:
    """Return a job of two devices at different cuts, 60 digits, and two rounds of two epochs."""
    settings: dict[str, Any] = {
        "model": BUILD,
        "data": DataTable("digits", train=60, test=20),
        "tiers": {"a": FleetTier(clients=1, cut=1), "b": FleetTier(clients=1, cut=3)},
        "method": method,
        "rounds": RoundsTable(count=2),
        "local": LocalTraining(EPOCHS, BATCH, {"lr": LR}),
        "trunk": TrunkTraining(hyper={"lr": TRUNK_LR}),
        "schedule": "constant",
    }
    return Job(**settings | changes)


def one(cut: int, codec: Any = "fp16") -> dict[str, FleetTier]:
    """Return a fleet of one device; pauses between batches keep the trunk from merging them."""
    return {"a": FleetTier(clients=1, cut=cut, codec=codec, gflops=0.001)}


class Run:
    """A simulated job, and the data that plain PyTorch needs to repeat it."""

    def __init__(self, job: Job, folder: Path) -> None:
        with Simulation(job, folder) as simulation:
            self.records = simulation.run()
            self.clients: dict[str, Client] = {c.name: c for c in simulation.clients}
            self.data = simulation.data.train
            self.tiers = simulation.fleet.tiers
        self.folder = folder

    def model(self) -> dict[str, Array]:
        """The trained model."""
        tensors: dict[str, Array] = load_file(self.folder / "model.safetensors")
        return tensors

    def examples(self, client: str) -> Examples:
        """Return the examples of a device."""
        rows = self.clients[client].rows
        return Examples(self.data.x[rows], self.data.y[rows])

    def order(self, client: str, number: int) -> np.random.Generator:
        """Return the generator that draws a device's batches in round ``number``."""
        return np.random.default_rng(number * 1_000_003 + sorted(self.clients).index(client))

    def batches(
        self, client: str, rng: np.random.Generator, epochs: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of a device, one epoch after the other."""
        data = self.examples(client)
        for _ in range(epochs):
            order = rng.permutation(len(data))
            for start in range(0, len(data), BATCH):
                rows = order[start : start + BATCH]
                yield torch.from_numpy(data.x[rows]).float(), torch.from_numpy(data.y[rows]).long()


def with_heads(cuts: Sequence[int]) -> SplitModel:
    """Return the job's model with auxiliary heads, as at the start of a job."""
    model = build()
    model.add_heads(cuts, torch.zeros(2, 1, 8, 8), CLASSES)
    return model


def copy_of(model: SplitModel, state: Mapping[str, Tensor]) -> SplitModel:
    """Return a model of the same form with another state."""
    result = with_heads(model.head_depths)
    result.load_state_dict(dict(state))
    return result


def sgd(
    model: nn.Module, lr: float, parameters: list[nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """Return the default optimizer of jobs, for some or all parameters of a model."""
    hyper = {"lr": lr, "momentum": MOMENTUM, "weight_decay": DECAY}
    return optimizer_of(model, hyper, parameters)


def device_parameters(model: SplitModel, cut: int) -> list[nn.Parameter]:
    """Return the parameters that a device with this cut trains."""
    layers = tuple(f"{layer}." for layer in model.client_layers(cut))
    return [p for n, p in model.named_parameters() if n.startswith(layers)]


def train_heads(
    model: SplitModel, cut: int, batches: Iterator[tuple[Tensor, Tensor]], distill: float = 0.0
) -> list[tuple[Tensor, Tensor]]:
    """Train a device on its heads; return the activations before each step, and the labels."""
    optimizer = sgd(model, LR, device_parameters(model, cut))
    seen = []
    for x, y in batches:
        h, logits = model.stem(x), []
        for depth in range(cut):
            h = model.block[depth](h)
            if str(depth + 1) in model.aux:
                logits.append(model.answer(depth + 1, h))
        loss = sum((cross_entropy(one, y) for one in logits), torch.zeros(()))
        if distill and len(logits) > 1:
            for i, own in enumerate(logits):
                for k, other in enumerate(logits):
                    if i != k:
                        p = other.detach().softmax(1)
                        apart = (p * (p.log() - own.log_softmax(1))).sum(1).mean()
                        loss = loss + distill / (len(logits) - 1) * apart
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append((h.detach(), y))
    return seen


class TrunkLoop:
    """The trunk in plain PyTorch: steps on activations that enter at one cut."""

    def __init__(self, model: SplitModel, cut: int, lr: float = TRUNK_LR) -> None:
        self.model, self.cut, self.lr = model, cut, lr
        blocks = [p for b in model.block[cut:] for p in b.parameters()]
        heads = [p for d in model.head_depths if d > cut for p in model.aux[str(d)].parameters()]
        self.parameters = [*blocks, *heads, *model.head.parameters()]
        self.optimizer = sgd(model, lr, self.parameters)

    def step(self, h: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """Make a step at ``factor`` times the rate; return the gradient of the activations."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * factor
        entering = h = h.detach().requires_grad_()
        loss = torch.zeros(())
        for depth in range(self.cut, self.model.depth):
            h = self.model.block[depth](h)
            if str(depth + 1) in self.model.aux:
                loss = loss + cross_entropy(self.model.answer(depth + 1, h), y)
        loss = loss + cross_entropy(self.model.head(h), y)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 25.0)
        self.optimizer.step()
        assert entering.grad is not None
        return entering.grad


def over_the_wire(h: Tensor, codec: str) -> Tensor:
    """Return activations or gradients as the other side unpacks them."""
    return get_codec(codec).unpack(get_codec(codec).pack(h, 1))


def mean_of(copies: Sequence[tuple[Mapping[str, Tensor], float]]) -> dict[str, Tensor]:
    """Return the weighted mean of states in float64; a state without a tensor is left out there."""
    names = {name: None for state, _ in copies for name in state}
    result = {}
    for name in names:
        held = [(state[name].detach().double(), w) for state, w in copies if name in state]
        total = sum(w for _, w in held)
        result[name] = sum((t * (w / total) for t, w in held), torch.zeros(())).float()
    return result


def layers_of(model: SplitModel, layers: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of some layers."""
    starts = tuple(f"{layer}." for layer in layers)
    return {n: t for n, t in model.state_dict().items() if n.startswith(starts)}


def assert_close(found: Mapping[str, Array], wanted: Mapping[str, Tensor], atol: float) -> None:
    """Check that names are equal, and that values differ by at most ``atol``."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_allclose(
            found[name], tensor.detach().numpy(), rtol=0, atol=atol, err_msg=name
        )


def assert_moved(found: Mapping[str, Array], start: SplitModel, layers: Sequence[str]) -> None:
    """Check that training has changed these layers by much more than the tests' tolerance."""
    for name, tensor in layers_of(start, layers).items():
        assert np.abs(found[name] - tensor.numpy()).max() > 2e-3, name


# --- averages over devices ------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_exc_is_federated_averaging_at_the_poorest_cut(tmp_path: Path, schedule: Any) -> None:
    global LR
    tiers = {"a": FleetTier(clients=2, cut=1), "b": FleetTier(clients=1, cut=3)}
    task = job("exc", tiers=tiers, schedule=schedule, data=DataTable("digits", train=61, test=20))
    run = Run(task, tmp_path / "run")
    start = with_heads([1])
    state: dict[str, Tensor] = dict(start.state_dict())
    full = LR
    try:
        for number in (1, 2):
            if schedule == "cosine":
                LR = full * 0.5 * (1 + math.cos(math.pi * (number - 1) / 2))
            copies = []
            for client in sorted(run.clients):
                model = copy_of(start, state)
                train_heads(model, 1, run.batches(client, run.order(client, number), EPOCHS))
                copies.append((layers_of(model, model.client_layers(1)), len(run.examples(client))))
            state |= mean_of(copies)
    finally:
        LR = full
    assert len({n for _, n in copies}) > 1, "devices of different weight"
    assert_close(run.model(), state, 2e-5)
    assert_moved(run.model(), start, ["stem", "block.0", "aux.1"])


def fedavg_whole(
    run: Run, members: Callable[[int], Sequence[str]], rounds: int
) -> dict[str, Tensor]:
    """Run federated averaging of the whole model; names are those of a model without a trunk."""
    state: dict[str, Tensor] = dict(build().state_dict())
    for number in range(1, rounds + 1):
        copies: list[tuple[Mapping[str, Tensor], float]] = []
        for order, client in enumerate(sorted(members(number))):
            model = build()
            model.load_state_dict(state)
            optimizer = sgd(model, LR)
            rng = np.random.default_rng(number * 1_000_003 + order)
            for x, y in run.batches(client, rng, EPOCHS):
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            copies.append((model.state_dict(), len(run.examples(client))))
        state = mean_of(copies)
    return {n.replace("head.", "aux.4.") if n.startswith("head.") else n: t
            for n, t in state.items()}  # fmt: skip


def test_fedavg_averages_the_whole_model(tmp_path: Path) -> None:
    run = Run(job("fedavg"), tmp_path / "run")
    assert_close(run.model(), fedavg_whole(run, lambda number: list(run.clients), 2), 2e-5)
    assert_moved(run.model(), build(), ["stem", "block.3"])
    assert run.records[-1].accuracy.keys() == {"a", "b"}
    assert "activations" not in run.records[-1].bytes


def test_centralized_is_sgd_on_all_the_data(tmp_path: Path) -> None:
    run = Run(job("centralized"), tmp_path / "run")
    assert len(run.clients) == 1
    assert len(run.examples("server-1")) == 60
    assert_close(run.model(), fedavg_whole(run, lambda number: ["server-1"], 2), 2e-5)


def test_centralized_sees_as_many_samples_in_a_round_as_the_others_devices(tmp_path: Path) -> None:
    tiers = {"a": FleetTier(clients=6, cut=1)}
    task = job("centralized", tiers=tiers, rounds=RoundsTable(count=2, per_round=2))
    run = Run(task, tmp_path / "run")
    assert {name: len(c.rows) for name, c in run.clients.items()} == {
        f"server-{i}": 20 for i in (1, 2, 3)
    }
    held = np.concatenate([c.rows for c in run.clients.values()])
    assert sorted(held.tolist()) == list(range(60)), "all data, each row once"
    assert [r.devices for r in run.records] == [1, 1]


def test_depthfl_averages_each_layer_over_its_holders_and_distils(tmp_path: Path) -> None:
    run = Run(job("depthfl"), tmp_path / "run")
    start = with_heads([1, 3])
    state: dict[str, Tensor] = dict(start.state_dict())
    for number in (1, 2):
        copies = []
        for client, cut in (("a-1", 1), ("b-1", 3)):
            model = copy_of(start, state)
            batches = run.batches(client, run.order(client, number), EPOCHS)
            train_heads(model, cut, batches, distill=1.0)
            copies.append((layers_of(model, model.client_layers(cut)), len(run.examples(client))))
        state |= mean_of(copies)
    assert_close(run.model(), state, 2e-5)
    assert_moved(run.model(), start, ["stem", "block.2", "aux.1", "aux.3"])
    undistilled = local_loss(torch.zeros(2, 3, CLASSES), torch.zeros(3).long())
    assert undistilled == pytest.approx(2 * math.log(CLASSES))
    for name, tensor in layers_of(start, ["block.3", "head"]).items():
        np.testing.assert_array_equal(run.model()[name], tensor.numpy(), "nobody holds it")


# --- nested widths --------------------------------------------------------------------------------


def test_nested_elements_are_the_mean_over_those_who_hold_them() -> None:
    initial: State = {
        "stem.weight": np.full((4, 2), 100, np.float32),
        "head.bias": np.full(3, 100, np.float32),
        "block.0.weight": np.full((2, 2), 100, np.float32),
    }
    nested = Nested(initial)

    def held(rows: int, columns: int, value: float) -> State:
        return {
            "stem.weight": np.full((rows, columns), value, np.float32),
            "head.bias": np.full(3, value, np.float32),
        }

    nested.commit(
        [
            DeviceUpdate("wide", held(3, 2, 6.0), 10),
            DeviceUpdate("narrow", held(1, 1, 1.0), 30),
            DeviceUpdate("flat", held(2, 1, 0.0), 20),
        ],
        [],
    )
    state = nested.trunk_state()
    np.testing.assert_allclose(
        state["stem.weight"],
        [
            [(60 + 30) / 60, 6.0],
            [60 / 30, 6.0],
            [6.0, 6.0],
            [100.0, 100.0],
        ],
        rtol=1e-6,
    )
    np.testing.assert_allclose(state["head.bias"], np.full(3, 90 / 60), rtol=1e-6)
    np.testing.assert_array_equal(state["block.0.weight"], initial["block.0.weight"])
    assert {t.dtype for t in state.values()} == {np.dtype(np.float32)}
    own = nested.device_state([TensorSpec("stem.weight", "float32", (2, 1))])
    np.testing.assert_array_equal(own["stem.weight"], state["stem.weight"][:2, :1])
    assert own["stem.weight"].flags.c_contiguous


def test_fjord_devices_hold_the_leading_part_and_only_that_changes(tmp_path: Path) -> None:
    tiers = {"a": FleetTier(clients=2, cut=2), "b": FleetTier(clients=1, cut=4)}
    task = job("fjord", model="server_hub.demo.digits:build", tiers=tiers,
               rounds=RoundsTable(count=1))  # fmt: skip
    task = replace(task, local=LocalTraining(1, BATCH, {"lr": LR, "weight_decay": 0.0}))
    from server_hub.demo import digits

    with Simulation(task, tmp_path / "run") as simulation:
        start = without_trunk(digits.build())
        shapes = {}
        for tier in tiers:
            manifest = simulation.index.manifest(tier)
            shapes[tier] = {spec.name: tuple(spec.shape) for spec in manifest.exchanged()}
        whole = {n: tuple(t.shape) for n, t in start.state_dict().items()}
        assert shapes["a"].keys() == shapes["b"].keys() == whole.keys()
        own = {tier: int(shapes[tier]["stem.0.weight"][0]) / 8 for tier in tiers}
        assert own["a"] < own["b"] <= 1, "the poorer tier is narrower"
        example = torch.zeros(2, 1, 8, 8)
        for tier, width in own.items():
            part = without_trunk(narrow(digits.build(), width, example)).state_dict()
            assert shapes[tier] == {n: tuple(t.shape) for n, t in part.items()}
        simulation.run()
    after = load_file(tmp_path / "run" / "model.safetensors")
    for name, tensor in start.state_dict().items():
        held = np.zeros(tensor.shape, bool)
        held[tuple(slice(n) for n in shapes["b"][name])] = True
        changed = after[name] != tensor.numpy()
        assert not changed[~held].any(), f"{name}: nobody holds this"
        assert changed[held].any(), name


# --- with a trunk ---------------------------------------------------------------------------------


def test_splitfed_with_one_device_is_sgd_on_the_uncut_model(tmp_path: Path) -> None:
    run = Run(job("splitfed-v1", tiers=one(2), trunk=TrunkTraining(hyper={"lr": LR})),
              tmp_path / "run")  # fmt: skip
    start = with_heads([2])
    uncut = copy_of(start, start.state_dict())
    for number in (1, 2):
        optimizer = sgd(
            uncut, LR, [p for n, p in uncut.named_parameters() if not n.startswith("aux.")]
        )
        for x, y in run.batches("a-1", run.order("a-1", number), EPOCHS):
            optimizer.zero_grad()
            cross_entropy(uncut(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    found, wanted = run.model(), uncut.state_dict()
    names = list(wanted)
    moved = np.concatenate([(wanted[n] - start.state_dict()[n]).numpy().ravel() for n in names])
    error = np.concatenate([(found[n] - wanted[n].numpy()).ravel() for n in names])
    # In half precision, with steps of 6e-8, gradients of means over rows and positions are small.
    assert np.linalg.norm(error) <= 0.1 * np.linalg.norm(moved)
    assert_moved(run.model(), start, ["stem", "block.0", "block.3", "head"])
    for name, tensor in layers_of(start, ["aux.2"]).items():
        np.testing.assert_array_equal(run.model()[name], tensor.numpy(), "the heads rest")


def returned_batch(
    model: SplitModel, optimizer: torch.optim.SGD, trunk: TrunkLoop, x: Tensor, y: Tensor
) -> None:
    """Send a batch up and its gradient down, packed in half precision; both sides make a step."""
    h = model.segment(x, trunk.cut)
    gradient = trunk.step(over_the_wire(h, "fp16"), y)
    optimizer.zero_grad()
    h.backward(over_the_wire(gradient, "fp16"))  # type: ignore[no-untyped-call]
    optimizer.step()


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v2"])
def test_splitfed_with_two_devices(tmp_path: Path, method: str) -> None:
    """The devices alternate, the first is a little faster; the trunk is one, or one per device."""
    first = FleetTier(clients=1, cut=2, codec="fp16", gflops=0.00101)
    tiers = {"a": first, "b": replace(first, gflops=0.001)}
    run = Run(job(method, tiers=tiers, rounds=RoundsTable(1)), tmp_path / "run")
    clients = ["a-1", "b-1"]
    start = with_heads([2])
    models = {c: copy_of(start, start.state_dict()) for c in clients}
    batches = {c: list(run.batches(c, run.order(c, 1), EPOCHS)) for c in clients}
    below = ["stem", "block.0", "block.1"]
    optimizers = {
        c: sgd(m, LR, [p for n, p in m.named_parameters() if n.startswith(("stem.", "block.0.",
                "block.1."))])
        for c, m in models.items()
    }  # fmt: skip
    if method == "splitfed-v1":
        trunks = {c: TrunkLoop(copy_of(start, start.state_dict()), 2) for c in clients}
    else:
        trunks = dict.fromkeys(clients, TrunkLoop(copy_of(start, start.state_dict()), 2))
    assert len(batches["a-1"]) == len(batches["b-1"])
    for pair in zip(*(batches[c] for c in clients), strict=True):
        for client, (x, y) in zip(clients, pair, strict=True):
            returned_batch(models[client], optimizers[client], trunks[client], x, y)
    sizes = {c: len(run.examples(c)) for c in clients}
    wanted = dict(start.state_dict())
    wanted |= mean_of([(layers_of(models[c], below), sizes[c]) for c in clients])
    above = ["block.2", "block.3", "head"]
    wanted |= mean_of([(layers_of(trunks[c].model, above), sizes[c]) for c in clients])
    assert_close(run.model(), wanted, 1e-4)
    assert_moved(run.model(), start, [*below, *above])


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_merged_fedsplitx_trains_the_trunk_on_the_activations_of_the_first_epoch(
    tmp_path: Path, codec: Any
) -> None:
    run = Run(job("fedsplitx", tiers=one(2, codec)), tmp_path / "run")
    start = with_heads([2])
    state: dict[str, Tensor] = dict(start.state_dict())
    for number in (1, 2):
        model = copy_of(start, state)
        batches = run.batches("a-1", run.order("a-1", number), EPOCHS)
        seen = train_heads(model, 2, batches)
        trunk = TrunkLoop(copy_of(start, state), 2)
        for h, y in seen[: math.ceil(60 / BATCH)]:
            trunk.step(over_the_wire(h, codec), y)
        state |= layers_of(model, model.client_layers(2))
        state |= layers_of(trunk.model, ["block.2", "block.3", "head"])
    # A value on the edge between two codes may be rounded to either.
    assert_close(run.model(), state, 5e-5 if codec == "fp16" else 5e-4)
    assert_moved(run.model(), start, ["stem", "block.1", "aux.2", "block.3", "head"])


def test_merged_fedsplitx_averages_what_devices_and_trunk_have_both_trained(
    tmp_path: Path,
) -> None:
    """Rows of the poorer device train blocks on the trunk that the richer device trains itself."""
    tiers = {
        "a": FleetTier(clients=1, cut=1, codec="fp16", gflops=0.001),
        "b": FleetTier(clients=1, cut=3, codec="fp16", gflops=1e-6),
    }
    task = job("fedsplitx", tiers=tiers, rounds=RoundsTable(1, deadline_s=1e9))
    run = Run(task, tmp_path / "run")
    start = with_heads([1, 3])
    trunk_model = copy_of(start, start.state_dict())
    copies: list[tuple[Mapping[str, Tensor], float]] = []
    weights: dict[str, int] = {}
    everything = [*trunk_model.parameters()]
    optimizer = sgd(trunk_model, TRUNK_LR)
    for client, cut in (("a-1", 1), ("b-1", 3)):  # the poorer finishes before the richer sends
        model = copy_of(start, start.state_dict())
        seen = train_heads(model, cut, run.batches(client, run.order(client, 1), EPOCHS))
        rows = len(run.examples(client))
        copies.append((layers_of(model, model.client_layers(cut)), rows))
        loop = TrunkLoop(trunk_model, cut)
        loop.optimizer = optimizer
        for h, y in seen[: math.ceil(rows / BATCH)]:
            for p in everything:
                p.grad = None
            loop.step(over_the_wire(h, "fp16"), y)
        above = [f"block.{i}" for i in range(cut, 4)] + [f"aux.{d}" for d in (1, 3) if d > cut]
        for layer in [*above, "head"]:
            weights[layer] = weights.get(layer, 0) + rows
    copies += [(layers_of(trunk_model, [layer]), rows) for layer, rows in weights.items()]
    assert_close(run.model(), mean_of(copies), 1e-4)
    assert weights["block.3"] == 60


def test_accsfl_averages_a_copy_of_the_trunk_per_device(tmp_path: Path) -> None:
    tiers = {
        "a": FleetTier(clients=2, cut=2, codec="fp16", gflops=0.001),
        "b": FleetTier(clients=1, cut=3, codec="fp16", gflops=0.002),
    }
    task = job("accsfl", tiers=tiers, data=DataTable("digits", train=61, test=20))
    run = Run(task, tmp_path / "run")
    start = with_heads([2])
    state: dict[str, Tensor] = dict(start.state_dict())
    above = ["block.2", "block.3", "head"]
    for number in (1, 2):
        devices, trunks = [], []
        for client in sorted(run.clients):
            model, rows = copy_of(start, state), len(run.examples(client))
            seen = train_heads(model, 2, run.batches(client, run.order(client, number), EPOCHS))
            trunk = TrunkLoop(copy_of(start, state), 2)
            for h, y in seen[: math.ceil(rows / BATCH)]:
                trunk.step(over_the_wire(h, "fp16"), y)
            devices.append((layers_of(model, model.client_layers(2)), rows))
            trunks.append((layers_of(trunk.model, above), rows))
        state |= mean_of(devices) | mean_of(trunks)
    assert len({rows for _, rows in devices}) > 1, "devices of different weight"
    assert_close(run.model(), state, 5e-5)
    assert_moved(run.model(), start, ["stem", "aux.2", *above])


def test_ampere_uploads_once_and_then_trains_the_trunk_with_a_falling_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three rounds of two epochs are six passes over the activations; the first is on arrival.

    The loop of the trunk takes the activations that have arrived: the two runtimes round a few of
    them to neighbours in float16, and 24 steps through ReLUs make that larger than any bound.
    """
    arrived: list[Tensor] = []
    train = TrunkTrainer.step

    def step(self: TrunkTrainer, inputs: Sequence[StepInput]) -> StepReport:
        for one in inputs:
            parts = {n: torch.from_numpy(np.array(part)) for n, part in one.batch.parts.items()}
            arrived.append(get_codec("fp16").unpack(parts))
        return train(self, inputs)

    monkeypatch.setattr(TrunkTrainer, "step", step)
    task = job("ampere", tiers=one(2), rounds=RoundsTable(3),
               trunk=TrunkTraining(hyper={"lr": TRUNK_LR}, max_rows=BATCH))  # fmt: skip
    run = Run(task, tmp_path / "run")
    start = with_heads([2])
    model = copy_of(start, start.state_dict())
    for number in (1, 2):
        train_heads(model, 2, run.batches("a-1", run.order("a-1", number), EPOCHS))
    device = layers_of(model, model.client_layers(2))
    pooled = []
    for h, (x, y) in zip(arrived, run.batches("a-1", run.order("a-1", 3)), strict=True):
        with torch.no_grad():
            wire = over_the_wire(model.segment(x, 2), "fp16")
        torch.testing.assert_close(h, wire, rtol=2**-10, atol=1e-6)
        pooled.append((h, y))
    trunk = TrunkLoop(copy_of(start, start.state_dict()), 2)
    for h, y in pooled:
        trunk.step(h, y)
    rng = np.random.default_rng(3)
    for done in range(1, 6):
        factor = 0.5 * (1 + math.cos(math.pi * done / 6))
        for i in rng.permutation(len(pooled)):
            h, y = pooled[i]
            trunk.step(h, y, factor)
    wanted = device | layers_of(trunk.model, ["block.2", "block.3", "head"])
    assert_close(run.model(), wanted, 1e-4)
    assert_moved(run.model(), start, ["stem", "aux.2", "block.3", "head"])
    assert [r.local_loss is None for r in run.records] == [False, False, True]
    assert [r.trunk_loss is None for r in run.records] == [True, True, False]
    assert "activations" not in run.records[1].bytes
    for path in ("device_alone",):
        assert run.records[1].accuracy["a"][path] == run.records[2].accuracy["a"][path]


def test_ampere_asks_every_device_for_its_activations(tmp_path: Path) -> None:
    tiers = {"a": FleetTier(clients=5, cut=2)}
    task = job("ampere", tiers=tiers, rounds=RoundsTable(count=4, per_round=2))
    run = Run(task, tmp_path / "run")
    assert [r.devices for r in run.records] == [2, 2, 2, 5]
    before, last = run.records[-2:]
    flop = last.costs["trunk_flop"] - before.costs["trunk_flop"]
    from server_hub.simulation.trunk import flop_above

    per_row = flop_above(with_heads([2]), [2], torch.zeros(2, 1, 8, 8))[2]
    passes = round(4 * EPOCHS * 2 / 5)
    assert flop == 3 * per_row * 60 * passes
