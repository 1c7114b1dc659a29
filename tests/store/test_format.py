"""Keys and values: round trips, order, and that no damage passes for a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.errors import CorruptRecord
from pybroker.message import Message, Route
from pybroker.operations import LEVELS, PeerRecord, ProducerRecord, QueueRecord, order_of
from pybroker.store import format as fmt
from tests.store.samples import fields, message, messages, peers, producers, records, sequences, u64

ROUTED = Message(
    *("/queue/a", b"hello", b"k:v\n", True, 4, 0, b"m1", 1_700_000_000_000),
    Route(("city", "province"), ("north",), 2, 7),
)
PRODUCER = ProducerRecord("ward-3", (1, 4, 6, 6), 1, 1_700_000_000_000)
PEER = PeerRecord("north", (("t.>", "south", ("north", "south")),))

NAMED: dict[str, tuple[bytes, Callable[[bytes], bytes], Callable[[bytes, bytes], Any]]] = {
    "message": (
        fmt.message_key(7, order_of(4, 9)),
        lambda key: fmt.encode_message(key, message(b"MSH|^~\\&|")),
        lambda key, value: fmt.decode_message(key, value, order_of(4, 9)),
    ),
    "reference": (
        fmt.message_key(7, order_of(4, 9)),
        lambda key: fmt.encode_reference(key, 3, 4, 5),
        fmt.decode_reference,
    ),
    "routed": (
        fmt.message_key(7, 9),
        lambda key: fmt.encode_message(key, ROUTED),
        lambda key, value: fmt.decode_message(key, value, 9),
    ),
    "producer": (
        fmt.producer_key("ward-3"),
        lambda key: fmt.encode_producer(key, PRODUCER),
        fmt.decode_producer,
    ),
    "peer": (fmt.peer_key("north"), lambda key: fmt.encode_peer(key, PEER), fmt.decode_peer),
    "fence": (fmt.message_key(7, fmt.FENCE_ORDER), fmt.encode_fence, fmt.decode_fence),
    "number": (fmt.deliveries_key(1, 2), lambda key: fmt.encode_number(key, 3), fmt.decode_number),
    "pair": (fmt.POSITION_KEY, lambda key: fmt.encode_pair(key, 3, 4), fmt.decode_pair),
    "queue": (
        fmt.queue_key(7),
        lambda key: fmt.encode_queue(key, QueueRecord(7, "subscription", "a.>", "client", "name")),
        fmt.decode_queue,
    ),
    "selective": (
        fmt.queue_key(7),
        lambda key: fmt.encode_queue(key, QueueRecord(7, "subscription", "a.>", "client", "name", selector="a = 1")),
        fmt.decode_queue,
    ),
    "meta": (fmt.META_KEY, lambda key: fmt.encode_meta(b"12345678", 3), lambda key, value: fmt.decode_meta(value)),
}


@given(messages, u64, st.integers(0, 9), sequences)
def test_messages_come_back(sent: Message, queue_id: int, priority: int, sequence: int) -> None:
    order = order_of(priority, sequence)
    key = fmt.message_key(queue_id, order)
    found = fmt.decode_message(key, fmt.encode_message(key, sent), order)
    sent.priority = priority  # it is in the order
    assert fields(found) == fields(sent)


@given(records)
def test_descriptors_come_back(record: QueueRecord) -> None:
    key = fmt.queue_key(record.queue_id)
    assert fmt.decode_queue(key, fmt.encode_queue(key, record)) == record


@given(producers)
def test_producers_come_back(record: ProducerRecord) -> None:
    key = fmt.producer_key(record.producer_id)
    assert fmt.decode_producer(key, fmt.encode_producer(key, record)) == record


@given(peers)
def test_peers_come_back(record: PeerRecord) -> None:
    key = fmt.peer_key(record.name)
    assert fmt.decode_peer(key, fmt.encode_peer(key, record)) == record


@given(u64, u64, u64, u64, u64)
def test_small_values_come_back(a: int, b: int, c: int, d: int, e: int) -> None:
    key = fmt.message_key(a, b)
    assert fmt.decode_reference(key, fmt.encode_reference(key, c, d, e)) == (c, d, e)
    for key in (fmt.deliveries_key(a, b), fmt.references_key(a), fmt.expiry_key(a, b, c)):
        assert fmt.decode_number(key, fmt.encode_number(key, d)) == d
    for key in (fmt.POSITION_KEY, fmt.IDS_KEY):
        assert fmt.decode_pair(key, fmt.encode_pair(key, a, b)) == (a, b)
    store_id = a.to_bytes(8, "big")
    assert fmt.decode_meta(fmt.encode_meta(store_id, b)) == (store_id, b)
    assert fmt.decode_format(fmt.encode_meta(store_id, b)) == fmt.FORMAT


@given(u64, u64, u64)
def test_keys_come_back(a: int, b: int, c: int) -> None:
    assert fmt.parse_key(fmt.message_key(a, b)) == (fmt.MESSAGE, a, b)
    assert fmt.parse_key(fmt.deliveries_key(a, b)) == (fmt.DELIVERIES, a, b)
    assert fmt.parse_key(fmt.expiry_key(a, b, c)) == (fmt.EXPIRY, a, b, c)
    assert fmt.parse_key(fmt.queue_key(a)) == (fmt.QUEUE, a)
    assert fmt.parse_key(fmt.body_key(a)) == (fmt.BODY, a)
    assert fmt.parse_key(fmt.references_key(a)) == (fmt.REFERENCES, a)
    for key in (fmt.META_KEY, fmt.POSITION_KEY, fmt.IDS_KEY):
        assert fmt.parse_key(key) == (key[0],)
    for key in (fmt.producer_key(str(a)), fmt.peer_key(str(a))):
        assert fmt.parse_key(key) == (key[0], int.from_bytes(key[1:9], "big"), int.from_bytes(key[9:], "big"))
        assert key < fmt.history_key(b) < fmt.queue_key(b) < fmt.META_KEY, "one range is read at open, up to a live key"


@pytest.mark.parametrize("key", [b"", b"\x20", b"\x20" * 18, b"\x11x", b"\x99" * 9, b"\xff"])
def test_keys_of_no_kind_are_refused(key: bytes) -> None:
    with pytest.raises(CorruptRecord):
        fmt.parse_key(key)


@given(st.lists(st.tuples(u64, st.integers(0, 9), sequences), max_size=20))
def test_key_order_is_delivery_order(places: list[tuple[int, int, int]]) -> None:
    in_order = sorted(places, key=lambda item: (item[0], -item[1], item[2]))
    by_key = sorted(places, key=lambda item: fmt.message_key(item[0], order_of(item[1], item[2])))
    assert by_key == in_order


@given(u64, u64, u64, u64, u64, u64)
def test_the_expiry_index_is_in_time_order(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    assert (fmt.expiry_key(a, b, c) < fmt.expiry_key(d, e, f)) == ((a, b, c) < (d, e, f))


@pytest.mark.parametrize("kind", NAMED)
def test_each_flipped_bit_is_detected(kind: str) -> None:
    key, encode, decode = NAMED[kind]
    value = encode(key)
    decode(key, value)
    for bit in range(len(value) * 8):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            decode(key, bytes(damaged))


@pytest.mark.parametrize("kind", NAMED)
def test_each_truncation_and_addition_is_detected(kind: str) -> None:
    key, encode, decode = NAMED[kind]
    value = encode(key)
    for size in range(len(value)):
        with pytest.raises(CorruptRecord):
            decode(key, value[:size])
    for tail in (b"\0", b"\xff", value):
        with pytest.raises(CorruptRecord):
            decode(key, value + tail)


@pytest.mark.parametrize("kind", [kind for kind in NAMED if kind != "meta"])
def test_a_value_under_another_key_is_detected(kind: str) -> None:
    key, encode, decode = NAMED[kind]
    value = encode(key)
    for bit in range(len(key) * 8):
        other = bytearray(key)
        other[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CorruptRecord):
            decode(bytes(other), value)


@settings(max_examples=200)
@given(st.binary(max_size=120))
def test_garbage_with_a_right_checksum_is_refused_or_read_but_never_crashes(payload: bytes) -> None:
    for key, _, decode in NAMED.values():
        try:
            decode(key, fmt.seal(key, payload))
        except CorruptRecord:
            continue


def test_values_of_another_kind_or_version_are_refused() -> None:
    key = fmt.message_key(1, order_of(4, 1))
    reference = fmt.encode_reference(key, 1, 2, 3)
    with pytest.raises(CorruptRecord, match="not a message"):
        fmt.decode_message(key, reference, 1)
    with pytest.raises(CorruptRecord):
        fmt.decode_reference(key, fmt.encode_message(key, message()))
    later = fmt.seal(key, b"\x02" + fmt.encode_message(key, message())[1:-4])
    with pytest.raises(CorruptRecord, match="value version 2, not 1"):
        fmt.decode_message(key, later, 1)
    with pytest.raises(CorruptRecord, match="out of range"):
        fmt.decode_message(key, fmt.encode_message(key, message()), (LEVELS + 3) << 56)
    with pytest.raises(CorruptRecord, match="out of range"):
        fmt.decode_message(key, fmt.encode_message(key, ROUTED), (LEVELS + 3) << 56)
    for kind in ("producer", "peer"):
        key, encode, decode = NAMED[kind]
        with pytest.raises(CorruptRecord, match="value version 2, not 1"):
            decode(key, fmt.seal(key, b"\x02" + encode(key)[1:-4]))
    key, encode, decode = NAMED["selective"]
    with pytest.raises(CorruptRecord, match="value version 3, not 1"):
        decode(key, fmt.seal(key, b"\x03" + encode(key)[1:-4]))
    for wrong in (b"\x01" + encode(key)[1:-4], encode(key)[:-4] + b"x", encode(key)[:-5], encode(key)[:-11] + b"\0\0"):
        with pytest.raises(CorruptRecord):
            decode(key, fmt.seal(key, wrong))


def test_a_route_must_fill_its_room_and_have_a_priority() -> None:
    key = fmt.message_key(7, 9)
    value = fmt.encode_message(key, ROUTED)[:-4]
    names = value.index(b"\x00\x04city")
    for at, byte in (
        (names - 10, 1),
        (names - 10, 0xFF),
        (names - 5, 10),
        (names - 3, 1),
        (names - 3, 3),
        (names + 1, 9),
    ):
        spoilt = bytearray(value)
        spoilt[at] = byte
        with pytest.raises(CorruptRecord):
            fmt.decode_message(key, fmt.seal(key, bytes(spoilt)), 9)
    for bad, flags in ((1, 8), (2, 0), (2, 1), (2, 0x0A), (3, 8)):
        with pytest.raises(CorruptRecord):
            fmt.decode_message(key, fmt.seal(key, bytes((bad, flags)) + value[2:]), 9)


@pytest.mark.parametrize("ranges", [(2, 1), (1, 2, 3, 4), (1, 5, 4, 9), (5, 6, 1, 2), (1, 1, 1, 1)])
def test_ranges_that_do_not_rise_are_refused(ranges: tuple[int, ...]) -> None:
    key = fmt.producer_key("p")
    with pytest.raises(CorruptRecord, match="do not rise"):
        fmt.decode_producer(key, fmt.encode_producer(key, ProducerRecord("p", ranges)))


def test_a_record_of_another_id_is_refused() -> None:
    key = fmt.producer_key("p")
    with pytest.raises(CorruptRecord, match="of another key"):
        fmt.decode_producer(key, fmt.encode_producer(key, ProducerRecord("q")))
    key = fmt.peer_key("p")
    with pytest.raises(CorruptRecord, match="of another key"):
        fmt.decode_peer(key, fmt.encode_peer(key, PeerRecord("q")))


def test_of_a_message_in_a_links_queue_the_route_knows_the_priority() -> None:
    key = fmt.message_key(7, 9)
    found = fmt.decode_message(key, fmt.encode_message(key, ROUTED), 9)
    assert found.route == ROUTED.route
    assert found.priority == 9, "that of the order"


def test_the_bytes_on_disk_do_not_change() -> None:
    """FORMAT.md's example: whoever changes these bytes needs a new format number, not a new expectation."""
    key = fmt.message_key(1, order_of(4, 2))
    sent = Message("/queue/a", b"hello", b"k:v\n", True, 4, 0, b"m1", 1_700_000_000_000)
    assert key.hex(" ") == "20 00 00 00 00 00 00 00 01 05 00 00 00 00 00 00 02"
    assert fmt.encode_message(key, sent).hex(" ") == (
        "01 01 00 00 01 8b cf e5 68 00 00 00 00 00 00 00 00 00 00 02 00 08 00 00 00 04 "
        "6d 31 2f 71 75 65 75 65 2f 61 6b 3a 76 0a 68 65 6c 6c 6f 37 b9 20 b4"
    )
    assert fmt.encode_number(fmt.deliveries_key(1, 2), 3).hex(" ") == "01 00 00 00 00 00 00 00 03 31 8b f1 a2"
    assert fmt.encode_message(fmt.message_key(7, 9), ROUTED).hex(" ") == (
        "02 09 00 00 01 8b cf e5 68 00 00 00 00 00 00 00 00 00 00 02 00 08 00 00 00 04 6d 31 2f 71 75 65 75 "
        "65 2f 61 6b 3a 76 0a 00 00 00 17 00 00 00 02 07 00 02 00 01 00 04 63 69 74 79 00 08 70 72 6f 76 69 "
        "6e 63 65 00 05 6e 6f 72 74 68 68 65 6c 6c 6f e6 34 12 e5"
    )
    assert fmt.producer_key("ward-3").hex(" ") == "0d 9f 46 18 72 bf 64 28 4a 6c ce de 2d 44 c8 8c ad"
    assert fmt.encode_producer(fmt.producer_key("ward-3"), PRODUCER).hex(" ") == (
        "01 00 00 00 00 00 00 00 01 00 00 01 8b cf e5 68 00 00 00 00 02 00 06 77 61 72 64 2d 33 00 00 00 00 "
        "00 00 00 01 00 00 00 00 00 00 00 04 00 00 00 00 00 00 00 06 00 00 00 00 00 00 00 06 e4 db 8f d0"
    )
    assert fmt.peer_key("north").hex(" ") == "0e dc 36 5e 79 d4 1c fa e1 c3 c0 d9 69 31 9a e6 21"
    assert fmt.encode_peer(fmt.peer_key("north"), PEER).hex(" ") == (
        "01 00 05 00 00 00 01 6e 6f 72 74 68 00 02 00 03 74 2e 3e 00 05 73 6f 75 74 68 00 05 6e 6f 72 74 68 "
        "00 05 73 6f 75 74 68 21 47 d1 6d"
    )
