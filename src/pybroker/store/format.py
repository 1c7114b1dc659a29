"""Keys and values of the store, byte by byte. On disk: do not change, and never renumber a tag.

FORMAT.md beside this file describes the same in prose. Pure: bytes in, values out; no backend, clock or file. Every
value is ``version (1 byte) ... crc32 (4 bytes, little endian)``; the checksum runs over the key, then the value, so
that a value under another's key is detected too. Integers in keys and values are big endian.
"""

from __future__ import annotations

from hashlib import sha256
from itertools import pairwise
from struct import Struct
from zlib import crc32

from pybroker.errors import CorruptRecord
from pybroker.message import PRIORITY_MAX, Message, Route
from pybroker.operations import LEVELS, SEQUENCE_BITS, PeerRecord, ProducerRecord, QueueRecord

FORMAT = 1  # of the store as a whole, in the META value
MAGIC = b"pybroker store\n"

# ---- tags: the first byte of each key. On disk: do not change.

PRODUCER = 0x0D  # | digest of the id: which sends of that producer are stored. Read at open, as all up to META
PEER = 0x0E  # | digest of the name: another broker of the network
HISTORY = 0x0F  # | epoch: the first lsn of that epoch
QUEUE = 0x10  # | queue_id: a queue's descriptor
META = 0x11  # alone: what the store is. Always there: it ends the range that is read at open
POSITION = 0x12  # alone: the (epoch, lsn) of the last batch
IDS = 0x13  # alone: lower bounds of the ids that were never used
MESSAGE = 0x20  # | queue_id | order: a message, a reference to a body, or (order = FENCE_ORDER) the queue's fence
DELIVERIES = 0x21  # | queue_id | order: how often delivery began, or the queue's fence
BODY = 0x30  # | body_id: a message that several subscriptions share
REFERENCES = 0x31  # | body_id: how many references are left
EXPIRY = 0x40  # | expires | queue_id | order: the index of what expires
SCHEDULING = 0x50  # alone: what there is of schedules. It ends the range of EXPIRY, once there was one
SCHEDULE = 0x51  # | number: a message to be sent later
SCHEDULE_DUE = 0x52  # | due | number: the index of when
END = 0xFF  # alone: LevelDB's end mark, owned by leveldb.py

META_KEY = bytes((META,))
SCHEDULING_KEY = bytes((SCHEDULING,))
POSITION_KEY = bytes((POSITION,))
IDS_KEY = bytes((IDS,))

FENCE_ORDER = 2**64 - 1  # no message has it; see FORMAT.md, "Fences"
ID_MAX = 2**64 - 1

# ---- flags of a value under MESSAGE or BODY. On disk: do not change.

DURABLE = 0x01
REFERENCE = 0x02
FENCE = 0x04
ROUTED = 0x08  # a message with its way through a network, in a value of version ROUTED_VERSION

KINDS = {"queue": 1, "subscription": 2, "deleted": 3, "link": 4}  # deleted: its messages are still being removed
_KIND_NAMES = {number: name for name, number in KINDS.items()}

VERSION = 1  # of each value
ROUTED_VERSION = 2  # of a message's that has a route, and of none else
SELECTIVE_VERSION = 2  # of the descriptor of a subscription that has a selector
DIGEST_BYTES = 16  # of the SHA-256 of a producer's id or a peer's name, in their keys
CHECKSUM_BYTES = 4
RESIDUE = 0x2144DF1C  # crc32 of anything followed by its own crc32, little endian

_key8 = Struct(">BQ").pack
_key16 = Struct(">BQQ").pack
_key24 = Struct(">BQQQ").pack
_unkey8 = Struct(">BQ").unpack
_unkey16 = Struct(">BQQ").unpack
_unkey24 = Struct(">BQQQ").unpack
_checksum = Struct("<I").pack

_MESSAGE_HEAD = Struct(">BBQQHHI")  # version, flags, timestamp, expires, bytes of message_id, destination, header block
_MESSAGE_HEAD_BYTES = _MESSAGE_HEAD.size
_pack_message = _MESSAGE_HEAD.pack
_unpack_message = _MESSAGE_HEAD.unpack_from
_REFERENCE = Struct(">BBQQQ")  # version, flags, body_id, expires, size
_FENCE = Struct(">BB")  # version, flags
_NUMBER = Struct(">BQ")  # version, a count or a size
_PAIR = Struct(">BQQ")  # version, two numbers
_QUEUE_HEAD = Struct(f">BB4Q{LEVELS}QHHH")
_META = Struct(">BI8sQ")  # version, format, store id, starts
_ROUTE_HEAD = Struct(">IIBHH")  # bytes of the route behind these, deliveries, priority, names passed, targets
_PRODUCER_HEAD = Struct(">BQQIH")  # version, floor, last_used, ranges, bytes of the id
_PEER_HEAD = Struct(">BHI")  # version, bytes of the name, demands
_U16 = Struct(">H")


