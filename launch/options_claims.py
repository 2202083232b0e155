"""Options of the stages that judge reward models, values and labels for claims."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import at_least, option
from ..models.step_format import Aggregation


@dataclass
class EvaluateRewards:
    """Compares reward models on one pool of solutions: choosing, ranking, and finding errors (results.json)."""

    models: dict[str, str] = option({}, "name -> folder of a reward model")
    solutions: str = option("", "held-out Solution rows, several of each problem")
    aggregations: list[Aggregation] = option(
        [], "ways to one score a solution: last, min, prod, mean; empty: the advised one"
    )
    task: dict[str, Any] = option({"kind": "chain"}, "the task, for exact step checks where it has them")
    dtype: str = option("float32", "precision of the reward models")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class EvaluateValues:
    """Sets the scores of value models beside counts of right continuations (results.json)."""

    models: dict[str, str] = option({}, "name -> folder of a reward model whose scores are values")
    labels: str = option("", "held-out StepLabels rows with many rollouts")
    k: int = option(4, "attempts of the best-of-k prover whose advantages are compared")
    dtype: str = option("float32", "precision of the reward models")
    seed: int = option(0, "seed of the bootstrap")

    def __post_init__(self) -> None:
        at_least(self, 1, "k")


@dataclass
class EvaluateLabels:
    """Sets sets of step labels beside the exact checker and beside what they cost (results.json)."""

    labels: dict[str, str] = option({}, "name -> StepLabels rows")
    costs: dict[str, list[str]] = option({}, "name -> folders of rows whose making it paid; empty: its own folder")
    task: dict[str, Any] = option({"kind": "chain"}, "the task, with an exact step checker")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class EvaluatePAVToy:
    """Trains the tabular policies of PAV's didactic toy with and without progress of a prover (results.json)."""

    gammas: list[float] = option([2.0, 5.0, 10.0, 30.0, 100.0, 1000.0], "provers: weights of the next right token")
    best_of: list[int] = option([], "provers: the best of so many attempts of the starting policy")
    start_gamma: float = option(2.0, "the starting policy")
    alpha: float = option(1.0, "weight of the prover's advantage")
    level: float = option(0.9, "probability of success that iterations are counted to")
    iterations: int = option(1500, "policy-gradient steps of each arm")
    batch: int = option(64, "sequences of each step")
    learning_rate: float = option(1e-2, "Adam's step size on the table of logits")
    runs: int = option(3, "runs of each arm, with seeds of their own")
    seed: int = option(0, "seed of the runs")

    def __post_init__(self) -> None:
        at_least(self, 1, "iterations", "batch", "runs")
        if min([self.start_gamma, *self.gammas], default=1) <= 0 or min(self.best_of, default=1) < 1:
            raise ValueError("gammas must be greater than 0 and best_of 1 or more")
