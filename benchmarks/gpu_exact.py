"""Exactness of the trunk on a torch device: merged steps beside computations of each device alone.

Every case draws a model, cuts, numbers of devices and rows, lengths of texts, weights, and a state
away from the initial one. The references are plain PyTorch: one pass per device, gradients summed,
nothing merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.gpu_models import CODEC, Shape, packed_batch, step_input, unpacked
from edge_sdk.protocol.tensors import Array
from export.packing import get_codec
from export.split import SplitModel
from server_hub.trunk.depth_merge import Entering, depth_merged_loss
from server_hub.trunk.interface import StepInput, TrunkCopy, TrunkPlan
from server_hub.trunk.step import TrunkTrainer

# exact in float32, which the vmapped trunk holds hyper-parameters in
HYPER = {"lr": 2.0**-5, "momentum": 0.875, "weight_decay": 2.0**-11}


@dataclass(frozen=True)
class Case:
    """A drawn case.

    Attributes:
        shape: the model.
        model: it, in float64 on the CPU, with the drawn state.
        steps: the inputs of each step; their packed scales are in float32.
        max_norm: of the gradients.
    """

    shape: Shape
    model: SplitModel
    steps: list[list[StepInput]]
    max_norm: float


def draw(shape: Shape, seed: int, steps: int = 2, bases: int = 0) -> Case:
    """The case of a seed; with ``bases`` every batch is of one of so many base networks."""
    rng = np.random.default_rng([seed, len(shape.name)])
    heads = sorted({*rng.choice(shape.cuts, 2), shape.cuts[0]})
    model = perturbed(shape.model([int(cut) for cut in heads]), seed).double()
    drawn = []
    for _ in range(steps):
        inputs = []
        for number in range(int(rng.integers(2, 6))):
            cut = int(rng.choice(shape.cuts))
            length = int(rng.integers(2, shape.size + 1))
            x, y = shape.inputs(int(rng.integers(1, 5)), rng, length)
            if shape.texts:
                y[:, 0] = -1  # a position that does not count
            batch = packed_batch(model, cut, x, y)
            parts = {n: p.astype(np.float32) if p.dtype == np.float64 else p
                     for n, p in batch.parts.items()}  # fmt: skip
            base = int(rng.integers(bases)) if bases else 0
            batch = replace(batch, parts=parts, base=base)
            weight = float(rng.choice([0.5, 1.0, 2.0]))
            inputs.append(step_input(f"device-{number}", cut, batch, weight))
        drawn.append(inputs)
    return Case(shape, model, drawn, 0.5 if seed % 2 else float("inf"))


def perturbed(model: SplitModel, seed: int) -> SplitModel:
    """A copy whose parameters are away from where they start."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += 0.05 * noise.to(parameter.dtype)
    return model


def in_dtype(step_input: StepInput, dtype: torch.dtype) -> StepInput:
    """An input whose scales are in a dtype, so that activations are unpacked in it."""
    wanted = np.float64 if dtype == torch.float64 else np.float32
    parts = {n: p.astype(wanted) if p.dtype == np.float32 else p
             for n, p in step_input.batch.parts.items()}  # fmt: skip
    return replace(step_input, batch=replace(step_input.batch, parts=parts))


def state_of(model: SplitModel) -> dict[str, Array]:
    """A copy of what is trained."""
    return {n: t.detach().cpu().numpy().copy() for n, t in model.trained().items()}


# --- references -----------------------------------------------------------------------------------


def alone_losses(model: SplitModel, h: Tensor, labels: Tensor, cut: int, auxiliary: bool) -> Tensor:
    """Sum of the cross-entropy over labels and heads above ``cut``, for one device."""
    total = torch.zeros((), dtype=h.dtype, device=h.device)
    for depth in range(cut, model.depth):
        h = model.block[depth](h)
        if auxiliary and str(depth + 1) in model.aux:
            total = total + _sum(model.answer(depth + 1, h), labels)
    return total + _sum(model.head(h), labels)


