"""The buffer that mixes batches: no batch is lost or repeated, and groups keep their bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_hub.trunk.shuffle_buffer import ShuffleBuffer


@dataclass(frozen=True)
class Batch:
    """A batch of a device."""

    device: int
    number: int
    rows: int


def batches(sizes: list[int], device: int = 0) -> list[Batch]:
    return [Batch(device, number, rows) for number, rows in enumerate(sizes)]


SIZES = st.lists(st.integers(1, 40), max_size=40)


@given(sizes=SIZES, capacity=st.integers(0, 200), max_rows=st.integers(1, 100), data=st.data())
def test_every_batch_comes_out_once_in_groups_that_keep_their_bound(
    sizes: list[int], capacity: int, max_rows: int, data: st.DataObject
) -> None:
    accepted: list[Batch] = []
    mixer = ShuffleBuffer[Batch](accepted.append)
    mixer.begin(capacity, seed=1)
    given, taken = batches(sizes), []
    for batch in given:
        mixer.put(batch)
        assert mixer.rows == sum(b.rows for b in given[: batch.number + 1]) - sum(
            b.rows for b in taken
        )
        while mixer.ready(last=False) and data.draw(st.booleans()):
            taken += (group := mixer.take(max_rows))
            assert len(group) == 1 or sum(b.rows for b in group) <= max_rows
    while mixer.ready(last=True):
        taken += (group := mixer.take(max_rows))
        assert group
    assert Counter(taken) == Counter(given)
    assert len(mixer) == mixer.rows == 0
    assert len(set(accepted)) == len(accepted), "each is accepted once"
    assert set(accepted) <= set(given)


@given(sizes=SIZES, max_rows=st.integers(1, 100))
def test_without_a_capacity_batches_keep_their_order(sizes: list[int], max_rows: int) -> None:
    mixer = ShuffleBuffer[Batch](lambda batch: pytest.fail("nothing is buffered"))
    mixer.begin(0, seed=1)
    for batch in batches(sizes):
        mixer.put(batch)
    taken = []
    while mixer.ready(last=False):
        taken += mixer.take(max_rows)
    assert taken == batches(sizes)


@given(sizes=SIZES, capacity=st.integers(1, 200))
def test_what_is_accepted_is_bounded(sizes: list[int], capacity: int) -> None:
    accepted: list[Batch] = []
    mixer = ShuffleBuffer[Batch](accepted.append)
    mixer.begin(capacity, seed=1)
    for batch in batches(sizes):
        mixer.put(batch)
    assert sum(b.rows for b in accepted) < capacity + 40
    assert mixer.ready(last=False) == (sum(sizes) >= capacity)


def test_steps_see_many_devices_although_each_sends_all_its_batches_at_once() -> None:
    mixer = ShuffleBuffer[Batch](lambda batch: None)
    mixer.begin(1000, seed=1)
    seen = []
    for device in range(10):
        for batch in batches([10] * 20, device):
            mixer.put(batch)
            while mixer.ready(last=device == 9 and batch.number == 19):
                seen.append({b.device for b in mixer.take(40)})
    assert sum(len(group) for group in seen) / len(seen) > 3, "of 4 batches in a group"


def test_draws_are_uniform() -> None:
    first = Counter()
    for seed in range(4000):
        mixer = ShuffleBuffer[Batch](lambda batch: None)
        mixer.begin(10, seed)
        for batch in batches([1] * 10):
            mixer.put(batch)
        first[mixer.take(1)[0].number] += 1
    expected = 400
    chi_square = sum((first[n] - expected) ** 2 / expected for n in range(10))
    assert chi_square < 27.9, "the 0.1 % point of chi-square with 9 degrees of freedom"
    assert np.isclose(sum(first.values()), 4000)
