"""The lab: chains of modular arithmetic with an exact checker for every step and closed-form label error rates.

`ChainArith(p, T)`: a start value in Z_p, then T operations ``+ a``, ``- a`` or ``* u`` (u a unit mod p), so that every
operation is invertible. A problem and its solution read

    Start 3 ; + 5 ; * 2 \\n        3 + 5 = 8 \\n 8 * 2 = 5 \\n Answer: 5
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..basics import fold_seed
from .base import Outcome, Problem, StepCheck, Verdict, first_error, split_on

OPERATIONS = ("+", "-", "*")
# What can be planted into a right solution, in words that a reader, or a model that is to plant it, understands.
ERRORS = {
    "slip": "the line has the right operation and a wrong result",
    "operand": "the line uses another number than the problem says",
    "operator": "the line uses another operation than the problem says",
    "copy": "the line begins with another value than the line before ended with",
    "skip": "the operation is left out",
    "answer": "the last line gives another value than the line before it",
}
_STEP = re.compile(r"(\d{1,6}) ?([-+*]) ?(\d{1,6}) ?= ?(\d{1,6})")
_ANSWER = re.compile(r"Answer: ?(\d{1,6})(?!\d)")  # a longer number is not read by its first digits


def apply(value: int, operation: str, operand: int, p: int) -> int:
    """`value` op `operand` mod p."""
    if operation == "+":
        return (value + operand) % p
    if operation == "-":
        return (value - operand) % p
    return (value * operand) % p


@dataclass(frozen=True)
class ChainArith:
    """Chain arithmetic mod `p` with `min_steps` to `max_steps` operations.

    Splits are disjoint by problem text whatever their sizes: a hash of the text decides its split (60 % train, 20 % dev,
    20 % test), so nothing of an evaluation split can be trained on. `sizes` says how many problems each split has.

    Demonstrations for a policy of middling skill are noisy by fact: a fixed random `noisy_share` of the facts (value,
    operation, operand) carries one fixed wrong result in `noisy_rate` of its uses, and every other fact is wrong (uniformly)
    in `slip_rate` of them.

    With `choices` an answer is graded by its remainder among so many choices, as a multiple-choice grader sees no more than a
    letter: a wrong value may count as right. Steps are checked as ever.
    """

    p: int = 11
    min_steps: int = 4
    max_steps: int = 8
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 2000, "dev": 200, "test": 500})
    seed: int = 0
    noisy_share: float = 0.15
    noisy_rate: float = 0.6
    slip_rate: float = 0.03
    choices: int = 0
    name: str = "chain"
    step_separator: str = "\n"

    def __post_init__(self) -> None:
        if not 3 <= self.p <= 9973:
            raise ValueError(f"p must lie between 3 and 9973, found {self.p}")
        if self.choices and not 2 <= self.choices <= self.p:
            raise ValueError(f"choices must be 0 or lie between 2 and p, found {self.choices}")
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"1 <= min_steps <= max_steps must hold, found {self.min_steps} and {self.max_steps}")

    # --- problems ------------------------------------------------------------------------------------------------------

    @property
    def units(self) -> list[int]:
        """The factors a multiplication may have: units mod p other than 1."""
        return [u for u in range(2, self.p) if math.gcd(u, self.p) == 1]

    def problems(self, split: str) -> list[Problem]:
        """The first `sizes[split]` distinct problems of the split; lengths cycle through min_steps..max_steps."""
        if split not in self.sizes:
            raise ValueError(f"split must be one of {', '.join(self.sizes)}, found {split!r}")
        found: dict[str, Problem] = {}
        lengths = range(self.min_steps, self.max_steps + 1)
        attempt = 0
        while len(found) < self.sizes[split]:
            if attempt > 200 * self.sizes[split] + 10_000:
                raise ValueError(
                    f"chain arithmetic with p={self.p} and {self.min_steps} to {self.max_steps} steps has fewer than "
                    f"{self.sizes[split]} distinct problems in split {split!r}: {len(found)} found"
                )
            problem = self.problem(lengths[len(found) % len(lengths)], fold_seed(self.seed, "problem", split, attempt))
            attempt += 1
            if self.split_of(problem.prompt) == split:
                found.setdefault(problem.prompt, problem)
        return [Problem(f"chain/{split}/{i:05d}", q.prompt, q.answer, q.meta) for i, q in enumerate(found.values())]

    def split_of(self, prompt: str) -> str:
        """The split that a problem's text belongs to; the same for every seed and size."""
        bucket = fold_seed(0, "split", prompt) % 5
        return "train" if bucket < 3 else ("dev" if bucket == 3 else "test")

    def problem(self, steps: int, seed: int) -> Problem:
        """One random problem of `steps` operations."""
        rng = random.Random(seed)
        start = rng.randrange(self.p)
        operations = []
        for _ in range(steps):
            operation = rng.choice(OPERATIONS)
            operand = rng.choice(self.units) if operation == "*" else rng.randrange(1, self.p)
            operations.append((operation, operand))
        value = start
        for operation, operand in operations:
            value = apply(value, operation, operand, self.p)
        prompt = (
            " ; ".join([f"Start {start}", *(f"{operation} {operand}" for operation, operand in operations)]) + " \n"
        )
        return Problem("", prompt, str(value), {"start": start, "operations": operations, "steps": steps})

    def problem_of(self, text: str) -> Problem:
        """The problem that somebody's text states, written as the task writes it. Raises ValueError if it states none."""
        start, *rest = (part.split() for part in text.split(";"))
        form = "expected a problem such as Start 3 ; + 5 ; * 2"
        if (
            len(start) != 2
            or start[0] != "Start"
            or not rest
            or any(len(p) != 2 or p[0] not in OPERATIONS for p in rest)
        ):
            raise ValueError(f"{form}, found {text.strip()[:80]!r}")
        numbers = [start[1], *(operand for _, operand in rest)]
        if wrong := [n for n in numbers if not re.fullmatch("[0-9]{1,6}", n) or int(n) >= self.p]:
            raise ValueError(f"{form}, with numbers from 0 to {self.p - 1}, found {wrong[0][:20]!r}")
        value = int(start[1])
        for operation, operand in rest:
            value = apply(value, operation, int(operand), self.p)
        prompt = " ; ".join([f"Start {int(start[1])}", *(f"{op} {int(number)}" for op, number in rest)]) + " \n"
        operations = [(op, int(number)) for op, number in rest]
        meta = {"start": int(start[1]), "operations": operations, "steps": len(rest)}
        return Problem("", prompt, str(value), meta)

    def parse(self, problem: Problem) -> tuple[int, list[tuple[str, int]]]:
        """(start value, operations) of a problem's text."""
        head, *rest = problem.prompt.strip().split(" ; ")
        return int(head.split()[1]), [(part.split()[0], int(part.split()[1])) for part in rest]

    # --- solutions -----------------------------------------------------------------------------------------------------

    def split_steps(self, text: str) -> list[str]:
        """The lines of a solution."""
        return split_on(text, self.step_separator)

    def reference_steps(self, problem: Problem) -> list[str]:
        """The right solution, without noise."""
        return self._write(problem, lambda value, op, operand: apply(value, op, operand, self.p))

    def demonstration(self, problem: Problem, seed: int) -> list[str]:
        """A noisy solution: what a policy of middling skill learns from. Errors carry on into the lines below."""
        rng = random.Random(seed)

        def noisy(value: int, operation: str, operand: int) -> int:
            right = apply(value, operation, operand, self.p)
            wrong = self.noisy_result(value, operation, operand)
            if wrong is not None:
                return wrong if rng.random() < self.noisy_rate else right
            if rng.random() < self.slip_rate:
                return (right + rng.randrange(1, self.p)) % self.p
            return right

        return self._write(problem, noisy)

    def noisy_result(self, value: int, operation: str, operand: int) -> int | None:
        """The fixed wrong result of a noisy fact; None for a fact that is not noisy."""
        rng = random.Random(fold_seed(self.seed, "fact", value, operation, operand))
        if rng.random() >= self.noisy_share:
            return None
        return (apply(value, operation, operand, self.p) + rng.randrange(1, self.p)) % self.p

    def _write(self, problem, result) -> list[str]:
        value, operations = self.parse(problem)
        lines = []
        for operation, operand in operations:
            after = result(value, operation, operand)
            lines.append(f"{value} {operation} {operand} = {after}")
            value = after
        return [*lines, f"Answer: {value}"]

    def expected_step(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The right next line after `steps`, from the value that they hold; None behind the answer or an unreadable line."""
        value, operations = self.parse(problem)
        if len(steps) > len(operations):
            return None
        if steps:
            written = self.written_result(steps[-1])
            if written is None:
                return None
            value = written
        if len(steps) == len(operations):
            return f"Answer: {value}"
        operation, operand = operations[len(steps)]
        return f"{value} {operation} {operand} = {apply(value, operation, operand, self.p)}"

    def difference(self, step: str, expected: str) -> str | None:
        """The line `z - z* = d` mod p of the results of a step and of the one that is expected; None if either has none."""
        result, wanted = (self._result(text) for text in (step, expected))
        if result is None or wanted is None:
            return None
        return f"{result} - {wanted} = {(result - wanted) % self.p}"

    def _result(self, text: str) -> int | None:
        """What a line or an answer line writes, if it is a residue."""
        answer = _ANSWER.fullmatch(text.strip())
        if answer is None:
            return self.written_result(text)
        return int(answer[1]) if int(answer[1]) < self.p else None

    def planted(self, problem: Problem, index: int, error: str, seed: int, more: float = 0.0) -> list[str]:
        """The right solution with one of `ERRORS` planted at a step; what follows goes on from it, and slips with
        probability `more` at each line.

        The first error is that step. Where the error cannot be told from a right line (an operation that is skipped before an
        equal one), and of "answer" before the last line, it is a slip.
        """
        value, operations = self.parse(problem)
        if not 0 <= index <= len(operations):
            raise ValueError(f"index must lie between 0 and {len(operations)}, found {index}")
        for kind in (error, "slip"):
            rng = random.Random(fold_seed(seed, "plant", kind))
            lines = self._planted(value, list(operations), index, kind, rng, more)
            if first_error(self.check_steps(problem, lines)) == index:
                return lines
        raise ValueError(f"no error can be planted at step {index} of {problem.prompt!r}")

    def _planted(
        self, value: int, operations: list[tuple[str, int]], index: int, error: str, rng: random.Random, more: float
    ) -> list[str]:
        other = lambda number: (number + rng.randrange(1, self.p)) % self.p
        if error == "skip" and index < len(operations):
            del operations[index]
        lines = []
        for position, (operation, operand) in enumerate(operations):
            here = error if position == index else ""
            if here == "operand":
                operand = rng.choice(
                    [n for n in (self.units if operation == "*" else range(1, self.p)) if n != operand] or [operand]
                )
            elif here == "operator":
                operation = rng.choice([o for o in OPERATIONS if o != operation])
            elif here == "copy":
                value = other(value)
            after = apply(value, operation, operand, self.p)
            if here in ("slip", "answer") or (more and position > index and rng.random() < more):
                after = other(after)
            lines.append(f"{value} {operation} {operand} = {after}")
            value = after
        last = index == len(operations) and error != "skip"
        return [*lines, f"Answer: {other(value) if last else value}"]

    def written_result(self, step: str) -> int | None:
        """The result that a line `z op a = z'` writes; None for a line of another form or a number that is no residue."""
        line = _STEP.fullmatch(step.strip())
        return int(line[4]) if line and int(line[4]) < self.p else None

    # --- checks --------------------------------------------------------------------------------------------------------

    def verify(self, problem: Problem, text: str) -> Verdict:
        """Verdict on the number after the last ``Answer:``; a text without one is unparseable."""
        found = _ANSWER.findall(text[-2000:])
        if not found:
            return Verdict(None, Outcome.UNPARSEABLE, "no line 'Answer: <number>'")
        answer = str(int(found[-1]))
        graded = lambda text: int(text) % self.choices if self.choices else text
        if graded(answer) == graded(problem.answer):
            return Verdict(answer, Outcome.RIGHT)
        return Verdict(answer, Outcome.WRONG, f"the answer is {problem.answer}, found {answer}")

    def holds(self, step: str) -> bool:
        """Whether a line's equation holds mod p, whatever the problem asked; an answer line holds."""
        line = _STEP.fullmatch(step.strip())
        if not line:
            return bool(_ANSWER.fullmatch(step.strip()))
        return int(line[4]) == apply(int(line[1]), line[2], int(line[3]), self.p)

    def check_steps(self, problem: Problem, steps: Sequence[str]) -> list[StepCheck]:
        """Exact checks of each step.

        `local_ok`: the line has the right operation, starts from the value on the line before and holds mod p; an answer line
        must repeat the last value after all operations. `on_track`: the written result is the reference's at that point.
        """
        value, operations = self.parse(problem)
        written, right = value, value  # what the solution holds, what the reference holds
        checks = []
        for index, step in enumerate(steps):
            line = _STEP.fullmatch(step.strip())
            answer = _ANSWER.fullmatch(step.strip())
            if index < len(operations):
                right = apply(right, *operations[index], self.p)
            if line and index < len(operations):
                before, after = int(line[1]), int(line[4])
                operation, operand = operations[index]
                local = (
                    before == written
                    and (line[2], int(line[3])) == (operation, operand)
                    and after == apply(before, operation, operand, self.p)
                )
                checks.append(StepCheck(local, after == right))
                written = after
            elif answer and index == len(operations):
                checks.append(StepCheck(int(answer[1]) == written, int(answer[1]) == right))
            else:
                checks.append(StepCheck(False, False))
        return checks


# --- closed forms for the uniform-error policy ----------------------------------------------------------------------------


def value_on_track(p: int, error_rate: float, steps_left: int) -> float:
    """P(final answer right | on track) with `steps_left` steps to go.

    The policy errs on each step with probability `error_rate`, then writes a uniformly random wrong residue:
    c_r = 1/p + (1 - 1/p) lam^r with lam = 1 - eps p / (p - 1).
    """
    return 1 / p + (1 - 1 / p) * _lam(p, error_rate) ** steps_left


def value_off_track(p: int, error_rate: float, steps_left: int) -> float:
    """P(final answer right | off track): w_r = (1 - lam^r) / p."""
    return (1 - _lam(p, error_rate) ** steps_left) / p


def hard_label_error_rates(p: int, error_rate: float, steps_left: int, rollouts: int) -> tuple[float, float]:
    """(false positive, false negative) rates of the label "any of K rollouts ends right", against `on_track`."""
    off = value_off_track(p, error_rate, steps_left)
    on = value_on_track(p, error_rate, steps_left)
    return 1 - (1 - off) ** rollouts, (1 - on) ** rollouts


def flawed_share_of_right(p: int, error_rate: float, steps: int) -> float:
    """Share of solutions with a right answer that contain a flawed step: 1 - (1 - eps)^T / c_T."""
    return 1 - (1 - error_rate) ** steps / value_on_track(p, error_rate, steps)


def _lam(p: int, error_rate: float) -> float:
    return 1 - error_rate * p / (p - 1)
