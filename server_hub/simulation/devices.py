"""Devices of a simulated fleet: devices of the SDK with a runtime that charges virtual time."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.bundle.manifest import Bundle
from edge_sdk.device import Device
from edge_sdk.errors import CutlayerError, LinkClosed
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.local_data import is_kept_back
from edge_sdk.transport.link import Link
from server_hub.simulation.clock import VirtualLoop
from server_hub.simulation.job import FleetTier
from server_hub.simulation.network import SimulatedLink

_HANDSHAKES = 3
"""Round trips until a link is open: one each for TCP, TLS and the WebSocket."""

Load = Callable[[Bundle, int], Runtime]
"""Loads the runtime of a bundle for a number of threads."""

Behave = Callable[[str, Examples, Load], tuple[Examples, Load]]
"""Returns the examples and the loader of a device that may misbehave, given its name and those of a
device that does not."""


def honest(device: str, data: Examples, load: Load) -> tuple[Examples, Load]:
    """Change nothing."""
    return data, load


@dataclass
class Meter:
    """Counts the compute of a run.

    Attributes:
        seconds: real seconds spent in steps of devices and trunk.
        device_flop: floating-point operations of the devices' steps.
        trunk_flop: floating-point operations of the trunk's steps.
    """

    seconds: float = 0.0
    device_flop: float = 0.0
    trunk_flop: float = 0.0


class TimedRuntime:
    """A runtime whose steps take as long as they would on the tier's devices.

    Implements :class:`edge_sdk.runtime.Runtime`.

    Args:
        runtime: runtime that runs the steps.
        flop: operations per row, by graph.
        gflops: speed of the device, in 10^9 operations per second; None for no limit.
        meter: counts operations and real seconds.
        loop: event loop with the virtual clock.
        length: length in tokens of the texts that ``flop`` was counted on; None for other inputs.
            The operations of a text are proportional to its length.
    """

    loading_s = 0.0
    """Seconds that loading takes; only steps take virtual time."""

    def __init__(
        self,
        runtime: Runtime,
        flop: Mapping[str, float],
        gflops: float | None,
        meter: Meter,
        loop: VirtualLoop,
        length: int | None = None,
    ) -> None:
        self._runtime, self._flop, self._meter, self._loop = runtime, flop, meter, loop
        self._length = length
        self._rate = math.inf if gflops is None else gflops * 1e9

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        self._runtime.set_state(tensors)

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        return self._runtime.get_state(slots)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        started = time.perf_counter()
        outputs = self._runtime.run(graph, batch)
        like = batch["y" if graph == "finish" else "x"]  # for texts, x and y have the same shape
        flop = self._flop[graph] * len(like)
        if self._length is not None:
            flop *= like.shape[1] / self._length
        self._meter.seconds += time.perf_counter() - started
        self._meter.device_flop += flop
        self._loop.charge(flop / self._rate)
        return outputs


class SimulatedDevice:
    """A device that is online and offline in turn, and trains while it is online.

    When it goes offline, its link breaks without a message and its local round is lost. When it is
    online again, it joins with the bundles in its cache, at its last cut.

    Args:
        name: name of the device.
        token: token of the device at the hub.
        tier: tier of the device: compute, network, and times online and offline.
        data: examples of the device.
        cache: folder for its bundles.
        load: loads the runtime of a bundle for a number of threads.
        serve: serves the hub's end of a link, given the device's name.
        seed: seed of the times online and offline.
        keep_back: expected share of the examples to keep back; 0 if none would be left.
    """

    def __init__(
        self,
        name: str,
        token: str,
        tier: FleetTier,
        data: Examples,
        cache: Path,
        load: Callable[[Bundle, int], Runtime],
        serve: Callable[[Link, str], Awaitable[None]],
        seed: int,
        keep_back: float = 0.0,
    ) -> None:
        all_kept = is_kept_back(data.keys(), keep_back).all()
        self._keep_back = 0.0 if all_kept else keep_back
        self.name, self._token, self._tier, self._data = name, token, tier, data
        self._cache, self._load, self._serve = cache, load, serve
        self._seed = seed
        self._link: SimulatedLink | None = None
        self._present = False
        self.left = False
        """Whether the device has gone offline at least once."""
        self._served: set[asyncio.Task[None]] = set()

    def there_at(self, now: float) -> bool:
        """Whether the device is online at time ``now``, in seconds."""
        return next(start for start, end in self._presences() if end > now) <= now

    def _presences(self) -> Iterator[tuple[float, float]]:
        return presences(self._tier, f"{self._seed}/{self.name}")

    async def live(self) -> None:
        """Be online and offline in turn until the hub ends the job.

        Raises:
            CutlayerError: the device failed while it was online.
        """
        loop = asyncio.get_running_loop()
        for start, end in self._presences():
            if end <= loop.time():
                continue
            await asyncio.sleep(start - loop.time())
            self._present = True
            visit = asyncio.create_task(self._visit())
            left = None if end == math.inf else end - loop.time()
            await asyncio.wait([visit], timeout=left)
            if visit.done():
                visit.result()
                return
            self._present, self.left = False, True
            if self._link is not None:
                self._link.cut()
            visit.cancel()
            with suppress(asyncio.CancelledError, CutlayerError):
                await visit

    async def _visit(self) -> None:
        device = Device(
            self._open_link,
            self._load,
            token=self._token,
            data=self._data,
            keep_back=self._keep_back,
            cache=self._cache,
            patience_s=math.inf,
        )
        try:
            await device.join()
            await device.train()
        finally:
            await device.close()

    async def _open_link(self) -> Link:
        if not self._present:
            raise LinkClosed("the device has no network")
        mine, theirs = SimulatedLink.pair(self._tier)
        self._link = mine
        await asyncio.sleep(_HANDSHAKES * 2 * self._tier.latency_ms / 1000)
        task = asyncio.ensure_future(self._serve(theirs, self.name))
        self._served.add(task)  # the loop itself keeps only a weak reference
        task.add_done_callback(self._served.discard)
        return mine


def presences(tier: FleetTier, seed: str) -> Iterator[tuple[float, float]]:
    """Yield the times when a device is online: ``(from, until)`` in seconds, in order.

    Times online and offline are exponentially distributed, so they have no memory. The
    probability of being online at the start is that of any later time.

    Args:
        tier: gives the mean times, ``online_s`` and ``offline_s``.
        seed: seed of the times.
    """
    if tier.online_s is None:
        yield 0.0, math.inf
        return
    rng = random.Random(seed)
    now = 0.0
    if rng.random() * (tier.online_s + tier.offline_s) >= tier.online_s:
        now = rng.expovariate(1 / tier.offline_s)
    while True:
        until = now + rng.expovariate(1 / tier.online_s)
        yield now, until
        now = until + (rng.expovariate(1 / tier.offline_s) if tier.offline_s else 0.0)
