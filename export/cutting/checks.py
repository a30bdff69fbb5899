"""Checks that the stem and the first blocks of a model can be exported exactly."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.spectral_norm import SpectralNorm

from export.cutting.calls import called, copied_buffers, recorded
from export.cutting.seeded_random import SeededDropout, unseeded
from export.cutting.split_model import ClientSegment, SplitModel, modes_kept, statistics
from export.errors import ExportError, reason
from export.tensor_names import is_statistic, layer_of
from export.torch_internals import NormBase, SpectralNormBase, forward_hooks

_ALPHA = "there is no exact translation of its random numbers; use nn.Dropout"

_ANY_LENGTH = (
    "a recurrent layer is exported for texts of one length, and a model with a label per position "
    "takes any; predict the next token of a text of fixed length (a model of classes), use "
    "attention, or cut before it"
)

REPLACEMENTS: dict[type[nn.Module], str] = {
    nn.SyncBatchNorm: "a device has no group to synchronise with; use nn.BatchNorm2d",
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
                raise ExportError(f"{called(name, module)}: {why}")
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and module.dropout > 0:
            raise ExportError(
                f"{called(name, module)} with dropout between its layers, which has random "
                "numbers of its own; use layers of one with nn.Dropout between them"
            )
        if isinstance(module, SpectralNormBase) or any(
            isinstance(hook, SpectralNorm)
            for hooks in forward_hooks(module)
            for hook in hooks.values()
        ):
            raise ExportError(
                f"{called(name, module)} with spectral_norm, whose power iteration changes vectors "
                "in every step that devices do not share; remove it (remove_spectral_norm, "
                "remove_parametrizations), or use weight_norm"
            )
        tracks = isinstance(module, NormBase) and module.track_running_stats
        if tracks and module.momentum is None:
            raise ExportError(
                f"{called(name, module)} with momentum=None: a cumulative average needs a count "
                "that devices do not share; give it a momentum"
            )


def is_recurrent(module: nn.Module) -> bool:
    """Whether a module has recurrent layers, which are exported for one length."""
    return any(isinstance(part, nn.RNNBase | nn.RNNCellBase) for part in module.modules())


def check_stages(model: SplitModel, cut: int, example: Tensor) -> None:
    """Check the stem and the first blocks, and run them on several batch sizes.

    Args:
        model: the model; its buffers and modes are restored.
        cut: number of blocks to check.
        example: inputs (batch, ...) like those on the devices.

    Raises:
        ExportError: a module has no exact translation, fails, fixes the batch size, changes a
            buffer, or draws random numbers that do not come from the step's seed; or a stage does
            not return one float32 tensor with a row for each example.
    """
    stages = {"stem": model.stem, **{f"block.{i}": b for i, b in enumerate(model.block[:cut])}}
    if model.task == "tokens":
        for stage_name, stage in stages.items():
            for name, module in stage.named_modules(prefix=stage_name):
                if isinstance(module, nn.RNNBase | nn.RNNCellBase):
                    raise ExportError(f"{called(name, module)}: {_ANY_LENGTH}")
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

    Each side trains a copy of its own, and nothing would make the copies equal again. A parameter
    that only the stem and heads share is not meant: each side computes its part of the gradient,
    and the hub adds what both have changed (:mod:`export.cutting.tied`).
    """
    on_device = set(model.client_layers(cut))
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        own = module.named_parameters(path, recurse=False)
        trained: dict[str, Tensor] = {n: p for n, p in own if p.requires_grad}
        if isinstance(module, NormBase):
            trained |= statistics(module, path)
        for name, tensor in trained.items():
            owners.setdefault(id(tensor), []).append(name)
    for names in owners.values():
        layers = {layer_of(name) for name in names}
        tied = "stem" in layers and not any(map(is_statistic, names))
        tied = tied and all(
            layer in ("stem", "head") or layer.startswith("aux.") for layer in layers
        )
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
            with SeededDropout(torch.zeros((), dtype=torch.int64)):
                h = _run_stage(name, stage.train(), h, fewer=rows < len(example))
    h = example[:2]
    for name, stage in stages.items():
        h = _run_stage(name, stage.eval(), h)


def _run_stage(name: str, stage: nn.Module, h: Tensor, fewer: bool = False) -> Tensor:
    """Output of a stage, which must have a row for each row of ``h``.

    Args:
        name: name of the stage.
        stage: stem or block.
        h: its input (rows, ...).
        fewer: whether these are fewer rows than the example has.
    """
    rows, drawn = len(h), (random.getstate(), np.random.get_state())
    with torch.no_grad(), unseeded(), recorded(stage, name) as calls:
        try:
            result = stage(h)
        except ExportError as error:
            raise ExportError(f"{calls.unfinished()}: {error}") from error
        except Exception as error:
            if rows == 1 and "Expected more than 1 value per channel" in str(error):
                return _evaluated(stage, h)
            fails = f"{calls.unfinished()} and fails on a batch of {rows}: {reason(error)}"
            if fewer:
                fails += "; it must take any batch: use x.shape[0] in place of a number"
            raise ExportError(fails) from error
    # the state of NumPy ends with a position that every draw changes
    if str(drawn) != str((random.getstate(), np.random.get_state())):
        raise ExportError(
            f"{called(name, stage)}: it draws random numbers of Python or NumPy, which a graph "
            "would keep for every step; use torch.rand or dropout, which take theirs from the "
            "step's seed"
        )
    if (
        not isinstance(result, Tensor)
        or result.dtype != torch.float32
        or result.shape[:1] != (rows,)
    ):
        found = (
            f"{result.dtype} {list(result.shape)}"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        raise ExportError(
            f"{called(name, stage)} and returns {found} for a batch of {rows}; it must "
            f"return one float32 tensor of shape [{rows}, ...]"
        )
    return result


def _evaluated(stage: nn.Module, h: Tensor) -> Tensor:
    """Output in evaluation mode: batch norms have no variance of a single value in training."""
    with torch.no_grad():
        result: Tensor = stage.eval()(h)
    return result


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
    # two rows are enough to see what a gradient reaches
    _, logits = functional_call(segment, copied_buffers(segment), (example[:2],))
    gradients = torch.autograd.grad(
        logits.sum(), list(parameters.values()), allow_unused=True, materialize_grads=False
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ExportError(
                f"{name} does not affect the segment's logits; remove it, or freeze it "
                "(requires_grad_(False))"
            )
