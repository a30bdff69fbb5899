"""Where activations have their channels is read from the model, or asked for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.runtime import load_runtime
from export import Tier, export_bundles
from export.bases.exported import without_trunk
from export.cutting.channels import Channels, channel_axis
from export.cutting.from_module import from_layers, from_module
from export.cutting.heads import AuxiliaryHead
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel
from export.errors import ExportError
from tests.lib.models import CLASSES, MeanHead, conv_model, example, token_model


class WindowAttention(nn.Module):
    """Attention inside windows of 2 x 2 positions of (batch, height, width, channels)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, h_BHWC: Tensor) -> Tensor:
        b, height, width, c = h_BHWC.shape
        windows = h_BHWC.reshape(b, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        qkv = self.qkv(windows.reshape(b, height * width // 4, 4, c))
        q, k, v = qkv.chunk(3, -1)
        mixed = self.out(torch.softmax(q @ k.transpose(2, 3) / c**0.5, -1) @ v)
        mixed = mixed.reshape(b, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return mixed.reshape(b, height, width, c)


class SwinBlock(nn.Module):
    """A block of a Swin transformer, in the order of its paper, with a shift by one position."""

    def __init__(self, width: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.shift = WindowAttention(width), shift
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, h_BHWC: Tensor) -> Tensor:
        mixed = self.norm1(h_BHWC)
        if self.shift:
            mixed = torch.roll(mixed, (-1, -1), (1, 2))
        mixed = self.attention(mixed)
        if self.shift:
            mixed = torch.roll(mixed, (1, 1), (1, 2))
        h_BHWC = h_BHWC + mixed
        return h_BHWC + self.mlp(self.norm2(h_BHWC))


class Patches(nn.Module):
    """Patch embedding to (batch, height, width, channels)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 2, 2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.embed(x_BCHW).permute(0, 2, 3, 1))


class Merging(nn.Module):
    """Patch merging: half of the positions each way, twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width)

    def forward(self, h_BHWC: Tensor) -> Tensor:
        parts = [h_BHWC[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        merged: Tensor = self.reduce(self.norm(torch.cat(parts, -1)))
        return merged


class LastHead(nn.Module):
    """Norm, mean over positions, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, h_BHWC: Tensor) -> Tensor:
        logits: Tensor = self.out(self.norm(h_BHWC).mean((1, 2)))
        return logits


def swin(width: int = 8) -> SplitModel:
    """A small Swin transformer whose activations have as many channels as rows and columns."""
    torch.manual_seed(0)
    blocks = [SwinBlock(width, 0), SwinBlock(width, 1), Merging(width), SwinBlock(2 * width, 0)]
    return SplitModel(Patches(width), blocks, LastHead(2 * width))


SWIN_INPUTS = (3, 16, 16)


class NextBlock(nn.Module):
    """A block of a ConvNeXt: a convolution with channels first, then layers with channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, 1, 1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        inner = self.norm(self.conv(h_BCHW).permute(0, 2, 3, 1))
        return h_BCHW + self.down(nn.functional.gelu(self.up(inner))).permute(0, 3, 1, 2)


class MixerBlock(nn.Module):
    """A block of an MLP-Mixer, which also has a layer over the positions."""

    def __init__(self, positions: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens, self.channels = nn.Linear(positions, positions), nn.Linear(width, width)

    def forward(self, h_BTC: Tensor) -> Tensor:
        h_BTC = h_BTC + self.tokens(self.norm1(h_BTC).transpose(1, 2)).transpose(1, 2)
        return h_BTC + self.channels(self.norm2(h_BTC))


class Plus(nn.Module):
    """Nothing that reads channels."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h) + 1


class Flat(nn.Module):
    """Positions in one axis, as in a vision transformer."""

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW.flatten(2).transpose(1, 2)


def signals() -> SplitModel:
    blocks = [nn.Sequential(nn.Conv1d(6, 6, 3, 1, 1), nn.ReLU()) for _ in range(2)]
    return SplitModel(nn.Conv1d(2, 6, 1), blocks, nn.Sequential(nn.Flatten(), nn.Linear(36, 3)))


def hybrid() -> SplitModel:
    """Convolutions, then a transformer's blocks."""
    layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    blocks = [nn.Conv2d(4, 4, 3, 1, 1), Flat(), layers, Plus()]
    return SplitModel(nn.Conv2d(1, 4, 1), blocks, MeanHead(4, CLASSES))


class Halves(nn.Module):
    """The halves of the channels in the other order."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat(h.chunk(2, 1)[::-1], 1)


MODELS: dict[str, tuple[Callable[[], SplitModel], tuple[int, ...], dict[int, Channels]]] = {
    "swin": (swin, SWIN_INPUTS, {1: "last", 2: "last", 3: "last", 4: "last"}),
    "convnext": (
        lambda: SplitModel(nn.Conv2d(1, 4, 1), [NextBlock(4), NextBlock(4)], MeanHead(4, 3)),
        (1, 4, 4),
        {1: "first", 2: "first"},
    ),
    "mixer": (
        lambda: SplitModel(nn.Linear(3, 4), [MixerBlock(4, 4), MixerBlock(4, 4)], MeanHead(4, 3)),
        (4, 3),
        {1: "last", 2: "last"},
    ),
    "resnet": (conv_model, (2, 8, 8), {1: "first", 2: "first", 3: "first"}),
    "rows": (token_model, (5,), {1: "last", 2: "last"}),
    "signals": (signals, (2, 6), {1: "first", 2: "first"}),
    "hybrid": (hybrid, (1, 4, 4), {1: "first", 2: "last", 3: "last", 4: "last"}),
    "elementwise": (
        lambda: SplitModel(nn.Conv2d(1, 4, 1), [Plus(), Plus()], MeanHead(4, 3)),
        (1, 4, 4),
        {1: "first", 2: "first"},
    ),
    "halves": (
        lambda: SplitModel(nn.Conv2d(1, 4, 1), [Halves(), Halves()], nn.Identity()),
        (1, 4, 4),
        {1: "first", 2: "first"},
    ),
    "read above the cut": (
        lambda: SplitModel(nn.Identity(), [Plus(), Plus()], MeanHead(4, 3)),
        (4, 4),
        {1: "last", 2: "last"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_model_shows_where_the_channels_are(name: str) -> None:
    """Also where sizes say nothing: positions and channels are as many."""
    build, shape, wanted = MODELS[name]
    model = build()
    if name == "rows":
        shape = (5, model.stem.in_features)
    if name == "resnet":
        shape = (model.stem.in_channels, 8, 8)
    x = example(shape)
    modes = [module.training for module in model.modules()]
    assert {depth: model.channels_at(depth, x) for depth in wanted} == wanted
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("name", ["swin", "convnext", "mixer", "signals"])
def test_a_segment_without_a_trunk_shows_where_the_channels_are(name: str) -> None:
    """Nobody has called ``add_heads`` for a model that is whole on devices."""
    build, shape, wanted = MODELS[name]
    whole = without_trunk(build())
    segment, x = ClientSegment(whole, whole.depth - 1), example(shape)
    modes = [module.training for module in segment.modules()]
    assert segment.find_channels(x) == wanted[segment.cut]
    assert [module.training for module in segment.modules()] == modes


def test_what_nothing_shows_is_asked_for() -> None:
    """An error names the cut and the setting; what is given is believed."""
    parts: list[nn.Module] = [nn.Identity(), Plus(), Plus(), nn.Flatten()]
    with pytest.raises(ExportError, match=r"channels of the activations at cut 1\?.* read no axis"):
        from_layers(parts).add_heads([1], example((4, 5)), 3)
    for channels, width in (("first", 4), ("last", 5)):
        model = from_layers(parts, channels=channels)  # type: ignore[arg-type]
        model.add_heads([1], example((4, 5)), 3)
        assert model.aux["1"].hidden.in_features == width
    both = [nn.Identity(), nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Flatten()]
    with pytest.raises(ExportError, match=r"at cut 1.* read axis 1 and the last axis"):
        from_layers(both).add_heads([1], example((4, 4)), 3)
    with pytest.raises(ExportError, match="channels is 'left'; it must be"):
        from_layers(parts, channels="left")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"tokens are \(batch, positions, channels\)"):
        SplitModel(Words(), parts[1:3], nn.Linear(4, 4), "tokens", channels="first")


class Words(nn.Module):
    """A stem for tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)


def test_the_axis_of_each_form() -> None:
    for shape, channels, axis in (
        ((4, 3), "first", 1), ((4, 3), "last", 1), ((4, 3, 5), "first", 1), ((4, 5, 3), "last", 2),
        ((4, 3, 5, 6), "first", 1), ((4, 5, 6, 3), "last", 3), ((4, 3), None, 1),
    ):  # fmt: skip
        assert channel_axis(torch.zeros(shape), channels) == axis  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=r"\[4, 5, 6\] holds the channels"):
        channel_axis(torch.zeros(4, 5, 6), None)
    with pytest.raises(ExportError, match="one or two further dimensions"):
        channel_axis(torch.zeros(1, 2, 3, 4, 5), "first")


@pytest.mark.parametrize("grid", [1, 4])
def test_a_head_pools_the_same_positions_in_either_form(grid: int) -> None:
    torch.manual_seed(0)
    first, last = (AuxiliaryHead(5, 3, c, grid) for c in ("first", "last"))  # type: ignore[arg-type]
    last.load_state_dict(first.state_dict())
    h = torch.randn(2, 5, 6, 7)
    torch.testing.assert_close(last(h.permute(0, 2, 3, 1)), first(h))


def test_a_file_says_where_the_channels_of_its_heads_are(tmp_path: Path) -> None:
    """A hub adds heads like those of the file, without an example to look at."""
    for build, shape in ((swin, SWIN_INPUTS), (signals, (2, 6))):
        model, x = build(), example(shape)
        model.add_heads([1], x, CLASSES)
        model.save(tmp_path / WEIGHTS)
        other = build()
        other.load(tmp_path / WEIGHTS)
        with torch.no_grad():
            h = model.segment(x, 1)
            assert torch.equal(other.answer(1, h), model.answer(1, h))


def eager_step(model: SplitModel, cut: int, x: Tensor, y: Tensor, rate: float) -> dict[str, Tensor]:
    """Parameters of the device's part after one step of SGD on the summed loss of its heads."""
    segment = ClientSegment(model, cut).double()
    optimizer = torch.optim.SGD(segment.parameters(), rate)
    _, logits = segment(x.double())
    sum(nn.functional.cross_entropy(z, y) for z in logits).backward()  # type: ignore[union-attr]
    optimizer.step()
    return {name: p.detach().clone() for name, p in segment.named_parameters()}


@pytest.mark.parametrize("cut", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_model_with_channels_last_is_trained_on_devices(cut: int, tmp_path: Path) -> None:
    """Gradients are those of eager PyTorch; scales, heads and widths are of the channels."""
    x, y = example(SWIN_INPUTS, 6), torch.arange(6) % CLASSES
    model = swin()
    index = export_bundles(model, {"a": Tier(cut)}, tmp_path, example=x, classes=CLASSES)
    manifest = index.manifest("a")
    size, width = (8, 8) if cut == 2 else (4, 16)
    assert manifest.packed[0].shape == ("batch", size, size, width)
    assert manifest.packed[1].shape == ("batch", size, size, 1)
    assert model.aux[str(cut)].hidden.in_features == 16 * width
    runtime = load_runtime(Bundle.open(manifest, index.blobs().read))
    hyper = {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    runtime.run("train", {"x": x.numpy(), "y": y.numpy(),
                          **{n: np.asarray(v, np.float32) for n, v in hyper.items()}})  # fmt: skip
    wanted = eager_step(model, cut, x, y, 0.1)
    for name, got in runtime.get_state().items():
        np.testing.assert_allclose(got, wanted[name].numpy(), rtol=1e-4, atol=2e-6, err_msg=name)


def test_blocks_of_swin_of_transformers() -> None:
    """Layers of transformers take (batch, positions, channels) and the size of the picture."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2], num_heads=[2], window_size=4,
        num_labels=3, drop_path_rate=0.0,
    )  # fmt: skip
    net = transformers.SwinForImageClassification(config).eval()
    layers = net.swin.encoder.layers[0].blocks

    class Layer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, h_BTC: Tensor) -> Tensor:
            out = self.layer(h_BTC, (8, 8))
            h: Tensor = out[0] if isinstance(out, tuple) else out
            return h

    model = from_module(
        net,
        stem=[lambda x: net.swin.embeddings(x)[0]],
        blocks=["swin.encoder.layers.0.blocks"],
        head=["swin.layernorm", lambda h: h.mean(1), "classifier"],
    )
    model = SplitModel(model.stem, [Layer(layer) for layer in layers], model.head).eval()
    x = example((3, 16, 16), 2)
    with torch.no_grad():
        torch.testing.assert_close(model(x), net(x).logits)
    assert [model.channels_at(depth, x) for depth in (1, 2)] == ["last", "last"]
