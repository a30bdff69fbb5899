"""A token table that stem and head share is trained on both sides of a cut as without a cut."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.batch import HeadGradient
from edge_sdk.protocol.tensors import Array, State, TensorSpec
from export.adapters_lora.lora import Lora, add_lora
from export.cutting.split_model import ClientSegment, SplitModel
from export.cutting.tied import tied_tensors, tied_to_head
from export.packing import codecs as packing
from export.steps.client_steps import ClientSteps
from export.steps.fused import fuse
from export.steps.optimizers import get_optimizer
from export.steps.returned import activate, backward
from export.steps.step import Step
from export.steps.train import train
from export.steps.u_shaped import finish
from server_hub.aggregation.adapters import MergedAdapters
from server_hub.aggregation.interface import Aggregation, DeviceUpdate
from server_hub.aggregation.merged import Merged
from server_hub.aggregation.separate import Separate
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.simulate import Simulation
from server_hub.trunk.interface import TrunkCopy, TrunkPlan
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.step import TrunkTrainer
from tests.lib.codecs import Double
from tests.lib.decay import optimizer_of
from tests.lib.transformers_models import WORDS, gpt2, llama, opt
from tests.lib.trunk_models import step_input

TABLE = "stem.embedding.weight"
PLAIN = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
HEAVY = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "max_norm": 0.0}
ADAMW = {"lr": 0.01, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3, "weight_decay": 0.1, "max_norm": 0.0}
CUTS = (1, 2)


FAMILIES: dict[str, Callable[[], SplitModel]] = {
    "gpt2": lambda: gpt2(n_layer=3),
    "llama": lambda: llama(tie_word_embeddings=True, num_hidden_layers=3),
    "opt": lambda: opt(num_hidden_layers=3),
}


@pytest.fixture(autouse=True)
def _double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packing.CODECS, "float64", Double())


def built(family: str) -> SplitModel:
    """A model in float64, in a state that is not special, with heads that are not zero."""
    torch.manual_seed(3)
    model = FAMILIES[family]()
    model.add_heads(CUTS, torch.zeros(1, 4, dtype=torch.int64), WORDS)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def texts(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens, and labels of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(WORDS, (rows, 6), generator=generator)
    y = torch.randint(WORDS, (rows, 6), generator=generator)
    y[:, 1:][torch.rand(rows, 5, generator=generator) < 0.3] = -1
    return x, y


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """The mean cross-entropy of the labels that count."""
    return cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-1)


class Device:
    """A device with its state in float64, and the step graphs."""

    def __init__(
        self, model: SplitModel, cut: int, optimizer: str, hyper: Mapping[str, float],
        *, u_shaped: bool = False, fused: bool = False,
    ) -> None:  # fmt: skip
        self.name, self.cut = f"device-{cut}", cut
        example = torch.zeros(2, 6, dtype=torch.int64)
        rule = get_optimizer(optimizer)
        self.steps = ClientSteps(
            ClientSegment(model, cut, u_shaped=u_shaped), rule, Double(), example, WORDS,
            {"seq": 8}, graphs=["fuse" if fused else "finish" if u_shaped else "backward"],
        )  # fmt: skip
        self.state = {**self.steps.initial, **self.steps.slots}
        self.hyper = {name: torch.tensor(hyper[name], dtype=torch.float64) for name in hyper}

    def start(self, aggregation: Aggregation, slots: bool) -> None:
        """Take the state of a round."""
        kinds = ("parameter", "statistic", "slot") if slots else ("parameter", "statistic")
        self.specs = [e.spec for e in self.steps.state if e.kind in kinds]
        given = aggregation.device_state(
            [TensorSpec(s.name, "float64", s.shape) for s in self.specs]
        )
        zeros = {n: t.double() for n, t in self.steps.slots.items()}
        self.state |= zeros | {n: torch.from_numpy(np.array(t)) for n, t in given.items()}

    def run(self, step: Step, **given: Tensor) -> dict[str, Tensor]:
        """Run a graph; its state outputs become the state."""
        outputs: dict[str, Tensor] = step.function(
            dict(step.constants), {**self.state, **self.hyper, **given}
        )
        for name, tensor in outputs.items():
            if name.startswith("next/"):
                self.state[name.removeprefix("next/")] = tensor
        return outputs

    def update(self, samples: int) -> DeviceUpdate:
        """What goes to the hub at the end of a round."""
        return DeviceUpdate(
            self.name, {s.name: self.state[s.name].numpy() for s in self.specs}, samples
        )

    def batch(self, h: Tensor, y: Tensor | None, **given: Any) -> Any:
        """A batch as it enters a step of the trunk."""
        labels = None if y is None else y.numpy()
        return step_input(
            self.name, "shared", self.cut, "float64", {"h": h.numpy()}, labels, **given
        )


def trained(model: SplitModel) -> State:
    """Copies of the trained tensors."""
    return {n: t.detach().numpy().copy() for n, t in model.trained().items()}


def table_of(model: SplitModel) -> Tensor:
    """The table of tokens."""
    return model.get_parameter(TABLE)


def without_heads(model: SplitModel) -> list[Tensor]:
    """The parameters of stem, blocks and head."""
    return [p for n, p in model.named_parameters() if not n.startswith("aux.")]


def stepped(uncut: SplitModel, loss: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Array]:
    """The tensors of the uncut model after a step."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return trained(uncut)


