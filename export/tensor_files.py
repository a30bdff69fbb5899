"""Files of tensors: safetensors, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from export.errors import ExportError


def save_tensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write tensors as safetensors; readers see the old file or the new one.

    Raises:
        ExportError: the file cannot be written.
    """
    from safetensors import SafetensorError  # the trunk works without this package
    from safetensors.torch import save_file

    temporary = path.with_name(f".write-{secrets.token_hex(8)}")
    try:
        save_file(dict(tensors), temporary, metadata)
        mask = os.umask(0)  # the only way to read it
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # safetensors lets nobody else read the file
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = str(error).replace(str(temporary), str(path))
        raise ExportError(f"{path} cannot be written: {reason}") from error
