"""The stages that a command or a recipe can run: a config, and a function that fills a folder from it.

Nothing heavy is imported until a stage runs: `stepladder --help` must not wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..basics import UserError
from ..config import option

T = TypeVar("T")


def at_least(config: Any, least: int, *names: str) -> None:
    """Raises ValueError if one of the fields is less than `least`."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be {least} or more, found {getattr(config, name)}")


@dataclass
class OnTask:
    """What every stage over problems is told."""

    task: dict[str, Any] = option({"kind": "chain"}, "the task: kind and its fields")
    split: str = option("train", "the split of the task")
    limit: int = option(0, "use the first so many problems; 0 for all")
    seed: int = option(0, "seed of everything drawn")
    unit_problems: int = option(64, "problems in one unit of work, which is what a kill can cost")
    shard: str = option("", "i/n: make only this share of the units; empty takes RANK and WORLD_SIZE")


@dataclass
class WithPolicy(OnTask):
    """How a stage samples from a policy."""

    policy: str = option("", "the policy: a folder, a hub id, or a served model's name")
    backend: str = option("transformers", "transformers, vllm or openai")
    base_url: str = option("", "address of an OpenAI-compatible server, for backend openai")
    dtype: str = option("float32", "precision of the weights: float32, bfloat16, float16 or auto")
    device: str = option("auto", "cpu, cuda ...; auto takes the best there is")
    batch_size: int = option(256, "sequences sampled at once")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    top_p: float = option(1.0, "nucleus: the smallest set of tokens with this probability is kept")
    max_new_tokens: int = option(128, "longest solution or continuation in tokens")
    chat: bool | None = option(None, "use the chat template of a policy that has no step format; null: if it has one")
    prompt_template: str = option("{prompt}", "text around the problem, for a policy that has no step format")
    system: str | None = option(None, "system message, for a policy that has no step format")

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens", "batch_size", "unit_problems")
        at_least(self, 0, "limit")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be 0 or more and top_p must lie in (0, 1]")


@dataclass
class Demonstrations(OnTask):
    """Writes one solution to learn from for each problem (Dialogue rows)."""


@dataclass
class Solutions(WithPolicy):
    """Samples solutions of each problem with verdicts (Solution rows)."""

    samples: int = option(8, "solutions of each problem")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "samples")


@dataclass
class StepLabelling(WithPolicy):
    """Continues every prefix of every solution and counts right endings (StepLabels rows)."""

    solutions: str = option("", "Solution rows to label")
    per_problem: int = option(0, "label at most so many solutions of a problem, the first sampled; 0 for all")
    rollouts: int = option(8, "continuations of each prefix")
    stop_early: str = option(
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
        if self.stop_early not in ("", "hard", "threshold"):
            raise ValueError(f"stop_early must be hard, threshold or empty, found {self.stop_early!r}")
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
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "rollouts", "search_limit")
        at_least(self, 0, "filter_rollouts", "min_tokens", "c_puct")
        if not (0 < self.alpha <= 1 and 0 < self.beta <= 1 and self.length_scale > 0):
            raise ValueError("alpha and beta must lie in (0, 1] and length_scale must be greater than 0")


@dataclass
class BestFirstTrees(WithPolicy):
    """Grows trees by the best next step, and judges all its siblings (Tree-PLV; Tree rows)."""

    candidates: int = option(4, "next steps judged at each level")
    completions: int = option(8, "completions that judge a step")
    max_depth: int = option(40, "most steps of a solution")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 2, "candidates")
        at_least(self, 1, "completions", "max_depth")


@dataclass
class FirstPit(WithPolicy):
    """Values prefixes up to the first pit of wrong rollouts, or of i.i.d. solutions (PAV; StepLabels rows)."""

    strategy: str = option("first_pit", "first_pit, or iid: all prefixes of all seeds")
    seeds: int = option(8, "rollouts from each problem")
    probes: int = option(4, "rollouts of a prefix while states and pits are looked for")
    promising: float = option(0.25, "a state is promising if its share of right rollouts is greater than this")
    pits: int = option(4, "wrong rollouts of a problem that are followed to their first pit")
    rollouts: int = option(20, "rollouts of each kept prefix")
    unit_problems: int = option(16, "problems in one unit of work, which is what a kill can cost")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds", "probes", "pits", "rollouts")
        if self.strategy not in ("first_pit", "iid"):
            raise ValueError(f"strategy must be first_pit or iid, found {self.strategy!r}")
        if not 0 <= self.promising < 1:
            raise ValueError(f"promising must lie in [0, 1), found {self.promising}")


