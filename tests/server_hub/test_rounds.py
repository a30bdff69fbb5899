"""Rounds: members, expected messages and the end of a round, in single steps and at random."""

from __future__ import annotations

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
    assert not rounds.can_start()
    assert not rounds.is_over(1e9)
    rounds.join("bo")
    assert not rounds.can_start(), "joining twice does not make two devices"
    rounds.join("cy")
    assert rounds.can_start()
    rounds.leave("ada", "gone")
    assert not rounds.can_start()


def test_a_round_takes_every_ready_device() -> None:
    rounds = with_devices(3, deadline_s=5.0)
    assert sorted(begin(rounds, 100.0)) == ["ada", "bo", "cy"]
    assert rounds.phase is Phase.TRAINING
    assert rounds.number == 1
    assert rounds.members == rounds.owed == {"ada", "bo", "cy"}
    assert rounds.delivered == set()
    assert rounds.dropped == {}
    assert rounds.deadline == 105.0
    assert not rounds.can_start()


def test_who_joins_during_a_round_takes_part_in_the_next() -> None:
    rounds = with_devices(1)
    begin(rounds, 0.0)
    rounds.join("bo")
    assert not rounds.expects("bo", 1)
    rounds.deliver("bo")
    assert rounds.delivered == set()
    rounds.deliver("ada")
    assert rounds.is_over(0.0)
    assert rounds.finish()
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
            rounds.deliver(device)
        rounds.finish()
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
    rounds.deliver("ada")
    rounds.drop("bo", "declined: battery")
    assert not rounds.is_over(0.0)
    assert rounds.owed == {"cy"}
    rounds.deliver("cy")
    assert rounds.is_over(0.0)
    assert rounds.finish()
    assert rounds.delivered == {"ada", "cy"}
    assert rounds.dropped == {"bo": "declined: battery"}
    assert (rounds.phase, rounds.number) == (Phase.WAITING, 1)


def test_the_deadline_ends_a_round_without_the_missing() -> None:
    rounds = with_devices(3, deadline_s=10.0)
    begin(rounds, 50.0)
    rounds.deliver("bo")
    assert not rounds.is_over(59.999)
    assert rounds.is_over(60.0)
    assert rounds.finish()
    assert rounds.delivered == {"bo"}
    assert rounds.dropped.keys() == {"ada", "cy"}
    assert "10 s" in rounds.dropped["ada"]
    assert rounds.owed == set()
    assert rounds.can_start(), "the late ones can take part in the next round"


def test_what_is_expected_of_whom() -> None:
    rounds = with_devices(2)
    assert not rounds.expects("ada", 0)
    assert not rounds.expects("ada", 1)
    begin(rounds, 0.0)
    assert rounds.expects("ada", 1)
    assert not rounds.expects("ada", 2)
    assert not rounds.expects("ada", 0)
    assert not rounds.expects("stranger", 1)
    rounds.deliver("ada")
    assert not rounds.expects("ada", 1), "one update is enough"
    rounds.drop("bo", "")
    assert not rounds.expects("bo", 1)
    rounds.finish()
    assert not rounds.expects("bo", 1)


def test_who_has_dropped_out_cannot_deliver_any_more() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.drop("ada", "declined")
    rounds.deliver("ada")
    assert rounds.delivered == set()
    assert rounds.dropped == {"ada": "declined"}


def test_an_update_that_turns_out_not_to_count_is_taken_back() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("ada")
    rounds.drop("ada", "its activations were not finite")
    assert rounds.delivered == set()
    assert rounds.dropped.keys() == {"ada"}
    rounds.deliver("bo")
    assert rounds.finish()
    assert rounds.delivered == {"bo"}


def test_a_device_that_leaves_is_not_waited_for() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("bo")
    rounds.leave("ada", "the connection was lost")
    assert rounds.is_over(0.0)
    assert rounds.dropped == {"ada": "the connection was lost"}
    assert list(rounds.ready) == ["bo"]


