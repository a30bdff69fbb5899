"""What a device trains on: draws that can be repeated, and a share that is kept back for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_sdk.bundle.manifest import Graph, Manifest, Port
from edge_sdk.errors import ConfigError, DataError, Diverged
from edge_sdk.protocol.enums import ActivationMode
from edge_sdk.protocol.messages import Features, Gradient
from edge_sdk.protocol.tensors import Array, TensorSpec
from edge_sdk.runtime import Runtime
from edge_sdk.training.data import Examples
from edge_sdk.training.learner import Learner
from edge_sdk.training.local_data import LocalData, is_kept_back
from edge_sdk.training.plan import Augment, LocalPlan, ReplyRequest
from tests.lib.collected import Collected

X = TensorSpec("x", "float32", ("batch", 3))
MANIFEST = Manifest(
    "test", 1, "onnx", "classes", 10, {}, ("aux.1",), "sgd", "none", (), (),
    {name: Graph(name, (Port(X, "batch"),), ()) for name in ("predict", "train", "forward")},
    "", (), {},
)  # fmt: skip


def pool(rows: int) -> Examples:
    """Return rows that a test can identify: the values of row n are n."""
    numbers = np.arange(rows)
    return Examples(np.repeat(numbers[:, None], 3, 1).astype(np.float32), numbers % 10)


class Noting(Runtime):
    """Replaces a runtime; remembers the batches that it is trained on."""

    loading_s = 0.0

    def __init__(self) -> None:
        self.batches: list[Array] = []

    def set_state(self, tensors: Mapping[str, Array]) -> None:
        pass

    def get_state(self, slots: bool = False) -> dict[str, Array]:
        return {}

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        self.batches.append(batch["x"].copy())
        return {"loss": np.float32(0), "correct": np.float32(0)}


def trained(data: LocalData, number: int, seed: int, augment: Augment | None = None) -> list[Array]:
    """Return the batches of a round."""
    runtime = Noting()
    plan = LocalPlan(2, 4, {}, "none", seed, augment=augment)
    rows = data.begin(number, seed)
    result = Learner(MANIFEST, runtime).train({}, rows, plan, lambda *_: None)
    assert result.samples == len(rows)
    return runtime.batches


class Overflowing(Noting):
    """Packs activations with a scale that is too large; the loss of its heads is finite."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = np.full((1, 3), scale, np.float32)

    def run(self, graph: str, batch: Mapping[str, Array]) -> dict[str, Array]:
        return super().run(graph, batch) | {"h.scale": self.scale}


def assert_same(some: list[Array], others: list[Array]) -> None:
    """Check that batches are equal."""
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        np.testing.assert_array_equal(one, other)


def shake(batch: Examples, rng: np.random.Generator) -> Examples:
    """Add noise to a batch."""
    return replace(batch, x=batch.x + rng.standard_normal(batch.x.shape, np.float32))


@settings(max_examples=30, deadline=None)
@given(
    here=st.sets(st.integers(0, 99), min_size=8),
    later=st.sets(st.integers(0, 99)),
    share=st.sampled_from([0.0, 0.2, 0.5]),
    seed=st.integers(0, 99),
    augmented=st.booleans(),
)
def test_a_round_can_be_repeated_and_never_trains_on_what_is_kept_back(
    here: set[int], later: set[int], share: float, seed: int, augmented: bool
) -> None:
    """The draw depends on the rows at the round's start and its seed; so does augmentation."""
    source = Collected(pool(100), sorted(here))
    data, augment = LocalData(source, share), shake if augmented else None
    kept = {n for n in range(100) if is_kept_back(np.array([n]), share)[0]}
    if not here - kept:
        with pytest.raises(DataError, match=r"all .* rows are kept back"):
            data.fit(MANIFEST)
        return
    data.fit(MANIFEST)
    first = trained(data, 1, seed, augment)
    if not augmented:
        drawn = [int(row) for batch in first for row in batch[:, 0]]
        assert sorted(drawn) == sorted(2 * list(here - kept))
    source.here = sorted(later)
    assert_same(first, trained(data, 1, seed, augment))  # the same round, begun again
    assert len(data.begin(2, seed)) == len(later - kept)
    assert {int(x) for x in data.kept_back().read(np.arange(len(later & kept))).x[:, 0]} == (
        later & kept
    )
    again = LocalData(Collected(pool(100), sorted(here)), share)  # another process
    again.fit(MANIFEST)
    assert_same(first, trained(again, 1, seed, augment))


def test_a_hub_that_cannot_count_anew_gets_the_rows_that_it_was_told_of() -> None:
    source = Collected(pool(20), range(9))
    data = LocalData(source)
    data.fit(MANIFEST)
    assert data.join() == 9
    source.here = list(range(20))
    assert len(data.begin(1, 0, recount=False)) == 9
    assert len(data.begin(2, 0)) == 20
    assert data.join() == 20


def test_augmentation_draws_on_its_own() -> None:
    """It does not change the order of the rows, and differs from batch to batch and by epoch."""
    data = LocalData(pool(8))
    data.fit(MANIFEST)
    plain, shaken = trained(data, 1, 5), trained(data, 1, 5, shake)
    noise = [b - a for a, b in zip(plain, shaken, strict=True)]
    assert len({n.tobytes() for n in noise}) == 4
    assert all(0.01 < np.abs(n).mean() < 2 for n in noise)


