"""Texts in everything that users see: the SDK's answers, commands, reports, pictures, plans."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk import DataError, Device, Evaluation, Prediction
from edge_sdk.cli.main import main
from edge_sdk.errors import LinkClosed
from edge_sdk.inference import prediction
from edge_sdk.inference.mixture import Mixture
from edge_sdk.inference.prediction import AnswerOptions, Predictor
from edge_sdk.protocol.messages import Answer
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime.measure import Measurement
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.transport.connection import Question
from edge_sdk.transport.link import open_websocket
from export.bundles.writer import Tier, export_bundles, make_steps, segment_of
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from export.planning import measuring
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.torch_runtime import TorchRuntime
from export.steps.train import train
from server_hub.config import HubConfig
from server_hub.gateway.limits import Listen
from server_hub.gateway.tokens import TokenFile
from server_hub.hub import Hub
from server_hub.methods.settings import LocalTraining
from server_hub.reports.comparison import cost_table
from server_hub.reports.rounds import round_line
from server_hub.rounds.rounds import RoundRules
from server_hub.simulation import cli as simulation_cli
from server_hub.simulation.datasets import DataTable
from server_hub.simulation.job import FleetTier, Job, RoundsTable
from server_hub.simulation.results import summary
from server_hub.simulation.simulate import Simulation
from server_hub.simulation.trunk import flop_above
from server_hub.storage.run_folder import RoundRecord
from server_hub.trunk.evaluator import Evaluator
from server_hub.trunk.interface import Query
from server_hub.trunk.local import LocalTrunk
from server_hub.trunk.settings import TrunkTraining
from tests.lib.harness import start_hub
from tests.lib.models import AttentionBlock, TokenBlock
from tests.lib.plans import write_without_lowering
from tests.lib.records import record

WORDS, WIDTH, LENGTH = 11, 8, 9
EXAMPLE = torch.zeros(2, LENGTH, dtype=torch.int64)
TIERS = {name: Tier(cut, codec="fp16", runtime="torch") for name, cut in (("a", 1), ("b", 2))}


class Stem(nn.Module):
    """Embeddings of tokens and positions."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D)."""
        h: Tensor = self.embedding(x) + self.place(torch.arange(x.shape[1]))
        return h


def build(words: int = WORDS) -> SplitModel:
    """Return three causal blocks of width 8; answers differ by more than fp16 rounding."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, words)
    nn.init.normal_(head.weight)
    return SplitModel(Stem(words), [AttentionBlock(WIDTH) for _ in range(3)], head, "tokens")


class OnePlace(nn.Module):
    """Embeddings of tokens only, so that every position costs the same."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, T, D)."""
        h: Tensor = self.embedding(x)
        return h


def build_without_attention() -> SplitModel:
    """Return three blocks that process each position alone."""
    torch.manual_seed(0)
    blocks = [TokenBlock(WIDTH) for _ in range(3)]
    return SplitModel(OnePlace(), blocks, nn.Linear(WIDTH, 256), "tokens")


def with_heads() -> SplitModel:
    model = build()
    model.add_heads([1, 2], EXAMPLE, WORDS)
    return model.eval()


