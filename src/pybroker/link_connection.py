"""One link with another broker over a stream: bytes between stream and session, frames between session and core.

Owns the link's outbox, what waits to be taken, its silence and its end; protocol rules are in `pybroker.protocols`, those of
forwarding in `pybroker.core`, which link may stand in `pybroker.broker_network`. One task reads and never waits for room: so what
the peer accepts is heard while this broker is full. One takes what is forwarded, one writes, one looks at the clock.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from itertools import islice
from typing import Any, NamedTuple, Protocol

import trio

from pybroker.cluster.native_urls import SCHEMES
from pybroker.config import BrokerConfig
from pybroker.connections import linger
from pybroker.core.broker import Core
from pybroker.core.consumer import Consumer
from pybroker.core.entry import Entry
from pybroker.core.links import Lane, Link
from pybroker.engine import Engine
from pybroker.errors import BrokerClosed, BrokerError, LimitExceeded, SendInDoubt
from pybroker.message import Message
from pybroker.operations import SEQUENCE_MASK
from pybroker.protocols.link_frames import Accepted, Demand, Forward, Rejected, Row, row_of
from pybroker.protocols.link_handshake import Introduction
from pybroker.protocols.link_session import Established, LinkEvent, LinkSession
from pybroker.protocols.native_frames import Bye, Error

log = logging.getLogger("pybroker.network")

RECEIVE_BYTES = 256 * 1024  # most bytes of one read
WRITE_BYTES = 256 * 1024  # bytes of one write: each has to get on within the time of a silence
FORWARD_BYTES_MAX = 1024 * 1024  # of one FORWARD, but for one message that is larger
FORWARD_MESSAGES_MAX = 1_000
LENGTH_BYTES = 4  # in front of a frame, which are no part of what the peer limits
DEMANDS_MAX = 5_000  # of one DEMAND
LAST_WORDS = 1.0  # seconds for the last frames of a link that ends
TEXT_SHOWN = 500  # characters of a peer's last words
BEATS_OF_SILENCE = 3  # of the peer's own heart-beats: silence is never less

# How a link ended where no ERROR says it.
BYE = "bye"
SILENT = "silent"
BROKEN = "broken"


class LinkOwner(Protocol):
    """Who knows all links of a broker."""

    def admit(self, connection: LinkConnection) -> None:
        """The peer has proved who it is: raise LinkRefused, or end whatever link to it there is, and count this one."""

    def left(self, connection: LinkConnection) -> None:
        """The link is not up any more."""


class _Taken(NamedTuple):
    """A token: what was taken in one turn, as (lane, tag), and its bytes."""

    tags: list[tuple[int, int]]
    size: int


_LAST = object()  # a token: what was taken before the link's end is committed


class LinkConnection:
    """One link, from its first byte to its end.

    address   where it was dialled, or "" for one that was accepted
    peer      who is at the other end, once it is up
    heard     whether the peer has said anything since then
    code, text  how it ended: the code of an ERROR (said or heard), or one of the words above
    elsewhere  addresses that the peer named when it refused: its leader's
    in_doubt  messages that it is not known of any more whether they were forwarded before
    """

    def __init__(
        self,
        owner: LinkOwner,
        config: BrokerConfig,
        engine: Engine,
        stream: trio.abc.Stream,
        session: LinkSession,
        address: str = "",
    ) -> None:
        assert config.network is not None
        self.address = address
        self.dialled = session.dialled
        self.peer: Introduction | None = None
        self.heard = False
        self.code = ""
        self.text = ""
        self.elsewhere: tuple[str, ...] = ()
        self.in_doubt = 0
        self.since = trio.current_time()
        self.touched = False
        self._owner = owner
        self._config = config
        self._engine = engine
        self._stream = stream
        self._session = session
        self._interval = config.network.heartbeat_interval
        self._silence = config.network.heartbeat_timeout
        self._body_max = config.stomp.body_bytes_max
        self._link: Link | None = None
        self._chunks: list[bytes] = []  # frames that can't wait, in order
        self._deliveries: deque[tuple[Lane, Entry]] = deque()  # encoded when they are written
        self._too_large: list[tuple[Lane, int, int]] = []  # lane, tag, bytes: of no use to this peer
        self._accepted: dict[int, list[tuple[int, int]]] = {}  # by lane, not said yet
        self._inbox: deque[Forward] = deque()  # what waits to be taken
        self._pending = 0  # messages of the peer that it has no answer for
        self._pending_bytes = 0
        self._work = trio.Event()
        self._arrived = trio.Event()
        self._reading = trio.CancelScope()
        self._scope = trio.CancelScope()
        self._ended = False  # nothing is read or taken any more
        self._ending = False  # nothing is owed any more
        self._farewell: BrokerError | None = None  # the last frame is an ERROR, or else BYE
        self._closed = trio.Event()
        self._last_received = self.since
        self._last_sent = self.since

    # ---- life

    async def run(self, data: bytes = b"") -> None:
        """Serve the link until it ends; `data` was read of the stream already. Never raises but for cancellation."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    self._reading.deadline = trio.current_time() + self._config.native.connect_timeout
                    with self._reading:
                        await self._read(data, nursery)
                    if self._reading.cancelled_caught and not self._ended:
                        self._abort(
                            SILENT, f"the hand-shake was not over after {self._config.native.connect_timeout:g} s"
                        )
                    self._scope.deadline = trio.current_time() + LAST_WORDS
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            self._abort(BROKEN, "the connection broke")
        except* Exception:
            log.exception("the link with %s failed; what was not accepted is forwarded again", self._who)
            self._abort(BROKEN, "an error in this broker; its log has it")
        finally:
            self._abort(BROKEN, "it was cut here")
            await trio.aclose_forcefully(self._stream)
            self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until `run` is over."""
        await self._closed.wait()

    @property
    def up(self) -> bool:
        return self._link is not None

    @property
    def link(self) -> Link | None:
        """The core's, while it is up."""
        return self._link

    @property
    def _who(self) -> str:
        return self.peer.name if self.peer is not None else self.address or "a broker that has not said who it is"

    def end(self, error: BrokerError | None) -> None:
        """End in good order: what was taken is accepted as soon as it is committed, then the peer is told why (None: BYE)."""
        if self._ended:
            return
        if error is None and self._link is None:
            error = STOPPING  # in the hand-shake there is no BYE
        self._farewell = error
        self._close(BYE if error is None else error.code, "it was ended here" if error is None else str(error))
        if self._engine.error is not None or self.peer is None:
            self._ending = True
            self._work.set()
            return
        self._engine.begin_turn().confirm((self, _LAST))
        self._engine.end_turn()

    def _abort(self, code: str, text: str) -> None:
        """There is nobody to say anything to."""
        if not self._ended:
            self._close(code, text)
        self._scope.cancel()

    def _close(self, code: str, text: str) -> None:
        self._ended = True
        self.code, self.text = code, text
        self._session.stop_reading()
        self._reading.cancel()
        self._arrived.set()
        self._inbox.clear()
        self._deliveries.clear()  # who keeps the link as the last one must not keep its messages
        link, self._link = self._link, None
        if link is not None and self._engine.error is None:
            self._engine.begin_turn().links.down(link)
            self._engine.end_turn()
        if self.peer is not None:
            self._owner.left(self)

    # ---- reading

    async def _read(self, data: bytes | bytearray, nursery: trio.Nursery) -> None:
        session = self._session
        self._say(session.data_to_send())
        while True:
            if data:
                self._last_received = trio.current_time()
                session.receive_data(data)
                try:
                    self._handle_all(nursery)
                except BrokerError as error:
                    self.end(error)
                if self._ended:
                    return
                self._say(session.data_to_send())
            data = await self._stream.receive_some(RECEIVE_BYTES)
            if not data:
                self._abort(BROKEN, "the peer closed the connection")
                return

    def _handle_all(self, nursery: trio.Nursery) -> None:
        """What one read brought, in one turn."""
        session = self._session
        core = self._engine.begin_turn()
        try:
            while not self._ended and (event := session.next_event()) is not None:
                if isinstance(event, Established):
                    self._start(core, event.peer, nursery)
                else:
                    self._handle(core, event)
        finally:
            if self._engine.error is None:
                self._engine.end_turn()

    def _start(self, core: Core, peer: Introduction, nursery: trio.Nursery) -> None:
        self.peer = peer
        self._owner.admit(self)  # before the dialler's proof has gone out: who dialled decides first
        self._reading.deadline = math.inf
        self._silence = max(self._silence, BEATS_OF_SILENCE * peer.heartbeat)
        self.since = trio.current_time()
        nursery.start_soon(self._take)
        nursery.start_soon(self._watch)
        self._link = core.links.up(peer.name, self, peer.messages_max, peer.bytes_max)

    def _handle(self, core: Core, event: LinkEvent) -> None:
        if isinstance(event, Error):
            self._refused(event)
            return
        if isinstance(event, Bye):
            self._abort(BYE, "the peer ended it")
            return
        self.heard = True
        link = self._link
        assert link is not None
        if isinstance(event, Forward):
            self._receive(event)
        elif isinstance(event, Accepted):
            core.links.accepted(link, event.lane, event.ranges)
        elif isinstance(event, Rejected):
            log.warning("%s refuses a message for good: %s", self._who, event.text)
            core.links.rejected(link, event.lane, event.tag, event.code, event.text)
        elif isinstance(event, Demand):
            core.links.hear(link, event.whole, event.adds, event.drops)

    def _refused(self, event: Error) -> None:
        urls = event.details.get("urls", ())
        if isinstance(urls, tuple):
            self.elsewhere = tuple(url for url in urls if isinstance(url, str) and url.partition("://")[0] in SCHEMES)
        said = "".join(each if each.isprintable() else "?" for each in event.text[:TEXT_SHOWN])
        self._abort(event.code, said)

    def _receive(self, frame: Forward) -> None:
        own = self._session.own
        count = len(frame.messages)
        size = sum([message.size for _, message in frame.messages])
        if self._pending + count > own.messages_max or self._pending_bytes + size > own.bytes_max:
            self._check_pending(frame)
        self._pending += count
        self._pending_bytes += size
        self._inbox.append(frame)
        self._arrived.set()

    def _check_pending(self, frame: Forward) -> None:
        """Raises LimitExceeded when more comes than this side takes; one message always may."""
        own = self._session.own
        count, size = self._pending, self._pending_bytes
        for _, message in frame.messages:
            if count and (count >= own.messages_max or size >= own.bytes_max):
                limit, value = (
                    ("network.link_messages_max", own.messages_max)
                    if count >= own.messages_max
                    else ("network.link_bytes_max", own.bytes_max)
                )
                raise LimitExceeded(
                    limit, value, "more is on its way over a link than this broker has said that it takes"
                )
            count += 1
            size += message.size

    # ---- taking what is forwarded

    async def _take(self) -> None:
        engine = self._engine
        limits = self._config.limits
        inbox = self._inbox
        while True:
            while not inbox:
                if self._ended:
                    return
                self._arrived = trio.Event()
                await self._arrived.wait()
            if engine.batch_full:
                await engine.journal.wait_room(limits.batch_bytes_max)
            if self._ended or engine.error is not None:
                return
            full = self._take_some(limits.turn_messages_max)
            while full is not None and not self._ended and engine.error is None:
                await engine.wait_freed()
                if engine.core.full(full, sent=False) is None:
                    break
            await trio.lowlevel.checkpoint()

    def _take_some(self, count_max: int) -> Message | None:
        """One turn; returns the message that there is no room for."""
        engine = self._engine
        core = engine.begin_turn()
        crowded = core.crowded
        inbox = self._inbox
        tags: list[tuple[int, int]] = []
        size = 0
        full = None
        try:
            while inbox and count_max > 0 and full is None:
                frame = inbox.popleft()
                messages = frame.messages[:count_max]
                done = 0 if crowded else self._take_run(core, frame, messages)
                tags += [(frame.lane, tag) for tag in range(frame.first_tag, frame.first_tag + done)]
                size += sum([message.size for _, message in messages[:done]])
                for sequence, message in messages[done:]:
                    if crowded and core.full(message, sent=False) is not None:
                        full = message
                        break
                    tag = frame.first_tag + done
                    if self._take_one(core, frame, tag, sequence, message):
                        tags.append((frame.lane, tag))
                        size += message.size
                    done += 1
                count_max -= done
                if done < len(frame.messages) and not self._ended:
                    rest = frame.messages[done:]
                    inbox.appendleft(frame._replace(first_tag=frame.first_tag + done, messages=rest))
            if tags:
                core.confirm((self, _Taken(tags, size)))
        finally:
            engine.end_turn()
        return full

    def _take_run(self, core: Core, frame: Forward, messages: list[tuple[int, Message]]) -> int:
        """Take those from the front that need no closer look; how many they are."""
        assert self._link is not None
        if max([message.size for _, message in messages]) > self._body_max:
            return 0
        return core.links.receive_run(self._link, frame.namespace, messages)

    def _take_one(self, core: Core, frame: Forward, tag: int, sequence: int, message: Message) -> bool:
        """Whether it is to be accepted once this turn is committed."""
        link = self._link
        assert link is not None
        try:
            if len(message.body) > self._body_max:
                what = f"a body has {len(message.body)} bytes"
                raise LimitExceeded("stomp.body_bytes_max", self._body_max, what)
            core.links.receive(link, frame.namespace, sequence, message)
        except SendInDoubt as error:
            if not self.in_doubt:
                log.error("the link with %s: %s; it stays there, unanswered (told once a link)", self._who, error)
            self.in_doubt += 1
            return False
        except BrokerError as error:
            log.warning(
                "a message that %s forwards can't be taken, it will be a dead letter there: %s", self._who, error
            )
            self._answered(1, message.size)
            self._say(self._session.rejected(frame.lane, tag, error.code, str(error)))
            return False
        return True

    def _answered(self, count: int, size: int) -> None:
        self._pending -= count
        self._pending_bytes -= size

    # ---- writing

    def _say(self, data: bytes) -> None:
        if data:
            self._chunks.append(data)
            self._work.set()

    async def _write(self) -> None:
        while True:
            self._work = trio.Event()
            if data := self._next_data():
                await self._send(data)
            elif self._ending:
                break
            else:
                await self._work.wait()
        error = self._farewell
        await self._send(self._session.bye() if error is None else self._session.error(error))
        await linger(self._stream)
        self._scope.cancel()

    async def _send(self, data: bytes) -> None:
        view = memoryview(data)
        for start in range(0, len(data), WRITE_BYTES):
            with trio.move_on_after(self._silence) as deadline:
                await self._stream.send_all(view[start : start + WRITE_BYTES])
            if deadline.cancelled_caught:
                self._abort(SILENT, f"the peer took nothing for {self._silence:g} s")
            self._last_sent = trio.current_time()

    def _next_data(self) -> bytes:
        """What is to be written now: first what can't wait, then news of demand, then a bounded part of what is forwarded."""
        frames, self._chunks = self._chunks, []
        accepted, self._accepted = self._accepted, {}
        frames += [self._session.accepted(lane, ranges) for lane, ranges in accepted.items()]
        if self._link is not None and self._engine.error is None:
            frames += self._news(self._link)
            if self._deliveries:
                frames.append(self._next_forward())
            if self._too_large:
                self._reject_too_large(self._link)
        return b"".join(frames)

    def _news(self, link: Link) -> list[bytes]:
        links = self._engine.core.links
        news = links.news(link) if link in links.changed else None
        if news is None:
            return []
        whole, adds, drops = news
        frames = []
        for start in range(0, max(len(adds), len(drops), 1), DEMANDS_MAX):
            end = start + DEMANDS_MAX
            frames.append(self._session.demand(whole and not start, adds[start:end], drops[start:end]))
        return frames

    def _next_forward(self) -> bytes:
        """One FORWARD: deliveries of one lane whose tags follow each other."""
        deliveries = self._deliveries
        assert self.peer is not None
        lane, entry = deliveries[0]
        first = tag = entry.tag
        rows: list[Row] = []
        size = 0
        for other, entry in islice(deliveries, FORWARD_MESSAGES_MAX):
            size += entry.message.size
            if other is not lane or entry.tag != tag or (size > FORWARD_BYTES_MAX and rows):
                break
            rows.append(row_of(entry.order & SEQUENCE_MASK, entry.message))
            tag += 1
        data = self._session.forward(lane.number, lane.namespace, first, rows)
        while (
            len(data) - LENGTH_BYTES > self.peer.frame_bytes_max
        ):  # it takes small ones only, or much of it is no body
            if len(rows) == 1:
                self._too_large.append((lane, first, len(data)))
                data = b""
                break
            del rows[len(rows) // 2 :]
            data = self._session.forward(lane.number, lane.namespace, first, rows)
        for _ in rows:
            deliveries.popleft()
        if deliveries:
            self._work.set()
        return data

    def _reject_too_large(self, link: Link) -> None:
        assert self.peer is not None
        found, self._too_large = self._too_large, []
        core = self._engine.begin_turn()
        for lane, tag, size in found:
            limit = self.peer.frame_bytes_max
            error = LimitExceeded(
                "native.frame_bytes_max", limit, f"there, and as a frame the message has {size} bytes"
            )
            core.links.rejected(link, lane.number, tag, error.code, str(error))
        self._engine.end_turn()
        self._work.set()

    # ---- the engine's side

    def deliver(self, consumer: Consumer, entry: Entry) -> None:
        """Engine: a message for the peer, which is durable here as far as it has to be."""
        if not self._ended:
            self._deliveries.append((consumer.context, entry))

    def confirm(self, token: Any) -> None:
        """Engine: what was taken with this token is committed."""
        if token is _LAST:
            self._ending = True
            return
        for lane, tag in token.tags:
            ranges = self._accepted.setdefault(lane, [])
            if ranges and ranges[-1][1] == tag - 1:
                ranges[-1] = ranges[-1][0], tag
            else:
                ranges.append((tag, tag))
        self._answered(len(token.tags), token.size)

    def flush(self) -> None:
        """Engine: the turn is over."""
        self._work.set()

    def fail(self, error: BrokerError) -> None:
        """Engine: the journal failed, or this replica leads no more."""
        self.end(error)

    def fail_consumer(self, consumer: Consumer, error: BrokerError) -> None:
        """Engine: a lane of a link is never ended by itself."""
        self.end(error)

    # ---- silence

    async def _watch(self) -> None:
        """Say that this side is there when nothing else was said for long; end a link whose peer has gone silent."""
        while True:
            await trio.sleep_until(min(self._last_sent + self._interval, self._last_received + self._silence))
            now = trio.current_time()
            if self._ended:
                return
            if now >= self._last_received + self._silence:
                self._abort(SILENT, f"nothing was heard of it for {self._silence:g} s")
                return
            if now >= self._last_sent + self._interval:
                self._last_sent = now
                if not self._chunks:
                    self._say(self._session.beat())


STOPPING = BrokerClosed("this broker is stopping, or does not lead its set any more: link again in a moment")
