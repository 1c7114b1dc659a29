"""ZooKeeper in memory, on trio's clock, with all its faults in a test's hands. Owns nodes, sessions and the way to them.

DESIGN.md section 5: the other version of `Coordinator`, held to the same conformance suite as the real one. Deterministic: what
is random comes from the caller's functions, and what falls on one moment happens in the order in which it was asked for.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

import trio

from pybroker.cluster.coordinator import (
    CoordinatorLost,
    CreateNode,
    DeleteNode,
    Node,
    Outcome,
    SetNode,
    Write,
)

NOTICE_SHARE = 2 / 3  # of the session timeout: after so long a silence a client gives its connection up, as kazoo does
HISTORY_MAX = 1000  # states that reads without sync may still see

Nodes = Mapping[str, Node]
_Answer = Callable[[Outcome | Mapping[str, Node]], None]


class Fate(NamedTuple):
    """What becomes of one request. Seconds until it arrives, and from then until its answer is back; None: never.

    The caller of an unanswered transaction gets UNKNOWN when it gives up (the connection is dropped then), and a late one is
    written all the same when it arrives.
    """

    arrives: float | None = 0.0
    answered: float | None = 0.0


class Snapshot(NamedTuple):
    """The service's state at some moment, to `rewind` to."""

    nodes: Nodes
    sessions: frozenset[int]


