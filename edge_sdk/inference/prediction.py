"""Answers: of the device alone, finished by the hub, and how good they are."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import CutlayerError, DataError, LinkClosed
from edge_sdk.inference.metrics import Metric, Tally, metric_of, softmax
from edge_sdk.inference.mixture import Mixture
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME
from edge_sdk.protocol.messages import Answer
from edge_sdk.protocol.tensors import Array
from edge_sdk.training import text
from edge_sdk.training.data import Examples, Source
from edge_sdk.training.learner import Learner, Precision
from edge_sdk.transport.connection import Question

log = logging.getLogger("cutlayer.device")

Ask = Callable[[Question], Awaitable[Answer]]
"""Sends packed activations to the hub and returns its half of the answer."""

FetchBases = Callable[[int], Awaitable[Mixture]]
"""Returns a mixture that holds so many of the best base networks; fetches those it lacks."""

_ROOM = DEFAULT_MAX_FRAME - 2**16
"""Bytes of logits that the hub puts into one answer."""

_BESIDE = 4096
"""Largest size of a question without its activations, in bytes."""

_PATHS = ("device_alone", "through_hub", "ensemble")
"""The ways to answer that :class:`Evaluation` has, in its order."""

_HEADS = 32
"""Number of heads that the hub is assumed to have above a cut before its first answer."""


@dataclass(frozen=True)
class AnswerOptions:
    """How to answer.

    Attributes:
        precision: dtype of the weights.
        bases: number of base networks to mix; None for all. Only for models of base networks.
        robustness: weight of the noise norms, from 0 to 1. Only for models with dual norms.
    """

    precision: Precision = "float32"
    bases: int | None = None
    robustness: float = 0.0


_DEFAULTS = AnswerOptions()


@dataclass(frozen=True)
class _DeviceAnswer:
    """The device's half of an answer.

    Attributes:
        manifest: manifest of the bundle that answered.
        logits: logits of the device's heads, (heads, rows, classes), or (heads, rows, positions,
            vocabulary).
        parts: packed activations by base network; under 0 for a single model.
        robustness: weight of the noise norms that the answer was computed with.
    """

    manifest: Manifest
    logits: Array
    parts: Mapping[int, Mapping[str, Array]]
    robustness: float


@dataclass(frozen=True)
class Prediction:
    """An answer; for a model of tokens, the token after each row.

    Attributes:
        labels: most probable class or token of each row, (rows,) int64.
        probabilities: (rows, classes) float64, mean of the softmax of the heads that answered.
        by_hub: (rows,) bool, whether the hub finished the answer.
    """

    labels: Array
    probabilities: Array
    by_hub: Array


@dataclass(frozen=True)
class Evaluation:
    """How good the three ways to answer are on labelled examples.

    Attributes:
        device_alone: metric of the mean of the device's own heads.
        through_hub: metric of the head of the whole model; None if the hub answers no questions of
            this device, and the device does not hold the whole model.
        ensemble: metric of the mean of all heads, the device's and the hub's; None likewise.
        samples: number of examples.
        metric: accuracy as a fraction, or perplexity for a model of tokens.
    """

    device_alone: float
    through_hub: float | None
    ensemble: float | None
    samples: int
    metric: Metric = "accuracy"


class Predictor:
    """Answers with the device's half of the model and the hub's; see :class:`edge_sdk.Device`.

    Args:
        learner: returns the present learner; a move may replace it at any time.
        ask: asks the hub.
        fetch_bases: returns the mixture of base networks.
        failure: returns the error that ended the connection to the hub; None while it goes on.
        largest_message: returns the bytes of the largest message that the hub takes.
        only_downloads: returns whether the hub answers no questions of this device.
    """

    def __init__(
        self,
        learner: Callable[[], Learner],
        ask: Ask,
        fetch_bases: FetchBases,
        failure: Callable[[], CutlayerError | None],
        largest_message: Callable[[], int],
        only_downloads: Callable[[], bool],
    ) -> None:
        self._learner, self._ask, self._fetch_bases = learner, ask, fetch_bases
        self._failure, self._largest_message = failure, largest_message
        self._only_downloads = only_downloads
        self._told = False
        self._hub_heads: dict[str, int] = {}

    async def predict(
        self, x: Array, confidence: float, timeout_s: float, options: AnswerOptions
    ) -> Prediction:
        """See :meth:`edge_sdk.device.Device.predict`."""
        limit = self._learner().manifest.limits.get("batch", math.inf)
        if x.ndim and len(x) > limit:
            limit = int(limit)
            answers = [
                await self.predict(x[start : start + limit], confidence, timeout_s, options)
                for start in range(0, len(x), limit)
            ]
            return Prediction(
                np.concatenate([answer.labels for answer in answers]),
                np.concatenate([answer.probabilities for answer in answers]),
                np.concatenate([answer.by_hub for answer in answers]),
            )
        own = await self._own(x, options, timeout_s)
        heads = _last_position(own.logits, own.manifest)
        probabilities = softmax(heads).mean(0)
        unsure = np.flatnonzero(probabilities.max(1) < confidence)
        by_hub = np.zeros(len(probabilities), bool)
        if len(unsure) and self._asks(own.manifest):
            hub = await self._hub_if_it_answers(own, unsure, x, timeout_s)
            if hub is not None:
                every = np.concatenate([heads[:, unsure], _last_position(hub, own.manifest)])
                probabilities[unsure] = softmax(every).mean(0)
                by_hub[unsure] = True
        return Prediction(probabilities.argmax(1), probabilities, by_hub)

    async def evaluate(self, examples: Source, batch_size: int) -> Evaluation:
        """See :meth:`edge_sdk.device.Device.evaluate`."""
        manifest = self._learner().manifest
        paths = _PATHS if manifest.whole or self._asks(manifest) else _PATHS[:1]
        tallies, samples = await self.tally(examples, batch_size, paths)
        alone = tallies["device_alone"].value
        through, ensemble = (
            tallies[path].value if path in tallies else None for path in _PATHS[1:]
        )
        return Evaluation(alone, through, ensemble, samples, metric_of(manifest.task))

    def _asks(self, manifest: Manifest) -> bool:
        """Whether there are heads above the device's, and the hub answers with them."""
        return not manifest.whole and not self._only_downloads()

    async def tally(
        self, examples: Source, batch_size: int, paths: Sequence[str]
    ) -> tuple[dict[str, Tally], int]:
        """Count the answers to examples, by way to answer.

        Args:
            examples: inputs and labels.
            batch_size: largest number of examples at a time; fewer if logits take much memory.
            paths: ways to answer: ``device_alone``, ``through_hub``, ``ensemble``, or ``mix`` for
                the last head of all base networks.

        Returns:
            The tally of each way, and the number of examples.

        Raises:
            DataError: there are no examples, they do not fit the model, a text is too long for one
                message, or there is no such way to answer.
            LinkClosed: the hub is out of reach.
        """
        if unknown := set(paths) - {*_PATHS, "mix"}:
            raise DataError(f"no way to answer is called {', '.join(sorted(unknown))}")
        manifest = self._learner().manifest
        fitted = await asyncio.to_thread(examples.fitted, manifest)
        examples = await asyncio.to_thread(fitted.snapshot)  # a source may block
        size = min(batch_size, manifest.limits.get("batch", batch_size))
        batches = examples.batches(size)
        if manifest.task == "tokens":
            positions = _ROOM // (4 * len(manifest.heads) * manifest.classes)
            batches = _divided(text.batches(examples, size), positions)
        tallies = {path: Tally(manifest.task) for path in paths}
        asks = self._asks(manifest) and any(path != "device_alone" for path in paths)
        samples = 0
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            samples += len(batch)
            own = await self._own(batch.x)
            hub = await self._hub(own, np.arange(len(batch)), batch.x) if asks else own.logits[:0]
            every = np.concatenate([own.logits, hub])
            logits = {
                "device_alone": own.logits,
                "through_hub": hub[-1:] if asks else own.logits,
                "ensemble": every,
                "mix": every[-1:],
            }
            for path, tally in tallies.items():
                tally.add(logits[path], batch.y)
        if samples == 0:
            raise DataError("there are no rows with a label to evaluate on")
        return tallies, samples

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
        if not manifest.whole and not self._asks(manifest):
            raise DataError(
                "going on with a text takes the whole model; the device's token only downloads"
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
            logits = own.logits if whole else await self._hub(own, np.arange(len(x)), seen)
            logits_BV = logits[-1, :, -1]
            if temperature > 0:  # the largest with Gumbel noise is a sample of the softmax
                logits_BV = logits_BV / temperature + rng.gumbel(size=logits_BV.shape)
            x = np.concatenate([x, logits_BV.argmax(1)[:, None].astype(x.dtype)], axis=1)
        return x

    async def _own(
        self, x: Array, options: AnswerOptions = _DEFAULTS, timeout_s: float | None = None
    ) -> _DeviceAnswer:
        """The device's half of an answer, by :meth:`Learner.predict` or :meth:`Mixture.answer`."""
        learner = self._learner()  # a move may replace it while this answer is computed
        manifest = learner.manifest
        x = manifest.ranges.fit_x(x)
        if not manifest.bases and options.bases is not None:
            raise DataError(
                f"{options.bases} bases are to be mixed, and the model has none; leave out bases, "
                "or export it with bases in tiers.toml"
            )
        if options.bases is not None and options.precision != "float32":
            raise DataError(
                f"{options.bases} bases are to be mixed in {options.precision}; bases are mixed in "
                "float32, so leave out bases or precision"
            )
        if not manifest.bases or options.precision != "float32":
            asked = x, options.precision, options.robustness
            logits, parts = await asyncio.to_thread(learner.predict, *asked)
            return _DeviceAnswer(manifest, logits, {0: parts}, options.robustness)
        manifest.check_robustness(options.robustness)
        bases = manifest.bases if options.bases is None else options.bases
        try:
            async with asyncio.timeout(timeout_s):
                mixture = await self._fetch_bases(bases)
        except (TimeoutError, CutlayerError) as error:
            if isinstance(error, CutlayerError) and error is not self._failure():
                raise
            raise LinkClosed(
                f"not all of {bases} bases are here, and the hub does not give the others; ask for "
                "fewer"
            ) from error
        answer = await asyncio.to_thread(mixture.answer, x, bases, options.robustness)
        return _DeviceAnswer(manifest, answer.logits, answer.parts, options.robustness)

    async def _hub_if_it_answers(
        self, own: _DeviceAnswer, rows: Array, x: Array, timeout_s: float
    ) -> Array | None:
        """:meth:`_hub`; None if the hub does not answer in time, restarts, or is gone for good."""
        try:
            async with asyncio.timeout(timeout_s):
                return await self._hub(own, rows, x)
        except (TimeoutError, CutlayerError) as error:
            failure = self._failure()
            if not isinstance(error, TimeoutError | LinkClosed) and error is not failure:
                raise
            if failure is not None and not self._told:
                self._told = True
                log.warning("the hub answers no more, the device answers alone: %s", failure)
            return None

    async def _hub(self, own: _DeviceAnswer, rows: Array, x: Array) -> Array:
        """Logits of the hub's heads for some rows, mean over the base networks.

        Args:
            own: the device's half of the answer to a batch.
            rows: numbers of the rows.
            x: inputs of the batch.
        """
        logits = [await self._hub_of(base, own, rows, x) for base in own.parts]
        mean: Array = np.mean(logits, axis=0)
        return mean

    async def _hub_of(self, base: int, own: _DeviceAnswer, rows: Array, x: Array) -> Array:
        """:meth:`_hub` for one base network, in as many requests as questions and answers need."""
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
            many = min(many, self._rows_of_a_question(parts, manifest))
            some = rows_of(parts, rows[done : done + many], manifest)
            answer = await self._ask(Question(some, tier, base, own.robustness))
            self._hub_heads[tier] = len(answer.heads)
            answers.append(answer.logits)
            done += many
        return np.concatenate(answers, axis=1)

    def _rows_of_a_question(self, parts: Mapping[str, Array], manifest: Manifest) -> int:
        """How many rows of packed activations a question holds.

        Raises:
            DataError: it does not hold one.
        """
        one = sum(part.nbytes for part in rows_of(parts, np.zeros(1, int), manifest).values())
        room = self._largest_message() - _BESIDE
        if one > room:
            raise DataError(
                f"the packed activations of one row have {one} bytes, and a message to the hub "
                f"holds {room}; take smaller inputs, or raise max_message in [limits] of the hub"
            )
        return max(min(room, _ROOM) // one, 1)


def _divided(batches: Iterator[Examples], positions: int) -> Iterator[Examples]:
    """Batches of texts with so many positions at most, or of a single text."""
    for batch in batches:
        size = max(positions // batch.x.shape[1], 1)
        for start in range(0, len(batch), size):
            yield batch.read(np.arange(start, min(start + size, len(batch))))


def rows_of(parts: Mapping[str, Array], rows: Array, manifest: Manifest) -> dict[str, Array]:
    """The packed activations of some rows of a batch."""
    return {
        spec.name: parts[spec.name][rows] if spec.shape[:1] == ("batch",) else parts[spec.name]
        for spec in manifest.packed
    }


def _last_position(logits: Array, manifest: Manifest) -> Array:
    """Logits (heads, rows, classes); for tokens those at the last position."""
    return logits[:, :, -1] if manifest.task == "tokens" else logits
