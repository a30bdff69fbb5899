"""The token file, and configuration files, whose errors name file and key."""

from __future__ import annotations

import hashlib
import re
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_sdk.config import build, load, read_toml
from edge_sdk.errors import ConfigError
from server_hub.config import HubConfig
from server_hub.gateway.tokens import TokenFile

# --- tokens ---------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path: Path) -> TokenFile:
    """A token file that does not exist yet."""
    return TokenFile(tmp_path / "hub" / "tokens.toml")


def allows(tokens: TokenFile, device: str, token: str) -> bool:
    return tokens.device_of(token) == device


def test_a_token_may_be_for_a_tier(tokens: TokenFile) -> None:
    ada = tokens.issue("ada", "small")
    tokens.issue("bo")
    assert (tokens.tier_of("ada"), tokens.tier_of("bo")) == ("small", None)
    assert tokens.device_of(ada) == "ada"
    tokens.issue("ada", "large")
    assert tokens.tier_of("ada") == "large"
    tokens.revoke("ada")
    assert tokens.tier_of("ada") is None
    assert list(tokens.read()) == ["bo"]
    tokens.path.write_text(tokens.path.read_text() + "[tiers]\nbo = 3\n")
    with pytest.raises(ConfigError, match=r"\[tiers\]"):
        TokenFile(tokens.path).tier_of("bo")


def test_a_token_may_only_download(tokens: TokenFile) -> None:
    """Until it is revoked, or another one is issued in its place."""
    ada = tokens.issue("ada", "small", download_only=True)
    tokens.issue("bo")
    assert tokens.is_download_only("ada")
    assert not tokens.is_download_only("bo")
    assert (tokens.device_of(ada), tokens.tier_of("ada")) == ("ada", "small")
    cy = tokens.issue('c"y', download_only=True)
    assert TokenFile(tokens.path).is_download_only('c"y')
    tokens.issue('c"y')
    assert not tokens.is_download_only('c"y')
    assert tokens.device_of(cy) is None
    tokens.revoke("ada")
    assert not tokens.is_download_only("ada")
    content = tokens.path.read_text()
    for wrong in ('"bo"', '["nobody"]', "[3]"):
        tokens.path.write_text(f"download_only = {wrong}\n{content}")
        with pytest.raises(ConfigError, match="download_only"):
            TokenFile(tokens.path).is_download_only("bo")


def test_a_file_that_breaks_leaves_the_tokens_that_were_read_last(
    tokens: TokenFile, caplog: pytest.LogCaptureFixture
) -> None:
    ada = tokens.issue("ada")
    assert tokens.device_of(ada) == "ada"
    good = tokens.path.read_text()
    for broken in ("[devices", None):
        caplog.clear()
        if broken is None:
            tokens.path.unlink()
        else:
            tokens.path.write_text(broken)
        assert [tokens.device_of(ada) for _ in range(3)] == ["ada"] * 3
        assert len(caplog.records) <= 1, "the file is not read, and nothing said, per hello"
    assert "stays valid" in caplog.text or not caplog.records
    tokens.path.write_text(good.replace("ada", "bo"))
    assert tokens.device_of(ada) == "bo"


