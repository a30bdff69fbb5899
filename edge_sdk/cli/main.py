"""The ``cutlayer`` command: its subcommands come from the packages, by entry points.

Only the module of the command that runs is imported, so that ``cutlayer device`` works on an
installation that has nothing but a device's packages.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import metadata
from typing import Any, NoReturn

import typer

from edge_sdk.errors import BundleError, ConfigError, CutlayerError, DataError
from edge_sdk.files import why

GROUP = "cutlayer.commands"

EXTRAS = {"export": "export", "plan": "export", "adapter": "transformers"}
"""The extra that brings what a command needs; ``hub`` for the others."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``cutlayer``. A user's mistake is one sentence and exit code 2, other failures 1.

    A failure that nobody has foreseen is one sentence as well. Its trace is in a file, which the
    sentence names.
    """
    args = [_at_home(a) for a in (sys.argv[1:] if arguments is None else arguments)]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # None where there is no console at all
            stream.reconfigure(errors="replace")  # not every console can show every character
    try:
        try:
            _run(args)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk shows now, and not when nobody can say so
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(args[0] if args else "", "hub")
        _stop(f"this needs the package {error.name}: pip install 'cutlayer[{extra}]'", 2)
    except (ConfigError, BundleError, DataError) as error:
        _stop(str(error), 2)
    except CutlayerError as error:
        _stop(str(error), 1)
    except KeyboardInterrupt:
        _stop("interrupted", 130)
    except BrokenPipeError:
        _stop(None, 1)  # whoever reads the output has had enough
    except OSError as error:
        where = "the output" if error.filename is None else error.filename
        _stop(f"{where}: {why(error)}", 1)
    except MemoryError:
        _stop("there is not enough memory", 1)
    except Exception as error:
        _stop(_unforeseen(error), 1)


def _run(args: list[str]) -> None:
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
    for name in wanted:
        command: Any = commands[name].load()
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    app(args, prog_name="cutlayer")


def _root(
    version: bool = typer.Option(False, "--version", help="Print the version.", is_eager=True),
) -> None:
    if version:
        print(f"cutlayer {metadata.version('cutlayer')}")
        raise typer.Exit


def _at_home(argument: str) -> str:
    """An argument with the home folder for ``~``, where the shell has not put it in."""
    option, equals, value = argument.partition("=")
    if argument.startswith("--") and equals:
        return f"{option}={_at_home(value)}"
    if argument[:2] in ("~", "~/", "~" + os.sep):
        return os.path.expanduser(argument)
    return argument


def _unforeseen(error: Exception) -> str:
    """A sentence on an error that is nobody's mistake but ours; its trace goes to a file."""
    text = "".join(traceback.format_exception(error))
    said = f"unexpected {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", errors="replace",
            prefix="cutlayer-trace-", suffix=".txt", delete=False,
        ) as file:  # fmt: skip
            file.write(text)
    except OSError as failure:
        return (
            f"{said} (in {last.filename}:{last.lineno}); its trace cannot be written to a "
            f"temporary folder: {why(failure)}; set TMPDIR to a folder that can be written, and "
            "try again"
        )
    return f"{said}; please report it, with its trace in {file.name}"


def _shown(message: str) -> str:
    """A message without characters that would control the console: a hub may have sent it."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in message
    )


def _stop(message: str | None, code: int) -> NoReturn:
    if message is not None and sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(f"cutlayer: {_shown(message)}", file=sys.stderr, flush=True)
    # what could not be written to stdout must not be tried again, and complained of, at the exit
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
        raise SystemExit(code)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(code)


if __name__ == "__main__":
    main()
