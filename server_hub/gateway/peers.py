"""Devices that have a session at the hub."""

from __future__ import annotations

from dataclasses import dataclass

from edge_sdk.transport.session import Session


@dataclass(eq=False)
class Peer:
    """A device's session at the hub.

    Attributes:
        device: its name.
        tier: its tier.
        session_id: what it resumes with.
        session: the channel and whatever link there is.
        memory_mb: what it can spare for training; None if it does not say.
        lost_at: when the link broke; None while there is one.
    """

    device: str
    tier: str
    session_id: str
    session: Session
    memory_mb: int | None
    lost_at: float | None = None
