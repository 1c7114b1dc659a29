"""The load generator counts exactly: its scanner for any split of the bytes, and all of it against the trial."""

import itertools

import pytest
from benchmarks.leveldb import open_database
from benchmarks.processes import TRIAL, ServerFailed, run_child, serving
from benchmarks.wire import (
    CHUNK_MESSAGES,
    CYCLE_CHUNKS,
    CYCLE_MESSAGES,
    Expected,
    LoadError,
    Scanner,
    acknowledgements,
    body,
    chunk_cycle,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import bare

SIZE = 16


def message(number: int, ack: bytes = b"") -> bytes:
    """A MESSAGE frame without its NUL."""
    head = b"MESSAGE\nsubscription:0\nmessage-id:%d\ndestination:/queue/x\n" % number
    if ack:
        head += b"ack:" + ack + b"\n"
    return head + b"content-length:%d\n\n" % SIZE + body(number, SIZE)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at these places."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[first:last] for first, last in itertools.pairwise(places)]


@settings(deadline=None)  # how long it takes is the machine's matter
@given(
    counts=st.integers(0, 12),
    ends=st.lists(st.sampled_from([b"", b"\n", b"\r\n", b"\n\n\n"]), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 1 << 16), max_size=40),
    tail=st.integers(0, 60),
)
def test_scanner_finds_every_frame_wherever_the_bytes_are_cut(counts, ends, cuts, tail):
    whole = b"".join(message(n) + b"\0" + ends[n] for n in range(counts))
    scanner, expected = Scanner(), Expected(SIZE)
    frames = []
    for piece in pieces(whole + message(counts)[:tail], cuts):
        got = scanner.feed(piece)
        expected.take(got)
        frames.extend(got)
    assert [frame.lstrip(b"\r\n") for frame in frames] == [message(n) for n in range(counts)]
    assert scanner.frame_count == expected.received == counts


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 1 << 20), max_size=20))
def test_scanner_agrees_with_the_prebuilt_chunks(cuts):
    chunk = chunk_cycle("/queue/x", SIZE, True, True)[1]
    scanner = Scanner()
    frames = [frame for piece in pieces(chunk, cuts) for frame in scanner.feed(piece)]
    assert len(frames) == CHUNK_MESSAGES
    assert scanner.rest == b""
    assert [frame[-SIZE:] for frame in frames] == [body(n, SIZE) for n in range(CHUNK_MESSAGES, 2 * CHUNK_MESSAGES)]
    assert [b"\nreceipt:r1\n" in frame for frame in frames] == [False] * (CHUNK_MESSAGES - 1) + [True]


def test_expected_goes_round_the_cycle():
    expected = Expected(SIZE)
    total = 2 * CYCLE_MESSAGES + 7
    frames = [message(number) for number in range(total)]
    expected.take(frames[: CYCLE_MESSAGES - 3])
    expected.take(frames[CYCLE_MESSAGES - 3 :])
    assert expected.received == total


@pytest.mark.parametrize("numbers", [[0, 2], [0, 0], [1, 0], [0, 1, 1]], ids=["lost", "repeated", "swapped", "extra"])
def test_expected_refuses_what_was_not_sent(numbers):
    with pytest.raises(LoadError, match="is not what was sent at its place"):
        Expected(SIZE).take([message(number) for number in numbers])


def test_expected_refuses_changed_bytes_and_other_frames():
    for frame in (message(0)[:-1] + b"y", b"ERROR\nmessage:no\n\n", message(0).replace(b"\n\n0", b"\n\nx0")):
        with pytest.raises(LoadError):
            Expected(SIZE).take([frame])


def test_each_message_is_acknowledged_by_its_own_ack_header():
    frames = [message(0, b"a-1"), b"\n" + message(1, b"a-2")]
    assert acknowledgements(frames) == b"ACK\nid:a-1\n\n\0ACK\nid:a-2\n\n\0"


def test_distinct_headers_are_distinct():
    chunks = chunk_cycle("/queue/x", SIZE, True, True, distinct=True)
    frames = b"".join(chunks).split(b"\0")[:-1]
    heads = {frame.partition(b"\n\n")[0] for frame in frames}
    assert len(heads) == CYCLE_MESSAGES == CYCLE_CHUNKS * CHUNK_MESSAGES


@pytest.mark.parametrize(
    "arguments",
    [[], ["--persistent"], ["--persistent", "--ack", "individual"], ["--ack", "individual", "--distinct"]],
    ids=" ".join,
)
def test_pump_against_the_trial(tmp_path, arguments):
    with serving(TRIAL, tmp_path / "data") as server:
        common = ["--url", server.url, "--pid", server.pid, "--messages", 7_000, "--warm", 500]
        result = run_child("benchmarks.load", ["pump", *common, *arguments])
    assert result["messages"] == 7_000
    assert result["body_bytes"] == 7_000 * 256
    assert result["wire_bytes"] > result["body_bytes"]
    assert result["rate"] > 0
    database = open_database(tmp_path / "data")
    assert list(database) == []  # every durable message was stored, and removed once it was consumed
    database.close()


def test_fill_restart_drain_against_the_trial(tmp_path):
    with serving(TRIAL, tmp_path / "data") as server:
        run_child("benchmarks.load", ["fill", "--url", server.url, "--persistent", "--messages", 2_000])
        run_child("benchmarks.load", ["fill", "--url", server.url, "--persistent", "--messages", 500, "--first", 2_000])
    with serving(TRIAL, tmp_path / "data") as server:
        result = run_child("benchmarks.load", ["drain", "--url", server.url, "--messages", 2_500])
    assert result["messages"] == 2_500


def test_paced_against_the_trial(tmp_path):
    with serving(TRIAL, tmp_path / "data") as server:
        result = run_child("benchmarks.load_paced", ["--url", server.url, "--seconds", 0.5, "--warm", 0.1])
    assert result["messages"] == 500
    for what in ("receipt", "delivery"):
        assert 0 < result[what]["p50_ms"] <= result[what]["p99_ms"] <= result[what]["max_ms"]


def test_a_server_is_stopped_when_its_user_fails(tmp_path):
    servers = []

    def fail() -> None:
        with serving(TRIAL, tmp_path / "data") as server:
            servers.append(server)
            raise LoadError("as a case may")

    with pytest.raises(LoadError, match="as a case may"):
        fail()
    assert servers[0].process.returncode is not None


def test_a_failing_child_says_why():
    with pytest.raises(ServerFailed, match="refused"):
        run_child("benchmarks.load", ["fill", "--url", "stomp://127.0.0.1:1", "--messages", 100])


def test_bare_measures_and_leaves_nothing(tmp_path):
    assert bare.measure(str(tmp_path / "data"), 1_000, 256) > 0
    database = open_database(tmp_path / "data")
    assert list(database) == []
    database.close()
