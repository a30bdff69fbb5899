"""Dual norms: mixtures of the two copies of a norm, against their closed form."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import cross_entropy

from export.bases.dual_norms import (
    DualNorm,
    has_dual_norms,
    noise_tensors,
    robustness,
    with_dual_norms,
)
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import ClientSegment, SplitModel, statistics
from export.errors import ExportError
from export.lowering.trace import trace
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.train import train
from tests.lib.models import (
    CLASSES,
    IMAGE,
    TOKENS,
    MeanHead,
    NormBlock,
    conv_model,
    example,
    token_model,
)


def batch_model(seed: int = 0) -> SplitModel:
    """Return two blocks with BatchNorm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [NormBlock(4) for _ in range(2)]
        for block in blocks:
            block.drop.p = 0.0
        return SplitModel(nn.Conv2d(1, 4, 3, padding=1), blocks, MeanHead(4, CLASSES))


def llama() -> SplitModel:
    """Return a Llama, whose norms are transformers' own."""
    return from_transformers(
        transformers.LlamaConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=8, vocab_size=12, max_position_embeddings=16,
        )
    )  # fmt: skip


def opt() -> SplitModel:
    """Return an OPT, whose layers join batch and positions before a norm."""
    return from_transformers(
        transformers.OPTConfig(
            hidden_size=8, num_hidden_layers=2, num_attention_heads=2, ffn_dim=8, vocab_size=12,
            max_position_embeddings=16, word_embed_proj_dim=8, dropout=0.0,
        )
    )  # fmt: skip


WORDS = torch.arange(15).reshape(3, 5) % 12
MODELS: dict[str, tuple[Callable[[], SplitModel], Tensor]] = {
    "group": (conv_model, example(IMAGE, 3)),
    "layer": (token_model, example(TOKENS, 3)),
    "batch": (batch_model, example(IMAGE, 3)),
    "rms": (llama, WORDS),
    "joined": (opt, WORDS),
}


def shake(module: nn.Module, seed: int) -> None:
    """Give the copies of dual norms different parameters and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, DualNorm):
            for tensor in (*part.parameters(), *statistics(part).values()):
                with torch.no_grad():
                    tensor.mul_(0.5 + torch.rand(tensor.shape, generator=generator))
                    tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))


def dual_model(name: str, seed: int = 1) -> tuple[SplitModel, Tensor]:
    """Return a model in float64 whose copies differ, and some inputs."""
    build, x = MODELS[name]
    model = with_dual_norms(build())
    shake(model, seed)
    return model.double().eval(), x.double() if x.is_floating_point() else x


def only(model: SplitModel, copied: str) -> SplitModel:
    """Return the model with only one of the copies."""
    result = copy.deepcopy(model)
    for parent in list(result.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, DualNorm):
                setattr(parent, key, getattr(child, copied))
    return result


@pytest.mark.parametrize("name", MODELS)
def test_the_ends_are_models_with_one_copy(name: str) -> None:
    """0 and no context give clean, 1 gives noise; numbers and tensors give the same results."""
    model, x = dual_model(name)
    clean, noise = only(model, "clean")(x), only(model, "noise")(x)
    assert not torch.allclose(clean, noise)
    assert torch.equal(model(x), clean)
    for value in (0, 0.0, False):
        with robustness(value):
            assert torch.equal(model(x), clean)
    with robustness(1):
        assert torch.equal(model(x), noise)
    with robustness(torch.tensor(1.0)):
        torch.testing.assert_close(model(x), noise, rtol=1e-12, atol=1e-12)
    with robustness(torch.tensor([0.0, 1.0, 0.0])):
        torch.testing.assert_close(
            model(x), torch.stack([clean[0], noise[1], clean[2]]), rtol=1e-12, atol=1e-12
        )


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(3, 4), (3, 4, 5), (3, 4, 2, 5)]),
    values=st.lists(st.floats(0, 1, width=32), min_size=3, max_size=3),
    seed=st.integers(0, 999),
)
def test_a_mixture_is_the_closed_form(
    shape: tuple[int, ...], values: list[float], seed: int
) -> None:
    """The result is ``(1 - l) (g h^ + b) + l (g' h^ + b')``, for one ``l`` and one per row."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(shape, generator=generator, dtype=torch.float64)
    norm = DualNorm(nn.GroupNorm(2, 4)).double()
    shake(norm, seed)
    grouped = h.reshape(3, 2, -1)
    centred = grouped - grouped.mean(2, keepdim=True)
    hat = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).reshape(shape)

    def affine(part: nn.Module) -> Tensor:
        size = (4, *[1] * (len(shape) - 2))
        return hat * part.weight.reshape(size) + part.bias.reshape(size)

    clean, noise = affine(norm.clean), affine(norm.noise)
    rows = torch.tensor(values, dtype=torch.float64)
    share = rows.reshape(3, *[1] * (len(shape) - 1))
    with robustness(rows):
        torch.testing.assert_close(norm(h), (1 - share) * clean + share * noise)
    for one in (values[0], rows[0]):
        with robustness(one):
            torch.testing.assert_close(norm(h), (1 - share[0]) * clean + share[0] * noise)


