"""The configuration file ``tiers.toml``: tiers, their limits, and the inputs of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_sdk import config
from edge_sdk.bundle.ranges import MAX_POSITIONS
from edge_sdk.errors import ConfigError
from edge_sdk.files import check_file_names
from edge_sdk.protocol.checks import MAX_BASES
from export.steps.graph_names import with_needed

if TYPE_CHECKING:
    from torch import Tensor

    from export.adapters_lora.lora import Lora
    from export.bases.exported import WholeBases
    from export.bases.split_width import Bases
    from export.bundles.writer import Tier
    from export.cutting.split_model import SplitModel

_LENGTH = 64

_MOST = 2**26
"""Largest number of values of one input: the export draws several inputs."""


@dataclass(frozen=True)
class TierTable:
    """Table ``[tiers.NAME]``: a class of devices.

    Attributes:
        cut: cut layer; if not given, the deepest cut that the tier can carry.
        codec: codec of the activations.
        runtime: runtime of the step graphs.
        batch: rows of a training step, which is the largest batch on ExecuTorch.
        memory: ``low``: a step on ONNX Runtime takes less memory and more time.
        precision: ``int8`` adds a graph for inference with int8 weights.
        memory_mb: largest memory of a training step, in 10^6 bytes.
        gflops: speed of the devices while training, in 10^9 operations per second.
        uplink_mbit: upload speed of the devices, in 10^6 bits per second.
        max_epoch_s: longest time of an epoch over the local examples, in seconds.
        examples: number of local examples of a device.
        graphs: optional step graphs of the tier, see :data:`export.steps.graph_names.NEEDS`.
    """

    cut: int | None = None
    codec: Literal["int8", "fp16"] = "int8"
    runtime: Literal["onnx", "executorch"] = "onnx"
    batch: int = 32
    memory: Literal["normal", "low"] = "normal"
    precision: Literal["float32", "int8"] = "float32"
    memory_mb: float | None = None
    gflops: float | None = None
    uplink_mbit: float | None = None
    max_epoch_s: float | None = None
    examples: int = 1000
    graphs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("memory_mb", "gflops", "uplink_mbit", "max_epoch_s"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        for name in ("batch", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 1 or more")
        if self.max_epoch_s is not None and self.gflops is None and self.uplink_mbit is None:
            raise ValueError("max_epoch_s has no effect without gflops or uplink_mbit; set one")
        if self.memory == "low" and self.runtime != "onnx":
            raise ValueError(f'memory = "low" has no effect on {self.runtime}; leave it out')
        with_needed(self.graphs)


@dataclass(frozen=True)
class LoraTable:
    """Table ``[lora]``: adapters on a frozen base; see :class:`~export.adapters_lora.lora.Lora`.

    Attributes:
        cut_rank: rank in the last block before a tier's cut; ``rank`` if not given.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = field(default_factory=list)
    cut_rank: int | None = None

    def __post_init__(self) -> None:
        if self.cut_rank is not None and self.cut_rank < 1:
            raise ValueError(f"cut_rank is {self.cut_rank}; it must be 1 or more")


