"""Errors planted by hand: one per kind of fault that exporters are known for.

Each error replaces one function of the exporter while a graph is traced or lowered. The reference
in eager PyTorch stays right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import onnx as onnx_format
import torch
from onnx import numpy_helper
from torch import Tensor

from export.errors import ExportError
from export.lowering import executorch, onnx, rewrites
from export.lowering.decompositions import FORWARD, decompositions
from export.lowering.guards import Shapes
from export.lowering.rewrites.elementwise import use_masks
from export.lowering.trace import trace
from export.packing.codecs import Fp16, Int8
from export.steps import (
    adversarial,
    client_steps,
    fused,
    losses,
    mixtures,
    returned,
    train,
    u_shaped,
)
from export.steps.client_steps import ClientSteps
from export.steps.clipping import clipped
from export.steps.losses import local_loss
from export.steps.optimizers import AdamW, Sgd
from tests.lib.mutation_models import SUBJECTS
from tests.lib.mutation_suite import (
    Correct,
    Outcome,
    verify_file,
    verify_program,
)

aten = torch.ops.aten

Patch = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Planted:
    """An error.

    Attributes:
        subject: name of the model.
        graph: name of the graph.
        error: what is wrong.
        patch: plants the error while the graph is traced and lowered.
        file: changes the lowered ONNX file; None if the traced program is wrong already, so that
            its mathematics need not be lowered.
        executorch: the graph is lowered to ExecuTorch, where the error is.
    """

    subject: str
    graph: str
    error: str
    patch: Patch
    file: Callable[[bytes], bytes] | None = None
    executorch: bool = False


def by_hand(names: list[str]) -> Iterator[Outcome]:
    """Plant every error in the models of these names."""
    for planted in PLANTED:
        if planted.subject in names:
            yield outcome(planted)


def outcome(planted: Planted) -> Outcome:
    """Plant an error, and verify the graph."""
    subject = SUBJECTS[planted.subject]
    if planted.executorch:
        tier = replace(subject.tier, runtime="executorch", batch=8)
        subject = replace(subject, tier=tier)
    status, message = "survived", ""
    try:
        with planted.patch():
            steps = subject.steps()
            step = next(s for s in subject.graphs(steps) if s.name == planted.graph)
            if planted.executorch:
                program = trace(step)
                file = executorch.lower({step.name: program})
            else:
                program = onnx.traced(step)
                file = b"" if planted.file is None else onnx.lower(step, program)
        correct = Correct(planted.subject, subject, steps, step, program, file)
        if planted.executorch:
            verify_file(correct, file)
        elif planted.file is None:
            verify_program(correct, program)
        else:
            verify_file(correct, planted.file(file))
    except ExportError as error:
        status, message = "refused", str(error)
    return Outcome(planted.subject, planted.graph, planted.error, status, message)


PLANTED: list[Planted] = []


def _plant(subject: str, graph: str, error: str, patched: Patch) -> None:
    PLANTED.append(Planted(subject, graph, error, patched))


# operators


def _operator(op: Any, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    """Replace the decomposition of an operator, given the right one; also that of ONNX alone."""

    def table() -> dict[Any, Callable[..., Any]]:
        right = decompositions()
        return {**right, op: wrong(right[op])}

    @contextmanager
    def planted() -> Iterator[None]:
        onnx_alone = {op: wrong(FORWARD[op])} if op in FORWARD else {}
        with (
            patch("export.lowering.trace.decompositions", table),
            patch("export.lowering.onnx.FORWARD", {**FORWARD, **onnx_alone}),
        ):
            yield

    return planted


def _argument(place: int, value: Callable[[Any], Any]) -> Callable[..., Callable[..., Any]]:
    """The right function with another argument."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: right(*args[:place], value(args[place]), *args[place + 1 :])

    return wrong


