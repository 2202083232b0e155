"""Options of the stages that judge, and of the report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..config import option


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
