"""Verifies every lowered graph against eager PyTorch before it is written.

The reference shares only the module with the exported step. It calls the module in float64, uses
autograd and ``torch.optim``, and does not pack activations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from edge_sdk.protocol.tensors import Array, TensorSpec
from export.bases.dual_norms import robustness
from export.cutting.seeded_random import PRIME, SeededDropout
from export.cutting.split_model import ClientSegment, statistics
from export.errors import ExportError, reason
from export.lowering import verify_mix
from export.lowering.graph_files import Run
from export.steps.client_steps import ClientSteps, Step
from export.steps.losses import NO_LABEL
from export.steps.optimizers import get_optimizer
from export.tensor_names import WAITING, is_waiting, layer_of

BATCHES = (1, 3, 8)
SEEDS = (0, 1)
DRAWS = 16
LENGTHS = {1: 2, 3: 5, 8: 3}
"""Lengths of texts by batch size for the first seed; other seeds use the example's length."""

_WAITING = 0.01
"""Gradient that waits in the slots of tied tensors before the first step."""

_OWN = 0.3
"""Weight of the heads' gradient in ``fuse``."""

_RELATIVE, _ROUNDING, _GLOBAL = 1e-3, 1e-6, 1e-5
_VERIFY_HYPER = {
    "sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
    # eps is large: with a small one, AdamW's first step is the sign of rounding errors
    "adamw": {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-2, "weight_decay": 0.01},
}


def verify(steps: ClientSteps, step: Step, run: Run, example: Tensor) -> None:
    """Compare a lowered graph with eager PyTorch for several batch sizes and seeds.

    Rounding may move an activation across the kink of a ReLU, which changes gradients. This
    happens in about one of several hundred draws of a small model, and in most draws of a model
    with a million activations. A wrong translation differs in every draw. So a draw that differs is
    repeated with other data, and a graph is refused only if all :data:`DRAWS` draws differ.

    Args:
        steps: steps of the segment.
        step: the graph's step.
        run: runs the lowered graph.
        example: inputs (batch, ...), whose distribution the draws imitate.

    Raises:
        ExportError: the graph fails or differs; the message names the first tensor that differs,
            and its layer.
    """
    for batch in BATCHES:
        if batch > step.limits.get("batch", batch):
            continue
        for seed in SEEDS:
            like = example
            if steps.x.shape[1:] == ("seq",) and seed == 0:
                like = example[:, : LENGTHS[batch]]
            try:
                for draw in range(DRAWS):
                    wrong = _compare(steps, step, run, like, batch, seed + 1000 * draw)
                    if wrong is None:
                        break
            except Exception as error:  # onnxruntime raises bare pybind exceptions
                raise ExportError(
                    f"the graph {step.name!r} fails for a batch of {batch} ({reason(error)}); "
                    "nothing was written"
                ) from error
            if wrong is not None:
                name, difference = wrong
                parameter = name.split("/")[-1]
                layer = f" of layer {layer_of(parameter)}" if parameter in steps.parameters else ""
                raise ExportError(
                    f"the graph {step.name!r} differs from eager PyTorch in {name}{layer} by "
                    f"{difference:.2g} (batch {batch}, seed {seed}); nothing was written"
                )


def _compare(
    steps: ClientSteps, step: Step, run: Run, example: Tensor, batch: int, seed: int
) -> tuple[str, float] | None:
    """Name and error of the first tensor that differs in one draw; None if none does."""
    generator = torch.Generator().manual_seed(seed)
    x = draw_like(example, batch, generator)
    if step.name in _TRAINING:
        return _compare_training(steps, step, run, x, seed)
    if step.name.startswith("mix_"):
        return verify_mix.compare_mix(steps, step, run, x, generator, _packed)
    if step.name == "attack":
        return verify_mix.compare_attack(steps, step, run, x, generator)
    feeds = {name: _numpy(t) for name, t in steps.initial.items()} | {"x": _numpy(x)}
    reference = copy.deepcopy(steps.segment).double().eval()
    logits = torch.empty(0)
    with torch.no_grad():
        if step.name == "activate":
            key = torch.randint(PRIME, (), generator=generator)
            feeds |= _seeds(steps, key)
            h = _activations(reference.train(), x, key)
        elif step.name == "predict" and steps.dual:
            feeds["robustness"] = np.asarray(verify_mix.ROBUSTNESS, np.float32)
            with robustness(verify_mix.ROBUSTNESS):
                h, logits = reference(_wide(x))
        else:
            h, logits = reference(_wide(x))
    got = run(step, feeds)
    wanted = {"logits": logits} if "logits" in got else {}
    return _first(_differences(got, _Eager({}, h, wanted, {}))) or _packed(
        steps, got, h, steps.packed
    )


