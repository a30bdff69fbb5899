"""Devices that have a session at the hub."""

from __future__ import annotations

from dataclasses import dataclass

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
        lost_at: seconds on the loop's clock when the link broke; None while there is a link.
    """

    device: str
    tier: str
    session_id: str
    session: Session
    memory_mb: int | None
    lost_at: float | None = None
