"""A round on the device: what it exchanges with the hub while it trains, and its update."""

from __future__ import annotations

import asyncio
from typing import Any

from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import (
    Activations,
    FeatureGradient,
    Features,
    Gradient,
    Round,
    Update,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.data import Source
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import (
    Augment,
    LocalPlan,
    LocalResult,
    NoGradient,
    Outgoing,
    Reply,
    ReplyRequest,
    Training,
    advance,
)
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.replies import BatchReply
from edge_sdk.transport.session import Session

PATIENCE_S = 10.0
"""Seconds that a device waits for a gradient that it can do without."""


class Exchange:
    """The batches of one round.

    Args:
        connection: connection to the hub.
        session: the session that the round came over.
        number: number of the round.
        optional: whether the device can do without gradients. Then it sends nothing while there is
            no link, and after one gradient took longer than :data:`PATIENCE_S` it trains alone for
            the rest of the round.
    """

    def __init__(
        self, connection: Connection, session: Session, number: int, *, optional: bool
    ) -> None:
        self._connection, self._session, self._number = connection, session, number
        self._optional, self._gave_up = optional, False
        self._unsent: set[int] = set()

    async def run(self, training: Training) -> tuple[LocalResult, float]:
        """Drive local training in a thread. What a step yields is sent before the next step.

        Returns:
            The result, and the seconds of computing.

        Raises:
            RoundOver: the hub has begun another round, or the job is over.
            SessionLost: the session has ended, and the round with it.
        """
        now = asyncio.get_running_loop().time
        reply: Reply = None
        computing = 0.0
        while True:
            started = now()
            step = await asyncio.to_thread(advance, training, reply)
            computing += now() - started
            reply = None
            if isinstance(step, LocalResult):
                return step, computing
            if isinstance(step, Outgoing):
                await self.send(step)
            elif isinstance(step, ReplyRequest):
                reply = await self.reply(step)

    async def send(self, outgoing: Outgoing) -> None:
        """Queue a batch or a gradient; waits while the session's window is full.

        Raises:
            SessionLost: the session has ended, and the round with it.
        """
        place: dict[str, Any] = {"round": self._number, "batch": outgoing.number}
        if not isinstance(outgoing.batch, Batch):
            await self._session.send(FeatureGradient(**place, **vars(outgoing.batch)))
        elif self._optional and (self._gave_up or not self._connection.linked):
            self._unsent.add(outgoing.number)
        else:
            await self._session.send(Activations(**place, **vars(outgoing.batch)))

    async def reply(self, request: ReplyRequest) -> Reply:
        """The hub's reply for a batch.

        Raises:
            RoundOver: the hub has begun another round, or the job is over.
            SessionLost: the session has ended, and the round with it.
        """
        replies = self._connection.replies
        kind: type[BatchReply] = Features if request.features else Gradient
        arguments = kind, self._session, self._number, request.number
        if request.number in self._unsent:
            replies.check_round(self._session, self._number)
            return NoGradient()
        if not request.wait or self._gave_up:
            here = replies.take(*arguments)
            return NoGradient() if here is None and self._gave_up else here
        if not self._optional:
            return await replies.wait(*arguments)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await replies.wait(*arguments)
        except TimeoutError:
            self._gave_up = True
            return NoGradient()


async def train_locally(
    connection: Connection,
    session: Session,
    task: Round,
    learner: Learner,
    states: dict[int | None, dict[str, Array]],
    rows: Source,
    augment: Augment | None,
) -> tuple[LocalResult, float]:
    """The local epochs of a round.

    Args:
        connection: connection to the hub.
        session: the session that the round came over.
        task: the round.
        learner: trains.
        states: the state to start from, by base network; of a single model under None.
        rows: the rows to train on.
        augment: changes every batch; None for no augmentation.

    Returns:
        The result, and the seconds of computing, without those of loading graphs.

    Raises:
        DataError: a row cannot be read, or does not fit the model.
        RoundOver: the hub has begun another round, or the job is over.
        SessionLost: the session has ended, and the round with it.
    """
    plan = LocalPlan(
        task.epochs,
        task.batch_size,
        task.hyper,
        task.activations,
        task.seed,
        task.staleness,
        augment,
    )
    if None in states:
        training = learner.training(states[None], rows, plan)
    else:
        bases = {base: state for base, state in states.items() if base is not None}
        training = learner.training_bases(bases, rows, plan)
    optional = plan.activations is ActivationMode.FUSED
    exchange = Exchange(connection, session, task.round, optional=optional)
    loaded = learner.runtime.loading_s
    result, computing = await exchange.run(training)
    return result, computing - (learner.runtime.loading_s - loaded)


async def send_update(session: Session, number: int, result: LocalResult, max_frame: int) -> None:
    """Send what was trained, in as many messages as the frame limit needs.

    Args:
        session: the session that the round came over.
        number: number of the round.
        result: trained tensors and metrics.
        max_frame: bytes of the largest frame that the hub takes.

    Raises:
        SessionLost: the session has ended, and the round with it.
    """
    limit = max_frame - 4096 - 600 * len(result.state)
    part: dict[str, Array] = {}
    size = 0

    async def flush(done: bool) -> None:
        await session.send(
            Update(
                round=number,
                tensors=dict(part),
                done=done,
                samples=result.samples,
                metrics=result.metrics,
            )
        )
        part.clear()

    for name, tensor in result.state.items():
        if part and size + tensor.nbytes > limit:
            await flush(done=False)
            size = 0
        part[name] = tensor
        size += tensor.nbytes
    await flush(done=True)