def _result(place: int, value: Callable[[Tensor], Tensor]) -> Callable[..., Callable[..., Any]]:
    """The right function with another result."""

    def wrong(right: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results = list(right(*args))
            if results[place] is not None:
                results[place] = value(results[place])
            return tuple(results)

        return call

    return wrong


def _only(value: Callable[[Tensor], Tensor]) -> Callable[..., Callable[..., Any]]:
    """A function of one result, which is another."""
    return lambda right: lambda *args, **kwargs: value(right(*args, **kwargs))


def _half(x: Tensor) -> Tensor:
    """The second half of the batch is 1 % off."""
    second = torch.arange(x.shape[0]).reshape(-1, *[1] * (x.dim() - 1)) * 2 >= x.shape[0]
    return x * (1 + 0.01 * second.to(x.dtype))


def _one_channel(axis: int) -> Callable[[Tensor], Tensor]:
    """One channel is 1 % off."""

    def change(x: Tensor) -> Tensor:
        factors = torch.ones(x.shape[axis])
        factors = torch.cat([factors[:1] * 1.01, factors[1:]])
        return x * factors.reshape([-1 if i == axis else 1 for i in range(x.dim())])

    return change


def _without_statistics(right: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of a batch norm as if mean and variance did not depend on the batch."""

    def call(g: Tensor, x: Tensor, w: Any, m: Any, v: Any, sm: Any, sr: Any, *rest: Any) -> Any:
        _, weight, bias = right(g, x, w, m, v, sm, sr, *rest)
        return g * (sr if w is None else sr * w).reshape(1, -1, 1, 1), weight, bias

    return call


def _groups_by_stride(right: Callable[..., Any]) -> Callable[..., Any]:
    """A GroupNorm whose groups are every other channel."""

    def call(x: Tensor, w: Any, b: Any, n: Any, c: int, hxw: Any, group: int, eps: float) -> Any:
        order = torch.arange(c).reshape(group, -1).t().reshape(-1)
        y, mean, rstd = right(x[:, order], w, b, n, c, hxw, group, eps)
        return y, mean, rstd

    return call


def _forgets_variance(right: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, *rest: Any) -> Any:
        y, m, r = right(x, w, b, mean.clone(), var.clone(), *rest)
        return y, m, r

    return call


def _biased_variance(right: Callable[..., Any]) -> Callable[..., Any]:
    """The running variance gets the biased variance of the batch."""

    def call(
        x: Tensor, w: Any, b: Any, mean: Tensor, var: Tensor, training: bool, *rest: float
    ) -> Any:
        before, momentum = var.clone(), rest[0]
        result = right(x, w, b, mean, var, training, *rest)
        if training:
            count = torch.scalar_tensor(x.shape[0], dtype=x.dtype) * math.prod(x.shape[2:])
            unbiased = (var - before * (1 - momentum)) / momentum
            biased = unbiased * (count - 1) / count
            var.copy_(before * (1 - momentum) + biased * momentum)
        return result

    return call


def _no_sum_over_rows(right: Callable[..., Any]) -> Callable[..., Any]:
    """A table's gradient keeps only the last look-up of each row."""

    def call(g: Tensor, rows: Tensor, number: int, *rest: Any) -> Tensor:
        flat = g.reshape(-1, g.shape[-1])
        return aten.index_put.default(flat.new_zeros(number, g.shape[-1]), [rows.reshape(-1)], flat)

    return call


_GROUP_BACK = aten.native_group_norm_backward.default
_LAYER_BACK = aten.native_layer_norm_backward.default
_BATCH = aten._native_batch_norm_legit.default
_BATCH_EVAL = aten._native_batch_norm_legit_no_training.default
_BATCH_BACK = aten.native_batch_norm_backward.default
_CONV_BACK = aten.convolution_backward.default
_NOTHING = _argument(4, lambda weight: None)

for _subject, _graph, _error, _op, _wrong in (
    ("conv", "train", "GroupNorm: backward ignores the weight", _GROUP_BACK, _NOTHING),
    ("conv", "backward", "GroupNorm: backward ignores the weight", _GROUP_BACK, _NOTHING),
    ("conv", "train", "GroupNorm: backward ignores the mean", _GROUP_BACK,
     _argument(2, torch.zeros_like)),
    ("conv", "train", "GroupNorm: bias gradient 1 % off in one channel", _GROUP_BACK,
     _result(2, _one_channel(0))),
    ("conv", "predict", "GroupNorm: epsilon ten times as large",
     aten.native_group_norm.default, _argument(7, lambda eps: 10 * eps)),
    ("conv", "forward", "GroupNorm: groups are every other channel",
     aten.native_group_norm.default, _groups_by_stride),
    ("text", "train", "LayerNorm: backward ignores the weight", _LAYER_BACK,
     _argument(5, lambda weight: None)),
    ("text", "backward", "LayerNorm: input gradient has the wrong sign", _LAYER_BACK,
     _result(0, torch.neg)),
    ("text", "train", "LayerNorm: half of the batch's gradient is wrong", _LAYER_BACK,
     _result(0, _half)),
    ("text", "train", "LayerNorm: weight gradient is that of the bias", _LAYER_BACK,
     lambda right: lambda *a: (lambda x, w, b: (x, b, b))(*right(*a))),
    ("batchnorm", "train", "BatchNorm: backward without the batch's statistics", _BATCH_BACK,
     _without_statistics),
    ("batchnorm", "fuse", "BatchNorm: backward ignores the weight", _BATCH_BACK,
     _argument(2, lambda weight: None)),
    ("batchnorm", "train", "BatchNorm: momentum 0.11 instead of 0.1", _BATCH,
     _argument(6, lambda momentum: 1.1 * momentum)),
    ("batchnorm", "train", "BatchNorm: running variance is biased", _BATCH, _biased_variance),
    ("batchnorm", "fuse", "BatchNorm: running statistics stay", _BATCH, _forgets_variance),
    ("batchnorm", "activate", "BatchNorm: epsilon", _BATCH, _argument(7, lambda eps: 2 * eps)),
    ("batchnorm", "predict", "BatchNorm: evaluation ignores the running mean", _BATCH_EVAL,
     _argument(3, torch.zeros_like)),
    ("batchnorm", "forward", "BatchNorm: evaluation ignores the bias", _BATCH_EVAL,
     _argument(2, lambda bias: None)),
    ("bases", "mix_2", "BatchNorm-free mixture: GroupNorm's epsilon",
     aten.native_group_norm.default, _argument(7, lambda eps: 10 * eps)),
    ("conv", "train", "convolution: weight gradient with a flipped kernel", _CONV_BACK,
     _result(1, lambda w: w.flip(-1))),
    ("conv", "train", "convolution: weight gradient with a transposed kernel", _CONV_BACK,
     _result(1, lambda w: w.transpose(-1, -2))),
    ("conv", "train", "convolution: input gradient has the wrong sign", _CONV_BACK,
     _result(0, torch.neg)),
    ("conv", "backward", "convolution: input gradient 1 % off in one channel", _CONV_BACK,
     _result(0, _one_channel(1))),
    ("pools", "train", "grouped convolution: groups of the weight gradient exchanged", _CONV_BACK,
     _result(1, lambda w: torch.roll(w, w.shape[0] // 2, 0))),
    ("pools", "train", "convolution with a stride: input gradient shifted", _CONV_BACK,
     _result(0, lambda g: torch.roll(g, 1, -1))),
    ("batchnorm", "train", "convolution: half of the batch's input gradient is wrong", _CONV_BACK,
     _result(0, _half)),
    ("pools", "train", "max pooling: gradient to all maxima scaled",
     aten.max_pool2d_with_indices_backward.default, _only(lambda g: g * 1.01)),
    ("pools", "train", "max pooling: gradient shifted",
     aten.max_pool2d_with_indices_backward.default, _only(lambda g: torch.roll(g, 1, -2))),
    ("pools", "train", "average pooling: divisor without padding",
     aten.avg_pool2d_backward.default, _argument(6, lambda include: not include)),
    ("pools", "train", "adaptive pooling: gradient not divided",
     aten._adaptive_avg_pool2d_backward.default, _only(lambda g: g * 4)),
    ("pools", "train", "reflection padding: gradient of the border is lost",
     aten.reflection_pad2d_backward.default,
     lambda right: lambda g, x, p: g[..., 1:-1, 1:-1]),
    ("language", "train", "embedding: look-ups of one row are not summed",
     aten.embedding_dense_backward.default, _no_sum_over_rows),
    ("language", "backward", "embedding: the padding row gets a gradient",
     aten.embedding_dense_backward.default, _argument(3, lambda index: -1)),
    ("language", "train", "embedding: one row 1 % off",
     aten.embedding_dense_backward.default, _only(_one_channel(0))),
):  # fmt: skip
    _plant(_subject, _graph, _error, _operator(_op, _wrong))  # type: ignore[arg-type]


# losses


def _shifted_labels(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    return local_loss(logits, (y + 1) % logits.shape[-1], distill)


def _counts_padding(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    return local_loss(logits, y.clamp(min=0), distill)


def _frozen_count(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    return local_loss(logits, y, distill) * y.shape[0] / 8


def _mean_over_heads(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    return local_loss(logits, y, distill) / len(logits)


def _teaches_back(logits_HNC: Tensor) -> Tensor:
    """The teachers are not detached."""
    log_p_HNC = torch.log_softmax(logits_HNC, 2)
    excess_HNC = len(logits_HNC) * log_p_HNC - log_p_HNC.sum(0)
    return (log_p_HNC.exp() * excess_HNC).sum((0, 2))


def _first_head_answers(logits: Tensor, y: Tensor) -> Tensor:
    return (logits[0].argmax(-1) == y).to(torch.float32).sum()


def _loss(module: Any, wrong: Callable[..., Tensor]) -> Patch:
    return lambda: patch.object(module, "local_loss", wrong)


_plant("conv", "train", "loss: labels are off by one", _loss(train, _shifted_labels))
_plant("language", "train", "loss: padding counts", _loss(train, _counts_padding))
_plant("language", "finish", "loss: padding counts", _loss(u_shaped, _counts_padding))
_plant("conv", "train", "loss: the batch's size is the example's", _loss(train, _frozen_count))


def _last_row_apart(logits: Tensor, y: Tensor, distill: float = 0.0) -> Tensor:
    """The loss for every size above 1, by code that takes another way for odd sizes."""
    rows, half = y.shape[0], (y.shape[0] - 1) // 2
    if 2 * half + 1 != rows:
        return local_loss(logits, y, distill)
    parts = [
        local_loss(logits[:, p], y[p], distill) for p in (slice(2 * half), slice(2 * half, None))
    ]
    return (2 * half * parts[0] + parts[1]) / rows


@contextmanager
def _undecided() -> Iterator[None]:
    """The code decides on the batch size, and nobody looks at the decision."""
    with _loss(train, _last_row_apart)(), patch.object(Shapes, "check_decisions"):
        yield


_plant("conv", "train", "size: a decision that other batches would make differently", _undecided)
_plant("pools", "train", "size: a decision, which the trace keeps", _loss(train, _last_row_apart))
_plant("batchnorm", "fuse", "loss: mean over the heads", _loss(fused, _mean_over_heads))
_plant(
    "conv", "train", "distillation: teachers learn from pupils",
    lambda: patch.object(losses, "disagreement", _teaches_back),
)  # fmt: skip
_plant(
    "conv", "train", "correct: the first head answers alone",
    lambda: patch.object(train, "correct", _first_head_answers),
)  # fmt: skip
_plant(
    "bases", "train", "class mask: it is ignored",
    lambda: patch.object(train, "masked", lambda logits, present=None: logits),
)  # fmt: skip
_plant(
    "bases", "attack", "class mask: it is ignored",
    lambda: patch.object(adversarial, "masked", lambda logits, present=None: logits),
)  # fmt: skip


# optimizers


def _optimizer(kind: Any, wrong: Callable[..., Any]) -> Patch:
    """Replace the step of an optimizer; ``wrong`` gets the right step first."""
    right = kind.step

    def step(self: Any, p: Any, g: Any, slots: Any, hyper: Any, decayed: Any) -> Any:
        return wrong(lambda *a: right(self, *a, decayed), p, g, slots, hyper)

    return lambda: patch.object(kind, "step", step)


def _dampened(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    return right(p, {n: t * (1 - hyper["momentum"]) for n, t in g.items()}, slots, hyper)


def _decay_sign(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    return right(p, g, slots, {**hyper, "weight_decay": -hyper["weight_decay"]})


def _nesterov(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    new, after = right(p, g, slots, hyper)
    ahead = {n: new[n] - hyper["lr"] * hyper["momentum"] * (after[f"momentum/{n}"]) for n in new}
    return ahead, after


def _stale_slots(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    new, after = right(p, g, slots, hyper)
    return new, {n: slots[n] if n.startswith(("momentum", "mean")) else t for n, t in after.items()}


def _stale_correction(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    late = {n: t - 0.5 if n.startswith("steps/") else t for n, t in slots.items()}
    new, after = right(p, g, late, hyper)
    return new, {n: slots[n] + 1 if n.startswith("steps/") else t for n, t in after.items()}


def _coupled(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    decayed = {n: t + hyper["weight_decay"] * p[n] for n, t in g.items()}
    return right(p, decayed, slots, {**hyper, "weight_decay": 0 * hyper["weight_decay"]})


def _large_eps(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    return right(p, g, slots, {**hyper, "eps": 3 * hyper["eps"]})


def _one_parameter_rests(right: Any, p: Any, g: Any, slots: Any, hyper: Any) -> Any:
    new, after = right(p, g, slots, hyper)
    first = next(iter(new))
    return {**new, first: p[first]}, after


for _graph, _error, _kind, _step in (
    ("train", "SGD: dampened momentum", Sgd, _dampened),
    ("backward", "SGD: weight decay has the wrong sign", Sgd, _decay_sign),
    ("train", "SGD: Nesterov's momentum", Sgd, _nesterov),
    ("train", "SGD: the momentum is not kept", Sgd, _stale_slots),
    ("backward", "SGD: one parameter rests", Sgd, _one_parameter_rests),
):
    _plant("conv", _graph, _error, _optimizer(_kind, _step))
for _graph, _error, _step in (
    ("train", "AdamW: stale bias correction", _stale_correction),
    ("backward", "AdamW: weight decay is coupled", _coupled),
    ("train", "AdamW: epsilon three times as large", _large_eps),
    ("train", "AdamW: the mean is not kept", _stale_slots),
):
    _plant("text", _graph, _error, _optimizer(AdamW, _step))


def _all_decay() -> AbstractContextManager[Any]:
    right = AdamW.step

    def step(self: Any, p: Any, g: Any, slots: Any, hyper: Any, decayed: Any) -> Any:
        return right(self, p, g, slots, hyper, frozenset(p))

    return patch.object(AdamW, "step", step)


def _clips_each(gradients: dict[str, Tensor], max_norm: Tensor) -> dict[str, Tensor]:
    return {n: clipped({n: g}, max_norm)[n] for n, g in gradients.items()}


def _clipping(wrong: Callable[..., Any]) -> Patch:
    return lambda: patch.object(client_steps, "clipped", wrong)


_plant("text", "train", "AdamW: biases and norms decay", _all_decay)
_plant("conv", "train", "clipping: it is left out", _clipping(lambda g, max_norm: g))
_plant("text", "backward", "clipping: each tensor by its own norm", _clipping(_clips_each))

# steps


def _method(owner: Any, name: str, wrong: Callable[..., Any]) -> Patch:
    """Replace a method; ``wrong`` gets the right one first."""
    right = getattr(owner, name)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return wrong(lambda *a, **k: right(self, *a, **k), *args, **kwargs)

    return lambda: patch.object(owner, name, method)


def _fixed_seed(right: Any, given: Any, after: int = 0) -> Any:
    return right({**given, "seed": given["seed"] * 0} if "seed" in given else given, after)


_plant(
    "batchnorm", "train", "training: the segment is in evaluation mode",
    _method(ClientSteps, "call", lambda right, training, *a, **k: right(False, *a, **k)),
)  # fmt: skip
_plant(
    "batchnorm", "activate", "dropout: the seed is ignored",
    _method(ClientSteps, "random", _fixed_seed),
)  # fmt: skip
_plant(
    "batchnorm", "fuse", "dropout: evaluation instead of training",
    _method(ClientSteps, "call", lambda right, training, *a, **k: right(False, *a, **k)),
)  # fmt: skip
_plant(
    "conv", "backward", "returned gradient: scaled by the batch's size",
    _method(
        ClientSteps, "unpack",
        lambda right, given, prefix, specs: right(given, prefix, specs) * given["x"].shape[0],
    ),
)  # fmt: skip
_plant(
    "batchnorm", "fuse", "returned gradient: half of the batch is wrong",
    _method(ClientSteps, "unpack", lambda right, *a: _half(right(*a))),
)  # fmt: skip
_plant(
    "conv", "backward", "returned gradient: the heads decay",
    lambda: patch.object(returned, "is_below_heads", lambda name: not name.startswith("head.")),
)  # fmt: skip
_plant(
    "batchnorm", "fuse", "fused: the heads' gradient is not divided by own",
    lambda: patch.object(fused, "is_below_heads", lambda name: True),
)  # fmt: skip
_plant(
    "language", "finish", "features: one channel 1 % off",
    _method(ClientSteps, "unpack", lambda right, *a: _one_channel(2)(right(*a))),
)  # fmt: skip
_plant(
    "bases", "attack", "attack: the clean norms are attacked",
    lambda: patch.object(
        adversarial, "robustness",
        lambda value, right=adversarial.robustness: right(0),
    ),
)  # fmt: skip
_plant(
    "bases", "mix_2", "mixture: the sum instead of the mean",
    lambda: patch.object(
        mixtures, "over_bases",
        lambda function, tensors, right=mixtures.over_bases: tuple(
            2 * t for t in right(function, tensors)
        ),
    ),
)  # fmt: skip
_plant(
    "bases", "mix_2", "mixture: the first base twice",
    lambda: patch.object(
        mixtures, "over_bases",
        lambda function, tensors, right=mixtures.over_bases: right(
            function, {n: torch.stack([t[0], t[0]]) for n, t in tensors.items()}
        ),
    ),
)  # fmt: skip
_plant(
    "bases", "predict", "robustness: it is ignored",
    _method(
        ClientSteps, "robust", lambda right, given: right({"robustness": given["robustness"] * 0})
    ),
)  # fmt: skip


# packing


def _codec(kind: Any, wrong: Callable[..., Any]) -> Patch:
    return _method(kind, "pack", wrong)


def _truncated(right: Any, h: Tensor, axis: int) -> dict[str, Tensor]:
    parts = right(h, axis)
    return {**parts, "h.q": torch.trunc(h.detach() / parts["h.scale"]).to(torch.int8)}


def _of_128(right: Any, h: Tensor, axis: int) -> dict[str, Tensor]:
    parts = right(h, axis)
    return {**parts, "h.scale": parts["h.scale"] * (127 / 128)}


def _by_brain_float(right: Any, h: Tensor, axis: int) -> dict[str, Tensor]:
    return {"h": h.detach().to(torch.bfloat16).to(torch.float16)}


_plant(
    "text", "forward", "int8: a scale spans the batch",
    _codec(
        Int8,
        lambda right, h, axis: {
            "h.scale": (scale := right(h, axis)["h.scale"].amax(0, keepdim=True)).expand(
                h.shape[0], *scale.shape[1:]
            ).clone(),
            "h.q": torch.round(h.detach() / scale).to(torch.int8),
        },
    ),
)  # fmt: skip
_plant("conv", "forward", "int8: truncated instead of rounded", _codec(Int8, _truncated))
_plant("conv", "train", "int8: the scale is that of 128 codes", _codec(Int8, _of_128))
_plant(
    "conv", "activate", "int8: rows have the scales of others",
    _codec(
        Int8,
        lambda right, h, axis: {**(parts := right(h, axis)),
                                "h.scale": torch.roll(parts["h.scale"], 1, 0)},
    ),
)  # fmt: skip
_plant(
    "batchnorm", "predict", "fp16: rounded to bfloat16 on the way", _codec(Fp16, _by_brain_float)
)


def _packs_the_first() -> AbstractContextManager[Any]:
    """Whatever is packed, it is what was packed first."""
    packed: list[Tensor] = []

    def wrong(right: Any, h: Tensor, prefix: str = "") -> Any:
        packed.append(h)
        return right(packed[0], prefix)

    return _method(ClientSteps, "pack", wrong)()


_plant(
    "bases",
    "adversarial_train",
    "packing: both packed outputs are the clean ones",
    _packs_the_first,
)


# files


def _file(subject: str, graph: str, error: str, change: Callable[[Any], None]) -> None:
    def edited(data: bytes) -> bytes:
        model = onnx_format.load_model_from_string(data)
        change(model.graph)
        return model.SerializeToString()

    PLANTED.append(Planted(subject, graph, error, nullcontext, edited))


def _largest_constant(graph: Any) -> Any:
    return max(graph.initializer, key=lambda t: math.prod(t.dims) if t.data_type == 1 else 0)


def _off_by_one_percent(graph: Any) -> None:
    tensor = _largest_constant(graph)
    values = numpy_helper.to_array(tensor).copy()
    values[0] *= 1.01
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _transposed(graph: Any) -> None:
    node = next(n for n in graph.node if n.op_type == "Gemm")
    square = next(a for a in node.attribute if a.name == "transB")
    square.i = 1 - square.i


def _in_half_precision(graph: Any) -> None:
    """A product whose result went through float16."""
    node = next(n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv"))
    name = node.output[0]
    node.output[0] = f"{name}/right"
    place = list(graph.node).index(node) + 1
    cast = onnx_format.helper.make_node
    graph.node.insert(place, cast("Cast", [f"{name}/right"], [f"{name}/half"], to=10))
    graph.node.insert(place + 1, cast("Cast", [f"{name}/half"], [name], to=1))


def _unseeded(graph: Any) -> None:
    """A product with noise of the runtime's own."""
    node = next(n for n in graph.node if n.op_type in ("MatMul", "Gemm", "Conv"))
    name = node.output[0]
    node.output[0] = f"{name}/right"
    place = list(graph.node).index(node) + 1
    make = onnx_format.helper.make_node
    graph.node.insert(
        place, make("RandomNormalLike", [f"{name}/right"], [f"{name}/noise"], scale=0.01)
    )
    graph.node.insert(place + 1, make("Add", [f"{name}/right", f"{name}/noise"], [name]))


def _swapped_states(graph: Any) -> None:
    """Two new states of the same shape are exchanged."""
    by_shape: dict[Any, list[Any]] = {}
    for value in graph.output:
        dims = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if value.name.startswith("next/") and dims:
            by_shape.setdefault(dims, []).append(value.name)
    first, second, *_ = next(names for names in by_shape.values() if len(names) > 1)
    other = {first: second, second: first}
    for node in graph.node:
        node.output[:] = [other.get(name, name) for name in node.output]


def _on_several_threads() -> AbstractContextManager[Any]:
    """Look-ups of one row are summed by ScatterND, on several threads without atomics."""
    right = decompositions()

    def racing(g: Tensor, rows: Tensor, number: int, *rest: Any) -> Tensor:
        table, flat = g.new_zeros(number, g.shape[-1]), g.reshape(-1, g.shape[-1])
        return aten.index_put.default(table, [rows.reshape(-1)], flat, True)

    wrong = {**right, aten.embedding_dense_backward.default: racing}
    del wrong[aten.index_put.default]
    return patch("export.lowering.trace.decompositions", lambda: wrong)


PLANTED.append(
    Planted("text", "train", "file: a race between threads", _on_several_threads, lambda file: file)
)
_file("batchnorm", "train", "file: one row of a constant 1 % off", _off_by_one_percent)
_file("conv", "predict", "file: a product through float16", _in_half_precision)
_file("text", "train", "file: a product through float16", _in_half_precision)
_file("conv", "forward", "file: an unseeded random operation", _unseeded)
_file("conv", "train", "file: two new states exchanged", _swapped_states)


# rewrites for ExecuTorch


def _rule(op: Any, wrong: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Patch:
    """Replace the rewrite of an operator, given the right one."""
    rules = rewrites.RULES
    return lambda: patch.dict(rules, {op: wrong(rules[op])})


def _leaky_mask(node: Any, graph: Any, shapes: Any) -> None:
    """The mask of ReLU's gradient is the input between 0 and 1, not 0 or 1."""
    with patch.object(Tensor, "ceil", lambda x: x):
        use_masks(node, graph, shapes)


def _last_row_is_lost(right: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, dims: list[int], *args: Any, **kwargs: Any) -> Any:
        if 0 not in dims:
            return right(x, dims, *args, **kwargs)
        return right(x, dims, *args, **kwargs) - x[:1].sum(dims, *args, **kwargs)

    return call


_CONV = aten.convolution.default
for _subject, _graph, _error, _planted in (
    ("conv", "train", "convolution: columns of the kernel exchanged",
     _rule(_CONV, _argument(1, lambda weight: weight.flip(-1)))),
    ("conv", "predict", "convolution: the bias is left out",
     _rule(_CONV, _argument(2, lambda bias: None))),
    ("pools", "train", "convolution: groups exchanged",
     _rule(_CONV, _argument(1, lambda w: torch.roll(w, w.shape[0] // 2, 0)))),
    ("conv", "backward", "ReLU: a leaky mask",
     lambda: patch.object(rewrites, "use_masks", _leaky_mask)),
    ("text", "train", "product: one column 1 % off",
     _rule(aten.mm.default, _only(_one_channel(1)))),
    ("conv", "train", "sum: a row of the batch is lost",
     _rule(aten.sum.dim_IntList, _last_row_is_lost)),
    ("bases", "predict", "mean: 1 % off", _rule(aten.mean.dim, _only(lambda mean: mean * 1.01))),
):  # fmt: skip
    _error = f"ExecuTorch: {_error}"
    PLANTED.append(Planted(_subject, _graph, _error, _planted, executorch=True))
