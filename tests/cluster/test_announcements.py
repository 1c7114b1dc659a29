"""Announcements: what is said is heard, nothing else ever is, and each of them once."""

from __future__ import annotations

import hmac
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pybroker.cluster import announcements as a
from pybroker.cluster.announcements import Announcement, Gate, Reason, decode, encode, longest
from pybroker.errors import ConfigurationError

BOOT = b"b" * 16
OTHER_BOOT = b"c" * 16
SECRET = b"hunter2"
SAID = Announcement("ward", "ward-1", 7, ("pybroker://10.0.0.1:61620", "pybroker+ssl://[::1]:1"), BOOT, 5)
GONE = SAID._replace(kind=a.GONE, urls=())


def body_of(fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def outer_of(body: bytes, *, version: object = a.VERSION, group: object = "default", signature: object = b"") -> bytes:
    return body_of((version, group, body, signature))


def signed(body: bytes, secret: bytes = SECRET) -> bytes:
    """A right signature by the text of the module, put together anew."""
    over = body_of((b"pybroker announcement", 1, "default", body))
    return outer_of(body, signature=hmac.new(secret, over, "sha256").digest())


# ---- what is said is heard


names = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=40)
urls = st.builds(
    "{}://{}:{}".format,
    st.sampled_from(["pybroker", "pybroker+ssl"]),
    st.sampled_from(["a", "10.0.0.1", "[::1]", "x.example"]),
    st.integers(1, 65_535),
)
numbers = st.one_of(st.integers(0, 300), st.integers(0, a.NUMBER_MAX))
said = st.builds(
    Announcement,
    names,
    names,
    numbers,
    st.lists(urls, min_size=1, max_size=16).map(tuple),
    st.binary(min_size=16, max_size=16),
    numbers,
    st.sampled_from([a.HERE, a.GONE]),
)


@given(said, names, st.none() | st.binary(min_size=1))
def test_what_is_said_is_heard(announcement: Announcement, group: str, secret: bytes | None):
    datagram = encode(announcement, group, secret)
    assert len(datagram) <= longest(announcement.name, announcement.node, announcement.urls, group)
    assert len(datagram) <= a.DATAGRAM_BYTES_MAX
    assert decode(datagram, group, secret) == announcement


@pytest.mark.parametrize("announcement", [SAID, GONE])
def test_the_signature_is_as_the_text_says(announcement: Announcement):
    assert encode(announcement, "default", SECRET) == signed(body_of(announcement))
    assert encode(announcement, "default", None) == outer_of(body_of(announcement))


def test_the_limits_of_what_can_be_said():
    wide = SAID._replace(
        name="ä" * 255, node="n" * 255, urls=("pybroker://" + ".".join(["h" * 50, *["h" * 49] * 3]) + ":1",) * 2
    )
    datagram = encode(wide, "default", SECRET)
    assert decode(datagram, "default", SECRET) == wide
    with pytest.raises(ConfigurationError, match="bytes, and 1400 fit: give shorter names"):
        encode(wide._replace(urls=wide.urls * 2), "default", SECRET)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": ""},
        {"name": "n" * 256},
        {"name": "a\n"},
        {"name": "\ud800"},
        {"name": b"ward"},
        {"node": ""},
        {"node": 5},
        {"epoch": -1},
        {"epoch": 2**63},
        {"epoch": True},
        {"epoch": 1.0},
        {"epoch": None},
        {"urls": ()},
        {"urls": "pybroker://a:1"},
        {"urls": ("pybroker://a:1", 5)},
        {"urls": ("pybroker://a:1",) * 17},
        {"urls": ("stomp://a:1",)},
        {"urls": ("pybroker://a:0",)},
        {"urls": ("pybroker://0.0.0.0:1",)},
        {"urls": ("pybroker://a:1/x",)},
        {"urls": ("pybroker://a@b:1",)},
        {"urls": ("pybroker://" + "h" * 250 + ":1",)},
        {"boot": b"b" * 15},
        {"boot": "b" * 16},
        {"counter": -1},
        {"counter": 2**63},
        {"kind": "away"},
        {"kind": b"here"},
        {"kind": 1},
    ],
)
def test_a_wrong_field_is_neither_said_nor_heard(wrong: dict[str, Any]):
    announcement = SAID._replace(**wrong)
    with pytest.raises(ConfigurationError, match="can't be announced"):
        encode(announcement, "default", None)
    if wrong.get("name") == "\ud800":
        return  # msgpack itself says no to that
    body = body_of(announcement)
    assert decode(outer_of(body), "default", None) is Reason.MALFORMED
    assert decode(signed(body), "default", SECRET) is Reason.MALFORMED


