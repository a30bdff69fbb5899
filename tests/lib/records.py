"""Records of rounds."""

from __future__ import annotations

from typing import Any

from server_hub.storage.run_folder import RoundRecord


def record(number: int, **changes: Any) -> RoundRecord:
    """Return a record of a SplitFT round, in which only the path through the hub is measured."""
    given: dict[str, Any] = {
        "round": number, "clock": 10.0 * number, "seconds": 1.0, "devices": 2, "dropped": {},
        "local_loss": None, "local_accuracy": None, "trunk_loss": 2.5, "trunk_steps": 3,
        "accuracy": {"a": {"through_hub": 1234.5 / number}, "b": {"through_hub": 40.0}},
        "bytes": {"update": {"up": 1000, "down": 0}}, "costs": {"device_flop": 1e9},
        "metric": "perplexity", "cuts": {"phone-3": 4, "phone-20": 1},
    }  # fmt: skip
    return RoundRecord(**given | changes)
