"""What scores the steps of a rollout: a reward model, or a task's own checker in its place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ..basics import UserError, fold_seed
from ..models.reward import RewardModel
from ..tasks.base import StepChecker, Task
from .rewards import Rollout

CHECKERS = ("checker", "facts")  # stand-ins for a reward model, where a task can check steps itself


class StepJudge(Protocol):
    """Scores the steps of responses."""

    def score(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        """Scores [B][1 + steps] in [0, 1], that of the prompt in front."""
        ...


class CheckedSteps:
    """Scores of a task's own checker in place of a reward model: 1 for a right step, 0 for a wrong one, and 1 for the prompt.

    `facts` asks only whether a line holds, not whether the problem asked for it: a judge that padding deceives. A share
    `false_positives` of the wrong steps, always the same ones, counts as right.
    """

    def __init__(self, task: Task, kind: str, false_positives: float, seed: int) -> None:
        if not isinstance(task, StepChecker) or (kind == "facts" and not hasattr(task, "holds")):
            raise UserError(f"process_reward: {kind}: task {task.name} cannot check steps")
        self.task, self.kind, self.false_positives, self.seed = task, kind, false_positives, seed

    def score(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        return [[1.0, *self._steps(one)] for one in rollouts]

    def _steps(self, one: Rollout) -> Iterator[float]:
        task: Any = self.task
        if self.kind == "facts":
            right = [task.holds(step) for step in one.steps]
        else:
            right = [check.local_ok and check.on_track for check in task.check_steps(one.problem, one.steps)]
        for step, good in zip(one.steps, right, strict=True):
            lucky = fold_seed(self.seed, "false positive", one.problem.id, step) / 2**63 < self.false_positives
            yield float(good or lucky)


class ScoredSteps:
    """Scores of a reward model. It reads text, so that its tokenizer may be another than the policy's."""

    def __init__(self, model: RewardModel) -> None:
        self.model = model

    def score(self, rollouts: Sequence[Rollout]) -> list[list[float]]:
        return self.model.score_with_root([(one.problem.prompt, one.steps) for one in rollouts])


def step_judge(
    name: str, task: Task, *, dtype: str, device: str, false_positives: float, seed: int
) -> StepJudge | None:
    """The judge called `name`: one of CHECKERS, or a reward model's folder; None without a name."""
    if not name:
        return None
    if name in CHECKERS:
        return CheckedSteps(task, name, false_positives, seed)
    return ScoredSteps(RewardModel.load(name, dtype=dtype, device=device))
