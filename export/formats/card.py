"""The model card: what was written, where it comes from, how good and how fast it is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

CARD = "README.md"
FIGURES = "model.json"
"""The card's content as JSON; by this file a folder is known as an earlier export."""


@dataclass(frozen=True)
class Written:
    """A file or folder that was written.

    Attributes:
        format: name of the format.
        path: its path, relative to the folder.
        size: bytes of it, all files of a folder together.
        opened_by: what opens it.
        heads: names of the outputs; empty for weights.
        scores: accuracy or perplexity on held-out examples by name of the output; empty if it was
            not measured.
        latency_ms: median time of an answer to one row, on one thread of the exporting machine;
            None if it was not measured.
        difference: largest relative difference of the logits from those in float32, for formats
            that round weights or activations; None for others.
    """

    format: str
    path: str
    size: int
    opened_by: str
    heads: Sequence[str] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    latency_ms: float | None = None
    difference: float | None = None


@dataclass(frozen=True)
class Card:
    """What the card says.

    Attributes:
        about: where the model comes from.
        metric: ``accuracy`` or ``perplexity``.
        x: inputs: dtype and shape.
        examples: number of held-out examples; 0 if there were none.
        files: what was written.
        notes: further sentences.
    """

    about: Mapping[str, Any]
    metric: str
    x: str
    examples: int
    files: Sequence[Written]
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """The card as plain dictionaries."""
        return asdict(self)

    def markdown(self) -> str:
        """The card as a page, with the front matter of model hubs."""
        lines = [
            "---",
            "tags:",
            "- cutlayer",
            "- federated-learning",
            "- split-learning",
            "---",
            "",
        ]
        lines += [f"# {self.about['title']}", "", self._origin(), ""]
        lines += [f"Inputs `x`: {self.x}.", ""]
        lines += ["| file | format | kB | opened by | one row |", "|---|---|---:|---|---:|"]
        for file in self.files:
            ms = "not measured" if file.latency_ms is None else f"{file.latency_ms:.2f} ms"
            row = [f"`{file.path}`", file.format, f"{file.size / 1e3:,.0f}", file.opened_by, ms]
            lines.append("| " + " | ".join(row) + " |")
        lines += ["", f"## {self.metric.capitalize()}", ""]
        if self.examples:
            where = f"on {self.examples:,} held-out examples"
            lines += [f"Of each file and output, {where}, in the runtime that opens the file.", ""]
            lines += ["| file | output | " + self.metric + " |", "|---|---|---:|"]
            lines += [
                f"| `{file.path}` | `{head}` | {shown(self.metric, value)} |"
                for file in self.files
                for head, value in file.scores.items()
            ]
        else:
            lines += ["Not measured: there were no held-out examples."]
        hub = self.about.get("measured_by_hub") or {}
        if hub:
            lines += ["", "As the hub measured it after the last evaluated round of the job:", ""]
            lines += ["| tier | path | " + self.metric + " |", "|---|---|---:|"]
            lines += [
                f"| {tier} | {path} | {shown(self.metric, value)} |"
                for tier, paths in hub.items()
                for path, value in paths.items()
            ]
        for note in self.notes:
            lines += ["", note]
        return "\n".join(lines) + "\n"

    def _origin(self) -> str:
        about = self.about
        said = f"Trained by Cutlayer {about['version']} with the method {about['method']}"
        said += f", {about['rounds']} rounds" if about["rounds"] is not None else ""
        tiers = ", ".join(f"{name} (cut {cut})" for name, cut in about["tiers"].items())
        said += f". Tiers: {tiers}."
        said += f" Part: {about['part']}."
        return said


def metadata(about: Mapping[str, Any], heads: Sequence[str], weights: str) -> str:
    """What the metadata inside a file say, as JSON."""
    known = {k: v for k, v in about.items() if k not in ("title", "measured_by_hub")}
    return json.dumps({**known, "heads": list(heads), "weights": weights}, sort_keys=True)


def shown(metric: str, value: float) -> str:
    """A figure as the card shows it."""
    return f"{100 * value:.1f} %" if metric == "accuracy" else f"{value:.3f}"
