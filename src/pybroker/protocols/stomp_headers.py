"""STOMP headers as bytes and as text, and whole frames to send, as each version escapes them.

Owns escaping. It must never know what a header means. Follows "Value Encoding" and "Augmented BNF" of STOMP 1.0, 1.1
and 1.2 (https://stomp.github.io). A colon inside a value that should have been escaped is taken as it is; an escape
that the version does not define is an error. The version is None in CONNECT and CONNECTED frames.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from pybroker.errors import ProtocolError
from pybroker.message import decode_headers, escape

VERSIONS = ("1.2", "1.1", "1.0")  # what is spoken, best first
HEARTBEAT = b"\n"

Headers = list[tuple[str, str]]

_BACKSLASH = 92
_ESCAPE_SEQUENCE = re.compile(r"\\(.?)", re.DOTALL)
_UNESCAPES = {"1.2": {"r": "\r", "n": "\n", "c": ":", "\\": "\\"}, "1.1": {"n": "\n", "c": ":", "\\": "\\"}}
_ESCAPES_1_1 = str.maketrans({"\\": "\\\\", "\n": "\\n", ":": "\\c"})


def shown(value: bytes | str) -> str:
    """A peer's text for an error message: quoted and cut to 80 characters."""
    text = value[:320].decode("utf-8", "replace") if isinstance(value, bytes) else value
    return repr(text if len(text) <= 80 else text[:77] + "...")


def decode_head(head: bytes, version: str | None) -> Headers:
    """Decode a frame's header lines; raise `ProtocolError` with how to mend them.

    Without a version (CONNECT and CONNECTED frames), and in 1.0, nothing is escaped.
    """
    try:
        lines = head.decode().split("\n")
    except UnicodeDecodeError as error:
        wrong = head[head.rfind(b"\n", 0, error.start) + 1 :].partition(b"\n")[0]
        raise ProtocolError(f"the header {shown(wrong)} is not valid UTF-8") from None
    unescapes = _UNESCAPES.get(version) if version and _BACKSLASH in head else None
    pairs = []
    for line in lines[1:-1]:
        name, colon, value = line.partition(":")
        if not colon:
            raise ProtocolError(f"the header {shown(line)} has no colon: write it as name:value")
        if not name:
            raise ProtocolError(f"the header {shown(line)} has an empty name")
        if unescapes and "\\" in line:
            name = _unescape(name, unescapes, version)
            value = _unescape(value, unescapes, version)
        pairs.append((name, value))
    return pairs


def _unescape(text: str, unescapes: Mapping[str, str], version: str | None) -> str:
    def replace(match: re.Match[str]) -> str:
        try:
            return unescapes[match[1]]
        except KeyError:
            known = ", ".join("\\" + name for name in unescapes)
            raise ProtocolError(
                f"header escape {shown(match[0])} is not defined in STOMP {version}, which has {known}"
            ) from None

    return _ESCAPE_SEQUENCE.sub(replace, text)


def encode_pair(name: str, value: str, version: str | None) -> str:
    """One header line with its line feed, as ``version`` can say it.

    1.1 has no escape for a carriage return, which its grammar allows in a value: it goes as it is. 1.0 has no
    escapes: a line feed in a value becomes a space, and a header whose name has a colon or line feed is left out
    (it would be read as another header).
    """
    if version == "1.2":
        return f"{escape(name)}:{escape(value)}\n"
    if version == "1.1":
        return f"{name.translate(_ESCAPES_1_1)}:{value.translate(_ESCAPES_1_1)}\n"
    if ":" in name or "\n" in name:
        return ""
    return f"{name}:{value}\n".replace("\n", " ", value.count("\n"))


def encode_frame(
    command: str, headers: Iterable[tuple[str, str]], version: str | None, body: bytes | None = None
) -> bytes:
    """Make a frame; with a body (also an empty one) it gets a content-length."""
    lines = [command, "\n"]
    lines += [encode_pair(name, value, version) for name, value in headers]
    if body is None:
        return "".join(lines).encode() + b"\n\0"
    lines.append(f"content-length:{len(body)}\n\n")
    return b"".join(("".join(lines).encode(), body, b"\0"))


def block_for(block: bytes, version: str | None) -> bytes:
    """A message's header block (escaped as 1.2 has it) as ``version`` says it."""
    if version == "1.2" or _BACKSLASH not in block:
        return block
    return "".join(encode_pair(name, value, version) for name, value in decode_headers(block)).encode()
