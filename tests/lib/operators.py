"""The operator matrix: small models whose export shows which operators are exact.

``python -m tests.lib.operators`` exports all models and prints the matrix as a Markdown table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.cutting.channels import Channels
from export.cutting.checks import check_parameters, check_stages
from export.cutting.input_ranges import find_ranges
from export.cutting.split_model import ClientSegment, SplitModel, Task
from export.lowering.graph_files import RuntimeName, lower
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.predict import predict
from export.steps.train import train
from tests.lib.graph_runs import run_files, verify
from tests.lib.models import TokenBlock
from tests.lib.oracle import check_step

CLASSES = 5
WORDS = 11
WIDTH = 8

Build = Callable[[], tuple[SplitModel, Tensor]]
"""Builds a model that is cut after its first block, and inputs for it."""


@dataclass(frozen=True)
class Case:
    """A row of the matrix: operators, and a model that uses them.

    Attributes:
        group: kind of operators.
        name: names of the operators.
        build: builds the model.
        onnx: part of the message that refuses the export to ONNX; empty if the export is exact.
        executorch: the same for ExecuTorch.
        note: remark for the table.
    """

    group: str
    name: str
    build: Build
    onnx: str = ""
    executorch: str = ""
    note: str = ""

    def refusal(self, runtime: RuntimeName) -> str:
        """Part of the message that refuses the export to a runtime; empty if it is exact."""
        return self.onnx if runtime == "onnx" else self.executorch


def steps_of(case: Case, runtime: RuntimeName) -> tuple[ClientSteps, Tensor]:
    """The steps of a case, and example inputs.

    Raises:
        ExportError: a module or a parameter is refused.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = case.build()
    classes = WORDS if model.task == "tokens" else CLASSES
    model.add_heads([1], example, classes)
    segment = ClientSegment(model, 1)
    check_stages(model, 1, example)
    check_parameters(segment, example)
    ranges = find_ranges(model, example)
    limits = {} if ranges.longest is None else {"seq": ranges.longest}
    if runtime == "executorch":
        limits = {"batch": 8} | ({} if example.is_floating_point() else {"seq": example.shape[1]})
    codec = get_codec("fp16")
    steps = ClientSteps(segment, get_optimizer("sgd"), codec, example, classes, limits)
    return steps, example


def check(case: Case, runtime: RuntimeName) -> None:
    """Lower the steps of a case, verify them, and compare them by the independent oracle.

    The graph ``train`` has the operators of ``predict``, unless evaluation is another function.

    Raises:
        ExportError: a module is refused, an operator has no translation, or the check of the
            exporter refuses a graph.
        Wrong: a graph that the exporter has accepted is wrong.
    """
    steps, example = steps_of(case, runtime)
    compared = [train(steps)]
    if steps.random_calls or steps.statistics or any(_fast(m) for m in steps.segment.modules()):
        compared.append(predict(steps))
    lowered = lower(runtime, compared, {})
    for step in compared:
        run = run_files(runtime, lowered)
        verify(steps, step, run, example)
        check_step(steps, step, run, example)


def _fast(module: nn.Module) -> bool:
    """Whether a module computes inference differently from training."""
    return isinstance(module, nn.MultiheadAttention)


# Models.


class Chain(nn.Module):
    """Modules and functions in order; the first of several results is passed on."""

    def __init__(self, *parts: Callable[..., Any]) -> None:
        super().__init__()
        self.parts = [part if not isinstance(part, nn.Module) else None for part in parts]
        self.modules_ = nn.ModuleList(p for p in parts if isinstance(p, nn.Module))

    def forward(self, h: Tensor) -> Tensor:
        """Output of the last part."""
        modules = iter(self.modules_)
        for part in self.parts:
            h = part(h) if part is not None else next(modules)(h)
            h = h[0] if isinstance(h, tuple) else h
        return h


class Residual(Chain):
    """A chain whose result is added to its input, or to ``skip`` of the input."""

    def __init__(self, *parts: Callable[..., Any], skip: nn.Module | None = None) -> None:
        super().__init__(*parts)
        self.skip = skip or nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        """The sum."""
        result: Tensor = self.skip(h) + super().forward(h)
        return result


