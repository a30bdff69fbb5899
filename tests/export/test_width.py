"""Narrow models: leading channels, and ordered dropout that trains them within the full model."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.runtime.onnx import OnnxRuntime
from export.bases.narrow import narrow, ordered_dropout, step_flops, widths_within
from export.bundles.writer import Tier, export_bundles
from export.cutting.seeded_random import PRIME, SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel, statistics
from export.errors import ExportError
from server_hub.demo import digits
from tests.lib.models import (
    AttentionBlock,
    MeanHead,
    conv_model,
    example,
    open_bundle,
    text_model,
    token_model,
)

CLASSES = 10
WIDTHS = (0.25, 0.5, 0.75, 1.0)


def batch_norm(channels: int) -> nn.Module:
    """Return a batch norm."""
    return nn.BatchNorm2d(channels)


def group_norm(channels: int) -> nn.Module:
    """Return a group norm with groups of two channels."""
    return nn.GroupNorm(channels // 2, channels)


class Basic(nn.Module):
    """The basic block of a ResNet for CIFAR, with a convolution in the skip connection."""

    def __init__(self, before: int, after: int, stride: int, norm: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = norm(after)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = norm(after)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride), norm(after))

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        inner = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(h)))))
        result: Tensor = self.relu(inner + self.downsample(h))
        return result


class Rows(nn.Module):
    """An MLP with a norm over channels at every position; channels are the last axis."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, channels)

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        result: Tensor = h + torch.tanh(self.linear(self.norm(h)))
        return result


def resnet(norm: Any, channels: int = 8, seed: int = 0) -> SplitModel:
    """Return a ResNet whose input is normalised by a batch norm that keeps its 3 channels."""
    torch.manual_seed(seed)
    stem = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.Conv2d(3, channels, 3, 1, 1, bias=False),
        norm(channels),
        nn.ReLU(),
    )
    blocks = [
        Basic(channels, channels, 1, norm),
        Basic(channels, 2 * channels, 2, norm),
        Basic(2 * channels, 2 * channels, 1, norm),
    ]
    return SplitModel(stem, blocks, MeanHead(2 * channels, CLASSES))


def plain(head: nn.Module | None = None, *middle: nn.Module, seed: int = 0) -> SplitModel:
    """Return convolutions without norms for (B, 1, 4, 4); by default the head flattens."""
    torch.manual_seed(seed)
    head = head or nn.Sequential(
        nn.Flatten(), nn.Linear(8 * 16, 12), nn.ReLU(), nn.Linear(12, CLASSES)
    )
    blocks = [nn.Conv2d(8, 8, 3, padding=1), nn.Sequential(*middle) if middle else nn.ReLU()]
    return SplitModel(nn.Conv2d(1, 8, 3, padding=1), blocks, head)


def depthwise(seed: int = 0) -> SplitModel:
    """Return depthwise and grouped convolutions, as in MobileNet."""
    middle = [
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.Conv2d(16, 8, 3, padding=1, groups=4),
        nn.InstanceNorm2d(8, affine=True),
    ]
    return plain(None, *middle, seed=seed)


def signals(seed: int = 0) -> SplitModel:
    """Return grouped Conv1d layers, and a head of convolution and norm that scales its answer."""

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Conv1d(8, CLASSES, 1)
            self.norm = nn.GroupNorm(5, CLASSES)

        def forward(self, h: Tensor) -> Tensor:
            scaled: Tensor = 2 * self.norm(self.out(h)).mean(2)
            return scaled

    torch.manual_seed(seed)
    blocks = [nn.Sequential(nn.Conv1d(8, 8, 3), nn.GroupNorm(4, 8), nn.GELU()) for _ in range(2)]
    return SplitModel(nn.Conv1d(1, 8, 3), blocks, Head(), channels="first")


def rows(seed: int = 0) -> SplitModel:
    """Return linear layers and LayerNorms, with channels last."""
    torch.manual_seed(seed)
    return SplitModel(nn.Linear(3, 8), [Rows(8), Rows(8)], MeanHead(8, CLASSES))