@pytest.mark.parametrize("name", ["group", "joined"])
def test_rows_have_each_their_own(name: str) -> None:
    """A batch with one robustness per row gives the same results as its rows alone."""
    model, x = dual_model(name)
    values = torch.tensor([0.25, 0.75, 1.0], dtype=torch.float64)
    with robustness(values):
        together = model(x)
    for row, value in enumerate(values.tolist()):
        with robustness(value):
            torch.testing.assert_close(together[row : row + 1], model(x[row : row + 1]))


def test_contexts_nest_and_end() -> None:
    """The innermost context counts; the outer one is restored, also after an error."""
    norm = DualNorm(nn.LayerNorm(4))
    shake(norm, 0)
    h = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    with robustness(1):
        with robustness(0.5):
            torch.testing.assert_close(norm(h), (norm.clean(h) + norm.noise(h)) / 2)
        with pytest.raises(ZeroDivisionError), robustness(0.5):
            raise ZeroDivisionError
        assert torch.equal(norm(h), norm.noise(h))
    assert torch.equal(norm(h), norm.clean(h))


def test_statistics_of_the_copy_in_use_move() -> None:
    """In training, 0 or 1 changes the statistics of one copy, and other values are refused."""
    norm = DualNorm(nn.BatchNorm1d(4))
    h = 3 + torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    norm(h)
    torch.testing.assert_close(norm.clean.running_mean, 0.1 * h.mean(0))
    assert not norm.noise.running_mean.any()
    with robustness(1):
        norm(h - 6)
    torch.testing.assert_close(norm.clean.running_mean, 0.1 * h.mean(0))
    torch.testing.assert_close(norm.noise.running_mean, 0.1 * (h - 6).mean(0))
    for value in (0.5, torch.tensor(0.0), torch.zeros(8)):
        with robustness(value), pytest.raises(ExportError, match="give 0 or 1 while training"):
            norm(h)
        with robustness(value):
            norm.eval()(h)
        norm.train()


@pytest.mark.parametrize("value", [0, 1])
def test_the_copy_that_is_not_used_has_gradients_of_zero(value: int) -> None:
    """The gradients of the other copy are those of a model with that copy only."""
    model, x = dual_model("group")
    copies = ("clean", "noise")
    single = only(model, copies[value])
    with robustness(value):
        model(x).square().sum().backward()
    single(x).square().sum().backward()
    want = {n: p.grad for n, p in single.named_parameters()}
    for name, p in model.named_parameters():
        if f".{copies[1 - value]}." in name:
            assert not p.grad.any()
        else:
            torch.testing.assert_close(p.grad, want[name.replace(f".{copies[value]}", "")])


def test_every_norm_but_those_of_auxiliary_heads() -> None:
    """Names and modes are kept, both copies are equal, and the given model is unchanged."""
    model = conv_model()
    model.add_heads([2], example(IMAGE), CLASSES)
    model.block[1].eval()
    before = set(model.state_dict())
    dual = with_dual_norms(model)
    assert set(model.state_dict()) == before
    assert (has_dual_norms(model), has_dual_norms(dual)) == (False, True)
    assert isinstance(dual.aux["2"].norm, nn.LayerNorm)
    state = dual.state_dict()
    assert torch.equal(state["block.0.norm.clean.weight"], model.block[0].norm.weight)
    assert torch.equal(state["block.0.norm.noise.weight"], model.block[0].norm.weight)
    assert len(state) == len(before) + 2 * 4
    assert [dual.block[i].norm.training for i in (0, 1)] == [True, False]
    assert dual.block[2][1].noise.num_groups == 2
    assert isinstance(with_dual_norms(llama()).head.norm, DualNorm)
    assert {layer.partition(".")[0] for layer in dual.layers()} == {"stem", "block", "aux", "head"}


def test_a_norm_in_two_places_stays_one() -> None:
    """Both places share one pair of copies; norms without tensors are not copied."""
    model = token_model()
    model.block[1].norm = model.block[0].norm
    model.block[2].norm = nn.LayerNorm(8, elementwise_affine=False)
    dual = with_dual_norms(model)
    assert dual.block[1].norm is dual.block[0].norm
    assert isinstance(dual.block[2].norm, nn.LayerNorm)


