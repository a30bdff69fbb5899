"""Fused steps: the gradient of the device's own heads and the returned one in one step."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import LinkClosed
from edge_sdk.protocol.messages import Gradient
from edge_sdk.protocol.tensors import Array
from edge_sdk.training import exchange
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import (
    LocalPlan,
    LocalResult,
    NoGradient,
    Outgoing,
    Reply,
    ReplyRequest,
    advance,
)
from edge_sdk.transport.link import Link, open_websocket
from export.bundles.writer import Tier, export_bundles, make_steps, segment_of
from export.cutting.split_model import ClientSegment
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.fused import fuse
from export.steps.optimizers import get_optimizer
from export.steps.torch_runtime import TorchRuntime
from server_hub.gateway.tokens import TokenFile
from server_hub.methods.settings import LocalTraining, MethodConfig
from server_hub.rounds.rounds import RoundRules
from tests.lib.codecs import Exact
from tests.lib.decay import optimizer_of
from tests.lib.graph_runs import run_of, verify
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.models import CLASSES, IMAGE, build, example
from tests.lib.returned_models import CUT, HYPER, MODELS, images
from tests.lib.step_runtimes import runtime_of
from tests.lib.wrong_steps import wrong


def fused_steps(kind: str, optimizer: str) -> tuple[nn.Module, ClientSteps]:
    """Return a model cut after its second block, with heads at both cuts, and its steps."""
    build, draw, classes = MODELS[kind]
    model = build()
    model.add_heads([1, CUT], draw(8), classes)
    limits = {"batch": 8} | ({"seq": 6} if kind == "lora" else {})
    return model, ClientSteps(
        ClientSegment(model, CUT), get_optimizer(optimizer), Exact(), draw(8), classes, limits,
        graphs=["fuse"],
    )  # fmt: skip


@pytest.mark.parametrize("own", [1.0, 0.6, 0.05])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["groupnorm", "batchnorm", "lora"])
def test_a_fused_step_is_that_of_the_weighted_loss_of_the_uncut_model(
    kind: str, optimizer: str, own: float
) -> None:
    """Below the cut the loss is ``own * heads + (1 - own) * trunk``; heads train by their own."""
    model, steps = fused_steps(kind, optimizer)
    _, draw, classes = MODELS[kind]
    runtime = runtime_of(steps, "torch")
    uncut = copy.deepcopy(model).double().train()
    held = {n: p for n, p in uncut.named_parameters() if p.requires_grad and n in steps.parameters}
    reference = optimizer_of(uncut, HYPER[optimizer], held.values())
    hyper = {name: np.asarray(value, np.float32) for name, value in HYPER[optimizer].items()}
    for number, rows in enumerate((8, 3)):
        x = draw(rows, number)
        generator = torch.Generator().manual_seed(number)
        y = torch.randint(classes, x.shape if kind == "lora" else (rows,), generator=generator)
        wide = x.double() if x.is_floating_point() else x
        heads = [n for n in held if n.startswith("aux.")]

        def losses(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            h, logits = ClientSegment(uncut, CUT)(x)  # type: ignore[arg-type]
            deep = h
            for block in uncut.block[CUT:]:  # type: ignore[union-attr, index]
                deep = block(deep)
            deep = uncut.head(deep)  # type: ignore[operator]
            flat = y.reshape(-1)
            local = sum(nn.functional.cross_entropy(z.flatten(0, -2), flat) for z in logits)
            return h, local, nn.functional.cross_entropy(deep.flatten(0, -2), flat)  # type: ignore[return-value]

        h, local, hub = losses(wide, y)
        (gradient,) = torch.autograd.grad(hub, h, retain_graph=True)
        by_heads = torch.autograd.grad(local, [held[n] for n in heads], retain_graph=True)
        reference.zero_grad()
        (own * local + (1 - own) * hub).backward()
        for name, g in zip(heads, by_heads, strict=True):
            held[name].grad = g
        reference.step()
        got = runtime.run(
            "fuse",
            {"x": x.numpy(), "y": y.numpy(), "grad.h": gradient.float().numpy(), **hyper,
             "own": np.asarray(own, np.float32)},
        )  # fmt: skip
        assert got["loss"] == pytest.approx(float(local.detach()), rel=1e-5)
    state = runtime.get_state()
    for name, tensor in held.items():
        change = tensor.detach() - steps.parameters[name]
        found = torch.from_numpy(state[name]) - steps.parameters[name]
        scale = change.abs().max().item()
        assert scale > 1e-6, f"the comparison is empty for {name}"
        np.testing.assert_allclose(found, change, rtol=2e-3, atol=2e-3 * scale, err_msg=name)


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        pytest.param("dropout", "onnx", marks=pytest.mark.slow),
        pytest.param("dropout", "torch", marks=pytest.mark.slow),
        pytest.param("lora", "onnx", marks=pytest.mark.slow),
        pytest.param("batchnorm", "executorch", marks=pytest.mark.slow),
    ],
)
def test_exported(kind: str, runtime: RuntimeName, tmp_path: Path) -> None:
    """Graphs are verified against eager PyTorch before they are written."""
    build, draw, classes = MODELS[kind]
    index = export_bundles(
        build(), {"t": Tier(CUT, "int8", runtime, 8, graphs=["fuse"])}, tmp_path / "out",
        example=draw(8), classes=classes,
    )  # fmt: skip
    graphs = index.manifest("t").graphs
    assert graphs.keys() == {"predict", "train", "forward", "activate", "fuse"}
    inputs = [p.spec.name for p in graphs["fuse"].inputs if p.role != "state"]
    seed = ["seed"] if kind == "dropout" else []
    grad = ["grad.h.q", "grad.h.scale"]
    assert inputs == ["x", "y", *grad, "lr", "momentum", "weight_decay", "max_norm", "own", *seed]


@pytest.mark.parametrize("name", ["block.0.conv.weight", "aux.2.out.bias"])
def test_a_wrong_graph_is_refused(name: str) -> None:
    """The error names a tensor that does not change."""
    build, draw, _ = MODELS["batchnorm"]
    model = build()
    model.add_heads([1, CUT], draw(8), CLASSES)
    steps = ClientSteps(
        ClientSegment(model, CUT), get_optimizer("sgd"), get_codec("int8"), draw(8), CLASSES,
        {"batch": 8}, graphs=["fuse"],
    )  # fmt: skip
    step = fuse(steps)
    run = run_of("torch", [step])
    verify(steps, step, run, images(8))
    bent = wrong(name, run)

    def stuck(step_: object, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:  # type: ignore[type-arg]
        outputs = bent(step, feeds)
        outputs[f"next/{name}"] = feeds[name]
        return outputs

    with pytest.raises(ExportError, match=f"'fuse' differs from eager PyTorch in next/{name}"):
        verify(steps, step, stuck, images(8))


# --- a device -------------------------------------------------------------------------------------


class Recorder:
    """Records graphs and weights of the runs; the loss of the heads is always 3."""

    def __init__(self, inner: TorchRuntime) -> None:
        self.inner, self.manifest, self.calls = inner, inner.manifest, list[tuple[str, float]]()
        self.set_state, self.get_state = inner.set_state, inner.get_state

    loading_s = 0.0

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph."""
        own = float(batch["own"]) if graph == "fuse" else 0.0
        self.calls.append((graph, own))
        outputs = self.inner.run(graph, batch)
        if "loss" in outputs:
            outputs["loss"] = np.asarray(3.0)
        return outputs


