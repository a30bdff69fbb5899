"""Returned gradients: ``activate`` and ``backward`` against the same model without a cut."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from export.adapters_lora.lora import Lora, add_lora
from export.bundles.writer import Tier, export_bundles, make_steps
from export.cutting.pretrained import from_transformers
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from export.packing.codecs import Codec, get_codec
from export.steps.client_steps import ClientSteps
from export.steps.predict import forward
from export.steps.returned import activate, backward
from tests.lib.codecs import Exact
from tests.lib.decay import optimizer_of
from tests.lib.graph_runs import run_of, verify
from tests.lib.models import (
    CLASSES,
    conv_model,
)
from tests.lib.returned_models import CUT, HYPER, MODELS, WORDS, images, steps_of, words
from tests.lib.step_runtimes import runtime_of
from tests.lib.wrong_steps import wrong


class Uncut:
    """The whole model in float64: its loss, and the update of the part that a device trains."""

    def __init__(self, model: SplitModel, optimizer: str, seeded: bool) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.seeded = seeded
        held: list[Tensor] = [
            p
            for n, p in self.model.named_parameters()
            if p.requires_grad and n.startswith(("stem.", "block.0.", "block.1."))
        ]
        self.optimizer = optimizer_of(self.model, HYPER[optimizer], held)

    def trunk(self, h: Tensor, y: Tensor) -> Tensor:
        """Return the loss of the deep part, which a hub computes."""
        for block in self.model.block[CUT:]:
            h = block(h)
        logits = self.model.head(h)
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), y.reshape(-1))

    def activations(self, x: Tensor, seed: int) -> Tensor:
        """Return the activations of the shallow part in training mode."""
        with SeededDropout(torch.tensor(seed)):
            return self.model.segment(x.double() if x.is_floating_point() else x, CUT)

    def step(self, x: Tensor, y: Tensor, seed: int) -> Tensor:
        """Update the shallow part by the loss of the whole model; return the activations."""
        self.optimizer.zero_grad()
        h = self.activations(x, seed)
        self.trunk(h, y).backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return h.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Return all parameters and buffers."""
        return dict(self.model.state_dict())


def split_step(
    runtime: Runtime,
    steps: ClientSteps,
    hub: Uncut,
    x: Tensor,
    y: Tensor,
    seed: int,
    rule: str,
) -> Tensor:
    """Run one step of device, hub and device; return the activations that the hub received."""
    key = {"seed": np.asarray(seed)} if steps.random_calls > 0 else {}
    packed = runtime.run("activate", {"x": x.numpy(), **key})
    parts = {name: torch.from_numpy(array) for name, array in packed.items()}
    h = steps.codec.unpack(parts).double().requires_grad_()
    (gradient,) = torch.autograd.grad(hub.trunk(h, y), h)
    back = steps.codec.pack(gradient.float(), steps.axis)
    grad = {f"grad.{name}": part.numpy() for name, part in back.items()}
    hyper = {name: np.asarray(value, np.float32) for name, value in HYPER[rule].items()}
    assert runtime.run("backward", {"x": x.numpy(), **grad, **hyper, **key}) == {}
    return h.detach()


