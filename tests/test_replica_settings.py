"""`pybroker.replica_settings` through `make_config`: what a replica set takes, and each fault with its path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pybroker.cluster.frames import FRAME_BYTES_MAX
from pybroker.config import BrokerConfig, Limits, ReplicaSetConfig, StompLimits
from pybroker.errors import ConfigurationError
from pybroker.settings import load_config, make_config

NEEDED = {"name": "ward", "zookeeper": "zoo1:2181,zoo2:2181/clinic"}
FILES = {"certificate": "a.pem", "key": "b.pem", "peer_ca": "ca.pem"}
SECRETS = ("hunter2", "anna:hunter3")


def made(replica_set: Any = None, **overrides: Any) -> BrokerConfig:
    """The configuration of replica ``a``; `replica_set` is put over what a set needs."""
    chosen = {**NEEDED, **replica_set} if isinstance(replica_set, dict) else replica_set
    return make_config(**{"name": "a", "data_dir": "data", "replica_set": chosen, **overrides})


def refused(replica_set: Any = None, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        made(replica_set, **overrides)
    return str(caught.value).splitlines()


def test_a_broker_is_on_its_own_by_default():
    assert make_config().replica_set is None
    assert make_config(replica_set=None).replica_set is None
    assert make_config(made({}), replica_set=None).replica_set is None


def test_a_mapping_goes_over_the_defaults_or_over_the_present_set():
    config = made({"replicas": 5, "weight": -3})
    assert config.replica_set == ReplicaSetConfig(**NEEDED, replicas=5, weight=-3)
    assert made({"weight": 0}).replica_set == ReplicaSetConfig(**NEEDED)
    changed = make_config(config, replica_set={"sync": "local_mem", "clients": ["stomp://a:1"]}).replica_set
    assert changed == ReplicaSetConfig(**NEEDED, replicas=5, weight=-3, sync="local_mem", clients=("stomp://a:1",))


def test_a_dataclass_is_taken_whole_and_checked():
    config = make_config(made({"replicas": 5}), replica_set=ReplicaSetConfig(**NEEDED, **FILES, scrub_interval=0))  # type: ignore[arg-type]
    assert config.replica_set == ReplicaSetConfig(
        **NEEDED, certificate=Path("a.pem"), key=Path("b.pem"), peer_ca=Path("ca.pem"), scrub_interval=0.0
    )
    assert make_config(config) == config
    lines = refused(ReplicaSetConfig(name="ward", zookeeper="", replicas=2))
    assert [line.partition(":")[0] for line in lines] == ["replica_set.replicas", "replica_set.zookeeper"]


def test_name_and_zookeeper_must_be_given():
    with pytest.raises(ConfigurationError) as caught:
        make_config(name="a", data_dir="data", replica_set={})
    assert str(caught.value).splitlines() == [
        "replica_set.name: expected the name of the set, which all its members give, got nothing",
        "replica_set.zookeeper: expected HOST:PORT[,HOST:PORT...][/CHROOT], got nothing",
    ]


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": 5}, "replica_set.name: expected text, got 5"),
        ({"name": "a/b"}, "replica_set.name: expected 1 to 64 letters, digits, '_', '.' or '-', the first a letter or"),
        ({"name": ".."}, "replica_set.name: expected 1 to 64 letters"),
        ({"zookeeper": ""}, "replica_set.zookeeper: expected HOST:PORT[,HOST:PORT...][/CHROOT], got ''"),
        ({"zookeeper": "a:1,"}, "replica_set.zookeeper: expected HOST:PORT[,"),
        ({"zookeeper": "a:0"}, "replica_set.zookeeper: expected HOST:PORT[,"),
        ({"zookeeper": "/clinic"}, "replica_set.zookeeper: expected HOST:PORT[,"),
        ({"zookeeper": "http://a:1"}, "replica_set.zookeeper: expected "),
        ({"zookeeper": "a:1/b/../c"}, "replica_set.zookeeper: expected a path as CHROOT, got 'a:1/b/../c'"),
        ({"zookeeper": "a:1//c"}, "replica_set.zookeeper: expected a path as CHROOT, got 'a:1//c'"),
        ({"replicas": 4}, "replica_set.replicas: expected an odd number, got 4: a half is no majority"),
        ({"replicas": 0}, "replica_set.replicas: expected a whole number above 0, got 0"),
        ({"replicas": "3"}, "replica_set.replicas: expected a whole number above 0, got '3'"),
        (
            {"heartbeat_interval": 0.6},
            "replica_set.heartbeat_timeout: expected at least twice replica_set.heartbeat_interval (0.6), got 1.0",
        ),
        ({"lease": 0.5}, "replica_set.lease: expected at least replica_set.heartbeat_timeout (1.0), got 0.5"),
        ({"sync": "disk"}, "replica_set.sync: expected one of 'quorum_disk', 'quorum_mem', 'local_disk', 'local_mem',"),
        ({"weight": 0.5}, "replica_set.weight: expected a whole number, got 0.5"),
        ({"session_timeout": 0}, "replica_set.session_timeout: expected a number above 0 and at most 86400, got 0"),
        ({"scrub_interval": -1}, "replica_set.scrub_interval: expected a number of at least 0, got -1"),
        ({"bind": ""}, "replica_set.bind: expected HOST:PORT (port 0 takes a free one; an IPv6 address stands in"),
        ({"bind": "127.0.0.1"}, "replica_set.bind: expected HOST:PORT"),
        ({"bind": "::1:7000"}, "replica_set.bind: expected HOST:PORT"),
        ({"bind": "127.0.0.1:70000"}, "replica_set.bind: expected HOST:PORT"),
        ({"bind": "127.0.0.1:7/x"}, "replica_set.bind: expected HOST:PORT"),
        ({"bind": "stomp://127.0.0.1:7"}, "replica_set.bind: expected HOST:PORT"),
        ({"advertise": "localhost:0"}, "replica_set.advertise: expected HOST:PORT under which the other replicas"),
        ({"advertise": "localhost"}, "replica_set.advertise: expected HOST:PORT under which the other replicas"),
        ({"advertise": "localhost:7"}, "replica_set.bind: expected a port where replica_set.advertise has one (local"),
        ({"clients": "stomp://a:1"}, "replica_set.clients: expected a list of texts, got 'stomp://a:1'"),
        ({"clients": ["stomp://a:1", 5]}, "replica_set.clients[1]: expected text, got 5"),
        ({"clients": ["stomp://a:1", "a:1"]}, "replica_set.clients[1]: expected stomp://HOST:PORT or stomp+ssl://HOST"),
        ({"clients": ["stomp://a:0"]}, "replica_set.clients[0]: expected stomp://HOST:PORT"),
        ({"clients": ["stomp+ssl://a:1?cert=x"]}, "replica_set.clients[0]: expected stomp://HOST:PORT"),
        (
            {"certificate": "a.pem", "key": "b.pem"},
            "replica_set.peer_ca: expected a path: certificate, key and peer_ca",
        ),
        ({"peer_ca": "ca.pem"}, "replica_set.certificate: expected a path: certificate, key and peer_ca"),
        ({**FILES, "key": "a\0b"}, "replica_set.key: expected a path without a null character, got 'a\\x00b'"),
        ({"key": 5}, "replica_set.key: expected a path, got 5"),
        ({"allow": ["plain"]}, "replica_set.allow[0]: expected one of 'plaintext', 'anonymous', got 'plain'"),
        ({"zookeper": "a:1"}, "replica_set.zookeper: no field has this name; did you mean replica_set.zookeeper?"),
        ({"listen": []}, "replica_set.listen: no field has this name; did you mean listen?"),
    ],
)
def test_a_wrong_field_is_told_with_its_path_and_what_was_expected(fields: dict[str, Any], line: str):
    (told,) = refused(fields)
    assert told.startswith(line)


@pytest.mark.parametrize(
    "fields",
    [
        {"zookeeper": "localhost"},
        {"zookeeper": "[::1]:2181,[::2],10.0.0.1:3/a/b/"},
        {"bind": "[::1]:0"},
        {"bind": "localhost:7000", "advertise": "localhost:7001"},
        {"clients": ["stomp://[::1]:61613", "stomp+ssl://a.example:61614"]},
        {"replicas": 1},
        {"zookeeper_auth": "anna:a:b"},
        {"session_timeout": 1},
    ],
)
def test_what_is_right_is_taken(fields: dict[str, Any]):
    chosen = made(fields).replica_set
    assert chosen is not None
    for name, value in fields.items():
        assert getattr(chosen, name) == (tuple(value) if isinstance(value, list) else value)


def test_the_broker_needs_a_name_of_its_own_and_a_directory():
    assert refused({}, name="a b")[0].startswith("name: expected 1 to 64 letters, digits")
    (line,) = refused({}, name="pybroker")
    assert line.startswith("name: expected this replica's own name")
    (line,) = refused({}, data_dir=None)
    assert line.startswith("data_dir: expected a directory where replica_set is given")
    assert make_config(name="a b").name == "a b"  # a broker on its own may be called anything
    assert made({"replicas": 1}, name="pybroker").name == "pybroker"


# ---- exposure


@pytest.mark.parametrize("bind", ["0.0.0.0:7000", "[::]:7000"])
def test_every_interface_is_no_address_to_reach(bind: str):
    (line,) = refused({"bind": bind, "secret": "x", **FILES})
    assert line == f"replica_set.advertise: expected HOST:PORT where replica_set.bind is every interface ({bind})"
    (line,) = refused({"bind": bind, "advertise": bind, "secret": "x", **FILES})
    assert line.startswith("replica_set.advertise: expected HOST:PORT under which the other replicas reach this one")
    assert made({"bind": bind, "advertise": "a.example:7000", "secret": "x", **FILES})


@pytest.mark.parametrize(
    ("fields", "missing", "allow"),
    [
        ({}, "plaintext and anonymous", '"plaintext", "anonymous"'),
        ({"secret": "x"}, "plaintext", '"plaintext"'),
        (FILES, "anonymous", '"anonymous"'),
        ({"allow": ["anonymous"]}, "plaintext", '"plaintext", "anonymous"'),
    ],
)
@pytest.mark.parametrize("where", [{"bind": "10.0.0.1:7"}, {"bind": "127.0.0.1:7", "advertise": "a.example:7"}])
def test_beyond_loopback_what_is_open_has_to_be_asked_for_by_name(
    fields: dict[str, Any], missing: str, allow: str, where: dict[str, str]
):
    (line,) = refused({**fields, **where})
    path, address = list(where.items())[-1]
    assert line.startswith(f"replica_set.{path}: {address} can be reached from beyond loopback and is {missing}: give ")
    assert line.endswith(f"or ask for it by name with replica_set.allow = [{allow}]")
    allowed = [word.strip('"') for word in allow.split(", ")]
    assert made({**fields, **where, "allow": allowed})
    assert made({**FILES, "secret": "x", **where})


# ---- secrets


@pytest.mark.parametrize(
    "replica_set",
    [
        {"secret": ["hunter2"], "zookeeper_auth": ["anna:hunter3"]},
        {"secret": "hunter2", "zookeeper_auth": "hunter3"},
        {"secret": "hunter2", "zookeeper_auth": ":hunter3", "replicas": 2},
        {"secret": "hunter2", "zookeeper_auth": "hunter3:", "nmae": "x"},
        {"secret": "hunter2", "zookeeper": "anna:hunter3@a:1"},
        ["hunter2", "hunter3"],
        "hunter2:hunter3",
    ],
)
def test_secrets_are_never_told(replica_set: Any):
    lines = refused(replica_set)
    assert lines
    assert "hunter" not in "\n".join(lines)


def test_secrets_are_no_part_of_a_repr():
    config = made({"secret": "hunter2", "zookeeper_auth": "anna:hunter3"})
    assert "hunter" not in repr(config)
    with pytest.raises(ConfigurationError) as caught:
        make_config({"replica_set": {"secret": "hunter2"}})  # type: ignore[arg-type]
    assert "hunter" not in str(caught.value)


def test_zookeeper_auth_is_a_user_and_a_password():
    for wrong in ("anna", "anna:", ":secret"):
        expected = "replica_set.zookeeper_auth: expected USER:PASSWORD, neither of them empty"
        assert refused({"zookeeper_auth": wrong}) == [expected]


# ---- with other fields


def test_the_largest_batch_fits_a_frame():
    limits, stomp = Limits(), StompLimits()
    assert limits.transaction_bytes_max + limits.batch_bytes_max + stomp.body_bytes_max < FRAME_BYTES_MAX
    (line,) = refused({}, limits={"transaction_bytes_max": FRAME_BYTES_MAX})
    assert line.startswith("limits.transaction_bytes_max: expected less where replica_set is given")
    for path in ("limits.batch_bytes_max (", "stomp.body_bytes_max (", f"({FRAME_BYTES_MAX})"):
        assert path in line
    (line,) = refused({}, stomp={"body_bytes_max": FRAME_BYTES_MAX - 1})
    assert line.startswith("stomp.body_bytes_max: expected less")
    assert make_config(stomp={"body_bytes_max": FRAME_BYTES_MAX})  # nothing travels


def test_a_toml_table_gives_the_same_fields(tmp_path: Path):
    file = tmp_path / "a.toml"
    file.write_text(
        """
        name = "a"
        data_dir = "data"
        [replica_set]
        name = "ward"
        zookeeper = "zoo1:2181,zoo2:2181/clinic"
        bind = "0.0.0.0:7000"
        advertise = "a.example:7000"
        clients = ["stomp://a.example:61613"]
        sync = "quorum_mem"
        weight = -1
        secret = "hunter2"
        zookeeper_auth = "anna:hunter3"
        certificate = "tls/a.pem"
        key = "/etc/a.key"
        peer_ca = "ca.pem"
        session_timeout = 5
        """
    )
    config = load_config(file)
    assert config.replica_set == ReplicaSetConfig(
        **NEEDED,
        bind="0.0.0.0:7000",
        advertise="a.example:7000",
        clients=("stomp://a.example:61613",),
        sync="quorum_mem",
        weight=-1,
        secret="hunter2",
        zookeeper_auth="anna:hunter3",
        certificate=tmp_path / "tls/a.pem",
        key=Path("/etc/a.key"),
        peer_ca=tmp_path / "ca.pem",
        session_timeout=5.0,
    )
    file.write_text('name = "a"\ndata_dir = "data"\n[replica_set]\nname = "ward"\nkey = ""\nreplicas = "3"\n')
    with pytest.raises(ConfigurationError) as caught:
        load_config(file)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [str(file), "replica_set.zookeeper"],
        [str(file), "replica_set.replicas"],
    ]


def numeric_fields() -> list[str]:
    hints = get_type_hints(ReplicaSetConfig)
    return [field.name for field in dataclasses.fields(ReplicaSetConfig) if hints[field.name] in (int, float)]


@pytest.mark.parametrize("name", numeric_fields())
@pytest.mark.parametrize("value", [-1, "1", None, True, float("nan"), float("inf"), [1]])
def test_no_number_takes_what_is_not_a_positive_number(name: str, value: object):
    if (name, value) == ("weight", -1):
        assert made({name: value})
        return
    (line,) = refused({name: value})
    assert line.startswith(f"replica_set.{name}: expected a ")
