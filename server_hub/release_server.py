"""The release server: gives devices the releases, where no job is running."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Message, Ready, Stop
from server_hub.gateway.limits import Limits, Listen
from server_hub.gateway.peers import Peer
from server_hub.gateway.releases import Releases
from server_hub.gateway.server import Gateway
from server_hub.gateway.tokens import TokenFile
from server_hub.logs import protect

log = logging.getLogger("cutlayer.hub")


@dataclass(frozen=True)
class ReleaseConfig:
    """Configuration of a release server.

    Attributes:
        releases: folder of the releases.
        tokens: file written by ``cutlayer token``.
        listen: where to listen.
        limits: what a peer may do.
    """

    releases: Path = Path("releases")
    tokens: Path = Path("tokens.toml")
    listen: Listen = field(default_factory=Listen)
    limits: Limits = field(default_factory=Limits)


class ReleaseServer:
    """Serves releases to all devices that have a token, until it is cancelled.

    A device that wants to train is told that there is no job, and has the newest release.

    Args:
        config: configuration of the server.

    Raises:
        ConfigError: there are no releases or no tokens, or they cannot be read.
    """

    def __init__(self, config: ReleaseConfig) -> None:
        protect(log)
        self._config = config
        self.releases = Releases(config.releases)
        tokens = TokenFile(config.tokens)
        tokens.read()  # a broken file is the operator's mistake, to be told now
        self.gateway = Gateway(
            config.limits,
            tokens,
            manifests={},
            store=None,
            handle=self._handle,
            gone=lambda peer, reason: None,
            moved=lambda device, issued, memory: None,
            connection=lambda peer: None,
            releases=self.releases,
        )

    async def serve(self, ready: Callable[[str], None] | None = None) -> None:
        """Serve until cancelled.

        Args:
            ready: called with the address once devices can connect.

        Raises:
            ConfigError: the port is taken.
        """
        async with self.gateway.listen(self._config.listen) as address:
            if ready is not None:
                ready(address)
            await asyncio.Event().wait()

    def _handle(self, peer: Peer, message: Message) -> None:
        if not isinstance(message, Ready):
            raise ProtocolError(
                ErrorCode.BAD_MESSAGE, f"here are releases and no job; {message.TYPE} has no place"
            )
        self.gateway.post(
            peer, Stop(reason="there is no job here, and the newest release is loaded")
        )
