"""Exactness of the trunk on a torch device: merged steps compared with steps of each device alone.

Every case draws a model, cuts, numbers of devices and rows, lengths of texts, weights, and a state
that differs from the initial one. The references are plain PyTorch: one pass per device, then the
sum of the gradients, without merging.
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
from export.cutting.split_model import SplitModel
from export.cutting.tied import tied_tensors
from export.packing.codecs import get_codec
from server_hub.trunk.depth_merge import Entering, depth_merged_loss
from server_hub.trunk.interface import StepInput, TrunkCopy, TrunkPlan
from server_hub.trunk.step import TrunkTrainer

# Exact in float32, because the vmapped trunk keeps hyper-parameters in float32.
HYPER = {"lr": 2.0**-5, "momentum": 0.875, "weight_decay": 2.0**-11}


@dataclass(frozen=True)
class Case:
    """A drawn case.

    Attributes:
        shape: the shape of the model.
        model: the model in float64 on the CPU, with the drawn state.
        steps: the inputs of each step; their packed scales are in float32.
        max_norm: maximum norm of the gradients.
    """

    shape: Shape
    model: SplitModel
    steps: list[list[StepInput]]
    max_norm: float


def draw(shape: Shape, seed: int, steps: int = 2, bases: int = 0) -> Case:
    """Draw the case of a seed; each batch is of one of ``bases`` base networks, or of none if 0."""
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
    """Return a copy of a model whose parameters differ from the initial ones."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += 0.05 * noise.to(parameter.dtype)
    return model


def in_dtype(step_input: StepInput, dtype: torch.dtype) -> StepInput:
    """Return an input with scales of ``dtype``, so that activations are unpacked in ``dtype``."""
    wanted = np.float64 if dtype == torch.float64 else np.float32
    parts = {n: p.astype(wanted) if p.dtype == np.float32 else p
             for n, p in step_input.batch.parts.items()}  # fmt: skip
    return replace(step_input, batch=replace(step_input.batch, parts=parts))


def state_of(model: SplitModel) -> dict[str, Array]:
    """Return a copy of the trained tensors."""
    return {n: t.detach().cpu().numpy().copy() for n, t in model.trained().items()}


# --- references -----------------------------------------------------------------------------------


def alone_losses(model: SplitModel, h: Tensor, labels: Tensor, cut: int, auxiliary: bool) -> Tensor:
    """Return the cross-entropy of one device, summed over labels and heads above ``cut``."""
    total = torch.zeros((), dtype=h.dtype, device=h.device)
    for depth in range(cut, model.depth):
        h = model.block[depth](h)
        if auxiliary and str(depth + 1) in model.aux:
            total = total + _sum(model.answer(depth + 1, h), labels)
    return total + _sum(model.head(h), labels)


def _sum(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-1, reduction="sum")


def counted(step_input: StepInput) -> int:
    """Return the number of labels of an input that count."""
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
    """Return the model after the steps in plain PyTorch: each device alone, gradients summed.

    The loss of a step is the sum of weighted losses divided by the number of labels; with
    ``weighted_mean``, as for base networks, it is divided by the sum of the labels' weights.
    """
    model = copy.deepcopy(case.model).to(device, dtype).train()
    tied = [model.get_parameter(name) for name in tied_tensors(model)]
    model.stem.requires_grad_(False)
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, **HYPER)
    if tied:  # weights of tables that heads read decay on the devices
        optimizer.add_param_group({"params": [p.requires_grad_() for p in tied], "weight_decay": 0})
    trained = [*own, *tied]
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
    """Return the norm of the difference of two changes, relative to the norm of the wanted one."""
    difference = change = 0.0
    for name, tensor in got.items():
        wanted = want[name].detach().cpu().double().numpy()
        difference += float(((tensor.astype(np.float64) - wanted) ** 2).sum())
        change += float(((wanted - start[name].astype(np.float64)) ** 2).sum())
    return (difference / change) ** 0.5


