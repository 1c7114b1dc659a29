"""Imports point downwards only, and the pure parts stay pure: read from the source with `ast`, nothing is run.

The tables say which layer a module belongs to and what each layer may import. A module that is on no table fails the
test: say its layer here when you add it. Imports inside functions and under ``TYPE_CHECKING`` count too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "pybroker"

# Layer -> the modules or subpackages in it. "" is the package's own __init__.py.
LAYERS: dict[str, tuple[str, ...]] = {
    "values": (
        *("message", "destination", "errors", "operations"),
        *("config", "consumer_options", "policies", "selectors"),
    ),
    "core": ("core",),
    "protocols": ("protocols",),
    "store": ("store",),
    "cluster": ("cluster",),
    "run time": (
        *("alarm", "engine", "journal", "spool", "server", "listeners", "users", "stomp_server", "control"),
        *("keeper", "mending", "replicated", "committing", "scheduling"),
        "stomp_temporary",
        *("queue_pages", "stomp_browsing"),
        *("connections", "native_server", "native_sending", "native_outbox"),
        *(
            "broker_network",
            "link_connection",
            "link_dialling",
            "link_transport",
            "network_membership",
            "network_status",
        ),
    ),
    "face": (
        *("message_view", "browser", "queue_work"),
        *("broker", "client", "subscription", "local_client", "local_subscription"),
        *("connecting", "connect_options", "addresses", "remote_client", "remote_connection", "remote_events"),
        *("remote_lifeline", "remote_search", "remote_sending", "remote_subscription", "remote_waiting"),
        *("remote_temporary", "requests"),
        *("routing_settings",),
        *("statistics", "stomp_remote", "settings", "replica_settings", "network_settings", "policy_settings"),
        *(
            "cli",
            "cli_output",
            "cli_replica",
            "cli_network",
            "cli_messages",
            "cli_policy",
            "cli_dead_letters",
            "dead_letter_work",
            "cli_queue",
            "cli_schedule",
            "__main__",
            "",
        ),
    ),
}

# Layer -> the layers that it may import beside itself.
BELOW: dict[str, tuple[str, ...]] = {
    "values": (),
    "core": ("values",),
    "protocols": ("values",),
    "store": ("values",),
    "cluster": ("values", "store"),
    "run time": ("values", "core", "protocols", "store", "cluster"),
    "face": ("values", "core", "protocols", "store", "cluster", "run time"),
}

# Package from outside -> the layers or single files that may import it.
OUTSIDE: dict[str, tuple[str, ...]] = {
    "lark": ("selectors/syntax.py",),
    "plyvel": ("store/leveldb.py",),
    "plyvel_next": ("store/leveldb.py",),
    "kazoo": ("cluster/zookeeper.py",),
    "msgpack": ("store", "protocols", "cluster", "run time"),
    "cronsim": ("core/cron.py",),
    "trio": ("cluster", "run time", "face"),
    "pydantic": ("settings.py",),
    "click": (
        "cli.py",
        "cli_messages.py",
        "cli_replica.py",
        "cli_network.py",
        "cli_policy.py",
        "cli_dead_letters.py",
        "cli_queue.py",
        "cli_schedule.py",
    ),
    "rich": (
        "cli.py",
        "cli_output.py",
        "cli_network.py",
        "cli_replica.py",
        "cli_policy.py",
        "cli_dead_letters.py",
        "cli_queue.py",
        "cli_schedule.py",
    ),
}

# Pure: no clock, randomness, socket, thread or file. So of the standard library only what has none of these.
PURE_LAYERS = ("core", "protocols")
PURE_MODULES = frozenset(
    (
        "__future__",
        "abc",
        "array",
        "base64",
        "binascii",
        "bisect",
        "collections",
        "contextlib",
        "copy",
        "dataclasses",
        "datetime",
        "enum",
        "functools",
        "hashlib",
        "heapq",
        "hmac",
        "itertools",
        "math",
        "operator",
        "re",
        "string",
        "struct",
        "sys",
        "types",
        "typing",
        "zlib",
    )
)
IMPURE_BUILTINS = frozenset(("open", "print", "input", "exec", "eval", "__import__"))
CLOCK_METHODS = frozenset(("now", "utcnow", "today"))  # of datetime's classes


def layer_of(module: str) -> str | None:
    """The layer of a module of the package, named without the package (``core.queue``; "" is the package itself)."""
    top = module.partition(".")[0]
    return next((layer for layer, modules in LAYERS.items() if top in modules), None)


def module_of(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(package: Path, name: str) -> bool:
    path = package.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST, path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything that a file imports; relative imports and names are resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = [package.name, *path.relative_to(package).parts[:-1]]
                base = ".".join([*here[: len(here) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}".partition(".")[2]
                is_ours = base.partition(".")[0] == package.name and is_module(package, name)
                yield node.lineno, f"{base}.{alias.name}" if is_ours else base


def violations(package: Path) -> list[str]:
    """What breaks the tables in the package that lies in ``package``, one line each."""
    found: list[str] = []
    for path in sorted(package.rglob("*.py")):
        name, module = path.relative_to(package).as_posix(), module_of(path, package)
        layer = layer_of(module)
        if layer is None:
            found.append(f"{name}: is in no layer; add it to LAYERS")
            continue
        tree = ast.parse(path.read_bytes())
        for line, imported in imports(tree, path, package):
            fault = fault_of(name, layer, imported, package.name)
            if fault:
                found.append(f"{name}:{line}: {fault}")
        if layer in PURE_LAYERS:
            found += [f"{name}:{line}: {layer} is pure and calls {call}()" for line, call in impure_calls(tree)]
    return found


def fault_of(name: str, layer: str, imported: str, package: str) -> str | None:
    top, _, rest = imported.partition(".")
    if top == package:
        target = layer_of(rest)
        if target is None:
            return f"imports {imported}, which is in no layer"
        return None if target in (layer, *BELOW[layer]) else f"{layer} imports {imported} of {target}"
    if top in sys.stdlib_module_names:
        return f"{layer} is pure and imports {imported}" if layer in PURE_LAYERS and top not in PURE_MODULES else None
    if layer == "values" and name not in OUTSIDE.get(top, ()):
        return f"values know the standard library only, and this imports {imported}"
    if top not in OUTSIDE:
        return f"imports {imported}, which OUTSIDE does not list"
    return None if {name, layer} & set(OUTSIDE[top]) else f"imports {imported}, which only {OUTSIDE[top]} may"


def impure_calls(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_BUILTINS:
            yield node.lineno, node.func.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CLOCK_METHODS:
            yield node.lineno, node.func.attr


def test_imports_point_downwards_and_pure_parts_are_pure():
    assert violations(PACKAGE) == []


def test_the_tables_fit_each_other():
    assert LAYERS.keys() == BELOW.keys()
    modules = [module for group in LAYERS.values() for module in group]
    assert len(modules) == len(set(modules))
    order = list(LAYERS)
    for layer, below in BELOW.items():
        assert all(order.index(lower) < order.index(layer) for lower in below), layer


@pytest.mark.parametrize(
    ("name", "source", "fault"),
    [
        ("core/queue.py", "from pybroker.engine import Engine", "core imports pybroker.engine of run time"),
        ("core/queue.py", "from pybroker import engine", "core imports pybroker.engine of run time"),
        ("core/queue.py", "from .. import engine", "core imports pybroker.engine of run time"),
        ("core/queue.py", "from ..engine import Engine", "core imports pybroker.engine of run time"),
        ("core/queue.py", "from pybroker import open_broker", "core imports pybroker of face"),
        ("core/queue.py", "import pybroker.store.leveldb", "core imports pybroker.store.leveldb of store"),
        ("core/queue.py", "def f():\n    import time", "core is pure and imports time"),
        ("core/queue.py", "import os.path", "core is pure and imports os.path"),
        ("core/queue.py", "import trio", "imports trio, which only ('cluster', 'run time', 'face') may"),
        ("core/queue.py", "x = open('x')", "core is pure and calls open()"),
        ("core/queue.py", "import datetime\nx = datetime.datetime.now()", "core is pure and calls now()"),
        ("protocols/stomp.py", "from random import random", "protocols is pure and imports random"),
        ("protocols/stomp.py", "from pybroker.core import queue", "protocols imports pybroker.core of core"),
        ("store/memory.py", "import plyvel", "imports plyvel, which only ('store/leveldb.py',) may"),
        ("store/leveldb.py", "from ..core.queue import Queue", "store imports pybroker.core.queue of core"),
        (
            "cluster/election.py",
            "import kazoo.client",
            "imports kazoo.client, which only ('cluster/zookeeper.py',) may",
        ),
        ("cluster/election.py", "import pybroker.engine", "cluster imports pybroker.engine of run time"),
        ("engine.py", "from pybroker.broker import Broker", "run time imports pybroker.broker of face"),
        ("engine.py", "import numpy", "imports numpy, which OUTSIDE does not list"),
        ("message.py", "import msgpack", "values know the standard library only, and this imports msgpack"),
    ],
)
def test_a_planted_import_is_found(tmp_path: Path, name: str, source: str, fault: str):
    package = tmp_path / "pybroker"
    for file in ("__init__.py", "engine.py", "broker.py", "store/leveldb.py"):
        plant(package / file, "")
    plant(package / name, f'"""A file."""\n{source}\n')
    lines = violations(package)
    assert [line.partition(": ")[2] for line in lines] == [fault]
    assert lines[0].startswith(f"{name}:")


def test_a_module_on_no_table_is_found(tmp_path: Path):
    plant(tmp_path / "pybroker" / "utilities.py", "")
    assert violations(tmp_path / "pybroker") == ["utilities.py: is in no layer; add it to LAYERS"]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("core/queue.py", "from heapq import heappush\nfrom pybroker.message import Message\nfrom . import window"),
        ("store/leveldb.py", "import plyvel, os\nfrom pybroker.operations import PUT_BODY"),
        ("engine.py", "import trio, time\nfrom pybroker.core.queue import Queue\nfrom .store import leveldb"),
        ("__init__.py", "from pybroker.broker import open_broker"),
    ],
)
def test_what_points_downwards_is_let_through(tmp_path: Path, name: str, source: str):
    plant(tmp_path / "pybroker" / name, source)
    assert violations(tmp_path / "pybroker") == []


def plant(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
