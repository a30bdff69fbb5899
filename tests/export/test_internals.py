"""The private names of other libraries: each in one module, and as it was when it was written."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ("edge_sdk", "export", "server_hub")
LIBRARIES = {"torch", "executorch", "onnx", "onnxscript", "onnxruntime"}
EXPERIMENTAL = ("torch.fx.experimental.",)
"""Modules that are private without an underscore. So is all of ExecuTorch."""

WRITTEN_FOR = {"torch": "2.13.0", "executorch": "1.4.1"}

INTERNALS: dict[str, dict[str, str]] = tomllib.loads(
    (Path(__file__).parent / "private_names.toml").read_text("utf-8")
)
"""The private names that each module uses, with the parameters that they had."""

SCHEMAS = (
    "_foreach_add.List(Tensor[] self, Tensor[] other, *, Scalar alpha=1) -> Tensor[]",
    "_foreach_add_.List(Tensor(a!)[] self, Tensor[] other, *, Scalar alpha=1) -> ()",
    "_foreach_add_.Scalar(Tensor(a!)[] self, Scalar scalar) -> ()",
    "_foreach_mul.Scalar(Tensor[] self, Scalar scalar) -> Tensor[]",
    "_foreach_mul_.ScalarList(Tensor(a!)[] self, Scalar[] scalars) -> ()",
    "_foreach_sqrt(Tensor[] self) -> Tensor[]",
    "_foreach_addcmul_.Scalar(Tensor(a!)[] self, Tensor[] tensor1, Tensor[] tensor2, Scalar "
    "value=1) -> ()",
    "_foreach_addcdiv_.ScalarList(Tensor(a!)[] self, Tensor[] tensor1, Tensor[] tensor2, "
    "Scalar[] scalars) -> ()",
    "_foreach_norm.Scalar(Tensor[] self, Scalar ord=2, ScalarType? dtype=None) -> Tensor[]",
)
"""Operations on lists of tensors, of ``export/torch_internals.py``."""

PASSES = (
    "XNNPACKRemoveCloneOpsTransform",
    "DimOrderOpsRevertPass",
    "ConvertToUpsampleBilinear2d",
    "ConvertToLinearPass",
    "PropagateCustomMetaPass",
    "ConvertToSDPAPass",
    "ConstPropPass",
    "FuseBatchNormPass",
    "DecomposeBatchNorm",
    "FuseActivationPass",
    "DecomposeConcatenate",
    "RemoveGetItemPass",
    "InsertPadQDQPass",
    "Conv1dUnsqueezePass",
    "PReLUReshapePass",
    "ChannelsLastTaggedReshapePass",
    "RemoveRedundantCopyPass",
)
"""All passes of XNNPACK, of which ``export/lowering/executorch_internals.py`` keeps some."""

FOREIGN = {
    ("edge_sdk/runtime/measure.py", "executorch"): "imported before memory is measured, not used",
    ("server_hub/simulation/formats.py", "numpy"): "the names that pickles of numpy have",
    ("export/cutting/pretrained/models.py", "_from_config"): "from_config is of Auto classes only",
}
"""Private names of other objects, with the reason."""


# where they are


def is_private(name: str) -> bool:
    """Return whether a name starts with exactly one underscore."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


