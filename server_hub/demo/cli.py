"""``cutlayer demo``: the main job from start to end, on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_sdk.bundle import write_atomically


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder  [default: runs/demo-DATE-TIME]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of federated training.")] = 40,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write TensorBoard logs to this folder.")
    ] = None,
) -> None:
    """Train one model over six unequal devices, in seven processes, on handwritten digits."""
    from server_hub.demo.job import run_demo
    from server_hub.tensorboard import Board

    folder = run or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    with Board(tensorboard) as board:
        result = run_demo(folder, rounds, console, board.round)
    if json_file is not None:
        write_atomically(json_file.absolute(), (json.dumps(result, indent=1) + "\n").encode())
        console.print(f"results in {json_file}")
