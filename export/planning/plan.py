"""Measures the cost of every cut, and finds the deepest cut that each tier can carry.

Nothing is interpolated: parameters and bytes are counted in the bundle that would be exported,
FLOPs in the eager training step; memory and time are measured while the step graph runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

from torch import Tensor

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError
from edge_sdk.runtime.measure import Measurement, measure_apart
from export.bundles.tier_table import TierTable
from export.bundles.writer import Tier, make_steps, write_tier
from export.cutting.checks import check_parameters, check_sharing, check_stages
from export.cutting.input_ranges import check_classes, find_ranges
from export.cutting.split_model import ClientSegment, SplitModel, modes_kept
from export.errors import ExportError
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.train import train

_NAME = "measured"
_STEPS = 2
"""Number of measured steps: memory reaches its peak in the second."""

_ROWS = 2
"""Rows of the example; a batch norm in training mode needs more than one."""

Report = Callable[[str, float | None], None]
"""Reports progress: a text, and the completed fraction (0 to 1) if it is known."""


def _silent(text: str, done: float | None) -> None:
    pass


@dataclass(frozen=True)
class Counts:
    """Counts for a cut, which need no run of its graphs.

    Attributes:
        parameters: number of trained parameters on the device.
        frozen: number of frozen parameters on the device.
        flops: FLOPs per example of a training step, forward and backward: matrix products,
            convolutions and attention, as ``torch.utils.flop_counter`` counts them.
        tokens: positions per example of text; 1 for all other inputs.
        activation_bytes: bytes of packed activations per token of a text, or per example.
        update_bytes: bytes of the update at the end of a round: parameters and statistics.
    """

    parameters: int
    frozen: int
    flops: int
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
            **asdict(self.tier),
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
        return {**asdict(self.tier), "heads": list(self.heads), "error": self.error}


@dataclass(frozen=True)
class Choice:
    """The cut of a tier.

    Attributes:
        cut: the cut; None if the tier can carry none.
        given: whether ``tiers.toml`` sets the cut.
        fits: whether the cut is within the tier's limits.
        reason: why the cut is not deeper, or which limit it exceeds.
        cost: cost of the cut with the heads at the shallower cuts of all tiers.
    """

    cut: int | None
    given: bool
    fits: bool
    reason: str
    cost: Cost | Failure | None


@dataclass(frozen=True)
class Plan:
    """Costs of all cuts, each with the head at the cut only, and the cuts of the tiers.

    Attributes:
        costs: costs by cut, then by the runtime, codec and batch that tiers use.
        tiers: the given tiers by name.
        choices: cut of each tier by name.
    """

    costs: tuple[Cost | Failure, ...]
    tiers: Mapping[str, TierTable]
    choices: Mapping[str, Choice]

    def epochs(self, cost: Cost | Failure) -> dict[str, float | None]:
        """Seconds of a local epoch by tier, for the tiers whose settings were measured."""
        if isinstance(cost, Failure):
            return {}
        return {
            name: epoch_s(table, cost.counts)
            for name, table in self.tiers.items()
            if table.at(cost.tier.cut) == cost.tier
        }

    def to_json(self) -> dict[str, Any]:
        """The plan as ``cutlayer plan --json`` prints it."""
        tiers = {}
        for name, choice in self.choices.items():
            cost = choice.cost
            seconds = epoch_s(self.tiers[name], cost.counts) if isinstance(cost, Cost) else None
            tiers[name] = {
                "cut": choice.cut,
                "given": choice.given,
                "fits": choice.fits,
                "reason": choice.reason,
                "epoch_s": seconds,
                "cost": None if cost is None else cost.to_json(),
            }
        cuts = [{**cost.to_json(), "epoch_s": self.epochs(cost)} for cost in self.costs]
        return {"cuts": cuts, "tiers": tiers}


class Planner:
    """Measures cuts of a model; a context manager that does not change the model.

    Args:
        model: model to measure.
        example: inputs (batch, ...) like those on the devices.
        classes: number of classes; for tokens the size of the vocabulary.
        optimizer: ``sgd`` or ``adamw``.
        report: receives the progress.

    Raises:
        ExportError: the model's head has another number of classes.
    """

    def __init__(
        self,
        model: SplitModel,
        example: Tensor,
        classes: int,
        optimizer: str = "sgd",
        report: Report = _silent,
    ) -> None:
        self.model, self.classes = model.cpu(), classes
        self.example = example[:_ROWS]  # only its shape and distribution matter
        self.optimizer, self.report = optimizer, report
        self._length = example.shape[1] if example.dim() == 2 else 1
        self._own = model.head_depths
        self._heads = dict(model.aux.items())
        self._known: dict[tuple[Tier, tuple[int, ...]], Cost | Failure] = {}
        self._written: _Written | None = None
        self._done: float | None = None
        self._checked = 0
        with suppress(ExportError):  # if the check fails, each cut is checked by itself
            self._check(model.depth - 1)
        if self._checked:
            check_classes(model, self.example, classes)
        self._ranges = find_ranges(model, self.example)

    def __enter__(self) -> Planner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._discard()

    def plan(self, tiers: Mapping[str, TierTable], cuts: Iterable[int] | None = None) -> Plan:
        """Measure the cuts and find the deepest cut that each tier can carry.

        Args:
            tiers: tiers by name.
            cuts: cuts to measure; None for all.

        Raises:
            ExportError: a cut is outside the model.
        """
        cuts = self._cuts(tiers, cuts)
        variants = list(dict.fromkeys(table.at(1) for table in tiers.values()))
        wanted = [replace(variant, cut=cut) for cut in cuts for variant in variants]
        costs = []
        for number, tier in enumerate(wanted):
            # the time that a cut takes grows with it
            self._done = sum(t.cut for t in wanted[:number]) / sum(t.cut for t in wanted)
            costs.append(self.cost(tier, []))
        self._done = None
        settled = self._settle(tiers, cuts)
        heads = {cut for cut, _ in settled.values() if cut is not None}
        choices = {n: self._judge(tiers[n], *settled[n], heads) for n in tiers}
        return Plan(tuple(costs), dict(tiers), choices)

    def choose(self, tiers: Mapping[str, TierTable]) -> dict[str, int]:
        """The cut of every tier: the given one, or the deepest that it can carry.

        Only the cuts that this depends on are measured.

        Args:
            tiers: tiers by name.

        Raises:
            ExportError: a tier can carry no cut, or a cut is outside the model.
        """
        settled = self._settle(tiers, self._cuts(tiers, None))
        heads = {cut for cut, _ in settled.values() if cut is not None}
        chosen = {}
        for name, (cut, reason) in settled.items():
            if cut is None:
                raise ExportError(f"tier {name!r} can carry no cut: {reason}")
            if tiers[name].cut is None:
                problem = self._shortfall(tiers[name], cut, heads)
                if problem is not None:
                    raise ExportError(
                        f"tier {name!r}: with the heads of the other tiers cut {cut} {problem}; "
                        "set its cut, or that of the others"
                    )
            chosen[name] = cut
        return chosen

    def cost(self, tier: Tier, heads: Iterable[int]) -> Cost | Failure:
        """Cost of a cut with the head at the cut and those of ``heads`` at shallower depths."""
        depths = self._depths(tier.cut, heads)
        if (tier, depths) not in self._known:
            with modes_kept(self.model):
                self._known[tier, depths] = self._measure(tier, depths)
        return self._known[tier, depths]

    def _depths(self, cut: int, heads: Iterable[int]) -> tuple[int, ...]:
        return tuple(sorted({d for d in {*heads, *self._own} if d < cut} | {cut}))

    def _cuts(self, tiers: Mapping[str, TierTable], cuts: Iterable[int] | None) -> list[int]:
        """The cuts to measure, shallowest first; checks that all given cuts are in the model."""
        wanted = sorted(set(range(1, self.model.depth) if cuts is None else cuts))
        for cut in wanted:
            self.model.check_cut(cut)
        for name, table in tiers.items():
            if table.cut is not None:
                try:
                    self.model.check_cut(table.cut)
                except ExportError as error:
                    raise ExportError(f"tier {name!r}: {error}") from error
        return wanted

    def _settle(
        self, tiers: Mapping[str, TierTable], cuts: Sequence[int]
    ) -> dict[str, tuple[int | None, str]]:
        """The cut of every tier, with the reason why it is not deeper.

        A device also trains the heads at the shallower cuts of other tiers. So the shallowest cut
        is settled first: its head adds to the cost of all other tiers, and no other head adds to
        its own.
        """
        settled: dict[str, tuple[int | None, str]] = {
            name: (table.cut, "") for name, table in tiers.items() if table.cut is not None
        }
        while len(settled) < len(tiers):
            heads = {cut for cut, _ in settled.values() if cut is not None}
            open_ones = {
                name: self._deepest(table, cuts, heads)
                for name, table in tiers.items()
                if name not in settled
            }
            name = min(open_ones, key=lambda n: open_ones[n][0] or 0)
            settled[name] = open_ones[name]
        return {name: settled[name] for name in tiers}

    def _deepest(
        self, table: TierTable, cuts: Sequence[int], heads: Iterable[int]
    ) -> tuple[int | None, str]:
        """The deepest cut that a tier can carry, and the reason why it is not deeper."""
        reason = "the deepest cut there is"
        if cuts[-1] < self.model.depth - 1:
            reason = "the deepest cut that was asked about"
        for cut in reversed(cuts):
            problem = self._shortfall(table, cut, heads)
            if problem is None:
                return cut, reason
            reason = f"cut {cut} {problem}"
        return None, reason

    def _judge(
        self, table: TierTable, cut: int | None, reason: str, heads: Iterable[int]
    ) -> Choice:
        """Judge whether a settled cut, with all settled heads, is within the tier's limits."""
        given = table.cut is not None
        if cut is None:
            return Choice(None, given, False, f"can carry no cut: {reason}", None)
        cost = self.cost(table.at(cut), heads)
        problem = self._shortfall(table, cut, heads)
        if problem is not None:
            return Choice(cut, given, False, f"over its limits: cut {cut} {problem}", cost)
        return Choice(cut, given, True, reason or "set in tiers.toml, within its limits", cost)

    def _shortfall(self, table: TierTable, cut: int, heads: Iterable[int]) -> str | None:
        """The limit of a tier that a cut exceeds, in words; None if the tier can carry the cut."""
        tier = table.at(cut)
        cost = self._known.get((tier, self._depths(cut, heads)))
        if cost is None and table.max_epoch_s is not None:
            # the time of an epoch is known before the cut is lowered and run
            with suppress(ExportError), modes_kept(self.model):
                counts = self._count(self._steps(tier, self._depths(cut, heads)), tier)
                problem = _too_slow(table, counts)
                if problem is not None:
                    return problem
        cost = self.cost(tier, heads)
        if isinstance(cost, Failure):
            return f"cannot be exported: {cost.error}"
        memory = cost.measured.memory_bytes
        if table.memory_mb is not None and memory > table.memory_mb * 1e6:
            return f"needs {_up(memory / 1e6)} MB, the tier has {table.memory_mb:g}"
        return _too_slow(table, cost.counts)

    def _measure(self, tier: Tier, depths: tuple[int, ...]) -> Cost | Failure:
        """Lower a cut, write its bundle and measure its training step."""
        heads = ", ".join(map(str, depths))
        line = f"cut {tier.cut}, heads at {heads}, {tier.runtime}, batch {tier.batch}"
        self.report(line, self._done)
        try:
            steps = self._steps(tier, depths)
            counts = self._count(steps, tier)
            written = self._write(steps, tier, depths)
            measured = measure_apart(written.path, _NAME, tier.batch, self._length, _STEPS)
        except (ExportError, BundleError) as error:
            return Failure(tier, depths, str(error))
        return Cost(tier, depths, counts, sum(written.manifest.blobs.values()), measured)

    def _steps(self, tier: Tier, depths: Sequence[int]) -> ClientSteps:
        """The steps of a cut whose device holds the heads at these depths."""
        model, cut = self.model, tier.cut
        view = SplitModel(
            model.stem,
            list(model.block),
            model.head,
            model.task,
            channels=model.channels,
        )
        view.layout = model.layout
        view.aux.update({str(d): self._heads[str(d)] for d in depths if str(d) in self._heads})
        self._check(cut)
        check_sharing(model, cut)
        view.add_heads(depths, self.example, self.classes)
        self._heads.update(view.aux.items())
        segment = ClientSegment(view, cut)
        check_parameters(segment, self.example)
        return make_steps(segment, tier, self.example, self.classes, self.optimizer, self._ranges)

    def _check(self, cut: int) -> None:
        if cut > self._checked:
            check_stages(self.model, cut, self.example)
            self._checked = cut

    def _count(self, steps: ClientSteps, tier: Tier) -> Counts:
        frozen = {n for n, _ in steps.segment.named_parameters()} - steps.parameters.keys()
        tokens = self._length if any("seq" in spec.shape for spec in steps.packed) else 1
        packed = sum(spec.nbytes(batch=tier.batch, seq=self._length) for spec in steps.packed)
        return Counts(
            parameters=sum(t.numel() for t in steps.parameters.values()),
            frozen=sum(steps.constants[n].numel() for n in frozen),
            flops=int(flops_per_row(train(steps), self._length)),
            tokens=tokens,
            activation_bytes=packed / (tier.batch * tokens),
            update_bytes=sum(t.nbytes for t in steps.initial.values()),
        )

    def _write(self, steps: ClientSteps, tier: Tier, depths: tuple[int, ...]) -> _Written:
        """Write the bundle of a cut, unless it was written last: ONNX ones fit every batch."""
        key = (replace(tier, batch=1) if "batch" not in steps.limits else tier), depths
        if self._written is not None and self._written.key == key:
            return self._written
        self._discard()
        folder = TemporaryDirectory(prefix="cutlayer-plan-")
        path = Path(folder.name)
        blobs = BlobStore(path / "blobs")
        manifest = write_tier(
            steps, _NAME, tier, blobs, self.example, lambda line: None, verified=False
        )
        entry = TierEntry(tier.cut, tier.codec, blobs.write(manifest.to_bytes()))
        BundleIndex(path, None, self.classes, self.optimizer, {_NAME: entry}).write()
        self._written = _Written(key, folder, manifest)
        return self._written

    def _discard(self) -> None:
        if self._written is not None:
            self._written.folder.cleanup()
            self._written = None


@dataclass(frozen=True)
class _Written:
    """The bundle that was written last, in a temporary folder.

    Attributes:
        key: export settings and depths of the heads.
        folder: folder of the bundle.
        manifest: manifest of the bundle.
    """

    key: tuple[Tier, tuple[int, ...]]
    folder: TemporaryDirectory[str]
    manifest: Manifest

    @property
    def path(self) -> Path:
        return Path(self.folder.name)


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


def _too_slow(table: TierTable, counts: Counts) -> str | None:
    seconds = epoch_s(table, counts)
    if seconds is None or table.max_epoch_s is None or seconds <= table.max_epoch_s:
        return None
    return f"takes {_up(seconds)} s per epoch, the tier allows {table.max_epoch_s:g}"


def _up(value: float) -> str:
    """A number rounded up to four digits, so that a value above a limit is shown above it."""
    decimals = max(0, 3 - math.floor(math.log10(value)))
    return f"{math.ceil(value * 10**decimals) / 10**decimals:.{decimals}f}"