def _sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-1, reduction="sum")


def counted(step_input: StepInput) -> int:
    """Labels of an input that count."""
    assert step_input.batch.labels is not None
    return int((step_input.batch.labels >= 0).sum())


def reference_steps(
    case: Case,
    device: str,
    inputs: list[list[StepInput]],
    *,
    weighted_mean: bool = False,
    dtype: torch.dtype = torch.float64,
) -> SplitModel:
    """The model after the steps: each device alone, gradients summed, in plain PyTorch.

    A step's loss is the sum of weighted losses by the number of labels; with ``weighted_mean``, as
    base networks have it, by the sum of their weights.
    """
    model = copy.deepcopy(case.model).to(device, dtype).train()
    model.stem.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, **HYPER)
    for step in inputs:
        optimizer.zero_grad()
        total = sum(counted(i) * (i.weight if weighted_mean else 1.0) for i in step)
        for i in step:
            h, labels = unpacked(in_dtype(i, dtype).batch, device)
            loss = alone_losses(model, h, labels, i.cut, auxiliary=True)
            (loss * i.weight / total).backward()
        nn.utils.clip_grad_norm_(trained, case.max_norm)
        optimizer.step()
    return model


def change_error(
    got: Mapping[str, Array], want: Mapping[str, Tensor], start: Mapping[str, Array]
) -> float:
    """Norm of the difference of two changes, by the norm of the change that was wanted."""
    difference = change = 0.0
    for name, tensor in got.items():
        wanted = want[name].detach().cpu().double().numpy()
        difference += float(((tensor.astype(np.float64) - wanted) ** 2).sum())
        change += float(((wanted - start[name].astype(np.float64)) ** 2).sum())
    return (difference / change) ** 0.5


def tensors_of(copies: Iterable[TrunkCopy], base: int = 0) -> dict[str, Array]:
    """All tensors that were trained of a base."""
    return {n: t for c in copies if c.base == base for n, t in c.tensors.items()}


# --- what is checked ------------------------------------------------------------------------------


def merged_error(shape: Shape, seed: int, device: str, dtype: torch.dtype) -> float:
    """Error of the change that two merged steps make, in a dtype."""
    case = draw(shape, seed)
    start = state_of(case.model)
    model = copy.deepcopy(case.model).to(dtype)
    trainer = TrunkTrainer(model, device)
    trainer.begin(state_of(model), TrunkPlan("sgd", HYPER, max_norm=case.max_norm))
    for step in case.steps:
        report = trainer.step([in_dtype(i, dtype) for i in step])
        if report.refused:
            raise AssertionError(f"seed {seed}: the trunk refused {report.refused}")
    got = tensors_of(trainer.finish())
    wanted = dict(reference_steps(case, device, case.steps).named_parameters())
    return change_error(got, wanted, start)


def rounding_error(shape: Shape, seed: int, device: str) -> float:
    """:func:`merged_error` in float32, by the error that plain PyTorch makes in float32.

    Where a change is small beside the weights, float32 cannot hold it any better.
    """
    case = draw(shape, seed)
    start = state_of(case.model)
    wanted = dict(reference_steps(case, device, case.steps).named_parameters())
    plain = reference_steps(case, device, case.steps, dtype=torch.float32)
    trained = {n: p.detach().cpu().numpy() for n, p in plain.named_parameters() if p.requires_grad}
    return merged_error(shape, seed, device, torch.float32) / change_error(trained, wanted, start)


