"""``cutlayer device``: take part in a job from the command line."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from edge_sdk import config
from edge_sdk.device import Device, RoundReport, TrainReport
from edge_sdk.errors import ConfigError
from edge_sdk.inference.metrics import Metric
from edge_sdk.inference.prediction import Evaluation
from edge_sdk.runtime import MAX_THREADS
from edge_sdk.sources.opened import open_source
from edge_sdk.sources.recent import Recent


@dataclasses.dataclass(frozen=True)
class DeviceConfig:
    """What ``device.toml`` may say; options of the command override it."""

    url: str
    token: str
    tier: str | None = None
    data: Path | None = None
    keep_back: float = 0.0
    newest: int | None = None
    max_age_s: float | None = None
    evaluate: Path | None = None
    cache: Path | None = None
    trust: list[str] | None = None
    threads: int = 1
    memory_mb: int | None = None
    patience_s: float = 60.0

    def __post_init__(self) -> None:
        for name in ("url", "token"):  # a file that one came from may have ended its line
            object.__setattr__(self, name, getattr(self, name).strip())
            if not getattr(self, name):
                raise ValueError(f"{name} is empty")
        if not 1 <= self.threads <= MAX_THREADS:
            raise ValueError(f"threads is {self.threads}; it must be from 1 to {MAX_THREADS}")
        if self.memory_mb is not None and self.memory_mb < 1:
            raise ValueError(f"memory_mb is {self.memory_mb}; it must be 1 or more")
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s is {self.patience_s}; it must be 0 or more")
        if not 0 <= self.keep_back < 1:
            raise ValueError(f"keep_back is {self.keep_back}; it must be from 0 to below 1")
        if self.newest is not None and self.newest < 1:
            raise ValueError(f"newest is {self.newest}; it must be 1 or more")
        if self.max_age_s is not None and not 0 < self.max_age_s < math.inf:
            raise ValueError(f"max_age_s is {self.max_age_s}; it must be above 0")
        if self.tier == "":
            raise ValueError("tier is empty")


def device(
    config_file: Annotated[
        Path | None, typer.Option("--config", help="TOML file with the same keys as the options.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address of the hub, ws://HOST:PORT.")] = None,
    token: Annotated[
        str | None, typer.Option(envvar="CUTLAYER_TOKEN", help="This device's token.")
    ] = None,
    tier: Annotated[
        str | None,
        typer.Option(help="Tier whose bundle the device carries.", show_default="token's"),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="What to train on: .npz with x and y, x.npy beside y.npy, .csv, .jsonl, .sqlite, "
            "or a folder of images; without it, only evaluate."
        ),
    ] = None,
    keep_back: Annotated[
        float | None,
        typer.Option(
            help="Share of the data that is never trained on; the device evaluates on it for the "
            "hub, and at the end unless --evaluate is given.",
            show_default="0",
        ),
    ] = None,
    newest: Annotated[
        int | None, typer.Option(min=1, help="Train on so many rows at most, the newest.")
    ] = None,
    max_age_s: Annotated[
        float | None,
        typer.Option(help="Train on rows of at most so many seconds of age, by their time."),
    ] = None,
    evaluate: Annotated[
        Path | None,
        typer.Option(help="What to measure accuracy or perplexity on; formats as for --data."),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="Folder that keeps bundles.", show_default="~/.cache/cutlayer"),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option(help="Public key or .pub file that must have signed the bundle; repeatable."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    memory_mb: Annotated[
        int | None, typer.Option(min=1, help="MB to spare for training, where cuts move.")
    ] = None,
    patience_s: Annotated[
        float | None, typer.Option(help="Seconds to go on trying to reach the hub.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end, progress to stderr.")
    ] = False,
) -> None:
    """Join a hub, train on local data until the job is over, and measure the result."""
    given = {
        "url": url, "token": token, "tier": tier, "data": data,
        "keep_back": keep_back, "newest": newest, "max_age_s": max_age_s, "evaluate": evaluate,
        "cache": cache, "trust": trust or None, "threads": threads, "memory_mb": memory_mb,
        "patience_s": patience_s,
    }  # fmt: skip
    raw: dict[str, Any] = config.read_toml(config_file) if config_file is not None else {}
    raw |= {key: str(v) if isinstance(v, Path) else v for key, v in given.items() if v is not None}
    settings = config.build(DeviceConfig, raw, str(config_file or "options of cutlayer device"))
    if settings.data is None and settings.evaluate is None:
        raise ConfigError("nothing to do: give --data to train on, --evaluate to measure, or both")
    if settings.data is None and (
        settings.keep_back or settings.newest is not None or settings.max_age_s is not None
    ):
        raise ConfigError("--keep-back, --newest and --max-age-s need --data")
    console = Console(stderr=as_json, highlight=False, markup=False)
    joined, training, evaluation = asyncio.run(_run(settings, console))
    if as_json:
        print(json.dumps(_summary(joined, training, evaluation)))
    elif evaluation is not None:
        console.print(_table(evaluation))


async def _run(
    settings: DeviceConfig, console: Console
) -> tuple[Device, TrainReport | None, Evaluation | None]:
    """The device, which has left; what training did; and the accuracy."""
    data = open_source(settings.data) if settings.data is not None else None
    if data is not None and (settings.newest is not None or settings.max_age_s is not None):
        data = Recent(data, settings.newest, settings.max_age_s)
    held_out = open_source(settings.evaluate) if settings.evaluate is not None else None

    def show(report: RoundReport) -> None:
        heads = ""
        if report.loss is not None and report.accuracy is not None:
            heads = f"loss {report.loss:.3f}  accuracy {report.accuracy:6.1%}  "
        console.print(f"round {report.round:3d}  {heads}{report.seconds:.1f} s", soft_wrap=True)

    joined = await Device.connect(
        settings.url,
        token=settings.token,
        tier=settings.tier,
        data=data,
        keep_back=settings.keep_back,
        cache=settings.cache,
        trust=settings.trust,
        threads=settings.threads,
        memory_mb=settings.memory_mb,
        patience_s=settings.patience_s,
    )
    async with joined:
        manifest = joined.manifest
        release = "" if joined.release is None else f", release {joined.release}"
        console.print(
            f"joined {settings.url} as {joined.name}: tier {manifest.tier}, cut {manifest.cut}, "
            f"{manifest.codec} activations{release}",
            soft_wrap=True,
        )
        if held_out is not None:  # not after hours of training
            held_out.fitted(manifest)
        training = await joined.train(show) if data is not None else None
        if training is not None:
            console.print(f"stopped: {training.reason}", soft_wrap=True)
        if held_out is None and settings.keep_back:
            held_out = joined.kept_back()
            if len(held_out) == 0:
                console.print("no row is kept back, so there is nothing to measure the result on")
                held_out = None
        evaluation = await joined.evaluate(held_out) if held_out is not None else None
    return joined, training, evaluation


def _summary(
    joined: Device, training: TrainReport | None, evaluation: Evaluation | None
) -> dict[str, Any]:
    return {
        "name": joined.name,
        "tier": joined.manifest.tier,
        "release": joined.release,
        "rounds": [dataclasses.asdict(r) for r in training.rounds] if training else [],
        "stopped": training.reason if training else None,
        "evaluation": dataclasses.asdict(evaluation) if evaluation else None,
        "rss_mb": peak_rss_mb(),
        "torch_imported": "torch" in sys.modules,
    }


def peak_rss_mb() -> float | None:
    """Largest resident memory of this process so far, in MiB; None where the system says nothing.

    Linux says it in /proc; ``getrusage`` there counts the process that we were forked from, too.
    """
    try:
        status = Path("/proc/self/status").read_text("ascii")
        return round(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024, 1)  # type: ignore[index]
    except (OSError, TypeError):
        try:
            import resource
        except ImportError:  # Windows
            return None
        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return round(size / (2**20 if sys.platform == "darwin" else 1024), 1)


def _table(evaluation: Evaluation) -> Table:
    table = Table(title=f"{evaluation.metric} on {evaluation.samples} examples")
    for column in ("device alone", "through hub", "ensemble"):
        table.add_column(column, justify="right")
    values = (evaluation.device_alone, evaluation.through_hub, evaluation.ensemble)
    table.add_row(*(_shown(value, evaluation.metric) for value in values))
    return table


def _shown(value: float | None, metric: Metric) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if metric == "accuracy" else f"{value:.4g}"
