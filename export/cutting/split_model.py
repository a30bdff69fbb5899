"""SplitModel, a model of stem, blocks and head, and ClientSegment, its part on a device."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from edge_sdk.errors import BundleError
from export.cutting.channels import Channels, channel_axis, find_channels
from export.cutting.heads import AuxiliaryHead, TokenHead, grid_and_width, grid_of
from export.errors import ExportError
from export.tensor_files import save_tensors
from export.torch_internals import NormBase

Task = Literal["classes", "tokens"]
"""Kind of the labels: the class of an example, or the token at each position of a text."""


WEIGHTS = "model.safetensors"
"""File of the model's weights in a folder of bundles."""


class SplitModel(nn.Module):
    """A model that can be cut between any two of its blocks.

    With cut layer ``k`` a device holds the stem and blocks ``0..k-1``; the hub holds blocks
    ``k..N-1`` and the head. The auxiliary head at depth ``k`` reads the output of block ``k-1``.
    Tensors are named by layer: ``stem.*``, ``block.3.*``, ``aux.2.*``, ``head.*``.

    Args:
        stem: module before the first block. For ``tokens`` its ``embedding`` is the
            ``nn.Embedding`` of the tokens.
        blocks: the blocks, in order; each takes one tensor and returns one.
        head: module from the output of the last block to logits: (batch, classes), or (batch,
            positions, vocabulary) for ``tokens``.
        task: kind of the labels.
        channels: where activations have their channels: ``first``, (batch, channels, ...), or
            ``last``, (batch, ..., channels). None: the model shows it by its convolutions, linear
            layers and norms, for each cut.

    Raises:
        ExportError: there are fewer than 2 blocks, the task or ``channels`` is unknown, or the stem
            of a model of tokens has no ``embedding``.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        task: Task = "classes",
        *,
        channels: Channels | None = None,
    ) -> None:
        super().__init__()
        if len(blocks) < 2:
            raise ExportError(f"a model needs at least 2 blocks to be cut, this has {len(blocks)}")
        if task not in get_args(Task):
            raise ExportError(f"unknown task {task!r}; there are {', '.join(get_args(Task))}")
        if channels not in (None, *get_args(Channels)):
            raise ExportError(f"channels is {channels!r}; it must be 'first', 'last' or None")
        if task == "tokens" and channels == "first":
            raise ExportError("activations of a model of tokens are (batch, positions, channels)")
        if task == "tokens" and not isinstance(getattr(stem, "embedding", None), nn.Embedding):
            raise ExportError("a model of tokens needs a stem whose .embedding is an nn.Embedding")
        self.stem = stem
        self.block = nn.ModuleList(blocks)
        self.aux = nn.ModuleDict()
        self.head = head
        self.task = task
        self.channels: Channels | None = "last" if task == "tokens" else channels
        self.layout: dict[int, Channels] = {}
        """Where activations have their channels, by depth, as far as it was found."""
        self.original_names: dict[str, str] = {}
        """Names of tensors in the module that the model was made of, by their names here; empty if
        the model was not made of another module."""

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.block)

    @property
    def head_depths(self) -> list[int]:
        """Depths of the auxiliary heads, shallowest first."""
        return sorted(int(depth) for depth in self.aux)

    def check_cut(self, cut: int) -> None:
        """Raise :class:`ExportError` unless both sides of ``cut`` hold at least one block."""
        if not 1 <= cut < self.depth:
            raise ExportError(
                f"cut {cut} is outside the model: it has {self.depth} blocks, "
                f"so a cut is from 1 to {self.depth - 1}"
            )

    def add_heads(self, cuts: Iterable[int], example: Tensor, classes: int) -> None:
        """Add an auxiliary head at every cut that has none yet, initialised from a fixed seed.

        Args:
            cuts: depths of the heads.
            example: inputs (batch, ...), from which the width at each depth is found.
            classes: number of classes; for ``tokens`` the size of the vocabulary.

        Raises:
            ExportError: a cut is outside the model; the model does not show which axis of the
                activations there holds the channels; or ``classes`` or the width at a cut does not
                fit the stem's table (``tokens``).
        """
        cuts = sorted(set(cuts))
        for cut in cuts:
            self.check_cut(cut)
        if self.channels is None and self.depth not in self.layout:
            self._find_layout(example)  # also that of the features, which no head reads
        for cut in cuts:
            channels = self.channels_at(cut, example)
            if str(cut) not in self.aux:
                with torch.no_grad(), evaluating(self):
                    h = self.segment(example, cut)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(cut)  # so that the same model gives the same bundles
                    self.aux[str(cut)] = self._head(h, channels, classes)

    def channels_at(self, depth: int, example: Tensor) -> Channels:
        """Where activations at a depth have their channels.

        Args:
            depth: number of blocks below the activations.
            example: inputs (batch, ...).

        Raises:
            ExportError: ``channels`` was not given, and the model does not show it: no layer reads
                or makes them, or some read axis 1 as channels and some the last axis.
        """
        known = self.known_channels(depth)
        if known is None:
            found = self._find_layout(example)
            if depth not in self.layout:
                reads = "axis 1 and the last axis" if found[depth] == "both" else "no axis"
                raise ExportError(
                    f"which axis holds the channels of the activations at cut {depth}? The model's "
                    f"convolutions, linear layers and norms read {reads} as such; give SplitModel "
                    'channels="first", (batch, channels, ...), or channels="last"'
                )
        return known or self.layout[depth]

    def _find_layout(self, example: Tensor) -> list[Channels | Literal["both"] | None]:
        parts = [self.stem, *self.block]
        with evaluating(self):
            found = find_channels([*parts, self.head], example[:2])[: len(parts)]
        self.layout |= {d: c for d, c in enumerate(found) if c == "first" or c == "last"}
        return found

    def known_channels(self, depth: int) -> Channels | None:
        """Where activations at a depth have their channels, if that was given or found."""
        head = dict(self.aux).get(str(depth))
        return self.channels or (
            head.channels if isinstance(head, AuxiliaryHead) else self.layout.get(depth)
        )

    def _head(self, h: Tensor, channels: Channels, classes: int) -> nn.Module:
        width = h.shape[channel_axis(h, channels)]
        if self.task == "classes":
            return AuxiliaryHead(width, classes, channels, grid_of(h, channels))
        table = self.stem.embedding
        assert isinstance(table, nn.Embedding)
        if (classes, width) != (table.num_embeddings, table.embedding_dim):
            raise ExportError(
                f"the head of a model of tokens reads the stem's table ({table.num_embeddings} x "
                f"{table.embedding_dim}); it cannot give {classes} tokens from a width of {width}"
            )
        return TokenHead(width)

    def answer(self, depth: int, h: Tensor) -> Tensor:
        """Logits of the auxiliary head at ``depth`` from the activations at that depth."""
        return answer(self.aux[str(depth)], self.stem, h)

    def trained(self) -> dict[str, Tensor]:
        """The tensors that devices and hub exchange, by name.

        These are the trained parameters and the running statistics of batch norms.
        """
        parameters = {n: p for n, p in self.named_parameters() if p.requires_grad}
        return parameters | statistics(self)

    def segment(self, x: Tensor, cut: int) -> Tensor:
        """Activations at ``cut``: the output of the stem and blocks ``0..cut-1``."""
        h: Tensor = self.stem(x)
        for block in self.block[:cut]:
            h = block(h)
        return h

    def features(self, x: Tensor) -> Tensor:
        """Features: the output of the last block, in evaluation mode."""
        with evaluating(self):
            return self.segment(x, self.depth)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the model's head: (batch, classes), or (batch, positions, vocabulary)."""
        logits: Tensor = self.head(self.segment(x, self.depth))
        return logits

    def client_layers(self, cut: int) -> list[str]:
        """Names of the layers on a device with this cut, its auxiliary heads included."""
        heads = [f"aux.{depth}" for depth in self.head_depths if depth <= cut]
        return ["stem", *(f"block.{i}" for i in range(cut)), *heads]

    def layers(self) -> list[str]:
        """Names of all layers."""
        return [*self.client_layers(self.depth), "head"]

    def save(self, path: Path) -> None:
        """Write the weights as safetensors, auxiliary heads included.

        Raises:
            ExportError: the file cannot be written.
        """
        tensors = {n: t.detach().cpu().contiguous() for n, t in self.tensors().items()}
        layout = {d: h.channels for d, h in self.aux.items() if isinstance(h, AuxiliaryHead)}
        save_tensors(tensors, path, {"channels": json.dumps(layout)} if layout else None)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; tied tensors appear under their first name only."""
        first: dict[int, str] = {}
        state = self.state_dict(keep_vars=True)
        return {n: t for n, t in state.items() if first.setdefault(id(t), n) == n}

    def load(self, path: Path) -> None:
        """Read weights written by :meth:`save`; adds auxiliary heads that only the file has.

        Raises:
            BundleError: the file cannot be read, or its tensors do not fit the model.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with open(path, "rb"):  # safetensors calls every failure a missing file
                pass
            with safe_open(path, framework="pt") as file:
                layout = json.loads((file.metadata() or {}).get("channels", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise BundleError(f"cannot read the weights {path}: {error}") from error
        for name in tensors:
            head = re.fullmatch(r"aux\.([1-9]\d*)\.norm\.weight", name)
            if head and head[1] not in self.aux:
                self._add_head_like(head[1], tensors, layout.get(head[1]))
        own = self.tensors()
        wrong = [
            f"{name}: {tuple(tensors[name].shape) if name in tensors else 'missing in the file'}"
            f" against {tuple(own[name].shape) if name in own else 'nothing in the model'}"
            for name in sorted(own.keys() | tensors.keys())
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        ]
        if wrong:
            raise BundleError(f"{path} does not fit the model: {'; '.join(wrong[:3])}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])

    def _add_head_like(
        self, depth: str, tensors: dict[str, Tensor], channels: Channels | None
    ) -> None:
        """Add a head of the size that the tensors of a file have.

        Files of earlier versions do not say where activations have their channels.
        """
        if self.task == "tokens":
            self.aux[depth] = TokenHead(len(tensors[f"aux.{depth}.norm.weight"]))
        elif {f"aux.{depth}.hidden.weight", f"aux.{depth}.out.bias"} <= tensors.keys():
            hidden, inputs = tensors[f"aux.{depth}.hidden.weight"].shape
            grid, width = grid_and_width(inputs, hidden)
            classes = len(tensors[f"aux.{depth}.out.bias"])
            channels = channels or self.channels or ("first" if grid > 1 else "last")
            self.aux[depth] = AuxiliaryHead(width, classes, channels, grid)


class ClientSegment(nn.Module):
    """The client segment at a cut: the stem, the first blocks, and the heads up to the cut.

    It shares the parameters of the :class:`SplitModel`, and their names.

    Args:
        model: model to cut.
        cut: cut layer.
        u_shaped: whether the device also holds the model's head, so that labels stay on it.

    Raises:
        ExportError: the cut is outside the model, or there is no auxiliary head up to it.
    """

    def __init__(self, model: SplitModel, cut: int, *, u_shaped: bool = False) -> None:
        super().__init__()
        model.check_cut(cut)
        self.cut = cut
        self.whole = isinstance(model.head, NoHead) and cut == model.depth - 1
        """Whether all blocks are on the device, so that the hub computes nothing."""
        self.task = model.task
        self.stem = model.stem
        self.block = model.block[:cut]
        self.aux = nn.ModuleDict({str(d): model.aux[str(d)] for d in model.head_depths if d <= cut})
        self.channels = model.known_channels(cut)
        """Where the activations have their channels, if the model knows it."""
        self.features: Callable[[Tensor], Tensor] | None = None
        """Maps inputs to features; None if the device does not hold the model's head."""
        if u_shaped:
            self.head = model.head
            self.features = model.features
            self.feature_channels = model.known_channels(model.depth)
        if not self.aux:
            raise ExportError(f"there is no auxiliary head at or before cut {cut}; add one")

    def find_channels(self, example: Tensor) -> Channels | None:
        """Where the activations have their channels, if the model says or the segment shows it.

        A model that is whole on devices has no trunk, and nobody has called ``add_heads`` for it.

        Args:
            example: inputs (batch, ...).
        """
        if self.channels is not None:
            return self.channels
        head = dict(self.aux).get(str(self.cut))
        readers = [] if head is None else [lambda h: answer(head, self.stem, h)]
        with evaluating(self):
            found = find_channels([self.stem, *self.block, *readers], example[:2])[self.cut]
        return None if found == "both" else found

    @property
    def heads(self) -> list[str]:
        """Names of the auxiliary heads, shallowest first."""
        return [f"aux.{depth}" for depth in sorted(map(int, self.aux))]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations at the cut, and logits (heads, batch, classes).

        For ``tokens`` logits are (heads, batch, positions, vocabulary).
        """
        h = self.stem(x)
        read = []
        for depth, block in enumerate(self.block, start=1):
            h = block(h)
            if str(depth) in self.aux:
                read.append((self.aux[str(depth)], h))
        # heads run last: so dropouts of the blocks draw the same masks without them
        return h, torch.stack([answer(head, self.stem, at) for head, at in read])


class NoHead(nn.Module):
    """Placeholder for the head of a model that answers with its last auxiliary head."""

    def forward(self, h: Tensor) -> Tensor:
        """Return ``h``."""
        return h


def answer(head: nn.Module, stem: nn.Module, h: Tensor) -> Tensor:
    """Logits of an auxiliary head; a head for tokens also reads the stem's token table."""
    tables = (stem.embedding.weight,) if isinstance(head, TokenHead) else ()  # type: ignore[union-attr]
    logits: Tensor = head(h, *tables)
    return logits


def statistics(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Running statistics of the batch norms in a module, by name.

    Args:
        module: module to search.
        prefix: prefix of the names.
    """
    return {
        f"{name}.{key}" if name else key: getattr(norm, key)
        for name, norm in module.named_modules(prefix=prefix)
        if isinstance(norm, NormBase) and norm.track_running_stats
        for key in ("running_mean", "running_var")
    }


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore the mode of every module, training or evaluation, at the end of the block."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode inside the block, and restore the mode of every module."""
    with modes_kept(model):
        model.eval()
        yield