# ---- keys


def producer_key(producer_id: str) -> bytes:
    return bytes((PRODUCER,)) + sha256(producer_id.encode()).digest()[:DIGEST_BYTES]


def peer_key(name: str) -> bytes:
    return bytes((PEER,)) + sha256(name.encode()).digest()[:DIGEST_BYTES]


def history_key(epoch: int) -> bytes:
    return _key8(HISTORY, epoch)


def queue_key(queue_id: int) -> bytes:
    return _key8(QUEUE, queue_id)


def message_key(queue_id: int, order: int) -> bytes:
    return _key16(MESSAGE, queue_id, order)


def deliveries_key(queue_id: int, order: int) -> bytes:
    return _key16(DELIVERIES, queue_id, order)


def body_key(body_id: int) -> bytes:
    return _key8(BODY, body_id)


def references_key(body_id: int) -> bytes:
    return _key8(REFERENCES, body_id)


def expiry_key(expires: int, queue_id: int, order: int) -> bytes:
    return _key24(EXPIRY, expires, queue_id, order)


def parse_key(key: bytes) -> tuple[int, ...]:
    """The tag and the numbers of a key (of a digest, its halves); raise `CorruptRecord` for one that no store has."""
    tag = key[0] if key else -1
    size = len(key)
    if tag in (MESSAGE, DELIVERIES, PRODUCER, PEER, SCHEDULE_DUE) and size == 17:
        numbers: tuple[int, ...] = _unkey16(key)
    elif tag == EXPIRY and size == 25:
        numbers = _unkey24(key)
    elif tag in (QUEUE, BODY, REFERENCES, HISTORY, SCHEDULE) and size == 9:
        numbers = _unkey8(key)
    elif tag in (META, POSITION, IDS, SCHEDULING) and size == 1:
        numbers = (tag,)
    else:
        raise CorruptRecord(key, "the key is of no known kind")
    return numbers


# ---- the envelope


def seal(key: bytes, payload: bytes) -> bytes:
    """Append the checksum of key and payload."""
    return payload + _checksum(crc32(payload, crc32(key)))


def is_whole(key: bytes, value: bytes) -> bool:
    """Whether a value's checksum is right, for that key. (One of a version that is not known here is not bad for that.)"""
    return crc32(value, crc32(key)) == RESIDUE


def check(key: bytes, value: bytes) -> None:
    """Raise `CorruptRecord` unless the value is whole, belongs to the key, and is of a version known here."""
    if not is_whole(key, value):
        raise CorruptRecord(key, "the checksum is wrong")
    if not value or value[0] != VERSION:
        raise CorruptRecord(key, f"value version {value[0] if value else None}, not {VERSION}")


def _unpack(struct: Struct, key: bytes, value: bytes) -> tuple[int, ...]:
    check(key, value)
    if len(value) != struct.size + CHECKSUM_BYTES:
        raise CorruptRecord(key, f"{len(value)} bytes, not {struct.size + CHECKSUM_BYTES}")
    return struct.unpack_from(value)


# ---- messages, references, fences


def encode_message(key: bytes, message: Message) -> bytes:
    """The value of a message under MESSAGE or BODY. Its priority is in the order, not here (that in a route is)."""
    if message.route is not None:
        return _encode_routed(key, message, message.route)
    message_id = message.message_id
    destination = message.destination.encode()
    header_block = message.header_block
    payload = b"".join(
        (
            _pack_message(
                VERSION,
                DURABLE if message.durable else 0,
                message.timestamp,
                message.expires,
                len(message_id),
                len(destination),
                len(header_block),
            ),
            message_id,
            destination,
            header_block,
            message.body,
        )
    )
    return payload + _checksum(crc32(payload, crc32(key)))


