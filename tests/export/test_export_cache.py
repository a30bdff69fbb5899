"""The cache of exports: it changes no byte, hides no error, and survives damage."""

from __future__ import annotations

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from export import ExportCache, ExportError, SplitModel, Tier, export_bundles
from export.lowering import executorch, onnx
from export.lowering.verification.verify import Report, Verifier
from tests.lib.commands import output
from tests.lib.models import BUILD, CLASSES, FEATURES, TIERS_TOML, MeanHead, TokenBlock, example

KEY = "0" * 64


class TwoFaced(TokenBlock):
    """A block that can compute something else than what is traced of it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.honest = True

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result = super().forward(h)
        traced = type(h).__name__ == "FakeTensor"
        return result if self.honest or traced else 1.001 * result


def small(seed: int = 0, width: int = 8) -> SplitModel:
    """A model that is exported in a second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [TwoFaced(width), TokenBlock(width)]
        return SplitModel(nn.Linear(FEATURES[0], width), blocks, MeanHead(width, CLASSES))


def exported(
    model: SplitModel,
    out: Path,
    cache: ExportCache | None,
    tier: Tier | None = None,
    optimizer: str = "sgd",
) -> dict[str, bytes]:
    """Export a model for one tier; return the files."""
    export_bundles(
        model,
        {"phone": tier or Tier(1)},
        out,
        example=example(FEATURES),
        classes=CLASSES,
        optimizer=optimizer,
        cache=cache,
    )
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}


