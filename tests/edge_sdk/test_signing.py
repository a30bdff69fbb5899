"""Signed bundles: keys, manifests, folders, devices that require a signature, and commands."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

import edge_sdk.device
from edge_sdk import BundleError, ConfigError, Device
from edge_sdk.bundle.index import INDEX, BundleIndex
from edge_sdk.bundle.manifest import FORMAT, MINOR, Manifest, canonical_json
from edge_sdk.bundle.signing import (
    CONTEXT,
    PrivateKey,
    check,
    new_key,
    public_key,
    read_private_key,
    read_public_key,
    read_trust,
    sign,
    sign_folder,
    verify_folder,
)
from edge_sdk.bundle.store import BlobStore
from edge_sdk.cli.main import main
from server_hub.gateway.tokens import TokenFile
from tests.lib.harness import hub_config, running_hub

KEY = PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = public_key(KEY)
OTHER = PrivateKey.from_private_bytes(bytes(32))

CHANGED = "changed after it was signed"


@pytest.fixture(scope="session")
def unsigned(bundles: Any) -> bytes:
    """Return a manifest as the export writes it."""
    index = BundleIndex.read(bundles.folder)
    return index.blobs().read(index.tiers["small"].manifest)


@pytest.fixture(scope="session")
def signed(unsigned: bytes) -> bytes:
    """Return the manifest signed with ``KEY``."""
    return sign(unsigned, KEY)


@pytest.fixture
def folder(tmp_path: Path, bundles: Any) -> Path:
    """Copy the unsigned bundles to a folder that a test may change."""
    return Path(shutil.copytree(bundles.folder, tmp_path / "bundles"))


def pair(path: Path, key: PrivateKey) -> Path:
    """Write a known key in the files of ``new_key``."""
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(pem)
    path.with_name(f"{path.name}.pub").write_text(f"{public_key(key)}\n")
    return path


# --- manifests ----------------------------------------------------------------------------------


def test_a_signature_holds(unsigned: bytes, signed: bytes) -> None:
    """A signature names its key and is always the same; signing again replaces it."""
    assert check(signed, {PUBLIC}) == PUBLIC
    assert check(signed) == PUBLIC
    assert check(unsigned) is None
    assert sign(unsigned, KEY) == signed
    assert sign(signed, KEY) == signed
    assert sign(sign(unsigned, OTHER), KEY) == signed


def test_as_the_documentation_says(unsigned: bytes, signed: bytes) -> None:
    """A client can cut the signature out of the bytes and check the rest, without a JSON writer."""
    found = re.findall(
        rb'"signature":\{"key":"([0-9a-f]{64})","value":"([0-9a-f]{128})"\},', signed
    )
    ((key, value),) = found
    field = b'"signature":{"key":"' + key + b'","value":"' + value + b'"},'
    assert signed.replace(field, b"") == unsigned
    public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.decode()))
    public.verify(bytes.fromhex(value.decode()), CONTEXT + unsigned)


def test_three_refusals(unsigned: bytes, signed: bytes) -> None:
    """Unsigned, signed with another key, changed: three messages that name the keys."""
    with pytest.raises(BundleError, match=rf"not signed.*{PUBLIC[:16]}…"):
        check(unsigned, {PUBLIC})
    other = public_key(OTHER)
    with pytest.raises(BundleError, match=rf"signed by {PUBLIC[:16]}….*only {other[:16]}…"):
        check(signed, {other})
    for trust in (None, {PUBLIC}, {other}):
        with pytest.raises(BundleError, match=CHANGED):
            check(signed.replace(b'"cut":1', b'"cut":2'), trust)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), change=st.integers(1, 255))
def test_any_changed_byte_is_refused(signed: bytes, data: st.DataObject, change: int) -> None:
    """A changed byte anywhere in the manifest or its signature is refused."""
    at = data.draw(st.integers(0, len(signed) - 1))
    wrong = signed[:at] + bytes([signed[at] ^ change]) + signed[at + 1 :]
    with pytest.raises(BundleError):
        check(wrong, {PUBLIC})


@settings(max_examples=300, deadline=None)
@given(data=st.data(), change=st.integers(1, 255))
def test_any_changed_byte_of_a_signature_is_refused(
    signed: bytes, data: st.DataObject, change: int
) -> None:
    """A device that accepts every key refuses it too."""
    start = signed.index(b'"signature":{"') + len(b'"signature":')
    at = data.draw(st.integers(start, start + 218))
    wrong = signed[:at] + bytes([signed[at] ^ change]) + signed[at + 1 :]
    with pytest.raises(BundleError):
        check(wrong)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_other_bytes_are_refused(signed: bytes, data: st.DataObject) -> None:
    """The same JSON in other bytes does not have a valid signature."""
    at = data.draw(st.integers(0, len(signed) - 1))
    more = data.draw(st.sampled_from([b" ", b"\n", b"0", b'"', b'"cut":9,', b"{", b'"tier":"x",']))
    for wrong in (signed[:at], signed[:at] + signed[at + 1 :], signed[:at] + more + signed[at:]):
        with pytest.raises(BundleError):
            check(wrong, {PUBLIC})


def test_another_spelling_is_refused(signed: bytes) -> None:
    """The digits of a signature have only one spelling, so that a bundle has one identity."""
    value = json.loads(signed)["signature"]["value"]
    for digits in (PUBLIC, value):
        with pytest.raises(BundleError, match="malformed"):
            check(signed.replace(digits.encode(), digits.upper().encode()), {PUBLIC})


def test_one_field_twice_is_refused(signed: bytes) -> None:
    """A manifest with a duplicate field is refused, because parsers choose different values."""
    assert json.loads(b'{"cut":9,' + signed[1:]) == json.loads(signed)
    with pytest.raises(BundleError, match=CHANGED):
        check(b'{"cut":9,' + signed[1:], {PUBLIC})


@pytest.mark.parametrize(
    "signature",
    [
        None,
        [],
        "signed",
        {},
        {"key": PUBLIC},
        {"key": PUBLIC.upper(), "value": "00" * 64},
        {"key": PUBLIC, "value": "00" * 63},
        {"key": PUBLIC, "value": 7},
        {"key": "ff" * 32, "value": "ff" * 64},
    ],
)
def test_malformed_signatures(unsigned: bytes, signature: Any) -> None:
    """A signature field is either valid or an error."""
    manifest = canonical_json({**json.loads(unsigned), "signature": signature})
    for trust in (None, {PUBLIC}):
        with pytest.raises(BundleError, match="changed"):
            check(manifest, trust)


def test_a_key_of_small_order(unsigned: bytes) -> None:
    """Zeros are a valid signature of this key for one manifest in four; the key is refused."""
    signature = {"key": "00" * 32, "value": "00" * 64}
    manifest = canonical_json({**json.loads(unsigned), "signature": signature})
    with pytest.raises(BundleError, match=r"changed|trusted is only"):
        check(manifest, {PUBLIC})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_what_is_no_manifest(data: bytes) -> None:
    """Other data are neither signed nor verified."""
    for call in (lambda: check(data), lambda: check(data, {PUBLIC}), lambda: sign(data, KEY)):
        with pytest.raises(BundleError, match="the manifest"):
            call()


def test_a_newer_format_is_not_signed(unsigned: bytes) -> None:
    """This version does not sign a format that it does not know."""
    newer = canonical_json({**json.loads(unsigned), "format": FORMAT + 1})
    with pytest.raises(BundleError, match="update cutlayer"):
        sign(newer, KEY)


def test_additions_of_a_later_minor_version_are_signed(unsigned: bytes) -> None:
    """They stay in the bytes, and a changed one is noticed by a reader that does not know it."""
    later = canonical_json({**json.loads(unsigned), "minor": MINOR + 1, "hints": [1]})
    signed = sign(later, KEY)
    assert json.loads(signed)["hints"] == [1]
    assert check(signed, {PUBLIC}) == PUBLIC
    Manifest.from_bytes(signed)
    with pytest.raises(BundleError, match="changed after it was signed"):
        check(signed.replace(b'"hints":[1]', b'"hints":[2]'), {PUBLIC})


def test_a_signature_is_for_a_bundle_only(unsigned: bytes) -> None:
    """A signature of the same JSON in another context is not valid."""
    value = KEY.sign(unsigned).hex()
    fields = {**json.loads(unsigned), "signature": {"key": PUBLIC, "value": value}}
    with pytest.raises(BundleError, match=CHANGED):
        check(canonical_json(fields))


# --- keys ---------------------------------------------------------------------------------------


def test_key_files(tmp_path: Path) -> None:
    """Only the owner can read the private key, the public key is one line, no file is replaced."""
    public = new_key(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key.pub").read_text() == f"{public}\n"
    assert public_key(read_private_key(tmp_path / "key")) == public
    assert read_public_key(tmp_path / "key.pub") == public
    assert read_public_key(str(tmp_path / "key.pub")) == public
    assert read_public_key(public.upper()) == public
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(ConfigError, match="never overwritten"):
        new_key(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before
    (tmp_path / "key").unlink()
    with pytest.raises(ConfigError, match=r"key\.pub exists"):
        new_key(tmp_path / "key")
    assert not (tmp_path / "key").exists()
    with pytest.raises(ConfigError, match="cannot be written"):
        new_key(tmp_path / "no folder" / "key")


def test_what_is_no_private_key(tmp_path: Path) -> None:
    """Missing files, folders, public keys, other algorithms and passwords are refused."""
    pair(tmp_path / "key", KEY)
    (tmp_path / "text").write_text("hello")
    (tmp_path / "ec").write_bytes(
        ec.generate_private_key(ec.SECP256R1()).private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    (tmp_path / "locked").write_bytes(
        KEY.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    for name, message in {
        "missing": "no key at",
        "key.pub": "is a public key",
        ".": "cannot be read",
        "ec": "no Ed25519 private key",
        "text": "no Ed25519 private key",
        "locked": "protected by a password",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_private_key(tmp_path / name)


def test_what_is_no_public_key(tmp_path: Path) -> None:
    """Missing files, private keys and other contents are refused."""
    pair(tmp_path / "key", KEY)
    (tmp_path / "text").write_text(PUBLIC[:-1])
    for key, message in {
        str(tmp_path / "missing"): "neither a public key",
        PUBLIC[:-1]: "neither a public key",
        str(tmp_path / "key"): r"private key.*use key\.pub",
        str(tmp_path / "text"): "no public key",
        str(tmp_path): "cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_public_key(key)


def test_trust_in_nobody_is_a_mistake(tmp_path: Path) -> None:
    """An empty list of keys is an error; it does not accept every bundle."""
    assert read_trust(None) is None
    assert read_trust([PUBLIC, pair(tmp_path / "k", KEY).with_name("k.pub")]) == {PUBLIC}
    with pytest.raises(ConfigError, match="empty list"):
        read_trust([])


# --- folders ------------------------------------------------------------------------------------


def test_signing_a_folder(folder: Path) -> None:
    """Every tier is signed, unsigned manifests are deleted, and a second time gives equal bytes."""
    before = BundleIndex.read(folder)
    weights = (folder / "model.safetensors").read_bytes()
    index = sign_folder(folder, KEY)
    assert BundleIndex.read(folder) == index
    reports = verify_folder(index, {PUBLIC})
    assert {tier: report.signer for tier, report in reports.items()} == dict.fromkeys(
        before.tiers, PUBLIC
    )
    assert not any(report.faults for report in reports.values())
    for tier, entry in before.tiers.items():
        assert entry.manifest not in before.blobs()
        assert index.tiers[tier].cut == entry.cut
        assert index.manifest(tier).tier == tier
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    sign_folder(folder, KEY)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files
    assert files[folder / "model.safetensors"] == weights


def test_fields_of_others_are_kept(folder: Path) -> None:
    """Unknown fields of the index are kept by signing."""
    raw = json.loads((folder / INDEX).read_text())
    raw["about"] = {"author": "somebody"}
    raw["tiers"]["small"]["rank"] = 4
    (folder / INDEX).write_text(json.dumps(raw))
    sign_folder(folder, KEY)
    after = json.loads((folder / INDEX).read_text())
    assert after["about"] == {"author": "somebody"}
    assert after["tiers"]["small"]["rank"] == 4
    assert after["tiers"]["small"]["manifest"] != raw["tiers"]["small"]["manifest"]
    others = {"about": {"author": "somebody"}, "decay": "matrices"}
    assert BundleIndex.read(folder).extra == others


def test_any_changed_byte_of_a_blob_is_found(folder: Path) -> None:
    """A change of the first, a middle or the last byte of any file is found."""
    index = sign_folder(folder, KEY)
    for blob in sorted((folder / "blobs").iterdir()):
        data = blob.read_bytes()
        for at in (0, len(data) // 2, len(data) - 1):
            blob.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            faults = [fault for r in verify_folder(index).values() for fault in r.faults]
            assert faults
            assert all(blob.name[:12] in fault and "changed" in fault for fault in faults)
        blob.write_bytes(data)
    assert not any(report.faults for report in verify_folder(index).values())


def test_faults_of_a_folder(folder: Path) -> None:
    """A missing blob, a wrong size or a wrong index is found, and the folder is not signed."""
    index = BundleIndex.read(folder)
    blobs = index.blobs()
    raw = json.loads(blobs.read(index.tiers["small"].manifest))
    raw["blobs"][raw["initial_state"]] += 1
    listed = json.loads((folder / INDEX).read_text())
    listed["tiers"]["small"]["manifest"] = blobs.write(canonical_json(raw))
    listed["tiers"]["medium"]["cut"] = 3
    (folder / INDEX).write_text(json.dumps(listed))
    missing = index.manifest("large").graphs["train"].blob
    blobs.remove(missing)
    before = (folder / INDEX).read_bytes(), sorted(path.name for path in blobs.folder.iterdir())
    reports = verify_folder(BundleIndex.read(folder))
    ((small,), (medium,), (large,)) = (
        reports[t].faults for t in ("small", "medium", "large")
    )  # each with one fault
    assert raw["initial_state"][:12] in small
    assert "bytes, the manifest says" in small
    assert medium == "the index says cut 3, the manifest 2; export again"
    assert missing[:12] in large
    assert "missing" in large
    with pytest.raises(BundleError, match="nothing was signed: tier 'small'"):
        sign_folder(folder, KEY)
    assert before == (
        (folder / INDEX).read_bytes(),
        sorted(path.name for path in blobs.folder.iterdir()),
    )


def test_a_signature_does_not_make_a_change_good(folder: Path) -> None:
    """A change to a signed manifest and the index is found, and the folder is not signed again."""
    index = sign_folder(folder, KEY)
    entry = index.tiers["small"]
    blobs = index.blobs()
    changed = blobs.write(blobs.read(entry.manifest).replace(b'"lr"', b'"lR"'))
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(entry.manifest, changed))
    assert CHANGED in verify_folder(BundleIndex.read(folder))["small"].faults[0]
    with pytest.raises(BundleError, match=CHANGED):
        sign_folder(folder, OTHER)


# --- the device ---------------------------------------------------------------------------------


def test_a_device_loads_only_what_it_trusts(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the right key a device joins a real hub; otherwise it downloads no graph."""
    load = edge_sdk.device.load_runtime

    def never(*_: Any) -> Any:
        raise AssertionError("a graph was loaded")

    async def job(trust: list[str | Path] | None, message: str | None, cache: str) -> None:
        config = hub_config(tmp_path, BundleIndex.read(folder))  # type: ignore[arg-type]
        token = TokenFile(config.tokens).issue(f"phone-{cache}-{message}")
        monkeypatch.setattr(edge_sdk.device, "load_runtime", load if message is None else never)
        async with running_hub(config) as (_, url):
            connecting = Device.connect(
                url, token=token, tier="small", cache=tmp_path / cache, trust=trust
            )
            if message is None:
                async with await connecting as device:
                    assert device.manifest.tier == "small"
            else:
                with pytest.raises(BundleError, match=message):
                    await connecting

    mine = pair(tmp_path / "mine", KEY).with_name("mine.pub")
    asyncio.run(job([mine], "not signed", "first"))
    unsigned = BundleIndex.read(folder).tiers["small"].manifest
    assert {path.name for path in (tmp_path / "first").iterdir()} == {unsigned, ".lock"}
    sign_folder(folder, KEY)
    asyncio.run(job([public_key(OTHER)], "signed by .* trusted is only", "second"))
    asyncio.run(job([public_key(OTHER), mine], None, "second"))
    asyncio.run(job(None, None, "second"))
    # Everything is in the cache now, but is not trusted for that reason.
    asyncio.run(job([public_key(OTHER)], "signed by .* trusted is only", "second"))


