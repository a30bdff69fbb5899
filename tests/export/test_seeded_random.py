"""Random numbers of a step come from its seed, or the export is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.bundles.writer import Tier, export_bundles
from export.cutting.checks import check_stages
from export.cutting.seeded_random import PRIME, SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.lowering.graph_files import lower
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.returned import activate
from tests.lib.operators import DropPath, Noise

COUNT = 100_000

UNIFORM: dict[str, Callable[[Tensor], Tensor]] = {
    "rand": lambda x: torch.rand(x.shape[0]),
    "rand of a shape": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "rand of a size": lambda x: torch.rand(size=(x.shape[0],)),
    "rand_like": torch.rand_like,
    "uniform_": lambda x: torch.empty_like(x).uniform_(),
}

BERNOULLI: dict[str, Callable[[Tensor], Tensor]] = {
    "bernoulli of probabilities": lambda x: torch.bernoulli(torch.full_like(x, 0.3)),
    "bernoulli method": lambda x: torch.full_like(x, 0.3).bernoulli(),
    "bernoulli with a number": lambda x: torch.bernoulli(x, 0.3),
    "bernoulli_": lambda x: x.new_empty(x.shape).bernoulli_(0.3),
    "bernoulli_ of a tensor": lambda x: x.new_empty(x.shape).bernoulli_(torch.full((1,), 0.3)),
    "floor": lambda x: torch.rand_like(x).add_(0.3).floor_(),
}

NORMAL: dict[str, Callable[[Tensor], Tensor]] = {
    "randn": lambda x: torch.randn(x.shape[0]),
    "randn of a shape": lambda x: torch.randn(x.shape, dtype=x.dtype),
    "randn of a size": lambda x: torch.randn(size=(x.shape[0],)),
    "randn_like": torch.randn_like,
    "normal_": lambda x: torch.empty_like(x).normal_(),
    "normal_ with bounds": lambda x: (torch.empty_like(x).normal_(3, std=2) - 3) / 2,
}


@pytest.mark.parametrize("draw", [*UNIFORM.values(), *BERNOULLI.values(), *NORMAL.values()])
def test_draws_come_from_the_seed(draw: Callable[[Tensor], Tensor]) -> None:
    """One seed repeats them; calls within a step differ, and so do seeds."""

    def drawn(seed: int) -> list[Tensor]:
        with SeededDropout(torch.tensor(seed)):
            return [draw(torch.zeros(1000)) for _ in range(2)]

    one, again, other = drawn(5), drawn(5), drawn(6)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], other[0])


@pytest.mark.parametrize("draw", UNIFORM.values())
def test_uniform_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    """Ten bins are as full as chance says: chi-square; the bounds are those of torch."""
    with SeededDropout(torch.tensor(PRIME - 1)):
        drawn = draw(torch.zeros(COUNT))
    counts = torch.histc(drawn.double(), 10, 0, 1)
    assert abs((((counts - COUNT / 10) ** 2) / (COUNT / 10)).sum() - 9) < 5 * 18**0.5
    assert drawn.min() >= 0
    assert drawn.max() < 1


@pytest.mark.parametrize("draw", BERNOULLI.values())
def test_bernoulli_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    """The rate is the probability; all numbers are 0 or 1."""
    with SeededDropout(torch.tensor(3)):
        drawn = draw(torch.zeros(COUNT))
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert abs(drawn.mean().item() - 0.3) < 5 * (0.3 * 0.7 / COUNT) ** 0.5


@pytest.mark.parametrize("draw", NORMAL.values())
def test_normal_numbers(draw: Callable[[Tensor], Tensor]) -> None:
    """Ten equally likely bins are as full as chance says; the tails are those of a normal one."""
    with SeededDropout(torch.tensor(11)):
        drawn = draw(torch.zeros(COUNT)).double()
    counts = torch.histc(torch.special.ndtr(drawn), 10, 0, 1)
    assert abs((((counts - COUNT / 10) ** 2) / (COUNT / 10)).sum() - 9) < 5 * 18**0.5
    beyond = 0.0027 * COUNT  # three standard deviations
    assert abs((drawn.abs() > 3).sum() - beyond) < 5 * beyond**0.5
    assert drawn.isfinite().all()


def test_two_normal_draws_are_independent() -> None:
    with SeededDropout(torch.tensor(4)):
        one, other = torch.randn(COUNT), torch.randn(COUNT)
    assert abs((one * other).mean()) < 5 / COUNT**0.5
    assert abs((one[1:] * one[:-1]).mean()) < 5 / COUNT**0.5


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_alpha_dropout(p: float) -> None:
    """What is kept is torch's value, what is dropped too; mean and variance stay."""
    x = torch.randn(COUNT, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with SeededDropout(torch.tensor(4)):
        found = F.alpha_dropout(x, p, training=True)
    torch.manual_seed(0)
    torchs = F.alpha_dropout(x, p, training=True)
    dropped = torchs.mode().values
    ours = torch.isclose(found, dropped)
    both = ~ours & ~torch.isclose(torchs, dropped)
    torch.testing.assert_close(found[both], torchs[both])
    assert abs(ours.double().mean() - p) < 5 * (p * (1 - p) / COUNT) ** 0.5
    assert abs(found.mean()) < 5 / COUNT**0.5
    assert abs(found.var() - 1) < 0.05
    with SeededDropout(torch.tensor(4)):
        assert torch.equal(F.alpha_dropout(x, p, training=False), x)
        assert not F.alpha_dropout(x, 1.0, training=True).any()


def test_bounds_of_uniform_numbers() -> None:
    """Bounds may be given by place or by name."""
    with SeededDropout(torch.tensor(3)):
        for drawn in (
            torch.empty(1000).uniform_(2, 3),
            torch.empty(1000).uniform_(**{"from": 2, "to": 3}),
        ):
            assert 2 <= drawn.min() < 2.1
            assert 2.9 < drawn.max() < 3


def test_float32_and_float64_draw_the_same_numbers() -> None:
    """Otherwise a mask computed from them would differ between a graph and its reference."""
    with SeededDropout(torch.tensor(3)):
        narrow = torch.rand(COUNT)
    with SeededDropout(torch.tensor(3)):
        wide = torch.rand(COUNT, dtype=torch.float64)
    assert torch.equal(narrow.double(), wide)


@pytest.mark.parametrize("form", ["bernoulli", "floor"])
def test_activate_repeats_a_drop_path(form: str) -> None:
    """``activate`` and ``backward`` must compute the same activations from one seed."""
    model = SplitModel(nn.Linear(3, 4), [DropPath(form), nn.Identity()], nn.Identity())
    x = torch.ones(500, 3)
    model.add_heads([1], x, 2)
    segment = ClientSegment(model, 1)
    given = (segment, get_optimizer("sgd"), get_codec("fp16"), x, 2)
    steps = ClientSteps(*given, graphs=["backward"])
    session = ort.InferenceSession(lower("onnx", [activate(steps)], {}).files["activate"])

    def run(seed: int) -> np.ndarray[Any, Any]:
        feeds = {n: t.numpy() for n, t in steps.initial.items()}
        feeds |= {"x": x.numpy(), "seed": np.asarray(seed)}
        feeds = {port.name: feeds[port.name] for port in session.get_inputs()}
        return np.asarray(session.run(None, feeds)[0])

    one, again, other = run(7), run(7), run(8)
    np.testing.assert_array_equal(one, again)
    kept = one.any(1)
    assert (kept != other.any(1)).any()
    assert abs(kept.mean() - 0.7) < 5 * (0.7 * 0.3 / len(x)) ** 0.5


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "normal": (lambda h: torch.normal(h, h.exp()), "aten.normal"),
    "randint": (lambda h: torch.randint(3, h.shape).float(), "aten.randint"),
    "randperm": (lambda h: h[:, torch.randperm(4)], "aten.randperm"),
    "multinomial": (lambda h: h.softmax(1).multinomial(4).float(), "aten.multinomial"),
    "exponential_": (lambda h: torch.empty_like(h).exponential_(), "aten.exponential_"),
    "feature_alpha_dropout": (lambda h: F.feature_alpha_dropout(h, 0.5, True), "aten.bernoulli_"),
    "rrelu": (lambda h: F.rrelu(h, training=True), "aten.rrelu_with_noise"),
    "gumbel_softmax": (lambda h: F.gumbel_softmax(h), "aten.exponential_"),
    "out": (lambda h: torch.rand(h.shape, out=torch.empty(h.shape)), "aten.rand"),
    "python": (lambda h: h * random.random(), "random numbers of Python or NumPy"),
    "numpy": (lambda h: h * np.random.rand(), "random numbers of Python or NumPy"),
}


