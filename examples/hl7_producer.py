"""A city hospital's program: sends HL7 messages over STOMP with stomp.py, each confirmed by a receipt, pipelined.

It stands for any producer that must lose nothing: a message is done only when its receipt came. When the broker dies,
the program connects again and sends what was not confirmed once more; the broker may have stored such a message
already, so that it then arrives twice. On stdout: one JSON line per 50 confirmations, and a last one with the totals.

    python examples/hl7_producer.py --port 61613 --seed 1 --count 2000
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
import threading
import time
from collections import Counter, deque

import stomp
from stomp.exception import StompException
from stomp.utils import Frame

from hl7_messages import CONTENT_TYPE, Hl7Message, make_messages

IN_FLIGHT_MAX = 64  # messages sent and not yet confirmed
REPORT_EVERY = 50


class Producer(stomp.ConnectionListener):
    """Keeps what is confirmed across connections. Listener methods run on stomp.py's own thread."""

    def __init__(self, host: str, port: int) -> None:
        self.address = (host, port)
        self.changed = threading.Condition()
        self.waiting: deque[Hl7Message] = deque()
        self.in_flight: dict[str, Hl7Message] = {}
        self.confirmed: set[str] = set()
        self.sent_again: Counter[str] = Counter()
        self.connections = 0
        self.connected = False

    def on_receipt(self, frame: Frame) -> None:
        with self.changed:
            control_id = frame.headers["receipt-id"]
            if self.in_flight.pop(control_id, None) is not None:
                self.confirmed.add(control_id)
                if len(self.confirmed) % REPORT_EVERY == 0:
                    say(confirmed=len(self.confirmed))
                self.changed.notify_all()

    def on_error(self, frame: Frame) -> None:
        print(f"producer: the broker says {frame.headers.get('message')}", file=sys.stderr)

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
            connection = stomp.Connection12([self.address], reconnect_attempts_max=1, auto_decode=False)
            connection.set_listener("producer", self)
            try:
                connection.connect(wait=True)
            except (StompException, OSError):
                if time.monotonic() > deadline:
                    raise SystemExit("producer: no broker, giving up") from None
                time.sleep(0.05)
                continue
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
                message = self.waiting.popleft()
                self.in_flight[message.control_id] = message
            connection.send(
                message.queue,
                message.body,
                content_type=CONTENT_TYPE,
                headers={"hl7-control-id": message.control_id, "sha256": message.sha256, "persistent": "true"},
                receipt=message.control_id,
            )

    def _take_back(self, connection: stomp.Connection12) -> None:
        """Close, and line up again what was not confirmed, in its old order."""
        connection.remove_listener("producer")  # a late event of this connection must not meddle with the next
        with contextlib.suppress(StompException, OSError):  # it may be gone already
            connection.disconnect()
        with self.changed:
            self.connected = False
            for message in reversed(self.in_flight.values()):
                self.waiting.appendleft(message)
                self.sent_again[message.queue] += 1
            self.in_flight.clear()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=2_000)
    parser.add_argument("--deadline", type=float, default=60.0, help="seconds for everything")
    arguments = parser.parse_args()
    logging.getLogger("stomp.py").setLevel(logging.CRITICAL)  # the broker's death is expected, and told below
    messages = list(make_messages(arguments.seed, arguments.count))
    producer = Producer(arguments.host, arguments.port)
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
