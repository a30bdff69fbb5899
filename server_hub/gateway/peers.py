"""Devices that have a session at the hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_sdk.protocol.states import ConnectionState
from edge_sdk.transport.flow import TokenBucket
from edge_sdk.transport.session import Session


@dataclass(eq=False)
class Peer:
    """A device's session at the hub.

    Attributes:
        device: name of the device.
        tier: tier of the device.
        session_id: what the device resumes the session with.
        session: the channel, and the link if there is one.
        memory_mb: memory that the device can spare for training, in MB; None if it does not say.
        state: whether the session has a link, has lost it and may be resumed, or has ended.
        lost_at: seconds on the loop's clock when the link broke; None while there is a link.
        errors: budget of ``error`` messages that the device may send.
    """

    device: str
    tier: str
    session_id: str
    session: Session
    memory_mb: int | None
    state: ConnectionState = ConnectionState.WAITING
    lost_at: float | None = None
    errors: TokenBucket = field(default_factory=lambda: TokenBucket(rate=1 / 60, burst=10))
