"""SENDs and COMMITs that their producer numbers, over a socket: what is stored, what is confirmed, what is in doubt (P7)."""

from __future__ import annotations

import trio

from pybroker.broker import Broker
from tests.support.serving import embedded
from tests.support.wire import Frame, Peer, dialled, frame

A, B = "/queue/a", "/queue/b"


def numbered(sequence: int, *headers: str, producer: str = "ward-3-1b9f") -> tuple[str, ...]:
    return (f"producer-id:{producer}", f"producer-sequence:{sequence}", *headers)


REPEAT = "producer-repeat:true"


async def send(peer: Peer, sequence: int, *headers: str, to: str = A) -> None:
    await peer.do("SEND", f"destination:{to}", *numbered(sequence, *headers), body=b"%d" % sequence)


def depth(broker: Broker, name: str) -> int:
    return sum(row.depth for row in broker.statistics().destinations if f"/queue/{row.name}" == name)


async def take(port: int, destination: str, count: int) -> list[Frame]:
    async with dialled(port) as peer:
        await peer.send(frame("SUBSCRIBE", f"destination:{destination}", "id:0"))
        found = [await peer.expect("MESSAGE") for _ in range(count)]
        await peer.do("DISCONNECT")
        return found


async def in_doubt(port: int, *frames: bytes) -> str:
    """Send these over a connection of their own: the last one must be answered with an ERROR, which ends it. Its text."""
    async with dialled(port) as peer:
        await peer.send(b"".join(frames))
        error = await peer.error()
        assert (error["code"], error["receipt-id"]) == ("in-doubt", "r")
        return error["message"]


async def test_a_repeat_is_confirmed_and_stored_once():
    async with embedded() as (broker, port):
        async with dialled(port) as peer:
            for sequence in (1, 2, 2, 1):
                await send(peer, sequence)
        async with dialled(port, "1.0") as peer:
            for sequence in (1, 2, 3):
                await send(peer, sequence, REPEAT, "a:b")
            await send(peer, 1, to=B)  # whatever it holds: the number is what counts
            await peer.do("SEND", f"destination:{A}", body=b"plain")
        assert broker.statistics().duplicates == 5
        assert depth(broker, B) == 0
        messages = await take(port, A, 4)
        assert [message.body for message in messages] == [b"1", b"2", b"3", b"plain"]
        assert not any(name.startswith("producer-") for message in messages for name, _ in message.headers)
        assert messages[2]["a"] == "b"


async def test_two_producers_do_not_know_each_other():
    async with embedded() as (broker, port), dialled(port) as peer:
        for producer in ("one", "other", "one"):
            await peer.do("SEND", f"destination:{A}", *numbered(5, producer=producer))
        assert depth(broker, A) == 2


async def test_many_in_one_turn():
    async with embedded() as (broker, port), dialled(port) as peer:
        frames = [
            frame("SEND", f"destination:{A}", *numbered(number % 50), f"receipt:{number}") for number in range(100)
        ]
        await peer.send(b"".join(frames))
        for number in range(100):
            await peer.receipt(str(number))
        assert (depth(broker, A), broker.statistics().duplicates) == (50, 50)


async def test_an_unknown_producer_that_repeats_is_in_doubt():
    async with embedded() as (broker, port):
        text = await in_doubt(port, frame("SEND", f"destination:{A}", *numbered(1, REPEAT, "receipt:r")))
        assert "producer ward-3-1b9f is not known here" in text
        async with dialled(port) as peer:
            await send(peer, 2)
        text = await in_doubt(port, frame("SEND", f"destination:{A}", *numbered(1, REPEAT, "receipt:r")))
        assert "not known any more whether 1" in text
        assert depth(broker, A) == 1


async def test_below_the_window_is_in_doubt_and_the_window_is_configured():
    async with embedded(limits={"producer_ranges_max": 2}) as (broker, port):
        async with dialled(port) as peer:
            for sequence in (1, 3, 5, 5, 3):
                await send(peer, sequence)
        for sequence in (1, 2):
            await in_doubt(port, frame("SEND", f"destination:{A}", *numbered(sequence, "receipt:r")))
        assert depth(broker, A) == 3
    async with embedded(limits={"producers_max": 1}) as (broker, port):
        async with dialled(port) as peer:
            await send(peer, 1)
            await peer.do("SEND", f"destination:{A}", *numbered(1, producer="other"))
        await in_doubt(port, frame("SEND", f"destination:{A}", *numbered(1, REPEAT, "receipt:r")))
        assert depth(broker, A) == 2


async def test_a_refused_send_may_be_repeated():
    async with embedded(limits={"destinations_max": 1}) as (broker, port):
        async with dialled(port) as peer:
            await send(peer, 1)
            await peer.send(frame("SEND", f"destination:{B}", *numbered(2)))
            await peer.error("destinations_max")
        async with dialled(port) as peer:
            await send(peer, 2, REPEAT)
        assert depth(broker, A) == 2