MODELS = {
    "resnet-gn": (lambda seed: resnet(group_norm, seed=seed), (3, 8, 8), WIDTHS),
    "resnet-bn": (lambda seed: resnet(batch_norm, seed=seed), (3, 8, 8), WIDTHS),
    "digits": (lambda seed: digits.build(), (1, 8, 8), WIDTHS),
    "plain": (lambda seed: plain(seed=seed), (1, 4, 4), WIDTHS),
    "depthwise": (lambda seed: depthwise(seed), (1, 4, 4), WIDTHS),
    "signals": (lambda seed: signals(seed), (1, 12), (0.25, 0.5, 1.0)),
    "rows": (lambda seed: rows(seed), (5, 3), WIDTHS),
}


def make(name: str, seed: int = 0, rows: int = 3) -> tuple[SplitModel, Tensor]:
    """Return a model in float64 with auxiliary heads and random parameters, and some inputs."""
    build, shape, _ = MODELS[name]
    model = build(seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((rows, *shape), generator=generator)
    model.add_heads(range(1, model.depth), x, CLASSES)
    with torch.no_grad():
        for p in model.parameters():  # the initial ones and zeros of norms hide mistakes
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.double(), x.double()


def loss_of(model: SplitModel, x: Tensor) -> Tensor:
    """Return the cross-entropy of all heads, each with its own weight."""
    y = torch.arange(len(x)) % CLASSES
    loss = cross_entropy(model(x), y)
    for depth in model.head_depths:
        loss = loss + 0.1 * depth * cross_entropy(model.answer(depth, model.segment(x, depth)), y)
    return loss


def leading(full: Tensor, part: Tensor) -> Tensor:
    """Return the leading slice of ``full`` with the shape of ``part``."""
    return full[tuple(slice(n) for n in part.shape)]


def drawn(widths: tuple[float, ...], seed: int) -> float:
    """Return the width that a step with this seed draws."""
    with SeededDropout(torch.tensor(seed)) as seeded:
        return seeded.choice(widths).item()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [0.5, 1.0])
def test_a_narrow_model_has_the_leading_slices(name: str, width: float) -> None:
    """Names are the same, tensors are slices with half the inner channels, classes are all kept."""
    model, x = make(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    part = narrow(model, width, x.float())
    assert part.state_dict().keys() == before.keys()
    for n, t in part.state_dict().items():
        assert torch.equal(t, leading(before[n], t)), n
        assert torch.equal(model.state_dict()[n], before[n])
    assert part(x).shape == (len(x), CLASSES)
    ratio = sum(p.numel() for p in part.parameters()) / sum(p.numel() for p in model.parameters())
    assert ratio == 1 if width == 1 else 0.24 < ratio < 0.6
    for depth in part.head_depths:
        assert part.aux[str(depth)].out.out_features == CLASSES
        hidden = model.aux[str(depth)].hidden
        assert part.aux[str(depth)].hidden.weight.shape == (
            hidden.out_features * width,
            hidden.in_features * width,
        )


def test_sizes_of_a_resnet() -> None:
    """Every kind of layer has new sizes in its attributes too; the norm of the input is kept."""
    model, x = make("resnet-gn")
    part = narrow(model, 0.5, x)
    assert part.stem[0].num_features == 3
    assert (part.stem[1].in_channels, part.stem[1].out_channels) == (3, 4)
    assert (part.stem[2].num_groups, part.stem[2].num_channels) == (2, 4)
    assert part.block[1].downsample[0].weight.shape == (8, 4, 1, 1)
    assert (part.head.out.in_features, part.head.out.out_features) == (8, CLASSES)
    assert part.aux["1"].norm.normalized_shape == (4,)
    model, x = make("depthwise")
    part = narrow(model, 0.25, x)
    assert [part.block[1][i].groups for i in (0, 2)] == [2, 1]
    assert part.block[1][2].weight.shape == (2, 4, 3, 3)


@settings(max_examples=12, deadline=None)
@given(name=st.sampled_from(sorted(MODELS)), seed=st.integers(0, PRIME - 1))
def test_a_masked_step_is_a_step_of_the_narrow_model(name: str, seed: int) -> None:
    """Loss, gradients and statistics equal autograd of the narrow model, in float64."""
    masked_step_equals_narrow_step(name, seed, MODELS[name][2])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("place", [0, 1, -1])
def test_a_masked_step_at_each_width(name: str, place: int) -> None:
    """Every model is checked at its narrowest, a middle and its full width."""
    masked_step_equals_narrow_step(name, 5, (MODELS[name][2][place],))


def masked_step_equals_narrow_step(name: str, seed: int, widths: tuple[float, ...]) -> None:
    """Check that a masked step and a step of the narrow model are equal."""
    model, x = make(name, seed % 100)
    width = drawn(widths, seed)
    part = narrow(model, width, x.float()).train()
    statistics = {n: b.clone() for n, b in model.named_buffers()}
    ordered_dropout(model, widths, x.float())
    with SeededDropout(torch.tensor(seed)):
        loss = loss_of(model.train(), x)
    want = loss_of(part, x)
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)
    loss.backward()
    want.backward()
    scale = max(p.grad.abs().max().item() for p in part.parameters())
    for (n, p), q in zip(model.named_parameters(), part.parameters(), strict=True):
        expected = torch.zeros_like(p)
        leading(expected, q).copy_(q.grad)
        torch.testing.assert_close(p.grad, expected, rtol=1e-7, atol=1e-9 * scale, msg=n)
    for (n, b), c in zip(model.named_buffers(), part.buffers(), strict=True):
        expected = statistics[n] if b.dim() else c
        leading(expected, c).copy_(c)
        torch.testing.assert_close(b, expected, msg=n)


