"""Errors from what the native protocol says of them (ERROR, REFUSED, FAILED, ENDED: code and text). Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from pybroker import errors
from pybroker.errors import BrokerError, LimitExceeded, NotLeader, ProtocolError

_LIMIT = re.compile(r"(.*): limit ([a-z_.]+) is (\d{1,19})(.*)", re.DOTALL)

_BY_CODE: dict[str, type[BrokerError]] = {
    each.code: each
    for each in vars(errors).values()
    if isinstance(each, type) and issubclass(each, BrokerError) and not issubclass(each, LimitExceeded | NotLeader)
}
del _BY_CODE[errors.CorruptRecord.code]  # made of a key: not of what a peer says


def error_of(code: str, text: str, details: Mapping[str, Any] | None = None) -> BrokerError:
    """The error with that code; a BrokerError with the text for a code that is not known."""
    if code == NotLeader.code:
        leader, urls = (details or {}).get("leader", ""), (details or {}).get("urls", ())
        known = tuple(url for url in urls if isinstance(url, str)) if isinstance(urls, tuple) else ()
        return NotLeader(text, leader if isinstance(leader, str) else "", known)
    if code == LimitExceeded.code:
        found = _LIMIT.fullmatch(text)
        if found is None:
            return ProtocolError(text)
        return LimitExceeded(found[2], int(found[3]), found[1] + found[4])
    return _BY_CODE.get(code, BrokerError)(text)
