"""Models and batches of the GPU check; they need only torch and numpy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from benchmarks.bare_loop import BareBatch
from benchmarks.resnet import build as build_resnet
from edge_sdk.protocol.batch import Batch
from export.cutting.channels import channel_axis
from export.cutting.split_model import SplitModel
from export.packing.codecs import get_codec
from server_hub.trunk.interface import StepInput

CODEC = "int8"
"""Codec of the activations."""


class Gpt2Stem(nn.Module):
    """Token and position embeddings."""

    def __init__(self, width: int, vocabulary: int, length: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(length, width)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embedding(x) + self.position.weight[: x.shape[1]]
        return h


class Gpt2Block(nn.Module):
    """A block of GPT-2: LayerNorm before the attention and before the multilayer perceptron."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h_BTD: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(h_BTD)).chunk(3, 2)
        )
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True)
        h_BTD = h_BTD + self.out(mixed.transpose(1, 2).flatten(2))
        up = self.up(self.norm2(h_BTD))
        h_BTD = h_BTD + self.down(gelu(up, approximate="tanh"))
        return h_BTD


@dataclass(frozen=True)
class Shape:
    """The shape of a model and of its inputs.

    Attributes:
        name: ``conv`` for a ResNet-18 with GroupNorm, ``gpt2`` for a model like GPT-2.
        width: channels of the first stage of ``conv``; width of the activations of ``gpt2``.
        blocks: number of blocks of ``gpt2``; a ResNet-18 has 8.
        classes: number of classes of ``conv``; size of the vocabulary of ``gpt2``.
        size: rows and columns of an image; positions of a text.
        cuts: cut layers.
    """

    name: str
    width: int
    blocks: int
    classes: int
    size: int
    cuts: tuple[int, ...]

    @property
    def texts(self) -> bool:
        """Whether inputs are texts."""
        return self.name == "gpt2"

    @property
    def samples_per_row(self) -> int:
        """Number of samples of a row: 1 for an image, the number of tokens for a text."""
        return self.size if self.texts else 1

    def model(self, heads: Sequence[int] | None = None) -> SplitModel:
        """Build the model, always the same, with auxiliary heads at its cuts, or at ``heads``."""
        torch.manual_seed(0)
        if self.texts:
            blocks = [Gpt2Block(self.width, max(self.width // 64, 2)) for _ in range(self.blocks)]
            head = nn.Sequential(
                nn.LayerNorm(self.width), nn.Linear(self.width, self.classes, bias=False)
            )
            stem = Gpt2Stem(self.width, self.classes, self.size)
            model = SplitModel(stem, blocks, head, "tokens")
        else:
            model = build_resnet(self.width, self.classes)
        example = torch.from_numpy(self.inputs(2, np.random.default_rng(0))[0])
        model.add_heads(self.cuts if heads is None else heads, example, self.classes)
        return model

    def inputs(
        self, rows: int, rng: np.random.Generator, size: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return random inputs (rows, ...), and labels (rows,), or (rows, positions) for texts.

        A text has ``size`` positions, or those of the shape if ``size`` is not given.
        """
        if self.texts:
            tokens = rng.integers(self.classes, size=(rows, (size or self.size) + 1))
            return tokens[:, :-1].copy(), tokens[:, 1:].copy()
        x = rng.standard_normal((rows, 3, self.size, self.size)).astype(np.float32)
        return x, rng.integers(self.classes, size=rows)


@torch.no_grad()
def packed_batch(model: SplitModel, cut: int, x: np.ndarray, y: np.ndarray) -> Batch:
    """Return a batch as a device sends it, computed on the model's device in its precision."""
    parameter = next(model.parameters())
    inputs = torch.from_numpy(x).to(parameter.device)
    if inputs.is_floating_point():
        inputs = inputs.to(parameter.dtype)
    h = model.segment(inputs, cut)
    parts = get_codec(CODEC).pack(h, channel_axis(h, model.channels_at(cut, inputs)))
    return Batch(parts={n: part.cpu().numpy() for n, part in parts.items()}, labels=y)


def unpacked(batch: Batch, device: str) -> tuple[Tensor, Tensor]:
    """Return the activations of a batch as the trunk unpacks them, and the labels."""
    parts = {n: torch.from_numpy(np.array(part)).to(device) for n, part in batch.parts.items()}
    return get_codec(CODEC).unpack(parts), torch.from_numpy(np.array(batch.labels)).to(device)


def step_input(
    device: str, cut: int, batch: Batch, weight: float = 1.0, replica: str = "shared"
) -> StepInput:
    """Return a batch of a device as an input of the trunk's step."""
    return StepInput(device, replica, cut, CODEC, batch, weight)


@dataclass(frozen=True)
class MergedStep:
    """The same batches as inputs of the trunk's step and of the bare loop's step."""

    inputs: list[StepInput]
    bare: list[BareBatch]


def merged_step(
    shape: Shape, model: SplitModel, devices: int, rows: int, seed: int, device: str
) -> MergedStep:
    """Return batches of ``devices`` devices, ``rows`` rows each, spread evenly over the cuts."""
    rng = np.random.default_rng(seed)
    inputs, bare = [], []
    for number in range(devices):
        cut = shape.cuts[number % len(shape.cuts)]
        batch = packed_batch(model, cut, *shape.inputs(rows, rng))
        bare.append(BareBatch.of(cut, CODEC, batch, device))
        # Both share their memory, which is pinned for a GPU, as the hub's shared memory is.
        parts = {name: part.numpy() for name, part in bare[-1].parts.items()}
        batch = replace(batch, parts=parts, labels=bare[-1].labels.numpy())
        inputs.append(step_input(f"device-{number}", cut, batch))
    return MergedStep(inputs, bare)


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute products and convolutions of float32 without TF32 in this context."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
