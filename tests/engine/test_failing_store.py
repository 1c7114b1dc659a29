"""A disk that fails, fills up or hangs: nothing that it doesn't have is confirmed or shown, and the broker serves again.

DESIGN.md section 3: a journal write that fails is fail-stop. In-flight sends are in doubt, never failed or confirmed; the
store is opened again with back-off. In memory, on a virtual clock, but for the connection over a socket.
"""

# ruff: noqa: ASYNC110, PT012, SIM117 (whole blocks are what is tested, and the nesting shows what ends first)
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio

import pybroker.engine
from pybroker.broker import Broker, open_broker
from pybroker.client import Client
from pybroker.errors import BrokerClosed, BrokerError, BrokerFull, SendInDoubt, StoreDamaged, StoreError
from pybroker.keeper import reopening
from pybroker.stomp_remote import connect_stomp
from pybroker.store import format as fmt
from pybroker.store.backend import Entry
from tests.engine.support import Disk, Found, Place, broker_on, check, check_empty, drain, wait_serving
from tests.store.forgetful import ForgetfulBackend

Q, OTHER = "/queue/q", "/queue/other"


def ids(found: dict[Place, list[Found]], place: Place = Q) -> list[str]:
    return [message.id for message in found.get(place, [])]


async def send(client: Client, id: str, destination: str = Q, **options: bool) -> None:
    await client.send(destination, id.encode(), {"id": id}, **options)


# ---- writes that fail


