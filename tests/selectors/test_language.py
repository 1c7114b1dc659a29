"""What selectors mean: the examples of JMS 2.0 section 3.8.1, our rules for text, and what must never happen."""

from __future__ import annotations

import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pybroker.errors import InvalidSelector
from pybroker.message import Message, encode_headers
from pybroker.selectors import compile_selector
from pybroker.selectors.like import like_matcher


def message(headers: Mapping[str, str] | None = None, **fields: object) -> Message:
    made = Message("/queue/orders", b"", encode_headers(headers or {}))
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("selector", "headers", "expected"),
    [
        # of the specification
        (
            "JMSType = 'car' AND color = 'blue' AND weight > 2500",
            {"type": "car", "color": "blue", "weight": "2501"},
            True,
        ),
        (
            "JMSType = 'car' AND color = 'blue' AND weight > 2500",
            {"type": "car", "color": "blue", "weight": "2500"},
            False,
        ),
        ("age BETWEEN 15 AND 19", {"age": "19"}, True),
        ("age BETWEEN 15 AND 19", {"age": "20"}, False),
        ("age NOT BETWEEN 15 AND 19", {"age": "20"}, True),
        ("Country IN ('UK', 'US', 'France')", {"Country": "UK"}, True),
        ("Country IN ('UK', 'US', 'France')", {"Country": "Peru"}, False),
        ("Country NOT IN ('UK', 'US', 'France')", {"Country": "Peru"}, True),
        ("Country NOT IN ('UK', 'US', 'France')", {}, False),
        ("phone LIKE '12%3'", {"phone": "123"}, True),
        ("phone LIKE '12%3'", {"phone": "12993"}, True),
        ("phone LIKE '12%3'", {"phone": "1234"}, False),
        ("word LIKE 'l_se'", {"word": "lose"}, True),
        ("word LIKE 'l_se'", {"word": "loose"}, False),
        (r"underscored LIKE '\_%' ESCAPE '\'", {"underscored": "_foo"}, True),
        (r"underscored LIKE '\_%' ESCAPE '\'", {"underscored": "bar"}, False),
        ("phone NOT LIKE '12%3'", {"phone": "1234"}, True),
        ("phone NOT LIKE '12%3'", {}, False),
        ("prop_name IS NULL", {}, True),
        ("prop_name IS NULL", {"prop_name": ""}, False),
        ("prop_name IS NOT NULL", {"prop_name": "x"}, True),
        ("name = 'it''s'", {"name": "it's"}, True),
        # precedence
        ("a = 1 OR b = 1 AND c = 1", {"a": "1", "b": "0", "c": "0"}, True),
        ("(a = 1 OR b = 1) AND c = 1", {"a": "1", "b": "0", "c": "0"}, False),
        ("NOT a = 1 AND b = 1", {"a": "0", "b": "1"}, True),
        ("1 + 2 * 3 = 7 AND (1 + 2) * 3 = 9 AND 7 - 2 - 1 = 4 AND 8 / 4 / 2 = 1", {}, True),
        ("-a * 2 = -6 AND - -a = 3 AND +a = 3 AND 1 - -a = 4", {"a": "3"}, True),
        ("not a = 1 oR a iS nuLL", {}, True),
        # numbers
        ("a = 57 OR a = +62", {"a": "62"}, True),
        ("a = 7E3 AND a = 7000. AND a = 7000d AND a = 7000L AND a = 0x1B58", {"a": "7000"}, True),
        ("7 / 2 = 3 AND -7 / 2 = -3 AND 7.0 / 2 = 3.5", {}, True),
        ("a = 12345678901234567890", {"a": "12345678901234567891"}, False),
        # text is taken as what the other side is, and is unknown if it can't be
        ("a = 1.0 AND a = '1'", {"a": "1"}, True),
        ("a = '1.0'", {"a": "1"}, False),
        ("a > 1", {"a": "many"}, False),
        ("NOT a > 1", {"a": "many"}, False),
        ("a <> 1", {"a": "many"}, False),
        ("urgent", {"urgent": "true"}, True),
        ("urgent = TRUE AND NOT urgent = FALSE", {"urgent": "True"}, True),
        ("NOT urgent", {"urgent": "perhaps"}, False),
        ("a < b", {"a": "9", "b": "10"}, True),
        ("a = b", {"a": "1", "b": "1.0"}, False),
        ("a IN (1, 'x')", {"a": "1.0"}, True),
        ("a IN (1, 'x')", {"a": "x"}, True),
        ("a NOT IN (1, 'x')", {"a": "y"}, False),  # unknown: y is no number
        # unknown
        ("a = 1 OR b = 1", {"b": "1"}, True),
        ("a = 1 AND b = 1", {"b": "1"}, False),
        ("NOT (a = 1 AND b = 2)", {"b": "1"}, True),
        ("a / 0 = 1 OR a / 0 <> 1 OR a / 0.0 > 1", {"a": "1"}, False),
        ("TRUE > FALSE OR TRUE = 1 OR NOT TRUE = 1", {}, False),
        # names
        ("Color = 'blue'", {"color": "blue"}, False),
        ("$_a.b1 = 'x' AND größe = 5", {"$_a.b1": "x", "größe": "5"}, True),
        ('"content-type" = \'text/plain\' AND "a""b" = 1', {"content-type": "text/plain", 'a"b': "1"}, True),
        ("ORDER = 1 AND android = 1 AND is_null = 1", {"ORDER": "1", "android": "1", "is_null": "1"}, True),
    ],
)
def test_examples(selector: str, headers: dict[str, str], expected: bool) -> None:
    assert compile_selector(selector).matches(message(headers)) is expected