def dotted(node: ast.expr, names: dict[str, str]) -> str | None:
    """Return the full name of an attribute of a module, given what names of modules stand for."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute):
        start = dotted(node.value, names)
        return f"{start}.{node.attr}" if start else None
    return None


def is_internal(name: str) -> bool:
    """Return whether a dotted name is private in one of the libraries."""
    root, *rest = name.split(".")
    if root not in LIBRARIES:
        return False
    undocumented = root == "executorch" or name.startswith(EXPERIMENTAL)
    return undocumented or any(is_private(part) for part in rest)


def private_uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """Yield line and name of the private names of others that a file uses.

    Args:
        tree: the file.
        own: private names that the packages define themselves.
    """
    modules: dict[str, str] = {}
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
            for alias in node.names:
                first = alias.name.partition(".")[0]
                modules[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom):
            found = [f"{node.module}.{alias.name}" for alias in node.names]
            for alias, name in zip(node.names, found, strict=True):
                modules[alias.asname or alias.name] = name
        for name in found:
            if is_internal(name):
                yield node.lineno, name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node, modules)
            if name is not None and name.partition(".")[0] in LIBRARIES:
                if is_internal(name):
                    yield node.lineno, name
            elif is_private(node.attr) and node.attr not in own:
                operator = isinstance(node.value, ast.Name) and node.value.id == "aten"
                standard = name is not None and name.partition(".")[0] in sys.stdlib_module_names
                if not operator and not standard:
                    yield node.lineno, node.attr
        elif isinstance(node, ast.Constant):
            text = str(node.value)
            if re.fullmatch(r"\w+(\.\w+)+", text) and is_internal(text):
                yield node.lineno, text


@cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text("utf-8"))


@cache
def own_names() -> frozenset[str]:
    """Return the private names that the packages define, and those of named tuples."""
    found = {"_replace", "_asdict", "_fields"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(parsed(path)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    found.add(node.id)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return frozenset(filter(is_private, found))


@pytest.mark.parametrize("package", PACKAGES)
def test_private_names_are_in_the_modules_for_them(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if file in INTERNALS:
            continue
        for line, name in private_uses(parsed(path), set(own_names())):
            root = name.partition(".")[0]
            assert (file, root) in FOREIGN, (
                f"{file}:{line} uses {name}, which is private; use it through one of "
                f"{', '.join(INTERNALS)}"
            )


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import torch._dynamo", "torch._dynamo"),
        ("from torch._guards import detect_fake_mode", "torch._guards.detect_fake_mode"),
        ("from torch.fx.experimental.proxy_tensor import make_fx", "make_fx"),
        ("from torch.nn.modules.batchnorm import _NormBase as Norm", "_NormBase"),
        ("def f():\n    import executorch.exir", "executorch.exir"),
        ("import onnxruntime as ort\nort.capi._pybind_state", "_pybind_state"),
        ("from torch import nn\nnn.modules.conv._ConvNd", "_ConvNd"),
        ("import torch\ntorch._foreach_add([], [])", "torch._foreach_add"),
        ("module._buffers", "_buffers"),
        ("class A(B):\n    def f(self):\n        self._theirs()", "_theirs"),
        ("getLogger('torch.onnx._internal')", "torch.onnx._internal"),
    ],
)
def test_private_names_are_found(code: str, name: str) -> None:
    """The check above sees imports, attributes of modules and objects, and names in strings."""
    assert [found.endswith(name) for _, found in private_uses(ast.parse(code), set())] == [True]


def test_public_names_are_not_found() -> None:
    code = (
        "import os, torch\nfrom torch import nn\nos._exit(1)\nself._ours = 1\nself._ours\n"
        "aten = torch.ops.aten\naten._unsafe_view\nnn.Linear.__name__\n_ = torch.export.export"
    )
    assert list(private_uses(ast.parse(code), {"_ours"})) == []


@pytest.mark.parametrize("file", INTERNALS)
def test_every_private_name_has_a_signature(file: str) -> None:
    """The table of this test has all names that the file uses, and no others of modules."""
    known = {path.rpartition(".")[2] for path in INTERNALS[file]}
    known |= {schema.partition(".")[0].partition("(")[0] for schema in SCHEMAS}
    prefixes = {".".join(path.split(".")[:n]) for path in INTERNALS[file] for n in range(2, 9)}
    tree = parsed(ROOT / file)
    for line, name in private_uses(tree, set(own_names())):
        listed = name.rpartition(".")[2] in known or name.startswith(
            tuple(f"{path}." for path in INTERNALS[file])
        )
        assert listed or name in prefixes, f"{file}:{line} uses {name}, add it to INTERNALS"
    text = ast.unparse(tree)
    for path in INTERNALS[file]:
        assert path.rpartition(".")[2].strip("()") in text, f"{file} does not use {path}; remove it"


# whether they are as they were


def resolve(path: str) -> Any:
    """Return the object with a dotted name; ``()`` behind a class stands for an object of it."""
    parts = path.split(".")
    found: Any = None
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
            break
        except ModuleNotFoundError:
            continue
    for part in parts[count:]:
        found = getattr(found, part.removesuffix("()"))
        found = found() if part.endswith("()") else found
    return found


def parameters(found: Any) -> str:
    """Return the names of a function's parameters; ``value`` if it has none to look at."""
    try:
        return ", ".join(inspect.signature(found).parameters)
    except (TypeError, ValueError):  # written in C
        head = re.match(r"\w+\((.*)\) ->", found.__doc__ or "") if callable(found) else None
        return ", ".join(re.findall(r"(?:^|, )(\w+): ", head[1])) if head else "value"


def difference(file: str, path: str, expected: str) -> str:
    """Return what has changed in a private name, and where to look; empty if nothing has."""
    library = path.partition(".")[0]
    hint = (
        f"written for {library} {WRITTEN_FOR[library]}; changed in {version(library)}: "
        f"look at {file}"
    )
    try:
        found = resolve(path)
    except (AttributeError, ImportError) as error:
        return f"{path} is missing ({error}): {hint}"
    now = parameters(found)
    if now != expected:
        return f"{path} takes ({now}) in place of ({expected}): {hint}"
    return ""


@pytest.mark.parametrize(
    ("file", "path", "expected"),
    [
        pytest.param(file, path, expected, id=path)
        for file, names in INTERNALS.items()
        for path, expected in names.items()
    ],
)
def test_a_private_name_is_as_it_was(file: str, path: str, expected: str) -> None:
    if path.startswith("executorch"):
        pytest.importorskip("executorch")
    assert not difference(file, path, expected)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_an_operation_on_lists_is_as_it_was(schema: str) -> None:
    name, _, overload = schema.partition("(")[0].partition(".")
    found = getattr(getattr(torch.ops.aten, name), overload or "default")
    assert str(found._schema) == f"aten::{schema}", (
        f"torch.{name}: written for torch {WRITTEN_FOR['torch']}; changed in {torch.__version__}: "
        "look at export/torch_internals.py"
    )
    assert hasattr(torch, name)


def test_xnnpack_has_the_passes_that_it_had() -> None:
    """A new pass may be one that a step graph needs; :func:`_few_passes` would leave it out."""
    pytest.importorskip("executorch")
    manager = resolve("executorch.backends.xnnpack._passes.XNNPACKPassManager")
    found = tuple(one.__name__ for one in manager(None).passes)
    assert found == PASSES, (
        f"written for executorch {WRITTEN_FOR['executorch']}; changed in {version('executorch')}: "
        "look at _few_passes in export/lowering/executorch_internals.py"
    )


def test_a_change_is_said_with_where_to_look() -> None:
    file = "export/torch_internals.py"
    gone = difference(file, "torch._guards.detect_fake_modes", "inputs")
    assert gone.startswith("torch._guards.detect_fake_modes is missing")
    moved = difference(file, "torch._not_there.make", "value")
    assert "torch._not_there.make is missing" in moved
    other = difference(file, "torch._guards.detect_fake_mode", "inputs, all")
    assert other == (
        "torch._guards.detect_fake_mode takes (inputs) in place of (inputs, all): written for "
        f"torch 2.13.0; changed in {version('torch')}: look at {file}"
    )