class Sender:
    """Sends one message after the other, whatever happens, and notes what it was told about each."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.confirmed: list[str] = []
        self.in_doubt: list[str] = []
        self.not_done: list[str] = []

    async def run(self, broker: Broker, count: int) -> None:
        number = 0
        while number < count:
            try:
                async with broker.connect() as client:
                    while number < count:
                        id = f"{self.name}-{number:02}"
                        number += 1
                        try:
                            await send(client, id)
                            self.confirmed.append(id)
                        except SendInDoubt:
                            self.in_doubt.append(id)
                        except BrokerClosed:
                            self.not_done.append(id)
                            raise
            except BrokerClosed:
                await trio.sleep(0.03)


@pytest.mark.parametrize("keep_failed", [False, True])
@pytest.mark.parametrize("fail_write", range(2, 9))
async def test_a_failed_write_leaves_its_sends_in_doubt_and_the_broker_serves_again(
    autojump_clock: trio.testing.MockClock, fail_write: int, keep_failed: bool
) -> None:
    disk = Disk()
    disk.keep_failed = keep_failed
    disk.backend.fail_write = fail_write
    senders = [Sender(name) for name in "abc"]
    async with broker_on(disk) as broker:
        async with trio.open_nursery() as nursery:
            for sender in senders:
                nursery.start_soon(sender.run, broker, 12)
        assert len(disk.opened_at) == 2
        check(broker)
        found = ids(await drain(broker, Q))
        check_empty(broker)
    assert len(found) == len(set(found))
    for sender in senders:
        mine = [id for id in found if id.startswith(sender.name)]
        assert len(sender.in_doubt) <= 1
        assert set(sender.confirmed) <= set(mine)
        assert not set(sender.not_done) & set(mine)
        assert mine == sorted(mine)
    in_doubt = {id for sender in senders for id in sender.in_doubt}
    assert in_doubt, "the failed batch had sends in it"
    in_failed_batch = in_doubt & set(found)
    assert bool(in_failed_batch) == keep_failed


async def test_everything_in_flight_of_a_publisher_is_in_doubt(autojump_clock: trio.testing.MockClock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker:
        async with broker.connect() as client:
            await send(client, "first")
            disk.backend.fail_write = disk.backend.writes + 1
            with pytest.raises(SendInDoubt, match="5 sends"):
                async with client.publisher() as publisher:
                    for number in range(5):
                        await publisher.send(Q, b"body", {"id": str(number)})
            assert publisher.confirmed == 0
            with pytest.raises(BrokerClosed):
                await send(client, "after")
        await wait_serving(broker)
        assert ids(await drain(broker, Q)) == ["first"]
        check_empty(broker)


@pytest.mark.parametrize("keep_failed", [False, True])
async def test_acknowledgements_and_commits_under_way_are_in_doubt(
    autojump_clock: trio.testing.MockClock, keep_failed: bool
) -> None:
    disk = Disk()
    disk.keep_failed = keep_failed
    outcome: list[str] = []
    async with broker_on(disk) as broker:
        async with broker.connect() as client:
            for id in ("a", "b", "c"):
                await send(client, id)
            async with client.subscribe(Q) as messages:
                batch = [await messages.receive() for _ in range(3)]

                async def ack() -> None:
                    with pytest.raises(SendInDoubt):
                        await batch[0].ack()
                    outcome.append("ack")

                async def commit() -> None:
                    with pytest.raises(SendInDoubt):
                        async with client.transaction() as transaction:
                            await transaction.ack(batch[1])
                            await transaction.send(OTHER, b"d", {"id": "d"})
                    outcome.append("commit")

                async def wait() -> None:
                    with pytest.raises(BrokerClosed):
                        await messages.receive()
                    outcome.append("receive")

                disk.shut()
                async with trio.open_nursery() as nursery:
                    for task in (ack, commit, wait):
                        nursery.start_soon(task)
                    await trio.testing.wait_all_tasks_blocked()
                    assert not outcome
                    # the first batch fails; what waits behind it is in doubt too, though no disk can have it
                    disk.backend.fail_write = disk.backend.writes + 1
                    disk.gate.set()
        assert sorted(outcome) == ["ack", "commit", "receive"]
        await wait_serving(broker)
        found = await drain(broker, Q, OTHER)
        assert ids(found, OTHER) == (["d"] if "b" not in ids(found) else [])
        assert set(ids(found)) | {"a", "b"} == {"a", "b", "c"}
        assert all(message.redelivered for message in found[Q])
        if not keep_failed:
            assert ids(found) == ["a", "b", "c"]
        check_empty(broker)


async def test_a_full_disk_is_tried_again_with_back_off(autojump_clock: trio.testing.MockClock) -> None:
    disk = Disk()
    async with broker_on(disk, reopen_delay=0.1, reopen_delay_max=0.8) as broker:
        async with broker.connect() as client:
            await send(client, "before")
            disk.fill(True)
            with pytest.raises(SendInDoubt, match="No space left"):
                await send(client, "lost")
        await trio.sleep(10)
        with pytest.raises(BrokerClosed, match="No space left"):
            await broker.connect().__aenter__()
        with pytest.raises(BrokerClosed):
            broker.statistics()
        assert broker.role == "starting"
        disk.fill(False)
        await wait_serving(broker)
        pauses = [later - earlier for earlier, later in zip(disk.opened_at[1:], disk.opened_at[2:], strict=False)]
        assert [round(pause, 3) for pause in pauses[:5]] == [0.2, 0.4, 0.8, 0.8, 0.8]
        assert ids(await drain(broker, Q)) == ["before"]
        check_empty(broker)


async def test_a_stop_while_the_store_is_away(autojump_clock: trio.testing.MockClock) -> None:
    disk = Disk()
    async with broker_on(disk) as broker:
        disk.refuse = 1_000
        disk.backend.fail_write = disk.backend.writes + 1
        async with broker.connect() as client:
            with pytest.raises(SendInDoubt):
                await send(client, "a")
        await trio.sleep(1)
        stopped_from = trio.current_time()
    assert trio.current_time() - stopped_from < 1


async def test_a_sender_that_waits_for_the_journal_is_told_of_its_failure(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """One who waits for room in the open batch has nothing in flight: it must neither hang nor be in doubt."""
    disk = Disk()
    told: list[type[BrokerError]] = []

    async def run(broker: Broker, id: str) -> None:
        async with broker.connect() as client:
            try:
                await client.send(Q, bytes(100), {"id": id})
            except BrokerError as error:
                told.append(type(error))

    async with broker_on(disk, limits={"batch_bytes_max": 10}) as broker:
        disk.shut()
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(run, broker, str(number))
                await trio.testing.wait_all_tasks_blocked()
            disk.backend.fail_write = disk.backend.writes + 1
            disk.gate.set()
            with trio.move_on_after(60):
                while len(told) < 4:
                    await trio.sleep(1)
            nursery.cancel_scope.cancel()
        assert sorted(error.__name__ for error in told) == ["BrokerClosed"] * 2 + ["SendInDoubt"] * 2


async def test_a_stomp_client_gets_no_receipt_for_a_failed_write() -> None:
    disk = Disk()
    async with broker_on(disk, listen=["stomp://127.0.0.1:0"], reopen_delay=0.01) as broker:
        (url,) = broker.listeners
        async with connect_stomp(url) as client, connect_stomp(url) as other:
            await client.send(Q, b"a", [("id", "a")])
            disk.backend.fail_write = disk.backend.writes + 1
            with pytest.raises(BrokerError, match="store failed"):
                await client.send(Q, b"b", [("id", "b")])
            with pytest.raises(BrokerError, match="store failed"):  # every connection ends
                await other.receive()
        await wait_serving(broker)
        assert broker.listeners == (url,)
        async with connect_stomp(url) as client:
            await client.subscribe(Q, "client-individual", 10)
            message = await client.receive()
            assert (message.header("id"), message.header("redelivered")) == ("a", "false")
            await client.ack(message)
        assert broker.statistics().connections <= 2
        check(broker)


# ---- a write that hangs


async def test_while_a_write_hangs_nothing_durable_is_confirmed_or_shown_and_the_rest_goes_on(
    autojump_clock: trio.testing.MockClock,
) -> None:
    disk = Disk()
    done: list[str] = []
    async with broker_on(disk) as broker, broker.connect() as client, broker.connect() as second:
        async with client.subscribe(Q) as durable, second.subscribe(OTHER, ack="auto") as transient:
            await send(client, "x")
            shown = await durable.receive()
            disk.shut()

            async def producer() -> None:
                await send(client, "y")
                done.append("send")

            async def acknowledger() -> None:
                await shown.ack()
                done.append("ack")

            async def committer() -> None:
                async with client.transaction() as transaction:
                    await transaction.send(Q, b"z", {"id": "z"})
                done.append("commit")

            async def consumer() -> None:
                for id in ("y", "z"):
                    assert (await durable.receive()).header("id") == id
                    done.append(f"shown {id}")

            async with trio.open_nursery() as nursery:
                for task in (producer, acknowledger, consumer):
                    nursery.start_soon(task)
                    await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(committer)
                await trio.sleep(600)
                assert done == []
                async with second.publisher(max_in_flight=200) as publisher:
                    for number in range(100):
                        await publisher.send(OTHER, b"fast", {"id": str(number)}, durable=False)
                        assert (await transient.receive()).header("id") == str(number)
                    assert done == []
                    check(broker)
                    disk.gate.set()
            assert sorted(done) == ["ack", "commit", "send", "shown y", "shown z"]
    assert not done[0].startswith("shown z")


async def test_messages_that_were_not_shown_while_a_write_hung_are_no_redeliveries(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A consumer that leaves while its deliveries are held has seen nothing: the next one gets them as new, once."""
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        disk.shut()
        async with trio.open_nursery() as nursery:
            async with broker.connect() as leaving:
                with trio.move_on_after(1):
                    async with leaving.subscribe(Q) as messages:
                        nursery.start_soon(send, client, "a")
                        await messages.receive()
                check(broker)
            disk.gate.set()
        found = await drain(broker, Q)
        assert [(message.id, message.redelivered) for message in found[Q]] == [("a", False)]
        check_empty(broker)


