"""Copies of the model with the tensors of a state, on the trunk's device."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.protocol.tensors import Array, State
from export.adapters_lora.lora import fit_ranks
from export.cutting.split_model import SplitModel
from export.tensor_names import is_slot
from export.torch_internals import BatchNormBase


class ModelPool:
    """Makes models with a given state, and uses those again that are given back.

    All models share the tensors that are frozen.

    Args:
        template: the model; its own trained tensors are not used.
        device: torch device of the models.
    """

    def __init__(self, template: SplitModel, device: str) -> None:
        self.device = torch.device(device)
        self.template = template.to(self.device)
        self._spare: list[SplitModel] = []

    def take(self, state: State) -> SplitModel:
        """A model in training mode that holds ``state``; optimizer slots in it are ignored.

        Raises:
            ValueError: the state has a tensor that the model does not have.
        """
        model = self._spare.pop() if self._spare else self._copy()
        tensors = {n: torch.from_numpy(np.asarray(t)) for n, t in state.items() if not is_slot(n)}
        fit_ranks(model, tensors)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name not in tensors:  # as in a model that was never used
                    buffer.copy_(self.template.get_buffer(name))
        unknown = model.load_state_dict(tensors, strict=False).unexpected_keys
        if unknown:
            raise ValueError(f"the trunk's model has no {unknown[0]}; it was built otherwise")
        return model.train()

    def give_back(self, models: Sequence[SplitModel]) -> None:
        """Take models that are not needed any more."""
        self._spare.extend(models)

    def _copy(self) -> SplitModel:
        frozen = {id(p): p for p in self.template.parameters() if not p.requires_grad}
        model = copy.deepcopy(self.template, frozen)
        for module in model.modules():
            if isinstance(module, BatchNormBase):
                _freeze_for_single_values(module)
        return model


def _freeze_for_single_values(norm: nn.Module) -> None:
    """Make a batch norm take its running statistics for a single value per channel.

    In training mode such an input has no variance, and torch refuses it.
    """
    frozen: list[bool] = []

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        h = inputs[0]
        if module.training and h.numel() == h.shape[1]:
            module.training = False
            frozen.append(True)

    def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if frozen:
            frozen.clear()
            module.training = True

    norm.register_forward_pre_hook(before)
    norm.register_forward_hook(after, always_call=True)


def to_device(arrays: Sequence[Array], device: torch.device) -> list[Tensor]:
    """Arrays as tensors on ``device``.

    On the CPU a tensor shares the array's memory where that is writable. To a GPU, arrays in pinned
    memory are copied without the host waiting; other arrays go through a pinned buffer.
    """
    # torch warns of read-only memory, so that is copied
    tensors = [torch.from_numpy(np.require(array, requirements="W")) for array in arrays]
    if device.type == "cpu":
        return tensors
    pinned = [t if t.is_pinned() else t.pin_memory() for t in tensors]
    return [t.to(device, non_blocking=True) for t in pinned]


def to_device_by_name(parts: Mapping[str, Array], device: torch.device) -> dict[str, Tensor]:
    """Arrays by name as tensors on ``device``, as :func:`to_device` moves them."""
    return dict(zip(parts, to_device(list(parts.values()), device), strict=True))
