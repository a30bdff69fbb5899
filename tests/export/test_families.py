"""The models of SplitFT's paper, at their real sizes with random weights: one step with a cut.

The reference is the same model without a cut, in eager PyTorch.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from edge_sdk.protocol.tensors import Array
from export.adapters_lora.lora import Lora, adapted_modules
from export.bundles.model_source import build_model
from export.cutting.split_model import ClientSegment
from export.packing import codecs as packing
from export.steps.client_steps import ClientSteps
from export.steps.optimizers import get_optimizer
from export.steps.torch_runtime import TorchRuntime
from server_hub.trunk.interface import TrunkPlan
from server_hub.trunk.step import TrunkTrainer
from tests.lib.codecs import Exact
from tests.lib.decay import optimizer_of
from tests.lib.step_runtimes import manifest_of
from tests.lib.trunk_models import step_input

CUT, ROWS, LENGTH = 2, 2, 16

# The config.json of each without dropout, whose masks would differ in an uncut model.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_embd": 768, "n_layer": 12,
        "n_head": 12, "n_positions": 1024, "vocab_size": 50257, "bos_token_id": 50256,
        "eos_token_id": 50256, "activation_function": "gelu_new", "initializer_range": 0.02,
        "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
    },
    "opt-125m": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"], "hidden_size": 768,
        "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072, "vocab_size": 50272,
        "max_position_embeddings": 2048, "word_embed_proj_dim": 768, "activation_function": "relu",
        "do_layer_norm_before": True, "init_std": 0.02, "layerdrop": 0.0, "pad_token_id": 1,
        "bos_token_id": 2, "eos_token_id": 2, "prefix": "</s>", "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "gpt-neo-125m": {
        "model_type": "gpt_neo", "architectures": ["GPTNeoForCausalLM"], "hidden_size": 768,
        "num_layers": 12, "num_heads": 12, "intermediate_size": None, "vocab_size": 50257,
        "max_position_embeddings": 2048, "attention_types": [[["global", "local"], 6]],
        "window_size": 256, "activation_function": "gelu_new", "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 50256, "eos_token_id": 50256,
        "attention_dropout": 0, "embed_dropout": 0, "resid_dropout": 0,
    },
}  # fmt: skip

PARAMETERS = {"gpt2": 124_439_808, "opt-125m": 125_239_296, "gpt-neo-125m": 125_198_592}
"""The sizes of the published models."""


@pytest.mark.parametrize("name", CONFIGS)
def test_a_split_step_of_a_real_model_is_that_of_the_uncut_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(packing.CODECS, "float32", Exact())
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    model = build_model(str(tmp_path / "config.json"), Lora(rank=8))
    base = [p for n, p in model.named_parameters() if ".lora_" not in n]
    assert sum(p.numel() for p in base) == PARAMETERS[name]
    assert {n.split(".")[1] for n in adapted_modules(model)} == {str(i) for i in range(12)}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # fresh adapters are zero, and A would have no gradient
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(0, 0.1, generator=generator)
    frozen: dict[int, Any] = {id(p): p for p in base}
    words = CONFIGS[name]["vocab_size"]
    x = torch.randint(words, (ROWS, LENGTH), generator=generator)
    y = torch.randint(words, (ROWS, LENGTH), generator=generator)
    y[0, -3:] = -1
    hyper = {"lr": 10.0, "momentum": 0.9, "weight_decay": 0.01, "max_norm": 0.0}
    rule = get_optimizer("sgd")
    before = {n: p.detach().numpy().copy() for n, p in model.trained().items()}

    uncut = copy.deepcopy(model, dict(frozen))
    reference = optimizer_of(uncut, hyper)
    loss = cross_entropy(uncut(x).flatten(0, 1), y.flatten(), ignore_index=-1)
    loss.backward()  # type: ignore[no-untyped-call]
    reference.step()

    trunk = TrunkTrainer(copy.deepcopy(model, dict(frozen)), "cpu")
    model.add_heads([CUT], x, words)
    steps = ClientSteps(
        ClientSegment(model, CUT), rule, Exact(), x, words, {"seq": LENGTH}, graphs=["backward"]
    )
    device = TorchRuntime(manifest_of(steps, "torch"), steps)
    given = {"x": x.numpy()}
    packed = device.run("activate", given)
    trunk.begin(before, TrunkPlan("sgd", hyper, returned=True))
    report = trunk.step([step_input("d", "all", CUT, "float32", packed, y.numpy())])
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)
    (gradient,) = report.gradients
    assert gradient is not None
    rates = {key: np.array(value, np.float32) for key, value in hyper.items()}
    device.run("backward", {**given, "grad.h": gradient["h"], **rates})

    after: dict[str, Array] = {n: t for n, t in device.get_state().items() if n in before}
    for copied in trunk.finish():
        assert not after.keys() & copied.tensors.keys()
        after |= copied.tensors
    want = {n: p.detach().numpy() for n, p in uncut.trained().items()}
    assert after.keys() == want.keys()
    for n, tensor in want.items():
        change = np.linalg.norm(tensor - before[n])
        assert change > 1e-3 * np.linalg.norm(before[n])
        assert np.linalg.norm(after[n] - tensor) < 1e-4 * change, n
