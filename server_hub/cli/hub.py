"""``cutlayer hub``: serves a training job."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edge_sdk import config

if TYPE_CHECKING:
    from server_hub.hub import Hub
    from server_hub.storage.run_folder import RoundRecord


def hub(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file, see docs/hub.md for its keys.")
    ] = None,
    bundles: Annotated[Path | None, typer.Option(help="Folder written by cutlayer export.")] = None,
    tokens: Annotated[Path | None, typer.Option(help="File written by cutlayer token.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder for metrics, report and model.")] = None,
    start_from: Annotated[
        Path | None,
        typer.Option(help="Run folder, checkpoint or weights whose model the job goes on with."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option(help=".npz with x and y to measure accuracy or perplexity on.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Number of rounds.")] = None,
    min_devices: Annotated[int | None, typer.Option(help="Devices a round waits for.")] = None,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Go on answering after the last round.")
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write TensorBoard logs to this folder.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print events as JSON, one a line.")
    ] = False,
) -> None:
    """Serve a job: let devices in, train the deep part, average every layer."""
    raw: dict[str, Any] = config.read_toml(config_file) if config_file is not None else {}
    top = {
        "bundles": bundles,
        "tokens": tokens,
        "run": run,
        "start_from": start_from,
        "held_out": held_out,
    }
    raw |= {key: str(value) for key, value in top.items() if value is not None}
    if keep_serving:
        raw["keep_serving"] = True
    for table, key, value in (
        ("listen", "host", host),
        ("listen", "port", port),
        ("rounds", "count", rounds),
        ("rounds", "min_devices", min_devices),
    ):
        if value is not None:
            raw[table] = {**raw.get(table, {}), key: value}
    from server_hub.config import HubConfig
    from server_hub.hub import Hub
    from server_hub.reports.report import write_report
    from server_hub.reports.rounds import move_lines, round_line
    from server_hub.reports.tensorboard import Board

    logging.basicConfig(
        level=logging.INFO if not as_json else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("websockets").setLevel(logging.CRITICAL)
    settings = config.build(HubConfig, raw, str(config_file or "options of cutlayer hub"))
    console = Console(stderr=as_json, highlight=False)

    def emit(event: str, **fields: Any) -> None:
        if as_json:
            print(json.dumps({"event": event, **fields}), flush=True)

    def on_round(record: RoundRecord) -> None:
        board.round(record)
        emit("round", **dataclasses.asdict(record))
        for line in (round_line(record), *move_lines(record)):
            console.print(line, soft_wrap=True, markup=False)

    job = Hub(settings, on_round=on_round)
    if job.started is not None:
        emit("started", **dataclasses.asdict(job.started))
        console.print(str(job.started), soft_wrap=True, markup=False)

    def ready(address: str) -> None:
        emit("ready", address=address)
        tiers = ", ".join(f"{name} (cut {t.cut})" for name, t in job.index.tiers.items())
        console.print(f"hub at {address}; tiers {tiers}", soft_wrap=True)

    # A full garbage collection of a heap with torch would pause the event loop for 0.1 s or more.
    gc.collect()
    gc.freeze()
    with Board(tensorboard) as board:
        interrupted = asyncio.run(_serve(job, ready))
    started = [] if job.started is None else [f"{job.started}."]
    write_report(job.run, f"{job.method.name}: {len(job.run.records)} rounds", started)
    traffic = job.gateway.traffic.by_kind()
    emit("done", run=str(settings.run), rounds=len(job.run.records), bytes=traffic)
    console.print(f"model, metrics and report in {settings.run}")
    if interrupted:
        raise typer.Exit(130)


async def _serve(job: Hub, ready: Any) -> bool:
    """Serve until the job is done or interrupted.

    Returns:
        Whether the job was interrupted. The model of the last round is then in the run folder.
    """
    task = asyncio.create_task(job.serve(ready))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return True
    return False
