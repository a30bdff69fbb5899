"""Device: join a hub, train on local examples, predict."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from edge_sdk.bundle.manifest import Manifest
from edge_sdk.bundle.signing import read_trust
from edge_sdk.bundle.store import BlobStore
from edge_sdk.bundle.trials import Trials
from edge_sdk.errors import CutlayerError, DataError
from edge_sdk.inference.base_networks import BaseNetworks
from edge_sdk.inference.kept_back import KeptBack
from edge_sdk.inference.mixture import Mixture
from edge_sdk.inference.prediction import AnswerOptions, Evaluation, Prediction, Predictor
from edge_sdk.protocol.message import EVALUATION, EXTENSIONS
from edge_sdk.protocol.tensors import Array
from edge_sdk.runtime import load_runtime
from edge_sdk.training.conditions import MayTrain
from edge_sdk.training.data import Source
from edge_sdk.training.learner import Learner, Precision
from edge_sdk.training.loader import BundleLoader, LoadRuntime
from edge_sdk.training.local_data import LocalData
from edge_sdk.training.participation import Participation
from edge_sdk.training.plan import Augment
from edge_sdk.training.report import RoundReport, TrainReport
from edge_sdk.transport.connection import Connection, OpenLink
from edge_sdk.transport.download import Downloader
from edge_sdk.transport.link import open_websocket

__all__ = ["Device", "Evaluation", "MayTrain", "Prediction", "RoundReport", "TrainReport"]


class Device:
    """A device that has joined a hub. Made by :meth:`connect`, used in ``async with``.

    Whoever brings another transport or runtime uses the constructor and then :meth:`join`. Its
    other arguments are those of :meth:`connect`.

    Args:
        open_link: opens a link to the hub.
        load: makes a runtime from a verified bundle, with a number of threads.
    """

    def __init__(
        self,
        open_link: OpenLink,
        load: LoadRuntime = load_runtime,
        *,
        token: str,
        tier: str | None = None,
        data: Source | None = None,
        keep_back: float = 0.0,
        augment: Augment | None = None,
        cache: str | Path | None = None,
        trust: Iterable[str | Path] | None = None,
        may_train: MayTrain | None = None,
        threads: int = 1,
        memory_mb: int | None = None,
        patience_s: float = 60.0,
    ) -> None:
        self._connection = Connection(
            open_link,
            token=token,
            tier=tier,
            patience_s=patience_s,
            memory_mb=memory_mb,
            extensions=[e for e in EXTENSIONS if e != EVALUATION or keep_back],
        )
        store = BlobStore.cache(cache)
        self._downloader = Downloader(self._connection, store)
        self._loader = BundleLoader(
            self._connection,
            self._downloader,
            load,
            Trials(None if store is None else store.folder, token),
            None if data is None else LocalData(data, keep_back),
            read_trust(trust),
            threads,
            on_change=lambda: self._bases.forget(),
        )
        self._bases = BaseNetworks(self._connection, self._downloader, self._present_learner)
        self._predictor = Predictor(
            self._present_learner,
            self._connection.ask,
            self._bases.fetch,
            lambda: self._connection.failure,
            lambda: self._connection.largest_message,
            lambda: self._connection.welcome.release is not None,
        )
        self._kept_back = KeptBack(
            self.kept_back, self._loader, self._bases, self._predictor, may_train
        )
        self._participation = Participation(
            self._connection,
            self._downloader,
            self._loader,
            self._bases.offer,
            self._kept_back.answer,
            may_train,
            augment,
        )

    @classmethod
    async def connect(
        cls,
        url: str,
        *,
        token: str,
        data: Source | None = None,
        keep_back: float = 0.0,
        augment: Augment | None = None,
        tier: str | None = None,
        cache: str | Path | None = None,
        trust: Iterable[str | Path] | None = None,
        may_train: MayTrain | None = None,
        threads: int = 1,
        memory_mb: int | None = None,
        patience_s: float = 60.0,
    ) -> Device:
        """Join the hub at ``url`` and load the tier's bundle.

        Args:
            url: ``ws://`` or ``wss://`` address of the hub.
            token: this device's token, which says who it is.
            data: local rows, such as ``Examples(x, y)``; without them the device can only
                predict. A source that grows is read anew at the start of each round.
            keep_back: expected share of the rows that are never trained on, from 0 to below 1; see
                :meth:`kept_back`.
            augment: changes the rows of every batch before a training step.
            tier: the tier whose bundle the device can carry; by default the one that the hub has
                moved it to, else the one that the token was issued for.
            cache: folder for bundles, ``~/.cache/cutlayer`` by default. Where it cannot be used,
                they are fetched at every start.
            trust: public keys, each 64 hex digits or a ``.pub`` file, one of which must have
                signed the bundle; without them an unsigned bundle is accepted.
            may_train: asked before each round whether the device may train now.
            threads: threads of the runtime.
            memory_mb: MB that the device can spare for training; a hub that moves cuts gives it
                no bundle that takes more.
            patience_s: seconds to go on trying to (re)connect while the hub cannot be reached, or
                says that the device should try later.

        Raises:
            HubError: the hub refused the device (token, tier, protocol version), or was busy or
                failed for ``patience_s``.
            LinkClosed: the hub could not be reached for ``patience_s``.
            BundleError: the bundle is damaged, not signed by a key in ``trust``, or cannot be run
                here.
            ConfigError: ``trust`` is empty, or holds something that is no public key; ``keep_back``
                is out of range; ``url`` is no address of a hub; or the environment names a proxy
                that cannot be used.
            DataError: there are no rows to train on, or the first ones do not fit the model.
        """
        device = cls(
            lambda: open_websocket(url),
            token=token,
            tier=tier,
            data=data,
            keep_back=keep_back,
            augment=augment,
            cache=cache,
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
            await self._loader.load_welcomed()
            await self._loader.load_present_state(welcome)
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
        """The device's name at the hub, which its token stands for."""
        return self._connection.welcome.device

    @property
    def manifest(self) -> Manifest:
        """The manifest of the loaded bundle."""
        return self._loader.learner.manifest

    @property
    def release(self) -> int | None:
        """Number of the release that the device runs.

        None if its bundle is that of a job, or of an earlier release that the device has gone back
        to, because the one that the hub offers has failed the device's check.
        """
        return None if self._loader.refused else self._connection.welcome.release or None

    async def refresh(self) -> bool:
        """Ask the hub for its newest model, and go on with it.

        For devices that only predict: the bundle of a release that was published meanwhile, or the
        one before if it was taken back, or the present state of a job. A release that fails the
        device's own check is not used, and the present bundle stays. The check is that the bundle
        loads, and answers its sample as it did when it was made.

        Returns:
            Whether the device has another bundle now.

        Raises:
            CutlayerError: the device is training; each round brings it the newest model.
            LinkClosed: the hub is out of reach.
            HubError: the hub refuses the device.
        """
        if self._participation.under_way:
            raise CutlayerError("the device is training, and gets the newest model in each round")
        before = self._present_learner()
        welcome = await self._connection.renew()
        await self._loader.load_welcomed()
        await self._loader.load_present_state(welcome)
        return self._present_learner() is not before

    # --- training -------------------------------------------------------------------------------

    async def train(self, on_round: Callable[[RoundReport], None] | None = None) -> TrainReport:
        """Take part in rounds until the hub says stop; the device then holds the final state.

        Args:
            on_round: called after each round of local training.

        Raises:
            DataError: the device was connected without data, or a row cannot be read or does not
                fit the model.
            BundleError: the hub came back with another bundle, which cannot be loaded.
            HubError: the hub refused a message and ended the session.
            LinkClosed: the hub was out of reach for longer than ``patience_s``.
        """
        self._present_learner()
        self._data()
        return await self._participation.train(on_round)

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
        all heads, the device's and the hub's. If the hub does not answer within ``timeout_s``,
        the device's own answer stands. After the connection has ended for good, it does so at
        once; a warning says why, the first time.

        Args:
            x: inputs (rows, ...), dtype and shape as the model takes them. For a model of tokens
                the answer is the token after the last position of each row.
            confidence: from 0 (never ask the hub) to above 1 (always ask it).
            timeout_s: seconds to wait for the hub; without a link, for the link as well.
            precision: ``int8`` answers with matrices in 8 bits, of the same weights.
            bases: number of base networks to mix, the best ones first; all by default. Those that
                are not on the device yet are fetched. Only for models of base networks.
            robustness: weight of the noise norms, from 0 (clean inputs) to 1 (adversarial
                examples). Only for models with dual norms.

        Raises:
            BundleError: the bundle has no graph of this precision.
            DataError: the inputs do not fit the model, a text is too long for one message, there
                are fewer bases, or ``robustness`` is out of range or not available.
            LinkClosed: not all bases are on the device, and the hub is out of reach.
        """
        options = AnswerOptions(precision, bases, robustness)
        return await self._predictor.predict(x, confidence, timeout_s, options)

    async def fetch_bases(self, bases: int) -> Mixture:
        """Fetch those of the best ``bases`` base networks that are not on the device yet.

        Returns:
            The mixture, which answers without the hub if the bases are whole.

        Raises:
            DataError: there are fewer bases.
            HubError: the hub does not have them.
        """
        return await self._bases.fetch(bases)

    def kept_back(self) -> Source:
        """The rows of the device's data that are kept back and never trained on, as they are now.

        A row is kept back or not for as long as it exists, whatever else comes or goes. Raises
        :class:`DataError` if the device was connected without data.
        """
        return self._data().kept_back()

    def _data(self) -> LocalData:
        if self._loader.data is None:
            raise DataError("this device has no data; pass data= to Device.connect")
        return self._loader.data

    async def evaluate(self, examples: Source, batch_size: int = 256) -> Evaluation:
        """Measure the three ways to answer: accuracy, or perplexity for a model of tokens.

        Args:
            examples: inputs and labels, such as ``Examples(x, y)`` or :meth:`kept_back`.
            batch_size: largest number of examples at a time; fewer if logits take much memory.

        Raises:
            DataError: the examples do not fit the model, or a text is too long for one message.
            LinkClosed: the hub is out of reach.
            HubError: the hub refused a message and ended the session.
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
        """Continue texts with the whole model: its first blocks here, the rest on the hub.

        Every token takes one pass over the text, on the device and on the hub.

        Args:
            x: tokens (rows, positions) to begin with.
            tokens: how many to append to each row.
            temperature: 0 appends the most probable token; above it, one that is drawn from the
                softmax of the logits divided by it.
            seed: seed of the draws.
            context: largest number of positions that the model looks back at; by default the
                bundle's limit, if it has one.

        Returns:
            Tokens (rows, positions + tokens), ``x`` at the start.

        Raises:
            DataError: the model is not one of tokens, or the text does not fit it.
            LinkClosed: the hub is out of reach.
            HubError: the hub refused a message and ended the session.
        """
        return await self._predictor.generate(x, tokens, temperature, seed, context)

    # --- leaving --------------------------------------------------------------------------------

    async def close(self, reason: str = "done") -> None:
        """Say bye, if the hub can be reached, and close the connection."""
        await self._connection.close(reason)

    def _present_learner(self) -> Learner:
        return self._loader.learner
