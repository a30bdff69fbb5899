"""Errors of the exporter."""

from __future__ import annotations

from edge_sdk.errors import ConfigError


class ExportError(ConfigError):
    """A model cannot be exported exactly. Says which module or tensor, and what to use instead."""


def reason(error: BaseException) -> str:
    """The innermost cause, in one line: torch's errors wrap the useful one several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
