"""The base networks that a device mixes: those that the hub names, fetched when needed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

from edge_sdk.errors import HubError
from edge_sdk.inference.mixture import Mixture
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.training.learner import Learner
from edge_sdk.transport.connection import Connection
from edge_sdk.transport.download import Downloader

_ATTEMPTS = 4
"""Times that base networks are fetched anew because rounds made new versions meanwhile."""


class BaseNetworks:
    """Keeps the mixture of a device in step with what the hub offers.

    Args:
        connection: connection to the hub.
        downloader: fetches states.
        learner: returns the present learner.
    """

    def __init__(
        self, connection: Connection, downloader: Downloader, learner: Callable[[], Learner]
    ) -> None:
        self._connection, self._downloader, self._learner = connection, downloader, learner
        self._mixture: Mixture | None = None

    def forget(self) -> None:
        """Drop all base networks, because another bundle was loaded."""
        self._mixture = None

    def offer(self, bases: Mapping[str, str]) -> Mixture:
        """Mix these versions from now on; base networks whose version is the same stay.

        Answers in progress finish with the mixture that they began with.

        Args:
            bases: sha256 of each state by number of the base, best first.
        """
        learner = self._learner()
        mixture = (
            Mixture(learner.manifest, learner.runtime)
            if self._mixture is None
            else copy.copy(self._mixture)
        )
        mixture.offer(bases)
        self._mixture = mixture
        return mixture

    async def fetch(self, bases: int) -> Mixture:
        """Fetch those of the best ``bases`` base networks that are not here yet.

        Raises:
            DataError: there are fewer bases.
            HubError: the hub does not have them.
        """
        for attempt in range(_ATTEMPTS):
            limit = self._learner().manifest.state_bytes
            mixture = self._mixture or self.offer(self._named())
            try:
                for base, name in mixture.missing(bases):
                    mixture.put(
                        base, name, unpack_tensors(await self._downloader.state(name, limit))
                    )
                return mixture
            except HubError as error:
                if error.code != ErrorCode.UNKNOWN_BLOB or attempt == _ATTEMPTS - 1:
                    raise
            # rounds passed since the hub named them
            await self._connection.renew()
            self.offer(self._named())
        raise AssertionError("the last attempt returns or raises")

    def _named(self) -> Mapping[str, str]:
        """The base networks of the bundle if it is of a trained model, else those of the job."""
        trained = self._learner().manifest.base_states
        if trained:
            return {str(base): name for base, name in enumerate(trained)}
        return self._connection.welcome.bases or {}
