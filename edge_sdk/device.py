"""Device: join a hub, train on local examples, predict."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType

from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.bundle.signing import check, read_trust
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError, CutlayerError, DataError, HubError
from edge_sdk.inference.base_networks import BaseNetworks
from edge_sdk.inference.mixture import Mixture
from edge_sdk.inference.prediction import AnswerOptions, Evaluation, Prediction, Predictor, softmax
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import (
    Decline,
    Move,
    Ready,
    Round,
    Stop,
    Welcome,
)
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import Runtime, load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.exchange import Exchange, send_update
from edge_sdk.training.learner import (
    Finished,
    Learner,
    LocalPlan,
    LocalResult,
    Packed,
    Precision,
    Reply,
    Training,
    Wanted,
    advance,
)
from edge_sdk.transport.connection import Connection, OpenLink, RoundOver
from edge_sdk.transport.download import Downloader
from edge_sdk.transport.link import open_websocket
from edge_sdk.transport.session import Session, SessionLost

__all__ = [
    "DEFAULT_CACHE",
    "Device",
    "Evaluation",
    "MayTrain",
    "Prediction",
    "RoundReport",
    "TrainReport",
    "softmax",
]

log = logging.getLogger("cutlayer.device")

DEFAULT_CACHE = Path.home() / ".cache" / "cutlayer"

MayTrain = Callable[[int], str | None]
"""Asked before each round with its number; a text declines the round and says why."""


@dataclass(frozen=True)
class RoundReport:
    """What one round of local training was like.

    Loss and accuracy are those of the auxiliary heads; None in a round that does not train them.
    """

    round: int
    loss: float | None
    accuracy: float | None
    seconds: float


@dataclass
class TrainReport:
    """What :meth:`Device.train` did."""

    reason: str = ""
    rounds: list[RoundReport] = field(default_factory=list)


class Device:
    """A device that is joined to a hub. Made by :meth:`connect`, used in ``async with``.

    The arguments are those of :meth:`connect`, but for the way to the hub and what runs the step
    graphs; :meth:`join` then does the rest.

    Args:
        open_link: opens a link to the hub.
        load: makes a runtime of a verified bundle, with so many threads.
    """

    def __init__(
        self,
        open_link: OpenLink,
        load: Callable[[Bundle, int], Runtime] = load_runtime,
        *,
        token: str,
        tier: str | None = None,
        data: Examples | None = None,
        cache: Path = DEFAULT_CACHE,
        trust: Iterable[str | Path] | None = None,
        may_train: MayTrain | None = None,
        threads: int = 1,
        memory_mb: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self._data, self._may_train, self._load = data, may_train, load
        self._trust = read_trust(trust)
        self._threads = threads
        self._learner: Learner | None = None
        self._bundle: str | None = None  # whose manifest the learner has
        self._connection = Connection(
            open_link, token=token, tier=tier, patience_s=patience_s, memory_mb=memory_mb
        )
        self._fetcher = Downloader(self._connection, BlobStore(cache))
        self._bases = BaseNetworks(self._connection, self._fetcher, self._need_learner)
        self._predictor = Predictor(self._need_learner, self._connection.ask, self._bases.have)

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str,
        data: Examples | None = None,
        tier: str | None = None,
        cache: str | Path = DEFAULT_CACHE,
        trust: Iterable[str | Path] | None = None,
        may_train: MayTrain | None = None,
        threads: int = 1,
        memory_mb: int | None = None,
        patience_s: float = 60.0,
    ) -> Device:
        """Join the hub at ``url`` and load the tier's bundle.

        Args:
            url: ``ws://`` or ``wss://`` address of the hub.
            token: this device's token; it says who the device is.
            data: local examples; without them the device can only predict.
            tier: the tier whose bundle the device can carry; if not given, the one that the hub
                has moved it to, else the one that the token was issued for.
            cache: folder for bundles, so that they are fetched once.
            trust: public keys, each 64 hex digits or a ``.pub`` file, one of which must have
                signed the bundle; without them an unsigned bundle is taken, too.
            may_train: asked before each round whether the device may train now.
            threads: threads of the runtime.
            memory_mb: what the device can spare for training; a hub that moves cuts gives it
                none that takes more.
            patience_s: how long to go on trying to (re)connect, in seconds.

        Raises:
            HubError: the hub refused the device (token, tier, protocol version).
            LinkClosed: the hub could not be reached for ``patience_s``.
            BundleError: the bundle is damaged, not signed by a key in ``trust``, or cannot be run
                here.
            ConfigError: ``trust`` is empty, or one of it is no public key.
            DataError: the examples do not fit the model.
        """
        device = cls(
            lambda: open_websocket(url),
            token=token,
            tier=tier,
            data=data,
            cache=Path(cache),
            trust=trust,
            may_train=may_train,
            threads=threads,
            memory_mb=memory_mb,
            patience_s=patience_s,
        )
        await device.join()
        return device

    async def join(self) -> None:
        """Connect to the hub and load the tier's bundle; raises as :meth:`connect` does."""
        try:
            welcome = await self._connection.open()
            await self._load_welcomed()
            await self._load_present_state(welcome)
        except BaseException:
            await self.close()
            raise

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
    def name(self) -> str:
        """The device's name at the hub, by its token."""
        return self._connection.welcome.device

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
            BundleError: the hub has come back with another bundle, which cannot be loaded.
            HubError: the hub refused a message and ended the session.
            LinkClosed: the hub was out of reach for longer than ``patience_s``.
        """
        self._need_learner()
        if self._data is None:
            raise DataError("this device has no examples; pass data= to Device.connect")
        report = TrainReport()
        joined = False
        while True:
            try:
                if not joined:
                    await self._load_welcomed()
                    await self._connection.send(self._ready())
                    joined = True
                session, delivery = await self._connection.next_work()
                if isinstance(delivery.message, Stop):
                    report.reason = delivery.message.reason
                    if delivery.message.state is not None:
                        await self._load_state(delivery.message.state)
                    if delivery.message.bases is not None:
                        self._bases.offer(delivery.message.bases)
                    session.settle(delivery.seq)
                    return report
                if isinstance(delivery.message, Move):
                    session.settle(delivery.seq)
                    await self._move(session, delivery.message)
                    continue
                assert isinstance(delivery.message, Round)
                # now, not at the end: gradients that come meanwhile are acknowledged after it
                session.settle(delivery.seq)
                done = await self._take_part(session, delivery.message)
                if done is not None:
                    report.rounds.append(done)
                    if on_round is not None:
                        on_round(done)
            except SessionLost:
                self._connection.raise_failure()
                joined = False  # the hub forgot us: join again, in a new session

    def _ready(self) -> Ready:
        assert self._data is not None
        return Ready(samples=len(self._data), tier=self.manifest.tier)

    async def _move(self, session: Session, move: Move) -> None:
        """Go on with another bundle; with the one that is here if the other cannot be loaded.

        Only what the cache lacks is fetched: layers that both bundles have are the same blobs.
        """
        try:
            learner = await self._load_bundle(move.manifest, move.tier)
            session.check()  # in a new session the hub knows us by the tier that we had
            self._learner, self._bundle = learner, move.manifest
            self._bases.forget()
            self._connection.tier = move.tier
        except (BundleError, DataError, HubError, OSError) as error:
            log.warning("cannot move to %s (%s): %s", move.tier, move.reason, error)
        await session.send(self._ready())

    async def _take_part(self, session: Session, task: Round) -> RoundReport | None:
        """Train one round and send the update; None if it was declined.

        All of it goes over the session that the round came from: if the hub restarts meanwhile,
        :class:`SessionLost` ends the round.
        """
        data = self._data
        assert data is not None
        reason = self._may_train(task.round) if self._may_train is not None else None
        if reason is not None:
            await session.send(Decline(round=task.round, reason=reason))
            return None
        now = asyncio.get_running_loop().time
        started = now()
        try:
            states = await self._fetcher.start_of(task)
        except HubError as error:
            if error.code != "unknown_blob":
                raise
            return None  # the round ended while we were away
        plan = LocalPlan(
            task.epochs, task.batch_size, task.hyper, task.activations, task.seed, task.staleness
        )
        try:
            result, compute_s = await self._train_locally(session, task.round, plan, states, data)
        except RoundOver:
            return None  # too slow: the hub went on without us
        times = {"compute_s": compute_s, "wait_s": now() - started - compute_s}
        result = replace(result, metrics=result.metrics | times)
        await send_update(session, task.round, result, self._connection.welcome.max_frame)
        loss, accuracy = (result.metrics.get(name) for name in ("loss", "accuracy"))
        return RoundReport(task.round, loss, accuracy, now() - started)

    async def _train_locally(
        self,
        session: Session,
        number: int,
        plan: LocalPlan,
        states: dict[int | None, dict[str, Array]],
        data: Examples,
    ) -> tuple[LocalResult, float]:
        """Step by step in a thread; what a step yields is sent before the next one.

        Returns the result, and the seconds of computing; loading the graphs does not count.
        """
        learner = self._need_learner()
        training: Training
        if None in states:
            training = learner.training(states[None], data, plan)
        else:
            bases = {base: state for base, state in states.items() if base is not None}
            training = learner.training_bases(bases, data, plan)
        loaded = learner.runtime.loading_s
        now = asyncio.get_running_loop().time
        reply: Reply = None
        computing = 0.0
        optional = plan.activations == "fused"
        exchange = Exchange(self._connection, session, number, optional=optional)
        while True:
            started = now()
            step = await asyncio.to_thread(advance, training, reply)
            computing += now() - started
            reply = None
            if isinstance(step, LocalResult):
                return step, computing - (learner.runtime.loading_s - loaded)
            if isinstance(step, Packed | Finished):
                await exchange.send(step)
            elif isinstance(step, Wanted):
                reply = await exchange.reply(step)

    # --- prediction -----------------------------------------------------------------------------

    async def predict(
        self,
        x: Array,
        *,
        confidence: float = 0.9,
        timeout_s: float = 10.0,
        precision: Precision = "float32",
        bases: int | None = None,
        robustness: float = 0.0,
    ) -> Prediction:
        """Answer from the device's own heads where they are confident, else through the hub.

        Rows whose most probable class has at least ``confidence`` are answered on the device.
        For the others the packed activations go to the hub, and the answer is the ensemble of
        all heads, the device's and the hub's. If the hub cannot be reached in ``timeout_s``,
        the device's own answer stands.

        Args:
            x: inputs (rows, ...), dtype and shape as the model takes them. For a model of tokens
                the answer is the token that comes behind the last position of each row.
            confidence: from 0 (never ask the hub) to above 1 (always ask it).
            timeout_s: how long to wait for the hub.
            precision: ``int8`` runs the bundle's small graph, whose weights are those of the
                export: it does not follow training.
            bases: of a model of several base networks, how many have a part in the answer; the
                best so many, all if not given. Those that are not here yet are fetched.
            robustness: of a model with dual norms, from 0 (for inputs as they should be) to 1 (for
                inputs that somebody has made hard).

        Raises:
            BundleError: the bundle has no graph of this precision.
            DataError: the inputs do not fit the model, a text is too long for one message, there
                are not so many bases, or the robustness cannot be had.
        """
        manner = AnswerOptions(precision, bases, robustness)
        return await self._predictor.predict(x, confidence, timeout_s, manner)

    async def fetch_bases(self, bases: int) -> Mixture:
        """Have the best ``bases`` base networks here; only those that are not are fetched.

        Raises:
            DataError: there are not so many.
            HubError: the hub does not give them.
        """
        return await self._bases.have(bases)

    async def evaluate(self, examples: Examples, batch_size: int = 256) -> Evaluation:
        """Measure the three ways to answer: accuracy, or perplexity for a model of tokens.

        Args:
            examples: inputs and labels.
            batch_size: examples at a time at most; fewer where logits take much memory.

        Raises:
            DataError: the examples do not fit the model, or a text is too long for one message.
            LinkClosed: the hub is out of reach.
        """
        return await self._predictor.evaluate(examples, batch_size)

    async def generate(
        self,
        x: Array,
        tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        context: int | None = None,
    ) -> Array:
        """Go on with texts through the whole model: its first half here, the rest on the hub.

        Every token takes one pass over the text, on the device and on the hub.

        Args:
            x: tokens (rows, positions) to begin with.
            tokens: how many to append to each row.
            temperature: 0 appends the most probable token; above it, one that is drawn with the
                softmax of the logits divided by it.
            seed: of the draws.
            context: positions that the model looks back at, at most; those that the bundle
                takes, where it has a limit, if not given.

        Returns:
            (rows, positions + tokens), what was given at the start.

        Raises:
            DataError: the model is not one of tokens, or the text does not fit it.
            LinkClosed: the hub is out of reach.
        """
        return await self._predictor.generate(x, tokens, temperature, seed, context)

    # --- leaving --------------------------------------------------------------------------------

    async def close(self, reason: str = "done") -> None:
        """Say bye, if the hub is there to hear it, and close the connection."""
        await self._connection.close(reason)

    # --- bundles and state ----------------------------------------------------------------------

    async def _load_welcomed(self) -> None:
        """Load the bundle of the last welcome, if it is not the one that is here."""
        while (welcome := self._connection.welcome).manifest != self._bundle:
            self._learner = await self._load_bundle(welcome.manifest, welcome.tier)
            self._bundle = welcome.manifest
            self._bases.forget()

    async def _load_bundle(self, name: str, tier: str) -> Learner:
        """Fetch the manifest called ``name`` and its blobs, verify them, load the runtime."""
        data = await self._fetcher.blob(name)
        manifest = Manifest.from_bytes(data)
        check(data, self._trust)
        if manifest.tier != tier:
            raise BundleError(f"the hub sent the bundle of {manifest.tier!r} for tier {tier!r}")
        blobs = {name: await self._fetcher.blob(name) for name in manifest.blobs}
        if self._data is not None:
            self._data = self._data.fitted(manifest)
        bundle = Bundle.open(manifest, blobs.__getitem__)
        runtime = await asyncio.to_thread(self._load, bundle, self._threads)
        return Learner(manifest, runtime)

    async def _load_present_state(self, welcome: Welcome) -> None:
        """Fetch the tier's present state, if it is no longer the bundle's initial one."""
        for attempt in range(4):
            try:
                if welcome.state is not None:
                    await self._load_state(welcome.state)
                return
            except HubError as error:
                if error.code != "unknown_blob" or attempt == 3:
                    raise
            welcome = await self._connection.renew()  # rounds went by while we downloaded

    async def _load_state(self, name: str) -> None:
        """Fetch a state and predict with it from now on."""
        self._need_learner().runtime.set_state(unpack_tensors(await self._fetcher.state(name)))

    def _need_learner(self) -> Learner:
        if self._learner is None:
            raise CutlayerError("the device is not connected; use Device.connect")
        return self._learner
