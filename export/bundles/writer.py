"""Writes bundles: one per tier, content-addressed, completely or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Bundle, Graph, Manifest
from edge_sdk.bundle.signing import PrivateKey, sign
from edge_sdk.bundle.store import BlobStore
from edge_sdk.files import check_file_names
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import DTYPES
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Precision
from export.adapters_lora.lora import lower_ranks
from export.bases.exported import WholeBases, save_bases
from export.bundles.constants import store_constants
from export.bundles.quantized import (
    INT8,
    Comparison,
    LossCheck,
    compare,
    predict_int8,
    quantize_matrices,
)
from export.cutting.checks import check_parameters, check_sharing, check_stages
from export.cutting.input_ranges import InputRanges, check_classes, find_ranges
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel, modes_kept
from export.errors import ExportError
from export.lowering.culprit import find_culprit
from export.lowering.export_cache import ExportCache
from export.lowering.graph_files import GraphFiles, RuntimeName, lower
from export.lowering.onnx import Place
from export.lowering.trace import trace
from export.lowering.verification.draws import Like, Rows
from export.lowering.verification.records import Verified
from export.lowering.verification.verify import Report, Verifier
from export.out_folder import check_out, folder_for, put
from export.packing.codecs import get_codec
from export.steps.client_steps import ClientSteps
from export.steps.graph_names import with_needed
from export.steps.graph_set import all_steps
from export.steps.optimizers import get_optimizer
from export.steps.step import Step
from export.steps.torch_runtime import TorchRuntime

_ANY = InputRanges()

Progress = Callable[[str], None]

Compared = Callable[[str, Comparison], None]
"""Receives the name of a tier and the comparison of its int8 graph with float32."""


@dataclass(frozen=True)
class Tier:
    """Settings of the export for a class of devices.

    Attributes:
        cut: cut layer: number of blocks on the devices.
        codec: codec of the activations, ``int8`` or ``fp16``.
        runtime: runtime of the step graphs, ``onnx`` or ``executorch``; or ``torch`` in a
            simulation, where nothing is lowered (:class:`export.steps.torch_runtime.TorchRuntime`).
        batch: largest batch, for which ExecuTorch plans its memory; ONNX Runtime takes any batch.
        precision: ``int8`` adds the graph ``predict_int8``, see :mod:`export.bundles.quantized`.
        memory: ``low`` makes a step on ONNX Runtime take less memory and more time: it keeps no
            packed copies of weights.
        graphs: names of the graphs that the method needs beside those of every bundle:
            ``backward`` trains on gradients that the hub returns, ``fuse`` with those of the heads
            too; with ``finish`` the devices hold the model's head, so that labels stay on them;
            ``adversarial_train`` trains on adversarial examples, through the noise norms if there
            are dual norms. Graphs that these need are added.
        distill: weight of the distillation between heads, in ``train`` and ``fuse``.
        cut_rank: rank of the adapters in the last block before the cut, as in SplitFT
            (https://arxiv.org/abs/2604.26388); None for the rank of all blocks.
        bases: number of base networks, of which the model is one, as in Split-Mix
            (https://arxiv.org/abs/2203.09747): adds the graphs ``mix_N``; 0 for an ordinary model.

    Raises:
        ValueError: there is no optional graph of a name in ``graphs``.
    """

    cut: int
    codec: str = "int8"
    runtime: RuntimeName = "onnx"
    batch: int = 32
    precision: Precision = "float32"
    memory: Literal["normal", "low"] = "normal"
    graphs: Collection[str] = frozenset()
    distill: float = 0.0
    cut_rank: int | None = None
    bases: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "graphs", with_needed(self.graphs))


def export_bundles(
    model: SplitModel,
    tiers: Mapping[str, Tier],
    out: str | Path,
    *,
    example: Tensor,
    classes: int,
    optimizer: str = "sgd",
    decay: str = "matrices",
    model_path: str | None = None,
    extra: Mapping[str, Any] | None = None,
    key: PrivateKey | None = None,
    overwrite: bool = False,
    int8: LossCheck | None = None,
    compared: Compared = lambda tier, comparison: None,
    verified: bool = True,
    data: Examples | None = None,
    report: Report | None = None,
    bases: WholeBases | None = None,
    cache: ExportCache | None = None,
    progress: Progress = lambda line: None,
) -> BundleIndex:
    """Export one bundle per tier, with an auxiliary head at every tier's cut.

    Every step graph is first run in its runtime and compared with eager PyTorch. The folder
    appears only when everything is written. The same model gives the same bytes.

    Args:
        model: model to export; missing auxiliary heads are added to it.
        tiers: settings by name of the tier.
        out: folder to write.
        example: inputs (batch, ...) like those on the devices, at least 2 rows.
        classes: number of logits of the model's head; for a model of tokens the size of its
            vocabulary.
        optimizer: ``sgd`` or ``adamw``, in the training graphs.
        decay: which parameters weight decay applies to, ``matrices`` or ``all``; see
            :func:`export.steps.weight_decay.decayed_names`.
        model_path: source of the model for the hub, see
            :func:`export.bundles.model_source.build_model`.
        extra: further entries of the index, see :func:`export.bundles.model_source.model_of`.
        key: private key that signs the bundles.
        overwrite: whether an earlier export in ``out`` is replaced.
        int8: limit for the loss of int8 graphs, and the examples on which it is measured; needed
            if a tier has the precision ``int8``.
        compared: receives the comparison of each int8 graph with float32.
        verified: whether graphs are compared with eager PyTorch; only simulations skip this.
        data: labelled examples on which graphs are verified; None for random inputs like
            ``example``.
        report: counts what was verified.
        bases: base networks to export. ``model`` is then ``bases.hub``, and tiers that are cut
            behind its last block get ``bases.whole``.
        cache: what earlier exports have lowered and verified, such as ``ExportCache.of_user()``;
            None to do everything anew. It changes no byte of a bundle.
        progress: receives a line per stage of the export.

    Returns:
        Index of the written bundles.

    Raises:
        ExportError: a cut is outside the model, a module has no exact translation, a graph differs
            from eager PyTorch, an int8 graph loses too much, or ``out`` exists. Nothing is
            written.
        ConfigError: a name of a tier cannot be part of a file name everywhere.
        DataError: the examples do not fit the model. Nothing is written.
    """
    out = Path(out)
    if not tiers:
        raise ExportError("there are no tiers to export for")
    check_file_names(tiers, "tier")
    check_out(out, overwrite)
    if len(example) < 2:
        raise ExportError("the example needs at least 2 rows, to see what inputs look like")
    if str(example.dtype).removeprefix("torch.") not in DTYPES:
        raise ExportError(f"the example is {example.dtype}; inputs are one of {', '.join(DTYPES)}")
    model = model.cpu()
    for tier in tiers.values():
        model.check_cut(tier.cut)
        get_codec(tier.codec)
        if tier.runtime not in get_args(RuntimeName):
            known = ", ".join(get_args(RuntimeName))
            raise ExportError(f"unknown runtime {tier.runtime!r}; there are {known}")
    _check_precisions(tiers, int8)
    get_optimizer(optimizer)
    check_stages(model, max(tier.cut for tier in tiers.values()), example)
    for tier in tiers.values():
        check_sharing(model, tier.cut)
    check_classes(model, example, classes)
    ranges = find_ranges(model, example)
    if bases is None:
        model.add_heads([tier.cut for tier in tiers.values()], example, classes)
    with folder_for(out) as folder, modes_kept(model):
        blobs = BlobStore(folder / "blobs")
        entries = {}
        written: dict[Tier, Manifest] = {}  # tiers with equal settings share their graphs
        for name, tier in tiers.items():
            if tier not in written:
                whole = bases is not None and tier.cut == model.depth - 1
                segment = segment_of(bases.whole if bases is not None and whole else model, tier)
                check_parameters(segment, example)
                steps = make_steps(segment, tier, example, classes, optimizer, ranges, decay=decay)
                rows = None if data is None else Examples(*steps.ranges.fit(data.x, data.y))
                if int8 is not None:
                    steps.ranges.fit(int8.examples.x, int8.examples.y)
                written[tier] = write_tier(
                    steps,
                    name,
                    tier,
                    blobs,
                    example,
                    progress,
                    verified=verified,
                    data=rows,
                    report=report,
                    cache=cache,
                )
            manifest = replace(written[tier], tier=name)
            if int8 is not None and tier.precision == "int8":
                progress(f"{name}: cut {tier.cut}, comparing int8 with float32")
                comparison = compare(manifest, blobs.read, int8.examples)
                compared(name, comparison)
                int8.judge(name, comparison)
            signed = manifest.to_bytes() if key is None else sign(manifest.to_bytes(), key)
            entries[name] = TierEntry(tier.cut, tier.codec, blobs.write(signed))
        model.save(folder / WEIGHTS)
        if bases is not None:
            save_bases(bases.states, folder)
        noted = {"decay": decay, **(extra or {})}
        index = BundleIndex(folder, model_path, classes, optimizer, entries, noted)
        index.write()
        put(folder, out)
    return replace(index, folder=out)


def _check_precisions(tiers: Mapping[str, Tier], int8: LossCheck | None) -> None:
    for name, tier in tiers.items():
        if tier.precision not in get_args(Precision):
            known = ", ".join(get_args(Precision))
            raise ExportError(f"unknown precision {tier.precision!r}; there are {known}")
        if tier.precision == "int8" and int8 is None:
            raise ExportError(
                f"tier {name!r} has the precision int8: give examples to compare it with float32 "
                "on, --data FILE.npz with x and y"
            )
        if tier.precision == "int8" and tier.runtime == "torch":
            raise ExportError(
                f"tier {name!r} has the precision int8 and the runtime torch, which runs float32 "
                "only; export it for onnx or executorch"
            )


def segment_of(model: SplitModel, tier: Tier) -> ClientSegment:
    """The client segment of a tier.

    With ``cut_rank`` it is a segment of a copy of the model, which shares the frozen parameters.

    Raises:
        ExportError: the cut is outside the model, or the rank does not fit it.
    """
    if tier.cut_rank is not None:
        frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
        model = copy.deepcopy(model, dict(frozen))
        lower_ranks(model, {tier.cut - 1: tier.cut_rank})
    return ClientSegment(model, tier.cut, u_shaped="finish" in tier.graphs)


def make_steps(
    segment: ClientSegment,
    tier: Tier,
    example: Tensor,
    classes: int,
    optimizer: str,
    ranges: InputRanges = _ANY,
    *,
    decay: str = "matrices",
) -> ClientSteps:
    """The steps of a tier, with the limits of its runtime and of the model."""
    limits = {} if ranges.longest is None else {"seq": ranges.longest}
    if tier.runtime == "executorch":
        limits["batch"] = tier.batch
        if not example.is_floating_point() and example.dim() == 2:
            limits["seq"] = example.shape[1]
    return ClientSteps(
        segment,
        get_optimizer(optimizer),
        get_codec(tier.codec),
        example,
        classes,
        limits,
        graphs=tier.graphs,
        distill=tier.distill,
        bases=tier.bases,
        highest=ranges.highest,
        decay=decay,
    )


def write_tier(
    steps: ClientSteps,
    name: str,
    tier: Tier,
    blobs: BlobStore,
    example: Tensor,
    progress: Progress,
    *,
    verified: bool = True,
    data: Examples | None = None,
    report: Report | None = None,
    cache: ExportCache | None = None,
) -> Manifest:
    """Lower the steps of a tier, verify every graph and write the blobs.

    Args:
        steps: steps of the tier.
        name: name of the tier.
        tier: settings of the export.
        blobs: store to write to.
        example: inputs (batch, ...) like those on the devices.
        progress: receives a line per stage.
        verified: whether graphs are compared with eager PyTorch; bundles that are only measured
            skip this.
        data: labelled examples on which graphs are verified, in the dtypes of the graphs; None for
            random inputs like ``example``.
        report: counts what was verified.
        cache: what was lowered and verified before; None to do everything anew.

    Returns:
        Manifest of the bundle, not signed.

    Raises:
        ExportError: a graph cannot be lowered, or differs from eager PyTorch.
    """
    sizes: dict[str, int] = {}

    def store(data: bytes) -> str:
        blob = blobs.write(data)
        sizes[blob] = len(data)
        return blob

    # a .pte file contains its constants
    frozen = {n: t for n, t in steps.constants.items() if tier.runtime == "onnx"}
    constants = store_constants(frozen, blobs)
    sizes |= constants.sizes
    outside = {n: steps.constants[n] for n in constants.places}
    progress(f"{name}: cut {tier.cut}, {tier.runtime}")
    found = all_steps(steps)
    lowered = [_lower(steps, found, tier, constants.places, example, cache)]
    if tier.precision == "int8":
        progress(f"{name}: cut {tier.cut}, {INT8}")
        int8 = predict_int8(steps, quantize_matrices(steps, tier.runtime))
        found.append(int8)
        replaced: dict[str, Tensor] = {}
        if tier.runtime == "onnx":  # constants that a device replaces must not be in the file
            replaced = {n: t for n, t in int8.constants.items() if n not in constants.places}
        held = store_constants(replaced, blobs, smallest=1)
        outside |= replaced
        constants = constants.joined(held)
        sizes |= held.sizes
        lowered.append(lower(tier.runtime, [int8], constants.places, cache))
    files = {graph: file for part in lowered for graph, file in part.files.items()}
    refers = {graph: names for part in lowered for graph, names in part.constants.items()}
    initial = {n: t.contiguous().numpy() for n, t in steps.initial.items()}
    manifest = Manifest(
        tier=name,
        cut=tier.cut,
        runtime=tier.runtime,
        task=steps.segment.task,
        classes=steps.classes,
        limits=steps.limits,
        heads=tuple(steps.segment.heads),
        optimizer=steps.optimizer.name,
        codec=tier.codec,
        packed=steps.packed,
        state=steps.state,
        graphs={
            step.name: Graph(store(files[step.name]), step.inputs, step.outputs, refers[step.name])
            for step in found
        },
        initial_state=store(pack_tensors(initial)),
        constants=tuple(constants.entries),
        blobs=sizes,
        bases=tier.bases,
        whole=steps.segment.whole,
        highest=steps.highest,
        memory=tier.memory,
    )
    if verified:
        shared = {n: outside[n].contiguous().numpy() for n in constants.places}
        bundle = Bundle(manifest, files, initial, shared)
        programs = {graph: p for part in lowered for graph, p in part.programs.items()}

        def open_runtime(threads: int) -> Runtime:
            if tier.runtime == "torch":
                return TorchRuntime(manifest, steps)
            return load_runtime(bundle, threads)

        source = Like(example) if data is None else Rows.of(data)
        verifier = Verifier(steps, source, Report() if report is None else report)
        contents = {graph: key for part in lowered for graph, key in part.keys.items()}
        for step in found:
            progress(f"{name}: cut {tier.cut}, checking {step.name} against PyTorch")
            check = partial(verifier.verify, step, programs.get(step.name) or trace(step))
            if cache is None or step.name not in contents:
                check(open_runtime)
                continue
            key = verifier.key(step, contents[step.name], manifest)
            before = cache.get(key)
            if before is None or not verifier.holds(step, Verified.from_bytes(before)):
                cache.put(key, check(open_runtime).to_bytes())
    return manifest


def _lower(
    steps: ClientSteps,
    found: Sequence[Step],
    tier: Tier,
    places: Mapping[str, Place],
    example: Tensor,
    cache: ExportCache | None,
) -> GraphFiles:
    try:
        return lower(tier.runtime, found, places, cache)
    except ExportError as error:
        culprit = find_culprit(
            steps.segment, example, lambda step: lower(tier.runtime, [step], {}), error
        )
        raise ExportError(culprit or f"the training step: {error}") from error
