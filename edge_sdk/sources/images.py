"""Images: size and pixels of a file, and pixels as a model takes them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from edge_sdk.errors import DataError
from edge_sdk.protocol.tensors import Array

NETPBM = frozenset({".pgm", ".ppm"})
PICTURES = NETPBM | {".png", ".jpg", ".jpeg"}
"""File name endings of images. Those of :data:`NETPBM` need no library; others need Pillow."""

_NETPBM = re.compile(rb"P([56])(?:\s|#[^\n]*\n)+(\d+)\s+(\d+)\s+(\d+)\s")
_MAGIC = b"\x93NUMPY"


def image_header(path: Path) -> tuple[tuple[int, int], bool]:
    """Width and height of an image, and whether it is grey.

    Raises:
        DataError: the file cannot be read, is no image of 8 bits per channel, or Pillow is needed
            and missing.
    """
    with _reading(path):
        if path.suffix.lower() in NETPBM:
            with path.open("rb") as file:
                kind, width, height, _ = _netpbm_header(file.read(512))
            return (width, height), kind == b"5"
        with _opened(path, str(path)) as image:
            return image.size, image.mode in ("1", "L")


def read_image(path: Path, grey: bool) -> Array:
    """The pixels of an image: (height, width) uint8 if ``grey``, else (height, width, 3).

    Raises:
        DataError: as :func:`image_header`.
    """
    with _reading(path):
        data = path.read_bytes()
        return _pixels(data, str(path), grey)


def decode_bytes(data: bytes, where: str) -> Array:
    """The array of an ``.npy`` file as it is, or the pixels of an image as a model takes them.

    Args:
        data: content of the file.
        where: what to call it in an error.

    Returns:
        Pixels are (channels, height, width) float32 from 0 to 1, with 1 channel if grey, else 3.

    Raises:
        DataError: it is neither, or Pillow is needed and missing.
    """
    try:
        if data.startswith(_MAGIC):
            array = npy.read_array(io.BytesIO(data), allow_pickle=False)
            assert isinstance(array, np.ndarray)
            return array
        return _scaled(_pixels(data, where, None))
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise DataError(f"{where} is neither an image nor an .npy array: {error}") from error


def _scaled(pixels: Array) -> Array:
    """Pixels (height, width[, channels]) as (channels, height, width) float32 from 0 to 1."""
    channels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(channels, np.float32) / np.float32(255)


def _pixels(data: bytes, where: str, grey: bool | None) -> Array:
    """Pixels in uint8, as they are if ``grey`` is None. Errors are those of the decoders."""
    if data[:2] in (b"P5", b"P6"):
        kind, width, height, start = _netpbm_header(data[:512])
        channels = 1 if kind == b"5" else 3
        raw = np.frombuffer(data, np.uint8, offset=start)
        size = width * height * channels
        if len(raw) < size:
            raise ValueError(f"it has {len(raw)} of {size} bytes of pixels")
        own_grey = channels == 1
        pixels = raw[:size].reshape(height, width, *([] if own_grey else [3]))
        if grey is None or grey == own_grey:
            return pixels
        if grey:
            raise ValueError("it is in colour, and the others are grey")
        return np.repeat(pixels[..., None], 3, -1)
    with _opened(io.BytesIO(data), where) as image:
        grey = image.mode in ("1", "L") if grey is None else grey
        return np.asarray(image.convert("L" if grey else "RGB"))


@contextmanager
def _opened(file: Path | io.BytesIO, where: str) -> Iterator[Any]:
    """An image of Pillow, which is no dependency of a device."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise DataError(
            f"{where} needs Pillow to be read; install 'cutlayer[images]', or convert images to "
            "PGM or PPM"
        ) from None
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{where} has more than 8 bits per channel; convert it to 8")
            yield image
    except UnidentifiedImageError:  # it names an object where the image is not in a file
        raise ValueError("its format is not known") from None
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from error


def _netpbm_header(data: bytes) -> tuple[bytes, int, int, int]:
    """Kind, width, height, and where the pixels begin; ValueError if there is no such header."""
    found = _NETPBM.match(data)
    if found is None or int(found[4]) != 255:
        raise ValueError("it is no binary PGM or PPM with values up to 255")
    return found[1], int(found[2]), int(found[3]), found.end()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what a decoder raises into a :class:`DataError` in one sentence."""
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} cannot be read as an image: {error}") from error
