"""Bundles and states, from the hub or the cache into a learner."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

from edge_sdk.bundle.manifest import MAX_MANIFEST, Bundle, Manifest
from edge_sdk.bundle.signing import check
from edge_sdk.bundle.trials import Trials
from edge_sdk.errors import BundleError, CutlayerError, HubError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import Welcome
from edge_sdk.protocol.release import Running
from edge_sdk.runtime import Runtime
from edge_sdk.training.learner import Learner
from edge_sdk.training.local_data import LocalData
from edge_sdk.training.self_check import check_sample
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.download import Downloader
from edge_sdk.transport.session import SessionLost

log = logging.getLogger("cutlayer.device")

LoadRuntime = Callable[[Bundle, int], Runtime]
"""Makes a runtime from a verified bundle, with a number of threads."""

_ATTEMPTS = 4
"""Times that the present state is asked for; each round in between makes a new one."""


class BundleLoader:
    """Holds the learner of the present bundle, and loads others in its place.

    Args:
        connection: connection to the hub.
        downloader: fetches blobs and states.
        load_runtime: makes the runtime.
        trials: what the device remembers of releases that it has tried.
        data: local rows; None if there are none. They are checked against each bundle.
        trust: public keys, one of which must have signed a bundle; None takes any bundle.
        threads: threads of the runtime.
        on_change: called when another learner is in use.

    Attributes:
        data: local rows, which fit the bundle loaded last.
    """

    def __init__(
        self,
        connection: Connection,
        downloader: Downloader,
        load_runtime: LoadRuntime,
        trials: Trials,
        data: LocalData | None,
        trust: frozenset[str] | None,
        threads: int,
        on_change: Callable[[], None],
    ) -> None:
        self._connection, self._downloader = connection, downloader
        self._load_runtime, self._threads = load_runtime, threads
        self._trust, self._on_change = trust, on_change
        self._trials = trials
        self.data = data
        self._learner: Learner | None = None
        self._manifest: str | None = None  # sha256 of the learner's manifest
        self._refused: str | None = None  # sha256 of the manifest of a release that failed

    @property
    def learner(self) -> Learner:
        """The learner of the present bundle; :class:`CutlayerError` before the first is loaded."""
        if self._learner is None:
            raise CutlayerError("the device is not connected; use Device.connect")
        return self._learner

    async def load(self, manifest_name: str, tier: str) -> Learner:
        """Fetch a bundle, verify it and load its runtime; the present learner stays.

        Args:
            manifest_name: sha256 of the manifest.
            tier: the tier that the bundle must be for.

        Raises:
            BundleError: the bundle is damaged, of another tier, not signed by a trusted key,
                cannot be run here, or answers its sample differently.
            DataError: the examples do not fit the model.
            HubError: the hub does not have one of the blobs.
        """
        bundle = await self._fetch(manifest_name, tier)
        return await asyncio.to_thread(self._checked, bundle)

    async def _fetch(self, manifest_name: str, tier: str) -> Bundle:
        """Fetch a bundle and verify it."""
        data = await self._downloader.blob(manifest_name, MAX_MANIFEST)
        manifest = Manifest.from_bytes(data)
        check(data, self._trust)
        if manifest.tier != tier:
            raise BundleError(f"the hub sent the bundle of {manifest.tier!r} for tier {tier!r}")
        blobs = {
            name: await self._downloader.blob(name, size) for name, size in manifest.blobs.items()
        }
        if self.data is not None:
            await asyncio.to_thread(self.data.fit, manifest)
        return Bundle.open(manifest, blobs.__getitem__)

    def _checked(self, bundle: Bundle) -> Learner:
        """Load the runtime of a bundle, and let it answer the bundle's sample."""
        learner = Learner(bundle.manifest, self._load_runtime(bundle, self._threads))
        check_sample(learner, bundle.sample)
        return learner

    def use(self, learner: Learner, manifest_name: str) -> None:
        """Go on with a learner that :meth:`load` returned."""
        self._learner, self._manifest = learner, manifest_name
        self._on_change()

    async def load_welcomed(self) -> None:
        """Load the bundle of the last ``welcome`` if it is not the present one.

        A release that fails the device's own check is refused: the one before stays, or is loaded.

        Raises as :meth:`load` does.
        """
        while (welcome := self._connection.welcome).manifest not in (self._manifest, self._refused):
            if welcome.release is None:
                self.use(await self.load(welcome.manifest, welcome.tier), welcome.manifest)
            else:
                await self._try_release(welcome)

    async def _try_release(self, welcome: Welcome) -> None:
        """Load a release, or go back to the one before; tell the hub which one runs."""
        wanted = welcome.manifest
        try:
            bundle = await self._fetch(wanted, welcome.tier)
            learner = await asyncio.to_thread(self._tried, wanted, bundle)
        except BundleError as error:
            self._refused = wanted
            log.warning("release %d is refused: %s", welcome.release, error)
            if self._learner is None:
                await self._go_back(welcome.tier)
            await self._tell(Running(self._manifest, wanted, str(error)[:4096]))
            if self._learner is None:
                raise
        else:
            self._refused = None
            self.use(learner, wanted)
            await self._tell(Running(wanted))

    def _tried(self, manifest_name: str, bundle: Bundle) -> Learner:
        """:meth:`_checked`, with the attempt written down, which may end the process."""
        self._trials.begin(manifest_name)
        passed = False
        try:
            learner = self._checked(bundle)
            passed = True
            return learner
        finally:
            self._trials.end(manifest_name, passed=passed)

    async def _go_back(self, tier: str) -> None:
        """Load the release that passed last, if there is one."""
        before = self._trials.passed
        if before is None:
            return
        try:
            self.use(await self.load(before, tier), before)
        except (BundleError, HubError) as error:
            log.warning("the release before cannot be loaded either: %s", error)

    async def _tell(self, message: Running) -> None:
        with contextlib.suppress(SessionLost):  # it is told again at the next start
            await self._connection.send(message)

    @property
    def refused(self) -> bool:
        """Whether the release that the hub offers has failed the device's check."""
        return self._refused == self._connection.welcome.manifest

    async def load_present_state(self, welcome: Welcome) -> None:
        """Fetch the tier's present state, if it is no longer the bundle's initial one.

        Raises:
            HubError: the hub does not have the state that it named, again and again.
        """
        for attempt in range(_ATTEMPTS):
            try:
                if welcome.state is not None and welcome.manifest == self._manifest:
                    await self.load_state(welcome.state)
                return
            except HubError as error:
                if error.code != ErrorCode.UNKNOWN_BLOB or attempt == _ATTEMPTS - 1:
                    raise
            welcome = await self._connection.renew()  # rounds passed during the download

    async def load_state(self, name: str, keep: bool = False) -> None:
        """Fetch the state with this sha256 and predict with it from now on.

        Args:
            name: sha256 of the state.
            keep: as in :meth:`Downloader.state`.
        """
        limit = self.learner.manifest.state_bytes
        data = await self._downloader.state(name, limit, keep)
        self.learner.runtime.set_state(unpack_tensors(data))
