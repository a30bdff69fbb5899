"""Devices that compute nothing: they speak the protocol and replay batches packed beforehand.

In each round a device downloads its state, sends its batches as fast as acknowledgements allow, and
then sends the downloaded state as its update. The side of the hub is real: WebSockets, gateway,
sessions, rounds. The devices only encode and decode frames.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edge_sdk.bundle.store import verify_blob
from edge_sdk.errors import HubError, LinkClosed
from edge_sdk.protocol.batch import Batch
from edge_sdk.protocol.channel import Channel, Delivery
from edge_sdk.protocol.frames import Frame, decode, encode, unpack_tensors
from edge_sdk.protocol.messages import (
    VERSION,
    Activations,
    Blob,
    BlobGet,
    Error,
    Hello,
    Message,
    Ready,
    Round,
    Stop,
    Welcome,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.training.exchange import send_update
from edge_sdk.training.plan import LocalResult
from edge_sdk.transport.link import open_websocket
from edge_sdk.transport.session import Session

DEVICES = "devices.json"
"""Name of the file in a prepared folder that lists the devices."""


@dataclass(frozen=True)
class ReplayDevice:
    """Name, tier and token of a device that replays."""

    name: str
    tier: str
    token: str


def read_batches(folder: Path, device: str) -> list[Batch]:
    """Read the batches that a device replays, in order."""
    found: list[dict[str, Array]] = []
    for key, tensor in unpack_tensors((folder / f"{device}.batches").read_bytes()).items():
        number, _, name = key.partition("/")
        while len(found) <= int(number):
            found.append({})
        found[int(number)][name] = tensor
    return [Batch(parts={n: t for n, t in b.items() if n}, labels=b[""]) for b in found]


def read_devices(folder: Path) -> list[ReplayDevice]:
    """Read the list of devices of a prepared folder."""
    return [ReplayDevice(**d) for d in json.loads((folder / DEVICES).read_text("utf-8"))]


@dataclass
class TimedChannel(Channel):
    """A channel that records how long every batch waits for its acknowledgement, in seconds."""

    waits: list[float] = field(default_factory=list)
    _sent_at: deque[float | None] = field(default_factory=deque)

    def send(self, message: Message) -> bytes:
        frame = super().send(message)
        if message.RELIABLE:
            timed = isinstance(message, Activations)
            self._sent_at.append(time.perf_counter() if timed else None)
        return frame

    def accept(self, frame: Frame) -> Delivery | None:
        delivery = super().accept(frame)
        now = time.perf_counter()
        while len(self._sent_at) > self.unacked:
            sent = self._sent_at.popleft()
            if sent is not None:
                self.waits.append(now - sent)
        return delivery


class Replayer:
    """One device at one hub.

    Args:
        url: address of the hub.
        device: name, tier and token of the device.
        batches: batches that the device sends in every round.
        waits: list that receives the seconds from the send of each batch to its acknowledgement.
    """

    def __init__(
        self, url: str, device: ReplayDevice, batches: list[Batch], waits: list[float]
    ) -> None:
        self._url, self._device, self._batches, self._waits = url, device, batches, waits
        self._samples = sum(len(batch.labels) for batch in batches if batch.labels is not None)
        self._rounds: asyncio.Queue[tuple[Round, int]] = asyncio.Queue()
        self._pieces: asyncio.Queue[Blob] = asyncio.Queue()

    async def run(self) -> None:
        """Take part in all rounds until the link closes.

        Raises:
            HubError: the hub refused the device.
        """
        link = await open_websocket(self._url)
        hello = Hello(version=VERSION, token=self._device.token, tier=self._device.tier)
        await link.send(encode(hello, 0, 0))
        welcome = decode(await link.receive()).message
        if not isinstance(welcome, Welcome):
            raise HubError("bad_message", f"{self._device.name} was answered {welcome}")
        channel = TimedChannel(welcome.window, peer_max_frame=welcome.max_frame, waits=self._waits)
        session = Session(channel)
        work = asyncio.create_task(self._work(session, welcome.max_frame))
        try:
            await session.run(link, 0, lambda d: self._handle(session, d))
        except LinkClosed:
            if work.done():
                work.result()
        finally:
            work.cancel()

    async def _work(self, session: Session, max_frame: int) -> None:
        await session.send(Ready(samples=self._samples, tier=self._device.tier))
        while True:
            task, seq = await self._rounds.get()
            assert task.state is not None
            state = unpack_tensors(await self._download(session, task.state))
            for number, batch in enumerate(self._batches):
                await session.send(
                    Activations(
                        round=task.round, batch=number, parts=batch.parts, labels=batch.labels
                    )
                )
            result = LocalResult(state, self._samples, {"loss": 1.0, "accuracy": 0.5})
            await send_update(session, task.round, result, max_frame)
            session.settle(seq)

    async def _download(self, session: Session, name: str) -> bytes:
        data = bytearray()
        while True:
            session.post(BlobGet(hash=name, offset=len(data)))
            piece = await self._pieces.get()
            data += piece.data
            if len(data) >= piece.size:
                return verify_blob(name, bytes(data))

    def _handle(self, session: Session, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, Round):
            self._rounds.put_nowait((message, delivery.seq))
        elif isinstance(message, Blob):
            self._pieces.put_nowait(message)
        elif isinstance(message, Error):
            raise HubError(message.code, f"{self._device.name}: {message.message}", message.field)
        elif isinstance(message, Stop):
            session.settle(delivery.seq)


def generate(pipe: Connection, folder: Path, urls: list[str], devices: list[ReplayDevice]) -> None:
    """Run the process of the devices; every device takes part at each of several hubs.

    The answer to every ``"mark"`` from the pipe is the processor time of this process since the
    last mark, in seconds, and the waits of the batches of each hub since then.
    """
    asyncio.run(_generate(pipe, folder, urls, devices))


async def _generate(
    pipe: Connection, folder: Path, urls: list[str], devices: list[ReplayDevice]
) -> None:
    waits: dict[str, list[float]] = {url: [] for url in urls}
    batches = {device.name: read_batches(folder, device.name) for device in devices}
    replayers = [
        Replayer(url, device, batches[device.name], waits[url])
        for url in urls
        for device in devices
    ]
    async with asyncio.TaskGroup() as group:
        running = [group.create_task(replayer.run()) for replayer in replayers]
        await _answer_marks(pipe, waits)
        for task in running:
            task.cancel()


async def _answer_marks(pipe: Connection, waits: dict[str, list[float]]) -> None:
    spent = time.process_time()
    while True:
        command: Any = await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
        if command == "stop":
            return
        now = time.process_time()
        pipe.send((now - spent, {url: list(found) for url, found in waits.items()}))
        spent = now
        for found in waits.values():
            found.clear()
