"""Blobs that devices download: those of the bundles, and the present states of the model."""

from __future__ import annotations

from collections.abc import Mapping

from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Blob, BlobGet, Error
from server_hub.methods.plan import ModelOffer


class BlobServer:
    """Gives pieces of blobs.

    Args:
        store: the blobs of the bundles.
        piece: size of a piece, in bytes.
    """

    def __init__(self, store: BlobStore, piece: int) -> None:
        self._store, self._piece = store, piece
        self._cache: dict[str, bytes] = {}
        self._states: list[Mapping[str, bytes]] = [{}, {}]
        self._offers: Mapping[str, ModelOffer] = {}

    def publish(self, offers: Mapping[str, ModelOffer], states: Mapping[str, bytes]) -> None:
        """Offer the present model.

        The states of the model before are kept once more, for devices that are downloading them.

        Args:
            offers: offer by tier.
            states: content by hash of all states that the offers name.
        """
        self._offers = offers
        if states.keys() != self._states[0].keys():  # else only their order is new
            self._states = [states, self._states[0]]

    def offer(self, tier: str) -> ModelOffer:
        """Where a tier's present model is; the bundle's initial state if nothing was published."""
        return self._offers.get(tier, ModelOffer())

    def piece(self, wanted: BlobGet) -> Blob | Error:
        """The piece that a device asks for, or what is wrong with its question."""
        now, before = self._states
        data = now.get(wanted.hash) or before.get(wanted.hash) or self._bundle_blob(wanted.hash)
        if data is None or wanted.offset > len(data):
            what = "the blob is not here" if data is None else "the offset is beyond the blob"
            return Error(code=ErrorCode.UNKNOWN_BLOB, message=what, fatal=False, field="hash")
        piece = data[wanted.offset : wanted.offset + self._piece]
        return Blob(hash=wanted.hash, offset=wanted.offset, size=len(data), data=piece)

    def _bundle_blob(self, name: str) -> bytes | None:
        if name not in self._cache:
            try:
                self._cache[name] = self._store.read(name)
            except BundleError:
                return None
        return self._cache[name]