def test_the_file_is_read_once_however_many_say_hello(
    tokens: TokenFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = tokens.issue("ada")
    lines = tokens.path.read_text() + "".join(
        f'device-{i} = "sha256:{i:064x}"\n' for i in range(10_000)
    )
    tokens.path.write_text(lines)
    reads: list[Path] = []

    def counted(path: Path) -> dict[str, Any]:
        reads.append(path)
        return read_toml(path)

    monkeypatch.setattr("server_hub.gateway.tokens.read_toml", counted)
    for _ in range(1000):
        assert tokens.device_of(ada) == "ada"
        assert tokens.device_of("guess") is None
        assert tokens.tier_of("ada") is None
    assert reads == [tokens.path]


def test_tokens_that_are_issued_at_once_are_all_kept(tokens: TokenFile) -> None:
    def issue(number: int) -> str:
        return TokenFile(tokens.path).issue(f"device-{number}")

    with ThreadPoolExecutor(8) as pool:
        issued = list(pool.map(issue, range(16)))
    assert [tokens.device_of(token) for token in issued] == [f"device-{i}" for i in range(16)]


def test_a_token_lets_its_device_in_and_no_other(tokens: TokenFile) -> None:
    ada, bo = tokens.issue("ada"), tokens.issue("bo")
    assert allows(tokens, "ada", ada)
    assert allows(tokens, "bo", bo)
    assert not allows(tokens, "ada", bo)
    assert not allows(tokens, "bo", ada)
    assert not allows(tokens, "cy", ada)
    assert not allows(tokens, "ada", "")
    assert not allows(tokens, "cy", "")
    assert not allows(tokens, "", ada)
    assert not allows(tokens, "ada", ada + "x")
    assert not allows(tokens, "ada", ada[:-1])


def test_tokens_are_long_and_all_different(tokens: TokenFile) -> None:
    issued = [tokens.issue(f"device-{i}") for i in range(20)]
    assert len(set(issued)) == 20
    assert all(len(token) >= 43 for token in issued), "256 bits"
    assert all(re.fullmatch(r"[\w-]+", token) for token in issued)


def test_the_file_holds_hashes_and_never_a_token(tokens: TokenFile) -> None:
    issued = {device: tokens.issue(device) for device in ("ada", "bo")}
    files = [path for path in tokens.path.parent.iterdir() if path.is_file()]
    assert files == [tokens.path], "nothing is left beside it"
    text = tokens.path.read_text("utf-8")
    for token in issued.values():
        assert token not in text
        assert token.encode().hex() not in text
    assert tomllib.loads(text) == {
        "devices": {
            device: f"sha256:{hashlib.sha256(token.encode()).hexdigest()}"
            for device, token in issued.items()
        }
    }


def test_the_hash_does_not_work_as_a_token(tokens: TokenFile) -> None:
    tokens.issue("ada")
    digest = tokens.read()["ada"]
    assert not allows(tokens, "ada", digest)
    assert not allows(tokens, "ada", digest.removeprefix("sha256:"))


def test_a_new_token_takes_the_place_of_the_old(tokens: TokenFile) -> None:
    old, other = tokens.issue("ada"), tokens.issue("bo")
    new = tokens.issue("ada")
    assert not allows(tokens, "ada", old)
    assert allows(tokens, "ada", new)
    assert allows(tokens, "bo", other)
    assert tokens.read().keys() == {"ada", "bo"}


def test_a_revoked_token_is_worth_nothing_from_now_on(tokens: TokenFile) -> None:
    ada, bo = tokens.issue("ada"), tokens.issue("bo")
    hub_side = TokenFile(tokens.path)
    assert allows(hub_side, "ada", ada)
    tokens.revoke("ada")
    assert not allows(hub_side, "ada", ada)
    assert allows(hub_side, "bo", bo)
    with pytest.raises(ConfigError, match="has no device 'ada'") as caught:
        tokens.revoke("ada")
    assert str(tokens.path) in str(caught.value)
    assert allows(hub_side, "bo", bo), "a revocation that fails changes nothing"
    tokens.revoke("bo")
    assert tokens.read() == {}
    assert allows(tokens, "ada", tokens.issue("ada")), "an empty file can be used"


def test_a_device_without_a_hash_has_no_token(tokens: TokenFile) -> None:
    tokens.issue("ada")
    tokens.path.write_text('[devices]\nada = ""\n')
    assert not allows(tokens, "ada", "")
    assert not allows(tokens, "bo", "")


def test_a_hash_that_is_none_lets_nobody_in(tokens: TokenFile) -> None:
    ada = tokens.issue("ada")
    bo = tokens.issue("bo")
    digest = tokens.read()["bo"]
    for broken in ("sha256:", "sha256:ünverständlich…", ada, tokens.read()["ada"][:-1]):
        tokens.path.write_text(f'[devices]\nada = "{broken}"\nbo = "{digest}"\n', "utf-8")
        assert not allows(tokens, "ada", ada)
        assert allows(tokens, "bo", bo)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    devices=st.lists(
        st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=20)
        .map(str.strip)
        .filter(bool),
        min_size=1,
        max_size=4,
        unique=True,
    )
)
def test_a_device_may_have_any_name_that_can_be_shown(tmp_path: Path, devices: list[str]) -> None:
    tokens = TokenFile(tmp_path / "tokens.toml")
    tokens.path.unlink(missing_ok=True)
    issued = {device: tokens.issue(device) for device in devices}
    assert tokens.read().keys() == issued.keys()
    for device, token in issued.items():
        assert allows(tokens, device, token)
    tokens.revoke(devices[0])
    assert tokens.read().keys() == set(devices[1:])


