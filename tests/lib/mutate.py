"""Checks whether the tests of a room notice small changes of its code.

``python -m tests.lib.mutate --room edge_sdk/protocol --count 20 --seed 0`` picks random lines of
the room and makes one change in each (see :mod:`tests.lib.mutants`), in a copy of the repository in
a temporary folder. It runs the room's tests on every changed copy: first the tests of the room
alone, then the tests that use it. A mutant is found when a test fails or exceeds its time limit. A
mutant that survives shows code that no test depends on, or a change without effect.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from tests.lib.mutants import Mutant, mutants

ROOT = Path(__file__).parents[2]
PRELOADED = ("torch", "onnxruntime", "hypothesis", "msgpack", "websockets", "cryptography")
"""Modules that are imported once; every run of the tests is a fork of this process."""

OVERDUE = 124
"""Exit status of a run that exceeds its time limit."""


class RoomTests(NamedTuple):
    """Tests of a room, as paths below ``tests``.

    Attributes:
        own: quick ones, about the room alone.
        wider: those that use the room; run when its own find nothing.
    """

    own: tuple[str, ...]
    wider: tuple[str, ...] = ()


FLEET = (
    "edge_sdk/test_session.py",
    "end_to_end/test_bad_input.py",
    "server_hub/test_cut_moves.py",
    "server_hub/test_fused.py",
    "end_to_end/test_end_to_end.py",
)
"""Tests in which hubs and devices talk to each other."""

ROOMS = {
    "edge_sdk/protocol": RoomTests(
        (
            "edge_sdk/test_tensors_frames.py",
            "edge_sdk/test_channel.py",
            "edge_sdk/test_vectors.py",
            "edge_sdk/test_structure_limits.py",
            "edge_sdk/test_pieces.py",
            "edge_sdk/test_extensions.py",
        ),
        ("edge_sdk/test_session.py", "end_to_end/test_bad_input.py"),
    ),
    "edge_sdk/bundle": RoomTests(
        ("edge_sdk/test_bundle.py", "edge_sdk/test_signing.py"),
        ("end_to_end/test_bad_input.py", "export/test_steps.py"),
    ),
    "edge_sdk/transport": RoomTests(
        (
            "edge_sdk/test_session.py",
            "edge_sdk/test_flow.py",
            "edge_sdk/test_connection_retry.py",
            "edge_sdk/test_blob_requests.py",
            "edge_sdk/test_liveness.py",
            "end_to_end/test_bad_hub.py",
        ),
        FLEET[1:],
    ),
    "edge_sdk/runtime": RoomTests(
        ("export/test_steps.py",), ("export/test_executorch.py", "export/test_plan.py")
    ),
    "edge_sdk/sources": RoomTests(("edge_sdk/test_sources.py",), ("server_hub/test_datasets.py",)),
    "edge_sdk/training": RoomTests(
        ("edge_sdk/test_adversarial.py", "server_hub/test_text.py"),
        ("server_hub/test_splitft.py", "server_hub/test_fused.py", "export/test_steps.py"),
    ),
    "edge_sdk/inference": RoomTests(
        ("edge_sdk/test_policy.py", "edge_sdk/test_mixture.py"),
        ("end_to_end/test_text_cli.py", "end_to_end/test_end_to_end.py"),
    ),
    "edge_sdk/cli": RoomTests(
        ("edge_sdk/test_signing.py", "end_to_end/test_text_cli.py"),
        ("end_to_end/test_bad_input.py", "end_to_end/test_end_to_end.py"),
    ),
    "server_hub/gateway": RoomTests(
        (
            "server_hub/test_tokens_config.py",
            "server_hub/test_gateway.py",
            "server_hub/test_door.py",
        ),
        FLEET,
    ),
    "server_hub/rounds": RoomTests(
        (
            "server_hub/test_rounds.py",
            "server_hub/test_cut_policy.py",
            "server_hub/test_claims.py",
            "server_hub/test_message_sizes.py",
            "server_hub/test_round_ends.py",
        ),
        FLEET[1:],
    ),
    "server_hub/trunk": RoomTests(
        (
            "server_hub/test_shuffle_buffer.py",
            "server_hub/test_batcher.py",
            "server_hub/test_trunk_bounds.py",
            "server_hub/test_trunk_isolation.py",
            "server_hub/test_trunk.py",
        ),
        ("server_hub/test_process.py", "server_hub/test_vmapped.py", "server_hub/test_splitft.py"),
    ),
    "server_hub/aggregation": RoomTests(
        (
            "server_hub/test_layer_store.py",
            "server_hub/test_adapter_average.py",
            "server_hub/test_separate_stores.py",
            "server_hub/test_update_bound.py",
            "server_hub/test_robust_rules.py",
        ),
        (
            "server_hub/test_methods.py",
            "server_hub/test_baselines.py",
            "server_hub/test_splitft.py",
            "server_hub/test_splitmix.py",
        ),
    ),
    "server_hub/methods": RoomTests(
        ("server_hub/test_methods.py", "server_hub/test_baselines.py"),
        ("server_hub/test_splitmix.py", "server_hub/test_splitft.py"),
    ),
    "server_hub/storage": RoomTests(
        ("server_hub/test_tensorboard.py", "server_hub/test_trained_run.py"),
        ("server_hub/test_simulation.py", "end_to_end/test_end_to_end.py"),
    ),
    "server_hub/reports": RoomTests(
        ("server_hub/test_tensorboard.py", "server_hub/test_partition.py"),
        ("server_hub/test_compare.py", "server_hub/test_simulation.py"),
    ),
    "server_hub/simulation": RoomTests(
        (
            "server_hub/test_clock_network.py",
            "server_hub/test_partition.py",
            "server_hub/test_datasets.py",
        ),
        ("server_hub/test_simulation.py", "server_hub/test_compare.py"),
    ),
    "server_hub/cli": RoomTests(
        ("server_hub/test_trained_run.py", "server_hub/test_tokens_config.py"),
        ("end_to_end/test_mix_bad_input.py", "end_to_end/test_bad_input.py"),
    ),
    "server_hub/demo": RoomTests(
        ("server_hub/test_datasets.py",),
        ("end_to_end/test_demo_mixtures.py", "end_to_end/test_demo_texts.py"),
    ),
}
"""The tests of each room."""


@dataclass(frozen=True)
class Outcome:
    """Result of a mutant.

    Attributes:
        file: path of the changed file.
        line: number of the changed line.
        before: what was there.
        after: what was there instead.
        found: whether a test failed.
        seconds: time that the tests took.
    """

    file: str
    line: int
    before: str
    after: str
    found: bool
    seconds: float


def pick(root: Path, room: str, count: int, seed: int) -> list[tuple[Path, Mutant]]:
    """Return random mutants of a room, at most one per line."""
    by_line: dict[tuple[Path, int], list[Mutant]] = {}
    for path in sorted((root / room).rglob("*.py")):
        for mutant in mutants(path.read_text("utf-8")):
            by_line.setdefault((path.relative_to(root), mutant.line), []).append(mutant)
    rng = random.Random(seed)
    lines = rng.sample(sorted(by_line), min(count, len(by_line)))
    return [(line[0], rng.choice(by_line[line])) for line in lines]


def copied(root: Path, folder: Path) -> Path:
    """Copy the repository's files into a folder, without what git ignores."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in listed.stdout.splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, folder / name)
    return folder


