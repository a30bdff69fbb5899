"""Low-rank adapters on a frozen base (LoRA, https://arxiv.org/abs/2106.09685), made with PEFT."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from export.adapters_lora.low_rank import reduce
from export.cutting.split_model import SplitModel
from export.errors import ExportError, reason


@dataclass(frozen=True)
class Lora:
    """Configuration of adapters.

    Attributes:
        rank: rank of the adapters.
        alpha: numerator of the adapters' scale, ``alpha / rank``.
        dropout: probability of dropout before an adapter, in training.
        targets: last parts of the names of the modules to adapt, as in PEFT; if empty, the
            :data:`FAMILY_TARGETS` of the model.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}; it must be 1 or more")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; it must be from 0 to below 1")


FAMILY_TARGETS = {
    "gpt2": ["c_attn"],
    "gpt_neo": ["q_proj", "v_proj"],
    "opt": ["q_proj", "v_proj"],
    "llama": ["q_proj", "v_proj"],
    "qwen2": ["q_proj", "v_proj"],
    "qwen3": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
    "vit": ["q_proj", "v_proj"],
}
"""Modules that are adapted by default, by family: the queries and values of the attention."""


def add_lora(model: SplitModel, lora: Lora, family: str | None = None) -> SplitModel:
    """Freeze every parameter of ``model`` and add adapters to the target modules, in place.

    A is drawn from a fixed seed, B starts at zero. Auxiliary heads that are added later are
    trained in full.

    Args:
        model: model to adapt.
        lora: rank, scale and targets.
        family: ``model_type`` of transformers, whose default targets apply if ``lora`` has none.

    Returns:
        ``model``.

    Raises:
        ExportError: there is no target module, PEFT cannot adapt one, a target is outside of the
            blocks, or a target is too small for the rank.
        ConfigError: PEFT is not installed.
    """
    logging.disable(logging.WARNING)  # imports of peft warn about missing hardware
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("LoRA needs peft: pip install 'cutlayer[transformers]'") from error
    finally:
        logging.disable(logging.NOTSET)
    targets = lora.targets or FAMILY_TARGETS.get(family or "", [])
    if not targets:
        raise ExportError("LoRA has no targets for this model; set targets in [lora]")
    transposed = [m for m in model.modules() if type(m).__name__ == "Conv1D"]
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number; PEFT divides by the rank
        lora_dropout=lora.dropout,
        target_modules=list(targets),
        fan_in_fan_out=bool(transposed),
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        try:
            inject_adapter_in_model(config, model)
        except ValueError as error:
            raise ExportError(f"LoRA on {', '.join(targets)}: {reason(error)}") from error
    for name, module in adapted_modules(model).items():
        if not name.startswith("block."):
            raise ExportError(f"{name} is adapted and not part of a block; name other targets")
        _check_rank(name, module, lora.rank)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model


