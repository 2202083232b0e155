"""Worked solutions from arithmetic expressions: one operation a line, then the answer."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

_OPERATORS: dict[type[ast.operator], tuple[str, Callable[[Fraction, Fraction], Fraction]]] = {
    ast.Add: ("+", operator.add),
    ast.Sub: ("-", operator.sub),
    ast.Mult: ("*", operator.mul),
    ast.Div: ("/", operator.truediv),
}
_LONGEST = 300  # characters; the data's expressions have a tenth of it


def worked_solution(expression: str, answer: str) -> list[str] | None:
    """The lines `a op b = c` of an expression such as ``( 8.0 - 2.0 ) * 3``, inner operations first, then ``The answer is c``.

    None if it is no expression of numbers and + - * /, if it divides by zero, has a result without a short decimal form, or if
    its value is not `answer`.
    """
    lines: list[str] = []
    try:
        if len(expression) > _LONGEST:
            return None
        value = _work(ast.parse(expression.strip(), mode="eval").body, lines)
        if value != Fraction(answer.replace(",", "")):
            return None
        return [*lines, f"The answer is {shown(value)}"]
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _work(node: ast.expr, lines: list[str]) -> Fraction:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_work(node.operand, lines)
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OPERATORS:
        raise ValueError("not an expression of numbers and + - * /")
    sign, apply = _OPERATORS[type(node.op)]
    left, right = _work(node.left, lines), _work(node.right, lines)
    value = apply(left, right)
    lines.append(f"{shown(left)} {sign} {shown(right)} = {shown(value)}")
    return value


def shown(value: Fraction) -> str:
    """The number as people write it, such as 17.5. Raises ValueError if it has no short decimal form."""
    if value.denominator == 1:
        return str(value.numerator)
    text = f"{float(value):.6f}".rstrip("0")
    if Fraction(text) != value:
        raise ValueError("no short decimal form")
    return text
