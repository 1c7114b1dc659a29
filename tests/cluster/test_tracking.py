"""The leader's book: by example, and against a model that keeps every word ever said (DESIGN.md section 5, rules 5, 7, 10)."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pybroker.cluster.registry import Position
from pybroker.cluster.tracking import BEATS_MAX, Copy, Tracking
from pybroker.errors import ProtocolError

B1, B2, C1 = Copy("b", "1"), Copy("b", "2"), Copy("c", "1")
P = Position


def book(last: int = 10) -> Tracking:
    return Tracking(5, 2, "a", [Copy("a", "1"), B1, C1], last)


def test_reach_is_what_a_quorum_holds():
    tracking = book()
    assert tracking.reach() == 0
    b = tracking.attach(B1, 7)
    assert tracking.reach() == 7
    c = tracking.attach(C1, 9)
    assert tracking.reach() == 9
    tracking.append(11)
    tracking.sent(b, 11)
    tracking.answer(b, 5, P(5, 11))
    assert tracking.reach() == 11
    tracking.detach(b)
    assert tracking.reach() == 11  # what it holds it holds
    five = Tracking(5, 3, "a", [B1, C1, Copy("d", "1"), Copy("e", "1")], 10)
    five.attach(B1, 10)
    assert five.reach() == 0
    five.attach(C1, 4)
    assert five.reach() == 4
    assert Tracking(5, 1, "a", [], 10).reach() == 10
    assert Tracking(5, 1, "a", [], 10).lease_until(2.0) == math.inf
    assert tracking.is_current(c)


def test_words_that_can_not_be_are_refused():
    tracking = book()
    b = tracking.attach(B1, 7)
    tracking.sent(b, 9)
    for epoch, position in ((4, P(5, 8)), (6, P(5, 8)), (5, P(5, 10)), (5, P(6, 8))):
        with pytest.raises(ProtocolError):
            tracking.answer(b, epoch, position)
    number = tracking.beat(1.0)
    for epoch, beat in ((5, number), (5, number + 1), (4, number), (5, 0)):  # not sent there yet
        with pytest.raises(ProtocolError):
            tracking.answer_beat(b, epoch, beat, P(5, 7))
    tracking.beat_sent(b, number)
    with pytest.raises(ProtocolError):
        tracking.answer_beat(b, 4, number, P(5, 7))
    tracking.answer_beat(b, 5, number, P(5, 7))
    assert tracking.lease_until(2.0) == 3.0
    again = tracking.attach(B1, 7)
    for call in (
        lambda: tracking.answer(b, 5, P(5, 8)),
        lambda: tracking.answer_beat(b, 5, number, P(5, 8)),
        lambda: tracking.answer_beat(again, 5, number, P(5, 8)),
    ):
        with pytest.raises(ProtocolError):
            call()
    with pytest.raises(ProtocolError):
        tracking.attach(Copy("a", "9"), 0)
    with pytest.raises(ValueError, match="does not follow"):
        tracking.append(12)


def test_the_lease_counts_from_sending_and_needs_a_quorum():
    tracking = Tracking(5, 3, "a", [B1, C1], 10)
    b, c = tracking.attach(B1, 0), tracking.attach(C1, 0)
    first = tracking.beat(1.0)
    tracking.beat_sent(b, first)
    tracking.beat_sent(c, first)
    second = tracking.beat(2.0)
    tracking.beat_sent(b, second)
    tracking.answer_beat(b, 5, second, P(0, 0))
    assert tracking.lease_until(2.0) == -math.inf
    tracking.answer_beat(c, 5, first, P(0, 0))
    assert tracking.lease_until(2.0) == 3.0
    tracking.answer_beat(b, 5, first, P(0, 0))  # an older one changes nothing
    assert tracking.lease_until(2.0) == 3.0


def test_very_old_heartbeats_prove_nothing():
    tracking = book()
    b = tracking.attach(B1, 0)
    first = tracking.beat(1.0)
    tracking.beat_sent(b, first)
    for _ in range(BEATS_MAX):
        tracking.beat(2.0)
    tracking.answer_beat(b, 5, first, P(0, 0))
    assert tracking.lease_until(2.0) == -math.inf


def test_a_new_copy_of_a_counted_name():
    tracking = book()
    old = tracking.attach(B1, 10)
    assert tracking.reach() == 10
    tracking.append(11)
    new = tracking.attach(B2, 0)
    assert tracking.counted() == [C1]  # at once
    assert tracking.reach() == 0
    with pytest.raises(ProtocolError):
        tracking.answer(old, 5, P(5, 11))
    tracking.sent(new, 10)
    tracking.answer(new, 5, P(5, 10))
    assert tracking.ready_learners() == []  # 11 was there when it came
    assert not tracking.registered(B2)
    tracking.append(12)
    tracking.sent(new, 11)
    tracking.answer(new, 5, P(5, 11))
    assert tracking.ready_learners() == [B2]
    assert tracking.reach() == 0
    assert tracking.registered(B2)
    assert tracking.reach() == 11
    assert tracking.ready_learners() == []


def test_a_copy_that_was_replaced_while_it_was_registered_does_not_count():
    tracking = book()
    tracking.attach(B2, 10)
    assert tracking.ready_learners() == [B2]
    tracking.attach(B1, 10)  # the old one comes back: a learner now
    assert not tracking.registered(B2)
    assert tracking.counted() == [C1]
    assert tracking.ready_learners() == [B1]
    tracking.stop_counting("c")
    assert tracking.counted() == []


class Model(RuleBasedStateMachine):
    """`Tracking` against the plain rules, with every fact kept."""

    names = "bcde"

    @initialize(quorum=st.sampled_from([1, 2, 3]), last=st.integers(0, 5))
    def begin(self, quorum, last):
        self.quorum = quorum
        self.last = last
        roster = [Copy(name, "0") for name in self.names[: 2 * quorum - 2]]
        self.tracking = Tracking(7, quorum, "a", [Copy("a", "0"), *roster], last)
        self.counts = set(roster)
        self.now = 0.0
        self.beats = {}
        self.links = {}  # attachment -> facts
        self.newest = {}  # name -> attachment
        self.holds = {}  # copy -> (attachment, durable)
        self.answered = {}  # copy -> time

    def link(self, number):
        return sorted(self.links)[number % len(self.links)]

    @rule(name=st.sampled_from(names), incarnation=st.sampled_from("012"), durable=st.integers(0, 20))
    def attach(self, name, incarnation, durable):
        copy = Copy(name, incarnation)
        durable = min(durable, self.last)
        attachment = self.tracking.attach(copy, durable)
        assert attachment not in self.links
        before = self.newest.get(name)
        if before is not None and self.links[before]["copy"] != copy:
            self.answered.pop(copy, None)  # what an earlier life of this copy answered is not looked at again
        self.links[attachment] = {
            "copy": copy, "durable": durable, "sent": durable, "beats": set(), "gone": False, "need": self.last,
        }  # fmt: skip
        self.newest[name] = attachment
        self.counts = {one for one in self.counts if one.name != name or one == copy}

    def current(self, attachment):
        facts = self.links[attachment]
        return self.newest[facts["copy"].name] == attachment and not facts["gone"]

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 99))
    def detach(self, number):
        attachment = self.link(number)
        self.tracking.detach(attachment)
        self.links[attachment]["gone"] = True

    @rule()
    def append(self):
        self.last += 1
        self.tracking.append(self.last)

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 99), lsn=st.integers(0, 30))
    def send(self, number, lsn):
        attachment = self.link(number)
        lsn = min(lsn, self.last)
        self.tracking.sent(attachment, lsn)
        facts = self.links[attachment]
        if self.current(attachment):
            facts["sent"] = max(facts["sent"], lsn)

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 99), lsn=st.integers(0, 30), epoch=st.sampled_from([7, 7, 7, 6, 8]))
    def answer(self, number, lsn, epoch):
        attachment = self.link(number)
        facts = self.links[attachment]
        if self.current(attachment) and epoch == 7 and lsn <= facts["sent"]:
            self.tracking.answer(attachment, epoch, P(7, lsn))
            facts["durable"] = max(facts["durable"], lsn)
        else:
            with pytest.raises(ProtocolError):
                self.tracking.answer(attachment, epoch, P(7, lsn))

    @rule(step=st.floats(0, 1))
    def beat(self, step):
        self.now += step
        self.beats[self.tracking.beat(self.now)] = self.now

    @precondition(lambda self: self.links and self.beats)
    @rule(number=st.integers(0, 99))
    def send_beat(self, number):
        attachment = self.link(number)
        newest = max(self.beats)
        self.tracking.beat_sent(attachment, newest)
        if self.current(attachment):
            self.links[attachment]["beats"].add(newest)

    @precondition(lambda self: self.links and self.beats)
    @rule(number=st.integers(0, 99), back=st.integers(0, 2))
    def answer_beat(self, number, back):
        attachment = self.link(number)
        facts = self.links[attachment]
        beat = max(self.beats) - back
        if self.current(attachment) and beat in facts["beats"]:
            self.tracking.answer_beat(attachment, 7, beat, P(7, 0))
            copy = facts["copy"]
            self.answered[copy] = max(self.answered.get(copy, -math.inf), self.beats[beat])
        elif not self.current(attachment) or not facts["beats"] or beat > max(facts["beats"]):
            with pytest.raises(ProtocolError):
                self.tracking.answer_beat(attachment, 7, beat, P(7, 0))

    @precondition(lambda self: self.links)
    @rule(number=st.integers(0, 99))
    def register(self, number):
        facts = self.links[self.link(number)]
        copy = facts["copy"]
        newest = self.links[self.newest[copy.name]]
        counts = self.tracking.registered(copy)
        assert counts == (newest["copy"] == copy and newest["durable"] >= newest["need"])
        if counts:
            self.counts.add(copy)

    @invariant()
    def agrees(self):
        if not hasattr(self, "tracking"):
            return
        assert set(self.tracking.counted()) == self.counts
        newest = [self.links[attachment] for attachment in self.newest.values()]
        held = sorted((one["durable"] for one in newest if one["copy"] in self.counts), reverse=True)
        times = sorted(
            (self.answered.get(one["copy"], -math.inf) for one in newest if one["copy"] in self.counts), reverse=True
        )
        others = self.quorum - 1
        if others == 0:
            assert self.tracking.reach() == self.last
        else:
            assert self.tracking.reach() == (held[others - 1] if len(held) >= others else 0)
            expected = times[others - 1] + 2.0 if len(times) >= others else -math.inf
            assert self.tracking.lease_until(2.0) == expected
        ready = {
            one["copy"]
            for one in newest
            if not one["gone"] and one["copy"] not in self.counts and one["durable"] >= one["need"]
        }
        assert set(self.tracking.ready_learners()) == ready


Model.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestModel = Model.TestCase
