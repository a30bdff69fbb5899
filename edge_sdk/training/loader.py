"""Bundles and states, from the hub or the cache into a learner."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from edge_sdk.bundle.manifest import MAX_MANIFEST, Bundle, Manifest
from edge_sdk.bundle.signing import check
from edge_sdk.errors import BundleError, CutlayerError, HubError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import Welcome
from edge_sdk.runtime import Runtime
from edge_sdk.training.learner import Learner
from edge_sdk.training.local_data import LocalData
from edge_sdk.training.self_check import check_sample
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.download import Downloader

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
        data: LocalData | None,
        trust: frozenset[str] | None,
        threads: int,
        on_change: Callable[[], None],
    ) -> None:
        self._connection, self._downloader = connection, downloader
        self._load_runtime, self._threads = load_runtime, threads
        self._trust, self._on_change = trust, on_change
        self.data = data
        self._learner: Learner | None = None
        self._manifest: str | None = None  # sha256 of the learner's manifest

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
        bundle = Bundle.open(manifest, blobs.__getitem__)
        return await asyncio.to_thread(self._checked, bundle)

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

        Raises as :meth:`load` does.
        """
        while (welcome := self._connection.welcome).manifest != self._manifest:
            self.use(await self.load(welcome.manifest, welcome.tier), welcome.manifest)

    async def load_present_state(self, welcome: Welcome) -> None:
        """Fetch the tier's present state, if it is no longer the bundle's initial one.

        Raises:
            HubError: the hub does not have the state that it named, again and again.
        """
        for attempt in range(_ATTEMPTS):
            try:
                if welcome.state is not None:
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