@pytest.mark.parametrize(
    "name", ["a b", 'say "hi"', "back\\slash", "Größe", "📱", "👩\u200d🔧", "[x]", "a.b", "#"]
)
def test_names_that_need_quoting(tokens: TokenFile, name: str) -> None:
    token, other = tokens.issue(name), tokens.issue("other")
    assert tokens.read().keys() == {name, "other"}
    assert allows(tokens, name, token)
    assert allows(tokens, "other", other)


BROKEN = {
    "no table": "",
    "another table": "[tokens]\nada = 'sha256:0'\n",
    "not a table": "devices = 3\n",
    "a list": "devices = ['ada']\n",
    "not a hash": "[devices]\nada = 3\n",
    "not TOML": "[devices\n",
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_token_file_is_said_to_be_one(tokens: TokenFile, content: str) -> None:
    tokens.path.parent.mkdir()
    tokens.path.write_text(content)
    for use in (
        tokens.read,
        lambda: allows(tokens, "ada", "x"),
        lambda: tokens.issue("ada"),
        lambda: tokens.revoke("ada"),
    ):
        with pytest.raises(ConfigError, match=re.escape(str(tokens.path))):
            use()
    assert tokens.path.read_text() == content, "the operator's file is left alone"


def test_a_token_file_that_cannot_be_read(tokens: TokenFile, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(str(tokens.path))):
        allows(tokens, "ada", "x")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (binary, tmp_path):
        with pytest.raises(ConfigError, match=re.escape(str(path))):
            TokenFile(path).read()


# --- configuration --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    """A nested table."""

    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size is {self.size}, must not be negative")


@dataclass(frozen=True)
class Outer:
    """A configuration with every kind of value."""

    name: str
    inner: Inner
    count: int = 1
    rate: float = 0.1
    on: bool = False
    mode: Literal["fast", "slow"] = "fast"
    folder: Path = Path("here")
    limit: int | None = None
    file: Path | None = None
    hyper: dict[str, float] = field(default_factory=dict)


FULL = """\
name = "x"
count = 3
rate = 2
on = true
mode = "slow"
folder = "a/b"
limit = 7
file = "c.npz"
hyper = { lr = 1, momentum = 0.5 }

[inner]
size = 4
rate = 0.25
"""


def written(tmp_path: Path, text: str) -> Path:
    """Write a configuration file."""
    path = tmp_path / "some.toml"
    path.write_text(text, "utf-8")
    return path


def test_a_full_file(tmp_path: Path) -> None:
    got = load(Outer, written(tmp_path, FULL))
    assert got == Outer(
        name="x",
        inner=Inner(4, 0.25),
        count=3,
        rate=2.0,
        on=True,
        mode="slow",
        folder=Path("a/b"),
        limit=7,
        file=Path("c.npz"),
        hyper={"lr": 1.0, "momentum": 0.5},
    )
    assert type(got.rate) is float
    assert type(got.hyper["lr"]) is float
    assert isinstance(got.folder, Path)


def test_what_is_left_out_has_its_default(tmp_path: Path) -> None:
    got = load(Outer, written(tmp_path, 'name = "x"\n[inner]\nsize = 1\n'))
    assert got == Outer("x", Inner(1))
    assert got.hyper == {}


WRONG = {
    "unknown key": ("nmae = 1\n" + FULL, "unknown key 'nmae'", "name, inner, count"),
    "unknown nested key": (FULL + "sizes = 1\n", "inner", "unknown key 'sizes'"),
    "missing key": ("[inner]\nsize = 1\n", "the key 'name' is missing", ""),
    "missing table": ('name = "x"\n', "the key 'inner' is missing", ""),
    "missing nested key": ('name = "x"\n[inner]\nrate = 1\n', "inner", "'size' is missing"),
    "text for int": (FULL.replace("count = 3", 'count = "3"'), "count is '3'", "of type int"),
    "float for int": (FULL.replace("count = 3", "count = 3.0"), "count is 3.0", "of type int"),
    "bool for int": (FULL.replace("count = 3", "count = true"), "count is True", "of type int"),
    "bool for float": (FULL.replace("rate = 2", "rate = true"), "rate is True", "of type float"),
    "int for bool": (FULL.replace("on = true", "on = 1"), "on is 1", "of type bool"),
    "int for text": (FULL.replace('"x"', "5"), "name is 5", "of type str"),
    "int for path": (FULL.replace('"a/b"', "5"), "folder is 5", "of type Path"),
    "int for optional path": (FULL.replace('"c.npz"', "5"), "file is 5", "of type Path"),
    "text for optional int": (FULL.replace("7", "'7'"), "limit is '7'", "of type int"),
    "literal": (FULL.replace('"slow"', '"medium"'), "mode is 'medium'", "one of fast, slow"),
    "list for literal": (FULL.replace('"slow"', '["slow"]'), "mode is ['slow']", "fast, slow"),
    "nested type": (FULL.replace("size = 4", "size = '4'"), "inner: size is '4'", "of type int"),
    "value for table": ('name = "x"\ninner = 3\n', "inner must be a table", ""),
    "value for mapping": (FULL.replace("{ lr = 1, momentum = 0.5 }", "3"), "hyper must be", ""),
    "mapping's value": (FULL.replace("lr = 1,", "lr = 'a',"), "hyper.lr is 'a'", "of type float"),
    "list of tables": (FULL.replace("[inner]", "[[inner]]"), "inner must be a table", ""),
    "own check": (FULL.replace("size = 4", "size = -4"), "inner: size is -4", "not be negative"),
}


@pytest.mark.parametrize(("text", "what", "more"), WRONG.values(), ids=WRONG.keys())
def test_errors_name_file_and_key(tmp_path: Path, text: str, what: str, more: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load(Outer, path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert what in message
    assert more in message
    assert "\n" not in message


def test_options_are_named_in_place_of_a_file() -> None:
    with pytest.raises(ConfigError, match=r"^options of the command: count is 'x'"):
        build(Outer, {"name": "x", "inner": {"size": 1}, "count": "x"}, "options of the command")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"no configuration file at {tmp_path}/no")):
        load(Outer, tmp_path / "no.toml")


@pytest.mark.parametrize("text", ["name = ", "[inner", "name = 'x'\nname = 'y'", "= 3"])
def test_a_file_that_is_not_toml(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(f"{path} is not valid TOML")) as caught:
        load(Outer, path)
    assert "(at " in str(caught.value), "where in the file"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"name = '\xff'")
    for unreadable in (path, tmp_path):
        with pytest.raises(ConfigError, match=re.escape(f"{unreadable} cannot be read")):
            read_toml(unreadable)


