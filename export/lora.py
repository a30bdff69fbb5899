"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) by PEFT, on a base that is frozen."""

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
from export.errors import ExportError, reason
from export.low_rank import reduce
from export.split import SplitModel


@dataclass(frozen=True)
class Lora:
    """How to adapt a model.

    Attributes:
        rank: rank of the adapters.
        alpha: their scale is ``alpha / rank``.
        dropout: dropout before an adapter, in training.
        targets: names (the last parts, as PEFT takes them) of the modules to adapt; PEFT's choice
            for the model's family if empty.
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
"""What is adapted by default: the attention's queries and values."""


def add_lora(model: SplitModel, lora: Lora, family: str | None = None) -> SplitModel:
    """Freeze every parameter of ``model`` and put adapters on the target modules, in place.

    The adapters are always the same ones: A is drawn from a fixed seed, B starts at zero.
    Auxiliary heads that are added later are trained in full.

    Args:
        model: the model.
        lora: rank, scale, targets.
        family: model type, for the targets when ``lora`` names none.

    Raises:
        ExportError: no module is a target, or one that PEFT cannot adapt is; or an adapted module
            is not among the blocks, or too small for the rank.
        ConfigError: PEFT is not installed.
    """
    logging.disable(logging.WARNING)  # what peft imports talks about hardware that is not there
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
"""PEFT's name for a module's adapter; there is one."""


def adapted_modules(model: nn.Module) -> dict[str, Any]:
    """PEFT's modules with adapters, by name."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


def set_ranks(model: SplitModel, ranks: Mapping[int, int]) -> None:
    """Give the adapters of some blocks other ranks, in place.

    ``alpha`` stays, so the scale becomes ``alpha / rank``. Adapters whose rank changes start
    anew, always the same ones: A is random, by a seed for each block, and B zero. What they have
    learned is lost, and an optimizer must be made again: their parameters are new. Adapters that
    have the rank already stay as they are.

    Args:
        model: with adapters, by :func:`add_lora`.
        ranks: rank by block.

    Raises:
        ExportError: there are no adapters, no such block, or a module is too small for the rank.
            Nothing was changed.
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
    """Like :func:`set_ranks`; what adapters have learned is kept as well as the ranks allow.

    Args:
        model: with adapters, by :func:`add_lora`.
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
    """Give the blocks of a model the ranks that the adapters in ``tensors`` have, in place.

    Args:
        model: with adapters, if there are any in ``tensors``.
        tensors: of a state, by name.

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
    """Give all adapters one rank and one scale, in place; what they compute stays the same.

    Where the rank grows, the new directions are as in a fresh adapter: A random, always the same,
    and B zero. Adapters that have the rank and the scale already stay as they are, bit for bit.

    Args:
        model: with adapters.
        lora: the rank and ``alpha`` that all get.

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
            groups = getattr(module.lora_B[ADAPTER], "groups", 1)  # each has its part of the rank
            fresh = A.new_empty(lora.rank, *A.shape[1:])
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
            known, drawn = A.unflatten(0, (groups, -1)), fresh.unflatten(0, (groups, -1))
            A = torch.cat([known, drawn[:, known.shape[1] :]], 1).flatten(0, 1)
            columns = B.new_zeros(len(B), lora.rank // groups - B.shape[1], *B.shape[2:])
            B = torch.cat([B, columns], 1)
        put_adapter(module, A, B, lora.alpha)


def put_adapter(module: Any, A: Tensor, B: Tensor, alpha: float) -> None:
    """Give a module of PEFT these values as its adapter; its scale becomes ``alpha / rank``.

    Args:
        module: one of :func:`adapted_modules`.
        A: (rank, in), or (rank, in, ...) for a convolution.
        B: (out, rank), or (out, rank, 1, ...).
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


def _start(module: Any, rank: int, generator: torch.Generator) -> None:
    """An adapter as PEFT starts them."""
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