def test_what_was_delivered_counts_though_the_device_has_left() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.deliver("ada")
    rounds.leave("ada", "went to sleep")
    rounds.leave("bo", "lost")
    assert rounds.finish()
    assert (rounds.delivered, rounds.dropped) == ({"ada"}, {"bo": "lost"})


def test_a_device_that_comes_back_waits_for_the_next_round() -> None:
    rounds = with_devices(2)
    begin(rounds, 0.0)
    rounds.leave("ada", "lost")
    rounds.join("ada")
    assert not rounds.expects("ada", 1)
    rounds.deliver("ada")
    assert rounds.delivered == set()
    rounds.deliver("bo")
    rounds.finish()
    assert sorted(begin(rounds, 0.0)) == ["ada", "bo"]
    assert rounds.dropped == {}


def test_strangers_and_times_between_rounds_do_not_matter() -> None:
    rounds = with_devices(1, count=2)
    rounds.drop("ada", "no round")
    rounds.deliver("ada")
    rounds.leave("stranger", "was never here")
    assert (rounds.delivered, rounds.dropped) == (set(), {})
    begin(rounds, 0.0)
    rounds.drop("stranger", "not a member")
    assert rounds.dropped == {}
    rounds.deliver("ada")
    rounds.finish()
    rounds.leave("ada", "after the round")
    assert rounds.delivered == {"ada"}, "the round it delivered for is over"


# --- the end --------------------------------------------------------------------------------------


def test_a_round_that_nobody_delivered_for_is_repeated() -> None:
    rounds = with_devices(2, count=1, deadline_s=1.0)
    begin(rounds, 0.0)
    assert rounds.is_over(1.0)
    assert not rounds.finish()
    assert (rounds.phase, rounds.completed) == (Phase.WAITING, 0)
    begin(rounds, 2.0)
    assert rounds.number == 2, "what is still on its way for the first is not for this one"
    assert rounds.deadline == 3.0
    assert rounds.owed == {"ada", "bo"}
    rounds.deliver("ada")
    assert rounds.is_over(3.0)
    assert rounds.finish()
    assert (rounds.phase, rounds.completed) == (Phase.DONE, 1)


def test_the_job_is_done_after_its_last_round() -> None:
    rounds = with_devices(1, count=3)
    for number in (1, 2, 3):
        assert rounds.can_start()
        begin(rounds, 0.0)
        assert rounds.number == number
        rounds.deliver("ada")
        assert rounds.finish()
    assert rounds.phase is Phase.DONE
    assert not rounds.can_start()
    assert not rounds.is_over(1e9)
    assert not rounds.expects("ada", 3)


@pytest.mark.parametrize("field", ["count", "min_devices", "per_round", "deadline_s"])
@pytest.mark.parametrize("value", [0, -1])
def test_rules_that_make_no_sense_are_refused(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value}, must be"):
        RoundRules(**{field: value})  # type: ignore[arg-type]


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
    )
    def begin(
        self, count: int, min_devices: int, per_round: int | None, deadline_s: float, seed: int
    ) -> None:
        self.rounds = Rounds(RoundRules(count, min_devices, per_round, deadline_s, seed))

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
        self.rounds.deliver(device)
        assert self.rounds.delivered == (delivered | {device} if expected else delivered)

    @rule(seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @precondition(lambda self: self.rounds.can_start())
    @rule()
    def start(self) -> None:
        rules, ready = self.rounds.rules, set(self.rounds.ready)
        assert len(ready) >= rules.min_devices
        members = begin(self.rounds, self.now)
        assert set(members) <= ready
        assert len(members) == min(len(ready), rules.per_round or len(ready))
        assert self.rounds.deadline == self.now + rules.deadline_s
        self.out = set()

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
            assert self.rounds.is_over(self.now) == (
                not self.rounds.owed or self.now >= self.rounds.deadline
            )

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
            for device in begin(self.rounds, self.now):
                self.rounds.deliver(device)
            self.end()
            assert self.useful <= self.rounds.rules.count
        assert self.rounds.completed == self.rounds.rules.count


TestRoundsAtRandom = RoundsMachine.TestCase
TestRoundsAtRandom.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
