"""One conformance suite for every `Backend`: ordered keys, whole batches, consistent snapshots, refusal after the end."""

from __future__ import annotations

import errno
import gc
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pybroker.errors import StoreDamaged, StoreError, StoreFormatError, StoreLocked
from pybroker.store import LevelDBBackend, MemoryBackend
from pybroker.store.backend import Backend
from pybroker.store.memory import CHUNK_KEYS_MAX
from tests.store.forgetful import ForgetfulBackend

TOP = b"\xff"


@pytest.fixture(params=["leveldb", "memory", "forgetful"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Backend]]:
    made: list[Backend] = []

    def new() -> Backend:
        kinds: dict[str, Callable[[], Backend]] = {
            "leveldb": lambda: LevelDBBackend(tmp_path / f"db{len(made)}"),
            "memory": MemoryBackend,
            "forgetful": ForgetfulBackend,
        }
        made.append(kinds[request.param]())
        return made[-1]

    yield new
    for backend in made:
        backend.close()


def put(backend: Backend, *changes: tuple[bytes, bytes | None], sync: bool = False) -> None:
    backend.write(backend.new_batch(list(changes)), sync)


def test_a_new_backend_is_empty(make: Callable[[], Backend]) -> None:
    backend = make()
    assert backend.get(b"a") is None
    assert list(backend.iterate(b"", TOP)) == []


def test_ranges_are_half_open_and_in_key_order(make: Callable[[], Backend]) -> None:
    backend = make()
    put(backend, (b"c", b"3"), (b"a", b"1"), (b"b\0", b"2"), (b"d", b"4"), sync=True)
    assert list(backend.iterate(b"a", b"d")) == [(b"a", b"1"), (b"b\0", b"2"), (b"c", b"3")]
    assert list(backend.iterate(b"b", b"b\0")) == []
    assert list(backend.iterate(b"d", b"a")) == []


def test_changes_of_a_batch_apply_in_order(make: Callable[[], Backend]) -> None:
    backend = make()
    put(backend, (b"a", b"1"), (b"a", None), (b"b", b"1"), (b"b", None), (b"b", b"2"), (b"c", b""))
    assert list(backend.iterate(b"", TOP)) == [(b"b", b"2"), (b"c", b"")]
    put(backend, (b"b", None), (b"missing", None))
    assert list(backend.iterate(b"", TOP)) == [(b"c", b"")]


@pytest.mark.parametrize("sync", [True, False])
def test_both_ways_of_writing_alternate(make: Callable[[], Backend], sync: bool) -> None:
    backend = make()
    for index in range(4):
        put(backend, (b"%d" % index, b"x"), sync=sync ^ bool(index % 2))
    assert len(list(backend.iterate(b"", TOP))) == 4


def test_random_changes_against_a_dict(make: Callable[[], Backend]) -> None:
    backend = make()
    chance = random.Random(7)
    model: dict[bytes, bytes] = {}
    for turn in range(120):
        changes: list[tuple[bytes, bytes | None]] = []
        for _ in range(chance.randrange(60)):
            key = b"%05d" % chance.randrange(3_000)
            if chance.random() < 0.6:
                changes.append((key, b"%d" % turn))
                model[key] = b"%d" % turn
            else:
                changes.append((key, None))
                model.pop(key, None)
        put(backend, *changes)
        if turn % 7 == 0:
            start = b"%05d" % chance.randrange(3_000)
            assert list(backend.iterate(start, TOP)) == sorted(item for item in model.items() if item[0] >= start)
    assert list(backend.iterate(b"", TOP)) == sorted(model.items())
    assert all(backend.get(key) == value for key, value in model.items())


def test_a_deep_range_filled_from_both_ends(make: Callable[[], Backend]) -> None:
    backend = make()
    keys = [b"%06d" % number for number in range(3 * CHUNK_KEYS_MAX)]
    for key in [*keys[1::2], *reversed(keys[::2])]:
        put(backend, (key, key))
        if int(key) % 100 == 0:
            next(backend.iterate(b"", TOP))
    assert [key for key, _ in backend.iterate(b"", TOP)] == keys
    put(backend, *((key, None) for key in keys[:-2]))
    assert [key for key, _ in backend.iterate(b"", TOP)] == keys[-2:]


