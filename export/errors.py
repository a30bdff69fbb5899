"""Errors of the exporter."""

from __future__ import annotations

from edge_sdk.errors import ConfigError


class ExportError(ConfigError):
    """A model cannot be exported exactly. Says which module or tensor, and what to use instead."""
