"""A device's part in a job: rounds, moves and evaluations, until the hub says stop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace

from edge_sdk.errors import BundleError, DataError, Diverged, HubError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.evaluation import Evaluate
from edge_sdk.protocol.message import RECOUNT
from edge_sdk.protocol.messages import DIVERGED, Decline, Move, Ready, Round, Stop
from edge_sdk.training.conditions import MayTrain
from edge_sdk.training.exchange import send_update, train_locally
from edge_sdk.training.loader import BundleLoader
from edge_sdk.training.local_data import LocalData
from edge_sdk.training.plan import Augment
from edge_sdk.training.report import RoundReport, TrainReport
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.download import Downloader
from edge_sdk.transport.replies import RoundOver
from edge_sdk.transport.session import Session, SessionLost

log = logging.getLogger("cutlayer.device")


class Participation:
    """Takes part in the rounds of a job.

    Args:
        connection: connection to the hub.
        downloader: fetches states.
        loader: holds the learner and the local rows, of which there must be some.
        offer_bases: called with the final base networks, best first: sha256 by number.
        answer: answers a request to evaluate.
        may_train: asked before each round whether the device may train now; None for always.
        augment: changes the rows of every batch before a training step.

    Attributes:
        under_way: whether the device takes part now.
    """

    def __init__(
        self,
        connection: Connection,
        downloader: Downloader,
        loader: BundleLoader,
        offer_bases: Callable[[Mapping[str, str]], object],
        answer: Callable[[Session, Evaluate], Awaitable[None]],
        may_train: MayTrain | None,
        augment: Augment | None,
    ) -> None:
        self._connection, self._downloader, self._loader = connection, downloader, loader
        self._offer_bases, self._answer = offer_bases, answer
        self._may_train, self._augment = may_train, augment
        self._announced = 0  # number of rows that the hub knows of
        self.under_way = False

    async def train(self, on_round: Callable[[RoundReport], None] | None) -> TrainReport:
        """See :meth:`edge_sdk.device.Device.train`."""
        self.under_way = True
        try:
            return await self._train(on_round)
        finally:
            self.under_way = False

    async def _train(self, on_round: Callable[[RoundReport], None] | None) -> TrainReport:
        report = TrainReport()
        joined = False
        while True:
            try:
                if not joined:
                    await self._loader.load_welcomed()
                    await self._connection.send(await self._ready())
                    joined = True
                session, delivery = await self._connection.next_work()
                if isinstance(delivery.message, Stop):
                    report.reason = delivery.message.reason
                    if delivery.message.state is not None:
                        await self._loader.load_state(delivery.message.state)
                    if delivery.message.bases is not None:
                        self._offer_bases(delivery.message.bases)
                    session.settle(delivery.seq)
                    return report
                if isinstance(delivery.message, Move):
                    session.settle(delivery.seq)
                    await self._move(session, delivery.message)
                    continue
                if isinstance(delivery.message, Evaluate):
                    session.settle(delivery.seq)
                    await self._answer(session, delivery.message)
                    continue
                assert isinstance(delivery.message, Round)
                # now, not at the end: gradients that come meanwhile are acknowledged after it
                session.settle(delivery.seq)
                done = await self._take_part(session, delivery.message)
                if done is not None:
                    report.rounds.append(done)
                    if on_round is not None:
                        on_round(done)
            except SessionLost:
                self._connection.raise_failure()
                joined = False  # the hub forgot us: join again, in a new session

    async def _ready(self) -> Ready:
        self._announced = max(await asyncio.to_thread(self._data().join), 1)
        return Ready(samples=self._announced, tier=self._loader.learner.manifest.tier)

    async def _move(self, session: Session, move: Move) -> None:
        """Go on with another bundle, or with the present one if the other cannot be loaded.

        Only blobs that the cache lacks are fetched: layers that both bundles have are the same
        blobs.
        """
        try:
            learner = await self._loader.load(move.manifest, move.tier)
            session.check()  # in a new session the hub knows the device by its old tier
            self._loader.use(learner, move.manifest)
            self._connection.tier = move.tier
        except (BundleError, DataError, HubError, OSError) as error:
            log.warning("cannot move to %s (%s): %s", move.tier, move.reason, error)
        await session.send(await self._ready())

    async def _take_part(self, session: Session, task: Round) -> RoundReport | None:
        """Train in one round and send the update.

        Everything goes over the session that the round came from: if the hub restarts meanwhile,
        :class:`SessionLost` ends the round.

        Returns:
            The report; None if the round was declined, training has diverged, or the round was
            over before the device was done.
        """
        reason = self._may_train(task.round) if self._may_train is not None else None
        recount = RECOUNT in session.extensions
        rows = await asyncio.to_thread(self._data().begin, task.round, task.seed, recount)
        if reason is None and len(rows) == 0:
            reason = "there are no rows to train on"
        if reason is not None:
            await session.send(Decline(round=task.round, reason=reason))
            return None
        if len(rows) != self._announced:
            self._announced = len(rows)
            await session.send(Ready(samples=len(rows), from_round=task.round))
        now = asyncio.get_running_loop().time
        started = now()
        try:
            states = await self._downloader.start_of(
                task, self._loader.learner.manifest.state_bytes
            )
        except HubError as error:
            if error.code != ErrorCode.UNKNOWN_BLOB:
                raise
            return None  # the round ended during the download
        try:
            result, compute_s = await train_locally(
                self._connection, session, task, self._loader.learner, states, rows, self._augment
            )
        except RoundOver:
            return None  # too slow: the hub went on without this device
        except Diverged as error:
            rate = f" (learning rate {task.hyper['lr']:g})" if "lr" in task.hyper else ""
            reason = f"{DIVERGED} in round {task.round}{rate}: {error}"
            log.warning("%s; the device keeps the state that the round began with", reason)
            await session.send(Decline(round=task.round, reason=reason))
            return None
        times = {"compute_s": compute_s, "wait_s": now() - started - compute_s}
        result = replace(result, metrics=result.metrics | times)
        await send_update(session, task.round, result, self._connection.welcome.max_frame)
        loss, accuracy = (result.metrics.get(name) for name in ("loss", "accuracy"))
        return RoundReport(task.round, loss, accuracy, now() - started, len(rows))

    def _data(self) -> LocalData:
        assert self._loader.data is not None
        return self._loader.data
