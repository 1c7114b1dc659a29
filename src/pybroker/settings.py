"""From a TOML file, a `BrokerConfig` and keyword overrides to a checked, frozen `BrokerConfig`.

Owns the checks: types (strict: ``"5"`` is no number), ranges, and what one field means for another. The shape and the
defaults belong to `pybroker.config`. Opens no file but the TOML file itself, and no socket. A value is refused with
its path and what was expected, one line per fault; what stands in ``users`` or is a secret is never repeated in a text.
What belongs together of a replica set's fields is in `pybroker.replica_settings`, of the network's in `pybroker.network_settings`.

pydantic does the type checks. It is imported when the first configuration is made: at ``import pybroker`` it would
add a tenth of a second to every program, also to those that only connect.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_type_hints
from zoneinfo import ZoneInfo

from pybroker.config import (
    BrokerConfig,
    DeliveryPolicy,
    Limits,
    NativeLimits,
    NetworkConfig,
    ReplicaSetConfig,
    RoutingConfig,
    StompLimits,
)
from pybroker.destination import QUEUE, parse_destination
from pybroker.errors import ConfigurationError, InvalidDestination, shown
from pybroker.listeners import check_exposure, parse_listener
from pybroker.network_settings import network_faults
from pybroker.policy_settings import policy_entries
from pybroker.replica_settings import TLS_FIELDS, replica_set_faults
from pybroker.routing_settings import composite_entries, routing_faults
from pybroker.users import parse_hash

if TYPE_CHECKING:
    from pydantic import BaseModel

NESTED: dict[str, type[Any]] = {
    "stomp": StompLimits,
    "native": NativeLimits,
    "limits": Limits,
    "delivery": DeliveryPolicy,
    "replica_set": ReplicaSetConfig,
    "network": NetworkConfig,
    "routing": RoutingConfig,
}
OPTIONAL = {"replica_set", "network"}  # nested ones that may be None
SECRET = {"replica_set.secret", "replica_set.zookeeper_auth", "network.secret"}  # never shown
MUST_BE_GIVEN = {  # fields without a default, and what they take
    "replica_set.name": "the name of the set, which all its members give",
    "replica_set.zookeeper": "HOST:PORT[,HOST:PORT...][/CHROOT]",
}
ANY_NUMBER = {"replica_set.weight"}  # may be below zero
ZERO_ALLOWED = {  # a number must be above zero, except these
    "stop_timeout",
    "limits.store_bytes_max",
    "limits.disk_free_bytes_min",
    "limits.queue_messages_max",
    "limits.full_timeout",
    "limits.schedule_period_min",
    "replica_set.scrub_interval",
}
AT_LEAST: dict[str, float] = {
    "stomp.heartbeat_tolerance": 1,  # below it a punctual peer would be cut off
}
AT_MOST: dict[str, float] = {
    # What an index or a length of four bytes can hold. Larger ones are slips of the pen, and would be met too late.
    "stomp.body_bytes_max": 2**31 - 1,
    "limits.prefetch_max": 2**31 - 1,
    "limits.selector_bytes_max": 2**16 - 1,
    "delivery.deliveries_max": 2**31 - 1,
    "stomp.heartbeat_min_ms": 86_400_000,
    "replica_set.session_timeout": 86_400,
    "network.hops_max": 1_000,
}
ORDERED = (  # the first must not be greater than the second
    ("limits.prefetch_default", "limits.prefetch_max"),
    ("reopen_delay", "reopen_delay_max"),
)
NAME_LENGTH_MAX = 255
NATIVE_OVERHEAD_BYTES = (
    65_536  # what a frame has beside a body and headers: names, ids, and the headers of a dead letter
)


def load_config(path: Path | str, **overrides: object) -> BrokerConfig:
    """Read a TOML file with the fields of `BrokerConfig`; relative files in it are relative to its directory.

    `overrides` are put over the file's fields (tables field by field) before anything is checked.

    >>> load_config("pybroker.toml", name="b")  # doctest: +SKIP

    Raises `ConfigurationError` that names the file, and each field in it that is wrong, with what was expected.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise ConfigurationError(f"{path}: can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path}: is not TOML: {error}") from None
    _anchor(values, path.resolve().parent)
    for name, value in overrides.items():
        table = values.get(name)
        if isinstance(table, Mapping) and isinstance(value, Mapping):
            values[name] = {**table, **value}
        else:
            values[name] = value
    try:
        return make_config(None, **values)
    except ConfigurationError as error:
        raise ConfigurationError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None


