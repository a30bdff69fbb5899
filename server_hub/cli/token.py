"""``cutlayer token``: issues and revokes the tokens of devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

token = typer.Typer(help="Issue and revoke the tokens of devices.", no_args_is_help=True)


TokensOption = Annotated[Path, typer.Option("--tokens", help="File that keeps the hashes.")]


@token.command()
def new(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    tokens: TokensOption = Path("tokens.toml"),
    tier: Annotated[
        str | None, typer.Option(help="Tier of the device; without it, the device names its own.")
    ] = None,
    download_only: Annotated[
        bool,
        typer.Option(
            "--download-only", help="The device gets bundles, and neither trains nor asks."
        ),
    ] = False,
) -> None:
    """Print a new token for a device; only its hash is stored."""
    from server_hub.gateway.tokens import TokenFile

    print(TokenFile(tokens).issue(device, tier, download_only=download_only))


@token.command()
def revoke(
    device: Annotated[str, typer.Argument(help="Name of the device.")],
    tokens: TokensOption = Path("tokens.toml"),
) -> None:
    """Revoke a device's token; the device can no longer connect."""
    from server_hub.gateway.tokens import TokenFile

    TokenFile(tokens).revoke(device)
    print(f"{device} can no longer connect")
