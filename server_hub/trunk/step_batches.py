"""Batches on the trunk's device, as a step takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edge_sdk.protocol.tensors import Array
from server_hub.trunk.bounds import shares
from server_hub.trunk.interface import StepInput


@dataclass(frozen=True)
class Received:
    """A batch on the trunk's device, still packed.

    Attributes:
        source: the batch as it came; its arrays may be overwritten before later passes.
        parts: packed activations by name.
        labels: labels; empty where they stay on the device.
        counted: number of labels that count.
        head_gradient: packed gradient of the features by name, where labels stay on the device.
    """

    source: StepInput
    parts: dict[str, Tensor]
    labels: Tensor
    counted: int
    head_gradient: dict[str, Tensor] | None


@dataclass(frozen=True)
class Unpacked:
    """A batch that is unpacked for one pass.

    Attributes:
        received: the batch.
        h: activations (rows, ...).
        gradient: gradient of the features (rows, ...), where labels stay on the device.
    """

    received: Received
    h: Tensor
    gradient: Tensor | None

    @property
    def source(self) -> StepInput:
        """The batch as it came."""
        return self.received.source


def merged_order(batches: Sequence[Unpacked]) -> list[int]:
    """The order in which the rows of batches stand behind each other when they are merged."""
    return sorted(range(len(batches)), key=lambda i: batches[i].source.cut)


def loss_sums(row_losses: Array, batches: Sequence[Unpacked]) -> list[float]:
    """Sum of the losses of each batch's rows, given those of all rows in the merged order."""
    order = merged_order(batches)
    ends = np.cumsum([batches[i].source.rows for i in order])
    parts = dict(zip(order, np.split(row_losses, ends[:-1]), strict=True))
    return [float(parts[i].sum()) for i in range(len(batches))]


def label_weights(batches: Sequence[Unpacked]) -> tuple[list[float], float]:
    """Weight of a label of each batch in the step, and how many labels all of them count as.

    A label of a device that has too large a share of the step counts less.
    """
    devices = [b.source.device for b in batches]
    factors = shares(devices, [b.source.weight * b.received.counted for b in batches])
    labels = sum(f * b.received.counted for f, b in zip(factors, batches, strict=True))
    return [f * b.source.weight for f, b in zip(factors, batches, strict=True)], labels


def is_finite(batch: Unpacked) -> Tensor:
    """Whether what the device has sent is finite; a boolean scalar on the trunk's device."""
    finite = torch.isfinite(batch.h).all()
    return finite if batch.gradient is None else finite & torch.isfinite(batch.gradient).all()


def rows_by_cut(batches: Sequence[Unpacked]) -> dict[int, int]:
    """Number of rows that enter at each cut."""
    rows: dict[int, int] = {}
    for b in batches:
        rows[b.source.cut] = rows.get(b.source.cut, 0) + b.source.rows
    return rows


def counted_labels(batches: Sequence[Unpacked]) -> int:
    """Number of labels that count in all batches."""
    return sum(b.received.counted for b in batches)