@pytest.mark.parametrize("codec", ["float32", "fp16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_split_step_is_the_uncut_step(kind: str, optimizer: str, codec: str) -> None:
    """Three steps of device and hub equal those of the whole model; auxiliary heads stay."""
    how: Codec = Exact() if codec == "float32" else get_codec(codec)
    model, steps = steps_of(kind, how, optimizer)
    _, draw, classes = MODELS[kind]
    runtimes: list[RuntimeName] = ["torch"]
    if codec == "float32" and optimizer == "adamw":
        runtimes += ["onnx"]
    for name in runtimes:
        runtime = runtime_of(steps, name, ("activate", "backward"))
        uncut = Uncut(model, optimizer, steps.random_calls > 0)
        initial = {n: t.clone() for n, t in uncut.tensors().items()}
        for number, rows in enumerate((8, 3, 5)):
            x = draw(rows, number)
            generator = torch.Generator().manual_seed(number)
            shape = x.shape if kind == "lora" else (rows,)
            y = torch.randint(classes, shape, generator=generator)
            hub = Uncut(model, optimizer, steps.random_calls > 0)
            seen = split_step(runtime, steps, hub, x, y, 70 + number, optimizer)
            h = uncut.step(x, y, 70 + number)
            tolerance = {"float32": 1e-5, "fp16": 0.05}[codec]
            assert distance(seen, h) < tolerance
        compare(runtime.get_state(), uncut.tensors(), initial, tolerance)


def distance(got: Tensor, want: Tensor) -> float:
    """Return the distance of two tensors, relative to the second."""
    return float((got - want).norm() / want.norm())


def compare(
    got: dict[str, Array], want: dict[str, Tensor], initial: dict[str, Tensor], tolerance: float
) -> None:
    """Check that the device's tensors equal those of the uncut model; its heads did not change."""
    trained = [name for name in got if not name.startswith("aux.")]
    assert len(trained) > 3
    for name in got.keys() - trained:
        np.testing.assert_array_equal(got[name], initial[name].float().numpy(), err_msg=name)
    changes = {name: want[name] - initial[name] for name in trained}
    for name, change in changes.items():
        assert change.abs().max() > 1e-5, f"the comparison is empty for {name}"
    found = [(torch.from_numpy(got[name]) - initial[name]).flatten() for name in trained]
    moved = torch.cat([change.flatten() for change in changes.values()])
    assert distance(torch.cat(found), moved) < tolerance


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("batchnorm", "torch"),
        *(
            pytest.param(kind, "torch", marks=pytest.mark.slow)
            for kind in MODELS
            if kind != "batchnorm"
        ),
        pytest.param("groupnorm", "onnx", marks=pytest.mark.slow),
        *(
            pytest.param(kind, "onnx", marks=pytest.mark.slow)
            for kind in ("batchnorm", "dropout", "lora")
        ),
        pytest.param("lora", "executorch", marks=pytest.mark.slow),
    ],
)
def test_exported(kind: str, runtime: RuntimeName, tmp_path: Path) -> None:
    """Every model exports and is verified; the graphs have the right inputs and outputs."""
    build, draw, classes = MODELS[kind]
    model = build()
    index = export_bundles(
        model, {"t": Tier(CUT, "int8", runtime, 8, graphs=["backward"])}, tmp_path / "out",
        example=draw(8), classes=classes,
    )  # fmt: skip
    graphs = index.manifest("t").graphs
    assert graphs.keys() == {"predict", "train", "forward", "activate", "backward"}
    seed = ["seed"] if kind == "dropout" else []
    inputs = [p.spec.name for p in graphs["activate"].inputs if p.role != "state"]
    assert inputs == ["x", *seed]
    assert [p.spec.name for p in graphs["activate"].outputs] == ["h.q", "h.scale"]
    inputs = [p.spec.name for p in graphs["backward"].inputs if p.role != "state"]
    grad = ["grad.h.q", "grad.h.scale"]
    assert inputs == ["x", *grad, "lr", "momentum", "weight_decay", "max_norm", *seed]
    assert [p.role for p in graphs["backward"].inputs if p.spec.name in grad] == ["packed"] * 2
    assert graphs["backward"].outputs == graphs["train"].outputs[: len(index.manifest("t").state)]


@pytest.mark.slow
def test_executorch() -> None:
    """The methods of a .pte file make the steps of the functions, also with dropout."""
    model, steps = steps_of("dropout", get_codec("int8"), "sgd")
    runtimes = [
        runtime_of(steps, name, ("activate", "backward")) for name in ("executorch", "torch")
    ]
    for number in range(3):
        y = torch.randint(CLASSES, (3,), generator=torch.Generator().manual_seed(number))
        for runtime in runtimes:
            hub = Uncut(model, "sgd", steps.random_calls > 0)
            split_step(runtime, steps, hub, images(3, number), y, number, "sgd")
    found, want = (runtime.get_state() for runtime in runtimes)
    for name, tensor in steps.initial.items():
        if name.startswith("aux."):
            np.testing.assert_array_equal(found[name], tensor.numpy())
        else:
            assert np.abs(want[name] - tensor.numpy()).max() > 1e-4
            np.testing.assert_allclose(found[name], want[name], rtol=1e-3, atol=1e-4)


