"""Devices that have a session at the hub."""

from __future__ import annotations

from dataclasses import dataclass, field

from edge_sdk.protocol.states import ConnectionState
from edge_sdk.transport.flow import TokenBucket
from edge_sdk.transport.session import Session
from server_hub.gateway.admission import Identity
from server_hub.gateway.releases import Offered


@dataclass(eq=False)
class Peer:
    """A device's session at the hub.

    Attributes:
        device: name of the device.
        tier: tier of the device.
        session_id: what the device resumes the session with.
        session: the channel, and the link if there is one.
        memory_mb: memory that the device can spare for training, in MB; None if it does not say.
        download_only: whether the device's token only downloads.
        release: the release that the device gets; None if it gets the bundle of the job.
        state: whether the session has a link, has lost it and may be resumed, or has ended.
        lost_at: seconds on the loop's clock when the link broke; None while there is a link.
        notes: budget of messages that are kept in the log or the database.
    """

    device: str
    tier: str
    session_id: str
    session: Session
    memory_mb: int | None
    download_only: bool
    release: Offered | None
    state: ConnectionState = ConnectionState.WAITING
    lost_at: float | None = None
    notes: TokenBucket = field(default_factory=lambda: TokenBucket(rate=1 / 60, burst=10))

    def is_like(self, found: Identity) -> bool:
        """Return whether a later ``hello`` may resume the session."""
        return (self.tier, self.download_only) == (found.tier, found.download_only)
