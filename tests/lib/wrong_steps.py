"""Steps with an error in one tensor, to show that verification finds it."""

from __future__ import annotations

from edge_sdk.protocol.tensors import Array
from export.steps.step import Step
from tests.lib.graph_runs import Run

REST = ("aux.", "momentum/aux.")
"""Prefixes of the tensors that a returned gradient does not change."""


def wrong(name: str, run: Run) -> Run:
    """Return one tensor unchanged; or changed, if its name starts with one of :data:`REST`."""

    def bent(step: Step, feeds: dict[str, Array]) -> dict[str, Array]:
        outputs = run(step, feeds)
        before = feeds[name]
        outputs[f"next/{name}"] = before + 1 if name.startswith(REST) else before
        return outputs

    return bent