def test_frozen_layers_before_the_cut() -> None:
    """Some layers may be frozen; if all are frozen, a gradient has nothing to train."""
    model = conv_model()
    model.add_heads([CUT], images(8), CLASSES)
    model.stem.requires_grad_(False)
    model.block[0].requires_grad_(False)
    segment = ClientSegment(model, CUT)
    steps = make_steps(segment, Tier(CUT, graphs=["backward"]), images(8), CLASSES, "sgd")
    verify(steps, backward(steps), run_of("torch", [backward(steps)]), images(8))
    model.block[1].requires_grad_(False)
    with pytest.raises(ExportError, match="every parameter before cut 2 is frozen"):
        make_steps(segment, Tier(CUT, graphs=["backward"]), images(8), CLASSES, "sgd")
    make_steps(segment, Tier(CUT), images(8), CLASSES, "sgd")


def test_further_graphs_change_no_others(tmp_path: Path) -> None:
    """Bundles without gradients have the three usual graphs, and their files are the same."""
    indices: list[BundleIndex] = [
        export_bundles(
            conv_model(), {"t": Tier(1, graphs=graphs)}, tmp_path / str(len(graphs)),
            example=images(8), classes=CLASSES, verified=False,
        )
        for graphs in ([], ["backward"])
    ]  # fmt: skip
    plain, more = (index.manifest("t") for index in indices)
    assert plain.graphs.keys() == {"predict", "train", "forward"}
    assert plain.graphs == {n: g for n, g in more.graphs.items() if n in plain.graphs}


@pytest.mark.parametrize(
    "name",
    [
        "block.0.conv.weight", "block.1.norm.running_mean", "momentum/block.1.conv.weight",
        "aux.2.out.bias", "momentum/aux.2.out.bias",
    ],
)  # fmt: skip
def test_a_wrong_backward_is_refused(name: str) -> None:
    """The error names a tensor that should change but does not, or the reverse."""
    _, steps = steps_of("batchnorm", get_codec("int8"), "sgd")
    step = backward(steps)
    run = run_of("torch", [step])
    verify(steps, step, run, images(8))
    with pytest.raises(ExportError, match=f"'backward' differs from eager PyTorch in next/{name}"):
        verify(steps, step, wrong(name, run), images(8))


def test_a_wrong_activate_is_refused() -> None:
    """In evaluation mode the activations differ, so the graph is refused."""
    _, steps = steps_of("batchnorm", get_codec("fp16"), "sgd")
    with pytest.raises(ExportError, match="'activate' differs from eager PyTorch in h"):
        verify(
            steps, activate(steps), lambda _, feeds: run_of("torch", [])(
                forward(steps), feeds
            ), images(8),
        )  # fmt: skip


def test_constants_that_a_step_does_not_need_are_not_in_its_file(tmp_path: Path) -> None:
    """A bias after all trained layers is large enough to be stored outside the graph."""
    config = transformers.GPT2Config(
        n_embd=256, n_layer=2, n_head=2, vocab_size=WORDS, n_positions=16, bos_token_id=1,
        eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = from_transformers(config)
    add_lora(model, Lora(rank=3), "gpt2")
    index = export_bundles(
        model,
        {"t": Tier(1, graphs=["backward"])},
        tmp_path / "out",
        example=words(8),
        classes=WORDS,
    )
    last = "block.0.layer.mlp.c_proj.bias"
    graphs = index.manifest("t").graphs
    assert last in graphs["activate"].constants
    assert last not in graphs["backward"].constants
