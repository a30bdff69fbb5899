"""Attentions and MLPs of a transformer, whose heads and hidden units are divided among bases."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export.bases.dual_norms import is_norm
from export.bases.narrow import CONVOLUTIONS, answers_of, called
from export.cutting.split_model import SplitModel
from export.errors import ExportError


@dataclass(frozen=True)
class Layout:
    """Names of the linear layers in an attention or an MLP.

    Attributes:
        inner: layers whose outputs are divided among the bases.
        outer: layer whose inputs are divided, because it reads those outputs.
        fused: number of matrices of equal size that one inner layer joins.
    """

    inner: tuple[str, ...]
    outer: str
    fused: int = 1


_ATTENTIONS = (
    Layout(("q_proj", "k_proj", "v_proj"), "o_proj"),
    Layout(("q_proj", "k_proj", "v_proj"), "out_proj"),
    Layout(("c_attn",), "c_proj", fused=3),
    Layout(("self.query", "self.key", "self.value"), "output.dense"),
)
_MLPS = (
    Layout(("fc1",), "fc2"),
    Layout(("c_fc",), "c_proj"),
    Layout(("gate_proj", "up_proj"), "down_proj"),
    Layout(("intermediate.dense",), "output.dense"),
)
_COUNTS = ("num_heads", "num_attention_heads", "num_key_value_heads", "all_head_size", "split_size")
"""Attributes in which attentions of transformers keep sizes that are divided."""

_SUPPORTED = (
    "there are rules for attention of q_proj, k_proj, v_proj and o_proj or out_proj; of c_attn and "
    "c_proj; of self.query, self.key, self.value and output.dense; for MLPs of fc1 and fc2, c_fc "
    "and c_proj, gate_proj, up_proj and down_proj, intermediate.dense and output.dense; and norms"
)


@dataclass(frozen=True)
class Unit:
    """An attention or an MLP of a model, by name, with its layout."""

    name: str
    layout: Layout

    @property
    def inner(self) -> list[str]:
        """Names of the layers whose outputs are divided."""
        return [f"{self.name}.{layer}" for layer in self.layout.inner]

    @property
    def outer(self) -> str:
        """Name of the layer whose inputs are divided."""
        return f"{self.name}.{self.layout.outer}"


def is_attention(module: nn.Module) -> bool:
    """Whether a module is an attention, of a known layout or of torch."""
    known = any(_fits(module, layout) for layout in _ATTENTIONS)
    return known or isinstance(module, nn.MultiheadAttention)


def _fits(module: nn.Module, layout: Layout) -> bool:
    try:
        for name in (*layout.inner, layout.outer):
            module.get_submodule(name)
    except AttributeError:
        return False
    return True


def is_transposed(module: nn.Module) -> bool:
    """Whether a layer is a ``Conv1D`` of transformers: linear, with weights (in, out)."""
    return type(module).__name__ == "Conv1D"


def is_weight(module: nn.Module) -> bool:
    """Whether a module is a convolution or linear."""
    return isinstance(module, (*CONVOLUTIONS, nn.Linear)) or is_transposed(module)


def fan_in(module: nn.Module) -> int:
    """Number of inputs of each output of a convolution or linear layer."""
    weight = module.get_parameter("weight")
    return len(weight) if is_transposed(module) else weight[0].numel()


def find_units(model: SplitModel, bases: int) -> list[Unit]:
    """Attentions and MLPs of the blocks.

    Raises:
        ExportError: a layer belongs to none, or its heads or hidden units are not divisible by
            ``bases``.
    """
    units: list[Unit] = []
    known: set[str] = set()
    blocks = [(f"block.{n}", m) for n, m in model.block.named_modules() if n]
    for name, module in blocks:
        for layout in (*_ATTENTIONS, *_MLPS):
            if _fits(module, layout):
                units.append(Unit(name, layout))
                known.update(units[-1].inner, [units[-1].outer])
    for name, module in blocks:
        wanted = not is_norm(module) and next(module.parameters(recurse=False), None) is not None
        splits = name in known and (isinstance(module, nn.Linear) or is_transposed(module))
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
    return layer.get_parameter("weight").shape[1 if is_transposed(layer) else 0]


def _sizes(model: SplitModel, unit: Unit) -> list[int]:
    """Number of heads, or of hidden units, of each inner layer."""
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


def divide(model: SplitModel, units: list[Unit], bases: int) -> SplitModel:
    """A copy of the model with the leading ``1 / bases`` of its heads and hidden units."""
    result = copy.deepcopy(model)
    for unit in units:
        for name in unit.inner:
            layer = result.get_submodule(name)
            rows = torch.arange(_outputs(layer)).reshape(unit.layout.fused, -1)
            kept = rows[:, : rows.shape[1] // bases].flatten()
            _keep(layer, kept, 1 if is_transposed(layer) else 0)
        outer = result.get_submodule(unit.outer)
        _keep(outer, torch.arange(fan_in(outer) // bases), 0 if is_transposed(outer) else 1)
        holder = result.get_submodule(unit.inner[0].rpartition(".")[0])
        for name in _COUNTS if unit.layout in _ATTENTIONS else ():
            if isinstance(count := getattr(holder, name, None), int):
                setattr(holder, name, count // bases)
    return result


def _keep(layer: nn.Module, kept: Tensor, axis: int) -> None:
    """Reduce a linear layer in place to the outputs, or inputs, with the indices ``kept``."""
    outputs = axis == (1 if is_transposed(layer) else 0)
    for name, p in list(layer.named_parameters(recurse=False)):
        if name == "weight" or outputs:
            part = p.detach().index_select(min(axis, p.dim() - 1), kept.to(p.device))
            setattr(layer, name, nn.Parameter(part, p.requires_grad))
    sizes = ("nf", "nx") if is_transposed(layer) else ("out_features", "in_features")
    setattr(layer, sizes[0 if outputs else 1], len(kept))


def check_division(model: SplitModel, units: list[Unit], bases: int, example: Tensor) -> None:
    """Compare a base with the wide model whose other heads and units are zero, at random weights.

    Both compute in float32: some layers of transformers do so for inputs of any dtype.
    """
    wide = copy.deepcopy(model).cpu().float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in wide.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / max(p[0].numel(), 1) ** 0.5)
        for unit in units:
            outer = wide.get_submodule(unit.outer)
            weight = outer.get_parameter("weight")
            inputs = weight if is_transposed(outer) else weight.t()
            inputs[len(inputs) // bases :] = 0
        base = divide(wide, units, bases)
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
