"""Validation of what devices send, against manifest and plan; errors name the field.

Every check raises :class:`ProtocolError`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.tensors import Array, State, TensorSpec, check_tensors
from export.tensor_names import is_variance
from server_hub.aggregation.layer_store import NotFinite, check_finite
from server_hub.methods.plan import DevicePlan

_BESIDE = 2**16
"""Largest size of an answer without its logits, in bytes."""

_LARGEST_METRIC = 1e12
"""Largest absolute value of a metric that counts; sums over devices stay finite."""


def check_packed(parts: Mapping[str, Array], manifest: Manifest) -> dict[str, int]:
    """Packed activations are as the manifest says; returns the sizes ``batch`` and ``seq``."""
    symbols: dict[str, int] = {}
    check_tensors(dict(parts), manifest.packed, symbols)
    longest = manifest.ranges.longest
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
    """The gradient of a batch's features is as the manifest says, with the batch's rows.

    Args:
        parts: the packed gradient by name.
        labels: number of labels that the gradient's mean loss is over.
        sizes: sizes that :func:`check_packed` has found for the batch.
        manifest: manifest of the tier.
    """
    check_tensors(dict(parts), manifest.features, dict(sizes))
    most = sizes["batch"] * sizes.get("seq", 1)
    if labels > most:
        raise ProtocolError(ErrorCode.BAD_LABELS, f"{labels} labels for {most} answers", "labels")


def check_labels(
    labels: Array | None, sizes: Mapping[str, int], manifest: Manifest, *, on_device: bool
) -> None:
    """Labels are int64, one for each row, each of a class of the model.

    For tokens there is one for each position, -1 where it does not count; at least one counts.

    Args:
        labels: labels of a batch, or None.
        sizes: sizes that :func:`check_packed` has found.
        manifest: manifest of the tier.
        on_device: whether labels stay on the devices in this round.
    """
    if on_device != (labels is None):
        what = (
            "labels stay on the devices in this round"
            if on_device
            else "labels are missing; the hub trains the head in this round"
        )
        raise ProtocolError(ErrorCode.BAD_LABELS, what, "labels")
    if labels is None:
        return
    tokens = manifest.task == "tokens"
    shape = (sizes["batch"], sizes["seq"]) if tokens else (sizes["batch"],)
    if labels.dtype != np.int64 or labels.shape != shape:
        raise ProtocolError(
            ErrorCode.BAD_LABELS,
            f"labels are {labels.dtype} {list(labels.shape)}, must be int64 {list(shape)}",
            "labels",
        )
    fault = manifest.ranges.label_fault(labels)
    if fault is not None:
        raise ProtocolError(ErrorCode.BAD_LABELS, fault, "labels")


def check_base_network(batch: Batch, plan: DevicePlan, manifest: Manifest) -> None:
    """A batch is of a base network that the device trains, on examples that it may train on.

    Args:
        batch: the batch; its labels are checked already.
        plan: what the device does in the round.
        manifest: manifest of the tier.
    """
    if plan.bases is None:
        if batch.base or batch.noise or batch.present is not None:
            field = "base" if batch.base else "noise" if batch.noise else "present"
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, "the model is not one of several bases", field
            )
        return
    if batch.base not in plan.bases:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"activations of base {batch.base}; the device trains "
            f"{', '.join(map(str, plan.bases))} in this round",
            "base",
        )
    if batch.noise and plan.adversarial is None:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            "there are no adversarial examples in this tier and round",
            "noise",
        )
    assert batch.labels is not None
    check_present(batch.present, batch.labels, manifest)


def check_present(present: Array | None, labels: Array, manifest: Manifest) -> None:
    """The class mask holds all classes of the labels, where the loss leaves out others.

    Args:
        present: (classes,) float32, 1 for classes that the device has examples of, else 0.
        labels: labels of a batch.
        manifest: manifest of the tier.
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


def check_samples(samples: int, most: int) -> None:
    """A device says that it has no more examples than ``most``."""
    if samples > most:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"{samples} examples; a device may have {most} at most, see samples in [limits]",
            "samples",
        )


def counted_samples(claimed: Mapping[str, int], over_median: float) -> dict[str, float]:
    """Return the number of examples that each member of a round counts for, by device.

    Args:
        claimed: number of examples that each member says it has, by device.
        over_median: largest multiple of the members' median that counts. The median of an even
            number of members is the lower one of the two in the middle.
    """
    if not claimed:
        return {}
    most = over_median * median_low(claimed.values())
    return {device: min(samples, most) for device, samples in claimed.items()}


def check_rows(rows: int, total: int, samples: int, plan: DevicePlan) -> None:
    """A device sends no larger batches, and no more rows, than its plan allows.

    Args:
        rows: number of rows of the batch.
        total: number of rows that the device has sent in the round, with these.
        samples: number of the device's examples.
        plan: what the device does in the round.
    """
    if rows > plan.batch_size or total > plan.passes * samples:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"{total} rows of activations in batches of {rows}; a round takes each of {samples} "
            f"examples {'once' if plan.passes == 1 else f'{plan.passes} times'}, in batches of at "
            f"most {plan.batch_size}",
            "parts",
        )


def checked_metrics(metrics: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return what a device says about its training, within what can be true.

    Args:
        metrics: metrics of the update by name, all finite.
        seconds: time from the start of the round to the update, by the hub's clock. The device's
            computing and waiting take no longer together.
    """
    checked = {n: min(max(v, -_LARGEST_METRIC), _LARGEST_METRIC) for n, v in metrics.items()}
    left = seconds
    for name in ("compute_s", "wait_s"):
        if name in checked:
            checked[name] = min(max(checked[name], 0.0), left)
            left -= checked[name]
    if "loss" in checked:
        checked["loss"] = max(checked["loss"], 0.0)
    return checked


def check_answer(sizes: Mapping[str, int], heads: int, classes: int) -> None:
    """The logits of an answer fit into one message.

    Args:
        sizes: sizes that :func:`check_packed` has found.
        heads: number of heads that answer.
        classes: number of logits of a head at each position.
    """
    size = 4 * heads * sizes["batch"] * sizes.get("seq", 1) * classes
    if size > DEFAULT_MAX_FRAME - _BESIDE:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"the answer would have {size} bytes; ask for fewer rows or shorter texts at a time",
            "parts",
        )


def check_update(message: Update, wanted: Sequence[TensorSpec], have: State, samples: int) -> None:
    """A part of an update holds tensors of the tier, each once, finite; the last part completes it.

    Args:
        message: the part.
        wanted: the tensors of the whole update.
        have: the tensors of earlier parts.
        samples: number of examples that the device has said it has.
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
    for name, tensor in message.tensors.items():
        if is_variance(name) and (tensor < 0).any():
            raise ProtocolError(ErrorCode.BAD_TENSOR, f"{name} holds negative variances", name)
    missing = [name for name in specs if name not in have and name not in message.tensors]
    if message.done and missing:
        raise ProtocolError(ErrorCode.BAD_TENSOR, f"tensor {missing[0]!r} is missing", missing[0])
    if message.samples != samples:
        raise ProtocolError(
            ErrorCode.BAD_MESSAGE,
            f"the update counts {message.samples} samples, ready said {samples}",
            "samples",
        )
