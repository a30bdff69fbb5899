"""A device that was shipped before the protocol had extensions, at the hub of today."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.lib.recorded_device import REQUIRED, RecordedDevice, Refused, decode
from tests.lib.recorded_job import CLASSES, RECORDING, ROUNDS, hub_of_the_job
from tests.lib.specification import ROOT
from tests.lib.tasks import run


def test_a_recorded_device_finishes_a_job(tmp_path: Path) -> None:
    """It trains in all rounds, gets an answer and leaves; nothing that it gets is new to it."""

    async def main() -> None:
        async with hub_of_the_job(tmp_path) as (hub, url, token):
            device = RecordedDevice(RECORDING, token)
            await device.run(url)
            assert device.rounds == list(range(1, ROUNDS + 1))
            assert device.reason == "the job is finished"
            assert device.answer.shape == (1, 2, CLASSES)
            assert np.isfinite(device.answer).all()
            assert hub.rounds.completed == ROUNDS
            assert not hub.rounds.dropped

    run(main(), 60)


def test_the_recorded_device_is_as_strict_as_it_was() -> None:
    """It takes every frame that a hub could send then, and nothing that came later."""
    vectors = json.loads((ROOT / "tests" / "vectors" / "vectors.json").read_text("utf-8"))
    taken = set()
    for vector in vectors["valid"]:
        meaning, frame = vector["meaning"], bytes.fromhex(vector["hex"])
        if "extensions" in vector or "extensions" in meaning["body"]:
            with pytest.raises(Refused, match=r"has no field|unknown message type"):
                decode(frame)
        elif meaning["type"] in REQUIRED:
            assert decode(frame)[:3] == (meaning["type"], meaning["seq"], meaning["ack"])
            taken.add(meaning["type"])
    assert taken == set(REQUIRED)