@pytest.mark.parametrize("name", ["group", "batch"])
def test_stacked_states_give_the_same(name: str) -> None:
    """``functional_call`` under ``vmap`` equals a loop, with a robustness and without."""
    model, x = dual_model(name)
    states = []
    for seed in range(3):
        shake(model, seed)
        states.append({n: t.detach().clone() for n, t in model.trained().items()})
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
    for value in (0, 1, 0.5, torch.tensor(0.3), torch.tensor([0.1, 0.5, 0.9])):
        with robustness(value):
            found = torch.vmap(lambda state: functional_call(model, state, (x,)))(stacked)
            wanted = torch.stack([functional_call(model, state, (x,)) for state in states])
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_stacked_states_have_the_same_gradients() -> None:
    """``grad`` under ``vmap`` equals autograd in a loop; the unused copy has zero gradients."""
    model, x = dual_model("group")
    states = []
    for seed in range(2):
        shake(model, seed)
        states.append({n: t.detach().clone() for n, t in model.trained().items()})
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}

    def loss(state: dict[str, Tensor]) -> Tensor:
        result: Tensor = functional_call(model, state, (x,)).square().sum()
        return result

    found = torch.vmap(torch.func.grad(loss))(stacked)
    for i, state in enumerate(states):
        leaves = {n: t.requires_grad_() for n, t in state.items()}
        loss(leaves).backward()
        for name, leaf in leaves.items():
            torch.testing.assert_close(found[name][i], leaf.grad)
            assert bool(leaf.grad.any()) is (".noise." not in name)


@pytest.mark.parametrize("name", ["group", "joined"])
def test_the_robustness_can_be_an_input_of_a_graph(name: str) -> None:
    """One trace is valid for every value and every batch."""
    model, x = dual_model(name)

    def function(x: Tensor, value: Tensor) -> Tensor:
        with robustness(value):
            return model(x)

    for value in (torch.tensor(0.5), torch.rand(3)):
        graph = make_fx(function, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x, value)
        for rows in (3, 5):
            inputs = torch.cat([x, x])[:rows]
            other = torch.rand((rows,) if value.dim() else ())
            with robustness(other):
                torch.testing.assert_close(graph(inputs, other), model(inputs))


def test_a_training_step_leaves_the_noise_copy() -> None:
    """The noise copy does not change; all other gradients equal autograd's, also when traced."""
    model = with_dual_norms(batch_model())
    x, y = example(IMAGE), torch.arange(8)
    model.add_heads([1], x, CLASSES)
    shake(model, 0)
    segment = ClientSegment(model, 1)
    steps = ClientSteps(segment, get_optimizer("sgd"), get_codec("fp16"), x, CLASSES)
    step = train(steps)
    hyper = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    given = {**steps.initial, **steps.slots, "x": x, "y": y}
    given |= {n: torch.tensor(v) for n, v in hyper.items()}
    after = step.function(dict(steps.constants), given)
    inputs = [given[port.spec.name] for port in step.inputs]
    reference = copy.deepcopy(segment).train()
    cross_entropy(reference(x)[1][0], y).backward()
    wanted = statistics(reference)
    for name, p in reference.named_parameters():
        wanted[name] = p.detach() - 0.5 * p.grad
    for name, tensor in steps.initial.items():
        torch.testing.assert_close(after[f"next/{name}"], wanted[name], msg=name)
        assert torch.equal(after[f"next/{name}"], tensor) is (".noise." in name)
    traced = trace(step).module()(*inputs)
    for port, found in zip(step.outputs, traced, strict=True):
        name = port.spec.name
        torch.testing.assert_close(found, after[name], rtol=1e-4, atol=1e-5, msg=name)


def test_names_of_noise_tensors() -> None:
    """They are the parameters and statistics of the noise copies, and no others."""
    model = with_dual_norms(batch_model())
    assert noise_tensors(model) == {n for n in model.state_dict() if ".noise." in n}


def test_mistakes_are_refused() -> None:
    """Every error says what to do."""
    for value in (-0.1, 1.5, float("nan")):
        with pytest.raises(ExportError, match=r"must be from 0 .* to 1"), robustness(value):
            pass
    wrong = pytest.raises(ExportError, match=r"shape \[2, 1\]; it must be one number")
    with wrong, robustness(torch.zeros(2, 1)):
        pass
    model, x = dual_model("group")
    with robustness(torch.zeros(2)), pytest.raises(ExportError, match=r"2 rows and the activ.* 3"):
        model(x)
    with pytest.raises(ExportError, match="has dual norms already"):
        with_dual_norms(model)
    untracked = batch_model()
    untracked.block[1].norm = nn.BatchNorm2d(4, track_running_stats=False)
    message = r"block\.1\.norm is a BatchNorm2d .* use GroupNorm, or track_running_stats=True"
    with pytest.raises(ExportError, match=message):
        with_dual_norms(untracked)
    plain = SplitModel(nn.Linear(2, 2), [nn.Linear(2, 2), nn.ReLU()], nn.Linear(2, 2))
    with pytest.raises(ExportError, match="there is no norm"):
        with_dual_norms(plain)
