"""Narrow versions of a model: the leading channels of every layer, and training them in one.

HeteroFL (Diao et al., ICLR 2021, https://arxiv.org/abs/2010.01264) gives a device of width ``p``
the leading part ``p`` of the channels of every layer, so that narrow models are nested in wide
ones: :func:`narrow`. FjORD (Horvath et al., NeurIPS 2021, https://arxiv.org/abs/2102.13451) also
trains the narrower models inside of the device's own: every step draws a width, and the channels
beyond it are dropped in all layers ("ordered dropout"): :func:`ordered_dropout`.

Which sizes stay is found by running the model, not by names: the channels of the input stay where
no convolution or linear layer came before, those of the answers where none comes after.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.dropout import CONVOLUTIONS, OrderedDropout, mask_channels, remove_ordered_dropout
from export.errors import ExportError, reason
from export.flops import flops_per_row
from export.split import SplitModel, answer
from export.steps import Step

_WEIGHTS = (*CONVOLUTIONS, nn.Linear)
_NORMS = (nn.GroupNorm, nn.LayerNorm, _NormBase)

_TOLERANCE = 1e-6
"""How far a width times a number of channels may be from a whole number: widths are like 1/3."""


def narrow(model: SplitModel, width: float, example: Tensor) -> SplitModel:
    """A copy of a model whose inner layers have the leading part of their channels.

    Weights are the leading slices ``full[:n0, :n1, ...]`` and keep their names. The channels of
    the input and the classes of the answers stay, those of auxiliary heads as well. Groups of a
    GroupNorm or a convolution keep their size and become fewer. The copy has no ordered dropout.

    Args:
        model: of convolutions, linear layers and norms, auxiliary heads included.
        width: part of the channels, above 0 and at most 1.
        example: some inputs (batch, ...) like those that devices will have.

    Raises:
        ExportError: a layer of another kind; a width that does not give whole channels or groups;
            or the copy does not compute what the full model computes when the channels beyond
            ``width`` are zero, because something mixes channels (a concatenation, a flatten with
            the channels last). Names the layer.
    """
    _check_width(width)
    layers = find_layers(model, example)
    result = _slice(model, layers, width)
    _check(model, layers, width, example)
    return result


def ordered_dropout(model: SplitModel, widths: Sequence[float], example: Tensor) -> None:
    """Make training steps draw one of ``widths`` and train the narrow model of that width.

    In training mode under a :class:`export.dropout.SeededDropout` every step draws a width from
    its seed, the same for all layers, and what a convolution, linear layer or norm gives beyond the
    leading part is zero. A LayerNorm is computed over the channels that are left. So loss and
    gradients are those of :func:`narrow` at this width: the gradients of the leading slices are
    equal, all others zero. Running statistics of batch norms move where channels are left. In
    evaluation, and in training without a seed, nothing is dropped.

    A gradient of zero does not mean that a weight stays: weight decay and momentum still move the
    weights beyond the width, as in any implementation by masks. A step costs what it costs at full
    width. The model gets forward hooks, no parameters; a second call replaces the widths.

    Args:
        model: what :func:`narrow` takes.
        widths: what is drawn from, each as likely.
        example: some inputs (batch, ...) like those that devices will have.

    Raises:
        ExportError: :func:`narrow` refuses the model at one of the widths. Nothing was changed.
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


def widths_within(
    model: SplitModel, budgets: Mapping[str, float], widths: Sequence[float], example: Tensor
) -> dict[str, float]:
    """The largest of ``widths`` that each tier can train.

    Args:
        model: what :func:`narrow` takes.
        budgets: by tier, FLOPs of a training step per example, see :func:`step_flops`.
        widths: what there is to choose from.
        example: some inputs (batch, ...) like those that devices will have.

    Raises:
        ExportError: the smallest width takes more than a tier has; or :func:`narrow` refuses the
            model at one of the widths.
    """
    if not widths:
        raise ExportError("there are no widths to choose from; give some, [0.5, 1.0]")
    needs = {w: step_flops(narrow(model, w, example), example) for w in sorted(set(widths))}
    least = min(needs)
    chosen = {}
    for tier, budget in budgets.items():
        if needs[least] > budget:
            raise ExportError(
                f"tier {tier!r} has {budget:.6g} FLOPs per example, and the smallest width, "
                f"{least:g}, takes {needs[least]:.6g}; add a smaller width or raise its budget"
            )
        chosen[tier] = max(w for w, need in needs.items() if need <= budget)
    return chosen


def step_flops(model: SplitModel, example: Tensor) -> float:
    """FLOPs per example of a training step of the whole model, without its auxiliary heads.

    Forward and backward: matrix products and convolutions, as ``torch.utils.flop_counter`` counts
    them.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    model = copy.deepcopy(model).train()

    def function(constants: dict[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
        trained = {n: constants[n].detach().requires_grad_() for n in names}
        logits = functional_call(model, {**constants, **trained}, (x,))
        return torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)

    dtype = str(example.dtype).removeprefix("torch.")
    x = Port(TensorSpec("x", dtype, ("batch", *example.shape[1:])), "batch")
    step = Step("train", function, (x,), (), {n: t.detach() for n, t in tensors.items()})
    return flops_per_row(step)


@dataclass(frozen=True)
class Layer:
    """A layer with channels, and what of it has the same size at every width.

    Attributes:
        name: of the module.
        keeps_input: it reads the channels of the model's input.
        keeps_output: what it gives are classes; of a norm, channels that are not narrowed.
    """

    name: str
    keeps_input: bool
    keeps_output: bool


def _check_width(width: float) -> None:
    if not 0 < width <= 1:
        raise ExportError(f"the width is {width:g}; it must be above 0 and at most 1")


def find_layers(model: SplitModel, example: Tensor) -> list[Layer]:
    """The layers that have channels, in the order in which they are called.

    Autograd tells the data flow. With gradients for the weights of convolutions and linear layers
    only, a tensor that needs no gradient has the channels of the input; and the layers that give
    the answers are the first ones on the way back from the logits.
    """
    _check_kinds(model)
    model = copy.deepcopy(model).cpu().double().eval()
    remove_ordered_dropout(model)
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
    """Raise for the first module whose parameters nothing is known of."""
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
    """Logits of the auxiliary heads, shallowest first, and of the head. Puts hooks on the model."""
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
    except Exception as error:  # a model's code runs: anything can come out
        failed = called(running[-1], model.get_submodule(running[-1]))
        raise ExportError(f"{failed} and fails {where}: {reason(error)}; {advice}") from error


def _slice(model: SplitModel, layers: Sequence[Layer], width: float) -> SplitModel:
    """A copy with the leading part of the channels."""
    result = copy.deepcopy(model)
    remove_ordered_dropout(result)
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
    """Give a layer the sizes that it has at a width: input channels of its weight, and output.

    The first is None where a weight has all of them: a group's.
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
    assert isinstance(module, _NormBase)
    module.num_features = part(module.num_features, "channels", layer.keeps_output)
    return None, module.num_features


def _check(model: SplitModel, layers: Sequence[Layer], width: float, example: Tensor) -> None:
    """Compare the narrow model with the masked one, for random weights, in float64.

    Random ones, because a layer that starts at zero hides what comes before it.
    """
    full = copy.deepcopy(model).cpu().double().eval()
    remove_ordered_dropout(full)
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
    """What every layer gives in its last call, and the answers."""
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


def called(name: str, module: nn.Module) -> str:
    return f"{name} is a {type(module).__name__}"
