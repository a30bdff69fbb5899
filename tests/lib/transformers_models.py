"""Tiny models of transformers, one for each family whose blocks can be split by width."""

from __future__ import annotations

from typing import Any

import transformers

from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel

WORDS = 12


def gpt2(**settings: Any) -> SplitModel:
    """A GPT-2 with four heads of width four."""
    known = {
        "n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 8,
        "bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }  # fmt: skip
    return from_transformers(transformers.GPT2Config(**known | settings))


def llama(kind: str = "Llama", **settings: Any) -> SplitModel:
    """A Llama with four heads that share two keys and values."""
    known = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": WORDS,
        "max_position_embeddings": 16,
    }  # fmt: skip
    return from_transformers(getattr(transformers, f"{kind}Config")(**known | settings))


def vit() -> SplitModel:
    """A ViT, which reads patches of images."""
    return from_transformers(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            image_size=8, patch_size=4, num_channels=1, num_labels=3,
        )
    )  # fmt: skip


def bert() -> SplitModel:
    """A BERT, whose norms follow the residual sums."""
    return from_transformers(
        transformers.BertConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
            vocab_size=WORDS, max_position_embeddings=8, num_labels=3, pad_token_id=0,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip


def opt(**settings: Any) -> SplitModel:
    """An OPT; the layers of its MLP belong to the block itself."""
    known = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24,
        "vocab_size": WORDS, "max_position_embeddings": 8, "word_embed_proj_dim": 16,
        "dropout": 0.0,
    }  # fmt: skip
    return from_transformers(transformers.OPTConfig(**known | settings))
