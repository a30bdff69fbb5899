"""Runs functional steps in eager PyTorch, for many simulated devices in one process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edge_sdk.bundle.manifest import Manifest, Port
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.tensors import DTYPES, Array
from export.errors import reason
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps
from export.steps.optimizers import AdamW, Optimizer, Sgd
from export.steps.step import Tensors
from export.tensor_names import layer_of
from export.torch_internals import (
    foreach_add,
    foreach_add_,
    foreach_addcdiv_,
    foreach_addcmul_,
    foreach_mul,
    foreach_mul_,
    foreach_sqrt,
)

_TURN = threading.Lock()
"""Held during a step, in which the shared module has the parameters of one device."""


class TorchRuntime:
    """An :class:`edge_sdk.runtime.Runtime` that runs steps in eager PyTorch.

    A runtime holds only its own state. Hundreds of runtimes share the steps and their module,
    whose tensors and mode are the same after every step. Steps of several threads run one at a
    time; nothing else may use the module during a step.

    Args:
        manifest: manifest of the bundle that was exported from ``steps``.
        steps: steps of the tier.

    Raises:
        BundleError: the manifest belongs to other steps.
    """

    loading_s = 0.0
    """Seconds that loading took: none, since there are no files to load."""

    def __init__(self, manifest: Manifest, steps: ClientSteps) -> None:
        if manifest.state != steps.state or manifest.packed != steps.packed:
            raise BundleError(
                f"the manifest of tier {manifest.tier!r} is not of these steps: their states or "
                "codecs differ; export the bundle from the same model, cut, optimizer and codec"
            )
        self.manifest = manifest
        fast = copy.copy(steps)
        fast.optimizer = _FAST[steps.optimizer.name]
        fast.clip = _clipped
        self._steps = {step.name: step for step in all_steps(fast)}
        self._constants = dict(steps.constants)
        self._turn = threading.Lock()
        # steps do not change their inputs, so all devices can share the initial tensors
        self._state = {**steps.initial, **steps.slots}

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        """Replace parameters and statistics, and set every optimizer slot to zero.

        Raises:
            BundleError: a tensor is missing or has another shape.
        """
        values = self.manifest.fresh_state(tensors)
        with self._turn:
            self._state = {name: torch.from_numpy(value) for name, value in values.items()}

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        """Copies of parameters and statistics by name, and with ``slots`` of optimizer slots."""
        with self._turn:
            return {
                spec.name: self._state[spec.name].numpy().copy()
                for spec in self.manifest.exchanged(slots)
            }

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph; its state outputs become the state.

        Args:
            graph: name of the graph.
            batch: inputs other than the state, by name.

        Returns:
            Outputs other than the state, by name.

        Raises:
            DataError: an input is missing, or has another dtype or shape.
            BundleError: there is no such graph, or it fails.
        """
        if graph not in self._steps:
            raise BundleError(f"the bundle of tier {self.manifest.tier!r} has no graph {graph!r}")
        step = self._steps[graph]
        given = {
            port.spec.name: _input(graph, port, batch)
            for port in step.inputs
            if port.role != "state"
        }
        with self._turn:
            inputs = given | {
                port.spec.name: self._state[port.spec.name]
                for port in step.inputs
                if port.role == "state"
            }
            try:
                with _TURN, torch.enable_grad():
                    outputs = step.function(self._constants, inputs)
            except (RuntimeError, IndexError, ValueError) as error:  # an index beyond its table
                raise BundleError(
                    f"PyTorch cannot run the graph {graph!r} ({reason(error)}); check that the "
                    "inputs are like those that the bundle was exported with"
                ) from error
            results: dict[str, Array] = {}
            for port in step.outputs:
                name = port.spec.name
                if port.role == "state":
                    self._state[name.removeprefix("next/")] = outputs[name]
                else:
                    results[name] = outputs[name].numpy()
            return results


