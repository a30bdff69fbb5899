"""The round log: files of a run, written beside the next round.

The model of a round is written in a thread. A round's record is written when its evaluation is in,
which is at the latest when the evaluation of the round after it is due: what a method reads from
an evaluation may be one round old, and a record's figures are always those of its own round.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

from edge_sdk.errors import CutlayerError
from edge_sdk.files import why
from edge_sdk.inference.metrics import mean_metric
from edge_sdk.protocol.messages import DIVERGED
from server_hub.aggregation.interface import DeviceUpdate
from server_hub.gateway.traffic import Traffic
from server_hub.methods.method import Method
from server_hub.rounds.cut_moves import CutMoves
from server_hub.rounds.model_publisher import ModelPublisher
from server_hub.rounds.rounds import DIVERGED_ROUNDS, Rounds
from server_hub.storage.run_folder import RoundRecord, RunFolder
from server_hub.trunk.batcher import RoundTotals
from server_hub.trunk.interface import EvaluationReport, TrunkCopy

log = logging.getLogger("cutlayer.hub")


class JobFailed(CutlayerError):
    """The job cannot come to its end."""


class RoundLog:
    """Writes what is kept of every round.

    Args:
        run: folder of the run.
        rounds: the rounds.
        method: takes in evaluations.
        publisher: gives the models to save.
        cut_moves: where devices are cut.
        traffic: bytes since the start.
        costs: what a record says of costs, in simulations.
        on_round: called with every record that was written.
        in_order: whether :meth:`add` waits until the record is written.
    """

    def __init__(
        self,
        run: RunFolder,
        rounds: Rounds,
        method: Method,
        publisher: ModelPublisher,
        cut_moves: CutMoves,
        traffic: Traffic,
        costs: Callable[[], dict[str, float]],
        on_round: Callable[[RoundRecord], None] | None,
        in_order: bool,
    ) -> None:
        self._run, self._rounds, self._method = run, rounds, method
        self._publisher, self._cut_moves, self._traffic = publisher, cut_moves, traffic
        self._costs, self._on_round, self._in_order = costs, on_round, in_order
        self.job_began = 0.0
        """Seconds on the loop's clock when the job began."""
        self._round_began = 0.0
        self._diverging = 0  # rounds in a row in which training of the trunk has diverged
        self._saving: asyncio.Task[None] | None = None
        self._evaluating: asyncio.Task[None] | None = None
        self.unwritten: dict[str, str] = {}
        """What could not be written the last time, with the reason."""

    def start_round(self) -> None:
        """A round begins."""
        self._round_began = asyncio.get_running_loop().time()

    def round_seconds(self) -> float:
        """Seconds since the round has begun."""
        return asyncio.get_running_loop().time() - self._round_began

    def tell_losses(self) -> None:
        """Log which members have not delivered in the round that has ended.

        Raises:
            JobFailed: nobody has delivered, or training has diverged on every device, in too many
                rounds in a row.
        """
        rounds = self._rounds
        for device, reason in rounds.dropped.items():
            log.warning("round %d goes on without %s: %s", rounds.number, device, reason)
        if rounds.delivered:
            return
        log.warning("nobody delivered in round %d; it does not count", rounds.number)
        if rounds.diverged:
            raise JobFailed(
                f"training has diverged on every device in {rounds.diverging} rounds in a row; "
                f"lower lr in [local]: {next(iter(rounds.dropped.values()))}"
            )
        if rounds.given_up:
            reasons = sorted(set(rounds.dropped.values()))
            raise JobFailed(
                f"nobody delivered in {rounds.fruitless} rounds in a row: {'; '.join(reasons[:3])}"
            )

    def useful(self, copies: Sequence[TrunkCopy], rate: float) -> list[TrunkCopy]:
        """Log whether training of the trunk has diverged; return the copies that count.

        Args:
            copies: layers that the trunk has trained in the round.
            rate: learning rate of the trunk.

        Raises:
            JobFailed: it has diverged in too many rounds in a row.
        """
        good = [copy for copy in copies if not copy.diverged]
        if len(good) == len(copies):
            if copies:
                self._diverging = 0
            return good
        self._diverging += 1
        found = (
            f"{DIVERGED} on the trunk in round {self._rounds.number} (learning rate {rate:g}); "
            "what it has trained in this round does not count"
        )
        log.warning("%s", found)
        if self._diverging >= DIVERGED_ROUNDS:
            raise JobFailed(
                f"{found}, for the {self._diverging}th time in a row; lower lr in [trunk]"
            )
        return good

    async def save(self) -> None:
        """Begin to write the model; the model of the round before is written first.

        A job goes on without what cannot be written, see :attr:`unwritten`.
        """
        await self._saved()
        models, completed = self._publisher.models(), self._rounds.completed

        def write() -> None:
            with self._tried("the model"):
                for name, state in models.items():
                    self._run.save_model(state, name, completed)

        self._saving = asyncio.create_task(asyncio.to_thread(write))

    async def add(
        self,
        updates: Sequence[DeviceUpdate],
        totals: RoundTotals,
        evaluation: asyncio.Future[EvaluationReport] | None,
    ) -> None:
        """Add a round that counts.

        Args:
            updates: updates that were averaged.
            totals: what the trunk's steps have come to.
            evaluation: evaluation of the model after the round; None if there is none.
        """
        record = self._record(updates, totals)
        await self._evaluated()
        if evaluation is None:
            self._write(record, EvaluationReport())
        elif evaluation.done():
            self._write(record, evaluation.result())
        else:
            self._evaluating = asyncio.create_task(self._write_later(record, evaluation))
        if self._in_order:
            await self._evaluated()

    async def _evaluated(self) -> None:
        """Wait until the record of the last round is written."""
        evaluating, self._evaluating = self._evaluating, None
        if evaluating is not None:
            await evaluating

    def check_written(self) -> None:
        """Raise :class:`JobFailed` if the last model, or the record of a round, is not on disk."""
        if self.unwritten:
            raise JobFailed("; ".join(self.unwritten.values()))

    async def finished(self) -> None:
        """Wait until everything is written."""
        await self._saved()
        await self._evaluated()

    async def cancel(self) -> None:
        """Stop waiting for an evaluation; what is being written is written to its end."""
        if self._evaluating is not None:
            self._evaluating.cancel()
            await asyncio.gather(self._evaluating, return_exceptions=True)
        if self._saving is not None:
            await asyncio.gather(self._saving, return_exceptions=True)

    @contextmanager
    def _tried(self, what: str) -> Iterator[None]:
        """Log why something cannot be written; it is tried again after the next round."""
        try:
            yield
            self.unwritten.pop(what, None)
        except OSError as error:
            self.unwritten[what] = f"{what} cannot be written to {error.filename}: {why(error)}"
            log.error("%s; the job goes on", self.unwritten[what])

    async def _saved(self) -> None:
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def _write_later(
        self, record: RoundRecord, evaluation: asyncio.Future[EvaluationReport]
    ) -> None:
        self._write(record, await evaluation)

    def _write(self, record: RoundRecord, report: EvaluationReport) -> None:
        if self._method.heed(report):
            self._publisher.offer()
        order = list(self._method.aggregation.order)
        record = self._run.add(replace(record, **report.fields() | {"order": order}))
        with self._tried("the record of a round"):
            self._run.write()
        if self._on_round is not None:
            self._on_round(record)

    def _record(self, updates: Sequence[DeviceUpdate], totals: RoundTotals) -> RoundRecord:
        """The record of the present round, without an evaluation."""

        def mean(metric: str) -> float | None:
            known = [u for u in updates if metric in u.metrics]
            return mean_metric((u.metrics[metric], u.samples) for u in known)

        return RoundRecord(
            round=self._rounds.completed,
            clock=asyncio.get_running_loop().time() - self.job_began,
            seconds=self.round_seconds(),
            devices=len(updates),
            dropped=dict(self._rounds.dropped),
            local_loss=mean("loss"),
            local_accuracy=mean("accuracy"),
            trunk_loss=totals.mean_loss,
            trunk_steps=totals.steps,
            accuracy={},
            bytes=self._traffic.by_kind(),
            costs=self._costs(),
            cuts=dict(self._cut_moves.cuts),
            moves=[asdict(move) for move in self._cut_moves.planned],
        )
