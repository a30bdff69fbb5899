"""The oracle of the operator matrix: eager PyTorch in float64, apart from the exporter's check.

It shares no code with :mod:`export.lowering.verification` or the references of steps. It copies
the segment in float64 at a random state, runs two steps of autograd and ``torch.optim.SGD``, and
compares what a device would see: loss, correct answers, logits, the change of every tensor, and the
unpacked activations. Its bounds are for float32, relative to the change of each channel.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.protocol.tensors import Array
from export.cutting.seeded_random import SeededDropout
from export.steps.client_steps import ClientSteps
from export.steps.step import Step
from tests.lib.decay import groups_of
from tests.lib.graph_runs import Run

HYPER = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
BATCHES = (1, 3, 8)

_REPEATS = 2
"""Further draws for a step: rounding may carry an activation over a kink."""

_CHANGE, _VALUE, _FLOOR = 2e-3, 2e-6, 2e-5
"""Bounds: parts of a channel's largest change and value, and of the graph's largest change."""


class Wrong(AssertionError):
    """A graph differs from eager PyTorch."""


def check_step(steps: ClientSteps, step: Step, run: Run, example: Tensor) -> None:
    """Compare a lowered ``train`` or ``predict`` with eager PyTorch; raises :class:`Wrong`."""
    compare = _train if step.name == "train" else _predict
    for rows in BATCHES:
        if rows > step.limits.get("batch", rows):
            continue
        wrong = [compare(steps, step, run, example, rows, rows)]
        while wrong[-1] and len(wrong) <= _REPEATS:
            wrong.append(compare(steps, step, run, example, rows, rows + 100 * len(wrong)))
        if wrong[-1]:
            raise Wrong(f"{step.name}, {rows} rows: {wrong[-1]}")


def _train(steps: ClientSteps, step: Step, run: Run, example: Tensor, rows: int, seed: int) -> str:
    """Two steps; returns what differs, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    model = _shaken(steps, generator).train()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    norms = {n: b for n, b in model.named_buffers() if "running_" in n}
    optimizer = torch.optim.SGD(groups_of(model, trained.values()), **HYPER)
    momenta = {n: torch.zeros_like(p) for n, p in trained.items()}
    for _ in range(2):
        x, y = _draw(steps, example, rows, generator)
        key = torch.randint(1000, (), generator=generator)
        before = {n: t.detach().clone() for n, t in (trained | norms).items()}
        feeds = {n: t.float() for n, t in before.items()}
        feeds |= {f"momentum/{n}": t.float() for n, t in momenta.items()}
        feeds |= {"x": x, "y": y, "seed": key}
        feeds |= {n: torch.tensor(v) for n, v in HYPER.items()}
        feeds["max_norm"] = torch.tensor(0.0)  # no bound
        got = _run(step, run, feeds)
        optimizer.zero_grad()
        try:
            with SeededDropout(key):
                h, logits = model(x.double() if x.is_floating_point() else x)
        except ValueError:
            if rows > 1:
                raise
            return ""  # a batch norm of one value has no variance
        rows_y = y.reshape(-1)
        flat = logits.reshape(len(logits), -1, logits.shape[-1])
        loss = sum(nn.functional.cross_entropy(z, rows_y, ignore_index=-1) for z in flat)
        assert isinstance(loss, Tensor)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        momenta = {n: optimizer.state[p]["momentum_buffer"] for n, p in trained.items()}
        answers = logits.detach().softmax(-1).mean(0).argmax(-1)
        if abs(float(got["loss"]) - float(loss.detach())) > 1e-4 * (1 + float(loss.detach())):
            return "loss"
        if float(got["correct"]) != float((answers == y).sum()):
            return "correct"
        after = {n: t.detach() for n, t in (trained | norms).items()}
        changes = {n: (after[n] - before[n]).abs().max().item() for n in after}
        most = max(changes.values())
        for name, want in after.items():
            if not _alike(got[f"next/{name}"], want, want - before[name], most):
                return f"{name}, which changes by {changes[name]:.2g}"
        steepest = max(t.abs().max().item() for t in momenta.values())
        for name, want in momenta.items():
            if not _alike(got[f"next/momentum/{name}"], want, want, steepest):
                return f"the momentum of {name}"
        if not _packed_alike(steps, got, h.detach()):
            return "activations"
    return ""


def _predict(
    steps: ClientSteps, step: Step, run: Run, example: Tensor, rows: int, seed: int
) -> str:
    """Logits and activations in evaluation mode; returns what differs, or nothing."""
    generator = torch.Generator().manual_seed(seed)
    model = _shaken(steps, generator).eval()
    x, _ = _draw(steps, example, rows, generator)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    feeds = {n: state[n].detach().float() for n in steps.initial}
    got = _run(step, run, {**feeds, "x": x})
    with torch.no_grad():
        h, logits = model(x.double() if x.is_floating_point() else x)
    error = np.abs(got["logits"] - logits.numpy()).max()
    if not error <= 1e-4 * (1e-2 + logits.abs().max().item()):
        return "logits"
    return "" if _packed_alike(steps, got, h) else "activations"


def _shaken(steps: ClientSteps, generator: torch.Generator) -> nn.Module:
    """A float64 copy of the segment in which no weight of a norm is 1 and no bias is 0."""
    model = copy.deepcopy(steps.segment).double()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in steps.initial:
                noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
                tensor.mul_(1 + 0.2 * noise)
                if not name.endswith("running_var"):
                    tensor.add_(0.05 * (noise - 0.3))
                tensor.copy_(tensor.float())  # what a device holds
    return model


def _draw(
    steps: ClientSteps, example: Tensor, rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs like the example, and labels; some labels of texts do not count."""
    shape = (rows, *example.shape[1:])
    if example.is_floating_point():
        x = example.mean() + example.std() * torch.randn(shape, generator=generator)
    else:
        x = torch.randint(int(example.max()) + 1, shape, generator=generator)
    if steps.segment.task == "classes":
        return x, torch.randint(steps.classes, (rows,), generator=generator)
    y = torch.randint(steps.classes, x.shape, generator=generator)
    y[:, -1] = -1
    return x, y


def _run(step: Step, run: Run, feeds: dict[str, Tensor]) -> dict[str, Array]:
    names = [port.spec.name for port in step.inputs]
    return run(step, {n: feeds[n].detach().contiguous().numpy() for n in names})


def _alike(got: Array, want: Tensor, change: Tensor, most: float) -> bool:
    """Whether each channel differs by little of its change, of its values, and of all changes."""
    others = list(range(1, want.dim()))
    difference = (torch.from_numpy(got).double() - want).abs()
    largest = change.abs().amax(others, keepdim=True) if others else change.abs()
    size = want.abs().amax(others, keepdim=True) if others else want.abs()
    bound = _CHANGE * largest + _VALUE * (size + 1e-3) + _FLOOR * most
    return bool((difference <= bound).all())


def _packed_alike(steps: ClientSteps, got: dict[str, Array], h: Tensor) -> bool:
    """Whether unpacked activations are within the bound of the codec."""
    parts = {spec.name: torch.from_numpy(got[spec.name]) for spec in steps.packed}
    bound = steps.codec.error_bound(parts).double() * 1.001 + 1e-4 * h.abs().max().item() + 1e-6
    return bool(((steps.codec.unpack(parts).double() - h).abs() <= bound).all())
