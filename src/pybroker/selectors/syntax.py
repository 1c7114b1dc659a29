"""Reads a selector: text to nodes, by a grammar for lark. Owns the language's form and the positions of its faults.

Keywords are those of SQL in any case; names are as they are written. Beyond JMS: a name in double quotes (``"content-type"``) may
hold any character, names may hold dots, IN takes numbers too, and parentheses may stand around any part.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError

from pybroker.errors import InvalidSelector

DEPTH_MAX = 100  # parts within parts: each takes a few frames of Python's stack when it is evaluated
DIGITS_MAX = 100  # of a number

GRAMMAR = r"""
start: disjunction

?disjunction: conjunction
    | disjunction OR conjunction                              -> either
?conjunction: inversion
    | conjunction AND inversion                               -> both
?inversion: condition
    | NOT inversion                                           -> opposite
?condition: sum
    | sum COMPARISON sum                                      -> comparison
    | sum BETWEEN sum AND sum                                 -> between
    | sum NOT BETWEEN sum AND sum                             -> not_between
    | sum IN "(" element ("," element)* ")"                   -> among
    | sum NOT IN "(" element ("," element)* ")"               -> not_among
    | sum LIKE STRING                                         -> like
    | sum LIKE STRING ESCAPE STRING                           -> like
    | sum NOT LIKE STRING                                     -> not_like
    | sum NOT LIKE STRING ESCAPE STRING                       -> not_like
    | sum IS NULL                                             -> is_null
    | sum IS NOT NULL                                         -> is_not_null
?sum: product
    | sum (PLUS | MINUS) product                              -> arithmetic
?product: unary
    | product (STAR | SLASH) unary                            -> arithmetic
?unary: atom
    | (PLUS | MINUS) unary                                    -> signed
?atom: STRING                                                 -> string
    | NUMBER                                                  -> number
    | TRUE                                                    -> true
    | FALSE                                                   -> false
    | NAME                                                    -> name
    | QUOTED                                                  -> name
    | "(" disjunction ")"
element: STRING                                               -> string
    | NUMBER                                                  -> number
    | (PLUS | MINUS) NUMBER                                   -> signed_number

