"""Adapters with a rank per block, and in the files of PEFT: equal logits, equal bits."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export.adapters_lora.lora import Lora, adapted_modules, add_lora, set_ranks
from export.adapters_lora.low_rank import adapter_pairs, average
from export.adapters_lora.peft_format import load_adapter, save_adapter
from export.cutting.pretrained import TransformersModel, from_transformers
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from tests.lib.models import conv_model

WORDS = 50
DEPTH = 3


def _gpt2(**changed: Any) -> Any:
    sizes = {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "vocab_size": WORDS, "n_positions": 16}
    return transformers.GPT2Config(**sizes | changed, bos_token_id=1, eos_token_id=1)


CONFIGS: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        hidden_size=16, num_layers=DEPTH, num_heads=2, intermediate_size=24, vocab_size=WORDS,
        max_position_embeddings=16, attention_types=[[["global", "local", "local"], 1]],
        window_size=4, bos_token_id=1, eos_token_id=1,
    ),
    "opt": lambda: transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2, ffn_dim=24,
        vocab_size=WORDS, max_position_embeddings=16, word_embed_proj_dim=16,
    ),
    "llama": lambda: transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, vocab_size=WORDS, max_position_embeddings=16,
    ),
    "bert": lambda: transformers.BertConfig(
        hidden_size=16, num_hidden_layers=DEPTH, num_attention_heads=2, intermediate_size=24,
        vocab_size=WORDS, max_position_embeddings=16, num_labels=3, initializer_range=0.2,
    ),
}  # fmt: skip


def adapted(config: Any, lora: Lora | None = None) -> TransformersModel:
    """Return a random model with fresh adapters."""
    model = from_transformers(config)
    add_lora(model, lora or Lora(rank=4, alpha=6), config.model_type)
    return model


def trained(model: SplitModel, seed: int = 0) -> SplitModel:
    """Return the model with random values in all trained tensors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.trained().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) / 4)
    return model