def make_config(config: BrokerConfig | None = None, **overrides: object) -> BrokerConfig:
    """Check ``config`` (None: the defaults) with ``overrides`` put over it, and return the result.

    An override is a field of `BrokerConfig`. ``stomp``, ``native``, ``limits``, ``delivery``, ``routing``, ``replica_set`` and
    ``network`` are given whole as a dataclass, or as a mapping of those of their fields that change; ``replica_set=None`` and
    ``network=None`` are a broker on its own. ``policy`` is a list of mappings with ``match`` and values, ``composite`` one of
    mappings with the fields of `CompositeEntry`. Text does for a path, any list or tuple for a tuple.

    >>> make_config(limits={"prefetch_default": 10}).limits.prefetch_default
    10

    Raises `ConfigurationError`: one line per fault, each with the field's path and what was expected.
    """
    if config is not None and not isinstance(config, BrokerConfig):
        got = f"a {type(config).__name__}" if isinstance(config, Mapping) else shown(config)  # it may hold a secret
        raise ConfigurationError(f"config: expected a BrokerConfig or None, got {got}")
    values = _as_values(config if config is not None else BrokerConfig())
    faults: list[str] = []
    for name, value in overrides.items():
        if name in NESTED and isinstance(value, NESTED[name]):
            values[name] = _as_values(value)
        elif name in NESTED and isinstance(value, Mapping):
            present = values[name] if isinstance(values[name], Mapping) else _defaults(NESTED[name])
            values[name] = {**present, **value}
        else:
            values[name] = value
    built = _typed(values, faults)
    if built is not None:
        faults.extend(_faults(built))
    if faults or built is None:
        raise ConfigurationError("\n".join(faults))
    return built


def _anchor(values: dict[str, Any], directory: Path) -> None:
    """Make the files that a TOML file names relative to its directory. What is wrong is left for the checks."""
    data_dir = values.get("data_dir")
    if isinstance(data_dir, str) and data_dir:
        values["data_dir"] = str(directory / data_dir)
    listen = values.get("listen")
    if isinstance(listen, list):
        values["listen"] = [_anchored(url, directory) for url in listen]
    for table in (values.get("replica_set"), values.get("network")):
        if isinstance(table, dict):
            for name in TLS_FIELDS:
                if isinstance(table.get(name), str) and table[name]:
                    table[name] = str(directory / table[name])


def _anchored(url: object, directory: Path) -> object:
    if not isinstance(url, str):
        return url
    try:
        return parse_listener(url, directory=directory).url
    except ConfigurationError:
        return url


