"""The two stores of FedSplitX's paper form: one for the devices' layers, one for the trunk's."""

from __future__ import annotations

import numpy as np

from server_hub.aggregation.separate import Separate


def test_both_stores_go_on_from_what_was_kept() -> None:
    """A resumed run uses the saved values of both stores."""
    first = {"block.0.weight": np.zeros(2, np.float32), "head.weight": np.ones(2, np.float32)}
    kept = {
        "devices": {name: tensor + 3 for name, tensor in first.items()},
        "trunk": {name: tensor + 5 for name, tensor in first.items()},
    }
    resumed = Separate(first)
    resumed.restore(kept)
    assert resumed.stores().keys() == kept.keys()
    for store, tensors in resumed.stores().items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, kept[store][name], err_msg=f"{store} {name}")
