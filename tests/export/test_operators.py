"""Every operator of the matrix is exact in both runtimes, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.errors import ExportError
from export.lowering.graph_files import RuntimeName
from tests.lib.operators import CASES, Case, check, steps_of, table

DOCUMENT = Path(__file__).parents[2] / "docs" / "operators.md"

EXECUTORCH = {"activation: Softmax, LogSoftmax, GLU"}
"""Cases that ``make test`` lowers for ExecuTorch, in addition to ``test_executorch.py``."""

SLOW_ONNX = {
    "LoRA: Conv2d",
    "attention: rotary positions",
    "attention: scaled_dot_product_attention: grouped queries",
    "attention: scaled_dot_product_attention: boolean mask, additive mask",
    "attention: written out, masked",
    "block: Conv2d with bias before BatchNorm2d",
    "block: inverted residual, BatchNorm, ReLU6 (MobileNetV2)",
    "convolution: Conv2d: padding same, circular, reflect, replicate",
    "dropout: attention dropout",
    "dropout: nn.MultiheadAttention",
    "dropout: nn.TransformerEncoderLayer",
    "block: residual with a stride, BatchNorm (ResNet)",
    "norm: BatchNorm2d with frozen weights, in training; without statistics",
    "random: randn, randn_like, normal_",
    "random: DropPath (timm), DropPath (rand and floor)",
    "recurrent: GRU on tokens: last position",
    "recurrent: GRU: bidirectional",
    "recurrent: LSTM on tokens: 2 layers, bidirectional",
    "recurrent: LSTM, GRU: time first",
    "recurrent: LSTM: 2 layers, bidirectional",
    "recurrent: RNN",
    "shape: PixelShuffle, PixelUnshuffle",
    "shape: Upsample: bilinear",
}
"""Cases that ``make test`` leaves out for ONNX, because other cases or models cover them."""


def title(case: Case) -> str:
    """Return the title of a case in the report of a run."""
    return f"{case.group}: {case.name}"


def check_claim(case: Case, runtime: RuntimeName) -> None:
    """Check that a case is exact or refused, as the matrix says."""
    refusal = case.refusal(runtime)
    if not refusal:
        check(case, runtime)
        return
    with pytest.raises(ExportError, match=re.escape(refusal)):
        check(case, runtime)


def cases(quick: Callable[[str], bool]) -> list[Any]:
    """Return all cases; those whose title is not ``quick`` are slow."""
    return [
        pytest.param(case, id=title(case), marks=() if quick(title(case)) else pytest.mark.slow)
        for case in CASES
    ]


@pytest.mark.parametrize("case", cases(lambda name: name not in SLOW_ONNX))
def test_onnx(case: Case) -> None:
    """The case is exact in ONNX Runtime, or refused for the given reason."""
    check_claim(case, "onnx")


@pytest.mark.parametrize("case", cases(lambda name: name in EXECUTORCH))
def test_executorch(case: Case) -> None:
    """The case is exact with ExecuTorch and XNNPACK, or refused for the given reason."""
    check_claim(case, "executorch")


def test_the_named_cases_exist() -> None:
    """A renamed case must not be left out by mistake."""
    assert EXECUTORCH | SLOW_ONNX <= {title(case) for case in CASES}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Embedding, any length", ("batch", "seq")),
        ("rotary positions", ("batch", "seq")),
        ("tokens, head tied to the embedding", ("batch", "seq")),
        ("Conv1d: stride, dilation, groups, padding same, circular", ("batch", 3, 12)),
        ("LSTM", ("batch", 3, 3)),
        ("LSTM on tokens: 2 layers, bidirectional", ("batch", 6)),
        ("Conv1d, maximum over time", ("batch", "seq")),
        ("Conv1d without padding, AdaptiveMaxPool1d", ("batch", 6)),
    ],
)
def test_texts_have_any_length(name: str, shape: tuple[int | str, ...]) -> None:
    """So the comparison covers several lengths of text, not only several batch sizes."""
    case = next(case for case in CASES if case.name == name)
    steps, _ = steps_of(case, "onnx")
    assert steps.x.shape == shape


def test_names_are_unique() -> None:
    """Every row of the table is one case."""
    names = [(case.group, case.name) for case in CASES]
    assert len(set(names)) == len(names)


def test_the_document_has_the_matrix() -> None:
    """``docs/operators.md`` ends with the output of ``python -m tests.lib.operators``."""
    text = DOCUMENT.read_text("utf-8")
    assert text.endswith(f"\n\n{table()}\n"), "run python -m tests.lib.operators"
