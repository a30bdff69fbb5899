"""SplitModel: the layers on each side of a cut, and weights on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from edge_sdk.errors import BundleError
from export.cutting.split_model import ClientSegment, SplitModel
from export.errors import ExportError
from export.tensor_names import layer_of
from tests.lib.models import CLASSES, FEATURES, IMAGE, TOKENS, conv_model, example, token_model


def with_heads(cuts: list[int], seed: int = 0) -> SplitModel:
    """Return the convolutional model with auxiliary heads."""
    model = conv_model(seed)
    model.add_heads(cuts, example(IMAGE), CLASSES)
    return model


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_both_sides_of_a_cut_make_the_model(cut: int) -> None:
    """The segment of the device followed by that of the hub is the whole model, bit for bit."""
    model, x = with_heads([cut]), example(IMAGE)
    with torch.no_grad():
        h, logits = ClientSegment(model, cut)(x)
        assert torch.equal(h, model.segment(x, cut))
        assert torch.equal(logits[0], model.aux[str(cut)](h))
        for block in model.block[cut:]:
            h = block(h)
        assert torch.equal(model.head(h), model(x))


def test_layers_are_named_by_side() -> None:
    """Heads above the cut are on the hub, and so is the head of the model."""
    model = with_heads([3, 1])
    assert model.depth == 4
    assert model.head_depths == [1, 3]
    assert model.client_layers(1) == ["stem", "block.0", "aux.1"]
    assert model.client_layers(2) == ["stem", "block.0", "block.1", "aux.1"]
    assert model.client_layers(3) == ["stem", "block.0", "block.1", "block.2", "aux.1", "aux.3"]
    assert model.layers() == [
        "stem", "block.0", "block.1", "block.2", "block.3", "aux.1", "aux.3", "head",
    ]  # fmt: skip


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_segment_has_the_parameters_of_its_layers(cut: int) -> None:
    """A segment has the model's names and tensors of its layers, and no others."""
    model = with_heads([1, 3])
    segment = ClientSegment(model, cut)
    layers = model.client_layers(cut)
    expected = {n: p for n, p in model.named_parameters() if layer_of(n) in layers}
    found = dict(segment.named_parameters())
    assert found.keys() == expected.keys()
    assert all(found[name] is expected[name] for name in found)
    assert {layer_of(name) for name in model.state_dict()} == set(model.layers())


def test_layer_of_a_name() -> None:
    """Every block and auxiliary head is a layer; stem and head are one layer each."""
    assert layer_of("block.3.conv.weight") == "block.3"
    assert layer_of("block.12.0.1.bias") == "block.12"
    assert layer_of("aux.2.out.bias") == "aux.2"
    assert layer_of("stem.weight") == "stem"
    assert layer_of("head.out.weight") == "head"


def test_heads_come_shallowest_first() -> None:
    """Heads are sorted by depth as a number: aux.2 before aux.10."""
    blocks = [nn.Identity() for _ in range(12)]
    model = SplitModel(nn.Identity(), blocks, nn.Identity())
    model.add_heads([10, 2], torch.zeros(2, 4), 3)
    assert model.head_depths == [2, 10]
    assert ClientSegment(model, 11).heads == ["aux.2", "aux.10"]
    x = example((4,))
    _, logits = ClientSegment(model, 11)(x)
    assert torch.equal(logits, torch.stack([model.aux["2"](x), model.aux["10"](x)]))


@pytest.mark.parametrize("shape", [TOKENS, FEATURES])
def test_heads_take_tokens_and_vectors(shape: tuple[int, ...]) -> None:
    """An auxiliary head finds the width on the right axis for its kind of activations."""
    model, x = token_model(), example(shape)
    model.add_heads([1], x, 4)
    h, logits = ClientSegment(model, 1)(x)
    assert model.aux["1"].hidden.in_features == h.shape[-1] == 8
    assert logits.shape == (1, 8, 4)


def test_added_heads_are_always_the_same() -> None:
    """The caller's random numbers are not changed, so the same model gives the same bundles."""
    one, other = conv_model(), conv_model()
    torch.manual_seed(1)
    one.add_heads([1, 2], example(IMAGE), CLASSES)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    other.add_heads([2, 1], example(IMAGE), CLASSES)
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_heads_that_are_there_are_kept() -> None:
    """A second export keeps the trained weights of a head."""
    model = with_heads([1])
    before = model.aux["1"].out.weight.clone()
    model.add_heads([1, 2], example(IMAGE), CLASSES)
    assert torch.equal(model.aux["1"].out.weight, before)
    assert model.head_depths == [1, 2]


