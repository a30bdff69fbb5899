"""``cutlayer hub``: serves a training job."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edge_sdk import config
from edge_sdk.errors import CutlayerError
from edge_sdk.files import why
from server_hub.cli.serving import log_to_stderr, until_signal

if TYPE_CHECKING:
    from server_hub.storage.run_folder import RoundRecord


log = logging.getLogger("cutlayer.hub")


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
    releases: Annotated[
        Path | None, typer.Option(help="Folder of releases for devices that only download.")
    ] = None,
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
        "releases": releases,
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

    log_to_stderr(quiet=as_json)
    settings = config.build(HubConfig, raw, str(config_file or "options of cutlayer hub"))
    console = Console(stderr=as_json, highlight=False, markup=False)

    def emit(event: str, **fields: Any) -> None:
        if as_json:
            print(json.dumps({"event": event, **fields}), flush=True)

    def on_round(record: RoundRecord) -> None:
        try:
            emit("round", **dataclasses.asdict(record))
            for line in (round_line(record), *move_lines(record)):
                console.print(line, soft_wrap=True)
            board.round(record)
        except OSError as error:  # a full disk, or nobody reads any more: the job goes on
            log.warning("round %d cannot be printed or drawn: %s", record.round, why(error))

    job = Hub(settings, on_round=on_round)
    if job.started is not None:
        emit("started", **dataclasses.asdict(job.started))
        console.print(str(job.started), soft_wrap=True)

    def ready(address: str) -> None:
        emit("ready", address=address)
        tiers = ", ".join(f"{name} (cut {t.cut})" for name, t in job.index.tiers.items())
        console.print(f"hub at {address}; tiers {tiers}", soft_wrap=True)

    # A full garbage collection of a heap with torch would pause the event loop for 0.1 s or more.
    gc.collect()
    gc.freeze()
    with Board(tensorboard) as board:
        ended_by = asyncio.run(until_signal(job.serve(ready)))
    started = [] if job.started is None else [f"{job.started}."]
    unwritten = job.unwritten
    try:
        write_report(job.run, f"{job.method.name}: {len(job.run.records)} rounds", started)
    except OSError as error:
        unwritten.append(f"the report cannot be written to {error.filename}: {why(error)}")
    if unwritten:
        raise CutlayerError("; ".join(unwritten))
    traffic = job.gateway.traffic.by_kind()
    emit("done", run=str(settings.run), rounds=len(job.run.records), bytes=traffic)
    console.print(f"model, metrics and report in {settings.run}", soft_wrap=True)
    if ended_by is not None and not job.finished:
        done = f"{len(job.run.records)} of {settings.rounds.count} rounds"
        print(f"cutlayer: ended by {ended_by.name} after {done}", file=sys.stderr)
        raise typer.Exit(128 + ended_by)
