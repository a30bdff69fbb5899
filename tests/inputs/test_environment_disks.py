"""Disks that are full or read-only, outputs that nobody reads, and little shared memory."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest

from edge_sdk.bundle import signing
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.rounds import RoundRules
from server_hub.storage.run_folder import read_records
from tests.lib.commands import expect_refusal, refusal
from tests.lib.harness import finish, hub_config, next_event, running_hub, take_part
from tests.lib.hub_files import write_hub_toml
from tests.lib.models import BUILD, TIERS_TOML

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "edge_sdk.cli.main"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

may_mount = pytest.mark.skipif(
    subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode != 0
    if Path("/usr/bin/unshare").exists()
    else True,
    reason="a file system of one's own needs unshare -rm, which is not permitted here",
)


def with_disk(folder: Path, size: str, *arguments: str) -> subprocess.Popen[str]:
    """A ``cutlayer`` command as a process that sees a disk of this size in a folder."""
    folder.mkdir(exist_ok=True)
    mount = 'mount -t tmpfs -o "size=$1" tmpfs "$0" && shift && exec "$@"'
    return subprocess.Popen(
        ["unshare", "-rm", "sh", "-c", mount, str(folder), size, *COMMAND, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip


def full(*arguments: object, **options: object) -> NoReturn:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# --- a hub --------------------------------------------------------------------------------------


@may_mount
@pytest.mark.slow
def test_a_hub_goes_on_when_its_disk_is_full_and_its_output_closed(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """Records fit, models do not: devices finish the job, and the exit code and a sentence say it.

    Whoever has started the hub reads its first line only.
    """
    token = TokenFile(tmp_path / "tokens.toml").issue("phone")
    toml = write_hub_toml(tmp_path, bundles, rounds=3, devices=1)
    hub = with_disk(tmp_path / "run", "8k", "hub", "--config", str(toml), "--json")
    url = next_event(hub, "ready")["address"]
    assert hub.stdout is not None
    hub.stdout.close()
    report = asyncio.run(take_part(url, token, tmp_path / "cache"))
    assert len(report.rounds) == 3
    assert hub.stderr is not None
    err = hub.stderr.read()
    assert hub.wait(60) == 1, err
    assert "Traceback" not in err
    *lines, last = err.strip().splitlines()
    wanted = "the model cannot be written to"
    assert sum(wanted in line and "the job goes on" in line for line in lines) == 3
    assert any("round 1 cannot be printed" in line for line in lines)
    assert last.startswith(f"cutlayer: {wanted}")
    assert "model.safetensors: No space left on device; the report cannot be written" in last


SCRIPT = """
import resource, sys
from pathlib import Path
from server_hub.storage.run_folder import METRICS, RoundRecord, RunFolder

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

def record(number):
    return RoundRecord(number, 1.0, 1.0, 1, {}, None, None, None, 1, {}, {})

folder = Path(sys.argv[1])
run = RunFolder(folder)
run.add(record(1))
run.write()
size = (folder / METRICS).stat().st_size
for allowed in (size, size + 1, 2 * size - 1):
    limit(allowed)
    run.add(record(len(run.records) + 1))
    try:
        run.write()
    except OSError as error:
        assert error.filename == str(folder / METRICS)
    else:
        raise AssertionError("there was room")
    assert (folder / METRICS).stat().st_size == size
limit(resource.RLIM_INFINITY)
run.write()
run.write()
"""


def test_records_are_written_whole_and_later(tmp_path: Path) -> None:
    """A line that does not fit leaves nothing; it is written once there is room."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [record.round for record in read_records(tmp_path)] == [1, 2, 3, 4]


@may_mount
def test_little_shared_memory_is_said_at_the_start(tmp_path: Path, bundles: BundleIndex) -> None:
    """A container's default of 64 MB does not hold the default arena."""
    TokenFile(tmp_path / "tokens.toml").issue("phone")
    toml = write_hub_toml(tmp_path, bundles, rounds=1, devices=1)
    code, _, err = finish(with_disk(Path("/dev/shm"), "64m", "hub", "--config", str(toml)))
    assert code == 2, err
    (line,) = err.strip().splitlines()
    assert "64 MiB are free in /dev/shm" in line or "0 MiB are free in /dev/shm" in line
    assert "set arena_mb of [trunk] lower" in line
    assert "--shm-size" in line


@pytest.mark.slow
@may_mount
def test_a_job_runs_in_little_shared_memory(tmp_path: Path, bundles: BundleIndex) -> None:
    """With the setting that the sentence has named."""
    token = TokenFile(tmp_path / "tokens.toml").issue("phone")
    toml = write_hub_toml(tmp_path, bundles, rounds=2, devices=1)
    toml.write_text(toml.read_text().replace("[trunk]", "[trunk]\narena_mb = 48"))
    hub = with_disk(Path("/dev/shm"), "64m", "hub", "--config", str(toml), "--json")
    url = next_event(hub, "ready")["address"]
    asyncio.run(take_part(url, token, tmp_path / "cache", rows=200))
    code, _, err = finish(hub)
    assert code == 0, err


