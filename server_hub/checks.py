"""Checks of what devices send, against their tier's manifest; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_sdk.bundle import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.tensors import Array, check_tensors
from server_hub.layers import NotFinite, State, check_finite


def check_packed(parts: Mapping[str, Array], manifest: Manifest) -> int:
    """Number of rows of packed activations that are as the manifest says."""
    symbols: dict[str, int] = {}
    check_tensors(dict(parts), manifest.packed, symbols)
    return symbols["batch"]


def check_labels(labels: Array, rows: int, classes: int) -> None:
    """Labels are int64, one for each row, each of a class that there is."""
    if labels.dtype != np.int64 or labels.shape != (rows,):
        raise ProtocolError(
            "bad_labels",
            f"labels are {labels.dtype} {list(labels.shape)}, must be int64 [{rows}]",
            "labels",
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ProtocolError(
            "bad_labels",
            f"labels reach from {labels.min()} to {labels.max()}, must be from 0 to {classes - 1}",
            "labels",
        )


def check_update(message: Update, manifest: Manifest, have: State, samples: int) -> None:
    """A part of an update: parameters of the tier, each once, finite; all of them when done.

    Args:
        message: the part.
        manifest: the tier's manifest.
        have: what earlier parts brought.
        samples: the examples that the device said it has.
    """
    specs = {spec.name: spec for spec in manifest.exchanged}
    for name, tensor in message.tensors.items():
        if name not in specs or name in have:
            what = "is not a parameter of the tier" if name not in specs else "came twice"
            raise ProtocolError("bad_tensor", f"tensor {name!r} {what}", name)
        specs[name].check(tensor, {})
    try:
        check_finite(message.tensors)
    except NotFinite as error:
        raise ProtocolError("not_finite", str(error), error.tensor) from error
    missing = [name for name in specs if name not in have and name not in message.tensors]
    if message.done and missing:
        raise ProtocolError("bad_tensor", f"tensor {missing[0]!r} is missing", missing[0])
    if message.samples != samples:
        raise ProtocolError(
            "bad_message",
            f"the update counts {message.samples} samples, ready said {samples}",
            "samples",
        )
