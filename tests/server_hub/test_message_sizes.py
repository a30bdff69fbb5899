"""What will be sent is compared with the limits before anything starts; questions are divided."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import Device
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Manifest
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.tensors import TensorSpec
from server_hub.gateway.limits import Limits
from server_hub.gateway.tokens import TokenFile
from server_hub.rounds.message_sizes import check_message_sizes
from tests.lib.harness import examples, hub_config, running_hub
from tests.lib.tasks import run

MB = 2**20


def manifest_of(bundles: BundleIndex, **changes: Any) -> Manifest:
    return replace(bundles.manifest("small"), **changes)


def check(manifest: Manifest, limits: Limits, batch_size: int = 32, mode: str = "train") -> None:
    modes = {ActivationMode(mode)}
    check_message_sizes({"small": manifest}, limits, batch_size, modes, slots=False)


def packed(*shape: int | str) -> tuple[TensorSpec, ...]:
    return (TensorSpec("h", "int8", shape),)


def test_what_fits_is_not_mentioned(bundles: BundleIndex, caplog: pytest.LogCaptureFixture) -> None:
    check(bundles.manifest("small"), Limits(), mode="u_shaped")
    assert not caplog.records


def test_a_tensor_that_is_too_large_for_a_message_is_named(bundles: BundleIndex) -> None:
    manifest = bundles.manifest("small")
    entry = manifest.state[0]
    huge = replace(entry, spec=TensorSpec("stem.table", "float32", (70_000, 256)))
    manifest = replace(manifest, state=(huge, *manifest.state[1:]))
    check(manifest, Limits())  # an embedding of 70,000 x 256 travels in pieces
    with pytest.raises(ConfigError) as caught:
        check(manifest, Limits(max_message=64 * MB))
    assert str(caught.value) == (
        "tier 'small': the tensor stem.table of an update has 71,680,000 bytes, and a message "
        "holds 67,108,864; raise max_message in [limits] to 72351744"
    )
    with pytest.raises(ConfigError, match="raise max_frame"):
        check(manifest, Limits(max_frame=100_000, blob_piece=50_000))
    with pytest.raises(ConfigError, match="and waiting_mb to 69"):
        check(manifest, Limits(max_message=32 * MB, waiting_mb=32))


def test_a_batch_that_is_too_large_is_named(
    bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifest_of(bundles, packed=packed("batch", 64, 64, 64))
    check(manifest, Limits(), batch_size=64)
    assert not caplog.records
    check(manifest, Limits(), batch_size=300)
    assert "'pieces' cannot take part; raise max_frame" in caplog.text
    with pytest.raises(ConfigError, match="the activations of a batch of 600 rows") as caught:
        check(manifest, Limits(), batch_size=600)
    assert "lower batch_size in [local], or raise max_message in [limits] to" in str(caught.value)
    check(manifest, Limits(), batch_size=600, mode="none")
    most = Limits(max_message=512 * MB, waiting_mb=512)
    with pytest.raises(ConfigError, match=r"the gradient of a batch of 600 rows .* lower batch"):
        check(manifest, most, batch_size=600, mode="returned")


def test_a_question_that_is_too_large_is_named(bundles: BundleIndex) -> None:
    manifest = manifest_of(bundles, packed=packed("batch", 1024, 512, 512))
    with pytest.raises(ConfigError, match="a question about one row has 268,435,456 bytes"):
        check(manifest, Limits(), mode="none")


def test_texts_may_be_shorter_than_the_longest(
    bundles: BundleIndex, caplog: pytest.LogCaptureFixture
) -> None:
    manifest = manifest_of(bundles, packed=packed("batch", "seq", 4096), limits={"seq": 4096})
    with caplog.at_level(logging.WARNING):
        check(manifest, Limits())
    assert "a batch of 32 rows of 4096 positions" in caplog.text
    assert "shorter texts fit" in caplog.text


def test_a_hub_says_so_when_it_starts(tmp_path: Path, bundles: BundleIndex) -> None:
    async def test() -> None:
        limits = Limits(max_frame=3000, blob_piece=1000)
        with pytest.raises(ConfigError, match="raise max_frame in \\[limits\\]"):
            async with running_hub(hub_config(tmp_path, bundles, limits=limits)):
                pass

    run(test())


def test_questions_are_divided_by_what_a_message_holds(
    tmp_path: Path, bundles: BundleIndex
) -> None:
    """All rows together are larger than a message to the hub; their answers are small."""

    async def test() -> None:
        limits = Limits(max_frame=12_000, blob_piece=4096, session_s=5.0)
        config = hub_config(tmp_path, bundles, limits=limits)
        token = TokenFile(config.tokens).issue("phone", "small")
        held_out = examples(64, seed=3)
        async with (
            running_hub(config) as (hub, url),
            await Device.connect(url, token=token, cache=tmp_path / "cache") as device,
        ):
            evaluation = await device.evaluate(held_out, batch_size=64)
            assert evaluation.samples == 64
            prediction = await device.predict(held_out.x, confidence=1.1)
            assert prediction.by_hub.all()
            assert hub.gateway.traffic.up["infer"] > 3 * 12_000

    run(test())
