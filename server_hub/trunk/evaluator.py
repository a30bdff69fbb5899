"""What the hub answers, and how good the answers are on held-out examples."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.protocol.tensors import Array
from edge_sdk.training import text
from edge_sdk.training.data import Examples
from export.dual_norm import robustness
from export.lora import fit_ranks
from export.names import is_slot
from export.packing import get_codec
from export.split import NoHead, SplitModel, Task, channel_axis
from server_hub.aggregation.layer_store import State
from server_hub.trunk.interface import Arrival, MixtureEvaluation

_ROWS = 256
"""Examples that are measured at a time."""

_LOGITS = 2**24
"""Numbers that a head's logits for texts that are measured at a time may have."""


class Tally:
    """How good answers are: accuracy for classes, perplexity for tokens.

    An answer is the mean of the softmax of some heads. Perplexity is the exponential of the mean
    negative logarithm that it gives the next tokens, over the positions that count; the largest
    number that is told is ``exp(700)``.
    """

    def __init__(self, task: Task) -> None:
        self._task = task
        self._sum, self._labels = 0.0, 0

    def add(self, logits: Tensor, y: Tensor) -> None:
        """Count answers.

        Args:
            logits: (heads, rows, classes), or (heads, rows, positions, vocabulary).
            y: labels (rows,), or (rows, positions) with -1 where a position does not count.
        """
        if self._task == "classes":
            answers_N = logits.softmax(-1).mean(0).argmax(-1)
            self._sum += int((answers_N == y).sum())
            self._labels += len(y)
            return
        counted = y >= 0
        log_p_HN = logits[:, counted].log_softmax(-1).gather(
            -1, y[counted].expand(len(logits), -1).unsqueeze(-1)
        ).squeeze(-1)  # fmt: skip
        losses_N = math.log(len(logits)) - log_p_HN.logsumexp(0)
        self._sum += float(losses_N.sum(dtype=torch.float64))
        self._labels += len(losses_N)

    @property
    def value(self) -> float:
        """The figure for all that was counted."""
        mean = self._sum / self._labels
        return mean if self._task == "classes" else math.exp(min(mean, 700.0))


def batches_to_measure(data: Examples, model: SplitModel) -> Iterator[Examples]:
    """Held-out examples, as many at a time as memory has room for the logits of."""
    if model.task == "classes":
        return data.batches(_ROWS)
    rows = _LOGITS // (data.y.shape[1] * vocabulary(model))
    return text.batches(data, min(max(rows, 1), _ROWS))


def vocabulary(model: SplitModel) -> int:
    """How many tokens a model of tokens knows."""
    table = model.stem.embedding
    assert isinstance(table, nn.Embedding)
    return table.num_embeddings


