"""Split-Mix: a wide model as many narrow base networks, of which a device trains and mixes some.

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747) divides a network by width into
``K`` base networks of the same structure that share nothing. A device trains as many as it can
afford, and answers with the mean of the logits of any number of them.

Convolutional nets and MLPs get ``1/K`` of the channels of every inner layer. Transformers keep the
width of their residual stream; every attention has ``1/K`` of its heads and every MLP ``1/K`` of
its hidden units.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.adapters import TransformersModel
from export.dropout import CONVOLUTIONS
from export.dual_norm import DualNorm, is_norm, with_dual_norms
from export.errors import ExportError
from export.heads import TokenHead
from export.names import is_statistic
from export.split import SplitModel
from export.width import answers_of, called, find_layers, narrow


@dataclass(frozen=True)
class Bases:
    """The base networks of a model.

    Attributes:
        model: the structure of one, rescaling included; its weights are those of the first.
        states: of each, the tensors that ``model.trained()`` has, at their start.
    """

    model: SplitModel
    states: list[dict[str, Tensor]]

    def with_dual_norms(self) -> Bases:
        """The same with :func:`export.dual_norm.with_dual_norms`, both copies as the norms are.

        Raises:
            ExportError: as :func:`export.dual_norm.with_dual_norms`.
        """
        model = with_dual_norms(self.model)
        norms = [n for n, m in model.named_modules() if isinstance(m, DualNorm)]
        names = {
            f"{norm}.{copied}.{own}": f"{norm}.{own}"
            for norm in norms
            for copied in ("clean", "noise")
            for own in dict(model.get_submodule(f"{norm}.clean").state_dict())
        }
        states = [
            {name: state[names.get(name, name)].clone() for name in model.trained()}
            for state in self.states
        ]
        return Bases(model, states)


def split_width(model: SplitModel, bases: int, example: Tensor, *, seed: int = 0) -> Bases:
    """Split a model by width into independent base networks, newly initialised.

    Of what the model has learned only embeddings, positions and class tokens stay, and whatever is
    frozen (the leading slices of it). Convolutions and linear layers start uniform within
    ``1 / sqrt(fan_in)``, as torch starts them, but with the fan-in of the *wide* layer. Biases
    start at 0, norms as the identity. A :class:`export.heads.TokenHead` stays as it is.

    A layer that lost inputs gives its output, bias included, times ``bases``. The classifier is not
    rescaled, nor a layer whose output only goes into a norm, where a factor cancels.

    Auxiliary heads are better put on the base afterwards: those of the model become narrower, too.

    Args:
        model: what :func:`export.width.narrow` takes; or a transformer, as
            :func:`export.adapters.from_transformers` makes them.
        bases: how many, ``K``.
        example: some inputs (batch, ...) like those that devices will have.
        seed: of the initialisation, 0 or more. A base's depends on the seed and its number.

    Raises:
        ExportError: ``bases`` is no whole number above 0; channels, heads or hidden units of a
            layer do not divide by it; or a module is of a kind that cannot be split.
    """
    if not isinstance(bases, int) or isinstance(bases, bool) or bases < 1:
        raise ExportError(f"the number of bases is {bases!r}; it must be a whole number, 1 or more")
    transformer = any(_is_attention(module) for module in model.block.modules())
    if transformer:
        units = _find_units(model, bases)
        _check(model, units, bases, example)
        base = _divide(model, units, bases)
        classifiers: set[str] = set()  # they lose no inputs
    else:
        try:
            base = narrow(model, 1 / bases, example)
        except ExportError as error:
            raise ExportError(f"the model cannot be split into {bases} bases: {error}") from error
        classifiers = {n.name for n in find_layers(base, example) if n.keeps_output}
    if isinstance(base, TransformersModel):
        base = _without_origin(base)
    wide = {n: _fan_in(m) for n, m in model.named_modules() if _is_weight(m)}
    rescaled = [
        name
        for name, fan_in in wide.items()
        if _fan_in(base.get_submodule(name)) < fan_in and name not in classifiers
    ]
    for name in sorted(set(rescaled) - _under_norms(base, rescaled, example)):
        base.get_submodule(name).register_forward_hook(Rescaling(bases))
    bounds = {name: fan_in**-0.5 for name, fan_in in wide.items()}  # as torch's, at one base
    states = [_start(base, bounds, _generator(seed, number)) for number in range(bases)]
    with torch.no_grad():
        for name, tensor in base.trained().items():
            tensor.copy_(states[0][name])
        for name, counter in base.named_buffers():
            if name.endswith(".num_batches_tracked"):
                counter.zero_()
    return Bases(base, states)


class Rescaling:
    """Forward hook of a layer that lost inputs: multiplies what it gives.

    In training and in evaluation: a function that differed between the two would be another network
    than the one that was trained. The paper's code does it in training only and relies on norms.

    Args:
        factor: of inputs in the wide layer to those in this one.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, h: Tensor) -> Tensor:
        """``factor * h``."""
        return h * self.factor