def test_the_names_of_jms() -> None:
    sent = message(
        {"type": "referral", "correlation-id": "c1", "reply-to": "/queue/r", "JMSXGroupID": "g", "JMSXGroupSeq": "3"},
        priority=7,
        message_id=b"m1",
        timestamp=1_700_000_000_000,
        expires=1_700_000_000_500,
    )
    assert compile_selector(
        "JMSPriority > 4 AND JMSDeliveryMode = 'PERSISTENT' AND JMSMessageID = 'm1' AND JMSTimestamp = 1700000000000"
        " AND JMSExpiration - JMSTimestamp = 500 AND JMSType = 'referral' AND JMSCorrelationID = 'c1'"
        " AND JMSReplyTo = '/queue/r' AND JMSDestination LIKE '/queue/%' AND JMSXGroupID = 'g' AND JMSXGroupSeq >= 3"
    ).matches(sent)
    sent.durable = False
    assert compile_selector("JMSDeliveryMode = 'NON_PERSISTENT'").matches(sent)


def test_of_repeated_headers_the_first_one_counts() -> None:
    sent = Message("/queue/a", b"", encode_headers([("a", "1"), ("a", "2")]))
    assert compile_selector("a = 1").matches(sent)


@pytest.mark.parametrize(
    ("selector", "line", "column", "part"),
    [
        ("", 1, 1, "the selector ends"),
        ("  ", 1, 3, "the selector ends"),
        ("a =", 1, 4, "the selector ends"),
        ("a = 'x", 1, 5, "a text begins that no ' ends"),
        ('"a = 1', 1, 1, 'a name begins that no " ends'),
        ("a = 5 5", 1, 7, "'5' can't stand here"),
        ("(a = 1", 1, 7, "the selector ends; expected )"),
        ("a = 1)", 1, 6, "')' can't stand here"),
        ("a LIKE 5", 1, 8, "'5' can't stand here; expected 'text'"),
        ("a LIKE 'x!y' ESCAPE '!'", 1, 8, "'!' must stand before"),
        ("a LIKE 'x!' ESCAPE '!'", 1, 8, "'!' must stand before"),
        ("a LIKE 'x' ESCAPE '!!'", 1, 19, "ESCAPE needs one character"),
        ("a IN ()", 1, 7, "')' can't stand here"),
        ("a BETWEEN 1 OR 2", 1, 13, "'OR' can't stand here; expected +, -, AND"),
        ("a IS 5", 1, 6, "expected NOT, NULL"),
        ("a\n = 1 AND\n  ^", 3, 3, "'^' has no meaning"),
        ("a = 1 AND\nb = = 2", 2, 5, "'=' can't stand here"),
        ("1ab = 2", 1, 1, "neither a number nor a name"),
        ("a = 010", 1, 5, "octal"),
        ("a = 1e999", 1, 5, "range of a double"),
        ("a = " + "1" * 101, 1, 5, "more than 100 digits"),
        ("a = 1 AND JMSRedelivered", 1, 11, "belongs to a delivery"),
        ("a = '\ud800'", 1, 6, "half of a character"),
        ("NOT " * 200 + "a", 1, 401, "more than 100 parts"),
    ],
)
def test_a_fault_is_told_with_its_place(selector: str, line: int, column: int, part: str) -> None:
    with pytest.raises(InvalidSelector) as caught:
        compile_selector(selector)
    assert (caught.value.line, caught.value.column) == (line, column)
    assert part in str(caught.value)
    assert caught.value.position == sum(map(len, selector.splitlines(keepends=True)[: line - 1])) + column - 1


def test_a_selector_that_is_too_long_is_refused() -> None:
    text = "a = 'é'"
    assert compile_selector(text, 8)
    with pytest.raises(InvalidSelector, match=r"8 bytes, and limits\.selector_bytes_max is 7"):
        compile_selector(text, 7)


