"""What a client keeps of its sends: against a broker that stores each sequence once, over connections that come and go."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pybroker.errors import ProtocolError
from pybroker.protocols.native_frames import COMMIT, SEND
from pybroker.protocols.native_sends import FRAME_MESSAGES_MAX, Row, Sends, Submission, row_size


def rows(*bodies: bytes) -> list[Row]:
    return [("/queue/q", body, b"", 20, 0) for body in bodies]


def submit(sends: Sends, *bodies: bytes, context: Any = "mine") -> Submission:
    made = rows(*bodies)
    return sends.submit(made, sum(map(row_size, made)), context)


def frame(sends: Sends) -> list[Any]:
    data = sends.next_frame()
    assert data is not None
    fields = msgpack.unpackb(data[4:])
    assert len(data) - 4 == int.from_bytes(data[:4], "big")
    return fields  # type: ignore[no-any-return]


def connected(messages_max: int = 100, bytes_max: int = 10_000) -> Sends:
    sends = Sends("producer-of-16-chars")
    sends.connected(messages_max, bytes_max, 100_000_000, 100_000)
    return sends


def test_what_waits_goes_out_in_one_frame() -> None:
    sends = connected()
    mine = [submit(sends, b"a", b"b"), submit(sends, b"c"), submit(sends, b"d", b"e")]
    kind, first, sent = frame(sends)
    assert (kind, first, [row[1] for row in sent]) == (SEND, 1, [b"a", b"b", b"c", b"d", b"e"])
    assert sends.next_frame() is None
    assert sends.confirm(1, 3) == [(mine[0], 2), (mine[1], 1)]
    assert sends.confirm(5, 5) == [(mine[2], 1)]
    assert sends.refuse(4) is mine[2]
    assert (sends.messages, sends.bytes, sends.pending) == (0, 0, 0)
    assert mine[0].rows == rows(b"a", b"b"), "the caller's list is not touched"


def test_the_window_holds_and_something_alone_always_may() -> None:
    sends = connected(messages_max=3, bytes_max=10)
    submit(sends, b"x" * 50)
    assert not sends.has_room
    submit(sends, b"a", b"b", b"c", b"d")
    assert len(frame(sends)[2]) == 1
    assert sends.next_frame() is None
    sends.confirm(1, 1)
    assert [row[1] for row in frame(sends)[2]] == [b"a", b"b", b"c"]
    assert sends.next_frame() is None
    sends.confirm(2, 2)
    assert [row[1] for row in frame(sends)[2]] == [b"d"]


def test_frames_are_bounded() -> None:
    sends = connected(messages_max=10_000, bytes_max=100_000_000)
    submit(sends, *[b"x"] * (FRAME_MESSAGES_MAX + 1))
    submit(sends, b"y" * 700_000, b"y" * 700_000)
    assert [len(frame(sends)[2]) for _ in range(3)] == [FRAME_MESSAGES_MAX, 2, 1]
    assert sends.next_frame() is None


def test_frames_fit_the_broker_s_limit() -> None:
    sends = Sends("producer-of-16-chars")
    assert sends.connected(10_000, 10**9, 5_000, 5_000) == []
    destination = "/queue/" + "ü" * 500
    for _ in range(5):
        made: list[Row] = [(destination, b"x" * 900, b"a:b\n", 20, 2**62)] * 20
        sends.submit(made, sum(map(row_size, made)), "mine")
    count = 0
    while (data := sends.next_frame()) is not None:
        assert len(data) - 4 <= 5_000
        count += len(msgpack.unpackb(data[4:])[2])
    assert count == 100


def test_a_transaction_has_a_frame_and_a_sequence_of_its_own() -> None:
    sends = connected()
    submit(sends, b"a")
    mine = sends.submit_transaction(rows(b"t", b"u"), 2, {5: [(1, 2)]}, {5: [(3, 3)], 6: [(9, 9)]}, "tx")
    submit(sends, b"b")
    assert frame(sends)[:2] == [SEND, 1]
    assert frame(sends) == [
        COMMIT,
        2,
        [list(row) for row in rows(b"t", b"u")],
        [[5, [1, 2]]],
        [[5, [3, 3]], [6, [9, 9]]],
    ]
    assert frame(sends)[:2] == [SEND, 3]
    assert sends.messages == 4
    assert sends.confirm(1, 3)[1] == (mine, 1)
    assert (sends.messages, sends.bytes) == (0, 0)


def test_what_was_not_written_can_be_withdrawn() -> None:
    sends = connected()
    first, second, third = (submit(sends, body) for body in (b"a", b"b", b"c"))
    sends.withdraw(third)
    sends.withdraw(first)
    assert submit(sends, b"d").first == 3, "the last sequence is given again"
    assert [(each[1], [row[1] for row in each[2]]) for each in (frame(sends),)] == [(2, [b"b", b"d"])]
    sends.withdraw(second)
    assert second.context is None, "it was written, and nobody cares"
    sends.disconnected()
    sends.connected(100, 100, 100_000, 1_000)
    assert frame(sends)[1] == 3, "what nobody waits for is not written again"
    assert (sends.messages, sends.bytes) == (1, 1)


def test_what_is_too_large_for_the_next_broker_is_not_sent_again_and_again() -> None:
    sends = connected()
    large, small = submit(sends, b"x" * 500), submit(sends, b"y")
    transaction = sends.submit_transaction(rows(b"x" * 300), 300, {}, {}, "tx")
    frame(sends)
    sends.disconnected()
    assert sends.connected(100, 10_000, 1_400, 400) == [large, transaction]
    assert frame(sends)[1] == small.first
    assert sends.next_frame() is None


@pytest.mark.parametrize("confirmed", [(3, 3), (1, 3), (2, 2)])
def test_confirming_what_is_not_under_way_breaks_the_rules(confirmed: tuple[int, int]) -> None:
    sends = connected()
    submit(sends, b"a", b"b")
    frame(sends)
    sends.confirm(2, 2)
    submit(sends, b"c")
    with pytest.raises(ProtocolError):
        sends.confirm(*confirmed)
    with pytest.raises(ProtocolError):
        sends.refuse(confirmed[1])


def test_another_producer_takes_what_was_never_written() -> None:
    sends = connected(messages_max=1)
    tried, named, fresh = submit(sends, b"a"), submit(sends, b"b"), submit(sends, b"c", b"d")
    named.named = True
    frame(sends)
    sends.disconnected()
    assert sends.elsewhere("another-of-16-chars") == [tried, named]
    assert (fresh.first, fresh.last, sends.known, sends.message_id(1)) == (1, 2, False, "another-of-16-chars-1")
    sends.connected(10, 10, 100_000, 1_000)
    assert frame(sends)[1] == 1
    assert sends.confirm(1, 2) == [(fresh, 2)]


def test_the_same_producer_elsewhere_repeats_what_can_be() -> None:
    sends = connected()
    tried = submit(sends, b"a")
    transaction = sends.submit_transaction(rows(b"t"), 1, {}, {}, "tx")
    settling = sends.submit_transaction([], 0, {1: [(1, 1)]}, {}, "tx")
    while sends.next_frame() is not None:
        pass
    sends.disconnected()
    assert sends.elsewhere(sends.producer) == [settling]
    sends.connected(10, 10, 100_000, 1_000)
    assert [frame(sends)[1], frame(sends)[1]] == [tried.first, transaction.first]


class Machine(RuleBasedStateMachine):
    """A client's sends and a broker, which keeps what is stored of the producer. Connections lose what is on its way.

    mine     submissions in order: what was told of each of its sequences
    wire     frames that the broker has not read; `answers`: what the client has not read
    stored   sequence to body, at the broker
    """

    def __init__(self) -> None:
        super().__init__()
        self.sends = Sends("producer-of-16-chars")
        self.open = False
        self.window = (0, 0)
        self.mine: list[Submission] = []
        self.bodies: dict[int, bytes] = {}
        self.told: dict[int, str] = {}
        self.stored: dict[int, bytes] = {}
        self.wire: list[list[Any]] = []
        self.answers: list[tuple[int, int, bool]] = []
        self.unanswered: dict[int, int] = {}  # sequence to size: what this connection's broker has had
        self.last = 0
        self.count = 0

    @rule(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=6))
    def submit(self, sizes: list[int]) -> None:
        made = rows(*[b"%d" % (self.count + at) + b"." * size for at, size in enumerate(sizes)])
        self.count += len(sizes)
        submission = self.sends.submit(made, sum(map(row_size, made)), "mine")
        self.mine.append(submission)
        for sequence, row in enumerate(made, submission.first):
            self.bodies[sequence] = row[1]

    @rule(sizes=st.lists(st.integers(0, 30), max_size=3))
    def transact(self, sizes: list[int]) -> None:
        made = rows(*[b"t%d" % self.count + b"." * size for size in sizes])
        self.count += 1
        submission = self.sends.submit_transaction(made, sum(map(row_size, made)), {}, {}, "mine")
        self.mine.append(submission)
        self.bodies[submission.first] = b"".join(row[1] for row in made)

    @precondition(lambda self: self.mine)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        submission = data.draw(st.sampled_from(self.mine))
        if submission.tried or not submission.left:
            return
        assert self.sends.withdraw_unwritten(submission)
        self.mine.remove(submission)
        for sequence in range(submission.first, submission.last + 1):
            del self.bodies[sequence]

    @precondition(lambda self: not self.open)
    @rule(messages_max=st.integers(1, 12), bytes_max=st.integers(1, 100))
    def connect(self, messages_max: int, bytes_max: int) -> None:
        self.open = True
        self.window = (messages_max, bytes_max)
        assert self.sends.connected(messages_max, bytes_max, 10_000, 10_000) == []
        self.last = 0
        self.unanswered = {}

    @precondition(lambda self: self.open)
    @rule()
    def write(self) -> None:
        data = self.sends.next_frame()
        if data is None:
            return
        fields = msgpack.unpackb(data[4:])
        assert fields[1] > self.last, "sequences rise"
        count = len(fields[2]) if fields[0] == SEND else 1
        self.last = fields[1] + count - 1
        for at in range(count):
            row = fields[2] if fields[0] == COMMIT else fields[2][at : at + 1]
            assert self.bodies[fields[1] + at] == b"".join(each[1] for each in row), "the same message each time"
            self.unanswered[fields[1] + at] = sum(len(each[1]) for each in row)
        if len(self.unanswered) > 1:
            messages = sum(max(1, self.weight(sequence)) for sequence in self.unanswered)
            assert messages <= self.window[0]
            assert sum(self.unanswered.values()) <= self.window[1]
        self.wire.append(fields)

    def weight(self, sequence: int) -> int:
        for each in self.mine:
            if each.first <= sequence <= each.last:
                return len(each.rows) if each.acks is not None else 1
        return 1

    @precondition(lambda self: self.wire)
    @rule(refuse=st.booleans())
    def serve(self, refuse: bool) -> None:
        kind, first, sent = self.wire.pop(0)[:3]
        for at in range(len(sent) if kind == SEND else 1):
            sequence = first + at
            if sequence not in self.stored:
                if refuse and at == 0:
                    self.answers.append((sequence, sequence, False))
                    continue
                body = sent[at][1] if kind == SEND else b"".join(row[1] for row in sent)
                self.stored[sequence] = body
            if self.answers and self.answers[-1][1] == sequence - 1 and self.answers[-1][2]:
                self.answers[-1] = (self.answers[-1][0], sequence, True)
            else:
                self.answers.append((sequence, sequence, True))

    @precondition(lambda self: self.answers and self.open)
    @rule()
    def answer(self) -> None:
        first, last, done = self.answers.pop(0)
        if done:
            found = self.sends.confirm(first, last)
            assert sum(count for _, count in found) == last - first + 1
        else:
            self.sends.refuse(first)
        for sequence in range(first, last + 1):
            assert sequence not in self.told, "told twice"
            self.told[sequence] = "confirmed" if done else "refused"
            del self.unanswered[sequence]
            if done:
                assert self.stored[sequence] == self.bodies[sequence], "confirmed, and not stored"
            else:
                assert sequence not in self.stored

    @precondition(lambda self: self.open)
    @rule()
    def disconnect(self) -> None:
        self.open = False
        self.wire.clear()
        self.answers.clear()
        self.sends.disconnected()

    @invariant()
    def counted(self) -> None:
        left = [each for each in self.mine if each.left]
        assert self.sends.bytes == sum(each.size for each in left)
        expected = sum(each.left if each.acks is None else max(len(each.rows), 1) for each in left)
        assert self.sends.messages == expected
        for each in self.mine:
            open_ = {number for first, last in each.open for number in range(first, last + 1)} if each.left else set()
            told = {number for number in range(each.first, each.last + 1) if number in self.told}
            assert open_ | told == set(range(each.first, each.last + 1))
            assert not open_ & told

    def teardown(self) -> None:
        for _ in range(1_000):
            if not self.open:
                self.connect(5, 50)
            self.write()
            if self.wire:
                self.serve(False)
            while self.answers:
                self.answer()
            if not self.sends.messages:
                break
        assert self.told.keys() == self.bodies.keys(), "everything is answered in the end, once"
        assert (self.sends.messages, self.sends.bytes, self.sends.writable) == (0, 0, False)


Machine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestMachine = Machine.TestCase


@given(st.lists(st.integers(1, 40), unique=True, min_size=1))
def test_parts_of_a_submission_are_answered_in_any_order(sequences: list[int]) -> None:
    sends = connected()
    mine = submit(sends, *[b"x"] * 40)
    frame(sends)
    for at, sequence in enumerate(sequences, 1):
        assert sends.confirm(sequence, sequence) == [(mine, 1)]
        assert (mine.left, mine.size, sends.messages) == (40 - at,) * 3
    sends.disconnected()
    sends.connected(100, 1_000, 100_000, 1_000)
    again: list[int] = []
    while (data := sends.next_frame()) is not None:
        _, first, sent = msgpack.unpackb(data[4:])
        again += range(first, first + len(sent))
    assert again == sorted(set(range(1, 41)) - set(sequences))
