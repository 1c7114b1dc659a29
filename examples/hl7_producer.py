"""A city hospital's program: sends HL7 messages over STOMP with stomp.py, each confirmed by a receipt, pipelined.

It stands for any producer that must lose nothing: a message is done only when its receipt came. When the broker dies,
the program connects again and sends what was not confirmed once more; the broker may have stored such a message
already, so that it then arrives twice. Of a set of replicas it is given all addresses; only the one that leads answers.
On stdout: one JSON line per 50 confirmations, one for each time without any at a broken connection, and a last one with
the totals.

    python examples/hl7_producer.py --port 61613 --seed 1 --count 2000
    python examples/hl7_producer.py --port 61613 --port 61614 --port 61615 --rate 300
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import threading
import time
from collections import Counter, deque

import stomp
from stomp.exception import StompException
from stomp.utils import Frame

from hl7_messages import CONTENT_TYPE, Hl7Message, make_messages

IN_FLIGHT_MAX = 64  # messages sent and not yet confirmed
REPORT_EVERY = 50
RETRY_SECONDS = 0.005  # between two tries of all addresses: so short because the demonstration measures
_saying = threading.Lock()  # two threads print, and a line must be whole


class Producer(stomp.ConnectionListener):
    """Keeps what is confirmed across connections. Listener methods run on stomp.py's own thread."""

    def __init__(self, addresses: list[tuple[str, int]], rate: float) -> None:
        self.addresses = addresses
        self.interval = 1 / rate if rate else 0.0  # seconds between two sends, at least
        self.next_send = 0.0
        self.last_confirmed: float | None = None
        self.without_since: float | None = None  # the last confirmation before the connection broke; None = it has not
        self.port = 0
        self.changed = threading.Condition()
        self.waiting: deque[Hl7Message] = deque()
        self.in_flight: dict[str, Hl7Message] = {}
        self.confirmed: set[str] = set()
        self.sent_again: Counter[str] = Counter()
        self.taken_back = 0  # of them, those since the last gap
        self.connections = 0
        self.connected = False

    def on_receipt(self, frame: Frame) -> None:
        with self.changed:
            control_id = frame.headers["receipt-id"]
            if self.in_flight.pop(control_id, None) is not None:
                self.confirmed.add(control_id)
                self._measure()
                if len(self.confirmed) % REPORT_EVERY == 0:
                    say(confirmed=len(self.confirmed))
                self.changed.notify_all()

    def _measure(self) -> None:
        now = time.monotonic()
        if self.without_since is not None:
            gap_ms = round(1_000 * (now - self.without_since), 1)
            say(gap_ms=gap_ms, port=self.port, sent_again=self.taken_back)
            self.without_since = None
            self.taken_back = 0
        self.last_confirmed = now

    def on_error(self, frame: Frame) -> None:
        say(told=frame.headers.get("message"))

    def on_connected(self, frame: Frame) -> None:
        with self.changed:
            self.connected = True
            self.connections += 1

    def on_disconnected(self) -> None:
        with self.changed:
            self.connected = False
            self.changed.notify_all()

    def run(self, messages: list[Hl7Message], deadline: float) -> None:
        self.waiting.extend(messages)
        while self.waiting or self.in_flight:
            connection = self._connect(deadline)
            try:
                self._send_all(connection, deadline)
            except (StompException, OSError):
                pass  # the broker is gone: what is in flight is unknown
            finally:
                self._take_back(connection)

    def _connect(self, deadline: float) -> stomp.Connection12:
        while True:
            connection = stomp.Connection12(
                self.addresses, reconnect_attempts_max=1, reconnect_sleep_initial=0, auto_decode=False
            )
            connection.set_listener("producer", self)
            try:
                connection.connect(wait=True)
            except (StompException, OSError):
                if time.monotonic() > deadline:
                    raise SystemExit("producer: no broker, giving up") from None
                time.sleep(RETRY_SECONDS)
                continue
            self.port = connection.transport.current_host_and_port[1]
            return connection

    def _send_all(self, connection: stomp.Connection12, deadline: float) -> None:
        while True:
            with self.changed:
                while self.connected and (
                    len(self.in_flight) >= IN_FLIGHT_MAX or (self.in_flight and not self.waiting)
                ):
                    if not self.changed.wait(timeout=deadline - time.monotonic()):
                        raise SystemExit(f"producer: {len(self.in_flight)} messages were never confirmed, giving up")
                if not self.connected or not self.waiting:
                    return
            self._wait_for_turn()
            with self.changed:
                if not self.connected:
                    return
                message = self.waiting.popleft()
                self.in_flight[message.control_id] = message
            connection.send(
                message.queue,
                message.body,
                content_type=CONTENT_TYPE,
                headers={"hl7-control-id": message.control_id, "sha256": message.sha256, "persistent": "true"},
                receipt=message.control_id,
            )

    def _wait_for_turn(self) -> None:
        now = time.monotonic()
        if self.interval and now < self.next_send:
            time.sleep(self.next_send - now)
        self.next_send = max(self.next_send, now) + self.interval

    def _take_back(self, connection: stomp.Connection12) -> None:
        """Close, and line up again what was not confirmed, in its old order."""
        connection.remove_listener("producer")  # a late event of this connection must not meddle with the next
        with contextlib.suppress(StompException, OSError):  # it may be gone already
            connection.disconnect()
        with self.changed:
            self.connected = False
            if self.without_since is None and (self.waiting or self.in_flight):
                self.without_since = self.last_confirmed
            for message in reversed(self.in_flight.values()):
                self.waiting.appendleft(message)
                self.sent_again[message.queue] += 1
                self.taken_back += 1
            self.in_flight.clear()


def say(**fields: object) -> None:
    with _saying:
        print(json.dumps(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, action="append", help="repeatable")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--rate", type=float, default=0, help="messages per second at most; 0 = as fast as can be")
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for everything")
    arguments = parser.parse_args()
    logging.getLogger("stomp.py").setLevel(logging.CRITICAL)  # the broker's death is expected, and told below
    messages = list(make_messages(arguments.seed, arguments.count))
    producer = Producer([(arguments.host, port) for port in arguments.port], arguments.rate)
    started = time.monotonic()
    producer.run(messages, started + arguments.deadline)
    say(
        done=sorted(producer.confirmed),
        sent_again=dict(producer.sent_again),
        connections=producer.connections,
        seconds=round(time.monotonic() - started, 2),
    )


if __name__ == "__main__":
    main()
