"""The demonstration's stage: the producer, the consumer and the clock of one run, whatever brokers they talk to.

Owns who is listened to, and for how long. What the programs say goes to the account; that the broker is still there is for
the watchers to say.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from rich.console import Console

from demo_account import DEAD_LETTER_QUEUE, Account
from demo_programs import HERE, DemoFailed, Program

STALL_SECONDS = 5.0  # what has not come when nothing came for this long will not come
QUIET_SECONDS = 1.0  # at the end it is watched for this long whether more comes than should
END_SECONDS = 10.0


@dataclass(frozen=True)
class Gap:
    """What the producer saw of a broker's death: from its last confirmed send to the next one, at another connection."""

    milliseconds: float
    port: int  # of the broker that confirmed again
    sent_again: int


class Stage:
    """One run. `account` holds what must arrive and what did.

    watchers  called again and again while the programs are followed; one raises when a broker is not as it should be
    gaps      in the order in which the producer saw them
    """

    def __init__(self, account: Account, seed: int, deadline: float, console: Console, started: float) -> None:
        self.account = account
        self.seed = seed
        self.deadline = deadline
        self.console = console
        self.started = started
        self.clients: list[Program] = []
        self.watchers: list[Callable[[], None]] = []
        self.gaps: list[Gap] = []

    @property
    def count(self) -> int:
        """Messages that are sent."""
        return len(self.account.messages)

    def start_clients(self, stack: ExitStack, ports: Sequence[int], rate: float = 0) -> None:
        """Start the consumer and the producer. They try the ports until a broker answers."""
        self.addresses = [word for port in ports for word in ("--port", str(port))]
        self._start(stack, "consumer", "hl7_consumer.py")
        numbers = ("--seed", str(self.seed), "--count", str(self.count), "--rate", str(rate))
        self._start(stack, "producer", "hl7_producer.py", *numbers, "--deadline", f"{self.left():.0f}")

    def _start(self, stack: ExitStack, name: str, file: str, *arguments: str) -> Program:
        program = stack.enter_context(Program(name, str(HERE / file), *self.addresses, *arguments))
        self.clients.append(program)
        return program

    def receive_rest(self, stack: ExitStack) -> None:
        """To the end of the run: everything is confirmed, delivered, and the dead letters are fetched."""
        self.follow(until=lambda: self.account.producer_done)
        self.say(f"producer: all {self.count} confirmed, after {self.account.connections} connections")
        self.follow(until=lambda: not self.account.not_delivered(), quiet=STALL_SECONDS)
        self.say(f"consumer: {len(self.account.deliveries)} have been delivered; now the dead letters")
        self._start(stack, "reader of dead letters", "hl7_consumer.py", "--queue", DEAD_LETTER_QUEUE)
        self.follow(until=lambda: not self.account.not_dead_lettered(), quiet=STALL_SECONDS)
        self.follow(until=lambda: False, quiet=QUIET_SECONDS)
        for program in self.clients:
            program.end_input()  # it disconnects and ends
            program.wait(END_SECONDS)

    def follow(self, *, until: Callable[[], object], quiet: float = math.inf) -> None:
        """Take in what the programs say until a condition holds, or none has said anything for ``quiet`` seconds."""
        last_line = time.monotonic()
        while not until() and time.monotonic() < last_line + quiet:
            if self.left() <= 0:
                raise DemoFailed("the time is over before everything had arrived")
            for watch in self.watchers:
                watch()
            for program in self.clients:
                for last_line, line in program.new_lines():  # noqa: B007 - the time of the last one
                    self._take(program, line)
                if program.process.poll():
                    raise DemoFailed(f"the {program.name} ended with exit status {program.process.returncode}")
            time.sleep(0.01)

    def _take(self, program: Program, text: str) -> None:
        line = json.loads(text)
        if "gap_ms" in line:
            self.gaps.append(Gap(line["gap_ms"], line["port"], line["sent_again"]))
        elif "told" in line:
            self.say(f"{program.name}: was told: {line['told']}")
        else:
            self.account.take(line)

    def left(self) -> float:
        """Seconds."""
        return self.started + self.deadline - time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.started:6.2f} s  {text}", highlight=False, soft_wrap=True)
