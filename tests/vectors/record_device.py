"""Writes ``device_v1_0.json``: the frames of a device in a small job, and what it received.

The file was written once, by the implementation that knew no extensions, and stays as it is: it
stands for apps that were shipped then. ``tests/end_to_end/test_recorded_device.py`` plays it to the
hub of today, through ``tests/lib/recorded_device.py``. To record the device of today: ``python
tests/vectors/record_device.py FILE``.

A frame is ``{"from": "device" | "hub", "type", "base64"}`` in the order of its passing; the data of
blobs are left out (``"bytes"`` says how long they were), since they depend on the exporter.
"""

from __future__ import annotations

import asyncio
import base64
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from edge_sdk import Device
from edge_sdk.protocol.frames import decode
from edge_sdk.protocol.message import EXTENSIONS
from edge_sdk.protocol.messages import Blob
from tests.lib.proxy import proxy
from tests.lib.recorded_job import data, hub_of_the_job


async def record() -> list[dict[str, Any]]:
    """The frames of a device that trains in all rounds, asks one question and leaves."""
    frames: list[dict[str, Any]] = []

    def keep(sender: str, frame: bytes) -> bytes:
        message = decode(frame, agreed=EXTENSIONS).message
        entry: dict[str, Any] = {"from": sender, "type": message.TYPE}
        if isinstance(message, Blob):
            entry["bytes"] = len(message.data)
        else:
            entry["base64"] = base64.b64encode(frame).decode()
        frames.append(entry)
        return frame

    with tempfile.TemporaryDirectory() as folder:
        async with (
            hub_of_the_job(Path(folder)) as (_, url, token),
            proxy(url, lambda f: keep("device", f), lambda f: keep("hub", f)) as address,
            await Device.connect(
                address, token=token, data=data(), cache=Path(folder) / "cache"
            ) as device,
        ):
            await device.train()
            await device.predict(data().x[:2], confidence=2)
    return frames


if __name__ == "__main__":
    text = json.dumps(asyncio.run(record()), indent=0)
    Path(sys.argv[1]).write_text(text + "\n", "utf-8")
