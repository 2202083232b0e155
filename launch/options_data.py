"""Options of the stages that make rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..config import at_least, option
from .options import OnTask, WithPolicy


@dataclass
class Demonstrations(OnTask):
    """Writes one solution to learn from for each problem (Dialogue rows)."""


@dataclass
class Solutions(WithPolicy):
    """Samples solutions of each problem with verdicts (Solution rows)."""

    samples: int = option(8, "solutions of each problem")
    unsolved_in: str = option("", "Solution rows: only problems that have no right solution there")
    hint: str = option(
        "", "PEEKS: a text with {prompt} and {answer} that is asked instead (STaR); empty never tells the answer"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples")
        if self.hint and "{prompt}" not in self.hint:
            raise ValueError(f"hint must contain {{prompt}}, found {self.hint!r}")


@dataclass
class StepLabelling(WithPolicy):
    """Continues every prefix of every solution and counts right endings (StepLabels rows)."""

    solutions: str = option("", "Solution rows to label")
    only: Literal["", "right", "wrong"] = option("", "label right or wrong solutions alone; empty labels both")
    per_problem: int = option(0, "label at most so many solutions of a problem, the first sampled; 0 for all")
    rollouts: int = option(8, "continuations of each prefix")
    stop_early: Literal["", "hard", "threshold"] = option(
        "", "no more continuations once this label is decided: hard or threshold; empty samples all"
    )
    threshold: float = option(0.5, "with stop_early: threshold, positive if the share is greater than this")
    confidence: float = option(1.0, "how sure a label must be to stop; 1: the rest could not change it")
    round_rollouts: int = option(2, "with stop_early, continuations of a prefix between two looks")
    consistent: bool = option(False, "count a right continuation only if it uses the result of the step before it")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rollouts", "round_rollouts")
        at_least(self, 0, "per_problem")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), found {self.threshold}")
        if not 0.5 < self.confidence <= 1:
            raise ValueError(f"confidence must lie in (0.5, 1], found {self.confidence}")


@dataclass
class OmegaPRMTrees(WithPolicy):
    """Finds first errors by binary search in trees that reuse rollouts (OmegaPRM; Tree rows)."""

    rollouts: int = option(8, "rollouts of each probed prefix")
    filter_rollouts: int = option(32, "drop a problem if none or all of so many rollouts are right; 0: no filter")
    search_limit: int = option(100, "wrong rollouts searched in each problem")
    alpha: float = option(0.5, "how much a state that is mostly solved is preferred, in (0, 1]")
    beta: float = option(0.9, "how much a short rollout is preferred, in (0, 1]")
    length_scale: float = option(500.0, "tokens after which the length factor is beta")
    c_puct: float = option(0.125, "weight of exploration")
    min_tokens: int = option(0, "a span of fewer tokens is not split any further")
    doubt: int = option(0, "a prefix with so few right rollouts, or fewer, is probed once more; 0: none")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rollouts", "search_limit")
        at_least(self, 0, "filter_rollouts", "min_tokens", "c_puct", "doubt")
        if not (0 < self.alpha <= 1 and 0 < self.beta <= 1 and self.length_scale > 0):
            raise ValueError("alpha and beta must lie in (0, 1] and length_scale must be greater than 0")


@dataclass
class BestFirstTrees(WithPolicy):
    """Grows trees by the best next step, and judges all its siblings (Tree-PLV; Tree rows)."""

    candidates: int = option(4, "next steps judged at each level")
    completions: int = option(8, "completions that judge a step")
    max_depth: int = option(40, "most steps of a solution")
    complete: bool = option(True, "go on with each step that is not expanded along its first completion, not judged")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "candidates")
        at_least(self, 1, "completions", "max_depth")


@dataclass
class FirstPit(WithPolicy):
    """Values prefixes up to the first pit of wrong rollouts, or of i.i.d. solutions (PAV; StepLabels rows)."""

    strategy: Literal["first_pit", "iid"] = option("first_pit", "first_pit, or iid: all prefixes of all seeds")
    seeds: int = option(8, "rollouts from each problem")
    probes: int = option(4, "rollouts of a prefix while states and pits are looked for")
    promising: float = option(0.25, "a state is promising if its share of right rollouts is greater than this")
    pits: int = option(4, "wrong rollouts of a problem that are followed to their first pit")
    rollouts: int = option(20, "rollouts of each kept prefix")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds", "probes", "pits", "rollouts")
        if not 0 <= self.promising < 1:
            raise ValueError(f"promising must lie in [0, 1), found {self.promising}")


@dataclass
class MCTSTrees(WithPolicy):
    """Grows search trees over steps, judged by a value model and by answers (AlphaMath; Tree rows)."""

    value: str = option("", "value model; empty: the value of an unfinished solution is 0, answers alone judge")
    value_dtype: str = option("float32", "precision of the value model")
    trees: int = option(1, "trees of each problem")
    simulations: int = option(40, "simulations of each tree")
    width: int = option(5, "steps sampled at once where a leaf is expanded")
    max_depth: int = option(16, "a solution of so many steps that has not ended counts as wrong")
    c_puct: float = option(1.25, "weight of exploration")
    terminal_backups: bool = option(True, "back finished children up when they are found, and do not select them")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "trees", "simulations", "width", "max_depth")
        at_least(self, 0, "c_puct")


@dataclass
class ValuePaths:
    """Reads finished solutions with the value of each step out of trees (Tree rows of one path)."""

    trees: str = option("", "Tree rows")
    right: int = option(4, "right solutions of each problem at most")
    wrong: int = option(4, "other finished solutions of each problem at most")
    likely: bool = option(False, "keep the right solutions that the policy is most likely to write, not drawn ones")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "right", "wrong")


@dataclass
class TreeLabels:
    """Reads step labels out of trees (StepLabels rows)."""

    trees: str = option("", "Tree rows with counts")
    single_steps: bool = option(True, "only steps whose own prefix was probed too, as OmegaPRM labels")
    flip: float = option(0.0, "a control: turn the counts of this share of the steps round first")
    seed: int = option(0, "seed of what is turned round")

    def __post_init__(self) -> None:
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], found {self.flip}")


@dataclass
class TreePairs:
    """Reads pairs of sibling steps, or of paths that part at one step, out of trees (Pair rows)."""

    trees: str = option("", "Tree rows")
    margin: float = option(0.375, "least difference of the shares of right completions")
    per_problem: int = option(0, "pairs of each tree at most, drawn with the seed; 0 for all")
    whole_paths: bool = option(False, "go on with each step along its best judged descendants, or the first")
    extremes: bool = option(False, "only the best and the worst of the siblings make a pair")
    flip: float = option(0.0, "a control: turn the counts of this share of the steps round first")
    seed: int = option(0, "seed of the draw, and of what is turned round")

    def __post_init__(self) -> None:
        at_least(self, 0, "per_problem")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip must lie in [0, 1], found {self.flip}")
        if not 0 < self.margin <= 1:
            raise ValueError(f"margin must lie in (0, 1], found {self.margin}")


@dataclass
class SORMLabels:
    """Makes the labels of a stepwise outcome model from counts: monotone, distinct, balanced (StepLabels rows)."""

    labels: str = option("", "StepLabels rows with counts, best made with consistent: true")
    propagate: bool = option(True, "a prefix of a positive prefix is positive")
    balance: bool = option(True, "as many positive as negative prefixes of each number of steps")
    seed: int = option(0, "seed of the balance")


@dataclass
class CheckerLabels:
    """Judges every step of solutions by the exact checker of a lab task (StepLabels rows)."""

    solutions: str = option("", "Solution rows to label")
    per_problem: int = option(0, "label at most so many solutions of a problem, the first sampled; 0 for all")
    limit: int = option(0, "label the solutions of the first so many problems; 0 for all")
    noise: float = option(0.0, "turn each judgement round with this probability: a simulated judge")
    task: dict[str, Any] = option({"kind": "chain"}, "the task, with an exact step checker")
    split: str = option("train", "the split that the solutions are of")
    seed: int = option(0, "seed of the noise")

    def __post_init__(self) -> None:
        at_least(self, 0, "per_problem", "limit")
        if not 0 <= self.noise < 1:
            raise ValueError(f"noise must lie in [0, 1), found {self.noise}")


@dataclass
class Consensus:
    """Keeps the labelled solutions whose first error a judge puts at the same step (StepLabels rows)."""

    labels: str = option("", "StepLabels rows, for example Monte-Carlo counts")
    judge: str = option("", "StepLabels rows of the same solutions")


@dataclass
class BalancedLabels:
    """Drops labels of the larger side until as many steps are likely to end right as not (StepLabels rows)."""

    labels: str = option("", "StepLabels rows with counts")
    threshold: float = option(0.5, "a share of right continuations of at least this is the upper side")
    by_length: bool = option(False, "balance each number of steps by itself")
    seed: int = option(0, "seed of what is dropped")

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must lie in (0, 1], found {self.threshold}")


@dataclass
class BestSolutions:
    """Keeps distinct right solutions of each problem to fine-tune on (Dialogue rows)."""

    solutions: str = option("", "Solution rows to choose from")
    reward: str = option("", "reward model that ranks right solutions; empty draws them")
    per_problem: int = option(4, "right solutions kept for each problem")
    only_right: bool = option(True, "false keeps wrong solutions as well: a control")
    separator: str = option("\n", "text between steps")
    dtype: str = option("float32", "precision of the reward model")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 1, "per_problem")


@dataclass
class ImportPRM800K:
    """Imports PRM800K step ratings (StepLabels rows; +1 and 0 count as right, after arXiv:2501.07301)."""

    file: str = option("", "JSON Lines, gzipped or not: nested records or one row a rated step")
    neutral: Literal["right", "half"] = option("right", "what a rating of 0 is: right, or half (one of a count of two)")
    limit: int = option(0, "use at most so many solutions, drawn with the seed; 0 for all")
    seed: int = option(0, "seed of the draw")


@dataclass
class Import:
    """Imports published data: step labels, first errors, trees or samples with verdicts (StepLabels, Tree or Solution rows)."""

    file: str = option("", "file (JSON, JSON Lines, parquet; gzipped or not) or hub id, owner/name:config:split")
    format: str = option(
        "", "prm800k, prm800k_pairs, math_shepherd, stepwise, math_aps, processbench, prmbench, mr_gsm8k, mr_ben, "
        "big_bench_mistake, gsm8k_solutions or math_best_of_8"
    )  # fmt: skip
    rollouts: int = option(
        0, "continuations that a share stands for, of math_aps (0: 32) and stepwise (0: labels are 0 or 1)"
    )
    label_source: str = option(
        "monte_carlo", "what the labels of the format stepwise are: monte_carlo, human or checker"
    )
    limit: int = option(0, "use at most so many rows, drawn with the seed; 0 for all")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "rollouts", "limit")


@dataclass
class CopyModel:
    """Copies a checkpoint: `lab` is the starting policy that ships with the package."""

    source: str = option("lab", "lab, a checkpoint folder, or a hub id")
    correction_words: bool = option(
        False, "give a lab policy the words of critiques and corrections, and a chat template for dialogues"
    )
