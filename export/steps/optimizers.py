"""Optimizers as pure functions, which are traced into step graphs and agree with torch.optim."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from export.errors import ExportError
from export.steps.step import Tensors
from export.tensor_names import layer_of


class Optimizer(Protocol):
    """One update rule.

    Attributes:
        name: name in ``tiers.toml`` and in the manifest.
        hyper: defaults of the hyper-parameters, which are scalar inputs of the graph.
        torch_names: name of a slot in torch.optim by its name here.
        shared: slots that all parameters of a layer share.
    """

    name: str
    hyper: dict[str, float]
    torch_names: dict[str, str]
    shared: frozenset[str]

    def slots(self, parameters: Tensors) -> Tensors:
        """Slots before the first step; all zeros.

        A slot is called ``KIND/PARAMETER``, or ``KIND/LAYER`` if all parameters of a layer share
        it. So a layer that moves between device and hub keeps its slots.
        """

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        slots: Tensors,
        hyper: Tensors,
        decayed: Collection[str],
    ) -> tuple[Tensors, Tensors]:
        """One update; returns new parameters and new slots by name.

        Args:
            parameters: parameters by name.
            gradients: their gradients by name.
            slots: their slots by name.
            hyper: hyper-parameters by name.
            decayed: names of the parameters that weight decay applies to; may have others.
        """

    def reference(
        self,
        parameters: Sequence[Tensor],
        hyper: dict[str, float],
        undecayed: Sequence[Tensor] = (),
    ) -> torch.optim.Optimizer:
        """The same optimizer of torch.optim, with which exported graphs are compared.

        Args:
            parameters: parameters that weight decay applies to.
            hyper: hyper-parameters by name; of others it takes no notice.
            undecayed: further parameters, without weight decay.
        """


class Sgd:
    """SGD with momentum and weight decay (coupled, as in torch.optim.SGD)."""

    name = "sgd"
    hyper: dict[str, float] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}
    torch_names = {"momentum": "momentum_buffer"}
    shared: frozenset[str] = frozenset()

    def slots(self, parameters: Tensors) -> Tensors:
        return {f"momentum/{n}": torch.zeros_like(p) for n, p in parameters.items()}

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        slots: Tensors,
        hyper: Tensors,
        decayed: Collection[str],
    ) -> tuple[Tensors, Tensors]:
        new_parameters, new_slots = {}, {}
        for name, p in parameters.items():
            g = gradients[name]
            if name in decayed:
                g = g + hyper["weight_decay"] * p
            v = hyper["momentum"] * slots[f"momentum/{name}"] + g
            new_parameters[name] = p - hyper["lr"] * v
            new_slots[f"momentum/{name}"] = v
        return new_parameters, new_slots

    def reference(
        self,
        parameters: Sequence[Tensor],
        hyper: dict[str, float],
        undecayed: Sequence[Tensor] = (),
    ) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            _groups(parameters, undecayed),
            lr=hyper["lr"],
            momentum=hyper["momentum"],
            weight_decay=hyper["weight_decay"],
        )


class AdamW:
    """AdamW with bias correction and decoupled weight decay (torch.optim.AdamW)."""

    name = "adamw"
    hyper: dict[str, float] = {
        "lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01,
    }  # fmt: skip
    torch_names = {"mean": "exp_avg", "square": "exp_avg_sq", "steps": "step"}
    shared = frozenset({"steps"})

    def slots(self, parameters: Tensors) -> Tensors:
        slots = {f"steps/{layer_of(name)}": torch.zeros(()) for name in parameters}
        for name, p in parameters.items():
            slots[f"mean/{name}"] = torch.zeros_like(p)
            slots[f"square/{name}"] = torch.zeros_like(p)
        return slots

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        slots: Tensors,
        hyper: Tensors,
        decayed: Collection[str],
    ) -> tuple[Tensors, Tensors]:
        beta1, beta2 = hyper["beta1"], hyper["beta2"]
        decay = 1 - hyper["lr"] * hyper["weight_decay"]
        new_parameters: Tensors = {}
        new_slots: Tensors = {}
        corrections: dict[str, tuple[Tensor, Tensor]] = {}
        for layer in dict.fromkeys(map(layer_of, parameters)):
            steps = new_slots[f"steps/{layer}"] = slots[f"steps/{layer}"] + 1
            root = (1 - torch.pow(beta2, steps)).sqrt()
            corrections[layer] = (
                hyper["lr"] * root / (1 - torch.pow(beta1, steps)),
                hyper["eps"] * root,
            )
        for name, p in parameters.items():
            rate, eps = corrections[layer_of(name)]
            g = gradients[name]
            m = beta1 * slots[f"mean/{name}"] + (1 - beta1) * g
            v = beta2 * slots[f"square/{name}"] + (1 - beta2) * (g * g)
            # scalars are combined first: every product with a tensor is a pass over its values
            kept = p * decay if name in decayed else p
            new_parameters[name] = kept - m / (v.sqrt() + eps) * rate
            new_slots[f"mean/{name}"] = m
            new_slots[f"square/{name}"] = v
        return new_parameters, new_slots

    def reference(
        self,
        parameters: Sequence[Tensor],
        hyper: dict[str, float],
        undecayed: Sequence[Tensor] = (),
    ) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            _groups(parameters, undecayed),
            lr=hyper["lr"],
            betas=(hyper["beta1"], hyper["beta2"]),
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
        )


def _groups(decayed: Sequence[Tensor], undecayed: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Parameter groups of torch.optim."""
    return [{"params": list(decayed)}, {"params": list(undecayed), "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Optimizer] = {rule.name: rule for rule in (Sgd(), AdamW())}


def get_optimizer(name: str) -> Optimizer:
    """The optimizer called ``name``; raises :class:`ExportError` if there is none."""
    if name not in OPTIMIZERS:
        raise ExportError(f"unknown optimizer {name!r}; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def check_hyper(name: str, given: dict[str, float]) -> dict[str, float]:
    """Hyper-parameters of an optimizer: the defaults, replaced by ``given``.

    Raises:
        ExportError: there is no such optimizer or hyper-parameter, or a value is out of range.
    """
    known = get_optimizer(name).hyper
    for key in given:
        if key not in known:
            raise ExportError(f"{name} has no hyper-parameter {key!r}; it has {', '.join(known)}")
    for key, value in given.items():
        below = 1.0 if key in ("momentum", "beta1", "beta2") else math.inf
        if not 0 <= value < below:
            rule = "0 or more" if below == math.inf else "from 0 to below 1"
            raise ExportError(f"{key} of {name} is {value}; it must be {rule}")
    return {**known, **given}
