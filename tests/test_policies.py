"""`pybroker.policies`: which entry a value comes from, what is refused, and that both faces say the same."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker import open_broker
from pybroker.config import BrokerConfig, DeliveryPolicy, Limits, PolicyEntry
from pybroker.destination import Destination, matches, parse_destination
from pybroker.errors import ConfigurationError
from pybroker.policies import VALUES, DestinationPolicy, Policies, fault_of, specificity
from pybroker.settings import load_config, make_config
from tests.support.serving import call_pybroker

names = st.lists(st.sampled_from("ab"), min_size=1, max_size=3).map(tuple)
patterns = st.lists(st.sampled_from(("a", "b", "*")), max_size=3).flatmap(
    lambda parts: st.sampled_from([(*parts, ">"), *([tuple(parts)] if parts else [])])
)


def policies(
    *entries: dict[str, Any], limits: Limits | None = None, delivery: DeliveryPolicy | None = None
) -> Policies:
    return Policies(make_config(policy=entries).policy, limits or Limits(), delivery or DeliveryPolicy())


def faults(*entries: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        make_config(policy=entries)
    return str(caught.value).splitlines()


# ---- which entry goes first


@settings(deadline=None)
@given(st.lists(patterns, max_size=8, unique=True), names)
def test_of_the_patterns_that_match_a_name_one_goes_first_and_no_less_specific_one_before_it(found: Any, name: Any):
    matching = sorted((each for each in found if matches(each, name)), key=specificity)
    for first, second in pairwise(matching):
        assert specificity(first) < specificity(second)
        # from the left: the first part in which they differ decides
        at = next(i for i in range(5) if first[i : i + 1] != second[i : i + 1])
        order = [name[at : at + 1], ("*",), (">",)]
        assert order.index(first[at : at + 1]) < order.index(second[at : at + 1])


@settings(deadline=None)
@given(st.lists(patterns, max_size=8, unique=True), names)
def test_a_value_comes_from_the_most_specific_entry_that_sets_it(found: Any, name: Any):
    entries = [{"match": "/queue/" + ".".join(each), "deliveries_max": n} for n, each in enumerate(found, 1)]
    matching = [each for each in found if matches(each, name)]
    best = min(matching, key=specificity, default=None)
    wanted = found.index(best) + 1 if best is not None else DeliveryPolicy().deliveries_max
    for order in (entries, entries[::-1]):
        assert policies(*order).of(Destination("queue", ".".join(name))).deliveries_max == wanted


def test_the_order_of_specificity_is_literal_before_star_before_the_rest():
    patterns = ["a", "a.b", "a.b.>", "a.*", "a.*.c", "a.>", "*", "*.b", "*.>", ">"]
    mixed = patterns[1::2] + patterns[::2]
    assert sorted(mixed, key=lambda text: specificity(tuple(text.split(".")))) == patterns


def test_queues_and_topics_have_entries_of_their_own():
    found = policies({"match": "/topic/a", "deliveries_max": 1}, {"match": "/queue/>", "deliveries_max": 2})
    assert found.of(parse_destination("/topic/a")).deliveries_max == 1
    assert found.of(parse_destination("/queue/a")).deliveries_max == 2
    assert found.of(parse_destination("/topic/b")).deliveries_max == 6


def test_what_no_entry_sets_is_the_configurations_own():
    found = policies({"match": "/queue/a", "deliveries_max": 1}, delivery=DeliveryPolicy(deliveries_max=9))
    sources = {
        name: {each.name: each for each in found.explain(parse_destination(name))} for name in ("/queue/a", "/queue/b")
    }
    assert sources["/queue/a"]["deliveries_max"][1:4] == (1, "deliveries", "/queue/a")
    assert sources["/queue/b"]["deliveries_max"][1:4] == (9, "deliveries", "delivery.deliveries_max")


def test_a_bounded_number_of_destinations_is_remembered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pybroker.policies.REMEMBERED_MAX", 3)
    found = policies({"match": "/queue/1", "deliveries_max": 1})
    for number in [*range(10), 1]:
        assert found.of(Destination("queue", str(number))).deliveries_max == (1 if number == 1 else 6)
        assert len(found._resolved) <= 3


# ---- what is refused


@pytest.mark.parametrize(
    ("entry", "line"),
    [
        (
            {"match": "queue.a"},
            "policy[0].match: destination 'queue.a' is not known: it must start with /queue/ or /topic/",
        ),
        ({"match": "/queue/a.>.b"}, "policy[0].match: destination '/queue/a.>.b' has '>' before its last part"),
        ({"deliveries_max": 1}, "policy[0].match: expected a pattern such as '/queue/a.>', got None"),
        ("x", "policy[0]: expected a table with `match` and values, got 'x'"),
        (
            {"match": "/queue/a", "deliveries_max": -1},
            "policy[0].deliveries_max: expected a whole number of deliveries, 0 to 2,147,483,647, got -1",
        ),
        (
            {"match": "/queue/a", "delivery_max": 1},
            "policy[0].delivery_max: no value has this name; did you mean deliveries_max?",
        ),
    ],
)
def test_a_wrong_entry_is_told_with_its_path_and_what_was_expected(entry: Any, line: str):
    assert faults(entry) == [line]


def test_the_same_pattern_twice_is_refused():
    entry = {"match": "/queue/a.*", "deliveries_max": 1}
    assert faults(entry, {"match": "/queue/b"}, entry) == [
        "policy[2].match: '/queue/a.*' is the pattern of policy[0], too: make one entry of both"
    ]


@given(st.sampled_from(sorted(VALUES)), st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9))
def test_whatever_a_value_is_it_is_taken_as_its_type_or_refused(name: str, given: Any):
    entry = {"match": "/queue/a", name: given}
    if fault_of(name, given):
        assert faults(entry)[0].startswith(f"policy[0].{name}: ")
    else:
        assert type(make_config(policy=[entry]).policy[0].values[name]) is type(VALUES[name].default)


@pytest.mark.parametrize("name", sorted(VALUES))
def test_each_value_has_a_default_that_it_would_take_a_unit_and_a_meaning(name: str):
    each = VALUES[name]
    assert fault_of(name, each.default) == ""
    assert each.metadata["unit"]
    assert each.metadata["doc"]
    if each.metadata["inherits"]:
        table, _, field = each.metadata["inherits"].partition(".")
        assert getattr(getattr(BrokerConfig(), table), field) == each.default


# ---- the configuration's ways


def test_entries_come_from_toml_from_mappings_and_from_a_config(tmp_path: Path):
    (tmp_path / "x.toml").write_text('[[policy]]\nmatch = "/queue/a.>"\ndeliveries_max = 2\n')
    config = load_config(tmp_path / "x.toml")
    assert config.policy == (PolicyEntry("/queue/a.>", {"deliveries_max": 2}),)
    assert make_config(policy=[{"match": "/queue/a.>", "deliveries_max": 2}]) == config
    assert make_config(config) == config
    assert make_config(config, policy=()).policy == ()


def test_a_policy_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DestinationPolicy().deliveries_max = 1  # type: ignore[misc]


async def test_the_command_says_what_applies_and_why_from_a_file_and_of_a_running_broker():
    with tempfile.TemporaryDirectory(prefix="pb-") as name:
        file, data = Path(name) / "x.toml", Path(name) / "data"
        file.write_text('data_dir = "data"\n[[policy]]\nmatch = "/queue/a.>"\ndeliveries_max = 2\n')
        async with open_broker(load_config(file)) as broker:
            assert broker.policy("/queue/a.b").deliveries_max == 2
            answers = []
            for source in (("--config", file), ("--data", data)):
                done = await trio.to_thread.run_sync(call_pybroker, "policy", "show", "/queue/a.b", "--json", *source)
                assert done.returncode == 0, done.stderr
                answers.append(json.loads(done.stdout))
            assert answers[0] == answers[1] == [each._asdict() for each in broker.explain_policy("/queue/a.b")]
            table = await trio.to_thread.run_sync(call_pybroker, "policy", "show", "/queue/a.b", "--data", data)
            row = next(line for line in table.stdout.decode().splitlines() if "deliveries_max" in line)
            assert [cell.strip() for cell in row.split("│")[1:5]] == ["deliveries_max", "2", "deliveries", "/queue/a.>"]
            wrong = await trio.to_thread.run_sync(call_pybroker, "policy", "show", "a.b", "--data", data)
            assert (wrong.returncode, b"must start with /queue/" in wrong.stderr) == (1, True)
        assert call_pybroker("policy", "show", "/queue/a").returncode == 2