@dataclass
class TreeLabels:
    """Reads step labels out of trees (StepLabels rows)."""

    trees: str = option("", "Tree rows with counts")
    single_steps: bool = option(True, "only steps whose own prefix was probed too, as OmegaPRM labels")


@dataclass
class TreePairs:
    """Reads pairs of sibling steps, or of paths that part at one step, out of trees (Pair rows)."""

    trees: str = option("", "Tree rows")
    margin: float = option(0.375, "least difference of the shares of right completions")
    per_problem: int = option(0, "pairs of each tree at most, drawn with the seed; 0 for all")
    whole_paths: bool = option(False, "go on with each step along its best judged descendants")
    extremes: bool = option(False, "only the best and the worst of the siblings make a pair")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 0, "per_problem")
        if not 0 < self.margin <= 1:
            raise ValueError(f"margin must lie in (0, 1], found {self.margin}")


@dataclass
class SORMLabels:
    """Makes the labels of a stepwise outcome model from counts: monotone, distinct, balanced (StepLabels rows)."""

    labels: str = option("", "StepLabels rows with counts, best made with consistent: true")
    balance: bool = option(True, "as many positive as negative prefixes of each number of steps")
    seed: int = option(0, "seed of the balance")


@dataclass
class BestSolutions:
    """Keeps distinct right solutions of each problem to fine-tune on (Dialogue rows)."""

    solutions: str = option("", "Solution rows to choose from")
    reward: str = option("", "reward model that ranks right solutions; empty draws them")
    per_problem: int = option(4, "right solutions kept for each problem")
    separator: str = option("\n", "text between steps")
    dtype: str = option("float32", "precision of the reward model")
    seed: int = option(0, "seed of the draw")

    def __post_init__(self) -> None:
        at_least(self, 1, "per_problem")


@dataclass
class ImportPRM800K:
    """Imports PRM800K step ratings (StepLabels rows; +1 and 0 count as right, after arXiv:2501.07301)."""

    file: str = option("", "JSON Lines, gzipped or not: nested records or one row a rated step")
    limit: int = option(0, "use at most so many solutions, drawn with the seed; 0 for all")
    seed: int = option(0, "seed of the draw")


@dataclass
class CopyModel:
    """Copies a checkpoint: `lab` is the starting policy that ships with the package."""

    source: str = option("lab", "lab, a checkpoint folder, or a hub id")


@dataclass
class Beam(WithPolicy):
    """PRM beam search (Solution rows, one a finished solution)."""

    split: str = option("test", "the split of the task")
    reward: str = option("", "the reward model that guides the search")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: str = option("", "how step scores become one: last, min, prod, mean; empty takes the advised one")
    beams: int = option(16, "finished solutions of each problem")
    width: int = option(4, "children of each kept prefix")
    max_depth: int = option(40, "most steps of a solution")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_depth")
        if not 1 <= self.width <= self.beams:
            raise ValueError(f"1 <= width <= beams must hold, found width {self.width} and beams {self.beams}")