# ---- nothing else ever is


@given(st.binary(max_size=1_500))
@example(b"")
@example(b"\x91" * 1_400)
@example(b"\x81" * 1_400)
@example(b"\xdd\xff\xff\xff\xff")
@example(b"\xdf\xff\xff\xff\xff\x01")
@example(b"\xc6\xff\xff\xff\xff")
@example(b"\x94\x01\xa7default\xc4\x00\xc4\x00")
@example(b"\x94\x01\xd7\xff" + bytes(8))
@example(b"\x81\x91\x01\x01")
@settings(max_examples=500)
def test_any_bytes_are_a_value_or_a_reason(data: bytes):
    for secret in (None, SECRET):
        found = decode(data, "default", secret)
        assert isinstance(found, Reason)
        assert found is (Reason.OVERSIZED if len(data) > 1_400 else found)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=40),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(values, st.lists(values, min_size=7, max_size=7), values, values)
@settings(max_examples=300)
def test_any_values_are_a_value_or_a_reason(value: Any, fields: list[Any], group: Any, signature: Any):
    for datagram in (
        body_of(value),
        outer_of(body_of(value)),
        outer_of(body_of(fields)),
        outer_of(value),
        outer_of(body_of(SAID), version=value),
        outer_of(body_of(SAID), group=group, signature=signature),
        signed(body_of(value)),
        signed(body_of(fields)),
    ):
        for secret in (None, SECRET):
            assert isinstance(decode(datagram, "default", secret), Reason | Announcement)


@given(said, st.data())
def test_changed_fields_are_heard_as_they_are_or_not_at_all(announcement: Announcement, data: st.DataObject):
    fields = list(announcement)
    fields[data.draw(st.integers(0, 6))] = data.draw(values)
    found = decode(outer_of(body_of(fields)), "default", None)
    assert found is Reason.MALFORMED or body_of(found) == body_of(fields)


