"""``pybroker send``, ``receive``, ``status``, ``store`` and ``hash-password``, as somebody types them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.serving import ANY_PORT, ServedBroker, call_pybroker, run_pybroker, served
from tests.support.wire import BlockingPeer


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory with a short name: the address of a control socket has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def broker() -> Iterator[ServedBroker]:
    with tempfile.TemporaryDirectory(prefix="pb-") as name, served(Path(name) / "data") as one:
        yield one


def run(*arguments: str | Path, stdin: bytes = b"", status: int = 0, process: bool = False) -> str:
    """Run a command that must end with this status; return what it printed."""
    done = (run_pybroker if process else call_pybroker)(*arguments, stdin=stdin)
    assert done.returncode == status, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    if status == 0:
        assert done.stderr == b""
        return done.stdout.decode()
    return done.stderr.decode()


# ---- send and receive


def test_send_and_receive(broker: ServedBroker):
    url = ("--url", broker.url)
    assert run("send", "/queue/s1", "grüße", "--header", "ward:3", "--header", "ratio:1:2", *url) == ""
    assert run("send", "/queue/s1", "--count", "2", "--transient", *url, stdin=b"from\0stdin\n", process=True) == ""
    shown = json.loads(run("receive", "/queue/s1", "--show-headers", *url))
    assert shown["body"] == "grüße"
    assert ["ward", "3"] in shown["headers"]
    assert ["ratio", "1:2"] in shown["headers"]
    assert run("receive", "/queue/s1", "--count", "2", *url, process=True) == "from\0stdin\n\n" * 2
    assert "no message within 0.2 s" in run("receive", "/queue/s1", "--timeout", "0.2", *url, status=1)


def test_receive_takes_no_more_than_it_was_asked_for(broker: ServedBroker):
    url = ("--url", broker.url)
    for body in "abc":
        run("send", "/queue/s2", body, *url)
    assert run("receive", "/queue/s2", *url) == "a\n"
    row = broker.queue_status("s2")
    assert (row["depth"], row["acknowledged"]) == (2, 1)
    assert run("receive", "/queue/s2", "--count", "2", *url) == "b\nc\n"


@pytest.mark.parametrize("command", [("send", "/queue/a", "x"), ("receive", "/queue/a")])
@pytest.mark.parametrize(
    "url", ["127.0.0.1:61613", "http://127.0.0.1:1", "stomp://127.0.0.1", "stomp://127.0.0.1:port", "stomp://[::1"]
)
def test_a_bad_url_is_refused(command: tuple[str, ...], url: str):
    text = run(*command, "--url", url, status=1)
    assert "it must look like stomp://HOST:PORT" in text
    assert len(text.splitlines()) == 1


def test_nobody_listens(broker: ServedBroker):
    text = run("send", "/queue/a", "x", "--url", "stomp://127.0.0.1:1", status=1, process=True)
    assert text.startswith("pybroker: no connection to stomp://127.0.0.1:1")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("command", ["send", "receive"])
def test_what_the_broker_refuses_is_one_line(broker: ServedBroker, command: str):
    text = run(command, "/nowhere/a", *(["x"] if command == "send" else []), "--url", broker.url, status=1)
    assert "must start with /queue/ or /topic/" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("header", ["nothing", ":value"])
def test_a_header_that_is_none_is_refused(broker: ServedBroker, header: str):
    text = run("send", "/queue/a", "x", "--header", header, "--url", broker.url, status=2)
    assert "NAME:VALUE" in text


def test_a_login(directory: Path):
    with served(directory / "data", "--user", "anna:se:cret", "--no-anonymous") as guarded:
        url = ("--url", guarded.url)
        run("send", "/queue/a", "x", "--user", "anna:se:cret", *url)
        assert run("receive", "/queue/a", "--user", "anna:se:cret", *url) == "x\n"
        for login in ((), ("--user", "anna:wrong")):
            text = run("send", "/queue/a", "x", *login, *url, status=1)
            assert "se:cret" not in text
            assert len(text.splitlines()) == 1


def test_tls(directory: Path):
    authority, pem, ca = trustme.CA(), directory / "server.pem", directory / "ca.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(pem)
    authority.cert_pem.write_to_path(ca)
    with served(directory / "data", listen=[f"stomp+ssl://127.0.0.1:0?cert={pem}&key={pem}"]) as secure:
        url = ("--url", secure.url)
        run("send", "/queue/a", "x" * 100_000, "--ca", ca, *url)
        assert run("receive", "/queue/a", "--ca", ca, *url) == "x" * 100_000 + "\n"
        text = run("send", "/queue/a", "x", *url, status=1)  # without the authority: not trusted
        assert "certificate" in text
        assert len(text.splitlines()) == 1


# ---- status


def test_status(broker: ServedBroker):
    assert broker.data_dir is not None
    name = "a-queue-with-a-long-name-of-its-own"
    with BlockingPeer(broker.port) as peer:
        for _ in range(3):
            peer.do("SEND", f"destination:/queue/{name}")
        peer.do("SUBSCRIBE", "id:s", "destination:/topic/t.>", "durable:true", "auto-delete:false")
        text = run("status", "--data", broker.data_dir, process=True)
        assert "role: standalone" in text
        assert f"listener: {broker.url}" in text
        assert "connections: 1" in text
        (line,) = [line for line in text.splitlines() if name in line]
        assert [word for word in line.replace("│", " ").split() if word.isdigit()][:2] == ["3", "0"]
        assert any("t.>" in line and "s" in line for line in text.splitlines())
        answer = json.loads(run("status", "--json", "--data", broker.data_dir))
        (row,) = [row for row in answer["destinations"] if row["name"] == name]
        assert (row["kind"], row["depth"], row["stored"], row["consumers"]) == ("queue", 3, 3, 0)


def test_status_of_nothing(directory: Path):
    text = run("status", "--data", directory, status=1)
    assert "no broker answers" in text
    assert len(text.splitlines()) == 1


# ---- store


@pytest.fixture
def filled(directory: Path) -> Path:
    """The data directory of a broker that has stopped, with five messages and a durable subscription in it."""
    with served(directory / "data") as one:
        with BlockingPeer(one.port, "1.2", "client-id:ward") as peer:
            peer.do("SUBSCRIBE", "id:1", "destination:/topic/t", "activemq.subscriptionName:sub")
            for number in range(5):
                peer.do("SEND", "destination:/queue/a", body=b"%d" % number * 1_000)
        assert one.terminate() == 0
    return directory / "data"


def test_verify_of_a_whole_store(filled: Path):
    text = run("store", "verify", filled)
    assert "nothing is wrong" in text
    (line,) = [line for line in text.splitlines() if " a " in line]
    assert "queue" in line
    assert "5" in line
    assert any("ward/sub" in line for line in text.splitlines())
    with served(filled) as again:
        assert again.queue_status("a")["depth"] == 5


@pytest.mark.parametrize("command", ["verify", "salvage"])
def test_a_store_that_a_broker_has_open_is_refused(filled: Path, command: str):
    with served(filled) as running:
        more = [filled.parent / "new"] if command == "salvage" else []
        text = run("store", command, filled, *more, status=1)
        assert str(filled) in text
        assert "another process" in text or "in use" in text
        assert len(text.splitlines()) == 1
        BlockingPeer(running.port).close()


@pytest.mark.parametrize("command", ["verify", "salvage"])
def test_a_directory_that_is_no_store(directory: Path, command: str):
    (directory / "notes.txt").write_text("x")
    for wrong in (directory, directory / "none"):
        more = [directory / "new"] if command == "salvage" else []
        text = run("store", command, wrong, *more, status=1)
        assert str(wrong) in text
        assert len(text.splitlines()) == 1
    assert sorted(each.name for each in directory.iterdir()) == ["notes.txt"]


def test_salvage_of_a_whole_store_and_serving_it(filled: Path):
    new = filled.parent / "new"
    text = run("store", "salvage", filled, new)
    assert "nothing is wrong" in text
    assert str(new) in text
    with served(new) as again, BlockingPeer(again.port) as peer:
        assert again.queue_status("a")["depth"] == 5
        peer.do("SEND", "destination:/topic/t")
    refusal = run("store", "salvage", filled, new, status=1)
    assert str(new) in refusal
    assert len(refusal.splitlines()) == 1


def test_a_damaged_store_is_not_served_and_salvaged(filled: Path):
    store = filled / "store"
    tables = sorted([*store.glob("*.ldb"), *store.glob("*.log")], key=lambda path: path.stat().st_size)
    data = bytearray(tables[-1].read_bytes())
    at = data.index(b"222222222222")  # within the body of the third message
    data[at : at + 4] = b"----"
    tables[-1].write_bytes(data)
    before = shutil.copytree(filled, filled.parent / "copy")
    damaged = call_pybroker("store", "verify", filled)
    assert damaged.returncode == 1
    assert b"Traceback" not in damaged.stderr
    salvaged = call_pybroker("store", "salvage", before, filled.parent / "new")
    assert salvaged.returncode == 1  # something was left behind
    assert b"Traceback" not in salvaged.stderr
    assert "problem" in salvaged.stdout.decode() + salvaged.stderr.decode()
    with served(filled.parent / "new") as again:
        rows = [row for row in again.status()["destinations"] if row["kind"] == "queue" and row["name"] == "a"]
        assert sum(row["depth"] for row in rows) < 5


# ---- passwords and help


def test_hash_password(directory: Path):
    encoded = run("hash-password", "--password", "secret").strip()
    assert "secret" not in encoded
    assert encoded != run("hash-password", "--password", "secret").strip()  # salted
    (directory / "b.toml").write_text(f'anonymous = false\nlisten = ["{ANY_PORT}"]\n[users]\nanna = "{encoded}"\n')
    broker = ServedBroker(None, directory / "b.toml", listen=[])
    try:
        run("send", "/queue/a", "x", "--user", "anna:secret", "--url", broker.start().url)
    finally:
        broker.close()


def test_help_and_version():
    text = run("--help")
    for command in ("serve", "send", "receive", "status", "store", "hash-password"):
        assert command in text
    assert "pybroker" in run("--version")
