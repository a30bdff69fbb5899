"""Signed bundles: an Ed25519 signature in the manifest, which names every blob by its sha256.

What is signed is :data:`CONTEXT` and the canonical JSON of the manifest without its field
``signature``. A signature covers the whole bundle, since the manifest does. Ed25519 (RFC 8032)
is deterministic: the same export signed with the same key gives the same bytes.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from edge_sdk.bundle.index import BundleIndex, TierEntry
from edge_sdk.bundle.manifest import Manifest, canonical_json
from edge_sdk.bundle.store import BlobStore
from edge_sdk.errors import BundleError, ConfigError
from edge_sdk.files import expanded, why

CONTEXT = b"cutlayer bundle\n"
"""Prefix of the signed bytes, so that the signature is valid for nothing but a bundle."""

PrivateKey = Ed25519PrivateKey

_PUBLIC = re.compile(r"[0-9a-f]{64}")
_VALUE = re.compile(r"[0-9a-f]{128}")


# --- keys ---------------------------------------------------------------------------------------


def new_key(path: Path) -> str:
    """Make a key pair: ``path`` is the private key, readable by its owner only, ``path.pub`` the
    public one.

    Returns:
        The public key, 64 hexadecimal digits.

    Raises:
        ConfigError: ``path`` names no file, one of the files exists, or cannot be written.
    """
    if not path.name:
        raise ConfigError("the key needs a file name")
    key = PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    public = path.with_name(f"{path.name}.pub")
    pair = ((path, private, 0o600), (public, f"{public_key(key)}\n".encode(), 0o666))
    made: list[Path] = []
    try:
        for file, _, _ in pair:
            if os.path.lexists(file):
                raise ConfigError(f"{file} exists, and a key is never overwritten; name another")
        for file, data, mode in pair:
            with open(file, "xb", opener=functools.partial(os.open, mode=mode)) as stream:
                made.append(file)
                stream.write(data)
    except OSError as error:
        for file in made:  # half of a pair is of no use
            file.unlink(missing_ok=True)
        raise ConfigError(f"the key {path} cannot be written: {why(error)}") from error
    return public_key(key)


def public_key(key: PrivateKey) -> str:
    """The public half of a key, 64 hexadecimal digits."""
    return key.public_key().public_bytes_raw().hex()


def read_private_key(path: Path) -> PrivateKey:
    """Read a private key (PEM, PKCS 8), as :func:`new_key` writes it.

    Raises:
        ConfigError: there is none, or it is not an Ed25519 private key without a password.
    """
    data = _read_key_file(path)
    if _PUBLIC.fullmatch(data.strip().decode("latin-1")):
        raise ConfigError(f"{path} is a public key; signing needs the private one")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except TypeError:
        raise ConfigError(f"{path} is protected by a password; use a key without") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, PrivateKey):
        raise ConfigError(
            f"{path} is no Ed25519 private key (PEM, PKCS 8); make one with cutlayer bundle key"
        )
    return key


def read_public_key(key: str | Path) -> str:
    """A public key, from its 64 hexadecimal digits or from the file that holds them.

    Raises:
        ConfigError: it is neither, or the file holds something else.
    """
    if isinstance(key, str) and _PUBLIC.fullmatch(key.lower()):
        return key.lower()
    path = expanded(key)
    if not path.exists():
        raise ConfigError(f"{str(key)!r} is neither a public key (64 hex digits) nor a file")
    data = _read_key_file(path)
    if b"PRIVATE KEY" in data:
        raise ConfigError(f"{path} is a private key, to be kept where it is; use {path.name}.pub")
    text = data.strip().decode("latin-1").lower()
    if not _PUBLIC.fullmatch(text):
        raise ConfigError(f"{path} is no public key: one line of 64 hex digits")
    return text


def read_trust(keys: Iterable[str | Path] | None) -> frozenset[str] | None:
    """The public keys to trust; None demands no signature and stays None.

    Raises:
        ConfigError: something that is no public key, or no key at all: nothing would be trusted.
    """
    if keys is None:
        return None
    trust = frozenset(read_public_key(key) for key in keys)
    if not trust:
        raise ConfigError("the keys to trust are an empty list; name one, or leave the list out")
    return trust


def shortened(key: str) -> str:
    """A public key, short enough for a sentence."""
    return f"{key[:16]}…"


def _read_key_file(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(codecs.BOM_UTF8)  # which some editors put there
    except FileNotFoundError:
        raise ConfigError(f"no key at {path}; make one with cutlayer bundle key") from None
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read: {why(error)}") from error


# --- manifests ----------------------------------------------------------------------------------


def sign(manifest: bytes, key: PrivateKey) -> bytes:
    """The manifest with a signature by ``key``, in place of an earlier one.

    Raises:
        BundleError: it is no manifest of this format.
    """
    Manifest.from_bytes(manifest)
    fields, _ = _parse(manifest)
    fields.pop("signature", None)
    value = key.sign(CONTEXT + canonical_json(fields)).hex()
    return canonical_json({**fields, "signature": {"key": public_key(key), "value": value}})


def check(manifest: bytes, trust: Collection[str] | None = None) -> str | None:
    """Check the signature of a manifest, before anything that it names is used.

    Args:
        manifest: its bytes as they came.
        trust: public keys, one of which must have signed it. None accepts any key and unsigned
            manifests, but a signature must be valid if there is one.

    Returns:
        The public key of the signer; None if the bundle is not signed.

    Raises:
        BundleError: it is not signed, not by a key in ``trust``, or was changed after signing.
    """
    fields, canonical = _parse(manifest)
    if "signature" not in fields:
        if trust is not None:
            raise BundleError(
                "the bundle is not signed, and only bundles signed by "
                f"{_listed(trust)} are trusted; sign it with cutlayer bundle sign"
            )
        return None
    signature = fields.pop("signature")
    key, value = _hex(signature, "key", _PUBLIC), _hex(signature, "value", _VALUE)
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(value, CONTEXT + canonical_json(fields))
        intact = canonical == manifest  # else it could name a field twice, the first one unsigned
    except InvalidSignature:
        intact = False
    if not intact:
        raise BundleError(
            "the signature does not match the manifest: the bundle was changed after it was "
            "signed; get it from its origin again"
        )
    if trust is not None and key.hex() not in trust:
        raise BundleError(
            f"the bundle is signed by {shortened(key.hex())}, trusted is only {_listed(trust)}; "
            "trust that key too, or have the bundle signed by one that is trusted"
        )
    return key.hex()


def _parse(manifest: bytes) -> tuple[dict[str, Any], bytes]:
    """The fields of a manifest, and its bytes as they must be for a signature to hold."""
    try:
        fields = json.loads(manifest)
        canonical = canonical_json(fields)
    except (ValueError, RecursionError) as error:
        raise BundleError("the manifest is not JSON; export the bundle again") from error
    if not isinstance(fields, dict):
        raise BundleError("the manifest is no JSON object; export the bundle again")
    return fields, canonical


def _hex(signature: Any, name: str, form: re.Pattern[str]) -> bytes:
    text = signature.get(name) if isinstance(signature, dict) else None
    if not isinstance(text, str) or not form.fullmatch(text):
        raise BundleError(f"the signature's {name} is malformed: the manifest was changed")
    return bytes.fromhex(text)


def _listed(trust: Collection[str]) -> str:
    return " or ".join(shortened(key) for key in sorted(trust))


# --- folders ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TierReport:
    """Result of reading all of a tier's bundle.

    Attributes:
        manifest: the identity of the bundle.
        blobs: number of its blobs, the manifest aside.
        size: bytes of its blobs, as the manifest says.
        signer: public key of the signer; None if it is not signed or the signature is refused.
        faults: what is wrong with it, a sentence each; empty if nothing is wrong.
    """

    manifest: str
    blobs: int
    size: int
    signer: str | None
    faults: tuple[str, ...]


def verify_folder(
    index: BundleIndex, trust: Collection[str] | None = None
) -> dict[str, TierReport]:
    """Read all bundles of a folder and report what is wrong with them, by tier.

    Args:
        index: the folder's index.
        trust: public keys, as for :func:`check`.
    """
    blobs = index.blobs()

    @functools.cache  # tiers share blobs
    def fault(name: str, size: int) -> str | None:
        try:
            found = len(blobs.read(name))
        except BundleError as error:
            return str(error)
        if found != size:
            return f"blob {name[:12]}… has {found} bytes, the manifest says {size}; export again"
        return None

    def report(tier: str, entry: TierEntry) -> TierReport:
        try:
            data = blobs.read(entry.manifest)
            manifest = Manifest.from_bytes(data)
        except BundleError as error:
            return TierReport(entry.manifest, 0, 0, None, (str(error),))
        signer, faults = None, []
        try:
            signer = check(data, trust)
        except BundleError as error:
            faults.append(str(error))
        for name, said, found in (
            ("tier", tier, manifest.tier),
            ("cut", entry.cut, manifest.cut),
            ("codec", entry.codec, manifest.codec),
        ):
            if said != found:
                faults.append(f"the index says {name} {said}, the manifest {found}; export again")
        faults += filter(None, (fault(*blob) for blob in manifest.blobs.items()))
        size = sum(manifest.blobs.values())
        return TierReport(entry.manifest, len(manifest.blobs), size, signer, tuple(faults))

    return {tier: report(tier, entry) for tier, entry in index.tiers.items()}


def sign_folder(folder: Path, key: PrivateKey) -> BundleIndex:
    """Sign the bundles of all tiers in a folder, in place of earlier signatures.

    The new manifests are written first, then the index, and only then the manifests that no tier
    uses any more are removed: the index never names one that is not there.

    Returns:
        The new index.

    Raises:
        BundleError: there are no bundles, or something is wrong with one; nothing is signed.
    """
    index = BundleIndex.read(folder)
    for tier, report in verify_folder(index).items():
        if report.faults:
            raise BundleError(f"nothing was signed: tier {tier!r} is faulty: {report.faults[0]}")
    blobs = index.blobs()
    signed = {tier: _signed(entry, blobs, key) for tier, entry in index.tiers.items()}
    updated = replace(index, tiers=signed)
    updated.write()
    used = {entry.manifest for entry in signed.values()}
    for entry in index.tiers.values():
        if entry.manifest not in used:
            blobs.remove(entry.manifest)
    return updated


def _signed(entry: TierEntry, blobs: BlobStore, key: PrivateKey) -> TierEntry:
    return replace(entry, manifest=blobs.write(sign(blobs.read(entry.manifest), key)))