@dataclass
class EvaluatePolicies:
    """Compares ways to choose an answer, for one or more policies, with paired intervals (results.json)."""

    policies: dict[str, dict[str, str]] = option(
        {}, "name -> {greedy, samples, beam}: Solution rows of the same problems"
    )
    orm: str = option("", "outcome reward model")
    prm: str = option("", "process reward model")
    dtype: str = option("float32", "precision of the reward models")
    task: dict[str, Any] = option({"kind": "chain"}, "the task, for exact step checks where it has them")
    split: str = option("test", "the split that the rows are of")
    shown: int = option(60, "problems whose solutions go into the report")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class EvaluatePRM:
    """Judges step scores and step labels against the exact checker of a lab task (results.json)."""

    prm: str = option("", "process reward model")
    orm: str = option("", "outcome reward model, for comparison")
    solutions: str = option("", "held-out Solution rows")
    labels: str = option("", "StepLabels rows, whose error rates are set beside their closed form")
    task: dict[str, Any] = option({"kind": "chain"}, "the task")
    limit: int = option(2000, "judge at most so many solutions; 0 for all")
    dtype: str = option("float32", "precision of the reward models")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class EvaluateProcessBench:
    """ProcessBench F1 of a process reward model (results.json)."""

    prm: str = option("", "process reward model")
    files: dict[str, str] = option({}, "subset -> JSON file or hub split of ProcessBench records")
    threshold: float | None = option(0.5, "a step under it is wrong; null tunes it on `tune_on`")
    tune_on: str = option("gsm8k", "the subset a threshold is tuned on, for scalar models whose scale is free")
    limit: int = option(0, "use at most so many records of each subset; 0 for all")
    dtype: str = option("float32", "precision of the reward model")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class Report:
    """Joins results into one table, results.json and report.html."""

    results: list[str] = option([], "folders of evaluation stages")
    title: str = option("Stepladder", "heading of the report")
    curves: dict[str, str] = option({}, "name -> folder of a training stage whose curves are shown")
    command: str = option("", "the command that made it")


def _stage(module: str, function: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return getattr(importlib.import_module(module, __package__), function)(config, out)

    return run


def _trainer(name: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return importlib.import_module(f"..trainers.{name}", __package__).train(config)

    return run


def config_class(stage: str) -> type:
    """The config dataclass of a stage; a trainer's is imported only now, with torch."""
    config, _ = STAGES[stage]
    if isinstance(config, str):
        module, name = config.split(":")
        return getattr(importlib.import_module(module, __package__), name)
    return config


STAGES: dict[str, tuple[type | str, Callable[..., Any]]] = {
    "data.demonstrations": (Demonstrations, _stage(".making", "make_demonstrations")),
    "data.solutions": (Solutions, _stage(".making", "make_solutions")),
    "data.step_labels": (StepLabelling, _stage(".making", "make_step_labels")),
    "data.omegaprm": (OmegaPRMTrees, _stage(".making_trees", "make_omegaprm")),
    "data.best_first": (BestFirstTrees, _stage(".making_trees", "make_best_first")),
    "data.first_pit": (FirstPit, _stage(".making_trees", "make_first_pit")),
    "data.tree_labels": (TreeLabels, _stage(".making_trees", "make_tree_labels")),
    "data.tree_pairs": (TreePairs, _stage(".making_trees", "make_tree_pairs")),
    "data.sorm": (SORMLabels, _stage(".making_trees", "make_sorm")),
    "data.best_solutions": (BestSolutions, _stage(".making", "make_best_solutions")),
    "data.prm800k": (ImportPRM800K, _stage(".making", "import_prm800k")),
    "model.copy": (CopyModel, _stage(".making", "copy_model")),
    "train.sft": ("..trainers.sft:SFTArguments", _trainer("sft")),
    "train.orm": ("..trainers.orm:ORMArguments", _trainer("orm")),
    "train.prm": ("..trainers.prm:PRMArguments", _trainer("prm")),
    "search.beam": (Beam, _stage(".making", "make_beam")),
    "eval.policies": (EvaluatePolicies, _stage(".evaluate", "evaluate_policies")),
    "eval.prm": (EvaluatePRM, _stage(".evaluate", "evaluate_prm")),
    "eval.processbench": (EvaluateProcessBench, _stage(".evaluate", "evaluate_processbench")),
    "report": (Report, _stage(".evaluate", "make_report")),
}


def required(config: Any, *names: str) -> None:
    """Raises UserError if one of the text fields is empty."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{name} is missing: {type(config).__dataclass_fields__[name].metadata['help']}")


def first(items: Sequence[T], limit: int) -> Sequence[T]:
    """The first `limit` items, or all if it is 0."""
    return items[:limit] if limit else items


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def task_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A task's config as a plain mapping."""
    return dict(values)
