"""Files of users: names, places, and texts that other systems and editors have written."""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk.errors import ConfigError

MAX_NAME = 128
"""Largest number of characters in a name, as in the messages of the protocol."""

_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')
"""Characters that no name of a file may have on Windows."""

_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
"""Categories of control characters, halves of characters, and ends of lines and paragraphs."""

_DEVICES = re.compile(r"(CON|PRN|AUX|NUL|CONIN\$|CONOUT\$|COM[0-9¹²³]|LPT[0-9¹²³])(\..*)?", re.I)
"""Names that Windows takes for a device, with any ending."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
"""Marks at the start of a text that say how it is encoded."""


def check_name(name: str, what: str) -> str:
    """Return a name that people have given, if it can be shown and be sent.

    Args:
        name: the name.
        what: what it names, for the error: ``"device"``.

    Raises:
        ConfigError: it is empty, too long, or has characters that cannot be shown.
    """
    if not name or len(name) > MAX_NAME:
        raise ConfigError(f"{what} name {_shown(name)} must have 1 to {MAX_NAME} characters")
    if name != name.strip() or any(unicodedata.category(c) in _UNSHOWN for c in name):
        raise ConfigError(
            f"{what} name {_shown(name)} has control characters, or spaces at an end; leave "
            "them out"
        )
    return name


def check_file_names(names: Iterable[str], what: str) -> None:
    """Check that names can be part of file names on every system, side by side in one folder.

    Args:
        names: the names.
        what: what they name, for the error: ``"tier"``.

    Raises:
        ConfigError: :func:`check_name` does not accept a name; it is reserved or has a forbidden
            character on Windows; or two names differ only in upper and lower case.
    """
    seen: dict[str, str] = {}
    for name in names:
        check_name(name, what)
        found = _FORBIDDEN.search(name)
        if found is not None:
            raise ConfigError(
                f"{what} name {name!r} has a {found[0]!r}, which is not possible in names of "
                "files everywhere; use letters, digits, '-', '_' and '.'"
            )
        if _DEVICES.fullmatch(name) or name.startswith(".") or name.endswith("."):
            raise ConfigError(
                f"{what} name {name!r} is no name for a file on every system; choose another"
            )
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ConfigError(
                f"{what} names {other!r} and {name!r} differ only in upper and lower case, "
                "which some systems do not tell apart; rename one"
            )


def expanded(path: str | Path) -> Path:
    """Return a path whose leading ``~`` is replaced by the home folder.

    Raises:
        ConfigError: the home folder is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path} begins with ~, and the home folder is not known; write the path in full, or "
            "set HOME"
        ) from None


def home_folder() -> Path | None:
    """Return the home folder; None if it is not known, as for a user id without an entry."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def read_text(path: Path) -> str:
    """Read a text in UTF-8, or in UTF-16 with a byte-order mark; the mark is left out.

    Raises:
        OSError: the file cannot be read.
        UnicodeDecodeError: it is no such text.
    """
    data = path.read_bytes()
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return data.decode(encoding)
    return data.decode("utf-8")


def why(error: OSError | UnicodeDecodeError) -> str:
    """Return the reason of a failure in words, without number and path."""
    if isinstance(error, UnicodeDecodeError):
        return "it is no UTF-8 text; save it as UTF-8"
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let errors of the system in the block name a file: a failed write names none by itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = str(path)
        raise


def _shown(name: str) -> str:
    return ascii(name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}...")