def _without_origin(model: TransformersModel) -> SplitModel:
    """The same layers: no model of transformers has their sizes, so none can be written."""
    result = SplitModel(model.stem, list(model.block), model.head, model.task)
    result.aux, result.training = model.aux, model.training
    return result


# -- initialisation


def _generator(seed: int, base: int) -> torch.Generator:
    drawn = np.random.SeedSequence([seed, base]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(drawn[0]))


def _start(
    base: SplitModel, bounds: Mapping[str, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """The trained tensors of a fresh base network."""
    kept = {
        p
        for module in base.modules()
        if isinstance(module, (nn.Embedding, TokenHead))  # a classifier may be tied to the table
        for p in module.parameters()
    }
    fresh: dict[Tensor, Tensor] = {}
    for name, module in base.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if p in kept or p in fresh:
                continue
            if name in bounds and own == "weight":
                drawn = torch.empty(p.shape, dtype=p.dtype)
                drawn.uniform_(-bounds[name], bounds[name], generator=generator)
                fresh[p] = drawn.to(p.device)
            elif name in bounds or (is_norm(module) and own == "bias"):
                fresh[p] = torch.zeros_like(p)
            elif is_norm(module):
                fresh[p] = torch.ones_like(p)
    return {
        name: torch.full_like(tensor, float(name.endswith("var")))
        if is_statistic(name)
        else fresh.get(tensor, tensor).detach().clone()
        for name, tensor in base.trained().items()
    }


# -- rescaling


def _under_norms(model: SplitModel, names: list[str], example: Tensor) -> set[str]:
    """Those of the layers whose output goes into a norm and nowhere else.

    Autograd's graph of the answers tells: the node of the output is the one that a norm receives
    (not changed in place since), and one other node reads it. What leaves a block has a reader more
    than these, as a head may be put there.
    """
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
    made: dict[str, list[Any]] = {name: [] for name in names}
    received: set[Any] = set()
    readers: Counter[Any] = Counter()

    def on(module: nn.Module, note: Callable[[Any], None]) -> None:
        module.register_forward_hook(lambda module, args, h: note(h.grad_fn))

    for name, nodes in made.items():
        on(model.get_submodule(name), nodes.append)
    for stage in (model.stem, *model.block):
        on(stage, lambda node: readers.update([node]))
    for module in model.modules():
        if is_norm(module):
            module.register_forward_pre_hook(lambda module, args: received.add(args[0].grad_fn))
    x = example[:2].detach().cpu()
    with torch.enable_grad():
        answers = answers_of(
            model,
            x.double() if x.is_floating_point() else x,
            "on the example",
            "give some inputs as devices have them",
        )
    todo, seen = [logits.grad_fn for logits in answers], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [n for n, _ in node.next_functions if n is not None]
        readers.update(before)
        todo.extend(before)
    return {
        name
        for name, nodes in made.items()
        if all(node in received and readers[node] == 1 for node in nodes)
    }


# -- transformers


@dataclass(frozen=True)
class _Layout:
    """Where the layers of an attention or an MLP are.

    Attributes:
        inner: layers whose outputs are divided.
        outer: the layer that reads them, from which a base has the inputs that are left.
        fused: how many outputs of the same kind an inner layer joins.
    """

    inner: tuple[str, ...]
    outer: str
    fused: int = 1


_ATTENTIONS = (
    _Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),
    _Layout(("q_proj", "k_proj", "v_proj"), "out_proj"),
    _Layout(("c_attn",), "c_proj", fused=3),
    _Layout(("self.query", "self.key", "self.value"), "output.dense"),
)
_MLPS = (
    _Layout(("fc1",), "fc2"),
    _Layout(("c_fc",), "c_proj"),
    _Layout(("gate_proj", "up_proj"), "down_proj"),
    _Layout(("intermediate.dense",), "output.dense"),
)
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size")
"""What attentions of transformers remember of sizes that are divided."""

_SUPPORTED = (
    "there are rules for attention of q_proj, k_proj, v_proj and o_proj or out_proj; of c_attn and "
    "c_proj; of self.query, self.key, self.value and output.dense; for MLPs of fc1 and fc2, c_fc "
    "and c_proj, gate_proj, up_proj and down_proj, intermediate.dense and output.dense; and norms"
)


@dataclass(frozen=True)
class _Unit:
    """An attention or an MLP of a model, by name, with its layout."""

    name: str
    layout: _Layout

    @property
    def inner(self) -> list[str]:
        """Names of the layers whose outputs are divided."""
        return [f"{self.name}.{layer}" for layer in self.layout.inner]

    @property
    def outer(self) -> str:
        """Name of the layer that reads them."""
        return f"{self.name}.{self.layout.outer}"


def _is_attention(module: nn.Module) -> bool:
    known = any(_fits(module, layout) for layout in _ATTENTIONS)
    return known or isinstance(module, nn.MultiheadAttention)


def _fits(module: nn.Module, layout: _Layout) -> bool:
    try:
        for name in (*layout.inner, layout.outer):
            module.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer is one of transformers' ``Conv1D``: linear, with weights (in, out)."""
    return type(module).__name__ == "Conv1D"


def _is_weight(module: nn.Module) -> bool:
    return isinstance(module, (*CONVOLUTIONS, nn.Linear)) or _is_transposed(module)


def _fan_in(module: nn.Module) -> int:
    weight = module.get_parameter("weight")
    return len(weight) if _is_transposed(module) else weight[0].numel()


def _find_units(model: SplitModel, bases: int) -> list[_Unit]:
    """Attentions and MLPs of the blocks, all of whose sizes divide by ``bases``."""
    units: list[_Unit] = []
    known: set[str] = set()
    blocks = [(f"block.{n}", m) for n, m in model.block.named_modules() if n]
    for name, module in blocks:
        for layout in (*_ATTENTIONS, *_MLPS):
            if _fits(module, layout):
                units.append(_Unit(name, layout))
                known.update(units[-1].inner, [units[-1].outer])
    for name, module in blocks:
        wanted = not is_norm(module) and next(module.parameters(recurse=False), None) is not None
        splits = name in known and (isinstance(module, nn.Linear) or _is_transposed(module))
        if wanted and not splits:
            raise ExportError(f"{called(name, module)}, which cannot be split: {_SUPPORTED}")
    for unit in units:
        module = model.get_submodule(unit.name)
        for layer, count in zip(unit.inner, _sizes(model, unit), strict=True):
            if count % bases:
                what = "heads" if unit.layout in _ATTENTIONS else "hidden units"
                raise ExportError(
                    f"{called(unit.name, module)} whose {layer.removeprefix(f'{unit.name}.')} "
                    f"has {count} {what}, which do not divide by {bases}; take another number of "
                    "bases"
                )
    return units


def _outputs(layer: nn.Module) -> int:
    return layer.get_parameter("weight").shape[1 if _is_transposed(layer) else 0]


def _sizes(model: SplitModel, unit: _Unit) -> list[int]:
    """Heads, or hidden units, of each inner layer."""
    outputs = [_outputs(model.get_submodule(n)) // unit.layout.fused for n in unit.inner]
    if unit.layout not in _ATTENTIONS:
        return outputs
    holder = model.get_submodule(unit.inner[0].rpartition(".")[0])
    for name in ("head_dim", "attention_head_size"):
        if isinstance(size := getattr(holder, name, None), int):
            return [n // size for n in outputs]
    for name in ("num_heads", "num_attention_heads"):
        if isinstance(heads := getattr(holder, name, None), int):
            return [n // (outputs[0] // heads) for n in outputs]
    raise ExportError(
        f"{called(unit.name, holder)} whose number of heads is not known; give it an attribute "
        "num_heads or head_dim"
    )


def _divide(model: SplitModel, units: list[_Unit], bases: int) -> SplitModel:
    """A copy with the leading heads and hidden units, under the same names."""
    result = copy.deepcopy(model)
    for unit in units:
        for name in unit.inner:
            layer = result.get_submodule(name)
            rows = torch.arange(_outputs(layer)).reshape(unit.layout.fused, -1)
            kept = rows[:, : rows.shape[1] // bases].flatten()
            _keep(layer, kept, 1 if _is_transposed(layer) else 0)
        outer = result.get_submodule(unit.outer)
        _keep(outer, torch.arange(_fan_in(outer) // bases), 0 if _is_transposed(outer) else 1)
        holder = result.get_submodule(unit.inner[0].rpartition(".")[0])
        for name in _COUNTS if unit.layout in _ATTENTIONS else ():
            if isinstance(count := getattr(holder, name, None), int):
                setattr(holder, name, count // bases)
    return result


def _keep(layer: nn.Module, kept: Tensor, axis: int) -> None:
    """Cut a linear layer down to some of its outputs, or inputs."""
    outputs = axis == (1 if _is_transposed(layer) else 0)
    for name, p in list(layer.named_parameters(recurse=False)):
        if name == "weight" or outputs:
            part = p.detach().index_select(min(axis, p.dim() - 1), kept.to(p.device))
            setattr(layer, name, nn.Parameter(part, p.requires_grad))
    sizes = ("nf", "nx") if _is_transposed(layer) else ("out_features", "in_features")
    setattr(layer, sizes[0 if outputs else 1], len(kept))


def _check(model: SplitModel, units: list[_Unit], bases: int, example: Tensor) -> None:
    """Compare a base with the wide model that reads the same heads and units, for random weights.

    In float32: some layers of transformers compute in it whatever their inputs are.
    """
    wide = copy.deepcopy(model).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)
        for unit in units:
            outer = wide.get_submodule(unit.outer)
            weight = outer.get_parameter("weight")
            inputs = weight if _is_transposed(outer) else weight.t()
            inputs[len(inputs) // bases :] = 0
        base = _divide(wide, units, bases)
        advice = "its code must not hold sizes that are divided"
        x = example[:2].detach().cpu()
        wanted = answers_of(wide, x, "on the example", "give some inputs as devices have them")
        found = answers_of(base, x, f"with 1/{bases} of the heads and hidden units", advice)
    for want, got in zip(wanted, found, strict=True):
        if want.shape != got.shape or (want - got).abs().max() > 1e-3 * want.abs().max():
            raise ExportError(
                f"with 1/{bases} of the heads and hidden units the model does not give what it "
                "gives when all others are zero: its code mixes heads or hidden units, or holds "
                "their number; " + _SUPPORTED
            )
