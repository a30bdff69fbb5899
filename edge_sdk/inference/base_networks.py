"""The base networks of a device: those that the hub names, fetched when they are asked for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from edge_sdk.errors import HubError
from edge_sdk.inference.mixture import Mixture
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.training.learner import Learner
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.download import Downloader

_ATTEMPTS = 4
"""Rounds that may go by while bases are fetched, of which each makes new versions."""


class BaseNetworks:
    """What a device mixes.

    Args:
        connection: to the hub.
        fetcher: fetches states.
        learner: gives the present learner.
    """

    def __init__(
        self, connection: Connection, fetcher: Downloader, learner: Callable[[], Learner]
    ) -> None:
        self._connection, self._fetcher, self._learner = connection, fetcher, learner
        self._mix: Mixture | None = None

    def forget(self) -> None:
        """The bundle is another."""
        self._mix = None

    def offer(self, bases: Mapping[str, str]) -> Mixture:
        """From now on these are mixed; of those that are here, the ones that are as they were stay.

        Answers that are under way go on with what they have begun with.
        """
        learner = self._learner()
        mix = (
            Mixture(learner.manifest, learner.runtime)
            if self._mix is None
            else copy.copy(self._mix)
        )
        mix.offer(bases)
        self._mix = mix
        return mix

    async def have(self, bases: int) -> Mixture:
        """Have the best so many here; only those that are not are fetched.

        Raises:
            DataError: there are not so many.
            HubError: the hub does not give them.
        """
        for attempt in range(_ATTEMPTS):
            mix = self._mix or self.offer(self._connection.welcome.bases or {})
            try:
                for base, name in mix.missing(bases):
                    mix.put(base, name, unpack_tensors(await self._fetcher.state(name)))
                return mix
            except HubError as error:
                if error.code != "unknown_blob" or attempt == _ATTEMPTS - 1:
                    raise
            # rounds went by since the hub named them
            self.offer((await self._connection.renew()).bases or {})
        raise AssertionError("the last attempt returns or raises")
