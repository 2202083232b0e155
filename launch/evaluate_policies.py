"""The stage that judges policies by their answers: every way to choose, before and after training, at its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError
from ..data_gen.rows import Solution
from ..data_gen.store import read_about, read_rows
from ..models.ledger import Ledger
from ..models.reward import RewardModel
from ..search.choose import best_credit, paired_bootstrap, pass_at_k, vote_credit
from ..tasks.base import Problem, StepChecker
from ..tasks.load import load_task
from . import options_eval
from .evaluate import record, values_of, write_results
from .evaluate_steps import step_right
from .scoring import Scored


@dataclass
class Arm:
    """Correctness of one way to answer, in [0, 1] problem by problem, and what it cost."""

    values: list[float]
    ledger: Ledger


def evaluate_policies(config: options_eval.EvaluatePolicies, out: Path) -> None:
    """Accuracy of every arm of every policy, differences from majority vote and from the first policy."""
    if not config.policies:
        raise UserError("policies is missing: name -> {greedy, samples, beam}, folders of Solution rows")
    named = {"orm": config.orm, "prm": config.prm}
    models = {which: RewardModel.load(path, dtype=config.dtype) for which, path in named.items() if path}
    pools = {name: _read_pools(name, paths) for name, paths in config.policies.items()}
    ids = sorted({row.problem_id for groups in pools.values() for pool in groups.values() for row in pool})
    records: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    arms_of: dict[str, dict[str, Arm]] = {}
    checker = load_task(config.task)
    for name, groups in pools.items():
        scored = Scored(out, name, models)
        arms = arms_of[name] = _arms(ids, groups, config.policies[name], scored)
        reference = next((a for a in arms if a.startswith("majority")), "greedy")
        for arm, found in arms.items():
            label, n = f"{name}/{arm}", len(ids)
            records.append(
                record(
                    label, "accuracy", paired_bootstrap(found.values, seed=config.seed), n, config.seed, found.ledger
                )
            )
            if reference in arms and arm not in (reference, "greedy") and not arm.startswith("pass"):
                difference = paired_bootstrap(found.values, arms[reference].values, seed=config.seed)
                records.append(record(label, "accuracy_minus_majority", difference, n, config.seed, found.ledger))
        shown += _shown(name, ids[: config.shown], groups, scored, checker)
    base, *others = arms_of
    for name in others:
        for arm, found in arms_of[name].items():
            if arm in arms_of[base]:
                difference = paired_bootstrap(found.values, arms_of[base][arm].values, seed=config.seed)
                records.append(
                    record(f"{name}/{arm}", f"accuracy_minus_{base}", difference, len(ids), config.seed, found.ledger)
                )
    values = [
        values_of(f"{name}/{arm}", "accuracy", ids, one.values)
        for name, arms in arms_of.items()
        for arm, one in arms.items()
    ]
    write_results(out, records, values=values, details={"solutions": shown})


def _read_pools(name: str, paths: Mapping[str, str]) -> dict[str, list[Solution]]:
    pools = {}
    for kind, path in paths.items():
        if kind not in ("greedy", "samples", "beam"):
            raise UserError(f"policies: {name}: expected greedy, samples or beam, found {kind!r}")
        pools[kind] = read_rows(path, Solution)
    return pools


def by_problem(
    rows: Sequence[Solution], extra: Sequence[float] | None = None
) -> dict[str, list[tuple[Solution, float]]]:
    grouped: dict[str, list[tuple[Solution, float]]] = {}
    for i, row in enumerate(rows):
        grouped.setdefault(row.problem_id, []).append((row, extra[i] if extra is not None else 0.0))
    return grouped


def _arms(
    ids: Sequence[str], groups: Mapping[str, Sequence[Solution]], paths: Mapping[str, str], scored: Scored
) -> dict[str, Arm]:
    """Every arm that the rows allow. A problem that an arm has no row of (its prompt did not fit) counts as wrong."""
    cost = {
        kind: Ledger(**read_about(path)["ledger"]) if Path(path).is_dir() else Ledger() for kind, path in paths.items()
    }
    arms: dict[str, Arm] = {}

    def add(name: str, kind: str, value: Any, extra: Sequence[float] | None = None, which: str = "") -> None:
        grouped = by_problem(groups[kind], extra)
        values = [float(value(grouped[i])) if i in grouped else 0.0 for i in ids]
        arms[name] = Arm(values, cost[kind] + (scored.cost(which, kind) if which else Ledger()))

    if "greedy" in groups:
        add("greedy", "greedy", lambda found: found[0][0].right)
    if "samples" in groups:
        rows = groups["samples"]
        n = max(len(found) for found in by_problem(rows).values())
        add("sample", "samples", lambda found: sum(r.right for r, _ in found) / len(found))
        add(f"pass@{n}", "samples", lambda found: pass_at_k(len(found), sum(r.right for r, _ in found), len(found)))
        add(
            f"majority@{n}",
            "samples",
            lambda found: vote_credit([r.answer for r, _ in found], [r.right for r, _ in found]),
        )
        for which in ("orm", "prm"):
            totals = scored.totals(which, "samples", rows)
            if totals is not None:
                best = lambda found: best_credit([s for _, s in found], [r.right for r, _ in found])
                vote = lambda found: vote_credit(
                    [r.answer for r, _ in found], [r.right for r, _ in found], [s for _, s in found]
                )
                add(f"best_of_{n}_{which}", "samples", best, totals, which)
                add(f"weighted_best_of_{n}_{which}", "samples", vote, totals, which)
    if "beam" in groups:
        totals = scored.totals("prm", "beam", groups["beam"])
        if totals is None:
            raise UserError("policies: rows of a beam search need prm, which chooses among what it found")
        n = max(len(found) for found in by_problem(groups["beam"]).values())
        best = lambda found: best_credit([s for _, s in found], [r.right for r, _ in found])
        vote = lambda found: vote_credit(
            [r.answer for r, _ in found], [r.right for r, _ in found], [s for _, s in found]
        )
        add(f"beam_{n}_prm", "beam", best, totals)
        add(f"weighted_beam_{n}_prm", "beam", vote, totals)
    return arms


def _shown(
    name: str, ids: Sequence[str], groups: Mapping[str, Sequence[Solution]], scored: Scored, task: Any
) -> list[dict[str, Any]]:
    """Solutions that some arm chose, with step scores and exact checks, for the report."""
    chosen: dict[tuple[str, int, str], tuple[Solution, list[float], list[str]]] = {}

    def add(row: Solution, kind: str, steps: Sequence[float], arm: str) -> None:
        chosen.setdefault((row.problem_id, row.sample, kind), (row, list(steps), []))[2].append(arm)

    for kind, rows in groups.items():
        step_scores = scored.steps("prm", kind, rows) or [[] for _ in rows]
        prm, orm = scored.totals("prm", kind, rows), scored.totals("orm", kind, rows) if kind == "samples" else None
        position = {id(row): i for i, row in enumerate(rows)}
        n = max(len(found) for found in by_problem(rows).values())
        for problem_id, found in by_problem(rows).items():
            if problem_id not in set(ids):
                continue
            where = [position[id(row)] for row, _ in found]
            if kind == "greedy":
                add(rows[where[0]], kind, step_scores[where[0]], "greedy")
                continue
            for arm, totals in (("prm", prm), ("orm", orm)):
                if totals is not None:
                    best = max(where, key=lambda i: (totals[i], -i))
                    add(
                        rows[best],
                        kind,
                        step_scores[best],
                        f"beam_{n}_{arm}" if kind == "beam" else f"best_of_{n}_{arm}",
                    )
            if kind == "samples":
                votes: dict[str, int] = {}
                for i in where:
                    if rows[i].answer is not None:
                        votes[str(rows[i].answer)] = votes.get(str(rows[i].answer), 0) + 1
                if votes:
                    winner = max(votes, key=lambda a: votes[a])
                    i = next(i for i in where if rows[i].answer == winner)
                    add(rows[i], kind, step_scores[i], f"majority@{n}")
    lines = []
    for row, scores, arms in chosen.values():
        checks = None
        if isinstance(task, StepChecker):
            checks = task.check_steps(Problem(row.problem_id, row.prompt, row.gold), row.steps)
        lines.append(
            {
                "problem_id": row.problem_id,
                "prompt": row.prompt,
                "gold": row.gold,
                "policy": name,
                "steps": list(row.steps),
                "scores": scores,
                "step_right": [step_right(c) for c in checks] if checks else [None] * len(row.steps),
                "answer": row.answer,
                "outcome": row.outcome,
                "selected_by": arms,
            }
        )
    return lines
