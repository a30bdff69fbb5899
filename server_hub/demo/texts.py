"""The model and data of the demo with texts: a small GPT-2 over bytes, and CPython's manual.

The texts are those that every CPython has for its ``help()``. The model is pretrained on most
topics, which are about the language; every device has one of those about the library.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from edge_sdk.inference.metrics import Tally
from edge_sdk.training import text
from edge_sdk.training.data import Examples
from export.cutting.pretrained import from_transformers, save_original
from export.cutting.split_model import SplitModel
from export.steps.losses import NO_LABEL
from export.steps.optimizers import get_optimizer
from export.steps.weight_decay import decayed_names
from server_hub.methods.settings import learning_rate_factor
from server_hub.simulation.datasets import BYTES
from server_hub.simulation.formats import cut_text

TOPICS = ("string-methods", "debugger", "formatstrings", "typesseq", "typesmapping", "strings")
"""Topics of the devices, one for each."""

HELD_OUT = 5
"""Every fifth paragraph of the devices' topics is held out."""

MEASURED = 64
"""Texts in a batch when perplexity is measured."""


@dataclass(frozen=True)
class Pretraining:
    """Training of the base: AdamW, warm-up, then a cosine schedule to 0."""

    steps: int = 300
    batch_size: int = 32
    lr: float = 2e-3
    warmup: int = 20


@dataclass(frozen=True)
class Shape:
    """Size of the GPT-2; ``context`` is the length of a text in bytes, at most."""

    blocks: int = 6
    width: int = 96
    heads: int = 4
    context: int = 64


@dataclass(frozen=True)
class Texts:
    """The data of the demo.

    Attributes:
        pretraining: bytes (positions,) int64, without the devices' paragraphs.
        shares: the examples of each topic.
        held_out: examples of paragraphs of these topics that no device has.
    """

    pretraining: Tensor
    shares: Mapping[str, Examples]
    held_out: Examples


def load(tuned: Sequence[str], context: int, texts: int, held_out: int) -> Texts:
    """The manual's paragraphs, the same split every time.

    Args:
        tuned: topics to fine-tune on; nothing of the others in :data:`TOPICS` is used.
        context: bytes of a text at most.
        texts: of each device, at most.
        held_out: texts of each topic to measure on, at most.
    """
    from pydoc_data.topics import topics

    parts = {name: _paragraphs(topics[name]) for name in topics}
    taken = {part for name in TOPICS for part in parts[name]}
    # topics hold others' paragraphs: each is kept once
    rest = {part: None for name in sorted(parts) for part in parts[name] if part not in taken}
    shares, measured = {}, []
    for number, name in enumerate(tuned):
        rng = np.random.default_rng(number)
        own = [part for i, part in enumerate(parts[name]) if i % HELD_OUT]
        shares[name] = _drawn(cut_text(own, context), texts, rng)
        measured.append(_drawn(cut_text(parts[name][::HELD_OUT], context), held_out, rng))
    return Texts(
        torch.from_numpy(np.frombuffer(b"\n\n".join(rest), np.uint8).astype(np.int64)),
        shares,
        pooled(measured),
    )


def _paragraphs(topic: str) -> list[bytes]:
    parts = (part.strip("\n") for part in re.split(r"\n\s*\n", topic))
    return [part.encode() for part in parts if part.strip()]


def _drawn(data: Examples, count: int, rng: np.random.Generator) -> Examples:
    rows = np.sort(rng.permutation(len(data))[:count])
    return Examples(data.x[rows], data.y[rows])


def pooled(shares: Collection[Examples]) -> Examples:
    """The examples of all shares."""
    return Examples(np.concatenate([s.x for s in shares]), np.concatenate([s.y for s in shares]))


def pretrain(
    folder: Path,
    shape: Shape,
    data: Tensor,
    plan: Pretraining,
    progress: Callable[[int, float], None],
) -> None:
    """Train a GPT-2 on random pieces of a text and write it as transformers would.

    Args:
        folder: folder to write.
        shape: size of the model.
        data: bytes (positions,).
        plan: steps, batch size and learning rates.
        progress: called with the number of each step, and its loss.
    """
    from transformers import GPT2Config

    config = GPT2Config(
        n_embd=shape.width, n_layer=shape.blocks, n_head=shape.heads, n_positions=shape.context,
        vocab_size=BYTES, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    logging.disable(logging.WARNING)  # what transformers imports talks about missing hardware
    try:
        model = from_transformers(config)
    finally:
        logging.disable(logging.NOTSET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.lr, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    positions_T = torch.arange(shape.context + 1)
    for step in range(1, plan.steps + 1):
        factor = min(step / plan.warmup, learning_rate_factor("cosine", step, plan.steps))
        starts_B1 = torch.randint(
            len(data) - shape.context, (plan.batch_size, 1), generator=generator
        )
        pieces = data[starts_B1 + positions_T]
        loss = _loss(model, pieces[:, :-1], pieces[:, 1:])
        _step(model, optimizer, loss, plan.lr * factor)
        progress(step, float(loss.detach()))
    save_original(model, folder)


def fine_tune(
    model: SplitModel,
    data: Examples,
    epochs: int,
    batch_size: int,
    hyper: Mapping[str, float],
    progress: Callable[[int], None],
) -> None:
    """Train the parameters of an uncut model that are not frozen, on all examples in one place.

    Args:
        model: with adapters.
        data: examples of all devices.
        epochs: number of epochs, as many as the job has rounds; the schedule is the same.
        batch_size: texts in a step.
        hyper: hyper-parameters of AdamW.
        progress: called with the number of each epoch.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    decayed = decayed_names(model, "matrices")
    optimizer = get_optimizer("adamw").reference(
        [p for n, p in trained.items() if n in decayed],
        dict(hyper),
        [p for n, p in trained.items() if n not in decayed],
    )
    rng = np.random.default_rng(0)
    for epoch in range(1, epochs + 1):
        progress(epoch)
        rate = hyper["lr"] * learning_rate_factor("cosine", epoch, epochs)
        for batch in text.batches(data, batch_size, rng):
            loss = _loss(model, torch.from_numpy(batch.x), torch.from_numpy(batch.y))
            _step(model, optimizer, loss, rate)


def _loss(model: SplitModel, x_BT: Tensor, y_BT: Tensor) -> Tensor:
    return cross_entropy(model(x_BT).flatten(0, 1), y_BT.flatten(), ignore_index=NO_LABEL)


def _step(model: SplitModel, optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def perplexity(model: SplitModel, data: Examples) -> float:
    """Perplexity of the uncut model over the bytes of some texts.

    Returns:
        ``exp`` of the mean cross-entropy of a byte, at most ``exp(700)``.
    """
    mode, tally = model.training, Tally("tokens")
    model.eval()
    for batch in text.batches(data, MEASURED):
        tally.add(model(torch.from_numpy(batch.x)).unsqueeze(0).numpy(), batch.y)
    model.train(mode)
    return tally.value
