"""A GPT-2 of four small blocks with adapters, and texts for it."""

from __future__ import annotations

import torch
import transformers
from torch import Tensor

from export.adapters_lora.lora import Lora, add_lora
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel

WORDS, LENGTH, DEPTH = 23, 7, 4


def build(rank: int = 4, seed: int = 0) -> SplitModel:
    """Return a GPT-2 of four small blocks with adapters whose B is not zero."""
    config = transformers.GPT2Config(
        n_embd=16, n_layer=DEPTH, n_head=2, vocab_size=WORDS, n_positions=LENGTH, bos_token_id=1,
        eos_token_id=1, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = from_transformers(config)
    add_lora(model, Lora(rank=rank), "gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return model


def texts(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random tokens (rows, positions), and labels of which some are -1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    y = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    y[torch.rand(y.shape, generator=generator) < 0.2] = -1
    return x, y