def test_nothing_is_masked_in_evaluation_or_without_a_seed() -> None:
    """Without a seed and in evaluation, the model has its own parameters."""
    model, x = make("resnet-gn")
    names = [n for n, _ in model.named_parameters()]
    want, state = loss_of(model.eval(), x), list(model.state_dict())
    ordered_dropout(model, (0.5,), x.float())
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == state
    assert torch.equal(loss_of(model, x), want)
    assert torch.equal(loss_of(model.train(), x), want)
    with SeededDropout(torch.tensor(1)) as seeded:
        assert torch.equal(loss_of(model.eval(), x), want)
        assert seeded.calls == 0
        assert not torch.equal(loss_of(model.train(), x), want)
        assert seeded.calls == 1


@pytest.mark.parametrize("name", ["resnet-bn", "rows"])
def test_copies_are_masked_alike(name: str) -> None:
    """Deep copies and pickles are masked; a model that is narrowed afterwards is not."""
    model, x = make(name)
    ordered_dropout(model, (0.5,), x.float())
    copies = [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    narrowed = narrow(model, 0.5, x.float())
    losses = []
    for twin in copies:
        with SeededDropout(torch.tensor(3)):
            losses.append(loss_of(twin.train(), x))
    assert losses[0] == losses[1] == losses[2]
    for twin in copies[1:]:
        for b, c in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(b, c)
            assert b is not c
    with SeededDropout(torch.tensor(3)) as seeded:
        torch.testing.assert_close(loss_of(narrowed.train(), x), losses[0])
        assert seeded.calls == 0


def test_widths_can_be_replaced() -> None:
    """The second call replaces the widths of the first, and a refused call changes nothing."""
    model, x = make("resnet-gn")
    ordered_dropout(model, (0.25,), x.float())
    ordered_dropout(model, (0.5,), x.float())
    with pytest.raises(ExportError):
        ordered_dropout(model, (1.0, 0.3), x.float())
    want = loss_of(narrow(model, 0.5, x.float()).train(), x)
    with SeededDropout(torch.tensor(0)):
        torch.testing.assert_close(loss_of(model.train(), x), want)


def test_every_width_is_as_likely() -> None:
    """Chi-square over consecutive seeds; adjacent seeds draw independently."""
    draws = torch.tensor([drawn(WIDTHS, seed) for seed in range(2000)])
    counts = torch.stack([(draws == w).sum() for w in WIDTHS]).double()
    assert counts.sum() == 2000
    assert ((counts - 500) ** 2 / 500).sum() < 20  # three degrees of freedom: 1 in 5000
    pairs = torch.stack([((draws[1:] == a) & (draws[:-1] == b)).sum() for a in WIDTHS
                         for b in WIDTHS]).double()  # fmt: skip
    assert ((pairs - 125) ** 2 / 125).sum() < 45  # fifteen degrees of freedom: 1 in 10000


def test_dropouts_keep_their_masks() -> None:
    """Masks do not depend on draws of widths; nested seeds have their own masks."""
    ones = torch.ones(50)

    def masks(choices: tuple[int, ...]) -> Tensor:
        kept = []
        with SeededDropout(torch.tensor(7)) as seeded:
            for place in range(3):
                if place in choices:
                    assert SeededDropout.active() is seeded
                    seeded.choice(WIDTHS)
                    seeded.choice(WIDTHS)
                kept.append(dropout(ones, 0.5))
        assert seeded.calls == 3 + bool(choices)
        return torch.stack(kept)

    assert torch.equal(masks(()), masks((0,)))
    assert torch.equal(masks(()), masks((1, 2)))
    assert SeededDropout.active() is None
    with SeededDropout(torch.tensor(0)) as outer:
        with SeededDropout(torch.tensor(1)) as inner:
            assert SeededDropout.active() is inner
        assert SeededDropout.active() is outer


@pytest.mark.parametrize("norm", [pytest.param(group_norm, marks=pytest.mark.slow), batch_norm])
def test_a_step_with_ordered_dropout_is_exported(norm: Any, tmp_path: Path) -> None:
    """The exported graph, with the seed as an input, makes the steps of the narrow models.

    Without weight decay, weights beyond the width do not change.
    """
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 4, 3, 1, 1), norm(4), nn.ReLU())
    model = SplitModel(stem, [Basic(4, 4, 1, norm), nn.ReLU()], MeanHead(4, CLASSES))
    x, y = torch.randn(4, 1, 4, 4), torch.arange(4)
    model.add_heads([1], x, CLASSES)
    ordered_dropout(model, (0.5, 1.0), x)
    index = export_bundles(model, {"all": Tier(1)}, tmp_path / "out", example=x, classes=CLASSES)
    bundle = open_bundle(index, "all")
    roles = {n: {port.role for port in g.inputs} for n, g in bundle.manifest.graphs.items()}
    assert {n for n, found in roles.items() if "seed" in found} == {"train"}
    runtime = OnnxRuntime(bundle)
    for seed in range(4):
        part = ClientSegment(narrow(model, drawn((0.5, 1.0), seed), x), 1).train()
        loss = cross_entropy(part(x)[1][0], y)
        loss.backward()
        runtime.set_state(bundle.initial_state)
        scalars = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
        batch = {n: np.asarray(value, np.float32) for n, value in scalars.items()}
        batch |= {"x": x.numpy(), "y": y.numpy(), "seed": np.asarray(seed, np.int64)}
        assert runtime.run("train", batch)["loss"] == pytest.approx(loss.item(), rel=1e-5)
        state = runtime.get_state()
        tensors = {n: p.detach() - 0.5 * p.grad for n, p in part.named_parameters()}
        for n, t in {**tensors, **statistics(part)}.items():
            want = torch.tensor(bundle.initial_state[n])
            leading(want, t).copy_(t)
            torch.testing.assert_close(torch.from_numpy(state[n]), want, rtol=1e-4, atol=1e-5)
    assert {drawn((0.5, 1.0), seed) for seed in range(4)} == {0.5, 1.0}


