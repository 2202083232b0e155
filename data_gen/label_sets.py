"""Sets of step labels: of a SORM (GLoRe, arXiv:2402.10963), of a checker; balance and consensus. Pure functions of rows."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..basics import fold_seed
from ..tasks.base import Problem, StepChecker, Task, first_error
from .rows import Solution, StepLabels, step_targets

# Without a sign: in "12-5" the 5 is used, whatever stands before it.
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def uses_result(step: str, suffix: str) -> bool:
    """Whether the last number of `step`, its intermediate result, appears in `suffix`, what was written behind it.

    A continuation that ignores the steps before it says nothing about them. A step without a number asks for nothing.
    """
    found = _numbers(step)
    return not found or found[-1] in _numbers(suffix)


def _numbers(text: str) -> list[float]:
    return [float(found.replace(",", "")) for found in _NUMBER.findall(text)]


def sorm_rows(
    rows: Sequence[StepLabels], *, seed: int, propagate: bool = True, balance: bool = True
) -> tuple[list[StepLabels], Counter[str]]:
    """SORM labels as rows of one judgement a step (n_rollouts 1), and what was counted on the way.

    1. A prefix is positive if at least one continuation ended right.
    2. Positive propagation, with `propagate`: a prefix of a positive prefix is positive, in whichever row of the problem that
       one stands. Labels along a solution become 1 .. 1 0 .. 0, and the first 0 is the first error.
    3. A prefix that stands in several rows keeps its label in the first.
    4. With `balance`, of each number of steps separately as many positive as negative prefixes are kept, drawn with the seed.

    Labels are no counts any more: soft labels of these rows are the hard ones. The empty prefix keeps its label and is not
    balanced: no step ends there. Rows without a label are left out.
    """
    counts: Counter[str] = Counter()
    raw, positive = positive_prefixes(rows, propagate=propagate)
    counts["labels made positive by a later step"] = sum(not right and key in positive for key, right in raw.items())

    seen: set[tuple[str, tuple[str, ...]]] = set()
    labelled: list[StepLabels] = []
    for row in rows:
        labels: list[int | None] = []
        for t, rollouts in enumerate(row.n_rollouts):
            key = (row.problem_id, row.steps[:t])
            if not rollouts and key not in positive:
                labels.append(None)  # nothing is known, and nothing follows from what comes later
            elif key in seen:
                labels.append(None)
                counts["duplicate prefixes"] += 1
            else:
                seen.add(key)
                labels.append(int(key in positive))
        labelled.append(_relabelled(row, labels))
    if balance:
        labelled, dropped = balanced(labelled, seed=seed, by_length=True)
        counts.update(dropped)
    kept = [row for row in labelled if any(row.n_rollouts[1:])]
    counts["rows without a label"] = len(labelled) - len(kept)
    given = [c for row in kept for c, n in zip(row.n_correct[1:], row.n_rollouts[1:], strict=True) if n]
    counts["positive labels"], counts["negative labels"] = sum(given), len(given) - sum(given)
    return kept, counts


def positive_prefixes(
    rows: Sequence[StepLabels], *, propagate: bool = True
) -> tuple[dict[tuple[str, tuple[str, ...]], bool], set[tuple[str, tuple[str, ...]]]]:
    """(prefix -> whether a continuation of it ended right; the positive prefixes), by problem and steps, over all rows.

    With `propagate` a prefix of a positive prefix is positive.
    """
    raw: dict[tuple[str, tuple[str, ...]], bool] = {}
    for row in rows:
        for t, (correct, rollouts) in enumerate(zip(row.n_correct, row.n_rollouts, strict=True)):
            if rollouts:
                key = (row.problem_id, row.steps[:t])
                raw[key] = raw.get(key, False) or correct > 0
    positive: set[tuple[str, tuple[str, ...]]] = set()
    for problem_id, steps in (key for key, right in raw.items() if right):
        positive.update((problem_id, steps[:t]) for t in range(0 if propagate else len(steps), len(steps) + 1))
    return raw, positive


def checker_labels(
    solutions: Sequence[Solution], task: Task, problems: Mapping[str, Problem], *, noise: float, seed: int
) -> list[StepLabels]:
    """One judgement a step by the task's exact checker: 1 before the first error, 0 at it and behind it.

    With `noise` a judgement is turned round with that probability, drawn with the seed: a simulated judge. Then the first step
    judged 0 is its first error, and steps behind it are 0 as well. The empty prefix is 1.
    """
    if not isinstance(task, StepChecker):
        raise ValueError(f"task {task.name} has no exact step checker")
    rows = []
    for row in solutions:
        error = first_error(task.check_steps(problems[row.problem_id], row.steps))
        good = [error is None or t < error for t in range(len(row.steps))]
        if noise:
            drawn = [
                fold_seed(seed, row.problem_id, "judge", row.sample, *row.steps[: t + 1]) / 2**63
                for t in range(len(good))
            ]
            turned = [g != (d < noise) for g, d in zip(good, drawn, strict=True)]
            good = [all(turned[: t + 1]) for t in range(len(turned))]
        labels = (1, *map(int, good))
        rows.append(
            StepLabels(
                problem_id=row.problem_id,
                prompt=row.prompt,
                gold=row.gold,
                sample=row.sample,
                steps=row.steps,
                n_correct=labels,
                n_rollouts=(1,) * len(labels),
                label_source="checker",
                outcome=row.outcome,
                first_error=error,
                first_error_known=True,
                source=row.source,
            )
        )
    return rows


def consensus(rows: Sequence[StepLabels], judge: Sequence[StepLabels]) -> tuple[list[StepLabels], Counter[str]]:
    """The rows whose hard labels have their first 0 where the judge's row of the same solution has it; the count of the others.

    The consensus filter of arXiv:2501.07301 section 3.2: Monte-Carlo labels are kept where a judge finds the same first error.
    """
    counts: Counter[str] = Counter()
    theirs = {(r.problem_id, r.sample, r.steps): r for r in judge}
    kept = []
    for row in rows:
        other = theirs.get((row.problem_id, row.sample, row.steps))
        if other is None:
            counts["rows that the judge has not seen"] += 1
        elif _first_zero(row) != _first_zero(other):
            counts["rows whose first error the judge puts elsewhere"] += 1
        else:
            kept.append(row)
    return kept, counts


def _first_zero(row: StepLabels) -> int | None:
    targets = step_targets(row, "hard")
    return targets.index(0.0) if 0.0 in targets else None


def _relabelled(row: StepLabels, labels: Sequence[int | None]) -> StepLabels:
    return dataclasses.replace(
        row,
        n_correct=tuple(label or 0 for label in labels),
        n_rollouts=tuple(int(label is not None) for label in labels),
    )


def balanced(
    rows: Sequence[StepLabels], *, seed: int, by_length: bool = False, threshold: float = 0.5
) -> tuple[list[StepLabels], Counter[str]]:
    """Rows with as many labelled steps of a share under `threshold` as of others; the count of what was set to unknown.

    With `by_length` for each number of steps separately, so that a model cannot learn "early is good, late is bad". PAV samples
    two such buckets equally (arXiv:2410.08146 appendix D). Which labels of the larger bucket are dropped is drawn with the seed,
    prefix by prefix, whatever the order of rows. The empty prefix is left alone.
    """
    buckets: dict[int, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for index, row in enumerate(rows):
        for t in range(1, len(row.steps) + 1):
            if row.n_rollouts[t]:
                high = row.n_correct[t] / row.n_rollouts[t] >= threshold
                buckets.setdefault(t if by_length else 0, ([], []))[high].append((index, t))
    counts: Counter[str] = Counter()
    dropped: set[tuple[int, int]] = set()
    for pair in buckets.values():
        size = min(map(len, pair))
        for bucket in pair:
            drawn = sorted(
                bucket,
                key=lambda it: (fold_seed(seed, rows[it[0]].problem_id, "balance", *rows[it[0]].steps[: it[1]]), it),
            )
            dropped.update(drawn[size:])
    counts["labels dropped for balance"] = len(dropped)
    kept = []
    for index, row in enumerate(rows):
        gone = {t for t in range(len(row.steps) + 1) if (index, t) in dropped}
        kept.append(
            dataclasses.replace(
                row,
                n_correct=tuple(0 if t in gone else c for t, c in enumerate(row.n_correct)),
                n_rollouts=tuple(0 if t in gone else n for t, n in enumerate(row.n_rollouts)),
            )
            if gone
            else row
        )
    return kept, counts