class MemoryZooKeeper:
    """One simulated service. `run` it in a nursery; `connect` makes clients.

    session_timeout  seconds without its client until a session ends
    request_timeout  seconds until a client gives an unanswered request up, and connects anew; default: session_timeout
    delay            seconds that a request, an answer, a notification or a new connection takes
    fate             of each request, by the client's name and its writes (none: a read); None there: `delay` each way
    spread           seconds between the moments at which a read sees one node and the next
    age              how old, in seconds, is what a read sees that does not sync (see `MemoryCoordinator.syncs`)
    fences_sessions  as in ZooKeeper: what arrives from a session that has ended is refused. Off: only new ephemeral nodes are

    All of them may be set at any time.
    """

    def __init__(
        self,
        *,
        session_timeout: float = 10.0,
        request_timeout: float | None = None,
        delay: Callable[[], float] = lambda: 0.0,
        fate: Callable[[str, Sequence[Write]], Fate | None] | None = None,
        spread: Callable[[], float] = lambda: 0.0,
        age: Callable[[], float] = lambda: 0.0,
        fences_sessions: bool = True,
    ) -> None:
        self.session_timeout = session_timeout
        self.request_timeout = session_timeout if request_timeout is None else request_timeout
        self.delay = delay
        self.fate = fate
        self.spread = spread
        self.age = age
        self.fences_sessions = fences_sessions
        self.applied = 0  # transactions that were done
        self._nodes: Nodes = MappingProxyType({})
        self._history: deque[tuple[float, Nodes]] = deque(maxlen=HISTORY_MAX)
        self._sessions: dict[int, int] = {}  # id to the number of its running timer
        self._last_session = 0
        self._last_timer = 0
        self._is_up = True
        self._clients: list[MemoryCoordinator] = []
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._last_entry = 0
        self._poked = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry requests and end sessions in their time, until cancelled."""
        task_status.started()
        while True:
            while self._agenda and self._agenda[0][0] <= trio.current_time():
                heapq.heappop(self._agenda)[2]()
            self._poked = trio.Event()
            with trio.move_on_at(self._agenda[0][0] if self._agenda else float("inf")):
                await self._poked.wait()

    # -- in the test's hands

    @property
    def nodes(self) -> Nodes:
        """What is stored now."""
        return self._nodes

    @property
    def sessions(self) -> frozenset[int]:
        """The sessions that have not ended."""
        return frozenset(self._sessions)

    def connect(self, name: str) -> MemoryCoordinator:
        """A new client, which begins to connect. Its name is for `fate` only."""
        client = MemoryCoordinator(self, name)
        self._clients.append(client)
        self._later(self.delay(), client._connect)
        return client

    def cut(
        self, client: MemoryCoordinator, *, requests: bool = True, answers: bool = True, noticed: bool = True
    ) -> None:
        """Cut a client off: its requests, or what comes back, or both. What has been sent still arrives.

        One that notices knows it at once (its connection is reset); another one believes itself connected until its patience
        ends, or until it is healed. Either way no sync can be had, so that its reads end with CoordinatorLost.
        """
        client._sends = client._sends and not requests
        client._hears = client._hears and not answers
        if requests:
            self._miss(client.session)
        if noticed:
            client._lose()
            return
        connection = client._connection

        def notice() -> None:
            if not client._is_reachable:
                client._notice(connection)

        self._later(self.session_timeout * NOTICE_SHARE, notice)

    def heal(self, client: MemoryCoordinator) -> None:
        """Undo `cut`. A client that never noticed goes on, if its session does."""
        client._sends = client._hears = True
        if client.connected and client.session in self._sessions:
            self._stop_timer(client.session)
            if client._is_notice_late:
                self._later(self.delay(), partial(client._hear_watch, client._connection))
            return
        client._lose()
        self._later(self.delay(), client._connect)

    def expire(self, client: MemoryCoordinator) -> None:
        """End a client's session now."""
        self._end_session(client.session)

    def kill(self, client: MemoryCoordinator) -> None:
        """The client's process is gone: it says nothing more, and its session ends in its time. What it sent still arrives."""
        if not client._is_closed:
            client._close()
            self._clients.remove(client)

    def down(self) -> None:
        """The whole service is gone. Sessions do not end meanwhile; what arrives now is lost."""
        self._is_up = False
        for client in self._clients:
            client._lose()

    def up(self) -> None:
        """The service is back, with its data and sessions."""
        self._is_up = True
        for session in self._sessions:
            self._start_timer(session)
        for client in self._clients:
            self._later(self.delay(), client._connect)

    def snapshot(self) -> Snapshot:
        return Snapshot(self._nodes, self.sessions)

    def rewind(self, to: Snapshot) -> None:
        """The service's data are those of an earlier moment; its sessions of then end in their time if nobody has them."""
        for client in self._clients:
            client._lose()
        self._sessions = dict.fromkeys(sorted(to.sessions), 0)
        for session in self._sessions:
            self._start_timer(session)
        self._store(to.nodes)
        for client in self._clients:
            self._later(self.delay(), client._connect)

    def wipe(self) -> None:
        """The service has lost all data, and knows no session."""
        self.rewind(Snapshot(MappingProxyType({}), frozenset()))

    # -- what the clients ask

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        self._last_entry += 1
        heapq.heappush(self._agenda, (trio.current_time() + seconds, self._last_entry, action))
        self._poked.set()

    def _fate(self, client: MemoryCoordinator, writes: Sequence[Write]) -> Fate:
        fate = self.fate(client.name, writes) if self.fate is not None else None
        return Fate(self.delay(), self.delay()) if fate is None else fate

    def _apply(self, session: int, writes: Sequence[Write]) -> bool:
        """Do all the writes or none, now."""
        if session not in self._sessions and (self.fences_sessions or any(map(_is_ephemeral, writes))):
            return False
        nodes = dict(self._nodes)
        for write in writes:
            node = nodes.get(write.path)
            if isinstance(write, CreateNode):
                if node is not None:
                    return False
                nodes[write.path] = Node(write.data, 0, session if write.ephemeral else 0)
                continue
            if node is None or node.version != write.version:
                return False
            match write:
                case SetNode():
                    nodes[write.path] = Node(write.data, node.version + 1, node.owner)
                case DeleteNode():
                    del nodes[write.path]
        self.applied += 1
        self._store(nodes)
        return True

    def _store(self, nodes: Nodes) -> None:
        is_changed = nodes.keys() != self._nodes.keys() or any(self._nodes[path] is not nodes[path] for path in nodes)
        self._history.append((trio.current_time(), self._nodes))
        self._nodes = MappingProxyType(dict(nodes))
        if is_changed:
            for client in self._clients:
                client._watched()

    def _seen(self, age: float) -> Nodes:
        """The nodes as they were so long ago."""
        moment = trio.current_time() - age
        for until, nodes in self._history:
            if until > moment:
                return nodes
        return self._nodes

    def _new_session(self) -> int:
        self._last_session += 1
        self._sessions[self._last_session] = 0
        return self._last_session

    def _end_session(self, session: int) -> None:
        if self._sessions.pop(session, None) is None:
            return
        self._store({path: node for path, node in self._nodes.items() if node.owner != session})
        for client in self._clients:
            if client.session == session and client._is_reachable:
                client._lose()
                self._later(self.delay(), client._connect)

    def _start_timer(self, session: int) -> None:
        if session in self._sessions:
            self._last_timer += 1
            self._sessions[session] = self._last_timer
            self._later(self.session_timeout, partial(self._timer_over, session, self._last_timer))

    def _miss(self, session: int) -> None:
        """Nothing is heard from a session's client from now on."""
        if self._sessions.get(session) == 0:
            self._start_timer(session)

    def _stop_timer(self, session: int) -> None:
        if session in self._sessions:
            self._sessions[session] = 0

    def _timer_over(self, session: int, timer: int) -> None:
        if self._is_up and self._sessions.get(session) == timer:
            self._end_session(session)


