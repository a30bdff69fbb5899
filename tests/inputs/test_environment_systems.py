"""Systems that lack what Linux has: Windows, users without a home, consoles without Unicode."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.cli.main import main
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from tests.lib.harness import examples, hub_config, running_hub, save_npz
from tests.lib.models import BUILD, TIERS_TOML

ROOT = Path(__file__).parents[2]

WINDOWS = """
import asyncio, importlib, multiprocessing, pkgutil, subprocess, sys, tempfile, zipfile
import email, html, http.client, urllib.request, xml.sax, concurrent.futures, signal

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None  # an import of it raises ImportError, as on Windows

def missing(*arguments):
    raise NotImplementedError

asyncio.SelectorEventLoop.add_signal_handler = missing
for path in ("os.getuid", "os.fork", "os.posix_fallocate", "signal.SIGKILL", "os.geteuid"):
    module, name = path.split(".")
    vars(sys.modules[module]).pop(name, None)
import edge_sdk
for found in pkgutil.walk_packages(edge_sdk.__path__, "edge_sdk."):
    if not found.name.endswith("runtime.executorch"):  # which is not made for Windows
        importlib.import_module(found.name)
"""
"""A program's start on a system like Windows. What the standard library needs of Linux is there."""

NOBODY = """
import os, pwd, sys

def unknown(*arguments):
    raise KeyError("getpwuid(): uid not found: 12345")

pwd.getpwuid = pwd.getpwnam = unknown
for name in ("HOME", "USER", "LOGNAME", "USERNAME", "LNAME"):
    os.environ.pop(name, None)
"""
"""A program's start for a user id without an entry, as in OpenShift."""

COMMAND = "\nfrom edge_sdk.cli.main import main\nmain()\n"


