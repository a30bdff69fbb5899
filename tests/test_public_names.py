"""The names that users import from the top level of the packages."""

from __future__ import annotations

import importlib
import inspect

import pytest

PUBLIC = {
    "edge_sdk": [
        "ArrayFiles",
        "BundleError",
        "Choice",
        "Condition",
        "ConfigError",
        "CsvFile",
        "CutlayerError",
        "DataError",
        "Device",
        "Evaluation",
        "Examples",
        "HubError",
        "ImageFolder",
        "JsonLines",
        "LinkClosed",
        "Mixture",
        "MixturePolicy",
        "Prediction",
        "ProtocolError",
        "Recent",
        "RoundReport",
        "Source",
        "SqliteTable",
        "TrainReport",
        "measure_latencies",
        "open_source",
    ],
    "export": [
        "BundleIndex",
        "ExportCache",
        "ExportError",
        "SplitModel",
        "Tier",
        "export_bundles",
        "from_transformers",
    ],
    "server_hub": ["Hub", "HubConfig"],
}
"""Names that a change must not remove."""

NAMES = [(package, name) for package, names in PUBLIC.items() for name in names]


@pytest.mark.parametrize("package", PUBLIC)
def test_a_package_offers_these_names_and_no_others(package: str) -> None:
    assert sorted(importlib.import_module(package).__all__) == PUBLIC[package]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_a_name_can_be_imported_and_is_documented(package: str, name: str) -> None:
    found = getattr(importlib.import_module(package), name)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert found.__name__ == name
    own = found.__doc__
    assert own, f"{package}.{name} has no docstring"
    assert not own.startswith(f"{name}("), "a dataclass without a docstring has its signature"


@pytest.mark.parametrize("package", PUBLIC)
def test_another_name_is_an_attribute_error(package: str) -> None:
    module = importlib.import_module(package)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = module.nothing
