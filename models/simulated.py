"""Reward models that do not exist: an exact checker's verdict with errors of a known kind and size, as controls for searches.

What a search does to a reward model depends on how that one errs (arXiv:2408.03314 and arXiv:2502.01618 search with good
ones): errors that are drawn anew for every prefix average out, errors that a search can find are found. Here both are dials.
THE VERDICT IS THE REFERENCE'S: whatever is searched with such a model has seen the answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ..basics import fold_seed
from ..tasks.base import Problem, StepChecker
from .ledger import Ledger


@dataclass(frozen=True)
class Errors:
    """How a simulated reward model errs: log-odds of a prefix are `margin` if it is right, -margin if not, and noise.

    `noise` is the standard deviation of a normal draw for each prefix, always the same one. A share `liked` of the wrong lines,
    always the same ones by their text, is taken for `liked_margin` instead: above `margin` these are preferred to right ones.
    """

    margin: float = 1.5
    noise: float = 1.0
    liked: float = 0.0
    liked_margin: float = 2.0

    def __post_init__(self) -> None:
        if self.margin <= 0 or self.noise < 0:
            raise ValueError(f"margin must be more than 0 and noise 0 or more, found {self.margin} and {self.noise}")
        if not 0 <= self.liked <= 1:
            raise ValueError(f"liked must lie in [0, 1], found {self.liked}")


class SimulatedReward:
    """Step scores in (0, 1) of prefixes by their problem's checker and `Errors`. It has no parameters and costs nothing."""

    parameters = 0
    cut_steps = 0
    context = 2**31

    def __init__(self, errors: Errors, task: StepChecker, problems: Mapping[str, Problem], seed: int = 0) -> None:
        """`problems` by prompt: a scorer sees no other name."""
        self.errors, self.task, self.problems, self.seed = errors, task, problems, seed
        self.name, self.ledger = "simulated", Ledger()
        self.step_format = SimpleNamespace(aggregation="last")

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Scores [B][T_b] of (prompt, steps) pairs."""
        return [scores[1:] for scores in self.score_with_root(solutions)]

    def score_with_root(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """As `score`, with the score of the empty prefix in front: [B][1 + T_b]."""
        return [self._scores(prompt, tuple(steps)) for prompt, steps in solutions]

    def _scores(self, prompt: str, steps: tuple[str, ...]) -> list[float]:
        level = self.errors.margin
        scores = [self._score(level, prompt, ())]
        for t, check in enumerate(self.task.check_steps(self.problems[prompt], steps)):
            # A line that goes on rightly from a wrong value changes nothing; one that is wrong in itself does.
            if not check.local_ok and level > -self.errors.margin:
                level = self.errors.liked_margin if self._liked(steps[t]) else -self.errors.margin
            scores.append(self._score(level, prompt, steps[: t + 1]))
        return scores

    def _liked(self, step: str) -> bool:
        return fold_seed(self.seed, "liked", step) / 2**63 < self.errors.liked

    def _score(self, level: float, prompt: str, steps: tuple[str, ...]) -> float:
        draw = (
            random.Random(fold_seed(self.seed, "noise", prompt, *steps)).gauss(0.0, 1.0) if self.errors.noise else 0.0
        )
        return 1 / (1 + math.exp(-level - self.errors.noise * draw))
