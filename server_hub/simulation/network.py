"""Links in memory that take the virtual time of a network."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass

from edge_sdk.errors import LinkClosed

_SEGMENT = 1460
"""Bytes of a TCP segment over Ethernet."""


@dataclass(frozen=True)
class Network:
    """The network between a device and the hub.

    Attributes:
        uplink_mbit: bandwidth from device to hub, in 10^6 bits per second; None for no limit.
        downlink_mbit: bandwidth from hub to device, in 10^6 bits per second; None for no limit.
        latency_ms: latency of one direction, in milliseconds.
        loss: fraction of the packets that are lost and sent again.
    """

    uplink_mbit: float | None = None
    downlink_mbit: float | None = None
    latency_ms: float = 0.0
    loss: float = 0.0

    def __post_init__(self) -> None:
        for name in ("uplink_mbit", "downlink_mbit"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be above 0")
        if not 0 <= self.latency_ms < math.inf:
            raise ValueError(f"latency_ms is {self.latency_ms}; it must be 0 or more, and finite")
        if not 0 <= self.loss < 1:
            raise ValueError(f"loss is {self.loss}; it must be from 0 to below 1")
        if self.loss and not self.latency_ms:
            raise ValueError("loss has no effect without latency_ms; remove loss or set latency_ms")

    def bytes_per_second(self, mbit: float | None) -> float:
        """Return the rate of one direction with a bandwidth of ``mbit``, in bytes per second.

        The rate of a TCP stream is at most ``1.22 segments / (round trip * sqrt(loss))`` (Mathis
        et al., 1997); this is the effect of lost packets on a WebSocket.

        Args:
            mbit: bandwidth, in 10^6 bits per second; None for no limit.
        """
        rate = math.inf if mbit is None else mbit * 1e6 / 8
        if self.loss:
            round_trip = 2 * self.latency_ms / 1000
            rate = min(rate, 1.22 * _SEGMENT / (round_trip * math.sqrt(self.loss)))
        return rate


class SimulatedLink:
    """One end of a link over a :class:`Network`; :meth:`pair` makes both ends.

    A frame is sent once its last byte is on the wire, and arrives after the latency. Frames of one
    direction are sent one after the other.

    Args:
        bytes_per_second: rate of this end's frames.
        latency: latency of one direction, in seconds.
    """

    def __init__(self, bytes_per_second: float, latency: float) -> None:
        self._rate, self._latency = bytes_per_second, latency
        self._free_at = 0.0
        self._under_way: deque[bytes | None] = deque()
        self._arrived: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._closed = False
        self._other: SimulatedLink | None = None

    @classmethod
    def pair(cls, network: Network) -> tuple[SimulatedLink, SimulatedLink]:
        """Return the device's end and the hub's end of a link."""
        latency = network.latency_ms / 1000
        device = cls(network.bytes_per_second(network.uplink_mbit), latency)
        hub = cls(network.bytes_per_second(network.downlink_mbit), latency)
        device._other, hub._other = hub, device
        return device, hub

    async def send(self, frame: bytes) -> None:
        """Send one frame; return once its last byte is on the wire.

        Raises:
            LinkClosed: the link is closed.
        """
        self._check()
        loop = asyncio.get_running_loop()
        sent_at = self._free_at = max(self._free_at, loop.time()) + len(frame) / self._rate
        await asyncio.sleep(sent_at - loop.time())
        self._check()
        self._deliver(frame, sent_at)

    async def receive(self) -> bytes | str:
        """Return the next frame; wait until it arrives.

        Raises:
            LinkClosed: the link is closed.
        """
        frame = None if self._closed else await self._arrived.get()
        if frame is None:
            self._closed = True
            raise LinkClosed("the link was closed")
        return frame

    async def close(self) -> None:
        """Close the link; the other end still receives every frame sent before."""
        if not self._closed:
            self._closed = True
            self._deliver(None, max(self._free_at, asyncio.get_running_loop().time()))
            self._arrived.put_nowait(None)  # wakes receive() of this end

    def cut(self) -> None:
        """Break the link: frames under way are lost, and both ends are closed at once."""
        for end in (self, self._other):
            assert end is not None
            if not end._closed:
                end._closed = True
                end._arrived.put_nowait(None)

    def _deliver(self, frame: bytes | None, sent_at: float) -> None:
        """Schedule the arrival of a frame, or of the end of the link (None), after the latency."""
        other = self._other
        assert other is not None
        other._under_way.append(frame)
        asyncio.get_running_loop().call_at(sent_at + self._latency, other._arrive)

    def _arrive(self) -> None:
        """Let the first frame under way arrive.

        Timers of the same moment run in any order, so a timer does not name its frame.
        """
        frame = self._under_way.popleft()
        if not self._closed:
            self._arrived.put_nowait(frame)

    def _check(self) -> None:
        if self._closed:
            raise LinkClosed("the link was closed")
