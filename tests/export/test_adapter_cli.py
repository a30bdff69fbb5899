"""``cutlayer adapter`` and ``[lora]``: from a model to a run's adapters, to PEFT, and back."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.cli import main
from edge_sdk.runtime.onnx import OnnxRuntime
from export.adapters_lora.lora import Lora, adapted_modules, add_lora, set_ranks, unify
from export.bundles.model_source import model_of
from export.cutting.pretrained import TransformersModel, from_transformers
from export.cutting.split_model import WEIGHTS, SplitModel
from export.errors import ExportError
from tests.lib.runs import finished_run

WORDS, LENGTH, DEPTH, WIDTH = 31, 8, 4, 16
RANK, CUT, CUT_RANK = 4, 2, 2

TIERS = f"""
length = {LENGTH}
graphs = ["backward"]

[lora]
rank = {RANK}
alpha = 6.0
cut_rank = {CUT_RANK}

[tiers.phone]
cut = {CUT}
codec = "fp16"
batch = 3
"""


@dataclass(frozen=True)
class Exported:
    """A folder of transformers with ``tiers.toml``, weights with a PEFT adapter, and bundles."""

    model: Path
    tiers: Path
    weights: Path
    bundles: Path

    @property
    def index(self) -> BundleIndex:
        """The index of the bundles."""
        return BundleIndex.read(self.bundles)

    def build(self) -> SplitModel:
        """Build the model with the adapters of the bundles."""
        model = model_of(self.index.model, self.index.extra, None)
        model.load(self.bundles / WEIGHTS)
        return model


def cutlayer(*arguments: object) -> None:
    """Run a command that must succeed."""
    with pytest.raises(SystemExit) as end:
        main.main([str(a) for a in arguments])
    assert end.value.code in (0, None)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must fail; return its error, which is one sentence without a trace."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main.main([str(a) for a in arguments])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("cutlayer: ")
    return said


def save_gpt2(folder: Path, seed: int = 3) -> Path:
    """Write the folder of a random GPT-2 as transformers does."""
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=DEPTH, n_head=2, vocab_size=WORDS, n_positions=LENGTH,
        bos_token_id=1, eos_token_id=1, initializer_range=0.2, attn_pdrop=0.0, embd_pdrop=0.0,
        resid_pdrop=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Bundles of ``cutlayer export``, made from an adapter of PEFT; tests must not change them."""
    folder = tmp_path_factory.mktemp("adapters")
    found = Exported(
        save_gpt2(folder / "gpt2"), folder / "tiers.toml", folder / "weights.safetensors",
        folder / "bundles",
    )  # fmt: skip
    found.tiers.write_text(TIERS)
    peft_model(found.model, r=RANK, lora_alpha=6).save_pretrained(folder / "adapter")
    cutlayer(
        "adapter", "import", folder / "adapter", "--model", found.model, "--tiers", found.tiers,
        "--out", found.weights,
    )  # fmt: skip
    cutlayer(
        "export", found.model, "--tiers", found.tiers, "--weights", found.weights,
        "--out", found.bundles,
    )  # fmt: skip
    return found


def peft_model(model: Path, **settings: Any) -> Any:
    """Return the model of a folder with random adapters, which PEFT has added."""
    config = peft.LoraConfig(
        target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True,
        init_lora_weights=False, **settings,
    )  # fmt: skip
    original = transformers.AutoModelForCausalLM.from_pretrained(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return peft.get_peft_model(original, config)


def randomize(model: SplitModel, seed: int = 0) -> SplitModel:
    """Set all trained tensors to random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


def write_run(
    exported: Exported, folder: Path, ranks: Mapping[int, int] | None = None
) -> SplitModel:
    """Write the folder of a finished run with random adapters; return the folder and the model."""
    model = exported.build()
    if ranks:
        set_ranks(model, ranks)
    finished_run(folder, exported.bundles, {None: randomize(model)})
    return model


def words(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randint(WORDS, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return logits in evaluation mode and float64."""
    with torch.no_grad():
        found = copy.deepcopy(model).double().eval()(x)
    return found if isinstance(found, Tensor) else found.logits


# --- to PEFT and back -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [{}, {CUT - 1: CUT_RANK, CUT: CUT_RANK}])
@pytest.mark.filterwarnings("ignore:.*cutlayer_base")
def test_peft_answers_as_the_run_does(
    ranks: dict[int, int], exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write_run(exported, tmp_path / "run", ranks)
    out = tmp_path / "adapter"
    capsys.readouterr()
    cutlayer("model", "export", tmp_path / "run", "--format", "peft", "--out", out, "--json")
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["format"], file["path"], file["opened_by"]) == ("peft", "adapter", "PEFT")
    out /= "adapter"
    assert file["size"] == sum(path.stat().st_size for path in out.iterdir())
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == RANK
    assert config["rank_pattern"] == {f"transformer.h.{i}.attn.c_attn": r for i, r in ranks.items()}
    assert config["base_model_name_or_path"] == str(exported.model)
    original = transformers.AutoModelForCausalLM.from_pretrained(exported.model)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(original), out)
    x = words()
    assert (logits(theirs, x) - logits(original, x)).abs().max() > 0.1
    torch.testing.assert_close(logits(model, x), logits(theirs, x), rtol=1e-9, atol=1e-9)


