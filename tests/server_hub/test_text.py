"""Language models through the hub: batches of texts, checks, simulated jobs, perplexity."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.ranges import MAX_POSITIONS
from edge_sdk.errors import ConfigError, DataError, ProtocolError
from edge_sdk.inference.metrics import Tally
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.tensors import Array
from edge_sdk.training import text
from edge_sdk.training.data import Examples
from export.bundles.writer import Tier, export_bundles
from export.cutting.split_model import SplitModel
from server_hub.config import HubConfig
from server_hub.hub import Hub
from server_hub.methods.settings import LocalTraining
from server_hub.reports.comparison import accuracy_table, cost_table
from server_hub.reports.report import write_report
from server_hub.rounds.validation import check_answer, check_labels, check_packed
from server_hub.simulation.datasets import DataTable, load_dataset
from server_hub.simulation.job import DeviceRuntime, FleetTier, Job, RoundsTable
from server_hub.simulation.results import (
    common_target,
    rows_of,
    summary,
    write_comparison,
)
from server_hub.simulation.simulate import Simulation
from server_hub.storage.run_folder import RoundRecord, RunFolder, read_records
from server_hub.trunk.evaluator import batches_to_evaluate, vocabulary
from server_hub.trunk.settings import TrunkTraining

WORDS = 258


def build() -> SplitModel:
    """Return a GPT-2 of three layers, width 32, with a vocabulary of 258 tokens."""
    from transformers import GPT2Config

    from export.cutting.pretrained import from_transformers

    config = GPT2Config(
        vocab_size=WORDS, n_positions=128, n_embd=32, n_layer=3, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return from_transformers(config)


def texts(rows: int, longest: int, seed: int) -> Examples:
    """Return texts of random lengths, some with gaps, some without labels that count."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 9, (rows, longest))
    y = rng.integers(0, 9, (rows, longest))
    y[np.arange(longest) >= rng.integers(0, longest + 1, rows)[:, None]] = -1
    y[rng.random(y.shape) < 0.2] = -1
    return Examples(x, y)


# --- batches --------------------------------------------------------------------------------------


def end_of(y: Array) -> int:
    """Return the number of positions up to the last label that counts."""
    return max((i + 1 for i, label in enumerate(y) if label >= 0), default=0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    longest=st.integers(1, 7),
    size=st.integers(1, 6),
    seed=st.integers(0, 99),
    shuffled=st.booleans(),
)
def test_batches_hold_every_text_once_and_end_with_their_longest(
    rows: int, longest: int, size: int, seed: int, shuffled: bool
) -> None:
    data = texts(rows, longest, seed)
    data.x[:, 0] = np.arange(rows)  # so that a test can identify them
    rng = np.random.default_rng(seed) if shuffled else None
    seen: list[int] = []
    for batch in text.batches(data, size, rng):
        assert 1 <= len(batch) <= size
        ends = [end_of(y) for y in batch.y]
        assert batch.x.shape == batch.y.shape == (len(batch), max(ends))
        for x, y, end in zip(batch.x, batch.y, ends, strict=True):
            assert end >= 1
            np.testing.assert_array_equal(x, data.x[x[0], : len(x)])
            np.testing.assert_array_equal(y, data.y[x[0], : len(y)])
            seen.append(int(x[0]))
    assert sorted(seen) == [i for i in range(rows) if end_of(data.y[i])]


def test_batches_of_similar_length_are_little_padded_and_differ_every_time() -> None:
    rng = np.random.default_rng(0)
    ends = rng.integers(1, 65, 512)
    y = np.where(np.arange(64) < ends[:, None], 1, -1)
    data = Examples(np.arange(512)[:, None].repeat(64, 1), y)

    def sent(seed: int) -> tuple[int, list[tuple[int, ...]]]:
        batches = list(text.batches(data, 8, np.random.default_rng(seed)))
        return sum(b.y.size for b in batches), [tuple(b.x[:, 0]) for b in batches]

    positions, order = sent(0)
    assert positions < 1.15 * ends.sum()
    assert sent(0)[1] == order
    assert {frozenset(b) for b in sent(1)[1]} != {frozenset(b) for b in order}


