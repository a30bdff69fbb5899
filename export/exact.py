"""Checks that a model can be exported exactly, and finds the module that makes an export fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_flatten, tree_unflatten

from edge_sdk.bundle.manifest import Port
from edge_sdk.protocol.tensors import TensorSpec
from export.dropout import SeededDropout
from export.errors import ExportError, reason
from export.names import layer_of
from export.split import ClientSegment, SplitModel, modes_kept, statistics
from export.steps import Step

_ALPHA = "there is no exact translation of its random numbers; use nn.Dropout"

REPLACEMENTS: dict[type[nn.Module], str] = {
    nn.SyncBatchNorm: "a device has no group to synchronise with; use nn.BatchNorm2d",
    nn.AlphaDropout: _ALPHA,
    nn.FeatureAlphaDropout: _ALPHA,
    nn.RReLU: _ALPHA,
}
"""Modules that are refused in a client segment, with the reason and a replacement."""


def check_modules(root: nn.Module, prefix: str = "") -> None:
    """Raise :class:`ExportError` for the first module that has no exact translation.

    Args:
        root: module to check, with all its submodules.
        prefix: name of ``root`` in messages.
    """
    for name, module in root.named_modules(prefix=prefix):
        for kind, why in REPLACEMENTS.items():
            if isinstance(module, kind):
                raise ExportError(f"{_called(name, module)}: {why}")
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and module.dropout > 0:
            raise ExportError(
                f"{_called(name, module)} with dropout between its layers, which has random "
                "numbers of its own; use layers of one with nn.Dropout between them"
            )
        tracks = isinstance(module, _NormBase) and module.track_running_stats
        if tracks and module.momentum is None:
            raise ExportError(
                f"{_called(name, module)} with momentum=None: a cumulative average needs a count "
                "that devices do not share; give it a momentum"
            )


def check_stages(model: SplitModel, cut: int, example: Tensor) -> None:
    """Check the stem and the first blocks, and run them in training mode on several batch sizes.

    Args:
        model: the model; its buffers and modes are restored.
        cut: number of blocks to check.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: a module has no exact translation, fails, fixes the batch size, or changes a
            buffer; or a stage does not return one float32 tensor with a row for each example.
    """
    stages = {"stem": model.stem, **{f"block.{i}": b for i, b in enumerate(model.block[:cut])}}
    for name, stage in stages.items():
        check_modules(stage, name)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    trained = statistics(model)
    try:
        with modes_kept(model):
            _run_stages(stages, example)
    finally:
        changed = [n for n, b in model.named_buffers() if not torch.equal(b, buffers[n])]
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
    for name in changed:
        if name not in trained and not name.endswith("num_batches_tracked"):
            raise ExportError(
                f"{name} changes when the model is called: the state of a device consists of "
                "parameters and the statistics of batch norms; make it a parameter, or do not "
                "change it"
            )


def check_sharing(model: SplitModel, cut: int) -> None:
    """Raise :class:`ExportError` if both sides of a cut would train the same tensor.

    Each side trains a copy of its own, and nothing would make the copies equal again. A table that
    only the stem and heads share is not meant: methods say which side trains it.
    """
    on_device = set(model.client_layers(cut))
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = module.named_parameters(path, recurse=False)
        trained: dict[str, Tensor] = {n: p for n, p in own if p.requires_grad}
        if isinstance(module, _NormBase):
            trained |= statistics(module, path)
        for name, tensor in trained.items():
            owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        layers = {layer_of(name) for name in names}
        tied = all(layer in ("stem", "head") or layer.startswith("aux.") for layer in layers)
        if layers & on_device and layers - on_device and not tied:
            device = next(name for name in names if layer_of(name) in on_device)
            hub = next(name for name in names if layer_of(name) not in on_device)
            raise ExportError(
                f"{device} on the device and {hub} on the hub are the same tensor at cut {cut}, "
                "and each side would train its own copy; cut where no layers share parameters, "
                "freeze it, or give each block parameters of its own (copy.deepcopy)"
            )


def _run_stages(stages: Mapping[str, nn.Module], example: Tensor) -> None:
    for rows in (len(example), 1, 2):
        h = example[:rows]
        for name, stage in stages.items():
            seeded = SeededDropout(torch.zeros((), dtype=torch.int64))
            with torch.no_grad(), seeded, _recorded(stage.train(), name) as calls:
                try:
                    h = stage(h)
                except Exception as error:
                    fails = f"{calls.unfinished()} and fails on a batch of {rows}: {reason(error)}"
                    if rows < len(example):
                        fails += "; it must take any batch: use x.shape[0] in place of a number"
                    raise ExportError(fails) from error
            if not isinstance(h, Tensor) or h.dtype != torch.float32 or h.shape[:1] != (rows,):
                found = f"{h.dtype} {list(h.shape)}" if isinstance(h, Tensor) else type(h).__name__
                raise ExportError(
                    f"{_called(name, stage)} and returns {found} for a batch of {rows}; it must "
                    f"return one float32 tensor of shape [{rows}, ...]"
                )


def check_parameters(segment: ClientSegment, example: Tensor) -> None:
    """Raise :class:`ExportError` for a parameter that a training step cannot train.

    Every parameter must be float32, and every trained one must have a gradient.
    """
    parameters = {
        n: p
        for n, p in segment.named_parameters()
        if p.requires_grad and not n.startswith("head.")  # the head reads features from the hub
    }
    for name, p in segment.named_parameters():
        if p.dtype != torch.float32:
            raise ExportError(f"{name} is {p.dtype}; parameters must be float32")
    _, logits = functional_call(segment, _copied_buffers(segment), (example,))
    gradients = torch.autograd.grad(
        logits.sum(), list(parameters.values()), allow_unused=True, materialize_grads=False
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ExportError(
                f"{name} does not affect the segment's logits; remove it, or freeze it "
                "(requires_grad_(False))"
            )


def find_culprit(
    segment: ClientSegment, example: Tensor, lower: Callable[[Step], object]
) -> str | None:
    """The first module whose training step cannot be lowered alone, as ``block.2.pool is a Pool``.

    Modules are tried in the order in which their calls return, so inner modules come first.

    Args:
        segment: segment whose export failed.
        example: inputs (batch, ...) of the segment.
        lower: lowers a step, or raises :class:`ExportError`.

    Returns:
        Name and class of the module; None if every module can be lowered alone.
    """
    with torch.no_grad(), _recorded(segment) as calls:
        functional_call(segment, _copied_buffers(segment), (example,))
    for name in calls.finished:
        module, arguments = calls.entered[name]
        if name:
            try:
                lower(_alone(module, arguments, len(example)))
            except ExportError:
                return _called(name, module)
    return None


def _alone(module: nn.Module, arguments: tuple[Any, dict[str, Any]], rows: int) -> Step:
    """A step that runs one module forward and backward on inputs like its recorded arguments."""
    leaves, layout = tree_flatten(arguments)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    parameters = dict(module.named_parameters())

    def function(constants: dict[str, Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
        tensors = tuple(
            t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors
        )
        given = list(leaves)
        for place, tensor in zip(places, tensors[len(parameters) :], strict=True):
            given[place] = tensor
        args, kwargs = tree_unflatten(given, layout)
        result = functional_call(
            module, dict(zip(parameters, tensors, strict=False)), tuple(args), kwargs
        )
        results = [
            torch.view_as_real(t) if t.is_complex() else t
            for t in tree_flatten(result)[0]
            if isinstance(t, Tensor)
        ]
        loss = torch.stack([(t * t).sum() for t in results]).sum()
        wanted = [t for t in tensors if t.requires_grad]
        if not loss.requires_grad or not wanted:
            return (loss,)
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
        return (loss.detach(), *(g for g in gradients if g is not None))

    def port(number: int, tensor: Tensor, shape: tuple[int | str, ...]) -> Port:
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Port(TensorSpec(f"t{number}", dtype, shape), "batch")

    inputs = [port(i, p, tuple(p.shape)) for i, p in enumerate(parameters.values())]
    for place in places:
        leaf = leaves[place]
        batched = leaf.dim() > 0 and leaf.shape[0] == rows
        shape = ("batch", *leaf.shape[1:]) if batched else tuple(leaf.shape)
        inputs.append(port(len(inputs), leaf, shape))
    return Step("module", function, tuple(inputs), ())


@dataclass
class _Calls:
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
        return _called(name, self.entered[name][0])


@contextmanager
def _recorded(root: nn.Module, prefix: str = "") -> Iterator[_Calls]:
    """Record the first call of every module in ``root``."""
    calls = _Calls()
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


def _copied_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers, so that a call in training mode does not change the statistics."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _called(name: str, module: nn.Module) -> str:
    return f"{name} is a {type(module).__name__}"
