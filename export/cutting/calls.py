"""Records the calls of a model's modules, to name the one that fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.weight_norm import WeightNorm

from export.torch_internals import forward_hooks


@dataclass
class Calls:
    """Recorded calls of modules.

    Attributes:
        entered: each called module with its arguments, by name, in the order of the calls.
        finished: names of the modules that returned, in that order.
    """

    entered: dict[str, tuple[nn.Module, tuple[Any, dict[str, Any]]]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)

    def unfinished(self) -> str:
        """Name and class of the innermost module that did not return."""
        name = next(n for n in reversed(self.entered) if n not in self.finished)
        return called(name, self.entered[name][0])


@contextmanager
def recorded(root: nn.Module, prefix: str = "") -> Iterator[Calls]:
    """Record the first call of every module in ``root`` inside the block.

    Args:
        root: module whose calls are recorded, with all its submodules.
        prefix: name of ``root`` in messages.
    """
    calls = Calls()
    handles = []
    for name, module in root.named_modules(prefix=prefix):

        def enter(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            calls.entered.setdefault(name, (module, (args, kwargs)))

        def leave(module: nn.Module, args: Any, result: Any, name: str = name) -> None:
            if name not in calls.finished:
                calls.finished.append(name)

        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, so that a call in training mode does not change the statistics."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def forget_computed_weights(module: nn.Module) -> None:
    """Detach the weights that ``torch.nn.utils.weight_norm`` computes before every call.

    They keep the graph of the last call, and a module with such a tensor cannot be copied.
    """
    for part in module.modules():
        for hook in (hook for hooks in forward_hooks(part) for hook in hooks.values()):
            if isinstance(hook, WeightNorm):
                setattr(part, hook.name, getattr(part, f"{hook.name}_v").detach())


def called(name: str, module: nn.Module) -> str:
    """Name and class of a module for messages: ``block.2.pool is a Pool``."""
    return f"{name} is a {type(module).__name__}"
