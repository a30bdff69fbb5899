"""What the trunk's process starts from: the model, or how to build it.

The model is built in the process where the hub knows a function that builds it. Otherwise it is
pickled, and its classes are imported in the process. The hub's main script is imported only if the
model has a class that is defined there.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from multiprocessing import spawn
from typing import Any

from edge_sdk.errors import CutlayerError
from edge_sdk.protocol.tensors import Array
from export.cutting.split_model import SplitModel
from server_hub.trunk.errors import TrunkFailed

ModelSource = SplitModel | Callable[[], SplitModel]
"""A model, or a function that builds it, which can be pickled."""

HeldOut = tuple[Array, Array] | None
"""Examples to evaluate on, ``(x, y)``."""

_BY_NAME = "name a function that builds the model as MODULE:FUNCTION in the hub's configuration"


def dump(model: ModelSource, held_out: HeldOut) -> bytes:
    """Pickle what the process starts from.

    Raises:
        TrunkFailed: the model cannot be pickled.
    """
    try:
        return pickle.dumps((model, held_out), protocol=5)
    except Exception as error:
        raise TrunkFailed(
            f"the model cannot be sent to the trunk's process ({error}): it holds a lambda, or "
            f"something else that cannot be pickled; use a module or a named function instead, or "
            f"{_BY_NAME}"
        ) from error


def main_script() -> dict[str, str]:
    """The hub's main script, for :func:`load`; empty in a notebook or an interactive session."""
    data = spawn.get_preparation_data("trunk")
    return {key: value for key, value in data.items() if key.startswith("init_main")}


def load(payload: Any, main: Mapping[str, str]) -> tuple[SplitModel, HeldOut]:
    """Unpickle what :func:`dump` has pickled; build the model.

    Args:
        payload: the pickle, as a buffer.
        main: what :func:`main_script` returned in the hub's process.
    """
    model, held_out = _Unpickler(io.BytesIO(payload), main).load()
    return (model if isinstance(model, SplitModel) else model()), held_out


def failure(error: Exception) -> CutlayerError:
    """Say in one sentence why the process cannot start."""
    if isinstance(error, CutlayerError):
        return error
    return TrunkFailed(f"the trunk's process cannot start: {type(error).__name__}: {error}")


class _Unpickler(pickle.Unpickler):
    """Imports the hub's main script when a class is defined there."""

    def __init__(self, file: io.BytesIO, main: Mapping[str, str]) -> None:
        super().__init__(file)
        self._main = main

    def find_class(self, module: str, name: str) -> Any:
        """See :meth:`pickle.Unpickler.find_class`."""
        if module == "__main__":
            self._import_main(name)
        return super().find_class(module, name)

    def _import_main(self, name: str) -> None:
        if not self._main:
            raise TrunkFailed(
                f"the model uses {name}, which is defined in a notebook or an interactive session; "
                f"the trunk's process cannot import it. Move it to a .py file and import it from "
                f"there, or {_BY_NAME}"
            )
        try:
            spawn.prepare(dict(self._main))
        except (Exception, SystemExit) as error:
            raise TrunkFailed(
                f"the model uses {name}, and the trunk's process cannot import the script that "
                f"defines it ({type(error).__name__}: {error}): put what the script runs under "
                f'if __name__ == "__main__":, or move {name} to a module of its own'
            ) from error
