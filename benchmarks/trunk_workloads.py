"""Workloads of the trunk's benchmark: a model, three cuts, and packed batches for every device.

A workload is prepared once in a folder: bundles for a hub, a token per device, and a file per
device with the batches that the device replays in every round. Hub, devices and bare loop read this
folder, so they work on the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.replay import DEVICES, ReplayDevice
from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.frames import pack_tensors
from edge_sdk.protocol.tensors import Array
from export.adapters_lora.lora import Lora, add_lora
from export.cutting.channels import channel_axis
from export.cutting.split_model import WEIGHTS, SplitModel
from export.packing.codecs import get_codec

CODEC = "int8"
"""Codec of the replayed activations."""

TOKENS = "tokens.toml"


@dataclass(frozen=True)
class Workload:
    """A model with the traffic of a round.

    Attributes:
        name: name on the command line.
        build: builds the model, with the same weights every time.
        cuts: cut layers; the devices are spread evenly over them.
        shape: shape of one input: an image, or (positions,) of a text.
        classes: number of classes; for texts, the size of the vocabulary.
        batch: rows of a batch.
        batches: number of batches that a device sends in a round.
        max_rows: maximum number of rows of a merged step.
        optimizer: optimizer of the trunk and of the bundles.
        rounds: number of timed rounds in one turn of the hub.
    """

    name: str
    build: Callable[[], SplitModel]
    cuts: tuple[int, ...]
    shape: tuple[int, ...]
    classes: int
    batch: int
    batches: int
    max_rows: int
    optimizer: str = "sgd"
    rounds: int = 2

    @property
    def rows(self) -> int:
        """Number of rows that a device sends in a round."""
        return self.batch * self.batches

    @property
    def texts(self) -> bool:
        """Whether inputs are texts, so that throughput is in tokens."""
        return len(self.shape) == 1

    @property
    def samples_per_row(self) -> int:
        """Number of samples of a row: 1 for an image, the number of tokens for a text."""
        return self.shape[0] if self.texts else 1

    def inputs(self, rows: int, seed: int) -> tuple[Array, Array]:
        """Return random inputs (rows, ...) and labels (rows,), or (rows, positions) for texts."""
        rng = np.random.default_rng(seed)
        if self.texts:
            tokens = rng.integers(self.classes, size=(rows, self.shape[0] + 1))
            return tokens[:, :-1].copy(), tokens[:, 1:].copy()
        x = rng.standard_normal((rows, *self.shape)).astype(np.float32)
        return x, rng.integers(self.classes, size=rows)

    def model(self) -> SplitModel:
        """Build the model with its auxiliary heads, on the CPU."""
        model = self.build()
        model.add_heads(self.cuts, torch.from_numpy(self.inputs(2, 0)[0]), self.classes)
        return model


def _small() -> SplitModel:
    from server_hub.demo.digits import build

    return build()


def _resnet(width: int) -> SplitModel:
    from benchmarks.resnet import build

    return build(width)


def _conv() -> SplitModel:
    return _resnet(16)


def _resnet18() -> SplitModel:
    return _resnet(64)


def _gpt2(width: int, depth: int, vocabulary: int, length: int) -> SplitModel:
    import transformers

    from export.cutting.pretrained import from_transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=width, n_layer=depth, n_head=max(width // 64, 2), vocab_size=vocabulary,
        n_positions=length, bos_token_id=0, eos_token_id=0,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return from_transformers(config)


def _gpt2_narrow() -> SplitModel:
    return _gpt2(128, 6, 256, 64)


def _gpt2_narrow_lora() -> SplitModel:
    return add_lora(_gpt2_narrow(), Lora(rank=8), "gpt2")


def _gpt2_wide() -> SplitModel:
    return _gpt2(768, 12, 50257, 128)


def _gpt2_wide_lora() -> SplitModel:
    return add_lora(_gpt2_wide(), Lora(rank=8), "gpt2")


_NARROW = {
    "cuts": (1, 2, 4), "shape": (64,), "classes": 256, "batch": 4, "batches": 4, "max_rows": 64,
    "optimizer": "adamw", "rounds": 3,
}  # fmt: skip
_WIDE = {
    "cuts": (2, 4, 8), "shape": (128,), "classes": 50257, "batch": 8, "batches": 4, "max_rows": 64,
    "optimizer": "adamw", "rounds": 3,
}  # fmt: skip

_EVERYWHERE = (
    Workload("small", _small, (1, 3, 5), (1, 8, 8), 10, 16, 4, 64, rounds=10),
    Workload("conv", _conv, (2, 4, 6), (3, 32, 32), 10, 32, 2, 256, rounds=3),
    Workload("resnet18", _resnet18, (2, 4, 6), (3, 32, 32), 10, 32, 2, 256, rounds=3),
)
_BY_DEVICE = {
    "cpu": (
        Workload("gpt2", _gpt2_narrow, **_NARROW),  # type: ignore[arg-type]
        Workload("gpt2-lora", _gpt2_narrow_lora, **_NARROW),  # type: ignore[arg-type]
    ),
    "cuda": (
        Workload("gpt2", _gpt2_wide, **_WIDE),  # type: ignore[arg-type]
        Workload("gpt2-lora", _gpt2_wide_lora, **_WIDE),  # type: ignore[arg-type]
    ),
}

NAMES = tuple(w.name for w in (*_EVERYWHERE, *_BY_DEVICE["cpu"]))


def get_workload(name: str, device: str) -> Workload:
    """Return the workload ``name``; GPT-2 is narrower on the CPU.

    Raises:
        ConfigError: there is no workload of this name.
    """
    for workload in (*_EVERYWHERE, *_BY_DEVICE[device]):
        if workload.name == name:
            return workload
    raise ConfigError(f"there is no model {name!r} to measure; choose from {', '.join(NAMES)}")


def prepare(workload: Workload, folder: Path, devices: int) -> list[ReplayDevice]:
    """Write bundles, tokens and the batches of all devices.

    The bundles have the manifests and states that a hub needs, but no exported graphs, so devices
    cannot run them.

    Args:
        workload: the model and its traffic.
        folder: an empty folder.
        devices: number of devices.
    """
    # Imported here, so that a process that only reads the folder starts faster.
    from export.bundles.writer import Tier, make_steps, segment_of, write_tier
    from server_hub.gateway.tokens import TokenFile

    model = workload.model()
    bundles = folder / "bundles"
    blobs = BlobStore(bundles / "blobs")
    example = torch.from_numpy(workload.inputs(8, 0)[0])
    tiers, entries = [], {}
    for cut in workload.cuts:
        name, tier = f"cut-{cut}", Tier(cut, CODEC, runtime="torch")
        steps = make_steps(
            segment_of(model, tier), tier, example, workload.classes, workload.optimizer
        )
        manifest = write_tier(steps, name, tier, blobs, example, lambda line: None, verified=False)
        entries[name] = TierEntry(cut, CODEC, blobs.write(manifest.to_bytes()))
        tiers.append((name, cut))
    model.save(bundles / WEIGHTS)
    noted = {"decay": "matrices"}
    BundleIndex(bundles, None, workload.classes, workload.optimizer, entries, noted).write()
    tokens, found = TokenFile(folder / TOKENS), []
    for number in range(devices):
        tier_name, cut = tiers[number % len(tiers)]
        device = f"device-{number}"
        found.append(ReplayDevice(device, tier_name, tokens.issue(device, tier_name)))
        path = folder / f"{device}.batches"
        path.write_bytes(_packed_batches(workload, model, cut, seed=number + 1))
    (folder / DEVICES).write_text(json.dumps([asdict(device) for device in found]))
    return found


def _packed_batches(workload: Workload, model: SplitModel, cut: int, seed: int) -> bytes:
    """Return a device's batches in the format of :func:`benchmarks.replay.read_batches`."""
    x, y = workload.inputs(workload.rows, seed)
    codec, tensors = get_codec(CODEC), {}
    model.train()
    for number in range(workload.batches):
        rows = slice(number * workload.batch, (number + 1) * workload.batch)
        with torch.no_grad():
            h = model.segment(torch.from_numpy(x[rows]), cut)
        parts = codec.pack(h, channel_axis(h, model.known_channels(cut)))
        tensors |= {f"{number}/{name}": part.numpy() for name, part in parts.items()}
        tensors[f"{number}/"] = y[rows]
    return pack_tensors(tensors)


def cut_of(tier: str) -> int:
    """Return the cut of a prepared tier."""
    return int(tier.removeprefix("cut-"))
