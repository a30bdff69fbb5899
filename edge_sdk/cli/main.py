"""The ``cutlayer`` command: its subcommands come from the packages, by entry points.

Only the module of the command that runs is imported, so that ``cutlayer device`` works on an
installation that has nothing but a device's packages.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import typer

from edge_sdk.errors import BundleError, ConfigError, CutlayerError, DataError

GROUP = "cutlayer.commands"

EXTRAS = {"export": "export", "plan": "export", "adapter": "transformers"}
"""The extra that brings what a command needs; ``hub`` for the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``cutlayer``. A user's mistake is one sentence and exit code 2, other failures 1."""
    args = list(sys.argv[1:] if arguments is None else arguments)
    commands = {entry.name: entry for entry in metadata.entry_points(group=GROUP)}
    wanted = [args[0]] if args and args[0] in commands else sorted(commands)
    app = typer.Typer(
        name="cutlayer",
        help="Train a large model over a fleet of unequal devices.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(_root)
    try:
        for name in wanted:
            command: Any = commands[name].load()
            if isinstance(command, typer.Typer):
                app.add_typer(command, name=name)
            else:
                app.command(name)(command)
        app(args, prog_name="cutlayer")
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(args[0] if args else "", "hub")
        _stop(f"this needs the package {error.name}: pip install 'cutlayer[{extra}]'", 2)
    except (ConfigError, BundleError, DataError) as error:
        _stop(str(error), 2)
    except CutlayerError as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if version:
        print(f"cutlayer {metadata.version('cutlayer')}")
        raise typer.Exit


def _stop(message: str, code: int) -> None:
    print(f"cutlayer: {message}", file=sys.stderr)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
