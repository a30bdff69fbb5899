"""What may enter the hub's log.

Texts of devices are part of log lines: reasons, names of fields, errors. They must neither forge
lines nor fill the disk, and a secret that a device sends in the wrong place must not be kept.
"""

from __future__ import annotations

import logging
import re
import time

from edge_sdk.transport.flow import TokenBucket

LENGTH = 1000
"""Largest number of characters in a line."""

_SECRET = re.compile(r"[0-9a-fA-F]{32,}")
"""Tokens and session ids look like this, and so do hashes."""

_LINES_PER_S, _BURST = 5.0, 50.0
"""Lines of one kind that are written; the others are counted."""


def plain(text: str) -> str:
    """Return a text that is safe in a line of a log.

    Control characters, line breaks among them, are written as escapes. What looks like a token is
    replaced. A text above :data:`LENGTH` characters is cut.
    """
    text = _SECRET.sub("[hidden]", text[: 4 * LENGTH])
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= LENGTH else f"{shown[:LENGTH]} ..."


class PlainLines(logging.Filter):
    """Makes every line of a logger :func:`plain`, and bounds the lines of each kind.

    Lines are of one kind if they have the same level and the same text before their arguments are
    put in. Of a kind that comes too often, the next line that is written says how many were not.
    """

    def __init__(self) -> None:
        super().__init__()
        self._budgets: dict[tuple[int, str], TokenBucket] = {}
        self._left_out: dict[tuple[int, str], int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite a record; False if it is not to be written."""
        kind = record.levelno, str(record.msg)
        budget = self._budgets.setdefault(kind, TokenBucket(_LINES_PER_S, _BURST))
        if not budget.try_take(time.monotonic()):
            self._left_out[kind] = self._left_out.get(kind, 0) + 1
            return False
        left_out = self._left_out.pop(kind, 0)
        more = f" (and {left_out} more lines like this)" if left_out else ""
        record.msg, record.args = plain(record.getMessage()) + more, None
        return True


def protect(logger: logging.Logger) -> None:
    """Let nothing but plain lines into a logger. Twice is as good."""
    if not any(isinstance(found, PlainLines) for found in logger.filters):
        logger.addFilter(PlainLines())
