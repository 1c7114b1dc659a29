"""How a client over the network behaves: `ConnectOptions`. Owns its fields, their defaults, and reading them from a URL's query."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from pybroker.errors import ConfigurationError

Spread = Literal["random", "first"]
Elsewhere = Literal["doubt", "repeat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectOptions:
    """Options of `pybroker.connect`. Times in seconds.

    deadline          for which an operation, or the first connection, may wait for a broker before it raises BrokerUnavailable
                      (not sent) or SendInDoubt (sent, and not answered); ``inf`` = for ever
    connect_timeout   for one try: name, connection, TLS, hand-shake
    reconnect_delay   before the next round of tries when all known brokers were tried; doubled each time, with jitter
    reconnect_delay_max  up to this
    heartbeat_interval  a side that has sent nothing for so long says that it is there; silent for three times that, it is lost
    close_timeout     for which a client that is closed waits for what was not answered
    spread            which broker is chosen of several: ``random`` spreads clients over them, ``first`` takes the first in the
                      order given that answers. (After a lost connection the same broker, or its set, is tried first.)
    own_set_first     for which, after a lost connection, no broker of another set is tried while something is not confirmed: only
                      the own set, whose next leader may not be there yet, knows what is stored; 0 = not at all
    elsewhere         what becomes of sends that were not confirmed when the broker that answers now knows nothing of them:
                      ``doubt`` raises SendInDoubt, ``repeat`` sends them again: a message may then be delivered twice (with
                      the same message id)
    learn             whether brokers that the network tells of are used too (only with ``failover:`` and ``discovery:``)
    addresses_max     brokers that are remembered so
    discovery_secret  of the network's announcements; "" = they are not signed
    """

    deadline: float = 30.0
    connect_timeout: float = 5.0
    reconnect_delay: float = 0.05
    reconnect_delay_max: float = 5.0
    heartbeat_interval: float = 5.0
    close_timeout: float = 2.0
    own_set_first: float = 2.0
    spread: Spread = "random"
    elsewhere: Elsewhere = "doubt"
    learn: bool = True
    addresses_max: int = 1_000
    discovery_secret: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        for name in (
            "deadline",
            "connect_timeout",
            "reconnect_delay",
            "reconnect_delay_max",
            "close_timeout",
            "own_set_first",
        ):
            _check_seconds(name, getattr(self, name), infinite=name == "deadline", zero=name == "own_set_first")
        if not 0.01 <= _check_seconds("heartbeat_interval", self.heartbeat_interval) <= 86_400:
            raise ConfigurationError("option heartbeat_interval: expected 0.01 to 86400 seconds")
        if self.reconnect_delay_max < self.reconnect_delay:
            raise ConfigurationError("option reconnect_delay_max: expected no less than reconnect_delay")
        for name, known in (("spread", get_args(Spread)), ("elsewhere", get_args(Elsewhere))):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"option {name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")
        if isinstance(self.addresses_max, bool) or not isinstance(self.addresses_max, int) or self.addresses_max < 1:
            raise ConfigurationError(
                f"option addresses_max: expected a whole number above 0, got {self.addresses_max!r}"
            )
        if not isinstance(self.learn, bool):
            raise ConfigurationError(f"option learn: expected True or False, got {self.learn!r}")
        if not isinstance(self.discovery_secret, str):
            raise ConfigurationError("option discovery_secret: expected text")


def _check_seconds(name: str, value: object, infinite: bool = False, zero: bool = False) -> float:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and (value > 0 or (zero and value == 0))
    if not fits or not (infinite or math.isfinite(value)):  # type: ignore[arg-type]
        raise ConfigurationError(
            f"option {name}: expected seconds {'from' if zero else 'above'} 0{' or inf' if infinite else ''}, got {value!r}"
        )
    return float(value)  # type: ignore[arg-type]


_KINDS: dict[str, str] = {each.name: str(each.type) for each in fields(ConnectOptions)}
IN_URL = tuple(name for name in _KINDS if name != "discovery_secret")  # URLs are shown; secrets are not


def with_options(base: ConnectOptions, given: Mapping[str, str]) -> ConnectOptions:
    """The options with those changed that a URL gives as texts. Raises ConfigurationError."""
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in IN_URL:
            close = difflib.get_close_matches(name, IN_URL, n=1)
            meant = f"did you mean {close[0]}?" if close else f"known are {', '.join(IN_URL)}"
            raise ConfigurationError(f"option {name!r} is not known ({meant})")
        kind = _KINDS[name]
        try:
            if kind == "float":
                values[name] = float(text)
            elif kind == "int":
                values[name] = int(text)
            elif kind == "bool":
                values[name] = {"true": True, "false": False}[text]
            else:
                values[name] = text
        except (ValueError, KeyError):
            wanted = {"float": "a number of seconds", "int": "a whole number", "bool": "true or false"}[kind]
            raise ConfigurationError(f"option {name}: expected {wanted}, got {text[:80]!r}") from None
    return replace(base, **values) if values else base
