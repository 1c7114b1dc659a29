"""Names that peers choose never become the paths of files: whatever they are, the same files are made, in the data directory."""

from __future__ import annotations

from pathlib import Path

import trio

from tests.hostile.arena import failures
from tests.hostile.stomp_pieces import CONNECTS, KINDS, NAMES
from tests.native import peer as wire
from tests.support.serving import embedded
from tests.support.wire import dialled, frame

PATHS = [*NAMES, "../x", "../../x", "/etc/passwd", "/tmp/x", "~", "~/x", "CURRENT", "LOCK",
    "nul", "C:\\\\x", "a/../../x", "x\x00.ldb", "\n",
         "$HOME", "`id`", "..\\\\x", "file:///x"]  # fmt: skip
URLS = ["stomp://127.0.0.1:0", "pybroker://127.0.0.1:0"]


def files(directory: Path) -> set[str]:
    """All files below a directory, without what LevelDB numbers, and without its own."""
    found = set()
    for path in directory.rglob("*"):
        numbered = path.stem.isdigit() or path.name.startswith("MANIFEST-")
        if not numbered:
            found.add(str(path.relative_to(directory)))
    return found


async def say(port: int, data: bytes) -> None:
    """Send it, and read what comes until nothing more does."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        await stream.send_all(data)
        await stream.send_eof()
        with trio.move_on_after(5):
            try:
                while await stream.receive_some(65_536):
                    pass
            except trio.BrokenResourceError:
                pass


async def test_names_never_become_paths(tmp_path: Path):
    place = tmp_path / "one" / "two"
    place.mkdir(parents=True)
    here = {path.name for path in Path.cwd().iterdir()}
    with failures() as failed:
        async with embedded(data_dir=place / "data", listen=URLS) as (broker, port):
            native = int(broker.listeners[1].rpartition(":")[2])
            async with dialled(port, "1.2", "client-id:c") as peer:
                await peer.do("SEND", "destination:/queue/plain", body=b"x")
                await peer.do(
                    "SEND", "destination:/queue/plain", "persistent:false", "producer-id:p", "producer-sequence:1"
                )
            before = files(tmp_path)
            for name in PATHS:
                said = [
                    *(frame("SEND", f"destination:{kind}{name}", "receipt:r") for kind in KINDS),
                    *(frame("SUBSCRIBE", "id:1", f"destination:{kind}{name}") for kind in KINDS),
                    *(
                        frame("SEND", "destination:/queue/a", f"{header}:{name}")
                        for header in ("reply-to", "JMSXGroupID", "x")
                    ),
                    frame("SEND", "destination:/queue/a", f"producer-id:{name}", "producer-sequence:1"),
                    frame(
                        "SUBSCRIBE",
                        "id:1",
                        "destination:/topic/a",
                        f"client-id:{name}",
                        f"activemq.subscriptionName:{name}",
                    ),
                    frame("BEGIN", f"transaction:{name}"),
                ]
                async with trio.open_nursery() as nursery:
                    for each in said:
                        nursery.start_soon(say, port, CONNECTS[0] + each)
                    nursery.start_soon(
                        say, port, frame("CONNECT", "accept-version:1.2", f"client-id:{name}", f"login:{name}")
                    )
                    opening = wire.pack(
                        [wire.HELLO, "pybroker", [1], {"client_id": name[:255], "software": name[:255]}],
                        [wire.SUBSCRIBE, 7, 1, "/topic/a", "individual", 0, name],
                        [wire.SEND, 1, [wire.row(b"x", f"/queue/{name}"), wire.row(b"x", f"/topic/{name}")]],
                    )
                    nursery.start_soon(say, native, opening)
            assert any("passwd" in queue.name for queue in broker._running().core.queues.values()), (
                "such names are taken"
            )
            assert files(tmp_path) == before
        assert not failed, failed[0]
    assert {path.name for path in Path.cwd().iterdir()} == here
    assert {path.name for path in place.iterdir()} == {"data"}