def decode_message(key: bytes, value: bytes, order: int) -> Message:
    """The message of a value; `order` gives its priority. Raises `CorruptRecord`."""
    if crc32(value, crc32(key)) != RESIDUE:
        raise CorruptRecord(key, "the checksum is wrong")
    end = len(value) - CHECKSUM_BYTES
    if end < _MESSAGE_HEAD_BYTES or value[0] != VERSION or value[1] > DURABLE:
        if end >= _MESSAGE_HEAD_BYTES and value[0] == ROUTED_VERSION and value[1] in (ROUTED, ROUTED | DURABLE):
            return _decode_routed(key, value, order)
        check(key, value)
        raise CorruptRecord(key, "the value is not a message")
    _, flags, timestamp, expires, id_bytes, destination_bytes, header_bytes = _unpack_message(value)
    destination_at = _MESSAGE_HEAD_BYTES + id_bytes
    header_at = destination_at + destination_bytes
    body_at = header_at + header_bytes
    priority = PRIORITY_MAX - (order >> SEQUENCE_BITS)
    if body_at > end or priority < 0:
        raise CorruptRecord(key, "lengths or order are out of range")
    try:
        destination = value[destination_at:header_at].decode()
    except UnicodeDecodeError:
        raise CorruptRecord(key, "the destination is not UTF-8") from None
    return Message(
        destination,
        value[body_at:end],
        value[header_at:body_at],
        flags == DURABLE,
        priority,
        expires,
        value[_MESSAGE_HEAD_BYTES:destination_at],
        timestamp,
    )


def _encode_routed(key: bytes, message: Message, route: Route) -> bytes:
    """As that of any other message, with the route between header block and body."""
    message_id = message.message_id
    destination = message.destination.encode()
    payload = b"".join(
        (
            _pack_message(
                ROUTED_VERSION,
                ROUTED | (DURABLE if message.durable else 0),
                message.timestamp,
                message.expires,
                len(message_id),
                len(destination),
                len(message.header_block),
            ),
            message_id,
            destination,
            message.header_block,
            _route_section(route),
            message.body,
        )
    )
    return payload + _checksum(crc32(payload, crc32(key)))


_last_section: tuple[Route | None, bytes] = (None, b"")


def _route_section(route: Route) -> bytes:
    """A route as it is stored. The last one is remembered: messages that follow each other have mostly one object as theirs."""
    global _last_section
    last, section = _last_section
    if route is not last:
        section = _pack_route(route)
        _last_section = route, section
    return section


def _pack_route(route: Route) -> bytes:
    names = _pack_texts((*route.passed, *route.targets))
    head = _ROUTE_HEAD.pack(len(names), route.deliveries, route.priority, len(route.passed), len(route.targets))
    return head + names


def _decode_routed(key: bytes, value: bytes, order: int) -> Message:
    end = len(value) - CHECKSUM_BYTES
    _, flags, timestamp, expires, id_bytes, destination_bytes, header_bytes = _unpack_message(value)
    destination_at = _MESSAGE_HEAD_BYTES + id_bytes
    header_at = destination_at + destination_bytes
    route_at = header_at + header_bytes
    names_at = route_at + _ROUTE_HEAD.size
    priority = PRIORITY_MAX - (order >> SEQUENCE_BITS)
    if names_at > end or priority < 0:
        raise CorruptRecord(key, "lengths or order are out of range")
    names_bytes, deliveries, sent_priority, passed, targets = _ROUTE_HEAD.unpack_from(value, route_at)
    body_at = names_at + names_bytes
    if body_at > end or sent_priority > PRIORITY_MAX:
        raise CorruptRecord(key, "the route's length or priority is out of range")
    names, names_end = _unpack_texts(key, value, names_at, body_at, passed + targets)
    if names_end != body_at:
        raise CorruptRecord(key, "the route is longer than its names")
    try:
        destination = value[destination_at:header_at].decode()
    except UnicodeDecodeError:
        raise CorruptRecord(key, "the destination is not UTF-8") from None
    return Message(
        destination,
        value[body_at:end],
        value[header_at:route_at],
        bool(flags & DURABLE),
        priority,
        expires,
        value[_MESSAGE_HEAD_BYTES:destination_at],
        timestamp,
        Route(names[:passed], names[passed:], deliveries, sent_priority),
    )


def check_message(key: bytes, value: bytes) -> None:
    """Raise `CorruptRecord` unless the value is whole, belongs to the key, and is of a version that a message may have."""
    if value[:1] != bytes((ROUTED_VERSION,)) or not is_whole(key, value):
        check(key, value)


def flags_of(value: bytes) -> int:
    """The flags of a value under MESSAGE, before its checksum is known to be right."""
    return value[1] if len(value) > 1 else 0


def encode_reference(key: bytes, body_id: int, expires: int, size: int) -> bytes:
    return seal(key, _REFERENCE.pack(VERSION, REFERENCE, body_id, expires, size))