class Served:
    """The models that the hub answers and evaluates with, by cut.

    Args:
        model: the model; its own weights are not used.
        device: torch device.
        held_out: examples for :meth:`evaluate`, ``(x, y)``.
    """

    def __init__(
        self, model: SplitModel, device: str, held_out: tuple[Array, Array] | None = None
    ) -> None:
        self.device = torch.device(device)
        self._template = model.to(self.device)
        self._serving: dict[tuple[int, int], SplitModel] = {}
        self._held_out = None if held_out is None else Examples(*held_out)

    def serve(self, states: Mapping[int, State], bases: int = 0) -> None:
        """Models to answer and evaluate with, by cut; equal states share one model.

        Of several ``bases`` each tensor is (bases, ...).
        """
        models: dict[int, list[SplitModel]] = {}
        for state in states.values():
            if id(state) not in models:
                each = [{n: t[b] for n, t in state.items()} for b in range(bases)] or [state]
                models[id(state)] = [self._model_with(own).eval() for own in each]
        self._serving = {
            (cut, base): model
            for cut, state in states.items()
            for base, model in enumerate(models[id(state)])
        }

    @torch.no_grad()
    def answer(self, arrival: Arrival) -> Array:
        """Logits of the heads above the cut, the true head last.

        They are (heads, rows, classes), or (heads, rows, positions, vocabulary).
        """
        h = get_codec(arrival.codec).unpack({n: self._move(p) for n, p in arrival.parts.items()})
        with robustness(arrival.robustness):
            logits = _above(self._serving[arrival.cut, arrival.base], h, arrival.cut)
        result: Array = logits.cpu().numpy()
        return result

    @torch.no_grad()
    def evaluate(self, tiers: Mapping[str, tuple[int, str]]) -> dict[str, dict[str, float]]:
        """Accuracy, or perplexity, by tier (cut, codec) on the held-out examples, by path.

        The activations are packed and unpacked at the cut, as they are on the way from a device.
        """
        assert self._held_out is not None
        task = self._template.task
        values = {}
        for name, (cut, codec_name) in tiers.items():
            model, codec = self._serving[cut, 0], get_codec(codec_name)
            tallies = {path: Tally(task) for path in ("device_alone", "through_hub", "ensemble")}
            for batch in batches_to_measure(self._held_out, model):
                h, own = model.stem(self._move(batch.x)), []
                for depth in range(cut):
                    h = model.block[depth](h)
                    if str(depth + 1) in model.aux:
                        own.append(model.answer(depth + 1, h))
                sent = codec.unpack(codec.pack(h, channel_axis(h, model.channels_first)))
                hub, device, y = _above(model, sent, cut), torch.stack(own), self._move(batch.y)
                tallies["device_alone"].add(device, y)
                tallies["through_hub"].add(hub[-1:], y)
                tallies["ensemble"].add(torch.cat([device, hub]), y)
            values[name] = {path: tally.value for path, tally in tallies.items()}
        return values

    @torch.no_grad()
    def evaluate_bases(self) -> MixtureEvaluation:
        """How good the bases are as whole models, each alone, and the best of them mixed.

        Every fifth held-out example serves to put them in order, the others to measure mixtures:
        the mean of the logits of the best so many.
        """
        assert self._held_out is not None
        cut = min(cut for cut, _ in self._serving)
        models = [self._serving[key] for key in sorted(self._serving) if key[0] == cut]
        task, metric = self._template.task, max if self._template.task == "classes" else min
        rows = np.arange(len(self._held_out))
        single = [Tally(task) for _ in models]
        for batch in batches_to_measure(self._held_out.take(rows[rows % 5 == 0]), models[0]):
            for model, tally in zip(models, single, strict=True):
                tally.add(whole_answer(model, self._move(batch.x))[None], self._move(batch.y))
        scores = [tally.value for tally in single]
        order = sorted(range(len(models)), key=lambda b: scores[b], reverse=metric is max)
        mixed = [Tally(task) for _ in models]
        for batch in batches_to_measure(self._held_out.take(rows[rows % 5 != 0]), models[0]):
            total = torch.zeros((), device=self.device)
            for i, base in enumerate(order):
                total = total + whole_answer(models[base], self._move(batch.x))
                mixed[i].add((total / (i + 1))[None], self._move(batch.y))
        return MixtureEvaluation(
            order, scores, {i + 1: tally.value for i, tally in enumerate(mixed)}
        )

    def _model_with(self, state: State) -> SplitModel:
        frozen = {id(p): p for p in self._template.parameters() if not p.requires_grad}
        model = copy.deepcopy(self._template, frozen)  # all copies share what is frozen
        tensors = {n: torch.from_numpy(np.array(t)) for n, t in state.items() if not is_slot(n)}
        fit_ranks(model, tensors)
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the trunk's model has no {unknown[0]}; it was built otherwise")
        return model

    def _move(self, array: Array) -> Tensor:
        """On the device; torch warns of read-only memory, so that is copied."""
        return torch.from_numpy(np.require(array, requirements="W")).to(self.device)


def whole_answer(model: SplitModel, x: Tensor) -> Tensor:
    """Logits of the whole model for inputs (rows, ...)."""
    return _above(model, model.stem(x), 0)[-1]


def _above(model: SplitModel, h: Tensor, cut: int) -> Tensor:
    logits = []
    for depth in range(cut, model.depth):
        h = model.block[depth](h)
        if str(depth + 1) in model.aux:
            logits.append(model.answer(depth + 1, h))
    if not isinstance(model.head, NoHead):
        logits.append(model.head(h))
    return torch.stack(logits)