def assert_equal(aggregation: Aggregation, model: SplitModel, want: Mapping[str, Array]) -> None:
    """The whole model is as it should be; auxiliary heads are trained elsewhere.

    Up to a millionth of a tensor's largest change: layers of Llama and OPT compute in float32 in
    places. The bias of keys has no gradient but rounding.
    """
    got, old = aggregation.path_state(model, 1), trained(model)
    changes = {n: np.abs(t - old[n]).max() for n, t in want.items() if not n.startswith("aux.")}
    assert changes[TABLE] > 1e-3
    for name, change in changes.items():
        bound = 1e-6 * max(change, 1e-2 * changes[TABLE])
        np.testing.assert_allclose(got[name], want[name], 0, bound, err_msg=name)


# --- returned gradients ---------------------------------------------------------------------------


def round_of(
    devices: Sequence[Device],
    data: Sequence[tuple[Tensor, Tensor]],
    trunk: TrunkTrainer,
    aggregation: Aggregation,
    plan: TrunkPlan,
) -> None:
    """A round of one step with returned gradients, or fused ones."""
    trunk.begin(aggregation.trunk_state([d.cut for d in devices]), plan)
    batches = []
    for device, (x, y) in zip(devices, data, strict=True):
        device.start(aggregation, plan.keeps_slots)
        h = device.run(activate(device.steps), x=x)["h"]
        batches.append(device.batch(h, y))
    updates = []
    gradients = trunk.step(batches).gradients
    for device, (x, y), gradient in zip(devices, data, gradients, strict=True):
        assert gradient is not None
        given = {"x": x, "grad.h": torch.from_numpy(np.array(gradient["h"]))}
        if "fuse" in device.steps.graphs:
            device.run(fuse(device.steps), **given, y=y)
        else:
            device.run(backward(device.steps), **given)
        # devices count by labels here, as the trunk's loss does
        updates.append(device.update(int((y >= 0).sum())))
    aggregation.commit(updates, trunk.finish())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hyper", [PLAIN, HEAVY], ids=["plain", "momentum"])
