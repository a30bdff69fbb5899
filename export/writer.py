"""Writes bundles: one per tier, content-addressed, all or nothing."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort
from torch import Tensor

from edge_sdk.bundle import FORMAT, BlobStore, Graph, Manifest
from edge_sdk.errors import BundleError
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import DTYPES, Array
from export.errors import ExportError
from export.exact import check_parameters, check_stages, find_culprit
from export.lowering import onnx as lower_onnx
from export.lowering.verify import verify
from export.optimizers import get_optimizer
from export.packing import get_codec
from export.split import ClientSegment, SplitModel
from export.steps import ClientSteps, Step

INDEX = "index.json"
WEIGHTS = "model.safetensors"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Tier:
    """A class of devices.

    Attributes:
        cut: cut layer: how many blocks the devices hold.
        codec: how activations are packed, ``int8`` or ``fp16``.
    """

    cut: int
    codec: str = "int8"


@dataclass(frozen=True)
class TierEntry:
    """What the index says about a tier."""

    cut: int
    codec: str
    manifest: str


@dataclass(frozen=True)
class BundleIndex:
    """A folder of bundles.

    Attributes:
        folder: where it is.
        model: ``module:function`` that builds the SplitModel, if it was exported from one.
        classes: number of classes.
        optimizer: the optimizer in the step graphs.
        tiers: tiers by name.
    """

    folder: Path
    model: str | None
    classes: int
    optimizer: str
    tiers: Mapping[str, TierEntry] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> BundleIndex:
        """Read the index of an export; :class:`BundleError` if there is none."""
        try:
            raw = json.loads((folder / INDEX).read_text("utf-8"))
            if raw["format"] != FORMAT:
                raise BundleError(f"{folder} has format {raw['format']}, this reads {FORMAT}")
            tiers = {name: TierEntry(**entry) for name, entry in raw["tiers"].items()}
            return cls(folder, raw["model"], raw["classes"], raw["optimizer"], tiers)
        except FileNotFoundError:
            raise BundleError(
                f"no bundles in {folder} (it has no {INDEX}); run cutlayer export first"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{folder / INDEX} is damaged ({error}); export again") from error

    def manifest(self, tier: str) -> Manifest:
        """The verified manifest of a tier."""
        return Manifest.from_bytes(self.blobs().read(self.tiers[tier].manifest))

    def blobs(self) -> BlobStore:
        """The blobs of all tiers."""
        return BlobStore(self.folder / "blobs")


def export_bundles(
    model: SplitModel,
    tiers: Mapping[str, Tier],
    out: str | Path,
    *,
    example: Tensor,
    classes: int,
    optimizer: str = "sgd",
    model_path: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda line: None,
) -> BundleIndex:
    """Export one bundle per tier, with an auxiliary head at every tier's cut.

    Every step graph is run in ONNX Runtime and compared with eager PyTorch first. The folder
    appears when all of it is written, or not at all.

    Args:
        model: the model; auxiliary heads are added to it where they are missing.
        tiers: tiers by name.
        out: folder to write.
        example: some inputs (batch, ...) like those that devices will have.
        classes: number of classes.
        optimizer: ``sgd`` or ``adamw``, in the training graph.
        model_path: ``module:function`` that builds the model, noted for the hub.
        overwrite: replace an earlier export in ``out``.
        progress: told what is being done.

    Raises:
        ExportError: a cut outside the model, a module without an exact translation, a graph that
            differs from eager PyTorch, or ``out`` exists. Nothing is written.
    """
    out = Path(out)
    if not tiers:
        raise ExportError("there are no tiers to export for")
    if out.exists() and not _replaceable(out, overwrite):
        raise ExportError(f"{out} exists; choose another folder, or overwrite an earlier export")
    if len(example) < 2:
        raise ExportError("the example needs at least 2 rows, to see what inputs look like")
    if str(example.dtype).removeprefix("torch.") not in DTYPES:
        raise ExportError(f"the example is {example.dtype}; inputs are one of {', '.join(DTYPES)}")
    model = model.cpu()
    for tier in tiers.values():
        model.check_cut(tier.cut)
        get_codec(tier.codec)
    get_optimizer(optimizer)
    check_stages(model, max(tier.cut for tier in tiers.values()), example)
    model.add_heads([tier.cut for tier in tiers.values()], example, classes)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        blobs = BlobStore(folder / "blobs")
        entries = {}
        for name, tier in tiers.items():
            manifest = _export_tier(model, name, tier, blobs, example, classes, optimizer, progress)
            entries[name] = TierEntry(tier.cut, tier.codec, blobs.write(manifest.to_bytes()))
        model.save(folder / WEIGHTS)
        index = {
            "format": FORMAT,
            "model": model_path,
            "classes": classes,
            "optimizer": optimizer,
            "tiers": {name: vars(entry) for name, entry in entries.items()},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", "utf-8")
        folder.chmod(0o755)
        _put(folder, out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return BundleIndex(out, model_path, classes, optimizer, entries)


def _replaceable(out: Path, overwrite: bool) -> bool:
    """Whether ``out`` may be replaced: an empty folder, or an earlier export when asked to."""
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or (overwrite and (out / INDEX).is_file())


def _put(folder: Path, out: Path) -> None:
    """Rename ``folder`` to ``out``; an earlier export there goes when the new one is in place."""
    if not out.exists():
        folder.rename(out)
        return
    earlier = folder.with_name(f"{folder.name}-earlier")
    out.rename(earlier)
    try:
        folder.rename(out)
    except BaseException:
        earlier.rename(out)
        raise
    shutil.rmtree(earlier, ignore_errors=True)


def _export_tier(
    model: SplitModel,
    name: str,
    tier: Tier,
    blobs: BlobStore,
    example: Tensor,
    classes: int,
    optimizer: str,
    progress: Progress,
) -> Manifest:
    segment = ClientSegment(model, tier.cut)
    check_parameters(segment, example)
    rule, codec = get_optimizer(optimizer), get_codec(tier.codec)
    steps = ClientSteps(segment, rule, codec, example, classes)
    graphs, sizes = {}, {}

    def store(data: bytes) -> str:
        blob = blobs.write(data)
        sizes[blob] = len(data)
        return blob

    for step in steps.all():
        progress(f"{name}: cut {tier.cut}, graph {step.name}")
        data = _lower(step, segment, example)
        verify(steps, step, _runner(data, step), example)
        graphs[step.name] = Graph(store(data), step.inputs, step.outputs)
    initial = store(pack_tensors({n: p.numpy() for n, p in steps.parameters.items()}))
    return Manifest(
        tier=name,
        cut=tier.cut,
        runtime="onnx",
        classes=classes,
        heads=tuple(segment.heads),
        optimizer=optimizer,
        codec=tier.codec,
        packed=steps.packed,
        state=steps.state,
        graphs=graphs,
        initial_state=initial,
        blobs=sizes,
    )


def _lower(step: Step, segment: ClientSegment, example: Tensor) -> bytes:
    try:
        return lower_onnx.lower(step)
    except ExportError as error:
        culprit = find_culprit(segment, example)
        raise ExportError(f"{culprit or f'the graph {step.name!r}'}: {error}") from error


def _runner(data: bytes, step: Step) -> Callable[[dict[str, Array]], dict[str, Array]]:
    """Runs an ONNX file as a device would: the names are the ports'."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [port.spec.name for port in step.outputs]

    def run(feeds: dict[str, Array]) -> dict[str, Array]:
        return dict(zip(names, session.run(names, feeds), strict=True))

    return run
