"""Cuts a byte stream into STOMP frames, for versions 1.0, 1.1 and 1.2.

Owns framing and the limits on a frame. It must never know which side of a connection it serves, nor what
a frame means: the session tells it which commands may come now (`FrameReader.expect`). Follows "STOMP Frames",
"Size Limits" and "Augmented BNF" of the specifications (https://stomp.github.io).

Where the specifications leave room:

* Lines may end in CR LF in 1.2, and before the version is known. In 1.0 and 1.1 a CR is part of the line. End-of-line
  octets between frames are skipped in every version: they are heart-beats or padding.
* A NUL at the start of a header line means that the empty line after the headers is missing, and is an error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from pybroker.config import StompLimits
from pybroker.errors import BrokerError, LimitExceeded, ProtocolError
from pybroker.protocols.stomp_headers import shown

# A frame: its command, its header lines without content-length, its body. The header lines start with the command's
# end of line and each ends in a line feed (b"\nname:value\n", or b"\n" for none), so that a search for
# b"\nname:" finds whole names only.
Frame = tuple[bytes, bytes, bytes]

_LF, _CR, _NUL = 10, 13, 0  # `10 in data` is ten times faster than `b"\n" in data` in CPython 3.11
_ENDS_OF_LINES = re.compile(rb"(?:\r?\n)+")
_FAST_BYTES_MAX = 4096  # longest header block that the fast path looks at
_LENGTH_DIGITS_MAX = 18  # digits of a content-length that are turned into a number at all


class _Refused(Exception):
    """Carries a failure, and the header lines known by then, out of the depth of the reader."""

    def __init__(self, error: BrokerError, head: bytes = b"\n") -> None:
        super().__init__()
        self.error = error
        self.head = head


class FrameReader:
    """Cuts what one peer sends into frames, within limits.

    ``failure`` is None until the peer breaks the protocol or passes a limit; after that nothing more is read and
    ``failed_head`` has the header lines of the frame at fault, as far as they are known.
    The reader holds at most one frame (as its limits allow) and what one `receive` brought, as long as its owner
    reads until `read` returns nothing before it receives more.
    """

    __slots__ = (
        "_buffer",
        "_cap",
        "_carriage_returns",
        "_checked",
        "_commands",
        "_ended",
        "_fast_bytes",
        "_limits",
        "_need",
        "_offset",
        "_partial_headers",
        "_partial_lines",
        "_pending",
        "_sought",
        "_spaces",
        "_stopped",
        "_waiting",
        "failed_head",
        "failure",
    )

    def __init__(self, limits: StompLimits) -> None:
        self._limits = limits
        # A header line has at least two octets: below this many no count and no length can be passed.
        self._fast_bytes = min(
            _FAST_BYTES_MAX, limits.header_bytes_max, limits.header_block_bytes_max, 2 * limits.header_count_max
        )
        self._commands: Mapping[bytes, bool] = {}
        self._carriage_returns = True
        self._spaces = True
        self._buffer = b""
        self._offset = 0
        self._pending = bytearray()  # received, not yet joined to the buffer: it could not complete the frame
        self._ended = False
        self._stopped = False
        self.failure: BrokerError | None = None
        self.failed_head = b"\n"
        # What an incomplete frame waits for: `_need` bytes in all; or the byte `_sought`, or more than `_cap` bytes.
        self._waiting = True
        self._need = 0
        self._sought = -1
        self._cap = 0
        self._checked = 0
        # An incomplete frame that was read so far, relative to the offset: no line is read twice.
        self._partial_lines: tuple[bytes, int, int, list[bytes]] | None = None
        self._partial_headers: tuple[bytes, bytes, int, int] | None = None

    def expect(self, commands: Mapping[bytes, bool], version: str | None) -> None:
        """Say which commands may come now, each with whether it may have a body, and by which version's rules."""
        self._commands = commands
        self._carriage_returns = version in (None, "1.2")
        self._spaces = version in (None, "1.0")  # 1.0 examples have ``name: value``

    @property
    def buffered_bytes(self) -> int:
        """Bytes received and not yet read as frames."""
        return len(self._buffer) - self._offset + len(self._pending)

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer; ``b""`` says that there will be no more."""
        if self._stopped:
            return
        if not data:
            self._ended = True
        elif self._offset == len(self._buffer) and not self._pending:
            self._buffer = data
            self._offset = 0
            self._waiting = False
        else:
            self._pending += data

    def stop(self) -> None:
        """Read nothing more, and forget what was not read."""
        self._stopped = True
        self._buffer = b""
        self._offset = 0
        self._pending = bytearray()
        self._waiting = True
        self._partial_lines = self._partial_headers = None

    def read(self, count_max: int) -> list[Frame]:
        """Return at most ``count_max`` frames; fewer only when more bytes are needed or the peer failed."""
        frames: list[Frame] = []
        try:
            while not self._waiting or self._gather():
                if not self._read_into(frames, count_max):
                    break
        except _Refused as refused:
            self.failure = refused.error
            self.failed_head = refused.head
            self.stop()
        return frames

    def _read_into(self, frames: list[Frame], count_max: int) -> bool:
        """Read frames from the buffer; return whether all that is here was read."""
        buffer = self._buffer
        offset = self._offset
        size = len(buffer)
        find = buffer.find
        commands = self._commands
        fast_bytes = self._fast_bytes
        command_bytes = self._limits.command_bytes_max + 1
        body_bytes_max = self._limits.body_bytes_max
        slow = self._partial_lines is not None or self._partial_headers is not None
        try:
            while len(frames) < count_max:
                if offset >= size:
                    self._wait()
                    return True
                if buffer[offset] <= _CR and (ends := _ENDS_OF_LINES.match(buffer, offset)):
                    offset = ends.end()
                    continue
                # The fast path: a plain frame that is here as a whole. Whatever it can't settle, the slow path
                # reads again from the start of the frame.
                line_end = find(b"\n", offset, offset + command_bytes)
                head_end = find(b"\n\n", line_end, line_end + fast_bytes) if line_end > 0 and not slow else -1
                if head_end >= 0:
                    command = buffer[offset:line_end]
                    head = buffer[line_end : head_end + 1]
                    if _CR not in head and _NUL not in head and command in commands:
                        body_start = head_end + 2
                        at = head.find(b"\ncontent-length:")
                        if at < 0:
                            body_end = find(b"\0", body_start, body_start + body_bytes_max + 1)
                        else:
                            stop = head.find(b"\n", at + 16)
                            digits = head[at + 16 : stop]
                            body_end = -1
                            if digits.isdigit() and stop - at < 16 + _LENGTH_DIGITS_MAX:
                                length = int(digits)
                                body_end = body_start + length
                                if length > body_bytes_max or body_end >= size or buffer[body_end]:
                                    body_end = -1
                                head = head[:at] + head[stop:]
                        if body_end >= 0 and (body_end == body_start or commands[command]):
                            frames.append((command, head, buffer[body_start:body_end]))
                            offset = body_end + 1
                            if offset < size and buffer[offset] == _LF:  # many clients end a frame so
                                offset += 1
                            continue
                self._offset = offset
                next_offset = self._read_slowly(frames, offset)
                if next_offset < 0:
                    return True
                offset = next_offset
                slow = False
            return False
        finally:
            if offset == size:  # lets go of a large buffer at once
                self._buffer = b""
                offset = 0
            self._offset = offset

    def _read_slowly(self, frames: list[Frame], offset: int) -> int:
        """Read one frame of any kind at ``offset``; return where it ends, or -1 when it is not all here."""
        if self._partial_headers is None and not self._read_headers(offset):
            return -1
        assert self._partial_headers is not None
        command, head, body_start, length = self._partial_headers
        buffer = self._buffer
        body_start += offset
        if not self._commands[command] and (length > 0 or buffer[body_start : body_start + 1] not in (b"", b"\0")):
            raise _Refused(
                ProtocolError(f"a {command.decode()} frame can't have a body: end it with a NUL after the empty line"),
                head,
            )
        body_bytes_max = self._limits.body_bytes_max
        if length < 0:
            body_end = buffer.find(b"\0", body_start, body_start + body_bytes_max + 1)
            if body_end < 0:
                if len(buffer) - body_start > body_bytes_max:
                    raise _Refused(LimitExceeded("stomp.body_bytes_max", body_bytes_max, "the body is too long"), head)
                self._wait(sought=_NUL, cap=body_start - offset + body_bytes_max)
                if not self._commands[command]:
                    self._wait(need=body_start - offset + 1)
                return -1
        else:
            body_end = body_start + length
            if body_end >= len(buffer):
                self._wait(need=body_end - offset + 1)
                return -1
            if buffer[body_end]:
                raise _Refused(
                    ProtocolError(
                        f"no NUL follows the {length} octets of the body: "
                        "content-length must be the number of octets between the empty line and the NUL"
                    ),
                    head,
                )
        frames.append((command, head, buffer[body_start:body_end]))
        self._partial_headers = None
        return body_end + 1

    def _read_headers(self, offset: int) -> bool:
        """Read a command and header lines line by line into `_partial_headers`; return False when not all here."""
        buffer, limits = self._buffer, self._limits
        if self._partial_lines is None:
            command, position = self._read_command(offset)
            if not command:
                return False
            lines: list[bytes] = []
            block_left = limits.header_block_bytes_max
        else:
            command, position, block_left, lines = self._partial_lines
            position += offset
        while True:
            allowed = max(0, min(limits.header_bytes_max, block_left - 1))
            end = buffer.find(b"\n", position, position + allowed + 2)
            line = buffer[position : end if end >= 0 else position + allowed + 2]
            if self._carriage_returns and line.endswith(b"\r"):
                line = line[:-1]
            if line:
                self._check_line(command, line, lines, allowed, end >= 0)
            if end < 0:
                self._partial_lines = (command, position - offset, block_left, lines)
                # Looked at again with the first octet of a line, and with the first one too many (after it a CR may
                # still turn out to end the line).
                here = len(buffer) - position
                self._wait(sought=_LF, cap=position - offset + (max(allowed, here) if line else here))
                return False
            if not line:
                break
            lines.append(line)
            block_left -= len(line) + 1
            position = end + 1
        self._partial_lines = None
        head = b"\n" + b"\n".join(lines) + b"\n" if lines else b"\n"
        length, head = self._cut_content_length(head)
        self._partial_headers = (command, head, end + 1 - offset, length)
        return True

    def _read_command(self, offset: int) -> tuple[bytes, int]:
        """Return a frame's command and where its headers start, or ``b""`` when its line is not all here."""
        buffer, maximum = self._buffer, self._limits.command_bytes_max
        end = buffer.find(b"\n", offset, offset + maximum + 2)
        line = buffer[offset : end if end >= 0 else offset + maximum + 2]
        if _NUL in line[: maximum + 1]:
            raise _Refused(
                ProtocolError(
                    f"a frame's first line must be a command and end in a line feed, not {shown(line[: line.index(_NUL) + 1])}"
                )
            )
        command = line[:-1] if self._carriage_returns and line.endswith(b"\r") else line
        if len(command) > maximum:
            raise _Refused(
                LimitExceeded("stomp.command_bytes_max", maximum, f"the command {shown(line[:maximum])}... is too long")
            )
        if end < 0:
            self._wait(cap=0)  # short: looked at whatever comes
            return b"", 0
        if command not in self._commands:
            expected = ", ".join(name.decode() for name in self._commands)
            raise _Refused(ProtocolError(f"command {shown(command)} can't come here: expected {expected}"))
        return command, end + 1

    def _check_line(self, command: bytes, line: bytes, lines: list[bytes], allowed: int, whole: bool) -> None:
        limits = self._limits
        error: BrokerError
        if line[0] == _NUL:
            name = command.decode()
            error = ProtocolError(f"the {name} frame ends inside its headers: put an empty line before the NUL")
        elif len(lines) >= limits.header_count_max:
            error = LimitExceeded("stomp.header_count_max", limits.header_count_max, "a frame has too many headers")
        elif len(line) > allowed == limits.header_bytes_max:
            error = LimitExceeded(
                "stomp.header_bytes_max", allowed, f"the header {shown(line[: min(allowed, 40)])}... is too long"
            )
        elif len(line) > allowed:
            maximum = limits.header_block_bytes_max
            error = LimitExceeded("stomp.header_block_bytes_max", maximum, "the headers of one frame are too long")
        elif whole and self._carriage_returns and _CR in line:
            error = ProtocolError(f"the header {shown(line)} has a carriage return inside: in 1.2 write it as \\r")
        else:
            return
        raise _Refused(error, b"\n" + b"".join(before + b"\n" for before in lines))

    def _cut_content_length(self, head: bytes) -> tuple[int, bytes]:
        """Return the first content-length (-1 = none) and the header lines without it."""
        at = head.find(b"\ncontent-length:")
        if at < 0:
            return -1, head
        stop = head.find(b"\n", at + 16)
        digits = head[at + 16 : stop]
        head = head[:at] + head[stop:]
        if self._spaces:
            digits = digits.strip(b" ")
        if not digits.isdigit():  # of bytes: ASCII digits only, no sign, no space, not empty
            raise _Refused(ProtocolError(f"content-length must be a whole number from 0, not {shown(digits)}"), head)
        if len(digits) > _LENGTH_DIGITS_MAX or int(digits) > self._limits.body_bytes_max:
            what = f"a content-length of {shown(digits)} is too much"
            raise _Refused(LimitExceeded("stomp.body_bytes_max", self._limits.body_bytes_max, what), head)
        return int(digits), head

    def _wait(self, *, need: int = 0, sought: int = -1, cap: int = 0) -> None:
        self._waiting = True
        self._need, self._sought, self._cap, self._checked = need, sought, cap, 0

    def _gather(self) -> bool:
        """Join what was received to the buffer, if it can take reading further; say so."""
        pending = self._pending
        rest = len(self._buffer) - self._offset
        if not pending:
            if self._ended and rest and not self._stopped:
                raise _Refused(ProtocolError("the connection ended inside a frame"))
            return False
        total = rest + len(pending)
        if rest:
            if self._need:
                ready = total >= self._need
            else:
                ready = total > self._cap or pending.find(self._sought, self._checked) >= 0
                self._checked = len(pending)
            if not ready:
                if self._ended:
                    raise _Refused(ProtocolError("the connection ended inside a frame"))
                return False
        # Once for all frames that were received, never once for each frame.
        self._buffer = b"".join((memoryview(self._buffer)[self._offset :], pending))
        self._offset = 0
        self._pending = bytearray()
        self._waiting = False
        return True