def uncut_error(shape: Shape, seed: int, device: str) -> float:
    """Error of all gradients, the devices' too, beside the uncut model's, in float64.

    Here nothing is packed: activations enter the merged pass with the graph that made them.
    """
    rng = np.random.default_rng(seed)
    merged, uncut = (perturbed(shape.model(), seed).double().to(device) for _ in range(2))
    entering: dict[int, list[Entering]] = {}
    total = torch.zeros((), dtype=torch.float64, device=device)
    for cut in (*shape.cuts, shape.cuts[0]):
        x, y = (torch.from_numpy(a).to(device) for a in shape.inputs(3, rng))
        x = x.double() if x.is_floating_point() else x
        weights = torch.full((len(x),), 0.25 * cut, dtype=torch.float64, device=device)
        entering.setdefault(cut, []).append(Entering(merged.segment(x, cut), y, weights))
        h = uncut.stem(x)
        for depth, block in enumerate(uncut.block, start=1):
            h = block(h)
            if depth > cut and str(depth) in uncut.aux:
                total = total + 0.25 * cut * _sum(uncut.answer(depth, h), y)
        total = total + 0.25 * cut * _sum(uncut.head(h), y)
    depth_merged_loss(merged, entering)[0].backward()  # type: ignore[no-untyped-call]
    total.backward()  # type: ignore[no-untyped-call]
    difference = norm = 0.0
    for (name, one), (_, other) in zip(
        merged.named_parameters(), uncut.named_parameters(), strict=True
    ):
        if (one.grad is None) != (other.grad is None):
            raise AssertionError(f"only one of the two passes gives {name} a gradient")
        if one.grad is not None and other.grad is not None:
            difference += float((one.grad - other.grad).square().sum())
            norm += float(other.grad.square().sum())
    return (difference / norm) ** 0.5


def returned_error(shape: Shape, seed: int, device: str) -> float:
    """Largest error of a returned gradient, in units of what its packing may lose.

    It is 1.0 at most where all is right but for the packing.
    """
    case = draw(shape, seed, steps=1)
    trainer = TrunkTrainer(copy.deepcopy(case.model), device)
    plan = TrunkPlan("sgd", HYPER, max_norm=case.max_norm, returned=True)
    trainer.begin(state_of(case.model), plan)
    inputs = [in_dtype(i, torch.float64) for i in case.steps[0]]
    report = trainer.step(inputs)
    model = copy.deepcopy(case.model).to(device).train()
    worst = 0.0
    for i, parts in zip(inputs, report.gradients, strict=True):
        if parts is None:
            raise AssertionError(f"seed {seed}: no gradient came back for {i.device}")
        h, labels = unpacked(i.batch, device)
        h.requires_grad_()
        loss = alone_losses(model, h, labels, i.cut, auxiliary=False) / counted(i)
        # the trunk weighs a device's loss, and so the gradient that it sends back
        (wanted,) = torch.autograd.grad(loss * i.weight, [h])
        back = {n: torch.from_numpy(np.array(p)).to(device) for n, p in parts.items()}
        codec = get_codec(CODEC)
        error = (codec.unpack(back) - wanted).abs() / codec.error_bound(back)
        worst = max(worst, float(error.max()))
    return worst


def vmapped_error(shape: Shape, seed: int, device: str, dtype: torch.dtype) -> float:
    """Largest error of the changes that two steps of three base networks make."""
    bases = 3
    case = draw(shape, seed, bases=bases)
    networks = [perturbed(case.model, 100 * seed + base) for base in range(bases)]
    states = [state_of(network) for network in networks]
    wanted_dtype = np.float64 if dtype == torch.float64 else np.float32
    stacked = {n: np.stack([s[n] for s in states]).astype(wanted_dtype) for n in states[0]}
    trainer = TrunkTrainer(copy.deepcopy(case.model).to(dtype), device)
    trainer.begin(stacked, TrunkPlan("sgd", HYPER, max_norm=case.max_norm, bases=bases))
    for step in case.steps:
        trainer.step([in_dtype(i, dtype) for i in step])
    copies = trainer.finish()
    worst = 0.0
    for base, network in enumerate(networks):
        mine = [[i for i in step if i.batch.base == base] for step in case.steps]
        alone = replace(case, model=network)
        reference = reference_steps(alone, device, [s for s in mine if s], weighted_mean=True)
        wanted = dict(reference.named_parameters())
        if got := tensors_of(copies, base):
            worst = max(worst, change_error(got, wanted, states[base]))
    return worst
