"""``cutlayer model export`` of base networks: bundles that answer without a hub, and mixtures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.signing import new_key, read_private_key, sign_folder
from edge_sdk.cli.main import main
from edge_sdk.errors import BundleError
from edge_sdk.inference.mixture import Mixture
from export.bases.dual_norms import robustness
from export.bundles.model_source import model_of
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import WEIGHTS, SplitModel
from server_hub.gateway.limits import Listen
from server_hub.gateway.releases import Releases
from server_hub.gateway.tokens import TokenFile
from server_hub.release_server import ReleaseConfig, ReleaseServer
from tests.lib.commands import refusal
from tests.lib.harness import served
from tests.lib.mixture_files import MODEL, tiers_toml
from tests.lib.mixture_models import CLASSES, FEATURES, made
from tests.lib.releases import spoiled
from tests.lib.runs import finished_run
from tests.lib.tasks import run as run_task

ORDER = [2, 0, 3, 1]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of four bases with dual norms, for ONNX."""
    folder = tmp_path_factory.mktemp("mix")
    tiers = tiers_toml(folder, "bases = 4\ndual_norms = true")
    main_quietly("export", MODEL, "--tiers", str(tiers), "--out", str(folder / "bundles"))
    return folder / "bundles"


def main_quietly(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0


def write_run(folder: Path, bundles: Path, order: list[int]) -> list[SplitModel]:
    """Write a finished run with some bases; return these, best first."""
    index = BundleIndex.read(bundles)
    models = {}
    for base in sorted(order):
        model = model_of(index.model, index.extra, None)
        model.load(bundles / WEIGHTS)
        generator = torch.Generator().manual_seed(base)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        models[base] = model.eval()
    finished_run(folder, bundles, {f"base-{b}": m for b, m in models.items()}, order=order)
    return [models[base] for base in order]


@pytest.fixture
def run(tmp_path: Path, bundles: Path) -> Path:
    write_run(tmp_path / "run", bundles, ORDER)
    return tmp_path / "run"


def mixed(run: Path, out: Path) -> Path:
    """Write bundles of the trained bases; return their folder."""
    main_quietly("model", "export", str(run), "--format", "bundles", "--out", str(out))
    return out / "bundles"


def test_the_best_bases_are_mixed_without_a_hub(tmp_path: Path, bundles: Path) -> None:
    models = write_run(tmp_path / "run", bundles, ORDER)
    mix = Mixture.open(mixed(tmp_path / "run", tmp_path / "out"), "small")
    x = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    for bases in range(1, 5):
        with torch.no_grad():
            answers = [answer_of(model, torch.from_numpy(x)) for model in models[:bases]]
        found = mix.answer(x, bases).logits[-1]
        np.testing.assert_allclose(found, torch.stack(answers).mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count", [1, 3])
def test_a_mixture_is_one_graph(count: int, tmp_path: Path, bundles: Path) -> None:
    """The graph of the best bases has the mean of their logits, at any robustness."""
    models = write_run(tmp_path / "run", bundles, ORDER)[:count]
    out = tmp_path / "out"
    main_quietly(
        "model", "export", str(tmp_path / "run"), "--out", str(out), "--bases", str(count),
        "--format", "onnx", "--format", "onnx-fp16", "--format", "onnx-int8",
    )  # fmt: skip
    x = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    for weight in (0.0, 0.4, 1.0):
        with torch.no_grad(), robustness(weight):
            want = torch.stack([answer_of(model, torch.from_numpy(x)) for model in models]).mean(0)
        for file, tolerance in (("model.onnx", 1e-5), ("model.fp16.onnx", 5e-3),
                                ("model.int8.onnx", 5e-2)):  # fmt: skip
            session = ort.InferenceSession(out / file, providers=["CPUExecutionProvider"])
            (got,) = session.run(["aux.2"], {"x": x, "robustness": np.float32(weight)[...]})
            error = np.abs(got - want.numpy()).max() / np.abs(want.numpy()).max()
            assert error < tolerance
            assert error > 0


@pytest.mark.slow
def test_a_mixture_runs_on_executorch(tmp_path: Path, bundles: Path) -> None:
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    models = write_run(tmp_path / "run", bundles, ORDER)[:2]
    main_quietly(
        "model", "export", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--bases", "2",
        "--format", "executorch", "--batch", "4",
    )  # fmt: skip
    method = Runtime.get().load_program(tmp_path / "out" / "model.pte").load_method("forward")
    assert method is not None
    x = torch.from_numpy(np.random.default_rng(0).random((3, 6)).astype(np.float32))
    with torch.no_grad(), robustness(0.4):
        want = torch.stack([answer_of(model, x) for model in models]).mean(0)
    (got,) = method.execute([x, torch.tensor(0.4)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def answer_of(model: SplitModel, x: Tensor) -> Tensor:
    """Return the logits of a base network's last head."""
    h = model.stem(x)
    for block in model.block:
        h = block(h)
    return model.answer(2, h)


def test_a_bundle_of_trained_bases_can_be_signed(tmp_path: Path, run: Path) -> None:
    out = mixed(run, tmp_path / "out")
    mine, other = (new_key(tmp_path / name) for name in ("mine", "other"))
    with pytest.raises(BundleError, match="not signed"):
        Mixture.open(out, "small", trust=[mine])
    sign_folder(out, read_private_key(tmp_path / "mine"))
    assert Mixture.open(out, "small", trust=[mine]).held == [0, 1, 2, 3]
    with pytest.raises(BundleError):
        Mixture.open(out, "small", trust=[other])


def test_bundles_that_are_not_of_trained_bases_are_told(bundles: Path) -> None:
    with pytest.raises(
        BundleError, match="holds no trained bases; write one with cutlayer model export"
    ):
        Mixture.open(bundles, "small")
    with pytest.raises(BundleError, match=r"no tier 'large' in .*; it has small"):
        Mixture.open(bundles, "large")


def test_what_is_no_run_of_these_bundles_is_refused(
    tmp_path: Path, run: Path, bundles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"

    def said(folder: Path, *options: str) -> str:
        line = refusal(
            capsys, "model", "export", str(folder), "--format", "bundles", "--out", str(out),
            *options,
        )  # fmt: skip
        assert not out.exists()
        return line

    assert "it has no metrics.jsonl" in said(tmp_path / "nowhere")
    write_run(tmp_path / "fewer", bundles, [1, 0])
    assert "has 2 bases, and the bundle of tier 'small' is for 4" in said(tmp_path / "fewer")
    assert "has 4 base networks; --bases is from 1 to 4" in said(run, "--bases", "5")
    assert (
        "has 4 base networks, which transformers cannot hold; the nearest format is onnx"
        in said(run, "--format", "transformers")
    )
    (run / "model.base-3.safetensors").write_bytes(b"nothing")
    assert "cannot read the model" in said(run)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_tiers_that_are_alike_have_the_same_graphs(tmp_path: Path) -> None:
    model = made(2).bases
    tier = Tier(2, runtime="torch", bases=2)
    index = export_bundles(
        model.hub, {"a": tier, "b": tier}, tmp_path / "bundles", bases=model,
        example=torch.zeros(4, FEATURES), classes=CLASSES, verified=False,
    )  # fmt: skip
    first, second = index.manifest("a"), index.manifest("b")
    assert (first.tier, second.tier) == ("a", "b")
    assert replace(first, tier="b") == second


def test_a_release_of_bases_is_mixed_by_devices(tmp_path: Path, bundles: Path) -> None:
    """A device that refuses the next release goes on with the bases of this one."""
    models = write_run(tmp_path / "run", bundles, ORDER)
    write_run(tmp_path / "next", bundles, [1, 3, 2, 0])
    place = Releases(tmp_path / "releases", create=True)
    place.publish(mixed(tmp_path / "run", tmp_path / "out"))
    tokens = TokenFile(tmp_path / "tokens.toml")
    token = tokens.issue("ada", "small", download_only=True)
    x = np.random.default_rng(0).random((5, 6)).astype(np.float32)
    server = ReleaseServer(ReleaseConfig(place.folder, tokens.path, Listen(port=0)))

    async def check(device: Device) -> None:
        for bases in (1, 3, 4):
            with torch.no_grad():
                answers = [answer_of(model, torch.from_numpy(x)) for model in models[:bases]]
            found = await device.predict(x, bases=bases, confidence=1.1)
            want = torch.stack(answers).mean(0).softmax(-1).numpy()
            np.testing.assert_allclose(found.probabilities, want, rtol=1e-4, atol=1e-5)

    async def main() -> None:
        async with (
            served(server) as url,
            await Device.connect(url, token=token, cache=tmp_path / "cache") as device,
        ):
            await check(device)
            place.publish(spoiled(mixed(tmp_path / "next", tmp_path / "out2")))
            assert not await device.refresh()
            await check(device)
            assert "does not answer its sample" in place.published()[1].refused["ada"]

    run_task(main())
