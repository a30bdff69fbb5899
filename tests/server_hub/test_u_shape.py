"""U-shaped training, with labels on the device, against the same model without a cut."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.batch import HeadGradient
from edge_sdk.protocol.tensors import Array
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.packing import codecs as packing
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.returned import activate, backward
from export.steps.torch_runtime import TorchRuntime
from export.steps.u_shaped import finish
from server_hub.methods.settings import LocalTraining
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import CutsTable, FleetTier, Job, RoundsTable
from server_hub.simulation.simulate import Simulation
from server_hub.trunk.interface import StepInput, TrunkPlan
from server_hub.trunk.settings import TrunkTraining
from server_hub.trunk.step import TrunkTrainer
from tests.lib.adapted_gpt2 import WORDS
from tests.lib.adapted_gpt2 import build as build_gpt2
from tests.lib.adapted_gpt2 import texts as draw_texts
from tests.lib.codecs import Double
from tests.lib.decay import optimizer_of
from tests.lib.graph_runs import run_of, verify
from tests.lib.returned_models import HYPER, MODELS
from tests.lib.step_runtimes import manifest_of
from tests.lib.trunk_models import step_input


def conv() -> SplitModel:
    """Return convolutions with group norms."""
    build, _, _ = MODELS["groupnorm"]
    model: SplitModel = build()
    return model


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    """Return the mean cross-entropy of the labels that count."""
    return cross_entropy(logits.flatten(0, -2), y.flatten(), ignore_index=-1)


def draw(kind: str, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels in float64."""
    if kind == "lora":
        x, y = draw_texts(rows, seed)
        length = 2 + seed % 6
        return x[:, :length], torch.cat([y[:, : length - 1], y[:, -1:].clamp(min=0)], 1)
    _, images, classes = MODELS["groupnorm"]
    generator = torch.Generator().manual_seed(seed)
    return images(rows, seed).double(), torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("kind", ["lora", "groupnorm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("seed", range(3))
def test_every_step_is_that_of_the_uncut_model_and_the_hub_sees_no_labels(
    kind: str, optimizer: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, with random cuts; slots of stem, blocks and head are handed on."""
    monkeypatch.setitem(packing.CODECS, "float64", Double())
    model = (build_gpt2(seed=seed) if kind == "lora" else conv()).double()
    classes = WORDS if kind == "lora" else MODELS["groupnorm"][2]
    uncut = copy.deepcopy(model)
    rule, hyper = get_optimizer(optimizer), HYPER[optimizer]
    reference = optimizer_of(uncut, hyper)
    trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
    held = {n: p.detach().numpy().copy() for n, p in model.trained().items()}
    held |= {n: t.numpy() for n, t in rule.slots(model.trained()).items()}
    rates = {name: torch.tensor(hyper[name], dtype=torch.float64) for name in hyper}
    rng = np.random.default_rng(seed)
    for _ in range(4):
        cut = int(rng.integers(1, model.depth))
        x, y = draw(kind, int(rng.integers(1, 5)), int(rng.integers(1000)))
        reference.zero_grad()
        expected = loss_of(uncut(x), y)
        expected.backward()  # type: ignore[no-untyped-call]
        reference.step()

        split = copy.deepcopy(model)
        split.add_heads([cut], x, classes)
        split = split.double()
        limits = {"seq": 7} if kind == "lora" else {}
        steps = ClientSteps(
            ClientSegment(split, cut, u_shaped=True), rule, Double(), x, classes, limits,
            graphs=["finish"],
        )  # fmt: skip
        own = {**{n: t.double() for n, t in {**steps.initial, **steps.slots}.items()}}
        own |= {n: torch.from_numpy(np.array(t)) for n, t in held.items() if n in own}
        constants = dict(steps.constants)

        h = activate(steps).function(constants, {**own, "x": x})["h"]
        trunk.begin(held, TrunkPlan(optimizer, hyper, returned=True, u_shaped=True,
                                    keeps_slots=True))  # fmt: skip
        arrival = step_input(
            "d", "all", cut, "float64", {"h": h.numpy()}, None, shape=tuple(y.shape)
        )
        features = trunk.features(arrival)
        assert features is not None
        outputs = finish(steps).function(
            constants, {**own, "features.h": torch.from_numpy(features["h"]), "y": y, **rates}
        )
        loss, back = outputs["loss"], outputs["grad.h"]
        own |= {n: outputs[f"next/{n}"] for n in own}
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-10)
        done = HeadGradient({"h": back.numpy()}, int((y >= 0).sum()))
        report = trunk.step([step_input("d", "all", cut, "float64", {"h": h.numpy()}, None,
                                     shape=tuple(y.shape), head_gradient=done)])  # fmt: skip
        (gradient,) = report.gradients
        assert gradient is not None
        assert report.losses == [None]
        outputs = backward(steps).function(
            constants,
            {**own, "x": x, "grad.h": torch.from_numpy(np.array(gradient["h"])), **rates},
        )
        own |= {n: outputs[f"next/{n}"] for n in own}
        for copied in trunk.finish():
            assert copied.layer != "head"
            held |= {n: np.array(t) for n, t in copied.tensors.items()}
        held |= {n: t.detach().numpy() for n, t in own.items() if n in held and (
            n.rpartition("/")[2].startswith(("stem", "head"))
            or any(n.rpartition("/")[2].startswith(f"block.{i}") for i in range(cut)))}  # fmt: skip
        for name, tensor in uncut.trained().items():
            np.testing.assert_allclose(
                held[name], tensor.detach().numpy(), rtol=1e-9, atol=1e-12, err_msg=name
            )


@pytest.mark.parametrize("kind", ["lora", "groupnorm"])
def test_arrivals_of_several_depths_are_one_step_over_all_their_labels(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient is that of the mean over all labels, as if they were on the hub."""
    monkeypatch.setitem(packing.CODECS, "float64", Double())
    model = (build_gpt2() if kind == "lora" else conv()).double()
    state = {n: p.detach().numpy().copy() for n, p in model.trained().items()}
    hyper = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    results: list[dict[str, Array]] = []
    returned: list[list[Array]] = []
    batches = [(cut, *draw(kind, rows, cut)) for cut, rows in ((2, 3), (1, 2), (2, 1))]
    for u_shaped in (False, True):
        trunk = TrunkTrainer(copy.deepcopy(model), "cpu")
        trunk.begin(state, TrunkPlan("sgd", hyper, returned=True, u_shaped=u_shaped))
        arrivals = []
        for i, (cut, x, y) in enumerate(batches):
            with torch.no_grad():
                parts = {"h": model.segment(x, cut).numpy()}
            arrival = step_input(f"d{i}", "all", cut, "float64", parts, y.numpy())
            if u_shaped:
                arrival = step_input(
                    f"d{i}", "all", cut, "float64", parts, None, shape=tuple(y.shape)
                )
                seen = trunk.features(arrival)
                assert seen is not None
                features = torch.from_numpy(seen["h"]).requires_grad_()
                (back,) = torch.autograd.grad(loss_of(model.head(features), y), features)
                done = HeadGradient({"h": back.numpy()}, int((y >= 0).sum()))
                arrival = step_input(f"d{i}", "all", cut, "float64", parts, None,
                                  shape=tuple(y.shape), head_gradient=done)  # fmt: skip
            arrivals.append(arrival)
        report = trunk.step(arrivals)
        returned.append([g["h"] for g in report.gradients if g is not None])
        results.append({
            n: t for c in trunk.finish() for n, t in c.tensors.items() if not n.startswith("head")
        })  # fmt: skip
    assert results[0].keys() == results[1].keys()
    assert len(returned[0]) == len(returned[1]) == 3
    for name, tensor in results[0].items():
        assert np.abs(tensor - state[name]).max() > 1e-8
        np.testing.assert_allclose(results[1][name], tensor, rtol=1e-9, atol=1e-13, err_msg=name)
    for want, got in zip(*returned, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        pytest.param("lora", "torch", marks=pytest.mark.slow),
        pytest.param("dropout", "torch", marks=pytest.mark.slow),
        pytest.param("groupnorm", "onnx", marks=pytest.mark.slow),
        pytest.param("batchnorm", "onnx", marks=pytest.mark.slow),
        pytest.param("lora", "onnx", marks=pytest.mark.slow),
        pytest.param("groupnorm", "executorch", marks=pytest.mark.slow),
    ],
)
def test_exported(kind: str, runtime: RuntimeName, tmp_path: Path) -> None:
    """Graphs are verified against eager PyTorch before they are written; the state has the head."""
    build, example, classes = MODELS[kind]
    index = export_bundles(
        build(), {"t": Tier(2, "int8", runtime, 8, graphs=["finish"])},
        tmp_path / "out", example=example(8), classes=classes,
    )  # fmt: skip
    manifest = index.manifest("t")
    assert "finish" in manifest.graphs
    assert [spec.name for spec in manifest.features] == ["h.q", "h.scale"]
    head = {e.spec.name for e in manifest.state if e.spec.name.startswith("head.")}
    assert bool(head) == (kind != "lora")  # with LoRA the head is frozen


def test_a_wrong_finish_is_refused() -> None:
    """Both are refused: a tensor that must change but does not, and the reverse."""
    build, example, classes = MODELS["groupnorm"]
    model = build()
    model.add_heads([1, 2], example(8), classes)
    steps = ClientSteps(
        ClientSegment(model, 2, u_shaped=True), get_optimizer("sgd"), get_codec("int8"),
        example(8), classes, {"batch": 8}, graphs=["finish"],
    )  # fmt: skip
    step = finish(steps)
    run = run_of("torch", [step])
    verify(steps, step, run, example(8))
    for name in ("head.out.weight", "block.0.conv.weight"):

        def bent(_: object, feeds: dict[str, Array], name: str = name) -> dict[str, Array]:
            outputs = run(step, feeds)
            moved = feeds[name] if name.startswith("head") else feeds[name] + 1
            return outputs | {f"next/{name}": moved}

        with pytest.raises(ExportError, match=f"'finish' differs .* in next/{name}"):
            verify(steps, step, bent, example(8))


def test_the_train_graph_leaves_the_head_alone() -> None:
    """The device's auxiliary heads train as without the model's head."""
    build, example, classes = MODELS["groupnorm"]
    found = []
    for u_shaped in (False, True):
        model = build()
        model.add_heads([1, 2], example(8), classes)
        steps = ClientSteps(
            ClientSegment(model, 2, u_shaped=u_shaped), get_optimizer("sgd"), get_codec("int8"),
            example(8), classes, graphs=["finish" if u_shaped else "backward"],
        )  # fmt: skip
        runtime = TorchRuntime(manifest_of(steps, "torch"), steps)
        hyper = {n: np.asarray(v, np.float32) for n, v in HYPER["sgd"].items()}
        y = np.arange(8) % classes
        runtime.run("train", {"x": example(8).numpy(), "y": y, **hyper})
        found.append(runtime.get_state())
    for name, tensor in found[1].items():
        if name.startswith("head."):
            np.testing.assert_array_equal(tensor, steps.initial[name].numpy())
        else:
            np.testing.assert_allclose(tensor, found[0][name], rtol=1e-6, atol=1e-7)


# --- a fleet --------------------------------------------------------------------------------------


def job_of(method: str, **changes: Any) -> Job:
    """Return a job on digits with two tiers of one device; each batch is a step of its own."""
    settings: dict[str, Any] = {
        "model": "tests.server_hub.test_u_shape:build_digits",
        "data": DataTable("digits"),
        "tiers": {"a": FleetTier(clients=1, cut=1, codec="fp16"),
                  "b": FleetTier(clients=1, cut=2, codec="fp16")},
        "method": method,
        "rounds": RoundsTable(count=3),
        "local": LocalTraining(batch_size=64, hyper={"lr": 0.05}),
        "trunk": TrunkTraining(hyper={"lr": 0.05}, max_rows=1, wait_s=0.0),
        "schedule": "constant",
    }  # fmt: skip
    return Job(**settings | changes)


def build_digits() -> SplitModel:
    """Return a model for 8 x 8 digits."""
    from server_hub.demo import digits

    return digits.build_for_demo()


def test_a_fleet_learns_and_no_label_leaves_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accuracy of the model's head rises, and the trunk's inputs have no labels."""
    seen: list[Array | None] = []
    step, features = TrunkTrainer.step, TrunkTrainer.features

    def watched_step(self: TrunkTrainer, arrivals: Sequence[StepInput]) -> Any:
        seen.extend(arrival.batch.labels for arrival in arrivals)
        return step(self, arrivals)

    def watched_features(self: TrunkTrainer, arrival: StepInput) -> Any:
        seen.append(arrival.batch.labels)
        return features(self, arrival)

    monkeypatch.setattr(TrunkTrainer, "step", watched_step)
    monkeypatch.setattr(TrunkTrainer, "features", watched_features)
    accuracies = []
    hyper = {"lr": 0.05, "momentum": 0.0}  # late steps do not work well with momentum
    calm: dict[str, Any] = {"trunk": TrunkTraining(hyper=hyper, max_rows=1, wait_s=0.0)}
    for staleness in (0, 1):
        calm["local"] = LocalTraining(batch_size=64, hyper=hyper, staleness=staleness)
        with Simulation(job_of("splitft-u", **calm), tmp_path / str(staleness)) as simulation:
            records = simulation.run()
        assert len(records) == 3
        accuracies.append([r.accuracy["a"]["through_hub"] for r in records])
        assert records[-1].trunk_loss is None
        assert records[-1].trunk_steps > 10
        assert records[-1].local_loss is not None
    assert seen
    assert all(labels is None for labels in seen)
    for first, *later in accuracies:
        last = max(later)  # with two devices and batch norms, single rounds fall back
        assert last > 0.4
        assert last > first + 0.1


def test_cuts_move_with_labels_on_the_devices(tmp_path: Path) -> None:
    """A device that moves keeps the head, from bundle to bundle."""
    job = job_of(
        "splitft-u",
        tiers={"a": FleetTier(clients=1, cut=2, gflops=0.01),
               "b": FleetTier(clients=1, cut=2, gflops=1.0)},
        cuts=CutsTable(policy="latency", options=[1, 2, 3]),
        rounds=RoundsTable(count=3),
    )  # fmt: skip
    with Simulation(job, tmp_path / "run") as simulation:
        records = simulation.run()
    assert list(itertools.chain.from_iterable(r.moves for r in records))
    assert records[-1].accuracy["a"]["through_hub"] > 0.3
