"""The entries ``[[policy]]`` of a configuration, checked: which patterns, which values. A part of `pybroker.settings`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from pybroker.config import PolicyEntry
from pybroker.destination import QUEUE, TOPIC, parse_destination
from pybroker.errors import InvalidDestination, shown
from pybroker.policies import VALUES, fault_of

ENTRIES_MAX = 10_000  # each destination is compared with all of them once


def policy_entries(given: object, faults: list[str]) -> tuple[PolicyEntry, ...]:
    """Entries of a list of tables (or of `PolicyEntry`). What is wrong is added to `faults`, one line each."""
    if not isinstance(given, list | tuple):
        faults.append(f"policy: expected a list of tables [[policy]], got {shown(given)}")
        return ()
    if len(given) > ENTRIES_MAX:
        faults.append(f"policy: expected at most {ENTRIES_MAX} entries, got {len(given)}")
        return ()
    entries: list[PolicyEntry] = []
    seen: dict[str, int] = {}
    for index, each in enumerate(given):
        path = f"policy[{index}]"
        if isinstance(each, PolicyEntry):
            each = {"match": each.match, **each.values}
        if not isinstance(each, Mapping):
            faults.append(f"{path}: expected a table with `match` and values, got {shown(each)}")
            continue
        match = each.get("match")
        if not isinstance(match, str):
            faults.append(f"{path}.match: expected a pattern such as '/queue/a.>', got {shown(match)}")
            continue
        try:
            kind = parse_destination(match).kind
        except InvalidDestination as error:
            faults.append(f"{path}.match: {error}")
            continue
        if kind not in (QUEUE, TOPIC):
            faults.append(f"{path}.match: expected /queue/NAME or /topic/NAME (or a pattern), got {shown(match)}")
            continue
        if match in seen:
            faults.append(
                f"{path}.match: {match!r} is the pattern of policy[{seen[match]}], too: make one entry of both"
            )
        seen.setdefault(match, index)
        values = {name: value for name, value in each.items() if name != "match"}
        known = len(faults)
        for name, value in values.items():
            if name not in VALUES:
                faults.append(f"{path}.{name}: no value has this name{_suggestion(name)}")
            elif expected := fault_of(name, value):
                faults.append(f"{path}.{name}: expected {expected}, got {shown(value)}")
        if known == len(faults):
            floats = {name: float(value) for name, value in values.items() if isinstance(VALUES[name].default, float)}
            entries.append(PolicyEntry(match, MappingProxyType({**values, **floats})))
    return tuple(entries)


def _suggestion(name: object) -> str:
    close = difflib.get_close_matches(str(name), VALUES, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; known are " + ", ".join(VALUES)
