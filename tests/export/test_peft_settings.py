"""Adapters of PEFT with every setting: they compute the same here, or are refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from export.adapters_lora.lora import Lora, add_lora
from export.adapters_lora.peft_format import CONFIG, load_adapter
from export.adapters_lora.peft_settings import (
    CHANGED_BASES,
    IN_TENSORS,
    READ,
    REFUSED,
    STARTS,
    WITHOUT_EFFECT,
)
from export.cutting.pretrained import from_transformers
from export.cutting.split_model import SplitModel
from export.errors import ExportError

RANK = 4


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a random Llama that adapters are made for."""
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=24, vocab_size=19, max_position_embeddings=8, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base: Path, **settings: Any) -> Any:
    """The model with adapters of PEFT."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    given: dict[str, Any] = {
        "r": RANK,
        "target_modules": ["q_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(**given | settings))


def trained(model: Any) -> Any:
    """The model as if it had been trained."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def here(base: Path) -> SplitModel:
    """The same model here, with adapters on the same modules."""
    return add_lora(from_transformers(base), Lora(rank=RANK), "llama")


def logits(model: nn.Module) -> Tensor:
    """Logits in float64."""
    x = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found = copy.deepcopy(model).double().eval()(x)
    return found if isinstance(found, Tensor) else found.logits


def test_every_setting_of_the_installed_peft_is_read_or_refused() -> None:
    """A setting that nobody has looked at may change what an adapter computes."""
    known = {*READ, *IN_TENSORS, *WITHOUT_EFFECT, *REFUSED}
    assert sum(map(len, (READ, IN_TENSORS, WITHOUT_EFFECT, REFUSED))) == len(known)
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    new, gone = sorted(fields - known), sorted(known - fields)
    assert not new, (
        f"PEFT {peft.__version__} has the settings {new}: find out whether an adapter with them is "
        "still scale * B @ A on the given base, and add them to export/adapters_lora/"
        "peft_settings.py, as settings without effect or as refused ones"
    )
    assert not gone, f"PEFT {peft.__version__} has no settings {gone} any more"


def test_every_start_of_the_installed_peft_is_known() -> None:
    """The names are those in the documentation of ``init_lora_weights``."""
    text = str(peft.LoraConfig.__annotations__["init_lora_weights"])
    listed = re.findall(r"[\"'](\w+)", text)
    assert len(listed) > 5
    for start in listed:
        assert start in STARTS or start.startswith(CHANGED_BASES), (
            f"PEFT {peft.__version__} has init_lora_weights = {start!r}: find out whether it "
            "changes the base, and add it to export/adapters_lora/peft_settings.py"
        )


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "mica"])
def test_an_adapter_on_the_given_base_answers_as_in_peft(
    start: object, base: Path, tmp_path: Path
) -> None:
    theirs = trained(adapted(base, init_lora_weights=start))
    theirs.save_pretrained(tmp_path / "adapter")
    model = here(base)
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)


def test_scales_by_the_root_of_the_rank_are_read_with_ranks_and_alphas_of_their_own(
    base: Path, tmp_path: Path
) -> None:
    theirs = trained(
        adapted(
            base, use_rslora=True, lora_alpha=6, rank_pattern={"layers.1.self_attn.q_proj": 2},
            alpha_pattern={"layers.0.self_attn.v_proj": 3}, init_lora_weights=False,
            lora_dropout=0.1,
        )
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "adapter")
    model = here(base)
    load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-6, atol=1e-6)
    assert (logits(model) - logits(here(base))).abs().max() > 0.1


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_on_a_changed_base_is_refused_until_it_is_converted(
    start: str, base: Path, tmp_path: Path
) -> None:
    theirs = adapted(base, init_lora_weights=start, lora_alpha=6)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = start
    trained(theirs).save_pretrained(tmp_path / "adapter")
    model = here(base)
    before = logits(model)
    with pytest.raises(ExportError, match=f"init_lora_weights = '{start}'.*changed the weights"):
        load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    theirs.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    load_adapter(model, tmp_path / "converted")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-4)


SET: dict[str, Any] = {
    "bias": "lora_only",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [0, 1],
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [3],
    "init_lora_weights": "loftq",
}
"""Values of settings that are refused; ``True`` or a table for the others."""


@pytest.mark.parametrize("name", [*REFUSED, "init_lora_weights", "use_something_new"])
def test_what_is_refused_is_named_with_its_reason(name: str, base: Path, tmp_path: Path) -> None:
    adapted(base).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / CONFIG
    config = json.loads(path.read_text())
    config[name] = SET.get(name, True if name.startswith("use_") else {"some": 1})
    path.write_text(json.dumps(config))
    model = here(base)
    with pytest.raises(ExportError, match=rf"{CONFIG} has {name}.*(: |; )") as error:
        load_adapter(model, tmp_path / "adapter")
    assert REFUSED.get(name, "") in str(error.value)
