"""Options of the stages that make pairs, and of those that self-training needs beside them."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import option
from .options import WithPolicy, at_least


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
class Join:
    """Puts rows of one kind from several folders into one."""

    rows: list[str] = option([], "finished folders of rows of the same kind, in this order")
