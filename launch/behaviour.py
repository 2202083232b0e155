"""The stage that measures how policies write, where accuracy alone would not show what training did to them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, write_json
from ..data_gen.rows import Solution
from ..data_gen.store import read_about, read_rows
from ..models.ledger import Ledger
from ..search.choose import paired_bootstrap
from ..tasks.base import Problem, StepChecker
from ..tasks.load import load_task
from . import options_eval
from .claims import RESULTS, VALUES
from .evaluate import record


def evaluate_behaviour(config: options_eval.EvaluateBehaviour, out: Path) -> None:
    """Writes results.json, with the mean of each number in `measure` for each policy, and values.json problem by problem."""
    if not config.policies:
        raise UserError("policies is missing: name -> folder of Solution rows")
    task = load_task(config.task)
    records: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for name, path in config.policies.items():
        grouped: dict[str, list[dict[str, float]]] = {}
        for row in read_rows(path, Solution):
            grouped.setdefault(row.problem_id, []).append(measure(row, task))
        ledger = Ledger(**read_about(path)["ledger"]) if Path(path).is_dir() else Ledger()
        for metric in sorted({metric for found in grouped.values() for one in found for metric in one}):
            means = {i: _mean([one[metric] for one in found if metric in one]) for i, found in grouped.items()}
            known = {i: value for i, value in means.items() if not math.isnan(value)}
            interval = paired_bootstrap(list(known.values()), seed=config.seed)
            records.append(record(name, metric, interval, len(known), config.seed, ledger))
            if len(known) == len(grouped):  # a paired difference needs every problem
                values.append({"arm": name, "metric": metric, "values": known})
    write_json(out / VALUES, values)
    write_json(out / RESULTS, records)


def measure(row: Solution, task: Any) -> dict[str, float]:
    """What is measured of one solution: accuracy, length (tokens), steps, the shares of repeated steps and of truncated
    and unreadable solutions; `length_right` or `length_wrong`; and where the task checks steps `flawed` (a step is wrong), of a
    right answer also `flawed_right`, and `flawed_and_right` of all."""
    found = {
        "accuracy": float(row.right),
        "length": float(len(row.token_ids)),
        "steps": float(len(row.steps)),
        "repeated_steps": 1 - len(set(row.steps)) / len(row.steps) if row.steps else 0.0,
        "truncated": float(row.stop == "length"),
        "unparseable": float(row.answer is None),
    }
    found["length_right" if row.right else "length_wrong"] = found["length"]
    if isinstance(task, StepChecker):
        checks = task.check_steps(Problem(row.problem_id, row.prompt, row.gold), row.steps)
        found["flawed"] = float(not all(check.local_ok and check.on_track for check in checks))
        found["flawed_and_right"] = found["flawed"] * found["accuracy"]
        if row.right:
            found["flawed_right"] = found["flawed"]
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
