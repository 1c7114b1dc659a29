"""Many queue browsers of one STOMP connection take no more than their room, in memory and of the broker's reading."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import trio
from trio.testing import MockClock, lockstep_stream_pair

from pybroker.core.browsing import BrowsePage, BrowseRequest
from pybroker.errors import InvalidDestination
from pybroker.stomp_browsing import StompBrowsers
from tests.core.bench import Bench
from tests.engine.support import Disk, broker_on
from tests.support.wire import Peer, frame

LIMITS = {"outbox_bytes_max": 40_000, "browse_bytes_max": 4_000, "browse_pages_max": 2}


async def test_who_reads_nothing_fills_its_outbox_and_no_more(autojump_clock: MockClock) -> None:
    async with broker_on(Disk(), limits=LIMITS) as broker, trio.open_nursery() as nursery:
        async with broker.connect() as client:
            for _ in range(9):
                await client.send("/queue/q", bytes(1_200))
        ours, theirs = lockstep_stream_pair()
        nursery.start_soon(broker._server.serve_stream, theirs, False)
        peer = Peer(ours)
        await peer.open()
        (connection,) = broker._server._connections
        many = [frame("SUBSCRIBE", f"id:{n}", "destination:/queue/q", "browser:true") for n in range(60)]
        await ours.send_all(b"".join(many))
        largest = 0
        for _ in range(200):
            await trio.sleep(0.01)
            largest = max(largest, connection._outbox_bytes)
        assert largest <= 20_000 + 2 * 6_000
        ends = 0
        while ends < 60:
            ends += (await peer.expect("MESSAGE")).get("browser") == "end"
        nursery.cancel_scope.cancel()


def test_the_page_of_one_that_was_stopped_counts_until_it_is_here() -> None:
    bench = Bench()
    bench.send("/queue/q", b"1")
    bench.settle()
    browsers = StompBrowsers(Mock(), Mock(), Mock(), 2)
    asked: list[BrowsePage] = []

    def go_on() -> int:
        browsers.go_on(bench.core)
        asked.extend(each.page for each in bench.core.held if isinstance(each, BrowseRequest))
        bench.core.held.clear()
        return len(asked)

    with pytest.raises(InvalidDestination):
        browsers.start(bench.core, "t", "/topic/t", b"", None)
    assert "t" not in browsers
    for _ in range(5):  # nothing is asked for in between: nothing is read
        browsers.start(bench.core, "a", "/queue/q", b"", None)
        browsers.stop("a")
    assert not browsers.waiting
    for key in "abc":
        browsers.start(bench.core, key, "/queue/q", b"", None)
    assert go_on() == 2
    browsers.stop("a")
    browsers.start(bench.core, "a", "/queue/q", b"", None)
    assert go_on() == 2
    browsers.show(asked[0])
    assert not browsers._put.called  # type: ignore[attr-defined]
    assert go_on() == 3
    browsers.show(asked[1])
    assert go_on() == 4
    for page in asked[2:]:
        browsers.show(page)
    assert browsers._put.call_count == 3  # type: ignore[attr-defined]
