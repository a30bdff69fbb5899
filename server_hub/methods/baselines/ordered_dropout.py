"""FjORD's ordered dropout: training a narrow model within a wider one.

FjORD (Horvath et al., NeurIPS 2021, https://arxiv.org/abs/2102.13451) trains the narrower models
inside the device's own: each step draws a width and drops the channels beyond it in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from export.bases.narrow import find_layers, leading_channels, mask_channels, narrow
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.torch_internals import NormBase, forward_hooks


def ordered_dropout(model: SplitModel, widths: Sequence[float], example: Tensor) -> None:
    """Make training steps draw one of ``widths`` and train the narrow model of that width.

    In training mode with a :class:`~export.cutting.seeded_random.SeededDropout`, each step
    draws one width for all layers, and the outputs of convolutions, linear layers and norms beyond
    it are zero. A LayerNorm is computed over the remaining channels. So loss and gradients are
    those of :func:`narrow` at this width, and the gradients beyond it are zero. Only the running
    statistics of remaining channels are updated. In evaluation mode, and without a seed, nothing is
    dropped.

    Weight decay and momentum still change weights whose gradient is zero, as in every
    implementation with masks. A step takes as long as at full width. The model gets forward hooks
    but no parameters; a second call replaces the widths. Narrow a model before this call, since
    copies keep the hooks with the widths of this model.

    Args:
        model: a model that :func:`narrow` takes.
        widths: widths to draw from, with equal probability.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: there are no widths, or :func:`narrow` refuses the model at one of them.
            Nothing was changed.
    """
    if not widths:
        raise ExportError("ordered dropout has no widths to draw from; give it some, [0.5, 1.0]")
    for width in widths:
        narrow(model, width, example)
    layers = find_layers(model, example)
    remove_ordered_dropout(model)
    for layer in layers:
        if not layer.keeps_output:
            OrderedDropout(widths).put_on(model.get_submodule(layer.name))


class OrderedDropout:
    """Hooks that drop the channels of one layer beyond the width of the step.

    A :class:`SeededDropout` draws the width. Without one, and in evaluation mode, nothing is
    dropped.

    Args:
        widths: fractions of the channels to draw from.
    """

    def __init__(self, widths: Sequence[float]) -> None:
        self.widths = tuple(widths)
        self._statistics: dict[str, Tensor] = {}

    def put_on(self, module: nn.Module) -> None:
        """Register the hooks on a layer."""
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Give a batch norm copies of its statistics, since those of dropped channels must stay.

        Restoring the statistics afterwards does not work: autograd refuses tensors that were
        changed after the forward pass.
        """
        if isinstance(module, NormBase) and self._width(module) is not None:
            for name in ("running_mean", "running_var"):
                tensor = getattr(module, name)
                if tensor is not None:
                    self._statistics[name] = tensor
                    setattr(module, name, tensor.clone())

    def _after(self, module: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        width = self._width(module)
        if width is None:
            return h
        for name, tensor in self._statistics.items():
            with torch.no_grad():
                moved = getattr(module, name)
                tensor.copy_(torch.where(leading_channels(len(tensor), width), moved, tensor))
            setattr(module, name, tensor)
        self._statistics = {}
        return mask_channels(module, args[0], h, width)

    def _width(self, module: nn.Module) -> Tensor | None:
        dropout = SeededDropout.active()
        return dropout.choice(self.widths) if dropout is not None and module.training else None


def remove_ordered_dropout(model: nn.Module) -> None:
    """Remove the hooks of :class:`OrderedDropout` from all modules."""
    for module in model.modules():
        for hooks in forward_hooks(module):
            for key, hook in list(hooks.items()):
                if isinstance(getattr(hook, "__self__", None), OrderedDropout):
                    del hooks[key]
