"""The bare PyTorch loop that the trunk is measured against.

It takes the same packed bytes in the same merged steps as the trunk and unpacks them. It runs the
blocks upward with one concatenation at each cut. Loss, backward pass, gradient clipping, optimizer
step (with the default weight decay, of matrices alone), precision and number of threads are those
of the trunk. It checks nothing, reads no loss, and keeps its model from round to round. Its batches
are ready in memory (pinned memory for a GPU), as those of a data loader.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from export.cutting.tied import tied_tensors
from export.packing.codecs import get_codec
from export.steps.optimizers import check_hyper, get_optimizer
from export.steps.weight_decay import decayed_names


@dataclass(frozen=True)
class BareBatch:
    """A packed batch in memory.

    Attributes:
        cut: number of the block that the activations enter.
        codec: codec of the activations.
        parts: the packed tensors by name.
        labels: labels (rows,), or (rows, positions) for texts.
    """

    cut: int
    codec: str
    parts: dict[str, Tensor]
    labels: Tensor

    @classmethod
    def of(cls, cut: int, codec: str, batch: Batch, device: str) -> BareBatch:
        """Prepare a batch, as a device has sent it, for a torch device."""
        assert batch.labels is not None
        parts = {name: _ready(part, device) for name, part in batch.parts.items()}
        return cls(cut, codec, parts, _ready(batch.labels, device))


class BareLoop:
    """Trains the blocks above the cuts of a model.

    Args:
        model: the model with its auxiliary heads; trained in place.
        device: torch device.
        mode: ``fp32``, or ``bf16`` for autocast with weights in float32.
        optimizer: ``sgd`` or ``adamw``.
        rate: learning rate.
        max_norm: maximum norm of the gradients of a step; larger ones are scaled down to it.
    """

    def __init__(
        self,
        model: SplitModel,
        device: str,
        mode: str,
        optimizer: str,
        rate: float,
        max_norm: float,
    ) -> None:
        self._model, self._device, self._mode = model.to(device).train(), device, mode
        self._max_norm = max_norm
        tied = [model.get_parameter(name) for name in tied_tensors(model)]
        model.stem.requires_grad_(False)
        for table in tied:
            table.requires_grad_()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        # tables that heads read decay on the devices
        decayed = decayed_names(model, "matrices") - set(tied_tensors(model))
        self._trained = list(trained.values())
        self._optimizer = get_optimizer(optimizer).reference(
            [p for n, p in trained.items() if n in decayed],
            check_hyper(optimizer, {"lr": rate}),
            [p for n, p in trained.items() if n not in decayed],
        )

    def step(self, batches: Sequence[BareBatch]) -> Tensor:
        """Run one merged step; return the mean loss of a label, as a tensor on the device."""
        entering: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for b in batches:
            parts = {name: self._move(part) for name, part in b.parts.items()}
            h = get_codec(b.codec).unpack(parts)
            entering.setdefault(b.cut, []).append((h, self._move(b.labels)))
        self._optimizer.zero_grad()
        with self._precision():
            loss = self._loss(entering)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._trained, self._max_norm)
        self._optimizer.step()
        return loss.detach()

    def seconds(self, steps: Sequence[Sequence[BareBatch]]) -> float:
        """Run steps; return the seconds until the torch device has finished them."""
        self._wait()
        began = time.perf_counter()
        for batches in steps:
            self.step(batches)
        self._wait()
        return time.perf_counter() - began

    def _loss(self, entering: Mapping[int, Sequence[tuple[Tensor, Tensor]]]) -> Tensor:
        model = self._model
        h, y = torch.empty(0), torch.empty(0)
        losses = []
        for depth in range(min(entering), model.depth):
            if depth in entering:
                below = [(h, y)] if losses or depth > min(entering) else []
                new = [*below, *entering[depth]]
                h, y = torch.cat([h for h, _ in new]), torch.cat([y for _, y in new])
            h = model.block[depth](h)
            if str(depth + 1) in model.aux:
                losses.append(_sum(model.answer(depth + 1, h), y))
        losses.append(_sum(model.head(h), y))
        return torch.stack(losses).sum() / y.numel()

    def _precision(self) -> AbstractContextManager[object]:
        if self._mode == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self._device).type, torch.bfloat16)

    def _move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device, non_blocking=True)

    def _wait(self) -> None:
        if torch.device(self._device).type == "cuda":
            torch.cuda.synchronize()


def _ready(array: Array, device: str) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def _sum(logits: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy, summed over all labels."""
    return cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
