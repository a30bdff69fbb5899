"""Answers: the device's own, those that the hub finishes, and how good they are."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import DataError, LinkClosed
from edge_sdk.inference.mixture import Mixture, check_robustness
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import Answer
from edge_sdk.protocol.tensors import Array
from edge_sdk.training import text
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner, Precision
from edge_sdk.transport.connection import Question

Metric = Literal["accuracy", "perplexity"]
"""What is measured on held-out examples; of perplexity, less is better."""

Ask = Callable[[Question], Awaitable[Answer]]
"""Sends what a bundle has packed to the hub; gives its answer."""

HaveBases = Callable[[int], Awaitable[Mixture]]
"""Base networks of which the best so many are here; fetches those that are not."""

_ROOM = DEFAULT_MAX_FRAME - 2**16
"""Bytes of logits that the hub puts into one answer."""

_HEADS = 32
"""Heads that the hub is taken to have above a cut, until it has answered once."""


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer.

    Attributes:
        precision: of the weights.
        bases: how many base networks to mix, where there are any; None for all.
        robustness: weight of the noise norms, where there are any.
    """

    precision: Precision = "float32"
    bases: int | None = None
    robustness: float = 0.0


_PLAIN = AnswerOptions()


@dataclass(frozen=True)
class _Own:
    """The device's part of an answer: what it has come from, logits, packed activations by base."""

    manifest: Manifest
    heads: Array
    parts: Mapping[int, Mapping[str, Array]]
    robustness: float


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
        mixing: gives the base networks.
    """

    def __init__(self, learner: Callable[[], Learner], ask: Ask, mixing: HaveBases) -> None:
        self._learner, self._ask, self._mixing = learner, ask, mixing
        self._hub_heads: dict[str, int] = {}

    async def predict(
        self, x: Array, confidence: float, timeout_s: float, manner: AnswerOptions
    ) -> Prediction:
        """See :meth:`edge_sdk.device.Device.predict`."""
        limit = self._learner().manifest.limits.get("batch", len(x))
        if len(x) > limit:
            answers = [
                await self.predict(x[start : start + limit], confidence, timeout_s, manner)
                for start in range(0, len(x), limit)
            ]
            return Prediction(
                np.concatenate([answer.labels for answer in answers]),
                np.concatenate([answer.probabilities for answer in answers]),
                np.concatenate([answer.by_hub for answer in answers]),
            )
        own = await self._own(x, manner, timeout_s)
        heads = _asked_for(own.heads, own.manifest)
        probabilities = softmax(heads).mean(0)
        unsure = np.flatnonzero(probabilities.max(1) < confidence)
        by_hub = np.zeros(len(probabilities), bool)
        if len(unsure) and not own.manifest.whole:
            with contextlib.suppress(TimeoutError, LinkClosed):
                hub = await asyncio.wait_for(self._hub(own, unsure, x), timeout_s)
                every = np.concatenate([heads[:, unsure], _asked_for(hub, own.manifest)])
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
            own = await self._own(batch.x)
            paths = [own.heads] * 3
            if not own.manifest.whole:
                hub = await self._hub(own, np.arange(len(batch)), batch.x)
                paths = [own.heads, hub[-1:], np.concatenate([own.heads, hub])]
            for path, logits in enumerate(paths):
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
            own = await self._own(seen)
            whole = own.manifest.whole
            logits = own.heads if whole else await self._hub(own, np.arange(len(x)), seen)
            logits_BV = logits[-1, :, -1]
            if temperature > 0:  # the largest with Gumbel noise is a sample of the softmax
                logits_BV = logits_BV / temperature + rng.gumbel(size=logits_BV.shape)
            x = np.concatenate([x, logits_BV.argmax(1)[:, None].astype(x.dtype)], axis=1)
        return x

    async def _own(
        self, x: Array, manner: AnswerOptions = _PLAIN, timeout_s: float | None = None
    ) -> _Own:
        """The device's part of an answer, by :meth:`Learner.predict` or :meth:`Mixture.answer`."""
        learner = self._learner()  # another one may take its place meanwhile
        manifest = learner.manifest
        shape = x.shape if manifest.task == "tokens" else x.shape[:1]
        x = Examples(x, np.zeros(shape, np.int64)).fitted(manifest).x
        if not manifest.bases and manner.bases is not None:
            raise DataError(
                f"{manner.bases} bases are to be mixed, and the model has none; leave out bases, "
                "or export it with bases in tiers.toml"
            )
        if manner.bases is not None and manner.precision != "float32":
            raise DataError(
                f"{manner.bases} bases are to be mixed in {manner.precision}; bases are mixed in "
                "float32, so leave out bases or precision"
            )
        if not manifest.bases or manner.precision != "float32":
            asked = x, manner.precision, manner.robustness
            heads, parts = await asyncio.to_thread(learner.predict, *asked)
            return _Own(manifest, heads, {0: parts}, manner.robustness)
        check_robustness(manner.robustness, manifest)
        bases = manifest.bases if manner.bases is None else manner.bases
        try:
            mix = await asyncio.wait_for(self._mixing(bases), timeout_s)
        except TimeoutError:
            raise LinkClosed(
                f"not all of {bases} bases are here, and the hub does not give the others; ask for "
                "fewer"
            ) from None
        mixed = await asyncio.to_thread(mix.answer, x, bases, manner.robustness)
        return _Own(manifest, mixed.logits, mixed.parts, manner.robustness)

    async def _hub(self, own: _Own, rows: Array, x: Array) -> Array:
        """The hub's logits for some rows, the mean over the bases.

        Args:
            own: what the device has made of a batch.
            rows: numbers of the rows.
            x: the batch.
        """
        logits = [await self._hub_of(base, own, rows, x) for base in own.parts]
        mean: Array = np.mean(logits, axis=0)
        return mean

    async def _hub_of(self, base: int, own: _Own, rows: Array, x: Array) -> Array:
        """That of one base, asked for in as many requests as its answers take."""
        manifest, parts = own.manifest, own.parts[base]
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
            some = rows_of(parts, rows[done : done + many], manifest)
            answer = await self._ask(Question(some, tier, base, own.robustness))
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