def _compare_training(
    steps: ClientSteps, step: Step, run: Run, x: Tensor, seed: int
) -> tuple[str, float] | None:
    """Compare two training steps; the second starts from optimizer slots that are not zero."""
    hyper = _VERIFY_HYPER[steps.optimizer.name]
    scalars = {key: np.asarray(value, np.float32) for key, value in hyper.items()}
    state = {n: _numpy(t) for n, t in (steps.initial | steps.slots).items()}
    if step.name == "fuse":
        scalars["own"] = np.asarray(_OWN, np.float32)
    state |= {n: _numpy(t) for n, t in _resting(steps, step.name).items()}
    if _trains(step.name, f"{WAITING}/"):
        state |= {n: np.full_like(state[n], _WAITING) for n in steps.waiting.values()}
    for eager in _TRAINING[step.name](steps, x, seed):
        feeds = eager.feeds if step.name == "finish" else {"x": _numpy(x), **eager.feeds}
        got = run(step, {**state, **scalars, **feeds})
        wrong = _first(_differences(got, eager))
        if wrong is None and eager.h_adv is not None:
            wrong = _packed(steps, got, eager.h_adv, steps.packed, "noise.")
        if wrong is None and eager.h is not None:
            deep = step.name == "finish"
            specs, prefix = (steps.features, "grad.") if deep else (steps.packed, "")
            wrong = _packed(steps, got, eager.h, specs, prefix)
        if wrong is not None:
            return wrong
        # Start the second step from the reference's state. A gradient that is zero up to rounding
        # would otherwise carry an error of the first step over.
        state = {n: _numpy(eager.wanted[f"next/{n}"].float()) for n in state}
    return None


@dataclass(frozen=True)
class _Eager:
    """One step in eager PyTorch.

    Attributes:
        feeds: inputs other than state and hyper-parameters.
        h: tensor that the graph packs: activations, or the gradient of features; None if the
            graph packs nothing.
        wanted: expected outputs by name.
        old: values before the step, by name of the output.
        h_adv: activations of the adversarial examples, if the step has any.
    """

    feeds: dict[str, Array]
    h: Tensor | None
    wanted: dict[str, Tensor]
    old: dict[str, Tensor]
    h_adv: Tensor | None = None

    def changes(self) -> dict[str, float]:
        """Largest change of each output; largest value of an output without an old value."""
        return {
            n: (w - self.old[n] if n in self.old else w).abs().max().item()
            for n, w in self.wanted.items()
        }


def _train_eagerly(steps: ClientSteps, x: Tensor, seed: int) -> list[_Eager]:
    """Two steps of ``train`` in float64, with autograd and torch.optim."""
    return _train(steps, x, seed, "train")


def _harden_eagerly(steps: ClientSteps, x: Tensor, seed: int) -> list[_Eager]:
    """Two steps of ``harden``: examples through the clean norms, perturbed ones through noise."""
    return _train(steps, x, seed, "harden")


def _train(steps: ClientSteps, x: Tensor, seed: int, graph: str) -> list[_Eager]:
    generator = torch.Generator().manual_seed(seed)
    name = steps.optimizer.name
    reference = copy.deepcopy(steps.segment).double().train()
    parameters, resting = _split(steps, reference, graph)
    moved = statistics(reference)
    optimizer = steps.optimizer.reference(list(parameters.values()), _VERIFY_HYPER[name])
    done = []
    for _ in range(2):
        y = _labels(steps, x, generator)
        present = verify_mix.draw_present(steps, generator)
        if present is not None:
            y = verify_mix.labels_among(present, len(x), generator)
        key = torch.randint(PRIME, (), generator=generator)
        everything = parameters | moved | resting
        old = {f"next/{n}": t.detach().clone() for n, t in everything.items()}
        x_adv = x + 0.1 * torch.randn(x.shape, generator=generator) if graph == "harden" else None
        h_adv = None
        with SeededDropout(key):
            h, logits = reference(_wide(x))
            if x_adv is not None:
                with robustness(1):
                    h_adv, logits_adv = reference(x_adv.double())
        if present is None:
            loss = _loss(logits, y, steps.distill)
        else:
            loss = verify_mix.loss_of(logits, y, present)
            logits = logits.masked_fill(present == 0, -torch.inf)
        if x_adv is not None:
            hard = verify_mix.loss_of(logits_adv, y, present)
            loss = (1 - verify_mix.ROBUSTNESS) * loss + verify_mix.ROBUSTNESS * hard
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        answers = logits.detach().softmax(-1).mean(0).argmax(-1)
        wanted = {"loss": loss.detach(), "correct": (answers == y).double().sum()}
        wanted |= {f"next/{n}": t.detach().clone() for n, t in everything.items()}
        slots = _slots(name, parameters, optimizer)
        wanted |= {f"next/{n}": s.detach().clone() for n, s in slots}
        feeds = {"y": _numpy(y)} | _seeds(steps, key)
        if present is not None:
            feeds["present"] = _numpy(present)
        if x_adv is not None:
            feeds["x_adv"] = _numpy(x_adv)
            feeds["robustness"] = np.asarray(verify_mix.ROBUSTNESS, np.float32)
        done.append(_Eager(feeds, h.detach(), wanted, old, h_adv))
    return done