@pytest.mark.parametrize(
    ("selector", "equals"),
    [
        ("id = 'N'", ("id", "N")),
        ("'N' = id", ("id", "N")),
        ("id = 5", ("id", 5)),
        ("JMSType = 'x'", ("type", "x")),
        ("a > 1 AND (id = 'N' AND c = 2)", ("id", "N")),
        ("id = TRUE", None),
        ("id <> 'N'", None),
        ("NOT id = 'N'", None),
        ("id = 'N' OR a = 1", None),
        ("id = other", None),
        ("JMSPriority = 4", None),
    ],
)
def test_what_must_be_equal_is_known(selector: str, equals: tuple[str, object] | None) -> None:
    assert compile_selector(selector).equals == equals


# ---- built to blow up


@pytest.mark.parametrize(
    "selector",
    [
        "(" * 4_000 + "a" + ")" * 4_000 + " = 1",
        "a IS NOT NULL AND " * 1_000 + "a = 1",
        "a = 1 OR a IS NULL AND " * 500 + "a = 1",
        "a = " + "1 * " * 2_000 + "1",
        "a = " + "--" * 2_000 + "1",
        f"a IN ({', '.join(map(str, range(2_000)))})",
    ],
)
def test_long_ones_are_no_deep_ones(selector: str) -> None:
    assert compile_selector(selector).matches(message({"a": "1"}))


@pytest.mark.parametrize("head", ["NOT ", "-a*(", "a = (b AND (", "1 + (", "a AND (b OR ("])
def test_deep_ones_are_refused_by_name(head: str) -> None:
    text = head * 1_000 + "a" + ")" * (1_000 * head.count("("))
    with pytest.raises(InvalidSelector, match="more than 100 parts lie within each other"):
        compile_selector(text)


def test_numbers_do_not_grow_without_bound() -> None:
    nines = "9" * 100
    huge = " * ".join([nines] * 2_000)
    selector = compile_selector(f"{huge} = 1 OR {huge} <> 1 OR 1e308 * 10 > 1 OR {huge} * 1.5 > 1")
    assert not selector.matches(message())
    assert not compile_selector(f"a * a * a * a * a * a * a * 1.5 > 1 OR a * {nines} * {nines} = 0").matches(
        message({"a": nines})
    )
    assert not compile_selector("a > 1 OR a < 1").matches(message({"a": "9" * 10_000}))


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("%a" * 1_000 + "%b", "a" * 60_000),
        ("%" + "a_" * 1_000 + "b%", "a" * 60_000),
        ("%" + "_" * 2_000 + "b%" * 2, "a" * 60_000),
        ("_%" * 1_000 + "b", "a" * 60_000),
        ("%" + "a" * 2_000 + "b%", "a" * 60_000),
    ],
)
def test_like_takes_time_by_the_texts_length_only(pattern: str, text: str) -> None:
    selector = compile_selector(f"a LIKE '{pattern}'")
    long = message({"a": text})
    begun = time.process_time()
    assert not selector.matches(long)
    assert time.process_time() - begun < 2  # with backtracking: ages; quadratic: minutes


@given(st.text("ab%_", max_size=8), st.text("ab\n", max_size=10))
def test_like_is_what_its_definition_says(pattern: str, text: str) -> None:
    def naive(pattern: str, text: str) -> bool:
        if not pattern:
            return not text
        if pattern[0] == "%":
            return any(naive(pattern[1:], text[at:]) for at in range(len(text) + 1))
        return bool(text) and pattern[0] in ("_", text[0]) and naive(pattern[1:], text[1:])

    assert compile_selector(f"a LIKE '{pattern}'").matches(message({"a": text})) is naive(pattern, text)


def test_runs_without_a_percent_sign_are_the_whole_text() -> None:
    assert like_matcher([[]])("")
    assert not like_matcher([[]])("x")


TOKENS = "a 1 'x' 1.5 ( ) AND OR NOT = < + - * / LIKE IN , IS NULL BETWEEN ESCAPE TRUE q"


def check_any(text: str) -> None:
    try:
        matches = compile_selector(text).matches
    except InvalidSelector as error:
        place = error.position
    else:
        place = 0
        assert matches(message({"a": "1"})) in (True, False)
    assert 0 <= place <= len(text)


@given(st.text(max_size=40))
def test_any_text_is_a_selector_or_refused_with_its_place(text: str) -> None:
    check_any(text)


@given(st.lists(st.sampled_from(TOKENS.split(" "))))
def test_any_tokens_are_a_selector_or_refused_with_their_place(tokens: list[str]) -> None:
    check_any(" ".join(tokens))
