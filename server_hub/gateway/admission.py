"""Admission: which device a ``hello`` comes from, and which bundle the device gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from edge_sdk.errors import ConfigError, ProtocolError
from edge_sdk.protocol.enums import ErrorCode
from edge_sdk.protocol.messages import Hello
from server_hub.gateway.releases import Offered, Releases
from server_hub.gateway.tokens import Tokens

log = logging.getLogger("cutlayer.hub")


@dataclass(frozen=True)
class Identity:
    """The device that a ``hello`` comes from.

    Attributes:
        device: name of the device.
        tier: tier of the device.
        memory_mb: memory that the device can spare for training, in MB; None if it does not say.
        download_only: whether the device's token only downloads.
        release: the release that the device gets; None if it gets the bundle of the job.
    """

    device: str
    tier: str
    memory_mb: int | None
    download_only: bool
    release: Offered | None


class Admission:
    """Looks up tokens, tiers and releases.

    Args:
        tokens: tells which device a token belongs to.
        manifests: hash of the manifest by tier; empty without a job.
        moved: returns the tier that a device has moved to, given the device's name, the tier of its
            token and its memory in MB; None for the tier of the token.
        releases: releases for devices that only download, and without a job for all devices; None
            if there are none.
    """

    def __init__(
        self,
        tokens: Tokens,
        manifests: Mapping[str, str],
        moved: Callable[[str, str | None, int | None], str | None],
        releases: Releases | None,
    ) -> None:
        self._tokens, self._manifests = tokens, manifests
        self._moved, self._releases = moved, releases

    def identify(self, hello: Hello) -> Identity:
        """Return the device of a ``hello``.

        Raises:
            ProtocolError: the token or the tier is not known, or tokens and releases cannot be
                read.
        """
        try:
            device = self._tokens.device_of(hello.token)
            if device is None:
                raise ProtocolError(ErrorCode.BAD_TOKEN, "the token is no device's", "token")
            issued = None if hello.tier else self._tokens.tier_of(device)
            download_only = self._tokens.is_download_only(device)
            release = None
            if self._releases is not None and (download_only or not self._manifests):
                tier = _known(device, hello.tier or issued, self._releases.tiers())
                release = self._releases.newest(device, tier)
                if release is None:
                    raise ProtocolError(
                        ErrorCode.UNKNOWN_TIER,
                        f"there is no release of tier {tier!r} for {device} yet",
                        "tier",
                    )
            else:
                wanted = hello.tier or self._moved(device, issued, hello.memory_mb) or issued
                tier = _known(device, wanted, self._manifests)
        except ConfigError as error:
            log.error("tokens or releases cannot be used: %s", error)
            raise ProtocolError(
                ErrorCode.INTERNAL, "the hub cannot read its tokens or releases now; try later"
            ) from error
        return Identity(device, tier, hello.memory_mb, download_only, release)


def _known(device: str, tier: str | None, known: Collection[str]) -> str:
    """Return a tier; :class:`ProtocolError` if there is none of this name."""
    there = ", ".join(sorted(known)) or "none yet"
    if tier is None:
        what = f"{device}'s token is for no tier; say one of {there}"
    elif tier not in known:
        what = f"there is no tier {tier!r} for {device}; there are {there}"
    else:
        return tier
    raise ProtocolError(ErrorCode.UNKNOWN_TIER, what, "tier")
