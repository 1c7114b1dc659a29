"""What a traced broker did, in order: its system calls, the batches in LevelDB's log, and the frames on its sockets.

LevelDB's log format is doc/log_format.md of LevelDB; a batch is a `WriteBatch` (write_batch.cc). Nothing of pybroker or
plyvel is used to read them.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.crash.wire import Frame, FrameParser

CALLS = "write,pwrite64,writev,sendto,sendmsg,fdatasync,fsync"
BLOCK = 32_768  # bytes of a block of LevelDB's log
HEADER = 7  # bytes in front of each fragment: checksum, length, kind
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

_CALL = re.compile(r"^(\d+) +(\w+)\((\d+)<((?:->|[^>])*)>(.*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>.*= (-?\d+)")
_RESULT = re.compile(r"\) += (-?\d+)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


def why_not() -> str | None:
    """Why nothing can be traced here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed: the order of fsync and receipts is NOT shown here"
    tried = subprocess.run(["strace", "-f", "-e", "trace=write", "true"], capture_output=True, check=False)
    if tried.returncode:
        return f"strace may not trace here (ptrace): the order of fsync and receipts is NOT shown: {tried.stderr!r}"
    return None


def strace(output: Path) -> tuple[str, ...]:
    return ("strace", "-f", "-yy", "-xx", "-s", "100000000", "-e", f"trace={CALLS}", "-o", str(output))


@dataclass
class Call:
    """`began` and `ended` are line numbers of the trace: calls of several threads overlap."""

    name: str
    file: str  # path, or "TCP:[from->to]"
    data: bytes
    began: int
    ended: int
    result: int


def _unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def read_calls(output: Path) -> list[Call]:
    """All calls that ended, in the order in which they began."""
    calls: list[Call] = []
    unfinished: dict[tuple[str, str], Call] = {}
    for number, line in enumerate(output.read_text().splitlines()):
        if match := _CALL.match(line):
            process, name, _, file, rest = match.groups()
            if "\\x" in file:
                file = _unhex(file).decode()
            data = b"".join(map(_unhex, _STRING.findall(rest)))
            call = Call(name, file, data, number, number, -1)
            calls.append(call)
            if result := _RESULT.search(rest):
                call.result = int(result[1])
            else:
                assert "<unfinished" in rest, line
                unfinished[process, name] = call
        elif match := _RESUMED.match(line):
            process, name, result_text = match.groups()
            call = unfinished.pop((process, name))
            call.ended, call.result = number, int(result_text)
    return [call for call in calls if call.ended > call.began or call.result >= 0]


@dataclass
class Batch:
    """One LevelDB batch: `began` when the first of it was handed to the system, `synced` when its fdatasync had returned."""

    puts: dict[bytes, bytes]
    deletes: set[bytes]
    began: int
    synced: int | None


def read_batches(calls: list[Call]) -> list[Batch]:
    """The batches of all of the store's log files, in order."""
    batches: list[Batch] = []
    for file in dict.fromkeys(call.file for call in calls if re.search(r"/store/\d+\.log$", call.file)):
        writes = [call for call in calls if call.file == file and call.name in ("write", "pwrite64", "writev")]
        syncs = [call for call in calls if call.file == file and call.name in ("fdatasync", "fsync")]
        for start, stop, record in _records(b"".join(call.data for call in writes)):
            first, last = _call_at(writes, start), _call_at(writes, stop - 1)
            after = [call.ended for call in syncs if call.began > last.ended and call.result == 0]
            puts, deletes = _parse_batch(record)
            batches.append(Batch(puts, deletes, first.began, min(after, default=None)))
    return batches


def _call_at(writes: list[Call], offset: int) -> Call:
    for call in writes:
        if offset < len(call.data):
            return call
        offset -= len(call.data)
    raise AssertionError("behind the end")


def _records(stream: bytes) -> list[tuple[int, int, bytes]]:
    """(offset, end, record) of each whole record."""
    found = []
    at = began = 0
    parts = b""
    while at + HEADER <= len(stream):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(stream[at + 4 : at + 6], "little"), stream[at + 6]
        assert kind in (FULL, FIRST, MIDDLE, LAST), kind
        if kind in (FULL, FIRST):
            began, parts = at, b""
        parts += stream[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            found.append((began, at, parts))
    return found


def _parse_batch(record: bytes) -> tuple[dict[bytes, bytes], set[bytes]]:
    puts: dict[bytes, bytes] = {}
    deletes: set[bytes] = set()
    at = 12  # sequence and count

    def take() -> bytes:
        nonlocal at
        length = shift = 0
        while True:
            byte = record[at]
            at += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        at += length
        return record[at - length : at]

    while at < len(record):
        kind = record[at]
        at += 1
        key = take()
        if kind == 1:
            puts[key] = take()
        else:
            deletes.add(key)
    return puts, deletes


@dataclass
class SentFrame:
    """A frame on its way to a client. `began`: the call that had its first byte; `ended`: the one with its last."""

    frame: Frame
    began: int
    ended: int


def read_frames(calls: list[Call], port: int) -> list[SentFrame]:
    """The frames that the broker sent to its clients."""
    found: list[SentFrame] = []
    head = f"TCP:[127.0.0.1:{port}->"
    for file in dict.fromkeys(call.file for call in calls if call.file.startswith(head)):
        parser = FrameParser()
        sends = [call for call in calls if call.file == file and call.result > 0]
        starts: list[tuple[int, Call]] = []
        offset = 0
        for call in sends:
            starts.append((offset, call))
            data = call.data[: call.result]
            offset += len(data)
            for at, frame in parser.feed(data):
                began = max((start, other.began) for start, other in starts if start <= at)[1]
                found.append(SentFrame(frame, began, call.ended))
    return found
