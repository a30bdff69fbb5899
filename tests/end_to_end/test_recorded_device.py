"""A device that was shipped before the protocol had extensions, at the hub of today."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.lib.recorded_device import RecordedDevice
from tests.lib.recorded_job import CLASSES, RECORDING, ROUNDS, hub_of_the_job
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
