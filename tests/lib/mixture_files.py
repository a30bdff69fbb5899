"""Writes ``tiers.toml`` for exports of the base networks of ``tests.lib.mixture_models``."""

from __future__ import annotations

from pathlib import Path

MODEL = "tests.lib.mixture_models:build_wide"


TIERS = """
classes = 3
input_shape = [6]
{more}
[tiers.small]
{tier}
"""


def tiers_toml(folder: Path, more: str, tier: str = "") -> Path:
    """Write a ``tiers.toml`` for :data:`MODEL` into a folder; returns its path."""
    path = folder / "tiers.toml"
    path.write_text(TIERS.format(more=more, tier=tier))
    return path