def run(code: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run code as a program."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=120, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip


def device_finishes(
    tmp_path: Path, bundles: BundleIndex, start: str, cached: bool, **env: str
) -> subprocess.CompletedProcess[str]:
    """Have a device of such a system take part in a job of one round."""

    async def job() -> subprocess.CompletedProcess[str]:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("phone", "small")
        data = str(save_npz(tmp_path / "d.npz", examples(24)))
        cache = ["--cache", str(tmp_path / "cache")] if cached else []
        async with running_hub(config) as (_, url):
            given = ["device", "--url", url, "--token", token, "--data", data, "--evaluate", data]
            return await asyncio.to_thread(run, start + COMMAND, *given, *cache, **env)

    done = asyncio.run(job())
    assert done.returncode == 0, done.stderr
    assert "stopped: the job is finished" in done.stdout
    assert "Traceback" not in done.stderr
    return done


def test_a_device_without_what_windows_lacks(tmp_path: Path, bundles: BundleIndex) -> None:
    """Every module imports, and a device finishes a job, also at a console of code page 1252."""
    device_finishes(tmp_path, bundles, WINDOWS, True, PYTHONIOENCODING="cp1252")


def test_a_device_of_an_unknown_user(tmp_path: Path, bundles: BundleIndex) -> None:
    """It keeps no bundles, and says so."""
    done = device_finishes(tmp_path, bundles, NOBODY, False)
    assert done.stderr.count("the home folder is not known") == 1


@pytest.mark.parametrize("start", [WINDOWS, NOBODY], ids=["windows", "nobody"])
def test_measurements_without_what_linux_has(start: str) -> None:
    """Memory is unknown where the system does not say it."""
    code = """
import pathlib
pathlib.Path.read_text = lambda *arguments: missing_file()
def missing_file():
    raise FileNotFoundError
from edge_sdk.cli.device import peak_rss_mb
print(peak_rss_mb())
"""
    done = run(start + code)
    assert done.returncode == 0, done.stderr
    assert (done.stdout.strip() == "None") == (start is WINDOWS)


@pytest.mark.slow
def test_all_commands_of_an_unknown_user(tmp_path: Path) -> None:
    """From the export to a simulation."""
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(TIERS_TOML)
    job = tmp_path / "job.toml"
    job.write_text((ROOT / "examples" / "fleet" / "digits.toml").read_text())
    model, out = BUILD, str(tmp_path / "out")
    for given in (
        ["export", model, "--tiers", str(tiers), "--out", out],
        ["bundle", "show", out],
        ["bundle", "measure", out, "small", "--steps", "1"],
        ["bundle", "key", str(tmp_path / "key")],
        ["token", "new", "phone", "--tokens", str(tmp_path / "tokens.toml")],
        ["plan", model, "--tiers", str(tiers), "--picture", str(tmp_path / "plan.png")],
        ["simulate", str(job), "--rounds", "1", "--run", str(tmp_path / "run")],
    ):
        done = run(NOBODY + COMMAND, *given)
        assert done.returncode == 0, (given, done.stderr)
        assert "Traceback" not in done.stderr


CONSOLES = {"ascii": "ascii:strict", "cp1252": "cp1252:strict"}


@pytest.mark.parametrize("encoding", CONSOLES.values(), ids=CONSOLES)
def test_a_console_that_cannot_show_everything(
    tmp_path: Path, bundles: BundleIndex, encoding: str
) -> None:
    """Tables, help, progress, names and errors are shown as far as it can."""
    folder, tokens = str(bundles.folder), str(tmp_path / "Größe-カメラ.toml")
    TokenFile(Path(tokens)).issue("カメラ")
    calls = [
        ["--help"], ["device", "--help"], ["bundle", "show", folder], ["bundle", "verify", folder],
        ["token", "revoke", "カメラ", "--tokens", tokens],
        ["token", "revoke", "カメラ", "--tokens", tokens],
        ["bundle", "show", "λ≤→…"], ["nonsense→"], ["bundle", "measure"],
    ]  # fmt: skip
    code = f"""
from edge_sdk.cli.main import main
codes = []
for call in {calls!r}:
    try:
        main(call)
    except SystemExit as end:
        codes.append(end.code)
print(codes)
from rich.console import Console
from server_hub.reports.progress import rounds_view
from server_hub.storage.run_folder import RoundRecord
accuracy = {{"カメラ": {{"ensemble": 1.0}}}}
record = RoundRecord(1, 1.0, 1.0, 1, {{}}, 1.0, 1.0, 1.0, 1, accuracy, {{}},
    moves=[{{"device": "カメラ", "cut": 1, "to": 2, "reason": "λ → 3"}}])
with rounds_view(Console(force_terminal=True), "FedSplitX → カメラ", 2) as show:
    show(record)
with Console(force_terminal=True).status("λ → …"):
    pass
"""
    done = run(code, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert "[0, 0, 0, 0, 0, 2, 2, 2, 2]" in done.stdout
    assert "Error" not in done.stderr.replace("─ Error ─", "").replace("- Error -", "")


def test_a_program_without_a_console(bundles: BundleIndex) -> None:
    """As a service of Windows, or with closed streams: nothing is shown, and nothing fails."""
    code = f"""
import sys
sys.stdout = sys.stderr = None
from edge_sdk.cli.main import main
for folder, code in (({str(bundles.folder)!r}, 0), ("nowhere", 2)):
    try:
        main(["bundle", "show", folder])
    except SystemExit as end:
        assert end.code == code
"""
    assert run(code).returncode == 0


# --- what nobody has foreseen -------------------------------------------------------------------


def fail(*arguments: object) -> None:
    """A mistake of ours."""
    raise RuntimeError("the\ncause")


def test_a_failure_that_nobody_has_foreseen_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its trace is in a file."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(BundleIndex, "read", fail)
    with pytest.raises(SystemExit) as ended:
        main(["bundle", "show", "x"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert line == (
        f"cutlayer: unexpected RuntimeError: the cause; please report it, with its trace in {file}"
    )
    assert 'raise RuntimeError("the\\ncause")' in file.read_text()


@pytest.mark.parametrize("folder", ["/proc", "/dev/full"])
def test_a_trace_that_cannot_be_written(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The sentence says so, and where the failure was."""
    monkeypatch.setattr(tempfile, "tempdir", folder)
    monkeypatch.setattr(BundleIndex, "read", fail)
    with pytest.raises(SystemExit) as ended:
        main(["bundle", "show", "x"])
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "unexpected RuntimeError: the cause (in " in line
    assert "test_environment_systems.py:" in line
    assert "its trace cannot be written to a temporary folder: " in line
    assert "TMPDIR" in line


def test_words_of_a_hub_do_not_control_the_console(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that came from elsewhere may hold anything."""
    from edge_sdk.errors import CutlayerError

    def told(*arguments: object) -> None:
        raise CutlayerError("\x1b[2Jgone\x07")

    monkeypatch.setattr(BundleIndex, "read", told)
    with pytest.raises(SystemExit):
        main(["bundle", "show", "x"])
    assert capsys.readouterr().err == "cutlayer: \\x1b[2Jgone\\x07\n"


def test_json_is_ascii_at_every_console(tmp_path: Path, bundles: BundleIndex) -> None:
    """So that another program reads it, whatever the encoding is."""
    done = run(COMMAND, "bundle", "show", str(bundles.folder), "--json", PYTHONIOENCODING="ascii")
    assert set(json.loads(done.stdout)["tiers"]) == set(bundles.tiers)
