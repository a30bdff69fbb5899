"""Constants of a graph that are computed from the state: the 8-bit matrices of ``predict_int8``.

A constant that is called like a tensor of the state is that tensor. ``NAME/codes`` and
``NAME/scale`` are the state tensor ``NAME`` as ``codes * scale``: int8 codes from -127 to 127, and
a float32 scale per channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import BundleError
from edge_sdk.protocol.tensors import Array

CODES, SCALE = "/codes", "/scale"

_LARGEST = np.float32(127)
_TINY = np.finfo(np.float32).tiny


def of_state(manifest: Manifest, graph: str) -> frozenset[str]:
    """Names of the constants of a graph that are computed from the state."""
    state = {spec.name for spec in manifest.exchanged()}
    return frozenset(
        name
        for name in manifest.graphs[graph].constants
        if name.removesuffix(CODES).removesuffix(SCALE) in state
    )


def has_weights(manifest: Manifest, graph: str) -> bool:
    """Whether the weights of a graph are constants: of the state, or those of the export.

    Other graphs take the state as inputs.
    """
    takes = any(port.role in ("state", "bases") for port in manifest.graphs[graph].inputs)
    return bool(manifest.exchanged()) and not takes


def check_weights(
    manifest: Manifest, graph: str, state: Mapping[str, Array], initial: Mapping[str, Array]
) -> None:
    """Check that the weights in a graph, which are those of the export, are those of the state.

    Raises:
        BundleError: the state has others.
    """
    if all(np.array_equal(state[s.name], initial[s.name]) for s in manifest.exchanged()):
        return
    raise BundleError(
        f"the graph {graph!r} of tier {manifest.tier!r} holds the weights of the export, and the "
        "model has been trained since; predict in float32, or write bundles of the trained model "
        "with cutlayer model export RUN --format bundles"
    )


def constants_from(manifest: Manifest, graph: str, state: Mapping[str, Array]) -> dict[str, Array]:
    """The constants of a graph that are computed from the state, by name.

    Args:
        manifest: manifest of the bundle.
        graph: name of the graph.
        state: tensors of the state by name.
    """
    # the shape of a scale says what a channel is
    shapes = {spec.name: spec.shape for held in manifest.constants for spec in held.tensors}
    found: dict[str, Array] = {}
    for name in of_state(manifest, graph):
        source = name.removesuffix(CODES).removesuffix(SCALE)
        if source == name:
            found[name] = state[name]
        elif name.endswith(SCALE):
            codes, scale = quantize(state[source], [int(n) for n in shapes[name]])
            found |= {source + CODES: codes, source + SCALE: scale}
    return found


def quantize(weight: Array, scale_shape: Sequence[int]) -> tuple[Array, Array]:
    """Quantize a finite float32 tensor: ``scale = max|w| / 127`` and ``codes = round(w / scale)``.

    A channel whose scale would be subnormal becomes zero.

    Args:
        weight: the tensor.
        scale_shape: shape of the scale: 1 along axes that a channel extends over.
    """
    within = tuple(axis for axis, size in enumerate(scale_shape) if size == 1)
    scale = np.abs(weight).max(within, keepdims=True) / _LARGEST
    scale = np.where(scale < _TINY, np.float32(2) * _LARGEST * _TINY, scale).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale
