"""What two brokers say of themselves when they link, and how they prove that they know the network's secret. No state. Pure.

NATIVE.md, "Links". Who dials says LINK_HELLO, who was dialled LINK_WELCOME with its proof, then the dialler LINK_PROOF. A proof is
an HMAC-SHA256 with the shared secret over everything that both sides have said, and the role of who proves: so neither a replay nor
the other side's own proof is one. There is no default secret: without one nothing is proved, and both must agree on that.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgpack

from pybroker.errors import BrokerError, ProtocolError
from pybroker.protocols.link_frames import LINK_VERSIONS, name_of, short_bytes
from pybroker.protocols.native_decoding import array, number, text

URLS_MAX = 16  # of one broker
URL_MAX = 1_024  # characters
HEARTBEAT_MAX = 600.0  # seconds
NONCE_BYTES = 32  # of a nonce that is made here
NONCE_BYTES_MIN = 16  # of one that is accepted
DEPTH_MAX = 8  # of options in each other

_LABEL = "pybroker link 1"
_DIALLER, _ACCEPTOR = "dialler", "acceptor"

# Codes of an ERROR by which a link is refused or ended. On the wire: do not change.
GROUP = "group"  # the peer is in another group
ITSELF = "itself"  # the broker has dialled itself
NAME = "name"  # another broker has the same name
VERSION = "version"  # no version in common
SECRET = "authentication"  # another secret, or none
LINKED = "linked"  # there is a link between these two, and it stays
REPLACED = "replaced"  # there is a newer link between these two
OUTDATED = "outdated"  # the other broker knows a later leader of that set


class LinkRefused(BrokerError):
    """A link is not made, or not kept; `code` is one of those above."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class Introduction(NamedTuple):
    """What a broker says of itself when it links.

    group      brokers link only with those of their own group
    name       in the network; the same for all replicas of a set
    life       a random text of this term of the broker: another one means that it was started again, or that another replica leads
    epoch      of the term; of one set the higher one is later
    nonce      random, for this connection only
    software   for the log
    urls       where others reach it; may be empty
    heartbeat  seconds after which it sends a BEAT when it has nothing else to send
    frame_bytes_max  the longest frame that it takes
    messages_max, bytes_max  what may be on its way to it and not accepted (one message always may)
    """

    group: str
    name: str
    life: str
    epoch: int
    nonce: bytes
    software: str
    urls: tuple[str, ...]
    heartbeat: float
    frame_bytes_max: int
    messages_max: int
    bytes_max: int


def options_of(introduction: Introduction) -> dict[str, Any]:
    """The options of a LINK_HELLO, and but for the proof those of a LINK_WELCOME."""
    return introduction._asdict()


def introduction_of(options: Mapping[str, Any]) -> Introduction:
    """Read the options of a peer; what is not known is passed over. Raises ProtocolError."""
    heartbeat = options.get("heartbeat")
    if heartbeat.__class__ not in (int, float) or not 0 < float(heartbeat or 0) <= HEARTBEAT_MAX:
        raise ProtocolError(f"heartbeat must be a number of seconds, more than 0 and at most {HEARTBEAT_MAX:g}")
    nonce = short_bytes(options.get("nonce"), "nonce")
    if len(nonce) < NONCE_BYTES_MIN:
        raise ProtocolError(f"nonce must be at least {NONCE_BYTES_MIN} bytes")
    urls = array(options.get("urls", ()), "urls")
    if len(urls) > URLS_MAX:
        raise ProtocolError(f"urls must be at most {URLS_MAX}")
    return Introduction(
        text(options.get("group"), "group"),
        name_of(options.get("name"), "name"),
        name_of(options.get("life"), "life"),
        number(options.get("epoch"), "epoch"),
        nonce,
        text(options.get("software", ""), "software"),
        tuple(text(url, "a URL", URL_MAX) for url in urls),
        float(heartbeat or 0),
        number(options.get("frame_bytes_max"), "frame_bytes_max", 1),
        number(options.get("messages_max"), "messages_max", 1),
        number(options.get("bytes_max"), "bytes_max", 1),
    )


def choose_version(offered: Sequence[int]) -> int:
    """The best version that both speak; raises LinkRefused."""
    for version in LINK_VERSIONS:
        if version in offered:
            return version
    ours, theirs = (", ".join(map(str, versions)) for versions in (LINK_VERSIONS, offered))
    raise LinkRefused(
        VERSION, f"versions {theirs} of the link were offered, {ours} are spoken here: update one of the brokers"
    )


def check_peer(own: Introduction, peer: Introduction) -> None:
    """Whether these two may link at all; raises LinkRefused, with a text that both sides can show."""
    if peer.group != own.group:
        raise LinkRefused(
            GROUP,
            f"broker {own.name} is in group {own.group!r}, and {peer.name} in {peer.group!r}: network.group must be the same",
        )
    if peer.name != own.name:
        return
    if peer.life == own.life:
        raise LinkRefused(ITSELF, f"broker {own.name} has dialled itself")
    raise LinkRefused(
        NAME,
        f"two brokers of the network are called {own.name!r}: give each a network.name of its own (only the members of one "
        "replica set share theirs)",
    )


def proof(
    secret: bytes | None,
    dialler: bool,
    versions: Sequence[int],
    hello: Mapping[str, Any],
    version: int,
    welcome: Mapping[str, Any],
) -> bytes:
    """The proof of the dialler, or of the acceptor, over what both have said; empty without a secret.

    `hello` and `welcome` are the options as they were sent, the second without its own proof.
    """
    if secret is None:
        return b""
    said = [_LABEL, _DIALLER if dialler else _ACCEPTOR, versions, hello, version, welcome]
    packed: bytes = msgpack.packb(_in_order(said), use_bin_type=True)
    return hmac.digest(secret, packed, "sha256")


def check_proof(secret: bytes | None, given: bytes, expected: bytes) -> None:
    """Whether a peer's proof is right; raises LinkRefused, with a text that both sides can show."""
    if secret is None:
        if given:
            raise LinkRefused(SECRET, "one broker has a secret and the other has none: network.secret must be the same")
        return
    if not given:
        raise LinkRefused(SECRET, "one broker has a secret and the other has none: network.secret must be the same")
    if not hmac.compare_digest(given, expected):
        raise LinkRefused(SECRET, "the brokers have different secrets: network.secret must be the same")


def _in_order(value: Any, depth: int = 0) -> Any:
    """The same with the keys of all maps in order, and no difference between lists and tuples: what both sides pack alike."""
    if depth > DEPTH_MAX:
        raise ProtocolError(f"options must be nested at most {DEPTH_MAX} deep")
    if isinstance(value, Mapping):
        keys = sorted(value, key=lambda key: (key.__class__ is bytes, key))
        return {key: _in_order(value[key], depth + 1) for key in keys}
    if isinstance(value, list | tuple) and value.__class__ in (list, tuple):
        return [_in_order(each, depth + 1) for each in value]
    return value
