"""What the fields of messages may hold. A decoder checks every field before a message is built.

A check takes a value and returns None if it is right, else what it must be, for an error message.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_TENSORS = 65_536
"""Tensors in one map."""

MAX_TEXT = 4_096
"""Code points of a text that says nothing else."""

MAX_INT = 2**63 - 1
"""Largest integer that travels."""

MAX_BASES = 64
"""Base networks that a model may be split into."""

MAX_EXTENSIONS = 16
"""Extensions that one side may name."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

Check = Callable[[object], str | None]
"""Returns what a value must be, or None if it is that."""


def integer(low: int = 0, high: int = MAX_INT) -> Check:
    """An integer from ``low`` to ``high``, both included; no bool, no float."""

    def check(value: object) -> str | None:
        ok = type(value) is int and low <= value <= high
        return None if ok else f"an integer from {low} to {high}"

    return check


def text(limit: int = MAX_TEXT) -> Check:
    """Text of at most ``limit`` code points."""

    def check(value: object) -> str | None:
        ok = isinstance(value, str) and len(value) <= limit
        return None if ok else f"text of at most {limit} characters"

    return check


def choice(*choices: str) -> Check:
    """One of some texts."""

    def check(value: object) -> str | None:
        ok = isinstance(value, str) and value in choices
        return None if ok else f"one of {', '.join(choices)}"

    return check


def optional(inner: Check) -> Check:
    """Nil, or what ``inner`` takes."""

    def check(value: object) -> str | None:
        wanted = None if value is None else inner(value)
        return None if wanted is None else f"nil or {wanted}"

    return check


def flag(value: object) -> str | None:
    """True or false."""
    return None if isinstance(value, bool) else "true or false"


def sha256(value: object) -> str | None:
    """A SHA-256 in hexadecimal digits."""
    ok = isinstance(value, str) and _SHA256.fullmatch(value)
    return None if ok else "a sha256 as 64 lower-case hexadecimal digits"


def data(value: object) -> str | None:
    """Binary data."""
    return None if isinstance(value, bytes) else "binary data"


def tensor(value: object) -> str | None:
    """A tensor of any dtype and shape; the manifest says which."""
    return None if isinstance(value, np.ndarray) else "a tensor"


def number(value: object) -> str | None:
    """A finite number; no bool."""
    return None if _is_finite(value) else "a finite number"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def _map_of(what: str, kind: Callable[[object], bool], limit: int) -> Check:
    def check(value: object) -> str | None:
        ok = (
            isinstance(value, dict)
            and len(value) <= limit
            and all(isinstance(k, str) and len(k) <= 512 and kind(v) for k, v in value.items())
        )
        return None if ok else f"a map from text to {what}, of at most {limit} entries"

    return check


tensors = _map_of("tensors", lambda v: isinstance(v, np.ndarray), MAX_TENSORS)
"""A map from name to tensor."""

numbers = _map_of("finite numbers", _is_finite, 64)
"""A map from name to finite number."""

_hashes = _map_of("sha256s", lambda v: sha256(v) is None, MAX_BASES)


def states(value: object) -> str | None:
    """A map from the number of a base network, in decimal digits, to the SHA-256 of its state."""
    wanted = _hashes(value)
    if wanted is not None:
        return wanted
    assert isinstance(value, dict)
    ok = all(re.fullmatch("0|[1-9][0-9]?", key) and int(key) < MAX_BASES for key in value)
    return None if ok else f"a map from numbers below {MAX_BASES}, as text, to sha256s"


def names(value: object) -> str | None:
    """A list of names."""
    ok = (
        isinstance(value, list)
        and len(value) <= 1024
        and all(isinstance(name, str) and len(name) <= 512 for name in value)
    )
    return None if ok else "a list of at most 1024 names"


def extensions(value: object) -> str | None:
    """A list of names of extensions, each once."""
    ok = (
        isinstance(value, list)
        and len(value) <= MAX_EXTENSIONS
        and all(isinstance(name, str) and 1 <= len(name) <= 64 for name in value)
        and len(set(value)) == len(value)
    )
    wanted = f"a list of at most {MAX_EXTENSIONS} names of 1 to 64 characters, each once"
    return None if ok else wanted


def checked(
    check: Check, default: Any = dataclasses.MISSING, *, extension: str | None = None
) -> Any:
    """A dataclass field with a check.

    Args:
        check: what the field may hold.
        default: value of the field where it is left out on the wire; without one it is required.
        extension: the extension that the field belongs to. It travels only where both sides have
            agreed on that, and needs a default for where they have not.
    """
    if extension is not None and default is dataclasses.MISSING:
        raise TypeError(f"a field of the extension {extension!r} needs a default")
    metadata = {"check": check, "extension": extension}
    return dataclasses.field(default=default, metadata=metadata)
