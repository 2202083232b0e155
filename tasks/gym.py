"""Any data set of reasoning-gym by its name: problems made by seed, answers scored by the data set itself."""

from __future__ import annotations

import difflib
import random
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..basics import UserError, canonical_json, fold_seed
from .answers import read_block
from .base import Outcome, Problem, Verdict, split_on
from .guard import BrokenOff, Guard, OutOfTime

_LONGEST = 4000  # characters of an answer; grids and lists of words are long
_MAKING_SECONDS = 300.0  # of processor time for 500 problems


@dataclass(frozen=True)
class GymTask:
    """Problems of the reasoning-gym data set `dataset`, made with its own `options`.

    Each split has a seed of its own and `sizes` says how many problems are made for it. A problem that an earlier split
    of evaluation (any but `train`) has is dropped and counted, and training loses what any of them has.
    """

    dataset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 1000, "dev": 100, "test": 300})
    seed: int = 0
    timeout: float = 5.0  # seconds of processor time that scoring an answer may take
    step_separator: str = "\n"

    def __post_init__(self) -> None:
        if not self.sizes or not all(isinstance(size, int) and size > 0 for size in self.sizes.values()):
            raise ValueError(f"sizes must give each split a number of problems, found {dict(self.sizes)}")
        if not self.step_separator:
            raise ValueError("step_separator is empty")
        if not self.timeout > 0:
            raise ValueError(f"timeout must be more than 0 seconds, found {self.timeout}")

    @property
    def name(self) -> str:
        return f"reasoning_gym/{self.dataset}"

    @property
    def dropped(self) -> dict[str, int]:
        """How many problems were left out, by reason."""
        return {"duplicates": self._made[1]} if self._made[1] else {}

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split. Raises UserError for an unknown split or data set, or for options it refuses."""
        if split not in self.sizes:
            raise UserError(f"task {self.name}: split must be one of {', '.join(self.sizes)}, found {split!r}")
        return list(self._made[0][split])

    @cached_property
    def _made(self) -> tuple[dict[str, list[Problem]], int]:
        made: dict[str, list[Problem]] = {}
        seen: set[str] = set()
        dropped = 0
        # Evaluation splits are made first, so that training is what loses a problem that both have.
        for split in sorted(self.sizes, key=lambda name: name == "train"):
            made[split] = []
            for start in range(0, self.sizes[split], 500):
                for i, (question, answer) in enumerate(self._make(split, start), start):
                    if question in seen:
                        dropped += 1
                        continue
                    seen.add(question)
                    made[split].append(
                        Problem(f"{self.name}/{split}/{i:05d}", question, answer, {"split": split, "index": i})
                    )
        return made, dropped

    def _make(self, split: str, start: int) -> list[tuple[str, str]]:
        # Made in the child as well: some data sets walk over sets of strings, whose order differs between processes unless
        # the hash seed is fixed, and the child's is.
        try:
            return _child.call(
                "make", start, min(start + 500, self.sizes[split]), seconds=_MAKING_SECONDS, setup=self._setup(split)
            )
        except (OutOfTime, BrokenOff) as error:
            from reasoning_gym.factory import DATASETS

            if self.dataset not in DATASETS:
                near = difflib.get_close_matches(self.dataset, DATASETS, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(DATASETS))}"
                raise UserError(f"reasoning-gym has no data set {self.dataset!r}; {hint}") from None
            options = canonical_json(dict(self.options))
            raise UserError(f"reasoning-gym data set {self.dataset!r} with options {options}: {error}") from None

    def _setup(self, split: str) -> tuple[str, dict[str, Any], int, int]:
        seed = fold_seed(self.seed, "reasoning_gym", self.dataset, split) % 2**31
        return self.dataset, dict(self.options), seed, self.sizes[split]

    # --- solutions -----------------------------------------------------------------------------------------------------

    def split_steps(self, text: str) -> list[str]:
        """The non-empty pieces of a solution between separators."""
        return split_on(text, self.step_separator)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """The data set's own score of the answer that was read: 1 is right, anything less is wrong.

        The answer is what is marked, or the last line; where the reference has several lines, all that follows the mark, or
        as many lines from the end. Scorers may evaluate what they read, so they run in a guarded child process.
        """
        answer = read_block(text, 1 + problem.answer.strip().count("\n"), _LONGEST)
        if answer is None:
            return Verdict(None, Outcome.UNPARSEABLE, "No answer could be read from the text.")
        form = _form(answer)
        split, index = problem.meta.get("split"), problem.meta.get("index")
        if not isinstance(split, str) or split not in self.sizes or not isinstance(index, int):
            return Verdict(form, Outcome.UNPARSEABLE, f"{problem.id} is no problem of this task.")
        try:
            score = float(_child.call("score", index, answer, seconds=self.timeout, setup=self._setup(split)))
        except OutOfTime as error:
            return Verdict(form, Outcome.TIMEOUT, f"Scoring was stopped: {error}.")
        except BrokenOff as error:
            # A scorer that stumbles over what a model wrote has found no right answer.
            return Verdict(form, Outcome.WRONG, f"The data set's scorer refused the answer ({error}).")
        if score >= 1.0:
            return Verdict(form, Outcome.RIGHT, "The data set scores the answer 1.")
        return Verdict(form, Outcome.WRONG, f"The data set scores the answer {score:g} of 1.")


def _form(answer: str) -> str:
    """Canonical form for votes. Scorers differ in what they let pass (case, leading zeros), so only white space is folded."""
    return "\n".join(" ".join(line.split()) for line in answer.strip().splitlines() if line.strip())


# --- in the guarded child ------------------------------------------------------------------------------------------------


def load_dataset(setup: tuple[str, dict[str, Any], int, int]) -> tuple[Any, int, dict[int, dict[str, Any]]]:
    """A data set, its seed, and the problems of it that were looked up to score answers."""
    import reasoning_gym

    name, options, seed, size = setup
    return reasoning_gym.create_dataset(name, seed=seed, size=size, **options), seed, {}


def _entry(data: Any, seed: int, index: int) -> dict[str, Any]:
    # codeio runs programs that draw from the global generators.
    random.seed(fold_seed(seed, "entry", index))
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(fold_seed(seed, "entry", index) % 2**32)
    return data[index]


def make_or_score(loaded: tuple[Any, int, dict[int, dict[str, Any]]], what: str, first: int, rest: Any) -> Any:
    """("make", first, end): questions and answers of these numbers. ("score", number, answer): its score in [0, 1]."""
    data, seed, entries = loaded
    if what == "make":
        made = [_entry(data, seed, i) for i in range(first, rest)]
        return [(str(e["question"]), "" if e["answer"] is None else str(e["answer"])) for e in made]
    if first not in entries:
        entries[first] = _entry(data, seed, first)
    # Scorers differ in whether a full stop or outer white space belongs to the answer: the kindest reading counts.
    readings = dict.fromkeys([rest, rest.strip(), rest.strip().strip("*`").strip(), rest.strip().rstrip(".")])
    return max(float(data.score_answer(answer=reading, entry=entries[first])) for reading in readings)


_child = Guard(__name__, "load_dataset", "make_or_score")