def noise(*shape: int) -> Tensor:
    """Random inputs from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def images(*parts: Callable[..., Any]) -> Build:
    """A convolution, then these parts, on 4 channels of 8 x 7."""

    def build() -> tuple[SplitModel, Tensor]:
        model = SplitModel(
            nn.Conv2d(2, 4, 3, padding=1), [Chain(*made(parts)), nn.Identity()], nn.Identity()
        )
        return model, noise(8, 2, 8, 7)

    return build


def signals(*parts: Callable[..., Any]) -> Build:
    """A 1-d convolution, then these parts, on 4 channels of length 12."""

    def build() -> tuple[SplitModel, Tensor]:
        stem, block = nn.Conv1d(3, 4, 3, padding=1), Chain(*made(parts))
        model = SplitModel(stem, [block, nn.Identity()], nn.Identity(), channels="first")
        return model, noise(8, 3, 12)

    return build


def sensors(*parts: Callable[..., Any]) -> Build:
    """These parts on readings (batch, time, channels) of 3 x 3."""

    def build() -> tuple[SplitModel, Tensor]:
        model = SplitModel(nn.Identity(), [Chain(*made(parts)), nn.Identity()], nn.Identity())
        return model, noise(8, 3, 3)

    return build


def vectors(*parts: Callable[..., Any], channels: Channels | None = None) -> Build:
    """A Linear, then these parts, on vectors of 8."""

    def build() -> tuple[SplitModel, Tensor]:
        blocks = [Chain(*made(parts)), nn.Identity()]
        model = SplitModel(nn.Linear(5, 8), blocks, nn.Identity(), channels=channels)
        return model, noise(8, 5)

    return build


class Stem(nn.Module):
    """Token embeddings, plus position embeddings if ``longest`` is above 0."""

    def __init__(self, longest: int = 0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.position = nn.Embedding(longest, WIDTH) if longest else None

    def forward(self, x: Tensor) -> Tensor:
        """(batch, positions) -> (batch, positions, width)."""
        h: Tensor = self.embedding(x)
        if self.position is not None:
            h = h + self.position(torch.arange(x.shape[1], device=x.device))
        return h


def texts(*parts: Callable[..., Any], task: Task = "classes", longest: int = 0) -> Build:
    """Embeddings, then a block of these parts and a residual around them."""

    def build() -> tuple[SplitModel, Tensor]:
        block = Residual(nn.LayerNorm(WIDTH), *made(parts))
        model = SplitModel(Stem(longest), [block, nn.Identity()], nn.Identity(), task)
        generator = torch.Generator().manual_seed(1)
        return model, torch.randint(WORDS, (8, 6), generator=generator)

    return build


def made(parts: tuple[Callable[..., Any], ...]) -> list[Callable[..., Any]]:
    """Return the parts; each ``Lazy`` one is built now, with the seed and anew for every model."""
    return [part.make() if isinstance(part, Lazy) else part for part in parts]


def words(*parts: Callable[..., Any], length: int = 6) -> Build:
    """Embeddings of 6 tokens, then a block of these parts."""

    def build() -> tuple[SplitModel, Tensor]:
        model = SplitModel(Stem(), [Chain(*made(parts)), nn.Identity()], nn.Identity())
        generator = torch.Generator().manual_seed(1)
        return model, torch.randint(WORDS, (8, length), generator=generator)

    return build


class Lazy:
    """A module that is built together with its model."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self.make = make

    def __call__(self, h: Tensor) -> Tensor:
        raise TypeError("a lazy part must be made first")


