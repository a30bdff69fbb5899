"""The references for other clients: the vectors in ``tests/vectors`` and ``docs/protocol.md``."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from typing import Any

import pytest

from edge_sdk.errors import HubError, ProtocolError
from edge_sdk.protocol.enums import CloseCode, ErrorCode
from edge_sdk.protocol.frames import DEFAULT_MAX_FRAME, decode, encode, pack_tensors, unpack_tensors
from edge_sdk.protocol.messages import MESSAGES, SUBPROTOCOL, VERSION, Error, Message
from tests.lib.specification import ROOT, SPECIFICATION, rows, section

FOLDER = ROOT / "tests" / "vectors"
VECTORS: dict[str, Any] = json.loads((FOLDER / "vectors.json").read_text("utf-8"))
make = runpy.run_path(str(FOLDER / "make.py"))


def named(kind: str) -> list[Any]:
    """Return the vectors of a kind, as test parameters."""
    return [pytest.param(vector, id=vector["name"]) for vector in VECTORS[kind]]


def test_the_file_is_up_to_date() -> None:
    written = (FOLDER / "vectors.json").read_text("utf-8")
    assert make["text"]() == written, "run python tests/vectors/make.py"


def test_every_message_and_every_code_of_a_decoder_has_a_vector() -> None:
    assert VECTORS["protocol"] == VERSION
    assert {vector["meaning"]["type"] for vector in VECTORS["valid"]} == set(MESSAGES)
    codes = {vector["error"] for vector in VECTORS["invalid"]}
    assert codes == {"bad_frame", "frame_too_big", "unknown_type", "bad_message", "bad_tensor"}
    for kind in ("valid", "accepted", "state", "invalid"):
        names = [vector["name"] for vector in VECTORS[kind]]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("vector", named("valid"))
def test_valid(vector: dict[str, Any]) -> None:
    data, agreed = bytes.fromhex(vector["hex"]), vector.get("extensions", [])
    assert make["meaning_of"](decode(data, agreed=agreed)) == vector["meaning"]
    frame = make["frame_of"](vector["meaning"])
    assert encode(frame.message, frame.seq, frame.ack, agreed) == data
    for missing in agreed:
        with pytest.raises(ProtocolError):
            decode(data, agreed=[name for name in agreed if name != missing])


@pytest.mark.parametrize("vector", named("accepted"))
def test_accepted(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    frame = decode(data)
    assert make["meaning_of"](frame) == vector["meaning"]
    assert encode(frame.message, frame.seq, frame.ack) != data, "this belongs to the valid ones"


@pytest.mark.parametrize("vector", named("state"))
def test_state(vector: dict[str, Any]) -> None:
    data = bytes.fromhex(vector["hex"])
    assert make["plain"](unpack_tensors(data)) == vector["meaning"]
    assert pack_tensors(make["value_of"](vector["meaning"])) == data


@pytest.mark.parametrize("vector", named("invalid"))
def test_invalid(vector: dict[str, Any]) -> None:
    data = vector["text"] if "text" in vector else bytes.fromhex(vector["hex"])
    with pytest.raises(ProtocolError) as caught:
        decode(data, vector.get("max_frame", DEFAULT_MAX_FRAME))
    assert caught.value.code == vector["error"]


# --- the specification --------------------------------------------------------------------------


@pytest.mark.parametrize("message", MESSAGES.values(), ids=MESSAGES)
def test_every_field_is_specified(message: type[Message]) -> None:
    table = rows(section(message.TYPE))
    fields = dataclasses.fields(message)  # type: ignore[arg-type]
    assert [row[0] for row in table] == [f"`{field.name}`" for field in fields]
    for (name, kind, meaning), field in zip(table, fields, strict=True):
        assert ("optional" in kind) == (field.default is not dataclasses.MISSING), name
        assert meaning


def test_every_message_is_specified_as_reliable_or_not() -> None:
    table = {re.findall(r"`(.+?)`", row[0])[0]: row[2] for row in rows(section("Messages"))}
    assert table == {name: "yes" if cls.RELIABLE else "no" for name, cls in MESSAGES.items()}


def test_every_error_code_is_specified() -> None:
    """The table has all codes in the enum's order, the fatal ones marked; all codes are used."""
    table = {code.strip("`"): fatal for code, _, fatal, _ in rows(section("Errors"))}
    assert list(table.items()) == [(c.value, "yes" if c.is_fatal else "no") for c in ErrorCode]
    text = "".join(
        file.read_text("utf-8")
        for folder in ("edge_sdk", "server_hub")
        for file in (ROOT / folder).rglob("*.py")
    )
    for code in ErrorCode:
        assert re.search(rf"(Error|Gap|Resume)\(\s*(code=)?ErrorCode\.{code.name}\b", text), code


def test_a_code_that_is_not_known_stays_text() -> None:
    """A newer peer may send an unknown code."""
    frame = encode(Error(code="too_new", message="m", fatal=True), 0, 0)
    message = decode(frame).message
    assert isinstance(message, Error)
    assert HubError(message.code, message.message).code == "too_new"
    assert HubError("busy", "m").code is ErrorCode.BUSY


def test_the_close_codes_are_specified() -> None:
    found = {int(code) for code in re.findall(r"code (\d{4})", section("Transport"))}
    assert found == set(CloseCode)


def test_the_specification_is_of_this_version() -> None:
    assert f"# The Cutlayer protocol, version {VERSION}" in SPECIFICATION
    assert f"`{SUBPROTOCOL}`" in SPECIFICATION
    assert f"{DEFAULT_MAX_FRAME} bytes" in section("Limits")


def test_the_tensor_that_is_spelled_out() -> None:
    line = next(line for line in section("Tensors").splitlines() if line.startswith("c7"))
    spelled = b"\x81\xa1a" + bytes.fromhex(line)
    assert unpack_tensors(spelled)["a"].tolist() == [[1, 2], [3, 4]]
