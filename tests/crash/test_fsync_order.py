"""kill -9 keeps the page cache, so it can't show a missing fsync. This does: from a trace of the broker's system calls.

No receipt and no delivery leaves before the fdatasync of the batch that it stands for has returned. DESIGN.md section 3.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from tests.crash.process import BrokerProcess
from tests.crash.trace import Batch, SentFrame, read_batches, read_calls, read_frames, strace, why_not
from tests.crash.wire import Connection, Frame

REASON = why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "")
MARKER = re.compile(rb"<marker [\w-]+>")
COUNT = 40  # messages of each kind


def marker(text: str) -> bytes:
    return f"<marker {text}>".encode()


def send(connection: Connection, destination: str, text: str, *headers: tuple[str, str]) -> None:
    connection.send("SEND", ("destination", destination), *headers, body=marker(text) + b"x" * 300)


def receipts(connection: Connection, count: int) -> list[Frame]:
    frames: list[Frame] = []
    while sum(frame.command == "RECEIPT" for frame in frames) < count:
        got = connection.wait(20)
        assert got, "no receipt came"
        frames += got
    return frames


def run_clients(port: int) -> None:
    """Sends one by one and pipelined, deliveries, acknowledgements of both modes, transactions, a durable subscription."""
    producer, consumer = Connection(port), Connection(port, "owner")
    subscription = ("activemq.subscriptionName", "mine"), ("receipt", "subscribed")
    consumer.send("SUBSCRIBE", ("id", "d"), ("destination", "/topic/t"), ("ack", "auto"), *subscription)
    consumer.receipt("subscribed")
    for number in range(COUNT):  # one batch each
        send(producer, "/queue/a", f"alone-{number}", ("receipt", f"send alone-{number}"))
        producer.receipt(f"send alone-{number}")
    for number in range(COUNT):  # many in a batch
        send(producer, "/queue/a", f"piped-{number}", ("receipt", f"send piped-{number}"))
        send(producer, "/queue/auto", f"auto-{number}", ("receipt", f"send auto-{number}"))
        send(producer, "/topic/t", f"topic-{number}", ("receipt", f"send topic-{number}"))
    receipts(producer, 3 * COUNT)
    for number in range(COUNT // 4):
        producer.send("BEGIN", ("transaction", "t"))
        for part in range(3):
            send(producer, f"/queue/c{part}", f"tx-{number}-{part}", ("transaction", "t"))
        producer.send("COMMIT", ("transaction", "t"), ("receipt", f"commit {number}"))
    receipts(producer, COUNT // 4)
    for id, ack in (("a", "client-individual"), ("auto", "auto")):
        consumer.send("SUBSCRIBE", ("id", id), ("destination", f"/queue/{id}"), ("ack", ack))
    acknowledged: set[str] = set()
    received = 0
    while received < 4 * COUNT or len(acknowledged) < 2 * COUNT:
        frames = consumer.wait(20)
        assert frames, (received, len(acknowledged))
        for frame in frames:
            if frame.command == "RECEIPT":
                acknowledged.add(frame.headers["receipt-id"])
                continue
            received += 1
            if frame.headers["subscription"] == "a":
                text = MARKER.match(frame.body)[0].decode()[8:-1]  # type: ignore[index]
                consumer.send("ACK", ("id", frame.headers["ack"]), ("receipt", f"ack {text}"))
    for number in range(COUNT):  # straight through to a consumer that waits
        send(producer, "/queue/auto", f"direct-{number}", ("receipt", f"send direct-{number}"))
    receipts(producer, COUNT)
    left = COUNT
    while left:
        left -= sum(frame.command == "MESSAGE" for frame in consumer.wait(20))
    for connection in (producer, consumer):
        connection.send("DISCONNECT", ("receipt", "bye"))
        connection.receipt("bye")
        connection.close()


def violations(batches: list[Batch], frames: list[SentFrame]) -> tuple[list[str], Counter[str]]:
    """What went out before it was on the disk; and how many of each kind were looked at."""
    put: dict[bytes, tuple[bytes, Batch]] = {}
    deleted: dict[bytes, Batch] = {}
    for batch in batches:
        for key, value in batch.puts.items():
            if found := MARKER.search(value):
                put.setdefault(found[0], (key, batch))
        for key in batch.deletes:
            deleted.setdefault(key, batch)
    bad: list[str] = []
    looked_at: Counter[str] = Counter()

    def check(kind: str, what: str, batch: Batch | None, sent: SentFrame) -> None:
        looked_at[kind] += 1
        if batch is None:
            bad.append(f"{kind} {what}: nothing of it was ever written")
        elif batch.synced is None or batch.synced >= sent.began:
            bad.append(
                f"{kind} {what} left at {sent.began}, its batch (from {batch.began}) was synced at {batch.synced}"
            )

    for sent in frames:
        if sent.frame.command == "MESSAGE":
            found = MARKER.match(sent.frame.body)
            assert found is not None
            key, batch = put.get(found[0], (b"", None))
            check("delivery", found[0].decode(), batch, sent)
            if sent.frame.headers["subscription"] == "auto":
                looked_at["auto"] += 1
                removal = deleted.get(key)
                if removal is None or removal.began <= sent.ended:
                    bad.append(f"auto {found[0]!r} was removed before it was sent: {removal and removal.began}")
            continue
        verb, _, text = sent.frame.headers.get("receipt-id", "").partition(" ")
        if verb == "send":
            check("receipt", text, put.get(marker(text), (b"", None))[1], sent)
        elif verb == "ack":
            check("ack", text, deleted.get(put[marker(text)][0]), sent)
        elif verb == "commit":
            parts = [put.get(marker(f"tx-{text}-{part}"), (b"", None))[1] for part in range(3)]
            check("commit", text, parts[0], sent)
            if any(part is not parts[0] for part in parts):
                bad.append(f"commit {text}: more than one batch")
    return bad, looked_at


def traced(directory: Path, config: Path | None = None) -> tuple[list[str], Counter[str]]:
    output = directory / "trace"
    broker = BrokerProcess(directory / "data", config, strace(output))
    try:
        port = broker.port()
        assert port is not None
        run_clients(port)
        assert broker.stop() == 0
    finally:
        broker.end()
    calls = read_calls(output)
    return violations(read_batches(calls), read_frames(calls, port))


EXPECTED = {"receipt": 5 * COUNT, "delivery": 5 * COUNT, "ack": 2 * COUNT, "commit": COUNT // 4, "auto": 2 * COUNT}


def test_nothing_leaves_before_its_batch_is_on_the_disk(tmp_path: Path) -> None:
    bad, looked_at = traced(tmp_path)
    assert bad == []
    assert dict(looked_at) == EXPECTED


def test_the_check_sees_a_broker_that_does_not_sync(tmp_path: Path) -> None:
    """The same with `sync = false`: every one of the promises is seen to be broken."""
    config = tmp_path / "broker.toml"
    config.write_text("sync = false\n")
    bad, looked_at = traced(tmp_path, config)
    assert dict(looked_at) == EXPECTED
    seen = Counter(text.partition(" ")[0] for text in bad)
    assert {kind: seen[kind] for kind in ("receipt", "delivery", "ack", "commit")} == {
        kind: EXPECTED[kind] for kind in ("receipt", "delivery", "ack", "commit")
    }
