"""Local training: batches through the step graphs of a bundle."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from edge_sdk.bundle.manifest import Manifest, tensor_of
from edge_sdk.errors import BundleError, DataError, Diverged
from edge_sdk.protocol.batch import Batch, HeadGradient
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import Features, Gradient
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from edge_sdk.training import text
from edge_sdk.training.adversarial import Attack
from edge_sdk.training.data import Examples, Source
from edge_sdk.training.plan import (
    Augment,
    LocalPlan,
    LocalResult,
    NoGradient,
    Outgoing,
    Reply,
    ReplyRequest,
    Training,
    TrainingStep,
    advance,
)

MAX_SEED = 2**31 - 70
"""Dropout seeds are below this number. The prime that masks are computed with is just above it."""

_LABELS = 256
"""Rows that are read at a time to see which classes there are."""

_LARGEST = float(np.finfo(np.float32).max) / 256
"""Bound on scales of packed activations: times a code, at most 127, they are still float32."""

Precision = Literal["float32", "int8"]
"""Dtype of the weights in a graph for inference."""

Emit = Callable[[int, Batch], None]
"""Takes the number of a batch in its round, and the batch."""


@dataclass
class _BatchInFlight:
    """A batch whose gradient is awaited, with what its step needs.

    Attributes:
        number: number of the batch in its round.
        inputs: ``x``, and ``seed`` with dropout, as the forward pass had them.
        examples: the batch itself.
        head_stepped: whether the model's head has made its step, with ``"u_shaped"``.
    """

    number: int
    inputs: Mapping[str, Array]
    examples: Examples
    head_stepped: bool = False


def _check_finite(parts: Mapping[str, Array], what: str = "the activations are") -> None:
    """Raise :class:`Diverged` if packed tensors, by name, are not finite once unpacked."""
    for part in parts.values():
        if part.dtype.kind == "f" and not (np.abs(part.astype(np.float32)) < _LARGEST).all():
            raise Diverged(f"{what} not finite")


class _Scores:
    """Loss and accuracy of the heads in an epoch, means over the labels that count."""

    def __init__(self) -> None:
        self.last: float | None = None  # summed loss of the heads in the latest step
        self.restart()

    def restart(self) -> None:
        """Begin an epoch."""
        self.loss = self.correct = 0.0
        self.labels = 0

    def add(self, outputs: dict[str, Array], examples: Examples) -> dict[str, Array]:
        """Count a step. Returns its outputs without loss and number of correct answers."""
        self.last = float(outputs.pop("loss"))
        if not math.isfinite(self.last):
            raise Diverged(f"the loss is {self.last}")
        self.loss += self.last * examples.labels
        self.correct += float(outputs.pop("correct"))
        self.labels += examples.labels
        return outputs

    def metrics(self) -> dict[str, float]:
        """The means; empty if no step was made."""
        if not self.labels:
            return {}
        return {"loss": self.loss / self.labels, "accuracy": self.correct / self.labels}


class Learner:
    """Trains and predicts with the step graphs of one bundle.

    Args:
        manifest: manifest of the bundle.
        runtime: runs its graphs and holds its state.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime

    def train(
        self, state: Mapping[str, Array], data: Source, plan: LocalPlan, emit: Emit
    ) -> LocalResult:
        """:meth:`training` from start to end, for plans without returned gradients.

        Args:
            state: as for :meth:`training`.
            data: as for :meth:`training`.
            plan: as for :meth:`training`.
            emit: receives the number and the packed activations of each batch.
        """
        training = self.training(state, data, plan)
        while True:
            step = advance(training)
            if isinstance(step, LocalResult):
                return step
            if isinstance(step, Outgoing):
                assert isinstance(step.batch, Batch)
                emit(step.number, step.batch)

    def training_bases(
        self, states: Mapping[int, Mapping[str, Array]], data: Source, plan: LocalPlan
    ) -> Training:
        """:meth:`training` of several base networks, one after the other.

        Base networks share no parameters, so the result is that of training them in turns, in the
        memory of one. Every base sees the same batches.

        Args:
            states: state of each base by number.
            data: as for :meth:`training`.
            plan: as for :meth:`training`, without returned gradients.
        """
        trained: dict[str, Array] = {}
        metrics: list[dict[str, float]] = []
        for base, state in states.items():
            training = self.training(state, data, plan)
            while not isinstance(step := advance(training), LocalResult):
                if isinstance(step, Outgoing) and isinstance(step.batch, Batch):
                    step = replace(step, batch=replace(step.batch, base=base))
                yield step
            trained |= {tensor_of(base, n): t for n, t in step.state.items()}
            metrics.append(step.metrics)
        means = {n: float(np.mean([m[n] for m in metrics])) for n in metrics[0]}
        return LocalResult(trained, len(data), means)

    def training(self, state: Mapping[str, Array], data: Source, plan: LocalPlan) -> Training:
        """The local epochs of one round, a step at a time.

        ``plan.activations`` says when activations are yielded:

        - ``"none"``: never.
        - ``"train"``: by the training steps of the first epoch, at no extra compute.
        - ``"forward"``: by a pass before training, as in FedSplitX's paper.
        - ``"returned"``: in every epoch. Each step is made with the gradient that comes back; the
          auxiliary heads keep their values. Up to ``plan.staleness`` further batches are in flight
          while the learner waits for the oldest gradient, so a gradient is that of activations
          which at most so many steps have made older. Steps are made in the order of the batches.
        - ``"fused"``: as ``"returned"``, and each step joins the heads' own gradient with the one
          that comes back, as in SuperSFL (https://arxiv.org/abs/2601.02092). The heads' weight is

              own = share * hub's loss / (heads' mean loss + hub's loss)

          where ``share`` is the hyper-parameter ``own`` and the heads' loss that of the step
          before. A batch whose gradient never comes is trained on by the heads alone.
        - ``"u_shaped"``: as ``"returned"``, but labels stay on the device. The batch's features
          come back first; the model's head makes its step here and the gradient of the features
          is yielded; then the gradient of the activations comes back.

        Args:
            state: parameters and statistics to start from. Optimizer slots start at zero unless
                they are given; the result has slots if ``state`` has.
            data: rows that fit the manifest, see :meth:`Source.fitted`.
            plan: epochs, batch size, hyper-parameters.

        Raises:
            Diverged: the loss, a parameter, or what is packed here or came packed from the hub is
                not finite any more; the runtime then holds ``state`` again.
        """
        self.runtime.set_state(state)
        try:
            return (yield from self._epochs(state, data, plan))
        except Diverged:
            self.runtime.set_state(state)
            raise

    def _epochs(self, state: Mapping[str, Array], data: Source, plan: LocalPlan) -> Training:
        """:meth:`training` with the state that the runtime holds."""
        runtime, rng = self.runtime, np.random.default_rng(plan.seed)
        hyper = {
            n: np.asarray(v, np.float32) for n, v in plan.hyper.items()
            if n not in ("own", "masked") and not n.startswith("attack_")
        }  # fmt: skip
        seeded = any(port.role == "seed" for port in self.manifest.graphs["train"].inputs)
        size = min(plan.batch_size, self.manifest.limits.get("batch", plan.batch_size))
        present = self._present(data, plan)
        adversarial = self.manifest.adversarial_graph if plan.hyper.get("robustness") else None
        attack = None if adversarial is None else Attack.of(plan.hyper)
        graph = adversarial or "train"
        if plan.activations is ActivationMode.FORWARD:
            for number, batch in enumerate(self._batches(data, size, plan, rng)):
                parts = runtime.run("forward", {"x": batch.x})
                _check_finite(parts)
                yield Outgoing(number, Batch(parts, batch.y))
        scores = _Scores()
        in_flight: deque[_BatchInFlight] = deque()
        sent = 0
        for epoch in range(plan.epochs):
            scores.restart()
            for number, batch in enumerate(self._batches(data, size, plan, rng)):
                seed = {"seed": np.asarray(rng.integers(MAX_SEED))} if seeded else {}
                if plan.activations.returns_gradients:
                    inputs = {"x": batch.x, **seed}
                    labels = None if plan.activations is ActivationMode.U_SHAPED else batch.y
                    parts = runtime.run("activate", inputs)
                    _check_finite(parts)
                    yield Outgoing(sent, Batch(parts, labels))
                    in_flight.append(_BatchInFlight(sent, inputs, batch))
                    sent += 1
                    yield from self._step_back(in_flight, plan, hyper, scores, most=plan.staleness)
                    continue
                given = {"x": batch.x, "y": batch.y, **present}
                if attack is None:
                    outputs = runtime.run(graph, {**given, **hyper, **seed})
                else:
                    x_adv = {"x_adv": attack.on(runtime, given, rng)}
                    outputs = runtime.run(graph, {**given, **x_adv, **hyper, **seed})
                outputs = scores.add(outputs, batch)
                if epoch > 0 or plan.activations is not ActivationMode.TRAIN:
                    yield None
                    continue
                _check_finite(outputs)
                noise = {n: outputs.pop(n) for n in list(outputs) if n.startswith("noise.")}
                there = present.get("present")
                yield Outgoing(number, Batch(outputs, batch.y, present=there))
                if noise:
                    parts = {n.removeprefix("noise."): part for n, part in noise.items()}
                    yield Outgoing(number, Batch(parts, batch.y, noise=True, present=there))
        yield from self._step_back(in_flight, plan, hyper, scores, most=0)
        slots = any(e.kind == "slot" and e.spec.name in state for e in self.manifest.state)
        result = runtime.get_state(slots)
        for name, tensor in result.items():
            if not np.isfinite(tensor).all():
                raise Diverged(f"{name} is not finite")
        return LocalResult(result, len(data), scores.metrics())

    def _present(self, data: Source, plan: LocalPlan) -> dict[str, Array]:
        """The class mask, if the graphs take one: the input ``present`` (classes,) float32.

        It is 1 for classes that have local examples and 0 for others, which the loss leaves out;
        all ones if the hyper-parameter ``masked`` is 0.
        """
        if all(port.spec.name != "present" for port in self.manifest.graphs["train"].inputs):
            return {}
        if plan.hyper.get("masked") == 0:
            return {"present": np.ones(self.manifest.classes, np.float32)}
        classes = np.zeros(self.manifest.classes, np.float32)
        for start in range(0, len(data), _LABELS):
            rows = np.arange(start, min(start + _LABELS, len(data)))
            classes[np.unique(data.read(rows).y)] = 1
        return {"present": classes}

    def _batches(
        self, data: Source, size: int, plan: LocalPlan, rng: np.random.Generator
    ) -> Iterator[Examples]:
        """The shuffled batches of an epoch; texts are batched with others of similar length.

        Raises:
            DataError: there is no batch: every row has been deleted, or no text has a label. Or
                what augmentation returns does not fit the model.
        """
        # draws of its own, so that the order of the rows does not depend on the augmentation
        (noise,) = rng.spawn(1)
        texts = self.manifest.task == "tokens"
        empty = True
        for batch in text.batches(data, size, rng) if texts else data.batches(size, rng):
            empty = False
            yield batch if plan.augment is None else self._augmented(batch, plan.augment, noise)
        if empty:
            raise DataError(f"none of the {len(data)} rows of this round can be trained on")

    def _augmented(self, batch: Examples, augment: Augment, noise: np.random.Generator) -> Examples:
        try:
            return augment(batch, noise).fitted(self.manifest)
        except DataError as error:
            raise DataError(f"augment returned rows that do not fit: {error}") from error

    def _step_back(
        self,
        in_flight: deque[_BatchInFlight],
        plan: LocalPlan,
        hyper: Mapping[str, Array],
        scores: _Scores,
        most: int,
    ) -> Generator[TrainingStep, Reply, None]:
        """Step with the gradients that are here, and wait until ``most`` batches are in flight."""
        fused = plan.activations is ActivationMode.FUSED
        while in_flight:
            if plan.activations is ActivationMode.U_SHAPED:
                yield from self._step_head(in_flight, hyper, scores, most)
            wait = len(in_flight) > most
            reply = yield ReplyRequest(in_flight[0].number, wait)
            if reply is None:
                assert not wait
                return
            batch = in_flight.popleft()
            inputs = {**batch.inputs, **hyper}
            if isinstance(reply, NoGradient):
                outputs = self.runtime.run("train", {**inputs, "y": batch.examples.y})
                scores.add(outputs, batch.examples)
            else:
                assert isinstance(reply, Gradient)
                _check_finite(reply.parts, "a gradient from the hub is")
                inputs |= {f"grad.{name}": part for name, part in reply.parts.items()}
                if fused:
                    own = self._own(plan, scores, reply.loss)
                    inputs |= {"y": batch.examples.y, "own": np.asarray(own, np.float32)}
                    scores.add(self.runtime.run("fuse", inputs), batch.examples)
                else:
                    self.runtime.run("backward", inputs)
            yield None

    def _step_head(
        self,
        in_flight: deque[_BatchInFlight],
        hyper: Mapping[str, Array],
        scores: _Scores,
        most: int,
    ) -> Generator[TrainingStep, Reply, None]:
        """Step the model's head with the features that are here.

        Waits for those of the oldest batch if more than ``most`` are in flight.
        """
        for batch in in_flight:
            if batch.head_stepped:
                continue
            wait = batch is in_flight[0] and len(in_flight) > most
            reply = yield ReplyRequest(batch.number, wait, features=True)
            if reply is None:
                assert not wait
                return
            assert isinstance(reply, Features)
            _check_finite(reply.parts, "the features from the hub are")
            seed = {name: value for name, value in batch.inputs.items() if name == "seed"}
            inputs = {f"features.{name}": part for name, part in reply.parts.items()}
            inputs |= {"y": batch.examples.y, **hyper, **seed}
            outputs = scores.add(self.runtime.run("finish", inputs), batch.examples)
            parts = {name.removeprefix("grad."): part for name, part in outputs.items()}
            _check_finite(parts, "the gradient of the features is")
            batch.head_stepped = True
            yield Outgoing(batch.number, HeadGradient(parts, batch.examples.labels))

    def _own(self, plan: LocalPlan, scores: _Scores, hub_loss: float | None) -> float:
        """Weight of the heads' gradient; before the first step as if both losses were equal."""
        share = plan.hyper["own"]
        if scores.last is None or hub_loss is None:
            return share / 2
        heads_loss = scores.last / len(self.manifest.heads)
        smallest = 1e-6
        own = share * (hub_loss + smallest) / (heads_loss + hub_loss + 2 * smallest)
        return max(own, 1e-3)  # heads' gradients are divided by it

    def predict(
        self, x: Array, precision: Precision = "float32", robustness: float = 0.0
    ) -> tuple[Array, dict[str, Array]]:
        """Logits of the device's heads, and the packed activations by name.

        Args:
            x: inputs (rows, ...), as the model takes them.
            precision: ``float32`` for the state that the runtime holds; ``int8`` for the same
                state, with matrices in 8 bits.
            robustness: weight of the noise norms, from 0 to 1.

        Returns:
            Logits (heads, rows, classes), or (heads, rows, positions, vocabulary); and the tensors
            that the manifest lists as ``packed``.

        Raises:
            BundleError: the bundle has no graph of this precision; or its int8 graph holds the
                weights of the export, as on ExecuTorch, and the state has others.
            DataError: ``robustness`` is out of range, or the model has no dual norms.
        """
        self.manifest.check_robustness(robustness)
        graph = "predict" if precision == "float32" else f"predict_{precision}"
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"the bundle of tier {self.manifest.tier!r} has no graph {graph!r}; export the "
                f'tier with precision = "{precision}", or predict in float32'
            )
        weight = np.asarray(robustness, np.float32)
        outputs = self.runtime.run(graph, {"x": x, "robustness": weight})
        return outputs.pop("logits"), outputs
