"""`pybroker.settings`: what is taken, and that each wrong field is refused with its path and what was expected."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pybroker.config import BrokerConfig, DeliveryPolicy, Limits, StompLimits
from pybroker.errors import ConfigurationError
from pybroker.settings import load_config, make_config
from pybroker.users import hash_password

HASH = hash_password("secret")


def refused(**overrides: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        make_config(**overrides)
    return str(caught.value).splitlines()


def test_the_defaults_are_in_order():
    assert make_config() == BrokerConfig()
    assert make_config(None) == BrokerConfig()


def test_overrides_of_flat_fields():
    config = make_config(name="city", data_dir="data", listen=["stomp://127.0.0.1:0"], sync=False, stop_timeout=3)
    assert config.name == "city"
    assert config.data_dir == Path("data")
    assert config.listen == ("stomp://127.0.0.1:0",)
    assert config.sync is False
    assert config.stop_timeout == 3


def test_a_mapping_changes_some_nested_fields_and_a_dataclass_all():
    base = make_config(limits={"prefetch_default": 10, "full_policy": "refuse"}, stomp=StompLimits(header_count_max=7))
    assert base.limits == Limits(prefetch_default=10, full_policy="refuse")
    assert base.stomp == StompLimits(header_count_max=7)
    assert make_config(base, limits={"prefetch_max": 20}).limits == Limits(
        prefetch_default=10, prefetch_max=20, full_policy="refuse"
    )
    assert make_config(base, limits=Limits(prefetch_max=2_000)).limits == Limits(prefetch_max=2_000)
    assert make_config(base, delivery={}).delivery == DeliveryPolicy()


def test_the_result_is_frozen_and_owes_nothing_to_what_came_in():
    users = {"anna": HASH}
    config = make_config(users=users)
    users["eve"] = HASH
    assert dict(config.users) == {"anna": HASH}
    with pytest.raises(TypeError):
        config.users["eve"] = HASH  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "other"  # type: ignore[misc]


def test_a_config_that_was_built_by_hand_is_checked_too():
    with pytest.raises(ConfigurationError, match=r"limits\.turn_messages_max: expected a whole number above 0, got 0"):
        make_config(BrokerConfig(limits=Limits(turn_messages_max=0)))
    with pytest.raises(ConfigurationError, match="config: expected a BrokerConfig or None, got 'x'"):
        make_config("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"name": 5}, "name: expected text, got 5"),
        ({"name": ""}, "name: expected 1 to 255 printable characters, got ''"),
        ({"data_dir": 5}, "data_dir: expected a path, got 5"),
        *(
            (
                {"delivery": {"cron_timezone": name}},
                'delivery.cron_timezone: expected the name of a time zone, for example "Europe/Berlin", got '
                + repr(name),
            )
            for name in ("Europe/Atlantis", "", "../../etc/passwd")
        ),
        ({"data_dir": "a\0b"}, "data_dir: expected a path without a null character, got 'a\\x00b'"),
        ({"listen": "stomp://127.0.0.1:0"}, "listen: expected a list of texts, got 'stomp://127.0.0.1:0'"),
        ({"listen": ["stomp://127.0.0.1:0", 5]}, "listen[1]: expected text, got 5"),
        ({"anonymous": "yes"}, "anonymous: expected true or false, got 'yes'"),
        ({"anonymous": 1}, "anonymous: expected true or false, got 1"),
        ({"stop_timeout": "5"}, "stop_timeout: expected a number of at least 0, got '5'"),
        ({"stop_timeout": True}, "stop_timeout: expected a number of at least 0, got True"),
        ({"stop_timeout": -1}, "stop_timeout: expected a number of at least 0, got -1"),
        ({"reopen_delay": float("nan")}, "reopen_delay: expected a number above 0, got nan"),
        ({"reopen_delay": 20}, "reopen_delay: expected at most reopen_delay_max (10.0), got 20.0"),
        (
            {"limits": 5},
            "limits: expected a table (mapping) with fields of Limits, got 5",
        ),
        (
            {"limits": {"prefetch_default": "5"}},
            "limits.prefetch_default: expected a whole number above 0, got '5'",
        ),
        ({"limits": {"prefetch_default": 5.0}}, "limits.prefetch_default: expected a whole number above 0, got 5.0"),
        (
            {"limits": {"prefetch_default": 40_000}},
            "limits.prefetch_default: expected at most limits.prefetch_max (32767), got 40000",
        ),
        ({"limits": {"full_policy": "drop"}}, "limits.full_policy: expected one of 'block', 'refuse', got 'drop'"),
        (
            {"stomp": {"heartbeat_tolerance": 0.5}},
            "stomp.heartbeat_tolerance: expected a number of at least 1, got 0.5",
        ),
        (
            {"delivery": {"dead_letter_queue": "/topic/x"}},
            "delivery.dead_letter_queue: expected /queue/NAME without wildcards, got '/topic/x'",
        ),
        (
            {"delivery": {"dead_letter_queue": "/queue/>"}},
            "delivery.dead_letter_queue: expected /queue/NAME without wildcards, got '/queue/>'",
        ),
        ({"users": ["anna"]}, "users: expected a table (mapping) of user name to password hash"),
    ],
)
def test_a_wrong_value_is_told_with_its_path_and_what_was_expected(overrides: dict[str, Any], line: str):
    assert refused(**overrides) == [line]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"nmae": "x"}, "nmae: no field has this name; did you mean name?"),
        (
            {"limits": {"prefetch_defualt": 5}},
            "limits.prefetch_defualt: no field has this name; did you mean limits.prefetch_default?",
        ),
        ({"body_bytes_max": 5}, "body_bytes_max: no field has this name; did you mean stomp.body_bytes_max?"),
        ({"stomp": {"anonymous": True}}, "stomp.anonymous: no field has this name; did you mean anonymous?"),
    ],
)
def test_an_unknown_field_is_refused_with_the_nearest_known_one(overrides: dict[str, Any], line: str):
    assert refused(**overrides) == [line]


def test_a_field_like_none_is_told_with_all_known_ones():
    (line,) = refused(zzzzzz=1)
    assert line.startswith("zzzzzz: no field has this name; known are name, data_dir, listen, users")


def test_all_faults_are_told_at_once():
    lines = refused(name=5, limits={"prefetch_max": 0}, colour="red")
    assert [line.partition(":")[0] for line in lines] == ["name", "limits.prefetch_max", "colour"]


def test_listeners_and_users_are_checked_and_passwords_never_shown():
    lines = refused(
        listen=["stomp://127.0.0.1:0", "stomp://0.0.0.0:0?allow=plaintext", "http://a:1"], users={"anna": "hunter2"}
    )
    assert [line.partition(":")[0] for line in lines] == ["listen[1]", "listen[2]", "users.anna"]
    assert "allow=plaintext,anonymous" in lines[0]
    assert "only stomp, stomp+ssl, pybroker and pybroker+ssl are" in lines[1]
    assert "hunter2" not in "".join(lines)
    for users in ({"anna": 12345678}, {"anna": ["hunter2"]}, "hunter2"):
        assert not {"hunter2", "12345678"} & set(" ".join(refused(users=users)).replace("'", " ").split())


def test_a_native_frame_has_room_for_the_largest_message():
    native = ["pybroker://127.0.0.1:0"]
    with pytest.raises(
        ConfigurationError, match=r"native.frame_bytes_max: expected at least 134348800, .* got 75497472"
    ):
        make_config(listen=native, stomp={"body_bytes_max": 128 * 1024 * 1024})
    make_config(listen=["stomp://127.0.0.1:0"], stomp={"body_bytes_max": 128 * 1024 * 1024})
    frame = {"frame_bytes_max": 136 * 1024 * 1024}
    make_config(listen=native, stomp={"body_bytes_max": 128 * 1024 * 1024}, native=frame)


def test_a_listener_that_nobody_can_log_in_to_is_refused():
    (line,) = refused(anonymous=False, listen=["stomp://127.0.0.1:0"])
    assert line.startswith("users: expected at least one user")
    assert make_config(anonymous=False, listen=["stomp://127.0.0.1:0"], users={"anna": HASH})
    assert make_config(anonymous=False)  # in process only: nobody logs in


def numeric_fields() -> list[tuple[str, str]]:
    found = []
    for parent, kind in (("", BrokerConfig), ("limits", Limits), ("stomp", StompLimits), ("delivery", DeliveryPolicy)):
        hints = get_type_hints(kind)
        found += [(parent, field.name) for field in dataclasses.fields(kind) if hints[field.name] in (int, float)]
    return found


@pytest.mark.parametrize(("parent", "name"), numeric_fields())
@pytest.mark.parametrize("value", [-1, "1", None, True, float("nan"), float("inf"), [1]])
def test_no_number_takes_what_is_not_a_positive_number(parent: str, name: str, value: object):
    path = f"{parent}.{name}" if parent else name
    (line,) = refused(**({parent: {name: value}} if parent else {name: value}))
    assert line.startswith(f"{path}: expected a ")


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first one builds a table of characters
@given(
    st.dictionaries(
        st.sampled_from([*(field.name for field in dataclasses.fields(BrokerConfig)), "x", "limit"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
            max_leaves=5,
        ),
    )
)
def test_whatever_comes_in_is_taken_or_refused_by_configuration_error(overrides: dict[str, Any]):
    try:
        config = make_config(**overrides)
    except ConfigurationError:
        return
    assert make_config(config) == config


def test_a_toml_file_gives_the_same_fields(tmp_path: Path):
    (tmp_path / "pybroker.toml").write_text(
        f"""
        name = "province"
        data_dir = "data"
        listen = ["stomp://127.0.0.1:61613", "stomp+ssl://[::]:61614?cert=tls/a%20b.pem&key=/etc/key.pem&client_ca=ca.pem"]
        anonymous = false
        stop_timeout = 2
        [users]
        anna = "{HASH}"
        [limits]
        prefetch_default = 10
        [delivery]
        deliveries_max = 3
        """
    )
    config = load_config(tmp_path / "pybroker.toml")
    assert config == BrokerConfig(
        name="province",
        data_dir=tmp_path / "data",
        listen=(
            "stomp://127.0.0.1:61613",
            f"stomp+ssl://[::]:61614?cert={tmp_path}/tls/a%20b.pem&key=/etc/key.pem&client_ca={tmp_path}/ca.pem",
        ),
        anonymous=False,
        stop_timeout=2.0,
        users={"anna": HASH},
        limits=Limits(prefetch_default=10),
        delivery=DeliveryPolicy(deliveries_max=3),
    )
    assert load_config(str(tmp_path / "pybroker.toml")) == config


def test_faults_of_a_toml_file_name_the_file(tmp_path: Path):
    path = tmp_path / "x.toml"
    for content, expected in (
        (
            b"name = 5\nlisten = 5\n",
            f"{path}: name: expected text, got 5\n{path}: listen: expected a list of texts, got 5",
        ),
        (b"name = \n", f"{path}: is not TOML: "),
        (b"name = '\xff'\n", f"{path}: is not TOML: "),
    ):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError) as caught:
            load_config(path)
        assert str(caught.value).startswith(expected)
    with pytest.raises(ConfigurationError, match=r"none\.toml: can't be read: No such file"):
        load_config(tmp_path / "none.toml")


def test_importing_the_settings_does_not_import_pydantic():
    program = "import sys, pybroker.settings; sys.exit('pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
