"""The transformers models that can be cut, with a function per class that takes it apart.

A family is a ``model_type`` of transformers. To add one, write a function that returns the
:class:`Parts` of a model, and add an entry to :data:`FAMILIES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from export.cutting.channels import Channels
from export.cutting.pretrained.wrappers import (
    BertBlock,
    BertStem,
    DecoderBlock,
    FirstPosition,
    ResidualBlock,
    TextStem,
    in_order,
)
from export.cutting.split_model import Task
from export.errors import ExportError


@dataclass(frozen=True)
class Parts:
    """The parts of a SplitModel: modules of the original model, not copies."""

    stem: nn.Module
    blocks: list[nn.Module]
    head: nn.Module
    task: Task
    channels: Channels = "last"


@dataclass(frozen=True)
class Family:
    """A ``model_type`` of transformers.

    Attributes:
        architectures: function that takes a model apart, by name of the model's class; the first
            class is the default.
        base: class name of the model without a head.
    """

    architectures: dict[str, Callable[[Any], Parts]]
    base: str

    @property
    def default(self) -> str:
        """Class name used if the configuration names none."""
        return next(iter(self.architectures))


def _gpt2(model: Any) -> Parts:
    body = model.transformer
    if model.config.add_cross_attention:
        raise ExportError("this GPT-2 has cross-attention; a block takes one tensor only")
    for layer in body.h:
        # this option computes the same attention in float32, with operations that do not lower
        layer.attn.reorder_and_upcast_attn = False
    stem = TextStem(body.wte, body.wpe, dropout=body.drop)
    head = in_order(norm=body.ln_f, output=model.lm_head)
    return Parts(stem, [DecoderBlock(layer) for layer in body.h], head, "tokens")


def _gpt_neo(model: Any) -> Parts:
    body, config = model.transformer, model.config
    blocks: list[nn.Module] = []
    for layer, kind in zip(body.h, config.attention_layers, strict=True):
        # DecoderBlock computes the mask; the layer's own table (positions x positions) would be
        # a constant of every graph
        layer.attn.attention.bias = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        blocks.append(DecoderBlock(layer, config.window_size if kind == "local" else None))
    stem = TextStem(body.wte, body.wpe, dropout=body.drop)
    return Parts(stem, blocks, in_order(norm=body.ln_f, output=model.lm_head), "tokens")


def _opt(model: Any) -> Parts:
    body = model.model.decoder
    positions = body.embed_positions
    stem = TextStem(
        body.embed_tokens, positions, offset=positions.offset, projection=body.project_in
    )
    head = in_order(norm=body.final_layer_norm, projection=body.project_out, output=model.lm_head)
    return Parts(stem, [DecoderBlock(layer) for layer in body.layers], head, "tokens")


def _llama(model: Any) -> Parts:
    body, config = model.model, model.config
    rope = config.rope_parameters["rope_type"]
    if rope in ("dynamic", "longrope"):
        raise ExportError(
            f"rotary positions of type {rope!r} depend on the longest text in the batch; "
            "use a model of type default, linear, yarn or llama3"
        )
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(body.layers)
    blocks: list[nn.Module] = []
    for layer, kind in zip(body.layers, kinds, strict=True):
        window = config.sliding_window if kind == "sliding_attention" else None
        blocks.append(DecoderBlock(layer, window, copy.deepcopy(body.rotary_emb)))
    head = in_order(norm=body.norm, output=model.lm_head)
    return Parts(TextStem(body.embed_tokens), blocks, head, "tokens")


def _bert_body(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    config = model.config
    if config.is_decoder:
        raise ExportError("this BERT is a decoder (is_decoder); only the encoder is supported")
    blocks: list[nn.Module] = [BertBlock(layer) for layer in model.bert.encoder.layer]
    return BertStem(model.bert.embeddings, config.pad_token_id), blocks


def _bert_classes(model: Any) -> Parts:
    stem, blocks = _bert_body(model)
    head = in_order(pooler=model.bert.pooler, dropout=model.dropout, output=model.classifier)
    return Parts(stem, blocks, head, "classes")


def _bert_tokens(model: Any) -> Parts:
    stem, blocks = _bert_body(model)
    predictions = model.cls.predictions
    head = in_order(transform=predictions.transform, output=predictions.decoder)
    return Parts(stem, blocks, head, "tokens")


def _vit(model: Any) -> Parts:
    body = model.vit
    head = in_order(norm=body.layernorm, first=FirstPosition(), output=model.classifier)
    return Parts(body.embeddings, list(body.layers), head, "classes")


def _resnet(model: Any) -> Parts:
    body = model.resnet
    layers = [layer for stage in body.encoder.stages for layer in stage.layers]
    blocks: list[nn.Module] = [ResidualBlock(layer) for layer in layers]
    head = in_order(pool=body.pooler, output=model.classifier)
    return Parts(body.embedder, blocks, head, "classes", "first")


def _mobilenet_v2(model: Any) -> Parts:
    body = model.mobilenet_v2
    head = in_order(
        conv=body.conv_1x1,
        pool=body.pooler,
        flatten=nn.Flatten(),
        dropout=model.dropout,
        output=model.classifier,
    )
    return Parts(body.conv_stem, list(body.layer), head, "classes", "first")


FAMILIES: dict[str, Family] = {
    "gpt2": Family({"GPT2LMHeadModel": _gpt2}, "GPT2Model"),
    "gpt_neo": Family({"GPTNeoForCausalLM": _gpt_neo}, "GPTNeoModel"),
    "opt": Family({"OPTForCausalLM": _opt}, "OPTModel"),
    "llama": Family({"LlamaForCausalLM": _llama}, "LlamaModel"),
    "qwen2": Family({"Qwen2ForCausalLM": _llama}, "Qwen2Model"),
    "qwen3": Family({"Qwen3ForCausalLM": _llama}, "Qwen3Model"),
    "bert": Family(
        {"BertForSequenceClassification": _bert_classes, "BertForMaskedLM": _bert_tokens},
        "BertModel",
    ),
    "vit": Family({"ViTForImageClassification": _vit}, "ViTModel"),
    "resnet": Family({"ResNetForImageClassification": _resnet}, "ResNetModel"),
    "mobilenet_v2": Family(
        {"MobileNetV2ForImageClassification": _mobilenet_v2}, "MobileNetV2Model"
    ),
}
"""Families by ``model_type`` of transformers."""
