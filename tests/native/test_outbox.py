"""The outbox of a native connection: what is said in which order, what goes together, and how large frames grow."""

from __future__ import annotations

from typing import Any

import msgpack
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker import native_outbox
from pybroker.core.entry import GONE, SENT, Entry
from pybroker.message import Message
from pybroker.native_outbox import DELIVER_BYTES_MAX, Outbox, Receiver
from pybroker.protocols.native_frames import encode_done
from tests.native.peer import CONFIRM, DELIVER, DONE


def taken(outbox: Outbox) -> list[Any]:
    return [msgpack.unpackb(frame[4:], raw=False) for frame in outbox.take()]


def entry(tag: int, size: int = 1, state: int = SENT) -> Entry:
    made = Entry(Message("/queue/a", b"x" * size), tag, None, True)  # type: ignore[arg-type]
    made.tag = tag
    made.state = state
    return made


def test_answers_stay_behind_what_was_confirmed_before_them() -> None:
    outbox = Outbox()
    outbox.confirm([(1, 3, True)])
    outbox.confirm([(4, 4, True), (5, 6, False), (7, 7, False), (9, 9, False)])
    outbox.put(encode_done(1))
    outbox.confirm([(10, 11, False)])
    assert outbox.size
    assert taken(outbox) == [
        [CONFIRM, [[1, 4, True], [5, 7, False], [9, 9, False]]],
        [DONE, 1],
        [CONFIRM, [[10, 11, False]]],
    ]
    assert taken(outbox) == []


def test_deliveries_go_by_subscription_behind_everything_else() -> None:
    outbox = Outbox()
    first, second = Receiver(1), Receiver(2)
    for tag in (1, 2):
        outbox.deliver(second, entry(tag))
        outbox.deliver(first, entry(tag))
    outbox.put(encode_done(1))
    assert [frame[:3] for frame in taken(outbox)] == [[DONE, 1], [DELIVER, 2, 1], [DELIVER, 1, 1]]
    outbox.deliver(first, entry(3))
    outbox.clear()
    assert (outbox.size, taken(outbox)) == (0, [])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 3), st.sampled_from([0, 10, 600, 700_000, 2_000_000]), st.booleans()), max_size=40
    ),
    st.integers(1, 7),
)
def test_runs_of_tags_are_divided_and_nothing_is_left_out(
    steps: list[tuple[int, int, bool]], messages_max: int
) -> None:
    outbox, receiver = Outbox(), Receiver(7)
    tag = 0
    expected = []
    for gap, size, there in steps:
        tag += gap
        outbox.deliver(receiver, entry(tag, size, SENT if there else GONE))
        if there:
            expected.append((tag, size))
    before = native_outbox.DELIVER_MESSAGES_MAX
    native_outbox.DELIVER_MESSAGES_MAX = messages_max
    try:
        frames = taken(outbox)
    finally:
        native_outbox.DELIVER_MESSAGES_MAX = before
    found = []
    for kind, number, first, messages in frames:
        assert (kind, number) == (DELIVER, 7)
        assert 0 < len(messages) <= messages_max
        sizes = [len(fields[1]) for fields in messages]
        assert len(messages) == 1 or sum(sizes) <= DELIVER_BYTES_MAX
        found += [(first + at, size) for at, size in enumerate(sizes)]
    assert found == expected