def _fuse_eagerly(steps: ClientSteps, x: Tensor, seed: int) -> list[_Eager]:
    """Two steps of ``fuse`` in float64; the two gradients of the blocks are computed separately."""
    generator = torch.Generator().manual_seed(seed)
    name = steps.optimizer.name
    reference = copy.deepcopy(steps.segment).double().train()
    heads = {id(p) for p in reference.aux.parameters()}
    parameters, resting = _split(steps, reference, "fuse")
    moved = statistics(reference)
    optimizer = steps.optimizer.reference(list(parameters.values()), _VERIFY_HYPER[name])
    done = []
    for _ in range(2):
        y = _labels(steps, x, generator)
        key = torch.randint(PRIME, (), generator=generator)
        everything = parameters | moved | resting
        old = {f"next/{n}": t.detach().clone() for n, t in everything.items()}
        with SeededDropout(key):
            h, logits = reference(_wide(x))
        loss = _loss(logits, y, steps.distill)
        parts = steps.codec.pack(torch.randn(h.shape, generator=generator), steps.axis)
        optimizer.zero_grad()
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        for p in parameters.values():
            if p.grad is not None and id(p) not in heads:
                p.grad *= _OWN
        h.backward((1 - _OWN) * steps.codec.unpack(parts).double())
        optimizer.step()
        answers = logits.detach().softmax(-1).mean(0).argmax(-1)
        wanted = {"loss": loss.detach(), "correct": (answers == y).double().sum()}
        wanted |= {f"next/{n}": t.detach().clone() for n, t in everything.items()}
        slots = _slots(name, parameters, optimizer)
        wanted |= {f"next/{n}": s.detach().clone() for n, s in slots}
        feeds = {f"grad.{n}": _numpy(part) for n, part in parts.items()}
        feeds |= {"y": _numpy(y)} | _seeds(steps, key)
        done.append(_Eager(feeds, None, wanted, old))
    return done


def _finish_eagerly(steps: ClientSteps, x: Tensor, seed: int) -> list[_Eager]:
    """Two steps of ``finish`` in float64, on random features; only the model's head changes."""
    generator = torch.Generator().manual_seed(seed)
    name = steps.optimizer.name
    reference = copy.deepcopy(steps.segment).double().train()
    parameters, resting = _split(steps, reference, "finish")
    moved, rule = statistics(reference), steps.optimizer
    optimizer = (
        rule.reference(list(parameters.values()), _VERIFY_HYPER[name]) if parameters else None
    )
    assert steps.segment.features is not None
    with torch.no_grad():
        like = steps.segment.features(x)
    tied = {slot: reference.get_parameter(n) for n, slot in steps.waiting.items()}
    waiting = {slot: torch.full_like(p, _WAITING) for slot, p in tied.items()}
    done = []
    for _ in range(2):
        y = _labels(steps, x, generator)
        key = torch.randint(PRIME, (), generator=generator)
        old = {f"next/{n}": t.detach().clone() for n, t in (parameters | moved | resting).items()}
        parts = steps.codec.pack(torch.randn(like.shape, generator=generator), steps.features_axis)
        h = steps.codec.unpack(parts).double().requires_grad_()
        with SeededDropout(key):
            logits = reference.head(h).unsqueeze(0)
        loss = _loss(logits, y, 0.0)
        reference.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        waiting = {slot: waiting[slot] + p.grad for slot, p in tied.items() if p.grad is not None}
        if optimizer is not None:
            optimizer.step()
        answers = logits[0].detach().argmax(-1)
        wanted = {"loss": loss.detach(), "correct": (answers == y).double().sum()}
        values = parameters | moved | resting | waiting
        if optimizer is not None:
            values |= dict(_slots(name, parameters, optimizer))
        wanted |= {f"next/{n}": t.detach().clone() for n, t in values.items()}
        feeds = {f"features.{n}": _numpy(part) for n, part in parts.items()}
        feeds |= {"y": _numpy(y)} | _seeds(steps, key)
        assert h.grad is not None
        done.append(_Eager(feeds, h.grad, wanted, old))
    return done


