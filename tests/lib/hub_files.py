"""The configuration file of a hub that runs as a process."""

from __future__ import annotations

from pathlib import Path

from edge_sdk.bundle.index import BundleIndex
from tests.lib.harness import examples, save_npz

HUB_TOML = """
bundles = "{bundles}"
tokens = "{tokens}"
run = "{run}"
held_out = "{held_out}"
[listen]
port = 0
[rounds]
count = {rounds}
min_devices = {devices}
deadline_s = 60
[local]
batch_size = 16
hyper = {{ lr = 0.05 }}
[trunk]
device = "cpu"
threads = 1
mix_rows = 32
hyper = {{ lr = 0.05 }}
[limits]
session_s = {session_s}
"""


def write_hub_toml(
    folder: Path, bundles: BundleIndex, rounds: int, devices: int, session_s: float = 10.0
) -> Path:
    """A ``hub.toml`` in a folder, beside its held-out examples; returns its path."""
    path = folder / "hub.toml"
    path.write_text(
        HUB_TOML.format(
            bundles=bundles.folder,
            tokens=folder / "tokens.toml",
            run=folder / "run",
            held_out=save_npz(folder / "held_out.npz", examples(100, seed=50)),
            rounds=rounds,
            devices=devices,
            session_s=session_s,
        )
    )
    return path
