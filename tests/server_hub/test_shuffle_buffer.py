"""The buffer that mixes batches: no batch is lost or repeated, and groups keep their bound."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server_hub.trunk.shuffle_buffer import ShuffleBuffer
from server_hub.trunk.step_size import StepBounds


@dataclass(frozen=True)
class Batch:
    """A batch of a device."""

    device: int
    number: int
    rows: int
    length: int = 1
    nbytes: int = 0


def batches(sizes: list[int], device: int = 0) -> list[Batch]:
    return [Batch(device, number, rows) for number, rows in enumerate(sizes)]


def bounds(rows: int, tokens: int = 2**62, nbytes: int = 2**62) -> StepBounds:
    return StepBounds(rows, tokens, nbytes)


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
            taken += (group := mixer.take(bounds(max_rows)))
            assert len(group) == 1 or sum(b.rows for b in group) <= max_rows
    while mixer.ready(last=True):
        taken += (group := mixer.take(bounds(max_rows)))
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
        taken += mixer.take(bounds(max_rows))
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
                seen.append({b.device for b in mixer.take(bounds(40))})
    assert sum(len(group) for group in seen) / len(seen) > 3, "of 4 batches in a group"


def test_draws_are_uniform() -> None:
    first = Counter()
    for seed in range(4000):
        mixer = ShuffleBuffer[Batch](lambda batch: None)
        mixer.begin(10, seed)
        for batch in batches([1] * 10):
            mixer.put(batch)
        first[mixer.take(bounds(1))[0].number] += 1
    expected = 400
    chi_square = sum((first[n] - expected) ** 2 / expected for n in range(10))
    assert chi_square < 27.9, "the 0.1 % point of chi-square with 9 degrees of freedom"
    assert np.isclose(sum(first.values()), 4000)


# --- texts and bytes ------------------------------------------------------------------------------


def texts(*lengths: int, rows: int = 4) -> list[Batch]:
    """Batches of texts, of 10 bytes a position."""
    return [Batch(0, i, rows, n, 10 * rows * n) for i, n in enumerate(lengths)]


def groups(given: list[Batch], bound: StepBounds, capacity: int = 0) -> list[list[Batch]]:
    mixer = ShuffleBuffer[Batch](lambda batch: None)
    mixer.begin(capacity, seed=1)
    for batch in given:
        mixer.put(batch)
    taken = []
    while len(mixer):
        taken.append(mixer.take(bound))
    return taken


@pytest.mark.parametrize("capacity", [0, 1000])
def test_a_long_text_does_not_pad_the_others(capacity: int) -> None:
    given = texts(*[64] * 32, 8192, *[64] * 31)
    got = groups(given, bounds(256, 2**15), capacity)
    assert Counter(batch for group in got for batch in group) == Counter(given)
    assert sorted(len(group) for group in got) == [1, 63]
    assert all(len({b.length for b in group}) == 1 for group in got)


def test_short_texts_are_merged_in_their_order_whatever_their_length() -> None:
    given = texts(3, 200, 64, 256, 1)
    assert groups(given, bounds(256)) == [given]


@given(
    lengths=st.lists(st.integers(1, 3000), max_size=30),
    rows=st.integers(1, 8),
    capacity=st.integers(0, 100),
)
def test_merged_texts_are_bounded_after_padding(
    lengths: list[int], rows: int, capacity: int
) -> None:
    given = texts(*lengths, rows=rows)
    got = groups(given, bounds(64, 4096, 30_000), capacity)
    assert Counter(batch for group in got for batch in group) == Counter(given)
    for group in got:
        longest = max(b.length for b in group)
        padded = longest * sum(b.rows for b in group)
        assert len(group) == 1 or (padded <= 4096 and 10 * padded <= 30_000)
        assert longest <= max(256, 2 * min(b.length for b in group))


def test_the_oldest_text_is_never_passed_over() -> None:
    given = texts(1000, *[5] * 40)
    assert groups(given, bounds(8))[0] == given[:1]


# --- turns ----------------------------------------------------------------------------------------


@given(
    arrivals=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8)), max_size=60),
    max_rows=st.integers(8, 40),
    data=st.data(),
)
def test_devices_take_turns_and_steps_are_full(
    arrivals: list[tuple[int, int]], max_rows: int, data: st.DataObject
) -> None:
    mixer = ShuffleBuffer[Batch](lambda batch: None)
    mixer.begin(0, seed=1)
    waiting: dict[int, list[Batch]] = {}
    passed: Counter[tuple[int, int]] = Counter()

    def step() -> None:
        group = mixer.take(bounds(max_rows))
        for batch in group:
            assert waiting[batch.device].pop(0) == batch, "of a device the oldest batch comes first"
            for other in waiting:
                if waiting[other]:
                    passed[other, batch.device] += 1
                passed[batch.device, other] = 0
        # while a batch waits, no other device has two turns
        assert all(count <= 1 for count in passed.values())
        left = [batches[0] for batches in waiting.values() if batches]
        assert len(mixer) == sum(map(len, waiting.values()))
        if left:
            used = sum(batch.rows for batch in group)
            assert used + max(batch.rows for batch in left) > max_rows, "there was room"

    for number, (device, rows) in enumerate(arrivals):
        batch = Batch(device, number, rows)
        waiting.setdefault(device, []).append(batch)
        mixer.put(batch)
        if data.draw(st.booleans()):
            step()
    while len(mixer):
        step()
    assert mixer.rows == 0


def test_a_device_with_many_batches_does_not_delay_another_one() -> None:
    mixer = ShuffleBuffer[Batch](lambda batch: None)
    mixer.begin(0, seed=1)
    for batch in batches([4] * 100, device=1):
        mixer.put(batch)
    assert [b.device for b in mixer.take(bounds(16))] == [1, 1, 1, 1]
    for device in (2, 3):
        for batch in batches([4] * 2, device):
            mixer.put(batch)
    assert [b.device for b in mixer.take(bounds(16))] == [1, 2, 3, 1]
    assert [b.device for b in mixer.take(bounds(16))] == [2, 3, 1, 1]


def test_a_text_that_is_passed_over_is_in_the_next_step() -> None:
    mixer = ShuffleBuffer[Batch](lambda batch: None)
    mixer.begin(0, seed=1)
    mixer.put(Batch(1, 0, 4, 64))
    long = Batch(2, 1, 4, 1000)
    for batch in (long, Batch(2, 2, 4, 64), Batch(3, 3, 4, 64)):
        mixer.put(batch)
    assert [b.number for b in mixer.take(bounds(256))] == [0, 2, 3]
    mixer.put(Batch(1, 4, 4, 64))
    assert mixer.take(bounds(256)) == [long]


def test_devices_enter_the_buffer_by_turns() -> None:
    entered: list[Batch] = []
    mixer = ShuffleBuffer[Batch](entered.append)
    mixer.begin(40, seed=1)
    for batch in [*batches([10] * 8, device=1), *batches([10] * 2, device=2)]:
        mixer.put(batch)
    for _ in range(2):
        mixer.take(bounds(20))
    assert [b.device for b in entered] == [1, 1, 1, 1, 1, 2, 1, 2]
