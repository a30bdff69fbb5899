"""The demo with texts in its smallest form: real processes over real WebSockets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from edge_sdk.protocol.tensors import Array
from server_hub.demo import texts
from server_hub.demo.demo_texts import TextDemo
from server_hub.demo.device_slow import SlowRuntime
from server_hub.demo.runner import run_demo
from server_hub.demo.texts import Pretraining, Shape
from server_hub.storage.run_folder import RoundRecord, read_records

pytestmark = pytest.mark.slow

SMALL = TextDemo(
    Shape(blocks=3, width=16, heads=2, context=32),
    Pretraining(steps=60, batch_size=8, lr=2e-2, warmup=5),
    rounds=14,  # real time decides when cuts move, and how fast so few rounds of them learn
    texts=32,
    held_out=8,
    lr=2e-2,
    lr_centralized=2e-2,
    cuts={"phone": 1, "laptop": 2},
    fleet={"phone-1": ("phone", 8), "laptop-1": ("laptop", 2), "laptop-2": ("laptop", 16)},
)


@pytest.fixture(scope="module")
def demo(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path, list[RoundRecord]]:
    """Return the demo's result, its folder, and the rounds that it reported."""
    folder = tmp_path_factory.mktemp("demo") / "run"
    told: list[RoundRecord] = []
    result = run_demo(SMALL, folder, Console(quiet=True), told.append)
    return json.loads(json.dumps(result)), folder, told


def test_fine_tuning_lowers_perplexity(demo: Any) -> None:
    """Perplexity is that of texts that no device has, through the hub and in the saved model."""
    result, _, _ = demo
    assert result["ppl_after"] < 0.99 * result["ppl_before"]
    assert result["ppl_centralized"] < 0.99 * result["ppl_before"]
    assert result["through_hub"].keys() == SMALL.cuts.keys()
    for value in result["through_hub"].values():
        assert value == pytest.approx(result["ppl_after"], rel=0.02)


def test_cuts_are_those_that_the_moves_say(demo: Any) -> None:
    """A device's cut starts at that of its tier and changes only with its moves."""
    result, _, told = demo
    cuts = {name: SMALL.cuts[tier] for name, (tier, _) in SMALL.fleet.items()}
    assert len(result["cuts"]) == SMALL.rounds
    for number, round_cuts in enumerate(result["cuts"], 1):
        assert round_cuts == cuts
        for move in result["moves"]:
            if move["round"] == number:
                assert (cuts[move["device"]], "a round takes it" in move["reason"]) == (
                    move["cut"], True
                )  # fmt: skip
                cuts[move["device"]] = move["to"]
    assert [record.cuts for record in told] == result["cuts"]
    assert sum(len(record.moves) for record in told) == len(result["moves"])


def test_the_run_folder_and_the_json_say_what_happened(demo: Any) -> None:
    """They have traffic of adapters, activations and gradients, a continued text, and a report."""
    result, folder, told = demo
    keys = {"ppl_before", "ppl_after", "ppl_centralized", "cuts", "moves", "bytes", "seconds"}
    assert keys <= result.keys()
    for kind, way in (("activations", "up"), ("update", "up"), ("infer", "up"),
                      ("gradient", "down"), ("blob", "down"), ("answer", "down")):  # fmt: skip
        assert result["bytes"][kind][way] > 0
    assert result["written"].startswith("Return a copy of the ")
    assert len(result["written"]) > 40
    assert result["device_rss_mb"] < 250
    assert read_records(folder) == told
    report = (folder / "report.md").read_text()
    assert "all texts in one place" in report
    for name in ("curves.png", "model.safetensors", "base/config.json", "logs/hub.log"):
        assert (folder / name).exists()


@pytest.mark.parametrize("context", [48, 64])
def test_no_text_is_on_two_sides(context: int) -> None:
    """Pretraining, devices and held-out texts share no paragraph, and every load is the same."""
    data, again = (texts.load(texts.TOPICS, context, 50, 10) for _ in range(2))
    written = bytes(data.pretraining.numpy().astype(np.uint8))
    seen: set[bytes] = set()
    for part in (*data.shares.values(), data.held_out):
        for x, y in zip(part.x, part.y, strict=True):
            length = int((y >= 0).sum())
            assert (x[1:length] == y[: length - 1]).all()
            text = bytes(x[:length].astype(np.uint8)) + bytes([int(y[length - 1])])
            if length == context and len(set(text)) > 12:  # headings and lines of dashes may repeat
                assert text not in written
                seen.add(text)
    assert len(seen) > 100
    np.testing.assert_array_equal(data.held_out.x, again.held_out.x)
    assert data.shares.keys() == set(texts.TOPICS)


def test_a_slow_device_computes_the_same_and_takes_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It sleeps for the rest of the step's time multiplied by its factor."""

    class Fake:
        clock, slept, loading_s = 0.0, 0.0, 0.0

        def run(self, graph: str, batch: Any) -> dict[str, Array]:
            Fake.clock += 0.25
            return {"loss": np.array(7.0)}

    def sleep(seconds: float) -> None:
        Fake.slept += seconds

    monkeypatch.setattr("server_hub.demo.device_slow.time.perf_counter", lambda: Fake.clock)
    monkeypatch.setattr("server_hub.demo.device_slow.time.thread_time", lambda: Fake.clock)
    monkeypatch.setattr("server_hub.demo.device_slow.time.sleep", sleep)
    for slower, want in ((1, 0.0), (4, 0.75), (16, 3.75)):
        Fake.slept = 0.0
        runtime: Any = Fake()
        assert SlowRuntime(runtime, slower).run("train", {})["loss"] == 7.0
        assert Fake.slept == pytest.approx(want)
