"""Answers of the global model, and how good they are on held-out examples."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.inference.metrics import Tally
from edge_sdk.protocol.tensors import Array, State
from edge_sdk.training import text
from edge_sdk.training.data import Examples
from export.bases.dual_norms import robustness
from export.cutting.channels import channel_axis
from export.cutting.split_model import NoHead, SplitModel
from export.packing.codecs import get_codec
from server_hub.trunk.errors import TrunkRefused, is_damage, reason_of
from server_hub.trunk.interface import EvaluationReport, Query
from server_hub.trunk.models import ModelPool, to_device, to_device_by_name

_ROWS = 256
"""Largest number of examples that are evaluated at a time."""

_LOGITS = 2**24
"""Largest number of logits of one head for texts that are evaluated at a time."""

Evaluation = Generator[None, None, EvaluationReport]
"""An evaluation in slices: it yields between two batches, and returns its report."""


class Evaluator:
    """Answers and evaluates with the states that are served.

    Args:
        model: the model; its own trained tensors are not used.
        device: torch device.
        held_out: examples to evaluate on, ``(x, y)``.
    """

    def __init__(
        self, model: SplitModel, device: str, held_out: tuple[Array, Array] | None = None
    ) -> None:
        self._pool = ModelPool(model, device)
        self._served: dict[tuple[int, int], SplitModel] = {}
        self._held_out = None if held_out is None else Examples(*held_out)
        self._users = 0

    def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        """Answer and evaluate with these states from now on. Equal states share one model.

        An evaluation that is under way goes on with the states that it has begun with.

        Args:
            states: tensors of the whole model by cut. With ``bases``, each tensor is (bases, ...).
            bases: number of base networks; 0 for a single model.
        """
        if not self._users:
            self._pool.give_back(list({id(m): m for m in self._served.values()}.values()))
        models: dict[int, list[SplitModel]] = {}
        for state in states.values():
            if id(state) not in models:
                each = [{n: t[b] for n, t in state.items()} for b in range(bases)] or [state]
                models[id(state)] = [self._pool.take(own).eval() for own in each]
        self._served = {
            (cut, base): model
            for cut, state in states.items()
            for base, model in enumerate(models[id(state)])
        }

    @torch.no_grad()
    def answer(self, query: Query) -> Array:
        """Logits of the heads above the cut, the true head last.

        Returns:
            (heads, rows, classes), or (heads, rows, positions, vocabulary).

        Raises:
            TrunkRefused: this query cannot be answered.
        """
        try:
            h = get_codec(query.codec).unpack(to_device_by_name(query.parts, self._pool.device))
            finite = torch.isfinite(h).all()
            with robustness(query.robustness):
                logits = _above(self._served[query.cut, query.base], h, query.cut)
            result: Array = logits.cpu().numpy()
        except Exception as error:
            if is_damage(error):
                raise
            raise TrunkRefused(reason_of(error)) from error
        if not finite:
            raise TrunkRefused("the activations are not finite")
        return result

    def evaluate(self, tiers: Mapping[str, tuple[int, str]], paths: Sequence[str]) -> Evaluation:
        """Evaluate the states that are served now on the held-out examples, in slices.

        Args:
            tiers: cut and codec by tier.
            paths: ways to answer to evaluate.
        """
        self._users += 1
        return self._slices(dict(self._served), tiers, paths)

    def _slices(
        self,
        served: Mapping[tuple[int, int], SplitModel],
        tiers: Mapping[str, tuple[int, str]],
        paths: Sequence[str],
    ) -> Evaluation:
        try:
            if any(base for _, base in served):
                return (yield from self._base_networks(served, tiers))
            return (yield from self._single_model(served, tiers, paths))
        finally:
            self._users -= 1

    def _single_model(
        self,
        served: Mapping[tuple[int, int], SplitModel],
        tiers: Mapping[str, tuple[int, str]],
        paths: Sequence[str],
    ) -> Evaluation:
        """Accuracy, or perplexity, by tier and path.

        Activations are packed and unpacked at the cut, as on their way from a device.
        """
        assert self._held_out is not None
        task = self._pool.template.task
        figures = {}
        for name, (cut, codec_name) in tiers.items():
            model, codec = served[cut, 0], get_codec(codec_name)
            tallies = {path: Tally(task) for path in paths}
            for batch in batches_to_evaluate(self._held_out, model):
                with torch.no_grad():
                    x = self._move(batch.x)
                    h, own = model.stem(x), []
                    for depth in range(cut):
                        h = model.block[depth](h)
                        if str(depth + 1) in model.aux:
                            own.append(model.answer(depth + 1, h))
                    axis = channel_axis(h, model.channels_at(cut, x))
                    sent = codec.unpack(codec.pack(h, axis))
                    hub = _above(model, sent, cut).cpu().numpy()
                    device = torch.stack(own).cpu().numpy()
                for path, tally in tallies.items():
                    tally.add(logits_of(path, device, hub), batch.y)
                yield
            figures[name] = {path: tally.value for path, tally in tallies.items()}
        return EvaluationReport(figures)

    def _base_networks(
        self, served: Mapping[tuple[int, int], SplitModel], tiers: Mapping[str, tuple[int, str]]
    ) -> Evaluation:
        """How good the base networks are as whole models, each alone and the best of them mixed.

        Every fifth held-out example serves to put them in order. On the others mixtures are
        measured: the mean of the logits of the best n.
        """
        assert self._held_out is not None
        cut = min(cut for cut, _ in served)
        models = [served[key] for key in sorted(served) if key[0] == cut]
        task = self._pool.template.task
        rows = np.arange(len(self._held_out))
        single = [Tally(task) for _ in models]
        for batch in batches_to_evaluate(self._held_out.read(rows[rows % 5 == 0]), models[0]):
            for model, tally in zip(models, single, strict=True):
                tally.add(self._logits(model, batch.x)[None].cpu().numpy(), batch.y)
            yield
        scores = [tally.value for tally in single]
        better_is_more = task == "classes"
        order = sorted(range(len(models)), key=lambda b: scores[b], reverse=better_is_more)
        mixed = [Tally(task) for _ in models]
        for batch in batches_to_evaluate(self._held_out.read(rows[rows % 5 != 0]), models[0]):
            total = torch.zeros((), device=self._pool.device)
            for i, base in enumerate(order):
                total = total + self._logits(models[base], batch.x)
                mixed[i].add((total / (i + 1))[None].cpu().numpy(), batch.y)
            yield
        values = {i + 1: tally.value for i, tally in enumerate(mixed)}
        return EvaluationReport(
            {tier: {"mix": values[len(order)]} for tier in tiers}, values, order
        )

    @torch.no_grad()
    def _logits(self, model: SplitModel, x: Array) -> Tensor:
        return whole_answer(model, self._move(x))

    def _move(self, array: Array) -> Tensor:
        return to_device([array], self._pool.device)[0]


def logits_of(path: str, device: Array, hub: Array) -> Array:
    """The logits that a way to answer takes the mean softmax of.

    Args:
        path: ``device_alone``, ``through_hub`` or ``ensemble``.
        device: logits of the device's heads (heads, rows, ...).
        hub: logits of the hub's heads (heads, rows, ...), the true head last.
    """
    if path == "device_alone":
        return device
    return hub[-1:] if path == "through_hub" else np.concatenate([device, hub])


def finished(evaluation: Evaluation) -> EvaluationReport:
    """Make all slices of an evaluation that are left; return its report."""
    while True:
        try:
            next(evaluation)
        except StopIteration as end:
            report: EvaluationReport = end.value
            return report


def batches_to_evaluate(data: Examples, model: SplitModel) -> Iterator[Examples]:
    """Held-out examples, as many at a time as memory has room for the logits of."""
    if model.task == "classes":
        return data.batches(_ROWS)
    rows = _LOGITS // (data.y.shape[1] * vocabulary(model))
    return text.batches(data, min(max(rows, 1), _ROWS))


def vocabulary(model: SplitModel) -> int:
    """Number of tokens in the vocabulary of a model of tokens."""
    table = model.stem.embedding
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


def whole_answer(model: SplitModel, x: Tensor) -> Tensor:
    """Logits (rows, ..., classes) of the whole model for inputs (rows, ...)."""
    return _above(model, model.stem(x), 0)[-1]


def _above(model: SplitModel, h: Tensor, cut: int) -> Tensor:
    """Logits (heads, rows, ...) of all heads above a cut, the true head last."""
    logits = []
    for depth in range(cut, model.depth):
        h = model.block[depth](h)
        if str(depth + 1) in model.aux:
            logits.append(model.answer(depth + 1, h))
    if not isinstance(model.head, NoHead):
        logits.append(model.head(h))
    return torch.stack(logits)
