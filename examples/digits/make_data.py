"""Writes the digits as two devices' examples and a held-out set into the folder ``work``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from server_hub.demo.digits import partition
from server_hub.simulation.digits import load

folder = Path("work")
folder.mkdir(exist_ok=True)
train, held_out = load()
files = {"held_out": held_out, **{f"device-{i}": d for i, d in enumerate(partition(train, 2, 1.0))}}
for name, data in files.items():
    np.savez(folder / f"{name}.npz", x=data.x, y=data.y)
    print(f"work/{name}.npz: {len(data)} examples")