def test_a_snapshot_does_not_see_later_writes(make: Callable[[], Backend]) -> None:
    backend = make()
    before = [(b"%03d" % number, b"old") for number in range(200)]
    put(backend, *before)
    with backend.snapshot() as reader:
        begun = reader.iterate(b"", TOP)
        first = [next(begun) for _ in range(3)]
        put(
            backend,
            *((key, b"new") for key, _ in before[::2]),
            *((key, None) for key, _ in before[1::2]),
            (b"zzz", b""),
        )
        put(backend, (b"001", b"again"))
        assert first + list(begun) == before
        assert list(reader.iterate(b"100", TOP)) == before[100:]
        assert reader.get(b"001") == b"old"
        assert reader.get(b"zzz") is None
    assert backend.get(b"001") == b"again"
    assert len(list(backend.iterate(b"", TOP))) == 102


def test_iterate_sees_the_moment_of_its_call(make: Callable[[], Backend]) -> None:
    backend = make()
    put(backend, (b"a", b"1"))
    entries = backend.iterate(b"", TOP)
    put(backend, (b"a", None), (b"b", b"2"))
    assert list(entries) == [(b"a", b"1")]


def test_size_grows_with_what_is_stored(make: Callable[[], Backend]) -> None:
    backend = make()
    empty = backend.approximate_size()
    put(backend, (b"a", b"x" * 100_000))
    assert backend.approximate_size() >= empty + 100_000


def test_a_closed_backend_refuses(make: Callable[[], Backend]) -> None:
    backend = make()
    put(backend, (b"a", b"1"), (b"b", b"2"))
    entries = backend.iterate(b"", TOP)
    next(entries)
    backend.close()
    backend.close()
    with pytest.raises(StoreError, match="closed"):
        list(entries)
    with pytest.raises(StoreError):
        backend.get(b"a")
    with pytest.raises(StoreError):
        put(backend, (b"a", b"1"))
    with pytest.raises(StoreError):
        backend.snapshot()


# ---- LevelDB alone


def test_leveldb_keeps_what_was_written(tmp_path: Path) -> None:
    for turn in range(3):
        backend = LevelDBBackend(tmp_path / "deep" / "db")
        assert len(list(backend.iterate(b"", TOP))) == turn
        put(backend, (b"%d" % turn, b"x"), sync=True)
        backend.close()
    assert (tmp_path / "deep" / "db").stat().st_mode & 0o777 == 0o700


def test_leveldb_is_locked_within_a_process(tmp_path: Path) -> None:
    """And the refused attempt must not drop the lock that the first one holds against other processes."""
    backend = LevelDBBackend(tmp_path)
    (tmp_path.parent / "link").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path.parent / "link"):
        with pytest.raises(StoreLocked, match="open already"):
            LevelDBBackend(path)
    code = "import sys; from pybroker.store import LevelDBBackend; LevelDBBackend(sys.argv[1])"
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "StoreLocked" in other.stderr
    backend.close()
    LevelDBBackend(tmp_path).close()


def test_a_forgotten_backend_gives_its_directory_back(tmp_path: Path) -> None:
    put(LevelDBBackend(tmp_path), (b"a", b"1"), sync=True)
    gc.collect()
    backend = LevelDBBackend(tmp_path)
    assert backend.get(b"a") == b"1"
    backend.close()


def test_leveldb_is_locked_against_another_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pybroker.store import LevelDBBackend; b = LevelDBBackend(sys.argv[1]); "
        "print('open', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(StoreLocked, match="another process"):
            LevelDBBackend(tmp_path)
        assert other.stdin is not None
        other.stdin.close()
        other.wait()
    LevelDBBackend(tmp_path).close()


def test_a_lost_current_file_is_damage_not_a_new_database(tmp_path: Path) -> None:
    backend = LevelDBBackend(tmp_path)
    put(backend, (b"a", b"1"), sync=True)
    backend.close()
    (tmp_path / "CURRENT").unlink()
    before = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    with pytest.raises(StoreDamaged, match="salvage"):
        LevelDBBackend(tmp_path)
    assert {path.name: path.stat().st_size for path in tmp_path.iterdir()} == before


def test_a_damaged_manifest_says_how_to_go_on(tmp_path: Path) -> None:
    store = tmp_path / "data" / "store"
    LevelDBBackend(store).close()
    manifest = next(store.glob("MANIFEST-*"))
    manifest.write_bytes(b"\0" * 20 + manifest.read_bytes()[20:])
    with pytest.raises(StoreDamaged, match=f"pybroker store salvage {tmp_path / 'data'} NEWDIR"):
        LevelDBBackend(store)