def decode_reference(key: bytes, value: bytes) -> tuple[int, int, int]:
    """``(body_id, expires, size)``."""
    _, flags, body_id, expires, size = _unpack(_REFERENCE, key, value)
    if flags != REFERENCE:
        raise CorruptRecord(key, "the value is not a reference")
    return body_id, expires, size


def encode_fence(key: bytes) -> bytes:
    return seal(key, _FENCE.pack(VERSION, FENCE))


def decode_fence(key: bytes, value: bytes) -> None:
    if _unpack(_FENCE, key, value)[1] != FENCE:
        raise CorruptRecord(key, "the value is not a fence")


# ---- numbers: delivery counts, references left, sizes in the expiry index, first lsns; position and ids


def encode_number(key: bytes, number: int) -> bytes:
    payload = _NUMBER.pack(VERSION, number)
    return payload + _checksum(crc32(payload, crc32(key)))


def decode_number(key: bytes, value: bytes) -> int:
    return _unpack(_NUMBER, key, value)[1]


def encode_pair(key: bytes, first: int, second: int) -> bytes:
    return seal(key, _PAIR.pack(VERSION, first, second))


def decode_pair(key: bytes, value: bytes) -> tuple[int, int]:
    _, first, second = _unpack(_PAIR, key, value)
    return first, second


# ---- descriptors


def encode_queue(key: bytes, record: QueueRecord) -> bytes:
    name = record.name.encode()
    client_id = record.client_id.encode()
    subscription = record.subscription.encode()
    payload = b"".join(
        (
            _QUEUE_HEAD.pack(
                SELECTIVE_VERSION if record.selector else VERSION,
                KINDS[record.kind],
                record.next_sequence,
                record.count,
                record.size,
                record.head,
                *record.dispatched,
                len(name),
                len(client_id),
                len(subscription),
            ),
            name,
            client_id,
            subscription,
            _pack_texts((record.selector,)) if record.selector else b"",
        )
    )
    return payload + _checksum(crc32(payload, crc32(key)))


def decode_queue(key: bytes, value: bytes) -> QueueRecord:
    selective = value[:1] == bytes((SELECTIVE_VERSION,)) and is_whole(key, value)
    if not selective:
        check(key, value)
    if len(value) < _QUEUE_HEAD.size + CHECKSUM_BYTES:
        raise CorruptRecord(key, "the descriptor is too short")
    fields = _QUEUE_HEAD.unpack_from(value)
    kind = _KIND_NAMES.get(fields[1])
    name_at = _QUEUE_HEAD.size
    client_at = name_at + fields[-3]
    subscription_at = client_at + fields[-2]
    end = selector_end = subscription_at + fields[-1]
    selector = ""
    if selective:
        (selector,), selector_end = _unpack_texts(key, value, end, len(value) - CHECKSUM_BYTES, 1)
    if kind is None or selector_end != len(value) - CHECKSUM_BYTES or selective is not bool(selector):
        raise CorruptRecord(key, "the descriptor's kind or lengths are out of range")
    try:
        return QueueRecord(
            queue_id=_unkey8(key)[1],
            kind=kind,
            name=value[name_at:client_at].decode(),
            client_id=value[client_at:subscription_at].decode(),
            subscription=value[subscription_at:end].decode(),
            next_sequence=fields[2],
            count=fields[3],
            size=fields[4],
            head=fields[5],
            dispatched=tuple(fields[6 : 6 + LEVELS]),
            selector=selector,
        )
    except UnicodeDecodeError:
        raise CorruptRecord(key, "a name is not UTF-8") from None


# ---- producers and peers


