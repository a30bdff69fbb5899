"""Runs the tests of the export and of the device's runtime with the newest libraries.

The libraries are those whose changes can break an export: ``pyproject.toml`` pins them to a tested
range, and this says whether the range can be widened. Torch and ExecuTorch stay as pinned.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from set_up import CannotFetch, output, run, say, set_up

LIBRARIES = ("onnx", "onnxscript", "onnxruntime", "transformers", "peft")
PINNED = ("torch", "executorch")
TESTS = ("tests/export", "tests/edge_sdk")


def upgrade(python: Path, torch: str, uv: str) -> None:
    """Install the newest versions of the libraries, beyond the range of ``pyproject.toml``.

    Args:
        python: the environment's Python.
        torch: version of torch, which stays: peft would let uv replace it.
        uv: path of uv; empty to install with pip.

    Raises:
        CannotFetch: something cannot be resolved or installed.
    """
    if uv:
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
        newest = [part for name in LIBRARIES for part in ("--upgrade-package", name)]
    else:
        install = [str(python), "-m", "pip", "install", "--quiet"]
        newest = ["--upgrade"]
    run([*install, *newest, *LIBRARIES, f"torch=={torch}"])


def versions(python: Path) -> str:
    """Return the versions of all libraries in an environment, such as ``onnx 1.23.2, ...``."""
    names = [*LIBRARIES, *PINNED]
    code = (
        "from importlib.metadata import version\n"
        f"print(', '.join(f'{{name}} {{version(name)}}' for name in {names}))"
    )
    return output([str(python), "-c", code]).strip()


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the environment's Python")
    parser.add_argument("--torch", required=True, help="version of torch")
    parser.add_argument("--uv", default="", help="path of uv; empty for pip")
    given = parser.parse_args()
    try:
        set_up(given.python, given.torch, given.uv)
        upgrade(given.python, given.torch, given.uv)
        found = versions(given.python)
    except (CannotFetch, OSError) as error:
        print(error, file=sys.stderr)
        print("make test-latest has failed; the lines above say why", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say(f"Testing with {found}")
    workers = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    status = subprocess.run([str(given.python), "-m", "pytest", *workers, *TESTS]).returncode
    say(f"The tests {'have failed' if status else 'pass'} with {found}")
    return status


if __name__ == "__main__":
    sys.exit(main())