@pytest.mark.parametrize("cut", [0, 4, 5, -1])
def test_a_cut_leaves_a_block_on_each_side(cut: int) -> None:
    """The error says which cuts are possible."""
    model = with_heads([1])
    with pytest.raises(ExportError, match=rf"cut {cut} is outside the model.*from 1 to 3"):
        model.check_cut(cut)
    with pytest.raises(ExportError, match="outside the model"):
        ClientSegment(model, cut)


def test_models_and_segments_that_cannot_be() -> None:
    """One block cannot be cut, a segment needs a head, and 5-D activations are refused."""
    with pytest.raises(ExportError, match="at least 2 blocks to be cut, this has 1"):
        SplitModel(nn.Identity(), [nn.Identity()], nn.Identity())
    with pytest.raises(ExportError, match="no auxiliary head at or before cut 1"):
        ClientSegment(with_heads([2]), 1)
    parts = [nn.Identity(), nn.Identity()]
    volume = SplitModel(nn.Identity(), parts, nn.Identity(), channels="first")
    with pytest.raises(ExportError, match=r"shape \[2, 3, 4, 4, 4\] at a cut; they must be"):
        volume.add_heads([1], torch.zeros(2, 3, 4, 4, 4), 2)


def test_weights_come_back_bit_for_bit(tmp_path: Path) -> None:
    """All tensors come back, also of auxiliary heads; a model without heads gets the file's."""
    saved, loaded = with_heads([1, 3], seed=1), conv_model(seed=2)
    saved.save(tmp_path / "model.safetensors")
    loaded.load(tmp_path / "model.safetensors")
    assert loaded.layers() == saved.layers()
    assert loaded.state_dict().keys() == saved.state_dict().keys()
    for name, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    with torch.no_grad():
        x = example(IMAGE)
        assert torch.equal(loaded(x), saved(x))
        both = (ClientSegment(model, 3)(x)[1] for model in (loaded, saved))
        assert torch.equal(*both)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    """The error names the tensor and both shapes, and the model does not change."""
    path = tmp_path / "model.safetensors"
    conv_model(width=8).save(path)
    model = conv_model(width=6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BundleError) as caught:
        model.load(path)
    assert str(path) in str(caught.value)
    assert "block.0.conv.weight: (8, 8, 3, 3) against (6, 6, 3, 3)" in str(caught.value)
    assert all(torch.equal(tensor, before[n]) for n, tensor in model.state_dict().items())


def test_missing_and_unknown_tensors_are_refused(tmp_path: Path) -> None:
    """Missing and unknown tensors are both errors."""
    path = tmp_path / "model.safetensors"
    conv_model().save(path)
    tensors = load_file(path)
    bias = tensors.pop("stem.bias")
    save_file(tensors, path)
    with pytest.raises(BundleError, match=r"stem\.bias: missing in the file against \(6,\)"):
        conv_model().load(path)
    save_file({**tensors, "stem.bias": bias, "stem.extra": bias.clone()}, path)
    with pytest.raises(BundleError, match=r"stem\.extra: \(6,\) against nothing in the model"):
        conv_model().load(path)


@pytest.mark.parametrize("name", ["weight", "aux", "aux.x.hidden.weight", "aux.1.hidden.weight"])
def test_strange_tensors_are_refused(tmp_path: Path, name: str) -> None:
    """Names without a layer, a head without a valid depth, and an incomplete head are refused."""
    path = tmp_path / "model.safetensors"
    save_file({**conv_model().state_dict(), name: torch.zeros(3, 3)}, path)
    model = conv_model()
    with pytest.raises(BundleError, match=r"does not fit the model: .*against nothing"):
        model.load(path)
    assert model.head_depths == []


def test_a_head_that_the_file_lacks_is_refused(tmp_path: Path) -> None:
    """Otherwise the head would keep random weights without notice."""
    path = tmp_path / "model.safetensors"
    with_heads([1]).save(path)
    with pytest.raises(BundleError, match=r"aux\.2\..*: missing in the file"):
        with_heads([1, 2]).load(path)


@pytest.mark.parametrize("content", [None, b"", b"no safetensors", b"\xff" * 64])
def test_files_that_are_no_weights(tmp_path: Path, content: bytes | None) -> None:
    """A missing, empty or damaged file raises a BundleError that names it."""
    path = tmp_path / "model.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot read the weights .*model\.safetensors"):
        conv_model().load(path)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    """A truncated file is never loaded in part."""
    path = tmp_path / "model.safetensors"
    conv_model().save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="cannot read the weights"):
        conv_model().load(path)
