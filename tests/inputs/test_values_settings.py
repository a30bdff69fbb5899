"""Every key of every TOML file: wrong values are one sentence with file and key.

Keys are found in the dataclasses, so a new key is tried as well. Keys that take numbers which are
wrong for others are in :data:`ZERO` and :data:`NEGATIVE`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_sdk import config
from edge_sdk.cli.device import DeviceConfig
from edge_sdk.errors import ConfigError
from export.bundles.tier_table import TiersConfig
from server_hub.config import HubConfig
from server_hub.simulation.job import Job

FILES: dict[type[Any], dict[str, Any]] = {
    HubConfig: {"bundles": "b", "tokens": "t"},
    TiersConfig: {"tiers": {"a": {"cut": 1}}},
    Job: {
        "model": "m:f",
        "data": {"source": "digits"},
        "tiers": {"a": {"clients": 1, "cut": 1}},
    },
    DeviceConfig: {"url": "ws://x", "token": "t"},
}
"""The settings, each with the smallest file."""

OTHER_TYPES: dict[Any, list[Any]] = {
    int: ["3", 3.0, True, [3], {"k": 3}],
    float: ["3", True, [3.0], {"k": 3.0}, math.nan],
    str: [3, 3.0, True, ["x"], {"k": "x"}],
    bool: ["true", 1, 0.0, [True], {"k": True}],
    Path: ["", 3, True, ["x"], {"k": "x"}],
    list: ["x", 3, True, {"k": 1}],
    tuple: ["x", 3, True, {"k": 1}],
    dict: ["x", 3, True, [1]],
    typing.Literal: ["nonsense", "", 3, True, ["x"]],
}
"""Wrong values of a key, by its type."""

ZERO = {
    "HubConfig": {
        "leave_s", "evaluation_s", "listen.port", "rounds.seed", "rounds.grace", "rounds.grace_s",
        "local.hyper.k", "local.staleness", "trunk.hyper.k", "trunk.mix_rows", "trunk.wait_s",
        "trunk.threads", "mix.robustness", "mix.seed", "mix.attack.low",
    },
    "TiersConfig": {"tiers.a.cut", "lora.dropout", "lora.rank", "lora.alpha", "bases"},
    "Job": {
        "data.seed", "keep_back", "tiers.a.latency_ms", "tiers.a.loss", "tiers.a.offline_s",
        "partition.seed", "local.hyper.k", "local.staleness", "trunk.hyper.k",
        "trunk.mix_rows", "trunk.wait_s", "trunk.threads", "mix.robustness", "mix.attack.low",
        "seed",
    },
    "DeviceConfig": {"patience_s", "keep_back"},
}  # fmt: skip
"""Numbers that may be 0, or are checked when the model is there."""

NEGATIVE = {
    "HubConfig": {"rounds.seed", "local.hyper.k", "trunk.hyper.k", "mix.attack.low"},
    "TiersConfig": {"tiers.a.cut", "lora.dropout", "lora.rank", "lora.alpha"},
    "Job": {"mix.attack.low"},
    "DeviceConfig": set(),
}
"""Numbers that may be negative, or are checked when the model is there."""


def kind_of(hint: Any) -> Any:
    """The type of a key, without None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint


def keys_of(cls: type[Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the path and the type of every key, of tables within tables as well."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, here = kind_of(hints[field.name]), (*path, field.name)
        if dataclasses.is_dataclass(kind):
            yield here, dict
            yield from keys_of(typing.cast(type[Any], kind), here)
        elif typing.get_origin(kind) is dict:
            inner = typing.get_args(kind)[1]
            yield here, dict
            if dataclasses.is_dataclass(inner):
                yield from keys_of(typing.cast(type[Any], inner), (*here, "a"))
            else:
                yield (*here, "k"), inner
        else:
            yield here, typing.get_origin(kind) or kind


def with_value(raw: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of a table with one key set."""
    first, *rest = path
    changed = with_value(raw.get(first, {}), tuple(rest), value) if rest else value
    return {**raw, first: changed}


CASES = [(cls, path, kind) for cls in FILES for path, kind in keys_of(cls)]


@pytest.mark.parametrize(
    ("cls", "path", "kind"), CASES, ids=[f"{c.__name__} {'.'.join(p)}" for c, p, _ in CASES]
)
def test_a_wrong_value_is_named(cls: type[Any], path: tuple[str, ...], kind: Any) -> None:
    """Wrong types, NaN, an empty path; and numbers below their range."""
    dotted, name = ".".join(path), cls.__name__
    wrong = list(OTHER_TYPES[kind])
    if kind in (int, float) and dotted not in NEGATIVE[name]:
        wrong += [-1, kind(-(10**12))]
    if kind in (int, float) and dotted not in ZERO[name]:
        wrong.append(0)
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            config.build(cls, with_value(FILES[cls], path, value), "file.toml")
        said = str(caught.value)
        assert said.startswith("file.toml"), said
        assert path[-1] in said, said
        assert "\n" not in said


@pytest.mark.parametrize("cls", FILES)
def test_unknown_and_missing_keys_are_named(cls: type[Any]) -> None:
    """At every level."""
    for path in {path[:-1] for path, _ in keys_of(cls)}:
        if path[-1:] not in (("hyper",), ("budgets",), ("memory_mb",)):
            with pytest.raises(ConfigError, match="unknown key 'nonsense'"):
                config.build(cls, with_value(FILES[cls], (*path, "nonsense"), 1), "file.toml")
    for key in FILES[cls]:
        raw = {k: v for k, v in FILES[cls].items() if k != key}
        with pytest.raises(ConfigError, match=f"the key '{key}' is missing"):
            config.build(cls, raw, "file.toml")


@pytest.mark.parametrize(
    ("cls", "path", "value"),
    [
        (HubConfig, "trunk.threads", 10**6),
        (HubConfig, "mix.attack.steps", 10**9),
        (HubConfig, "mix.budgets.k", 1.5),
        (HubConfig, "limits.session_s", math.inf),
        (HubConfig, "trunk.wait_s", math.inf),
        (TiersConfig, "length", 10**6),
        (TiersConfig, "input_shape", [10**9]),
        (TiersConfig, "input_shape", []),
        (TiersConfig, "input_shape", [3, 0]),
        (Job, "tiers.a.clients", 10**9),
        (Job, "data.length", 10**9),
        (Job, "local.hyper.lr", -1.0),
        (Job, "trunk.hyper.momentum", 1.0),
        (DeviceConfig, "threads", 10**6),
        (DeviceConfig, "token", ""),
    ],
)
def test_values_out_of_range_are_named(cls: type[Any], path: str, value: Any) -> None:
    """Also numbers that only exhaust a machine: the sentence says of the key what is wrong."""
    with pytest.raises(ConfigError) as caught:
        config.build(cls, with_value(FILES[cls], tuple(path.split(".")), value), "file.toml")
    assert re.search(rf"\b{path.split('.')[-1]}( of sgd)? is ", str(caught.value))


def test_a_list_of_networks_can_be_given() -> None:
    """A tuple in Python is a list in TOML."""
    raw = with_value(FILES[HubConfig], ("listen", "trusted"), ["10.0.0.0/8"])
    assert config.build(HubConfig, raw, "f").listen.trusted == ("10.0.0.0/8",)
