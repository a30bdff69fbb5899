"""Inference graphs of a trained model: ``x -> logits of each head``, with all weights inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import has_dual_norms, robustness
from export.bases.vmapped import over_bases
from export.cutting.split_model import NoHead, SplitModel, answer
from export.errors import ExportError
from export.lowering.verification.float64 import LARGE
from export.steps.client_steps import ROBUSTNESS
from export.steps.compact_weights import (
    Compact,
    constants_of,
    halve,
    matrix_axes,
    quantize,
    restored,
)
from export.steps.step import Step, Tensors

HEAD = "head"
"""Name of the model's own head. Auxiliary heads are called ``aux.DEPTH``."""


class Heads(nn.Module):
    """Part of a model that computes the logits of some heads.

    It holds the stem, the blocks that these heads need and the heads, under the model's names, and
    shares its tensors. Its calls run in evaluation mode.

    Args:
        model: the model.
        heads: names of the heads: ``aux.DEPTH`` or ``head``.

    Raises:
        ConfigError: the model has no head of a name.
    """

    def __init__(self, model: SplitModel, heads: Sequence[str]) -> None:
        super().__init__()
        known = heads_of(model)
        for name in heads:
            if name not in known:
                raise ConfigError(
                    f"the model has no head {name!r}; its heads are {', '.join(known)}"
                )
        self.names = [name for name in known if name in heads]
        depth = max(_depth(model, name) for name in self.names)
        self.stem = model.stem
        self.block = model.block[:depth]
        self.aux = nn.ModuleDict(
            {str(d): model.aux[str(d)] for d in model.head_depths if f"aux.{d}" in heads}
        )
        if HEAD in self.names:
            self.head = model.head
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits of each head: (batch, classes), or (batch, positions, vocabulary)."""
        h, logits = self.stem(x), []
        for depth, block in enumerate(self.block, start=1):
            h = block(h)
            if str(depth) in self.aux:
                logits.append(answer(self.aux[str(depth)], self.stem, h))
        if HEAD in self.names:
            logits.append(self.head(h))
        return tuple(logits)


def heads_of(model: SplitModel) -> list[str]:
    """Names of a model's heads, shallowest first."""
    own = [] if isinstance(model.head, NoHead) else [HEAD]
    return [*(f"aux.{depth}" for depth in model.head_depths), *own]


def _depth(model: SplitModel, head: str) -> int:
    return model.depth if head == HEAD else int(head.removeprefix("aux."))


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an inference graph.

    Attributes:
        x: name, dtype and shape of the inputs, with the symbols ``batch`` and ``seq``.
        logits: shape of the logits of a head.
        limits: largest ``batch`` and ``seq``, if there are any.
    """

    x: TensorSpec
    logits: tuple[int | str, ...]
    limits: Mapping[str, int]


def inference_step(
    module: Heads,
    signature: Signature,
    compact: Mapping[str, Compact],
    bases: Sequence[Mapping[str, Tensor]] = (),
) -> Step:
    """The step ``x -> logits of each head``, in evaluation mode, with all tensors as constants.

    With dual norms it also takes the input ``robustness``.

    Args:
        module: the part of the model.
        signature: inputs and outputs.
        compact: tensors that are held in fewer bits, by name; of several base networks stacked.
        bases: tensors of each base network by name, to answer with the mean of their logits;
            empty for a single model, that of ``module``.
    """
    tensors = _stacked(bases) if bases else _tensors(module)
    constants = {n: t for n, t in tensors.items() if n not in compact} | constants_of(compact)
    dual = has_dual_norms(module)
    names = module.names

    def function(held: Tensors, given: Tensors) -> Tensors:
        with restored(held, compact) as values, robustness(given["robustness"] if dual else 0):
            if bases:
                logits = over_bases(lambda own: _call(module, own, given["x"]), values)
                logits = tuple(z.mean(0) for z in logits)
            else:
                logits = _call(module, values, given["x"])
        return dict(zip(names, logits, strict=True))

    def reference(given: Tensors) -> Tensors:
        """The model's own code; base networks one after the other."""
        exact = {n: _wide(t) for n, t in tensors.items()}
        exact |= {n: _wide(c.restore()) for n, c in compact.items()}
        each = [{n: t[b] for n, t in exact.items()} for b in range(len(bases))]
        return eager_answers(module, each or [exact], given)

    return Step(
        "forward",
        function,
        (Port(signature.x, "batch"), *([ROBUSTNESS] if dual else [])),
        tuple(Port(TensorSpec(name, "float32", signature.logits), "result") for name in names),
        constants,
        dict(signature.limits),
        reference,
    )


def eager_answers(module: Heads, states: Sequence[Mapping[str, Tensor]], given: Tensors) -> Tensors:
    """Logits of each head by name, by the model's own code: the mean over some states.

    Args:
        module: the part of the model.
        states: tensors by name, in place of the module's own: one state, or one for each base
            network. A tensor that is missing is the module's.
        given: the inputs ``x``, and ``robustness`` with dual norms.
    """
    with torch.no_grad(), robustness(float(given.get("robustness", 0))):
        answers = [_call(module, own, given["x"]) for own in states]
    means = [torch.stack(z).mean(0) for z in zip(*answers, strict=True)]
    return dict(zip(module.names, means, strict=True))


def float16_weights(
    module: Heads, bases: Sequence[Mapping[str, Tensor]] = ()
) -> dict[str, Compact]:
    """All float32 tensors with two or more dimensions, as float16, by name.

    Raises:
        ExportError: a value is beyond the range of float16.
    """
    names = [n for n, t in _tensors(module).items() if t.dtype is torch.float32 and t.dim() > 1]
    tensors = _stacked(bases) if bases else _tensors(module)
    return {name: halve(name, tensors[name]) for name in names}


def int8_weights(module: Heads, bases: Sequence[Mapping[str, Tensor]] = ()) -> dict[str, Compact]:
    """The matrices of linear layers, convolutions and embeddings in 8 bits, by name.

    Each output channel has a scale; of several base networks each has its own.

    Raises:
        ExportError: there is no such matrix.
    """
    tensors = _stacked(bases) if bases else _tensors(module)
    found: dict[str, Compact] = {}
    for name, _, axis in matrix_axes(module):
        if name in tensors:
            found[name] = quantize(tensors[name], *((0, axis + 1) if bases else (axis,)))
    if not found:
        raise ExportError(
            "the model has no linear layer, convolution or embedding whose weights could be int8"
        )
    return found


def _tensors(module: nn.Module) -> Tensors:
    """All tensors that the module reads, by name; tied tensors under their first name."""
    first: dict[int, str] = {}
    state = {**dict(module.named_parameters(remove_duplicate=False)),
             **dict(module.named_buffers(remove_duplicate=False))}  # fmt: skip
    return {
        n: t.detach()
        for n, t in state.items()
        if first.setdefault(id(t), n) == n and not n.endswith("num_batches_tracked")
    }


def _stacked(bases: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """Tensors of all base networks by name, each (bases, ...)."""
    return {name: torch.stack([own[name] for own in bases]) for name in bases[0]}


def _call(module: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """Call the module with the given tensors, by name, in place of its own."""
    result: tuple[Tensor, ...] = functional_call(module, dict(tensors), (x,))
    return result


def _wide(tensor: Tensor) -> Tensor:
    """A float32 tensor in float64, unless it is large: then operations convert it in parts."""
    small = tensor.dtype is torch.float32 and tensor.nbytes <= LARGE
    return tensor.double() if small else tensor
