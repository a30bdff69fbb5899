"""Splits a wide model by width into narrow base networks (Split-Mix).

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747) divides a network into ``K``
base networks of one structure that share no parameters. A device trains as many as its budget
allows, and answers with the mean of the logits of any number of them.

In a base, each inner layer of a convolutional network or MLP has ``1/K`` of the channels. A
transformer keeps the width of its residual stream; each attention has ``1/K`` of the heads, and
each MLP ``1/K`` of the hidden units.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.bases.dual_norms import DualNorm, is_norm, with_dual_norms
from export.bases.narrow import answers_of, find_layers, narrow
from export.bases.transformer_units import (
    check_division,
    divide,
    fan_in,
    find_units,
    is_attention,
    is_weight,
)
from export.cutting.heads import TokenHead
from export.cutting.pretrained import TransformersModel
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.tensor_names import is_statistic


@dataclass(frozen=True)
class Bases:
    """The base networks of a model.

    Attributes:
        model: one base network, rescaling included, with the initial weights of the first base.
        states: initial tensors of each base, with the names of ``model.trained()``.
    """

    model: SplitModel
    states: list[dict[str, Tensor]]

    def with_dual_norms(self) -> Bases:
        """The same bases with dual norms; both copies of a norm start as the norm.

        Raises:
            ExportError: as :func:`export.bases.dual_norms.with_dual_norms`.
        """
        model = with_dual_norms(self.model)
        norms = [n for n, m in model.named_modules() if isinstance(m, DualNorm)]
        names = {
            f"{norm}.{copied}.{own}": f"{norm}.{own}"
            for norm in norms
            for copied in ("clean", "noise")
            for own in dict(model.get_submodule(f"{norm}.clean").state_dict())
        }
        states = [
            {name: state[names.get(name, name)].clone() for name in model.trained()}
            for state in self.states
        ]
        return Bases(model, states)


def split_width(model: SplitModel, bases: int, example: Tensor, *, seed: int = 0) -> Bases:
    """Split a model by width into independent base networks, newly initialised.

    The base networks keep the model's embeddings, positions, class tokens, and
    :class:`~export.cutting.heads.TokenHead`, and the leading slices of its frozen parameters.
    Weights of convolutions and linear layers are drawn uniformly within ``1 / sqrt(fan_in)``, as in
    torch, with the fan-in of the *wide* layer. Biases start at 0, norms as the identity.

    The output of a layer that lost inputs, bias included, is multiplied by ``bases``. The
    classifier is not rescaled, nor a layer whose output only enters a norm, where a factor cancels.

    Add auxiliary heads to the base afterwards: heads of the model become narrower as well.

    Args:
        model: a model that :func:`export.bases.narrow.narrow` takes, or a transformer of
            :func:`export.cutting.pretrained.from_transformers`.
        bases: number of base networks, ``K``.
        example: inputs (batch, ...) like those on the devices.
        seed: seed of the initialisation, 0 or more; each base draws from the seed and its number.

    Raises:
        ExportError: ``bases`` is not a positive integer; channels, heads or hidden units of a
            layer are not divisible by it; or a module is of a kind that cannot be split.
    """
    if not isinstance(bases, int) or isinstance(bases, bool) or bases < 1:
        raise ExportError(f"the number of bases is {bases!r}; it must be a whole number, 1 or more")
    transformer = any(is_attention(module) for module in model.block.modules())
    if transformer:
        units = find_units(model, bases)
        check_division(model, units, bases, example)
        base = divide(model, units, bases)
        classifiers: set[str] = set()  # the classifier of a transformer loses no inputs
    else:
        try:
            base = narrow(model, 1 / bases, example)
        except ExportError as error:
            raise ExportError(f"the model cannot be split into {bases} bases: {error}") from error
        classifiers = {n.name for n in find_layers(base, example) if n.keeps_output}
    if isinstance(base, TransformersModel):
        base = _without_origin(base)
    wide = {n: fan_in(m) for n, m in model.named_modules() if is_weight(m)}
    rescaled = [
        name
        for name, inputs in wide.items()
        if fan_in(base.get_submodule(name)) < inputs and name not in classifiers
    ]
    for name in sorted(set(rescaled) - _under_norms(base, rescaled, example)):
        base.get_submodule(name).register_forward_hook(Rescaling(bases))
    bounds = {name: inputs**-0.5 for name, inputs in wide.items()}  # torch's bounds if bases is 1
    states = [_start(base, bounds, _generator(seed, number)) for number in range(bases)]
    with torch.no_grad():
        for name, tensor in base.trained().items():
            tensor.copy_(states[0][name])
        for name, counter in base.named_buffers():
            if name.endswith(".num_batches_tracked"):
                counter.zero_()
    return Bases(base, states)


class Rescaling:
    """Forward hook that multiplies the output of a layer that lost inputs.

    It multiplies in training and in evaluation, so that the network that answers is the network
    that was trained. The paper's code multiplies in training only and relies on norms.

    Args:
        factor: number of inputs of the wide layer divided by that of this layer.
    """

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, module: nn.Module, args: Any, h: Tensor) -> Tensor:
        """``factor * h``."""
        return h * self.factor


def _without_origin(model: TransformersModel) -> SplitModel:
    """The same layers as a plain SplitModel: no transformers model has these sizes to save as."""
    result = SplitModel(
        model.stem, list(model.block), model.head, model.task, channels=model.channels
    )
    result.aux, result.training, result.layout = model.aux, model.training, model.layout
    return result


# -- initialisation


def _generator(seed: int, base: int) -> torch.Generator:
    drawn = np.random.SeedSequence([seed, base]).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(drawn[0]))


def _start(
    base: SplitModel, bounds: Mapping[str, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Initial values of the trained tensors of one base network.

    Args:
        base: a base network.
        bounds: largest magnitude of an initial weight, by name of the layer.
        generator: source of the weights.
    """
    kept = {
        p
        for module in base.modules()
        if isinstance(module, (nn.Embedding, TokenHead))  # a classifier may be tied to the table
        for p in module.parameters()
    }
    fresh: dict[Tensor, Tensor] = {}
    for name, module in base.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if p in kept or p in fresh:
                continue
            if name in bounds and own == "weight":
                drawn = torch.empty(p.shape, dtype=p.dtype)
                drawn.uniform_(-bounds[name], bounds[name], generator=generator)
                fresh[p] = drawn.to(p.device)
            elif name in bounds or (is_norm(module) and own == "bias"):
                fresh[p] = torch.zeros_like(p)
            elif is_norm(module):
                fresh[p] = torch.ones_like(p)
    return {
        name: torch.full_like(tensor, float(name.endswith("var")))
        if is_statistic(name)
        else fresh.get(tensor, tensor).detach().clone()
        for name, tensor in base.trained().items()
    }


