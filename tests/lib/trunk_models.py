"""Small models for the tests of the trunk, and plain PyTorch to compare it with.

They live in a module of their own so that a worker process can import them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from server_hub.trunk.interface import StepInput, TrunkCopy

DEPTH = 4
WIDTH = 6
CLASSES = 3


class DenseBlock(nn.Module):
    """A linear layer with a skip connection, so that large values pass through."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class ConvBlock(nn.Module):
    """A 3x3 convolution with GroupNorm and a skip connection."""

    def __init__(self, channels: int = WIDTH) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm = nn.GroupNorm(2, channels)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.relu(self.norm(self.conv(h)))


class PooledHead(nn.Module):
    """Global average pool and a linear layer."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.out = nn.Linear(channels, classes)

    def forward(self, h: Tensor) -> Tensor:
        logits: Tensor = self.out(h.mean((2, 3)))
        return logits


class SleepingBlock(DenseBlock):
    """A block that sleeps."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, h: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().forward(h)


class DyingBlock(DenseBlock):
    """A block that ends its process, or sleeps, when seven rows pass."""

    def __init__(self, sleeps: bool = False) -> None:
        super().__init__()
        self.sleeps = sleeps

    def forward(self, h: Tensor) -> Tensor:
        if len(h) == 7 and self.sleeps:
            time.sleep(30.0)
        elif len(h) == 7:
            os._exit(7)
        return super().forward(h)


POISON = 0.77001953125
"""A value that float16 holds exactly, and that is not large enough to be shortened."""


class FragileBlock(DenseBlock):
    """A block that ends its process when a value is :data:`POISON`."""

    def forward(self, h: Tensor) -> Tensor:
        if (h == POISON).any():
            os._exit(7)
        return super().forward(h)


def poisoned(arrival: StepInput, value: float = POISON) -> StepInput:
    """An arrival in fp16 with one value replaced."""
    parts = {name: np.array(part) for name, part in arrival.batch.parts.items()}
    parts["h"].flat[0] = value
    return replace(arrival, batch=replace(arrival.batch, parts=parts))


class BusyBlock(DenseBlock):
    """A block that keeps the processor busy, in torch and in Python."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def forward(self, h: Tensor) -> Tensor:
        matrix = torch.eye(256)
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            matrix = matrix @ matrix
            sum(range(10_000))
        return super().forward(h)


def dense_model(heads: Iterable[int] = (1, 2, 3), seed: int = 0) -> SplitModel:
    """Inputs (batch, 5), 4 blocks of width 6, 3 classes."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh())
    model = SplitModel(stem, [DenseBlock() for _ in range(DEPTH)], nn.Linear(WIDTH, CLASSES))
    model.add_heads(heads, torch.zeros(1, 5), CLASSES)
    return model


def conv_model(heads: Iterable[int] = (1, 2, 3), seed: int = 0) -> SplitModel:
    """Inputs (batch, 1, 6, 6), 4 blocks of 6 channels, 3 classes."""
    torch.manual_seed(seed)
    stem = nn.Sequential(nn.Conv2d(1, WIDTH, 3, 1, 1), nn.ReLU())
    model = SplitModel(stem, [ConvBlock() for _ in range(DEPTH)], PooledHead(WIDTH, CLASSES))
    model.add_heads(heads, torch.zeros(1, 1, 6, 6), CLASSES)
    return model


def slow_model(block: DenseBlock) -> SplitModel:
    """Like :func:`dense_model` without auxiliary heads, with a slow last block."""
    torch.manual_seed(0)
    blocks = [*(DenseBlock() for _ in range(DEPTH - 1)), block]
    return SplitModel(nn.Linear(5, WIDTH), blocks, nn.Linear(WIDTH, CLASSES))


def model_with_a_lambda() -> SplitModel:
    """:func:`dense_model`, but it cannot be pickled."""
    model = dense_model()
    model.head.register_forward_hook(lambda module, inputs, output: output)
    return model


def no_model() -> SplitModel:
    """Fail to build a model."""
    raise ConfigError("there is no such model")


def state_of(model: nn.Module) -> dict[str, Array]:
    """A copy of a model's parameters."""
    return {name: p.detach().cpu().numpy().copy() for name, p in model.named_parameters()}