def test_directories_of_others_are_refused(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(StoreFormatError, match=r"letter\.txt"):
        LevelDBBackend(tmp_path)
    with pytest.raises(StoreError, match="no store"):
        LevelDBBackend(tmp_path / "missing", create=False)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_leveldb_databases_of_others_are_refused(tmp_path: Path) -> None:
    plyvel = pytest.importorskip("plyvel" if sys.version_info < (3, 13) else "plyvel_next")
    database = plyvel.DB(str(tmp_path / "a"), create_if_missing=True)
    database.put(b"key", b"value")
    database.close()
    with pytest.raises(StoreFormatError, match="not a pybroker store"):
        LevelDBBackend(tmp_path / "a")
    plyvel.DB(
        str(tmp_path / "b"), create_if_missing=True, comparator=lambda a, b: (a > b) - (a < b), comparator_name=b"x"
    ).close()
    with pytest.raises(StoreFormatError, match="not a pybroker store"):
        LevelDBBackend(tmp_path / "b")


def test_an_iteration_that_ends_before_the_end_mark_is_damage(tmp_path: Path) -> None:
    backend = LevelDBBackend(tmp_path)
    put(backend, (b"a", b"1"), (TOP, None))
    with pytest.raises(StoreDamaged, match="end mark"):
        list(backend.iterate(b"", TOP))
    backend.close()


def test_after_a_failed_write_leveldb_refuses_everything(tmp_path: Path) -> None:
    """A limit on the size of files makes the log's next write fail, as a full disk does."""
    code = """
import resource, sys
from pybroker.errors import StoreError
from pybroker.store import LevelDBBackend
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
backend = LevelDBBackend(sys.argv[1])
for number in range(100):
    batch = backend.new_batch([(b"%d" % number, b"x" * 10_000)])
    try:
        backend.write(batch, True)
    except StoreError as error:
        assert isinstance(error.__cause__, OSError), error
        break
else:
    sys.exit("no write failed")
for call in (lambda: backend.write(batch, True), lambda: backend.new_batch([]), lambda: backend.get(b"0"),
             lambda: backend.iterate(b"", b"z"), backend.snapshot):
    try:
        call()
    except StoreError as error:
        assert "opened again" in str(error)
    else:
        sys.exit("not refused")
backend.close()
print(number)
"""
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr + result.stdout
    backend = LevelDBBackend(tmp_path)
    found = len(list(backend.iterate(b"", TOP)))
    backend.close()
    assert found in (int(result.stdout), int(result.stdout) + 1)


def test_closing_under_busy_threads_never_crashes(tmp_path: Path) -> None:
    """A crash would end the test run; each thread ends with `StoreError` instead."""
    for turn in range(5):
        _close_under_busy_threads(LevelDBBackend(tmp_path), turn)


def _close_under_busy_threads(backend: LevelDBBackend, turn: int) -> None:
    put(backend, *((b"%d.%d" % (turn, number), b"x" * 100) for number in range(2_000)))
    ended: list[str] = []
    barrier = threading.Barrier(5)

    def hold() -> None:
        with backend.snapshot() as reader:
            for _ in reader.iterate(b"", TOP):
                reader.get(b"0.0")

    def run(work: Callable[[], object]) -> None:
        barrier.wait()
        try:
            while True:
                work()
        except StoreError as error:
            ended.append(str(error))

    works: list[Callable[[], object]] = [
        lambda: list(backend.iterate(b"", TOP)),
        lambda: put(backend, (b"w", b"x")),
        lambda: backend.get(b"0.0"),
        hold,
    ]
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    barrier.wait()
    threading.Event().wait(0.02)
    backend.close()
    for thread in threads:
        thread.join(10)
    assert len(ended) == len(works)
    assert all("closed" in text for text in ended)


# ---- the forgetful one


def test_forgetful_forgets_what_was_not_synced() -> None:
    backend = ForgetfulBackend()
    put(backend, (b"a", b"1"), sync=True)
    put(backend, (b"b", b"2"))
    put(backend, (b"a", None))
    assert dict(backend.crash().iterate(b"", TOP)) == {b"a": b"1"}
    backend = ForgetfulBackend({b"a": b"1"})
    put(backend, (b"b", b"2"))
    put(backend, (b"c", b"3"))
    assert dict(backend.crash(keep=1).iterate(b"", TOP)) == {b"a": b"1", b"b": b"2"}


def test_forgetful_fails_as_asked() -> None:
    backend = ForgetfulBackend()
    backend.fail_write = 2
    put(backend, (b"a", b"1"), sync=True)
    with pytest.raises(StoreError) as caught:
        put(backend, (b"b", b"2"), sync=True)
    assert isinstance(caught.value.__cause__, OSError)
    with pytest.raises(StoreError, match="opened again"):
        backend.get(b"a")
    assert dict(backend.crash(keep_failed=True).iterate(b"", TOP)) == {b"a": b"1", b"b": b"2"}
    backend = ForgetfulBackend()
    backend.full = True
    with pytest.raises(StoreError) as caught:
        put(backend, (b"b", b"2"))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
