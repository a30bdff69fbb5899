"""Fills the virtual environment of ``make setup``, with uv or pip; says first what it fetches.

It runs before anything is installed, so it needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
SIZES = {"CPU": "about 200 MB", "CUDA": "about 3 GB"}
"""Rough sizes of what torch brings: its wheel, and for CUDA the libraries that it needs."""


@dataclass(frozen=True)
class Torch:
    """A build of torch that can be fetched.

    Attributes:
        version: version with its local part, such as ``2.13.0+cpu``.
        source: URL of the wheel, or of the index or folder that has it.
        needs: names of all packages that it brings, itself included.
        command: arguments that install it.
    """

    version: str
    source: str
    needs: Sequence[str]
    command: Sequence[str]

    @property
    def build(self) -> str:
        """What it computes on: ``CPU``, ``CUDA``, or the local part of its version."""
        local = self.version.partition("+")[2]
        if local.startswith("cu") or any(n.startswith(("nvidia-", "cuda-")) for n in self.needs):
            return "CUDA"
        return "CPU" if local in ("", "cpu") else local

    @property
    def size(self) -> str:
        """Its size in words; that of a file on this machine is exact."""
        file = self._file()
        if file is not None and file.is_file():
            return f"{file.stat().st_size / 1e6:.0f} MB"
        return SIZES.get(self.build, "several GB")

    @property
    def place(self) -> str:
        """A folder, or the name of a host; never a password that is in a URL."""
        file = self._file()
        if file is None:
            return urlsplit(self.source).hostname or self.source
        return str(file.parent if file.is_file() else file)

    def _file(self) -> Path | None:
        parts = urlsplit(self.source)
        if parts.scheme not in ("", "file"):
            return None
        return Path(unquote(parts.path))


class CannotFetch(Exception):
    """An installer cannot resolve or install something; the text is what it printed."""


def pip_torch(python: Path, version: str) -> Torch:
    """Return the CPU build of torch where pip finds it, else the ordinary one.

    Raises:
        CannotFetch: there is none.
    """
    failure = ""
    for wanted in (f"torch=={version}+cpu", f"torch=={version}"):
        install = [str(python), "-m", "pip", "install", "--quiet"]
        try:
            report = output([*install, "--dry-run", "--ignore-installed", "--report", "-", wanted])
        except CannotFetch as error:
            failure = str(error)
            continue
        items = {item["metadata"]["name"].lower(): item for item in json.loads(report)["install"]}
        torch = items["torch"]
        return Torch(
            torch["metadata"]["version"],
            torch["download_info"]["url"],
            list(items),
            [*install, wanted],
        )
    raise CannotFetch(failure)


def uv_torch(uv: str, python: Path, version: str, links: Sequence[str]) -> Torch:
    """Return the build of torch in a folder of wheels, else that for this machine.

    uv chooses the index of PyTorch for the machine's GPU, or for a CPU. Where that index cannot be
    reached, the build of the ordinary index is taken.

    Args:
        uv: path of uv.
        python: the environment's Python.
        version: version of torch.
        links: folders of wheels.

    Raises:
        CannotFetch: there is none.
    """
    wanted, failure = f"torch=={version}", ""
    backend = [f"--torch-backend={os.environ.get('UV_TORCH_BACKEND') or 'auto'}"]
    for flags in ([], backend, []) if links else (backend, []):
        try:
            found = resolved(uv, python, wanted, flags)
        except CannotFetch as error:
            failure = str(error)
            if flags:
                say(f"uv {flags[0]} does not find torch: {failure.splitlines()[0]}")
            continue
        torch, source = found["torch"]
        in_folder = path_of(source) in map(path_of, links)
        if flags or failure or in_folder:
            install = [uv, "pip", "install", "--quiet", "--python", str(python), *flags]
            return Torch(torch, source, list(found), [*install, wanted])
    raise CannotFetch(failure)


def resolved(
    uv: str, python: Path, wanted: str, flags: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """Resolve a requirement with uv.

    Returns:
        Version and index by name of a package.
    """
    compiled = output(
        [uv, "pip", "compile", "--quiet", "--no-header", "--emit-index-annotation",
         "--python", str(python), *flags, "-"],
        wanted,
    )  # fmt: skip
    found: dict[str, tuple[str, str]] = {}
    name = ""
    for line in compiled.splitlines():
        if "==" in line:
            name, _, version = line.partition(";")[0].strip().partition("==")
            found[name] = version, ""
        elif line.strip().startswith("# from "):
            found[name] = found[name][0], line.strip().removeprefix("# from ")
    return found


def path_of(link: str) -> str:
    """Return the path of a folder of wheels, which is given as a URL or a path."""
    parts = urlsplit(link)
    path = parts.path if parts.scheme in ("http", "https", "file") else str(Path(link).absolute())
    return path.rstrip("/")


def output(command: Sequence[str], given: str | None = None) -> str:
    """Return what a command prints.

    Raises:
        CannotFetch: the command failed.
    """
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise CannotFetch(said or f"{' '.join(command)} has failed")
    return done.stdout


def run(command: Sequence[str]) -> None:
    """Run a command, which prints for itself.

    Raises:
        CannotFetch: the command failed.
    """
    if subprocess.run(command).returncode:
        raise CannotFetch(f"{' '.join(command)} has failed")


def links_of(environment: Mapping[str, str]) -> list[str]:
    """Return the folders of wheels that the variables of pip and of uv name, each once."""
    pips = environment.get("PIP_FIND_LINKS", "").split()
    uvs = [link.strip() for link in environment.get("UV_FIND_LINKS", "").split(",")]
    found = [link for link in dict.fromkeys([*pips, *uvs]) if link]
    return [link for link in found if "://" in link or Path(link).exists()]  # uv refuses others


def installed_torch(python: Path) -> str | None:
    """Return the version of torch in an environment, None if it has none."""
    code = "from importlib.metadata import version; print(version('torch'))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return done.stdout.strip() or None


def announcement(torch: Torch, installer: str) -> list[str]:
    """Return the lines that say what will be fetched, and how to avoid a GPU's build."""
    lines = [
        f"{installer} will fetch torch {torch.version}, the {torch.build} build, {torch.size}, "
        f"from {torch.place}; and about 250 MB of other packages."
    ]
    if torch.build != "CPU":
        way = (
            "run UV_TORCH_BACKEND=cpu make setup"
            if installer == "uv"
            else f"run PIP_EXTRA_INDEX_URL={CPU_INDEX} make setup"
        )
        lines.append(
            f"The CPU build ({SIZES['CPU']}) is enough for everything but training on a GPU. To "
            f"get it, stop this (Ctrl-C) and {way}; without access to that index, put its wheel "
            "into a folder and set PIP_FIND_LINKS to the folder."
        )
    return lines