def test_weight_decay_moves_what_is_beyond_the_width() -> None:
    """The gradient beyond the width is zero, but the step is not."""
    model, x = make("plain")
    ordered_dropout(model, (0.5,), x.float())
    before = model.stem.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    with SeededDropout(torch.tensor(0)):
        loss_of(model.train(), x).backward()
    optimizer.step()
    torch.testing.assert_close(model.stem.weight[4:], before[4:] * 0.99)


def test_flops_are_those_of_forward_and_backward() -> None:
    """Operations are per example, for any number of examples, without auxiliary heads."""
    model, x = make("resnet-bn")
    for width in (0.5, 1.0):
        part = narrow(model, width, x).train()
        with FlopCounterMode(display=False) as counter:
            part(x).sum().backward()
        assert step_flops(part, x) == counter.get_total_flops() / len(x)
        assert all(p.grad is None for p in part.aux.parameters())


def test_the_largest_width_within_a_budget() -> None:
    """The budget equals the operations of a width, or is just below them."""
    model, x = make("resnet-gn")
    needs = {w: step_flops(narrow(model, w, x), x) for w in WIDTHS}
    assert sorted(needs.values()) == list(needs.values())
    budgets = {f"at {w}": n for w, n in needs.items()}
    budgets |= {f"below {w}": n - 1 for w, n in needs.items() if w > 0.25}
    chosen = widths_within(model, budgets, WIDTHS[::-1], x)
    assert chosen == {f"at {w}": w for w in WIDTHS} | {
        "below 0.5": 0.25,
        "below 0.75": 0.5,
        "below 1.0": 0.75,
    }
    with pytest.raises(ExportError, match=r"tier 'tiny' has 10 FLOPs .* width, 0\.5, takes \d+"):
        widths_within(model, {"large": 1e12, "tiny": 10}, (1.0, 0.5), x)