@pytest.mark.parametrize("cut", CUTS)
def test_returned_gradients_and_the_hubs_part_are_steps_of_the_uncut_model(
    family: str, hyper: dict[str, float], cut: int
) -> None:
    """In float64; slots of both sides are kept over rounds of one step."""
    model = built(family)
    uncut = copy.deepcopy(model)
    reference = optimizer_of(uncut, hyper, without_heads(uncut))
    aggregation = MergedAdapters(trained(model), "sgd", tied=tied_to_head(model))
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    plan = TrunkPlan("sgd", hyper, returned=True, keeps_slots=True)
    for number in range(3):
        x, y = texts(3, number)
        round_of([Device(model, cut, "sgd", hyper)], [(x, y)], trunk, aggregation, plan)
        want = stepped(uncut, loss_of(uncut(x), y), reference)
        assert_equal(aggregation, model, want)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_of_devices_at_several_cuts_are_one_gradient(family: str) -> None:
    """The blocks between the cuts have copies on both sides, which are averaged; a table has not.

    Momentum starts at zero, as in a method that keeps no slots.
    """
    model = built(family)
    uncut = copy.deepcopy(model)
    aggregation = Merged(trained(model))
    devices = [Device(model, cut, "sgd", HEAVY) for cut in CUTS]
    data = [texts(2 + i, i) for i in range(len(CUTS))]
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    round_of(devices, data, trunk, aggregation, TrunkPlan("sgd", HEAVY, returned=True))
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    reference = optimizer_of(uncut, HEAVY, without_heads(uncut))
    want = stepped(uncut, loss_of(uncut(x), y), reference)
    assert_equal(aggregation, model, {TABLE: want[TABLE]})


def test_a_fused_step_adds_the_hubs_part() -> None:
    """The hub's loss counts in full for its head, as for all that is above the cut."""
    model, own, cut = built("gpt2"), 0.25, 1
    uncut = copy.deepcopy(model)
    aggregation = Merged(trained(model))
    device = Device(model, cut, "sgd", PLAIN, fused=True)
    device.hyper["own"] = torch.tensor(own, dtype=torch.float64)
    x, y = texts(3, 0)
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    round_of([device], [(x, y)], trunk, aggregation, TrunkPlan("sgd", PLAIN, returned=True))
    table = table_of(uncut)
    h = uncut.segment(x, cut)
    below = h.detach().requires_grad_()
    (above,) = torch.autograd.grad(loss_of(deep(uncut, below, cut), y), [below], retain_graph=True)
    (output,) = torch.autograd.grad(loss_of(deep(uncut, below.detach(), cut), y), [table])
    (fused,) = torch.autograd.grad(
        [loss_of(uncut.answer(cut, h), y), h], [table], [torch.tensor(own), (1 - own) * above]
    )
    want = (table - PLAIN["lr"] * (output + fused)).detach().numpy()
    assert_equal(aggregation, model, {TABLE: want})


def deep(model: SplitModel, h: Tensor, cut: int) -> Tensor:
    """Logits of the head from activations at a cut."""
    for block in model.block[cut:]:
        h = block(h)
    logits: Tensor = model.head(h)
    return logits


# --- losses on both sides -------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hyper", [PLAIN, HEAVY], ids=["plain", "momentum"])
@pytest.mark.parametrize("aggregate", [Merged, Separate])
def test_heads_of_devices_and_of_the_hub_train_the_table_together(
    family: str, hyper: dict[str, float], aggregate: type[Merged] | type[Separate]
) -> None:
    """FedSplitX: the table's gradient is that of the losses of all heads, on both sides."""
    model, cut = built(family), 1
    uncut = copy.deepcopy(model)
    aggregation = aggregate(trained(model))
    device = Device(model, cut, "sgd", hyper)
    x, y = texts(3, 0)
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    device.start(aggregation, slots=False)
    trunk.begin(aggregation.trunk_state(), TrunkPlan("sgd", hyper))
    trunk.step([device.batch(device.run(train(device.steps), x=x, y=y)["h"], y)])
    aggregation.commit([device.update(3)], trunk.finish())
    h = uncut.segment(x, cut)
    below = uncut.answer(cut, h)
    deeper = uncut.block[cut](h.detach())
    above = uncut.answer(cut + 1, deeper), deep(uncut, deeper, cut + 1)
    loss = sum((loss_of(logits, y) for logits in above), loss_of(below, y))
    reference = optimizer_of(uncut, hyper, list(uncut.parameters()))
    want = stepped(uncut, loss, reference)
    assert_equal(aggregation, model, want)
    np.testing.assert_allclose(aggregation.trunk_state()[TABLE], want[TABLE], rtol=1e-9)