# --- perplexity -----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(heads=st.integers(1, 3), seed=st.integers(0, 99))
def test_perplexity_is_that_of_the_mean_of_the_heads(heads: int, seed: int) -> None:
    tally = Tally("tokens")
    probabilities: list[float] = []
    generator = torch.Generator().manual_seed(seed)
    for part in range(3):
        y = torch.from_numpy(texts(4, 5, 3 * seed + part).y)
        logits = 3 * torch.randn(heads, 4, 5, 9, generator=generator, dtype=torch.float64)
        tally.add(logits.numpy(), y.numpy())
        for row in range(4):
            for position in range(5):
                if (label := int(y[row, position])) >= 0:
                    p = [torch.softmax(z[row, position], 0)[label].item() for z in logits]
                    probabilities.append(sum(p) / heads)
    if probabilities:
        want = math.exp(-sum(map(math.log, probabilities)) / len(probabilities))
        assert tally.value == pytest.approx(want, rel=1e-9)


def test_perplexity_of_a_model_that_has_overflowed_is_a_number() -> None:
    tally = Tally("tokens")
    tally.add(np.array([[[[0.0, 1e30]]]], np.float32), np.array([[0]]))
    assert json.loads(json.dumps(tally.value)) == math.exp(700)


def test_texts_are_measured_as_many_at_a_time_as_memory_has_room_for() -> None:
    model = build()
    y = np.zeros((300, 1024), np.int64)
    sizes = [len(batch) for batch in batches_to_evaluate(Examples(y, y), model)]
    assert sum(sizes) == 300
    assert max(sizes) * 1024 * vocabulary(model) <= 2**24


# --- what devices send ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> BundleIndex:
    folder = tmp_path_factory.mktemp("bundles") / "out"
    example = torch.zeros(2, 6, dtype=torch.int64)
    return export_bundles(
        build(), {"a": Tier(cut=1, runtime="torch")}, folder, example=example, classes=WORDS,
        verified=False,
    )  # fmt: skip


def packed(rows: int = 3, positions: int = 5) -> dict[str, Array]:
    """Return activations that fit the manifest."""
    return {
        "h.q": np.zeros((rows, positions, 32), np.int8),
        "h.scale": np.ones((rows, positions, 1), np.float32),
    }


def test_labels_are_one_for_each_position_that_was_sent(index: BundleIndex) -> None:
    manifest = index.manifest("a")
    sizes = check_packed(packed(), manifest)
    assert sizes == {"batch": 3, "seq": 5}
    y = np.full((3, 5), -1)
    y[1, 2] = WORDS - 1
    check_labels(y, sizes, manifest, on_device=False)
    wrong: list[tuple[Any, str]] = [
        (y[:, :4], r"\[3, 4\], must be int64 \[3, 5\]"),
        (y[0], r"must be int64 \[3, 5\]"),
        (y.astype(np.int32), "int32"),
        (np.full((3, 5), -1), "no position has a label"),
        (np.full((3, 5), -2), "the label -2; the model has the classes 0 to 257; -1 marks"),
        (np.full((3, 5), WORDS), "the label 258; the model has the classes 0 to 257"),
    ]
    for labels, says in wrong:
        with pytest.raises(ProtocolError, match=says) as error:
            check_labels(labels, sizes, manifest, on_device=False)
        assert error.value.code == ErrorCode.BAD_LABELS


def test_texts_and_answers_that_take_too_much_memory_are_refused(index: BundleIndex) -> None:
    manifest = index.manifest("a")
    with pytest.raises(ProtocolError, match="129 positions; they may have 128"):
        check_packed(packed(1, 129), manifest)  # the model's table of positions ends there
    manifest = replace(manifest, limits={})
    check_packed(packed(1, MAX_POSITIONS), manifest)
    with pytest.raises(ProtocolError, match="8192 at most"):
        check_packed(packed(1, MAX_POSITIONS + 1), manifest)
    short: Manifest = replace(manifest, limits={"seq": 4})
    with pytest.raises(ProtocolError, match="4 at most"):
        check_packed(packed(), short)
    check_answer({"batch": 8, "seq": 64}, 2, WORDS)
    with pytest.raises(ProtocolError, match="fewer rows or shorter texts"):
        check_answer({"batch": 8, "seq": 64}, 2, 50257)


def test_a_hub_takes_bundles_of_a_model_of_tokens(index: BundleIndex, tmp_path: Path) -> None:
    (tmp_path / "tokens.toml").write_text("[devices]\n")
    held_out = texts(20, 6, 0)
    np.savez(tmp_path / "held_out.npz", x=held_out.x, y=held_out.y)
    config = HubConfig(
        bundles=index.folder, tokens=tmp_path / "tokens.toml", run=tmp_path / "run",
        held_out=tmp_path / "held_out.npz",
    )  # fmt: skip
    hub = Hub(config, build())
    assert hub.manifests["a"].task == "tokens"


# --- data -----------------------------------------------------------------------------------------

