"""A hub and its devices as processes of this machine: start, output, end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_sdk.errors import CutlayerError

CUTLAYER = "edge_sdk.cli.main"
"""Module of the ``cutlayer`` command."""


@dataclass(frozen=True)
class HubProcess:
    """A hub that listens.

    Attributes:
        process: its process.
        address: URL for devices.
        events: the events that follow, as ``cutlayer hub --json`` prints them.
    """

    process: subprocess.Popen[str]
    address: str
    events: Iterator[dict[str, Any]]


@contextmanager
def hub_process(folder: Path, settings: Mapping[str, Any]) -> Iterator[HubProcess]:
    """A hub on a free port of this machine; it has 15 s to end by itself on leaving.

    Args:
        folder: where ``hub.toml`` and ``logs/hub.log`` are written.
        settings: contents of ``hub.toml``.

    Raises:
        CutlayerError: the hub ended before it listened; with the end of its log.
    """
    config = folder / "hub.toml"
    config.write_text(to_toml({**settings, "listen": {"port": 0}}), "utf-8")
    arguments = ["hub", "--config", str(config), "--json"]
    with module_process(folder, "hub", CUTLAYER, *arguments) as process:
        events = _hub_events(process, folder)
        for event in events:
            if event["event"] == "ready":
                yield HubProcess(process, event["address"], events)
                return
        raise CutlayerError(f"the hub ended before it listened:\n{tail(folder, 'hub')}")


@contextmanager
def module_process(
    folder: Path, name: str, module: str, *arguments: str, token: str = ""
) -> Iterator[subprocess.Popen[str]]:
    """A module that prints JSON to stdout, as a process; ended on leaving.

    Args:
        folder: the log is written to ``logs/NAME.log`` there.
        name: name of the process.
        module: module that Python runs.
        arguments: command line of the module.
        token: token of a device.
    """
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    with open(logs / f"{name}.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "CUTLAYER_TOKEN": token, "PYTHONUNBUFFERED": "1"},
        )
        try:
            yield process
        finally:
            try:
                process.wait(15 if sys.exc_info()[0] is None else 0)
            except subprocess.TimeoutExpired:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _hub_events(hub: subprocess.Popen[str], folder: Path) -> Iterator[dict[str, Any]]:
    """The events that a hub prints, until its end.

    Raises:
        CutlayerError: the hub failed; with the end of its log.
    """
    yield from json_lines(hub)
    if hub.wait() != 0:
        raise CutlayerError(f"the hub failed:\n{tail(folder, 'hub')}")


def json_lines(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """The JSON that a process prints, line by line, until its end."""
    assert process.stdout is not None
    for line in process.stdout:
        yield json.loads(line)


def device_report(process: subprocess.Popen[str], name: str, folder: Path) -> dict[str, Any]:
    """The JSON that a device prints at its end.

    Raises:
        CutlayerError: the device failed, with the end of its log; or it has imported torch.
    """
    out, _ = process.communicate(timeout=120)
    check_device(process, name, folder)
    report: dict[str, Any] = json.loads(out)
    check_no_torch(report, name)
    return report


def check_device(process: subprocess.Popen[str], name: str, folder: Path) -> None:
    """Raise :class:`CutlayerError`, with the end of its log, if a device's process failed."""
    if process.wait() != 0:
        raise CutlayerError(f"the device {name} failed:\n{tail(folder, name)}")


def check_no_torch(report: Mapping[str, Any], name: str) -> None:
    """Raise :class:`CutlayerError` if a device reports that it has imported torch."""
    if report["torch_imported"]:
        raise CutlayerError(f"the device {name} imported torch; a device must not need it")


def tail(folder: Path, name: str) -> str:
    """The last lines of the log of a process."""
    lines = (folder / "logs" / f"{name}.log").read_text("utf-8").splitlines()
    return "\n".join(lines[-5:])


def to_toml(settings: Mapping[str, Any]) -> str:
    """Settings as TOML: dictionaries become tables, those inside of them inline tables."""
    plain = {key: value for key, value in settings.items() if not isinstance(value, Mapping)}
    lines = [f"{key} = {_toml_value(value)}" for key, value in plain.items()]
    for name, table in settings.items():
        if isinstance(table, Mapping):
            lines += ["", f"[{name}]"]
            lines += [f"{key} = {_toml_value(value)}" for key, value in table.items()]
    return "\n".join([*lines, ""])


def _toml_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str | Path):
        return json.dumps(str(value), ensure_ascii=False)
    return json.dumps(value)