def _loss(logits: Tensor, y: Tensor, distill: float) -> Tensor:
    """Cross-entropy and distillation of the heads, summed term by term."""
    classes, y = logits.shape[-1], y.reshape(-1)
    heads = [z.reshape(-1, classes) for z in logits]
    losses = [cross_entropy(z, y, ignore_index=NO_LABEL) for z in heads]
    for own in heads if distill > 0 else ():
        for other in heads:
            if other is not own:
                target = log_softmax(other[y != NO_LABEL], 1).detach()
                answer = log_softmax(own[y != NO_LABEL], 1)
                apart = kl_div(answer, target, reduction="batchmean", log_target=True)
                losses.append(distill / (len(heads) - 1) * apart)
    return torch.stack(losses).sum()


def _return_eagerly(steps: ClientSteps, x: Tensor, seed: int) -> list[_Eager]:
    """Two steps of ``backward`` in float64, with random gradients; the heads do not change."""
    generator = torch.Generator().manual_seed(seed)
    name = steps.optimizer.name
    reference = copy.deepcopy(steps.segment).double().train()
    trained, resting = _split(steps, reference, "backward")
    moved = statistics(reference)
    optimizer = steps.optimizer.reference(list(trained.values()), _VERIFY_HYPER[name])
    waiting = dict.fromkeys(steps.waiting.values(), _WAITING)
    done = []
    for _ in range(2):
        key = torch.randint(PRIME, (), generator=generator)
        old = {f"next/{n}": t.detach().clone() for n, t in (trained | moved | resting).items()}
        h = _activations(reference, x, key)
        parts = steps.codec.pack(torch.randn(h.shape, generator=generator), steps.axis)
        optimizer.zero_grad()
        h.backward(steps.codec.unpack(parts).double())  # type: ignore[no-untyped-call]
        for tied, slot in steps.waiting.items():
            trained[tied].grad += waiting.pop(slot, 0.0)  # type: ignore[operator]
        optimizer.step()
        values = trained | moved | resting | dict(_slots(name, trained, optimizer))
        values |= {s: torch.zeros_like(trained[n]) for n, s in steps.waiting.items()}
        wanted = {f"next/{n}": t.detach().clone() for n, t in values.items()}
        feeds = {f"grad.{n}": _numpy(part) for n, part in parts.items()} | _seeds(steps, key)
        done.append(_Eager(feeds, None, wanted, old))
    return done


def _trains(graph: str, name: str) -> bool:
    """Whether a graph trains a parameter, or changes a slot."""
    if is_waiting(name):
        return graph in ("finish", "backward")
    layer = layer_of(name)
    if graph == "finish":
        return layer == "head"
    return layer != "head" and (graph != "backward" or not layer.startswith("aux."))


def _resting(steps: ClientSteps, graph: str) -> dict[str, Tensor]:
    """Slots that a graph must not change, with values other than zero."""
    idle = verify_mix.idle(steps, graph)
    return {
        n: torch.full_like(t, 0.5) for n, t in steps.slots.items()
        if not _trains(graph, n) or n.partition("/")[2] in idle
    }  # fmt: skip