def test_a_hub_that_changed_a_bundle(tmp_path: Path, folder: Path) -> None:
    """The hashes of the changed manifest are valid, but its signature is not."""
    index = sign_folder(folder, KEY)
    blobs = index.blobs()
    entry = index.tiers["small"]
    changed = blobs.write(blobs.read(entry.manifest).replace(b'"correct"', b'"Correct"'))
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace(entry.manifest, changed))

    async def job() -> None:
        config = hub_config(tmp_path, BundleIndex.read(folder))  # type: ignore[arg-type]
        token = TokenFile(config.tokens).issue("phone")
        async with running_hub(config) as (_, url):
            for trust in (None, [PUBLIC]):
                with pytest.raises(BundleError, match=CHANGED):
                    await Device.connect(
                        url, token=token, tier="small", cache=tmp_path / "cache", trust=trust
                    )
        assert index.manifest("small").initial_state not in BlobStore(tmp_path / "cache")

    asyncio.run(job())


# --- commands -----------------------------------------------------------------------------------


class Commands:
    """Runs ``cutlayer`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: object, code: int = 0) -> str:
        """Return the output; for a user's mistake (code 2), the sentence on stderr."""
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        out, err = self.capsys.readouterr()
        assert ended.value.code == code, out + err
        if code != 2:
            assert err == ""
            return out
        assert err.startswith("cutlayer: ")
        assert len(err.splitlines()) == 1
        return err


