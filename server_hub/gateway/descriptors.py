"""How many connections the system lets the hub have open."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from edge_sdk.errors import ConfigError

log = logging.getLogger("cutlayer.hub")

_RESERVE = 192
"""Descriptors that are kept for files, the trunk, and connections that are about to be refused."""

_LEAST = 16
"""Connections without which there is no point in listening."""


def free_descriptors(wanted: int) -> int:
    """Number of connections to take: ``wanted``, or what the limit on open files leaves.

    The soft limit is raised as far as the hard one allows.

    Args:
        wanted: number of connections that the hub is meant to take.

    Raises:
        ConfigError: the limit leaves hardly any.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = _used()
    needed = used + wanted + _RESERVE
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = soft - used - _RESERVE
    if free < _LEAST:
        raise ConfigError(
            f"the system lets the hub open {soft} files, which leaves no connections; "
            f"allow {needed} (ulimit -n {needed})"
        )
    if free < wanted:
        log.warning(
            "the system lets the hub open %d files: it takes %d connections instead of %d; "
            "allow %d (ulimit -n %d)", soft, free, wanted, needed, needed,
        )  # fmt: skip
    return min(free, wanted)


def _used() -> int:
    folder = Path("/proc/self/fd")
    return len(os.listdir(folder)) if folder.exists() else 64