@pytest.mark.parametrize("announcement", [SAID, GONE])
def test_every_flipped_bit_of_a_signed_datagram_is_refused(announcement: Announcement):
    datagram = encode(announcement, "default", SECRET)
    reasons = set()
    for bit in range(8 * len(datagram)):
        changed = bytearray(datagram)
        changed[bit // 8] ^= 1 << bit % 8
        found = decode(bytes(changed), "default", SECRET)
        assert isinstance(found, Reason), f"bit {bit}"
        reasons.add(found)
    assert reasons == {Reason.MALFORMED, Reason.VERSION, Reason.GROUP, Reason.FORGED}


def test_every_cut_or_longer_datagram_is_refused():
    datagram = encode(SAID, "default", SECRET)
    for size in range(len(datagram)):
        assert decode(datagram[:size], "default", SECRET) is Reason.MALFORMED
        assert decode(datagram + datagram[: size + 1], "default", SECRET) is Reason.MALFORMED


def test_another_encoding_of_the_same_is_refused():
    datagram = encode(SAID, "default", SECRET)
    assert datagram[1] == a.VERSION
    wider = datagram[:1] + b"\xcc\x01" + datagram[2:]  # the version as a byte of its own
    assert msgpack.unpackb(wider) == msgpack.unpackb(datagram)
    assert decode(wider, "default", SECRET) is Reason.MALFORMED


@pytest.mark.parametrize(
    ("datagram", "secret", "reason"),
    [
        (encode(SAID, "default", SECRET), b"hunter3", Reason.FORGED),
        (encode(SAID, "default", SECRET), None, Reason.SIGNED),
        (encode(SAID, "default", None), SECRET, Reason.UNSIGNED),
        (encode(SAID, "other", None), None, Reason.GROUP),
        (encode(SAID, "other", SECRET), SECRET, Reason.GROUP),
        (encode(SAID, "other", b"hunter3"), SECRET, Reason.GROUP),
        (outer_of(body_of(SAID), version=2), None, Reason.VERSION),
        (body_of((2, "what", "comes", "with", 2)), None, Reason.VERSION),
        (outer_of(body_of(SAID), version=True), None, Reason.MALFORMED),
        (outer_of(body_of(SAID), signature=b"s" * 31), SECRET, Reason.MALFORMED),
        (b"\x94" * 1_401, None, Reason.OVERSIZED),
    ],
)
def test_each_reason(datagram: bytes, secret: bytes | None, reason: Reason):
    assert decode(datagram, "default", secret) is reason


def test_the_group_is_signed_too():
    """A datagram of one group is none of another that has the same secret, also when somebody writes that group on it."""
    version, _, body, signature = msgpack.unpackb(encode(SAID, "default", SECRET))
    moved = body_of((version, "other", body, signature))
    assert decode(moved, "other", SECRET) is Reason.FORGED


# ---- each announcement once


def admitted(gate: Gate, announcement: Announcement, secret: bytes | None = SECRET) -> Announcement | Reason:
    return gate.admit(encode(announcement, "default", secret))


def test_counters_must_rise():
    gate = Gate("default", SECRET)
    assert admitted(gate, SAID) == SAID
    assert admitted(gate, SAID) is Reason.REPLAYED
    assert admitted(gate, SAID._replace(counter=4)) is Reason.REPLAYED
    assert admitted(gate, SAID._replace(counter=5, kind=a.GONE)) is Reason.REPLAYED
    assert admitted(gate, SAID._replace(counter=9)) == SAID._replace(counter=9)  # some were lost
    assert admitted(gate, SAID._replace(counter=8)) is Reason.REPLAYED
    assert admitted(gate, SAID._replace(counter=0, boot=OTHER_BOOT)) == SAID._replace(counter=0, boot=OTHER_BOOT)


def test_what_was_heard_of_a_superseded_boot_can_not_come_back():
    gate = Gate("default", SECRET)
    recorded = [encode(SAID._replace(counter=count), "default", SECRET) for count in range(20)]
    for datagram in recorded:
        assert not isinstance(gate.admit(datagram), Reason)
    assert not isinstance(admitted(gate, SAID._replace(boot=OTHER_BOOT, counter=0)), Reason)
    assert {gate.admit(datagram) for datagram in recorded} == {Reason.REPLAYED}


def test_a_recorded_boot_does_not_lock_out_the_live_one():
    """Heard by who was away when it was recorded. The live boot's next announcement counts, whatever came in between."""
    gate = Gate("default", SECRET)
    live, recorded = SAID, SAID._replace(boot=OTHER_BOOT)
    for count in range(10):
        assert not isinstance(admitted(gate, live._replace(counter=10 + count)), Reason)
        assert not isinstance(admitted(gate, recorded._replace(counter=count)), Reason)
        assert admitted(gate, recorded._replace(counter=count)) is Reason.REPLAYED


def test_a_replay_in_another_name_or_node_is_another_boot():
    gate = Gate("default", None)
    for change in ({}, {"name": "other"}, {"node": "other"}):
        assert not isinstance(admitted(gate, SAID._replace(**change), None), Reason)  # type: ignore[arg-type]


def test_what_is_refused_moves_no_counter():
    gate = Gate("default", SECRET)
    assert admitted(gate, SAID._replace(counter=a.NUMBER_MAX), b"hunter3") is Reason.FORGED
    assert admitted(gate, SAID._replace(counter=a.NUMBER_MAX), None) is Reason.UNSIGNED
    assert admitted(gate, SAID) == SAID


def test_our_own_are_known_by_their_boot():
    own = {BOOT}
    gate = Gate("default", SECRET, own)
    assert admitted(gate, SAID) is Reason.OWN
    assert not isinstance(admitted(gate, SAID._replace(boot=OTHER_BOOT)), Reason)
    own.add(OTHER_BOOT)
    assert admitted(gate, SAID._replace(boot=OTHER_BOOT, counter=99)) is Reason.OWN


def test_the_memory_of_boots_is_bounded_and_keeps_the_last_heard():
    gate = Gate("default", None, boots_max=10)
    admitted(gate, SAID, None)
    for count in range(1_000):
        boot = count.to_bytes(16, "big")
        assert not isinstance(admitted(gate, SAID._replace(boot=boot), None), Reason)
        if count % 9 == 8:
            assert admitted(gate, SAID, None) is Reason.REPLAYED
            assert not isinstance(admitted(gate, SAID._replace(counter=6 + count), None), Reason)
            assert admitted(gate, SAID._replace(boot=boot), None) is Reason.REPLAYED
    assert len(gate._counters) == 10


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 8)), max_size=60))
def test_against_a_model_each_boot_and_counter_is_taken_once(heard: list[tuple[int, int]]):
    gate = Gate("default", None)
    last: dict[int, int] = {}
    for boot, counter in heard:
        taken = not isinstance(admitted(gate, SAID._replace(boot=bytes([boot]) * 16, counter=counter), None), Reason)
        assert taken == (counter > last.get(boot, -1))
        last[boot] = max(counter, last.get(boot, -1))
