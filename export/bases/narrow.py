"""Narrow models nested in a wide one: the leading channels of every layer.

The sizes that stay are found by running the model. A layer keeps its input channels if no
convolution or linear layer precedes it, and its output channels if none follows.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from export.cutting.split_model import SplitModel, answer
from export.errors import ExportError, reason
from export.torch_internals import NormBase

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_WEIGHTS = (*CONVOLUTIONS, nn.Linear)
_NORMS = (nn.GroupNorm, nn.LayerNorm, NormBase)

_TOLERANCE = 1e-6
"""Largest distance of width times channels from an integer, since widths such as 1/3 round."""


def narrow(model: SplitModel, width: float, example: Tensor) -> SplitModel:
    """A copy of a model whose inner layers have the leading fraction of their channels.

    Weights are the leading slices ``full[:n0, :n1, ...]`` and keep their names. The channels of
    the input and the classes of all heads stay. Groups of a GroupNorm or a convolution keep their
    size, and their number shrinks.

    Args:
        model: a model of convolutions, linear layers and norms, auxiliary heads included.
        width: fraction of the channels, above 0 and at most 1.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: a layer is of another kind; the width does not give a whole number of channels
            or groups; or the copy differs from the full model whose channels beyond ``width`` are
            zero, because an operation mixes channels (a concatenation, a flatten with the
            channels last). The message names the layer.
    """
    _check_width(width)
    layers = find_layers(model, example)
    result = _slice(model, layers, width)
    _check(model, layers, width, example)
    return result


@dataclass(frozen=True)
class Layer:
    """A layer with channels, and the sizes of it that are the same at every width.

    Attributes:
        name: name of the module.
        keeps_input: whether the layer reads the channels of the model's input.
        keeps_output: whether the outputs are classes; for a norm, whether its channels are not
            narrowed.
    """

    name: str
    keeps_input: bool
    keeps_output: bool


def _check_width(width: float) -> None:
    if not 0 < width <= 1:
        raise ExportError(f"the width is {width:g}; it must be above 0 and at most 1")


def find_layers(model: SplitModel, example: Tensor) -> list[Layer]:
    """The layers that have channels, in the order of their calls.

    The data flow is read from autograd. Only weights of convolutions and linear layers require
    gradients, so a tensor that requires none has the channels of the input. The layers that
    return logits are the first ones on the way back from the logits.

    Args:
        model: a model that :func:`narrow` takes.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: a layer is of another kind, the example does not reach it, or the model fails
            on the example.
    """
    _check_kinds(model)
    model = copy.deepcopy(model).cpu().double().eval()
    model.requires_grad_(False)
    raw: dict[str, bool] = {}
    makers: dict[Any, str] = {}

    layers = {n: m for n, m in model.named_modules() if isinstance(m, (*_WEIGHTS, *_NORMS))}
    for name, module in layers.items():
        module.requires_grad_(isinstance(module, _WEIGHTS))

        def note(module: nn.Module, args: Any, result: Tensor, name: str = name) -> None:
            raw[name] = raw.get(name, True) and not args[0].requires_grad
            if result.grad_fn is not None:
                makers[result.grad_fn] = name

        module.register_forward_hook(note)
    with torch.enable_grad():
        x = example[:2].detach().cpu().double()
        answers = answers_of(model, x, "on the example", "give some inputs as devices have them")
    for name, module in layers.items():
        if name not in raw:
            raise ExportError(
                f"{called(name, module)} that the example does not reach, so its width is not "
                "known; remove it"
            )
    whole = set()
    nodes, seen = [logits.grad_fn for logits in answers], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in makers:
            whole.add(makers[node])
            if isinstance(layers[makers[node]], _WEIGHTS):
                continue
        nodes.extend(before for before, _ in node.next_functions)
    return [Layer(n, raw[n], n in whole or (raw[n] and isinstance(layers[n], _NORMS))) for n in raw]


def _check_kinds(model: SplitModel) -> None:
    """Raise :class:`ExportError` for the first module for which there is no rule."""
    for name, module in model.named_modules():
        if isinstance(module, (*_WEIGHTS, *_NORMS)):
            if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) > 1:
                raise ExportError(
                    f"{called(name, module)} over {list(module.normalized_shape)}, positions and "
                    "channels; only one over channels can be narrowed, or a GroupNorm"
                )
        elif next(module.parameters(recurse=False), None) is not None:
            raise ExportError(
                f"{called(name, module)}, which cannot be narrowed: there are rules for "
                "Conv1d, Conv2d, Conv3d, Linear, GroupNorm, LayerNorm and BatchNorm only"
            )


def answers_of(model: SplitModel, x: Tensor, where: str, advice: str) -> list[Tensor]:
    """Logits of the auxiliary heads, shallowest first, and of the model's head.

    Args:
        model: model to run, which gets hooks.
        x: inputs (batch, ...).
        where: condition of the run, for messages.
        advice: remedy, for messages.

    Raises:
        ExportError: the model fails; the message names the innermost running module.
    """
    running: list[str] = []
    for name, module in model.named_modules():

        def enter(module: nn.Module, args: Any, name: str = name) -> None:
            running.append(name)

        def leave(module: nn.Module, args: Any, result: Any) -> None:
            running.pop()

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    logits = []
    try:
        h = model.stem(x)
        for depth, block in enumerate(model.block, start=1):
            h = block(h)
            if str(depth) in model.aux:
                logits.append(answer(model.aux[str(depth)], model.stem, h))
        return [*logits, model.head(h)]
    except Exception as error:  # the code of a model raises errors of any class
        failed = called(running[-1], model.get_submodule(running[-1]))
        raise ExportError(f"{failed} and fails {where}: {reason(error)}; {advice}") from error


def _slice(model: SplitModel, layers: Sequence[Layer], width: float) -> SplitModel:
    """A copy of a model with the leading fraction of the channels."""
    result = copy.deepcopy(model)
    slices: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters stay tied
    for layer in layers:
        module = result.get_submodule(layer.name)
        before, after = _resize(layer, module, width)
        for name, p in list(module.named_parameters(recurse=False)):
            part = _leading(p.detach(), after, before)
            if p not in slices:
                slices[p] = nn.Parameter(part, p.requires_grad)
            elif slices[p].shape != part.shape:
                raise ExportError(
                    f"{called(layer.name, module)} that shares its {name} with a layer of another "
                    f"size at width {width:g}; give each its own"
                )
            setattr(module, name, slices[p])
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, _leading(buffer, after, before))
    return result


def _leading(tensor: Tensor, after: int, before: int | None) -> Tensor:
    if tensor.dim() == 0:  # the count of a batch norm
        return tensor
    return (tensor[:after] if tensor.dim() == 1 else tensor[:after, :before]).clone()


def _resize(layer: Layer, module: nn.Module, width: float) -> tuple[int | None, int]:
    """Set the size attributes of a layer for a width.

    Returns:
        Remaining input channels of the weight, None if all remain (in a group); and remaining
        output channels.
    """

    def part(count: int, what: str, kept: bool = False) -> int:
        if kept:
            return count
        narrowed = round(count * width)
        if narrowed < 1 or abs(count * width - narrowed) > _TOLERANCE:
            raise ExportError(
                f"{called(layer.name, module)} with {count} {what}, of which width {width:g} "
                f"leaves {count * width:g}; take a multiple of 1/{count}, or another size"
            )
        return narrowed

    if isinstance(module, nn.Linear):
        module.in_features = part(module.in_features, "input features", layer.keeps_input)
        module.out_features = part(module.out_features, "output features", layer.keeps_output)
        return module.in_features, module.out_features
    if isinstance(module, CONVOLUTIONS):
        grouped = module.groups > 1
        if grouped and (layer.keeps_input or layer.keeps_output) and width != 1:
            where = "input" if layer.keeps_input else "answer"
            raise ExportError(
                f"{called(layer.name, module)} in {module.groups} groups at the model's {where}, "
                "whose channels stay; use one without groups"
            )
        module.in_channels = part(module.in_channels, "input channels", layer.keeps_input)
        module.out_channels = part(module.out_channels, "output channels", layer.keeps_output)
        if not grouped:
            return module.in_channels, module.out_channels
        each = f"groups, {module.weight.shape[1]} input channels each"
        module.groups = part(module.groups, each)
        return None, module.out_channels
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        each = f"groups of {size} of its {module.num_channels} channels"
        module.num_groups = part(module.num_groups, each, layer.keeps_output)
        module.num_channels = size * module.num_groups
        return None, module.num_channels
    if isinstance(module, nn.LayerNorm):
        channels = part(module.normalized_shape[0], "channels", layer.keeps_output)
        module.normalized_shape = (channels,)
        return None, channels
    assert isinstance(module, NormBase)
    module.num_features = part(module.num_features, "channels", layer.keeps_output)
    return None, module.num_features


def _check(model: SplitModel, layers: Sequence[Layer], width: float, example: Tensor) -> None:
    """Compare the narrow model with the masked full model, at random weights, in float64.

    The weights are random, because a layer that starts at zero hides the layers before it.
    """
    full = copy.deepcopy(model).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in full.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            p.copy_(noise / max(p[0].numel(), 1) ** 0.5)
    slim = _slice(full, layers, width)
    at = torch.tensor(width, dtype=torch.float32)
    for layer in layers:
        if not layer.keeps_output:
            full.get_submodule(layer.name).register_forward_hook(
                lambda module, args, h: mask_channels(module, args[0], h, at)
            )
    x = torch.randn((2, *example.shape[1:]), generator=generator, dtype=torch.float64)
    wanted, answers = _run(full, layers, x)
    found, slim_answers = _run(slim, layers, x)
    for name, h in found.items():
        _compare(called(name, slim.get_submodule(name)), wanted[name], h, width)
    for want, got in zip(answers, slim_answers, strict=True):
        _compare("what comes after the last layer of the model", want, got, width)


def _run(
    model: SplitModel, layers: Sequence[Layer], x: Tensor
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Output of every layer in its last call by name, and the logits of all heads."""
    given: dict[str, Tensor] = {}
    for layer in layers:

        def note(module: nn.Module, args: Any, h: Tensor, name: str = layer.name) -> None:
            given[name] = h

        model.get_submodule(layer.name).register_forward_hook(note)
    advice = "its code must not hold a number of channels, nor read channels that are not narrowed"
    with torch.no_grad():
        return given, answers_of(model, x, "with fewer channels", advice)