def set_up(python: Path, version: str, uv: str) -> None:
    """Install torch, then Cutlayer with everything for development.

    Args:
        python: the environment's Python.
        version: version of torch.
        uv: path of uv; empty to install with pip.

    Raises:
        CannotFetch: something cannot be resolved or installed.
    """
    links = links_of(os.environ)
    if links:
        os.environ["PIP_FIND_LINKS"], os.environ["UV_FIND_LINKS"] = " ".join(links), ",".join(links)
    else:
        os.environ.pop("UV_FIND_LINKS", None)
    if uv:
        install = [uv, "pip", "install", "--quiet", "--python", str(python)]
    else:
        install = [str(python), "-m", "pip", "install", "--quiet"]
        run([*install, "--upgrade", "pip"])
    present = installed_torch(python)
    if present is not None and present.partition("+")[0] == version:
        say(f"torch {present} is there already; the other packages are fetched where they changed.")
    else:
        torch = uv_torch(uv, python, version, links) if uv else pip_torch(python, version)
        for line in announcement(torch, "uv" if uv else "pip"):
            say(line)
        run(torch.command)
    run([*install, "--editable", ".[dev]"])


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="the environment's Python")
    parser.add_argument("--torch", required=True, help="version of torch")
    parser.add_argument("--uv", default="", help="path of uv; empty for pip")
    given = parser.parse_args()
    try:
        set_up(given.python, given.torch, given.uv)
    except (CannotFetch, OSError) as error:
        print(error, file=sys.stderr)
        hint = "; make setup UV= installs with pip" if given.uv else ""
        print(f"make setup has failed; the lines above say why{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