def _as_values(config: Any) -> dict[str, Any]:
    """A dataclass as nested dictionaries. `dataclasses.asdict` would copy ``users``, which a mapping proxy forbids."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: _as_values(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()}


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """The defaults of a configuration class that has fields without one."""
    return {field.name: field.default for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING}


# --- types and ranges of single fields ---------------------------------------------------------------------------


@functools.cache
def _model(parent: str | None = None) -> type[BaseModel]:
    """A pydantic model with the fields of a configuration class, strict, with the ranges of the tables above."""
    from pydantic import ConfigDict, create_model

    kind, prefix = (NESTED[parent], parent + ".") if parent else (BrokerConfig, "")
    hints = get_type_hints(kind)
    fields: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(kind)):
        path = prefix + name
        if path in ("policy", "composite"):  # checked by `policy_entries` and `composite_entries`
            continue
        kept: Any = _model(path) if path in NESTED else _annotation(path, hints[name])
        fields[name] = (kept | None if path in OPTIONAL else kept, ...)
    # The models' own names never show: faults are told with the fields' paths.
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _annotation(path: str, hint: Any) -> Any:
    from typing import Annotated

    from pydantic import Field

    if hint is int or hint is float:
        if path in ANY_NUMBER:
            return hint
        low, high = _range(path)
        exclusive = low == 0 and path not in ZERO_ALLOWED
        bounds: dict[str, Any] = {"gt": 0} if exclusive else {"ge": low}
        return Annotated[hint, Field(le=high, allow_inf_nan=False if hint is float else None, **bounds)]
    if hint == Path | None:
        return Annotated[Path | None, Field(strict=False)]
    if hint == tuple[str, ...]:
        return Annotated[tuple[Annotated[str, Field(strict=True)], ...], Field(strict=False)]
    if hint == Mapping[str, str]:
        return Annotated[dict[str, str], Field(strict=True)]
    return hint


def _range(path: str) -> tuple[float, float | None]:
    return AT_LEAST.get(path, 0), AT_MOST.get(path)


def _expected(path: str) -> str:
    """What a field takes, in words."""
    kind: type[Any] = BrokerConfig
    *parents, name = path.split(".")
    for parent in parents:
        kind = NESTED[parent]
    hint = get_type_hints(kind)[name]
    if hint is int or hint is float:
        number = "a whole number" if hint is int else "a number"
        if path in ANY_NUMBER:
            return number
        low, high = _range(path)
        above = f" of at least {low:g}" if low or path in ZERO_ALLOWED else " above 0"
        return number + above + (f" and at most {high}" if high is not None else "")
    if hint is bool:
        return "true or false"
    if hint is str:
        return "text"
    if path in NESTED:
        return f"a table (mapping) with fields of {NESTED[name].__name__}"
    if hint == Path | None:
        return "a path"
    if hint == tuple[str, ...]:
        return "a list of texts"
    if hint == Mapping[str, str]:
        return "a table (mapping) of user name to password hash"
    return "one of " + ", ".join(repr(choice) for choice in hint.__args__)


def _typed(values: dict[str, Any], faults: list[str]) -> BrokerConfig | None:
    from pydantic import ValidationError

    policy = policy_entries(values.pop("policy", ()), faults)
    composite = composite_entries(values.pop("composite", ()), faults)
    if isinstance(values.get("users"), Mapping):
        values["users"] = dict(values["users"])
    try:
        model = _model().model_validate(values)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False):
            line = _told(fault["type"], tuple(fault["loc"]), fault["input"])
            if line not in faults:
                faults.append(line)
        return None
    built: dict[str, Any] = {name: getattr(model, name) for name in type(model).model_fields}
    for name, kind in NESTED.items():
        nested = built[name]
        if nested is None:
            continue
        built[name] = kind(**{field: getattr(nested, field) for field in type(nested).model_fields})
    built["users"] = MappingProxyType(built["users"])
    return BrokerConfig(**built, policy=policy, composite=composite)


def _told(fault: str, location: tuple[int | str, ...], value: object) -> str:
    """One line for one of pydantic's faults."""
    names = tuple(str(part) for part in location)
    if fault == "extra_forbidden":
        parent = NESTED[names[0]] if len(names) > 1 else BrokerConfig
        return f"{'.'.join(names)}: no field has this name{_suggestion(names[-1], parent, names[:-1])}"
    if names[0] == "users":
        # never the value: people write the password itself where its hash belongs
        return f"{'.'.join(names[:2])}: expected {_expected('users') if len(names) == 1 else 'a text, a password hash'}"
    depth = 2 if names[0] in NESTED else 1
    path = ".".join(names[:depth])
    if fault == "missing":
        return f"{path}: expected {MUST_BE_GIVEN.get(path) or _expected(path)}, got nothing"
    if path in SECRET or path in OPTIONAL:  # what was meant for a table may hold its secrets
        return f"{path}: expected {_expected(path)}"
    if len(names) > depth and isinstance(location[depth], int):
        return f"{path}[{names[depth]}]: expected text, got {shown(value)}"
    return f"{path}: expected {_expected(path)}, got {shown(value)}"


