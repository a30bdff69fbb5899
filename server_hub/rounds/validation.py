"""Checks of what devices send, against their tier's manifest; errors name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.tensors import Array, TensorSpec, check_tensors
from server_hub.aggregation.layer_store import NotFinite, State, check_finite

_BESIDE = 2**16
"""Bytes of an answer beside its logits, at most."""

MAX_POSITIONS = 8192
"""Positions of a text that the hub takes: attention needs memory for the square of them."""


def check_packed(parts: Mapping[str, Array], manifest: Manifest) -> dict[str, int]:
    """Sizes of ``batch`` and, for texts, ``seq`` of activations that are as the manifest says."""
    symbols: dict[str, int] = {}
    check_tensors(dict(parts), manifest.packed, symbols)
    longest = min(manifest.limits.get("seq", MAX_POSITIONS), MAX_POSITIONS)
    if symbols.get("seq", 0) > longest:
        raise ProtocolError(
            ErrorCode.BAD_TENSOR,
            f"texts of {symbols['seq']} positions; they may have {longest} at most",
            "parts",
        )
    return symbols


def check_features(
    parts: Mapping[str, Array], labels: int, sizes: Mapping[str, int], manifest: Manifest
) -> None:
    """The gradient of a batch's features is as the manifest says, of as many rows as it has.

    Args:
        parts: the packed gradient.
        labels: how many labels it is the mean over.
        sizes: what :func:`check_packed` has found.
        manifest: the tier's manifest.
    """
    check_tensors(dict(parts), manifest.features, dict(sizes))
    most = sizes["batch"] * sizes.get("seq", 1)
    if labels > most:
        raise ProtocolError(ErrorCode.BAD_LABELS, f"{labels} labels for {most} answers", "labels")


def check_labels(labels: Array, sizes: Mapping[str, int], manifest: Manifest) -> None:
    """Labels are int64, one for each row, each of a class that there is.

    For tokens there is one for each position, -1 where it does not count; one counts at least.

    Args:
        labels: of a batch.
        sizes: what :func:`check_packed` has found.
        manifest: the tier's manifest.
    """
    tokens = manifest.task == "tokens"
    shape = (sizes["batch"], sizes["seq"]) if tokens else (sizes["batch"],)
    if labels.dtype != np.int64 or labels.shape != shape:
        raise ProtocolError(
            ErrorCode.BAD_LABELS,
            f"labels are {labels.dtype} {list(labels.shape)}, must be int64 {list(shape)}",
            "labels",
        )
    lowest, highest = (-1 if tokens else 0), manifest.classes - 1
    if labels.min() < lowest or labels.max() > highest:
        raise ProtocolError(
            ErrorCode.BAD_LABELS,
            f"labels reach from {labels.min()} to {labels.max()}, "
            f"must be from {lowest} to {highest}",
            "labels",
        )
    if labels.max() < 0:
        raise ProtocolError(ErrorCode.BAD_LABELS, "no label counts: all are -1", "labels")


def check_present(present: Array | None, labels: Array, manifest: Manifest) -> None:
    """Which classes a device has, where its loss leaves out the others: those of its labels, too.

    Args:
        present: (classes,) float32, 1 for those that there are and 0 for others.
        labels: of a batch, each of a class.
        manifest: the tier's manifest.
    """
    wanted = any(port.spec.name == "present" for port in manifest.graphs["train"].inputs)
    if not wanted and present is None:
        return
    if not wanted or present is None:
        what = "is missing" if wanted else "is not for this model"
        raise ProtocolError(ErrorCode.BAD_MESSAGE, f"which classes are present {what}", "present")
    shape = (manifest.classes,)
    if present.dtype != np.float32 or present.shape != shape or not np.isin(present, (0, 1)).all():
        raise ProtocolError(
            ErrorCode.BAD_TENSOR,
            f"present must be float32 {list(shape)} of zeros and ones",
            "present",
        )
    if not present[labels].all():
        raise ProtocolError(
            ErrorCode.BAD_LABELS, "a label is of a class that is not present", "labels"
        )


def check_answer(sizes: Mapping[str, int], heads: int, classes: int) -> None:
    """The logits that were asked for fit one message.

    Args:
        sizes: what :func:`check_packed` has found.
        heads: how many heads answer.
        classes: logits of a head at each position.
    """
    size = 4 * heads * sizes["batch"] * sizes.get("seq", 1) * classes
    if size > DEFAULT_MAX_FRAME - _BESIDE:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"the answer would have {size} bytes; ask for fewer rows or shorter texts at a time",
            "parts",
        )


def check_update(message: Update, wanted: Sequence[TensorSpec], have: State, samples: int) -> None:
    """A part of an update: tensors of the tier, each once, finite; all of them when done.

    Args:
        message: the part.
        wanted: the tensors that the whole update has.
        have: what earlier parts brought.
        samples: the examples that the device said it has.
    """
    specs = {spec.name: spec for spec in wanted}
    for name, tensor in message.tensors.items():
        if name not in specs or name in have:
            what = "is not a parameter of the tier" if name not in specs else "came twice"
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"tensor {name!r} {what}", name)
        specs[name].check(tensor, {})
    try:
        check_finite(message.tensors)
    except NotFinite as error:
        raise ProtocolError(ErrorCode.NOT_FINITE, str(error), error.tensor) from error
    missing = [name for name in specs if name not in have and name not in message.tensors]
    if message.done and missing:
        raise ProtocolError(ErrorCode.BAD_TENSOR, f"tensor {missing[0]!r} is missing", missing[0])
    if message.samples != samples:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"the update counts {message.samples} samples, ready said {samples}",
            "samples",
        )
