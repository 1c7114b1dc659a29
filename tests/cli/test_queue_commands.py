"""``pybroker browse`` and ``pybroker queue``, as somebody types them."""

from __future__ import annotations

import json
import tempfile
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.test_commands import run
from tests.support.serving import ServedBroker, served


@pytest.fixture(scope="module")
def broker() -> Iterator[ServedBroker]:
    with tempfile.TemporaryDirectory(prefix="pb-") as name, served(Path(name) / "data") as one:
        yield one


def fill(broker: ServedBroker, name: str, count: int) -> tuple[str, Path]:
    run("send", f"/queue/{name}", "grüße", "--header", "ward:3", "--url", broker.url)
    run("send", f"/queue/{name}", "x", "--header", "ward:4", "--count", str(count - 1), "--url", broker.url)
    return "--data", broker.data_dir


def test_browse(broker: ServedBroker):
    data = fill(broker, "b", 300)
    text = run("browse", "/queue/b", "--limit", "1", *data)
    assert "grüße" in text
    assert "ward: 3" in text
    assert "300" not in text
    rows = [json.loads(line) for line in run("browse", "/queue/b", "--json", *data).splitlines()]
    assert len(rows) == 300
    assert b64decode(rows[0]["body"]).decode() == "grüße"
    assert ["ward", "3"] in rows[0]["headers"]
    (row,) = [
        json.loads(line) for line in run("browse", "/queue/b", "--selector", "ward = 3", "--json", *data).splitlines()
    ]
    assert row["outstanding"] is False
    assert "body" not in json.loads(run("browse", "/queue/b", "--limit", "1", "--headers-only", "--json", *data))
    assert run("browse", "/queue/none", *data) == ""
    assert broker.queue_status("b")["depth"] == 300


def test_a_message_does_nothing_to_the_terminal_that_shows_it(broker: ServedBroker):
    body = "one\ntwo\x1b[2J\r\x9b2J\u202e\tgrüße"
    run("send", "/queue/t", body, "--header", "note:a\x1b]0;b", "--url", broker.url)
    text = run("browse", "/queue/t", "--data", broker.data_dir)
    assert "  one\ntwo\\x1b[2J\\r\\x9b2J\\u202e\tgrüße\n" in text
    assert "  note: a\\x1b]0;b\n" in text
    row = json.loads(run("browse", "/queue/t", "--json", "--data", broker.data_dir))
    assert b64decode(row["body"]).decode() == body
    assert ["note", "a\x1b]0;b"] in row["headers"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("browse", "/topic/a"), "can't be looked into"),
        (("browse", "/queue/a", "--selector", "a ="), "selector"),
        (("queue", "move", "/queue/b", "/queue/b"), "itself"),
        (("queue", "show", "/queue/none"), "there is no /queue/none"),
        (("queue", "show", "/topic/b"), "is no queue"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(broker: ServedBroker, arguments: tuple[str, ...], words: str):
    text = run(*arguments, "--data", broker.data_dir, status=1)
    assert words in text
    assert len(text.splitlines()) == 1


def test_purge_move_copy_list_and_show(broker: ServedBroker):
    data = fill(broker, "m", 600)
    assert run("queue", "copy", "/queue/m", "/queue/copy", *data) == "600 messages copied\n"
    assert run("queue", "move", "/queue/m", "/queue/to", "--selector", "ward = 3", *data) == "1 messages moved\n"
    assert run("queue", "move", "/queue/m", "/queue/to", "--limit", "9", *data) == "9 messages moved\n"
    done = json.loads(run("queue", "purge", "/queue/m", "--json", *data))
    assert done == {"count": 590, "outstanding": 0, "unread": 0, "refused": ""}
    rows = {row["name"]: row for row in json.loads(run("queue", "list", "--json", *data))}
    assert {name: rows[name]["ready"] for name in ("m", "to", "copy")} == {"m": 0, "to": 10, "copy": 600}
    assert rows["m"]["removed"] == 600
    assert "copy" in run("queue", "list", *data)
    assert broker.terminate() == 0
    broker.start()
    shown = json.loads(run("queue", "show", "/queue/copy", "--json", *data))
    assert shown["ready"] == 600
    assert shown["bytes"] > 600
    assert shown["oldest_ms"] > 1_600_000_000_000
    assert "oldest: " in run("queue", "show", "/queue/copy", *data)