SENTENCES = ["the cat sat on the mat", "a dog sat on a log", "the mat and the log", "on and on"]


def write_text(path: Path, paragraphs: int = 60) -> None:
    """Write paragraphs of one to three sentences."""
    rng = np.random.default_rng(0)
    picked = (rng.choice(SENTENCES, rng.integers(1, 4)) for _ in range(paragraphs))
    path.write_text("\n\n".join(". ".join(p) for p in picked))


def write_tokenizer(folder: Path) -> list[str]:
    """Write a tokenizer whose tokens are the words; return them in the order of their numbers."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["?", ".", *sorted({word for s in SENTENCES for word in s.split()})]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder)
    return words


def test_a_tokenizer_of_transformers_makes_the_tokens(tmp_path: Path) -> None:
    write_text(tmp_path / "some.txt")
    words = write_tokenizer(tmp_path / "words")
    data = load_dataset(DataTable("some.txt", length=12, tokenizer="words"), tmp_path)
    assert (data.task, data.classes) == ("tokens", len(words))
    written = (tmp_path / "some.txt").read_text().replace(".", " .")
    for x, y in zip(data.train.x, data.train.y, strict=True):
        end = end_of(y)
        assert " ".join(words[i] for i in [*x[:end], y[end - 1]]) in written
        np.testing.assert_array_equal(x[1:end], y[: end - 1])


def test_what_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    write_text(tmp_path / "some.txt")
    with pytest.raises(DataError, match=r"no tokenizer at .*nowhere"):
        load_dataset(DataTable("some.txt", tokenizer="nowhere"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be read as a tokenizer"):
        load_dataset(DataTable("some.txt", tokenizer="empty"), tmp_path)
    with pytest.raises(DataError, match="digits is no text"):
        load_dataset(DataTable("digits", tokenizer="nowhere"), tmp_path)


# --- simulated jobs -------------------------------------------------------------------------------

ADAMW = {"lr": 0.01}


def job(folder: Path, **changes: Any) -> Job:
    """Return a job of four devices of two tiers on a small text."""
    if not (folder / "some.txt").exists():
        write_text(folder / "some.txt")
    given: dict[str, Any] = {
        "model": f"{__name__}:build",
        "data": DataTable("some.txt", length=24),
        "tiers": {
            "small": FleetTier(clients=2, cut=1, gflops=0.01, uplink_mbit=1),
            "large": FleetTier(clients=2, cut=2, codec="fp16"),
        },
        "optimizer": "adamw",
        "schedule": "constant",
        "rounds": RoundsTable(count=3),
        "local": LocalTraining(batch_size=8, hyper=ADAMW),
        "trunk": TrunkTraining(optimizer="adamw", hyper=ADAMW),
    }
    return Job(**given | changes)


def simulate(
    job: Job, base: Path, run: str = "run", runtime: DeviceRuntime = "torch"
) -> list[RoundRecord]:
    with Simulation(job, base / run, runtime, base) as simulation:
        records = simulation.run()
        simulation.report()
        return records


def start(base: Path, task: Job) -> float:
    """Return the perplexity of the untrained model on the held-out texts."""
    held_out = load_dataset(task.data, base).held_out
    with torch.no_grad():
        logits = build().eval()(torch.from_numpy(held_out.x))
    y = torch.from_numpy(held_out.y)
    return math.exp(cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1).item())


def repeatable(record: RoundRecord) -> dict[str, Any]:
    """Return a record without values of real time."""
    table = asdict(record)
    for real in ("wall_s", "seconds"):
        del table["costs"][real]
    return table


@pytest.mark.parametrize(
    ("method", "rounds", "epochs"),
    [
        ("fedsplitx", 2, 1),
        *(
            pytest.param(method, 5, 2, marks=pytest.mark.slow)
            for method in ("splitfed-v1", "splitfed-v2")
        ),
    ],
)
def test_perplexity_falls_and_a_run_can_be_repeated(
    tmp_path: Path, method: str, rounds: int, epochs: int
) -> None:
    local = LocalTraining(batch_size=8, epochs=epochs, hyper=ADAMW)
    task = job(tmp_path, method=method, rounds=RoundsTable(count=rounds), local=local)
    records = simulate(task, tmp_path)
    before = start(tmp_path, task)
    assert before > 150
    for values in records[-1].accuracy.values():
        assert all(value < before / 5 for value in values.values()), values
    assert {r.metric for r in records} == {"perplexity"}
    assert [repeatable(r) for r in read_records(tmp_path / "run")] == [
        repeatable(r) for r in records
    ]
    first = replace(task, rounds=RoundsTable(count=1))
    assert [repeatable(r) for r in simulate(first, tmp_path, "one")] == [
        repeatable(r) for r in simulate(first, tmp_path, "again")
    ]


@pytest.mark.slow
def test_exported_graphs_give_what_the_steps_in_pytorch_give(tmp_path: Path) -> None:
    tiers = {"small": FleetTier(clients=2, cut=1, codec="fp16")}
    local = LocalTraining(batch_size=8, hyper={"lr": 0.05})
    task = job(
        tmp_path, tiers=tiers, rounds=RoundsTable(count=1), optimizer="sgd", local=local
    )  # fmt: skip
    (fast,) = simulate(task, tmp_path, "torch")
    (exported,) = simulate(task, tmp_path, "onnx", "onnx")
    for path, value in fast.accuracy["small"].items():
        assert exported.accuracy["small"][path] == pytest.approx(value, rel=0.01)


def test_padding_costs_no_traffic(tmp_path: Path) -> None:
    """Rows with much more padding around the same texts cause the same traffic."""
    tiers = {"large": FleetTier(clients=2, cut=2)}
    base = job(tmp_path, tiers=tiers, rounds=RoundsTable(count=1))
    paragraphs = [len(p) for p in (tmp_path / "some.txt").read_text().split("\n\n")]
    assert max(paragraphs) < 90
    sent = {}
    for length in (90, 120):
        task = replace(base, data=DataTable("some.txt", length=length))
        (record,) = simulate(task, tmp_path, str(length))
        sent[length] = record.bytes["activations"]["up"]
    assert sent[90] == sent[120]


def test_a_vocabulary_that_the_model_does_not_have_is_told_before_anything_runs(
    tmp_path: Path,
) -> None:
    write_text(tmp_path / "some.txt")
    write_tokenizer(tmp_path / "words")
    task = job(tmp_path, model=f"{__name__}:of_eight_tokens")
    for tokenizer, many in ((None, 256), ("words", 11)):
        data = DataTable("some.txt", tokenizer=tokenizer)
        with pytest.raises(ConfigError, match=f"{many} tokens, the model knows 8"):
            Simulation(replace(task, data=data), tmp_path / "run", base=tmp_path)
    with pytest.raises(ConfigError, match="take a text"):
        Simulation(replace(task, data=DataTable("digits")), tmp_path / "run")


def of_eight_tokens() -> SplitModel:
    """Return a model with a vocabulary of eight tokens."""

    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h: torch.Tensor = self.embedding(x)
            return h

    return SplitModel(Stem(), [nn.Linear(4, 4) for _ in range(3)], nn.Linear(4, 8), "tokens")


# --- results --------------------------------------------------------------------------------------


def record(number: int, value: float) -> RoundRecord:
    return RoundRecord(
        number, 10.0 * number, 1.0, 4, {}, 1.0, 0.5, 1.0, 3,
        {t: {"device_alone": 2 * value, "through_hub": value} for t in ("small", "large")},
        {"update": {"up": 1000, "down": 0}}, {"device_flop": 1e9}, "perplexity",
    )  # fmt: skip


def test_lower_perplexity_is_better(tmp_path: Path) -> None:
    task = job(tmp_path)
    runs = {
        ("fedsplitx", 0): (task, [record(1, 90.0), record(2, 20.0), record(3, 12.5)]),
        ("exc", 0): (replace(task, method="exc"), [record(1, 80.0), record(2, 25.0)]),
    }
    assert common_target(runs) == 25.0
    found = summary(runs)
    assert [cost.target_s for cost in found.costs] == [20.0, 20.0]
    assert [cost.target_s for cost in summary(runs, 15.0).costs] == [30.0, None]
    table = accuracy_table(found)
    assert table.title == "Perplexity"
    assert table.rows[0] == ["fedsplitx", "all", "25.0", "12.5"]
    assert "a perplexity of 25" in cost_table(found).title
    rows = rows_of("exc", *runs["exc", 0])
    assert [row["perplexity"] for row in rows] == [50.0, 25.0, 50.0, 25.0]
    assert all("accuracy" not in row for row in rows)
    write_comparison(tmp_path / "out", runs)
    assert (tmp_path / "out" / "comparison.png").stat().st_size > 0
    run = RunFolder(tmp_path / "run", metric="perplexity")
    for one in runs["fedsplitx", 0][1]:
        run.add(one)
        run.write()
    write_report(run, "a run")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "## Rounds: perplexity" in report
    assert "12.5" in report
    assert "%" not in report