def inputs(model: SplitModel, rows: int, seed: int) -> tuple[Array, Array]:
    """Random inputs for a model of this module, and labels."""
    rng = np.random.default_rng(seed)
    shape = (5,) if isinstance(model.head, nn.Linear) else (1, 6, 6)
    x = rng.standard_normal((rows, *shape)).astype(np.float32)
    x += rng.standard_normal((rows, *(1 for _ in shape))).astype(np.float32)
    return x, rng.integers(0, CLASSES, rows)


def activations(model: SplitModel, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random activations that fit every cut of a model of this module, and labels."""
    rng = np.random.default_rng(seed)
    shape = (WIDTH,) if isinstance(model.head, nn.Linear) else (WIDTH, 6, 6)
    h = torch.from_numpy(rng.standard_normal((rows, *shape)).astype(np.float32))
    return h, torch.from_numpy(rng.integers(0, CLASSES, rows))


def step_input(
    device: str,
    replica: str,
    cut: int,
    codec: str,
    parts: Mapping[str, Array],
    labels: Array | None,
    weight: float = 1.0,
    *,
    shape: tuple[int, ...] = (),
    head_gradient: HeadGradient | None = None,
    **batch: Any,
) -> StepInput:
    """A batch on its way into a step; ``batch`` has further fields of :class:`Batch`."""
    return StepInput(
        device, replica, cut, codec, Batch(dict(parts), labels, **batch), weight, shape,
        head_gradient,
    )  # fmt: skip


def arrival_of(
    model: SplitModel,
    cut: int,
    rows: int,
    seed: int,
    device: str = "",
    replica: str = "shared",
    codec: str = "int8",
    weight: float = 1.0,
) -> StepInput:
    """An arrival with random activations."""
    h, labels = activations(model, rows, seed)
    packed = get_codec(codec).pack(h, 1)
    parts = {name: part.numpy() for name, part in packed.items()}
    return step_input(
        device or f"device-{seed}", replica, cut, codec, parts, labels.numpy(), weight
    )  # fmt: skip


def unpacked(arrival: StepInput) -> tuple[Tensor, Tensor]:
    """The activations of an arrival as the trunk sees them, and the labels."""
    parts = {name: torch.from_numpy(part) for name, part in arrival.batch.parts.items()}
    return get_codec(arrival.codec).unpack(parts), torch.from_numpy(arrival.batch.labels)


def plain_logits(model: SplitModel, h: Tensor, cut: int) -> list[Tensor]:
    """Logits of the auxiliary heads above ``cut``, then of the head: one loop, nothing merged."""
    logits = []
    for depth in range(cut, len(model.block)):
        h = model.block[depth](h)
        if str(depth + 1) in model.aux:
            logits.append(model.aux[str(depth + 1)](h))
    return [*logits, model.head(h)]


def plain_row_losses(model: SplitModel, h: Tensor, labels: Tensor, cut: int) -> Tensor:
    """Summed cross-entropy of the heads above ``cut`` of each row."""
    losses = [cross_entropy(z, labels, reduction="none") for z in plain_logits(model, h, cut)]
    return torch.stack(losses).sum(0)


def plain_step(
    model: SplitModel, optimizer: torch.optim.Optimizer, arrivals: Sequence[StepInput]
) -> float:
    """One step on the arrivals with one backward pass each; returns the mean loss per row."""
    rows = sum(a.rows for a in arrivals)
    optimizer.zero_grad()
    total = 0.0
    for arrival in arrivals:
        losses = plain_row_losses(model, *unpacked(arrival), arrival.cut)
        (losses.sum() * arrival.weight / rows).backward()
        total += losses.sum().item()
    optimizer.step()
    return total / rows


def layers_above(model: SplitModel, cut: int) -> set[str]:
    """Layers that rows entering at ``cut`` pass."""
    blocks = {f"block.{i}" for i in range(cut, len(model.block))}
    return blocks | {f"aux.{d}" for d in map(int, model.aux) if d > cut} | {"head"}


def by_layer(copies: Iterable[TrunkCopy], replica: str = "shared") -> dict[str, TrunkCopy]:
    """The copies of one replica by layer."""
    return {copy.layer: copy for copy in copies if copy.replica == replica}


def tensors_of(copies: Iterable[TrunkCopy], replica: str = "shared") -> dict[str, Array]:
    """All tensors that one replica trained."""
    mine = by_layer(copies, replica).values()
    return {name: tensor for copy in mine for name, tensor in copy.tensors.items()}
