"""Local training: batches through the step graphs of a bundle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from edge_sdk.bundle.manifest import Manifest, tensor_of
from edge_sdk.errors import BundleError
from edge_sdk.inference.mixture import check_robustness
from edge_sdk.protocol.messages import Features, Gradient
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from edge_sdk.training import text
from edge_sdk.training.adversarial import Attack
from edge_sdk.training.data import Examples

MAX_SEED = 2**31 - 70
"""Seeds of dropout are below this: the prime that masks are computed with is just above it."""

Precision = Literal["float32", "int8"]
"""Of the weights in a graph for inference."""

Emit = Callable[[int, dict[str, Array], Array], None]
"""Takes a batch number, its packed activations and its labels."""


@dataclass(frozen=True)
class LocalPlan:
    """How to train in one round; field by field what the ``round`` message says."""

    epochs: int
    batch_size: int
    hyper: Mapping[str, float]
    activations: str
    seed: int
    staleness: int = 0


@dataclass(frozen=True)
class LocalResult:
    """Outcome of local training.

    Attributes:
        state: what was trained, by name: the tensors that training started from; of several base
            networks by :func:`edge_sdk.inference.mixture.tensor_of`.
        samples: number of local examples.
        metrics: ``loss`` and ``accuracy`` of the last epoch, before each step, weighted by labels.
    """

    state: dict[str, Array]
    samples: int
    metrics: dict[str, float]


@dataclass(frozen=True)
class Packed:
    """The packed activations of a batch and its labels, on their way to the hub.

    There are no labels where they stay here. Of several base networks they are of ``base``, and
    ``present`` says with 1 and 0 of which classes there are examples here; ``noise`` that they have
    come through the noise norms.
    """

    batch: int
    parts: dict[str, Array]
    labels: Array | None
    base: int = 0
    noise: bool = False
    present: Array | None = None


@dataclass(frozen=True)
class Finished:
    """The packed gradient of a batch's features, of the mean loss over so many ``labels``."""

    batch: int
    parts: dict[str, Array]
    labels: int


@dataclass(frozen=True)
class Wanted:
    """The gradient of a batch that was sent: to be waited for, or taken if it is there.

    Or its ``features``, where the device has the model's head.
    """

    batch: int
    wait: bool
    features: bool = False


class Alone(NamedTuple):
    """Instead of a gradient: there will be none."""


@dataclass
class _Flight:
    """A batch on its way: what its step will be computed from again."""

    batch: int
    inputs: Mapping[str, Array]
    examples: Examples
    finished: bool = False


Reply = Gradient | Features | Alone | None

Training = Generator[Packed | Finished | Wanted | None, Reply, LocalResult]
"""Local training, a step at a time; returns the result.

Yields what is to be sent; or which gradient it wants, to be sent it; or None if it need not wait
and there is none yet; or, in ``"fused"`` rounds, :class:`Alone` if none will come. Or yields None.
"""


class _Scores:
    """Loss and accuracy of the heads in an epoch, weighted by labels."""

    def __init__(self) -> None:
        self.last: float | None = None
        self.restart()

    def restart(self) -> None:
        """An epoch begins."""
        self.loss = self.correct = 0.0
        self.labels = 0

    def add(self, outputs: dict[str, Array], examples: Examples) -> dict[str, Array]:
        """Count a step; returns the outputs that are left."""
        self.last = float(outputs.pop("loss"))
        self.loss += self.last * examples.labels
        self.correct += float(outputs.pop("correct"))
        self.labels += examples.labels
        return outputs

    def metrics(self) -> dict[str, float]:
        """Means; nothing where no step was made."""
        if not self.labels:
            return {}
        return {"loss": self.loss / self.labels, "accuracy": self.correct / self.labels}