# ---- reads that fail, and bad values


class BadReads(ForgetfulBackend):
    """Reading a queue's range fails, `fail_reads` times, with `error`."""

    fail_reads = 0
    error: StoreError = StoreError("the disk can't be read")

    def snapshot(self) -> BadReads:  # type: ignore[override]
        self._check()
        return self

    def __enter__(self) -> BadReads:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
        if start[0] == fmt.MESSAGE and type(self).fail_reads:
            type(self).fail_reads -= 1
            raise type(self).error
        return super().iterate(start, stop)


@pytest.fixture
def bad_reads() -> Iterator[type[BadReads]]:
    yield BadReads
    BadReads.fail_reads = 0


async def test_a_page_that_cannot_be_read_ends_the_role_and_is_read_in_the_next_one(
    autojump_clock: trio.testing.MockClock, bad_reads: type[BadReads]
) -> None:
    disk = Disk()
    disk.backend = bad_reads()
    async with broker_on(disk, limits={"window_messages_max": 4}) as broker:
        async with broker.connect() as client:
            for number in range(12):
                await send(client, f"{number:02}")
            bad_reads.fail_reads = 3
            async with client.subscribe(Q, prefetch=100) as messages:
                with pytest.raises((BrokerClosed, SendInDoubt)):
                    while True:
                        await (await messages.receive()).nack()
        await wait_serving(broker)
        lives = 0
        while bad_reads.fail_reads:  # each life meets it when somebody consumes
            lives += 1
            assert lives < 10
            async with broker.connect() as client:
                with pytest.raises((BrokerClosed, SendInDoubt)):
                    async with client.subscribe(Q) as messages:
                        await messages.receive()
            await wait_serving(broker)
        assert ids(await drain(broker, Q)) == [f"{number:02}" for number in range(12)]
        check_empty(broker)


