"""Blobs from the cache, or from the hub."""

from __future__ import annotations

import logging

from edge_sdk.bundle.store import BlobStore, verify_blob
from edge_sdk.errors import BundleError
from edge_sdk.files import why
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import Round
from edge_sdk.protocol.tensors import Array
from edge_sdk.transport.connection import Connection

log = logging.getLogger("cutlayer.device")


class Downloader:
    """Fetches blobs and states. Everything is verified by its sha256.

    A cache that cannot be read or written, on a full or a read-only disk for example, is used no
    more: a warning says so once, and everything is fetched into memory.

    Args:
        connection: connection to the hub.
        store: the device's cache; None keeps nothing.
    """

    def __init__(self, connection: Connection, store: BlobStore | None) -> None:
        self._connection, self._store = connection, store
        self._kept: tuple[str, bytes] | None = None
        if store is None:
            log.warning(
                "the home folder is not known, so that bundles are fetched at every start; name a "
                "folder with cache"
            )

    async def blob(self, name: str) -> bytes:
        """A blob of a bundle, from the cache or downloaded into it.

        A download that broke off before goes on where it stopped.

        Raises:
            HubError: the hub does not have the blob.
            BundleError: the downloaded bytes do not match the name.
        """
        if self._store is not None:
            try:
                return await self._through(self._store, name)
            except OSError as error:
                self._give_up(self._store, error)
        return await self.state(name)

    async def _through(self, store: BlobStore, name: str) -> bytes:
        if name in store:
            try:
                return store.read(name)
            except BundleError:
                store.remove(name)  # damaged on disk: fetch again
        with store.claim() as mine:
            if not mine:  # another process is downloading it into this cache
                data = await self.state(name)
                store.write(data)
                return data
            await self._connection.download(
                name, store.partial(name), lambda data: store.append(name, data)
            )
            return store.finish(name)

    def _give_up(self, store: BlobStore, error: OSError) -> None:
        log.warning(
            "the cache %s cannot be used: %s; what it lacks is kept in memory, and fetched again "
            "at the next start", store.folder, why(error),
        )  # fmt: skip
        self._store = None

    async def state(self, name: str, keep: bool = False) -> bytes:
        """A state, from the cache or downloaded into memory; raises as :meth:`blob` does.

        States are not cached, since every round has another. That of the first round is a blob of
        the bundle.

        Args:
            name: sha256 of the state.
            keep: whether to keep it in memory until a state is asked for again: that of an
                evaluation is mostly that of the next round, too.
        """
        kept, self._kept = self._kept, None
        if self._store is not None:
            try:
                if name in self._store:
                    return self._store.read(name)
            except OSError as error:
                self._give_up(self._store, error)
        if kept is not None and kept[0] == name:
            data = kept[1]
        else:
            buffer = bytearray()
            await self._connection.download(name, 0, buffer.extend)
            data = verify_blob(name, bytes(buffer))
        if keep:
            self._kept = name, data
        return data

    async def start_of(self, task: Round) -> dict[int | None, dict[str, Array]]:
        """The states that a round starts from: by base network, or of a single model under None."""
        if task.bases is None:
            assert task.state is not None
            return {None: unpack_tensors(await self.state(task.state))}
        return {
            int(base): unpack_tensors(await self.state(name)) for base, name in task.bases.items()
        }
