"""What devices say enters the log without doing harm there."""

from __future__ import annotations

import io
import logging
import secrets
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_hub.logs import LENGTH, plain, protect


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger(f"test-{secrets.token_hex(4)}")
    found.propagate = False
    found.setLevel(logging.INFO)
    yield found
    found.handlers.clear()


def written(logger: logging.Logger) -> io.StringIO:
    """Give a logger a stream, and return it."""
    stream = io.StringIO()
    logger.addHandler(logging.StreamHandler(stream))
    return stream


@given(st.text())
def test_a_text_is_one_printable_line(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    assert len(shown) <= LENGTH + 4


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"], max_codepoint=0x24F), max_size=30))
def test_a_harmless_text_stays_as_it_is(text: str) -> None:
    assert plain(text) == "".join(c if c.isprintable() else plain(c) for c in text)


@pytest.mark.parametrize("around", ["{}", "token {}.", "there is no tier '{}'", "x={}\n"])
def test_a_token_is_hidden(around: str) -> None:
    token, session = secrets.token_hex(32), secrets.token_hex(16)
    for secret in (token, session, token.upper()):
        assert secret not in plain(around.format(secret))
        assert "[hidden]" in plain(around.format(secret))


def test_lines_are_not_forged_and_sequences_of_the_terminal_are_not_passed_on(
    logger: logging.Logger,
) -> None:
    stream = written(logger)
    protect(logger)
    protect(logger)
    logger.warning("%s reports: %s", "phone", "x\n2026-01-01 INFO all is well\x1b[2J\r\u2028y")
    assert stream.getvalue() == (
        "phone reports: x\\n2026-01-01 INFO all is well\\x1b[2J\\r\\u2028y\n"
    )


def test_a_flood_of_lines_of_one_kind_is_counted_and_others_are_written(
    logger: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    stream = written(logger)
    protect(logger)
    for number in range(1000):
        logger.warning("refused a connection from %s", number)
    logger.warning("the disk is full")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 51
    assert lines[-1] == "the disk is full"
    now += 60.0
    logger.warning("refused a connection from %s", 1000)
    logger.warning("refused a connection from %s", 1001)
    assert stream.getvalue().splitlines()[51:] == [
        "refused a connection from 1000 (and 950 more lines like this)",
        "refused a connection from 1001",
    ]


def test_a_trace_stays_whole(logger: logging.Logger) -> None:
    stream = written(logger)
    protect(logger)
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("cannot handle %s", "infer")
    assert "ValueError: why" in stream.getvalue()