def _input(graph: str, port: Port, batch: Mapping[str, Array]) -> Tensor:
    """A checked copy of one input; a copy because a module may change it in place."""
    spec = port.spec
    if spec.name not in batch:
        raise DataError(f"the graph {graph!r} needs the input {spec.name!r}")
    value = np.asarray(batch[spec.name])
    sizes = zip(value.shape, spec.shape, strict=False)
    fits = value.dtype == DTYPES[spec.dtype] and value.ndim == len(spec.shape)
    if not fits or any(n < 1 if isinstance(want, str) else n != want for n, want in sizes):
        raise DataError(
            f"{spec.name} is {value.dtype} {list(value.shape)}, "
            f"must be {spec.dtype} {list(spec.shape)}"
        )
    return torch.from_numpy(np.array(value, order="C"))


class _FastSgd(Sgd):
    """:class:`Sgd` with one call for all parameters instead of one call for each."""

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        slots: Tensors,
        hyper: Tensors,
        decayed: Collection[str],
    ) -> tuple[Tensors, Tensors]:
        if not parameters:
            return {}, {}  # torch._foreach_add takes no empty lists
        h = {name: value.item() for name, value in hyper.items()}
        old, given = list(parameters.values()), dict(gradients)
        if some := [n for n in parameters if n in decayed]:
            given |= _named(
                some,
                foreach_add(
                    [given[n] for n in some],
                    [parameters[n] for n in some],
                    alpha=h["weight_decay"],
                ),
            )
        g = [given[n] for n in parameters]
        v = foreach_mul([slots[f"momentum/{n}"] for n in parameters], h["momentum"])
        foreach_add_(v, g)
        new = foreach_add(old, v, alpha=-h["lr"])
        momenta = (f"momentum/{n}" for n in parameters)
        return _named(parameters, new), _named(momenta, v)


class _FastAdamW(AdamW):
    """:class:`AdamW` with one call for all parameters instead of one call for each."""

    def step(
        self,
        parameters: Tensors,
        gradients: Tensors,
        slots: Tensors,
        hyper: Tensors,
        decayed: Collection[str],
    ) -> tuple[Tensors, Tensors]:
        if not parameters:
            return {}, {}
        h = {name: value.item() for name, value in hyper.items()}
        g = [gradients[n] for n in parameters]
        layers = [layer_of(name) for name in parameters]
        steps = {layer: slots[f"steps/{layer}"] + 1 for layer in dict.fromkeys(layers)}
        counts = {layer: count.item() for layer, count in steps.items()}
        rates = [-h["lr"] / (1 - h["beta1"] ** counts[layer]) for layer in layers]
        roots = [(1 - h["beta2"] ** counts[layer]) ** -0.5 for layer in layers]
        m = foreach_mul([slots[f"mean/{n}"] for n in parameters], h["beta1"])
        foreach_add_(m, g, alpha=1 - h["beta1"])
        v = foreach_mul([slots[f"square/{n}"] for n in parameters], h["beta2"])
        foreach_addcmul_(v, g, g, 1 - h["beta2"])
        deviation = foreach_sqrt(v)
        foreach_mul_(deviation, roots)
        foreach_add_(deviation, h["eps"])
        kept = [1 - h["lr"] * h["weight_decay"] if n in decayed else 1.0 for n in parameters]
        new = foreach_mul(list(parameters.values()), kept)
        foreach_addcdiv_(new, m, deviation, rates)
        new_slots: Tensors = {f"steps/{layer}": count for layer, count in steps.items()}
        for name, mean, square in zip(parameters, m, v, strict=True):
            new_slots |= {f"mean/{name}": mean, f"square/{name}": square}
        return _named(parameters, new), new_slots


def _clipped(gradients: Tensors, max_norm: Tensor) -> Tensors:
    """:func:`export.steps.clipping.clipped` with one call for all gradients."""
    if not gradients or max_norm.item() <= 0:
        return gradients
    given = list(gradients.values())
    scale = max_norm / (torch.nn.utils.get_total_norm(given) + 1e-6)
    return _named(gradients, foreach_mul(given, scale.clamp(max=1.0)))  # NaN stays


def _named(names: Any, tensors: Any) -> Tensors:
    return dict(zip(names, tensors, strict=True))


_FAST: dict[str, Optimizer] = {rule.name: rule for rule in (_FastSgd(), _FastAdamW())}
