"""``cutlayer demo``: the main job from start to end, on this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError


def demo(
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Run folder.", show_default="runs/demo-DATE-TIME")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of training.", show_default="40; with --text 16"),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Fine-tune a language model, by SplitFT, instead.")
    ] = False,
    mix: Annotated[
        bool,
        typer.Option("--mix", help="Train networks that can be mixed, by Split-Mix, instead."),
    ] = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also write TensorBoard logs to this folder.")
    ] = None,
) -> None:
    """Train one model over six unequal devices, in seven processes, on handwritten digits.

    With --text, fine-tune a small GPT-2 on texts instead, while the devices' cuts move. With --mix,
    train narrow networks; one device then mixes some of them, and chooses its robustness.
    """
    if text and mix:
        raise ConfigError("--text and --mix are two demos; choose one")
    from server_hub.demo.demo_digits import DigitsDemo
    from server_hub.demo.demo_mixtures import MixtureDemo
    from server_hub.demo.demo_texts import TextDemo
    from server_hub.demo.runner import run_demo
    from server_hub.reports.tensorboard import Board

    kind = TextDemo if text else MixtureDemo if mix else DigitsDemo
    chosen = kind() if rounds is None else kind(rounds=rounds)
    folder = run or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    console = Console(highlight=False)
    with Board(tensorboard) as board:
        result = run_demo(chosen, folder, console, board.round)
    written = result["rows"] if mix else result
    if json_file is not None:
        write_atomically(json_file.absolute(), (json.dumps(written, indent=1) + "\n").encode())
        console.print(f"results in {json_file}", soft_wrap=True, markup=False)
