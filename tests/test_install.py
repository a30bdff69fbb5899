"""What gets installed: nothing of torch on a device; ``make setup`` says first what it fetches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NOT_ON_A_DEVICE = {"torch", "onnx", "onnxscript", "executorch", "transformers", "safetensors"}


def brought_by(name: str) -> set[str]:
    """Return the names of all packages that installing a package without extras brings."""
    found: set[str] = set()
    todo = [Requirement(name)]
    while todo:
        wanted = todo.pop()
        key = f"{canonicalize_name(wanted.name)}{sorted(wanted.extras)}"
        if key in found:
            continue
        found.add(key)
        for line in metadata.requires(wanted.name) or []:
            needed = Requirement(line)
            extras = wanted.extras or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                todo.append(needed)
    return {key.partition("[")[0] for key in found}


def test_a_device_gets_no_torch() -> None:
    """``pip install cutlayer`` brings what runs step graphs, and nothing that makes them."""
    found = brought_by("cutlayer")
    assert {"cutlayer", "numpy", "onnxruntime", "websockets", "typer"} <= found
    assert not found & NOT_ON_A_DEVICE
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]
    assert "torch" in brought_by("cutlayer[export]"), "the closure is not resolved"


@pytest.mark.slow
def test_a_clean_environment_of_a_device(tmp_path: Path) -> None:
    """The package installs without extras, imports, and has its command; it needs the index."""
    source = tmp_path / "source"
    for folder in ("edge_sdk", "export", "server_hub"):
        shutil.copytree(ROOT / folder, source / folder)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    bin_ = tmp_path / "venv" / "bin"

    def run(*command: str | Path) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [str(part) for part in command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run(sys.executable, "-m", "venv", tmp_path / "venv")
    run(bin_ / "python", "-m", "pip", "install", "--quiet", source)
    listed = json.loads(run(bin_ / "python", "-m", "pip", "list", "--format", "json"))
    assert not {canonicalize_name(item["name"]) for item in listed} & NOT_ON_A_DEVICE
    run(bin_ / "python", "-c", "import edge_sdk; edge_sdk.Device, edge_sdk.Examples")
    assert "--url" in run(bin_ / "cutlayer", "device", "--help")


# --- make setup ---------------------------------------------------------------------------------

FAKE_UV = """\
#!/bin/sh
echo "$*" >> {log}
case "$*" in
  "pip compile"*--torch-backend*) {backend} ;;
  "pip compile"*) printf '%s' '{plain}' ;;
  *torch==*) echo INSTALL TORCH ;;
  *) echo INSTALL REST ;;
esac
"""
CPU = "torch==2.13.0+cpu\n    # from https://user:secret@torch.example/whl/cpu\n"
CUDA = (
    "nvidia-cublas==13.1\n    # via torch\n    # from https://index.example/simple\n"
    "torch==2.13.0\n    # from https://index.example/simple\n"
)
FAKE_PIP = """\
#!/bin/sh
case "$*" in
  *--dry-run*+cpu) {cpu} ;;
  *--dry-run*) printf '%s' '{plain}' ;;
  *torch==*) echo INSTALL TORCH ;;
  *editable*) echo INSTALL REST ;;
esac
"""


def script(path: Path, text: str) -> Path:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)
    return path


def set_up(tmp_path: Path, *options: str | Path, **environment: str) -> tuple[int, list[str]]:
    """Run the script behind ``make setup``; return its exit status and its lines.

    The environment that it fills has no torch.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "set_up.py", "--torch", "2.13.0", *options],
        env=kept | environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout.splitlines()


def report(*names: str) -> str:
    """Return a report of pip, as much of it as counts."""
    return json.dumps(
        {
            "install": [
                {
                    "metadata": {"name": name, "version": "2.13.0"},
                    "download_info": {"url": f"https://files.example/{name}.whl"},
                }
                for name in names
            ]
        }
    )


def with_uv(tmp_path: Path, backend: str, **environment: str) -> tuple[int, list[str], str]:
    """Set up with a uv that answers as given; return also what it was called with."""
    log = tmp_path / "log"
    uv = script(tmp_path / "uv", FAKE_UV.format(log=log, backend=backend, plain=CUDA))
    python = script(tmp_path / "python", "#!/bin/sh\n")
    code, lines = set_up(tmp_path, "--python", python, "--uv", uv, **environment)
    return code, lines, log.read_text()


def test_uv_takes_the_build_for_this_machine(tmp_path: Path) -> None:
    """The build, its size and its source come before the first download, without a password."""
    code, lines, log = with_uv(tmp_path, f"printf '%s' '{CPU}'")
    assert code == 0
    assert "the CPU build, about 200 MB, from torch.example;" in lines[0]
    assert lines[1:] == ["INSTALL TORCH", "INSTALL REST"]
    assert log.count("--torch-backend=auto") == 2  # asked, and installed with
    assert "secret" not in "".join(lines)


def test_uv_says_that_it_fetches_cuda(tmp_path: Path) -> None:
    """Where the index of PyTorch is out of reach, the reason and the way around are said first."""
    code, lines, log = with_uv(tmp_path, "echo no route >&2; exit 2", UV_TORCH_BACKEND="cpu")
    assert code == 0
    assert "--torch-backend=cpu" in lines[0]
    assert "no route" in lines[0]
    assert "the CUDA build, about 3 GB, from index.example;" in lines[1]
    assert "PIP_FIND_LINKS" in lines[2]
    assert lines[3:] == ["INSTALL TORCH", "INSTALL REST"]
    assert "--torch-backend" not in log.splitlines()[-2]