def texts(rows: int, seed: int = 0) -> Examples:
    """Return random texts of random lengths, with the next tokens as labels."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, WORDS, (rows, LENGTH + 1))
    y = np.where(np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (rows, 1)), x[:, 1:], -1)
    return Examples(x[:, :-1], y)


@torch.no_grad()
def eager(model: SplitModel, x: Array, cut: int) -> tuple[Tensor, Tensor]:
    """Return logits of the device's heads and of the hub's, (heads, B, T, V), in float64."""
    h = model.double().stem(torch.from_numpy(x))
    own: list[Tensor] = []
    above: list[Tensor] = []
    for depth in range(1, model.depth + 1):
        h = model.block[depth - 1](h)
        if str(depth) in model.aux:
            (own if depth <= cut else above).append(model.answer(depth, h))
    return torch.stack(own), torch.stack([*above, model.head(h)])


# --- the SDK --------------------------------------------------------------------------------------


def steps_of(model: SplitModel, tier: str) -> ClientSteps:
    return make_steps(segment_of(model, TIERS[tier]), TIERS[tier], EXAMPLE, WORDS, "sgd")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("texts") / "bundles"
    return export_bundles(
        build(), TIERS, folder, example=EXAMPLE, classes=WORDS, verified=False
    )  # fmt: skip


Asked = list[dict[str, Array]]


@pytest.fixture(params=["a", "b"])
def pair(request: pytest.FixtureRequest, bundles: Any) -> tuple[Predictor, Asked, int]:
    """A predictor whose hub is a function, the questions to that function, and the cut."""
    tier = request.param
    model, cut = with_heads(), TIERS[tier].cut
    learner = Learner(
        bundles.manifest(tier), TorchRuntime(bundles.manifest(tier), steps_of(model, tier))
    )
    served = Evaluator(with_heads(), "cpu")
    served.serve({cut: {n: t.detach().numpy() for n, t in model.trained().items()}})
    asked: Asked = []

    async def ask(question: Question) -> Answer:
        assert question.tier == tier
        asked.append(question.parts)
        logits = served.answer(Query(cut, "fp16", question.parts))
        return Answer(request=1, heads=["?"] * len(logits), logits=logits)

    async def mixing(bases: int) -> Mixture:
        raise AssertionError("the model has no bases")

    predictor = Predictor(lambda: learner, ask, mixing, lambda: None, lambda: 2**26, lambda: False)
    return predictor, asked, cut


def predict(predictor: Predictor, x: Array, confidence: float) -> Prediction:
    return asyncio.run(predictor.predict(x, confidence, 10.0, AnswerOptions()))


def test_a_prediction_for_texts_is_the_token_behind_the_last_position(
    pair: tuple[Predictor, Asked, int],
) -> None:
    predictor, asked, cut = pair
    x = texts(6).x
    own, hub = eager(with_heads(), x, cut)
    alone = predict(predictor, x, 0.0)
    assert not asked
    assert alone.probabilities.shape == (6, WORDS)
    np.testing.assert_allclose(
        alone.probabilities, own[:, :, -1].softmax(-1).mean(0), atol=1e-5
    )  # fmt: skip
    every = predict(predictor, x, 1.1)
    assert every.by_hub.all()
    want = torch.cat([own, hub])[:, :, -1].softmax(-1).mean(0)
    np.testing.assert_allclose(every.probabilities, want, atol=5e-3)
    some = predict(predictor, x, float(np.median(alone.probabilities.max(1))))
    np.testing.assert_array_equal(
        some.by_hub, alone.probabilities.max(1) < np.median(alone.probabilities.max(1))
    )
    np.testing.assert_allclose(some.probabilities[some.by_hub], want[some.by_hub], atol=5e-3)


def evaluate(predictor: Predictor, data: Examples, batch_size: int = 4) -> Evaluation:
    return asyncio.run(predictor.evaluate(data, batch_size))


def test_an_evaluation_of_texts_is_their_perplexity(pair: tuple[Predictor, Asked, int]) -> None:
    predictor, _, cut = pair
    data = texts(13)
    found = evaluate(predictor, data)
    assert (found.metric, found.samples) == ("perplexity", 13)
    own, hub = eager(with_heads(), data.x, cut)
    y = torch.from_numpy(data.y).flatten()
    for value, logits in (
        (found.device_alone, own),
        (found.through_hub, hub[-1:]),
        (found.ensemble, torch.cat([own, hub])),
    ):
        log_p = logits.softmax(-1).mean(0).log().flatten(0, 1)
        want = math.exp(cross_entropy(log_p, y, ignore_index=-1).item())
        assert value == pytest.approx(want, rel=2e-3)


def test_the_hub_is_asked_for_no_more_than_a_message_holds(
    pair: tuple[Predictor, Asked, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor, asked, cut = pair
    data = texts(13)
    heads = 3 - cut
    whole, many = evaluate(predictor, data, 13), len(asked)
    answer = predict(predictor, data.x, 1.1)
    for rows in (5, 1):
        asked.clear()
        monkeypatch.setattr(prediction, "_ROOM", 4 * heads * rows * LENGTH * WORDS)
        assert evaluate(predictor, data, 13).ensemble == pytest.approx(whole.ensemble, rel=1e-6)
        assert len(asked) > many
        asked.clear()
        again = predict(predictor, data.x, 1.1)
        np.testing.assert_allclose(again.probabilities, answer.probabilities, rtol=1e-5)
        sent = [len(parts["h"]) for parts in asked]
        assert sum(sent) == 13
        assert max(sent) == rows
    asked.clear()
    monkeypatch.setattr(prediction, "_ROOM", 4 * heads * LENGTH * WORDS - 1)
    with pytest.raises(DataError, match="take shorter texts"):
        predict(predictor, data.x, 1.1)
    assert not asked


def test_generated_text_is_what_the_uncut_model_says_next(
    pair: tuple[Predictor, Asked, int],
) -> None:
    predictor, _, cut = pair
    model, begin = with_heads(), texts(3).x[:, :2]

    def generate(tokens: int, *settings: Any) -> Array:
        return asyncio.run(predictor.generate(begin, tokens, *settings))

    want = begin
    for _ in range(12):  # longer than the model's context: it reads the last 9 tokens
        logits = eager(model, want[:, -LENGTH:], cut)[1][-1, :, -1]
        want = np.concatenate([want, logits.argmax(1)[:, None].numpy()], axis=1)
    np.testing.assert_array_equal(generate(12, 0.0, 0, LENGTH), want)
    np.testing.assert_array_equal(
        generate(4, 1e-6, 5, None), want[:, :6]
    )  # only the largest is not 0
    drawn = generate(5, 2.0, 1, None)
    np.testing.assert_array_equal(generate(5, 2.0, 1, None), drawn)
    assert any((generate(5, 2.0, seed, None) != drawn).any() for seed in (2, 3))


def test_drawn_tokens_have_the_probabilities_of_the_softmax(
    pair: tuple[Predictor, Asked, int],
) -> None:
    predictor, _, cut = pair
    begin = np.repeat(texts(1).x[:, :3], 4000, axis=0)
    drawn = asyncio.run(predictor.generate(begin, 1, 1.5, 0, None))[:, -1]
    p = (eager(with_heads(), begin[:1], cut)[1][-1, 0, -1] / 1.5).softmax(-1).numpy()
    spread = np.sqrt(p * (1 - p) / 4000)
    assert (abs(np.bincount(drawn, minlength=WORDS) / 4000 - p) < 5 * spread + 1e-3).all()


def test_what_cannot_be_generated_is_told(pair: tuple[Predictor, Asked, int]) -> None:
    predictor, *_ = pair
    x = texts(2).x[:, :2]
    for arguments, says in (
        ((x[0], 1, 0.0, 0, None), r"shape \[2\]"),
        ((x, 1, -1.0, 0, None), "temperature is -1"),
        ((x, 1, 0.0, 0, 0), "context 0"),
        ((x.astype(np.float32), 1, 0.0, 0, None), "x is float32"),
    ):
        with pytest.raises(DataError, match=says):
            asyncio.run(predictor.generate(*arguments))


def test_a_device_that_only_downloads_asks_nothing(bundles: Any) -> None:
    """Its own heads answer; to go on with a text takes the whole model."""
    learner = Learner(
        bundles.manifest("a"), TorchRuntime(bundles.manifest("a"), steps_of(with_heads(), "a"))
    )

    async def ask(question: Question) -> Answer:
        raise AssertionError("the hub answers no questions")

    async def mixing(bases: int) -> Mixture:
        raise AssertionError("the model has no bases")

    predictor = Predictor(learner=lambda: learner, ask=ask, fetch_bases=mixing,
                          failure=lambda: None, largest_message=lambda: 2**26,
                          only_downloads=lambda: True)  # fmt: skip
    data = texts(6)
    assert not predict(predictor, data.x, 1.1).by_hub.any()
    found = asyncio.run(predictor.evaluate(data, 4))
    assert found.device_alone > 1
    assert found.through_hub is found.ensemble is None
    with pytest.raises(DataError, match="the device's token only downloads"):
        asyncio.run(predictor.generate(data.x, 1, 0.0, 0, None))


# --- a real hub -----------------------------------------------------------------------------------


async def served_job(
    folder: Path,
    bundles: Any,
    use: Callable[[Device], Awaitable[None]],
    paths: tuple[str, ...] | None = None,
) -> tuple[Hub, list[RoundRecord]]:
    """Run one round of a hub with a device of tier b, over a WebSocket; ``use`` gets the device.

    With ``paths``, the hub's method trains only these ways to answer.
    """
    folder.mkdir(exist_ok=True)
    tokens = TokenFile(folder / "tokens.toml")
    token = tokens.issue("phone", "b")
    held_out = texts(20, 7)
    np.savez(folder / "held_out.npz", x=held_out.x, y=held_out.y)
    config = HubConfig(
        bundles=bundles.folder, tokens=tokens.path, run=folder / "run", listen=Listen(port=0),
        held_out=folder / "held_out.npz", rounds=RoundRules(count=1, min_devices=1),
        local=LocalTraining(batch_size=4, hyper={"lr": 0.05}),
        trunk=TrunkTraining(device="cpu", hyper={"lr": 0.05}),
    )  # fmt: skip
    model = with_heads()
    trunk = LocalTrunk(model, "cpu", (held_out.x, held_out.y))
    records: list[RoundRecord] = []
    hub = Hub(config, model, trunk, on_round=records.append)
    if paths is not None:
        hub.method = replace(hub.method, paths=paths)
    serving, url = await start_hub(hub)
    device = Device(
        lambda: open_websocket(url),
        lambda bundle, threads: TorchRuntime(bundle.manifest, steps_of(with_heads(), "b")),
        token=token, data=texts(16, 3), cache=folder / "cache", patience_s=0.5,
    )  # fmt: skip
    try:
        await device.join()
        await device.train()
        await use(device)
    finally:
        await device.close()
    await serving
    return hub, records


def test_a_record_has_the_ways_to_answer_that_the_method_trains(
    tmp_path: Path, bundles: Any
) -> None:
    async def nothing(device: Device) -> None:
        """Do nothing after the round."""

    _, (record,) = asyncio.run(
        served_job(tmp_path, bundles, nothing, paths=("through_hub",))  # as SplitFT
    )
    assert record.accuracy["b"].keys() == {"through_hub"}


def test_device_and_hub_measure_the_same_perplexity_and_generate(
    tmp_path: Path, bundles: Any
) -> None:
    found: dict[str, Any] = {}

    async def use(device: Device) -> None:
        found["evaluation"] = await device.evaluate(texts(20, 7))
        found["text"] = await device.generate(texts(2).x[:, :3], 4)
        found["next"] = await device.predict(texts(2).x)

    hub, (record,) = asyncio.run(served_job(tmp_path, bundles, use))
    assert record.metric == hub.run.metric == hub.run.records[0].metric == "perplexity"
    assert "%" not in round_line(record)
    evaluation = found["evaluation"]
    assert evaluation.metric == "perplexity"
    for path, value in record.accuracy["b"].items():
        assert getattr(evaluation, path) == pytest.approx(value, rel=1e-3)
    # PyTorch gives the same answers with the saved model
    model = with_heads()
    model.load(tmp_path / "run" / "model.safetensors")
    codec, want = get_codec("fp16"), texts(2).x[:, :3]
    with torch.no_grad():
        for _ in range(4):
            h = model.eval().segment(torch.from_numpy(want), 2)
            h = model.block[2](codec.unpack(codec.pack(h, 2)))
            following = model.head(h)[:, -1].argmax(1)
            want = np.concatenate([want, following[:, None].numpy()], axis=1)
    np.testing.assert_array_equal(found["text"], want)
    assert found["next"].labels.shape == (2,)


def test_a_text_cannot_be_generated_without_the_hub(tmp_path: Path, bundles: Any) -> None:
    async def use(device: Device) -> None:
        await device.close()
        with pytest.raises(LinkClosed):
            await device.generate(texts(1).x[:, :3], 1)

    asyncio.run(served_job(tmp_path, bundles, use))


# --- commands -------------------------------------------------------------------------------------


def run(arguments: list[str]) -> None:
    """Run ``cutlayer``, which must succeed."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert not end.value.code