class Concatenated(nn.Module):
    """Two parallel convolutions, as in a DenseNet; their joined channels are not nested."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        return torch.cat([self.left(h), self.right(h)], 1)


class Unseen(nn.Module):
    """Has a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations unchanged."""
        return h


class Fixed(nn.Module):
    """Has a fixed number of channels."""

    def forward(self, h: Tensor) -> Tensor:
        """Return the activations unchanged."""
        return h.reshape(h.shape[0], 8, 4, 4)


class LastFlat(nn.Module):
    """Flattens with channels last."""

    def forward(self, h: Tensor) -> Tensor:
        """Return features (B, H W C)."""
        return h.permute(0, 2, 3, 1).flatten(1)


def pooled() -> nn.Module:
    """Return a head for any number of positions."""
    return MeanHead(8, CLASSES)


REFUSED: dict[str, tuple[Any, tuple[int, ...], float, str]] = {
    "channels": (
        lambda: resnet(group_norm),
        (3, 8, 8),
        0.3,
        r"stem\.1 is a Conv2d with 8 output channels, of which width 0\.3 leaves 2\.4",
    ),
    "groups": (conv_model, (1, 8, 8), 1 / 3, r"block\.0\.norm is a GroupNorm with 2 groups of 3"),
    "one group": (
        lambda: plain(pooled(), nn.GroupNorm(1, 8)),
        (1, 4, 4),
        0.5,
        r"block\.1\.0 is a GroupNorm with 1 groups of 8 of its 8 channels.* leaves 0\.5",
    ),
    "conv groups": (
        lambda: plain(pooled(), nn.Conv2d(8, 8, 1, groups=2)),
        (1, 4, 4),
        0.25,
        r"block\.1\.0 is a Conv2d with 2 groups, 4 input channels each, .* leaves 0\.5",
    ),
    "groups at the input": (
        lambda: SplitModel(
            nn.Conv2d(2, 8, 1, groups=2), [nn.ReLU(), nn.ReLU()], MeanHead(8, CLASSES)
        ),
        (2, 4, 4),
        0.5,
        r"stem is a Conv2d in 2 groups at the model's input",
    ),
    "attention": (
        lambda: plain(nn.MultiheadAttention(8, 2)),
        (1, 4, 4),
        0.5,
        r"head is a MultiheadAttention, which cannot be narrowed",
    ),
    "embedding": (text_model, (6,), 0.5, r"stem is a Embedding, which cannot"),
    "own attention": (
        lambda: SplitModel(
            nn.Linear(3, 8), [AttentionBlock(8), AttentionBlock(8)], MeanHead(8, CLASSES)
        ),
        (5, 3),
        0.5,
        r"block\.0\.out is a Linear: at width 0\.5 it does not give",
    ),
    "concatenation": (
        lambda: plain(pooled(), Concatenated(), nn.Conv2d(8, 8, 1)),
        (1, 4, 4),
        0.5,
        r"block\.1\.1 is a Conv2d: at width 0\.5 it does not give",
    ),
    "shuffle": (
        lambda: plain(pooled(), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1)),
        (1, 4, 4),
        0.5,
        r"block\.1\.1 is a Conv2d: at width",
    ),
    "offset": (
        lambda: plain(pooled(), nn.Sigmoid(), nn.Conv2d(8, 8, 1)),
        (1, 4, 4),
        0.5,
        r"block\.1\.1 is a Conv2d: at width .* f\(0\) != 0",
    ),
    "flatten": (
        lambda: plain(nn.Sequential(LastFlat(), nn.Linear(128, CLASSES))),
        (1, 4, 4),
        0.5,
        r"head\.1 is a Linear: at width",
    ),
    "positions": (
        lambda: plain(pooled(), nn.LayerNorm([8, 4, 4])),
        (1, 4, 4),
        0.5,
        r"block\.1\.0 is a LayerNorm over \[8, 4, 4\]",
    ),
    "idle": (lambda: plain(pooled(), Unseen()), (1, 4, 4), 0.5, r"block\.1\.0\.idle is a Linear"),
    "fixed": (
        lambda: plain(pooled(), Fixed()),
        (1, 4, 4),
        0.5,
        r"block\.1\.0 is a Fixed and fails with fewer channels",
    ),
    "width": (conv_model, (1, 8, 8), 1.5, r"the width is 1\.5; it must be"),
    "example": (conv_model, (2, 8, 8), 0.5, r"stem is a Conv2d and fails on the example: .* 2 ch"),
    "no width": (conv_model, (1, 8, 8), 0.0, r"the width is 0; it must be"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_narrowed_is_refused(case: str) -> None:
    """The error names the layer, also for ordered dropout, which leaves the model unchanged."""
    build, shape, width, message = REFUSED[case]
    model = build()
    x = torch.zeros(2, *shape, dtype=torch.long) if case == "embedding" else example(shape, 2)
    with pytest.raises(ExportError, match=message):
        narrow(model, width, x)
    with pytest.raises(ExportError, match=message):
        ordered_dropout(model, (width,), x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_widths_are_refused() -> None:
    """An empty list of widths is refused in a draw and in a choice."""
    model = conv_model()
    with pytest.raises(ExportError, match="no widths"):
        ordered_dropout(model, (), example((1, 8, 8)))
    with pytest.raises(ExportError, match="no widths"):
        widths_within(model, {"a": 1}, (), example((1, 8, 8)))


def test_a_layer_that_starts_at_zero_hides_no_mistake() -> None:
    """The comparison uses random weights, whatever the weights of the model are."""
    model = plain(pooled(), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1))
    nn.init.zeros_(model.block[1][1].weight)
    with pytest.raises(ExportError, match=r"block\.1\.1 is a Conv2d: at width"):
        narrow(model, 0.5, torch.zeros(2, 1, 4, 4))


def test_tied_and_frozen_parameters_stay_so() -> None:
    """A weight that two layers share stays shared and frozen, and modes are kept."""
    model = token_model()
    for block in (model.block[0], model.block[1]):
        block.wide = model.block[2].wide
    model.stem.requires_grad_(False)
    model.block[1].eval()
    part = narrow(model, 0.5, example((6,), 2))
    assert part.block[0].wide is part.block[2].wide
    assert [n for n, _ in part.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [p.requires_grad for p in part.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert [m.training for m in part.modules()] == [m.training for m in model.modules()]
    rows_model = rows()
    rows_model.block[1].linear.weight = rows_model.block[0].linear.weight
    part = narrow(rows_model, 0.5, example((5, 3), 2))
    assert part.block[0].linear.weight is part.block[1].linear.weight
    assert part.block[0].linear.weight.shape == (4, 4)
