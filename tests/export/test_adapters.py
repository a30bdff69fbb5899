"""SplitModels from transformers and from modules: equal logits, equal files, and clear errors."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

from export.cutting.from_module import from_layers, from_module
from export.cutting.pretrained import from_transformers, save_original
from export.cutting.pretrained.models import TransformersModel
from export.cutting.split_model import SplitModel
from export.errors import ExportError
from export.torch_internals import SymbolicSizes, trace_graph

WORDS = 50
PAD = 0


def _gpt2(**settings: Any) -> Any:
    return transformers.GPT2Config(
        n_embd=16, n_layer=3, n_head=2, vocab_size=WORDS, n_positions=32, bos_token_id=1,
        eos_token_id=1, **settings,
    )  # fmt: skip


def _gpt_neo() -> Any:
    return transformers.GPTNeoConfig(
        hidden_size=16, num_layers=3, num_heads=2, intermediate_size=24, vocab_size=WORDS,
        max_position_embeddings=32, attention_types=[[["global", "local", "local"], 1]],
        window_size=4, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip


def _opt(**settings: Any) -> Any:
    settings = {"word_embed_proj_dim": 16} | settings
    return transformers.OPTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=24, vocab_size=WORDS,
        max_position_embeddings=32, **settings,
    )  # fmt: skip


_LLAMA: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "vocab_size": WORDS,
    "max_position_embeddings": 64,
}  # fmt: skip


def _sliding(kind: str) -> Any:
    return getattr(transformers, f"{kind}Config")(
        **_LLAMA, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )


def _bert(architecture: str | None = None) -> Any:
    return transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        vocab_size=WORDS, max_position_embeddings=32, num_labels=3, pad_token_id=PAD,
        architectures=architecture and [architecture],
    )  # fmt: skip


def _vit() -> Any:
    return transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip


def _resnet(kind: str = "basic") -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type=kind, num_labels=3
    )


def _mobilenet() -> Any:
    return transformers.MobileNetV2Config(
        image_size=32, depth_multiplier=0.25, depth_divisible_by=4, min_depth=4, num_labels=3
    )


TEXT: dict[str, Callable[[], Any]] = {
    "gpt2": _gpt2,
    "gpt2 scaled": lambda: _gpt2(
        scale_attn_by_inverse_layer_idx=True, reorder_and_upcast_attn=True
    ),
    "gpt_neo": _gpt_neo,
    "opt": _opt,
    "opt projected": lambda: _opt(word_embed_proj_dim=8, do_layer_norm_before=False),
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "llama tied": lambda: transformers.LlamaConfig(
        **_LLAMA,
        tie_word_embeddings=True,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        },
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "qwen2 sliding": lambda: _sliding("Qwen2"),
    "qwen3": lambda: transformers.Qwen3Config(**_LLAMA, head_dim=8),
    "qwen3 sliding": lambda: _sliding("Qwen3"),
    "bert": _bert,
    "bert tokens": lambda: _bert("BertForMaskedLM"),
}  # fmt: skip
IMAGES: dict[str, Callable[[], Any]] = {
    "vit": _vit,
    "resnet": _resnet,
    "resnet bottleneck": lambda: _resnet("bottleneck"),
    "mobilenet_v2": _mobilenet,
}
CONFIGS = TEXT | IMAGES
DECODERS = [name for name in TEXT if not name.startswith("bert")]


def _class(config: Any) -> Any:
    named = config.architectures and config.architectures[0]
    name = named or {
        "gpt2": "GPT2LMHeadModel", "gpt_neo": "GPTNeoForCausalLM", "opt": "OPTForCausalLM",
        "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
        "bert": "BertForSequenceClassification", "vit": "ViTForImageClassification",
        "resnet": "ResNetForImageClassification",
        "mobilenet_v2": "MobileNetV2ForImageClassification",
    }[config.model_type]  # fmt: skip
    return getattr(transformers, name)


def _original(name: str) -> Any:
    """Return a model of transformers with its own attention; no tensor has its default value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = CONFIGS[name]()
        model = _class(config)(config).eval()
        with torch.no_grad():
            for tensor in model.state_dict(keep_vars=True).values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand_like(tensor)
    return model


