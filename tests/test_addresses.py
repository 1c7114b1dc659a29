"""What `pybroker.connect` is told: every form, every fault with what was expected, and any text at all."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.addresses import URL_LENGTH_MAX, parse_learned, parse_target
from pybroker.connect_options import IN_URL, ConnectOptions, with_options
from pybroker.errors import ConfigurationError

DEFAULT = ConnectOptions()


def urls(text: str) -> list[str]:
    return [address.url for address in parse_target(text).brokers]


def test_one_broker() -> None:
    target = parse_target("pybroker://host:61620")
    assert (target.discovery, target.learns, target.options) == (None, False, DEFAULT)
    assert urls("pybroker://host:61620") == ["pybroker://host:61620"]
    assert urls("pybroker+ssl://[::1]:1") == ["pybroker+ssl://[::1]:1"]
    assert parse_target("pybroker://host:1?deadline=inf&elsewhere=repeat").options == ConnectOptions(
        deadline=math.inf, elsewhere="repeat"
    )


def test_several() -> None:
    assert urls("pybroker://a:1,pybroker+ssl://b:2") == ["pybroker://a:1", "pybroker+ssl://b:2"]
    assert not parse_target("pybroker://a:1,pybroker://b:2").learns
    for form in ("failover:(pybroker://a:1,pybroker://b:2)", "failover://(pybroker://a:1, pybroker://b:2)"):
        assert urls(form) == ["pybroker://a:1", "pybroker://b:2"]
        assert parse_target(form).learns
    target = parse_target("failover:(pybroker://a:1)?spread=first&reconnect_delay=0.2&learn=false&addresses_max=7")
    assert target.options == ConnectOptions(spread="first", reconnect_delay=0.2, learn=False, addresses_max=7)
    assert not target.learns


def test_discovery() -> None:
    target = parse_target("discovery:(multicast://239.255.2.3:6155?group=city&interface=127.0.0.1)?deadline=5")
    assert target.brokers == ()
    assert target.discovery is not None
    assert (target.discovery.address, target.discovery.port, target.discovery.group) == ("239.255.2.3", 6155, "city")
    assert target.options.deadline == 5
    assert target.learns


def test_options_that_are_given_are_the_base() -> None:
    base = ConnectOptions(deadline=3, discovery_secret="s")
    assert parse_target("pybroker://a:1", base).options is base
    assert parse_target("pybroker://a:1?spread=first", base).options == ConnectOptions(
        deadline=3, discovery_secret="s", spread="first"
    )
    assert "'s'" not in repr(base)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "empty"),
        ("host:61620", "has no scheme"),
        ("http://host:1", "expected pybroker://HOST:PORT"),
        ("stomp://host:1", "stomp is not spoken by this client"),
        ("pybroker://host", "expected pybroker://HOST:PORT"),
        ("pybroker://host:0", "port 0"),
        ("pybroker://host:65536", "port 65536"),
        ("pybroker://:1", "expected"),
        ("pybroker://0.0.0.0:1", "every interface"),
        ("pybroker://user:word@host:1", "user or a password|takes no user or password"),
        ("pybroker://a:1,", "is empty"),
        ("pybroker://a:1,pybroker://a:1", "given twice"),
        ("pybroker://a:1,pybroker://b:1?deadline=5", "failover:"),
        ("failover:pybroker://a:1", "followed by brackets"),
        ("failover:(pybroker://a:1", "not closed"),
        ("failover:()", "is empty"),
        ("failover:(pybroker://a:1)deadline=5", "behind the brackets"),
        ("failover:(pybroker://a:1?deadline=5)", "behind the brackets"),
        ("failover:(pybroker://a:1)?deadline", "name=value"),
        ("failover:(pybroker://a:1)?deadline=5&deadline=6", "given twice"),
        ("failover:(pybroker://a:1)?dedline=5", "did you mean deadline"),
        ("failover:(pybroker://a:1)?deadline=soon", "option deadline: expected a number of seconds, got 'soon'"),
        ("failover:(pybroker://a:1)?deadline=-1", "seconds above 0 or inf"),
        ("failover:(pybroker://a:1)?own_set_first=-1", "seconds from 0, got"),
        ("failover:(pybroker://a:1)?own_set_first=nan", "seconds from 0, got"),
        ("failover:(pybroker://a:1)?deadline=nan", "seconds above 0"),
        ("failover:(pybroker://a:1)?reconnect_delay=inf", "seconds above 0"),
        ("failover:(pybroker://a:1)?reconnect_delay=9", "reconnect_delay_max"),
        ("failover:(pybroker://a:1)?spread=fewest", "random or first"),
        ("failover:(pybroker://a:1)?elsewhere=drop", "doubt or repeat"),
        ("failover:(pybroker://a:1)?learn=yes", "true or false"),
        ("failover:(pybroker://a:1)?addresses_max=0", "whole number above 0"),
        ("failover:(pybroker://a:1)?discovery_secret=x", "not known"),
        ("failover:(" + ",".join(f"pybroker://h:{port}" for port in range(1, 300)) + ")", "at most 256"),
        ("discovery:(pybroker://a:1)", "multicast"),
        ("discovery:(multicast://239.255.2.3:6155", "not closed"),
        ("pybroker://" + "a" * URL_LENGTH_MAX, "at most"),
    ],
)
def test_faults_say_what_was_expected(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as caught:
        parse_target(url)
    assert "word" not in str(caught.value).replace("password", "")


def test_not_a_text() -> None:
    with pytest.raises(ConfigurationError, match="must be text"):
        parse_target(b"pybroker://a:1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [
        {"deadline": 0},
        {"deadline": "5"},
        {"deadline": True},
        {"heartbeat_interval": 0.001},
        {"heartbeat_interval": 100_000},
        {"close_timeout": math.inf},
        {"addresses_max": True},
        {"learn": 1},
        {"discovery_secret": None},
        {"spread": "all"},
    ],
)
def test_wrong_options(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        ConnectOptions(**wrong)  # type: ignore[arg-type]


PIECES = "failover: discovery: ( ) ? & = , // pybroker:// pybroker+ssl:// multicast:// a:1 b 239.255.2.3:6155 deadline spread 5 inf"
MORE_PIECES = ("[::1]:2", "@", "%", "%41", "\0", "ü", " ")
pieces = st.sampled_from([*PIECES.split(), *MORE_PIECES])


@given(st.one_of(st.text(max_size=80), st.lists(pieces, max_size=12).map("".join)))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        target = parse_target(text)
    except ConfigurationError:
        return
    assert bool(target.brokers) != (target.discovery is not None)
    for address in target.brokers:
        assert 1 <= address.port <= 65_535
        assert urls(address.url) == [address.url], "what is read can be written"


@given(st.dictionaries(st.one_of(st.sampled_from(IN_URL), st.text(max_size=10)), st.text(max_size=10), max_size=3))
def test_any_options_are_read_or_refused(given_: dict[str, str]) -> None:
    try:
        with_options(DEFAULT, given_)
    except ConfigurationError:
        return


def test_learned_addresses() -> None:
    told = ["pybroker://a:1", "stomp://a:2", "nonsense", "pybroker+ssl://b:3", "pybroker://0.0.0.0:4"]
    assert [each.url for each in parse_learned(told, tls_only=False)] == ["pybroker://a:1", "pybroker+ssl://b:3"]
    assert [each.url for each in parse_learned(told, tls_only=True)] == ["pybroker+ssl://b:3"]
