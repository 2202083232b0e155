"""Any data set of reasoning-gym by its name: problems made by seed, answers scored by the data set itself."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..basics import UserError, fold_seed
from .answers import read_answer
from .base import Outcome, Problem, Verdict, split_on


@dataclass(frozen=True)
class GymTask:
    """`dataset` of reasoning-gym with its `options`; each split has its own seed, and equal prompts stay in the first split."""

    dataset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=lambda: {"train": 1000, "dev": 100, "test": 300})
    seed: int = 0
    timeout: float = 5.0  # seconds that scoring an answer may take
    step_separator: str = "\n"

    @property
    def name(self) -> str:
        return f"reasoning_gym/{self.dataset}"

    @cached_property
    def _made(self) -> dict[str, tuple[Any, dict[str, dict[str, Any]]]]:
        import reasoning_gym

        made: dict[str, tuple[Any, dict[str, dict[str, Any]]]] = {}
        seen: set[str] = set()
        for split, size in self.sizes.items():
            try:
                data = reasoning_gym.create_dataset(
                    self.dataset, size=size, seed=fold_seed(self.seed, "gym", split) % 2**31, **self.options
                )
                entries = list(data)
            except (ValueError, TypeError, AssertionError, KeyError) as error:
                raise UserError(f"reasoning_gym data set {self.dataset!r} with {dict(self.options)}: {error}") from None
            fresh = {}
            for i, entry in enumerate(entries):
                if entry["question"] not in seen:
                    seen.add(entry["question"])
                    fresh[f"{self.name}/{split}/{i:05d}"] = entry
            made[split] = (data, fresh)
        return made

    def problems(self, split: str) -> list[Problem]:
        """The problems of a split."""
        if split not in self.sizes:
            raise ValueError(f"split must be one of {', '.join(self.sizes)}, found {split!r}")
        _, entries = self._made[split]
        return [Problem(i, e["question"], str(e["answer"]), {"split": split}) for i, e in entries.items()]

    def split_steps(self, text: str) -> list[str]:
        """The non-empty lines of a solution."""
        return split_on(text, self.step_separator)

    def verify(self, problem: Problem, text: str) -> Verdict:
        """The data set's own score of the marked answer, or of the last line: 1 is right, anything less is wrong."""
        answer = read_answer(text, "text")
        if answer is None:
            return Verdict(None, Outcome.UNPARSEABLE, "the text is empty")
        split = problem.id.split("/")[-2] if problem.id.startswith(self.name) else next(iter(self.sizes))
        data, entries = self._made[split]
        entry = entries.get(problem.id, {"question": problem.prompt, "answer": problem.answer, "metadata": {}})
        score = _within(lambda: float(data.score_answer(answer=answer, entry=entry)), self.timeout)
        form = " ".join(answer.split()).casefold()
        if score is None:
            return Verdict(form, Outcome.TIMEOUT, f"scoring took longer than {self.timeout:g} s")
        right = score >= 1.0
        return Verdict(problem.answer if right else form, Outcome.RIGHT if right else Outcome.WRONG, f"score {score:g}")


def _within(work: Any, seconds: float) -> float | None:
    """What `work` returns, 0.0 if it raises, None if it takes longer than `seconds`.

    A thread that takes too long cannot be stopped and runs on in the background; reasoning-gym's scorers parse text and do not
    evaluate it, so that this is a guard against the exception and not the rule.
    """
    found: list[float] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception:  # a scorer that stumbles over model text has found no right answer
            found.append(0.0)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None