async def test_a_bad_block_is_passed_over(autojump_clock: trio.testing.MockClock, bad_reads: type[BadReads]) -> None:
    """What LevelDB can't read for good must not take the queue down with it again and again."""
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        for number in range(6):
            await send(client, str(number))
    keys = [key for key in disk.backend.synced if key[0] == fmt.MESSAGE]

    class BadBlock(BadReads):
        def iterate(self, start: bytes, stop: bytes) -> Iterator[Entry]:
            for key, value in ForgetfulBackend.iterate(self, start, stop):
                if key == sorted(keys)[2]:
                    raise StoreDamaged("a bad block")
                yield key, value

    after = Disk()
    after.backend = BadBlock(disk.backend.synced)
    async with broker_on(after) as broker:
        assert ids(await drain(broker, Q)) == ["0", "1", "3", "4", "5"]
        assert [row.corrupt for row in broker.statistics().destinations if row.name == "q"] == [1]
        assert len(after.opened_at) == 1
        check(broker)


@pytest.mark.parametrize("window", [2_048, 2])
async def test_a_corrupt_message_is_counted_and_not_delivered_and_the_rest_is(
    autojump_clock: trio.testing.MockClock, window: int
) -> None:
    disk = Disk()
    async with broker_on(disk) as broker, broker.connect() as client:
        for number in range(10):
            await send(client, str(number))
            await send(client, str(number), OTHER)
    after = Disk(disk.backend.synced)
    for key in list(after.backend.synced):
        if key[0] == fmt.MESSAGE and b"q" in (after.backend.get(key) or b"") and key.endswith(b"\x04"):
            value = after.backend.get(key) or b""
            if Q.encode() in value:
                after.backend.flip(key, 8 * len(value) - 40)
                bad = key
    async with broker_on(after, limits={"window_messages_max": window}) as broker:
        found = await drain(broker, Q, OTHER)
        assert ids(found) == [str(number) for number in range(10) if number != 4]
        assert ids(found, OTHER) == [str(number) for number in range(10)]
        rows = {row.name: row for row in broker.statistics().destinations}
        assert (rows["q"].corrupt >= 1, rows["other"].corrupt) == (True, 0)
        assert rows["q"].depth == 1
        check(broker)
        async with broker.connect() as client:  # it goes on
            await send(client, "new")
        assert ids(await drain(broker, Q)) == ["new"]
        check(broker)
    assert bad in after.backend.synced, "it stays in the store"


# ---- a disk with little room


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    space = SimpleNamespace(free=1 << 40)
    monkeypatch.setattr(pybroker.engine.shutil, "disk_usage", lambda path: SimpleNamespace(free=space.free))
    return space


@pytest.mark.parametrize("policy", ["block", "refuse"])
async def test_producers_wait_or_are_refused_while_the_disk_has_too_little_room(
    tmp_path: Path, free_bytes: SimpleNamespace, policy: str
) -> None:
    limits = {"disk_free_bytes_min": 1_000_000, "full_policy": policy}
    async with open_broker(data_dir=tmp_path, limits=limits, delivery={"expiry_interval": 0.02}) as broker:
        async with broker.connect() as client, client.subscribe(Q) as messages:
            await send(client, "a")
            free_bytes.free = 999_999
            while not broker.statistics().full:
                await trio.sleep(0.01)
            async with trio.open_nursery() as nursery:
                if policy == "refuse":
                    with pytest.raises(BrokerFull, match="disk_free_bytes_min"):
                        await send(client, "b")
                else:
                    nursery.start_soon(send, client, "b")
                    await trio.sleep(0.1)
                message = await messages.receive()  # consumers go on, and make room
                await message.ack()
                assert message.header("id") == "a"
                free_bytes.free = 1_000_001
            while broker.statistics().full:
                await trio.sleep(0.01)
            if policy == "refuse":
                await send(client, "b")
            message = await messages.receive()
            assert message.header("id") == "b"
            await message.ack()
        check_empty(broker)


async def test_a_blocked_send_is_refused_in_the_end(tmp_path: Path, free_bytes: SimpleNamespace) -> None:
    free_bytes.free = 0
    limits = {"full_timeout": 0.1}
    async with open_broker(data_dir=tmp_path, limits=limits, delivery={"expiry_interval": 0.02}) as broker:
        while not broker.statistics().full:
            await trio.sleep(0.01)
        async with broker.connect() as client:
            with pytest.raises(BrokerFull, match="full_timeout"):
                await send(client, "a")
        check_empty(broker)


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (
            "the store in /data/a/store: IO error: /data/a/store/000003.log: No space left on device",
            " (No space left on device)",
        ),
        ("the store: [Errno 5] Input/output error", " ([Errno 5] Input/output error)"),
        ("the store in /data/a/store", ""),
        ("it failed: /data/a/store", ""),
    ],
)
def test_clients_are_told_why_the_store_failed_and_no_path(failure: str, told: str) -> None:
    text = str(reopening(StoreError(failure)))
    assert text.startswith(f"the store failed{told} ")
    assert "/data" not in text
