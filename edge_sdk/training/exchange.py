"""What goes to and fro while a device trains: activations up, gradients down."""

from __future__ import annotations

import asyncio

from edge_sdk.protocol.messages import (
    Activations,
    FeatureGradient,
    Features,
    Gradient,
    Update,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.learner import Alone, Finished, LocalResult, Packed, Reply, Wanted
from edge_sdk.transport.connection import Connection, Returned
from edge_sdk.transport.session import Session

PATIENCE_S = 10.0
"""How long a device waits for a gradient that it can do without."""


class Exchange:
    """The batches of one round.

    Args:
        connection: to the hub.
        session: the one that the round came over.
        number: of the round.
        optional: whether the device can do without gradients: then it sends nothing while there is
            no link, and once the hub has let it wait for :data:`PATIENCE_S` it goes on alone for
            the rest of the round.
    """

    def __init__(
        self, connection: Connection, session: Session, number: int, *, optional: bool
    ) -> None:
        self._connection, self._session, self._number = connection, session, number
        self._optional, self._gave_up = optional, False
        self._unsent: set[int] = set()

    async def send(self, packed: Packed | Finished) -> None:
        """Send a batch; waits while the outbox has no room, not until it is sent."""
        number, batch, parts = self._number, packed.batch, packed.parts
        if isinstance(packed, Finished):
            await self._session.send(
                FeatureGradient(round=number, batch=batch, parts=parts, labels=packed.labels)
            )
            return
        if self._optional and (self._gave_up or not self._connection.linked):
            self._unsent.add(packed.batch)
            return
        await self._session.send(
            Activations(
                round=number,
                batch=batch,
                parts=parts,
                labels=packed.labels,
                base=packed.base,
                noise=packed.noise,
                present=packed.present,
            )
        )

    async def reply(self, wanted: Wanted) -> Reply:
        """What comes back for a batch; raises as :meth:`Connection.returned` does."""
        kind: type[Returned] = Features if wanted.features else Gradient
        arguments = kind, self._session, self._number, wanted.batch
        if wanted.batch in self._unsent:
            self._connection.check_round(self._session, self._number)
            return Alone()
        if not wanted.wait or self._gave_up:
            here = self._connection.returned_now(*arguments)
            return Alone() if here is None and self._gave_up else here
        if not self._optional:
            return await self._connection.returned(*arguments)
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._connection.returned(*arguments)
        except TimeoutError:
            self._gave_up = True
            return Alone()


async def send_update(session: Session, number: int, result: LocalResult, max_frame: int) -> None:
    """Send what was trained in messages that each stay under the frame limit."""
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