# --- the hub's configuration ----------------------------------------------------------------------

HUB = 'bundles = "bundles"\ntokens = "tokens.toml"\n'


def test_a_hub_needs_bundles_and_tokens_alone(tmp_path: Path) -> None:
    config = load(HubConfig, written(tmp_path, HUB))
    assert config == HubConfig(Path("bundles"), Path("tokens.toml"))
    assert config.listen.host == "127.0.0.1", "not open to the network unless asked"
    for key in ("bundles", "tokens"):
        text = "".join(line for line in HUB.splitlines(True) if not line.startswith(key))
        with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
            load(HubConfig, written(tmp_path, text))


def test_a_hub_with_everything_set(tmp_path: Path) -> None:
    config = load(
        HubConfig,
        written(
            tmp_path,
            HUB
            + """\
schedule = "step"
keep_serving = true
held_out = "test.npz"

[listen]
host = "0.0.0.0"
port = 0

[method]
form = "paper"

[rounds]
count = 5
min_devices = 2
per_round = 2
deadline_s = 60

[local]
epochs = 2
hyper = { lr = 1 }

[trunk]
optimizer = "adamw"
wait_s = 0

[limits]
window = 4
""",
        ),
    )
    assert config.schedule == "step"
    assert config.keep_serving
    assert config.held_out == Path("test.npz")
    assert (config.listen.host, config.listen.port) == ("0.0.0.0", 0)
    assert config.method.form == "paper"
    assert (config.rounds.count, config.rounds.per_round) == (5, 2)
    assert config.rounds.deadline_s == 60.0
    assert config.local.hyper == {"lr": 1.0}
    assert (config.trunk.optimizer, config.trunk.wait_s) == ("adamw", 0.0)
    assert config.limits.window == 4