def test_augmentation_that_does_not_fit_is_named() -> None:
    data = LocalData(pool(8))
    data.fit(MANIFEST)
    with pytest.raises(DataError, match=r"augment returned rows that do not fit: x has shape"):
        trained(data, 1, 5, lambda batch, _: replace(batch, x=batch.x[:, :2]))


def test_about_the_share_is_kept_back_and_it_grows_with_the_share() -> None:
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 20_000)
    for rows in (keys, np.arange(20_000)):
        kept = [is_kept_back(rows, share) for share in (0.0, 0.1, 0.5, 1.0)]
        assert [k.mean() for k in kept] == pytest.approx([0, 0.1, 0.5, 1], abs=0.01)
        assert not (kept[1] & ~kept[2]).any()


def test_which_rows_are_kept_back_never_changes_with_a_new_version() -> None:
    """A device that is updated must not train on what it has measured itself on."""
    assert np.flatnonzero(is_kept_back(np.arange(60), 0.1)).tolist() == [10, 18, 21, 41, 48]


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match=r"keep_back is .*; it must be from 0 to below 1"):
        LocalData(pool(3), share)


def test_what_is_no_source_is_refused() -> None:
    with pytest.raises(DataError, match="data is a list; it must be a Source"):
        LocalData([1, 2])  # type: ignore[arg-type]


def test_a_bad_row_is_named_when_it_is_read() -> None:
    """Also one that comes later: the first rows are checked before training, others then."""
    rows = pool(100)
    rows.y[90] = 10
    source = Collected(rows, range(50))
    data = LocalData(source)
    data.fit(MANIFEST)
    trained(data, 1, 0)
    source.here = [*range(50), 90]
    with pytest.raises(DataError, match="the app's row 90: y is the label 10"):
        trained(data, 2, 0)
    with pytest.raises(DataError, match="the app's row 90: y is the label"):
        LocalData(source).fit(MANIFEST)


def test_without_rows_nothing_begins() -> None:
    with pytest.raises(DataError, match="the data has no rows"):
        LocalData(Collected(pool(5), [])).fit(MANIFEST)


def test_flat_rows_of_a_source_take_the_shape_of_the_inputs() -> None:
    """Arrays in memory have to be right as they are."""
    port = Port(replace(X, shape=("batch", 1, 3)), "batch")
    manifest = replace(
        MANIFEST, graphs={name: Graph(name, (port,), ()) for name in MANIFEST.graphs}
    )
    data = LocalData(Collected(pool(8), range(8)))
    data.fit(manifest)
    rows = np.array([5, 2])
    x = data.begin(1, 0).read(rows).x
    np.testing.assert_array_equal(x, pool(8).x[rows].reshape(2, 1, 3))
    with pytest.raises(DataError, match=r"x has shape \[8, 3\], the model takes"):
        LocalData(pool(8)).fit(manifest)


def test_a_text_without_a_label_is_left_out() -> None:
    port = Port(TensorSpec("x", "int64", ("batch", "seq")), "batch")
    graphs = {name: Graph(name, (port,), ()) for name in MANIFEST.graphs}
    texts = Examples(np.array([[1, 2], [3, 4], [5, 6]]), np.array([[2, -1], [-1, -1], [6, 7]]))
    data = LocalData(Collected(texts, range(3)))
    data.fit(replace(MANIFEST, task="tokens", graphs=graphs))
    assert data.begin(1, 0).read(np.arange(3)).x.tolist() == [[1, 2], [5, 6]]


@pytest.mark.parametrize("mode", ["forward", "train", "returned", "u_shaped"])
@pytest.mark.parametrize("scale", [np.nan, np.inf, 3e38])
def test_activations_that_are_not_finite_are_not_sent(mode: ActivationMode, scale: float) -> None:
    """Nor are those whose scale makes them so once they are unpacked."""
    learner, sent = Learner(MANIFEST, Overflowing(scale)), list[int]()
    plan = LocalPlan(1, 4, {}, mode, 0)
    with pytest.raises(Diverged, match="the activations are not finite"):
        learner.train({}, pool(8), plan, lambda number, _: sent.append(number))
    assert not sent


@pytest.mark.parametrize("mode", ["returned", "fused", "u_shaped"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["h", "h.scale"])
def test_what_the_hub_sends_back_is_refused_if_it_is_not_finite(
    mode: ActivationMode, bad: float, name: str
) -> None:
    """Gradients and features are refused before a step is made with them."""
    runtime, parts = Noting(), {name: np.array([[1.0], [bad]], np.float16)}
    plan = LocalPlan(1, 4, {"own": 0.5}, mode, 0)
    training = Learner(MANIFEST, runtime).training({}, pool(8), plan)
    step = next(training)
    while not isinstance(step, ReplyRequest):
        step = next(training)
    kind = Features if step.features else Gradient
    with pytest.raises(Diverged, match=r"from the hub (is|are) not finite"):
        training.send(kind(round=1, batch=0, parts=parts))
    assert len(runtime.batches) == 1  # activate alone


class Vanishing(Collected):
    """All rows are deleted after the round has begun."""

    def read(self, rows: Array) -> Examples:
        return super().read(rows[:0])


def test_rows_that_are_all_deleted_in_a_round_are_an_error() -> None:
    learner, rows = Learner(MANIFEST, Noting()), Vanishing(pool(5), range(5))
    plan = LocalPlan(1, 4, {}, "none", 0)
    with pytest.raises(DataError, match="none of the 5 rows of this round can be trained on"):
        learner.train({}, rows, plan, lambda *_: None)