# -- rescaling


def _under_norms(model: SplitModel, names: list[str], example: Tensor) -> set[str]:
    """Names of the given layers whose output enters a norm and nothing else.

    The data flow is read from autograd's graph of the logits: the node of such an output is one
    that a norm receives, unchanged, and exactly one node reads it. The output of a block counts as
    read once more, because a head may be added there.
    """
    model = copy.deepcopy(model).cpu().double().eval().requires_grad_(True)
    made: dict[str, list[Any]] = {name: [] for name in names}
    received: set[Any] = set()
    readers: Counter[Any] = Counter()

    def on(module: nn.Module, note: Callable[[Any], None]) -> None:
        module.register_forward_hook(lambda module, args, h: note(h.grad_fn))

    for name, nodes in made.items():
        on(model.get_submodule(name), nodes.append)
    for stage in (model.stem, *model.block):
        on(stage, lambda node: readers.update([node]))
    for module in model.modules():
        if is_norm(module):
            module.register_forward_pre_hook(lambda module, args: received.add(args[0].grad_fn))
    x = example[:2].detach().cpu()
    with torch.enable_grad():
        answers = answers_of(
            model,
            x.double() if x.is_floating_point() else x,
            "on the example",
            "give some inputs as devices have them",
        )
    todo, seen = [logits.grad_fn for logits in answers], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = [n for n, _ in node.next_functions if n is not None]
        readers.update(before)
        todo.extend(before)
    return {
        name
        for name, nodes in made.items()
        if all(node in received and readers[node] == 1 for node in nodes)
    }