def test_weights_follow_the_losses_and_what_does_not_come_is_done_without() -> None:
    """``share * hub / (heads + hub)``, where the heads' mean loss is that of the previous step."""
    _, steps = fused_steps("groupnorm", "sgd")
    runtime = Recorder(runtime_of(steps, "torch"))  # type: ignore[arg-type]
    learner = Learner(runtime.manifest, runtime)
    data = Examples(images(12).numpy(), np.arange(12) % CLASSES)
    plan = LocalPlan(
        1,
        2,
        {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0, "own": 0.5},
        "fused",
        3,
    )
    hub_losses = [2.0, 0.5, None, 6.0, None, 1.0]  # None: no gradient arrives
    training = learner.training(runtime.get_state(), data, plan)
    reply: Reply = None
    sent: dict[int, dict[str, Array]] = {}
    while not isinstance(step := advance(training, reply), LocalResult):
        reply = None
        if isinstance(step, Outgoing):
            sent[step.number] = step.batch.parts
        elif isinstance(step, ReplyRequest):
            loss = hub_losses[step.number]
            parts = sent[step.number]
            reply = NoGradient() if loss is None else Gradient(1, step.number, parts, loss)
    heads = 3.0 / len(runtime.manifest.heads)
    expected = [0.25, *(0.5 * loss / (heads + loss) for loss in (0.5, 6.0, 1.0))]
    assert [name for name, _ in runtime.calls if name != "activate"] == [
        "fuse", "fuse", "train", "fuse", "train", "fuse",
    ]  # fmt: skip
    found = [own for name, own in runtime.calls if name == "fuse"]
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert step.metrics["loss"] == pytest.approx(3.0)


