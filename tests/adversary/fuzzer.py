"""A mutation fuzzer of frames: takes good frames, and makes bad ones of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

VECTORS = Path(__file__).parents[1] / "vectors" / "vectors.json"

_LENGTHS = b"\xc4\xc5\xc6\xc7\xc8\xc9\xd9\xda\xdb\xdc\xdd\xde\xdf"
"""First bytes of values whose length follows."""


def seeds() -> list[bytes]:
    """Frames of the test vectors, good and bad."""
    content = json.loads(VECTORS.read_text("utf-8"))
    vectors = [v for kind in ("valid", "accepted", "invalid") for v in content[kind]]
    return [bytes.fromhex(v["hex"]) for v in vectors if "hex" in v]


class Fuzzer:
    """Makes frames that are nearly right.

    Args:
        seed: seed of the mutations; the same seed makes the same frames.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._seeds = seeds()

    def frame(self) -> bytes:
        """The next frame: one to four mutations of a seed, or of a splice of two."""
        rng = self._random
        data = bytearray(rng.choice(self._seeds))
        if rng.random() < 0.1:
            other = rng.choice(self._seeds)
            data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]
        for _ in range(rng.choice((1, 1, 2, 4))):
            if data:
                rng.choice(self._mutations)(self, data)
        return bytes(data)

    def _flip(self, data: bytearray) -> None:
        data[self._random.randrange(len(data))] ^= 1 << self._random.randrange(8)

    def _set(self, data: bytearray) -> None:
        data[self._random.randrange(len(data))] = self._random.choice(
            b"\x00\x01\x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc6\xc9\xcb\xcf\xd3\xdb\xdd\xdf\xff"
        )

    def _cut(self, data: bytearray) -> None:
        del data[self._random.randrange(len(data)) :]

    def _remove(self, data: bytearray) -> None:
        start = self._random.randrange(len(data))
        del data[start : start + self._random.randint(1, 8)]

    def _repeat(self, data: bytearray) -> None:
        start = self._random.randrange(len(data))
        piece = data[start : start + self._random.randint(1, 64)]
        data[start:start] = piece * self._random.choice((1, 2, 50))

    def _insert(self, data: bytearray) -> None:
        place = self._random.randrange(len(data) + 1)
        data[place:place] = self._random.randbytes(self._random.randint(1, 8))

    def _lie(self, data: bytearray) -> None:
        """Claim a length that is not there."""
        place = self._random.randrange(len(data))
        data[place : place + 5] = bytes([self._random.choice(_LENGTHS)]) + self._random.choice(
            (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x00\x01\x00\x00", b"\x00\x00\x00\x00")
        )

    def _nest(self, data: bytearray) -> None:
        place = self._random.randrange(len(data))
        data[place:place] = self._random.choice((b"\x91", b"\x81\xa1x")) * self._random.choice(
            (1, 5, 2000)
        )

    _mutations = (_flip, _set, _cut, _remove, _repeat, _insert, _lie, _nest)
