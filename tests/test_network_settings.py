"""`pybroker.network_settings` through `make_config`: what the network takes, and each fault with its path."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from click.testing import CliRunner

from pybroker import cli
from pybroker.cluster.announcements import DATAGRAM_BYTES_MAX
from pybroker.config import BrokerConfig, NetworkConfig
from pybroker.errors import ConfigurationError
from pybroker.settings import load_config, make_config

NATIVE = "pybroker://127.0.0.1:0"
OUTSIDE = "pybroker://10.0.0.1:0?allow=plaintext,anonymous"
LOOPBACK = "multicast://239.255.2.3:6155?interface=127.0.0.1"
FILES = {"certificate": "a.pem", "key": "b.pem", "peer_ca": "ca.pem"}
REPLICA = {"name": "ward", "zookeeper": "zoo1:2181"}


def made(network: Any = None, **overrides: Any) -> BrokerConfig:
    """The configuration of broker ``a`` in a network."""
    return make_config(**{"name": "a", "listen": [NATIVE], "network": network, **overrides})


def refused(network: Any = None, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        made(network, **overrides)
    return str(caught.value).splitlines()


def test_a_broker_is_in_no_network_by_default():
    assert make_config().network is None
    assert make_config(made({}), network=None).network is None


def test_a_mapping_goes_over_the_defaults_or_over_the_present_network():
    config = made({"discovery": LOOPBACK, "hops_max": 3})
    assert config.network == NetworkConfig(discovery=LOOPBACK, hops_max=3)
    changed = make_config(config, network={"peers": ["pybroker://localhost:1,127.0.0.1:2"]}).network
    assert changed == NetworkConfig(discovery=LOOPBACK, hops_max=3, peers=("pybroker://localhost:1,127.0.0.1:2",))
    assert make_config(config) == config


def test_a_dataclass_is_taken_whole_and_checked():
    config = made(NetworkConfig(**FILES))  # type: ignore[arg-type]
    assert config.network == NetworkConfig(certificate=Path("a.pem"), key=Path("b.pem"), peer_ca=Path("ca.pem"))
    (line,) = refused(NetworkConfig(discovery="x"))
    assert line.startswith("network.discovery: discovery 'x': it must look like multicast://ADDRESS:PORT")


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"name": 5}, "network.name: expected text, got 5"),
        ({"name": "a\n"}, "network.name: expected 1 to 255 printable characters, got 'a\\n'"),
        ({"name": "n" * 256}, "network.name: expected 1 to 255 printable characters"),
        ({"group": ""}, "network.group: expected 1 to 255 printable characters, got ''"),
        ({"discovery": 5}, "network.discovery: expected text, got 5"),
        (
            {"discovery": "multicast://10.0.0.1:1"},
            "network.discovery: discovery 'multicast://10.0.0.1:1': '10.0.0.1' is ",
        ),
        (
            {"discovery": LOOPBACK + "&group=x", "group": "y"},
            "network.group: expected the group of network.discovery ('x') or none, got 'y'",
        ),
        ({"peers": "pybroker://127.0.0.1:1"}, "network.peers: expected a list of texts, got 'pybroker://127.0.0.1:1'"),
        (
            {"peers": ["pybroker://localhost:1", "localhost:1"]},
            "network.peers[1]: address 'localhost:1': expected pybroker://",
        ),
        (
            {"peers": ["stomp://localhost:1"]},
            "network.peers[0]: address 'stomp://localhost:1': expected pybroker://HOST:PORT",
        ),
        (
            {"peers": ["pybroker://localhost:0"]},
            "network.peers[0]: address 'pybroker://localhost:0': port 0 is not one of",
        ),
        (
            {"peers": ["pybroker://localhost:1,"]},
            "network.peers[0]: address 'pybroker://': expected pybroker://HOST:PORT",
        ),
        (
            {"peers": ["pybroker+ssl://localhost:1"]},
            "network.certificate: expected a path: certificate, key and peer_ca are needed to dial pybroker+ssl://localhost:1",
        ),
        (
            {"certificate": "a", "key": "b"},
            "network.peer_ca: expected a path: certificate, key and peer_ca are given together",
        ),
        ({"peer_ca": "a"}, "network.certificate: expected a path: certificate, key and peer_ca are given together"),
        ({**FILES, "key": "a\0b"}, "network.key: expected a path without a null character, got 'a\\x00b'"),
        ({"allow": ["plain"]}, "network.allow[0]: expected one of 'plaintext', 'anonymous', got 'plain'"),
        (
            {"advertise": ["pybroker://0.0.0.0:1"]},
            "network.advertise[0]: address 'pybroker://0.0.0.0:1': 0.0.0.0 stands for",
        ),
        ({"advertise": ["pybroker://a:1/x"]}, "network.advertise[0]: address 'pybroker://a:1/x': expected pybroker://"),
        (
            {"include": ["/queue/a.>", "a"]},
            "network.include[1]: destination 'a' is not known: it must start with /queue/ or",
        ),
        ({"exclude": ["/queue/a..b"]}, "network.exclude[0]: destination '/queue/a..b' has an empty part"),
        (
            {"heartbeat_timeout": 0.9},
            "network.heartbeat_timeout: expected at least twice network.heartbeat_interval (0.5), got",
        ),
        ({"retry_interval": 6}, "network.retry_interval_max: expected at least network.retry_interval (6.0), got 5.0"),
        (
            {"peer_timeout_intervals": 1},
            "network.peer_timeout_intervals: expected at least 2, or one lost datagram ends a peer",
        ),
        ({"hops_max": 0}, "network.hops_max: expected a whole number above 0 and at most 1000, got 0"),
        ({"discover": LOOPBACK}, "network.discover: no field has this name; did you mean network.discovery?"),
        ({"limits": {}}, "network.limits: no field has this name; did you mean limits?"),
    ],
)
def test_a_wrong_field_is_told_with_its_path_and_what_was_expected(fields: dict[str, Any], line: str):
    (told,) = refused(fields)
    assert told.startswith(line)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"discovery": LOOPBACK},
        {"discovery": LOOPBACK + "&group=x"},
        {"discovery": LOOPBACK + "&group=x", "group": "x"},
        {"discovery": LOOPBACK, "group": "x"},
        {"peers": ["pybroker://localhost:1,[::1]:2", "pybroker://127.0.0.1:3"]},
        {"peers": ["pybroker+ssl://localhost:1"], **FILES},
        {"advertise": ["pybroker+ssl://a.example:1"]},
        {"include": ["/queue/a.>", "/topic/*"], "exclude": ["/queue/a.b"]},
        {"heartbeat_interval": 1, "heartbeat_timeout": 2},
        {"name": "Zürich, Süd"},
    ],
)
def test_what_is_right_is_taken(fields: dict[str, Any]):
    chosen = made(fields).network
    assert chosen is not None
    for name, value in fields.items():
        found = getattr(chosen, name)
        assert (str(found) if isinstance(found, Path) else found) == (
            tuple(value) if isinstance(value, list) else value
        )


def test_all_faults_are_told_together():
    lines = refused({"discovery": "x", "peers": ["y"], "allow": ["z"], "include": ["a"], "heartbeat_timeout": 0.1})
    assert [line.partition(":")[0] for line in lines] == [
        "network.discovery",
        "network.peers[0]",
        "network.allow[0]",
        "network.include[0]",
        "network.heartbeat_timeout",
    ]


# ---- with other fields


def test_the_broker_needs_a_name_in_the_network():
    (line,) = refused({}, name="pybroker")
    assert line.startswith(
        "network.name: expected a name that no other broker of the network has, and 'pybroker' is the name"
    )
    assert made({"name": "x"}, name="pybroker")
    assert made({}, data_dir="data", replica_set={**REPLICA})


@pytest.mark.parametrize("listen", [[], ["stomp://127.0.0.1:0"]])
def test_links_need_a_native_listener(listen: list[str]):
    (line,) = refused({"discovery": LOOPBACK}, listen=listen)
    assert line.startswith(
        "listen: expected a listener of the native protocol (pybroker://HOST:PORT or pybroker+ssl://)"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_every_interface_is_no_address_to_reach(host: str):
    listen = [f"pybroker://{host}:7000?allow=plaintext,anonymous"]
    (line,) = refused({}, listen=listen)
    assert line == (
        "network.advertise: expected the URLs under which others reach this broker, where it listens on every interface "
        f"(pybroker://{host}:7000)"
    )
    assert made({"advertise": ["pybroker://a.example:7000"]}, listen=listen)


def test_loopback_is_no_address_for_other_machines():
    beyond = {"discovery": "multicast://default", "secret": "x", "allow": ["plaintext"]}
    for fields, path in (({}, "listen"), ({"advertise": ["pybroker://localhost:1"]}, "network.advertise")):
        (line,) = refused({**beyond, **fields})
        assert line.startswith(
            f"{path}: expected an address that other machines reach where network.discovery goes to them"
        )
    assert made(beyond, listen=[NATIVE, OUTSIDE])
    assert made({**beyond, "advertise": ["pybroker://a.example:1"]})


def test_an_announcement_has_room_for_names_and_addresses():
    long = {"name": "ä" * 255, "discovery": LOOPBACK, "group": "ü" * 255}
    assert made(long)
    (line,) = refused(long, name="ö" * 255)
    assert line.startswith("network: the announcement would have 1")
    assert f"and {DATAGRAM_BYTES_MAX} fit: give shorter names" in line
    assert made({**long, "discovery": ""}, name="ö" * 255)  # nothing is announced
    (line,) = refused({"discovery": LOOPBACK, "advertise": [f"pybroker://a:{port}" for port in range(1, 18)]})
    assert line == "network.advertise: expected at most 16 addresses of the native protocol to announce, got 17"
    (line,) = refused({"discovery": LOOPBACK}, listen=[f"pybroker://127.0.0.1:{port}" for port in range(1, 18)])
    assert line == "listen: expected at most 16 addresses of the native protocol to announce, got 17"


# ---- exposure


@pytest.mark.parametrize(
    ("fields", "missing", "allow"),
    [
        ({}, "plaintext and anonymous", '"plaintext", "anonymous"'),
        ({"secret": "x"}, "plaintext", '"plaintext"'),
        ({"allow": ["anonymous"]}, "plaintext", '"plaintext", "anonymous"'),
        ({"allow": ["plaintext"]}, "anonymous", '"plaintext", "anonymous"'),
    ],
)
@pytest.mark.parametrize(
    ("where", "path"),
    [
        ({"discovery": "multicast://default"}, "network.discovery: multicast://239.255.2.3:6155 goes beyond loopback"),
        (
            {"discovery": "multicast://default?interface=10.0.0.1"},
            "network.discovery: multicast://239.255.2.3:6155?interface=",
        ),
        ({"peers": ["pybroker://localhost:1,a.example:2"]}, "network.peers: pybroker://a.example:2 is beyond loopback"),
    ],
)
def test_beyond_loopback_what_is_open_has_to_be_asked_for_by_name(
    fields: dict[str, Any], missing: str, allow: str, where: dict[str, Any], path: str
):
    (line,) = refused({**fields, **where}, listen=[OUTSIDE])
    assert line.startswith(path)
    assert f"and links are {missing}: " in line
    assert f"or ask for it by name with network.allow = [{allow}]" in line
    assert ("or add interface=127.0.0.1" in line) == ("discovery" in where)
    allowed = [word.strip('"') for word in allow.split(", ")]
    assert made({**fields, **where, "allow": allowed}, listen=[OUTSIDE])


def test_tls_and_a_secret_are_enough_beyond_loopback():
    assert made({**FILES, "secret": "x", "discovery": "multicast://default"}, listen=[OUTSIDE])
    assert made({**FILES, "secret": "x", "peers": ["pybroker+ssl://a.example:1"]})
    (line,) = refused({**FILES, "secret": "x", "peers": ["pybroker://a.example:1"]})  # it would be dialled without TLS
    assert "links are plaintext: use pybroker+ssl:// for peers, or ask" in line
    (line,) = refused({**FILES, "peers": ["pybroker+ssl://a.example:1"]})
    assert "links are anonymous: give a secret, or ask" in line


# ---- secrets


@pytest.mark.parametrize(
    "network",
    [
        {"secret": ["hunter2"]},
        {"secret": "hunter2", "name": "", "discovery": "x", "nmae": 1},
        {"secret": "hunter2", "peers": ["pybroker://anna:hunter3@localhost:1"]},
        {"secret": "hunter2", "discovery": LOOPBACK, "group": "ü" * 255, "name": "ä" * 255, "advertise": ["x"]},
        ["hunter2"],
        "hunter2",
    ],
)
def test_secrets_are_never_told(network: Any):
    lines = refused(network)
    assert lines
    assert "hunter" not in "\n".join(lines)


def test_secrets_are_no_part_of_a_repr():
    assert "hunter" not in repr(made({"secret": "hunter2"}))


# ---- numbers


def numeric_fields() -> list[str]:
    hints = get_type_hints(NetworkConfig)
    return [field.name for field in dataclasses.fields(NetworkConfig) if hints[field.name] in (int, float)]


@pytest.mark.parametrize("name", numeric_fields())
@pytest.mark.parametrize("value", [-1, 0, "1", None, True, float("nan"), float("inf"), [1]])
def test_no_number_takes_what_is_not_a_positive_number(name: str, value: object):
    (line,) = refused({name: value})
    assert line.startswith(f"network.{name}: expected a ")


# ---- TOML and the command line


def test_a_toml_table_gives_the_same_fields(tmp_path: Path):
    file = tmp_path / "a.toml"
    file.write_text(
        f"""
        name = "a"
        listen = ["{NATIVE}"]
        [network]
        name = "city"
        discovery = "{LOOPBACK}"
        peers = ["pybroker+ssl://b.example:61620,c.example:61620"]
        secret = "hunter2"
        certificate = "tls/a.pem"
        key = "/etc/a.key"
        peer_ca = "ca.pem"
        exclude = ["/queue/local.>"]
        announce_interval = 1
        """
    )
    assert load_config(file).network == NetworkConfig(
        name="city",
        discovery=LOOPBACK,
        peers=("pybroker+ssl://b.example:61620,c.example:61620",),
        secret="hunter2",
        certificate=tmp_path / "tls/a.pem",
        key=Path("/etc/a.key"),
        peer_ca=tmp_path / "ca.pem",
        exclude=("/queue/local.>",),
        announce_interval=1.0,
    )
    file.write_text('name = "a"\n[network]\nkey = ""\nhops_max = "3"\n')
    with pytest.raises(ConfigurationError) as caught:
        load_config(file)
    assert [line.split(": ")[:2] for line in str(caught.value).splitlines()] == [[str(file), "network.hops_max"]]


def test_the_flags_of_serve_are_the_fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    served: list[BrokerConfig] = []
    monkeypatch.setattr(cli.trio, "run", lambda function, config: served.append(config))
    file = tmp_path / "a.toml"
    file.write_text(f'name = "a"\nlisten = ["{NATIVE}"]\n[network]\nhops_max = 3\npeers = ["pybroker://localhost:9"]\n')
    flags = ["--discovery", LOOPBACK, "--peer", "pybroker://localhost:1", "--peer", "pybroker://localhost:2,[::1]:3"]
    flags += ["--network-name", "city", "--network-group", "x"]
    chosen = NetworkConfig(
        discovery=LOOPBACK, peers=("pybroker://localhost:1", "pybroker://localhost:2,[::1]:3"), name="city", group="x"
    )
    for arguments, expected in (
        (["--name", "a", "--listen", NATIVE], None),
        (["--name", "a", "--listen", NATIVE, *flags], chosen),
        ([str(file)], NetworkConfig(hops_max=3, peers=("pybroker://localhost:9",))),
        ([str(file), *flags], dataclasses.replace(chosen, hops_max=3)),
    ):
        result = CliRunner().invoke(cli.serve, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert served.pop().network == expected