def test_replicas_of_the_trunk_share_the_part() -> None:
    """Parts are averaged over replicas by samples, and added to the average of devices."""
    for store in (Merged({TABLE: np.zeros(2)}), Separate({TABLE: np.zeros(2)})):
        updates = [DeviceUpdate("a", {TABLE: np.full(2, 8.0)}, 1)]
        updates += [DeviceUpdate("b", {TABLE: np.zeros(2)}, 1)]
        copies = [
            TrunkCopy(name, "stem", {TABLE: np.full(2, change)}, 1, part=True)
            for name, change in (("a", 1.0), ("b", 3.0))
        ]
        store.commit(updates, copies)
        np.testing.assert_array_equal(store.trunk_state()[TABLE], 4.0 + 2.0)
        store.commit([], copies[:1])  # no device has delivered: the hub has moved it from 6 to 1
        np.testing.assert_array_equal(store.trunk_state()[TABLE], 1.0)


# --- labels on the devices ------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("optimizer", "hyper"), [("sgd", HEAVY), ("adamw", ADAMW)])
def test_a_device_with_the_head_steps_with_the_whole_gradient(
    family: str, optimizer: str, hyper: dict[str, float]
) -> None:
    """Several steps of a round; with AdamW, too, since both parts meet before the step."""
    model, cut = built(family), 1
    uncut = copy.deepcopy(model)
    reference = optimizer_of(uncut, hyper, without_heads(uncut))
    aggregation = MergedAdapters(trained(model), optimizer)
    device = Device(model, cut, optimizer, hyper, u_shaped=True)
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    plan = TrunkPlan(optimizer, hyper, returned=True, u_shaped=True, keeps_slots=True)
    device.start(aggregation, slots=True)
    trunk.begin(aggregation.trunk_state(), plan)
    want: dict[str, Array] = {}
    for number in range(3):
        x, y = texts(3, number)
        h = device.run(activate(device.steps), x=x)["h"]
        features = trunk.features(device.batch(h, None, shape=tuple(y.shape)))
        assert features is not None
        given = {"features.h": torch.from_numpy(features["h"]), "y": y}
        back = device.run(finish(device.steps), **given)["grad.h"]
        done = HeadGradient({"h": back.numpy()}, int((y >= 0).sum()))
        batch = device.batch(h, None, shape=tuple(y.shape), head_gradient=done)
        (gradient,) = trunk.step([batch]).gradients
        assert gradient is not None
        given = {"x": x, "grad.h": torch.from_numpy(np.array(gradient["h"]))}
        device.run(backward(device.steps), **given)
        want = stepped(uncut, loss_of(uncut(x), y), reference)
    copies = trunk.finish()
    assert not any(copied.part for copied in copies)
    aggregation.commit([device.update(3)], copies)
    assert_equal(aggregation, model, want)
    assert not device.state[f"waiting/{TABLE}"].any()


# --- what does not change -------------------------------------------------------------------------


@pytest.mark.parametrize("returned", [True, False])
def test_a_frozen_table_stays_as_it_is_bit_for_bit(returned: bool) -> None:
    model = gpt2(n_layer=3)
    add_lora(model, Lora(rank=2), "gpt2")
    model.add_heads(CUTS, torch.zeros(1, 4, dtype=torch.int64), WORDS)
    model = model.double()
    assert tied_tensors(model) == {}
    table = table_of(model).detach().clone()
    trunk = TrunkTrainer(model, "cpu")
    trunk.begin(trained(model), TrunkPlan("sgd", PLAIN, returned=returned))
    h = np.random.default_rng(0).standard_normal((2, 4, 16))
    y = np.zeros((2, 4), np.int64)
    trunk.step([step_input("a", "shared", 1, "float64", {"h": h}, y)])
    copies = trunk.finish()
    assert copies
    assert not any(c.part or c.layer in ("stem", "tied") for c in copies)
    assert torch.equal(table_of(model), table)


