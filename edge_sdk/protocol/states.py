"""States of a device's connection and session, without I/O; both ends follow the same tables.

A *session* is the conversation of a device and a hub: its state says what the device is doing, and
messages change it. A *connection* carries the session for a while; a session outlives it. The
tables here are those of ``docs/protocol.md``.

The tables describe, they do not refuse: a message that has no place in a state leaves the state as
it is, and a receiver settles and ignores it. The two ends may differ for a moment, while a message
is on its way.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Final

from edge_sdk.protocol.messages import Decline, Error, Message, Round, Update


class ConnectionState(enum.StrEnum):
    """What a device has of a way to its hub."""

    DISCONNECTED = "disconnected"
    """There is no connection."""
    WAITING = "waiting"
    """``hello`` is sent; ``welcome`` is not here yet."""
    LINKED = "linked"
    """The session goes over the connection."""
    ENDED = "ended"
    """The device left, or one side sent a fatal error. There is no way back."""


class ConnectionEvent(enum.StrEnum):
    """What changes the state of a connection."""

    HELLO = "hello"
    """A connection was opened and ``hello`` sent."""
    WELCOME = "welcome"
    """``welcome`` was received; with ``resumed``, unacknowledged messages are sent again."""
    LOST = "lost"
    """The connection broke, no answer to ``hello`` came in time, ``sequence_gap``, or a temporary
    error was received."""
    BYE = "bye"
    """The device said ``bye`` and closes the connection."""
    FATAL = "fatal"
    """A fatal ``error`` that is not temporary was received, or one was sent, or the device gave up
    connecting."""


CONNECTION_TRANSITIONS: Final[Mapping[tuple[ConnectionState, ConnectionEvent], ConnectionState]] = {
    (ConnectionState.DISCONNECTED, ConnectionEvent.HELLO): ConnectionState.WAITING,
    (ConnectionState.DISCONNECTED, ConnectionEvent.BYE): ConnectionState.ENDED,
    (ConnectionState.DISCONNECTED, ConnectionEvent.FATAL): ConnectionState.ENDED,
    (ConnectionState.WAITING, ConnectionEvent.WELCOME): ConnectionState.LINKED,
    (ConnectionState.WAITING, ConnectionEvent.LOST): ConnectionState.DISCONNECTED,
    (ConnectionState.WAITING, ConnectionEvent.BYE): ConnectionState.ENDED,
    (ConnectionState.WAITING, ConnectionEvent.FATAL): ConnectionState.ENDED,
    (ConnectionState.LINKED, ConnectionEvent.LOST): ConnectionState.DISCONNECTED,
    (ConnectionState.LINKED, ConnectionEvent.BYE): ConnectionState.ENDED,
    (ConnectionState.LINKED, ConnectionEvent.FATAL): ConnectionState.ENDED,
}
"""The next state of a connection, by state and event. What is not listed changes nothing."""


class SessionState(enum.StrEnum):
    """What a device does in its session."""

    JOINED = "joined"
    """The hub has welcomed the device. It loads its bundle, or only predicts."""
    READY = "ready"
    """The device can be picked for a round."""
    TRAINING = "training"
    """The device takes part in a round."""
    MOVING = "moving"
    """The device loads the bundle of another tier."""
    STOPPED = "stopped"
    """The job is over. The device may fetch the final state and ask for answers."""
    ENDED = "ended"
    """The device said ``bye``, one side sent a fatal error, or the hub gave the session up."""


FROM_DEVICE: Final = frozenset(
    {
        "ack", "activations", "blob_get", "bye", "decline", "error", "evaluated",
        "feature_gradient", "infer", "piece", "ready", "running", "update",
    }
)  # fmt: skip
"""Types of the messages that a device sends in a session."""

FROM_HUB: Final = frozenset(
    {
        "ack", "answer", "blob", "error", "evaluate", "features", "gradient", "move", "piece",
        "round", "stop",
    }
)  # fmt: skip
"""Types of the messages that a hub sends in a session."""


def _in_any(state: SessionState) -> dict[str, SessionState]:
    """What has a place in every state but ``ended``."""
    kinds = ("ack", "answer", "blob", "blob_get", "error", "infer", "piece", "running")
    stay = dict.fromkeys(kinds, state)
    return {**stay, "bye": SessionState.ENDED, "stop": SessionState.STOPPED}


SESSION_TRANSITIONS: Final[Mapping[SessionState, Mapping[str, SessionState]]] = {
    SessionState.JOINED: {
        **_in_any(SessionState.JOINED),
        "ready": SessionState.READY,
    },
    SessionState.READY: {
        **_in_any(SessionState.READY),
        "round": SessionState.TRAINING,
        "move": SessionState.MOVING,
        "evaluate": SessionState.READY,
        "evaluated": SessionState.READY,
        # late, for a batch that the device went on without
        "features": SessionState.READY,
        "gradient": SessionState.READY,
    },
    SessionState.TRAINING: {
        **_in_any(SessionState.TRAINING),
        # the number of examples has changed
        "ready": SessionState.TRAINING,
        "activations": SessionState.TRAINING,
        "features": SessionState.TRAINING,
        "feature_gradient": SessionState.TRAINING,
        "gradient": SessionState.TRAINING,
        "update": SessionState.READY,
        "decline": SessionState.READY,
        # before the device begins the round, or late
        "evaluate": SessionState.TRAINING,
        "evaluated": SessionState.TRAINING,
        # the hub did not wait: the round before is over
        "round": SessionState.TRAINING,
        "move": SessionState.MOVING,
    },
    SessionState.MOVING: {
        **_in_any(SessionState.MOVING),
        "evaluated": SessionState.MOVING,
        "ready": SessionState.READY,
    },
    SessionState.STOPPED: {
        **_in_any(SessionState.STOPPED),
        "evaluated": SessionState.STOPPED,
        "ready": SessionState.READY,
    },
    SessionState.ENDED: {},
}
"""The messages that have a place in a state, by type, and the state that each leads to.

Three of them lead to their state only in part: see :meth:`SessionTracker.follow`.
"""


class SessionTracker:
    """The state of one session, as one end sees it from the messages that it sends and receives.

    Attributes:
        state: the present state; ``joined`` at first, since ``welcome`` begins a session.
        round: number of the last round that the device was picked for; 0 before the first.
    """

    def __init__(self) -> None:
        self.state = SessionState.JOINED
        self.round = 0

    def follow(self, message: Message) -> bool:
        """Take note of a message that was sent, or received for the first time.

        A fatal ``error`` ends the session, another one changes nothing. ``update`` ends the
        device's part in a round only with ``done``, and like ``decline`` only if it is of the last
        round that the device was picked for.

        Returns:
            Whether the message has a place in the state that it was met in. One that has none
            leaves the state as it is.
        """
        following = SESSION_TRANSITIONS[self.state].get(message.TYPE)
        if following is None:
            return False
        if isinstance(message, Error):
            following = SessionState.ENDED if message.fatal else self.state
        elif isinstance(message, Round):
            self.round = message.round
        elif isinstance(message, Update | Decline):
            over = message.round == self.round and (isinstance(message, Decline) or message.done)
            following = following if over else self.state
        self.state = following
        return True

    def end(self) -> None:
        """The session is given up: nothing more is sent or received in it."""
        self.state = SessionState.ENDED


def next_connection_state(state: ConnectionState, event: ConnectionEvent) -> ConnectionState:
    """The state of a connection after an event; the same one if the event changes nothing."""
    return CONNECTION_TRANSITIONS.get((state, event), state)