@pytest.fixture
def cache(tmp_path: Path) -> ExportCache:
    """An empty cache."""
    return ExportCache(tmp_path / "cache")


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is lowered, and what is verified in its runtime, from now on."""
    done: list[str] = []
    lower, verify = onnx.lower, Verifier.verify

    def lowered(step, *args):  # type: ignore[no-untyped-def]
        done.append(f"lower {step.name}")
        return lower(step, *args)

    def verified(self, step, *args):  # type: ignore[no-untyped-def]
        done.append(f"verify {step.name}")
        return verify(self, step, *args)

    monkeypatch.setattr(onnx, "lower", lowered)
    monkeypatch.setattr(Verifier, "verify", verified)
    return done


def test_a_second_export_lowers_nothing_and_has_the_same_bytes(
    tmp_path: Path, cache: ExportCache, work: list[str]
) -> None:
    without = exported(small(), tmp_path / "a", None)
    first = exported(small(), tmp_path / "b", cache)
    assert work.count("lower train") == work.count("verify train") == 2
    work.clear()
    second = exported(small(), tmp_path / "c", cache)
    assert work == []
    assert without == first == second


def test_what_was_verified_is_counted_again(tmp_path: Path, cache: ExportCache) -> None:
    reports = []
    for out in ("a", "b"):
        reports.append(Report())
        export_bundles(
            small(),
            {"phone": Tier(1)},
            tmp_path / out,
            example=example(FEATURES),
            classes=CLASSES,
            report=reports[-1],
            cache=cache,
        )
    assert reports[0] == reports[1]
    assert reports[0].graphs > 0


@pytest.mark.parametrize("change", ["width", "codec", "optimizer", "memory"])
def test_a_change_of_the_settings_has_entries_of_its_own(
    change: str, tmp_path: Path, cache: ExportCache, work: list[str]
) -> None:
    exported(small(), tmp_path / "a", cache)
    work.clear()
    model = small(width=12 if change == "width" else 8)
    tier = {"codec": Tier(1, codec="fp16"), "memory": Tier(1, memory="low")}.get(change)
    optimizer = "adamw" if change == "optimizer" else "sgd"
    files = exported(model, tmp_path / "b", cache, tier, optimizer)
    assert "verify train" in work
    assert files == exported(model, tmp_path / "c", None, tier, optimizer)


def test_other_weights_are_verified_and_keep_the_files(
    tmp_path: Path, cache: ExportCache, work: list[str]
) -> None:
    """Trained weights are inputs of the graphs, and verification draws its inputs from them."""
    exported(small(), tmp_path / "a", cache)
    work.clear()
    exported(small(seed=1), tmp_path / "b", cache)
    assert sorted(work) == ["verify forward", "verify predict", "verify train"]


def test_other_frozen_weights_are_lowered(
    tmp_path: Path, cache: ExportCache, work: list[str]
) -> None:
    """They are constants of the graphs, too small here for a blob of their own."""
    for seed in (0, 1):
        work.clear()
        model = small(seed)
        model.stem.requires_grad_(False)
        exported(model, tmp_path / f"{seed}", cache)
        assert "lower train" in work


def test_a_model_that_computes_something_else_than_before_is_refused(
    tmp_path: Path, cache: ExportCache
) -> None:
    """Its trace is that of a verified graph: only its own code shows the difference."""
    model = small()
    exported(model, tmp_path / "a", cache)
    model.block[0].honest = False
    with pytest.raises(ExportError, match="differs from eager PyTorch"):
        exported(model, tmp_path / "b", cache)
    assert not (tmp_path / "b").exists()


def test_a_refused_graph_is_refused_again(tmp_path: Path, cache: ExportCache) -> None:
    model = small()
    model.block[0].honest = False
    for out in ("a", "b"):
        with pytest.raises(ExportError, match="differs from eager PyTorch"):
            exported(model, tmp_path / out, cache)


def test_damaged_entries_are_named_and_computed_again(
    tmp_path: Path, cache: ExportCache, caplog: pytest.LogCaptureFixture
) -> None:
    first = exported(small(), tmp_path / "a", cache)
    entries = list(cache.folder.iterdir())
    for entry in entries:
        data = bytearray(entry.read_bytes())
        data[len(data) // 2] ^= 1
        entry.write_bytes(data)
    with caplog.at_level(logging.WARNING, "cutlayer.export"):
        assert exported(small(), tmp_path / "b", cache) == first
    assert sorted(record.getMessage() for record in caplog.records) == sorted(
        f"the cached export {entry} is damaged, and is computed again" for entry in entries
    )
    caplog.clear()
    assert exported(small(), tmp_path / "c", cache) == first
    assert caplog.records == []


def test_an_entry_under_the_name_of_another_is_damaged(cache: ExportCache) -> None:
    other = "1" * 64
    cache.put(KEY, b"file")
    (cache.folder / KEY).rename(cache.folder / other)
    assert cache.get(other) is None


@pytest.mark.parametrize("library", ["torch", "onnxruntime", "numpy"])
def test_another_version_of_a_library_empties_the_cache(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = ExportCache(tmp_path)
    old.put(KEY, b"file")
    version = metadata.version

    def changed(name: str) -> str:
        return f"{version(name)}.1" if name == library else version(name)

    monkeypatch.setattr(metadata, "version", changed)
    assert ExportCache(tmp_path).get(KEY) is None
    assert not old.folder.exists()
    monkeypatch.undo()
    assert ExportCache(tmp_path).get(KEY) is None


def test_entries_beyond_the_limit_are_removed_the_longest_unused_first(tmp_path: Path) -> None:
    cache = ExportCache(tmp_path, limit=1000)
    for number in range(3):
        cache.put(f"{number}", bytes(250))
        path = cache.folder / f"{number}"
        os.utime(path, (number, number))
    assert cache.get("0") is not None  # used again
    cache.put("3", bytes(250))
    found = {name for name in "0123" if cache.get(name) is not None}
    assert found == {"0", "2", "3"}
    cache.put("4", bytes(900))
    assert cache.get("4") is None  # would leave no space for others


def test_two_exports_at_once_see_whole_entries(tmp_path: Path) -> None:
    contents = [bytes([n]) * 50_000 for n in range(4)]

    def use(content: bytes) -> None:
        cache = ExportCache(tmp_path, limit=300_000)
        for number in range(50):
            cache.put(f"{number % 3}", content)
            assert cache.get(f"{number % 3}") in [None, *contents]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, contents))
    assert not list(tmp_path.rglob(".write-*"))


def test_a_cache_that_cannot_be_written_is_like_none(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    cache = ExportCache(tmp_path / "cache")
    assert exported(small(), tmp_path / "a", cache)


def test_the_command_uses_the_cache_of_the_user(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(TIERS_TOML)
    arguments = ("export", BUILD, "--tiers", str(tiers), "--out")
    output(capsys, *arguments, str(tmp_path / "a"), "--no-cache")
    assert not (tmp_path / "caches").exists()
    output(capsys, *arguments, str(tmp_path / "b"))
    assert list((tmp_path / "caches" / "cutlayer" / "exports").rglob("*"))
    assert BundleIndex.read(tmp_path / "a").tiers == BundleIndex.read(tmp_path / "b").tiers


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_a_relative_cache_folder_is_ignored(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the specification of XDG_CACHE_HOME says."""
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    found = ExportCache.of_user()
    assert found is not None
    assert found.folder.parent == tmp_path / ".cache" / "cutlayer" / "exports"


def test_an_executorch_file_is_lowered_once(
    tmp_path: Path, cache: ExportCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = Tier(1, runtime="executorch", batch=4)
    first = exported(small(), tmp_path / "a", cache, tier)
    monkeypatch.setattr(executorch, "lower", lambda programs: pytest.fail("lowered again"))
    assert exported(small(), tmp_path / "b", cache, tier) == first
