"""One announcement as a datagram, and what is taken of those that come: signed, for our group, and never twice. Pure.

DESIGN.md section 6. A datagram is the msgpack array ``[version, group, body, signature]``, at most 1,400 bytes, so that it fits one
packet. `body` is the msgpack array ``[name, node, epoch, URLs, boot, counter, kind]``. `signature` is the HMAC-SHA256, with the
group's secret, of a label, the version, the group and the body; it is empty where the group has no secret. Whoever has a secret
takes only signed ones, whoever has none only unsigned ones: so a mistake in a configuration shows at once, on both sides.
Until the signature is checked only the version and the group are read. A datagram that is not encoded as we do it is malformed.

There is no wall clock in it. `boot` is random for each start, `counter` rises with each datagram of a boot, and one that does not
rise is dropped as a replay. What is left to someone who has no secret, but records signed datagrams and sends them again later:

* Each one works once at most for a listener that has not heard it: `Gate` knows the last counter of each boot that it heard.
* A recorded "here" of an earlier boot, heard by a listener that was away at the time, shows an old address. It only
  suggests where to dial: whom one meets there is proved by the link's own hand-shake.
* It can't hide the live broker behind it for longer than the time until that one's next announcement: the live boot's counters
  go on rising, so what it says is always taken, whichever boots were heard in between. For this reason *no boot is ever
  refused for good because a later-heard one superseded it*: without a clock nobody can say which of two random boots is the
  older one, and a rule that does would let one recorded datagram lock out the live broker. What a boot said that has been
  superseded is refused in as far as it was heard.
* A recorded "gone" takes away only a peer of that very boot (or of an older epoch): `pybroker.cluster.peers`. So it needs a
  recorded "here" of its boot before it, and the live broker is back with its next announcement.
* Of a set, only the datagrams of the newest epoch heard within the expiry time count: a deposed leader's are worth nothing.
* A recorder who can also keep the live broker's datagrams from us needs no records to hide it; links that stand stay.

The memory of counters is bounded; what was not heard for longest is forgotten first. Only boots whose signatures are right take
room in it. Without a secret anybody can announce anything: that is what no secret means.
"""

from __future__ import annotations

import hmac
from collections import OrderedDict
from collections.abc import Set as AbstractSet
from enum import StrEnum
from typing import Any, NamedTuple

import msgpack

from pybroker.cluster.discovery import is_name
from pybroker.cluster.native_urls import ADDRESSES_MAX, parse_native_url
from pybroker.errors import ConfigurationError

VERSION = 1
DATAGRAM_BYTES_MAX = 1_400
BOOT_BYTES = 16
SIGNATURE_BYTES = 32
NUMBER_MAX = 2**63 - 1
BOOTS_MAX = 16_384  # boots whose counters are remembered

HERE, GONE = "here", "gone"

TOO_LONG = (
    f"the announcement would have {{}} bytes, and {DATAGRAM_BYTES_MAX} fit: give shorter names, or fewer or shorter addresses "
    "in network.advertise"
)

_LABEL = b"pybroker announcement"


class Reason(StrEnum):
    """Why a datagram was dropped."""

    OVERSIZED = "oversized"  # longer than any announcement
    MALFORMED = "malformed"  # not an announcement
    VERSION = "version"  # of another version of this format
    GROUP = "group"  # of another group on the same address
    UNSIGNED = "unsigned"  # and we have a secret
    SIGNED = "signed"  # and we have no secret to check it with
    FORGED = "forged"  # its signature is wrong: changed, or made with another secret
    OWN = "own"  # our own, which we hear as others in this host do; or of another leadership of our set
    REPLAYED = "replayed"  # heard before
    EPOCH = "epoch"  # of a leader before the one that is known
    NAME = "name"  # another broker has this name, and is there
    FULL = "full"  # the table has no room


class Announcement(NamedTuple):
    """What a broker says of itself.

    name    of the broker in the network, or of its set
    node    of the broker itself
    epoch   of the leadership; a broker on its own says the same number always
    urls    where it is reached, ``pybroker[+ssl]://HOST:PORT``, 1 to 16 (none are needed when it is gone)
    boot    16 random bytes, new at each start
    counter rises with each datagram of a boot
    kind    ``"here"`` or ``"gone"``
    """

    name: str
    node: str
    epoch: int
    urls: tuple[str, ...]
    boot: bytes
    counter: int
    kind: str = HERE


def encode(announcement: Announcement, group: str, secret: bytes | None) -> bytes:
    """The datagram. Raises `ConfigurationError` when it would be none that others take, or too long for one packet."""
    if not is_name(group) or not _is_whole(announcement):
        raise ConfigurationError(f"{announcement!r} of group {group[:80]!r} can't be announced")
    body = msgpack.packb(announcement)
    datagram = _outer(group, body, b"" if secret is None else _signature(secret, group, body))
    if len(datagram) > DATAGRAM_BYTES_MAX:
        raise ConfigurationError(TOO_LONG.format(len(datagram)))
    return datagram