ADAPTER = "default"
"""Name that PEFT gives the only adapter of a module."""


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """Modules of PEFT that have adapters, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def set_ranks(model: SplitModel, ranks: Mapping[int, int]) -> None:
    """Change the ranks of the adapters in some blocks, in place.

    ``alpha`` stays, so the scale becomes ``alpha / rank``. Adapters whose rank changes lose their
    training: A is drawn from a fixed seed per block, and B is zero. Their parameters are new
    objects, so an existing optimizer must be replaced. Adapters that have the rank already stay.

    Args:
        model: a model with adapters, see :func:`add_lora`.
        ranks: rank by block.

    Raises:
        ExportError: the model has no adapters or no such block, or a module is too small for the
            rank. Nothing was changed.
    """
    adapted = adapted_modules(model)
    if not adapted:
        raise ExportError("the model has no adapters to set ranks of; add_lora puts them in")
    for block in ranks:
        if not 0 <= block < model.depth:
            raise ExportError(
                f"there is no block {block} to set the rank of; "
                f"the model has blocks 0 to {model.depth - 1}"
            )
    blocks: dict[int, list[Any]] = {}
    for name, module in adapted.items():
        block = int(name.split(".")[1])
        if block in ranks:
            _check_rank(name, module, ranks[block])
            blocks.setdefault(block, []).append(module)
    for block, modules in blocks.items():
        generator = torch.Generator().manual_seed(block)
        for module in modules:
            if module.r[ADAPTER] != ranks[block]:
                _start(module, ranks[block], generator)


def lower_ranks(model: SplitModel, ranks: Mapping[int, int]) -> None:
    """Change the ranks of the adapters in some blocks, and keep their products approximately.

    See :func:`export.adapters_lora.low_rank.reduce` for the approximation, and :func:`set_ranks`
    for the rest.

    Args:
        model: a model with adapters, see :func:`add_lora`.
        ranks: rank by block.

    Raises:
        ExportError: as :func:`set_ranks`.
    """
    learned = {
        name: [module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach()]
        for name, module in adapted_modules(model).items()
    }
    set_ranks(model, ranks)
    for name, module in adapted_modules(model).items():
        (A, B), rank = learned[name], module.r[ADAPTER]
        if len(A) != rank:
            scale = rank / len(A)  # alpha stays
            b, a = reduce(scale * B.flatten(1).numpy(), A.flatten(1).numpy(), rank)
            A = torch.from_numpy(a).view(rank, *A.shape[1:])
            B = torch.from_numpy(b).view(len(B), rank, *B.shape[2:])
            put_adapter(module, A, B, module.lora_alpha[ADAPTER])


def fit_ranks(model: SplitModel, tensors: Mapping[str, Tensor]) -> None:
    """Set the ranks of a model's blocks to those of the adapters in ``tensors``, in place.

    Args:
        model: a model with adapters if ``tensors`` has any.
        tensors: tensors of a state by name.

    Raises:
        ExportError: as :func:`set_ranks`.
    """
    ranks = {}
    for name, tensor in tensors.items():
        if factor := re.match(r"block\.(\d+)\..*\.lora_A\.", name):
            ranks[int(factor[1])] = len(tensor)
    if ranks:
        set_ranks(model, ranks)


def unify(model: SplitModel, lora: Lora) -> None:
    """Give all adapters one rank and one scale, in place, without changing their products.

    If a rank grows, the new rows of A are drawn from a fixed seed and the new columns of B are
    zero. Adapters that have the rank and the scale already stay the same bit for bit.

    Args:
        model: a model with adapters.
        lora: the rank and ``alpha`` for all adapters.

    Raises:
        ExportError: an adapter has a higher rank. Nothing was changed.
    """
    adapted = adapted_modules(model)
    for name, module in adapted.items():
        if module.r[ADAPTER] > lora.rank:
            raise ExportError(
                f"the adapter of {name} has rank {module.r[ADAPTER]}, and [lora] says "
                f"{lora.rank}; a rank cannot shrink without loss, set rank to that of the adapter"
            )
    generator = torch.Generator().manual_seed(0)
    for module in adapted.values():
        A, B = module.lora_A[ADAPTER].weight.detach(), module.lora_B[ADAPTER].weight.detach()
        factor = module.scaling[ADAPTER] / (lora.alpha / lora.rank)
        if factor != 1:
            B = B * factor
        if len(A) < lora.rank:
            # the rank of a grouped convolution is divided among its groups
            groups = getattr(module.lora_B[ADAPTER], "groups", 1)
            fresh = A.new_empty(lora.rank, *A.shape[1:])
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            known, drawn = A.unflatten(0, (groups, -1)), fresh.unflatten(0, (groups, -1))
            A = torch.cat([known, drawn[:, known.shape[1] :]], 1).flatten(0, 1)
            columns = B.new_zeros(len(B), lora.rank // groups - B.shape[1], *B.shape[2:])
            B = torch.cat([B, columns], 1)
        put_adapter(module, A, B, lora.alpha)


def put_adapter(module: Any, A: Tensor, B: Tensor, alpha: float) -> None:
    """Replace the adapter of a module of PEFT; its scale becomes ``alpha / rank``.

    Args:
        module: one of :func:`adapted_modules`.
        A: (rank, in), or (rank, in, ...) for a convolution.
        B: (out, rank), or (out, rank, 1, ...) for a convolution.
        alpha: scale times rank.
    """
    rank = len(A)
    down, up = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
    for layer, weight in ((down, A), (up, B)):
        if layer.weight.shape == weight.shape:
            with torch.no_grad():
                layer.weight.copy_(weight)
        else:
            own = weight.to(layer.weight, copy=True)
            layer.weight = nn.Parameter(own, requires_grad=layer.weight.requires_grad)
    sides = "features" if isinstance(down, nn.Linear) else "channels"
    setattr(down, f"out_{sides}", rank)
    setattr(up, f"in_{sides}", rank)
    module.r[ADAPTER] = rank
    module.lora_alpha[ADAPTER] = alpha
    module.scaling[ADAPTER] = alpha / rank


def merge(model: nn.Module) -> None:
    """Add all adapters to the weights that they adapt, and remove them, in place.

    A merged weight is ``W + scale * B @ A``, rounded once. Modules have the names again that they
    had before adapters were added.
    """
    adapted = adapted_modules(model)
    for name, module in adapted.items():
        base = module.get_base_layer()
        with torch.no_grad():
            # PEFT knows how A and B make up the change of each kind of layer
            module.double()
            change = module.get_delta_weight(ADAPTER)
            module.float()
            base.weight.copy_((base.weight.double() + change).float())
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _start(module: Any, rank: int, generator: torch.Generator) -> None:
    """Reset an adapter to PEFT's initialisation: A is random, B is zero."""
    down, up = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    A = torch.empty(rank, *down.shape[1:])
    nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    groups = getattr(module.lora_B[ADAPTER], "groups", 1)
    B = torch.zeros(up.shape[0], rank // groups, *up.shape[2:])
    put_adapter(module, A, B, module.lora_alpha[ADAPTER])


def _check_rank(name: str, module: Any, rank: int) -> None:
    up = module.lora_B[ADAPTER]
    outputs, inputs = len(up.weight), module.lora_A[ADAPTER].weight[0].numel()
    if not 1 <= rank <= min(outputs, inputs):
        raise ExportError(
            f"rank {rank} does not fit {name}, which is {outputs} x {inputs}; "
            f"a rank there is from 1 to {min(outputs, inputs)}"
        )
    groups = getattr(up, "groups", 1)
    if rank % groups:
        raise ExportError(
            f"rank {rank} does not fit {name}, a convolution in {groups} groups; "
            f"a rank there is a multiple of {groups}"
        )