def _split(
    steps: ClientSteps, reference: ClientSegment, graph: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters that a graph trains; and parameters and slots that it must not change."""
    parameters = {n: p for n, p in reference.named_parameters() if p.requires_grad}
    idle = verify_mix.idle(steps, graph)
    trained: dict[str, Tensor] = {
        n: p for n, p in parameters.items() if _trains(graph, n) and n not in idle
    }
    rest: dict[str, Tensor] = {n: p for n, p in parameters.items() if n not in trained}
    return trained, rest | _resting(steps, graph)


def _activations(segment: ClientSegment, x: Tensor, seed: Tensor) -> Tensor:
    """Activations at the cut, with dropout masks drawn from ``seed``."""
    with SeededDropout(seed):
        h: Tensor = segment.stem(_wide(x))
        for block in segment.block:
            h = block(h)
    return h


def _seeds(steps: ClientSteps, key: Tensor) -> dict[str, Array]:
    return {"seed": _numpy(key)} if steps.seeded else {}


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


_TRAINING = {
    "train": _train_eagerly,
    "harden": _harden_eagerly,
    "backward": _return_eagerly,
    "fuse": _fuse_eagerly,
    "finish": _finish_eagerly,
}
"""Reference of each graph that changes the state."""


def _labels(steps: ClientSteps, x: Tensor, generator: torch.Generator) -> Tensor:
    """Random labels; in a text some labels are :data:`NO_LABEL`, but never all."""
    shape = x.shape if steps.segment.task == "tokens" else x.shape[:1]
    y = torch.randint(steps.classes, shape, generator=generator)
    if y.dim() == 2:
        y[:, 1:][torch.rand(y[:, 1:].shape, generator=generator) < 0.3] = NO_LABEL
    return y


def _slots(
    optimizer_name: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, Tensor]]:
    """The slots of a torch optimizer, with their names in the step graph."""
    for name, p in parameters.items():
        for slot, theirs in get_optimizer(optimizer_name).torch_names.items():
            whose = layer_of(name) if slot == "steps" else name
            yield f"{slot}/{whose}", optimizer.state[p][theirs]


def _differences(got: dict[str, Array], eager: _Eager) -> Iterator[tuple[str, float]]:
    """Yield name and error of each tensor that differs by more than rounding explains.

    The bound applies to the change of a parameter, not to its value. It is a fraction of the
    largest change in the tensor, plus float32 rounding of the values, plus a small fraction of the
    largest change in any tensor, since a gradient that is zero up to rounding has no scale of its
    own. Optimizer slots are not scaled by the learning rate, so for a slot the last term uses the
    largest change among slots of its kind. The rounding of a running mean is proportional to the
    deviation of the activations, even if their mean is near zero.
    """
    change = eager.changes()
    largest = max((c for n, c in change.items() if n in eager.old), default=0.0)
    scales: dict[str, float] = {}
    for name in change.keys() - eager.old.keys():
        kind = "/".join(name.split("/")[:2])  # next/momentum, of next/momentum/stem.weight
        scales[kind] = max(change[name], scales.get(kind, largest))
    for name, want in eager.wanted.items():
        error = np.abs(got[name].astype(np.float64) - want.double().numpy()).max(initial=0.0)
        size = want.abs().max().item()
        scale = largest if name in eager.old else scales["/".join(name.split("/")[:2])]
        bound = _RELATIVE * change[name] + _ROUNDING * (size + 1e-3) + _GLOBAL * scale
        if name.endswith("running_mean"):
            variance = eager.wanted[name.removesuffix("mean") + "var"]
            bound += _GLOBAL * variance.max().sqrt().item()
        if not error <= bound:
            yield name, float(error)


def _packed(
    steps: ClientSteps,
    got: dict[str, Array],
    h: Tensor,
    specs: Sequence[TensorSpec],
    prefix: str = "",
) -> tuple[str, float] | None:
    """Compare unpacked outputs with ``h``, within the error bound of the codec.

    Returns:
        Name and excess over the bound; None if the outputs are within it.
    """
    parts = {spec.name: torch.from_numpy(got[f"{prefix}{spec.name}"]) for spec in specs}
    slack = 1e-4 * h.abs().max().item() + 1e-6  # norms over few values amplify rounding
    bound = steps.codec.error_bound(parts).double() * (1 + 1e-3) + slack
    excess = ((steps.codec.unpack(parts).double() - h).abs() - bound).max().item()
    return None if excess <= 0 else ("packed activations", excess)


def _first(differences: Iterator[tuple[str, float]]) -> tuple[str, float] | None:
    return next(differences, None)


def draw_like(example: Tensor, batch: int, generator: torch.Generator) -> Tensor:
    """Random inputs with the mean and deviation of ``example``, or with its range of integers.

    Args:
        example: inputs (rows, ...).
        batch: number of rows to draw.
        generator: source of the draws.

    Returns:
        Inputs (batch, ...) of the dtype of ``example``.
    """
    shape = (batch, *example.shape[1:])
    if example.is_floating_point():
        deviation = example.std().clamp(min=1e-3) if example.numel() > 1 else torch.tensor(1.0)
        return example.mean() + deviation * torch.randn(shape, generator=generator)
    low, high = int(example.min()), int(example.max())
    return torch.randint(low, high + 1, shape, generator=generator, dtype=example.dtype)


def _numpy(tensor: Tensor) -> Array:
    return tensor.detach().contiguous().numpy()
