"""Random selectors, written out and compiled, against an interpreter that follows the rules word by word."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pybroker.message import Message, encode_headers
from pybroker.selectors import compile_selector
from pybroker.selectors.index import SelectorIndex

NAMES = ("a", "b", "type", "urgent", "missing")
TEXTS = ("x", "y", "it's", "1", "2.5", "-3", "true", "FALSE", "", "1e2", "%_")
NUMBERS = ("0", "1", "2", "3", "2.5", "100", "1e2", ".5")

# A tree: (kind, part, ...). Kinds have the operators' names.
atoms = st.one_of(
    st.tuples(st.just("name"), st.sampled_from(NAMES)),
    st.tuples(st.just("text"), st.sampled_from(TEXTS)),
    st.tuples(st.just("number"), st.sampled_from(NUMBERS)),
    st.tuples(st.just("truth"), st.booleans()),
)


def grown(trees: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.tuples(st.sampled_from(("AND", "OR")), trees, trees),
        st.tuples(st.just("NOT"), trees),
        st.tuples(st.sampled_from(("=", "<>", "<", "<=", ">", ">=")), trees, trees),
        st.tuples(st.sampled_from(("+", "-", "*", "/")), trees, trees),
        st.tuples(st.just("minus"), trees),
        st.tuples(st.just("plus"), trees),
        st.tuples(st.just("BETWEEN"), trees, trees, trees, st.booleans()),
        st.tuples(
            st.just("IN"),
            trees,
            st.lists(
                st.one_of(
                    *(st.tuples(st.just("text"), st.sampled_from(TEXTS)),) * 2,
                    st.tuples(st.just("number"), st.sampled_from(NUMBERS)),
                ),
                min_size=1,
                max_size=3,
            ),
            st.booleans(),
        ),
        st.tuples(
            st.just("LIKE"),
            trees,
            st.text("xy1%_'!", max_size=4).filter(lambda text: not re.search("!(?![%_!])", text.replace("!!", ""))),
            st.booleans(),
        ),
        st.tuples(st.just("IS NULL"), trees, st.booleans()),
    )


trees = st.recursive(atoms, grown, max_leaves=12)
headers = st.dictionaries(st.sampled_from(NAMES[:4]), st.sampled_from(TEXTS))


def written(tree: Any) -> str:
    """The tree as text, every part in parentheses."""
    kind, *parts = tree
    if kind == "name":
        return parts[0]
    if kind == "text":
        return quoted(parts[0])
    if kind == "number":
        return parts[0]
    if kind == "truth":
        return str(parts[0]).lower()
    negated = "NOT " if parts[-1] is True else ""
    first = f"({written(parts[0])})"
    if kind == "NOT":
        return f"NOT {first}"
    if kind in ("minus", "plus"):
        return f"{'-' if kind == 'minus' else '+'} {first}"
    if kind == "BETWEEN":
        return f"{first} {negated}BETWEEN ({written(parts[1])}) AND ({written(parts[2])})"
    if kind == "IN":
        return f"{first} {negated}IN ({', '.join(written(each) for each in parts[1])})"
    if kind == "LIKE":
        return f"{first} {negated}LIKE {quoted(parts[1])} ESCAPE '!'"
    if kind == "IS NULL":
        return f"{first} IS {negated}NULL"
    return f"{first} {kind} ({written(parts[1])})"


def bare(tree: Any) -> str:
    """The tree as text, with parentheses only where precedence needs them."""
    return _bare(tree)[0]


_LEVELS = {
    "OR": 1,
    "AND": 2,
    "NOT": 3,
    "+": 5,
    "-": 5,
    "*": 6,
    "/": 6,
    "minus": 7,
    "plus": 7,
    "name": 8,
    "text": 8,
    "number": 8,
    "truth": 8,
}


def _bare(tree: Any) -> tuple[str, int]:
    kind, *parts = tree
    level = _LEVELS.get(kind, 4)  # 4: conditions, which do not chain

    def part(each: Any, least: int) -> str:
        text, found = _bare(each)
        return text if found >= least else f"({text})"

    if level == 8:
        return written(tree), 8
    negated = "NOT " if parts[-1] is True else ""
    if kind == "NOT":
        return f"NOT {part(parts[0], 3)}", level
    if level == 7:
        return f"{'-' if kind == 'minus' else '+'} {part(parts[0], 7)}", level
    if kind == "BETWEEN":
        return f"{part(parts[0], 5)} {negated}BETWEEN {part(parts[1], 5)} AND {part(parts[2], 5)}", level
    if kind == "IN":
        return f"{part(parts[0], 5)} {negated}IN({','.join(written(each) for each in parts[1])})", level
    if kind == "LIKE":
        return f"{part(parts[0], 5)} {negated}LIKE {quoted(parts[1])} ESCAPE '!'", level
    if kind == "IS NULL":
        return f"{part(parts[0], 5)} IS {negated}NULL", level
    if level == 4:
        return f"{part(parts[0], 5)} {kind} {part(parts[1], 5)}", level
    return f"{part(parts[0], level)} {kind} {part(parts[1], level + 1)}", level


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


# ---- the interpreter. Values: ("text", str), ("exact", int), ("approximate", float), ("truth", bool), or None


def meaning(tree: Any, found: dict[str, str]) -> Any:
    kind, *parts = tree
    if kind == "name":
        return ("text", found[parts[0]]) if parts[0] in found else None
    if kind == "text":
        return ("text", parts[0])
    if kind == "number":
        return number(parts[0])
    if kind == "truth":
        return ("truth", parts[0])
    if kind == "AND":
        sides = [truth(meaning(part, found)) for part in parts]
        return as_value(False if False in sides else None if None in sides else True)
    if kind == "OR":
        sides = [truth(meaning(part, found)) for part in parts]
        return as_value(True if True in sides else None if None in sides else False)
    if kind == "NOT":
        return opposite(as_value(truth(meaning(parts[0], found))))
    if kind == "BETWEEN":
        low = (">=", parts[0], parts[1])
        return turned(meaning(("AND", low, ("<=", parts[0], parts[2])), found), parts[-1])
    if kind == "IN":
        result: Any = ("truth", False)
        for each in parts[1]:
            one = truth(meaning(("=", parts[0], each), found))
            before = truth(result)
            result = as_value(True if True in (one, before) else None if None in (one, before) else False)
        return turned(result, parts[-1])
    first = meaning(parts[0], found)
    if kind == "IS NULL":
        return ("truth", (first is None) is not parts[-1])
    if kind == "LIKE":
        if first is None or first[0] != "text":
            return None
        pieces = re.findall(r"!.|[^!]", parts[1], re.DOTALL)
        pattern = "".join({"%": ".*", "_": "."}.get(piece) or re.escape(piece[-1]) for piece in pieces)
        return turned(("truth", re.fullmatch(pattern, first[1], re.DOTALL) is not None), parts[-1])
    if kind in ("minus", "plus"):
        value = as_number(first)
        if value is None:
            return None
        return (value[0], -value[1] if kind == "minus" else value[1])
    second = meaning(parts[1], found)
    if kind in ("=", "<>"):
        same = as_value(alike(first, second))
        return same if kind == "=" else opposite(same)
    left, right = as_number(first), as_number(second)
    if left is None or right is None:
        return None
    if kind in ("<", "<=", ">", ">="):
        order = (Fraction(left[1]) > Fraction(right[1])) - (Fraction(left[1]) < Fraction(right[1]))
        return ("truth", {"<": order < 0, "<=": order <= 0, ">": order > 0, ">=": order >= 0}[kind])
    if kind == "/" and right[1] == 0:
        return None
    if left[0] == right[0] == "exact":
        if kind == "/":
            return ("exact", int(Fraction(left[1], right[1])))
        return ("exact", {"+": left[1] + right[1], "-": left[1] - right[1], "*": left[1] * right[1]}[kind])
    a, b = float(left[1]), float(right[1])
    return ("approximate", a + b if kind == "+" else a - b if kind == "-" else a * b if kind == "*" else a / b)


def number(text: str) -> Any:
    return ("exact", int(text)) if re.fullmatch(r"[+-]?\d+", text) else ("approximate", float(text))


def as_number(value: Any) -> Any:
    if value is None or value[0] == "truth":
        return None
    if value[0] != "text":
        return value
    return number(value[1]) if re.fullmatch(r"[+-]?\d+(\.\d*)?(e[+-]?\d+)?", value[1]) else None


def truth(value: Any) -> bool | None:
    if value is None:
        return None
    if value[0] == "text":
        return {"true": True, "false": False}.get(value[1].lower())
    return value[1] if value[0] == "truth" else None


def as_value(result: bool | None) -> Any:
    return None if result is None else ("truth", result)


def opposite(value: Any) -> Any:
    return value and ("truth", not value[1])


def turned(value: Any, negated: bool) -> Any:
    return opposite(value) if negated else value


def alike(first: Any, second: Any) -> bool | None:
    if first is None or second is None:
        return None
    kinds = {first[0], second[0]}
    if kinds == {"text"}:
        return bool(first[1] == second[1])
    if "truth" in kinds:
        if kinds & {"exact", "approximate"}:
            return None
        left, right = truth(first), truth(second)
        return None if left is None or right is None else left is right
    left, right = as_number(first), as_number(second)
    return None if left is None or right is None else Fraction(left[1]) == Fraction(right[1])


def message(found: dict[str, str]) -> Message:
    return Message("/topic/t", b"", encode_headers(found))


@settings(max_examples=300)
@given(trees, headers)
def test_a_selector_says_what_the_rules_say(tree: Any, found: dict[str, str]) -> None:
    expected = truth(meaning(tree, found)) is True
    assert compile_selector(written(tree)).matches(message(found)) is expected
    assert compile_selector(bare(tree)).matches(message(found)) is expected
    assert compile_selector(f"NOT ({bare(tree)})").matches(message(found)) is (truth(meaning(tree, found)) is False)


@given(st.lists(trees, max_size=6), st.lists(headers, max_size=4))
def test_an_index_finds_what_each_selector_says(several: list[Any], messages: list[dict[str, str]]) -> None:
    selectors = [compile_selector(bare(tree)) for tree in several]
    index = SelectorIndex(zip(selectors, range(len(selectors)), strict=True))
    for found in messages:
        sent = message(found)
        assert sorted(index.match(sent)) == [at for at, selector in enumerate(selectors) if selector.matches(sent)]


equalities = st.tuples(
    st.just("="), st.tuples(st.just("name"), st.sampled_from(NAMES)), st.one_of(
        st.tuples(st.just("text"), st.sampled_from(TEXTS)), st.tuples(st.just("number"), st.sampled_from(NUMBERS))
    )
)  # fmt: skip


@given(st.lists(st.one_of(equalities, st.tuples(st.just("AND"), trees, equalities)), max_size=12), headers)
def test_an_index_by_values_finds_what_each_selector_says(several: list[Any], found: dict[str, str]) -> None:
    selectors = [compile_selector(written(tree)) for tree in several]
    assert all(selector.equals for selector in selectors)
    index = SelectorIndex(zip(selectors, range(len(selectors)), strict=True))
    sent = message(found)
    assert sorted(index.match(sent)) == [at for at, selector in enumerate(selectors) if selector.matches(sent)]
