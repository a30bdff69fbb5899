"""Whether everything that devices and hub will send each other fits into a message.

The manifest says how large it is, so that this is known before a device trains in vain.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.ranges import MAX_POSITIONS
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.pieces import MAX_MESSAGE
from edge_sdk.protocol.tensors import TensorSpec
from server_hub.gateway.limits import Limits

log = logging.getLogger("cutlayer.hub")

_BESIDE = 4096
"""Largest size of a message with one batch or one tensor, without elements, in bytes."""


@dataclass(frozen=True)
class _Message:
    """A message that will be sent.

    Attributes:
        what: what it holds.
        size: its size, in bytes.
        from_device: whether a device sends it.
        longest: whether the size is that of the longest texts, which devices may not have.
        remedy: what makes it smaller.
    """

    what: str
    size: int
    from_device: bool
    longest: bool
    remedy: str = ""


def check_message_sizes(
    manifests: Mapping[str, Manifest],
    limits: Limits,
    batch_size: int,
    modes: Collection[ActivationMode],
    slots: bool,
) -> None:
    """Compare what will be sent with the limits of messages.

    Args:
        manifests: manifest by tier.
        limits: limits of a peer.
        batch_size: rows in a local step.
        modes: activation modes of the rounds.
        slots: whether optimizer slots travel.

    Raises:
        ConfigError: something cannot be sent; it says what, how large it is, and what to change.
    """
    for tier, manifest in manifests.items():
        for message in _messages(manifest, batch_size, modes, slots):
            _check(tier, message, limits)


def _check(tier: str, message: _Message, limits: Limits) -> None:
    frame = limits.max_frame if message.from_device else DEFAULT_MAX_FRAME
    most, setting = frame, "max_frame"
    if limits.takes_pieces:
        most, setting = (limits.max_message if message.from_device else MAX_MESSAGE), "max_message"
    size = message.size + _BESIDE
    said = f"tier {tier!r}: {message.what} has {message.size:,} bytes"
    if size > most:
        remedies = [message.remedy] if message.remedy else []
        if message.from_device:
            needed = -(-size // 2**20)
            raised = f"raise {setting} in [limits] to {needed * 2**20}"
            if setting == "max_message" and needed > limits.waiting_mb:
                raised += f", and waiting_mb to {needed}"
            remedies.append(raised)
        sentence = f"{said}, and a message holds {most:,}; {', or '.join(remedies)}"
        if not message.longest:
            raise ConfigError(sentence)
        log.warning("%s; shorter texts fit", sentence)
    elif size > frame and not message.longest:
        log.warning(
            "%s, more than a frame; devices whose app does not speak the extension 'pieces' cannot "
            "take part%s",
            said,
            "; raise max_frame in [limits]" if message.from_device else "",
        )


def _messages(
    manifest: Manifest, batch_size: int, modes: Collection[ActivationMode], slots: bool
) -> Iterator[_Message]:
    """The largest messages of a tier."""
    largest = max(manifest.exchanged(slots), key=lambda spec: spec.nbytes(), default=None)
    if largest is not None:
        what = f"the tensor {largest.name} of an update"
        yield _Message(what, largest.nbytes(), from_device=True, longest=False)
    if manifest.whole:
        return
    symbols = {name for spec in manifest.packed for name in spec.shape if isinstance(name, str)}
    texts = bool(symbols - {"batch"})
    positions = min(manifest.limits.get("seq", MAX_POSITIONS), MAX_POSITIONS) if texts else 1
    long = f" of {positions} positions" if texts else ""
    smaller = "lower batch_size in [local]"

    def size(specs: tuple[TensorSpec, ...], rows: int) -> int:
        return sum(spec.nbytes(batch=rows, seq=positions) for spec in specs)

    rows = min(batch_size, manifest.limits.get("batch", batch_size))
    batch = f"a batch of {rows} rows{long}"
    if any(mode is not ActivationMode.NONE for mode in modes):
        labels = 8 * rows * positions
        packed = size(manifest.packed, rows)
        yield _Message(f"the activations of {batch}", packed + labels, True, texts, smaller)
    if any(mode.returns_gradients for mode in modes):
        yield _Message(f"the gradient of {batch}", packed, False, texts, smaller)
    if ActivationMode.U_SHAPED in modes:
        features = size(manifest.features, rows)
        yield _Message(f"the features of {batch}", features, False, texts, smaller)
        yield _Message(f"the gradient of the features of {batch}", features, True, texts, smaller)
    row = f"one row{long}"
    yield _Message(f"a question about {row}", size(manifest.packed, 1), True, texts)
    yield _Message(
        f"the answer of one head to {row}",
        4 * positions * manifest.classes,
        False,
        texts,
        "export with fewer classes",
    )