class Learner:
    """Trains and predicts with the step graphs of one bundle."""

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self.manifest = manifest
        self.runtime = runtime

    def train(
        self, state: Mapping[str, Array], data: Examples, plan: LocalPlan, emit: Emit
    ) -> LocalResult:
        """:meth:`training` from start to end, where no gradient comes back.

        Args:
            state: as for :meth:`training`.
            data: as for :meth:`training`.
            plan: as for :meth:`training`.
            emit: receives the packed activations of each batch.
        """
        training = self.training(state, data, plan)
        while True:
            step = advance(training)
            if isinstance(step, LocalResult):
                return step
            if isinstance(step, Packed):
                assert step.labels is not None
                emit(step.batch, step.parts, step.labels)

    def training_bases(
        self, states: Mapping[int, Mapping[str, Array]], data: Examples, plan: LocalPlan
    ) -> Training:
        """:meth:`training` of several base networks, one after the other.

        They have nothing in common, so this is what training them batch by batch in turns would
        give, and takes the memory of one. Every one sees the same batches.

        Args:
            states: of each base, by number.
            data: as for :meth:`training`.
            plan: the same; no gradients come back.
        """
        trained: dict[str, Array] = {}
        metrics: list[dict[str, float]] = []
        for base, state in states.items():
            training = self.training(state, data, plan)
            while not isinstance(step := advance(training), LocalResult):
                yield replace(step, base=base) if isinstance(step, Packed) else step
            trained |= {tensor_of(base, n): t for n, t in step.state.items()}
            metrics.append(step.metrics)
        means = {n: float(np.mean([m[n] for m in metrics])) for n in metrics[0]}
        return LocalResult(trained, len(data), means)

    def training(self, state: Mapping[str, Array], data: Examples, plan: LocalPlan) -> Training:
        """The local epochs of one round, a step at a time.

        Every example's activations are yielded exactly once: by the training steps of the first
        epoch (``plan.activations == "train"``, no extra compute), by a pass before training
        (``"forward"``, what FedSplitX's paper does), or not at all (``"none"``). With
        ``"returned"`` they are yielded in every epoch, and the step is made with the gradient
        that comes back; the auxiliary heads rest. Then ``plan.staleness`` more batches are on
        their way while a gradient is waited for: a gradient is that of activations which the
        steps since have made older by as many at most, and steps are made in the batches' order.

        With ``"fused"`` the same, and the heads' gradient is joined with what came back, as in
        SuperSFL (https://arxiv.org/abs/2601.02092): by the weight

            own = share * hub's loss / (heads' mean loss + hub's loss)

        where ``share`` is the hyper-parameter ``own`` of the plan and the heads' loss that of the
        step before. A batch whose gradient does not come is trained on by the heads alone.

        With ``"u_shaped"`` labels stay on the device: for the activations of a batch the features
        come back, the model's head makes a step here, the gradient of the features goes to the
        hub, and then that of the activations comes back.

        Args:
            state: parameters to start from, and optimizer slots, or these start at zero; the
                result has slots if the state has.
            data: examples that fit the manifest, see :meth:`Examples.fitted`.
            plan: epochs, batch size, hyper-parameters.
        """
        runtime, rng = self.runtime, np.random.default_rng(plan.seed)
        runtime.set_state(state)
        hyper = {
            n: np.asarray(v, np.float32) for n, v in plan.hyper.items()
            if n not in ("own", "masked") and not n.startswith("attack_")
        }  # fmt: skip
        seeded = any(port.role == "seed" for port in self.manifest.graphs["train"].inputs)
        size = min(plan.batch_size, self.manifest.limits.get("batch", plan.batch_size))
        present = self._present(data, plan)
        attack = Attack.of(plan.hyper) if plan.hyper.get("robustness") and self._hardens else None
        if plan.activations == "forward":
            for number, batch in enumerate(self._batches(data, size, rng)):
                yield Packed(number, runtime.run("forward", {"x": batch.x}), batch.y)
        returned = plan.activations in ("returned", "fused", "u_shaped")
        scores = _Scores()
        flights: deque[_Flight] = deque()
        sent = 0
        for epoch in range(plan.epochs):
            scores.restart()
            for number, batch in enumerate(self._batches(data, size, rng)):
                seed = {"seed": np.asarray(rng.integers(MAX_SEED))} if seeded else {}
                if returned:
                    inputs = {"x": batch.x, **seed}
                    labels = None if plan.activations == "u_shaped" else batch.y
                    yield Packed(sent, runtime.run("activate", inputs), labels)
                    flights.append(_Flight(sent, inputs, batch))
                    sent += 1
                    yield from self._land(flights, plan, hyper, scores, most=plan.staleness)
                    continue
                given = {"x": batch.x, "y": batch.y, **present}
                if attack is None:
                    outputs = runtime.run("train", {**given, **hyper, **seed})
                else:
                    hard = {"x_adv": attack.on(runtime, given, rng)}
                    outputs = runtime.run("harden", {**given, **hard, **hyper, **seed})
                outputs = scores.add(outputs, batch)
                if epoch > 0 or plan.activations != "train":
                    yield None
                    continue
                noisy = {n: outputs.pop(n) for n in list(outputs) if n.startswith("noise.")}
                there = present.get("present")
                yield Packed(number, outputs, batch.y, present=there)
                if noisy:
                    parts = {n.removeprefix("noise."): part for n, part in noisy.items()}
                    yield Packed(number, parts, batch.y, noise=True, present=there)
        yield from self._land(flights, plan, hyper, scores, most=0)
        slots = any(e.kind == "slot" and e.spec.name in state for e in self.manifest.state)
        result = runtime.get_state(slots)
        return LocalResult(result, len(data), scores.metrics())

    @property
    def _hardens(self) -> bool:
        return "harden" in self.manifest.graphs

    def _present(self, data: Examples, plan: LocalPlan) -> dict[str, Array]:
        """Of which classes there are examples, where the loss leaves out the others.

        All classes count where the plan's hyper-parameter ``masked`` is 0.
        """
        if all(port.spec.name != "present" for port in self.manifest.graphs["train"].inputs):
            return {}
        if plan.hyper.get("masked") == 0:
            return {"present": np.ones(self.manifest.classes, np.float32)}
        classes = np.zeros(self.manifest.classes, np.float32)
        classes[np.unique(data.y)] = 1
        return {"present": classes}

    def _batches(self, data: Examples, size: int, rng: np.random.Generator) -> Iterator[Examples]:
        """Shuffled batches; texts come with others of their length."""
        texts = self.manifest.task == "tokens"
        return text.batches(data, size, rng) if texts else data.batches(size, rng)

    def _land(
        self,
        flights: deque[_Flight],
        plan: LocalPlan,
        hyper: Mapping[str, Array],
        scores: _Scores,
        most: int,
    ) -> Generator[Finished | Wanted | None, Reply, None]:
        """Step with the gradients that are there, and wait until ``most`` batches are left."""
        fused = plan.activations == "fused"
        while flights:
            if plan.activations == "u_shaped":
                yield from self._finish(flights, hyper, scores, most)
            wait = len(flights) > most
            reply = yield Wanted(flights[0].batch, wait)
            if reply is None:
                assert not wait
                return
            flight = flights.popleft()
            inputs = {**flight.inputs, **hyper}
            if isinstance(reply, Alone):
                outputs = self.runtime.run("train", {**inputs, "y": flight.examples.y})
                scores.add(outputs, flight.examples)
            else:
                assert isinstance(reply, Gradient)
                inputs |= {f"grad.{name}": part for name, part in reply.parts.items()}
                if fused:
                    own = self._own(plan, scores, reply.loss)
                    inputs |= {"y": flight.examples.y, "own": np.asarray(own, np.float32)}
                    scores.add(self.runtime.run("fuse", inputs), flight.examples)
                else:
                    self.runtime.run("backward", inputs)
            yield None

    def _finish(
        self, flights: deque[_Flight], hyper: Mapping[str, Array], scores: _Scores, most: int
    ) -> Generator[Finished | Wanted | None, Reply, None]:
        """Step the head with the features that are there; wait for the oldest's if need be."""
        for flight in flights:
            if flight.finished:
                continue
            wait = flight is flights[0] and len(flights) > most
            reply = yield Wanted(flight.batch, wait, features=True)
            if reply is None:
                assert not wait
                return
            assert isinstance(reply, Features)
            seed = {name: value for name, value in flight.inputs.items() if name == "seed"}
            inputs = {f"features.{name}": part for name, part in reply.parts.items()}
            inputs |= {"y": flight.examples.y, **hyper, **seed}
            outputs = scores.add(self.runtime.run("finish", inputs), flight.examples)
            parts = {name.removeprefix("grad."): part for name, part in outputs.items()}
            flight.finished = True
            yield Finished(flight.batch, parts, flight.examples.labels)

    def _own(self, plan: LocalPlan, scores: _Scores, hub_loss: float | None) -> float:
        """Weight of the heads' gradient; equal losses are assumed before the first step."""
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
        """Logits of the device's heads, and the packed activations.

        Logits are (heads, batch, classes), or (heads, batch, positions, vocabulary).

        Args:
            x: inputs as the model takes them.
            precision: ``float32`` for the state that the runtime holds; ``int8`` for the weights
                of the export.

            robustness: weight of the noise norms, from 0 to 1.

        Raises:
            BundleError: the bundle has no graph of this precision.
            DataError: the model has no dual norms to be robust with.
        """
        check_robustness(robustness, self.manifest)
        graph = "predict" if precision == "float32" else f"predict_{precision}"
        if graph not in self.manifest.graphs:
            raise BundleError(
                f"the bundle of tier {self.manifest.tier!r} has no graph {graph!r}; export the "
                f'tier with precision = "{precision}", or predict in float32'
            )
        weight = np.asarray(robustness, np.float32)
        outputs = self.runtime.run(graph, {"x": x, "robustness": weight})
        return outputs.pop("logits"), outputs


def advance(
    training: Training, gradient: Reply = None
) -> Packed | Finished | Wanted | LocalResult | None:
    """The next step of local training: what it yields, or the result at its end."""
    try:
        return training.send(gradient)
    except StopIteration as end:
        result: LocalResult = end.value
        return result