def _suggestion(name: str, kind: type[Any], parents: tuple[str, ...]) -> str:
    elsewhere = [field.name for field in dataclasses.fields(BrokerConfig)] + [
        f"{parent}.{field.name}" for parent, nested in NESTED.items() for field in dataclasses.fields(nested)
    ]
    for path in elsewhere:
        if path.rpartition(".")[2] == name:
            return f"; did you mean {path}?"
    known = [field.name for field in dataclasses.fields(kind)]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return "; did you mean " + ".".join((*parents, close[0])) + "?"
    return "; known are " + ", ".join(known)


# --- what fields mean together -----------------------------------------------------------------------------------


def _faults(config: BrokerConfig) -> Iterator[str]:
    if not (config.name and config.name.isprintable() and len(config.name) <= NAME_LENGTH_MAX):
        yield f"name: expected 1 to {NAME_LENGTH_MAX} printable characters, got {shown(config.name)}"
    if config.data_dir is not None and not _is_file_name(config.data_dir):
        yield f"data_dir: expected a path without a null character, got {shown(str(config.data_dir))}"
    for low, high in ORDERED:
        if (low_value := _value(config, low)) > (high_value := _value(config, high)):
            yield f"{low}: expected at most {high} ({high_value}), got {low_value}"
    yield from _dead_letter_faults(config.delivery.dead_letter_queue)
    yield from _refusals("delivery.cron_timezone", functools.partial(_check_zone, config.delivery.cron_timezone))
    for index, url in enumerate(config.listen):
        yield from _refusals(f"listen[{index}]", functools.partial(_check_listener, url, config.anonymous))
    for name, encoded in config.users.items():
        if not (name and name.isprintable()):
            yield f"users: expected printable user names of at least one character, got {shown(name)}"
        else:
            yield from _refusals(f"users.{name}", functools.partial(parse_hash, encoded))
    if not config.anonymous and not config.users and config.listen:
        yield "users: expected at least one user where anonymous is false, or no client can ever log in"
    yield from _native_faults(config)
    yield from replica_set_faults(config)
    yield from network_faults(config)
    yield from routing_faults(config)


def _native_faults(config: BrokerConfig) -> Iterator[str]:
    """Whatever one listener takes, a client of another must be able to be given."""
    least = config.stomp.body_bytes_max + config.stomp.header_block_bytes_max + NATIVE_OVERHEAD_BYTES
    if config.native.frame_bytes_max < least and any(url.startswith("pybroker") for url in config.listen):
        yield (
            f"native.frame_bytes_max: expected at least {least}, so that a message of stomp.body_bytes_max and "
            f"stomp.header_block_bytes_max fits into a frame, got {config.native.frame_bytes_max}"
        )


def _check_listener(url: str, anonymous: bool) -> None:
    check_exposure(parse_listener(url), anonymous)


def _check_zone(name: str) -> None:
    try:
        ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ConfigurationError(
            f'expected the name of a time zone, for example "Europe/Berlin", got {shown(name)}'
        ) from None


def _refusals(path: str, check: Callable[[], object]) -> Iterator[str]:
    try:
        check()
    except ConfigurationError as error:
        yield f"{path}: {error}"


def _dead_letter_faults(text: str) -> Iterator[str]:
    try:
        destination = parse_destination(text)
    except InvalidDestination as error:
        yield f"delivery.dead_letter_queue: {error}"
        return
    if destination.kind != QUEUE or destination.is_pattern:
        yield f"delivery.dead_letter_queue: expected /queue/NAME without wildcards, got {shown(text)}"


def _is_file_name(path: Path) -> bool:
    return "\0" not in str(path)


def _value(config: BrokerConfig, path: str) -> float:
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part)
    assert isinstance(value, int | float)
    return value