def test_a_head_with_a_table_of_its_own_leaves_the_stem_to_the_devices() -> None:
    """With returned gradients; otherwise auxiliary heads on the hub read the stem's table."""
    model = llama(num_hidden_layers=3, tie_word_embeddings=False)
    model.add_heads(CUTS, torch.zeros(1, 4, dtype=torch.int64), WORDS)
    model = model.double()
    assert tied_to_head(model) == ()
    trunk = TrunkTrainer(model, "cpu")
    h = np.random.default_rng(0).standard_normal((2, 4, 16))
    y = np.zeros((2, 4), np.int64)
    for returned, parts in ((True, []), (False, [TABLE]), (True, [])):
        trunk.begin(trained(model), TrunkPlan("sgd", PLAIN, returned=returned))
        trunk.step([step_input("a", "shared", 1, "float64", {"h": h}, y)])
        copies = trunk.finish()
        assert [name for c in copies if c.part for name in c.tensors] == parts
        assert "head" in {c.layer for c in copies}


# --- through hub and devices ----------------------------------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog and runs away from it\n\n" * 6


def build_bytes() -> SplitModel:
    """A GPT-2 of three small blocks for bytes, trained in full."""
    torch.manual_seed(0)
    return gpt2(n_embd=32, n_layer=3, vocab_size=258, n_positions=32)


def build_llama() -> SplitModel:
    """A Llama of three small blocks for bytes, trained in full, with one table."""
    torch.manual_seed(0)
    return llama(
        hidden_size=32, num_hidden_layers=3, vocab_size=258, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip


def build_adapted() -> SplitModel:
    """:func:`build_bytes` with adapters: the head is frozen, and trains nothing on a device."""
    model = add_lora(build_bytes(), Lora(rank=2), "gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


@pytest.mark.parametrize(
    ("method", "build"),
    [
        ("splitft", "build_bytes"),
        pytest.param("splitft", "build_llama", marks=pytest.mark.slow),
        ("splitft-u", "build_bytes"),
        ("splitft-u", "build_adapted"),
    ],
)
def test_a_job_makes_the_steps_of_the_uncut_model_and_goes_on(
    method: str, build: str, tmp_path: Path
) -> None:
    """Two rounds of one step, and another in a job that starts from them, with momentum.

    Activations and gradients are packed as fp16, which has 11 bits.
    """
    (tmp_path / "some.txt").write_text(TEXT)
    hyper = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.01}
    data = DataTable(str(tmp_path / "some.txt"), train=4, test=2, length=24)
    job = Job(
        model=f"tests.server_hub.test_tied:{build}",
        data=data,
        tiers={"a": FleetTier(clients=1, cut=1, codec="fp16")},
        method=method,
        optimizer="sgd",
        rounds=RoundsTable(2),
        local=LocalTraining(1, 8, hyper),
        trunk=TrunkTraining(optimizer="sgd", hyper=hyper),
        schedule="constant",
    )
    uncut: SplitModel = globals()[build]()
    start, table = trained(uncut), table_of(uncut).detach().clone()
    parameters: list[Tensor] = [p for p in uncut.parameters() if p.requires_grad]
    reference = optimizer_of(uncut, hyper, parameters)
    for folder, task, steps in (
        ("first", job, 2),
        ("second", replace(job, rounds=RoundsTable(1), start_from=tmp_path / "first"), 1),
    ):
        with Simulation(task, tmp_path / folder) as simulation:
            simulation.run()
            examples = simulation.data.train
        got = load_file(tmp_path / folder / "model.safetensors")
        assert not [n for n in got if n == "head.output.weight" or "/" in n or "tied" in n]
        for _ in range(steps):
            x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
            want = stepped(uncut, loss_of(uncut(x), y), reference)
        for name, tensor in want.items():
            moved, wrong = (np.linalg.norm(v - tensor) for v in (start[name], got[name]))
            assert moved > 0
            if "k_proj.bias" not in name:
                assert wrong < 2e-3 * moved, name
        if TABLE not in start:
            np.testing.assert_array_equal(got[TABLE], table)