OR.2: /OR(?![\w$.])/i
AND.2: /AND(?![\w$.])/i
NOT.2: /NOT(?![\w$.])/i
BETWEEN.2: /BETWEEN(?![\w$.])/i
IN.2: /IN(?![\w$.])/i
LIKE.2: /LIKE(?![\w$.])/i
ESCAPE.2: /ESCAPE(?![\w$.])/i
IS.2: /IS(?![\w$.])/i
NULL.2: /NULL(?![\w$.])/i
TRUE.2: /TRUE(?![\w$.])/i
FALSE.2: /FALSE(?![\w$.])/i
COMPARISON: /<>|<=|>=|=|<|>/
PLUS: "+"
MINUS: "-"
STAR: "*"
SLASH: "/"
STRING: /'[^']*(?:''[^']*)*'/
QUOTED: /"[^"]+(?:""[^"]*)*"/
NUMBER: (HEXADECIMAL | DECIMAL | WHOLE) /(?![\w$])/
HEXADECIMAL: /0[xX][0-9a-fA-F]+[lL]?/
DECIMAL: /(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?[fFdD]?/
WHOLE: /[0-9]+(?:[eE][+-]?[0-9]+[fFdD]?|[fFdD]|[lL])?/
NAME: /(?!\d)[\w$][\w$.]*/
%ignore /[ \t\r\n\f]+/
"""

_WORDS = {
    "NAME": "a name",
    "QUOTED": "a name",
    "STRING": "'text'",
    "NUMBER": "a number",
    "COMPARISON": "a comparison",
    "PLUS": "+",
    "MINUS": "-",
    "STAR": "*",
    "SLASH": "/",
    "LPAR": "(",
    "RPAR": ")",
    "COMMA": ",",
    "$END": "the end",
}
# Of a message's delivery, not of the message.
_OF_THE_DELIVERY = frozenset(("JMSRedelivered", "JMSXDeliveryCount"))


class Node:
    """A part of a selector; `depth`: how many parts lie within each other."""

    __slots__ = ("depth",)

    def __init__(self, *parts: Node) -> None:
        self.depth: int = 1 + max((part.depth for part in parts), default=0)


class Literal(Node):
    __slots__ = ("value",)

    def __init__(self, value: str | int | float | bool) -> None:
        super().__init__()
        self.value = value


class Name(Node):
    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


class Junction(Node):
    """AND (`every`) or OR of two or more parts."""

    __slots__ = ("every", "parts")

    def __init__(self, every: bool, parts: list[Node]) -> None:
        super().__init__(*parts)
        self.every = every
        self.parts = parts


class Not(Node):
    __slots__ = ("part",)

    def __init__(self, part: Node) -> None:
        super().__init__(part)
        self.part = part


class Comparison(Node):
    __slots__ = ("left", "operator", "right")

    def __init__(self, operator: str, left: Node, right: Node) -> None:
        super().__init__(left, right)
        self.operator = operator
        self.left = left
        self.right = right


class Between(Node):
    __slots__ = ("high", "low", "part")

    def __init__(self, part: Node, low: Node, high: Node) -> None:
        super().__init__(part, low, high)
        self.part = part
        self.low = low
        self.high = high


class Among(Node):
    __slots__ = ("part", "values")

    def __init__(self, part: Node, values: list[str | int | float]) -> None:
        super().__init__(part)
        self.part = part
        self.values = values


class Like(Node):
    """`runs`: what stands between the ``%``, each a list of characters, with None for ``_``."""

    __slots__ = ("part", "runs")

    def __init__(self, part: Node, runs: list[list[str | None]]) -> None:
        super().__init__(part)
        self.part = part
        self.runs = runs


class IsNull(Node):
    __slots__ = ("part",)

    def __init__(self, part: Node) -> None:
        super().__init__(part)
        self.part = part


class Arithmetic(Node):
    """From left to right: `first`, then each step's operator (``+ - * /``) and operand."""

    __slots__ = ("first", "steps")

    def __init__(self, first: Node, steps: list[tuple[str, Node]]) -> None:
        super().__init__(first, *(operand for _, operand in steps))
        self.first = first
        self.steps = steps


class Negative(Node):
    """The number with the other sign."""

    __slots__ = ("part",)

    def __init__(self, part: Node) -> None:
        super().__init__(part)
        self.part = part


class _Fault(Exception):
    """Something that the grammar lets through, and where it is."""

    def __init__(self, token: Token, text: str) -> None:
        super().__init__(text)
        self.position = token.start_pos or 0


def parse(text: str) -> Node:
    """The selector's outermost part. Raises InvalidSelector with the place of the fault."""
    try:
        node = _parser().parse(text)
    except UnexpectedToken as error:
        at_end = error.token.type == "$END"
        position = len(text) if at_end else error.pos_in_stream or 0
        found = "the selector ends" if at_end else f"{_short(error.token)} can't stand here"
        raise invalid(text, position, found, _expected(error.accepts or error.expected)) from None
    except UnexpectedCharacters as error:
        position = error.pos_in_stream or 0
        raise invalid(text, position, _bad_character(text[position])) from None
    except UnexpectedInput:
        raise invalid(text, len(text), "the selector ends") from None
    except VisitError as error:
        if isinstance(error.orig_exc, _Fault):
            raise invalid(text, error.orig_exc.position, str(error.orig_exc)) from None
        raise
    except _Fault as error:
        raise invalid(text, error.position, str(error)) from None
    assert isinstance(node, Node)
    return node


def invalid(text: str, position: int, what: str, expected: tuple[str, ...] = ()) -> InvalidSelector:
    """The error for a fault at that position."""
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    wanted = f"; expected {', '.join(expected)}" if expected else ""
    place = f"column {column}" if line == 1 and "\n" not in text else f"line {line}, column {column}"
    near = text[max(position - 20, 0) : position + 20]
    return InvalidSelector(
        f"selector, {place}: {what}{wanted} (near {near!r})",
        position=position,
        line=line,
        column=column,
        expected=expected,
    )


@cache
def _parser() -> Lark:
    return Lark(GRAMMAR, parser="lalr", lexer="basic", transformer=_Builder(), propagate_positions=False)


def _short(token: Token) -> str:
    return repr(str(token)) if len(token) <= 40 else repr(token[:40]) + "..."


def _expected(names: Any) -> tuple[str, ...]:
    """What the grammar would take, in words, in the order of the table, keywords last."""
    words = {_WORDS.get(name, name) for name in names}
    order = list(dict.fromkeys(_WORDS.values()))
    return tuple(sorted(words, key=lambda word: (order.index(word) if word in order else len(order), word)))


def _bad_character(character: str) -> str:
    if character == "'":
        return "a text begins that no ' ends"
    if character == '"':
        return 'a name begins that no " ends'
    if character.isdigit() or character == ".":
        return "this is neither a number nor a name"
    return f"{character!r} has no meaning in a selector"


def _check_depth(node: Node, token: Token) -> Node:
    if node.depth > DEPTH_MAX:
        raise _Fault(token, f"more than {DEPTH_MAX} parts lie within each other")
    return node


def _string(token: Token) -> str:
    return token[1:-1].replace("''", "'")


def _number(token: Token) -> int | float:
    text = token.rstrip("lL") if token[:2] in ("0x", "0X") else token.rstrip("lLfFdD")
    if len(text) > DIGITS_MAX:
        raise _Fault(token, f"a number has more than {DIGITS_MAX} digits")
    if text[:2] in ("0x", "0X"):
        return int(text, 16)
    if text.isdecimal():
        if len(text) > 1 and text[0] == "0":
            raise _Fault(token, "a whole number begins with 0 (octal in Java): write it without, or as 'text'")
        return float(text) if token[-1] in "fFdD" else int(text)
    value = float(text)
    if math.isinf(value):
        raise _Fault(token, "the number is out of the range of a double")
    return value


def _runs(pattern: Token, escape: Token | None) -> list[list[str | None]]:
    """A LIKE pattern, cut at each ``%``."""
    text = _string(pattern)
    mark = None
    if escape is not None:
        mark = _string(escape)
        if len(mark) != 1:
            raise _Fault(escape, "ESCAPE needs one character")
    runs: list[list[str | None]] = [[]]
    characters = iter(text)
    for character in characters:
        if character == mark:
            escaped = next(characters, "")
            if escaped not in ("%", "_", mark):
                raise _Fault(pattern, f"in the pattern {mark!r} must stand before %, _ or itself")
            runs[-1].append(escaped)
        elif character == "%":
            if runs[-1] or len(runs) == 1:  # several in a row are one
                runs.append([])
        else:
            runs[-1].append(None if character == "_" else character)
    return runs


@v_args(inline=True)
class _Builder(Transformer[Token, Node]):
    """The rules' results. Chains of AND, OR, sums and products become one node each, so their length is no depth."""

    def start(self, node: Node) -> Node:
        return node

    def either(self, left: Node, token: Token, right: Node) -> Node:
        return self._joined(False, left, token, right)

    def both(self, left: Node, token: Token, right: Node) -> Node:
        return self._joined(True, left, token, right)

    def _joined(self, every: bool, left: Node, token: Token, right: Node) -> Node:
        if isinstance(left, Junction) and left.every is every:
            left.parts.append(right)
            left.depth = max(left.depth, right.depth + 1)
            return _check_depth(left, token)
        return _check_depth(Junction(every, [left, right]), token)

    def opposite(self, token: Token, part: Node) -> Node:
        return _check_depth(Not(part), token)

    def comparison(self, left: Node, operator: Token, right: Node) -> Node:
        return _check_depth(Comparison(str(operator), left, right), operator)

    def between(self, part: Node, token: Token, low: Node, _: Token, high: Node) -> Node:
        return _check_depth(Between(part, low, high), token)

    def not_between(self, part: Node, token: Token, _: Token, low: Node, __: Token, high: Node) -> Node:
        return _check_depth(Not(Between(part, low, high)), token)

    def among(self, part: Node, token: Token, *values: Literal) -> Node:
        return _check_depth(Among(part, [each.value for each in values]), token)

    def not_among(self, part: Node, token: Token, _: Token, *values: Literal) -> Node:
        return _check_depth(Not(self.among(part, token, *values)), token)

    def like(
        self, part: Node, token: Token, pattern: Token, _: Token | None = None, escape: Token | None = None
    ) -> Node:
        return _check_depth(Like(part, _runs(pattern, escape)), token)

    def not_like(
        self, part: Node, token: Token, _: Token, pattern: Token, __: Token | None = None, escape: Token | None = None
    ) -> Node:
        return _check_depth(Not(Like(part, _runs(pattern, escape))), token)

    def is_null(self, part: Node, token: Token, _: Token) -> Node:
        return _check_depth(IsNull(part), token)

    def is_not_null(self, part: Node, token: Token, _: Token, __: Token) -> Node:
        return _check_depth(Not(IsNull(part)), token)

    def arithmetic(self, left: Node, operator: Token, right: Node) -> Node:
        if isinstance(left, Arithmetic) and (left.steps[-1][0] in "+-") == (str(operator) in "+-"):
            left.steps.append((str(operator), right))
            left.depth = max(left.depth, right.depth + 1)
            return _check_depth(left, operator)
        return _check_depth(Arithmetic(left, [(str(operator), right)]), operator)

    def signed(self, sign: Token, part: Node) -> Node:
        if isinstance(part, Literal) and part.value.__class__ in (int, float):
            return Literal(-part.value) if sign == "-" else part
        if sign == "+":  # a number, too
            return _check_depth(Negative(Negative(part)), sign)
        return _check_depth(Negative(part), sign)

    def signed_number(self, sign: Token, token: Token) -> Node:
        value = _number(token)
        return Literal(-value if sign == "-" else value)

    def string(self, token: Token) -> Node:
        return Literal(_string(token))

    def number(self, token: Token) -> Node:
        return Literal(_number(token))

    def true(self, _: Token) -> Node:
        return Literal(True)

    def false(self, _: Token) -> Node:
        return Literal(False)

    def name(self, token: Token) -> Node:
        name = token[1:-1].replace('""', '"') if token.type == "QUOTED" else str(token)
        if name in _OF_THE_DELIVERY:
            raise _Fault(token, f"{name} can't be selected by: it belongs to a delivery, not to the message")
        return Name(name)
