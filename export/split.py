"""SplitModel: a stem, a list of blocks and a head; and what a cut of it means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_sdk.errors import BundleError
from export.errors import ExportError
from export.heads import AuxiliaryHead


class SplitModel(nn.Module):
    """A model that can be cut between any two of its blocks.

    With cut layer ``k`` a device holds the stem and blocks ``0..k-1``; the hub holds blocks
    ``k..N-1`` and the head. Auxiliary heads sit at depths: head ``k`` reads what leaves block
    ``k-1``. Tensors are named by layer: ``stem.*``, ``block.3.*``, ``aux.2.*``, ``head.*``.

    Args:
        stem: what comes before the first block.
        blocks: the blocks, in order; each takes one tensor and returns one.
        head: from the last block's output to logits (batch, classes).
    """

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], head: nn.Module) -> None:
        super().__init__()
        if len(blocks) < 2:
            raise ExportError(f"a model needs at least 2 blocks to be cut, this has {len(blocks)}")
        self.stem = stem
        self.block = nn.ModuleList(blocks)
        self.aux = nn.ModuleDict()
        self.head = head

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block)

    @property
    def head_depths(self) -> list[int]:
        """Depths at which auxiliary heads sit, shallowest first."""
        return sorted(int(depth) for depth in self.aux)

    def check_cut(self, cut: int) -> None:
        """Raise :class:`ExportError` unless both sides of ``cut`` hold at least one block."""
        if not 1 <= cut < self.depth:
            raise ExportError(
                f"cut {cut} is outside the model: it has {self.depth} blocks, "
                f"so a cut is from 1 to {self.depth - 1}"
            )

    def add_heads(self, cuts: Iterable[int], example: Tensor, classes: int) -> None:
        """Put an auxiliary head at every cut that has none yet, always the same one.

        Args:
            cuts: depths.
            example: one input batch, to find the width at each depth.
            classes: number of classes.
        """
        for cut in sorted(set(cuts)):
            self.check_cut(cut)
            if str(cut) not in self.aux:
                with torch.no_grad():
                    h = self.segment(example, cut)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(cut)  # the same model gives the same bundles
                    self.aux[str(cut)] = AuxiliaryHead(width_of(h), classes)

    def segment(self, x: Tensor, cut: int) -> Tensor:
        """Activations at ``cut``: the stem and blocks ``0..cut-1``."""
        h: Tensor = self.stem(x)
        for block in self.block[:cut]:
            h = block(h)
        return h

    def forward(self, x: Tensor) -> Tensor:
        """Logits (batch, classes) of the whole model, without auxiliary heads."""
        logits: Tensor = self.head(self.segment(x, self.depth))
        return logits

    def client_layers(self, cut: int) -> list[str]:
        """Layers that a device with this cut holds, its auxiliary heads included."""
        heads = [f"aux.{depth}" for depth in self.head_depths if depth <= cut]
        return ["stem", *(f"block.{i}" for i in range(cut)), *heads]

    def layers(self) -> list[str]:
        """All layers."""
        return [*self.client_layers(self.depth), "head"]

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, auxiliary heads included."""
        save_file({n: t.detach().cpu().contiguous() for n, t in self.state_dict().items()}, path)

    def load(self, path: Path) -> None:
        """Read weights written by :meth:`save`; auxiliary heads are made as the file has them.

        Raises:
            BundleError: no such file, or its tensors are not this model's.
        """
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise BundleError(f"cannot read the weights {path}: {error}") from error
        for name, tensor in tensors.items():
            head = re.fullmatch(r"aux\.([1-9]\d*)\.hidden\.weight", name)
            if head and head[1] not in self.aux and f"aux.{head[1]}.out.bias" in tensors:
                classes = len(tensors[f"aux.{head[1]}.out.bias"])
                self.aux[head[1]] = AuxiliaryHead(tensor.shape[1], classes)
        own = self.state_dict()
        wrong = [
            f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing in the file'}"
            f" against {tuple(own[name].shape) if name in own else 'nothing in the model'}"
            for name in sorted(own.keys() | tensors.keys())
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        ]
        if wrong:
            raise BundleError(f"{path} does not fit the model: {'; '.join(wrong[:3])}")
        self.load_state_dict(tensors)


class ClientSegment(nn.Module):
    """What a device holds at a cut: the stem, the first blocks, and the heads up to the cut.

    Parameters keep the names they have in the :class:`SplitModel`, which it shares.
    """

    def __init__(self, model: SplitModel, cut: int) -> None:
        super().__init__()
        model.check_cut(cut)
        self.cut = cut
        self.stem = model.stem
        self.block = model.block[:cut]
        self.aux = nn.ModuleDict({str(d): model.aux[str(d)] for d in model.head_depths if d <= cut})
        if not self.aux:
            raise ExportError(f"there is no auxiliary head at or before cut {cut}; add one")

    @property
    def heads(self) -> list[str]:
        """Names of the heads, shallowest first."""
        return [f"aux.{depth}" for depth in sorted(map(int, self.aux))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations at the cut, and logits (heads, batch, classes)."""
        h = self.stem(x)
        logits = []
        for depth, block in enumerate(self.block, start=1):
            h = block(h)
            if str(depth) in self.aux:
                logits.append(self.aux[str(depth)](h))
        return h, torch.stack(logits)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: ``block.3.conv.weight`` -> ``block.3``."""
    parts = name.split(".")
    return ".".join(parts[:2]) if parts[0] in ("block", "aux") else parts[0]


def width_of(h: Tensor) -> int:
    """Feature width of activations: channels of (B, C, H, W) or (B, C), last axis of (B, T, C).

    Raises:
        ExportError: activations of another form.
    """
    if h.dim() not in (2, 3, 4):
        raise ExportError(
            f"activations of shape {list(h.shape)} at a cut; they must be (batch, channels), "
            "(batch, positions, channels) or (batch, channels, height, width)"
        )
    return h.shape[2] if h.dim() == 3 else h.shape[1]
