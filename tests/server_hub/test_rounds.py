"""Rounds: members, expected messages and the end of a round, in single steps and at random."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server_hub.rounds.rounds import Phase, RoundRules, Rounds

DEVICES = ["ada", "bo", "cy", "dee", "eli", "flo"]


def begin(rounds: Rounds, now: float) -> list[str]:
    """Start the next round with the devices that the rules draw; return these."""
    members = rounds.draw()
    rounds.start(now, members)
    return members


def end(rounds: Rounds) -> bool:
    """End the round in progress at its deadline; return whether it counts."""
    rounds.close(rounds.deadline)
    return rounds.finish()


def with_devices(number: int = 3, **rules: object) -> Rounds:
    """Return rounds with some devices ready."""
    rounds = Rounds(RoundRules(**rules))  # type: ignore[arg-type]
    for device in DEVICES[:number]:
        rounds.join(device)
    return rounds


# --- starting -------------------------------------------------------------------------------------


def test_nothing_happens_before_enough_devices_are_ready() -> None:
    rounds = with_devices(2, min_devices=3)
    assert rounds.phase is Phase.WAITING
    assert not rounds.can_start(0.0)
    assert not rounds.is_over(1e9)
    rounds.join("bo")
    assert not rounds.can_start(0.0), "joining twice does not make two devices"
    rounds.join("cy")
    assert rounds.can_start(0.0)
    rounds.leave("ada", "gone")
    assert not rounds.can_start(0.0)


def test_a_round_takes_every_ready_device() -> None:
    rounds = with_devices(3, deadline_s=5.0)
    assert sorted(begin(rounds, 100.0)) == ["ada", "bo", "cy"]
    assert rounds.phase is Phase.TRAINING
    assert rounds.number == 1
    assert rounds.members == rounds.owed == {"ada", "bo", "cy"}
    assert rounds.delivered == set()
    assert rounds.dropped == {}
    assert rounds.deadline == 105.0
    assert not rounds.can_start(0.0)


def test_who_joins_during_a_round_takes_part_in_the_next() -> None:
    rounds = with_devices(1)
    begin(rounds, 0.0)
    rounds.join("bo")
    assert not rounds.expects("bo", 1)
    rounds.deliver("bo", 0.0)
    assert rounds.delivered == set()
    rounds.deliver("ada", 0.0)
    assert rounds.is_over(0.0)
    assert end(rounds)
    assert sorted(begin(rounds, 1.0)) == ["ada", "bo"]


def draws(seed: int, order: list[str], rounds_count: int = 6) -> list[list[str]]:
    """Return the members of successive rounds of three devices each."""
    rounds = Rounds(RoundRules(count=rounds_count, per_round=3, seed=seed))
    for device in order:
        rounds.join(device)
    members = []
    for _ in range(rounds_count):
        drawn = begin(rounds, 0.0)
        assert set(drawn) == rounds.members == rounds.owed
        assert len(drawn) == len(set(drawn)) == 3
        members.append(sorted(drawn))
        for device in drawn:
            rounds.deliver(device, 0.0)
        end(rounds)
    return members


def test_the_draw_depends_on_the_seed_and_the_round_alone() -> None:
    first = draws(0, DEVICES)
    assert draws(0, DEVICES) == first
    assert draws(0, DEVICES[::-1]) == first, "not on the order in which devices came"
    assert len({tuple(members) for members in first}) > 1, "each round has a draw of its own"
    assert any(draws(seed, DEVICES) != first for seed in (1, 2, 3))
    assert {device for members in first for device in members} == set(DEVICES)


@pytest.mark.parametrize("per_round", [3, 4, None])
def test_all_take_part_where_there_are_no_more_than_per_round(per_round: int | None) -> None:
    rounds = with_devices(3, per_round=per_round)
    assert sorted(begin(rounds, 0.0)) == ["ada", "bo", "cy"]


# --- during a round -------------------------------------------------------------------------------


def test_a_round_is_over_once_all_have_delivered_or_dropped_out() -> None:
    rounds = with_devices(3)
    begin(rounds, 0.0)
    rounds.deliver("ada", 0.0)
    rounds.drop("bo", "declined: battery")
    assert not rounds.is_over(0.0)
    assert rounds.owed == {"cy"}
    rounds.deliver("cy", 0.0)
    assert rounds.is_over(0.0)
    assert end(rounds)
    assert rounds.delivered == {"ada", "cy"}
    assert rounds.dropped == {"bo": "declined: battery"}
    assert (rounds.phase, rounds.number) == (Phase.WAITING, 1)


def test_the_deadline_ends_a_round_without_the_missing() -> None:
    rounds = with_devices(3, deadline_s=10.0)
    begin(rounds, 50.0)
    rounds.deliver("bo", 0.0)
    assert not rounds.is_over(59.999)
    assert rounds.is_over(60.0)
    assert end(rounds)
    assert rounds.delivered == {"bo"}
    assert rounds.dropped.keys() == {"ada", "cy"}
    assert "10 s" in rounds.dropped["ada"]
    assert rounds.owed == set()
    assert rounds.can_start(0.0), "the late ones can take part in the next round"


def test_what_is_expected_of_whom() -> None:
    rounds = with_devices(2)
    assert not rounds.expects("ada", 0)
    assert not rounds.expects("ada", 1)
    begin(rounds, 0.0)
    assert rounds.expects("ada", 1)
    assert not rounds.expects("ada", 2)
    assert not rounds.expects("ada", 0)
    assert not rounds.expects("stranger", 1)
    rounds.deliver("ada", 0.0)
    assert not rounds.expects("ada", 1), "one update is enough"
    rounds.drop("bo", "")
    assert not rounds.expects("bo", 1)
    end(rounds)
    assert not rounds.expects("bo", 1)


def test_who_has_dropped_out_cannot_deliver_any_more() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.drop("ada", "declined")
    rounds.deliver("ada", 0.0)
    assert rounds.delivered == set()
    assert rounds.dropped == {"ada": "declined"}


def test_an_update_that_turns_out_not_to_count_is_taken_back() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("ada", 0.0)
    rounds.drop("ada", "its activations were not finite")
    assert rounds.delivered == set()
    assert rounds.dropped.keys() == {"ada"}
    rounds.deliver("bo", 0.0)
    assert end(rounds)
    assert rounds.delivered == {"bo"}


def test_a_device_that_leaves_is_not_waited_for() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("bo", 0.0)
    rounds.leave("ada", "the connection was lost")
    assert rounds.is_over(0.0)
    assert rounds.dropped == {"ada": "the connection was lost"}
    assert list(rounds.ready) == ["bo"]


def test_what_was_delivered_counts_though_the_device_has_left() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("ada", 0.0)
    rounds.leave("ada", "went to sleep")
    rounds.leave("bo", "lost")
    assert end(rounds)
    assert (rounds.delivered, rounds.dropped) == ({"ada"}, {"bo": "lost"})


def test_a_device_that_comes_back_waits_for_the_next_round() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.leave("ada", "lost")
    rounds.join("ada")
    assert not rounds.expects("ada", 1)
    rounds.deliver("ada", 0.0)
    assert rounds.delivered == set()
    rounds.deliver("bo", 0.0)
    end(rounds)
    assert sorted(begin(rounds, 0.0)) == ["ada", "bo"]
    assert rounds.dropped == {}


def test_strangers_and_times_between_rounds_do_not_matter() -> None:
    rounds = with_devices(1, count=2)
    rounds.drop("ada", "no round")
    rounds.deliver("ada", 0.0)
    rounds.leave("stranger", "was never here")
    assert (rounds.delivered, rounds.dropped) == (set(), {})
    begin(rounds, 0.0)
    rounds.drop("stranger", "not a member")
    assert rounds.dropped == {}
    rounds.deliver("ada", 0.0)
    end(rounds)
    rounds.leave("ada", "after the round")
    assert rounds.delivered == {"ada"}, "the round it delivered for is over"


# --- the end --------------------------------------------------------------------------------------


def test_a_round_that_nobody_delivered_for_is_repeated() -> None:
    rounds = with_devices(2, count=1, deadline_s=1.0)
    begin(rounds, 0.0)
    assert rounds.is_over(1.0)
    assert not end(rounds)
    assert (rounds.phase, rounds.completed) == (Phase.WAITING, 0)
    begin(rounds, 2.0)
    assert rounds.number == 2, "what is still on its way for the first is not for this one"
    assert rounds.deadline == 3.0
    assert rounds.owed == {"ada", "bo"}
    rounds.deliver("ada", 0.0)
    assert rounds.is_over(3.0)
    assert end(rounds)
    assert (rounds.phase, rounds.completed) == (Phase.DONE, 1)


def test_the_job_is_done_after_its_last_round() -> None:
    rounds = with_devices(1, count=3)
    for number in (1, 2, 3):
        assert rounds.can_start(0.0)
        begin(rounds, 0.0)
        assert rounds.number == number
        rounds.deliver("ada", 0.0)
        assert end(rounds)
    assert rounds.phase is Phase.DONE
    assert not rounds.can_start(0.0)
    assert not rounds.is_over(1e9)
    assert not rounds.expects("ada", 3)


@pytest.mark.parametrize("field", ["count", "min_devices", "per_round", "deadline_s", "quorum"])
@pytest.mark.parametrize("value", [0, -1])
def test_rules_that_make_no_sense_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value}, must be"):
        RoundRules(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value"),
    [("quorum", 1.1), ("quorum", math.nan), ("grace", -0.1), ("grace_s", -1.0),
     ("grace_s", math.nan)],
)  # fmt: skip
def test_a_quorum_that_makes_no_sense_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value}, must be"):
        RoundRules(**{field: value})  # type: ignore[arg-type]


# --- a quorum -------------------------------------------------------------------------------------


def quorum_of(count: int, **rules: object) -> Rounds:
    """Return a round of some devices, named by number, that started at time 100."""
    rounds = Rounds(RoundRules(**rules))  # type: ignore[arg-type]
    for number in range(count):
        rounds.join(str(number))
    begin(rounds, 100.0)
    return rounds


def test_a_round_ends_without_the_slowest_after_a_grace() -> None:
    rounds = quorum_of(30)
    for number in range(23):
        rounds.deliver(str(number), 110.0)
    assert rounds.end == rounds.deadline
    rounds.deliver("23", 130.0)
    assert rounds.end == 160.0, "the others have as long again as the quorum took"
    rounds.deliver("24", 140.0)
    assert rounds.end == 160.0
    assert not rounds.is_over(159.9)
    assert rounds.is_over(160.0)
    rounds.close(160.0)
    assert "25 of 30" in rounds.dropped["25"]
    assert rounds.finish()
    assert len(rounds.dropped) == 5


def test_the_grace_has_a_shortest_length_and_ends_at_the_deadline() -> None:
    rounds = quorum_of(10, grace_s=20.0, deadline_s=30.0)
    for number in range(8):
        rounds.deliver(str(number), 101.0)
    assert rounds.end == 121.0
    rounds = quorum_of(10, grace_s=20.0, deadline_s=30.0)
    for number in range(8):
        rounds.deliver(str(number), 125.0)
    assert rounds.end == 130.0


def test_a_quorum_is_one_of_those_that_have_not_dropped_out() -> None:
    rounds = quorum_of(10)
    for number in range(4):
        rounds.deliver(str(number), 110.0)
    assert rounds.end == rounds.deadline
    for number in range(4, 9):
        rounds.decline(str(number), "battery")
    assert rounds.end == 120.0, "four of five"
    rounds.drop("0", "not finite")
    assert rounds.end == rounds.deadline, "three of four are no quorum"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_small_fleet_waits_for_every_device_that_is_connected(count: int) -> None:
    rounds = quorum_of(count)
    for number in range(count - 1):
        rounds.deliver(str(number), 101.0)
    assert rounds.end == rounds.deadline


def test_a_quorum_of_one_waits_for_everybody() -> None:
    rounds = quorum_of(30, quorum=1.0)
    for number in range(29):
        rounds.deliver(str(number), 101.0)
    rounds.connection("29", 101.0)
    assert rounds.end == rounds.deadline


@pytest.mark.parametrize("count", [2, 3, 5, 30])
@pytest.mark.parametrize("killed_at", [105.0, 115.0, 119.0])
def test_a_killed_device_does_not_hold_a_round(count: int, killed_at: float) -> None:
    rounds = quorum_of(count)
    rounds.connection("0", killed_at)
    for number in range(1, count):
        assert rounds.end == rounds.deadline or number > 1
        rounds.deliver(str(number), 120.0)
    assert rounds.end == pytest.approx(killed_at + 4.0), "a fifth of the time that the others took"
    assert rounds.end <= 100.0 + 1.2 * 20.0
    rounds.close(124.0)
    assert rounds.dropped == {"0": "it has lost its connection"}


def test_a_device_that_is_back_is_waited_for_again() -> None:
    rounds = quorum_of(2)
    rounds.connection("0", 110.0)
    rounds.deliver("1", 120.0)
    assert rounds.end == 114.0
    rounds.connection("0", None)
    assert rounds.end == rounds.deadline
    rounds.connection("0", 130.0)
    assert rounds.end == 136.0, "a fifth of the round until then"


def test_a_device_is_not_held_to_a_connection_that_it_had_before() -> None:
    rounds = quorum_of(2)
    rounds.connection("0", 110.0)
    rounds.leave("0", "the session is over")
    rounds.join("0")
    assert rounds.lost == {}


def test_a_break_of_many_connections_is_waited_for() -> None:
    rounds = quorum_of(10)
    for number in range(7):
        rounds.deliver(str(number), 110.0)
        rounds.connection(str(number), 111.0)
    for number in range(7, 10):
        rounds.connection(str(number), 111.0)
    assert rounds.end == rounds.deadline


def test_nothing_is_taken_after_the_close_and_refusals_still_count() -> None:
    rounds = quorum_of(3, deadline_s=10.0)
    rounds.deliver("0", 105.0)
    rounds.deliver("1", 105.0)
    rounds.close(110.0)
    assert not rounds.expects("2", 1)
    rounds.deliver("2", 110.0)
    rounds.drop("1", "not finite")
    assert rounds.delivered == {"0"}
    assert rounds.finish()
    assert rounds.dropped == {"1": "not finite", "2": "no update within 10 s"}


# --- devices that miss rounds, and rounds that all decline ----------------------------------------


def rounds_with_a_silent_device(count: int, per_round: int | None) -> list[bool]:
    """Return in which of many rounds a device took part that never delivered."""
    rounds = Rounds(RoundRules(count=count, per_round=per_round))
    for device in DEVICES:
        rounds.join(device)
    there = []
    for _ in range(count):
        members = begin(rounds, 0.0)
        there.append("bo" in members)
        for device in members:
            if device != "bo":
                rounds.deliver(device, 0.0)
        end(rounds)
    return there


def test_a_device_that_misses_rounds_takes_part_in_fewer() -> None:
    there = rounds_with_a_silent_device(60, None)
    assert there[:3] == [True] * 3
    part = [number for number, took_part in enumerate(there) if took_part][2:]
    assert {b - a for a, b in itertools.pairwise(part[1:4])} == {2}
    assert {b - a for a, b in itertools.pairwise(part[4:7])} == {4}
    assert {b - a for a, b in itertools.pairwise(part[7:])} == {8}, "and never fewer than that"
    assert rounds_with_a_silent_device(60, None) == there


def test_a_device_that_misses_rounds_is_drawn_less_often() -> None:
    there = rounds_with_a_silent_device(400, 3)
    assert 0.75 * 400 * 3 / 6 / 8 < sum(there) < 1.5 * 400 * 3 / 6 / 8 + 6


def test_a_device_that_delivers_takes_part_as_before() -> None:
    rounds = with_devices(3, count=100)
    rounds.missed["ada"] = 7
    there = []
    for _ in range(20):
        members = begin(rounds, 0.0)
        there.append("ada" in members)
        for device in members:
            rounds.deliver(device, 0.0)
        end(rounds)
    first = there.index(True)
    assert 0 < first < 4
    assert all(there[first:])


def test_who_declines_or_leaves_and_comes_back_misses_nothing_more() -> None:
    rounds = with_devices(2, count=100)
    for _ in range(4):
        assert sorted(begin(rounds, 0.0)) == ["ada", "bo"]
        rounds.decline("ada", "battery")
        rounds.deliver("bo", 0.0)
        end(rounds)
    assert rounds.dropped == {"ada": "declined: battery"}
    assert rounds.missed == {}
    for missed in (1, 2, 3):
        begin(rounds, 0.0)
        rounds.leave("ada", "left")
        rounds.deliver("bo", 0.0)
        end(rounds)
        rounds.join("ada")
        assert rounds.missed == {"ada": missed}, "leaving does not help"


def test_somebody_takes_part_though_all_miss_rounds() -> None:
    rounds = with_devices(3)
    now = 0.0
    for _ in range(20):
        assert begin(rounds, now)
        end(rounds)
        now = rounds.deadline


def starts(rounds: Rounds, count: int) -> list[float]:
    """Return the times at which rounds start that every member declines at once."""
    times = [0.0]
    for _ in range(count):
        for device in begin(rounds, times[-1]):
            rounds.decline(device, "battery")
        assert not end(rounds)
        assert not rounds.can_start(times[-1])
        times.append(rounds.not_before)
        assert rounds.can_start(times[-1])
    return times


def test_rounds_that_all_decline_come_less_and_less_often() -> None:
    rounds = with_devices(2)
    times = starts(rounds, 9)
    pauses = [b - a for a, b in itertools.pairwise(times)]
    assert pauses == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
    rounds.join("ada")
    begin(rounds, times[-1])
    rounds.drop("ada", "declined")
    rounds.drop("bo", "declined")
    assert not end(rounds)
    assert not rounds.can_start(times[-1])
    rounds.join("bo")
    assert not rounds.can_start(times[-1]), "it was ready before"
    rounds.join("cy")
    assert rounds.can_start(times[-1]), "a new device may deliver"
    begin(rounds, times[-1])
    rounds.deliver("cy", times[-1])
    assert end(rounds)
    assert rounds.can_start(times[-1])
    assert starts(rounds, 2) == [0.0, 0.5, 1.5], "the shortest pause again"


def test_a_long_round_without_an_update_is_not_followed_by_a_pause() -> None:
    rounds = with_devices(2, deadline_s=40.0)
    for start in (0.0, 40.0, 80.0):
        begin(rounds, start)
        assert not end(rounds)
        assert rounds.can_start(start + 40.0)


# --- at random ------------------------------------------------------------------------------------


class RoundsMachine(RuleBasedStateMachine):
    """All events of devices in any order, compared with a ledger of expected results."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.useful = 0
        self.left: set[str] = set()
        self.out: set[str] = set()

    @initialize(
        count=st.integers(1, 3),
        min_devices=st.integers(1, 3),
        per_round=st.one_of(st.none(), st.integers(1, 4)),
        deadline_s=st.sampled_from([0.5, 1.0, 7.0]),
        seed=st.integers(0, 3),
        quorum=st.sampled_from([0.5, 0.8, 1.0]),
    )
    def begin(
        self,
        count: int,
        min_devices: int,
        per_round: int | None,
        deadline_s: float,
        seed: int,
        quorum: float,
    ) -> None:
        self.rounds = Rounds(
            RoundRules(count, min_devices, per_round, deadline_s, seed, quorum=quorum, grace_s=0.5)
        )

    @property
    def training(self) -> bool:
        return self.rounds.phase is Phase.TRAINING

    @rule(device=st.sampled_from(DEVICES))
    def join(self, device: str) -> None:
        self.rounds.join(device)
        self.left.discard(device)

    @rule(device=st.sampled_from(DEVICES))
    def leave(self, device: str) -> None:
        if device in self.rounds.owed:
            self.out.add(device)
        self.rounds.leave(device, "left")
        self.left.add(device)

    @rule(device=st.sampled_from(DEVICES))
    def drop(self, device: str) -> None:
        ready = list(self.rounds.ready)
        self.rounds.drop(device, "dropped")
        assert list(self.rounds.ready) == ready
        self.out.add(device)

    @rule(device=st.sampled_from(DEVICES))
    def deliver(self, device: str) -> None:
        expected = self.rounds.expects(device, self.rounds.number)
        delivered = set(self.rounds.delivered)
        self.rounds.deliver(device, self.now)
        assert self.rounds.delivered == (delivered | {device} if expected else delivered)

    @rule(seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.rounds.can_start(self.now))
    @rule()
    def start(self) -> None:
        rules, ready = self.rounds.rules, set(self.rounds.ready)
        assert len(ready) >= rules.min_devices
        members = begin(self.rounds, self.now)
        assert set(members) <= ready
        struck = {d for d in ready if self.rounds.missed.get(d, 0) >= 3}
        assert len(members) <= min(len(ready), rules.per_round or len(ready))
        assert len(members) >= min(len(ready - struck), rules.per_round or len(ready))
        assert members
        assert self.rounds.deadline == self.now + rules.deadline_s
        self.out = set()

    @rule(device=st.sampled_from(DEVICES))
    def lose(self, device: str) -> None:
        self.rounds.connection(device, self.now)

    @rule(device=st.sampled_from(DEVICES))
    def regain(self, device: str) -> None:
        self.rounds.connection(device, None)

    @precondition(lambda self: self.training)
    @rule()
    def finish(self) -> None:
        if not self.rounds.is_over(self.now):
            assert self.rounds.owed
            assert self.now < self.rounds.deadline
            return
        self.end()

    def end(self) -> None:
        delivered, members = set(self.rounds.delivered), set(self.rounds.members)
        self.rounds.close(self.now)
        useful = self.rounds.finish()
        assert useful == bool(delivered)
        assert self.rounds.delivered == delivered
        assert self.rounds.owed == set()
        assert self.rounds.dropped.keys() == members - delivered
        self.useful += useful

    @invariant()
    def members_are_partitioned(self) -> None:
        rounds = self.rounds
        if self.training:
            dropped = set(rounds.dropped)
            assert rounds.owed | rounds.delivered | dropped == rounds.members
            assert not rounds.owed & rounds.delivered
            assert not rounds.owed & dropped
            assert not rounds.delivered & dropped
            assert dropped == rounds.members & self.out
        else:
            assert rounds.owed == set()

    @invariant()
    def a_device_that_has_left_is_not_waited_for(self) -> None:
        assert not self.left & self.rounds.owed
        assert not self.left & self.rounds.ready.keys()

    @invariant()
    def useful_rounds_are_counted(self) -> None:
        assert self.rounds.completed == self.useful
        assert (self.rounds.phase is Phase.DONE) == (self.useful == self.rounds.rules.count)

    @invariant()
    def a_round_ends_by_its_deadline(self) -> None:
        if self.training:
            assert self.rounds.is_over(self.rounds.deadline)
            if not self.rounds.owed or self.now >= self.rounds.deadline:
                assert self.rounds.is_over(self.now)
            elif self.rounds.is_over(self.now):
                assert self.rounds.rules.quorum < 1
                assert self.rounds.delivered
                counted = len(self.rounds.delivered) + len(self.rounds.owed)
                enough = len(self.rounds.delivered) >= self.rounds.rules.quorum * counted
                assert enough or self.rounds.owed <= self.rounds.lost.keys()

    def teardown(self) -> None:
        """From every state the job can be brought to its end."""
        if not hasattr(self, "rounds"):
            return
        if self.training:
            self.now = max(self.now, self.rounds.deadline)
            assert self.rounds.is_over(self.now)
            self.end()
        for device in DEVICES:
            self.rounds.join(device)
        while self.rounds.phase is not Phase.DONE:
            self.now = max(self.now, self.rounds.not_before)
            for device in begin(self.rounds, self.now):
                self.rounds.deliver(device, self.now)
            self.end()
            assert self.useful <= self.rounds.rules.count
        assert self.rounds.completed == self.rounds.rules.count


TestRoundsAtRandom = RoundsMachine.TestCase
TestRoundsAtRandom.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
