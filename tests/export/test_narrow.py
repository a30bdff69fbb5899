"""Narrow models: the leading channels of every layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from export.bases.narrow import narrow
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from tests.lib.models import (
    AttentionBlock,
    MeanHead,
    conv_model,
    example,
    text_model,
    token_model,
)
from tests.lib.widths import (
    CLASSES,
    MODELS,
    group_norm,
    leading,
    make,
    plain,
    resnet,
    rows,
)


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
    """The error names the layer, and the model stays as it is."""
    build, shape, width, message = REFUSED[case]
    model = build()
    x = torch.zeros(2, *shape, dtype=torch.long) if case == "embedding" else example(shape, 2)
    with pytest.raises(ExportError, match=message):
        narrow(model, width, x)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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
