"""Draws the inputs of a step for verification, from states that are not special."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Port
from edge_sdk.training.data import Examples
from export.cutting.seeded_random import PRIME
from export.steps.client_steps import ClientSteps
from export.steps.losses import NO_LABEL
from export.steps.step import Step, Tensors

_HYPER = {
    "lr": 0.05,
    "momentum": 0.9,
    "weight_decay": 0.01,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
}
"""Hyper-parameters of optimizers."""

_MAX_NORMS = (0.0, 0.05, 1e6)
"""Bounds of the gradients' norm, one a draw: none, one that bites, and one that does not."""

_STEPS_BEFORE = 3
"""Number of steps that AdamW has made, so that its bias correction is not at its start."""

_FIRST_EPS = 1e-2
"""Epsilon of AdamW's first step: with a small one, the step is the sign of rounding errors."""


class Source(Protocol):
    """Where inputs and labels come from."""

    def draw(
        self, steps: ClientSteps, rows: int, length: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs (rows, ...), and labels (rows,) or (rows, length); None to draw labels.

        Args:
            steps: steps of the segment.
            rows: number of rows.
            length: number of positions of texts; None for other inputs.
            generator: source of the draws.
        """


@dataclass(frozen=True)
class Like:
    """Random inputs with the mean and deviation of an example, or with its range of integers.

    Attributes:
        example: inputs (rows, ...).
    """

    example: Tensor

    def draw(
        self, steps: ClientSteps, rows: int, length: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Random inputs (rows, ...) of the dtype of the example, without labels."""
        example = self.example
        shape = (rows, *example.shape[1:]) if length is None else (rows, length)
        if example.is_floating_point():
            deviation = example.std().clamp(min=1e-3) if example.numel() > 1 else torch.tensor(1.0)
            return example.mean() + deviation * torch.randn(shape, generator=generator), None
        if length is None:  # columns may have ranges of their own
            return example[torch.randint(len(example), (rows,), generator=generator)], None
        low, high = int(example.min()), int(example.max())
        return torch.randint(low, high + 1, shape, generator=generator, dtype=example.dtype), None


@dataclass(frozen=True)
class Rows:
    """Rows of the user's data, with their labels.

    Attributes:
        x: inputs (rows, ...).
        y: labels (rows,), or (rows, positions).
    """

    x: Tensor
    y: Tensor

    @classmethod
    def of(cls, examples: Examples) -> Rows:
        """The rows of labelled examples."""
        return cls(torch.from_numpy(examples.x), torch.from_numpy(examples.y))

    def draw(
        self, steps: ClientSteps, rows: int, length: int | None, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """Some rows with labels, in random order.

        Texts are cut or repeated to the length, from their first label on: without a label there
        is no loss.
        """
        counts = self.y.reshape(len(self.y), -1) != NO_LABEL
        labelled = counts.any(1).nonzero().flatten()
        chosen = labelled[torch.randint(len(labelled), (rows,), generator=generator)]
        x, y = self.x[chosen], self.y[chosen]
        if length is not None:
            first = counts[chosen].int().argmax(1, keepdim=True)
            places = (first + torch.arange(length)) % x.shape[1]
            x = x.gather(1, places)
            y = y.gather(1, places) if y.dim() == 2 else y
        return x, y


def draw_inputs(
    steps: ClientSteps,
    step: Step,
    source: Source,
    rows: int,
    length: int | None,
    seed: int,
    known: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensors:
    """Draw all inputs of a step, in the dtypes of its ports.

    Parameters and statistics are perturbed, so that no weight is 1, no bias 0 and no running mean
    at its start. Odd seeds draw optimizer slots that are in use; even seeds have those of a first
    step, all zero.

    Args:
        steps: steps of the segment.
        step: step whose inputs are drawn.
        source: where inputs and labels come from.
        rows: number of rows.
        length: number of positions of texts; None for other inputs.
        seed: seed of the draws.
        known: inputs of the same draw that are not drawn again: what follows the state.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y = source.draw(steps, rows, length, generator)
    used = seed % 2 == 1
    # draws that replace one another differ by hundreds
    bound = _MAX_NORMS[seed % 100 % len(_MAX_NORMS)]
    drawn: Tensors = {"x": x, "max_norm": torch.tensor(bound)}
    if y is not None:
        drawn["y"] = y
    drawn |= known
    sizes = {"batch": rows} if length is None else {"batch": rows, "seq": length}
    for port in step.inputs:
        name = port.spec.name
        if name not in drawn:
            drawn[name] = _draw(steps, step, port, sizes, drawn, used, generator)
    return {port.spec.name: drawn[port.spec.name] for port in step.inputs}


def _draw(
    steps: ClientSteps,
    step: Step,
    port: Port,
    sizes: Mapping[str, int],
    drawn: Tensors,
    used: bool,
    generator: torch.Generator,
) -> Tensor:
    name = port.spec.name
    shape = tuple(sizes[n] if isinstance(n, str) else n for n in port.spec.shape)
    if port.role == "bases":
        first = steps.initial[name.removeprefix("bases/")]
        return torch.stack([_perturbed(name, first, generator) for _ in range(shape[0])])
    if port.role == "state":
        if name in steps.slots:
            return _slot(name, steps.slots[name], used, generator)
        return _perturbed(name, steps.initial[name], generator)
    if port.role == "seed":
        return torch.randint(PRIME, (), generator=generator)
    if port.role == "hyper":
        value = {**_HYPER, **step.verified_at}[name]
        return torch.tensor(_FIRST_EPS if name == "eps" and not used else value)
    if port.role == "packed":
        return _packed(steps, step, name, sizes, drawn, generator)
    if name == "y":
        return _labels(steps, shape, drawn, step, generator)
    if name == "present":
        return _present(steps, drawn, generator)
    assert name in ("x_adv", "start"), name
    reach = step.verified_at.get("epsilon", 0.1)
    return drawn["x"] + reach * (2 * torch.rand(shape, generator=generator) - 1)


def _perturbed(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor at a point that is not special; variances stay above zero."""
    noise = torch.randn(tensor.shape, generator=generator)
    scaled = tensor * (1 + 0.2 * torch.rand(tensor.shape, generator=generator))
    if name.endswith("running_var"):
        return scaled
    size = tensor.std().item() if tensor.numel() > 1 else 0.0
    return scaled + max(0.1 * size, 0.01) * noise


def _slot(name: str, tensor: Tensor, used: bool, generator: torch.Generator) -> Tensor:
    if not used:
        return torch.zeros_like(tensor)
    if name.startswith("steps/"):
        return torch.full_like(tensor, _STEPS_BEFORE)
    noise = 0.01 * torch.randn(tensor.shape, generator=generator)
    return noise * noise + 1e-6 if name.startswith("square/") else noise


def _packed(
    steps: ClientSteps,
    step: Step,
    name: str,
    sizes: Mapping[str, int],
    drawn: Tensors,
    generator: torch.Generator,
) -> Tensor:
    """A part of a packed random tensor; its other parts are kept for their ports."""
    prefix = next(p for p in ("grad.", "features.") if name.startswith(p))
    deep = prefix == "features."
    specs = steps.features if deep else steps.packed
    axis = steps.features_axis if deep else steps.axis
    shape = next(
        [sizes[n] if isinstance(n, str) else n for n in spec.shape]
        for spec in specs
        if len(spec.shape) and spec.shape[0] == "batch"
    )
    h = torch.randn(shape, generator=generator)
    for part, value in steps.codec.pack(h, axis).items():
        drawn[f"{prefix}{part}"] = value
    return drawn[name]


def _labels(
    steps: ClientSteps,
    shape: tuple[int, ...],
    drawn: Tensors,
    step: Step,
    generator: torch.Generator,
) -> Tensor:
    """Random labels; in a text some are :data:`NO_LABEL`, but never all."""
    if any(port.spec.name == "present" for port in step.inputs):
        drawn["present"] = present = _present(steps, drawn, generator)
        classes = present.nonzero().flatten()
        return classes[torch.randint(len(classes), shape, generator=generator)]
    y = torch.randint(steps.classes, shape, generator=generator)
    if any(port.spec.name == "x" for port in step.inputs):
        # every second row has the model's own answer: random labels are hardly ever correct
        y[::2] = _answers(steps, drawn)[::2]
    if y.dim() == 2:
        y[:, 1:][torch.rand(y[:, 1:].shape, generator=generator) < 0.3] = NO_LABEL
    return y


def _answers(steps: ClientSteps, drawn: Tensors) -> Tensor:
    """The classes that the heads answer together, in evaluation mode."""
    tensors = {**steps.constants, **{n: drawn[n] for n in steps.initial}}
    with torch.no_grad():
        _, logits = steps.call(False, tensors, drawn["x"])
    return logits.softmax(-1).mean(0).argmax(-1)


def _present(steps: ClientSteps, drawn: Tensors, generator: torch.Generator) -> Tensor:
    """A random class mask (classes,) with about half of the classes and those of the labels."""
    present = (torch.rand(steps.classes, generator=generator) < 0.5).float()
    present[0] = 1.0
    if "y" in drawn:
        present[torch.unique(drawn["y"])] = 1.0
    return present
