"""Writes bundles of a trained model: what devices download, with the trained weights inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.learner import Learner
from edge_sdk.training.self_check import relative_difference
from export.bases.exported import BASES
from export.bundles.quantized import INT8, predict_int8, quantize_matrices
from export.bundles.writer import Progress, Tier, make_steps, segment_of
from export.cutting.split_model import WEIGHTS, ClientSegment, SplitModel, evaluating
from export.errors import ExportError
from export.formats.trained import TrainedModel
from export.lowering.graph_files import lower
from export.lowering.verification.draws import Like
from export.lowering.verification.verify import Verifier

_DIFFERENCE = 1e-3
"""Largest relative difference of a device's logits from those of the model in PyTorch. The graphs
were verified when they were exported; this finds a state that is not theirs."""


def write_bundles(folder: Path, trained: TrainedModel, progress: Progress) -> BundleIndex:
    """Write bundles that start from the trained weights, with the graphs of the run's bundles.

    Bundles of base networks hold all of them, best first. Each bundle holds a few inputs and its
    answers to them, which a device compares with its own before it uses the bundle. On
    ExecuTorch the graph ``predict_int8`` holds weights, so it is lowered again.

    Args:
        folder: folder to write.
        trained: the trained model.
        progress: receives a line per tier.

    Returns:
        The index of the new bundles, which are not signed.

    Raises:
        ConfigError: the model does not fit the bundles.
        ExportError: a bundle answers differently from the model.
    """
    index, models = trained.index, trained.by_tier
    blobs = BlobStore(folder / "blobs")
    entries = {}
    for tier, entry in index.tiers.items():
        progress(f"bundle of tier {tier}")
        manifest = index.manifest(tier)
        if trained.bases:
            manifest = _with_states(manifest, [_arrays(own) for own in trained.bases], index, blobs)
        else:
            segment = _segment(models[tier], manifest)
            manifest = _with_states(manifest, [_arrays(segment.state_dict())], index, blobs)
            if INT8 in manifest.graphs and manifest.runtime == "executorch":
                manifest = _with_int8(manifest, segment, blobs, trained)
        learner = Learner(manifest, load_runtime(Bundle.open(manifest, blobs.read)))
        if not trained.bases:
            _check(learner, segment, trained)
        manifest = _with_sample(learner, blobs, trained)
        entries[tier] = TierEntry(entry.cut, entry.codec, blobs.write(manifest.to_bytes()))
    written = replace(index, folder=folder, tiers=entries)
    written.write()
    trained.model.save(folder / WEIGHTS)
    if (index.folder / BASES).exists():
        (folder / BASES).write_bytes((index.folder / BASES).read_bytes())
    return written


def _segment(model: SplitModel, manifest: Manifest) -> ClientSegment:
    """The client segment of a tier, whose last block may have adapters of a lower rank."""
    last = f"block.{manifest.cut - 1}."
    ranks = {
        int(spec.shape[0])
        for spec in manifest.exchanged()
        if spec.name.startswith(last) and ".lora_A." in spec.name
    }
    return segment_of(model, Tier(manifest.cut, cut_rank=min(ranks, default=None)))


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def _with_states(
    manifest: Manifest,
    states: Sequence[Mapping[str, Array]],
    index: BundleIndex,
    blobs: BlobStore,
) -> Manifest:
    """Write the blobs of a tier with trained states; return the new manifest."""
    tier = manifest.tier
    if max(manifest.bases, 1) != len(states):
        raise ConfigError(
            f"the run has {len(states)} bases, and the bundle of tier {tier!r} is for "
            f"{manifest.bases}; give the bundles that the hub had"
        )
    kept = [name for name in manifest.blobs if name != manifest.initial_state]
    for name in kept:
        blobs.write(index.blobs().read(name))
    sizes = {name: manifest.blobs[name] for name in kept}
    names = []
    for state in states:
        own = {}
        for spec in manifest.exchanged():
            if spec.name not in state or state[spec.name].shape != spec.shape:
                raise ConfigError(
                    f"the run's model has no {spec.name} as the bundle of tier {tier!r} has; give "
                    "the bundles that the hub had"
                )
            own[spec.name] = state[spec.name]
        data = pack_tensors(own)
        names.append(blobs.write(data))
        sizes[names[-1]] = len(data)
    if len(set(names)) < len(names):
        raise BundleError("two bases are the same; the run has not trained them")
    return replace(
        manifest,
        initial_state=names[0],
        base_states=tuple(names) if manifest.bases else (),
        blobs=sizes,
    )


def _with_int8(
    manifest: Manifest, segment: ClientSegment, blobs: BlobStore, trained: TrainedModel
) -> Manifest:
    """Lower ``predict_int8`` for ExecuTorch with the trained weights; return the new manifest."""
    example = trained.rows(manifest.limits.get("seq"))
    tier = Tier(manifest.cut, manifest.codec, "executorch", manifest.limits["batch"], "int8")
    steps = make_steps(segment, tier, example, manifest.classes, manifest.optimizer)
    step = predict_int8(steps, quantize_matrices(steps, "executorch"))
    lowered = lower("executorch", [step], {})
    data = lowered.files[INT8]
    old, new = manifest.graphs[INT8].blob, blobs.write(data)
    sizes = {n: size for n, size in manifest.blobs.items() if n != old} | {new: len(data)}
    graphs = {**manifest.graphs, INT8: replace(manifest.graphs[INT8], blob=new)}
    manifest = replace(manifest, graphs=graphs, blobs=sizes)
    bundle = Bundle.open(manifest, blobs.read)
    Verifier(steps, Like(example)).verify(
        step, lowered.programs[INT8], lambda threads: load_runtime(bundle, threads)
    )
    return manifest


def _with_sample(learner: Learner, blobs: BlobStore, trained: TrainedModel) -> Manifest:
    """Store some inputs with the bundle's answers to them; return the new manifest.

    The inputs are drawn: what is held out does not leave for devices.
    """
    manifest = learner.manifest
    rows = trained.drawn(manifest.limits.get("seq"))[: min(manifest.limits.get("batch", 2), 2)]
    logits, _ = learner.predict(rows.numpy())
    data = pack_tensors({"x": rows.numpy(), "logits": logits})
    name = blobs.write(data)
    return replace(manifest, sample=name, blobs={**manifest.blobs, name: len(data)})


def _check(learner: Learner, segment: ClientSegment, trained: TrainedModel) -> None:
    """Compare the answers of a bundle with the model's, on a few rows."""
    manifest = learner.manifest
    rows = trained.rows(manifest.limits.get("seq"))[: manifest.limits.get("batch")]
    got = learner.predict(rows.numpy())[0]
    with torch.no_grad(), evaluating(segment):
        want = segment(rows)[1].numpy()
    difference = relative_difference(got, want)
    if not difference <= _DIFFERENCE:
        raise ExportError(
            f"the bundle of tier {manifest.tier!r} answers differently from the model, by "
            f"{difference:.2g} of its logits; nothing was written"
        )