def test_what_comes_back_is_what_went_out(exported: Exported, tmp_path: Path) -> None:
    """The same tensors come back, bit for bit, under the same names."""
    model = write_run(exported, tmp_path / "run")
    weights, out = tmp_path / "weights.safetensors", tmp_path / "out" / "adapter"
    cutlayer(
        "model", "export", tmp_path / "run", "--format", "peft", "--out", out.parent, "--base", "b"
    )
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "b"
    cutlayer(
        "adapter", "import", out, "--model", exported.model, "--tiers", exported.tiers,
        "--out", weights,
    )  # fmt: skip
    back = load_file(weights)
    own = {n: t for n, t in model.tensors().items() if not n.startswith("aux.")}
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in own.items())


def test_an_export_starts_from_an_imported_adapter(exported: Exported) -> None:
    theirs = peft_model(exported.model, r=RANK, lora_alpha=6)
    ours = exported.build()
    torch.testing.assert_close(logits(ours, words()), logits(theirs, words()), rtol=1e-9, atol=1e-9)
    index = exported.index
    state = Bundle.open(index.manifest("phone"), index.blobs().read).initial_state
    first = [name for name in state if name.startswith("block.0.")]
    assert len(first) == 2
    for name in first:
        np.testing.assert_array_equal(state[name], ours.state_dict()[name].numpy())


def test_an_adapter_with_ranks_and_scales_of_its_own_computes_the_same(
    exported: Exported, tmp_path: Path
) -> None:
    """PEFT made the adapter: with lower ranks than ``[lora]`` and other scales, by patterns."""
    theirs = peft_model(
        exported.model, r=3, lora_alpha=5, rank_pattern={r"h\.1\..*": 2},
        alpha_pattern={r"h\.2\..*": 9},
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "weights.safetensors"
    cutlayer(
        "adapter", "import", tmp_path / "adapter", "--model", exported.model,
        "--tiers", exported.tiers, "--out", weights,
    )  # fmt: skip
    model = model_of(exported.index.model, exported.index.extra, None)
    model.load(weights)
    assert {len(m.lora_A["default"].weight) for m in adapted_modules(model).values()} == {RANK}
    x = words()
    torch.testing.assert_close(logits(model, x), logits(theirs, x), rtol=1e-5, atol=1e-5)


# --- one rank for all -----------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=DEPTH, max_size=DEPTH),
    st.integers(0, 10),
    st.floats(0.5, 64),
    st.integers(0, 1000),
)
def test_one_rank_and_scale_for_all_changes_no_answer(
    ranks: list[int], more: int, alpha: float, seed: int
) -> None:
    """Each adapter's product is equal in float64, and the added part can learn at once."""
    model = _small(Lora(rank=3, alpha=5))
    set_ranks(model, dict(enumerate(ranks)))
    randomize(model, seed).double()
    before = {name: _product(module) for name, module in adapted_modules(model).items()}
    rank = max(ranks) + more
    unify(model, Lora(rank=rank, alpha=alpha))
    for name, module in adapted_modules(model).items():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert (len(A), B.shape[1]) == (rank, rank)
        torch.testing.assert_close(_product(module), before[name], rtol=1e-12, atol=1e-12)
        assert module.scaling["default"] == alpha / rank
        assert A.abs().sum(1).min() > 0
        assert torch.linalg.matrix_rank(A) == min(rank, WIDTH)


