"""One pass through many networks, against a loop over them in float64."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.vmapped import over_bases
from export.cutting.split_model import SplitModel
from export.steps.step import Step
from tests.lib.graph_runs import run_of
from tests.lib.models import CLASSES, AttentionBlock, MeanHead, TokenBlock, conv_model, text_model
from tests.lib.transformers_models import bert, gpt2, llama, opt, vit

WORDS = 12


def tensors_of(net: nn.Module, bases: int, seed: int) -> dict[str, Tensor]:
    """Return float64 tensors (bases, ...) of networks of one form; variances are positive."""
    generator = torch.Generator().manual_seed(seed)
    everything = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    stacked = {}
    for name, tensor in everything.items():
        if tensor.is_floating_point():
            shape = (bases, *tensor.shape)
            noise = torch.rand(shape, generator=generator, dtype=torch.float64)
            stacked[name] = tensor.detach().double() + (
                noise if name.endswith("running_var") else 0.4 * noise - 0.2
            )
    return stacked


def assert_as_a_loop(
    net: nn.Module, bases: int, x: Tensor, *, seed: int = 0, kept: float = 0.0
) -> None:
    """Check that one pass equals a loop, for one shared input and for an input per network.

    Args:
        net: a network.
        bases: number of networks.
        x: inputs of each network, (bases, rows, ...).
        seed: seed of the tensors, and of the choice of shared ones.
        kept: fraction of the tensors that all networks share; they are not stacked.
    """
    net = copy.deepcopy(net).double().eval()
    stacked = tensors_of(net, bases, seed)
    drawn = random.Random(seed)
    common = {n: t[0] for n, t in stacked.items() if drawn.random() < kept}
    own = {n: t for n, t in stacked.items() if n not in common}
    if not own:
        own = {n: common.pop(n) for n in list(common)[:1]}
        own = {n: torch.stack([t + i for i in range(bases)]) for n, t in own.items()}
    each = [common | {n: t[base] for n, t in own.items()} for base in range(bases)]
    with torch.no_grad():
        shared = over_bases(lambda given: functional_call(net, common | given, (x[0],)), own)
        apart = over_bases(
            lambda given: functional_call(
                net, common | {n: t for n, t in given.items() if n != "x"}, (given["x"],)
            ),
            own | {"x": x},
        )
        wanted = [functional_call(net, tensors, (x[0],)) for tensors in each]
        torch.testing.assert_close(shared, torch.stack(wanted), rtol=1e-10, atol=1e-10)
        wanted = [functional_call(net, tensors, (x[i],)) for i, tensors in enumerate(each)]
        torch.testing.assert_close(apart, torch.stack(wanted), rtol=1e-10, atol=1e-10)


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
POOLINGS: dict[int, tuple[Callable[[], nn.Module], ...]] = {
    1: (
        lambda: nn.MaxPool1d(2, ceil_mode=True),
        lambda: nn.AvgPool1d(3, 2, padding=1),
        lambda: nn.AdaptiveAvgPool1d(2),
        lambda: nn.AdaptiveMaxPool1d(2),
    ),
    2: (
        lambda: nn.MaxPool2d(3, 2, padding=1),
        lambda: nn.AvgPool2d(2, stride=1, ceil_mode=True, count_include_pad=False),
        lambda: nn.AdaptiveAvgPool2d((2, 1)),
        lambda: nn.AdaptiveMaxPool2d(2),
    ),
    3: (
        lambda: nn.MaxPool3d(2, stride=1),
        lambda: nn.AvgPool3d(2, stride=1),
        lambda: nn.AdaptiveAvgPool3d(2),
    ),
}


class Mean(nn.Module):
    """Mean over positions."""

    def forward(self, h: Tensor) -> Tensor:
        """Return (rows, channels)."""
        return h.flatten(2).mean(2)


class Where(nn.Module):
    """Pooling of inputs that are large enough."""

    def __init__(self, pooling: nn.Module) -> None:
        super().__init__()
        self.pooling = pooling

    def forward(self, h: Tensor) -> Tensor:
        """Return the pooled input, or the input if a side is smaller than the windows."""
        result: Tensor = self.pooling(h) if min(h.shape[2:]) > 2 else h
        return result


def conv_net(dims: int, drawn: random.Random) -> nn.Module:
    """Return a network of random convolutions, norms and pooling."""
    channels = 4
    layers: list[nn.Module] = []
    for _ in range(drawn.randint(1, 3)):
        groups = drawn.choice([1, 1, 2, 4])
        after = drawn.choice([4, 8])
        dilation = drawn.choice([1, 1, 2])
        same = drawn.random() < 0.2
        kernel = 3 if same else drawn.choice([1, 2, 3])
        layers.append(
            CONVOLUTIONS[dims](
                channels,
                after,
                kernel,
                stride=1 if same else drawn.choice([1, 1, 2]),
                padding="same" if same else dilation,
                dilation=dilation,
                groups=groups,
                bias=drawn.random() < 0.5,
                padding_mode=drawn.choice(["zeros", "zeros", "zeros", "replicate"]),
            )
        )
        channels = after
        norms: list[nn.Module] = [
            nn.GroupNorm(2, channels),
            nn.GroupNorm(channels // 2, channels, affine=False),
            nn.GroupNorm(1, channels),
            BATCH_NORMS[dims](channels),
            BATCH_NORMS[dims](channels, affine=False),
            nn.Identity(),
        ]
        layers += [drawn.choice(norms), drawn.choice([nn.ReLU(), nn.ReLU(inplace=True), nn.GELU()])]
        if drawn.random() < 0.5:
            layers.append(Where(drawn.choice(POOLINGS[dims])()))
    return nn.Sequential(*layers, Mean(), nn.Linear(channels, 3, bias=drawn.random() < 0.5))


@settings(max_examples=80, deadline=None)
@given(
    dims=st.sampled_from([1, 1, 2, 2, 2, 3]),
    bases=st.integers(1, 4),
    rows=st.integers(1, 4),
    kept=st.sampled_from([0.0, 0.0, 0.4]),
    seed=st.integers(0, 9999),
)
def test_convolutions_norms_and_pooling_are_a_loop(
    dims: int, bases: int, rows: int, kept: float, seed: int
) -> None:
    """Strides, dilation, groups and biases vary, and so do the tensors that networks share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = conv_net(dims, random.Random(seed))
        x = torch.randn(bases, rows, 4, *[9, 8, 7][:dims], dtype=torch.float64)
    assert_as_a_loop(net, bases, x, seed=seed, kept=kept)


