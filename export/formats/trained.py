"""A trained model to write: its tensors, what it reads and returns, and where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.training.data import Examples
from export.cutting.split_model import SplitModel
from export.formats.inference import Signature


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, or several base networks of one structure.

    Attributes:
        model: the model with its trained tensors; of base networks, the best.
        by_tier: the model of each tier; with separate stores they differ.
        index: the bundles that were trained with.
        about: where the model comes from, as JSON holds it: for the card and the metadata of files.
        bases: tensors of each base network by name, best first; empty for a single model.
        held_out: labelled examples to measure with; None if there are none.
    """

    model: SplitModel
    by_tier: Mapping[str, SplitModel]
    index: BundleIndex
    about: Mapping[str, Any]
    bases: Sequence[Mapping[str, Tensor]] = field(default=())
    held_out: Examples | None = None

    def signature(self, tier: str | None, limits: Mapping[str, int]) -> Signature:
        """Inputs of an inference graph.

        Args:
            tier: tier whose bundle says what inputs are; any if None.
            limits: largest ``batch`` and ``seq`` that the graph must take; a text is never longer
                than the model takes.
        """
        manifest = self.index.manifest(tier or next(iter(self.index.tiers)))
        longest = max(self.index.manifest(name).ranges.longest for name in self.index.tiers)
        names = [n for n in manifest.x.shape if isinstance(n, str)]
        own = {n: limits[n] for n in names if n in limits}
        if "seq" in names:
            own["seq"] = min(own.get("seq", longest), longest)
        return Signature(manifest.x, own)

    def rows(self, longest: int | None = None) -> Tensor:
        """Up to 8 inputs (rows, ...): of the held-out examples, or drawn without any.

        Args:
            longest: largest length of texts; that of the model if None.
        """
        if self.held_out is None:
            return self.drawn(longest)
        x = torch.from_numpy(self.held_out.x[:_ROWS])
        return x[:, : self._longest(longest)] if "seq" in self._any.x.shape else x

    def drawn(self, longest: int | None = None) -> Tensor:
        """8 inputs (rows, ...) that are drawn from a fixed seed.

        Args:
            longest: largest length of texts; that of the model if None.
        """
        x = self._any.x
        most = min(self._longest(longest), _LENGTH)
        shape = [most if n == "seq" else int(n) for n in x.shape[1:]]
        generator = torch.Generator().manual_seed(0)
        if x.dtype.startswith("float"):
            return torch.randn((_ROWS, *shape), generator=generator)
        highest = torch.tensor(self._any.highest or (self._any.classes - 1,))
        values = torch.rand((_ROWS, *shape), generator=generator) * (highest + 1)
        return values.long().to(getattr(torch, x.dtype))

    @property
    def _any(self) -> Manifest:
        """The manifest of a tier; all say the same of inputs."""
        return self.index.manifest(next(iter(self.index.tiers)))

    def _longest(self, longest: int | None) -> int:
        most = self._any.ranges.longest
        return most if longest is None else min(longest, most)


_ROWS = 8
_LENGTH = 64
"""Tokens of a text that is drawn."""
