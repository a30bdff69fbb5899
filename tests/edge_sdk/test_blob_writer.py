"""Blobs that are written in pieces appear whole, under the name of their content, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_sdk.bundle.store import BlobStore


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


def test_pieces_are_the_blob_of_their_bytes(store: BlobStore) -> None:
    with store.writing() as blob:
        blob.write(b"first, ")
        blob.write(memoryview(b"second"))
        assert list(store.folder.glob("[!.]*")) == []
    assert blob.size == 13
    assert store.read(blob.name) == b"first, second"
    assert blob.name == store.write(b"first, second")
    assert [path.name for path in store.folder.iterdir()] == [blob.name]


def test_a_blob_without_bytes(store: BlobStore) -> None:
    with store.writing() as blob:
        pass
    assert store.read(blob.name) == b""
    assert blob.name == store.write(b"")


def test_nothing_is_left_of_a_blob_that_fails(store: BlobStore) -> None:
    with pytest.raises(RuntimeError, match="halfway"):
        _write_halfway(store, RuntimeError("halfway"))
    assert list(store.folder.iterdir()) == []


def test_a_blob_that_is_there_already_stays(store: BlobStore) -> None:
    name = store.write(b"the same")
    before = (store.folder / name).stat().st_ino
    with store.writing() as blob:
        blob.write(b"the same")
    assert blob.name == name
    assert (store.folder / name).stat().st_ino == before
    assert len(list(store.folder.iterdir())) == 1


def test_a_full_disk_names_the_folder(store: BlobStore) -> None:
    with pytest.raises(OSError, match="No space left") as raised:
        _write_halfway(store, OSError(28, "No space left on device"))
    assert raised.value.filename == str(store.folder)
    assert list(store.folder.iterdir()) == []


def _write_halfway(store: BlobStore, error: Exception) -> None:
    with store.writing() as blob:
        blob.write(b"some")
        raise error
