"""What people bring: names, paths, and texts that other systems and editors have written."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_sdk.bundle import signing
from edge_sdk.bundle.index import BundleIndex
from edge_sdk.errors import ConfigError
from server_hub.gateway.tokens import TokenFile
from tests.lib.commands import expect_refusal, output, refusal
from tests.lib.harness import examples, save_npz

UNSHOWN = ["", "x" * 129, " a", "a ", "a\tb", "a\nb", "a\x1b[31mb", "a\u2028b", "a\x7f"]
"""Names that cannot be shown in a line, or be sent."""

NOT_FOR_FILES = [
    *UNSHOWN, "CON", "con", "Aux.txt", "nul.tar.gz", "COM1", "lpt9.log", "COM¹",
    "a.", "...", ".", "..", ".hidden",
    *(f"a{c}b" for c in '<>:"/\\|?*'), "../up", "C:", "\\\\host\\share",
]  # fmt: skip
"""Names that cannot be part of the name of a file on every system."""

ANYWHERE = [
    "small",
    "phone-2",
    "v1.2",
    "Größe",
    "カメラ",
    "a b",
    "console",
    "com10",
    "auxiliary",
    "[x]",
]
"""Names that are all right."""


def tiers_toml(folder: Path, *names: str) -> Path:
    """A ``tiers.toml`` with tiers of these names."""
    lines = ["classes = 10", "input_shape = [1, 8, 8]"]
    lines += [f"[tiers.{json.dumps(name)}]\ncut = 1" for name in names]
    path = folder / "tiers.toml"
    path.write_text("\n".join(lines).replace("\x7f", "\\u007f"), "utf-8")
    return path


@pytest.mark.parametrize("name", NOT_FOR_FILES)
def test_names_of_tiers_that_cannot_be_files_are_refused(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """By the exporter, and by whoever reads bundles that another program has written."""
    tiers, out = tiers_toml(tmp_path, name), tmp_path / "out"
    expect_refusal(
        capsys, ["export", "no.module:f", "--tiers", str(tiers), "--out", str(out)], "tier name"
    )
    raw = json.loads((bundles.folder / "index.json").read_text())
    raw["tiers"] = {name: raw["tiers"]["small"]}
    (tmp_path / "index.json").write_text(json.dumps(raw))
    expect_refusal(capsys, ["bundle", "show", str(tmp_path)], "index.json", "tier name")


@pytest.mark.parametrize("name", ANYWHERE)
def test_other_names_of_tiers_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    tiers, out = tiers_toml(tmp_path, name), tmp_path / "out"
    expect_refusal(
        capsys, ["export", "no.module:f", "--tiers", str(tiers), "--out", str(out)], "no.module"
    )


def test_names_that_differ_in_case_only_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers, out = tiers_toml(tmp_path, "Phone", "phone"), tmp_path / "out"
    expect_refusal(
        capsys,
        ["export", "no.module:f", "--tiers", str(tiers), "--out", str(out)],
        "'Phone' and 'phone' differ only in upper and lower case",
    )


@pytest.mark.parametrize("name", [*UNSHOWN, os.fsdecode(b"\xff")])
def test_names_of_devices_that_cannot_be_shown_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """No token is written; nor is one taken from a file that somebody has edited."""
    path = tmp_path / "tokens.toml"
    expect_refusal(capsys, ["token", "new", "--tokens", str(path), "--", name], "device name")
    assert not path.exists()
    if name.isascii():
        path.write_text(f"[devices]\n{json.dumps(name)} = 'sha256:0'\n".replace("\x7f", "\\u007f"))
        expect_refusal(capsys, ["token", "revoke", "x", "--tokens", str(path)], "device name")


@pytest.mark.parametrize("name", [*ANYWHERE, "CON", "a/b", "a:b", "📱"])
def test_devices_may_be_called_what_is_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """No file is named after a device."""
    path = tmp_path / "tokens.toml"
    token = output(capsys, "token", "new", name, "--tokens", str(path)).strip()
    assert TokenFile(path).device_of(token) == name
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokens.toml"]


# --- texts --------------------------------------------------------------------------------------

Rewrite = Callable[[str], bytes]

EDITORS: dict[str, Rewrite] = {
    "a byte-order mark": lambda text: text.encode("utf-8-sig"),
    "ends of lines of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "both": lambda text: text.replace("\n", "\r\n").encode("utf-8-sig"),
    "UTF-16 of PowerShell": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
    "UTF-16, big-endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.fixture(params=EDITORS)
def edited(request: pytest.FixtureRequest) -> Rewrite:
    """How an editor writes a text."""
    return EDITORS[request.param]


def test_texts_of_all_editors_are_read(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str], edited: Rewrite
) -> None:
    """Tokens, configurations, tiers and the index of bundles."""
    folder, tokens, toml = tmp_path / "b", tmp_path / "tokens.toml", tmp_path / "device.toml"
    folder.mkdir()
    (folder / "blobs").symlink_to(bundles.folder / "blobs")
    (folder / "index.json").write_bytes(edited((bundles.folder / "index.json").read_text()))
    assert output(capsys, "bundle", "show", str(folder), "small").startswith("small")
    TokenFile(tokens).issue("Größe")
    tokens.write_bytes(edited(tokens.read_text("utf-8")))
    assert "can no longer" in output(capsys, "token", "revoke", "Größe", "--tokens", str(tokens))
    data = save_npz(tmp_path / "d.npz", examples(4))
    toml.write_bytes(edited(f'url = "ws://127.0.0.1:1"\ndata = "{data}"\npatience_s = 0.1\n'))
    given = ["device", "--config", str(toml), "--token", "t"]
    expect_refusal(capsys, given, "cannot connect to ws://127.0.0.1:1", code=1)
    tiers = tiers_toml(tmp_path, "small")
    tiers.write_bytes(edited(tiers.read_text()))
    out = str(tmp_path / "out")
    expect_refusal(
        capsys, ["export", "no.module:f", "--tiers", str(tiers), "--out", out], "no.module"
    )


@pytest.mark.parametrize("name", ["a byte-order mark", "ends of lines of Windows", "both"])
def test_keys_are_read_as_editors_leave_them(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A private key signs, and a public one is trusted."""
    edited, key, folder = EDITORS[name], tmp_path / "key", tmp_path / "b"
    signing.new_key(key)
    for path in (key, tmp_path / "key.pub"):
        path.write_bytes(edited(path.read_text()))
    shutil.copytree(bundles.folder, folder)
    output(capsys, "bundle", "sign", str(folder), "--key", str(key))
    output(capsys, "bundle", "verify", str(folder), "--trust", f"{key}.pub")