def _inputs(name: str, rows: int = 3, length: int = 11) -> Tensor:
    generator = torch.Generator().manual_seed(rows + length)
    if name in IMAGES:
        return torch.randn(rows, 3, 32, 32, generator=generator)
    return torch.randint(1, WORDS, (rows, length), generator=generator)


def _saved(model: Any, folder: Path, **settings: Any) -> Path:
    model.save_pretrained(folder, **settings)
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    return folder


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def _expected(model: Any, x: Tensor, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, **inputs).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_original_s(name: str, tmp_path: Path) -> None:
    original = _original(name)
    model = from_transformers(_saved(original, tmp_path / "model")).eval()
    for rows, length in ((1, 1), (2, 7), (5, 16)):
        x = _inputs(name, rows, length)
        expected = _expected(original, x)
        torch.testing.assert_close(_logits(model, x), expected, rtol=1e-5, atol=1e-5)
        for cut in range(1, model.depth):
            with torch.no_grad():
                h = model.segment(x, cut)
                for block in model.block[cut:]:
                    h = block(h)
                torch.testing.assert_close(model.head(h), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_parameter_has_a_part_in_the_answer(name: str) -> None:
    model = from_transformers(CONFIGS[name]())
    model(_inputs(name)).square().mean().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize("name", ["bert", "bert tokens"])
def test_padding_of_bert(name: str, tmp_path: Path) -> None:
    original = _original(name)
    model = from_transformers(_saved(original, tmp_path / "model"))
    x = _inputs(name, 4, 9)
    x[1, 5:], x[2, 1:], x[3, 2:4] = PAD, PAD, PAD
    tokens = x != PAD
    found, expected = _logits(model, x), _expected(original, x, attention_mask=tokens.long())
    if name == "bert tokens":
        found, expected = found[tokens], expected[tokens]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for depth in range(1, model.depth):
        with torch.no_grad():
            h = model.segment(x, depth)
        assert torch.equal((h != 0).any(-1), tokens)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neo", "llama tied", "bert tokens"])
def test_tied_embeddings_stay_one_tensor(name: str) -> None:
    model = from_transformers(CONFIGS[name]())
    assert model.head.get_submodule("output").weight is model.stem.embedding.weight


@pytest.mark.parametrize("name", CONFIGS)
def test_other_tensors_can_be_put_in_the_model_for_a_call(name: str) -> None:
    model = from_transformers(CONFIGS[name]()).eval()
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    functional_call(model, {n: t.clone() for n, t in tensors.items()}, (_inputs(name),))
    for n, t in [*model.named_parameters(), *model.named_buffers()]:
        assert t is tensors[n], n


def test_a_configuration_gives_the_same_weights_every_time(tmp_path: Path) -> None:
    config = _gpt2()
    config.save_pretrained(tmp_path)
    before = torch.random.get_rng_state()
    models = [from_transformers(source) for source in (config, config, tmp_path / "config.json")]
    assert torch.equal(before, torch.random.get_rng_state())
    for model in models[1:]:
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, models[0].state_dict()[name]), name


@pytest.mark.parametrize("name", DECODERS)
def test_a_block_is_traced_for_any_batch_and_length(name: str) -> None:
    model = from_transformers(CONFIGS[name]()).eval()
    symbolic = SymbolicSizes({"rows": 7, "length": 13})
    with symbolic.tracing():
        h = torch.zeros(symbolic.sizes["rows"], symbolic.sizes["length"], 16)
        graph = trace_graph(model.block[1], [h])
    assert not symbolic.fixed()
    with torch.no_grad():
        for rows, length in ((2, 3), (4, 12)):
            h = torch.randn(rows, length, 16)
            torch.testing.assert_close(graph(h), model.block[1](h), rtol=1e-5, atol=1e-6)


# back into the folder