@pytest.fixture
def cutlayer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Commands:
    monkeypatch.setenv("COLUMNS", "160")
    return Commands(capsys)


def test_commands(tmp_path: Path, folder: Path, cutlayer: Commands) -> None:
    """A key is created; bundles are signed, verified, shown, damaged, and the damage is found."""
    key = tmp_path / "key"
    public = cutlayer("bundle", "key", key).strip()
    assert public == (tmp_path / "key.pub").read_text().strip()
    assert cutlayer("bundle", "verify", folder).count("nobody") == 3
    out = cutlayer("bundle", "verify", folder, "--trust", f"{key}.pub", code=1)
    assert out.count("the bundle is not signed") == 3

    out = cutlayer("bundle", "sign", folder, "--key", key)
    index = BundleIndex.read(folder)
    for tier, entry in index.tiers.items():
        assert re.search(rf"{tier}.*{entry.manifest[:12]}….*{public[:16]}…", out)
    out = cutlayer("bundle", "verify", folder, "--trust", PUBLIC, "--trust", f"{key}.pub")
    assert out.count("intact") == 3
    reports = json.loads(cutlayer("bundle", "verify", folder, "--json"))
    assert {report["signer"] for report in reports.values()} == {public}
    out = cutlayer("bundle", "verify", folder, "--trust", PUBLIC, code=1)
    assert out.count("trusted is only") == 3

    blob = index.manifest("medium").graphs["train"].blob
    (folder / "blobs" / blob).write_bytes(b"junk")
    out = cutlayer("bundle", "verify", folder, code=1)
    assert out.count("intact") == 2
    assert f"medium: blob {blob[:12]}… has sha256" in out
    reports = json.loads(cutlayer("bundle", "verify", folder, "--json", code=1))
    assert [len(report["faults"]) for report in reports.values()] == [0, 1, 0]