@dataclass(frozen=True)
class TiersConfig:
    """Content of ``tiers.toml``.

    Attributes:
        tiers: tiers by name.
        classes: number of logits of the model's head, which the model gives itself.
        input_shape: shape of one input without the batch; known for a transformers model.
        input_dtype: ``float32``, or ``int64`` for token ids.
        input_high: exclusive upper bound of token ids.
        length: number of tokens in a text.
        optimizer: optimizer of the training graphs.
        decay: parameters that weight decay applies to, in the graphs and in the trunk: ``matrices``
            leaves norms, biases and embeddings alone.
        graphs: optional step graphs of every tier, see :data:`export.steps.graph_names.NEEDS`.
        lora: freeze the model and train adapters.
        bases: number of base networks into which the model is split by width, for Split-Mix; tiers
            without a cut train whole bases. 0 for an ordinary model.
        dual_norms: give each norm a copy for adversarial examples; needs ``bases``.
    """

    tiers: dict[str, TierTable]
    classes: int | None = None
    input_shape: list[int] | None = None
    input_dtype: Literal["float32", "int64"] = "float32"
    input_high: int = 2
    length: int = _LENGTH
    optimizer: Literal["sgd", "adamw"] = "sgd"
    decay: Literal["matrices", "all"] = "matrices"
    graphs: list[str] = field(default_factory=list)
    lora: LoraTable | None = None
    bases: int = 0
    dual_norms: bool = False

    def __post_init__(self) -> None:
        if not self.tiers:
            raise ValueError("there are no tiers; add [tiers.NAME]")
        check_file_names(self.tiers, "tier")
        shape = self.input_shape
        if shape is not None and not (shape and min(shape) > 0 and math.prod(shape) <= _MOST):
            raise ValueError(
                f"input_shape is {shape}; it must be a list of positive integers, for at most "
                f"{_MOST:,} values"
            )
        if self.classes is not None and self.classes < 1:
            raise ValueError(f"classes is {self.classes}; it must be 1 or more")
        if self.input_high < 1:
            raise ValueError(f"input_high is {self.input_high}; it must be 1 or more")
        if not 0 <= self.bases <= MAX_BASES:
            raise ValueError(f"bases is {self.bases}; it must be from 1 to {MAX_BASES}, or 0")
        used = with_needed([*self.graphs, *(g for t in self.tiers.values() for g in t.graphs)])
        if not self.bases and (self.dual_norms or "attack" in used):
            what = "dual_norms" if self.dual_norms else "adversarial_train in graphs"
            raise ValueError(f"{what} has no effect without bases; set bases to 1 or more")
        if self.bases and (self.lora is not None or "activate" in used):
            raise ValueError(
                "bases are trained from the start, by the devices' own losses; leave out lora, and "
                "backward, finish, fuse and activate in graphs"
            )
        int8 = [name for name, tier in self.tiers.items() if tier.precision == "int8"]
        if self.bases and int8:
            raise ValueError(
                f"tier {int8[0]!r} has the precision int8, whose graph answers with one base "
                "network only; leave out precision"
            )
        if not 2 <= self.length <= MAX_POSITIONS:
            raise ValueError(f"length is {self.length}; it must be from 2 to {MAX_POSITIONS}")

    @classmethod
    def read(cls, path: Path) -> TiersConfig:
        """Read the file; raises :class:`ConfigError` if it is missing or not valid."""
        return config.load(cls, path)

    def at(self, name: str, cut: int) -> Tier:
        """Settings of a tier's export at a cut.

        Args:
            name: name of the tier.
            cut: cut layer.
        """
        from export.bundles.writer import Tier

        table = self.tiers[name]
        return Tier(
            cut,
            codec=table.codec,
            runtime=table.runtime,
            batch=table.batch,
            memory=table.memory,
            precision=table.precision,
            graphs=[*self.graphs, *table.graphs],
            cut_rank=None if self.lora is None else self.lora.cut_rank,
            bases=self.bases,
        )

    def make_lora(self) -> Lora | None:
        """Configuration of the adapters; None without ``[lora]``.

        Raises:
            ConfigError: a value of ``[lora]`` is out of range.
        """
        from export.adapters_lora.lora import Lora

        if self.lora is None:
            return None
        try:
            table = self.lora
            return Lora(table.rank, table.alpha, table.dropout, table.targets)
        except ValueError as error:
            raise ConfigError(f"[lora]: {error}") from error

    def mix(self, example: Tensor) -> dict[str, Any]:
        """Entry ``mix`` of an index; :func:`~export.bundles.model_source.model_of` reads it."""
        high = None if example.is_floating_point() else int(example.max()) + 1
        shape = list(example.shape[1:])
        return {"bases": self.bases, "dual_norms": self.dual_norms, "shape": shape, "high": high}

    def split_bases(self, model: SplitModel, example: Tensor) -> Bases:
        """Split the model into base networks.

        Args:
            model: the wide model.
            example: inputs (batch, ...).

        Raises:
            ExportError: the model cannot be split.
        """
        from export.bases.split_width import split_width

        bases = split_width(model, self.bases, example)
        return bases.with_dual_norms() if self.dual_norms else bases

    def make_bases(
        self, model: SplitModel, tiers: Mapping[str, Tier], example: Tensor, classes: int
    ) -> WholeBases:
        """Split the model into base networks for an export.

        Args:
            model: the wide model.
            tiers: settings of the export by tier, whose cuts get auxiliary heads.
            example: inputs (batch, ...).
            classes: number of classes.

        Raises:
            ExportError: the model cannot be split.
        """
        from export.bases.exported import whole_bases

        bases = self.split_bases(model, example)
        cuts = {tier.cut for tier in tiers.values() if tier.cut != model.depth}
        return whole_bases(bases, cuts, example, classes)

    def example(self, model: SplitModel) -> tuple[Tensor, int]:
        """Random inputs (batch, ...) for the model, and the number of classes.

        Raises:
            ConfigError: neither the file nor the model gives the shape.
            ExportError: the model fails on such inputs.
        """
        from export.bundles.model_source import draw_inputs
        from export.cutting.input_ranges import outputs

        known = _known(model, self.length)
        shape = self.input_shape if self.input_shape is not None else known.get("shape")
        if shape is None:
            raise ConfigError("tiers.toml must say input_shape: this model does not")
        high = known.get("high", self.input_high if self.input_dtype == "int64" else None)
        example = draw_inputs(shape, high)
        classes = outputs(model, example) if self.classes is None else self.classes
        if classes is None:
            raise ConfigError("tiers.toml must say classes: the model has no head")
        return example, classes

    def exported(
        self, model: SplitModel, choose: Callable[[], Mapping[str, int]]
    ) -> dict[str, Tier]:
        """Settings of each tier's export, at its cut or at the cut that ``choose`` finds.

        Args:
            model: model to export.
            choose: finds a cut for every tier; called if a tier has none.

        Raises:
            ExportError: as ``choose`` does.
        """
        cuts: Mapping[str, int] = self.settled(model.depth)
        if len(cuts) < len(self.tiers):
            cuts = choose()
        return {name: self.at(name, cuts[name]) for name in self.tiers}

    def settled(self, depth: int) -> dict[str, int]:
        """Cuts of the tiers that need no plan: given ones, and those of tiers with whole bases.

        Args:
            depth: number of blocks of the model.
        """
        cuts = {name: tier.cut for name, tier in self.tiers.items() if tier.cut is not None}
        return dict.fromkeys(self.tiers, depth) | cuts if self.bases else cuts


def _known(model: SplitModel, length: int) -> dict[str, Any]:
    """Shape and bound of token ids, as far as the model gives them."""
    from torch import nn

    origin = getattr(model, "origin", None)
    if origin is None:
        if model.task == "tokens":
            table = model.stem.embedding
            assert isinstance(table, nn.Embedding)
            words = table.num_embeddings
            return {"shape": [length], "high": words}
        return {}
    known = origin.config
    if hasattr(known, "vocab_size"):
        longest = getattr(known, "max_position_embeddings", length)
        return {"shape": [min(length, longest)], "high": known.vocab_size}
    size = getattr(known, "image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    return {"shape": [known.num_channels, height, width]}
