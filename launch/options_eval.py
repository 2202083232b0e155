"""Options of the stages that judge, and of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..config import at_least, option
from ..models.step_format import Aggregation

JUDGES = ("prm", "critic", "served_prm", "served_critic")


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
class EvaluateBehaviour:
    """Measures how policies write: length, steps, repetitions, right answers with wrong steps (results.json)."""

    policies: dict[str, str] = option({}, "name -> Solution rows of the same problems")
    task: dict[str, Any] = option({"kind": "chain"}, "the task, for exact step checks where it has them")
    seed: int = option(0, "seed of the bootstrap")


@dataclass
class EvaluateResampling:
    """Measures resampling until a verifier that errs accepts: what it reaches, and when to stop (results.json)."""

    policies: dict[str, str] = option({}, "name -> Solution rows, several of each problem")
    reward: str = option("", "the verifier: a reward model, which accepts scores of `threshold` or more")
    threshold: float = option(0.5, "least score that is accepted")
    aggregation: Literal["", Aggregation] = option(
        "", "how step scores become one: last, min, prod, mean; empty takes the advised one"
    )
    dtype: str = option("float32", "precision of the reward model")
    accept_wrong: float = option(
        0.0, "in place of a reward model: accept the right solutions, and this share of the wrong ones, always the same"
    )
    rhos: list[float] = option([0.5, 1.0, 2.0, 4.0], "costs of a wrong answer, where a right one is worth 1")
    attempts: int = option(0, "most attempts; 0 takes a quarter of the samples of the problem with the fewest")
    seed: int = option(0, "seed of what is accepted, and of the bootstrap")

    def __post_init__(self) -> None:
        at_least(self, 0, "attempts")
        if not 0 <= self.accept_wrong <= 1:
            raise ValueError(f"accept_wrong must lie in [0, 1], found {self.accept_wrong}")
        if self.reward and self.accept_wrong:
            raise ValueError("reward and accept_wrong are two verifiers: give one of them")
        if any(rho < 0 for rho in self.rhos):
            raise ValueError(f"rhos must be 0 or more, found {min(self.rhos)}")


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
    process: bool = option(False, "also flawed right answers that are found, and where the lowest score stands")
    policy: str = option("", "the policy of the solutions: scores are set beside its exact values (chain tasks)")
    contexts: int = option(8, "with policy: random problems in which each of its facts is read")
    temperature: float = option(1.0, "with policy: the temperature at which it was sampled")
    top_p: float = option(1.0, "with policy: the nucleus in which it was sampled")

    def __post_init__(self) -> None:
        at_least(self, 0, "limit")
        at_least(self, 1, "contexts")
        if self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be greater than 0 and top_p must lie in (0, 1]")


@dataclass
class Judged:
    """What every stage over solutions with known first errors is told: the judge, and how its scores become verdicts."""

    kind: str = option("prm", "the judge: prm, critic (a language model), served_prm or served_critic")
    model: str = option("", "the judge's folder or hub id, or a served model's name")
    dtype: str = option("float32", "precision of the judge")
    base_url: str = option("", "address of the server, for a served judge or backend openai")
    layout: str = option("", "folder with tokenizer and step_format.json of a served reward model; empty takes model")
    backend: str = option("transformers", "what runs a critic: transformers, vllm or openai")
    samples: int = option(1, "critiques of each solution, which vote; 8 at temperature 1 and top_p 0.9 in ProcessBench")
    temperature: float = option(0.0, "sampling temperature of a critic; 0 is greedy")
    top_p: float = option(1.0, "nucleus of a critic")
    max_new_tokens: int = option(2048, "longest critique in tokens")
    prompt: str = option("", "a critic's prompt with {problem} and {paragraphs}; empty takes ProcessBench's")
    batch_size: int = option(64, "critiques sampled at once, or requests under way")
    threshold: float | None = option(0.5, "a step under it is wrong; null tunes it on `tune_on`")
    tune_on: str = option("", "the subset a threshold is tuned on; it is to be left out of what you report")
    limit: int = option(0, "use at most so many records of each subset; 0 for all")
    seed: int = option(0, "seed of critiques and of the bootstrap")

    def __post_init__(self) -> None:
        at_least(self, 1, "samples", "max_new_tokens", "batch_size")
        at_least(self, 0, "limit", "temperature")
        if self.kind not in JUDGES:
            raise ValueError(f"kind must be one of {', '.join(JUDGES)}, found {self.kind!r}")
        if self.kind.startswith("served") and not self.base_url:
            raise ValueError(f"kind {self.kind} needs base_url, such as http://localhost:8000")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}")


@dataclass
class EvaluateProcessBench(Judged):
    """ProcessBench F1 of a process reward model or a critic (results.json)."""

    prm: str = option("", "short for kind: prm and model: ...")
    files: dict[str, str] = option({}, "subset -> JSON file or hub split of ProcessBench records")
    tune_on: str = option("gsm8k", "the subset a threshold is tuned on, for scalar models whose scale is free")
    tuned_too: bool = option(False, "report the tuned threshold as well, as ARM_tuned, from the same scores")
    arm: str = option("processbench", "what the results are called, where several models are set beside each other")


@dataclass
class EvaluateFirstErrors(Judged):
    """Finds the first wrong step of any solutions for which it is known (results.json)."""

    files: dict[str, str] = option({}, "subset -> file or hub split of `format`, or a folder of StepLabels rows")
    format: str = option("rows", "rows, processbench, mr_gsm8k, mr_ben, big_bench_mistake, prmbench, prm800k")


@dataclass
class EvaluatePRMBench(Judged):
    """PRMBench: F1 of right and of wrong steps and PRMScore, by class of error (results.json)."""

    file: str = option("", "file or hub split of PRMBench records")


@dataclass
class EvaluateBestOfN:
    """Curves over k from one pool of samples: best-of-k, weighted vote, majority, pass@k (results.json)."""

    samples: str = option("", "Solution rows, several of each problem")
    models: dict[str, Any] = option(
        {}, "name -> reward model that ranks them, or {kind: ..., model: ...}: any judge of eval.first_error"
    )
    scores: dict[str, str] = option(
        {}, "name -> JSON file with a list of step scores for each row, as data.import writes"
    )
    aggregations: list[Aggregation] = option(
        list(get_args(Aggregation)), "how step scores become one: last, min, prod, mean"
    )
    ks: list[int] = option([], "sizes of the draws; empty takes 1, 2, 4 ... and the size of the pool")
    subsets: int = option(200, "random draws for a weighted vote, which has no closed form")
    dtype: str = option("float32", "precision of the reward models")
    limit: int = option(0, "use the first so many problems; 0 for all")
    seed: int = option(0, "seed of the draws and of the bootstrap")

    def __post_init__(self) -> None:
        at_least(self, 0, "limit")
        at_least(self, 1, "subsets")


@dataclass
class Report:
    """Joins results into one table, results.json and report.html."""

    results: list[str] = option([], "folders of evaluation stages")
    title: str = option("Stepladder", "heading of the report")
    curves: dict[str, str] = option({}, "name -> folder of a training stage whose curves are shown")
    command: str = option("", "the command that made it")
    trees: dict[str, str] | None = option(
        None, "name -> folder of a search stage whose trees are shown; null takes those of the run, {} none"
    )
    dialogues: dict[str, str] | None = option(
        None, "name -> folder of Dialogue rows of which some are shown; null takes those of the run, {} none"
    )