@pytest.mark.parametrize("data", ["größe = 1".encode("latin-1"), b"\x00\xff\xfe", b"\xff\xfea"])
def test_what_is_no_text_is_said_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    path = tmp_path / "hub.toml"
    path.write_bytes(data)
    expect_refusal(capsys, ["hub", "--config", str(path)], "hub.toml", "save it as UTF-8")
    (tmp_path / "index.json").write_bytes(data)
    expect_refusal(capsys, ["bundle", "show", str(tmp_path)], "index.json")


def test_a_token_from_a_file_may_end_its_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whitespace around it is no part of it: an empty one is still missing."""
    data = str(save_npz(tmp_path / "d.npz", examples(4)))
    given = ["device", "--url", "ws://127.0.0.1:1", "--data", data, "--patience-s", "0.1"]
    monkeypatch.setenv("CUTLAYER_TOKEN", " \r\n")
    expect_refusal(capsys, given, "token is empty")
    monkeypatch.setenv("CUTLAYER_TOKEN", "t\r\n")
    expect_refusal(capsys, given, "cannot connect", code=1)


# --- paths --------------------------------------------------------------------------------------

FOLDERS = ["with [red] %s {0} quote'and\"", "Größe カメラ", os.fsdecode(b"not-utf8-\xff")]


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_may_have_any_name(
    tmp_path: Path, bundles: BundleIndex, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Bundles are shown, signed and measured in a process of its own; errors name the folder."""
    folder = tmp_path / name
    shutil.copytree(bundles.folder, folder / "b")
    key, tokens = folder / "key", folder / "tokens.toml"
    output(capsys, "bundle", "key", str(key))
    output(capsys, "bundle", "sign", str(folder / "b"), "--key", str(key))
    output(capsys, "bundle", "measure", str(folder / "b"), "small", "--steps", "1", "--json")
    output(capsys, "token", "new", "phone", "--tokens", str(tokens))
    line = refusal(capsys, "bundle", "show", str(folder / "none"))
    assert name.replace("\udcff", "") in line
    assert "no bundles" in line


def test_the_home_folder_stands_for_a_tilde(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the command line as in TOML, wherever the shell does not see it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    output(capsys, "token", "new", "phone", "--tokens=~/tokens.toml")
    output(capsys, "token", "new", "phone", "--tokens", "~/tokens.toml")
    output(capsys, "bundle", "key", "~/key")
    assert {path.name for path in tmp_path.iterdir()} == {"tokens.toml", "key", "key.pub"}
    save_npz(tmp_path / "d.npz", examples(4))
    toml = tmp_path / "device.toml"
    toml.write_text(
        'url = "ws://127.0.0.1:1"\ntoken = "t"\npatience_s = 0.1\n'
        'data = "~/d.npz"\ntrust = ["~/key.pub"]\n'
    )
    expect_refusal(capsys, ["device", "--config", "~/device.toml"], "cannot connect", code=1)


def test_a_tilde_without_a_home_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", nowhere)
    toml = tmp_path / "device.toml"
    toml.write_text('url = "ws://127.0.0.1:1"\ntoken = "t"\ndata = "~/d.npz"\n')
    expect_refusal(capsys, ["device", "--config", str(toml)], "~/d.npz", "home folder", "HOME")


def test_links_and_loops(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder where a file belongs, a file where a folder belongs, a link to itself."""
    loop, file = tmp_path / "loop", tmp_path / "file"
    loop.symlink_to(loop)
    file.write_text("")
    for bad in (loop, tmp_path, file):
        below = str(bad / "x")
        expect_refusal(capsys, ["hub", "--config", str(bad)], code=2)
        for given in (["token", "new", "a", "--tokens"], ["bundle", "key"]):
            if bad != tmp_path:
                line = refusal(capsys, *given, below, code=1 if given[0] == "token" else 2)
                assert str(bad) in line


def test_names_are_checked_where_bundles_are_written(tmp_path: Path) -> None:
    """A program that exports gets the same error."""
    from export.bundles.writer import Tier, export_bundles
    from tests.lib.models import CLASSES, IMAGE, build, example

    with pytest.raises(ConfigError, match="tier name 'a/b'"):
        export_bundles(
            build(), {"a/b": Tier(1)}, tmp_path / "out", example=example(IMAGE), classes=CLASSES
        )
    assert not list(tmp_path.iterdir())


def test_a_text_to_train_on_is_the_same_from_every_editor(tmp_path: Path) -> None:
    """Marks and ends of lines are no part of its paragraphs."""
    from server_hub.simulation.formats import read_text

    path = tmp_path / "text.txt"
    for name in ("a byte-order mark", "ends of lines of Windows", "both"):
        path.write_bytes(EDITORS[name]("Größe\n\nzwei\n"))
        assert read_text(path) == ["Größe".encode(), b"zwei"]
