"""Finds which axis of activations holds the channels, by what the model does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

from export.errors import ExportError
from export.torch_internals import flatten

Channels = Literal["first", "last"]
"""Where activations have their channels: (batch, channels, ...) or (batch, ..., channels)."""

_FIRST = {
    "conv1d", "conv2d", "conv_transpose1d", "conv_transpose2d",
    "batch_norm", "instance_norm", "group_norm", "local_response_norm",
    "max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "lp_pool1d", "lp_pool2d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d",
    "interpolate", "dropout1d", "dropout2d", "pixel_shuffle", "pixel_unshuffle",
}  # fmt: skip
"""Functions whose first tensor, and result, have the channels at axis 1."""

_LAST = {
    "linear", "layer_norm", "rms_norm", "embedding", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "multi_head_attention_forward", "scaled_dot_product_attention",
}  # fmt: skip
"""Functions whose first tensor, and result, have the channels at the last axis."""

_MOVES = {"permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims"}
_SHAPES = {"view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"}
_RESIZES = {"cat", "concat", "pad", "__getitem__", "chunk", "split", "narrow"}
_POOLS = {"mean", "sum", "amax", "amin"}


@dataclass(frozen=True)
class _Call:
    """A call of a function: its name and arguments, its tensors, and one that it returned.

    It holds the tensors, so that none of them has the ``id`` of another.
    """

    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    given: tuple[Tensor, ...]
    result: Tensor


@dataclass(frozen=True)
class _Link:
    """Two tensors some of whose axes are the same: places in ``b`` by those in ``a``.

    ``length`` is 0 for tensors of one layout, such as those of a residual sum, else 1.
    """

    a: Tensor
    b: Tensor
    places: dict[int, int]
    length: int


class _Recorder(TorchFunctionMode):
    """Records the calls of torch's functions and of tensors' methods."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        given = tuple(t for t in flatten((args, options))[0] if isinstance(t, Tensor))
        name = (resolve_name(func) or getattr(func, "__name__", "")).rpartition(".")[2]
        if given and name != "__get__":
            for out in flatten(result)[0]:
                if isinstance(out, Tensor):
                    self.calls.append(_Call(name, tuple(args), options, given, out))
        return result


def channel_axis(h: Tensor, channels: Channels | None) -> int:
    """Axis of the channels of activations (batch, ...).

    Raises:
        ExportError: the activations do not have 2, 3 or 4 dimensions; or they have more than 2,
            and nobody knows where their channels are.
    """
    if h.dim() not in (2, 3, 4):
        raise ExportError(
            f"activations of shape {list(h.shape)} at a cut; they must be (batch, channels), or "
            "have one or two further dimensions of positions before or behind the channels"
        )
    if channels is None and h.dim() > 2:
        raise ExportError(
            f"which axis of the activations {list(h.shape)} holds the channels? Call add_heads, or "
            'give SplitModel channels="first" or channels="last"'
        )
    return 1 if channels == "first" else h.dim() - 1


def find_channels(
    stages: Iterable[Callable[[Tensor], Tensor]], x: Tensor
) -> list[Channels | Literal["both"] | None]:
    """Find where the output of each stage has its channels.

    The axis is the one that the nearest convolutions, linear layers and norms read or make. It is
    followed through elementwise functions and sums, and then through permutations, reshapes and
    means, forward and backward.

    Args:
        stages: stem, blocks and head, as functions of one tensor.
        x: inputs (rows, ...) of the stem.

    Returns:
        For each stage: where its output has the channels; ``both`` if the model reads axis 1 and
        the last axis as channels; None if nothing reads them. Two axes have their channels last.
    """
    outputs: list[Tensor] = []
    with torch.no_grad(), _Recorder() as recorder:
        for stage in stages:
            x = stage(x)
            outputs.append(x)
    distances = _distances(recorder.calls)
    return [_decided(h, distances.get(id(h), {})) for h in outputs]


def _decided(h: Tensor, distances: dict[int, int]) -> Channels | Literal["both"] | None:
    first, last = distances.get(1), distances.get(h.dim() - 1)
    if h.dim() == 2 or (first is None and last is not None):
        return "last"
    if first is None or last is None:
        return None if first is None else "first"
    return "both" if first == last else ("first" if first < last else "last")


def _distances(calls: Sequence[_Call]) -> dict[int, dict[int, int]]:
    """How far the nearest layer is that reads or makes an axis as channels, by tensor and axis."""
    found: dict[int, dict[int, int]] = {}
    for call in calls:
        if call.name in _FIRST or call.name in _LAST:
            for tensor in (call.given[0], call.result):
                if tensor.dim() > 1 and tensor.is_floating_point():
                    axis = 1 if call.name in _FIRST else tensor.dim() - 1
                    found.setdefault(id(tensor), {})[axis] = 0
    links = [link for call in calls for link in _links(call)]
    changed = True
    while changed:
        changed = False
        for link in (*links, *reversed(links)):
            back = {b: a for a, b in link.places.items()}
            for source, target, places in ((link.a, link.b, link.places), (link.b, link.a, back)):
                known = found.setdefault(id(target), {})
                for axis, distance in list(found.get(id(source), {}).items()):
                    if axis in places:
                        further = distance + link.length
                        if further < known.get(places[axis], further + 1):
                            known[places[axis]] = further
                            changed = True
    return found


def _links(call: _Call) -> list[_Link]:
    """The tensors that a call joins."""
    first, out = call.given[0], call.result
    same = {axis: axis for axis in range(out.dim())}
    if call.name in _FIRST or call.name in _LAST or first is out:
        return []
    if call.name in _MOVES:
        return [_Link(first, out, _moved(first, out), 1)]
    if call.name in _SHAPES:
        return [_Link(first, out, _reshaped(first.shape, out.shape), 1)]
    if call.name in _RESIZES:
        return [_Link(t, out, same, 0) for t in call.given if t.dim() == out.dim()]
    if call.name in _POOLS and out.shape != first.shape:
        return [_Link(first, out, _pooled(call), 1)]
    return [_Link(t, out, same, 0) for t in call.given if t.shape == out.shape and t is not out]


def _moved(first: Tensor, out: Tensor) -> dict[int, int]:
    """Places of axes in a permuted tensor; sizes and strides tell them apart."""
    before = list(zip(first.shape, first.stride(), strict=True))
    after = list(zip(out.shape, out.stride(), strict=True))
    return {a: after.index(pair) for a, pair in enumerate(before) if after.count(pair) == 1}


def _reshaped(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Places of the axes that a reshape keeps: those before and behind all that it changes."""
    places = {}
    for axis, (old, new) in enumerate(zip(before, after, strict=False)):
        if old != new:
            break
        places[axis] = axis
    for step, (old, new) in enumerate(zip(reversed(before), reversed(after), strict=False)):
        if old != new:
            break
        places.setdefault(len(before) - 1 - step, len(after) - 1 - step)
    return places


def _pooled(call: _Call) -> dict[int, int]:
    """Places of the axes that a mean leaves."""
    first, out = call.given[0], call.result
    dims = call.options.get("dim", call.arguments[1] if len(call.arguments) > 1 else None)
    gone = [dims] if isinstance(dims, int) else list(dims or ())
    if not all(isinstance(d, int) for d in gone):
        return {}
    left = [a for a in range(first.dim()) if a not in {d % first.dim() for d in gone}]
    if out.dim() == first.dim():
        return {a: a for a in left}
    return {a: place for place, a in enumerate(left)} if len(left) == out.dim() else {}