def longest(name: str, node: str, urls: tuple[str, ...], group: str) -> int:
    """How many bytes the announcements of a broker may have, signed and in a long life."""
    body = msgpack.packb(Announcement(name, node, NUMBER_MAX, urls, bytes(BOOT_BYTES), NUMBER_MAX))
    return len(_outer(group, body, bytes(SIGNATURE_BYTES)))


def decode(datagram: bytes, group: str, secret: bytes | None) -> Announcement | Reason:
    """What a datagram says, or why it is to be dropped. Never raises, whatever the bytes are."""
    if len(datagram) > DATAGRAM_BYTES_MAX:
        return Reason.OVERSIZED
    outer = _unpacked(datagram)
    if type(outer) is not tuple or not outer or type(outer[0]) is not int:
        return Reason.MALFORMED
    if outer[0] != VERSION:
        return Reason.VERSION
    if len(outer) != 4 or type(outer[1]) is not str or type(outer[2]) is not bytes or type(outer[3]) is not bytes:
        return Reason.MALFORMED
    _, said_group, body, signature = outer
    if len(signature) not in (0, SIGNATURE_BYTES) or _outer(said_group, body, signature) != datagram:
        return Reason.MALFORMED
    if said_group != group:
        return Reason.GROUP
    if secret is None and signature:
        return Reason.SIGNED
    if secret is not None:
        if not signature:
            return Reason.UNSIGNED
        if not hmac.compare_digest(signature, _signature(secret, group, body)):
            return Reason.FORGED
    fields = _unpacked(body)
    if type(fields) is not tuple or len(fields) != len(Announcement._fields):
        return Reason.MALFORMED
    announcement = Announcement(*fields)
    return announcement if _is_whole(announcement) else Reason.MALFORMED


class Gate:
    """Takes datagrams of one group, each announcement once.

    own  the boots of this process's own announcements, which are dropped; who makes more adds them to the set
    """

    def __init__(
        self,
        group: str,
        secret: bytes | None,
        own: AbstractSet[bytes] = frozenset(),
        boots_max: int = BOOTS_MAX,
    ) -> None:
        self._group = group
        self._secret = secret
        self._own = own
        self._boots_max = boots_max
        self._counters: OrderedDict[tuple[str, str, bytes], int] = OrderedDict()

    def admit(self, datagram: bytes) -> Announcement | Reason:
        """What the datagram says, the first time; else why it was dropped."""
        found = decode(datagram, self._group, self._secret)
        return found if isinstance(found, Reason) else self._fresh(found)

    def _fresh(self, announcement: Announcement) -> Announcement | Reason:
        if announcement.boot in self._own:
            return Reason.OWN
        key = (announcement.name, announcement.node, announcement.boot)
        if announcement.counter <= self._counters.get(key, -1):
            return Reason.REPLAYED
        self._counters[key] = announcement.counter
        self._counters.move_to_end(key)
        if len(self._counters) > self._boots_max:
            self._counters.popitem(last=False)
        return announcement


def _is_whole(announcement: Announcement) -> bool:
    """Whether each field has its type and is within its limits."""
    name, node, epoch, urls, boot, counter, kind = announcement
    return (
        type(name) is str
        and is_name(name)
        and type(node) is str
        and is_name(node)
        and type(epoch) is int
        and 0 <= epoch <= NUMBER_MAX
        and type(boot) is bytes
        and len(boot) == BOOT_BYTES
        and type(counter) is int
        and 0 <= counter <= NUMBER_MAX
        and type(kind) is str
        and kind in (HERE, GONE)
        and type(urls) is tuple
        and (kind == GONE or bool(urls))
        and len(urls) <= ADDRESSES_MAX
        and all(type(url) is str and _is_native(url) for url in urls)
    )


def _is_native(url: str) -> bool:
    try:
        parse_native_url(url)
    except ConfigurationError:
        return False
    return True


def _outer(group: str, body: bytes, signature: bytes) -> bytes:
    packed: bytes = msgpack.packb((VERSION, group, body, signature))
    return packed


def _signature(secret: bytes, group: str, body: bytes) -> bytes:
    return hmac.digest(secret, msgpack.packb((_LABEL, VERSION, group, body)), "sha256")


def _unpacked(data: bytes) -> Any:
    """The value that the bytes are; None when they are none. Lengths in it can't be larger than what is there."""
    try:
        return msgpack.unpackb(data, raw=False, use_list=False, strict_map_key=True)
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
