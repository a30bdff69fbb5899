"""The cost of a cut, and the time that a device needs for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from edge_sdk.runtime.measure import Measurement
from export.bundles.tier_table import TierTable
from export.bundles.writer import Tier


@dataclass(frozen=True)
class Counts:
    """Counts for a cut, which need no run of its graphs.

    Attributes:
        parameters: number of trained parameters on the device.
        frozen: number of frozen parameters on the device.
        flops: FLOPs per example of a training step: matrix products, convolutions and attention,
            as ``torch.utils.flop_counter`` counts them.
        graph_flops: FLOPs per example of each graph that a training step runs, by name, see
            :func:`edge_sdk.runtime.measure.graphs_of_a_step`; ``attack`` runs several times.
        tokens: positions per example of text; 1 for all other inputs.
        activation_bytes: bytes that a training step sends per token of a text, or per example:
            packed activations, and the gradient of features if labels stay on the device. Tensors
            that a batch shares (scales) are divided among its rows. 0 if all blocks are on the
            device.
        update_bytes: bytes of the update at the end of a round: parameters and statistics.
    """

    parameters: int
    frozen: int
    flops: int
    graph_flops: Mapping[str, int]
    tokens: int
    activation_bytes: float
    update_bytes: int


@dataclass(frozen=True)
class Cost:
    """Cost of a cut.

    Attributes:
        tier: the cut and the other settings of the export.
        heads: depths of the auxiliary heads that the device holds.
        counts: parameters, FLOPs and bytes.
        bundle_bytes: size of the bundle.
        measured: memory and time on this machine of a training step with the tier's batch.
    """

    tier: Tier
    heads: tuple[int, ...]
    counts: Counts
    bundle_bytes: int
    measured: Measurement

    def to_json(self) -> dict[str, Any]:
        """All fields in one flat object."""
        return {
            **_settings(self.tier),
            "heads": list(self.heads),
            **asdict(self.counts),
            "bundle_bytes": self.bundle_bytes,
            **asdict(self.measured),
        }


@dataclass(frozen=True)
class Failure:
    """A cut that cannot be exported or measured.

    Attributes:
        tier: the cut and the other settings of the export.
        heads: depths of the auxiliary heads.
        error: message of the error.
    """

    tier: Tier
    heads: tuple[int, ...]
    error: str

    def to_json(self) -> dict[str, Any]:
        """All fields in one flat object."""
        return {**_settings(self.tier), "heads": list(self.heads), "error": self.error}


def epoch_s(table: TierTable, counts: Counts) -> float | None:
    """Seconds of a local epoch, including the uploads.

    A device uploads activations while it trains, so the longer of the two times counts; the update
    follows. Terms whose speed the tier does not give are left out.

    Returns:
        Seconds; None if the tier gives neither ``gflops`` nor ``uplink_mbit``.
    """
    if table.gflops is None and table.uplink_mbit is None:
        return None
    compute = upload = update = 0.0
    if table.gflops is not None:
        compute = table.examples * counts.flops / (table.gflops * 1e9)
    if table.uplink_mbit is not None:
        bytes_s = table.uplink_mbit * 1e6 / 8
        upload = table.examples * counts.tokens * counts.activation_bytes / bytes_s
        update = counts.update_bytes / bytes_s
    return max(compute, upload) + update


def too_slow(table: TierTable, counts: Counts) -> str | None:
    """The time of an epoch that exceeds a tier's limit, in words; None if it does not."""
    seconds = epoch_s(table, counts)
    if seconds is None or table.max_epoch_s is None or seconds <= table.max_epoch_s:
        return None
    return f"takes {up(seconds)} s per epoch, the tier allows {table.max_epoch_s:g}"


def up(value: float) -> str:
    """A number rounded up to four digits, so that a value above a limit is shown above it."""
    decimals = max(0, 3 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**decimals) / 10**decimals:.{decimals}f}"


def _settings(tier: Tier) -> dict[str, Any]:
    """The settings of a tier as JSON can hold them."""
    return {**asdict(tier), "graphs": sorted(tier.graphs)}
