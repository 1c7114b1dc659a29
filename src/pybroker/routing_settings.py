"""The entries ``[[composite]]`` and the table ``[routing]`` of a configuration, checked. A part of `pybroker.settings`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields

from pybroker.config import BrokerConfig, CompositeEntry
from pybroker.core.advisories import is_advisory
from pybroker.destination import QUEUE, parse_destination
from pybroker.errors import InvalidDestination, InvalidSelector, shown
from pybroker.selectors import compile_selector

ENTRIES_MAX = 1_000  # a name that is sent to is compared with all of them, unless it is one of those remembered
FORWARD_TO_MAX = 1_000
_KINDS = {"name": (str, "text"), "forward_only": (bool, "true or false"), "filter": (str, "a selector")}
_FIELDS = tuple(field.name for field in fields(CompositeEntry))


def composite_entries(given: object, faults: list[str]) -> tuple[CompositeEntry, ...]:
    """Entries of a list of tables (or of `CompositeEntry`). What is wrong is added to `faults`, one line each."""
    if not isinstance(given, list | tuple):
        faults.append(f"composite: expected a list of tables [[composite]], got {shown(given)}")
        return ()
    if len(given) > ENTRIES_MAX:
        faults.append(f"composite: expected at most {ENTRIES_MAX} entries, got {len(given)}")
        return ()
    entries = []
    for index, each in enumerate(given):
        path = f"composite[{index}]"
        if isinstance(each, CompositeEntry):
            each = {name: getattr(each, name) for name in _FIELDS}
        if not isinstance(each, Mapping):
            faults.append(f"{path}: expected a table with `name` and `forward_to`, got {shown(each)}")
            continue
        found = list(_faults(each, path))
        faults += found
        if not found:
            entries.append(CompositeEntry(**{**each, "forward_to": tuple(each["forward_to"])}))
    return tuple(entries)


def _faults(entry: Mapping[str, object], path: str) -> Iterator[str]:
    for field in entry:
        if field not in _FIELDS:
            yield f"{path}.{field}: no field has this name; known are {', '.join(_FIELDS)}"
    for field, (kind, expected) in _KINDS.items():
        if field in entry and not isinstance(entry[field], kind):
            yield f"{path}.{field}: expected {expected}, got {shown(entry[field])}"
    name = entry.get("name")
    if name is None:
        yield f"{path}.name: expected a destination such as '/queue/orders', or a pattern"
    elif isinstance(name, str):
        yield from _destination_faults(f"{path}.name", name, True)
    texts = entry.get("forward_to")
    if not isinstance(texts, list | tuple) or not 0 < len(texts) <= FORWARD_TO_MAX:
        yield f"{path}.forward_to: expected a list of 1 to {FORWARD_TO_MAX} destinations, got {shown(texts)}"
    else:
        for index, text in enumerate(texts):
            if isinstance(text, str):
                yield from _destination_faults(f"{path}.forward_to[{index}]", text, False)
            else:
                yield f"{path}.forward_to[{index}]: expected a destination, got {shown(text)}"
    selector = entry.get("filter")
    if isinstance(selector, str) and selector:
        try:
            compile_selector(selector)
        except InvalidSelector as error:
            yield f"{path}.filter: {error}"


def _destination_faults(path: str, text: str, pattern: bool) -> Iterator[str]:
    try:
        target = parse_destination(text)
    except InvalidDestination as error:
        yield f"{path}: {error}"
        return
    if target.is_pattern and not pattern:
        yield f"{path}: expected one name, without wildcards, got {shown(text)}"
    elif not pattern and is_advisory(target):
        yield f"{path}: expected another topic, for only the broker itself sends to advisories, got {shown(text)}"


def routing_faults(config: BrokerConfig) -> Iterator[str]:
    """What does not fit of the table ``[routing]``."""
    routing = config.routing
    if routing.virtual_topics:
        yield from _destination_faults("routing.virtual_topics", f"/topic/{routing.virtual_topics}", True)
    prefix = routing.virtual_consumers
    if not prefix.endswith(".") or prefix.startswith("."):
        yield f"routing.virtual_consumers: expected parts that end in a dot, such as 'Consumer.*.', got {shown(prefix)}"
    else:
        yield from _destination_faults("routing.virtual_consumers", f"/queue/{prefix}x", True)
    for index, text in enumerate(routing.mirrored_queues):
        path = f"routing.mirrored_queues[{index}]"
        faults = list(_destination_faults(path, text, True))
        yield from faults
        if not faults and parse_destination(text).kind != QUEUE:
            yield f"{path}: expected a pattern of queues, got {shown(text)}"
    name = f"{routing.mirror_prefix}x{routing.mirror_suffix}"
    yield from _destination_faults("routing.mirror_prefix and mirror_suffix", f"/topic/{name}", False)
