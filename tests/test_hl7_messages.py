"""The demo's messages: the same bytes for the same seed, of the sizes promised, and readable HL7."""

from __future__ import annotations

import base64
import hashlib
import sys
from collections import Counter
from pathlib import Path

import hl7
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import hl7_messages
from hl7_messages import Hl7Message, make_message, make_messages

COUNT = 600


@pytest.fixture(scope="module")
def messages() -> list[Hl7Message]:
    return list(make_messages(7, COUNT))


def test_the_same_seed_gives_the_same_bytes(messages: list[Hl7Message]):
    assert list(make_messages(7, COUNT)) == messages
    assert make_message(7, 123) == messages[123], "each message is made by itself"
    assert make_message(8, 123).body != messages[123].body
    assert len({message.sha256 for message in messages}) == COUNT


def test_the_bytes_are_the_same_on_every_machine(messages: list[Hl7Message]):
    whole = hashlib.sha256(b"".join(message.body for message in messages[:60])).hexdigest()
    assert whole == "af4db184630e76653e2491aeca279995ffb802a59d37371148a662dd2b0278ef"


def test_sizes(messages: list[Hl7Message]):
    sizes = [len(message.body) for message in messages]
    assert hl7_messages.BYTES_MIN <= min(sizes) < 1_000
    assert 150_000 < max(sizes) <= hl7_messages.BYTES_MAX


def test_queues_and_rejected_ones(messages: list[Hl7Message]):
    assert Counter(message.queue for message in messages) == dict.fromkeys(hl7_messages.QUEUES, COUNT // 3)
    rejected = Counter(message.queue for message in messages if not message.names_patient)
    assert sum(rejected.values()) == COUNT // 50
    assert rejected.keys() == set(hl7_messages.QUEUES)


def test_each_message_is_hl7(messages: list[Hl7Message]):
    kinds = Counter()
    for message in messages[:120]:
        assert hashlib.sha256(message.body).hexdigest() == message.sha256
        parsed = hl7.parse(message.body, encoding="utf-8")
        assert str(parsed).encode() == message.body
        assert str(parsed["MSH.F10"]) == message.control_id
        assert hl7_messages.number_of(message.control_id) == message.number
        assert bool(str(parsed.segment("PID")(3))) == message.names_patient
        kinds[str(parsed.segment("MSH")(9))] += 1
    assert kinds == {"ORM^O01": 40, "ORU^R01": 40, "REF^I12": 40}


def test_a_result_carries_its_electrocardiogram(messages: list[Hl7Message]):
    result = next(message for message in messages if message.queue == hl7_messages.RESULTS)
    parsed = hl7.parse(result.body, encoding="utf-8")
    data = parsed.segments("OBX")[1]
    assert str(data(2)) == "ED"
    assert str(data(5)(1)(4)) == "Base64"
    assert len(base64.b64decode(str(data(5)(1)(5)), validate=True)) % 2 == 0


def test_separators_in_texts_are_escaped():
    assert hl7_messages._escaped("a|b^c&d~e\\f") == r"a\F\b\S\c\T\d\R\e\E\f"