def test_uv_takes_a_wheel_from_a_folder(tmp_path: Path) -> None:
    """``PIP_FIND_LINKS`` counts for uv; a folder that does not exist is left out."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    uv = script(
        tmp_path / "uv",
        FAKE_UV.format(
            log=tmp_path / "log", backend="exit 2", plain=f"torch==2.13.0+cpu\n # from file://{wheels}"
        ).replace("#!/bin/sh", '#!/bin/sh\n[ "$UV_FIND_LINKS" ] || exit 3'),
    )  # fmt: skip
    python = script(tmp_path / "python", "#!/bin/sh\n")
    code, lines = set_up(
        tmp_path, "--python", python, "--uv", uv, PIP_FIND_LINKS=f"{wheels} /not/there"
    )
    assert code == 0
    assert f"the CPU build, about 200 MB, from {wheels};" in lines[0]
    assert "/not/there" not in "".join(lines)


@pytest.mark.parametrize(("cpu", "build"), [("exit 1", "CUDA"), ("printf '%s' '{}'", "CPU")])
def test_pip_says_what_it_fetches(tmp_path: Path, cpu: str, build: str) -> None:
    """pip takes the CPU build where it finds one, else the ordinary one, and says which."""
    one = report("torch")
    text = FAKE_PIP.format(cpu=cpu.format(one), plain=report("torch", "nvidia-cublas"))
    python = script(tmp_path / "python", text)
    code, lines = set_up(tmp_path, "--python", python)
    assert code == 0
    assert f"the {build} build" in lines[0]
    assert "from files.example;" in lines[0]
    assert ("PIP_EXTRA_INDEX_URL" in lines[1]) == (build == "CUDA")
    assert lines[-2:] == ["INSTALL TORCH", "INSTALL REST"]


def test_an_installer_that_is_not_there_is_no_traceback(tmp_path: Path) -> None:
    """``make setup UV=elsewhere`` names what it cannot run."""
    python = script(tmp_path / "python", "#!/bin/sh\n")
    code, lines = set_up(tmp_path, "--python", python, "--uv", tmp_path / "elsewhere")
    assert code == 1
    assert str(tmp_path / "elsewhere") in lines[0]
    assert "Traceback" not in "".join(lines)


def test_a_failure_is_no_traceback(tmp_path: Path) -> None:
    """What the installer says is shown, and nothing is installed."""
    python = script(tmp_path / "python", "#!/bin/sh\necho no index >&2\nexit 1\n")
    code, lines = set_up(tmp_path, "--python", python)
    assert code == 1
    assert "no index" in lines
    assert "Traceback" not in "".join(lines)


# --- make test-latest ---------------------------------------------------------------------------

FAKE_PYTHON = """\
#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *--dry-run*) printf '%s' '{report}' ;;
  "-c "*"version('torch')"*) exit 1 ;;
  "-c "*) echo onnx 9.9, torch 2.13.0 ;;
  "-m pytest"*) exit {status} ;;
  *"--upgrade onnx"*) {upgrade} ;;
esac
"""


def with_newest(tmp_path: Path, tests: int = 0, upgrade: str = "true") -> tuple[int, str, str]:
    """Test with the newest libraries; return the exit status, what is said, and what was run."""
    log = tmp_path / "log"
    text = FAKE_PYTHON.format(log=log, report=report("torch"), status=tests, upgrade=upgrade)
    python = script(tmp_path / "python", text)
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tools" / "newest.py",
            "--torch",
            "2.13.0",
            "--python",
            python,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, log.read_text()


@pytest.mark.parametrize(("status", "verdict"), [(0, "pass"), (1, "have failed")])
def test_the_newest_libraries_are_tested(tmp_path: Path, status: int, verdict: str) -> None:
    """The versions are said before and after the tests; torch stays."""
    code, said, ran = with_newest(tmp_path, tests=status)
    assert code == status
    assert "Testing with onnx 9.9, torch 2.13.0\n" in said
    assert said.endswith(f"The tests {verdict} with onnx 9.9, torch 2.13.0\n")
    (upgrade,) = [line for line in ran.splitlines() if "--upgrade onnx" in line]
    assert upgrade.endswith("onnx onnxscript onnxruntime transformers peft torch==2.13.0")
    assert ran.index(upgrade) < ran.index("-m pytest")
    assert "tests/export tests/edge_sdk" in ran


def test_newest_libraries_that_do_not_install_are_not_tested(tmp_path: Path) -> None:
    code, said, ran = with_newest(tmp_path, upgrade="echo no index; exit 1")
    assert code == 1
    assert "no index" in said
    assert "Traceback" not in said
    assert "pytest" not in ran


def test_the_newest_libraries_have_an_environment_of_their_own() -> None:
    """``make test-latest`` does not touch the environment of ``make setup``."""
    done = subprocess.run(
        ["make", "--dry-run", "test-latest", "UV="], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "-m venv build/latest" in done.stdout
    assert "--python build/latest/bin/python" in done.stdout
    assert ".venv" not in done.stdout
