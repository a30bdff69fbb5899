"""Errors of the exporter."""

from __future__ import annotations

from edge_sdk.errors import ConfigError


class ExportError(ConfigError):
    """A model cannot be exported exactly. The message names the module or tensor, and a remedy."""


def reason(error: BaseException) -> str:
    """First line of the innermost cause, since torch wraps the useful error several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
