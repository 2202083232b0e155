"""The types of a task: problems, verdicts, and the protocols that every task meets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable


@dataclass(frozen=True)
class Problem:
    """One problem. `answer` is the reference answer in the task's own notation; `meta` is free, JSON only."""

    id: str
    prompt: str
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)


class Outcome(StrEnum):
    """What a verifier found."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSEABLE = "unparseable"  # no answer could be read: not the same as a wrong one
    TIMEOUT = "timeout"  # the check ran out of time: nothing is known


@dataclass(frozen=True)
class Verdict:
    """A verifier's finding about one text.

    `answer` is the canonical form of the answer that was read, equal for answers that count as equal in a vote, and
    None where none was read; `reason` is for people.
    """

    answer: str | None
    outcome: Outcome
    reason: str = ""

    @property
    def right(self) -> bool:
        return self.outcome is Outcome.RIGHT


@dataclass(frozen=True)
class StepCheck:
    """Exact verdict on one step.

    `local_ok`: the step holds given what was written before it; `on_track`: its result is that of the reference.
    """

    local_ok: bool
    on_track: bool


@runtime_checkable
class Task(Protocol):
    """Problems by split, where steps end, and what is right. `verify` never raises and never hangs on model text."""

    @property
    def name(self) -> str: ...

    @property
    def step_separator(self) -> str:
        """The text that ends a step in a policy's output, for example a line break."""
        ...

    def problems(self, split: str) -> Sequence[Problem]: ...

    def split_steps(self, text: str) -> list[str]: ...

    def verify(self, problem: Problem, text: str) -> Verdict: ...


@runtime_checkable
class StepChecker(Protocol):
    """A task that can also check each step exactly."""

    def check_steps(self, problem: Problem, steps: Sequence[str]) -> list[StepCheck]: ...


@runtime_checkable
class StepPlanter(Task, StepChecker, Protocol):
    """A task that can also say what a step should have been, and plant an error into a right solution."""

    def expected_step(self, problem: Problem, steps: Sequence[str]) -> str | None:
        """The right next step after `steps`, from what they hold; None where there is none."""
        ...

    def planted(self, problem: Problem, index: int, error: str, seed: int, more: float = 0.0) -> list[str]:
        """The right solution with an error at step `index`, which is its first; what follows goes on from it.

        Each step behind it slips too, with probability `more`.
        """
        ...


@runtime_checkable
class Subtracts(Protocol):
    """A task that can say by how much a step's result is off, in a line of its own kind."""

    def difference(self, step: str, expected: str) -> str | None:
        """The line `z - z* = d` of the results of a step and of the one expected; None if either has none. Equal ones give 0."""
        ...


@runtime_checkable
class HasReference(Protocol):
    """A task that knows a full right solution of its problems, for supervised fine-tuning."""

    def reference_steps(self, problem: Problem) -> list[str] | None: ...


def first_error(checks: Sequence[StepCheck]) -> int | None:
    """0-based index of the first step that is off the track or does not hold; None if there is none."""
    return next((i for i, check in enumerate(checks) if not (check.on_track and check.local_ok)), None)


def split_on(text: str, separator: str) -> list[str]:
    """The non-empty pieces of `text` between separators, stripped of outer white space."""
    return [piece.strip() for piece in text.split(separator) if piece.strip()]
