"""Inference graphs of a trained model: ``x -> logits of each head``, with all weights inside."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.func import functional_call

from edge_sdk.bundle.manifest import Port
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import TensorSpec
from export.bases.dual_norms import has_dual_norms, robustness
from export.bases.vmapped import over_bases
from export.cutting.split_model import NoHead, SplitModel, answer
from export.errors import ExportError
from export.lowering.trace import trace
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
    """Inputs of an inference graph.

    Attributes:
        x: name, dtype and shape of the inputs, with the symbols ``batch`` and ``seq``.
        limits: largest ``batch`` and ``seq``, if there are any.
    """

    x: TensorSpec
    limits: Mapping[str, int]


class InferenceGraph(nn.Module):
    """What is exported: ``x -> logits of each head``, with tensors in few bits, or several bases.

    With dual norms it also takes ``robustness``, float32 (). Of base networks it returns the mean
    of their logits.

    Args:
        module: the part of the model.
        compact: tensors that are held in fewer bits, by name; of several base networks stacked.
        bases: tensors of each base network by name; empty for a single model, that of ``module``.
    """

    def __init__(
        self,
        module: Heads,
        compact: Mapping[str, Compact],
        bases: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        super().__init__()
        tensors = _stacked(bases) if bases else tensors_of(module)
        held = {n: t for n, t in tensors.items() if n not in compact} | constants_of(compact)
        self._buffers_of = {name: _buffer_name(name) for name in held}
        for name, tensor in held.items():
            self.register_buffer(self._buffers_of[name], tensor)
        self._module = (module,)  # not a submodule, whose tensors would be exported too
        self._compact, self._mixed = dict(compact), bool(bases)
        self.dual = has_dual_norms(module)
        self.names = module.names
        self.eval()

    def program(self, signature: Signature, example: Tensor) -> ExportedProgram:
        """The graph as torch's exporters take it, for any batch and length within the limits.

        Args:
            signature: inputs.
            example: inputs (batch, ...), at least 2 rows.

        Raises:
            Exception: torch cannot trace the model.
        """
        if self._mixed:
            # torch.export has no rules for functions that bring their own rule for vmap
            return trace(self._step(signature))
        dims = {
            axis: Dim(name, max=signature.limits[name]) if name in signature.limits else Dim(name)
            for axis, name in enumerate(signature.x.shape)
            if isinstance(name, str) and signature.limits.get(name) != 1
        }
        sizes = [
            signature.limits.get(str(name), size)
            for name, size in zip(signature.x.shape, example.shape, strict=True)
        ]
        inputs = (_sized(example, sizes), *([torch.tensor(0.5)] if self.dual else []))
        shapes = (dims, *([{}] if self.dual else []))
        return torch.export.export(self, inputs, dynamic_shapes=shapes, strict=False)

    def _step(self, signature: Signature) -> Step:
        """The graph as a step: a function of named tensors."""
        names = dict(zip(self._buffers_of.values(), self._buffers_of, strict=True))

        def function(constants: Tensors, given: Tensors) -> Tensors:
            held = {names[buffer]: tensor for buffer, tensor in constants.items()}
            logits = self._logits(held, given["x"], given.get("robustness"))
            return dict(zip(self.names, logits, strict=True))

        inputs = (Port(signature.x, "batch"), *([ROBUSTNESS] if self.dual else []))
        outputs = (Port(TensorSpec(n, "float32", ()), "result") for n in self.names)
        held = dict(self.named_buffers())
        return Step("forward", function, inputs, tuple(outputs), held, dict(signature.limits))

    def forward(self, x: Tensor, robust: Tensor | None = None) -> tuple[Tensor, ...]:
        """Logits of each head: (batch, classes), or (batch, positions, vocabulary)."""
        return self._logits({n: getattr(self, b) for n, b in self._buffers_of.items()}, x, robust)

    def _logits(self, held: Tensors, x: Tensor, robust: Tensor | None) -> tuple[Tensor, ...]:
        (module,) = self._module
        with restored(held, self._compact) as values, robustness(0 if robust is None else robust):
            if not self._mixed:
                return _call(module, values, x)
            each = over_bases(lambda own: _call(module, own, x), values)
            return tuple(logits.mean(0) for logits in each)

    def exact(self, wide: bool) -> list[Tensors]:
        """The tensors of each base network, or of the model, as they are restored.

        Args:
            wide: whether float32 becomes float64.
        """
        held = {n: getattr(self, b) for n, b in self._buffers_of.items()}
        with torch.no_grad(), restored(held, self._compact) as values:
            tensors = {n: t.double() if wide and t.dtype is torch.float32 else t
                       for n, t in values.items()}  # fmt: skip
        if not self._mixed:
            return [tensors]
        count = len(next(iter(tensors.values())))
        return [{n: t[base] for n, t in tensors.items()} for base in range(count)]


def _sized(example: Tensor, sizes: Sequence[int]) -> Tensor:
    """The example repeated and cut to some sizes."""
    x = example
    for axis, size in enumerate(sizes):
        times = -(-size // x.shape[axis])
        x = torch.cat([x] * times, axis).narrow(axis, 0, size)
    return x.contiguous()


def _buffer_name(name: str) -> str:
    return name.replace(".", "_").replace("/", "_")


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
    names = [n for n, t in tensors_of(module).items() if t.dtype is torch.float32 and t.dim() > 1]
    tensors = _stacked(bases) if bases else tensors_of(module)
    return {name: halve(name, tensors[name]) for name in names}


def int8_weights(module: Heads, bases: Sequence[Mapping[str, Tensor]] = ()) -> dict[str, Compact]:
    """The matrices of linear layers, convolutions and embeddings in 8 bits, by name.

    Each output channel has a scale; of several base networks each has its own.

    Raises:
        ExportError: there is no such matrix.
    """
    tensors = _stacked(bases) if bases else tensors_of(module)
    found: dict[str, Compact] = {}
    for name, _, axis in matrix_axes(module):
        if name in tensors:
            found[name] = quantize(tensors[name], *((0, axis + 1) if bases else (axis,)))
    if not found:
        raise ExportError(
            "the model has no linear layer, convolution or embedding whose weights could be int8"
        )
    return found


def tensors_of(module: nn.Module) -> Tensors:
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


@contextmanager
def silenced() -> Iterator[None]:
    """Silence what torch's exporters, and the libraries that they import, log and warn of."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # an error is raised, and told in one sentence
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
