"""Measures cuts: writes the bundle that an export would write, and runs its training steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError
from edge_sdk.runtime.measure import graphs_of_a_step, measure_apart
from export.bundles.writer import Tier, make_steps, segment_of, write_tier
from export.cutting.checks import check_parameters, check_sharing, check_stages
from export.cutting.input_ranges import check_classes, find_ranges
from export.cutting.split_model import SplitModel, modes_kept
from export.errors import ExportError
from export.planning.cost import Cost, Counts, Failure
from export.planning.flops import flops_per_row
from export.steps.client_steps import ClientSteps
from export.steps.graph_set import all_steps

_NAME = "measured"
_STEPS = 2
"""Number of measured steps: memory reaches its peak in the second."""

_ROWS = 2
"""Rows of the example; a batch norm in training mode needs more than one."""


class CutMeasurer:
    """Measures cuts of a model, which it does not change.

    Args:
        model: model to measure.
        example: inputs (batch, ...) like those on the devices.
        classes: number of classes; for tokens the size of the vocabulary.
        optimizer: ``sgd`` or ``adamw``.
        decay: parameters that weight decay applies to, ``matrices`` or ``all``.

    Raises:
        ExportError: the model's head has another number of classes.
    """

    def __init__(
        self, model: SplitModel, example: Tensor, classes: int, optimizer: str, decay: str
    ) -> None:
        self.model, self.classes = model.cpu(), classes
        self.optimizer, self._decay = optimizer, decay
        self.example = example[:_ROWS]  # only its shape and distribution matter
        self._length = example.shape[1] if example.dim() == 2 else 1
        self._heads = dict(model.aux.items())
        self._written: _Written | None = None
        self._checked = 0
        with suppress(ExportError):  # if the check fails, each cut is checked by itself
            self._check(model.depth - 1)
        if self._checked:
            check_classes(model, self.example, classes)
        self._ranges = find_ranges(model, self.example)

    def count(self, tier: Tier, depths: Sequence[int]) -> Counts:
        """Count parameters, FLOPs and bytes of a cut, without lowering it.

        Args:
            tier: the cut and the other settings of the export.
            depths: depths of the auxiliary heads that the device holds.

        Raises:
            ExportError: the cut cannot be exported.
        """
        with modes_kept(self.model):
            return self._count(self._steps(tier, depths), tier)

    def measure(self, tier: Tier, depths: tuple[int, ...]) -> Cost | Failure:
        """Lower a cut, write its bundle and measure its training step.

        Args:
            tier: the cut and the other settings of the export.
            depths: depths of the auxiliary heads that the device holds.
        """
        try:
            with modes_kept(self.model):
                steps = self._steps(tier, depths)
                counts = self._count(steps, tier)
                written = self._write(steps, tier, depths)
            measured = measure_apart(written.path, _NAME, tier.batch, self._length, _STEPS)
        except (ExportError, BundleError) as error:
            return Failure(tier, depths, str(error))
        return Cost(tier, depths, counts, sum(written.manifest.blobs.values()), measured)

    def _steps(self, tier: Tier, depths: Sequence[int]) -> ClientSteps:
        """The steps of a cut whose device holds the heads at these depths."""
        model, cut = self.model, tier.cut
        view = SplitModel(
            model.stem,
            list(model.block),
            model.head,
            model.task,
            channels=model.channels,
        )
        view.layout = model.layout
        view.aux.update({str(d): self._heads[str(d)] for d in depths if str(d) in self._heads})
        self._check(cut)
        check_sharing(model, cut)
        view.add_heads(depths, self.example, self.classes)
        self._heads.update(view.aux.items())
        segment = segment_of(view, tier)
        check_parameters(segment, self.example)
        return make_steps(
            segment,
            tier,
            self.example,
            self.classes,
            self.optimizer,
            self._ranges,
            decay=self._decay,
        )

    def _check(self, cut: int) -> None:
        if cut > self._checked:
            check_stages(self.model, cut, self.example)
            self._checked = cut

    def _count(self, steps: ClientSteps, tier: Tier) -> Counts:
        frozen = {n for n, _ in steps.segment.named_parameters()} - steps.parameters.keys()
        known = {step.name: step for step in all_steps(steps)}
        runs = Counter(graphs_of_a_step(known))
        flops = {name: int(flops_per_row(known[name], self._length)) for name in runs}
        tokens = self._length if any("seq" in spec.shape for spec in steps.packed) else 1
        sent = sum(
            port.spec.nbytes(batch=tier.batch, seq=self._length)
            for name in runs
            for port in known[name].outputs
            if port.role == "packed" and not steps.segment.whole
        )
        return Counts(
            parameters=sum(t.numel() for t in steps.parameters.values()),
            frozen=sum(steps.constants[n].numel() for n in frozen),
            flops=sum(flops[name] * times for name, times in runs.items()),
            graph_flops=flops,
            tokens=tokens,
            activation_bytes=sent / (tier.batch * tokens),
            update_bytes=sum(t.nbytes for t in steps.initial.values()),
        )

    def _write(self, steps: ClientSteps, tier: Tier, depths: tuple[int, ...]) -> _Written:
        """Write the bundle of a cut, unless it was written last: ONNX ones fit every batch."""
        key = (replace(tier, batch=1) if "batch" not in steps.limits else tier), depths
        if self._written is not None and self._written.key == key:
            return self._written
        self.close()
        folder = TemporaryDirectory(prefix="cutlayer-plan-")
        path = Path(folder.name)
        blobs = BlobStore(path / "blobs")
        manifest = write_tier(
            steps, _NAME, tier, blobs, self.example, lambda line: None, verified=False
        )
        entry = TierEntry(tier.cut, tier.codec, blobs.write(manifest.to_bytes()))
        BundleIndex(path, None, self.classes, self.optimizer, {_NAME: entry}).write()
        self._written = _Written(key, folder, manifest)
        return self._written

    def close(self) -> None:
        """Remove the bundle that was written last."""
        if self._written is not None:
            self._written.folder.cleanup()
            self._written = None


@dataclass(frozen=True)
class _Written:
    """The bundle that was written last, in a temporary folder.

    Attributes:
        key: export settings and depths of the heads.
        folder: folder of the bundle.
        manifest: manifest of the bundle.
    """

    key: tuple[Tier, tuple[int, ...]]
    folder: TemporaryDirectory[str]
    manifest: Manifest

    @property
    def path(self) -> Path:
        return Path(self.folder.name)
