"""A method that another package adds, while no code of Cutlayer knows its name."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

import server_hub
from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import State
from export.cutting.split_model import SplitModel
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.aggregation.merged import Merged
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.fleet import JobOutline, Recipe
from server_hub.methods.method import Method, Stage, always
from server_hub.methods.plan import DevicePlan, RoundContext
from server_hub.methods.registry import hub_methods, simulated_methods
from server_hub.methods.settings import MethodConfig
from server_hub.rounds.rounds import RoundRules
from server_hub.trunk.interface import TrunkCopy
from server_hub.trunk.local import LocalTrunk
from tests.lib.harness import examples, hub_config, start_hub


class HalfWay(Merged):
    """An average that goes half of the way from the old model to the mean of the copies."""

    def commit(self, updates: Sequence[DeviceUpdate], copies: Sequence[TrunkCopy]) -> None:
        before = {name: tensor.copy() for name, tensor in self.trunk_state().items()}
        super().commit(updates, copies)
        mean = self.trunk_state()
        self.restore({"all": {n: (before[n] + mean[n]) / 2 for n in mean}})


@dataclass(frozen=True, kw_only=True)
class Cautious(Method):
    """Devices train at a tenth of the learning rate, and the average goes half of the way."""

    def device_plan(
        self, context: RoundContext, stage: Stage, device: str, order: int
    ) -> DevicePlan:
        plan = super().device_plan(context, stage, device, order)
        return replace(plan, hyper={**plan.hyper, "lr": plan.hyper["lr"] / 10})


def cautious(initial: State, outline: JobOutline) -> Method:
    """Return the method."""
    return Cautious(
        name="Cautious", stage=always(ActivationMode.TRAIN), aggregation=HalfWay(initial)
    )


CAUTIOUS = Recipe("Cautious", cautious)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate that a package with the method is installed."""
    entry = metadata.EntryPoint("cautious", f"{__name__}:CAUTIOUS", "cutlayer.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry])


async def train(hub: Hub, folder: Path) -> None:
    """Run one device in the hub's job, over a WebSocket."""
    token = TokenFile(folder / "tokens.toml").issue("phone", "small")
    serving, url = await start_hub(hub)
    device = await Device.connect(url, token=token, data=examples(24), cache=folder / "cache")
    async with device:
        await device.train()
    await asyncio.wait_for(serving, 30)


@pytest.mark.usefixtures("installed")
def test_a_hub_trains_with_a_method_that_an_entry_point_names(
    tmp_path: Path, bundles: BundleIndex, model: SplitModel
) -> None:
    assert hub_methods()["cautious"] is simulated_methods()["cautious"] is CAUTIOUS
    config = hub_config(
        tmp_path,
        bundles,
        method=MethodConfig(name="cautious"),
        rounds=RoundRules(count=1, deadline_s=60),
    )
    hub = Hub(config, model, LocalTrunk(model))
    assert hub.method.name == "Cautious"
    before = {n: t.copy() for n, t in hub.method.aggregation.trunk_state().items()}
    asyncio.run(train(hub, tmp_path))
    after = hub.method.aggregation.trunk_state()
    assert [record.devices for record in hub.run.records] == [1]
    moved = {n: float(np.abs(after[n] - before[n]).max()) for n in after}
    assert moved["head.weight" if "head.weight" in moved else next(reversed(moved))] > 0
    assert moved["stem.0.weight" if "stem.0.weight" in moved else next(iter(moved))] > 0


def test_a_method_given_as_an_argument_plans_the_rounds(
    tmp_path: Path, bundles: BundleIndex, model: SplitModel
) -> None:
    """The device gets the method's plan, with a tenth of the learning rate."""
    initial = {n: t.detach().numpy().copy() for n, t in model.trained().items()}
    method = cautious(initial, JobOutline(1))
    rules = RoundRules(count=1, deadline_s=60)
    seen: list[float] = []

    class Watched(Cautious):
        def device_plan(
            self, context: RoundContext, stage: Stage, device: str, order: int
        ) -> DevicePlan:
            plan = super().device_plan(context, stage, device, order)
            seen.append(plan.hyper["lr"])
            return plan

    watched = Watched(name=method.name, stage=method.stage, aggregation=method.aggregation)
    config = hub_config(tmp_path, bundles, rounds=rules)
    hub = Hub(config, model, LocalTrunk(model), method=watched)
    asyncio.run(train(hub, tmp_path))
    assert seen == [pytest.approx(0.005)]
    assert len(hub.run.records) == 1


def test_an_unknown_method_is_one_sentence(tmp_path: Path, bundles: BundleIndex) -> None:
    for name, said in (("magic", "there is no method 'magic'"), ("exc", "it is a baseline")):
        with pytest.raises(ConfigError, match=said):
            Hub(hub_config(tmp_path, bundles, method=MethodConfig(name=name)))


def test_an_entry_point_that_is_no_recipe_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = metadata.EntryPoint("broken", f"{__name__}:cautious", "cutlayer.methods")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=r"the method 'broken' of .* is no Recipe"):
        hub_methods()


def test_the_loop_the_hub_and_the_gateway_know_no_method() -> None:
    """Their code has neither the name of a method nor a word of one."""
    words = re.compile(
        r"\b(fused?|harden\w*|bases?|u_shaped|returned|mixtures?|adversarial|fedsplitx|splitft|"
        r"splitmix|supersfl)\b",
        re.IGNORECASE,
    )
    folder = Path(server_hub.__file__).parent
    for path in (folder / "job.py", folder / "hub.py", *(folder / "gateway").glob("*.py")):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
            found = words.search(line)
            assert found is None, f"{path.name}:{number} says {found and found[0]}"
    assert (folder / "job.py").read_text("utf-8").count("\n") < 150
