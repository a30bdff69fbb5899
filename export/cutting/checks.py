"""Checks that the stem and the first blocks of a model can be exported exactly."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from export.cutting.calls import called, copied_buffers, recorded
from export.cutting.seeded_random import SeededDropout
from export.cutting.split_model import ClientSegment, SplitModel, modes_kept, statistics
from export.errors import ExportError, reason
from export.tensor_names import is_statistic, layer_of
from export.torch_internals import NormBase

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
                raise ExportError(f"{called(name, module)}: {why}")
        if isinstance(module, nn.RNNBase) and module.num_layers > 1 and module.dropout > 0:
            raise ExportError(
                f"{called(name, module)} with dropout between its layers, which has random "
                "numbers of its own; use layers of one with nn.Dropout between them"
            )
        tracks = isinstance(module, NormBase) and module.track_running_stats
        if tracks and module.momentum is None:
            raise ExportError(
                f"{called(name, module)} with momentum=None: a cumulative average needs a count "
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
            seeded = SeededDropout(torch.zeros((), dtype=torch.int64))
            with torch.no_grad(), seeded, recorded(stage.train(), name) as calls:
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
                    f"{called(name, stage)} and returns {found} for a batch of {rows}; it must "
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
    _, logits = functional_call(segment, copied_buffers(segment), (example,))
    gradients = torch.autograd.grad(
        logits.sum(), list(parameters.values()), allow_unused=True, materialize_grads=False
    )
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            raise ExportError(
                f"{name} does not affect the segment's logits; remove it, or freeze it "
                "(requires_grad_(False))"
            )