@pytest.mark.parametrize("dims", POOLINGS)
def test_pooling_of_the_input_is_a_loop(dims: int) -> None:
    """The input is pooled before any layer with tensors, so it is shared by all networks."""
    for pooling in POOLINGS[dims]:
        torch.manual_seed(dims)
        net = nn.Sequential(pooling(), CONVOLUTIONS[dims](4, 3, 1), Mean())
        x = torch.randn(3, 2, 4, *[9, 8, 7][:dims], dtype=torch.float64)
        assert_as_a_loop(net, 3, x)


class Layers(nn.Module):
    """Linear layers and layer norms, with or without tensors; shapes are (..., size)."""

    def __init__(self, drawn: random.Random, axes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(drawn.randint(1, 3)):
            shape = (3, 4) if axes > 1 and drawn.random() < 0.3 else (4,)
            norm = nn.LayerNorm(shape, elementwise_affine=drawn.random() < 0.7)
            linear = nn.Linear(4, 4, bias=drawn.random() < 0.7)
            self.layers += drawn.sample([norm, linear, nn.GELU(), nn.Tanh()], 3)
        self.layers.append(nn.Linear(4, 2))

    def forward(self, h: Tensor) -> Tensor:
        """Return the result, with a residual where the size is unchanged."""
        for layer in self.layers:
            z = layer(h)
            h = h + z if z.shape == h.shape else z
        return h


@settings(max_examples=80, deadline=None)
@given(
    axes=st.integers(1, 3),
    bases=st.integers(1, 4),
    rows=st.integers(1, 4),
    kept=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9999),
)
def test_linear_layers_and_layer_norms_are_a_loop(
    axes: int, bases: int, rows: int, kept: float, seed: int
) -> None:
    """Vectors, sequences and grids work, whatever tensors the networks share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Layers(random.Random(seed), axes)
        x = torch.randn(bases, rows, *(2, 3)[2 - axes + 1 :], 4, dtype=torch.float64)
    assert_as_a_loop(net, bases, x, seed=seed, kept=kept)


class Encoder(nn.Module):
    """PyTorch's own attention between word and position embeddings and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 8, padding_idx=0)
        self.places = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.block = TokenBlock(8)
        self.head = MeanHead(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.words(x) + self.places(torch.arange(x.shape[1], device=x.device))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        logits: Tensor = self.head(self.block(h))
        return logits


class Seen(nn.Module):
    """A class token, a patch convolution and attention, for images."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.block = AttentionBlock(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.patches(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(x.shape[0], -1, -1), h], 1)
        logits: Tensor = self.head(self.block(h)[:, 0])
        return logits


def words(*shape: int) -> Tensor:
    """Return random integers for an embedding."""
    return torch.randint(WORDS, shape, generator=torch.Generator().manual_seed(sum(shape)))


def pictures(*shape: int) -> Tensor:
    """Return random images with one channel."""
    drawn = torch.randn(*shape, 1, 8, 8, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn


def vectors(*shape: int) -> Tensor:
    """Return random sequences of three vectors with four numbers."""
    return torch.randn(*shape, 3, 4, generator=torch.Generator().manual_seed(sum(shape)))


def texts(*shape: int) -> Tensor:
    """Return random texts of five words."""
    return words(*shape, 5)


def channels(*shape: int) -> Tensor:
    """Return random images with four channels."""
    drawn = torch.randn(*shape, 4, 7, 8, generator=torch.Generator().manual_seed(sum(shape)))
    return drawn


def pooled(*layers: nn.Module) -> nn.Module:
    """Return convolutions with groups and norms, and pooling."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        *layers, nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 2, stride=2), Mean(), nn.Linear(4, 3),
    )  # fmt: skip