class _Request:
    """A request under way, and its answer: None when the connection went first."""

    __slots__ = ("answer", "done")

    def __init__(self) -> None:
        self.done = trio.Event()
        self.answer: Outcome | Nodes | None = None

    def settle(self, answer: Outcome | Nodes | None) -> None:
        if not self.done.is_set():
            self.answer = answer
            self.done.set()


class MemoryCoordinator:
    """`Coordinator` over a `MemoryZooKeeper`; made by its `connect`.

    syncs  whether reads sync first, as they must. Off, they see the service as it was `age` seconds ago: a fault to plant.
    """

    def __init__(self, service: MemoryZooKeeper, name: str) -> None:
        self.name = name
        self.syncs = True
        self._service = service
        self._session = 0
        self._is_connected = False
        self._is_closed = False
        self._sends = True  # requests get through
        self._hears = True  # answers and notifications get through
        self._connection = 0  # counts connections: what belongs to an earlier one is not heard
        self._requests: dict[_Request, None] = {}  # in order
        self._is_watching = False
        self._is_notice_late = False  # a notification did not get through: it comes when the way is healed, as over TCP
        self._changes = 0
        self._changed = trio.Event()

    @property
    def connected(self) -> bool:
        return self._is_connected

    @property
    def session(self) -> int:
        return self._session

    @property
    def changes(self) -> int:
        return self._changes

    async def read(self) -> Nodes:
        await trio.lowlevel.checkpoint()
        answer = await self._wait(self._submit((), self._serve_read))
        if isinstance(answer, Mapping):
            return answer
        raise CoordinatorLost("the connection to ZooKeeper was lost")

    async def transact(self, writes: Sequence[Write]) -> Outcome:
        if not writes:
            raise ValueError("a transaction needs a write")
        if any(not isinstance(write, CreateNode) and write.version < 0 for write in writes):
            raise ValueError("a version is 0 or more: a write without a version could not be settled")
        await trio.lowlevel.checkpoint()
        writes = tuple(writes)
        answer = await self._wait(self._submit(writes, partial(self._serve_transaction, self._session, writes)))
        return answer if isinstance(answer, Outcome) else Outcome.UNKNOWN

    async def wait_change(self, seen: int) -> int:
        while self._changes == seen:
            await self._changed.wait()
        return self._changes

    async def aclose(self) -> None:
        if self._is_closed:
            return
        session, was_reachable = self._session, self._is_reachable and self._is_connected
        self._service.kill(self)
        if was_reachable:
            self._service._end_session(session)
        with trio.CancelScope(shield=True):
            await trio.lowlevel.checkpoint()

    # -- requests

    def _submit(self, writes: Sequence[Write], serve: Callable[[_Answer], None]) -> _Request:
        """Send a request. `serve` is called when it arrives, with what to call when its answer is ready."""
        if not self._is_connected:
            raise CoordinatorLost("there is no connection to ZooKeeper")
        service, request, connection = self._service, _Request(), self._connection
        fate = service._fate(self, writes)

        def arrive() -> None:
            if service._is_up:
                serve(answer)

        def answer(reply: Outcome | Nodes) -> None:
            if fate.answered is not None:
                service._later(fate.answered, partial(hear, reply))

        def hear(reply: Outcome | Nodes) -> None:
            if self._hears and connection == self._connection and self._is_connected:
                request.settle(reply)

        if fate.arrives is not None and self._sends:
            service._later(fate.arrives, arrive)
        return request

    async def _wait(self, request: _Request) -> Outcome | Nodes | None:
        """The answer, or None when the connection went first."""
        connection = self._connection
        self._requests[request] = None
        try:
            with trio.move_on_after(self._service.request_timeout):
                await request.done.wait()
        finally:
            del self._requests[request]
        if not request.done.is_set():
            self._notice(connection)
        return request.answer

    def _serve_transaction(self, session: int, writes: Sequence[Write], answer: _Answer) -> None:
        answer(Outcome.DONE if self._service._apply(session, writes) else Outcome.REFUSED)

    def _serve_read(self, answer: _Answer) -> None:
        """See the nodes one after the other, as ZooKeeper does: at first which there are, then each."""
        service = self._service
        age = 0.0 if self.syncs else service.age()
        self._is_watching = True
        found: dict[str, Node] = {}
        paths = deque(sorted(service._seen(age)))

        def see() -> None:
            while paths:
                path = paths.popleft()
                node = service._seen(age).get(path)
                if node is not None:
                    found[path] = node
                if paths and (pause := service.spread()) > 0:
                    service._later(pause, see)
                    return
            answer(MappingProxyType(found))

        see()

    # -- what the service tells

    @property
    def _is_reachable(self) -> bool:
        return self._service._is_up and self._sends and self._hears and not self._is_closed

    def _connect(self) -> None:
        if self._is_connected or not self._is_reachable:
            return
        if self._session not in self._service._sessions:
            if self._session:
                self._session = 0
                self._bump()
            self._session = self._service._new_session()
        self._service._stop_timer(self._session)
        self._connection += 1
        self._is_connected = True
        self._bump()

    def _notice(self, connection: int) -> None:
        """Patience is over: drop that connection, and try for another one."""
        if connection == self._connection and self._is_connected:
            self._lose()
            self._service._later(self._service.delay(), self._connect)

    def _lose(self) -> None:
        """The connection is gone, and what was asked over it is not answered any more."""
        if not self._is_connected:
            return
        self._is_connected = False
        self._is_watching = False
        self._service._miss(self._session)
        for request in self._requests:
            request.settle(None)
        if self._service._is_up and self._session not in self._service._sessions and self._is_reachable:
            self._session = 0
        self._bump()

    def _close(self) -> None:
        self._lose()
        self._is_closed = True
        self._session = 0
        self._bump()

    def _watched(self) -> None:
        """A watch is told once; the next read sets it again."""
        if self._is_watching and self._is_connected:
            self._is_watching = False
            connection = self._connection
            self._service._later(self._service.delay(), partial(self._hear_watch, connection))

    def _hear_watch(self, connection: int) -> None:
        if connection == self._connection and self._is_connected:
            self._is_notice_late = not self._hears
            if self._hears:
                self._bump()

    def _bump(self) -> None:
        self._changes += 1
        self._changed.set()
        self._changed = trio.Event()


def _is_ephemeral(write: Write) -> bool:
    return isinstance(write, CreateNode) and write.ephemeral