# --- a device -----------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["append", "finish", "claim", "write", "read", "__contains__"])
def test_a_device_goes_on_without_its_cache(
    tmp_path: Path,
    bundles: BundleIndex,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    failing: str,
) -> None:
    """It keeps the bundle in memory, and says so once."""

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            if failing == "read":
                (tmp_path / "cache").mkdir()
                for blob in bundles.blobs().folder.iterdir():
                    (tmp_path / "cache" / blob.name).write_bytes(blob.read_bytes())
            original: Any = getattr(BlobStore, failing)

            def fail(store: BlobStore, *arguments: Any) -> Any:
                return (full if store.folder.name == "cache" else original)(store, *arguments)

            monkeypatch.setattr(BlobStore, failing, fail)
            await take_part(url, token, tmp_path / "cache")

    asyncio.run(job())
    said = [line for line in caplog.messages if "cache cannot be used: No space left" in line]
    assert len(said) == (failing != "write")  # a download that has finished writes no other way


def test_a_cache_that_cannot_be_made(
    tmp_path: Path, bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    cache = "/proc/x"

    async def job() -> None:
        config = hub_config(tmp_path, bundles, rounds=RoundRules(count=1))
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            await take_part(url, token, cache)

    asyncio.run(job())
    assert sum(f"the cache {cache} cannot be used" in line for line in caplog.messages) == 1


@pytest.mark.parametrize("cache", ["/dev/null", "/dev/null/x"])
def test_a_file_is_no_cache(cache: str) -> None:
    """This is a mistake in the path, and no state of a disk."""
    with pytest.raises(BundleError, match=f"{cache} is no folder, or lies in a file"):
        BlobStore.cache(cache)


# --- commands -----------------------------------------------------------------------------------


PLACES = {
    "token": (["token", "new", "a", "--tokens", "/proc/x"], 1),
    "token, a file": (["token", "new", "a", "--tokens", "/dev/null/x"], 1),
    "key": (["bundle", "key", "/proc/x"], 2),
    "key, a file": (["bundle", "key", "/dev/null/x"], 2),
    "export": (["export", BUILD, "--tiers", "{tiers}", "--out", "/proc/x"], 1),
    "simulate": (["simulate", "{job}", "--run", "/dev/null/x"], 2),
    "hub": (["hub", "--bundles", "{bundles}", "--tokens", "{tokens}", "--run", "/proc/x"], 2),
    "tensorboard": (
        ["hub", "--bundles", "{bundles}", "--tokens", "{tokens}", "--run", "{folder}/r",
         "--port", "0", "--tensorboard", "/proc/x"], 2,
    ),
    "demo": (["demo", "--run", "/proc/x"], 2),
    "compare": (["compare", "{job}", "--methods", "exc", "--seeds", "0", "--run", "/proc/x"], 1),
}  # fmt: skip
"""Commands that write to a place that cannot be written, with their exit codes."""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        pytest.param(*case, id=name, marks=[pytest.mark.slow] if name == "compare" else [])
        for name, case in PLACES.items()
    ],
)
def test_a_place_that_cannot_be_written(
    tmp_path: Path,
    bundles: BundleIndex,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
) -> None:
    """One sentence names it."""
    tiers, job, tokens = tmp_path / "tiers.toml", tmp_path / "job.toml", tmp_path / "tokens.toml"
    tiers.write_text(TIERS_TOML)
    job.write_text((ROOT / "examples" / "fleet" / "digits.toml").read_text())
    TokenFile(tokens).issue("phone")
    filled = [
        argument.format(
            tiers=tiers, job=job, tokens=tokens, bundles=bundles.folder,
            folder=tmp_path,
        )
        for argument in arguments
    ]  # fmt: skip
    (place,) = [argument for argument in arguments if argument in ("/proc/x", "/dev/null/x")]
    assert place in refusal(capsys, *filled, code=code)


@pytest.mark.slow
def test_an_export_to_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither at its first blob nor at the weights."""
    import safetensors.torch

    tiers, out = tmp_path / "tiers.toml", tmp_path / "new" / "out"
    tiers.write_text(TIERS_TOML)
    given = ["export", BUILD, "--tiers", str(tiers), "--out", str(out)]

    def weights(*arguments: object) -> NoReturn:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    for target, name, failing, code in (
        (os, "fsync", full, 1), (safetensors.torch, "save_file", weights, 2),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(target, name, failing)
            expect_refusal(capsys, given, "No space left on device", code=code)
        assert not list(out.parent.iterdir())


def test_a_signature_and_a_token_on_a_full_disk_change_nothing(
    tmp_path: Path,
    bundles: BundleIndex,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    folder, tokens, key = tmp_path / "b", tmp_path / "tokens.toml", tmp_path / "key"
    shutil.copytree(bundles.folder, folder)
    signing.new_key(key)
    TokenFile(tokens).issue("phone")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    monkeypatch.setattr(os, "fsync", full)
    for given in (
        ["bundle", "sign", str(folder), "--key", str(key)],
        ["token", "new", "tablet", "--tokens", str(tokens)],
        ["token", "revoke", "phone", "--tokens", str(tokens)],
    ):
        line = refusal(capsys, *given, code=1)
        assert line.endswith("No space left on device")
        assert str(tmp_path) in line
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_outputs_that_cannot_be_written(bundles: BundleIndex) -> None:
    """A full disk is one sentence; a reader that has gone is none."""
    with open("/dev/full", "w") as out:
        for more in ([], ["--json"]):
            done = subprocess.run(
                [*COMMAND, "bundle", "show", str(bundles.folder), *more],
                stdout=out, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
            )  # fmt: skip
            assert done.stderr == "cutlayer: the output: No space left on device\n"
            assert done.returncode == 1
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*COMMAND, "bundle", "show", str(bundles.folder)],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    os.close(write)
    assert (done.stderr, done.returncode) == ("", 1)
