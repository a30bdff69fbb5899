"""What the devices could do without a hub: one model that fits the poorest, federated averaging.

The learner, the step graph and the averaging are those of the job; there is no trunk, and no
activations leave a device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle
from edge_sdk.inference.metrics import softmax
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.runtime import load_runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.plan import LocalPlan
from export.optimizers import check_hyper
from export.split import SplitModel
from server_hub.aggregation.layer_store import LayerCopy, LayerStore, split_by_layer
from server_hub.methods.settings import learning_rate_factor


def federated_averaging(
    model: SplitModel,
    index: BundleIndex,
    tier: str,
    shares: Sequence[Examples],
    held_out: Examples,
    rounds: int,
    hyper: Mapping[str, float],
    batch_size: int,
    progress: Callable[[int], None],
) -> float:
    """Accuracy on ``held_out`` of the tier's own model after as many rounds as with the hub.

    Args:
        model: the model as exported; gives the initial weights.
        index: the bundles.
        tier: the poorest tier: every device trains its segment and heads.
        shares: the devices' examples.
        held_out: examples to measure on.
        rounds: rounds of federated averaging.
        hyper: hyper-parameters of the local optimizer, as in the job with a hub.
        batch_size: rows of a local step.
        progress: told each round's number.
    """
    manifest, blobs = index.manifest(tier), index.blobs()
    bundle = Bundle.open(manifest, blobs.read)
    learner = Learner(manifest, load_runtime(bundle))
    store = LayerStore(bundle.initial_state)
    local = [share.fitted(manifest) for share in shares]
    for number in range(1, rounds + 1):
        progress(number)
        full = check_hyper(index.optimizer, dict(hyper))
        full["lr"] *= learning_rate_factor("cosine", number, rounds)
        copies = []
        for order, data in enumerate(local):
            plan = LocalPlan(1, batch_size, full, ActivationMode.NONE, number * 1_000_003 + order)
            result = learner.train(store.state(), data, plan, lambda *_: None)
            copies += [
                LayerCopy(layer, tensors, result.samples, f"device {order}")
                for layer, tensors in split_by_layer(result.state).items()
            ]
        store.commit(copies)
    learner.runtime.set_state(store.state())
    examples = held_out.fitted(manifest)
    heads, _ = learner.predict(examples.x)
    return float((softmax(heads).mean(0).argmax(1) == examples.y).mean())