def volumes(*layers: nn.Module) -> nn.Module:
    """Return a convolution of volumes, and pooling."""
    return nn.Sequential(nn.Conv3d(2, 4, 2), *layers, Mean(), nn.Linear(4, 3))


def cubes(*shape: int) -> Tensor:
    """Return random volumes with two channels."""
    return torch.randn(*shape, 2, 6, 6, 7, generator=torch.Generator().manual_seed(sum(shape)))


class Joined(nn.Module):
    """Joins the output of a layer with its input, with itself, and with a constant."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.first, self.net = nn.Conv2d(4, 2, 1), net

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.first(x)
        h = torch.concat([h, x[:, :1], h[:, 1:].relu()], dim=1)
        logits: Tensor = self.net(torch.cat((h.flip(3), torch.zeros_like(x)), -1))
        return torch.cat([logits, logits[:, :1]], 1)


Net = tuple[Callable[[], nn.Module], Callable[..., Tensor]]

TEXTS: dict[str, Net] = {
    "words and attention": (text_model, texts),
    "attention of torch": (Encoder, texts),
    "gpt2": (gpt2, texts),
    "llama": (llama, texts),
    "bert": (bert, texts),
    "opt": (opt, texts),
}
NETS: dict[str, Net] = {
    "convolutions": (conv_model, pictures),
    "max pooling": (lambda: pooled(nn.MaxPool2d(2)), channels),
    "mean pooling": (lambda: pooled(nn.AvgPool2d(3, 2, padding=1)), channels),
    "adaptive pooling": (lambda: pooled(nn.AdaptiveAvgPool2d((2, 3))), channels),
    "pooling in three dimensions": (lambda: volumes(nn.MaxPool3d(2), nn.AvgPool3d(2, 1)), cubes),
    "mirrored and enlarged": (
        lambda: pooled(
            nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.Upsample(scale_factor=2)
        ),
        channels,
    ),
    "joined": (lambda: Joined(pooled()), channels),
    "layers": (lambda: Layers(random.Random(3), 2), vectors),
    "patches": (Seen, pictures),
    "vit": (vit, pictures),
    **TEXTS,
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("bases", [1, 3])
def test_models_are_a_loop(name: str, bases: int) -> None:
    """Embeddings, attention, class tokens and the norms of transformers are covered."""
    build, draw = NETS[name]
    x = draw(bases, 4)
    net = build()
    assert_as_a_loop(net, bases, x.double() if x.is_floating_point() else x, seed=bases)


def step_of(net: nn.Module, stacked: dict[str, Tensor], x: Tensor) -> Step:
    """Return a step of many networks on one batch; rows and text lengths are symbolic."""
    fixed = {n: b for n, b in net.named_buffers() if n not in stacked}

    def function(constants: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name: given[name] for name in stacked}
        logits = over_bases(lambda t: functional_call(net, {**constants, **t}, (given["x"],)), own)
        return {"logits": logits}

    text = not x.is_floating_point()
    shape = ("batch", "seq") if text else ("batch", *x.shape[1:])
    ports = [Port(TensorSpec(n, "float32", tuple(t.shape)), "bases") for n, t in stacked.items()]
    ports.append(Port(TensorSpec("x", "int64" if text else "float32", shape), "batch"))
    bases = len(next(iter(stacked.values())))
    result = Port(TensorSpec("logits", "float32", (bases, "batch", CLASSES)), "result")
    return Step("mix", function, tuple(ports), (result,), fixed)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow)
        if name in ("bert", "opt", "vit", "gpt2") else name
        for name in NETS
    ],
)  # fmt: skip
def test_a_graph_takes_any_number_of_rows(name: str) -> None:
    """The lowered ONNX graph takes one row, and more rows than were traced."""
    build, draw = NETS[name]
    net = build().eval()
    stacked = tensors_of(net, 3, seed=7)
    x = draw(2)
    run = run_of("onnx", [step := step_of(net, stacked_32(stacked), x)])
    net.double()
    for rows in (1, 2, 5, 9):
        x = draw(rows)[:, : 3 + rows % 3] if name in TEXTS else draw(rows)
        feeds = {n: t.numpy() for n, t in stacked_32(stacked).items()} | {"x": x.numpy()}
        (got,) = run(step, feeds).values()
        wide = x.double() if x.is_floating_point() else x
        with torch.no_grad():
            want = [
                functional_call(
                    net, {n: t[i].float().double() for n, t in stacked.items()}, (wide,)
                )
                for i in range(3)
            ]
        assert got.shape[:2] == (3, rows)
        np.testing.assert_allclose(got, torch.stack(want).numpy(), rtol=1e-4, atol=2e-5)


def stacked_32(stacked: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in float32, as graphs take them."""
    return {n: t.float() for n, t in stacked.items()}


def test_several_results_are_stacked_each() -> None:
    """A function may return several tensors; each is stacked."""
    net = conv_model()
    assert isinstance(net, SplitModel)
    stacked = tensors_of(net.double(), 2, seed=0)
    x = pictures(3).double()

    def both(own: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits = functional_call(net, own, (x,))
        return logits, logits.argmax(-1)

    logits, answers = over_bases(both, stacked)
    for base in range(2):
        want, answer = both({n: t[base] for n, t in stacked.items()})
        torch.testing.assert_close(logits[base], want, rtol=1e-10, atol=1e-10)
        assert torch.equal(answers[base], answer)


def test_statistics_of_a_batch_are_refused() -> None:
    """In training, batch norms would use the rows of all networks, so they are refused."""
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    stacked = stacked_32(tensors_of(net, 2, seed=0))
    with pytest.raises(AssertionError, match="statistics of a batch"):
        over_bases(lambda own: functional_call(net, own, (torch.ones(3, 4),)), stacked)
