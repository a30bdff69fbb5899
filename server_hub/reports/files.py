"""The files of a report: pictures, pages and rows of JSON, each written whole or not at all."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_sdk.bundle.store import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    write_atomically(path.absolute(), picture.getvalue())


def tidy(axis: Any, grid: str = "both") -> None:
    """Give an axis a pale grid (``x``, ``y`` or ``both``) and no frame above and to the right."""
    axis.grid(axis=grid, alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def write_page(path: Path, parts: Sequence[str]) -> None:
    """Write Markdown: parts with an empty line between them."""
    write_atomically(path.absolute(), ("\n\n".join(parts) + "\n").encode())


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as a JSON list, a row on each line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    write_atomically(path.absolute(), f"[\n{lines}\n]\n".encode())
