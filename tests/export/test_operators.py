"""Every operator of the matrix is exact in both runtimes, or refused: never silently wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from export.errors import ExportError
from export.lowering.lowered import RuntimeName
from tests.lib.operators import CASES, Case, check, steps_of, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "operators.md"

USUAL = {
    "convolution: Conv2d: stride, padding, dilation",
    "norm: BatchNorm2d",
    "norm: LocalResponseNorm",
    "recurrent: LSTM",
    "LoRA: Linear",
}
"""Cases that the default run lowers for ExecuTorch."""


def title(case: Case) -> str:
    """What a case is called in the report of a run."""
    return f"{case.group}: {case.name}"


def check_claim(case: Case, runtime: RuntimeName) -> None:
    """A case is what the matrix says of it."""
    refusal = case.refusal(runtime)
    if not refusal:
        check(case, runtime)
        return
    with pytest.raises(ExportError, match=re.escape(refusal)):
        check(case, runtime)


@pytest.mark.parametrize("case", CASES, ids=title)
def test_onnx(case: Case) -> None:
    """Exact in ONNX Runtime, or refused for the reason given."""
    check_claim(case, "onnx")


def executorch_cases() -> list[Any]:
    """All cases; those that no other stands for run by default."""
    return [
        pytest.param(case, marks=() if title(case) in USUAL else pytest.mark.slow) for case in CASES
    ]


@pytest.mark.parametrize("case", executorch_cases(), ids=title)
def test_executorch(case: Case) -> None:
    """The same with ExecuTorch and XNNPACK."""
    check_claim(case, "executorch")


def test_the_usual_cases_exist() -> None:
    """So that a case that is renamed does not drop out of the default run."""
    assert USUAL <= {title(case) for case in CASES}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Embedding, any length", ("batch", "seq")),
        ("rotary positions", ("batch", "seq")),
        ("tokens, head tied to the embedding", ("batch", "seq")),
        ("Conv1d: stride, dilation, groups, padding same, circular", ("batch", 3, 12)),
        ("LSTM", ("batch", 3, 3)),
    ],
)
def test_texts_have_any_length(name: str, shape: tuple[int | str, ...]) -> None:
    """So the comparison is over several lengths there, not only over several batches."""
    case = next(case for case in CASES if case.name == name)
    steps, _ = steps_of(case, "onnx")
    assert steps.x.shape == shape


def test_names_are_unique() -> None:
    """A row of the table is one case."""
    names = [(case.group, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_the_document_has_the_matrix() -> None:
    """``docs/operators.md`` ends with what ``python -m tests.lib.operators`` prints."""
    text = DOCUMENT.read_text("utf-8")
    assert text.endswith(f"\n\n{table()}\n"), "run python -m tests.lib.operators"
