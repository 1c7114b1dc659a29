"""One link between two brokers, sans-IO: bytes in, checked frames out. Owns the order of frames; knows no rule of forwarding.

NATIVE.md, "Links". Both ends are this class: who dialled and who was dialled differ only until the link is up. Which frame may
come when is in one table. Pure: nonces are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pybroker.errors import BrokerError, ProtocolError
from pybroker.protocols import link_frames, native_frames
from pybroker.protocols.link_frames import (
    LINK_VERSIONS,
    Accepted,
    Demand,
    Forward,
    LinkFrame,
    LinkHello,
    LinkProof,
    LinkWelcome,
    Rejected,
    decode_link_frame,
    short_bytes,
)
from pybroker.protocols.link_handshake import (
    Introduction,
    check_peer,
    check_proof,
    choose_version,
    introduction_of,
    options_of,
    proof,
)
from pybroker.protocols.native_decoding import FrameCutter, HeaderBlocks
from pybroker.protocols.native_frames import Beat, Bye, Error
from pybroker.protocols.native_session import error_frame

WAIT_HELLO = "waits for LINK_HELLO"
WAIT_WELCOME = "waits for LINK_WELCOME"
WAIT_PROOF = "waits for LINK_PROOF"
UP = "up"
CLOSED = "closed"

_MAY_COME: Mapping[str, tuple[type, ...]] = {
    WAIT_HELLO: (LinkHello, Error),
    WAIT_WELCOME: (LinkWelcome, Error),
    WAIT_PROOF: (LinkProof, Error),
    UP: (Demand, Forward, Accepted, Rejected, Beat, Bye, Error),
    CLOSED: (),
}

LANES_MAX = 10_000  # lanes of one link


class Established(NamedTuple):
    """Event: both sides have proved what they have to; the link is up."""

    peer: Introduction


LinkEvent = Established | Demand | Forward | Accepted | Rejected | Beat | Bye | Error


class LinkSession:
    """One end of a link.

    ::

        session = LinkSession(own, secret, dialled=True, ...)
        send(session.data_to_send())
        session.receive_data(data)
        while (event := session.next_event()) is not None:
            ...
            send(session.data_to_send())

    `next_event` raises ProtocolError and LinkRefused for what the peer did wrong: the answer is `error`, then close. After an
    `Error`, a `Bye` or `stop_reading` nothing is read any more. The other methods return frames, or raise RuntimeError where none
    may be sent.
    """

    def __init__(
        self,
        own: Introduction,
        secret: bytes | None,
        *,
        dialled: bool,
        handshake_bytes_max: int,
        versions: Sequence[int] = LINK_VERSIONS,
    ) -> None:
        self.own = own
        self.dialled = dialled
        self.peer: Introduction | None = None  # as far as it has said who it is; proved once the link is up
        self.version = 0
        self._secret = secret
        self._versions = tuple(versions)
        self._state = WAIT_WELCOME if dialled else WAIT_HELLO
        self._may_send = False  # the link is up, and the last frame was not said
        self._cutter = FrameCutter(handshake_bytes_max, "native.handshake_bytes_max")
        self._blocks = HeaderBlocks()
        self._lanes: dict[int, tuple[str, int]] = {}  # of what the peer forwards: namespace and last tag
        self._said: dict[str, Any] = options_of(own)
        self._heard: Mapping[str, Any] = {}
        self._output = [link_frames.encode_link_hello(self._said, self._versions)] if dialled else []

    @property
    def state(self) -> str:
        return self._state

    # ---- input

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take bytes from the peer; they are dropped once the session is closed."""
        if self._state is not CLOSED:
            self._cutter.feed(data)

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet turned into events."""
        return self._cutter.left

    def next_event(self) -> LinkEvent | None:
        """The next event; None when more data is needed. Raises ProtocolError, LinkRefused."""
        while self._state is not CLOSED:
            fields = self._cutter.next()
            if fields is None:
                return None
            event = self._take(decode_link_frame(fields, self._blocks))
            if event is not None:
                return event
        return None

    def _take(self, frame: LinkFrame) -> LinkEvent | None:
        if not isinstance(frame, _MAY_COME[self._state]):
            raise ProtocolError(
                f"a frame {frame.__class__.__name__} can't come now: this end of the link {self._state}"
            )
        if isinstance(frame, LinkHello):
            self._answer(frame)
            return None
        if isinstance(frame, LinkWelcome):
            return self._welcomed(frame)
        if isinstance(frame, LinkProof):
            check_proof(self._secret, frame.proof, self._proof(of_dialler=True))
            return self._established()
        if isinstance(frame, Error | Bye):
            self._state = CLOSED
        elif isinstance(frame, Forward):
            self._check_forward(frame)
        return frame

    def _answer(self, hello: LinkHello) -> None:
        self.peer = introduction_of(hello.options)
        self.version = choose_version(hello.versions)
        check_peer(self.own, self.peer)
        self._versions = hello.versions
        self._heard = hello.options
        own_proof = self._proof(of_dialler=False)
        self._output.append(link_frames.encode_link_welcome(self.version, {**self._said, "proof": own_proof}))
        self._state = WAIT_PROOF

    def _welcomed(self, welcome: LinkWelcome) -> Established:
        self.peer = introduction_of(welcome.options)
        if welcome.version not in self._versions:
            raise ProtocolError(f"version {welcome.version} of the link was chosen and not offered")
        check_peer(self.own, self.peer)
        self.version = welcome.version
        self._heard = {key: value for key, value in welcome.options.items() if key != "proof"}
        given = short_bytes(welcome.options.get("proof", b""), "a proof")
        check_proof(self._secret, given, self._proof(of_dialler=False))
        self._output.append(link_frames.encode_link_proof(self._proof(of_dialler=True)))
        return self._established()

    def _established(self) -> Established:
        assert self.peer is not None
        self._state = UP
        self._may_send = True
        self._cutter.bytes_max = self.own.frame_bytes_max
        self._cutter.limit = "native.frame_bytes_max"
        self._said, self._heard = {}, {}
        return Established(self.peer)

    def _proof(self, *, of_dialler: bool) -> bytes:
        hello, welcome = (self._said, self._heard) if self.dialled else (self._heard, self._said)
        return proof(self._secret, of_dialler, self._versions, hello, self.version, welcome)

    def _check_forward(self, frame: Forward) -> None:
        assert self.peer is not None
        known = self._lanes.get(frame.lane)
        if known is None:
            if len(self._lanes) >= LANES_MAX:
                raise ProtocolError(f"a link has at most {LANES_MAX} lanes")
        elif known[0] != frame.namespace:
            raise ProtocolError(f"lane {frame.lane} is {known[0]!r} on this link, not {frame.namespace!r}")
        elif frame.first_tag <= known[1]:
            raise ProtocolError(f"tags of lane {frame.lane} must rise: {known[1]} was there")
        self._lanes[frame.lane] = frame.namespace, frame.first_tag + len(frame.messages) - 1
        name = self.peer.name
        for _, message in frame.messages:
            assert message.route is not None
            if message.route.passed[-1] != name:
                raise ProtocolError(f"the last broker that a message has passed must be its sender, {name}")

    # ---- output

    def data_to_send(self) -> bytes:
        """What the hand-shake has to say; empties the output."""
        data = b"".join(self._output)
        self._output.clear()
        return data

    def demand(self, whole: bool, adds: Sequence[link_frames.Added], drops: Sequence[link_frames.Dropped]) -> bytes:
        self._check_up()
        return link_frames.encode_demand(whole, adds, drops)

    def forward(self, lane: int, namespace: str, first_tag: int, rows: Sequence[link_frames.Row]) -> bytes:
        """`rows` are messages from `link_frames.row_of`."""
        self._check_up()
        return link_frames.encode_forward(lane, namespace, first_tag, rows)

    def accepted(self, lane: int, ranges: native_frames.Ranges) -> bytes:
        self._check_up()
        return link_frames.encode_accepted(lane, ranges)

    def rejected(self, lane: int, tag: int, code: str, text: str) -> bytes:
        self._check_up()
        return link_frames.encode_rejected(lane, tag, code, text)

    def beat(self) -> bytes:
        self._check_up()
        return native_frames.encode_beat()

    def bye(self) -> bytes:
        """The last frame of a link that ends in good order. Nothing more is read."""
        self._check_up()
        self._end()
        return native_frames.encode_bye()

    def error(self, error: BrokerError) -> bytes:
        """The last frame, whatever the state: why this end closes the link. Nothing more is read."""
        self._end()
        return error_frame(error)

    def stop_reading(self) -> None:
        """Nothing that the peer says counts any more; what is owed may still be said, then `bye` or `error`."""
        self._state = CLOSED

    def _end(self) -> None:
        self._state = CLOSED
        self._may_send = False
        self._output.clear()

    def _check_up(self) -> None:
        if not self._may_send:
            raise RuntimeError(f"this end of the link is {self._state}: nothing of a link that is up can be sent")