def _compare(what: str, full: Tensor, slim: Tensor, width: float) -> None:
    want = full[tuple(slice(n) for n in slim.shape)]
    if want.shape != slim.shape or not torch.allclose(want, slim, rtol=1e-6, atol=1e-9):
        raise ExportError(
            f"{what}: at width {width:g} it does not give what it gives in the full model when the "
            "channels beyond are zero; something before it mixes channels (a concatenation, a "
            "shuffle, a flatten with the channels last, attention, a function with f(0) != 0)"
        )


def mask_channels(module: nn.Module, input: Tensor, h: Tensor, width: Tensor) -> Tensor:
    """Output of a layer with zeros in the channels beyond a width.

    A LayerNorm is computed again over the remaining channels, since zeros would enter its mean.

    Args:
        module: a convolution, linear layer or norm.
        input: input of the layer.
        h: output of the layer.
        width: fraction of the channels that remains, a float32 scalar.
    """
    if isinstance(module, nn.LayerNorm):
        kept = leading_channels(h.shape[-1], width).to(h.dtype)
        count = kept.sum()
        centred = (input - (input * kept).sum(-1, keepdim=True) / count) * kept
        variance = (centred * centred).sum(-1, keepdim=True) / count
        h = centred * torch.rsqrt(variance + module.eps)
        h = h if module.weight is None else h * module.weight
        return (h if module.bias is None else h + module.bias) * kept
    axis = h.dim() - 1 if isinstance(module, nn.Linear) else 1
    if isinstance(module, CONVOLUTIONS):
        axis = h.dim() - 1 - len(module.kernel_size)
    kept = leading_channels(h.shape[axis], width).to(h.dtype)
    return h * kept.reshape(-1, *[1] * (h.dim() - 1 - axis))


def leading_channels(channels: int, width: Tensor) -> Tensor:
    """Boolean mask (channels,) of the channels that remain at a width.

    The width leaves a whole number of channels up to rounding.
    """
    middles = torch.arange(channels, device=width.device).to(torch.float32) + 0.5
    return middles < width * channels


def called(name: str, module: nn.Module) -> str:
    return f"{name} is a {type(module).__name__}"
