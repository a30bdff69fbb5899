"""Answers: the device's own, those that the hub finishes, and how good they are."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk import text
from edge_sdk.bundle import Manifest
from edge_sdk.data import Examples
from edge_sdk.errors import DataError, LinkClosed
from edge_sdk.learner import Learner, Precision
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import Answer
from edge_sdk.protocol.tensors import Array

Metric = Literal["accuracy", "perplexity"]
"""What is measured on held-out examples; of perplexity, less is better."""

Ask = Callable[[dict[str, Array], str], Awaitable[Answer]]
"""Sends what the bundle of a tier has packed to the hub; gives its answer."""

_ROOM = DEFAULT_MAX_FRAME - 2**16
"""Bytes of logits that the hub puts into one answer."""

_HEADS = 32
"""Heads that the hub is taken to have above a cut, until it has answered once."""


@dataclass(frozen=True)
class Prediction:
    """An answer; for a model of tokens, what comes after each row.

    Attributes:
        labels: most probable class, or token, of each row (rows,).
        probabilities: (rows, classes), mean of the softmax of the heads that were asked.
        by_hub: (rows,) whether the hub finished the answer.
    """

    labels: Array
    probabilities: Array
    by_hub: Array


@dataclass(frozen=True)
class Evaluation:
    """How good the three ways to answer are on labelled examples.

    Attributes:
        device_alone: by the mean of the device's own heads.
        through_hub: by the head of the whole model.
        ensemble: by the mean of all heads, the device's and the hub's.
        samples: number of examples.
        metric: what the three are: accuracy as a fraction, or perplexity for a model of tokens.
    """

    device_alone: float
    through_hub: float
    ensemble: float
    samples: int
    metric: Metric = "accuracy"


class Predictor:
    """Answers with the device's half of the model and the hub's, as :class:`Device` says.

    Args:
        learner: gives the present learner; a move may put another in its place at any time.
        ask: asks the hub.
    """

    def __init__(self, learner: Callable[[], Learner], ask: Ask) -> None:
        self._learner, self._ask = learner, ask
        self._hub_heads: dict[str, int] = {}

    async def predict(
        self, x: Array, confidence: float, timeout_s: float, precision: Precision
    ) -> Prediction:
        """See :meth:`edge_sdk.device.Device.predict`."""
        limit = self._learner().manifest.limits.get("batch", len(x))
        if len(x) > limit:
            answers = [
                await self.predict(x[start : start + limit], confidence, timeout_s, precision)
                for start in range(0, len(x), limit)
            ]
            return Prediction(
                np.concatenate([answer.labels for answer in answers]),
                np.concatenate([answer.probabilities for answer in answers]),
                np.concatenate([answer.by_hub for answer in answers]),
            )
        manifest, heads, parts = await self._own(x, precision)
        heads = _asked_for(heads, manifest)
        probabilities = softmax(heads).mean(0)
        unsure = np.flatnonzero(probabilities.max(1) < confidence)
        by_hub = np.zeros(len(probabilities), bool)
        if len(unsure):
            with contextlib.suppress(TimeoutError, LinkClosed):
                hub = await asyncio.wait_for(self._hub(parts, unsure, manifest, x), timeout_s)
                every = np.concatenate([heads[:, unsure], _asked_for(hub, manifest)])
                probabilities[unsure] = softmax(every).mean(0)
                by_hub[unsure] = True
        return Prediction(probabilities.argmax(1), probabilities, by_hub)

    async def evaluate(self, examples: Examples, batch_size: int) -> Evaluation:
        """See :meth:`edge_sdk.device.Device.evaluate`."""
        manifest = self._learner().manifest
        examples = examples.fitted(manifest)
        size = min(batch_size, manifest.limits.get("batch", batch_size))
        if manifest.task == "tokens":
            longest = int(text.lengths(examples.y).max())
            row = 4 * len(manifest.heads) * longest * manifest.classes
            batches = text.batches(examples, min(size, max(_ROOM // row, 1)))
        else:
            batches = examples.batches(size)
        totals = np.zeros(3)
        for batch in batches:
            now, heads, parts = await self._own(batch.x)
            hub = await self._hub(parts, np.arange(len(batch)), now, batch.x)
            for path, logits in enumerate((heads, hub[-1:], np.concatenate([heads, hub]))):
                if manifest.task == "tokens":
                    totals[path] += _loss(logits, batch.y)
                else:
                    totals[path] += (softmax(logits).mean(0).argmax(1) == batch.y).sum()
        metric: Metric = "accuracy"
        alone, through, ensemble = totals / examples.labels
        if manifest.task == "tokens":
            metric = "perplexity"
            alone, through, ensemble = np.exp(np.minimum([alone, through, ensemble], 700.0))
        return Evaluation(float(alone), float(through), float(ensemble), len(examples), metric)

    async def generate(
        self, x: Array, tokens: int, temperature: float, seed: int, context: int | None
    ) -> Array:
        """See :meth:`edge_sdk.device.Device.generate`."""
        manifest = self._learner().manifest
        if manifest.task != "tokens":
            raise DataError("the model classifies; a model of tokens can go on with a text")
        if x.ndim != 2:
            raise DataError(f"x has shape {list(x.shape)}; texts are tokens (rows, positions)")
        if temperature < 0 or (context is not None and context < 1):
            raise DataError(
                f"temperature is {temperature:g} and context {context}; they must be 0 or more, "
                "and 1 or more"
            )
        many = manifest.limits.get("batch", len(x))
        if len(x) > many:
            raise DataError(f"{len(x)} texts; the bundle takes {many} at a time")
        window = min(context or math.inf, manifest.limits.get("seq", math.inf))
        rng = np.random.default_rng(seed)
        for _ in range(tokens):
            seen = x if x.shape[1] <= window else x[:, -int(window) :]
            now, _, parts = await self._own(seen)
            logits_BV = (await self._hub(parts, np.arange(len(x)), now, seen))[-1, :, -1]
            if temperature > 0:  # the largest with Gumbel noise is a sample of the softmax
                logits_BV = logits_BV / temperature + rng.gumbel(size=logits_BV.shape)
            x = np.concatenate([x, logits_BV.argmax(1)[:, None].astype(x.dtype)], axis=1)
        return x

    async def _own(
        self, x: Array, precision: Precision = "float32"
    ) -> tuple[Manifest, Array, dict[str, Array]]:
        """What :meth:`Learner.predict` gives, and the manifest of the bundle that gave it."""
        learner = self._learner()  # another one may take its place meanwhile
        shape = x.shape if learner.manifest.task == "tokens" else x.shape[:1]
        fitted = Examples(x, np.zeros(shape, np.int64)).fitted(learner.manifest)
        heads, parts = await asyncio.to_thread(learner.predict, fitted.x, precision)
        return learner.manifest, heads, parts

    async def _hub(
        self, parts: Mapping[str, Array], rows: Array, manifest: Manifest, x: Array
    ) -> Array:
        """The hub's logits for some rows, asked for in as many requests as its answers take.

        Args:
            parts: the packed activations of a batch.
            rows: numbers of the rows.
            manifest: of the bundle that packed them.
            x: the batch.
        """
        tier = manifest.tier
        positions = x.shape[1] if manifest.task == "tokens" else 1
        row = 4 * positions * manifest.classes
        answers, done = [], 0
        while done < len(rows):
            size = row * self._hub_heads.get(tier, 1)
            if size > _ROOM:
                raise DataError(
                    f"the hub's answer to one row of {positions} positions has {size} bytes, a "
                    f"message holds {_ROOM}; take shorter texts"
                )
            many = max(_ROOM // (row * self._hub_heads.get(tier, _HEADS)), 1)
            answer = await self._ask(rows_of(parts, rows[done : done + many], manifest), tier)
            self._hub_heads[tier] = len(answer.heads)
            answers.append(answer.logits)
            done += many
        return np.concatenate(answers, axis=1)


def rows_of(parts: Mapping[str, Array], rows: Array, manifest: Manifest) -> dict[str, Array]:
    """The packed activations of some rows of a batch."""
    return {
        spec.name: parts[spec.name][rows] if spec.shape[:1] == ("batch",) else parts[spec.name]
        for spec in manifest.packed
    }


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    weights: Array = np.exp(shifted)
    total: Array = weights / weights.sum(-1, keepdims=True)
    return total


def _asked_for(logits: Array, manifest: Manifest) -> Array:
    """Logits (heads, rows, classes); of texts those behind the last position."""
    return logits[:, :, -1] if manifest.task == "tokens" else logits


def _loss(logits: Array, y: Array) -> float:
    """Sum of the cross-entropy of the heads' mean over the labels that count.

    Args:
        logits: (heads, rows, positions, vocabulary).
        y: (rows, positions), -1 where a position does not count.
    """
    counted = y >= 0
    z_HNV = logits[:, counted].astype(np.float64)
    label_HN = z_HNV[:, np.arange(z_HNV.shape[1]), y[counted]]
    log_p_HN = label_HN - np.logaddexp.reduce(z_HNV, axis=-1)
    return float((math.log(len(logits)) - np.logaddexp.reduce(log_p_HN, axis=0)).sum())
