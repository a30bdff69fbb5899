"""States of connections and sessions: the tables in the specification match the code."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_sdk.protocol.messages import (
    MESSAGES,
    Ack,
    Activations,
    Answer,
    Bye,
    Decline,
    Error,
    Gradient,
    Message,
    Move,
    Ready,
    Round,
    Stop,
    Update,
)
from edge_sdk.protocol.states import (
    CONNECTION_TRANSITIONS,
    FROM_DEVICE,
    FROM_HUB,
    SESSION_TRANSITIONS,
    ConnectionEvent,
    ConnectionState,
    SessionState,
    SessionTracker,
    next_connection_state,
)
from tests.lib.specification import rows, section

HASH = "0" * 64


def a_round(number: int) -> Round:
    """Return a round for devices that train alone."""
    return Round(number, HASH, 1, 8, {}, "none", 0)  # type: ignore[arg-type]


def update(number: int, *, done: bool = True) -> Update:
    """Return an update without tensors."""
    return Update(round=number, tensors={}, done=done, samples=1, metrics={})


# --- the specification --------------------------------------------------------------------------


def test_the_connection_s_table_is_the_specified_one() -> None:
    table = {
        (ConnectionState(state), ConnectionEvent(event)): ConnectionState(following)
        for state, event, following in (
            [cell.strip("`") for cell in row[:3]] for row in rows(section("States of a connection"))
        )
    }
    assert table == CONNECTION_TRANSITIONS


def transitions(cell: str, state: SessionState) -> dict[str, SessionState]:
    """Return the messages in a table cell, each with the state that it leads to."""
    if cell == "–":
        return {}
    found = {}
    for entry in cell.split(", "):
        match = re.fullmatch(r"`(\w+)`(?: → `(\w+)`)?", entry)
        assert match is not None, entry
        assert match[1] not in found, entry
        found[match[1]] = state if match[2] is None else SessionState(match[2])
    return found


def test_the_session_s_table_is_the_specified_one() -> None:
    """The messages allowed in a state, in each direction, and their next states match the table."""
    seen = []
    for name, meaning, from_device, from_hub in rows(section("States of a session")):
        state = SessionState(name.strip("`"))
        seen.append(state)
        assert meaning
        ended = state is SessionState.ENDED
        both = {} if ended else dict.fromkeys(("ack", "error", "piece"), state)
        for cell, direction in ((from_device, FROM_DEVICE), (from_hub, FROM_HUB)):
            code = SESSION_TRANSITIONS[state]
            own = {kind: following for kind, following in code.items() if kind in direction}
            assert transitions(cell, state) | both == own, (state, cell)
    assert seen == list(SessionState) == list(SESSION_TRANSITIONS)


def test_the_directions_are_the_specified_ones() -> None:
    table: dict[str, set[str]] = {"device → hub": set(), "hub → device": set(), "both": set()}
    for name, direction, *_ in rows(section("Messages")):
        table[direction].add(re.findall(r"`(.+?)`", name)[0])
    handshake = {"hello", "welcome"}
    assert table["device → hub"] | table["both"] == FROM_DEVICE | {"hello"}
    assert table["hub → device"] | table["both"] == FROM_HUB | {"welcome"}
    assert FROM_DEVICE | FROM_HUB | handshake == MESSAGES.keys()


def test_every_message_has_a_place_and_every_state_can_be_left() -> None:
    placed = {kind for messages in SESSION_TRANSITIONS.values() for kind in messages}
    assert placed == FROM_DEVICE | FROM_HUB
    for state, messages in SESSION_TRANSITIONS.items():
        ended = state is SessionState.ENDED
        assert (SessionState.ENDED in messages.values()) == (not ended)


# --- sequences of messages ----------------------------------------------------------------------


def test_a_job_from_beginning_to_end() -> None:
    """In two rounds, a move and a stop, replies and answers in between do not change the state."""
    tracker = SessionTracker()
    answer = Answer(request=1, heads=["head"], logits=np.zeros((1, 1, 2), np.float32))
    story: list[tuple[Message, SessionState]] = [
        (answer, SessionState.JOINED),
        (Ready(samples=3), SessionState.READY),
        (a_round(1), SessionState.TRAINING),
        (Activations(round=1, batch=0, parts={}), SessionState.TRAINING),
        (Gradient(round=1, batch=0, parts={}), SessionState.TRAINING),
        (Ack(), SessionState.TRAINING),
        (update(1, done=False), SessionState.TRAINING),
        (update(1), SessionState.READY),
        (Gradient(round=1, batch=1, parts={}), SessionState.READY),
        (a_round(2), SessionState.TRAINING),
        (Decline(round=2, reason="the battery is low"), SessionState.READY),
        (Move(tier="t", manifest=HASH, reason="r"), SessionState.MOVING),
        (Ready(samples=3, tier="t"), SessionState.READY),
        (Stop(reason="done"), SessionState.STOPPED),
        (answer, SessionState.STOPPED),
        (Bye(reason="done"), SessionState.ENDED),
    ]
    for message, state in story:
        assert tracker.follow(message), message
        assert tracker.state is state, message


def test_a_late_update_does_not_end_the_next_round() -> None:
    """A late message of the previous round does not change the state of the next one."""
    tracker = SessionTracker()
    for message in (Ready(samples=1), a_round(1), a_round(2), update(1), Decline(1, "late")):
        assert tracker.follow(message)
    assert tracker.state is SessionState.TRAINING
    assert tracker.follow(update(2))
    assert tracker.state is SessionState.READY


@pytest.mark.parametrize("fatal", [False, True])
def test_only_a_fatal_error_ends_a_session(fatal: bool) -> None:
    tracker = SessionTracker()
    assert tracker.follow(Error(code="unknown_blob", message="m", fatal=fatal))
    assert tracker.state is (SessionState.ENDED if fatal else SessionState.JOINED)


MET: list[Any] = [
    Ready(samples=1), a_round(1), a_round(2), update(1), update(2), Decline(round=1, reason=""),
    Move(tier="t", manifest=HASH, reason=""), Stop(reason=""), Bye(reason=""), Ack(),
    Error(code="bad_frame", message="", fatal=True), Activations(round=1, batch=0, parts={}),
]  # fmt: skip


@given(st.lists(st.sampled_from(MET)))
def test_a_message_without_a_place_changes_nothing(messages: list[Message]) -> None:
    """No message raises an error, and an ended session stays ended."""
    tracker = SessionTracker()
    for message in messages:
        before = tracker.state
        placed = message.TYPE in SESSION_TRANSITIONS[before]
        assert tracker.follow(message) == placed
        if not placed:
            assert tracker.state is before
        if before is SessionState.ENDED:
            assert tracker.state is SessionState.ENDED


@given(st.sampled_from(ConnectionState), st.sampled_from(ConnectionEvent))
def test_events_that_are_not_listed_change_nothing(
    state: ConnectionState, event: ConnectionEvent
) -> None:
    following = next_connection_state(state, event)
    assert following is CONNECTION_TRANSITIONS.get((state, event), state)
    assert state is not ConnectionState.ENDED or following is ConnectionState.ENDED
