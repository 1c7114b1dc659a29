"""The provincial system's program: takes HL7 messages over STOMP with stomp.py, reads and acknowledges each by itself.

A message that names no patient (an empty PID-3), or that does not parse, is rejected (NACK) every time, so that it ends
in the dead-letter queue. Connects again when the broker dies; ends at end of file on stdin. Of a set of replicas it is
given all addresses; only the one that leads answers. On stdout one JSON line per delivery, for whoever wants to check:
control id, queue, SHA-256 of the body as it arrived, what was done with it.

    python examples/hl7_consumer.py --port 61613 < /dev/tty
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import threading

import hl7
import stomp
from stomp.exception import StompException
from stomp.utils import Frame

from hl7_messages import QUEUES

RETRY_SECONDS = 0.02  # between two tries of all addresses
_saying = threading.Lock()  # each connection has a thread, and a line must be whole


class Consumer(stomp.ConnectionListener):
    """Handles deliveries on stomp.py's own thread, one at a time and in order."""

    def __init__(self, addresses: list[tuple[str, int]], queues: tuple[str, ...]) -> None:
        self.addresses = addresses
        self.queues = queues
        self.disconnected = threading.Event()
        self.connection: stomp.Connection12 | None = None

    def on_disconnected(self) -> None:
        self.disconnected.set()

    def on_error(self, frame: Frame) -> None:
        say(told=frame.headers.get("message"))

    def on_message(self, frame: Frame) -> None:
        connection = self.connection
        assert connection is not None
        control_id, accepted = read(frame.body)
        say(
            control_id=control_id,
            queue=frame.headers["destination"],
            message_id=frame.headers["message-id"],
            redelivered=frame.headers.get("redelivered") == "true",
            sha256=hashlib.sha256(frame.body).hexdigest(),
            accepted=accepted,
            origin=frame.headers.get("dead-letter-origin"),
        )
        try:
            if accepted or frame.headers.get("dead-letter-origin"):
                connection.ack(frame.headers["ack"])
            else:
                connection.nack(frame.headers["ack"])
        except (StompException, OSError):
            pass  # the broker is gone: it delivers the message again

    def run(self, ended: threading.Event) -> None:
        while not ended.is_set():
            self.disconnected.clear()
            self.connection = stomp.Connection12(
                self.addresses, reconnect_attempts_max=1, reconnect_sleep_initial=0, auto_decode=False
            )
            self.connection.set_listener("consumer", self)
            try:
                self.connection.connect(wait=True)
                for number, queue in enumerate(self.queues):
                    self.connection.subscribe(queue, id=str(number), ack="client-individual")
            except (StompException, OSError):
                ended.wait(RETRY_SECONDS)
                continue
            while not ended.is_set() and not self.disconnected.wait(0.05):
                pass
        if self.connection is not None and self.connection.is_connected():
            self.connection.disconnect(receipt="bye")  # so that the last acknowledgements are with the broker


def say(**fields: object) -> None:
    with _saying:
        print(json.dumps(fields), flush=True)


def read(body: bytes) -> tuple[str | None, bool]:
    """The control id (MSH-10), and whether the message can be taken in."""
    try:
        message = hl7.parse(body, encoding="utf-8")
        control_id = str(message.segment("MSH")(10))
        return control_id, bool(str(message.segment("PID")(3)))
    except (hl7.HL7Exception, UnicodeDecodeError, LookupError):
        return None, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True, action="append", help="repeatable")
    parser.add_argument("--queue", action="append", help="repeatable; the three HL7 queues when not given")
    arguments = parser.parse_args()
    logging.getLogger("stomp.py").setLevel(logging.CRITICAL)  # the broker's death is expected
    consumer = Consumer([(arguments.host, port) for port in arguments.port], tuple(arguments.queue or QUEUES))
    ended = threading.Event()
    worker = threading.Thread(target=consumer.run, args=(ended,))
    worker.start()
    sys.stdin.read()
    ended.set()
    worker.join()


if __name__ == "__main__":
    main()