JOB = """
model = "{model}"
method = "splitft"
optimizer = "sgd"
[data]
source = "some.txt"
length = {length}
train = 8
test = 4
[rounds]
count = 2
[local]
batch_size = 4
[tiers.a]
clients = 1
cut = 2
codec = "fp16"
gflops = 0.0001
[cuts]
policy = "latency"
options = [1, 2]
"""


def write_job(folder: Path, model: str = "build_without_attention", length: int = 24) -> Path:
    words = ("the quick brown fox jumps over the lazy dog " * 6)[: 3 * LENGTH]
    (folder / "some.txt").write_text(f"{words}\n\n" * 12)
    path = folder / f"{model}-{length}.toml"
    path.write_text(JOB.format(model=f"{__name__}:{model}", length=length))
    return path


def test_simulate_prints_perplexity_and_the_moves_as_they_happen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    run(["simulate", str(write_job(tmp_path)), "--run", str(tmp_path / "run")])
    out = capsys.readouterr().out
    assert len(re.findall(r"^after round \d+ a-1 goes from cut 2 to 1: ", out, re.M)) == 1
    assert "Perplexity" in out
    report = (tmp_path / "run" / "report.md").read_text()
    assert re.search(r"^\| a-1 \| .+ \| 1 \| 2 \| 1 \|$", report, re.M)
    assert (tmp_path / "run" / "cuts.png").exists()