class Gate:
    """A link to the hub that a test can shut."""

    def __init__(self, url: str) -> None:
        self.url, self.shut, self.link = url, False, None

    async def open(self) -> Link:
        """Open a link, unless it is shut."""
        if self.shut:
            raise LinkClosed("the gate is shut")
        self.link: Any = await open_websocket(self.url)
        return self.link  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["no link", "no answer"])
def test_training_goes_on_while_the_hub_is_away(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After fused steps come steps alone; the round is delivered, and the next is fused again."""
    monkeypatch.setattr(exchange, "PATIENCE_S", 0.3)
    model, tier = build(), Tier(1, runtime="torch", graphs=["fuse"])
    index = export_bundles(
        model, {"t": tier}, tmp_path / "bundles", example=example(IMAGE, 8, 0), classes=10,
        verified=False,
    )  # fmt: skip
    steps = make_steps(segment_of(model, tier), tier, example(IMAGE, 8, 0), 10, "sgd")
    config = hub_config(
        tmp_path, index, method=MethodConfig("supersfl"),
        rounds=RoundRules(count=2, min_devices=1, deadline_s=60),
        local=LocalTraining(batch_size=4, hyper={"lr": 0.05}),
    )  # fmt: skip
    token = TokenFile(config.tokens).issue("phone", "t")
    graphs: list[str] = []

    class Noting(TorchRuntime):
        def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
            graphs.append(graph)
            return super().run(graph, batch)

    def load(bundle: Bundle, threads: int) -> TorchRuntime:
        return Noting(bundle.manifest, steps)

    async def job() -> None:
        async with running_hub(config) as (hub, address):
            gate = Gate(address)
            if how == "no answer":
                step, calls = hub.trunk.step, []

                async def slow(arrivals: Any) -> Any:
                    calls.append(1)
                    if len(calls) == 3:
                        await asyncio.sleep(1.0)
                    return await step(arrivals)

                monkeypatch.setattr(hub.trunk, "step", slow)
            device = Device(
                gate.open, load, token=token, data=examples(80), cache=tmp_path / "cache"
            )
            await device.join()
            training = asyncio.create_task(device.train())
            if how == "no link":
                while graphs.count("fuse") < 3:
                    await asyncio.sleep(0.001)
                gate.shut = True
                await gate.link.close()
                while "train" not in graphs:
                    await asyncio.sleep(0.001)
                gate.shut = False
            report = await asyncio.wait_for(training, 60)
            assert [r.round for r in report.rounds] == [1, 2]
            assert hub.rounds.completed == 2
            await device.close()

    asyncio.run(job())
    first, second = graphs[: len(graphs) // 2], graphs[len(graphs) // 2 :]
    assert first.count("fuse") >= 2
    assert first.count("train") >= 1
    assert first.count("fuse") + first.count("train") == 20
    assert second.count("fuse") == 20
