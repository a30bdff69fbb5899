"""Device: join a hub, train on local examples, predict."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from edge_sdk.bundle import BlobStore, Bundle, Manifest, verify_blob
from edge_sdk.data import Examples
from edge_sdk.errors import BundleError, CutlayerError, DataError, HubError, LinkClosed
from edge_sdk.learner import Learner, LocalPlan, LocalResult
from edge_sdk.link import Link, open_websocket
from edge_sdk.protocol.channel import CannotResume, Channel, Delivery
from edge_sdk.protocol.frames import decode, encode, unpack_tensors
from edge_sdk.protocol.messages import (
    VERSION,
    Activations,
    Answer,
    Blob,
    BlobGet,
    Bye,
    Decline,
    Error,
    Hello,
    Infer,
    Message,
    Ready,
    Round,
    Stop,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.session import Session, SessionLost

DEFAULT_CACHE = Path.home() / ".cache" / "cutlayer"

MayTrain = Callable[[int], str | None]
"""Asked before each round with its number; a text declines the round and says why."""


@dataclass(frozen=True)
class RoundReport:
    """What one round of local training was like."""

    round: int
    loss: float
    accuracy: float
    seconds: float


@dataclass
class TrainReport:
    """What :meth:`Device.train` did."""

    reason: str = ""
    rounds: list[RoundReport] = field(default_factory=list)


@dataclass(frozen=True)
class Prediction:
    """An answer.

    Attributes:
        labels: most probable class of each row (rows,).
        probabilities: (rows, classes), mean of the softmax of the heads that were asked.
        by_hub: (rows,) whether the hub finished the answer.
    """

    labels: Array
    probabilities: Array
    by_hub: Array


@dataclass(frozen=True)
class Evaluation:
    """Accuracy on labelled examples, as fractions, of the three ways to answer."""

    device_alone: float
    through_hub: float
    ensemble: float
    samples: int


class Device:
    """A device that is joined to a hub. Made by :meth:`connect`, used in ``async with``."""

    def __init__(
        self,
        url: str,
        *,
        token: str,
        tier: str,
        name: str,
        data: Examples | None,
        cache: Path,
        may_train: MayTrain | None,
        threads: int,
        patience_s: float,
    ) -> None:
        self._url, self._token = url, token
        self.tier, self.name = tier, name
        self._data, self._may_train = data, may_train
        self._store = BlobStore(Path(cache))
        self._threads, self._patience_s = threads, patience_s
        self._session: Session | None = None
        self._session_id: str | None = None
        self._welcome: Welcome | None = None
        self._linked = asyncio.Event()
        self._failure: CutlayerError | None = None
        self._blob: asyncio.Future[Blob] | None = None
        self._wanted: tuple[str, int] | None = None
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._requests = 0
        self._work: asyncio.Queue[tuple[Session, Delivery] | CutlayerError] = asyncio.Queue()
        self._keeper: asyncio.Task[None] | None = None
        self._learner: Learner | None = None
        self._fetching = asyncio.Lock()

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str,
        tier: str,
        data: Examples | None = None,
        name: str | None = None,
        cache: str | Path = DEFAULT_CACHE,
        may_train: MayTrain | None = None,
        threads: int = 1,
        patience_s: float = 60.0,
    ) -> Device:
        """Join the hub at ``url`` and load the bundle of ``tier``.

        Args:
            url: ``ws://`` or ``wss://`` address of the hub.
            token: this device's token.
            tier: the tier whose bundle the device can carry.
            data: local examples; without them the device can only predict.
            name: the device's name at the hub; the host name if not given.
            cache: folder for bundles, so that they are fetched once.
            may_train: asked before each round whether the device may train now.
            threads: threads of the runtime.
            patience_s: how long to go on trying to (re)connect, in seconds.

        Raises:
            HubError: the hub refused the device (token, tier, protocol version).
            LinkClosed: the hub could not be reached for ``patience_s``.
            BundleError: the bundle is damaged or cannot be run here.
            DataError: the examples do not fit the model.
        """
        device = cls(
            url,
            token=token,
            tier=tier,
            name=name or socket.gethostname(),
            data=data,
            cache=Path(cache),
            may_train=may_train,
            threads=threads,
            patience_s=patience_s,
        )
        device._keeper = asyncio.create_task(device._keep_linked())
        try:
            await device._load_bundle()
        except BaseException:
            await device.close()
            raise
        return device

    async def __aenter__(self) -> Device:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    @property
    def manifest(self) -> Manifest:
        """The manifest of the loaded bundle."""
        return self._need_learner().manifest

    # --- training -------------------------------------------------------------------------------

    async def train(self, on_round: Callable[[RoundReport], None] | None = None) -> TrainReport:
        """Take part in rounds until the hub says stop; then hold the final state.

        Args:
            on_round: called after each round of local training.

        Raises:
            DataError: the device was connected without examples.
            HubError: the hub refused a message and ended the session.
            LinkClosed: the hub was out of reach for longer than ``patience_s``.
        """
        learner = self._need_learner()
        if self._data is None:
            raise DataError("this device has no examples; pass data= to Device.connect")
        report = TrainReport()
        joined = False
        while True:
            try:
                if not joined:
                    await self._send(Ready(samples=len(self._data)))
                    joined = True
                item = await self._work.get()
                if isinstance(item, CutlayerError):
                    raise item
                session, delivery = item
                if isinstance(delivery.message, Stop):
                    report.reason = delivery.message.reason
                    if delivery.message.state is not None:
                        state = await self._fetch_state(delivery.message.state)
                        learner.runtime.set_state(unpack_tensors(state))
                    session.settle(delivery.seq)
                    return report
                assert isinstance(delivery.message, Round)
                done = await self._take_part(session, delivery.message)
                session.settle(delivery.seq)
                if done is not None:
                    report.rounds.append(done)
                    if on_round is not None:
                        on_round(done)
            except SessionLost:
                self._raise_failure()
                joined = False  # the hub forgot us: join again, in a new session

    async def _take_part(self, session: Session, task: Round) -> RoundReport | None:
        """Train one round and send the update; None if it was declined.

        All of it goes over the session that the round came from: if the hub restarts meanwhile,
        :class:`SessionLost` ends the round.
        """
        learner, data = self._need_learner(), self._data
        assert data is not None
        reason = self._may_train(task.round) if self._may_train is not None else None
        if reason is not None:
            await session.send(Decline(round=task.round, reason=reason))
            return None
        started = time.monotonic()
        try:
            state = unpack_tensors(await self._fetch_state(task.state))
        except HubError as error:
            if error.code != "unknown_blob":
                raise
            return None  # the round ended while we were away
        plan = LocalPlan(task.epochs, task.batch_size, task.hyper, task.activations, task.seed)
        loop = asyncio.get_running_loop()

        def emit(batch: int, parts: dict[str, Array], labels: Array) -> None:
            # Runs in the training thread: returns once the outbox has room, not once it is sent.
            message = Activations(round=task.round, batch=batch, parts=parts, labels=labels)
            asyncio.run_coroutine_threadsafe(session.send(message), loop).result()

        result = await asyncio.to_thread(learner.train, state, data, plan, emit)
        await self._send_update(session, task.round, result)
        loss, accuracy = result.metrics["loss"], result.metrics["accuracy"]
        return RoundReport(task.round, loss, accuracy, time.monotonic() - started)

    async def _send_update(self, session: Session, number: int, result: LocalResult) -> None:
        """Send the parameters in messages that each stay under the frame limit."""
        assert self._welcome is not None
        limit = self._welcome.max_frame - 4096 - 600 * len(result.parameters)
        part: dict[str, Array] = {}
        size = 0

        async def flush(done: bool) -> None:
            await session.send(
                Update(
                    round=number,
                    tensors=dict(part),
                    done=done,
                    samples=result.samples,
                    metrics=result.metrics,
                )
            )
            part.clear()

        for name, tensor in result.parameters.items():
            if part and size + tensor.nbytes > limit:
                await flush(done=False)
                size = 0
            part[name] = tensor
            size += tensor.nbytes
        await flush(done=True)

    # --- prediction -----------------------------------------------------------------------------

    async def predict(
        self, x: Array, *, confidence: float = 0.9, timeout_s: float = 10.0
    ) -> Prediction:
        """Answer from the device's own heads where they are confident, else through the hub.

        Rows whose most probable class has at least ``confidence`` are answered on the device.
        For the others the packed activations go to the hub, and the answer is the ensemble of
        all heads, the device's and the hub's. If the hub cannot be reached in ``timeout_s``,
        the device's own answer stands.

        Args:
            x: inputs (rows, ...), dtype and shape as the model takes them.
            confidence: from 0 (never ask the hub) to above 1 (always ask it).
            timeout_s: how long to wait for the hub.
        """
        heads, parts = await self._run_predict(x)
        probabilities = softmax(heads).mean(0)
        unsure = np.flatnonzero(probabilities.max(1) < confidence)
        by_hub = np.zeros(len(probabilities), bool)
        if len(unsure):
            with contextlib.suppress(TimeoutError, LinkClosed):
                hub = await asyncio.wait_for(self._ask_hub(self._rows(parts, unsure)), timeout_s)
                every = np.concatenate([heads[:, unsure], hub.logits])
                probabilities[unsure] = softmax(every).mean(0)
                by_hub[unsure] = True
        return Prediction(probabilities.argmax(1), probabilities, by_hub)

    async def evaluate(self, examples: Examples, batch_size: int = 256) -> Evaluation:
        """Accuracy on labelled examples: device alone, through the hub, ensemble of all heads."""
        examples = examples.fitted(self.manifest)
        hits = np.zeros(3)
        for batch in examples.batches(batch_size):
            heads, parts = await self._run_predict(batch.x)
            hub = await self._ask_hub(parts)
            for path, logits in enumerate(
                (heads, hub.logits[-1:], np.concatenate([heads, hub.logits]))
            ):
                hits[path] += (softmax(logits).mean(0).argmax(1) == batch.y).sum()
        alone, through, ensemble = (hits / len(examples)).tolist()
        return Evaluation(alone, through, ensemble, len(examples))

    async def _run_predict(self, x: Array) -> tuple[Array, dict[str, Array]]:
        learner = self._need_learner()
        fitted = Examples(x, np.zeros(len(x), np.int64)).fitted(learner.manifest)
        return await asyncio.to_thread(learner.predict, fitted.x)

    def _rows(self, parts: dict[str, Array], rows: Array) -> dict[str, Array]:
        """The packed activations of some rows of a batch."""
        return {
            spec.name: parts[spec.name][rows] if spec.shape[:1] == ("batch",) else parts[spec.name]
            for spec in self.manifest.packed
        }

    async def _ask_hub(self, parts: dict[str, Array]) -> Answer:
        self._requests += 1
        request = self._requests
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._answers[request] = future
        try:
            await self._send(Infer(request=request, parts=parts))
            return await future
        except SessionLost:
            self._raise_failure()
            raise LinkClosed("the hub restarted; ask again") from None
        finally:
            del self._answers[request]

    # --- leaving --------------------------------------------------------------------------------

    async def close(self, reason: str = "done") -> None:
        """Say bye, if the hub is there to hear it, and close the connection."""
        if self._session is not None and self._failure is None:
            with contextlib.suppress(CutlayerError, TimeoutError):
                await self._send(Bye(reason=reason))
                channel = self._session.channel
                async with asyncio.timeout(5):
                    while channel.unacked and self._session.linked:
                        await asyncio.sleep(0.01)
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        self._fail(LinkClosed("the device was closed"))

    # --- connection -----------------------------------------------------------------------------

    async def _keep_linked(self) -> None:
        """Connect, serve, reconnect with back-off; gives up after ``patience_s`` without a hub."""
        lost_at = time.monotonic()
        delay = 0.1
        while True:
            try:
                link = await open_websocket(self._url)
                try:
                    await self._serve(link)
                finally:
                    await link.close()
                    if self._linked.is_set():
                        self._linked.clear()
                        lost_at, delay = time.monotonic(), 0.1
            except LinkClosed as error:
                if self._blob is not None and not self._blob.done():
                    self._blob.set_exception(error)
                if time.monotonic() - lost_at + delay > self._patience_s:
                    self._fail(error)
                    break
            except CutlayerError as error:  # refused: trying again would be refused again
                self._fail(error)
                break
            await asyncio.sleep(delay * random.uniform(0.5, 1.0))
            delay = min(delay * 2, 10.0)
        if self._session is not None:
            await self._session.lose("the connection to the hub was given up")

    async def _serve(self, link: Link) -> None:
        """Handshake on a fresh link, then run the session on it until it breaks."""
        old = self._session
        settled = old.channel.settled if old is not None else 0
        hello = Hello(
            version=VERSION,
            device=self.name,
            token=self._token,
            tier=self.tier,
            session=self._session_id,
            last_seq=settled,
        )
        await link.send(encode(hello, 0, 0))
        async with asyncio.timeout(10):
            try:
                answer = decode(await link.receive()).message
            except TimeoutError:
                raise LinkClosed("the hub did not answer the hello in 10 s") from None
        if isinstance(answer, Error):
            raise HubError(answer.code, answer.message, answer.field)
        if not isinstance(answer, Welcome):
            raise HubError("bad_message", f"the hub answered hello with {answer.TYPE}")
        self._welcome = answer
        if old is None or not answer.resumed:
            if old is not None:
                await old.lose("the hub does not know this session any more")
                self._forget_session()
            self._session = Session(Channel(answer.window, peer_max_frame=answer.max_frame))
            self._session_id = answer.session
        session = self._session
        assert session is not None
        self._linked.set()
        try:
            await session.run(link, answer.last_seq, self._handle)
        except CannotResume as error:
            await session.lose(str(error))
            self._forget_session()
            self._session = self._session_id = None  # the next hello starts over
            raise LinkClosed(str(error)) from error

    def _handle(self, delivery: Delivery) -> None:
        message = delivery.message
        if isinstance(message, Round | Stop):
            assert self._session is not None
            self._work.put_nowait((self._session, delivery))
        elif isinstance(message, Answer):
            future = self._answers.get(message.request)
            if future is not None and not future.done():
                future.set_result(message)
            self._settle(delivery)
        elif isinstance(message, Blob):
            # a piece that was asked for twice, because the first took long, may come twice
            expected = (message.hash, message.offset) == self._wanted
            if expected and self._blob is not None and not self._blob.done():
                self._blob.set_result(message)
        elif isinstance(message, Error):
            error = HubError(message.code, message.message, message.field)
            if message.fatal:
                raise error
            if self._blob is not None and not self._blob.done():
                self._blob.set_exception(error)
        elif delivery.seq:
            self._settle(delivery)

    def _forget_session(self) -> None:
        """Everything that waits for the old session ends."""
        lost = SessionLost("the hub does not know this session any more")
        for future in self._answers.values():
            if not future.done():
                future.set_exception(lost)
        while not self._work.empty():
            self._work.get_nowait()
        self._work.put_nowait(lost)

    def _fail(self, error: CutlayerError) -> None:
        """Remember why the device stopped and wake everything that waits."""
        if self._failure is None:
            self._failure = error
        self._linked.set()
        for future in (self._blob, *self._answers.values()):
            if future is not None and not future.done():
                future.set_exception(error)
        self._work.put_nowait(error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _send(self, message: Message) -> None:
        if self._session is None:
            await self._linked.wait()
        self._raise_failure()
        assert self._session is not None
        await self._session.send(message)

    def _settle(self, delivery: Delivery) -> None:
        if self._session is not None:
            self._session.settle(delivery.seq)

    # --- bundles and state ----------------------------------------------------------------------

    async def _load_bundle(self) -> None:
        """Fetch what is not in the cache, verify it, load the runtime."""
        await self._linked.wait()
        self._raise_failure()
        assert self._welcome is not None
        manifest = Manifest.from_bytes(await self._fetch_blob(self._welcome.manifest))
        if manifest.tier != self.tier:
            raise BundleError(f"the hub sent the bundle of {manifest.tier!r}, not {self.tier!r}")
        blobs = {name: await self._fetch_blob(name) for name in manifest.blobs}
        if self._data is not None:
            self._data = self._data.fitted(manifest)
        bundle = Bundle(
            manifest,
            {name: blobs[graph.blob] for name, graph in manifest.graphs.items()},
            unpack_tensors(blobs[manifest.initial_state]),
        )
        runtime = await asyncio.to_thread(load_runtime, bundle, self._threads)
        self._learner = Learner(manifest, runtime)

    async def _fetch_blob(self, name: str) -> bytes:
        """A blob of the bundle, from the cache or downloaded into it, resumed if broken off."""
        if name not in self._store:
            await self._download(
                name, self._store.partial(name), lambda data: self._store.append(name, data)
            )
            return self._store.finish(name)
        try:
            return self._store.read(name)
        except BundleError:
            (self._store.folder / name).unlink(missing_ok=True)  # damaged on disk: fetch again
            return await self._fetch_blob(name)

    async def _fetch_state(self, name: str) -> bytes:
        """The state of a round; kept in memory, since every round has another."""
        buffer = bytearray()
        await self._download(name, 0, buffer.extend)
        return verify_blob(name, bytes(buffer))

    async def _download(self, name: str, offset: int, append: Callable[[bytes], None]) -> None:
        """Download a blob from ``offset`` on, piece by piece, over as many links as it takes."""
        async with self._fetching:
            while True:
                await self._linked.wait()
                self._raise_failure()
                self._blob = asyncio.get_running_loop().create_future()
                self._wanted = (name, offset)
                try:
                    await self._send(BlobGet(hash=name, offset=offset))
                    piece = await asyncio.wait_for(self._blob, 30)
                except (LinkClosed, SessionLost, TimeoutError):
                    self._raise_failure()
                    await asyncio.sleep(0.05)
                    continue
                finally:
                    self._blob = None
                append(piece.data)
                offset += len(piece.data)
                if offset >= piece.size:
                    return
                if not piece.data:
                    raise BundleError(f"the hub sent an empty piece of blob {name[:12]}…")

    def _need_learner(self) -> Learner:
        if self._learner is None:
            raise CutlayerError("the device is not connected; use Device.connect")
        return self._learner


def softmax(logits: Array) -> Array:
    """Softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    weights: Array = np.exp(shifted)
    total: Array = weights / weights.sum(-1, keepdims=True)
    return total
