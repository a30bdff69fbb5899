"""Wrong values of options and arguments of every command: one sentence, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_sdk.bundle import signing
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.cli.main import main
from server_hub.gateway.tokens import TokenFile
from tests.lib.harness import examples
from tests.lib.models import BUILD, TIERS_TOML

JOB = """model = "server_hub.demo.digits:build"
[data]
source = "{source}"
[rounds]
count = 1
[tiers.a]
clients = 1
cut = 1
"""
EXPORT = ["export", BUILD, "--tiers", "tiers.toml", "--out", "new"]
DEVICE = ["device", "--url", "ws://127.0.0.1:1", "--token", "t", "--patience-s", "0.1"]
HUB = ["hub", "--bundles", "BUNDLES", "--tokens", "tokens.toml", "--run", "new", "--port", "0"]
COMPARE = ["compare", "job.toml", "--run", "new"]

ROWS: list[tuple[list[str], str]] = [
    # bundle
    (["bundle", "show", "none"], "no bundles in none"),
    (["bundle", "show", "note.txt"], "no bundles in note.txt"),
    (["bundle", "show", "BUNDLES", "nope"], "has no tier 'nope'; it has small, medium, large"),
    (["bundle", "measure", "BUNDLES", "nope"], "has no tier 'nope'"),
    (["bundle", "measure", "BUNDLES", "small", "--batch", "0"], "--batch"),
    (["bundle", "measure", "BUNDLES", "small", "--steps", "x"], "--steps"),
    (["bundle", "sign", "BUNDLES", "--key", "none"], "no key at none"),
    (["bundle", "sign", "BUNDLES", "--key", "note.txt"], "note.txt is no Ed25519 private key"),
    (["bundle", "sign", "BUNDLES", "--key", "folder"], "folder cannot be read"),
    (["bundle", "sign", "BUNDLES", "--key", "key.pub"], "key.pub is a public key"),
    (["bundle", "verify", "BUNDLES", "--trust", "zz"], "'zz' is neither a public key"),
    (["bundle", "verify", "BUNDLES", "--trust", "note.txt"], "note.txt is no public key"),
    (["bundle", "key", "key"], "key exists"),
    (["bundle", "key", ""], "needs a file name"),
    (["bundle", "key", "none/key"], "cannot be written"),
    # token
    (["token", "new", "", "--tokens", "new.toml"], "device name '' must have"),
    (["token", "new", "x", "--tier", "", "--tokens", "new.toml"], "tier name '' must have"),
    (["token", "new", "x", "--tokens", "note.txt"], "note.txt is not valid TOML"),
    (["token", "new", "x", "--tokens", "folder"], "folder cannot be read"),
    (["token", "new", "x", "--tokens", "empty"], "empty needs a table [devices]"),
    (["token", "revoke", "nobody", "--tokens", "tokens.toml"], "has no device 'nobody'"),
    (["token", "revoke", "x", "--tokens", "none.toml"], "no tokens at none.toml"),
    # export
    (["export", "", *EXPORT[2:]], "has no config.json"),
    (["export", "nope", *EXPORT[2:]], "there is no model 'nope'"),
    (["export", "os:getcwd", *EXPORT[2:]], "os:getcwd returned a str"),
    (["export", f"{BUILD}_none", *EXPORT[2:]], "cannot import the model"),
    (["export", "note.txt", *EXPORT[2:]], "note.txt is no valid configuration"),
    (["export", BUILD, "--tiers", "none", "--out", "new"], "no configuration file at none"),
    (["export", BUILD, "--tiers", "empty", "--out", "new"], "the key 'tiers' is missing"),
    (["export", BUILD, "--tiers", "right.npz", "--out", "new"], "right.npz cannot be read"),
    (["export", BUILD, "--tiers", "tiers.toml", "--out", "note.txt"], "note.txt exists"),
    (["export", BUILD, "--tiers", "tiers.toml", "--out", "note.txt/x"], "note.txt is a file"),
    ([*EXPORT, "--weights", "none"], "cannot read the weights none"),
    ([*EXPORT, "--weights", "note.txt"], "cannot read the weights note.txt"),
    ([*EXPORT, "--sign", "none"], "no key at none"),
    ([*EXPORT, "--data", "none"], "no data at none"),
    ([*EXPORT, "--data", "note.txt"], "note.txt"),
    ([*EXPORT, "--data", "shape.npz"], "x has shape [4, 3], the model takes"),
    ([*EXPORT, "--data", "labels.npz"], "the model has the classes 0 to 9"),
    ([*EXPORT, "--data", "nan.npz"], "row 0 of x at 0, 0, 0 is nan"),
    ([*EXPORT, "--data", "right.npz", "--max-loss", "nan"], "the largest loss is nan"),
    ([*EXPORT, "--data", "right.npz", "--max-loss", "-1"], "the largest loss is -1"),
    ([*EXPORT, "--max-loss", "0.1"], "--max-loss has no effect: no tier in tiers.toml has"),
    ([*EXPORT, "--data", "right.npz", "--allow-loss"], "--allow-loss has no effect: no tier in"),
    (["export", BUILD, "--tiers", "int8.toml", "--out", "new", "--data", "labels.npz"],
     "the model has the classes 0 to 9"),
    (["export", BUILD, "--tiers", "int8.toml", "--out", "new", "--data", "nan.npz"],
     "row 0 of x at 0, 0, 0 is nan"),
    (["export", BUILD, "--tiers", "seven.toml", "--out", "new"], "the model's head gives 10"),
    # plan
    (["plan", BUILD, "--tiers", "tiers.toml", "--cuts", ""], "must be numbers with commas"),
    (["plan", BUILD, "--tiers", "tiers.toml", "--cuts", "1.5"], "must be numbers with commas"),
    (["plan", BUILD, "--tiers", "tiers.toml", "--cuts", "99"], "cut 99 is outside the model"),
    (["plan", BUILD, "--tiers", "tiers.toml", "--picture", "new.jpg"], "must end in .png"),
    (["plan", BUILD, "--tiers", "tiers.toml", "--picture", "none/x.png"], "no such folder"),
    (["plan", BUILD, "--tiers", "seven.toml"], "the model's head gives 10"),
    # device
    ([*DEVICE], "nothing to do"),
    ([*DEVICE, "--data", "none"], "no data at none"),
    ([*DEVICE, "--data", "right.npz", "--threads", "0"], "--threads"),
    ([*DEVICE, "--data", "right.npz", "--threads", "1000000"], "threads is 1000000"),
    ([*DEVICE, "--data", "right.npz", "--memory-mb", "0"], "--memory-mb"),
    ([*DEVICE, "--data", "right.npz", "--patience-s", "nan"], "patience_s is nan"),
    ([*DEVICE, "--data", "right.npz", "--patience-s", "-1"], "patience_s is -1"),
    ([*DEVICE, "--data", "right.npz", "--trust", "zz"], "'zz' is neither a public key"),
    ([*DEVICE, "--data", "right.npz", "--cache", "note.txt"], "note.txt is no folder"),
    ([*DEVICE, "--data", "right.npz", "--tier", ""], "tier is empty"),
    ([*DEVICE, "--data", "right.npz", "--url", "127.0.0.1"], "not a websocket address"),
    ([*DEVICE, "--config", "note.txt"], "note.txt is not valid TOML"),
    # hub
    (["hub"], "the key 'bundles' is missing"),
    ([*HUB, "--bundles", "note.txt"], "no bundles in note.txt"),
    ([*HUB, "--tokens", "folder"], "folder cannot be read"),
    ([*HUB, "--run", "note.txt"], "cannot write to note.txt"),
    ([*HUB, "--port", "-1"], "port is -1"),
    ([*HUB, "--rounds", "0"], "count is 0"),
    ([*HUB, "--min-devices", "0"], "min_devices is 0"),
    ([*HUB, "--held-out", "none"], "no data at none"),
    ([*HUB, "--held-out", "labels.npz"], "labels.npz: row 0 of y is the label"),
    ([*HUB, "--held-out", "nan.npz"], "nan.npz: row 0 of x at 0, 0, 0 is nan"),
    ([*HUB, "--config", "method.toml"], "there is no method 'nonsense'"),
    ([*HUB, "--config", "rate.toml"], "lr of sgd is -1.0"),
    # simulate and compare
    (["simulate", "none", "--run", "new"], "no configuration file at none"),
    (["simulate", "empty", "--run", "new"], "the key 'model' is missing"),
    (["simulate", "job.toml", "--run", "note.txt"], "note.txt is a file"),
    (["simulate", "job.toml", "--run", "new", "--runtime", "x"], "--runtime is 'x'"),
    (["simulate", "job.toml", "--run", "new", "--method", "x"], "there is no method 'x'"),
    (["simulate", "job.toml", "--run", "new", "--seed", "-1"], "--seed"),
    (["simulate", "job-labels.toml", "--run", "new"], "the data have 20 classes"),
    (["simulate", "job-nan.toml", "--run", "new"], "not finite"),
    (["simulate", "job-note.toml", "--run", "new"], "note.txt"),
    ([*COMPARE, "--seeds", ""], "--seeds is ''"),
    ([*COMPARE, "--methods", "x"], "there is no method 'x'"),
    ([*COMPARE, "--target", "5"], "--target is 5"),
    ([*COMPARE, "--run", "note.txt"], "note.txt is a file"),
    # model and adapter
    (["model", "export", "none", "--out", "new"], "there is no run in none"),
    (["model", "export", "run-garbage", "--out", "new"], "does not say which bundles it had"),
    (["model", "export", "run-garbage", "--out", "new", "--bundles", "BUNDLES"],
     "metrics.jsonl, line 1"),
    (["model", "export", "run-list", "--out", "new", "--bundles", "BUNDLES"],
     "metrics.jsonl, line 1"),
    (["model", "export", "run-part", "--out", "new", "--bundles", "BUNDLES"],
     "metrics.jsonl, line 1"),
    (["model", "export", "run-empty", "--out", "new"], "has not completed a round"),
    (["model", "export", "none", "--out", "new", "--format", "gguf"], "there is no format 'gguf'"),
    (["model", "export", "none", "--out", "new", "--batch", "0"], "the largest batch is 0"),
    (["model", "export", "none", "--out", "new", "--length", "0"], "the largest length is 0"),
    (["model", "export", "none", "--out", "new", "--max-loss", "-1"], "the largest loss is -1"),
    (["model", "export", "none", "--out", "run-list"], "run-list exists"),
    (["model", "export", "none", "--out", "new", "--format", "peft", "--tier", "a"],
     "peft holds the whole model"),
    (["adapter", "import", "folder", "--model", BUILD, "--tiers", "tiers.toml", "--out", "new"],
     "tiers.toml has no [lora]"),
    (["adapter", "import", "folder", "--model", BUILD, "--tiers", "tiers.toml", "--out", "empty"],
     "tiers.toml has no [lora]"),
    (["demo", "--nonsense"], "--nonsense"),
    (["nonsense"], "nonsense"),
]  # fmt: skip


def save(path: Path, **changes: Any) -> None:
    """Write examples to an ``.npz`` file, with changes."""
    good = examples(4)
    np.savez(path, **{"x": good.x, "y": good.y, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of every kind, right and wrong."""
    folder = tmp_path_factory.mktemp("values")
    texts = {
        "note.txt": "not a table", "empty": "", "tiers.toml": TIERS_TOML,
        "seven.toml": TIERS_TOML.replace("10", "7"),
        "int8.toml": f'{TIERS_TOML}precision = "int8"\n',
        "method.toml": '[method]\nname = "nonsense"\n',
        "rate.toml": "[trunk]\nhyper = { lr = -1.0 }\n",
        "job.toml": JOB.format(source="digits"),
        "job-labels.toml": JOB.format(source="labels.npz"),
        "job-nan.toml": JOB.format(source="nan.npz"),
        "job-note.toml": JOB.format(source="note.txt"),
        **{f"run-{name}/model.safetensors": "" for name in ("garbage", "list", "part")},
        "run-garbage/metrics.jsonl": "garbage\n", "run-list/metrics.jsonl": "[1]\n",
        "run-part/metrics.jsonl": '{"round": 1}\n', "run-empty/metrics.jsonl": "",
    }  # fmt: skip
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "folder").mkdir()
    good = examples(4)
    save(folder / "right.npz")
    save(folder / "labels.npz", y=np.array([19, 0, 1, 2]))
    save(folder / "nan.npz", x=good.x * np.float32(np.nan))
    save(folder / "shape.npz", x=np.zeros((4, 3), np.float32))
    TokenFile(folder / "tokens.toml").issue("phone")
    signing.new_key(folder / "key")
    return folder


def entries(folder: Path) -> dict[str, int]:
    """Every file below a folder with its time of change; 0 for folders."""
    return {
        str(path.relative_to(folder)): path.stat().st_mtime_ns if path.is_file() else 0
        for path in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("arguments", "says"), ROWS, ids=[re.sub(r"\W+", "-", " ".join(r[0])) for r in ROWS]
)
def test_a_wrong_value_is_one_sentence(
    folder: Path,
    bundles: BundleIndex,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    """The exit code is 2, the sentence names the value, and no file is new or changed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "200")
    before = entries(folder)
    with pytest.raises(SystemExit) as ended:
        main([str(bundles.folder) if a == "BUNDLES" else a for a in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert says in " ".join(said.split()), said
    assert "Traceback" not in said
    if "Usage:" not in said:
        assert said.strip().splitlines()[-1].startswith("cutlayer: ")
    assert entries(folder) == before