def words() -> Tensor:
    return torch.randint(2, WORDS, (3, 9), generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return logits in evaluation mode."""
    with torch.no_grad():
        found = model.eval()(x)
    return found if isinstance(found, Tensor) else found.logits


def ranks(model: SplitModel) -> dict[str, int]:
    """Return the rank of every adapter, from the shapes of its tensors."""
    found = {}
    for name, module in adapted_modules(model).items():
        A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
        assert len(A) == B.shape[1]
        found[name] = len(A)
    return found


# ranks


def test_ranks_change_where_they_differ_and_only_there() -> None:
    model = trained(adapted(CONFIGS["opt"]()))
    before = {n: p for n, p in model.named_parameters() if p.requires_grad}
    values = {n: p.detach().clone() for n, p in before.items()}
    set_ranks(model, {0: 4, 1: 2, 2: 7})
    assert {n.split(".")[1]: r for n, r in ranks(model).items()} == {"0": 4, "1": 2, "2": 7}
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert after.keys() == before.keys()
    for name, parameter in after.items():
        if name.startswith("block.0."):
            assert parameter is before[name]
            assert torch.equal(parameter, values[name])
        elif "lora_B" in name:
            assert not parameter.any()
        else:
            bound = 16**-0.5  # PEFT draws uniformly within 1 / sqrt(in)
            assert bound / 2 < parameter.abs().max() <= bound


def test_the_scale_is_alpha_over_the_rank() -> None:
    """The reference is the adapter written out: x W' + b + (alpha / rank) B A x."""
    model = adapted(CONFIGS["opt"](), Lora(rank=4, alpha=6))
    set_ranks(model, {1: 3})
    trained(model)
    module = model.block[1].layer.self_attn.q_proj
    x = torch.randn(5, 16, dtype=torch.float64)
    own = copy.deepcopy(module).double().eval()
    A, B = own.lora_A["default"].weight, own.lora_B["default"].weight
    expected = own.base_layer(x) + 6 / 3 * x @ A.T @ B.T
    torch.testing.assert_close(own(x), expected, rtol=1e-12, atol=1e-12)


def test_fresh_adapters_are_always_the_same_and_draw_nothing_from_the_global_seed() -> None:
    a, b = adapted(_gpt2()), adapted(_gpt2())
    state = torch.get_rng_state()
    set_ranks(a, {0: 2, 1: 2})
    set_ranks(b, {1: 2})
    set_ranks(b, {0: 2})
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in a.trained().items():
        assert torch.equal(tensor, b.trained()[name])
    first, second = (
        tensor for n, tensor in a.trained().items() if "lora_A" in n and len(tensor) == 2
    )
    assert not torch.equal(first, second)


def test_a_convolution_has_a_rank_too() -> None:
    model = add_lora(conv_model(), Lora(rank=2, targets=["conv"]))
    set_ranks(model, {1: 5})
    assert ranks(model) == {"block.0.conv": 2, "block.1.conv": 5, "block.3.conv": 2}
    x = torch.randn(2, 1, 8, 8)
    before = logits(model, x)
    assert not torch.equal(logits(trained(model), x), before)


def test_ranks_that_do_not_fit_are_refused_and_nothing_changes() -> None:
    model = adapted(CONFIGS["llama"]())  # v_proj: 16 -> 2 heads of 4
    with pytest.raises(
        ExportError,
        match=r"rank 9 does not fit block.2.layer.self_attn.v_proj, which is 8 x 16; "
        "a rank there is from 1 to 8",
    ):
        set_ranks(model, {0: 2, 2: 9})
    with pytest.raises(ExportError, match=r"rank 0 does not fit block\.1"):
        set_ranks(model, {0: 2, 1: 0})
    with pytest.raises(ExportError, match=r"there is no block 3 .* blocks 0 to 2"):
        set_ranks(model, {0: 2, 3: 4})
    assert set(ranks(model).values()) == {4}
    with pytest.raises(ExportError, match="has no adapters"):
        set_ranks(conv_model(), {0: 2})
    with pytest.raises(ExportError, match=r"rank 9 does not fit block.0.* from 1 to 8"):
        adapted(CONFIGS["llama"](), Lora(rank=9))


def test_averaged_adapters_fit_the_model_they_came_from() -> None:
    """The names are those of a real state, and the average of one copy is that copy."""
    model = trained(adapted(_gpt2()))
    state = {n: t.detach().numpy() for n, t in model.trained().items()}
    pairs = adapter_pairs(state)
    assert len(pairs) == DEPTH
    assert {name for pair in pairs for name in pair} == state.keys()
    for a, b in pairs:
        B, A = average([(state[b], state[a], 1.5, 10.0)], 4, 1.5)
        np.testing.assert_allclose(A, state[a], atol=1e-5)
        np.testing.assert_allclose(B, state[b], atol=1e-5)


# files of PEFT


def original_of(config: Any, folder: Path) -> Path:
    """Write the folder of a random model; return it."""
    name = {
        "gpt2": "GPT2LMHeadModel", "gpt_neo": "GPTNeoForCausalLM", "opt": "OPTForCausalLM",
        "llama": "LlamaForCausalLM", "bert": "BertForSequenceClassification",
    }[config.model_type]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def reloaded(folder: Path, kind: str) -> Any:
    auto = transformers.AutoModelForCausalLM
    if kind == "bert":
        auto = transformers.AutoModelForSequenceClassification
    return auto.from_pretrained(folder)


def adapted_from(source: Path, kind: str) -> TransformersModel:
    """Return a folder's model with fresh adapters; BERT's module has a name in its pooler too."""
    model = from_transformers(source)
    dense = ["output.dense"] if kind == "bert" else []
    add_lora(model, Lora(rank=4, alpha=6, targets=dense), kind)
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    source = original_of(CONFIGS[kind](), tmp_path / "base")
    model = adapted_from(source, kind)
    set_ranks(model, {0: 2, 2: 5})
    trained(model)
    save_adapter(model, tmp_path / "adapter", str(source))
    with pytest.warns(UserWarning, match="cutlayer_base"):
        adapter = peft.PeftModel.from_pretrained(reloaded(source, kind), tmp_path / "adapter")
    x = words()
    plain = logits(reloaded(source, kind), x)
    expected = logits(adapter, x)
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(logits(model, x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_is_saved_comes_back_bit_for_bit(kind: str, tmp_path: Path) -> None:
    config = CONFIGS[kind]()
    model = adapted(config)
    set_ranks(model, {0: 2, 2: 5})
    trained(model)
    save_adapter(model, tmp_path / "adapter", "a name")
    other = adapted(config, Lora(rank=3, alpha=1))
    load_adapter(other, tmp_path / "adapter")
    assert ranks(other) == ranks(model)
    state = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    assert torch.equal(logits(other, words()), logits(model, words()))
    assert all(p.requires_grad == (".lora_" in n) for n, p in other.named_parameters())
    save_adapter(other, tmp_path / "again", "a name")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (
            tmp_path / "adapter" / file
        ).read_bytes()


def test_the_files_say_what_peft_says(tmp_path: Path) -> None:
    model = adapted(_gpt2(), Lora(rank=4, alpha=6, dropout=0.1))
    set_ranks(model, {1: 2})
    save_adapter(model, tmp_path / "adapter", "gpt2")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 6, 0.1)
    assert config["rank_pattern"] == {"transformer.h.1.attn.c_attn": 2}
    assert config["alpha_pattern"] == {}
    assert config["target_modules"] == ["c_attn"]
    assert config["base_model_name_or_path"] == "gpt2"
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["fan_in_fan_out"] is True
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.transformer.h.{i}.attn.c_attn.lora_{factor}.weight"
        for i in range(DEPTH)
        for factor in "AB"
    }


def test_a_checkpoint_with_other_names_gives_those_of_the_class(tmp_path: Path) -> None:
    """In the folder of a model without a head, names lack ``transformer.``."""
    transformers.GPT2Model(_gpt2()).save_pretrained(tmp_path / "base")
    model = from_transformers(tmp_path / "base")
    add_lora(model, Lora(rank=2), "gpt2")
    save_adapter(trained(model), tmp_path / "adapter", "gpt2")
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(name.startswith("base_model.model.transformer.h.") for name in names)


def test_what_peft_saves_is_read(tmp_path: Path) -> None:
    """Some modules have other ranks and alphas, by patterns."""
    source = original_of(CONFIGS["llama"](), tmp_path / "base")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        rank_pattern={r"layers\.1\..*": 2}, alpha_pattern={"v_proj": 9, r"layers\.2\..*q_proj": 4},
        init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(reloaded(source, "llama"), config)
    theirs.save_pretrained(tmp_path / "adapter")
    model = adapted_from(source, "llama")
    load_adapter(model, tmp_path / "adapter")
    assert sorted(set(ranks(model).values())) == [2, 3]
    x = words()
    torch.testing.assert_close(logits(model, x), logits(theirs, x), rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path / "again", str(source))
    with pytest.warns(UserWarning, match="cutlayer_base"):
        again = peft.PeftModel.from_pretrained(reloaded(source, "llama"), tmp_path / "again")
    torch.testing.assert_close(logits(again, x), logits(theirs, x), rtol=1e-5, atol=1e-5)


# errors


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The adapters of a small GPT-2 on disk."""
    save_adapter(trained(adapted(_gpt2())), tmp_path / "adapter", "gpt2")
    return tmp_path / "adapter"


def edit(folder: Path, **values: Any) -> None:
    """Change the configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def retensor(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


BREAK: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no configuration": (lambda f: (f / "adapter_config.json").unlink(), "there is no .*config"),
    "no tensors": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        "there is no .*adapter_model.safetensors",
    ),
    "no JSON": (
        lambda f: (f / "adapter_config.json").write_text("{"), "is no configuration of LoRA"
    ),
    "damaged": (
        lambda f: (f / "adapter_model.safetensors").write_bytes(b"12"), "is damaged"
    ),
    "another type": (lambda f: edit(f, peft_type="LOHA"), "'LOHA', must be LORA"),
    "another kind": (lambda f: edit(f, use_dora=True), "use_dora, which is not supported"),
    "no alpha": (lambda f: edit(f, lora_alpha=None), "no valid lora_alpha"),
    "no pattern": (lambda f: edit(f, alpha_pattern={"(": 2}), "no valid lora_alpha"),
    "other modules": (
        lambda f: retensor(
            f, lambda t: t.update({"base_model.model.x.lora_A.weight": t.popitem()[1]})
        ),
        "has base_model.model.x.lora_A.weight, and this model has no adapter there",
    ),
    "modules missing": (
        lambda f: retensor(f, lambda t: t.popitem()), "lacks base_model.*, where this model has"
    ),
    "ranks that differ": (
        lambda f: retensor(
            f,
            lambda t: t.update(
                {"base_model.model.transformer.h.1.attn.c_attn.lora_A.weight": torch.ones(3, 16)}
            ),
        ),
        r"h.1.attn.c_attn in .* is \[48, 4\] times \[3, 16\], must be \[48, rank\] times "
        r"\[rank, 16\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BREAK)
def test_what_does_not_fit_is_refused_and_nothing_changes(what: str, saved: Path) -> None:
    damage, message = BREAK[what]
    damage(saved)
    model = trained(adapted(_gpt2()), 1)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ExportError, match=message):
        load_adapter(model, saved)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_adapters_of_another_base_are_refused(saved: Path) -> None:
    with pytest.raises(ExportError, match=r"\[48, 4\] times \[4, 16\], must be \[96, rank\]"):
        load_adapter(adapted(_gpt2(n_embd=32)), saved)
    with pytest.raises(ExportError, match=r"h.3.attn.c_attn.*, where this model has an"):
        load_adapter(adapted(_gpt2(n_layer=4)), saved)
    model = adapted(_gpt2())
    with torch.no_grad():
        model.block[2].layer.mlp.c_fc.weight[3, 5] += 1e-3
    with pytest.raises(ExportError, match="were trained on another base than this model"):
        load_adapter(model, saved)
    edit(saved, cutlayer_base=None)
    load_adapter(model, saved)


def test_the_name_of_the_base_and_auxiliary_heads_do_not_matter(saved: Path) -> None:
    edit(saved, base_model_name_or_path="elsewhere")
    model = adapted(_gpt2())
    model.add_heads([1], words(), WORDS)
    model.requires_grad_(False)
    load_adapter(model, saved)


def test_only_adapters_of_transformers_can_be_saved(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new"
    with pytest.raises(ExportError, match="does not come from transformers"):
        save_adapter(add_lora(conv_model(), Lora(rank=2, targets=["conv"])), folder, "x")
    with pytest.raises(ExportError, match="has no adapters"):
        save_adapter(from_transformers(_gpt2()), folder, "x")
    with pytest.raises(ExportError, match="exists; choose another folder"):
        save_adapter(adapted(_gpt2()), saved, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
