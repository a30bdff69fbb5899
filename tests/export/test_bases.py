"""Base networks: sizes, initial weights, rescaling, and transformers with part of their heads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from export.bases.dual_norms import robustness
from export.bases.split_width import Bases, Rescaling, split_width
from export.cutting.pretrained import from_transformers, save_original
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.trace import trace
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.train import train
from tests.lib.models import CLASSES, IMAGE, MeanHead, conv_model, example, text_model
from tests.lib.transformers_models import WORDS, bert, gpt2, llama, opt, vit

TEXT = torch.arange(15).reshape(3, 5) % WORDS


class Residual(nn.Module):
    """A pre-activation block: only a norm reads the first convolution, a sum reads the second."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(before // 2, before)
        self.conv1 = nn.Conv2d(before, after, 3, padding=1)
        self.norm2 = nn.GroupNorm(after // 2, after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1)
        self.shortcut = nn.Conv2d(before, after, 1)

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        grown = self.conv1(torch.relu(self.norm1(h)))
        out: Tensor = self.conv2(torch.relu(self.norm2(grown)))
        out += self.shortcut(h)
        return out


def resnet(channels: int = 16) -> SplitModel:
    """Return a ResNet with pre-activation blocks, and a norm and a linear layer at the end."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [Residual(channels, channels), Residual(channels, 2 * channels)]
        head = nn.Sequential(
            nn.GroupNorm(channels, 2 * channels), nn.ReLU(), MeanHead(2 * channels, CLASSES)
        )
        return SplitModel(nn.Conv2d(1, channels, 3, padding=1), blocks, head)


def bare() -> SplitModel:
    """Return a model without norms: a convolution, a grouped one, a flatten, and linear layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)]
        head = nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(128, 16), nn.Linear(16, CLASSES))
        return SplitModel(nn.Conv2d(1, 8, 3, padding=1), blocks, head)


def gpt_neo() -> SplitModel:
    """Return a GPT-Neo with a window in the second block and attention without a scale."""
    return from_transformers(
        transformers.GPTNeoConfig(
            hidden_size=16, num_layers=2, num_heads=4, intermediate_size=24, vocab_size=WORDS,
            max_position_embeddings=8, attention_types=[[["global", "local"], 1]], window_size=2,
            bos_token_id=1, eos_token_id=1,
        )
    )  # fmt: skip


PICTURES = example(IMAGE, 3)
TRANSFORMERS: dict[str, tuple[Callable[[], SplitModel], Tensor]] = {
    "gpt2": (gpt2, TEXT),
    "llama": (llama, TEXT),
    "qwen2": (lambda: llama("Qwen2"), TEXT),
    "qwen3": (lambda: llama("Qwen3", head_dim=8), TEXT),
    "vit": (vit, PICTURES),
    "bert": (bert, TEXT),
    "opt": (opt, TEXT),
    "gpt_neo": (gpt_neo, TEXT),
}
NETS: dict[str, tuple[Callable[[], SplitModel], Tensor]] = {
    "resnet": (resnet, PICTURES),
    "bare": (bare, example((1, 4, 4), 3)),
}


def rescaled(model: nn.Module) -> set[str]:
    """Return the names of the rescaled layers."""
    return {
        name
        for name, module in model.named_modules()
        if any(isinstance(hook, Rescaling) for hook in module._forward_hooks.values())
    }