def test_compare_takes_a_perplexity_as_target_for_texts_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    job = write_job(tmp_path)
    runs = {
        ("splitft", 0): (
            Job.read(job),
            [record(1), record(2, accuracy={"a": {"through_hub": 7.0}})],
        )
    }
    monkeypatch.setattr(simulation_cli, "run_comparison", lambda *args: runs)
    run(["compare", str(job), "--target", "25", "--run", str(tmp_path / "out")])
    out = " ".join(capsys.readouterr().out.split())
    assert "until a perplexity of 25" in out
    assert cost_table(summary(runs, 25.0)).header[-1] == "perplexity 25, s"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "![perplexity against rounds, traffic and time, and by tier](comparison.png)" in report
    assert "| perplexity 25, s |" in report
    assert "ccuracy" not in report
    digits = Path(__file__).parents[2] / "examples" / "fleet" / "digits.toml"
    with pytest.raises(SystemExit) as end:
        main(["compare", str(digits), "--target", "25", "--run", str(tmp_path / "other")])
    assert end.value.code == 2
    assert "--target is 25; accuracy is a fraction, from 0 to 1" in capsys.readouterr().err


# --- operations -----------------------------------------------------------------------------------


def test_the_trunk_is_charged_for_the_positions_of_a_text_and_no_more(tmp_path: Path) -> None:
    """The same texts in longer rows take the same operations, which equal a count by hand."""
    spent = {}
    for length in (30, 50):
        job = replace(
            Job.read(write_job(tmp_path, length=length)), method="fedsplitx",
            rounds=RoundsTable(1), tiers={"a": FleetTier(clients=1, cut=2, codec="fp16")},
            data=DataTable("some.txt", length=length, train=8, test=4),
        )  # fmt: skip
        with Simulation(job, tmp_path / f"run-{length}", base=tmp_path) as simulation:
            (done,) = simulation.run()
        spent[length] = done.costs["trunk_flop"]
    positions = 8 * (3 * LENGTH - 1)  # the last token of a text has no next token
    forward = 2 * (2 * 2 * WIDTH * WIDTH + 256 * WIDTH)  # a block of two products, and the head
    assert spent[30] == spent[50] == 3 * positions * forward


