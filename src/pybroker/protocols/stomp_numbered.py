"""SEND and COMMIT that a producer numbers, so that a repeated one is stored once: what the headers mean, and their cutting out.

Three headers, which are the transport's and are not passed on:

* ``producer-id``: 1 to 64 printable characters without a space; unique, and hard to guess. The producer makes it.
* ``producer-sequence``: a whole number from 0. The same number stands for the same SEND, or the same COMMIT, for ever.
* ``producer-repeat:true``: it may have been sent before. Then a producer that is not known here is one that was forgotten, and the
  answer is an ERROR with the code ``in-doubt``; without it the frame is taken for a new producer's first, and lower numbers are
  in doubt from then on. So number upwards, and say it of everything that is sent again.

A SEND or COMMIT that is stored already gets its RECEIPT, and nothing else happens.
"""

from __future__ import annotations

from pybroker.errors import ProtocolError
from pybroker.protocols.stomp_events import Numbered
from pybroker.protocols.stomp_headers import shown

NUMBERED = ("producer-id", "producer-sequence", "producer-repeat")
PRODUCER_CHARACTERS_MAX = 64
SEQUENCE_DIGITS_MAX = 18

_SEQUENCE_LINE = b"\nproducer-sequence:"


def parse_numbered(command: str, producer: str | None, sequence: str | None, repeat: str | None) -> Numbered | None:
    """What the three headers say, None when none of them is there. Raise `ProtocolError` with how to mend them."""
    if producer is None and sequence is None and repeat is None:
        return None
    if producer is None or sequence is None:
        missing = "producer-sequence" if producer is not None else "producer-id"
        raise ProtocolError(
            f"{command} needs the header {missing}, too: producer-id and producer-sequence belong together, give both or none"
        )
    if not 1 <= len(producer) <= PRODUCER_CHARACTERS_MAX or not producer.isprintable() or " " in producer:
        raise ProtocolError(
            f"{command} header producer-id must be 1 to {PRODUCER_CHARACTERS_MAX} printable characters without a space, "
            f"not {shown(producer)}"
        )
    if not (sequence.isascii() and sequence.isdigit() and len(sequence) <= SEQUENCE_DIGITS_MAX):
        raise ProtocolError(
            f"{command} header producer-sequence must be a whole number from 0, of up to {SEQUENCE_DIGITS_MAX} digits, "
            f"not {shown(sequence)}"
        )
    if repeat not in (None, "true", "false"):
        raise ProtocolError(f"{command} header producer-repeat must be true or false, not {shown(repeat)}")
    return Numbered(producer, int(sequence), repeat == "true")


def cut_sequence(lines: bytes) -> tuple[bytes, int] | None:
    """Header lines without their producer-sequence, and that number; None when it is not there, or not plainly written.

    What is left is the same for all frames of a producer, and can be remembered.
    """
    at = lines.find(_SEQUENCE_LINE)
    if at < 0:
        return None
    start = at + len(_SEQUENCE_LINE)
    stop = lines.find(b"\n", start)
    digits = lines[start:stop]
    if not digits.isdigit() or len(digits) > SEQUENCE_DIGITS_MAX:
        return None
    return lines[:at] + lines[stop:], int(digits)
