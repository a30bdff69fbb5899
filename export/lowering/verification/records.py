"""What a graph was compared with when it was verified, to know whether that holds again.

The result of a verification depends on nothing but the traced graph, the file, the runtime's
settings, the inputs, and the values that the model's own code computes from them. A key of the
cache covers the graph, the file and the settings; a :class:`Verified` covers inputs and values,
bit by bit. So a cached verification holds if it has the same key, *and* the model's own code,
which runs again on every draw, gives the same bits. A model that is traced to the same graph as
before, but computes something else by itself, is verified anew, and refused as ever.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import torch

from edge_sdk.bundle.manifest import Manifest
from export.lowering.content import tensor_digest
from export.lowering.export_cache import digest
from export.steps.step import Tensors


@dataclass(frozen=True)
class Compared:
    """A draw of the inputs of a step, and what its reference made of them.

    Attributes:
        rows: number of rows.
        length: number of positions of texts; None for other inputs.
        seed: seed of the draw.
        inputs: hash of the inputs.
        outputs: hash of the outputs of the reference; empty if the model refuses the batch.
    """

    rows: int
    length: int | None
    seed: int
    inputs: str
    outputs: str

    @classmethod
    def of(
        cls, rows: int, length: int | None, seed: int, given: Tensors, want: Tensors | None
    ) -> Compared:
        """The record of a draw.

        Args:
            rows: number of rows.
            length: number of positions of texts; None for other inputs.
            seed: seed of the draw.
            given: the inputs.
            want: the outputs of the reference; None if the model refuses the batch.
        """
        outputs = "" if want is None else tensor_digest(want)
        return cls(rows, length, seed, tensor_digest(given), outputs)


@dataclass(frozen=True)
class Verified:
    """What a graph was compared with when it was verified.

    Attributes:
        draws: the draws, in their order.
        redraws: number of draws that were repeated, because rounding carried a value over a kink.
    """

    draws: tuple[Compared, ...]
    redraws: int

    def to_bytes(self) -> bytes:
        """The record as JSON."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Verified:
        """Read what :meth:`to_bytes` wrote."""
        raw = json.loads(data)
        return cls(tuple(Compared(**draw) for draw in raw["draws"]), raw["redraws"])


def verification_key(content: str, graph: str, manifest: Manifest, settings: object) -> str:
    """Key of the verification of a graph in the cache.

    Args:
        content: hash of the traced step, see :func:`export.lowering.content.step_digest`.
        graph: name of the graph.
        manifest: manifest of the bundle, from which the runtime opens the graph.
        settings: sizes of the draws, and what else decides how outputs are compared.
    """
    alone = replace(manifest, tier="", graphs={graph: manifest.graphs[graph]}, blobs={})
    torchs = f"{torch.get_num_threads()} {torch.get_float32_matmul_precision()}"
    return digest("verified", content, alone.to_bytes(), repr(settings), torchs)
