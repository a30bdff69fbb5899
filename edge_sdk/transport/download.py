"""Blobs from the cache, or from the hub."""

from __future__ import annotations

from edge_sdk.bundle.store import BlobStore, verify_blob
from edge_sdk.errors import BundleError
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.messages import Round
from edge_sdk.protocol.tensors import Array
from edge_sdk.transport.connection import Connection


class Downloader:
    """Fetches blobs and states. Everything is verified by its sha256.

    Args:
        connection: connection to the hub.
        store: the device's cache.
    """

    def __init__(self, connection: Connection, store: BlobStore) -> None:
        self._connection, self._store = connection, store
        self._kept: tuple[str, bytes] | None = None

    async def blob(self, name: str) -> bytes:
        """A blob of a bundle, from the cache or downloaded into it.

        A download that broke off before goes on where it stopped.

        Raises:
            HubError: the hub does not have the blob.
            BundleError: the downloaded bytes do not match the name.
        """
        if name in self._store:
            try:
                return self._store.read(name)
            except BundleError:
                self._store.remove(name)  # damaged on disk: fetch again
        with self._store.claim() as mine:
            if not mine:  # another process is downloading it into this cache
                data = await self.state(name)
                self._store.write(data)
                return data
            await self._connection.download(
                name, self._store.partial(name), lambda data: self._store.append(name, data)
            )
            return self._store.finish(name)

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
        if name in self._store:
            return self._store.read(name)
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
