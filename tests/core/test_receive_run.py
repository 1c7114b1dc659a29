"""`Links.receive_run` does what `Links.receive` does message by message, and leaves the rest to it."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from pybroker.config import DeliveryPolicy, Limits, NetworkConfig
from pybroker.core.broker import Core
from pybroker.core.invariants import check_invariants
from pybroker.core.links import Link
from pybroker.errors import BrokerError
from pybroker.message import Message, Route

NOW = 1_000
KNOWN = "/queue/known"
DESTINATIONS = (KNOWN, KNOWN, KNOWN, KNOWN, "/queue/new", "/topic/t", "/queue/>", "nothing")


class Sink:
    """The run time's object for a link."""


def receiver() -> tuple[Core, Link]:
    core = Core(
        Limits(producer_ranges_max=3),
        DeliveryPolicy(),
        first_id=1,
        id_prefix="x-",
        network=NetworkConfig(),
        network_name="here",
        life="life",
    )
    core.now = NOW
    core.send(Message(KNOWN, b"first"))
    return core, core.links.up("there", Sink())


def forwarded(sequence: int, destination: str, expires: int) -> Message:
    return Message(destination, b"%d" % sequence, b"", True, 4, expires, b"m%d" % sequence, 1, Route(("there",)))


def one_by_one(core: Core, link: Link, rows: list[tuple[int, Message]]) -> list[str]:
    told = []
    for sequence, message in rows:
        try:
            told.append(str(core.links.receive(link, "n", sequence, message)))
        except BrokerError as error:
            told.append(error.code)
    return told


def in_runs(core: Core, link: Link, rows: list[tuple[int, Message]]) -> list[str]:
    told: list[str] = []
    while rows:
        taken = core.links.receive_run(link, "n", rows)
        told += ["True"] * taken
        rows = rows[taken:]
        told += one_by_one(core, link, rows[:1])
        rows = rows[1:]
    return told


def state(core: Core, link: Link) -> Any:
    check_invariants(core)
    producer = core.producers.find("link there n")
    assert producer is not None
    queues = {queue.name: [entry.message.body for entry in queue.window] for queue in core.queues.values()}
    peer = link.peer
    return producer.ranges, producer.floor, queues, peer.received, peer.repeats, core.expired_on_arrival, core.unrouted


steps = st.tuples(
    st.sampled_from([1, 1, 1, 1, 1, 1, 0, 2, 5, -1, -4]),  # from the sequence before
    st.sampled_from(DESTINATIONS),
    st.sampled_from([0, 0, 0, NOW, NOW + 1]),
)


@given(st.lists(steps, min_size=1, max_size=40))
@example([(1, KNOWN, 0)] * 5 + [(0, KNOWN, 0), (1, KNOWN, NOW), (1, KNOWN, 0), (-4, KNOWN, 0), (1, KNOWN, 0)])
@example([(2, KNOWN, 0)] * 6 + [(-9, KNOWN, 0)])  # gaps give up the lowest ranges: then some are in doubt
def test_runs_take_what_would_be_taken_one_by_one(story: list[tuple[int, str, int]]) -> None:
    sequence = 10
    rows = []
    for step, destination, expires in story:
        sequence = max(sequence + step, 0)
        rows.append((sequence, destination, expires))
    results = []
    for take in (one_by_one, in_runs):
        core, link = receiver()
        messages = [(number, forwarded(number, destination, expires)) for number, destination, expires in rows]
        told = take(core, link, messages)
        results.append((told, state(core, link)))
    assert results[0] == results[1]


def test_a_run_ends_where_a_closer_look_is_needed() -> None:
    core, link = receiver()
    rows = [(number, forwarded(number, KNOWN, 0)) for number in (5, 6, 7)]
    assert core.links.receive_run(link, "n", [*rows, (9, forwarded(9, KNOWN, 0))]) == 3
    assert core.links.receive_run(link, "n", rows) == 0
    assert core.links.receive_run(link, "n", [(9, forwarded(9, "/queue/new", 0))]) == 0
    assert core.links.receive_run(link, "n", [(9, forwarded(9, KNOWN, NOW))]) == 0
    assert link.peer.received == 3
