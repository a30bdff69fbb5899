"""Blobs that devices download: those of the bundles, and the present states of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from edge_sdk.bundle.store import BlobStore
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Blob, BlobGet, Error
from server_hub.methods.plan import ModelOffer


class BlobServer:
    """Gives pieces of blobs.

    Args:
        stores: the blobs of the bundles. They were verified before; a device verifies them, too.
        piece: size of a piece, in bytes.
    """

    def __init__(self, stores: Sequence[BlobStore], piece: int) -> None:
        self._stores, self._piece = stores, piece
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
        found = self._state_piece(wanted)
        for store in self._stores:
            found = found or store.piece(wanted.hash, wanted.offset, self._piece)
        if found is None:
            return Error(
                code=ErrorCode.UNKNOWN_BLOB,
                message="the blob is not here, or the offset is beyond it",
                fatal=False,
                field="hash",
            )
        data, size = found
        return Blob(hash=wanted.hash, offset=wanted.offset, size=size, data=data)

    def _state_piece(self, wanted: BlobGet) -> tuple[bytes, int] | None:
        """A piece of a state, and the state's size; None if it is none, or too short."""
        now, before = self._states
        data = now.get(wanted.hash) or before.get(wanted.hash)
        if data is None or wanted.offset > len(data):
            return None
        return data[wanted.offset : wanted.offset + self._piece], len(data)
