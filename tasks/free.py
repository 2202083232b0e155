"""Text of one's own: a problem that belongs to no data set, whose answers are read but have nothing to be compared with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .answers import AnswerKind, canonical, equal, read_answer
from .base import Outcome, Problem, Verdict, split_on
from .guard import BrokenOff, OutOfTime

FreeKind = Literal["any", AnswerKind]

_COUNT = re.compile(
    r"([-$€£]{0,2}[0-9][0-9,.]{0,30})\s{1,3}[A-Za-z ]{1,60}\.?"
)  # "12 apples": the number is the answer
_SIGNS = re.compile(r"[\\^_{}=+*/<>|$0-9]")  # without any of these a marked answer is words


@dataclass(frozen=True)
class FreeText:
    """Problems as somebody types them, for one search at a time; there are no splits.

    With `answer_kind` any, an answer is read as mathematics (a box, a mark such as "answer is", an ending such as "= 3"), else
    it is the last number, else the last line.
    """

    step_separator: str = "\n"
    answer_kind: FreeKind = "any"
    name: str = "free"

    def __post_init__(self) -> None:
        if not self.step_separator:
            raise ValueError("step_separator is empty")

    def problems(self, split: str) -> Sequence[Problem]:
        """Raises ValueError: there are none."""
        raise ValueError("kind free has no problems of its own; it is for `stepladder solve` and `stepladder serve`")

    def split_steps(self, text: str) -> list[str]:
        """The non-empty pieces of a solution between separators."""
        return split_on(text, self.step_separator)

    def read(self, text: str) -> tuple[str, AnswerKind] | None:
        """(canonical answer, its kind) of a text; None if none can be read."""
        kinds: tuple[AnswerKind, ...] = ("math", "number", "text") if self.answer_kind == "any" else (self.answer_kind,)
        for kind in kinds:
            answer = read_answer(text, kind)
            if answer is not None and self.answer_kind == "any" and kind == "math":
                if count := _COUNT.fullmatch(answer):
                    answer, kind = count[1], "number"
                elif not _SIGNS.search(answer):
                    kind = "text"
            form = canonical(answer, kind) if answer is not None else None
            if form is not None:
                return form, kind
        return None

    def verify(self, problem: Problem, text: str) -> Verdict:
        """The answer of a text and, where somebody gave a reference, whether it equals that; without one nothing is right."""
        found = self.read(text)
        if found is None:
            return Verdict(None, Outcome.UNPARSEABLE, "No answer could be read from the text.")
        answer, kind = found
        try:
            right = bool(problem.answer) and equal(problem.answer, answer, kind)
        except (OutOfTime, BrokenOff) as error:
            return Verdict(answer, Outcome.TIMEOUT, f"Comparing the answers was stopped: {error}.")
        said = f"The reference is {problem.answer}." if problem.answer else "There is no reference to compare with."
        return Verdict(answer, Outcome.RIGHT if right else Outcome.WRONG, said)