def test_show(folder: Path, cutlayer: Commands) -> None:
    """The output is text for people, or complete JSON."""
    sign_folder(folder, KEY)
    out = cutlayer("bundle", "show", folder)
    for text in ("small", "medium", "large", f"signed by {PUBLIC[:16]}…", "cut 2", "fp16"):
        assert text in out
    out = cutlayer("bundle", "show", folder, "small")
    assert "medium" not in out
    for text in ("onnx", "batch × 1 × 8 × 8", "float32", "h.scale", "hyper", "initial state"):
        assert text in out
    index = BundleIndex.read(folder)
    manifest = index.manifest("small")
    shown = json.loads(cutlayer("bundle", "show", folder, "--json"))["tiers"]
    assert list(shown) == list(index.tiers)
    assert shown["small"]["signer"] == PUBLIC
    assert shown["small"]["identity"] == index.tiers["small"].manifest
    assert shown["small"]["parameters"] == sum(
        entry.spec.nbytes() // 4 for entry in manifest.state if entry.kind == "parameter"
    )
    assert {n: b["size"] for n, b in shown["small"]["blobs"].items()} == manifest.blobs
    ports = shown["small"]["graphs"]["train"]["inputs"]
    assert {"spec": {"name": "y", "dtype": "int64", "shape": ["batch"]}, "role": "batch"} in ports