class Inside(nn.Module):
    """A module inside of a block."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), inner

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        result: Tensor = self.inner(self.first(h))
        return result


@pytest.mark.parametrize("name", REFUSED)
def test_other_random_operators_are_refused(name: str) -> None:
    """The message says the module, the operator, the reason and what to use."""
    draw, said = REFUSED[name]
    block = Inside(Noise(draw))
    model = SplitModel(nn.Linear(3, 4), [block, nn.Identity()], nn.Identity())
    with pytest.raises(ExportError) as caught:
        check_stages(model, 1, torch.randn(8, 3))
    place = "block.0 is a Inside" if "Python" in said else "block.0.inner is a Noise"
    assert str(caught.value).startswith(f"{place}: it draws random numbers ")
    assert said in str(caught.value)
    assert "use dropout" in str(caught.value) or "use torch.rand or dropout" in str(caught.value)


class Always(nn.Module):
    """Draws random numbers in evaluation as well."""

    def forward(self, h: Tensor) -> Tensor:
        """Activations of the same shape."""
        return h * torch.rand_like(h)


def test_nothing_random_in_evaluation() -> None:
    """Graphs of inference have no seed."""
    model = SplitModel(nn.Linear(3, 4), [Always(), nn.Identity()], nn.Identity())
    with pytest.raises(ExportError, match=r"block.0 is a Always: it draws .* in evaluation"):
        check_stages(model, 1, torch.randn(8, 3))


class RandomHead(nn.Module):
    """An auxiliary head with noise, which only the traced graph shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, h: Tensor) -> Tensor:
        """Logits (batch, classes)."""
        result: Tensor = self.norm(h) + torch.empty_like(h).exponential_()
        return result


def test_a_random_head_is_refused(tmp_path: Path) -> None:
    """Random operators are found wherever they are."""
    model = SplitModel(nn.Linear(3, 4), [nn.Tanh(), nn.Identity()], nn.Identity())
    model.aux["1"] = RandomHead()
    with pytest.raises(ExportError, match=r"aux.1 is a RandomHead: it draws .* aten.exponential"):
        export_bundles(
            model, {"a": Tier(1)}, tmp_path / "out", example=torch.randn(8, 3), classes=4
        )
    assert not list(tmp_path.iterdir())
