"""Compiled selectors: made once of each text, and kept. Owns the cache, and the reading of headers for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

from pybroker.errors import InvalidSelector
from pybroker.message import Message, decode_headers
from pybroker.selectors.evaluation import Truth, header_name, truth_of
from pybroker.selectors.syntax import Comparison, Junction, Literal, Name, Node, invalid, parse

KEPT_MAX = 4_096  # header blocks whose headers are kept: a few megabytes
KEPT_BYTES_MAX = 512  # of such a block
CACHED_MAX = 1_000  # compiled selectors that are remembered beside those in use


class Selector(NamedTuple):
    """A selector that was understood.

    text     as it was given
    matches  whether it is true for a message (unknown is not true); never raises for a well-formed header block;
             for another one InvalidMessage or UnicodeDecodeError
    equals   (header, value) when it can only be true where that header is equal to that text or number, else None
    """

    text: str
    matches: Callable[[Message], bool]
    equals: tuple[str, str | int | float] | None


def compile_selector(text: str, bytes_max: int | None = None) -> Selector:
    """The selector of a text. `bytes_max`: how long it may be. Raises InvalidSelector, which says where the fault is."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise invalid(text, error.start, "this is half of a character, which UTF-8 does not have") from None
    if bytes_max is not None and size > bytes_max:
        raise InvalidSelector(
            f"the selector has {size} bytes, and limits.selector_bytes_max is {bytes_max}: make it shorter",
            position=len(text),
        )
    return _compile(text)


@lru_cache(maxsize=CACHED_MAX)
def _compile(text: str) -> Selector:
    node = parse(text)
    return Selector(text, _matcher(truth_of(node)), _equality(node))


def _matcher(truth: Truth) -> Callable[[Message], bool]:
    def matches(message: Message) -> bool:
        return truth(headers_of(message), message) is True

    return matches


_last: tuple[bytes, Mapping[str, str]] = (b"", {})


def headers_of(message: Message) -> Mapping[str, str]:
    """A message's headers, the first of each name.

    Those of the last message are kept: many selectors may be asked about it. Short ones are kept longer: a selective consumer of
    a queue is asked about all that others left, again and again.
    """
    global _last
    block, headers = _last
    if block is not message.header_block:
        block = message.header_block
        headers = _kept(block) if len(block) <= KEPT_BYTES_MAX else _read(block)
        _last = block, headers
    return headers


def _read(block: bytes) -> Mapping[str, str]:
    return dict(reversed(decode_headers(block)))


_kept = lru_cache(maxsize=KEPT_MAX)(_read)


def _equality(node: Node) -> tuple[str, str | int | float] | None:
    """Of a comparison by ``=``, or the first such one among parts that must all be true."""
    if isinstance(node, Junction) and node.every:
        return next((found for part in node.parts if (found := _equality(part))), None)
    if not isinstance(node, Comparison) or node.operator != "=":
        return None
    name, literal = (node.left, node.right) if isinstance(node.left, Name) else (node.right, node.left)
    if not isinstance(name, Name) or not isinstance(literal, Literal) or literal.value.__class__ is bool:
        return None
    header = header_name(name.name)
    return None if header is None else (header, literal.value)
