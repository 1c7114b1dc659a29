"""The featureless trial: as little broker as the load generator can talk to, on trio and plyvel, as fast as it goes.

It sets the bar for the broker: one queue, one consumer, CONNECT, SUBSCRIBE, SEND, ACK, DISCONNECT and receipts, and no
features: no limits, priorities, expiry, redelivery, transactions, topics, checks of input. It keeps the promises that
cost something: a durable message is written and synced before its receipt and before its delivery, its removal is
written too (after the kernel took its bytes, or after its ACK), and a restart finds what was left.

Run as ``python -m benchmarks.trial --data DIR --listen stomp://127.0.0.1:0``; prints ``listening URL``.
"""

from __future__ import annotations

import argparse
import signal
import socket
import struct
from collections import deque
from typing import Any
from urllib.parse import urlsplit

import trio

from benchmarks.leveldb import open_database

READ_BYTES = 1 << 17  # one read, and with it one turn
OUTBOX_BYTES_MAX = 4 << 20  # bytes a consumer has not taken before producers wait
BATCH_BYTES_MAX = 4 << 20  # bytes that wait for the disk before producers wait
HEADS_MAX = 1024  # parsed SEND headers that are remembered

pack_key = struct.Struct(">Q").pack


class Peer:
    """One connection: its unsent bytes, and the durable messages among them that are removed once they are sent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.outbox: list[bytes] = []
        self.sent_keys: list[bytes] = []
        self.rest = memoryview(b"")
        self.stuck = trio.Event()
        self.drained = trio.Event()
        self.drained.set()

    def flush(self, trial: Trial) -> None:
        """Hand the outbox to the kernel in one call; what it does not take is left to the writer task."""
        if not self.outbox or self.rest:
            return
        data = b"".join(self.outbox)
        self.outbox.clear()
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return
        if sent == len(data):
            if self.sent_keys:
                trial.journal.remove(self.sent_keys)
                self.sent_keys.clear()
        else:
            self.rest = memoryview(data)[sent:]
            self.drained = trio.Event()
            self.stuck.set()

    async def write(self, trial: Trial) -> None:
        """Send what the kernel did not take at once."""
        while True:
            await self.stuck.wait()
            while self.rest:
                await trio.lowlevel.wait_writable(self.sock)
                try:
                    self.rest = self.rest[self.sock.send(self.rest) :]
                except BlockingIOError:
                    continue
            if self.sent_keys:
                trial.journal.remove(self.sent_keys)
                self.sent_keys.clear()
            self.flush(trial)
            if not self.rest:
                self.stuck = trio.Event()
                self.drained.set()


class Journal:
    """Group commit: while one batch is written and synced in a thread, the next one fills."""

    def __init__(self, database: Any) -> None:
        self.database = database
        self.batch = database.write_batch(sync=True)
        self.size = 0
        self.messages: list[tuple[bytes, bytes]] = []  # to be delivered once the open batch is on disk
        self.receipts: list[tuple[Peer, bytes]] = []
        self.filled = trio.Event()
        self.room = trio.Event()
        self.room.set()

    def remove(self, keys: list[bytes]) -> None:
        """Delete with the open batch."""
        delete = self.batch.delete
        for key in keys:
            delete(key)
        self.size += 1
        self.filled.set()

    async def run(self, trial: Trial) -> None:
        """Write batch after batch."""
        while True:
            await self.filled.wait()
            batch, messages, receipts = self.batch, self.messages, self.receipts
            self.batch, self.messages, self.receipts, self.size = self.database.write_batch(sync=True), [], [], 0
            self.filled = trio.Event()
            self.room.set()
            await trio.to_thread.run_sync(batch.write)
            for peer, frame in receipts:
                peer.outbox.append(frame)
                peer.flush(trial)
            if messages:
                trial.deliver(messages)


class Trial:
    """The queue, its consumer, and the turns of the producer."""

    def __init__(self, path: str) -> None:
        self.database = open_database(path)
        self.journal = Journal(self.database)
        # (key, body); the key of a message that is not durable is empty
        self.backlog: deque[tuple[bytes, bytes]] = deque()
        self.next = 0
        for key, value in self.database:
            self.backlog.append((key, value[value.index(b"\n\n") + 2 :]))
            self.next = int.from_bytes(key, "big") + 1
        self.delivered = 0
        self.consumer: Peer | None = None
        self.prefix = b""  # of MESSAGE frames to the consumer
        self.individual = False
        self.unacknowledged: dict[bytes, bytes] = {}
        self.heads: dict[bytes, tuple[int, bool, bytes]] = {}

    def deliver(self, messages: list[tuple[bytes, bytes]]) -> None:
        """Frames for the consumer, all in one write; without a consumer they wait."""
        consumer = self.consumer
        if consumer is None:
            self.backlog.extend(messages)
            return
        prefix = self.prefix
        number = self.delivered
        if self.individual:
            unacknowledged = self.unacknowledged
            for key, body in messages:
                number += 1
                name = b"%d" % number
                unacknowledged[name] = key
                consumer.outbox.append(
                    b"%b%b\nack:%b\ncontent-length:%d\n\n%b\0" % (prefix, name, name, len(body), body)
                )
        else:
            append = consumer.outbox.append
            for _, body in messages:
                number += 1
                append(b"%b%d\ncontent-length:%d\n\n%b\0" % (prefix, number, len(body), body))
            consumer.sent_keys.extend([key for key, _ in messages if key])
        self.delivered = number
        consumer.flush(self)

    def turn(self, peer: Peer, data: bytes) -> bytes:
        """Handle all whole frames in `data`. Returns what is left."""
        find = data.find
        heads = self.heads
        journal = self.journal
        put = journal.batch.put
        durable_messages = journal.messages
        volatile_messages: list[tuple[bytes, bytes]] = []
        removed: list[bytes] = []
        sequence = self.next
        position = 0
        size = len(data)
        while True:
            while data.startswith(b"\n", position):
                position += 1
            head_end = find(b"\n\n", position)
            if head_end < 0:
                break
            head = data[position:head_end]
            body_start = head_end + 2
            if head.startswith(b"ACK\n"):
                if body_start >= size:
                    break
                key = self.unacknowledged.pop(head[7:])
                if key:
                    removed.append(key)
                position = body_start + 1
                continue
            if not head.startswith(b"SEND\n"):
                if body_start >= size:
                    break
                position = body_start + 1
                self.next = sequence
                self.command(peer, head)
                continue
            known = heads.get(head)
            if known is None:
                known = self.parse(head)
            length, durable, receipt = known
            body_end = body_start + length
            if body_end >= size:
                break
            body = data[body_start:body_end]
            if durable:
                key = pack_key(sequence)
                sequence += 1
                put(key, data[position:body_end])
                durable_messages.append((key, body))
                journal.size += length
                if receipt:
                    journal.receipts.append((peer, receipt))
            else:
                volatile_messages.append((b"", body))
                if receipt:
                    peer.outbox.append(receipt)
            position = body_end + 1
        self.next = sequence
        if removed:
            journal.remove(removed)
        if journal.size:
            journal.filled.set()
        if volatile_messages:
            self.deliver(volatile_messages)
        peer.flush(self)
        return data[position:]

    def parse(self, head: bytes) -> tuple[int, bool, bytes]:
        """Content length, durability and receipt frame of a SEND."""
        headers = dict(line.split(b":", 1) for line in head.split(b"\n")[1:])
        receipt = headers.get(b"receipt", b"")
        known = (
            int(headers[b"content-length"]),
            headers.get(b"persistent") != b"false",
            b"RECEIPT\nreceipt-id:%b\n\n\0" % receipt if receipt else b"",
        )
        if len(self.heads) < HEADS_MAX:
            self.heads[head] = known
        return known

    def command(self, peer: Peer, head: bytes) -> None:
        """CONNECT, SUBSCRIBE, DISCONNECT."""
        name, _, lines = head.partition(b"\n")
        headers = dict(line.split(b":", 1) for line in lines.split(b"\n"))
        if name in (b"CONNECT", b"STOMP"):
            peer.outbox.append(b"CONNECTED\nversion:1.2\nheart-beat:0,0\n\n\0")
            return
        if b"receipt" in headers:
            frame = b"RECEIPT\nreceipt-id:%b\n\n\0" % headers[b"receipt"]
            if name == b"DISCONNECT":
                self.journal.receipts.append((peer, frame))  # behind the acknowledgements before it
                self.journal.filled.set()
            else:
                peer.outbox.append(frame)
        if name == b"SUBSCRIBE":
            self.consumer = peer
            self.individual = headers.get(b"ack", b"auto") != b"auto"
            self.prefix = b"MESSAGE\nsubscription:%b\ndestination:%b\nmessage-id:" % (
                headers[b"id"],
                headers[b"destination"],
            )
            waiting = list(self.backlog)
            self.backlog.clear()
            self.deliver(waiting)

    async def serve(self, sock: socket.socket) -> None:
        """One connection from accept to close."""
        peer = Peer(sock)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(peer.write, self)
                await self.read(peer)
                nursery.cancel_scope.cancel()
        except* OSError:
            pass
        finally:
            if self.consumer is peer:
                self.consumer = None
                for frame_key in self.unacknowledged.values():
                    if frame_key:
                        value = self.database.get(frame_key)
                        self.backlog.append((frame_key, value[value.index(b"\n\n") + 2 :]))
                self.unacknowledged.clear()
            sock.close()

    async def read(self, peer: Peer) -> None:
        """Read and handle until the peer closes."""
        journal = self.journal
        sock = peer.sock
        rest = b""
        while True:
            try:
                data = sock.recv(READ_BYTES)
            except BlockingIOError:
                await trio.lowlevel.wait_readable(sock)
                continue
            if not data:
                return
            rest = self.turn(peer, rest + data)
            if self.consumer is not None and self.consumer is not peer:
                await self.consumer.drained.wait()
            if journal.size > BATCH_BYTES_MAX:
                journal.room = trio.Event()
                await journal.room.wait()
            else:
                await trio.lowlevel.checkpoint()


async def run(path: str, url: str) -> None:
    """Serve until SIGTERM or SIGINT."""
    parts = urlsplit(url)
    trial = Trial(path)
    listener = socket.create_server((parts.hostname or "127.0.0.1", parts.port or 0), backlog=1024)
    listener.setblocking(False)

    async def accept(nursery: trio.Nursery) -> None:
        while True:
            await trio.lowlevel.wait_readable(listener)
            sock, _ = listener.accept()
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            nursery.start_soon(trial.serve, sock)

    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trial.journal.run, trial)
            nursery.start_soon(accept, nursery)
            print(f"listening stomp://127.0.0.1:{listener.getsockname()[1]}", flush=True)
            async for _ in signals:
                nursery.cancel_scope.cancel()
                break
    trial.journal.batch.write()
    trial.database.close()


def main() -> None:
    """The command line: the part of ``pybroker serve`` that the suite uses."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trial")
    parser.add_argument("--data", required=True)
    parser.add_argument("--listen", default="stomp://127.0.0.1:0")
    options = parser.parse_args()
    trio.run(run, options.data, options.listen)


if __name__ == "__main__":
    main()