class Attention(nn.Module):
    """Self-attention of two heads in one of several forms, on (batch, positions, width).

    Args:
        form: ``causal``, ``mask`` (boolean), ``bias`` (added), ``eager`` (written out), ``rotary``
            or ``grouped`` (two query heads for a head of keys).
        dropout: of the attention's weights.
    """

    def __init__(self, form: str, dropout: float = 0.0) -> None:
        super().__init__()
        self.form, self.dropout = form, dropout
        shared = WIDTH // 2 if form == "grouped" else WIDTH
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, shared)
        self.value, self.out = nn.Linear(WIDTH, shared), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        size = WIDTH // 2
        rows, length, _ = h.shape
        q, k, v = (
            layer(h).view(rows, length, -1, size).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        p = self.dropout if self.training else 0.0
        place = torch.arange(length, device=h.device)
        near = (place[:, None] - place[None, :]).abs() < 3
        if self.form == "rotary":
            q, k = rotated(q, place), rotated(k, place)
        if self.form == "eager":
            scores = q @ k.transpose(2, 3) / math.sqrt(size)
            scores = scores.masked_fill(~near, float("-inf"))
            mixed = F.dropout(scores.softmax(-1), p, self.training) @ v
        elif self.form == "mask":
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=near, dropout_p=p)
        elif self.form == "bias":
            bias = -(place[:, None] - place[None, :]).abs().to(h.dtype)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
        else:
            mixed = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, dropout_p=p, enable_gqa=self.form == "grouped"
            )
        result: Tensor = self.out(mixed.transpose(1, 2).reshape(rows, length, WIDTH))
        return result


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """Rotary position embedding of (batch, heads, positions, size)."""
    half = x.shape[-1] // 2
    speed = 10.0 ** -torch.arange(half, device=x.device)
    angle = place[:, None] * torch.cat([speed, speed])
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angle.cos().to(x.dtype) + turned * angle.sin().to(x.dtype)


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` as self-attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = self.attention(h, h, h, need_weights=False)[0]
        return result


class Excite(nn.Module):
    """Squeeze and excitation of 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h * torch.sigmoid(self.up(torch.relu(self.down(self.pool(h)))))


class DropPath(nn.Module):
    """Drops whole examples of a residual branch in training.

    Args:
        form: how the mask is drawn: ``bernoulli`` (as timm) or ``floor`` (as older models).
    """

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        if not self.training:
            return h
        shape = (h.shape[0],) + (1,) * (h.dim() - 1)
        if self.form == "bernoulli":
            mask = h.new_empty(shape).bernoulli_(0.7)
            return h * mask.div_(0.7)
        mask = 0.7 + torch.rand(shape, dtype=h.dtype, device=h.device)
        return h.div(0.7) * mask.floor_()


class Noise(nn.Module):
    """Multiplies by random numbers in training.

    Args:
        draw: draws numbers like the activations.
    """

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h * self.draw(h) if self.training else h


def weight_normed(module: nn.Module, **options: Any) -> nn.Module:
    """The module with its weight as direction and length."""
    normed: nn.Module = nn.utils.parametrizations.weight_norm(module, **options)
    return normed


def frozen(module: nn.Module) -> nn.Module:
    """The module with every parameter frozen."""
    return module.requires_grad_(False)


class FrozenNorm(nn.BatchNorm2d):
    """A batch norm that stays in evaluation mode, as in fine-tuned detectors."""

    def train(self, mode: bool = True) -> FrozenNorm:
        """Set evaluation mode, ignoring ``mode``."""
        super().train(False)
        return self


def adapted(build: Build, *targets: str) -> Build:
    """Return ``build`` with PEFT LoRA on a frozen base; the up-projection is not zero."""

    def with_adapters() -> tuple[SplitModel, Tensor]:
        from peft import LoraConfig, inject_adapter_in_model

        model, example = build()
        transposed = any(type(m).__name__ == "Conv1D" for m in model.modules())
        config = LoraConfig(
            r=2, lora_alpha=4, target_modules=list(targets), fan_in_fan_out=transposed
        )
        inject_adapter_in_model(config, model)
        for name, parameter in model.named_parameters():
            if "lora_" in name and not parameter.any():
                nn.init.normal_(parameter, std=0.1)
        return model, example

    return with_adapters


def conv1d_of_transformers() -> nn.Module:
    """GPT-2's linear layer, whose weight is transposed."""
    from transformers.pytorch_utils import Conv1D

    return Conv1D(WIDTH, WIDTH)


def seeded_table() -> tuple[SplitModel, Tensor]:
    """A model whose frozen embedding gets adapters."""
    return texts(Lazy(lambda: nn.Linear(WIDTH, WIDTH)))()


# The matrix.

CASES: tuple[Case, ...] = (
    Case(
        "convolution",
        "Conv2d: stride, padding, dilation",
        images(
            Lazy(lambda: nn.Conv2d(4, 4, 3, 2, 1)),
            nn.Tanh(),
            Lazy(lambda: nn.Conv2d(4, 6, 2, dilation=2, bias=False)),
        ),
    ),
    Case(
        "convolution",
        "Conv2d: groups, depthwise",
        images(
            Lazy(lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1)),
            nn.Tanh(),
            Lazy(lambda: nn.Conv2d(4, 6, 3, 2, groups=2)),
        ),
    ),
    Case(
        "convolution",
        "Conv2d: padding same, circular, reflect, replicate",
        images(
            Lazy(lambda: nn.Conv2d(4, 4, (2, 3), padding="same")),
            nn.Tanh(),
            Lazy(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
            nn.Tanh(),
            Lazy(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")),
            nn.Tanh(),
            Lazy(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate")),
        ),
    ),
    Case(
        "convolution",
        "Conv1d: stride, dilation, groups, padding same, circular",
        signals(
            Lazy(lambda: nn.Conv1d(4, 4, 3, dilation=2, groups=2)),
            nn.Tanh(),
            Lazy(lambda: nn.Conv1d(4, 4, 4, padding="same")),
            nn.Tanh(),
            Lazy(lambda: nn.Conv1d(4, 6, 3, 2, 1, padding_mode="circular")),
        ),
    ),
    Case(
        "convolution",
        "ConvTranspose1d",
        signals(Lazy(lambda: nn.ConvTranspose1d(4, 4, 3, 2, 1, 1))),
    ),
    Case(
        "convolution",
        "ConvTranspose2d",
        images(Lazy(lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2))),
    ),
    Case(
        "norm",
        "BatchNorm2d",
        images(Lazy(lambda: nn.BatchNorm2d(4)), nn.Tanh()),
        note="running statistics are state; hub and devices average them",
    ),
    Case(
        "norm",
        "BatchNorm1d",
        signals(Lazy(lambda: nn.BatchNorm1d(4, momentum=0.3)), nn.Tanh()),
    ),
    Case(
        "norm",
        "BatchNorm2d, frozen, evaluated",
        images(Lazy(lambda: frozen(FrozenNorm(4))), nn.Tanh()),
        note="train() must keep it in evaluation mode; its statistics travel and stay",
    ),
    Case(
        "norm",
        "BatchNorm2d with frozen weights, in training; without statistics",
        images(
            Lazy(lambda: frozen(nn.BatchNorm2d(4))),
            nn.Tanh(),
            Lazy(lambda: nn.BatchNorm2d(4, track_running_stats=False)),
            nn.Tanh(),
        ),
        note="normalises by the batch and moves its statistics, as in PyTorch",
    ),
    Case(
        "norm",
        "GroupNorm, InstanceNorm2d",
        images(
            Lazy(lambda: nn.GroupNorm(2, 4)),
            nn.Tanh(),
            Lazy(lambda: nn.InstanceNorm2d(4, affine=True)),
            nn.Tanh(),
        ),
    ),
    Case(
        "norm",
        "LayerNorm, RMSNorm",
        vectors(Lazy(lambda: nn.LayerNorm(8)), nn.Tanh(), Lazy(lambda: nn.RMSNorm(8))),
    ),
    Case(
        "norm",
        "LocalResponseNorm",
        images(nn.LocalResponseNorm(3, alpha=0.1)),
        onnx="avg_pool3d_backward",
        executorch="no kernel for aten::avg_pool3d.out",
    ),
    Case(
        "norm",
        "BatchNorm1d of vectors",
        vectors(Lazy(lambda: nn.BatchNorm1d(8)), nn.Tanh()),
        note="as in PyTorch, training needs two rows",
    ),
    Case(
        "norm",
        "weight_norm: Conv1d, Linear",
        signals(
            Lazy(lambda: weight_normed(nn.Conv1d(4, 4, 3, padding=2, dilation=2))),
            nn.Tanh(),
            Lazy(lambda: weight_normed(nn.Linear(12, 3), dim=None)),
        ),
    ),
    Case(
        "norm",
        "weight_norm by hooks: Conv1d",
        signals(Lazy(lambda: nn.utils.weight_norm(nn.Conv1d(4, 4, 3))), nn.Tanh()),
    ),
    Case(
        "norm",
        "spectral_norm",
        vectors(Lazy(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)))),
        onnx="power iteration",
        executorch="power iteration",
    ),
    Case(
        "activation",
        "ReLU, ReLU6, LeakyReLU, PReLU",
        vectors(
            nn.ReLU(),
            Lazy(lambda: nn.Linear(8, 8)),
            nn.ReLU6(),
            Lazy(lambda: nn.Linear(8, 8)),
            nn.LeakyReLU(0.1),
            Lazy(lambda: nn.PReLU()),
        ),
    ),
    Case(
        "activation",
        "GELU, GELU (tanh)",
        vectors(nn.GELU(), Lazy(lambda: nn.Linear(8, 8)), nn.GELU("tanh")),
    ),
    Case(
        "activation",
        "SiLU, Mish, Softplus",
        vectors(nn.SiLU(), Lazy(lambda: nn.Linear(8, 8)), nn.Mish(), nn.Softplus()),
    ),
    Case(
        "activation",
        "Hardswish, Hardsigmoid, Hardtanh",
        vectors(nn.Hardswish(), Lazy(lambda: nn.Linear(8, 8)), nn.Hardsigmoid(), nn.Hardtanh()),
    ),
    Case(
        "activation",
        "Tanh, Sigmoid, ELU, CELU, SELU",
        vectors(nn.Tanh(), nn.ELU(), nn.CELU(), nn.SELU(), nn.Sigmoid()),
    ),
    Case(
        "activation",
        "Softmax, LogSoftmax, GLU",
        vectors(Lazy(lambda: nn.Linear(8, 16)), nn.GLU(), nn.Softmax(-1), nn.LogSoftmax(-1)),
    ),
    Case(
        "activation",
        "in place (ReLU, SiLU)",
        vectors(nn.ReLU(inplace=True), Lazy(lambda: nn.Linear(8, 8)), nn.SiLU(inplace=True)),
    ),
    Case(
        "pooling",
        "MaxPool2d: overlapping, ceil_mode, dilation",
        images(nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, ceil_mode=True)),
    ),
    Case(
        "pooling",
        "AvgPool2d: overlapping, ceil_mode",
        images(
            nn.AvgPool2d(3, 2, 1),
            nn.Tanh(),
            nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False),
        ),
    ),
    Case(
        "pooling",
        "MaxPool1d, AvgPool1d",
        signals(nn.MaxPool1d(3, 2, 1), nn.Tanh(), nn.AvgPool1d(2)),
    ),
    Case(
        "pooling",
        "AdaptiveAvgPool1d, AdaptiveAvgPool2d",
        signals(
            nn.AdaptiveAvgPool1d(5),
            nn.Tanh(),
            lambda h: h.unsqueeze(2),
            nn.AdaptiveAvgPool2d((1, 2)),
        ),
    ),
    Case(
        "pooling",
        "AdaptiveMaxPool2d",
        images(nn.AdaptiveMaxPool2d((4, 1))),
        note="sizes that divide the input's",
    ),
    Case("pooling", "LPPool2d", images(nn.Softplus(), nn.LPPool2d(2, 2))),
    Case("shape", "Upsample: nearest", images(nn.Upsample(scale_factor=2), nn.Tanh())),
    Case(
        "shape",
        "Upsample: bilinear",
        images(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh()),
    ),
    Case(
        "shape",
        "PixelShuffle, PixelUnshuffle",
        images(nn.PixelShuffle(2), nn.Tanh(), lambda h: h[..., :6], nn.PixelUnshuffle(2)),
    ),
    Case(
        "shape",
        "pad, roll, flip, cat, chunk, slices",
        images(
            lambda h: F.pad(h, (1, 2)),
            lambda h: h.roll(1, 3).flip(2),
            lambda h: torch.cat(h.chunk(2, 1)[::-1], 1),
            lambda h: h[:, :, ::2, 1:-1],
        ),
    ),
    Case(
        "shape",
        "einsum, unfold, cumsum",
        vectors(
            lambda h: torch.einsum("bi,bj->bij", h, h),
            lambda h: h.unfold(2, 3, 2).sum(-1),
            lambda h: h.cumsum(1) * 0.1,
            channels="last",
        ),
    ),
    Case(
        "shape",
        "Unflatten, Flatten, Linear",
        vectors(nn.Unflatten(1, (2, 4)), Lazy(lambda: nn.Linear(4, 3)), nn.Flatten()),
    ),
    Case("block", "squeeze and excitation", images(Lazy(Excite))),
    Case(
        "block",
        "residual with a stride, BatchNorm (ResNet)",
        images(
            Lazy(
                lambda: Residual(
                    nn.Conv2d(4, 6, 3, 2, 1, bias=False),
                    nn.BatchNorm2d(6),
                    nn.ReLU(),
                    nn.Conv2d(6, 6, 3, padding=1, bias=False),
                    nn.BatchNorm2d(6),
                    skip=nn.Sequential(nn.Conv2d(4, 6, 1, 2, bias=False), nn.BatchNorm2d(6)),
                )
            ),
            nn.ReLU(),
        ),
    ),
    Case(
        "block",
        "inverted residual, BatchNorm, ReLU6 (MobileNetV2)",
        images(
            Lazy(
                lambda: Residual(
                    nn.Conv2d(4, 8, 1, bias=False),
                    nn.BatchNorm2d(8),
                    nn.ReLU6(),
                    nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
                    nn.BatchNorm2d(8),
                    nn.ReLU6(),
                    nn.Conv2d(8, 4, 1, bias=False),
                    nn.BatchNorm2d(4),
                )
            )
        ),
    ),
    Case(
        "block",
        "Conv2d with bias before BatchNorm2d",
        images(Lazy(lambda: nn.Conv2d(4, 4, 3)), Lazy(lambda: nn.BatchNorm2d(4)), nn.ReLU()),
        note="the bias has no gradient but rounding",
    ),
    Case(
        "attention",
        "scaled_dot_product_attention: causal",
        texts(Lazy(lambda: Attention("causal"))),
    ),
    Case(
        "attention",
        "scaled_dot_product_attention: boolean mask, additive mask",
        texts(Lazy(lambda: Attention("mask")), Lazy(lambda: Attention("bias"))),
    ),
    Case(
        "attention",
        "scaled_dot_product_attention: grouped queries",
        texts(Lazy(lambda: Attention("grouped"))),
    ),
    Case("attention", "written out, masked", texts(Lazy(lambda: Attention("eager")))),
    Case("attention", "rotary positions", texts(Lazy(lambda: Attention("rotary")))),
    Case("recurrent", "LSTM", sensors(Lazy(lambda: nn.LSTM(3, 4, batch_first=True)))),
    Case(
        "recurrent",
        "LSTM: 2 layers, bidirectional",
        sensors(Lazy(lambda: nn.LSTM(3, 3, 2, batch_first=True, bidirectional=True))),
    ),
    Case(
        "recurrent",
        "GRU: bidirectional",
        sensors(Lazy(lambda: nn.GRU(3, 3, batch_first=True, bidirectional=True))),
    ),
    Case(
        "recurrent",
        "LSTM, GRU: time first",
        sensors(
            lambda h: h.transpose(0, 1),
            Lazy(lambda: nn.LSTM(3, 4)),
            Lazy(lambda: nn.GRU(4, 4)),
            lambda h: h.transpose(0, 1),
        ),
    ),
    Case(
        "recurrent",
        "LSTM: dropout between layers",
        sensors(Lazy(lambda: nn.LSTM(3, 4, 2, batch_first=True, dropout=0.5))),
        onnx="dropout between its layers",
        executorch="dropout between its layers",
    ),
    Case("recurrent", "RNN", sensors(Lazy(lambda: nn.RNN(3, 4, batch_first=True)))),
    Case(
        "recurrent",
        "LSTM on tokens: 2 layers, bidirectional",
        words(Lazy(lambda: nn.LSTM(WIDTH, 3, 2, batch_first=True, bidirectional=True))),
        note="at the example's length",
    ),
    Case(
        "recurrent",
        "GRU on tokens: last position",
        words(Lazy(lambda: nn.GRU(WIDTH, 4, batch_first=True)), lambda h: h[:, -1]),
        note="at the example's length",
    ),
    Case(
        "text",
        "Conv1d, maximum over time",
        words(
            lambda h: h.transpose(1, 2),
            Lazy(lambda: nn.Conv1d(WIDTH, 6, 3, padding=1)),
            nn.ReLU(),
            lambda h: h.amax(2),
        ),
        note="any length",
    ),
    Case(
        "text",
        "Conv1d without padding, AdaptiveMaxPool1d",
        words(
            lambda h: h.transpose(1, 2),
            Lazy(lambda: nn.Conv1d(WIDTH, 6, 3)),
            nn.ReLU(),
            nn.AdaptiveMaxPool1d(1),
            nn.Flatten(),
        ),
        note="at the example's length, since the kernel needs three tokens",
    ),
    Case(
        "text",
        "indices that repeat: index_select, index_add, gather",
        vectors(
            lambda h: h.index_select(1, torch.tensor([0, 1, 1, 6, 3, 3, 7, 0])),
            lambda h: h.new_zeros(h.shape[0], 8).index_add(1, torch.tensor([0, 1, 1, 7] * 2), h),
            lambda h: h.gather(1, (h > 0).long()) + h,
        ),
    ),
    Case("text", "Embedding, any length", texts(Lazy(lambda: TokenBlock(WIDTH)))),
    Case(
        "text",
        "Embedding with positions",
        texts(Lazy(lambda: nn.Linear(WIDTH, WIDTH)), longest=6),
    ),
    Case(
        "text",
        "tokens, head tied to the embedding",
        texts(Lazy(lambda: nn.Linear(WIDTH, WIDTH)), task="tokens"),
    ),
    Case(
        "dropout",
        "Dropout",
        vectors(nn.Dropout(0.3), Lazy(lambda: nn.Linear(8, 8)), nn.Dropout(0.7)),
        note="a mask from the step's seed",
    ),
    Case(
        "dropout",
        "Dropout1d, Dropout2d",
        signals(nn.Dropout1d(0.4), lambda h: h.unflatten(2, (3, 4)), nn.Dropout2d(0.2)),
    ),
    Case(
        "dropout",
        "attention dropout",
        texts(
            Lazy(lambda: Attention("causal", 0.3)),
            Lazy(lambda: Attention("eager", 0.3)),
        ),
    ),
    Case(
        "dropout",
        "nn.TransformerEncoderLayer",
        texts(Lazy(lambda: nn.TransformerEncoderLayer(WIDTH, 2, 8, 0.2, batch_first=True))),
    ),
    Case("dropout", "nn.MultiheadAttention", texts(Lazy(lambda: MultiHead(0.3)))),
    Case(
        "random",
        "DropPath (timm), DropPath (rand and floor)",
        vectors(DropPath("bernoulli"), Lazy(lambda: nn.Linear(8, 8)), DropPath("floor")),
        note="from the step's seed",
    ),
    Case(
        "random",
        "rand_like, uniform_, bernoulli",
        vectors(
            Noise(lambda h: 1 + torch.rand_like(h)),
            nn.Tanh(),
            Noise(lambda h: torch.empty_like(h).uniform_(0.5, 1.5)),
            nn.Tanh(),
            Noise(lambda h: torch.bernoulli(torch.full_like(h, 0.3))),
        ),
        note="from the step's seed",
    ),
    Case(
        "random",
        "randn, randn_like, normal_",
        vectors(
            Noise(lambda h: 1 + 0.1 * torch.randn_like(h)),
            nn.Tanh(),
            Noise(lambda h: torch.empty_like(h).normal_(1, 0.1)),
            nn.Tanh(),
            Noise(lambda h: 1 + 0.1 * torch.randn(h.shape)),
        ),
        note="from the step's seed",
    ),
    Case(
        "random",
        "AlphaDropout",
        vectors(nn.AlphaDropout(0.3), Lazy(lambda: nn.Linear(8, 8)), nn.SELU()),
        note="from the step's seed",
    ),
    Case(
        "random",
        "exponential_ and others",
        vectors(Noise(lambda h: torch.empty_like(h).exponential_())),
        onnx="random numbers with aten.exponential_",
        executorch="random numbers with aten.exponential_",
    ),
    Case(
        "LoRA",
        "Linear",
        adapted(texts(Lazy(lambda: Attention("causal"))), "query", "value"),
    ),
    Case(
        "LoRA", "Conv1D of transformers", adapted(texts(Lazy(conv1d_of_transformers)), "modules_.1")
    ),
    Case("LoRA", "Conv2d", adapted(images(Lazy(lambda: nn.Conv2d(4, 4, 3))), "modules_.0")),
    Case("LoRA", "Embedding", adapted(seeded_table, "embedding")),
)


def table() -> str:
    """The matrix as a Markdown table; the tests check every case."""
    head = ["| group | operators | ONNX | ExecuTorch | note |", "|---|---|---|---|---|"]
    rows = [
        f"| {c.group} | {c.name} | {_cell(c.onnx)} | {_cell(c.executorch)} | {c.note} |"
        for c in CASES
    ]
    return "\n".join([*head, *rows])


def _cell(refusal: str) -> str:
    return f"refused: {refusal}" if refusal else "exact"


if __name__ == "__main__":
    print(table())
