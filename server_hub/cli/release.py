"""``cutlayer release``: rolls trained models out to devices that only predict."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edge_sdk import config
from server_hub.reports.table import Table

if TYPE_CHECKING:
    from server_hub.gateway.releases import Release

release = typer.Typer(
    help="Roll trained models out to devices that only predict.", no_args_is_help=True
)

FolderOption = Annotated[Path, typer.Option("--releases", help="Folder of the releases.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
NumberArgument = Annotated[int, typer.Argument(help="Number of the release.")]

_FOLDER = Path("releases")


@release.command()
def publish(
    bundles: Annotated[
        Path, typer.Argument(help="Folder that cutlayer model export --format bundles wrote.")
    ],
    folder: FolderOption = _FOLDER,
    share: Annotated[
        float, typer.Option(help="Share of the devices that get it, above 0 and at most 1.")
    ] = 1.0,
    as_json: JsonOption = False,
) -> None:
    """Publish bundles of a trained model, to all devices or to a share of them."""
    from server_hub.gateway.releases import Releases

    made = Releases(folder, create=True).publish(bundles, share)
    if as_json:
        print(json.dumps(dataclasses.asdict(made)))
    else:
        tiers = ", ".join(made.tiers)
        print(f"release {made.number} is published to {_percent(share)} of devices; tiers {tiers}")


@release.command("share")
def set_share(
    number: NumberArgument,
    share: Annotated[float, typer.Argument(help="Share of the devices, above 0 and at most 1.")],
    folder: FolderOption = _FOLDER,
) -> None:
    """Offer a release to another share of the devices; a larger one includes a smaller one."""
    from server_hub.gateway.releases import Releases

    Releases(folder).set_share(number, share)
    print(f"release {number} is for {_percent(share)} of devices")


@release.command()
def withdraw(number: NumberArgument, folder: FolderOption = _FOLDER) -> None:
    """Take a release back: devices that come get the one before."""
    from server_hub.gateway.releases import Releases

    Releases(folder).withdraw(number)
    print(f"release {number} is taken back")


@release.command("list")
def list_releases(folder: FolderOption = _FOLDER, as_json: JsonOption = False) -> None:
    """Show the releases, how many devices run each, and which devices refuse one, and why."""
    from server_hub.gateway.releases import Releases

    found = Releases(folder).published()
    if as_json:
        print(json.dumps([dataclasses.asdict(one) for one in found]))
        return
    console = Console(highlight=False, markup=False)
    console.print(table(found).rich())
    for one in found:
        for device, reason in one.refused.items():
            console.print(f"{device} refuses release {one.number}: {reason}", soft_wrap=True)


@release.command()
def serve(
    config_file: Annotated[
        Path | None,
        typer.Option("--config", help="TOML file: releases, tokens, and tables as in hub.toml."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option("--releases", help="Folder of the releases.", show_default="releases"),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(help="File written by cutlayer token.", show_default="tokens.toml"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the address as JSON, when it is ready.")
    ] = False,
) -> None:
    """Serve releases where no job is running, until interrupted."""
    from server_hub.cli.serving import log_to_stderr, until_signal
    from server_hub.release_server import ReleaseConfig, ReleaseServer

    raw: dict[str, Any] = config.read_toml(config_file) if config_file is not None else {}
    top = {"releases": folder, "tokens": tokens}
    raw |= {key: str(value) for key, value in top.items() if value is not None}
    listen = {k: v for k, v in (("host", host), ("port", port)) if v is not None}
    if listen:
        raw["listen"] = {**raw.get("listen", {}), **listen}
    where = str(config_file or "options of cutlayer release serve")
    log_to_stderr(quiet=as_json)
    server = ReleaseServer(config.build(ReleaseConfig, raw, where))

    def ready(address: str) -> None:
        if as_json:
            print(json.dumps({"event": "ready", "address": address}), flush=True)
        else:
            print(f"releases at {address}; tiers {', '.join(server.releases.tiers())}", flush=True)

    ended_by = asyncio.run(until_signal(server.serve(ready)))
    if ended_by is not None:
        raise typer.Exit(128 + ended_by)


def table(found: list[Release]) -> Table:
    """A row for each release."""
    header = ["release", "published (UTC)", "tiers", "share", "devices", "refused by"]
    rows = [
        [
            str(one.number),
            one.published[:16].replace("T", " "),
            ", ".join(one.tiers),
            "taken back" if one.share == 0 else _percent(one.share),
            str(one.devices),
            str(len(one.refused)),
        ]
        for one in found
    ]
    return Table("Releases", header, rows, 3)


def _percent(share: float) -> str:
    return f"{share:.1%}".replace(".0%", "%")
