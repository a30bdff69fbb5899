"""Finds the deepest cut that each tier can carry."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType

from torch import Tensor

from export.bases.exported import without_trunk
from export.bundles.tier_table import TiersConfig
from export.bundles.writer import Tier
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.planning.cost import Cost, Failure, too_slow, up
from export.planning.measuring import CutMeasurer
from export.planning.plan import Choice, Plan

Report = Callable[[str, float | None], None]
"""Reports progress: a text, and the completed fraction (0 to 1) if it is known."""


def _silent(text: str, done: float | None) -> None:
    pass


class Planner:
    """Measures cuts of a model, and finds the cuts of tiers; a context manager.

    It measures the bundles that ``cutlayer export`` writes with the same settings, and does not
    change the model.

    Args:
        settings: content of ``tiers.toml``.
        model: model to measure; with ``bases`` the wide model.
        example: inputs (batch, ...) like those on the devices.
        classes: number of classes; for tokens the size of the vocabulary.
        report: receives the progress.

    Raises:
        ExportError: the model's head has another number of classes, or the model cannot be split
            into bases.
    """

    def __init__(
        self,
        settings: TiersConfig,
        model: SplitModel,
        example: Tensor,
        classes: int,
        report: Report = _silent,
    ) -> None:
        self.settings, self.report = settings, report
        self._settled = settings.settled(model.depth)
        self._whole: int | None = None
        """The cut of whole bases."""
        if settings.bases:
            self._whole = model.depth
            model = without_trunk(settings.split_bases(model, example).model)
        self._model = model
        self._measurer = CutMeasurer(model, example, classes, settings.optimizer, settings.decay)
        self._known: dict[tuple[Tier, tuple[int, ...]], Cost | Failure] = {}
        self._done: float | None = None

    def __enter__(self) -> Planner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._measurer.close()

    def plan(self, cuts: Iterable[int] | None = None) -> Plan:
        """Measure the cuts and find the deepest cut that each tier can carry.

        Args:
            cuts: cuts to measure; None for all.

        Raises:
            ExportError: a cut is outside the model.
        """
        cuts = self._cuts(cuts)
        names = self.settings.tiers
        variants = list(dict.fromkeys(self.settings.at(name, 1) for name in names))
        wanted = [replace(variant, cut=cut) for cut in cuts for variant in variants]
        costs = []
        for number, tier in enumerate(wanted):
            # the time that a cut takes grows with it
            self._done = sum(t.cut for t in wanted[:number]) / sum(t.cut for t in wanted)
            costs.append(self.cost(tier, []))
        self._done = None
        settled = self._settle(cuts)
        heads = {cut for cut, _ in settled.values() if cut is not None}
        choices = {name: self._judge(name, *settled[name], heads) for name in names}
        return Plan(tuple(costs), self.settings, choices)

    def choose(self) -> dict[str, int]:
        """The cut of every tier: the given one, or the deepest that it can carry.

        Only the cuts that this depends on are measured.

        Raises:
            ExportError: a tier can carry no cut, or a cut is outside the model.
        """
        settled = self._settle(self._cuts(None))
        heads = {cut for cut, _ in settled.values() if cut is not None}
        chosen = {}
        for name, (cut, reason) in settled.items():
            if cut is None:
                raise ExportError(f"tier {name!r} can carry no cut: {reason}")
            if name not in self._settled:
                problem = self._shortfall(name, cut, heads)
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
            read = ", ".join(map(str, depths))
            line = f"cut {tier.cut}, heads at {read}, {tier.runtime}, batch {tier.batch}"
            self.report(line, self._done)
            self._known[tier, depths] = self._measurer.measure(tier, depths)
        return self._known[tier, depths]

    def _depths(self, cut: int, heads: Iterable[int]) -> tuple[int, ...]:
        if cut == self._whole:  # whole bases have no other heads
            return (cut,)
        return tuple(sorted({d for d in {*heads, *self._model.head_depths} if d < cut} | {cut}))

    def _cuts(self, cuts: Iterable[int] | None) -> list[int]:
        """The cuts to measure, shallowest first; checks that all given cuts are in the model."""
        wanted = sorted(set(range(1, self._model.depth) if cuts is None else cuts))
        for cut in wanted:
            self._model.check_cut(cut)
        for name, cut in self._settled.items():
            try:
                self._model.check_cut(cut)
            except ExportError as error:
                raise ExportError(f"tier {name!r}: {error}") from error
        return wanted

    def _settle(self, cuts: Sequence[int]) -> dict[str, tuple[int | None, str]]:
        """The cut of every tier, with the reason why it is not deeper.

        A device also trains the heads at the shallower cuts of other tiers. So the shallowest cut
        is settled first: its head adds to the cost of all other tiers, and no other head adds to
        its own.
        """
        tiers = self.settings.tiers
        settled: dict[str, tuple[int | None, str]] = {
            name: (cut, "set in tiers.toml" if tiers[name].cut else "without cut, so whole bases")
            for name, cut in self._settled.items()
        }
        while len(settled) < len(tiers):
            heads = {cut for cut, _ in settled.values() if cut is not None}
            open_ones = {n: self._deepest(n, cuts, heads) for n in tiers if n not in settled}
            name = min(open_ones, key=lambda n: open_ones[n][0] or 0)
            settled[name] = open_ones[name]
        return {name: settled[name] for name in tiers}

    def _deepest(
        self, name: str, cuts: Sequence[int], heads: Iterable[int]
    ) -> tuple[int | None, str]:
        """The deepest cut that a tier can carry, and the reason why it is not deeper."""
        reason = "the deepest cut there is"
        if cuts[-1] < self._model.depth - 1:
            reason = "the deepest cut that was asked about"
        for cut in reversed(cuts):
            problem = self._shortfall(name, cut, heads)
            if problem is None:
                return cut, reason
            reason = f"cut {cut} {problem}"
        return None, reason

    def _judge(self, name: str, cut: int | None, reason: str, heads: Iterable[int]) -> Choice:
        """Judge whether a settled cut, with all settled heads, is within the tier's limits."""
        table = self.settings.tiers[name]
        given = table.cut is not None
        if cut is None:
            return Choice(None, given, False, f"can carry no cut: {reason}", None)
        cost = self.cost(self.settings.at(name, cut), heads)
        problem = self._shortfall(name, cut, heads)
        if problem is not None:
            return Choice(cut, given, False, f"over its limits: cut {cut} {problem}", cost)
        limited = table.memory_mb is not None or table.max_epoch_s is not None
        within = ", within its limits" if name in self._settled and limited else ""
        return Choice(cut, given, True, reason + within, cost)

    def _shortfall(self, name: str, cut: int, heads: Iterable[int]) -> str | None:
        """The limit of a tier that a cut exceeds, in words; None if the tier can carry the cut."""
        table, tier = self.settings.tiers[name], self.settings.at(name, cut)
        depths = self._depths(cut, heads)
        if (tier, depths) not in self._known and table.max_epoch_s is not None:
            # the time of an epoch is known before the cut is lowered and run
            with suppress(ExportError):
                problem = too_slow(table, self._measurer.count(tier, depths))
                if problem is not None:
                    return problem
        cost = self.cost(tier, heads)
        if isinstance(cost, Failure):
            return f"cannot be exported: {cost.error}"
        memory = cost.measured.memory_bytes
        if table.memory_mb is not None and memory > table.memory_mb * 1e6:
            return f"needs {up(memory / 1e6)} MB, the tier has {table.memory_mb:g}"
        return too_slow(table, cost.counts)