HUB_WRONG = {
    "rounds.count": ("[rounds]\ncount = 0", "rounds: count is 0, must be at least 1"),
    "rounds.min_devices": ("[rounds]\nmin_devices = 0", "rounds: min_devices is 0"),
    "rounds.per_round": ("[rounds]\nper_round = 0", "rounds: per_round is 0"),
    "rounds.deadline_s": ("[rounds]\ndeadline_s = 0", "rounds: deadline_s is 0"),
    "local.epochs": ("[local]\nepochs = 0", "local: epochs"),
    "local.batch_size": ("[local]\nbatch_size = 0", "batch_size must be at least 1"),
    "local.hyper": ("[local]\nhyper = { lr = 'x' }", "local: hyper.lr is 'x'"),
    "trunk.max_rows": ("[trunk]\nmax_rows = 0", "trunk: max_rows must be at least 1"),
    "trunk.arena_mb": ("[trunk]\narena_mb = 0", "arena_mb must be at least 1"),
    "trunk.optimizer": ("[trunk]\noptimizer = 'lion'", "trunk: optimizer is 'lion'"),
    "limits.window": ("[limits]\nwindow = 1", "limits: window must be at least 2"),
    "limits.max_frame": ("[limits]\nmax_frame = 1000", "max_frame at least twice blob_piece"),
    "method.form": ("[method]\nform = 'best'", "method: form is 'best', must be one of merged"),
    "schedule": ("schedule = 'linear'", "schedule is 'linear', must be one of constant"),
    "listen.port": ("[listen]\nport = '8765'", "listen: port is '8765', must be of type int"),
    "port too high": ("[listen]\nport = 65536", "listen: port is 65536, must be from 0 to 65535"),
    "port too low": ("[listen]\nport = -1", "listen: port is -1, must be from 0 to 65535"),
    "a section": ("[round]\ncount = 3", "unknown key 'round'"),
}


@pytest.mark.parametrize(("text", "what"), HUB_WRONG.values(), ids=HUB_WRONG.keys())
def test_a_hub_says_what_is_wrong_with_its_file(tmp_path: Path, text: str, what: str) -> None:
    path = written(tmp_path, f"{HUB}{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(HubConfig, path)
    assert str(caught.value).startswith(f"{path}: ")
    assert what in str(caught.value)