def run_tests(folder: Path, tests: Sequence[str], limit_s: float) -> int:
    """Run pytest in a fork of this process and return its exit status.

    Args:
        folder: a copy of the repository.
        tests: paths below its ``tests``.
        limit_s: time limit in seconds.

    Returns:
        The exit status of pytest; :data:`OVERDUE` if it exceeds the limit.
    """
    child = os.fork()
    if child == 0:
        _run_pytest(folder, tests)
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return OVERDUE


def _run_pytest(folder: Path, tests: Sequence[str]) -> None:
    """Run pytest on a copy of the repository, and end this process."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(folder / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.dont_write_bytecode = True
        scratch = folder.with_name(f"{folder.name}-tmp")
        tempfile.tempdir = str(scratch)
        os.environ.update(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", TMPDIR=str(scratch))
        sys.path.insert(0, str(folder))
        ours = ("edge_sdk", "export", "server_hub", "benchmarks", "tests")
        for name in [name for name in sys.modules if name.split(".")[0] in ours]:
            del sys.modules[name]
        pytest = importlib.import_module("pytest")
        paths = [f"tests/{path}" for path in tests]
        status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *paths]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def try_mutants(room: str, count: int, seed: int) -> list[Outcome]:
    """Run the tests of a room on random mutants.

    Raises:
        SystemExit: the tests fail without a change.
    """
    for module in PRELOADED:
        importlib.import_module(module)
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="cutlayer-mutants-") as scratch:
        folder = copied(ROOT, Path(scratch, "copy"))
        Path(scratch, "copy-tmp").mkdir()
        limits: dict[tuple[str, ...], float] = {}
        for path, mutant in pick(ROOT, room, count, seed):
            started, found = time.monotonic(), False
            for tests in filter(None, ROOMS[room]):
                if tests not in limits:  # without a change they pass; how long does it take?
                    began = time.monotonic()
                    if run_tests(folder, tests, 1800) != 0:
                        log = (folder / "pytest.log").read_text("utf-8", "replace")
                        raise SystemExit(f"the tests fail without a change:\n{log[-3000:]}")
                    limits[tests] = 30 + 3 * (time.monotonic() - began)
                    started = time.monotonic()
                original = (folder / path).read_text("utf-8")
                (folder / path).write_text(mutant.source, "utf-8")
                found = run_tests(folder, tests, limits[tests]) != 0
                (folder / path).write_text(original, "utf-8")
                if found:
                    break
            outcome = Outcome(
                str(path), mutant.line, mutant.before, mutant.after, found,
                round(time.monotonic() - started, 1),
            )  # fmt: skip
            print(row(outcome), file=sys.stderr, flush=True)
            outcomes.append(outcome)
    return outcomes


def row(outcome: Outcome) -> str:
    """Return one line of the table."""
    place = f"{outcome.file}:{outcome.line}"
    result = "found" if outcome.found else "SURVIVED"
    change = f"{outcome.before[:60]}  ->  {outcome.after[:60]}"
    return f"{place:44} {result:9} {outcome.seconds:6.1f} s  {change}"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--room", required=True, choices=sorted(ROOMS))
    parser.add_argument("--count", type=int, default=20, help="how many mutants")
    parser.add_argument("--seed", type=int, default=0, help="which ones")
    parser.add_argument("--json", type=Path, help="write the outcomes to a file")
    options = parser.parse_args()
    outcomes = try_mutants(options.room, options.count, options.seed)
    found = sum(outcome.found for outcome in outcomes)
    print(f"{options.room}: {found} of {len(outcomes)} mutants found")
    if options.json is not None:
        table = {"room": options.room, "outcomes": [asdict(outcome) for outcome in outcomes]}
        options.json.write_text(json.dumps(table, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
