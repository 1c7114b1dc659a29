"""``pybroker serve``: its output, its configuration, what it refuses and how, and how it stops."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pybroker.users import hash_password
from tests.support.serving import ANY_PORT, ServedBroker, call_pybroker, run_pybroker, served
from tests.support.wire import BlockingPeer, connect_frame, frame


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the address of a control socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


def refused(*arguments: str | Path, status: int = 1, process: bool = False) -> str:
    """Run a command that must be refused; return its error text, which is no traceback."""
    done = (run_pybroker if process else call_pybroker)(*arguments)
    text = done.stderr.decode()
    assert done.returncode == status, text
    assert done.stdout == b""
    assert "Traceback" not in text
    return text


def test_each_listener_is_printed_with_its_port(directory: Path):
    with served(directory / "data", listen=[ANY_PORT, "stomp://localhost:0"]) as broker:
        assert [url.rpartition(":")[0] for url in broker.urls] == ["stomp://127.0.0.1", "stomp://localhost"]
        assert len(set(broker.ports)) == 2
        for port in broker.ports:
            BlockingPeer(port).close()
        assert broker.terminate() == 0
        assert broker.output == [f"listening {url}" for url in broker.urls] + ["role standalone epoch 0"]


def test_without_a_data_directory_it_says_so():
    with served(None) as broker:
        BlockingPeer(broker.port).close()
        assert broker.terminate() == 0
        assert "kept in memory only" in broker.log()


def test_a_toml_file_and_flags_over_it(directory: Path):
    file = directory / "broker.toml"
    file.write_text(
        f"""
        name = "ward-3"
        data_dir = "data"
        listen = ["{ANY_PORT}"]
        anonymous = false
        [users]
        anna = "{hash_password("secret")}"
        [limits]
        subscriptions_max = 1
        [delivery]
        dead_letter_queue = "/queue/lost"
        """
    )
    broker = ServedBroker(None, file, listen=[])
    try:
        broker.start()
        broker.data_dir = directory / "data"  # relative to the file
        assert broker.status()["name"] == "ward-3"
        with BlockingPeer(broker.port, "1.2", "login:anna", "passcode:secret") as peer:
            peer.do("SUBSCRIBE", "id:1", "destination:/queue/a")
            peer.send(frame("SUBSCRIBE", "id:2", "destination:/queue/b"))
            assert "limits.subscriptions_max is 1" in peer.frame()["message"]
        with BlockingPeer(broker.port, None) as peer:
            peer.send(connect_frame())
            assert peer.frame()["code"] == "authentication"
        assert broker.terminate() == 0
    finally:
        broker.close()
    with served(directory / "other", file, "--name", "flagged", "--anonymous", "--user", "ben:pass") as flagged:
        assert flagged.status()["name"] == "flagged"
        for login in ((), ("login:anna", "passcode:secret"), ("login:ben", "passcode:pass")):
            BlockingPeer(flagged.port, "1.2", *login).close()


def test_an_unknown_field_is_refused_with_what_was_meant(directory: Path):
    file = directory / "broker.toml"
    file.write_text('nmae = "x"\n[limits]\nprefetch_max = "many"\nconnectoins_max = 5\n')
    text = refused("serve", file, process=True)
    assert f"{file}: nmae: no field has this name; did you mean name?" in text
    assert f"{file}: limits.connectoins_max: no field has this name; did you mean limits.connections_max?" in text
    assert f"{file}: limits.prefetch_max: expected a whole number" in text
    assert len(text.splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "words"), [(None, "can't be read"), ("name = ", "is not TOML"), ("\xff", "is not TOML")]
)
def test_a_file_that_is_no_configuration(directory: Path, content: str | None, words: str):
    file = directory / "broker.toml"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    text = refused("serve", file)
    assert str(file) in text
    assert words in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--listen", "http://127.0.0.1:0"], "scheme 'http' is not known"),
        (["--listen", "stomp://127.0.0.1"], "HOST:PORT"),
        (["--listen", "stomp+ssl://127.0.0.1:0"], "cert"),
        (["--listen", "stomp+ssl://127.0.0.1:0?cert=/none.pem&key=/none.pem"], "can't be read"),
        (["--listen", "stomp://0.0.0.0:0"], "allow=plaintext,anonymous"),
        (["--listen", "stomp://0.0.0.0:0?allow=plaintext"], "allow=plaintext,anonymous"),
        (["--listen", "stomp://0.0.0.0:0", "--user", "a:b", "--no-anonymous"], "allow=plaintext"),
        (["--listen", ANY_PORT, "--no-anonymous"], "at least one user"),
        (["--listen", ANY_PORT, "--name", ""], "name: expected"),
    ],
)
def test_what_is_refused_at_the_start(directory: Path, arguments: list[str], words: str):
    text = refused("serve", "--data", directory / "data", *arguments)
    assert words in text
    assert len(text.splitlines()) <= 2


def test_bad_flags(directory: Path):
    assert "NAME:PASSWORD" in refused("serve", "--user", "anna", status=2)
    assert "--nonsense" in refused("serve", "--nonsense", status=2)
    assert "LEVEL" in refused("serve", "--log-level", "loud", status=2).upper()


def test_beyond_loopback_when_it_is_asked_for(directory: Path):
    with served(directory / "data", listen=["stomp://0.0.0.0:0?allow=plaintext,anonymous"]) as broker:
        assert broker.url.startswith("stomp://0.0.0.0:")
        BlockingPeer(broker.port).close()


def test_a_port_in_use_is_refused(directory: Path):
    with served(directory / "data") as broker:
        text = refused("serve", "--data", directory / "other", "--listen", broker.url)
        assert "can't be opened" in text
        assert broker.url in text


def test_a_data_directory_in_use_is_refused(directory: Path):
    with served(directory / "data") as broker:
        text = refused("serve", "--data", directory / "data", "--listen", ANY_PORT, process=True)
        assert "another process" in text or "in use" in text
        assert str(directory / "data") in text
        BlockingPeer(broker.port).close()  # the first one is not harmed


def test_a_data_directory_that_is_something_else(directory: Path):
    (directory / "file").write_text("x")
    assert "can't be made" in refused("serve", "--data", directory / "file", "--listen", ANY_PORT)
    store = directory / "data" / "store"
    store.mkdir(parents=True)
    (store / "letter.txt").write_text("Dear Sir")
    text = refused("serve", "--data", directory / "data", "--listen", ANY_PORT)
    assert str(directory / "data") in text
    assert (store / "letter.txt").read_text() == "Dear Sir"


def test_a_start_after_a_full_stop_forgets_nothing_and_a_stale_socket_does_no_harm(directory: Path):
    with served(directory / "data") as broker:
        broker.kill()
        assert (directory / "data" / "control.sock").exists()
        broker.restart()
        assert broker.status()["role"] == "standalone"
        assert oct((directory / "data" / "control.sock").stat().st_mode & 0o777) == "0o600"
        assert broker.terminate() == 0
        assert not (directory / "data" / "control.sock").exists()


# ---- stopping


def test_sigterm_with_clients_and_work_in_hand(directory: Path):
    """Confirmed is confirmed, unacknowledged returns, and the clients learn why; all in bounded time."""
    with served(directory / "data") as broker:
        consumer, producer, idle = (BlockingPeer(broker.port) for _ in range(3))
        unconnected = BlockingPeer(broker.port, None)
        consumer.do("SUBSCRIBE", "id:1", "destination:/queue/a", "ack:client-individual", "activemq.prefetchSize:3")
        producer.send(frame("BEGIN", "transaction:t") + frame("SEND", "destination:/queue/a", "transaction:t"))
        sent = 0
        stop = threading.Event()

        def produce() -> None:
            nonlocal sent
            try:
                while not stop.is_set():
                    producer.send(frame("SEND", "destination:/queue/a", f"receipt:{sent}", body=b"%d" % sent))
                    sent += 1
            except OSError:
                pass  # the broker has closed the connection

        thread = threading.Thread(target=produce)
        thread.start()
        held = [consumer.frame() for _ in range(3)]
        started = time.monotonic()
        result: list[int] = []
        stopping = threading.Thread(target=lambda: result.append(broker.terminate()))
        stopping.start()
        answers = producer.end(15)
        stop.set()
        thread.join(10)
        for peer in (consumer, idle, unconnected):
            left = [each for each in peer.end() if each.command == "ERROR"]
            assert ["stopping" in each["message"] for each in left] == [True]
        stopping.join(15)
        assert result == [0]
        assert time.monotonic() - started < 8
        assert [each.command for each in answers[:-1]] == ["RECEIPT"] * (len(answers) - 1)
        assert answers[-1]["code"] == "closed"
        confirmed = [int(each["receipt-id"]) for each in answers[:-1]]
        assert confirmed == list(range(len(confirmed)))
        assert len(confirmed) >= 3
        for peer in (consumer, producer, idle, unconnected):
            peer.close()
        broker.restart()
        depth = broker.queue_status("a")["depth"]
        with BlockingPeer(broker.port) as other:
            other.send(frame("SUBSCRIBE", "id:1", "destination:/queue/a", "activemq.prefetchSize:32767"))
            found = [other.frame() for _ in range(depth)]
        bodies = [int(each.body) for each in found]
        assert bodies == list(range(len(bodies)))  # in place, none twice, nothing of the open transaction
        assert len(bodies) >= len(confirmed)
        assert [each.body for each in found if each["redelivered"] == "true"] == [each.body for each in held]


def test_sigterm_does_not_wait_for_ever_for_a_stalled_client(directory: Path):
    file = directory / "broker.toml"
    file.write_text("stop_timeout = 0.5\n")
    with served(directory / "data", file) as broker:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", broker.port))
        sock.sendall(connect_frame() + frame("SUBSCRIBE", "id:1", "destination:/queue/a", "receipt:s"))
        with BlockingPeer(broker.port) as sender:
            for number in range(20):
                sender.do("SEND", "destination:/queue/a", f"n:{number}", body=b"x" * 1_000_000)
        started = time.monotonic()
        assert broker.terminate() == 0
        assert time.monotonic() - started < 4
        sock.close()
        broker.restart()
        assert broker.queue_status("a")["depth"] > 0  # what it had not taken


def test_sigint_stops_in_good_order_too(directory: Path):
    with served(directory / "data") as broker:
        with BlockingPeer(broker.port) as peer:
            peer.do("SEND", "destination:/queue/a")
        os.kill(broker.pid, 2)
        assert broker._wait() == 0
        broker.restart()
        assert broker.queue_status("a")["depth"] == 1
