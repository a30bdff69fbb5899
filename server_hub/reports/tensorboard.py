"""Rounds as TensorBoard logs, for ``--tensorboard DIR``."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from edge_sdk.errors import ConfigError
from edge_sdk.files import why
from server_hub.storage.run_folder import RoundRecord


class Board:
    """Writes every round's losses, accuracy or perplexity, cuts and traffic; used in ``with``.

    Args:
        folder: TensorBoard's log folder; None writes nothing.

    Raises:
        ConfigError: the folder cannot be written, or the package is not installed.
    """

    def __init__(self, folder: Path | None) -> None:
        self._writer: Any = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "--tensorboard needs the package tensorboard: pip install 'cutlayer[tensorboard]'"
            ) from error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(folder))
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {why(error)}") from error

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def round(self, record: RoundRecord) -> None:
        """Log a round, with its number as the step."""
        if self._writer is None:
            return
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.round)
        self._writer.flush()


def scalars(record: RoundRecord) -> dict[str, float]:
    """The values of a round that are logged, by name."""
    values: dict[str, float | None] = {
        "loss/devices": record.local_loss,
        "loss/trunk": record.trunk_loss,
        "accuracy/on the devices' own examples": record.local_accuracy,
        "round/seconds": record.seconds,
        "round/devices": record.devices,
        "round/dropped": len(record.dropped),
        "time/seconds since the start": record.clock,
        "traffic/MB up": record.up / 1e6,
        "traffic/MB down": record.down / 1e6,
    }
    for tier, paths in record.accuracy.items():
        values |= {f"{record.metric}/{tier}/{path}": value for path, value in paths.items()}
    for tier, said in record.on_devices.get("tiers", {}).items():
        values |= {
            f"{record.metric} on devices/{tier}/{path}/{name}": value
            for path, figures in said["paths"].items()
            for name, value in figures.items()
        }
    values |= {f"cut/{device}": cut for device, cut in record.cuts.items()}
    return {name: value for name, value in values.items() if value is not None}