def encode_producer(key: bytes, record: ProducerRecord) -> bytes:
    producer_id = record.producer_id.encode()
    ranges = record.ranges
    head = _PRODUCER_HEAD.pack(VERSION, record.floor, record.last_used, len(ranges) // 2, len(producer_id))
    payload = b"".join((head, producer_id, Struct(f">{len(ranges)}Q").pack(*ranges)))
    return payload + _checksum(crc32(payload, crc32(key)))


def decode_producer(key: bytes, value: bytes) -> ProducerRecord:
    check(key, value)
    end = len(value) - CHECKSUM_BYTES
    if end < _PRODUCER_HEAD.size:
        raise CorruptRecord(key, "the producer's record is too short")
    _, floor, last_used, count, id_bytes = _PRODUCER_HEAD.unpack_from(value)
    ranges_at = _PRODUCER_HEAD.size + id_bytes
    if ranges_at + 16 * count != end:
        raise CorruptRecord(key, "the lengths of a producer's record are out of range")
    try:
        producer_id = value[_PRODUCER_HEAD.size : ranges_at].decode()
    except UnicodeDecodeError:
        raise CorruptRecord(key, "the producer's id is not UTF-8") from None
    if producer_key(producer_id) != key:
        raise CorruptRecord(key, "the producer's id is one of another key")
    ranges = Struct(f">{2 * count}Q").unpack_from(value, ranges_at)
    if not _rises(ranges):
        raise CorruptRecord(key, "the ranges of a producer's record do not rise")
    return ProducerRecord(producer_id, ranges, floor, last_used)


def _rises(ranges: tuple[int, ...]) -> bool:
    """Whether each range ends at or behind its start, and well before the next one."""
    return all(first + 1 < second if at % 2 else first <= second for at, (first, second) in enumerate(pairwise(ranges)))


def encode_peer(key: bytes, record: PeerRecord) -> bytes:
    name = record.name.encode()
    parts = [_PEER_HEAD.pack(VERSION, len(name), len(record.demand)), name]
    for pattern, origin, path in record.demand:
        parts += (_U16.pack(len(path)), _pack_texts((pattern, origin, *path)))
    return seal(key, b"".join(parts))


def decode_peer(key: bytes, value: bytes) -> PeerRecord:
    check(key, value)
    end = len(value) - CHECKSUM_BYTES
    if end < _PEER_HEAD.size:
        raise CorruptRecord(key, "the peer's record is too short")
    _, name_bytes, count = _PEER_HEAD.unpack_from(value)
    at = _PEER_HEAD.size + name_bytes
    try:
        name = value[_PEER_HEAD.size : at].decode()
    except UnicodeDecodeError:
        raise CorruptRecord(key, "the peer's name is not UTF-8") from None
    if at > end or peer_key(name) != key:
        raise CorruptRecord(key, "the peer's name is one of another key")
    demand = []
    for _ in range(count):
        if at + _U16.size > end:
            raise CorruptRecord(key, "the peer's record ends within its demand")
        (length,) = _U16.unpack_from(value, at)
        texts, at = _unpack_texts(key, value, at + _U16.size, end, 2 + length)
        demand.append((texts[0], texts[1], texts[2:]))
    if at != end:
        raise CorruptRecord(key, "the peer's record is longer than its demand")
    return PeerRecord(name, tuple(demand))


def _pack_texts(texts: tuple[str, ...]) -> bytes:
    """Each with its length in bytes before it."""
    parts: list[bytes] = []
    for text in texts:
        encoded = text.encode()
        parts += (_U16.pack(len(encoded)), encoded)
    return b"".join(parts)


def _unpack_texts(key: bytes, value: bytes, at: int, end: int, count: int) -> tuple[tuple[str, ...], int]:
    """So many texts from `at` on, and where they end; none of them reaches behind `end`."""
    texts = []
    for _ in range(count):
        start = at + _U16.size
        if start > end:
            raise CorruptRecord(key, "a text is missing")
        at = start + int.from_bytes(value[at:start], "big")
        if at > end:
            raise CorruptRecord(key, "a text is longer than what holds it")
        try:
            texts.append(value[start:at].decode())
        except UnicodeDecodeError:
            raise CorruptRecord(key, "a text is not UTF-8") from None
    return tuple(texts), at


# ---- meta


def encode_meta(store_id: bytes, starts: int) -> bytes:
    """MAGIC comes first, before anything that another format may change."""
    return seal(META_KEY, MAGIC + _META.pack(VERSION, FORMAT, store_id, starts))


def decode_format(value: bytes) -> int | None:
    """The format of the store that a META value belongs to; None when it is not one of pybroker's."""
    if not value.startswith(MAGIC) or len(value) < len(MAGIC) + 5:
        return None
    return int.from_bytes(value[len(MAGIC) + 1 : len(MAGIC) + 5], "big")


def is_damaged_meta(value: bytes) -> bool:
    """Whether a META value is one of ours that went bad: of the right length, with a checksum that no format would have."""
    return len(value) == len(MAGIC) + _META.size + CHECKSUM_BYTES and not is_whole(META_KEY, value)


def decode_meta(value: bytes) -> tuple[bytes, int]:
    """``(store_id, starts)`` of a META value of this FORMAT."""
    if not is_whole(META_KEY, value) or len(value) != len(MAGIC) + _META.size + CHECKSUM_BYTES:
        raise CorruptRecord(META_KEY, "the checksum is wrong")
    _, _, store_id, starts = _META.unpack_from(value, len(MAGIC))
    return store_id, starts