def test_a_blob_of_two_tiers_is_shown_as_such(folder: Path, cutlayer: Commands) -> None:
    """Bundles that share a file name each other."""
    raw = json.loads((folder / INDEX).read_text())
    blobs = BlobStore(folder / "blobs")
    twin = json.loads(blobs.read(raw["tiers"]["small"]["manifest"]))
    twin["tier"] = "twin"
    entry = {**raw["tiers"]["small"], "manifest": blobs.write(canonical_json(twin))}
    raw["tiers"]["twin"] = entry
    (folder / INDEX).write_text(json.dumps(raw))
    shown = json.loads(cutlayer("bundle", "show", folder, "--json"))["tiers"]
    assert shown["twin"]["blobs"][twin["initial_state"]]["shared_with"] == ["small"]
    assert shown["small"]["blobs"][twin["initial_state"]]["shared_with"] == ["twin"]
    assert "initial state" in shown["small"]["blobs"][twin["initial_state"]]["holds"]


def test_mistakes_are_one_sentence(tmp_path: Path, folder: Path, cutlayer: Commands) -> None:
    """The exit code is 2, and nothing was done."""
    key = pair(tmp_path / "key", KEY)
    nowhere = tmp_path / "nowhere"
    cases: list[tuple[list[object], str]] = [
        (["key", key], "never overwritten"),
        (["sign", nowhere, "--key", key], "no bundles in"),
        (["sign", folder, "--key", nowhere], "no key at"),
        (["sign", folder, "--key", f"{key}.pub"], "is a public key"),
        (["verify", nowhere], "no bundles in"),
        (["verify", key], "no bundles in"),
        (["verify", folder, "--trust", key], "use key.pub"),
        (["verify", folder, "--trust", "abc"], "neither a public key"),
        (["show", nowhere], "no bundles in"),
        (["show", folder, "huge"], "has no tier 'huge'; it has small, medium, large"),
    ]
    for arguments, message in cases:
        assert message in cutlayer("bundle", *arguments, code=2)
    join = [
        "device",
        "--url",
        "ws://127.0.0.1:1",
        "--token",
        "t",
        "--data",
        str(tmp_path / "x.npz"),
    ]
    import numpy as np

    np.savez(tmp_path / "x.npz", x=np.zeros((2, 1, 8, 8), np.float32), y=np.zeros(2, np.int64))
    assert "neither a public key" in cutlayer(*join, "--trust", "abc", code=2)
    config = tmp_path / "device.toml"
    for text, message in (
        ("trust = []", "empty list"),
        ('trust = "abc"', "trust must be a list"),
        ("trust = [3]", "trust[0] is 3"),
    ):
        config.write_text(text)
        assert message in cutlayer(*join, "--config", config, code=2)