def tensors_of(copies: Iterable[TrunkCopy], base: int = 0) -> dict[str, Array]:
    """Return all trained tensors of a base network."""
    return {n: t for c in copies if c.base == base for n, t in c.tensors.items()}


# --- what is checked ------------------------------------------------------------------------------


def merged_error(shape: Shape, seed: int, device: str, dtype: torch.dtype) -> float:
    """Return the relative error of the change by two merged steps in ``dtype``."""
    case = draw(shape, seed)
    start = state_of(case.model)
    model = copy.deepcopy(case.model).to(dtype)
    trainer = TrunkTrainer(model, device)
    trainer.begin(state_of(model), TrunkPlan("sgd", HYPER, max_norm=case.max_norm, decay="all"))
    for step in case.steps:
        report = trainer.step([in_dtype(i, dtype) for i in step])
        if report.refused:
            raise AssertionError(f"seed {seed}: the trunk refused {report.refused}")
    got = tensors_of(trainer.finish())
    wanted = dict(reference_steps(case, device, case.steps).named_parameters())
    return change_error(got, wanted, start)


def rounding_error(shape: Shape, seed: int, device: str) -> float:
    """Return :func:`merged_error` in float32, divided by the error of plain PyTorch in float32.

    Both errors are large if a change is small relative to the weights, because of float32.
    """
    case = draw(shape, seed)
    start = state_of(case.model)
    wanted = dict(reference_steps(case, device, case.steps).named_parameters())
    plain = reference_steps(case, device, case.steps, dtype=torch.float32)
    trained = {n: p.detach().cpu().numpy() for n, p in plain.named_parameters() if p.requires_grad}
    return merged_error(shape, seed, device, torch.float32) / change_error(trained, wanted, start)


def uncut_error(shape: Shape, seed: int, device: str) -> float:
    """Return the error of all gradients, also those of devices, against the uncut model in float64.

    Activations are not packed here; they enter the merged pass with their autograd graph.
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
    """Return the largest error of a returned gradient, in units of the largest loss by packing.

    It is at most 1.0 if the packing is the only error.
    """
    case = draw(shape, seed, steps=1)
    trainer = TrunkTrainer(copy.deepcopy(case.model), device)
    plan = TrunkPlan("sgd", HYPER, max_norm=case.max_norm, decay="all", returned=True)
    trainer.begin(state_of(case.model), plan)
    inputs = [in_dtype(i, torch.float64) for i in case.steps[0]]
    report = trainer.step(inputs)
    model = copy.deepcopy(case.model).to(device).train()
    worst = 0.0
    for i, parts in zip(inputs, report.gradients, strict=True):
        if parts is None:
            raise AssertionError(f"seed {seed}: no gradient was returned for {i.device}")
        h, labels = unpacked(i.batch, device)
        h.requires_grad_()
        loss = alone_losses(model, h, labels, i.cut, auxiliary=False) / counted(i)
        (wanted,) = torch.autograd.grad(loss, [h])  # of the device's own loss, without its weight
        back = {n: torch.from_numpy(np.array(p)).to(device) for n, p in parts.items()}
        codec = get_codec(CODEC)
        error = (codec.unpack(back) - wanted).abs() / codec.error_bound(back)
        worst = max(worst, float(error.max()))
    return worst


def vmapped_error(shape: Shape, seed: int, device: str, dtype: torch.dtype) -> float:
    """Return the largest error of the changes by two steps of three base networks."""
    bases = 3
    case = draw(shape, seed, bases=bases)
    networks = [perturbed(case.model, 100 * seed + base) for base in range(bases)]
    states = [state_of(network) for network in networks]
    wanted_dtype = np.float64 if dtype == torch.float64 else np.float32
    stacked = {n: np.stack([s[n] for s in states]).astype(wanted_dtype) for n in states[0]}
    trainer = TrunkTrainer(copy.deepcopy(case.model).to(dtype), device)
    trainer.begin(
        stacked, TrunkPlan("sgd", HYPER, max_norm=case.max_norm, decay="all", bases=bases)
    )
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
