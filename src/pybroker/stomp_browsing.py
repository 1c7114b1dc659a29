"""The queue browsers of one STOMP connection, as ActiveMQ has them: ``browser:true`` in SUBSCRIBE.

Owns which browsers there are and whose page is asked for next: one after the other, and no more at a time than a connection may.
Behind the last message comes a MESSAGE with the header ``browser:end``; the subscription's id is in use until UNSUBSCRIBE.
"""

from __future__ import annotations

from collections.abc import Callable

from pybroker.core.broker import Core
from pybroker.core.browsing import BrowsePage, Cursor, Matches, find
from pybroker.engine import Sink
from pybroker.protocols.stomp_session import StompSession


class _Browser:
    """One of them. `cursor`: where its next page starts."""

    __slots__ = ("cursor", "destination", "head", "key", "matches")

    def __init__(self, key: str, destination: str, head: bytes, matches: Matches | None) -> None:
        self.key = key
        self.destination = destination
        self.head = head
        self.matches = matches
        self.cursor: Cursor | None = None


class StompBrowsers:
    """`put` takes frames for the outbox; pages are confirmed to `sink`. `pages_max`: pages that are asked for at a time."""

    def __init__(self, sink: Sink, session: StompSession, put: Callable[[bytes], None], pages_max: int) -> None:
        self._sink = sink
        self._session = session
        self._put = put
        self._pages_max = pages_max
        self._browsers: dict[str, _Browser] = {}
        self._reading: dict[
            BrowsePage, _Browser
        ] = {}  # also for those that were stopped: their pages are read all the same
        self._waiting: dict[str, None] = {}  # whose next page is to be asked for, in order

    def __contains__(self, key: str | None) -> bool:
        return key in self._browsers

    def __len__(self) -> int:
        return len(self._browsers)

    def start(self, core: Core, key: str, destination: str, head: bytes, matches: Matches | None) -> None:
        """Its first page is asked for when it is its turn. Raises InvalidDestination."""
        find(core, destination)
        self._browsers[key] = _Browser(key, destination, head, matches)
        self._waiting[key] = None

    def stop(self, key: str) -> None:
        """What is on its way for it is dropped."""
        del self._browsers[key]
        self._waiting.pop(key, None)

    def show(self, page: BrowsePage) -> None:
        """A page is here."""
        browser = self._reading.pop(page)
        if self._browsers.get(browser.key) is not browser:
            return
        for each in page.messages:
            redelivered = each.deliveries > 0
            self._put(self._session.message_frame(browser.head, each.message, redelivered, each.deliveries + 1, None))
        browser.cursor = page.cursor
        if page.cursor is None:
            self._put(self._session.browser_end_frame(browser.head, browser.destination))
        else:
            self._waiting[browser.key] = None

    @property
    def waiting(self) -> bool:
        """Whether some browser would ask for its next page, and may."""
        return bool(self._waiting) and len(self._reading) < self._pages_max

    def go_on(self, core: Core) -> None:
        """There is room in the outbox: ask for the next pages."""
        while self.waiting:
            key = next(iter(self._waiting))
            del self._waiting[key]
            browser = self._browsers[key]
            page = core.browse(browser.destination, self._sink, cursor=browser.cursor, matches=browser.matches)
            self._reading[page] = browser