def count(model: SplitModel) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def shake(model: nn.Module, seed: int = 0) -> None:
    """Change all parameters: the initial ones of norms and biases hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))


def test_eight_bases_hold_an_eighth_of_the_parameters() -> None:
    """Together they hold a little more, because input and classes keep their sizes."""
    model = resnet(64)
    bases = split_width(model, 8, PICTURES)
    assert len(bases.states) == 8
    shares = {"head.2.out.bias": 1, "stem.weight": 8, "head.2.out.weight": 8}
    for state in bases.states:
        for name, p in model.named_parameters():
            share = shares.get(name, 8 if p.dim() == 1 else 64)
            assert state[name].numel() == p.numel() / share
    assert 1 / 8 < 8 * count(bases.model) / count(model) < 0.136
    assert bases.model(PICTURES).shape == (3, CLASSES)
    assert bases.model.block[1].conv1.weight.shape == (16, 8, 3, 3)


def test_bases_start_independently_and_by_the_seed() -> None:
    """Weights differ by base and by seed; torch's random number generator is unchanged."""
    model = resnet()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    torch.manual_seed(3)
    one = split_width(model, 2, PICTURES, seed=4)
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))
    again, other = (split_width(model, 2, PICTURES, seed=seed) for seed in (4, 5))
    assert one.states[0].keys() == one.model.trained().keys()
    for name, tensor in one.model.trained().items():
        assert torch.equal(tensor, one.states[0][name])
        for a, b in zip(one.states, again.states, strict=True):
            assert torch.equal(a[name], b[name])
        if tensor.dim() > 1:
            assert not torch.equal(one.states[0][name], one.states[1][name])
            assert not torch.equal(one.states[0][name], other.states[0][name])
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@settings(max_examples=6, deadline=None)
@given(bases=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_weights_start_within_the_bound_of_the_wide_layer(bases: int, seed: int) -> None:
    """The bound is ``1 / sqrt(fan_in / r)`` with the base's own fan-in, if inputs were removed."""
    split = split_width(resnet(32), bases, PICTURES, seed=seed)
    for state in split.states:
        for name, tensor in state.items():
            if tensor.dim() == 1:
                wanted = torch.full_like(tensor, name.endswith("weight"))  # of norms
                assert torch.equal(tensor, wanted), name
                continue
            fan_in = tensor[0].numel() * (1 if name == "stem.weight" else bases)
            bound = fan_in**-0.5
            assert tensor.abs().max() <= bound
            if tensor.numel() > 500:
                assert tensor.abs().max() > 0.98 * bound
                assert abs(tensor.std().item() / (bound / 3**0.5) - 1) < 0.1


def test_a_layer_whose_fan_in_stays_is_as_in_the_wide_model() -> None:
    """A depthwise convolution loses no inputs, so its initial weights and output do not change."""
    split = split_width(bare(), 4, NETS["bare"][1])
    assert rescaled(split.model) == {"block.0", "head.2"}
    bound = 9**-0.5
    assert max(state["block.1.weight"].abs().max() for state in split.states) > 0.8 * bound


def test_rescaling_multiplies_where_there_is_no_norm() -> None:
    """The output with its bias is multiplied, in training and evaluation, but not at K = 1."""
    x = NETS["bare"][1].double()
    for bases in (1, 2, 4):
        model = split_width(bare(), bases, x.float()).model
        shake(model)
        p = {n: t.double() for n, t in model.state_dict().items()}
        h = F.conv2d(x, p["stem.weight"], p["stem.bias"], padding=1)
        h = bases * F.conv2d(h, p["block.0.weight"], p["block.0.bias"], padding=1)
        h = F.conv2d(h, p["block.1.weight"], p["block.1.bias"], padding=1, groups=8 // bases)
        h = bases * F.linear(h.flatten(1).relu(), p["head.2.weight"], p["head.2.bias"])
        want = F.linear(h, p["head.3.weight"], p["head.3.bias"])
        model.double()
        torch.testing.assert_close(model.train()(x), want)
        torch.testing.assert_close(copy.deepcopy(model).eval()(x), want)


def test_rescaling_is_left_out_where_a_norm_cancels_it() -> None:
    """There the norm is the only reader; an in-place sum, a skip and a head are readers too."""
    model = split_width(resnet(), 2, PICTURES).model
    skips = {f"block.{i}.{layer}" for i in (0, 1) for layer in ("conv2", "shortcut")}
    assert rescaled(model) == skips
    shake(model)
    other = copy.deepcopy(model)
    for block in other.block:
        block.conv1.register_forward_hook(Rescaling(2))
    for module in (*model.modules(), *other.modules()):
        if isinstance(module, nn.GroupNorm):
            module.eps = 1e-14
    x = PICTURES.double()
    torch.testing.assert_close(model.double()(x), other.double()(x))
    assert rescaled(split_width(conv_model(8, 8), 2, PICTURES).model) == set()


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_what_leaves_a_block_is_rescaled(norm: Callable[[int], nn.Module]) -> None:
    """A head may read a block's output, though the next block begins with a norm."""
    inner = nn.Sequential(nn.Conv2d(8, 8, 1), norm(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    last = nn.Sequential(norm(8), nn.ReLU())
    model = SplitModel(nn.Conv2d(1, 8, 1), [inner, last], MeanHead(8, CLASSES))
    split = split_width(model, 2, PICTURES)
    assert rescaled(split.model) == {"block.0.3"}
    for state in split.states:
        for name, tensor in state.items():
            if "running" in name:
                assert torch.equal(tensor, torch.full_like(tensor, float("var" in name)))


def test_auxiliary_heads_become_narrower_too() -> None:
    """The hidden layer of an auxiliary head is before a norm; its last layer is a classifier."""
    model = resnet()
    model.add_heads([1], PICTURES, CLASSES)
    split = split_width(model, 2, PICTURES)
    assert not any(name.startswith("aux.") for name in rescaled(split.model))
    hidden, out = (split.states[1][f"aux.1.{n}.weight"] for n in ("hidden", "out"))
    assert (hidden.shape, out.shape) == ((4, 8 * 16), (CLASSES, 4))
    assert out.abs().max() <= 8**-0.5
    assert 0.95 * 256**-0.5 < hidden.abs().max() <= 256**-0.5


def test_frozen_tensors_are_kept() -> None:
    """The model has the leading slices of frozen tensors, and no state has them."""
    model = resnet()
    model.stem.requires_grad_(False)
    split = split_width(model, 2, PICTURES)
    assert "stem.weight" not in split.states[0]
    assert torch.equal(split.model.stem.weight, model.stem.weight[:8])
    gpt = gpt2()
    gpt.block[0].requires_grad_(False)
    split = split_width(gpt, 2, TEXT)
    own = split.model.block[0].layer.mlp.c_fc.weight
    assert torch.equal(own, gpt.block[0].layer.mlp.c_fc.weight[:, :32])
    assert not any(name.startswith("block.0") for name in split.states[0])


def heads_of(wide: Tensor, bases: int, parts: int, axis: int) -> Tensor:
    """Return the leading part along an axis of ``parts`` joined tensors."""
    pieces = wide.chunk(parts, axis)
    return torch.cat([p.narrow(axis, 0, p.shape[axis] // bases) for p in pieces], axis)


# By the last name of the layer: the divided axis of a weight, parts, whether it is an output.
GPT2 = {
    "attn.c_attn": (1, 3, True),
    "attn.c_proj": (0, 1, False),
    "c_fc": (1, 1, True),
    "mlp.c_proj": (0, 1, False),
}
LINEAR = {
    **dict.fromkeys(["q_proj", "k_proj", "v_proj", "query", "key", "value"], (0, 1, True)),
    **dict.fromkeys(["fc1", "gate_proj", "up_proj", "intermediate.dense", "c_fc"], (0, 1, True)),
    **dict.fromkeys(["o_proj", "out_proj", "fc2", "down_proj", "c_proj"], (1, 1, False)),
    "output.dense": (1, 1, False),
}


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_base_of_a_transformer_is_the_wide_one_without_the_others(name: str, bases: int) -> None:
    """The base equals the wide model without the other heads and units, rescaled by hand."""
    build, x = TRANSFORMERS[name]
    model = build()
    split = split_width(model, bases, x)
    shake(model)
    model, base = model.double().eval(), split.model.double().eval()
    x = x.double() if x.is_floating_point() else x
    state = {n: t.clone() for n, t in model.state_dict().items()}
    outer = set()
    for path, p in model.named_parameters():
        layer, _, kind = path.rpartition(".")
        rules = GPT2 if name == "gpt2" else LINEAR
        rule = next((r for end, r in rules.items() if layer.endswith(f".{end}")), None)
        if rule is None or not layer.startswith("block."):
            continue
        axis, parts, is_output = rule
        if kind == "weight" or is_output:
            state[path] = heads_of(p.detach(), bases, parts, min(axis, p.dim() - 1))
        if not is_output:
            outer.add(layer)
            with torch.no_grad():
                if kind == "weight":
                    p.transpose(0, axis)[p.shape[axis] // bases :] = 0
                p.mul_(bases)
    assert rescaled(base) == (outer if bases > 1 else set())
    base.load_state_dict(state)
    wanted, found = model(x), base(x)
    assert found.shape == wanted.shape
    # Some of these layers compute in float32 for every input dtype.
    error = 1e-9 if name in ("gpt2", "vit", "bert", "opt") else 1e-4
    torch.testing.assert_close(found, wanted, rtol=error, atol=error)


def test_sizes_of_a_transformer() -> None:
    """Heads, keys, values and hidden units are divided; the residual stream and tables are not."""
    base = split_width(llama(), 2, TEXT).model
    layer = base.block[0].layer
    assert layer.self_attn.q_proj.weight.shape == (8, 16)
    assert layer.self_attn.k_proj.weight.shape == (4, 16)
    assert (layer.mlp.down_proj.in_features, layer.mlp.down_proj.out_features) == (12, 16)
    assert base.stem.embedding.weight.shape == (WORDS, 16)
    base = split_width(gpt2(), 4, TEXT).model
    attention = base.block[1].layer.attn
    assert (attention.num_heads, attention.head_dim, attention.split_size) == (1, 4, 4)
    assert (attention.c_attn.nx, attention.c_attn.nf) == (16, 12)
    base.add_heads([1], TEXT, WORDS)
    assert base.answer(1, base.segment(TEXT, 1)).shape == (3, 5, WORDS)


def test_how_a_transformer_starts() -> None:
    """Tables are those of the model, tied as before; weights are within the wide layer's bound."""
    model = gpt2()
    model.add_heads([1], TEXT, WORDS)
    split = split_width(model, 2, TEXT)
    assert split.model.head.output.weight is split.model.stem.embedding.weight
    for state in split.states:
        assert torch.equal(state["stem.embedding.weight"], model.stem.embedding.weight)
        assert torch.equal(state["stem.positions.weight"], model.stem.positions.weight)
        assert not state["aux.1.up.weight"].any()
        for name, fan_in in (("attn.c_attn", 16), ("attn.c_proj", 16), ("mlp.c_proj", 64)):
            weight = state[f"block.0.layer.{name}.weight"]
            assert 0.95 * fan_in**-0.5 < weight.abs().max() <= fan_in**-0.5
            assert not state[f"block.0.layer.{name}.bias"].any()
        assert (state["block.1.layer.ln_1.weight"] == 1).all()
    images = vit()
    split = split_width(images, 2, PICTURES)
    assert torch.equal(split.states[1]["stem.cls_token"], images.stem.cls_token)
    assert split.states[1]["stem.patch_embeddings.projection.weight"].abs().max() <= 16**-0.5


@pytest.mark.parametrize("name", [*NETS, "gpt2", "vit", "llama", "bert"])
def test_stacked_states_give_the_same(name: str) -> None:
    """``functional_call`` under ``vmap`` equals a loop, in float64."""
    build, x = {**NETS, **TRANSFORMERS}[name]
    split = split_width(build(), 2, x)
    model = split.model.double().eval()
    x = x.double() if x.is_floating_point() else x
    states = [{n: t.double() for n, t in s.items()} for s in split.states]
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
    found = torch.vmap(lambda state: functional_call(model, state, (x,)))(stacked)
    wanted = torch.stack([functional_call(model, state, (x,)) for state in states])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(wanted[0], wanted[1])


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_a_step_of_a_base_can_be_traced(name: str) -> None:
    """The graph includes the rescaling and gives the same results as the step."""
    build, x = {**NETS, **TRANSFORMERS}[name]
    base = split_width(build(), 2, x).model
    classes = CLASSES if name == "resnet" else WORDS
    base.add_heads([1], x, classes)
    shake(base)
    segment = ClientSegment(base, 1)
    steps = ClientSteps(segment, get_optimizer("sgd"), get_codec("fp16"), x, classes)
    step, hyper = train(steps), {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
    y = torch.arange(3) if name == "resnet" else TEXT
    given = {**steps.initial, **steps.slots, "x": x, "y": y}
    given |= {n: torch.tensor(v) for n, v in hyper.items()}
    wanted = step.function(dict(steps.constants), given)
    found = trace(step).module()(*(given[port.spec.name] for port in step.inputs))
    for port, got in zip(step.outputs, found, strict=True):
        torch.testing.assert_close(got, wanted[port.spec.name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet", "llama"])
def test_dual_norms_of_bases(name: str) -> None:
    """Both copies have the initial values of the norm, in the model and in every state."""
    build, x = {**NETS, **TRANSFORMERS}[name]
    split = split_width(build(), 2, x)
    dual: Bases = split.with_dual_norms()
    assert rescaled(dual.model) == rescaled(split.model)
    assert list(dual.states[0]) == list(dual.model.trained())
    for state, before in zip(dual.states, split.states, strict=True):
        for n, tensor in state.items():
            single = n.replace(".clean.", ".").replace(".noise.", ".")
            assert torch.equal(tensor, before[single])
            assert tensor.data_ptr() != before[single].data_ptr()
        for value in (0, 1):
            with robustness(value):
                torch.testing.assert_close(
                    functional_call(dual.model.eval(), state, (x,)),
                    functional_call(split.model.eval(), before, (x,)),
                )
    noise = [n.replace(".noise.", ".") for n in dual.states[0] if ".noise." in n]
    wanted = [n for n in split.states[0] if "norm" in n or n.startswith("head.0.")]
    assert sorted(noise) == sorted(wanted)


def test_a_base_is_not_written_as_a_model_of_transformers(tmp_path: Any) -> None:
    """No model of transformers has the sizes of a base."""
    with pytest.raises(ExportError, match="does not come from transformers"):
        save_original(split_width(gpt2(), 2, TEXT).model, tmp_path / "out")


class Fixed(nn.Module):
    """Attention whose code contains the model's width."""

    def __init__(self, *, known: bool = True) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        if known:
            self.num_heads = 2

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        q, k, v = (
            part(h).reshape(*h.shape[:2], 2, -1).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*h.shape[:2], -1)
        result: Tensor = h + self.o_proj(mixed)
        return result


class Multihead(nn.Module):
    """Attention of torch itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, h: Tensor) -> Tensor:
        """Return activations."""
        result: Tensor = h + self.attention(h, h, h)[0]
        return result


def positions(*blocks: nn.Module) -> SplitModel:
    """Return a model for inputs (B, T, 3)."""
    return SplitModel(nn.Linear(3, 8), [*blocks, nn.LayerNorm(8)], MeanHead(8, CLASSES))


ROWS = example((5, 3), 2)
REFUSED: dict[str, tuple[Callable[[], SplitModel], int | float, Tensor, str]] = {
    "none": (resnet, 0, PICTURES, r"number of bases is 0; it must be a whole number, 1 or more"),
    "part": (resnet, 2.0, PICTURES, r"number of bases is 2\.0; it must be"),
    "channels": (resnet, 3, PICTURES, r"stem is a Conv2d with 16 output channels, of which width"),
    "heads": (gpt2, 3, TEXT, r"block\.0\.layer\.attn is a GPT2Attention whose c_attn has 4 heads"),
    "keys": (llama, 4, TEXT, r"layer\.self_attn is a LlamaAttention whose k_proj has 2 heads"),
    "units": (
        lambda: gpt2(n_inner=18),
        4,
        TEXT,
        r"block\.0\.layer\.mlp is a GPT2MLP whose c_fc has 18 hidden units, which do not divide",
    ),
    "unknown": (
        lambda: positions(Multihead(), nn.ReLU()),
        2,
        ROWS,
        r"block\.0\.attention is a MultiheadAttention, which cannot be split: there are rules for",
    ),
    "mixed": (
        lambda: positions(Fixed(), nn.Sequential(nn.Linear(8, 8))),
        2,
        ROWS,
        r"block\.1\.0 is a Linear, which cannot be split: there are rules for",
    ),
    "no heads": (
        lambda: positions(Fixed(known=False)),
        2,
        ROWS,
        r"block\.0 is a Fixed whose number of heads is not known; give it an attribute num_heads",
    ),
    "fixed": (
        lambda: positions(Fixed()),
        2,
        ROWS,
        r"does not give what it gives when all others are zero: its code mixes heads",
    ),
    "own attention": (text_model, 2, TEXT, r"stem is a Embedding, which cannot be narrowed"),
    "example": (
        gpt2,
        2,
        PICTURES,
        r"stem\.embedding is a Embedding and fails on the example: .*; give some inputs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_split_is_refused(case: str) -> None:
    """The error names the module and says what to do."""
    build, bases, x, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        split_width(build(), bases, x)  # type: ignore[arg-type]
