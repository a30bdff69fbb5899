"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) by PEFT, on a base that is frozen."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field

import torch

from edge_sdk.errors import ConfigError
from export.errors import ExportError, reason
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
            is not among the blocks.
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
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    for name in adapted:
        if not name.startswith("block."):
            raise ExportError(f"{name} is adapted and not part of a block; name other targets")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    return model
