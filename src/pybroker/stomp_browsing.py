"""The queue browsers of one STOMP connection, as ActiveMQ has them: ``browser:true`` in SUBSCRIBE.

Owns which browsers there are and when each asks for its next page: one at a time, and only while the outbox is not full. Behind the
last message comes a MESSAGE with the header ``browser:end``; the subscription's id is in use until UNSUBSCRIBE.
"""

from __future__ import annotations

from collections.abc import Callable

from pybroker.core.broker import Core
from pybroker.core.browsing import BrowsePage, Cursor, Matches
from pybroker.engine import Sink
from pybroker.protocols.stomp_session import StompSession


class _Browser:
    """One of them. `cursor`: where its next page starts."""

    __slots__ = ("cursor", "destination", "head", "matches")

    def __init__(self, destination: str, head: bytes, matches: Matches | None) -> None:
        self.destination = destination
        self.head = head
        self.matches = matches
        self.cursor: Cursor | None = None


class StompBrowsers:
    """`put` takes frames for the outbox; pages are confirmed to `sink`."""

    def __init__(self, sink: Sink, session: StompSession, put: Callable[[bytes], None]) -> None:
        self._sink = sink
        self._session = session
        self._put = put
        self._browsers: dict[str, _Browser] = {}
        self._reading: dict[BrowsePage, str] = {}
        self._waiting: list[str] = []  # whose next page waits for room in the outbox

    def __contains__(self, key: str | None) -> bool:
        return key in self._browsers

    def __len__(self) -> int:
        return len(self._browsers)

    def start(self, core: Core, key: str, destination: str, head: bytes, matches: Matches | None) -> None:
        """Raises InvalidDestination."""
        self._read(core, key, _Browser(destination, head, matches))

    def _read(self, core: Core, key: str, browser: _Browser) -> None:
        page = core.browse(browser.destination, self._sink, cursor=browser.cursor, matches=browser.matches)
        self._browsers[key] = browser
        self._reading[page] = key

    def stop(self, key: str) -> None:
        """What is on its way for it is dropped."""
        del self._browsers[key]
        self._reading = {page: other for page, other in self._reading.items() if other != key}
        self._waiting = [other for other in self._waiting if other != key]

    def show(self, page: BrowsePage) -> None:
        """A page is here."""
        key = self._reading.pop(page, None)
        if key is None:
            return
        browser = self._browsers[key]
        for each in page.messages:
            redelivered = each.deliveries > 0
            self._put(self._session.message_frame(browser.head, each.message, redelivered, each.deliveries + 1, None))
        browser.cursor = page.cursor
        if page.cursor is None:
            self._put(self._session.browser_end_frame(browser.head, browser.destination))
        else:
            self._waiting.append(key)

    @property
    def waiting(self) -> bool:
        """Whether some browser would ask for its next page."""
        return bool(self._waiting)

    def go_on(self, core: Core) -> None:
        """There is room in the outbox."""
        waiting, self._waiting = self._waiting, []
        for key in waiting:
            self._read(core, key, self._browsers[key])
