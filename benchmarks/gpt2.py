"""A small GPT-2 of eight blocks for bytes: trained once on a text, then adapted with LoRA."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.functional import cross_entropy

from edge_sdk.errors import ConfigError
from edge_sdk.training import text
from export.adapters_lora.lora import Lora
from export.bundles.model_source import build_model
from export.cutting.pretrained import from_transformers, save_original
from export.cutting.split_model import SplitModel
from server_hub.simulation.datasets import BYTES, DataTable, load_dataset

BASE = "CUTLAYER_BENCHMARK_BASE"
"""Environment variable with the folder of the trained base model; a job can only name functions."""

LENGTH, WIDTH, DEPTH, RANK = 64, 96, 8, 16
STEPS, BATCH, RATE = 1000, 16, 3e-3


def pretrain(source: Path, folder: Path) -> None:
    """Train the base model centrally on one text, and write it in the format of transformers.

    Args:
        source: file of the text.
        folder: folder to write; it is created after the training.

    Raises:
        DataError: the text cannot be read.
    """
    data = load_dataset(DataTable(str(source), held_out=1e-6, length=LENGTH)).train
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=DEPTH, n_head=4, vocab_size=BYTES, n_positions=LENGTH,
        bos_token_id=0, eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    model = from_transformers(config)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    rng = np.random.default_rng(0)
    done = 0
    while done < STEPS:
        for batch in text.batches(data, BATCH, rng):
            logits = model(torch.from_numpy(batch.x))
            labels = torch.from_numpy(batch.y)
            loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if done == STEPS:
                break
    save_original(model, folder)


def build() -> SplitModel:
    """Return the trained base model, frozen, with adapters of rank 16.

    Raises:
        ConfigError: the environment variable :data:`BASE` is not set.
    """
    folder = os.environ.get(BASE)
    if folder is None:
        raise ConfigError(f"{BASE} is not set; set it to the folder of the trained base model")
    return build_model(folder, Lora(rank=RANK))
