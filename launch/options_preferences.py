"""Options of the stages that make pairs, and of those that self-training needs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import at_least, option
from .options import WithPolicy


@dataclass
class SolutionPairs:
    """Pairs right solutions of a problem with wrong ones (Pair rows)."""

    solutions: str = option("", "Solution rows with right and wrong ones of the same problem")
    per_problem: int = option(4, "pairs of each problem at most; 0 for all")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "per_problem")


@dataclass
class StepPairs(WithPolicy):
    """Corrects the first wrong step of wrong solutions (Step-DPO; Pair rows)."""

    solutions: str = option("", "Solution rows; the wrong ones among them are corrected")
    labels: str = option("", "StepLabels rows of them, for a task without an exact step checker")
    per_problem: int = option(0, "wrong solutions of each problem at most, the first sampled; 0 for all")
    rollouts: int = option(8, "continuations from before each wrong step")
    winners: int = option(1, "corrections kept for each wrong step, those that ended right most often")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rollouts", "winners")
        at_least(self, 0, "per_problem")


@dataclass
class MCTSDPOTrees(WithPolicy):
    """Grows trees of steps judged by the policy itself or by rollouts (MCTS-DPO; Tree rows)."""

    value: Literal["self", "rollouts"] = option(
        "self", "what judges a step: self (the policy's own opinion) or rollouts (completions that end right)"
    )
    iterations: int = option(8, "descents before each move")
    first_factor: int = option(4, "so many times more before the first move")
    candidates: int = option(4, "next steps sampled for a node, before duplicates are dropped")
    evaluations: int = option(8, "opinions, or completions, that judge a step")
    max_depth: int = option(12, "most steps of a solution")
    c_puct: float = option(1.0, "weight of exploration")
    length_exponent: float = option(1.25, "a step's prior is exp(log-probability / tokens to this power)")
    gamma: float = option(1.0, "discount of a step, in (0, 1]")
    full_confidence: int = option(
        3, "a judgement is divided by the depth of the step's parent less this, if that is over 1"
    )
    question: str = option("", "what the policy is asked, with {prompt} and {steps}; empty takes a built-in question")
    yes: list[str] = option(["yes"], "how an answer begins that says that the steps are right")
    include_gold_candidate: bool = option(False, "PEEKS: the reference solution's next step is a candidate too")
    hint_self_eval: bool = option(False, "PEEKS: the policy is told the answer when it judges")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "iterations", "first_factor", "evaluations", "max_depth")
        at_least(self, 2, "candidates")
        at_least(self, 0, "c_puct", "length_exponent", "full_confidence")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"gamma must lie in (0, 1], found {self.gamma}")
        if self.question and not ("{prompt}" in self.question and "{steps}" in self.question):
            raise ValueError(f"question must contain {{prompt}} and {{steps}}, found {self.question!r}")
        if not self.yes or not all(self.yes):
            raise ValueError("yes is empty: how does an answer begin that says that the steps are right?")
        if self.hint_self_eval and self.value != "self":
            raise ValueError("hint_self_eval is about value: self")


@dataclass
class Join:
    """Puts rows of one kind from several folders into one."""

    rows: list[str] = option([], "finished folders of rows of the same kind, in this order")