def test_operations_above_a_cut_are_per_position_of_a_text() -> None:
    model = build_without_attention()
    model.add_heads([2], EXAMPLE, 256)
    above = flop_above(model, [1, 2], EXAMPLE)
    block, head = 2 * 2 * 2 * WIDTH * WIDTH, 2 * WIDTH * 256
    assert above[2] == block + head
    aux = 2 * 2 * WIDTH * 8 + 2 * WIDTH * 256  # down to 8 and up again, and the table of tokens
    assert above[1] == above[2] + block + aux


def test_operations_of_a_step_on_a_trained_table_are_those_of_eager_training() -> None:
    """The table is an argument of the head, and the loss has a gradient for it."""
    model = with_heads().train()
    counted = flops_per_row(train(steps_of(model, "b")), LENGTH)
    x = torch.from_numpy(texts(2).x)
    with FlopCounterMode(display=False) as counter:
        h = model.stem(x)
        losses = []
        for depth in (1, 2):
            h = model.block[depth - 1](h)
            losses.append(cross_entropy(model.answer(depth, h).flatten(0, 1), x.flatten()))
        sum(losses, torch.zeros(())).backward()
    assert counted == counter.get_total_flops() / 2


def test_plan_of_a_model_of_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "measure_apart", lambda *args: Measurement(0.1, 10, 20))
    monkeypatch.setattr(measuring, "write_tier", write_without_lowering)
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(f"length = {LENGTH}\n[tiers.phone]\nbatch = 4\ngflops = 1\nexamples = 10\n")
    arguments = [
        "plan",
        f"{__name__}:build_without_attention",
        "--tiers",
        str(tiers),
        "--cuts",
        "1",
    ]
    run([*arguments, "--json"])
    (cost,) = json.loads(capsys.readouterr().out)["cuts"]
    assert (cost["cut"], cost["tokens"]) == (1, LENGTH)
    block, down = 2 * 2 * 2 * WIDTH * WIDTH, 2 * 2 * WIDTH * 8
    # a training step has three products per product of the forward pass
    assert cost["flops"] == 3 * LENGTH * (block + down + 2 * WIDTH * 256)