def test_a_convolution_in_groups_grows_within_its_groups() -> None:
    blocks = [
        nn.Sequential(OrderedDict(conv=nn.Conv2d(6, 6, 3, padding=1, groups=2))) for _ in range(2)
    ]
    model = SplitModel(nn.Conv2d(1, 6, 1), blocks, nn.Sequential(nn.Flatten(), nn.LazyLinear(3)))
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    model(x.float())
    add_lora(model, Lora(rank=2, alpha=3, targets=["conv"]))
    randomize(model)
    before = logits(model, x)
    unify(model, Lora(rank=6, alpha=7))
    torch.testing.assert_close(logits(model, x), before, rtol=1e-5, atol=1e-5)


def test_a_rank_that_is_right_already_stays_bit_for_bit() -> None:
    model = randomize(_small(Lora(rank=3, alpha=5)))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    unify(model, Lora(rank=3, alpha=5))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ExportError, match=r"has rank 3, and \[lora\] says 2; a rank cannot shrink"):
        unify(model, Lora(rank=2))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def _small(lora: Lora) -> TransformersModel:
    config = transformers.GPT2Config(
        n_embd=WIDTH, n_layer=DEPTH, n_head=2, vocab_size=WORDS, n_positions=LENGTH,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    model = from_transformers(config)
    add_lora(model, lora, "gpt2")
    return model


def _product(module: Any) -> Tensor:
    """Return the product that an adapter adds to the matrix of its module."""
    B, A = module.lora_B["default"].weight, module.lora_A["default"].weight
    return (module.scaling["default"] * B @ A).detach()


# --- cut_rank and returned in tiers.toml ----------------------------------------------------------


def test_the_last_block_before_the_cut_has_its_own_rank(exported: Exported) -> None:
    manifest = exported.index.manifest("phone")
    for block in range(CUT):
        rank = CUT_RANK if block == CUT - 1 else RANK
        shapes = {e.spec.name.split(".")[-3]: e.spec.shape for e in manifest.state
                  if e.spec.name.startswith(f"block.{block}.")}  # fmt: skip
        assert shapes == {"lora_A": (rank, WIDTH), "lora_B": (3 * WIDTH, rank)}
    whole = load_file(exported.bundles / WEIGHTS)  # the hub's adapters all have one rank
    assert {len(t) for n, t in whole.items() if ".lora_A." in n} == {RANK}


def test_the_exported_graphs_step_as_eager_torch_does(exported: Exported) -> None:
    """``activate`` and ``backward`` on ONNX Runtime equal autograd in float64."""
    index = exported.index
    manifest = index.manifest("phone")
    assert {"activate", "backward"} <= manifest.graphs.keys()
    runtime = OnnxRuntime(Bundle.open(manifest, index.blobs().read))
    model = exported.build()
    set_ranks(model, {CUT - 1: CUT_RANK})
    state = runtime.get_state()
    for i, name in enumerate(n for n in state if ".lora_" in n):
        state[name] = np.random.default_rng(i).standard_normal(state[name].shape).astype("f4") / 4
    runtime.set_state(state)
    model.load_state_dict({n: torch.from_numpy(t) for n, t in state.items()}, strict=False)
    model = model.double()
    held = {n: p for n, p in model.named_parameters() if n in state and not n.startswith("aux.")}
    x = words()
    h = model.segment(x, CUT)
    gradient = torch.randn(h.shape, generator=torch.Generator().manual_seed(1)).half()
    optimizer = torch.optim.SGD(held.values(), lr=0.5)
    h.backward(gradient.double())  # type: ignore[no-untyped-call]
    optimizer.step()
    given = {"x": x.numpy()}
    (packed,) = runtime.run("activate", given).values()
    np.testing.assert_allclose(packed, h.detach().numpy(), rtol=2e-3, atol=2e-3)  # it is fp16
    hyper = {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0, "max_norm": 0.0}
    rates = {name: np.array(value, np.float32) for name, value in hyper.items()}
    runtime.run("backward", {**given, "grad.h": gradient.numpy(), **rates})
    after = runtime.get_state()
    assert len(held) == 2 * CUT
    for name, parameter in held.items():
        change = np.abs(after[name] - state[name]).max()
        assert change > 0.01
        want = parameter.detach().numpy()
        np.testing.assert_allclose(after[name], want, rtol=0, atol=1e-4 * change)


LARGE = "rank 17 does not fit block.1.layer.attn.c_attn, which is 48 x 16"


@pytest.mark.parametrize(
    ("rank", "said"),
    [(17, LARGE), (17, "from 1 to 16"), (0, "cut_rank is 0; it must")],
)
def test_a_cut_rank_that_does_not_fit_is_refused_and_nothing_is_written(
    rank: int, said: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = tmp_path / "tiers.toml"
    tiers.write_text(TIERS.replace(f"cut_rank = {CUT_RANK}", f"cut_rank = {rank}"))
    message = refusal(
        capsys, "export", exported.model, "--tiers", tiers, "--out", tmp_path / "out"
    )  # fmt: skip
    assert said in message
    assert list(tmp_path.iterdir()) == [tiers]


# --- mistakes -------------------------------------------------------------------------------------


def test_mistakes_on_the_way_out(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    write_run(exported, run)
    good = load_file(run / WEIGHTS)

    def refused(**tensors: Tensor) -> str:
        save_file({**good, **tensors}, run / WEIGHTS)
        said = refusal(capsys, "model", "export", run, "--format", "peft", "--out", out)
        assert not out.exists()
        return said

    name = "block.3.layer.mlp.c_fc.weight"
    assert "were trained on another base" in refused(**{name: good[name] + 1e-3})
    a = "block.1.layer.attn.c_attn.lora_A.default.weight"
    assert "rank 17 does not fit block.1.layer.attn.c_attn" in refused(**{a: torch.ones(17, WIDTH)})
    save_file({n: t for n, t in good.items() if "block.3" not in n}, run / WEIGHTS)
    said = refusal(capsys, "model", "export", run, "--format", "peft", "--out", out)
    assert "does not fit the model" in said
    (run / WEIGHTS).write_bytes(b"nothing")
    said = refusal(capsys, "model", "export", run, "--format", "peft", "--out", out)
    assert "cannot read the model" in said


def test_mistakes_on_the_way_in(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(exported, tmp_path / "run")
    folder, out = tmp_path / "out" / "adapter", tmp_path / "weights.safetensors"
    cutlayer("model", "export", tmp_path / "run", "--format", "peft", "--out", tmp_path / "out")

    def refused(
        source: Path = folder, model: object = exported.model, tiers: str = TIERS, to: Path = out
    ) -> str:
        (tmp_path / "tiers.toml").write_text(tiers)
        said = refusal(
            capsys, "adapter", "import", source, "--model", model,
            "--tiers", tmp_path / "tiers.toml", "--out", to,
        )  # fmt: skip
        assert not out.exists()
        return said

    other = save_gpt2(tmp_path / "other", seed=4)
    assert "were trained on another base than this model" in refused(model=other)
    assert f"there is no {other / 'adapter_config.json'}" in refused(source=other)
    targets = TIERS.replace("alpha = 6.0", 'alpha = 6.0\ntargets = ["c_fc"]')
    assert "or for other targets in [lora]" in refused(tiers=targets)
    smaller = TIERS.replace(f"rank = {RANK}\na", "rank = 3\na")
    assert "has rank 4, and [lora] says 3; a rank cannot shrink" in refused(tiers=smaller)
    larger = TIERS.replace(f"rank = {RANK}\na", "rank = 17\na")
    assert "rank 17 does not fit block.0.layer.attn.c_attn" in refused(tiers=larger)
    without = TIERS[: TIERS.index("[lora]")] + TIERS[TIERS.index("[tiers") :]
    assert "tiers.toml has no [lora]" in refused(tiers=without)
    unscaled = TIERS.replace("alpha = 6.0", "alpha = 0")
    assert "alpha is 0.0; it must be above 0" in refused(tiers=unscaled)
    assert "does not come from transformers" in refused(
        model="tests.lib.models:build", tiers=TIERS.replace("alpha = 6.0", 'targets = ["conv"]')
    )
    assert "exists; choose another file" in refused(to=folder)
    assert "there is no folder" in refused(to=tmp_path / "nowhere" / "weights.safetensors")
