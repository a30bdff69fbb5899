"""A replica of the trunk: a copy of the model with an optimizer, for one round."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from edge_sdk.protocol.tensors import State
from export.cutting.split_model import SplitModel, statistics
from export.steps.optimizers import get_optimizer
from export.tensor_names import TIED, layer_of
from export.torch_internals import DropoutBase, foreach_norm
from server_hub.trunk.interface import TrunkCopy, TrunkPlan

_GROWTH = 1e6
"""A batch statistic may grow in a round to so many times the largest of its norm, or of 1."""

_EXPLODED = 1e4
"""A root mean square of parameters that no training reaches unless it diverges."""


class Replica:
    """A copy of the trunk and its optimizer.

    Args:
        model: the copy, in training mode; it is trained in place.
        state: tensors that the round starts from. With ``keeps_slots`` they include those of the
            optimizer.
        plan: how the round trains.
        tied: the model's tied tensors, see :func:`export.cutting.tied.tied_tensors`. They are
            trained with the gradients of the heads that read them.
    """

    def __init__(
        self,
        model: SplitModel,
        state: State,
        plan: TrunkPlan,
        tied: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> None:
        self.model, self._plan = model, plan
        read = {name: [h for h in heads if self._trains(h)] for name, heads in tied.items()}
        self._tied = {name: heads for name, heads in read.items() if heads}
        # the rest of the stem is trained on the devices
        for name, parameter in model.stem.named_parameters("stem"):
            parameter.requires_grad_(name in self._tied)
        for module in model.modules() if plan.u_shaped else ():
            if isinstance(module, DropoutBase):
                module.eval()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        """The parameters that are trained."""
        self._statistics = statistics(model)
        self._largest = self._norms().clamp(min=1.0) * _GROWTH if self._statistics else None
        rule = get_optimizer(plan.optimizer)
        self.optimizer = rule.reference(list(self.trained), dict(plan.hyper))
        """Updates the parameters."""
        if parts := [model.get_parameter(name) for name in self._tied]:
            (group,) = self.optimizer.param_groups
            group["params"] = [p for p in self.trained if all(p is not part for part in parts)]
            # tied tensors decay on the devices
            self.optimizer.add_param_group({"params": parts, "weight_decay": 0.0})
        self._samples: dict[str, int] = {}
        self.diverged = False
        """Whether a step has found that training has diverged; no further steps are made."""
        if plan.keeps_slots:
            for slots, slot, name in self._slot_names():
                slots[slot] = torch.from_numpy(np.array(state[name]))
                if slot != "step":  # torch wants that one on the host
                    slots[slot] = slots[slot].to(self.trained[0].device)

    def statistics(self) -> dict[str, Tensor]:
        """Copies of the running statistics of batch norms, which a forward pass changes."""
        return {name: tensor.clone() for name, tensor in self._statistics.items()}

    @torch.no_grad()
    def restore(self, statistics: Mapping[str, Tensor]) -> None:
        """Set the running statistics of batch norms to what :meth:`statistics` returned."""
        for name, tensor in self._statistics.items():
            tensor.copy_(statistics[name])

    @contextmanager
    def attempt(self) -> Iterator[dict[str, Tensor]]:
        """A context that yields :meth:`statistics`, and restores them on an exception."""
        before = self.statistics()
        try:
            yield before
        except Exception:
            self.restore(before)
            self.optimizer.zero_grad()
            raise

    def statistics_are_sane(self) -> Tensor:
        """Whether the running statistics of batch norms are finite and within bounds.

        Returns:
            A boolean scalar on the device; the host does not wait.
        """
        if self._largest is None:
            return torch.ones((), dtype=torch.bool, device=self.trained[0].device)
        return (self._norms() <= self._largest).all()  # false for NaN

    def _norms(self) -> Tensor:
        """Largest absolute value of each statistic (statistics,)."""
        tensors = list(self._statistics.values())
        return torch.stack(foreach_norm(tensors, math.inf)).float()

    @torch.no_grad()
    def has_diverged(self) -> bool:
        """Whether a parameter is not finite, or so large that training has diverged."""
        norms = torch.stack(foreach_norm(list[Tensor](self.trained))).float()
        sizes = torch.tensor([p.numel() for p in self.trained], device=norms.device)
        return not bool((norms <= _EXPLODED * sizes.sqrt()).all())  # false for NaN

    def set_rate(self, factor: float) -> None:
        """Set the learning rate to the plan's, times ``factor``."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self._plan.hyper["lr"]

    def count(self, rows: Mapping[int, int]) -> None:
        """Count rows that a step has used, given their number by cut.

        They count for every layer above their cut that the hub trains.
        """
        model = self.model
        for cut, number in rows.items():
            heads = [*(f"aux.{d}" for d in model.head_depths if d > cut), "head"]
            above = [f"block.{i}" for i in range(cut, model.depth)]
            for layer in [*above, *filter(self._trains, heads)]:
                self._samples[layer] = self._samples.get(layer, 0) + number

    def _trains(self, head: str) -> bool:
        """Whether the plan trains a head, given the name of its layer."""
        return not (self._plan.u_shaped if head == "head" else self._plan.returned)

    def copies(self, name: str) -> list[TrunkCopy]:
        """Every layer that was trained, as copies of the replica called ``name``."""
        diverged = self.diverged or (bool(self.trained) and self.has_diverged())
        trained = self.model.trained()
        if self._plan.keeps_slots:
            trained |= {n: slots[slot] for slots, slot, n in self._slot_names()}
        samples = dict(self._samples)
        for heads in self._tied.values():
            rows = max(samples.get(head, 0) for head in heads)
            if rows:
                samples["stem"] = samples[TIED] = max(rows, samples.get(TIED, 0))
        copies = []
        for layer, rows in samples.items():
            tensors = {
                n: t.detach().to("cpu", copy=True).numpy()
                for n, t in trained.items()
                if layer_of(n) == layer
            }
            if tensors:  # a layer whose tensors are all frozen has none
                # an example counts once, however many passes devices and trunk make
                rows //= self._plan.epochs * self._plan.passes
                tensors = {} if diverged else tensors
                part = layer == "stem"
                copies.append(TrunkCopy(name, layer, tensors, rows, diverged=diverged, part=part))
        return copies

    def _slot_names(self) -> Iterator[tuple[dict[str, Tensor], str, str]]:
        """For each slot: torch's dictionary that holds it, its key there, and its name here."""
        kinds = get_optimizer(self._plan.optimizer).torch_names
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                if name in self._tied:  # devices have slots of the name itself
                    name = f"{TIED}.{name}"
                for kind, slot in kinds.items():
                    owner = layer_of(name) if kind == "steps" else name
                    yield self.optimizer.state[parameter], slot, f"{kind}/{owner}"
