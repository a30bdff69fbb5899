"""Writes a trained model in some formats to one folder, with a card: all of it or nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edge_sdk.bundle.store import write_atomically
from edge_sdk.errors import ConfigError
from edge_sdk.inference.metrics import Metric, metric_of
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.self_check import relative_difference
from export.adapters_lora.lora import adapted_modules, merge
from export.bundles.writer import Progress
from export.cutting.split_model import evaluating
from export.errors import ExportError
from export.formats.bundles import write_bundles
from export.formats.card import CARD, FIGURES, Card, Written, metadata, shown
from export.formats.checking import (
    Run,
    batches_to_check,
    check,
    latency_ms,
    scores,
)
from export.formats.executorch_file import Bits, check_installed, write_executorch, write_quantized
from export.formats.inference import (
    Heads,
    InferenceGraph,
    Signature,
    eager_answers,
    float16_weights,
    heads_of,
    int8_weights,
)
from export.formats.onnx_file import write_onnx
from export.formats.trained import TrainedModel
from export.formats.weights import write_peft, write_safetensors, write_transformers
from export.out_folder import check_out, folder_for, put


@dataclass(frozen=True)
class Format:
    """A format of a trained model.

    Attributes:
        path: file or folder that is written.
        opened_by: what opens it.
        graph: whether it is an inference graph; else it holds the weights of the whole model.
    """

    path: str
    opened_by: str
    graph: bool = True


FORMATS = {
    "onnx": Format("model.onnx", "ONNX Runtime"),
    "onnx-fp16": Format("model.fp16.onnx", "ONNX Runtime"),
    "onnx-int8": Format("model.int8.onnx", "ONNX Runtime"),
    "executorch": Format("model.pte", "ExecuTorch"),
    "executorch-int8": Format("model.int8.pte", "ExecuTorch"),
    "executorch-int4": Format("model.int4.pte", "ExecuTorch"),
    "transformers": Format("transformers", "transformers", graph=False),
    "peft": Format("adapter", "PEFT", graph=False),
    "safetensors": Format("model.safetensors", "PyTorch", graph=False),
    "bundles": Format("bundles", "Cutlayer's SDK", graph=False),
}
"""Formats by name."""

_QUANTIZED = 0.05
"""Largest relative difference of XNNPACK's logits from those of the same quantized model in
PyTorch. Rounding may carry an activation to the next code, which no bound on rounding covers."""

_MERGED = 1e-4
"""Largest relative difference of the logits that merging adapters may make, by rounding weights."""


@dataclass(frozen=True)
class Choice:
    """What to write of a trained model.

    Attributes:
        formats: names in :data:`FORMATS`.
        tier: tier whose part is written, as its devices answer alone; None for the whole model.
        heads: names of the outputs; all that the part has if empty.
        batch: largest batch of files for ExecuTorch, which plan their memory for it.
        length: largest number of tokens of a text in files for ExecuTorch.
        base: name of the original model in the files of PEFT; None for its source.
        max_loss: largest loss of accuracy, or relative growth of perplexity, of a file whose
            weights are rounded.
        allow_loss: whether files that lose more are written nevertheless.
    """

    formats: Sequence[str]
    tier: str | None = None
    heads: Sequence[str] = ()
    batch: int = 1
    length: int = 64
    base: str | None = None
    max_loss: float = 0.01
    allow_loss: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise ConfigError(f"there is no format {name!r}; there are {', '.join(FORMATS)}")
            if not FORMATS[name].graph and (self.tier is not None or self.heads):
                raise ConfigError(
                    f"{name} holds the whole model; leave --tier and --head out, or write a part "
                    "of the model as onnx or executorch"
                )
        if not self.formats:
            raise ConfigError(f"no format is given; there are {', '.join(FORMATS)}")
        if len(set(self.formats)) < len(self.formats):
            raise ConfigError("a format is given twice")
        for what, number in (("batch", self.batch), ("length", self.length)):
            if number < 1:
                raise ConfigError(f"the largest {what} is {number}; it must be 1 or more")
        if not self.max_loss >= 0:
            raise ConfigError(f"the largest loss is {self.max_loss}; it must be 0 or more")


def ship(
    trained: TrainedModel,
    choice: Choice,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
) -> Card:
    """Write a trained model in some formats, each checked in the runtime that opens it.

    Adapters are merged into the model afterwards, in place.

    Args:
        trained: the trained model.
        choice: formats, part and outputs.
        out: folder to write. It appears only when everything is written.
        overwrite: whether an earlier export in ``out`` is replaced.
        progress: receives a line per file.

    Returns:
        The card.

    Raises:
        ConfigError: the model has no such tier or head.
        ExportError: the model cannot be written in a format, a file differs from the model or
            loses too much, or ``out`` exists. Nothing is written.
    """
    check_out(out, overwrite, FIGURES)
    with folder_for(out) as folder:
        card = _Shipment(trained, choice, folder, progress).write()
        write_atomically(folder / FIGURES, (json.dumps(card.to_json(), indent=2) + "\n").encode())
        write_atomically(folder / CARD, card.markdown().encode())
        put(folder, out)
    return card


class _Shipment:
    """One folder that is being written."""

    def __init__(
        self, trained: TrainedModel, choice: Choice, folder: Path, progress: Progress
    ) -> None:
        self._trained, self._choice, self._folder = trained, choice, folder
        self._progress = progress
        self._heads = self._chosen_heads()
        self._metric: Metric = metric_of(trained.model.task)
        self._held_out = trained.held_out
        self._scores: dict[int | None, dict[str, float]] = {}  # of the model, by length of texts
        if trained.bases:
            for name in set(choice.formats) - {"onnx", "onnx-fp16", "onnx-int8", "executorch"}:
                if name != "bundles":
                    near = "executorch" if name.startswith("executorch") else "onnx or bundles"
                    raise ExportError(
                        f"the run has {len(trained.bases)} base networks, which {name} cannot "
                        f"hold; the nearest format is {near}"
                    )
        if any(name.startswith("executorch") for name in choice.formats):
            check_installed()

    def _chosen_heads(self) -> list[str]:
        """Names of the outputs."""
        trained, choice = self._trained, self._choice
        known = heads_of(trained.model)
        if choice.tier is not None and choice.tier not in trained.index.tiers:
            raise ConfigError(
                f"the run has no tier {choice.tier!r}; its tiers are "
                f"{', '.join(trained.index.tiers)}"
            )
        if trained.bases:
            known = known[-1:]  # devices mix the answers of their last head
        elif choice.tier is not None and not choice.heads:
            return list(trained.index.manifest(choice.tier).heads)
        return list(choice.heads) or known

    def write(self) -> Card:
        """Write all files; returns the card."""
        trained, choice = self._trained, self._choice
        written: dict[str, Written] = {}
        notes: list[str] = []
        for name in [n for n in choice.formats if n in ("peft", "bundles")]:
            self._progress(name)
            written[name] = self._with_adapters(name)
        if adapted_modules(trained.model) and len(written) < len(choice.formats):
            self._progress("merging the adapters")
            apart = f", but not in {' and '.join(written)}" if written else ""
            notes.append(f"Adapters are merged into the weights{apart}.")
            self._merge()
        module = Heads(trained.model, self._heads)
        for name in [n for n in choice.formats if n not in written]:
            self._progress(name)
            if FORMATS[name].graph:
                written[name] = self._graph(name, module)
            else:
                written[name] = self._weights(name)
        if self._held_out is None and any(_kind(name) != FLOAT32 for name in choice.formats):
            notes.append("What rounding the weights loses was not measured.")
        return Card(
            self._about(),
            self._metric,
            self._inputs(),
            0 if self._held_out is None else len(self._held_out.x),
            [written[name] for name in choice.formats],
            notes,
        )

    def _about(self) -> dict[str, Any]:
        choice, trained = self._choice, self._trained
        part = "the whole model" if choice.tier is None else f"that of tier {choice.tier}"
        if trained.bases:
            part = f"the mean of the best {len(trained.bases)} base networks"
        return {**trained.about, "part": part}

    def _inputs(self) -> str:
        spec = self._trained.signature(self._choice.tier, {}).x
        return f"{spec.dtype} ({', '.join(map(str, spec.shape))})"

    # --- weights --------------------------------------------------------------------------------

    def _with_adapters(self, name: str) -> Written:
        """Write a format that holds adapters as they are."""
        trained, path = self._trained, self._folder / FORMATS[name].path
        if name == "peft":
            base = self._choice.base or trained.index.model or ""
            write_peft(path, trained.model, base)
        else:
            write_bundles(path, trained, self._progress)
        return self._entry(name)

    def _weights(self, name: str) -> Written:
        """Write a format that holds merged weights."""
        model, path = self._trained.model, self._folder / FORMATS[name].path
        if name == "transformers":
            write_transformers(path, model)
        else:
            write_safetensors(path, model, {"cutlayer": metadata(self._about(), (), "float32")})
        return self._entry(name)

    def _merge(self) -> None:
        """Merge adapters into the model, and compare the answers."""
        model, rows = self._trained.model, self._trained.rows()
        module = Heads(model, self._heads)
        with torch.no_grad(), evaluating(module):
            before = [z.numpy() for z in module(rows)]
            merge(model)
            after = [z.numpy() for z in Heads(model, self._heads)(rows)]
        for name, want, got in zip(module.names, before, after, strict=True):
            difference = relative_difference(got, want)
            if not difference <= _MERGED:
                raise ExportError(
                    f"merging the adapters changes the logits of {name} by {difference:.2g} of "
                    "their size; write --format peft or bundles, which hold them as they are"
                )

    # --- graphs ---------------------------------------------------------------------------------

    def _graph(self, name: str, module: Heads) -> Written:
        """Write an inference graph, check it and measure it."""
        trained, choice = self._trained, self._choice
        path = self._folder / FORMATS[name].path
        limits = {}
        if name.startswith("executorch"):
            limits = {"batch": choice.batch, "seq": choice.length}
        signature = trained.signature(choice.tier, limits)
        rows = self._rows(signature)
        kind, difference = _kind(name), None
        about = metadata(self._about(), module.names, kind)
        if name in ("executorch-int8", "executorch-int4"):
            bits: Bits = 8 if kind == "int8" else 4
            quantized, run = write_quantized(path, module, signature, bits, about, rows)
            self._check_quantized(quantized, run, rows[: signature.limits["batch"]])
        else:
            compact = {"fp16": float16_weights, "int8": int8_weights}.get(kind, _none)(
                module, trained.bases
            )
            graph = InferenceGraph(module, compact, trained.bases)
            if name == "executorch":
                run = write_executorch(path, graph, signature, about, rows)
            else:
                run = write_onnx(path, graph, signature, {"cutlayer": about}, rows)
            check(graph, module, run, batches_to_check(rows, signature.limits))
        if kind != FLOAT32:
            some = {"x": rows[: signature.limits.get("batch")].numpy()}
            want, got = self._eager(module)(some), run(some)
            difference = max(relative_difference(got[n], want[n]) for n in module.names)
        found = {} if self._held_out is None else self._measured(run, signature.limits)
        if found and kind != FLOAT32:
            self._judge(name, self._exact(module, signature.limits.get("seq")), found)
        return replace(
            self._entry(name),
            heads=module.names,
            scores=found,
            latency_ms=latency_ms(run, rows.numpy()),
            difference=difference,
        )

    def _rows(self, signature: Signature) -> Tensor:
        """Inputs to check with, no longer than a graph takes."""
        longest = signature.limits.get("seq") if "seq" in signature.x.shape else None
        return self._trained.rows(longest)

    def _eager(self, module: Heads) -> Run:
        """Runs the model in PyTorch, base networks one after the other."""
        states = self._trained.bases or [{}]

        def run(given: Mapping[str, Array]) -> dict[str, Array]:
            tensors = {n: torch.from_numpy(a) for n, a in given.items()}
            return {n: t.numpy() for n, t in eager_answers(module, states, tensors).items()}

        return run

    def _exact(self, module: Heads, longest: int | None) -> dict[str, float]:
        """Scores of the model in PyTorch, on texts that are cut to a length."""
        if longest not in self._scores:
            self._progress("measuring the model in PyTorch")
            limits = {} if longest is None else {"seq": longest}
            self._scores[longest] = self._measured(self._eager(module), limits)
        return self._scores[longest]

    def _measured(self, run: Run, limits: Mapping[str, int]) -> dict[str, float]:
        """Scores on the held-out examples; texts are cut to the length that a file takes."""
        examples = self._held_out
        assert examples is not None
        if "seq" in limits and examples.x.shape[1] > limits["seq"]:
            x, y = examples.x[:, : limits["seq"]], examples.y
            y = y[:, : limits["seq"]] if y.ndim > 1 else y
            examples = replace(examples, x=x, y=y)
        return scores(run, self._heads, examples, self._trained.model.task, limits)

    def _check_quantized(self, quantized: torch.nn.Module, run: Run, rows: Tensor) -> None:
        with torch.no_grad():
            want = quantized(rows)
        got = run({"x": rows.numpy()})
        for name, logits in zip(self._heads, want, strict=True):
            difference = relative_difference(got[name], logits.numpy())
            if not difference <= _QUANTIZED:
                raise ExportError(
                    f"the file differs from the quantized model in the logits of {name} by "
                    f"{difference:.2g} of their size; nothing was written"
                )

    def _judge(self, name: str, exact: Mapping[str, float], found: Mapping[str, float]) -> None:
        """Raise :class:`ExportError` if a file loses more than allowed."""
        choice, metric = self._choice, self._metric
        for head, value in found.items():
            before = exact[head]
            loss = before - value if metric == "accuracy" else value / before - 1
            if loss > choice.max_loss and not choice.allow_loss:
                raise ExportError(
                    f"{name}: {metric} of {head} is {shown(metric, before)} in float32 and "
                    f"{shown(metric, value)} in the file, a loss of {loss:.2%} where "
                    f"{choice.max_loss:.2%} are allowed; raise --max-loss, give --allow-loss, or "
                    "leave the format out. Nothing was written"
                )

    def _entry(self, name: str) -> Written:
        kind, path = FORMATS[name], self._folder / FORMATS[name].path
        files = path.rglob("*") if path.is_dir() else path.parent.glob(f"{path.name}*")
        size = sum(file.stat().st_size for file in files if file.is_file())
        return Written(name, kind.path, size, kind.opened_by)


FLOAT32 = "float32"


def _kind(name: str) -> str:
    """Kind of the weights in a format: ``float32``, ``fp16``, ``int8`` or ``int4``."""
    return name.partition("-")[2] or FLOAT32


def _none(module: Heads, bases: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """No tensors in fewer bits."""
    return {}
