"""Problems in words whose equations are known: an exact check of solutions that are lines `a op b = c`."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ..basics import UserError, fold_seed
from .base import Problem, StepCheck, first_error
from .equations import shown
from .text import TextTask

_NUMBER = r"-?\d+(?:\.\d+)?"
_LINE = re.compile(rf"({_NUMBER}) ?([-+*/]) ?({_NUMBER}) ?= ?({_NUMBER})")
_ANSWER = re.compile(rf"The answer is ({_NUMBER})\.?")
_LONGEST = 80  # characters of a line; the data's have a third of it


@dataclass(frozen=True)
class Operation:
    """One line of a worked solution: an operand is a number, or the result of an earlier line (by its index)."""

    sign: str
    left: Fraction | int
    right: Fraction | int


@dataclass(frozen=True)
class WorkedTask(TextTask):
    """The problems of a TextTask that come with an equation, and an exact check of each line of a solution.

    A line holds if it is the operation that the equation has at its place, on the results that the lines before it wrote, with
    its right value (either order for + and *). A solution that takes another way counts as wrong there, unless all its equations
    are true and its answer is right: then all of it is right.
    """

    def problems(self, split: str) -> list[Problem]:
        """The problems of the split that have a worked solution; splits are those of the whole data."""
        found = [problem for problem in super().problems(split) if self._operations(problem)]
        if not found:
            raise UserError(
                f"task {self.name}: checked needs problems with an equation; split {split!r} has none (see equation_field)"
            )
        return found

    def check_steps(self, problem: Problem, steps: Sequence[str]) -> list[StepCheck]:
        """Whether each line holds given what was written before it, and whether its result is the reference's at that place."""
        operations = self._operations(problem)
        right = _results(operations)
        written: list[Fraction | None] = []  # None: no line, which a later one cannot go on from
        checks = []
        for index, step in enumerate(steps):
            line, answer = _line(step), _answer(step)
            if line is not None and index < len(operations):
                left, sign, value, result = line
                wanted = operations[index]
                asked = tuple(written[x] if isinstance(x, int) else x for x in (wanted.left, wanted.right))
                same = (left, value) == asked or (sign in "+*" and (value, left) == asked)
                holds = sign == wanted.sign and same and _value(left, sign, value) == result
                checks.append(StepCheck(holds, result == right[index]))
                written.append(result)
            elif answer is not None and index == len(operations):
                checks.append(StepCheck(answer == (written or right)[-1], answer == right[-1]))
            else:
                checks.append(StepCheck(False, False))
                written.append(None)
        if first_error(checks) is not None and self._another_way(problem, steps):
            return [StepCheck(True, True)] * len(steps)
        return checks

    def expected_step(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The right next line after `steps`, from the results that they hold; None behind the answer or a line that is none."""
        operations = self._operations(problem)
        lines = [_line(step) for step in steps]
        if len(steps) > len(operations) or None in lines:
            return None
        written = [line[3] for line in lines if line is not None]
        try:
            if len(steps) == len(operations):
                return f"The answer is {shown(written[-1])}"
            left, right = (_resolved(x, written) for x in (operations[len(steps)].left, operations[len(steps)].right))
            return _write(left, operations[len(steps)].sign, right)
        except (ValueError, ZeroDivisionError):
            return None

    def difference(self, step: str, expected: str) -> str | None:
        """The line `z - z* = d` of the results of a step and of the one that is expected; None if either has none."""
        found = []
        for text in (step, expected):
            line = _line(text)
            found.append(line[3] if line is not None else _answer(text))
        if found[0] is None or found[1] is None:
            return None
        try:
            return f"{shown(found[0])} - {shown(found[1])} = {shown(found[0] - found[1])}"
        except ValueError:
            return None

    def planted(self, problem: Problem, index: int, error: str, seed: int, more: float = 0.0) -> list[str]:
        """The right solution with one of `chain.ERRORS` planted at a line; what follows goes on from it, and slips with
        probability `more` at each line.

        The first error is that line. An error that cannot stand there (an operation left out of a solution of one) is a slip.
        """
        count = len(self._operations(problem))
        if not 0 <= index <= count:
            raise ValueError(f"index must lie between 0 and {count}, found {index}")
        for attempt in range(20):
            for kind in (error, "slip"):
                rng = random.Random(fold_seed(seed, "plant", kind, attempt))
                try:
                    lines = self._planted(problem, index, kind, rng, more)
                except (ValueError, ZeroDivisionError):  # a result without a short decimal form
                    continue
                if first_error(self.check_steps(problem, lines)) == index:
                    return lines
        raise ValueError(f"no error can be planted at line {index} of {problem.id}")

    def _planted(self, problem: Problem, index: int, error: str, rng: random.Random, more: float) -> list[str]:
        operations = self._operations(problem)
        last = index == len(operations)
        # Wrong numbers are mostly other numbers of the problem, as a careless reader would have it.
        told = sorted({Fraction(n) for n in re.findall(r"\d+(?:\.\d+)?", problem.prompt.replace(",", ""))})

        def other(value: Fraction) -> Fraction:
            near = [value + d for d in (-10, -2, -1, 1, 2, 10) if value + d >= 0]
            return rng.choice(near)

        written: list[Fraction] = []
        lines = []
        for place, one in enumerate(operations):
            here = error if place == index else ""
            left, right, sign = _resolved(one.left, written), _resolved(one.right, written), one.sign
            if here == "skip":
                if place + 1 == len(operations) and not written:
                    raise ValueError("nothing is left")
                written.append(left if isinstance(one.left, int) else right)
                continue
            if here == "operand" or (here == "copy" and not isinstance(one.left, int)):
                right = rng.choice([n for n in told if n not in (left, right)] or [other(right)])
            elif here == "copy":
                left = other(left)
            elif here == "operator":
                sign = rng.choice([s for s in "+-*/" if s != sign])
            result = _value(left, sign, right)
            if result is None:
                raise ZeroDivisionError
            if here in ("slip", "answer") or (more and place > index and rng.random() < more):
                result = other(result)
            lines.append(f"{shown(left)} {sign} {shown(right)} = {shown(result)}")
            written.append(result)
        return [*lines, f"The answer is {shown(other(written[-1]) if last else written[-1])}"]

    def _another_way(self, problem: Problem, steps: Sequence[str]) -> bool:
        """Whether all lines are true equations, the last one gives the result of the line before it, and it is right."""
        *lines, end = steps
        read = [_line(step) for step in lines]
        answer = _answer(end)
        if answer is None or not read or any(r is None or _value(*r[:3]) != r[3] for r in read):
            return False
        return read[-1] is not None and read[-1][3] == answer and self.verify(problem, end).right

    def _operations(self, problem: Problem) -> list[Operation]:
        """The operations of the reference solution; none if it is not one of lines `a op b = c`."""
        *lines, _ = self.reference_steps(problem) or [""]
        operations: list[Operation] = []
        free: list[tuple[int, Fraction]] = []  # results that no later line has taken yet, the newest last

        def taken(value: Fraction) -> Fraction | int:
            if free and free[-1][1] == value:
                return free.pop()[0]
            return value

        for index, step in enumerate(lines):
            line = _line(step)
            if line is None:
                return []
            right = taken(line[2])  # inner operations come first, and those of the right operand come last
            operations.append(Operation(line[1], taken(line[0]), right))
            free.append((index, line[3]))
        return operations


def _line(step: str) -> tuple[Fraction, str, Fraction, Fraction] | None:
    found = _LINE.fullmatch(step.strip()) if len(step) <= _LONGEST else None
    return (Fraction(found[1]), found[2], Fraction(found[3]), Fraction(found[4])) if found else None


def _answer(step: str) -> Fraction | None:
    found = _ANSWER.fullmatch(step.strip()) if len(step) <= _LONGEST else None
    return Fraction(found[1]) if found else None


def _value(left: Fraction, sign: str, right: Fraction) -> Fraction | None:
    if sign == "/":
        return left / right if right else None
    return left + right if sign == "+" else left - right if sign == "-" else left * right


def _resolved(operand: Fraction | int, written: Sequence[Fraction]) -> Fraction:
    return written[operand] if isinstance(operand, int) else operand


def _results(operations: Sequence[Operation]) -> list[Fraction]:
    written: list[Fraction] = []
    for one in operations:
        value = _value(_resolved(one.left, written), one.sign, _resolved(one.right, written))
        assert value is not None  # the reference was worked out
        written.append(value)
    return written


def _write(left: Fraction, sign: str, right: Fraction) -> str:
    value = _value(left, sign, right)
    if value is None:
        raise ZeroDivisionError
    return f"{shown(left)} {sign} {shown(right)} = {shown(value)}"