def _tensor_bytes(folder: Path) -> dict[str, tuple[str, bytes]]:
    tensors: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return {
        name: (str(t.dtype), t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gpt2", "bert tokens", "vit", "mobilenet_v2", "qwen3"])
def test_saving_gives_back_every_file(name: str, dtype: str, sharded: bool, tmp_path: Path) -> None:
    original = _original(name).to(getattr(torch, dtype))
    source = _saved(original, tmp_path / "a", **({"max_shard_size": "8KB"} if sharded else {}))
    assert sharded == (source / "model.safetensors.index.json").exists()
    save_original(from_transformers(source), tmp_path / "b")
    names = {p.name for p in source.iterdir()}
    assert names == {p.name for p in (tmp_path / "b").iterdir()}
    for file in names:
        assert (source / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("from_config", [False, True])
def test_what_was_trained_is_saved(name: str, from_config: bool, tmp_path: Path) -> None:
    original = _original(name)
    source = original.config if from_config else _saved(original, tmp_path / "a")
    model = from_transformers(source)
    _train(model, _inputs(name))
    save_original(model, tmp_path / "b")
    x = _inputs(name, 4, 9)
    reloaded = type(original).from_pretrained(tmp_path / "b")
    torch.testing.assert_close(
        _expected(reloaded.eval(), x), _logits(model, x), rtol=1e-5, atol=1e-5
    )
    again = from_transformers(tmp_path / "b").state_dict()
    for tensor_name, tensor in model.state_dict().items():
        assert torch.equal(again[tensor_name], tensor), tensor_name


def _train(model: SplitModel, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    model.train()(x).square().mean().backward()
    optimizer.step()


def test_names_without_the_prefix_and_old_buffers(tmp_path: Path) -> None:
    original = _original("gpt2")
    source = _saved(original, tmp_path / "a")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("transformer."): t for name, t in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32).tril()
    bare["lm_head.weight"] = bare["wte.weight"].clone()
    save_file(bare, source / "model.safetensors", {"format": "pt", "made_by": "hand"})
    model = from_transformers(source)
    torch.testing.assert_close(
        _logits(model, _inputs("gpt2")), _expected(original, _inputs("gpt2")), rtol=1e-5, atol=1e-5
    )
    save_original(model, tmp_path / "b")
    assert _tensor_bytes(source) == _tensor_bytes(tmp_path / "b")
    with safe_open(tmp_path / "b" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "hand"}
    with torch.no_grad():
        model.stem.embedding.weight.zero_()
    save_original(model, tmp_path / "c")
    saved = load_file(tmp_path / "c" / "model.safetensors")
    assert not saved["wte.weight"].any()
    assert not saved["lm_head.weight"].any()


def test_layer_norms_of_long_ago(tmp_path: Path) -> None:
    original = _original("bert")
    source = _saved(original, tmp_path / "a")
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    model = from_transformers(source)
    x = _inputs("bert")
    torch.testing.assert_close(_logits(model, x), _expected(original, x), rtol=1e-5, atol=1e-5)
    save_original(model, tmp_path / "b")
    assert _tensor_bytes(source) == _tensor_bytes(tmp_path / "b")


@pytest.mark.parametrize("settings", [{}, {"max_shard_size": "8KB"}])
def test_a_model_without_a_head_gets_one(settings: dict[str, str], tmp_path: Path) -> None:
    body = transformers.BertModel(_bert()).eval()
    source = _saved(body, tmp_path / "a", **settings)
    model = from_transformers(source)
    assert torch.equal(model.head.output.weight, from_transformers(source).head.output.weight)
    save_original(model, tmp_path / "b")
    before, after = _tensor_bytes(source), _tensor_bytes(tmp_path / "b")
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {"classifier.weight", "classifier.bias"}
    x = _inputs("bert")
    kind = transformers.AutoModelForSequenceClassification
    reloaded = kind.from_pretrained(tmp_path / "b", num_labels=3).eval()
    torch.testing.assert_close(_expected(reloaded, x), _logits(model, x), rtol=1e-5, atol=1e-5)
    again = from_transformers(tmp_path / "b")
    torch.testing.assert_close(_logits(again, x), _logits(model, x), rtol=0, atol=0)


class _Lora(nn.Module):
    """Replaces a module, as peft does."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(16, 2)

    def forward(self, h: Tensor) -> Tensor:
        return self.base_layer(h)


def test_adapters_are_not_saved(tmp_path: Path) -> None:
    source = _saved(_original("gpt2"), tmp_path / "a")
    model = from_transformers(source)
    attention = model.block[1].layer.attn
    attention.c_attn = _Lora(attention.c_attn)
    save_original(model, tmp_path / "b")
    assert _tensor_bytes(source) == _tensor_bytes(tmp_path / "b")


def test_a_copy_can_be_saved(tmp_path: Path) -> None:
    source = _saved(_original("opt"), tmp_path / "a")
    save_original(copy.deepcopy(from_transformers(source)), tmp_path / "b")
    assert _tensor_bytes(source) == _tensor_bytes(tmp_path / "b")


def test_nothing_is_written_over_or_by_half(tmp_path: Path) -> None:
    source = _saved(_original("gpt2").half(), tmp_path / "a")
    model = from_transformers(source)
    with pytest.raises(ExportError, match="exists; choose another folder"):
        save_original(model, source)
    with torch.no_grad():
        model.block[0].layer.ln_1.weight.fill_(1e6)
    with pytest.raises(ExportError, match=r"ln_1.weight has become too large for torch.float16"):
        save_original(model, tmp_path / "b")
    shutil.rmtree(source)
    with pytest.raises(ExportError, match="needs the folder that the model was loaded from"):
        save_original(model, tmp_path / "b")
    assert not list(tmp_path.iterdir())


# errors


def _edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | values), "utf-8")


def _drop(folder: Path, *names: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file({n: t for n, t in tensors.items() if n not in names}, folder / "model.safetensors")


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _reshape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["transformer.ln_f.weight"] = torch.ones(5)
    save_file(tensors, folder / "model.safetensors")


def _truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def _index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "is no valid configuration"),
        (lambda f: (f / "config.json").write_text("{}"), "has no model_type"),
        (lambda f: (f / "config.json").write_text("[]"), "is no valid configuration"),
        (lambda f: (f / "model.safetensors").unlink(), "to start from random weights, give"),
        (_pickle, "convert them to safetensors"),
        (_truncate, "model.safetensors is damaged"),
        (lambda f: _index(f, "{}"), "index.json is damaged"),
        (lambda f: _index(f, '{"weight_map": {"a": "../x"}}'), "index.json is damaged"),
        (lambda f: _index(f, '{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors is missing"),
        (lambda f: _edit_config(f, model_type="t5"), "'t5' are not supported; there are gpt2, "),
        (
            lambda f: _edit_config(f, architectures=["GPT2ForTokenClassification"]),
            "GPT2ForTokenClassification is not supported; of gpt2 there are GPT2LMHeadModel",
        ),
        (lambda f: _edit_config(f, n_head=3), "transformers cannot make the GPT2LMHeadModel"),
        (lambda f: _edit_config(f, n_layer=1), "at least 2 blocks"),
        (lambda f: _edit_config(f, add_cross_attention=True), "cross-attention|crossattention"),
        (lambda f: _edit_config(f, quantization_config={"quant_method": "fp8"}), "quantised"),
        (lambda f: _drop(f, "transformer.h.0.ln_1.bias"), "h.0.ln_1.bias is missing$"),
        (
            lambda f: _drop(f, *(f"transformer.h.{i}.ln_1.bias" for i in range(3)), "lm_head"),
            "h.2.ln_1.bias is missing$",
        ),
        (lambda f: _edit_config(f, n_layer=5), "missing and 21 more"),
        (_reshape, r"transformer.ln_f.weight is \[5\], must be \[16\]"),
    ],
)
def test_errors_say_what_to_do(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    folder = _saved(_original("gpt2"), tmp_path / "model")
    damage(folder)
    with pytest.raises(ExportError, match=message) as error:
        from_transformers(folder)
    assert "\n" not in str(error.value)


def test_configurations_that_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no"):
        from_transformers(tmp_path / "nothing.json")
    decoder = _bert()
    decoder.is_decoder = True
    with pytest.raises(ExportError, match="is_decoder"):
        from_transformers(decoder)
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    dynamic = transformers.LlamaConfig(**_LLAMA, rope_parameters=rope)
    with pytest.raises(ExportError, match="'dynamic' depend on the longest text"):
        from_transformers(dynamic)
    with pytest.raises(ExportError, match="does not come from transformers"):
        save_original(from_layers([nn.Linear(2, 2) for _ in range(4)]), tmp_path / "out")


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'cutlayer\[transformers\]'"):
        from_transformers("anything")


# any module


class Net(nn.Module):
    """A network of the usual form, optionally with a tensor that none of the parts has."""

    def __init__(self, how: str = "usual") -> None:
        super().__init__()
        self.how = how
        self.embed = nn.Conv2d(3, 4, 3)
        self.body = nn.Module()
        self.body.layers = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.more = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1))
        self.norm = nn.BatchNorm2d(4)
        nn.init.constant_(self.norm.bias, 0.5)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        h = first = self.embed(x)
        for layer in [*self.body.layers, *self.more]:
            h = layer(h)
        if self.how == "skip":
            h = h + first
        h = self.out(self.drop(self.norm(h)).mean((2, 3)))
        return {"logits": h} if self.how == "dict" else h


PARTS: dict[str, Any] = {
    "stem": "embed",
    "blocks": ["body.layers", "more"],
    "head": ["norm", "drop", lambda h: h.mean((2, 3)), "out"],
}
X = torch.randn(4, 3, 8, 8)


def test_a_module_by_names() -> None:
    net = Net()
    model = from_module(net, **PARTS, example=X)
    assert model.depth == 5
    assert model.stem is net.embed
    assert model.block[1] is net.body.layers[1]
    assert net.training
    assert model.training
    assert net.norm.num_batches_tracked == 0
    torch.testing.assert_close(_logits(model, X), _logits(net, X), rtol=0, atol=0)
    one = from_module(net, stem=["embed"], blocks="body.layers", head=[lambda h: h])
    assert one.depth == 3
    named = from_module(net, stem="embed", blocks=["body.layers.0", "body.layers.2"], head="norm")
    assert named.block[1] is net.body.layers[2]


@pytest.mark.parametrize(
    ("how", "change", "message"),
    [
        ("skip", {}, "a connection skips over blocks"),
        ("dict", {}, "the module returns a dict"),
        ("usual", {"head": ["drop", lambda h: h.mean((2, 3)), "out"]}, "logits differ by up to"),
        ("usual", {"head": "norm"}, "logits are"),
        ("usual", {"head": "out"}, "do not fit one after the other"),
        ("usual", {"stem": "embd"}, "no module 'embd'; close to it: embed"),
        ("usual", {"blocks": "body.layer"}, "close to it: body.layers"),
        ("usual", {"blocks": "norm"}, "norm is a BatchNorm2d, not a list of blocks"),
        ("usual", {"blocks": ["norm"]}, "at least 2 blocks"),
    ],
)
def test_parts_that_are_not_the_module(how: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        from_module(Net(how), **PARTS | change, example=X)


def test_a_module_of_tokens() -> None:
    net = nn.Sequential(
        nn.Embedding(9, 4), nn.LayerNorm(4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
        nn.Linear(4, 9),
    )  # fmt: skip
    x = torch.randint(9, (2, 5))
    model = from_module(net, stem=["0", "1"], blocks="2", head="3", example=x, task="tokens")
    assert model.stem.embedding is net[0]
    flat = from_layers([net[0], *net[2], net[3]], task="tokens")
    assert flat.stem.embedding is net[0]
    assert flat(x).shape == (2, 5, 9)
    with pytest.raises(ExportError, match=r"\.embedding"):
        from_layers([nn.Linear(2, 2) for _ in range(4)], task="tokens")


def test_a_list_of_layers() -> None:
    layers = [nn.Linear(2, 2) for _ in range(5)]
    model = from_layers(layers)
    assert (model.stem, *model.block, model.head) == tuple(layers)
    with pytest.raises(ExportError, match="3 layers cannot be cut"):
        from_layers(layers[:3])


def test_the_names_of_a_class_are_kept() -> None:
    model = from_transformers(_gpt2())
    assert isinstance(model, TransformersModel)
    assert model.origin.names["transformer.h.1.mlp.c_fc.weight"] == "block.1.layer.mlp.c_fc.weight"