async def test_a_repeat_needs_no_room():
    async with embedded(limits={"queue_messages_max": 1, "full_policy": "refuse"}) as (broker, port):
        async with dialled(port) as peer:
            await send(peer, 1)
            await send(peer, 1)
            await peer.send(frame("SEND", f"destination:{A}", *numbered(2)))
            await peer.error("queue_messages_max")
        await take(port, A, 1)  # with automatic acknowledgement
        async with dialled(port) as peer:
            await send(peer, 2, REPEAT)
        assert depth(broker, A) == 1


async def test_who_waits_for_room_finds_that_somebody_else_has_stored_it():
    async with embedded(limits={"queue_messages_max": 1}) as (broker, port), dialled(port) as one, dialled(port) as two:
        await one.do("SEND", f"destination:{A}", body=b"in the way")
        for peer in (one, two):
            await peer.send(frame("SEND", f"destination:{A}", *numbered(1, "receipt:r"), body=b"once"))
        await trio.sleep(0.05)
        assert depth(broker, A) == 1
        messages = await take(port, A, 2)
        assert [message.body for message in messages] == [b"in the way", b"once"]
        await one.receipt("r")
        await two.receipt("r")
        assert (depth(broker, A), broker.statistics().duplicates) == (0, 1)


async def test_a_transaction_leaves_out_what_is_stored_and_an_aborted_one_records_nothing():
    async with embedded() as (broker, port), dialled(port) as peer:
        await send(peer, 1)
        for end in ("ABORT", "COMMIT", "ABORT"):
            await peer.do("BEGIN", "transaction:t")
            for sequence in (1, 2, 3):
                await peer.do(
                    "SEND", f"destination:{A}", "transaction:t", *numbered(sequence, REPEAT), body=b"%d" % sequence
                )
            await peer.do(end, "transaction:t")
        assert [message.body for message in await take(port, A, 3)] == [b"1", b"2", b"3"]
        assert depth(broker, A) == 0
        await peer.send(frame("SEND", f"destination:{A}", "transaction:none", *numbered(1, REPEAT)))
        await peer.error("transaction 'none' is not open")


async def test_a_repeated_commit_is_confirmed_and_what_it_collected_is_dropped():
    async with embedded() as (broker, port), dialled(port) as peer:
        for number, commit in enumerate((numbered(9), numbered(9, REPEAT), numbered(10))):
            await peer.do("BEGIN", "transaction:t")
            await peer.do("SEND", f"destination:{A}", "transaction:t", body=b"%d" % number)
            await peer.do("COMMIT", "transaction:t", *commit)
        await peer.do(
            "COMMIT", "transaction:t", *numbered(10, REPEAT)
        )  # only asked for: there is no such transaction any more
        assert broker.statistics().duplicates == 2
        assert [message.body for message in await take(port, A, 2)] == [b"0", b"2"]
        await peer.send(frame("COMMIT", "transaction:t", *numbered(11, REPEAT)))
        await peer.error("transaction 't' is not open")


async def test_acknowledgements_in_a_repeated_commit_are_given_back():
    async with embedded() as (broker, port), dialled(port) as peer:
        await peer.do("BEGIN", "transaction:t")
        await peer.do("COMMIT", "transaction:t", *numbered(1))
        await peer.do("SEND", f"destination:{A}", body=b"held")
        await peer.send(frame("SUBSCRIBE", f"destination:{A}", "id:0", "ack:client-individual"))
        held = await peer.expect("MESSAGE")
        await peer.do("BEGIN", "transaction:t")
        await peer.do("ACK", f"id:{held['ack']}", "transaction:t")
        await peer.send(frame("COMMIT", "transaction:t", *numbered(1, REPEAT, "receipt:r")))
        again = await peer.expect("MESSAGE")
        await peer.receipt("r")
        assert (again.body, again["redelivered"]) == (b"held", "true")
        assert depth(broker, A) == 1


async def test_a_commit_in_doubt_ends_the_connection_and_does_nothing():
    async with embedded() as (broker, port):
        await in_doubt(
            port,
            frame("BEGIN", "transaction:t"),
            frame("SEND", f"destination:{A}", "transaction:t"),
            frame("COMMIT", "transaction:t", *numbered(1, REPEAT, "receipt:r")),
        )
        assert depth(broker, A) == 0


async def test_producers_are_remembered_across_a_restart(tmp_path):
    for life in range(3):
        async with embedded(data_dir=tmp_path) as (broker, port), dialled(port) as peer:
            await send(peer, 1, *([REPEAT] if life else []))
            await send(peer, 2 + life)
            assert depth(broker, A) == 2 + life
            assert broker.statistics().duplicates == bool(life)
