"""Makes a SplitModel of any module, from the dotted names of its stem, blocks and head."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from export.cutting.channels import Channels
from export.cutting.split_model import SplitModel, Task
from export.errors import ExportError, reason

Part = str | Callable[[Tensor], Tensor]
"""Dotted name of a submodule, or a function of the activations."""


class Apply(nn.Module):
    """A function as a module.

    Args:
        function: takes one tensor and returns one.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        """``function(h)``."""
        return self.function(h)


class TokenParts(nn.Sequential):
    """A stem for tokens that runs its parts in order."""

    @property
    def embedding(self) -> nn.Embedding | None:
        """The first embedding among the parts, which is that of the tokens."""
        return next((m for m in self.modules() if isinstance(m, nn.Embedding)), None)


def from_module(
    module: nn.Module,
    *,
    stem: Part | Sequence[Part],
    blocks: str | Sequence[str],
    head: Part | Sequence[Part],
    example: Tensor | None = None,
    task: Task = "classes",
    channels: Channels | None = None,
) -> SplitModel:
    """Make a SplitModel of a module that runs a stem, a list of blocks and a head in order.

    The SplitModel shares the module's layers::

        from_module(
            resnet,
            stem=["conv1", "bn1", "relu", "maxpool"],
            blocks=["layer1", "layer2", "layer3", "layer4"],
            head=["avgpool", lambda h: h.flatten(1), "fc"],
            example=images,
        )

    Args:
        module: the module to cut.
        stem: the parts before the blocks: a name, or names and functions in order.
        blocks: name of an ``nn.ModuleList`` or ``nn.Sequential``, or names of blocks and of such
            containers in order.
        head: the parts after the blocks, like ``stem``.
        example: inputs (batch, ...) on which the parts in order must return the module's logits,
            in evaluation mode. Without an example nothing is checked.
        task: task of the model.
        channels: where activations have their channels, see :class:`SplitModel`.

    Raises:
        ExportError: the module has no part of a given name, or the parts in order do not compute
            what the module computes.
    """
    if example is not None:
        twin = copy.deepcopy(module).eval()
        _compare(twin, _split(twin, stem, blocks, head, task, channels).eval(), example)
    return _split(module, stem, blocks, head, task, channels)


def from_layers(
    layers: Sequence[nn.Module], task: Task = "classes", channels: Channels | None = None
) -> SplitModel:
    """Make a SplitModel of layers that run in order: the first is the stem, the last the head.

    Args:
        layers: the layers.
        task: task of the model.
        channels: where activations have their channels, see :class:`SplitModel`.

    Raises:
        ExportError: there are fewer than 4 layers.
    """
    if len(layers) < 4:
        raise ExportError(
            f"{len(layers)} layers cannot be cut; there must be a stem, 2 blocks or more, a head"
        )
    first, *blocks, last = layers
    return SplitModel(_joined([first], task), blocks, last, task, channels=channels)


def _split(
    module: nn.Module,
    stem: Part | Sequence[Part],
    blocks: str | Sequence[str],
    head: Part | Sequence[Part],
    task: Task,
    channels: Channels | None,
) -> SplitModel:
    model = SplitModel(
        _joined(_parts(module, stem), task),
        _blocks(module, blocks),
        _joined(_parts(module, head), "classes"),
        task,
        channels=channels,
    )
    names = {id(tensor): name for name, tensor in module.state_dict(keep_vars=True).items()}
    own = model.state_dict(keep_vars=True)
    model.original_names = {name: names[id(t)] for name, t in own.items() if id(t) in names}
    return model


def _parts(module: nn.Module, part: Part | Sequence[Part]) -> list[nn.Module]:
    parts = [part] if isinstance(part, str) or callable(part) else part
    return [_find(module, p) if isinstance(p, str) else Apply(p) for p in parts]


def _joined(parts: list[nn.Module], task: Task) -> nn.Module:
    if (
        task == "tokens"
        and getattr(parts[0] if len(parts) == 1 else None, "embedding", None) is None
    ):
        return TokenParts(*parts)
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _blocks(module: nn.Module, names: str | Sequence[str]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for name in [names] if isinstance(names, str) else names:
        part = _find(module, name)
        if isinstance(part, nn.ModuleList | nn.Sequential):
            found += part
        elif isinstance(names, str):
            raise ExportError(
                f"{name} is a {type(part).__name__}, not a list of blocks; name an nn.ModuleList "
                "or nn.Sequential, or every block"
            )
        else:
            found.append(part)
    return found


def _find(module: nn.Module, name: str) -> nn.Module:
    try:
        return module.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in module.named_modules() if n]
        close = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:3]
        raise ExportError(
            f"{type(module).__name__} has no module {name!r}; close to it: {', '.join(close)}"
        ) from None


def _compare(module: nn.Module, model: SplitModel, example: Tensor) -> None:
    with torch.no_grad():
        expected = module(example)
        try:
            found = model(example)
        except Exception as error:
            raise ExportError(
                f"the parts do not fit one after the other: {reason(error)}"
            ) from error
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        raise ExportError(
            f"the module returns a {type(expected).__name__}, its parts a {type(found).__name__}; "
            "both must return logits, one tensor"
        )
    if expected.shape != found.shape:
        difference = f"logits are {list(found.shape)} instead of {list(expected.shape)}"
    elif not torch.allclose(expected, found, rtol=1e-4, atol=1e-5):
        difference = f"logits differ by up to {(expected - found).abs().max():.3g}"
    else:
        return
    raise ExportError(
        f"the parts in order are not what the module does ({difference}): it runs code between "
        "them, or a connection skips over blocks; name that code as a function, or write the stem, "
        "blocks and head as modules"
    )
