"""What a selector says of a message: nodes to functions. Owns types and three-valued logic; evaluation never raises.

A value is text, a number (exact: int, approximate: float), a truth value, or None: unknown. Headers are text; so text is taken as
a number where a number is asked for or stands on the other side, and as a truth value likewise. What can't be taken so is
unknown, as is a header that is not there, a division by zero, and a number out of range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from operator import ge, gt, le, lt

from pybroker.message import Message
from pybroker.selectors.like import like_matcher
from pybroker.selectors.syntax import (
    DIGITS_MAX,
    Among,
    Arithmetic,
    Between,
    Comparison,
    IsNull,
    Junction,
    Like,
    Literal,
    Name,
    Negative,
    Node,
    Not,
)

Number = int | float
Value = str | int | float | bool | None
Headers = Mapping[str, str]
Evaluate = Callable[[Headers, Message], Value]
Truth = Callable[[Headers, Message], bool | None]

BITS_MAX = 4_096  # of an exact result; a longer one is unknown
_READS_AS_NUMBER = re.compile(
    r"[+-]?(?:[0-9]+|(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[0-9]+[eE][+-]?[0-9]+)"
).fullmatch
_TRUTHS = {"true": True, "false": False}
_ORDERS: dict[str, Callable[[Number, Number], bool]] = {"<": lt, "<=": le, ">": gt, ">=": ge}

# JMS names that stand for headers of another name, and those that are no headers.
_HEADER_NAMES = {"JMSType": "type", "JMSCorrelationID": "correlation-id", "JMSReplyTo": "reply-to"}
_FIELDS: dict[str, Evaluate] = {
    "JMSPriority": lambda _, message: message.priority,
    "JMSDeliveryMode": lambda _, message: "PERSISTENT" if message.durable else "NON_PERSISTENT",
    "JMSMessageID": lambda _, message: message.message_id.decode("utf-8", "replace"),
    "JMSTimestamp": lambda _, message: message.timestamp,
    "JMSExpiration": lambda _, message: message.expires,
    "JMSDestination": lambda _, message: message.destination,
}


def number_of(text: str) -> Number | None:
    """The number that a text reads as."""
    if len(text) > DIGITS_MAX or not _READS_AS_NUMBER(text):
        return None
    try:
        return int(text)
    except ValueError:
        value = float(text)
        return None if math.isinf(value) else value


def header_name(name: str) -> str | None:
    """The header that a name in a selector stands for; None: something else of the message."""
    return None if name in _FIELDS else _HEADER_NAMES.get(name, name)


def truth_of(node: Node) -> Truth:
    """The function that says whether a part is true, false or unknown."""
    if isinstance(node, Junction):
        parts = [truth_of(part) for part in node.parts]
        return _every(parts) if node.every else _any(parts)
    if isinstance(node, Not):
        return _not(truth_of(node.part))
    if isinstance(node, Comparison):
        return _comparison(node)
    if isinstance(node, Between):
        part = value_of(node.part)
        return _every([_ordered(ge, part, value_of(node.low)), _ordered(le, part, value_of(node.high))])
    if isinstance(node, Among):
        return _among(value_of(node.part), node.values)
    if isinstance(node, Like):
        return _like(value_of(node.part), like_matcher(node.runs))
    if isinstance(node, IsNull):
        part = value_of(node.part)
        return lambda headers, message: part(headers, message) is None
    value = value_of(node)
    return lambda headers, message: _truth(value(headers, message))


def value_of(node: Node) -> Evaluate:
    """The function that says what a part is worth."""
    if isinstance(node, Literal):
        literal = node.value
        return lambda _, __: literal
    if isinstance(node, Name):
        return _name(node.name)
    if isinstance(node, Arithmetic):
        return _arithmetic(value_of(node.first), [(operator, value_of(operand)) for operator, operand in node.steps])
    if isinstance(node, Negative):
        return _negative(value_of(node.part))
    return truth_of(node)


def _name(name: str) -> Evaluate:
    field = _FIELDS.get(name)
    if field is not None:
        return field
    header = _HEADER_NAMES.get(name, name)
    return lambda headers, _: headers.get(header)


# ---- logic


def _every(parts: list[Truth]) -> Truth:
    def every(headers: Headers, message: Message) -> bool | None:
        result: bool | None = True
        for part in parts:
            truth = part(headers, message)
            if truth is False:
                return False
            if truth is None:
                result = None
        return result

    return every


def _any(parts: list[Truth]) -> Truth:
    def some(headers: Headers, message: Message) -> bool | None:
        result: bool | None = False
        for part in parts:
            truth = part(headers, message)
            if truth:
                return True
            if truth is None:
                result = None
        return result

    return some


def _not(part: Truth) -> Truth:
    def opposite(headers: Headers, message: Message) -> bool | None:
        truth = part(headers, message)
        return None if truth is None else not truth

    return opposite


def _truth(value: Value) -> bool | None:
    if value.__class__ is str:
        return _TRUTHS.get(value.lower()) if len(value) <= 5 else None
    return value if value.__class__ is bool else None


# ---- comparisons


def _comparison(node: Comparison) -> Truth:
    left, right = value_of(node.left), value_of(node.right)
    operator = node.operator
    if operator not in ("=", "<>"):
        return _ordered(_ORDERS[operator], left, right)
    alike = _same_text(node) or (lambda headers, message: equal(left(headers, message), right(headers, message)))
    return alike if operator == "=" else _not(alike)


def _same_text(node: Comparison) -> Truth | None:
    """The same for the most frequent comparison, a header with a text; None for others."""
    name, literal = (node.left, node.right) if isinstance(node.left, Name) else (node.right, node.left)
    if not isinstance(name, Name) or not isinstance(literal, Literal) or literal.value.__class__ is not str:
        return None
    header = header_name(name.name)
    if header is None:
        return None
    wanted = literal.value

    def same(headers: Headers, _: Message) -> bool | None:
        text = headers.get(header)
        return None if text is None else text == wanted

    return same


def equal(left: Value, right: Value) -> bool | None:
    """Whether two values are equal, or None."""
    if left is None or right is None:
        return None
    if left.__class__ is str:
        if right.__class__ is str:
            return left == right
        left, right = right, left
    if right.__class__ is str:
        assert isinstance(right, str)
        right = _truth(right) if left.__class__ is bool else number_of(right)
        return None if right is None else left == right
    if (left.__class__ is bool) is not (right.__class__ is bool):
        return None
    return left == right


def _ordered(order: Callable[[Number, Number], bool], left: Evaluate, right: Evaluate) -> Truth:
    def ordered(headers: Headers, message: Message) -> bool | None:
        first = _number(left(headers, message))
        if first is None:
            return None
        second = _number(right(headers, message))
        return None if second is None else order(first, second)

    return ordered


def _among(part: Evaluate, values: list[str | int | float]) -> Truth:
    texts = frozenset(value for value in values if value.__class__ is str)
    numbers = frozenset(value for value in values if value.__class__ is not str)

    def among(headers: Headers, message: Message) -> bool | None:
        """``=`` with each of the values, joined by OR."""
        value = part(headers, message)
        if value is None:
            return None
        if value.__class__ is str:
            if value in texts:
                return True
            if not numbers:
                return False
            number = number_of(value)
            return None if number is None else number in numbers
        if value.__class__ is bool:
            return _worst([equal(value, each) for each in values])
        if value in numbers:
            return True
        return _worst([equal(value, each) for each in texts]) if texts else False

    return among


def _worst(truths: list[bool | None]) -> bool | None:
    """Of several joined by OR."""
    if True in truths:
        return True
    return None if None in truths else False


def _like(part: Evaluate, matches: Callable[[str], bool]) -> Truth:
    def like(headers: Headers, message: Message) -> bool | None:
        value = part(headers, message)
        return matches(value) if value.__class__ is str else None

    return like


# ---- arithmetic


def _number(value: Value) -> Number | None:
    if isinstance(value, str):
        return number_of(value)
    return None if isinstance(value, bool) else value


def _negative(part: Evaluate) -> Evaluate:
    def negative(headers: Headers, message: Message) -> Value:
        value = _number(part(headers, message))
        return None if value is None else -value

    return negative


def _arithmetic(first: Evaluate, steps: list[tuple[str, Evaluate]]) -> Evaluate:
    def arithmetic(headers: Headers, message: Message) -> Value:
        result = _number(first(headers, message))
        for operator, operand in steps:
            value = _number(operand(headers, message))
            if result is None or value is None:
                return None
            result = calculate(operator, result, value)
        return result

    return arithmetic


def calculate(operator: str, left: Number, right: Number) -> Number | None:
    """One step. Exact numbers give an exact one; a quotient of these is cut towards zero, as in Java."""
    try:
        if operator == "+":
            result = left + right
        elif operator == "-":
            result = left - right
        elif operator == "*":
            result = left * right
        elif left.__class__ is int and right.__class__ is int:
            result = abs(left) // abs(right)
            result = result if (left < 0) is (right < 0) else -result
        else:
            result = left / right
    except (ZeroDivisionError, OverflowError):
        return None
    if result.__class__ is int:
        return result if result.bit_length() <= BITS_MAX else None
    return result if math.isfinite(result) else None
