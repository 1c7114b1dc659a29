"""Discovery URLs and native addresses: what is taken, and each fault with its mend."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.cluster.discovery import Discovery, parse_discovery
from pybroker.cluster.naming import network_group
from pybroker.cluster.native_urls import NativeAddress, is_every_interface, is_loopback, parse_native_url, parse_peer
from pybroker.config import BrokerConfig, NetworkConfig, ReplicaSetConfig
from pybroker.errors import ConfigurationError


@pytest.mark.parametrize(
    ("url", "discovery"),
    [
        ("multicast://239.255.2.3:6155", Discovery()),
        ("multicast://default", Discovery()),
        ("multicast://default:7000/?group=a", Discovery(port=7_000, group="a")),
        ("multicast://224.1.2.3", Discovery("224.1.2.3")),
        (
            "multicast://239.1.1.1:1?interface=127.0.0.1&group=city%20%26%20country",
            Discovery("239.1.1.1", 1, "city & country", "127.0.0.1"),
        ),
    ],
)
def test_discovery_urls(url: str, discovery: Discovery):
    assert parse_discovery(url) == discovery
    assert parse_discovery(discovery.url) == discovery


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "must look like multicast://ADDRESS:PORT?group=G&interface=IP"),
        ("239.255.2.3:6155", "must look like multicast://"),
        ("multicast://239.255.2.3:6155\n", "must look like multicast://"),
        ("multicast://239.255.2.3:6155/x", "must look like multicast://"),
        ("multicast://[ff02::1]:6155", "must look like multicast://"),
        ("udp://239.255.2.3:6155", "scheme 'udp' is not known, only multicast is"),
        ("multicast://:6155", "'' is not an IPv4 multicast address (224.0.0.0 to 239.255.255.255)"),
        ("multicast://10.0.0.1:6155", "'10.0.0.1' is not an IPv4 multicast address"),
        ("multicast://a.example:6155", "'a.example' is not an IPv4 multicast address"),
        ("multicast://239.255.2.3:0", "port 0 is not one of 1 to 65535"),
        ("multicast://239.255.2.3:65536", "port 65536 is not one of 1 to 65535"),
        (
            "multicast://default?grup=a",
            "option 'grup' is not known, only group and interface are (did you mean group?)",
        ),
        ("multicast://default?group=a&group=b", "option 'group' is given twice"),
        ("multicast://default?group=", "option 'group' has no value"),
        ("multicast://default?group", "option 'group' has no value"),
        ("multicast://default?group=%0a", "group: expected 1 to 255 printable characters"),
        ("multicast://default?group=%ff", "option 'group' has bytes in it that are not UTF-8"),
        ("multicast://default?group=" + "a" * 256, "group: expected 1 to 255 printable characters"),
        (
            "multicast://default?interface=eth0",
            "interface: expected the IPv4 address of one of this machine's interfaces",
        ),
        ("multicast://default?interface=::1", "interface: expected the IPv4 address"),
        ("multicast://default?interface=239.1.1.1", "interface: expected the IPv4 address"),
        ("multicast://default?interface=0.0.0.0", "0.0.0.0 is no interface: leave it out"),
    ],
)
def test_faults_of_discovery_urls(url: str, fault: str):
    with pytest.raises(ConfigurationError) as caught:
        parse_discovery(url)
    assert str(caught.value).startswith(f"discovery {url[:200]!r}: ")
    assert fault in str(caught.value)


@given(st.text() | st.text().map("multicast://default?".__add__) | st.text().map("multicast://".__add__))
def test_any_text_is_a_discovery_url_or_refused(text: str):
    try:
        found = parse_discovery(text)
    except ConfigurationError:
        return
    assert parse_discovery(found.url) == found


def test_what_goes_beyond_loopback():
    assert parse_discovery("multicast://default").beyond_loopback
    assert parse_discovery("multicast://default?interface=10.0.0.1").beyond_loopback
    assert not parse_discovery("multicast://default?interface=127.0.0.1").beyond_loopback
    assert not parse_discovery("multicast://default?interface=127.3.2.1").beyond_loopback


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("pybroker://a:1", NativeAddress(False, "a", 1)),
        ("pybroker+ssl://a.example:65535", NativeAddress(True, "a.example", 65_535)),
        ("pybroker://[::1]:61620", NativeAddress(False, "::1", 61_620)),
        ("pybroker://127.0.0.1:61620", NativeAddress(False, "127.0.0.1", 61_620)),
    ],
)
def test_native_urls(url: str, address: NativeAddress):
    assert parse_native_url(url) == address
    assert address.url == url
    assert parse_peer(url) == (address,)


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("", "expected pybroker://HOST:PORT or pybroker+ssl://HOST:PORT"),
        ("stomp://a:1", "expected pybroker://HOST:PORT"),
        ("pybroker://a", "expected pybroker://HOST:PORT"),
        ("pybroker://a:1/", "expected pybroker://HOST:PORT"),
        ("pybroker://a:1?x=1", "expected pybroker://HOST:PORT"),
        ("pybroker://ä:1", "expected pybroker://HOST:PORT"),
        ("pybroker://::1:5", "expected pybroker://HOST:PORT"),
        ("pybroker://a:0", "port 0 is not one of 1 to 65535"),
        ("pybroker://a:99999", "port 99999 is not one of"),
        ("pybroker://[10.0.0.1]:1", "[10.0.0.1] is not an IPv6 address"),
        ("pybroker://[::g]:1", "[::g] is not an IPv6 address"),
        ("pybroker://-a:1", "'-a' is not a host name or an address"),
        ("pybroker://:1", "'' is not a host name"),
        ("pybroker://0.0.0.0:1", "0.0.0.0 stands for every interface when listening"),
        ("pybroker://[::]:1", ":: stands for every interface"),
        ("pybroker://[::ffff:0.0.0.0]:1", "stands for every interface"),
        ("pybroker://" + "a" * 250 + ":1", "expected pybroker://HOST:PORT"),
    ],
)
def test_faults_of_native_urls(url: str, fault: str):
    with pytest.raises(ConfigurationError) as caught:
        parse_native_url(url)
    assert str(caught.value).startswith("address '")
    assert fault in str(caught.value)


def test_a_password_in_an_address_is_not_told():
    with pytest.raises(ConfigurationError) as caught:
        parse_native_url("pybroker://anna:hunter2@a:1")
    assert "takes no user or password" in str(caught.value)
    assert "hunter2" not in str(caught.value)


@given(st.text() | st.text().map("pybroker://".__add__))
def test_any_text_is_a_native_url_or_refused(text: str):
    try:
        found = parse_native_url(text)
    except ConfigurationError:
        return
    assert parse_native_url(found.url) == found


def test_a_peer_has_one_address_or_several():
    assert parse_peer("pybroker+ssl://a:1,b:2,pybroker://c:3") == (
        NativeAddress(True, "a", 1),
        NativeAddress(True, "b", 2),
        NativeAddress(False, "c", 3),
    )


@pytest.mark.parametrize(
    ("entry", "fault"),
    [
        ("", "expected pybroker://HOST:PORT"),
        ("a:1", "expected pybroker://HOST:PORT"),
        ("pybroker://a:1,", "expected pybroker://HOST:PORT"),
        ("pybroker://a:1,a:1", "pybroker://a:1 is given twice"),
        (
            ",".join(f"pybroker://a:{port}" for port in range(1, 18)),
            "expected at most 16 addresses of one broker or set",
        ),
    ],
)
def test_faults_of_peers(entry: str, fault: str):
    with pytest.raises(ConfigurationError) as caught:
        parse_peer(entry)
    assert fault in str(caught.value)


def test_hosts():
    assert [is_loopback(host) for host in ("localhost", "LOCALHOST", "127.9.9.9", "::1", "::ffff:127.0.0.1")] == [
        True
    ] * 5
    assert [is_loopback(host) for host in ("a", "10.0.0.1", "::2", "0.0.0.0", "127.0.0.1.example")] == [False] * 5
    assert is_every_interface("0.0.0.0")
    assert is_every_interface("::")
    assert not is_every_interface("::1")


def test_the_name_and_the_group_of_a_broker():
    replicas = ReplicaSetConfig(name="ward", zookeeper="zoo")
    assert BrokerConfig(name="a", network=NetworkConfig()).network_name == "a"
    assert BrokerConfig(name="a", network=NetworkConfig(), replica_set=replicas).network_name == "ward"
    assert BrokerConfig(name="a", network=NetworkConfig(name="x"), replica_set=replicas).network_name == "x"
    assert network_group(NetworkConfig()) == "default"
    assert network_group(NetworkConfig(group="x")) == "x"
    assert network_group(NetworkConfig(discovery="multicast://default?group=y")) == "y"
    assert network_group(NetworkConfig(discovery="multicast://default", group="x")) == "x"
