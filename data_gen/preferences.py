"""Pairs to prefer by: right over wrong solutions of a problem, and corrections of a solution's first wrong step (step-DPO)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..basics import fold_seed
from ..models.engine import Engine, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Problem, StepChecker, Task, first_error
from .growing import Ask, Cut, Growth, Roller, grow
from .rows import Pair, Solution, StepLabels, step_targets
from .store import UnitResult

_CUT_SHORT = (StopReason.LENGTH.value, StopReason.CONTEXT.value)


def solution_pairs(solutions: Sequence[Solution], *, per_problem: int, seed: int) -> UnitResult[Pair]:
    """Up to `per_problem` pairs of a right and a wrong solution of each problem (0: all), with an empty prefix.

    Steps decide what is a duplicate; `n_chosen` and `n_rejected` say how often each side was sampled. Every solution enters a pair
    before any enters a second one, in an order drawn with the seed. Solutions that were cut at their length are left out: nothing
    says how they end. So are those whose answer could not be checked in time.
    """
    result: UnitResult[Pair] = UnitResult([])
    counts: Counter[str] = Counter()
    by_problem: dict[str, list[Solution]] = {}
    for row in solutions:
        rows = by_problem.setdefault(row.problem_id, [])
        if row.stop in _CUT_SHORT:
            counts["solutions cut at their length"] += 1
        elif row.outcome == "timeout":
            counts["solutions not checked in time"] += 1
        elif not row.steps:
            counts["solutions without a step"] += 1
        else:
            rows.append(row)
    for problem_id, rows in by_problem.items():
        seen = Counter(row.steps for row in rows)
        counts["duplicates"] += len(rows) - len(seen)
        distinct = {row.steps: row for row in reversed(rows)}  # the first sampled of equal ones
        order = sorted(distinct.values(), key=lambda row: fold_seed(seed, problem_id, row.sample))
        right, wrong = [row for row in order if row.right], [row for row in order if not row.right]
        if not right or not wrong:
            counts["problems without a right solution" if not right else "problems without a wrong solution"] += 1
            continue
        # Each round uses every solution of the larger side once, and those of the smaller in turn.
        few, many = sorted((len(right), len(wrong)))
        both = [((k + turn) % few, k) for turn in range(few) for k in range(many)]
        if len(right) > len(wrong):
            both = [(j, i) for i, j in both]
        kept = both[:per_problem] if per_problem else both
        counts["pairs beyond the limit a problem"] += len(both) - len(kept)
        for i, j in kept:
            better, worse = right[i], wrong[j]
            result.rows.append(
                Pair(
                    problem_id=problem_id,
                    prompt=better.prompt,
                    prefix=(),
                    chosen=better.steps,
                    rejected=worse.steps,
                    reward_chosen=1.0,
                    reward_rejected=0.0,
                    n_chosen=seen[better.steps],
                    n_rejected=seen[worse.steps],
                    chosen_finished=True,
                    rejected_finished=True,
                    source=better.source,
                )
            )
    result.dropped = +counts
    return result


def first_wrong_step(
    task: Task, problem: Problem, steps: Sequence[str], labels: StepLabels | None
) -> tuple[int | None, str]:
    """(0-based index of the first wrong step or None, who says so: checker, labels or nobody).

    An exact checker decides where the task has one; else a known first error of the labels; else the first prefix from which no
    continuation ended right, as far as everything before it is known.
    """
    if isinstance(task, StepChecker):
        return first_error(task.check_steps(problem, steps)), "checker"
    if labels is None:
        return None, "nobody"
    if labels.first_error_known:
        return labels.first_error, "labels"
    for index, target in enumerate(step_targets(labels, "hard")):
        if target is None:
            return None, "nobody"
        if target == 0.0:
            return index, "labels"
    return None, "labels"


@dataclass(frozen=True)
class Flaw:
    """A first wrong step: what stands before it, as steps and as ids behind the prompt, and the step itself."""

    problem: Problem
    prefix: tuple[str, ...]
    ids: tuple[int, ...]
    step: str
    last: bool  # the solution ended with it


@dataclass
class Corrections:
    """What sampling from before a flaw gave."""

    begun: Counter[str] = field(default_factory=Counter)  # next step -> rollouts that began with it
    right: Counter[str] = field(default_factory=Counter)  # correction -> those of them that ended right
    finished: dict[str, bool] = field(default_factory=dict)  # correction -> it ends the solution
    counts: Counter[str] = field(default_factory=Counter)


def correct_flaw(cut: Cut, flaw: Flaw, rollouts: int, accept: Callable[[Sequence[str]], bool]) -> Growth[Corrections]:
    """Samples on from before a flaw; a correction is the first step of what ends right, if `accept` takes it.

    `accept` is asked about the steps up to and including the correction.
    """
    found = Corrections()
    [samples] = yield [Ask(flaw.ids, range(rollouts))]
    depth = len(flaw.prefix)
    for rollout in samples:
        steps, _ = cut(rollout.ids)
        if len(steps) <= depth:
            continue
        step, last = steps[depth], len(steps) == depth + 1
        found.begun[step] += 1
        if not rollout.right:
            continue
        if step == flaw.step:
            found.counts["right endings through the wrong step"] += 1
        elif not accept(steps[: depth + 1]):
            found.counts["right endings through another wrong step"] += 1
        else:
            found.right[step] += 1
            # What some rollout goes on behind is no end.
            found.finished[step] = last and found.finished.get(step, True)
    return found


def step_pairs(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    solutions: Sequence[Solution],
    problems: Mapping[str, Problem],
    *,
    labels: Mapping[tuple[str, int], StepLabels] | None,
    rollouts: int,
    winners: int,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Pair]:
    """Pairs (correction, first wrong step) behind what was right, for every wrong solution: Step-DPO (arXiv:2406.18629).

    The corrections are sampled by the policy that is to be trained, from the ids of the solution itself: what another model writes
    is improbable under the policy and teaches it little (their Table 3). Of the corrections of one flaw the `winners` that ended
    right most often are kept. With an exact checker a correction must be right itself. `n_chosen` and `n_rejected` count the
    rollouts that began with either step. Flaws that several solutions share are corrected once.
    """
    before = engine.ledger.copy()
    roller = Roller(engine, task, step_format, sampling, seed)
    result: UnitResult[Pair] = UnitResult([])
    flaws: dict[tuple[str, tuple[str, ...], str], Flaw] = {}
    for row in solutions:
        if row.right:
            continue
        result.counts["wrong solutions"] += 1
        problem = problems[row.problem_id]
        own = labels.get((row.problem_id, row.sample)) if labels is not None else None
        index, by = first_wrong_step(task, problem, row.steps, own)
        if index is None:
            why = "without labels" if by == "nobody" else "in which no step is known to be wrong"
            result.dropped[f"wrong solutions {why}"] += 1
            continue
        last = index + 1 == len(row.steps)
        if last and row.stop in _CUT_SHORT:
            result.dropped["wrong solutions cut inside their wrong step"] += 1
            continue
        key = (row.problem_id, row.steps[:index], row.steps[index])
        if key in flaws:
            result.dropped["flaws met again"] += 1
            continue
        flaws[key] = Flaw(problem, key[1], _prefix_ids(engine.tokenizer, step_format, row, index), key[2], last)

    def accept(problem: Problem) -> Callable[[Sequence[str]], bool]:
        if not isinstance(task, StepChecker):
            return lambda steps: True
        return lambda steps: first_error(task.check_steps(problem, steps)) is None

    ordered = list(flaws.values())
    growths = [correct_flaw(roller.cut, flaw, rollouts, accept(flaw.problem)) for flaw in ordered]
    source = roller.source(policy)
    for flaw, found in zip(ordered, grow(roller, [flaw.problem for flaw in ordered], growths), strict=True):
        result.counts["flaws"] += 1
        result.counts.update(found.counts)
        if not found.right:
            result.dropped["flaws without a correction"] += 1
        for step, _ in found.right.most_common(winners):  # the first sampled among equals
            result.rows.append(
                Pair(
                    problem_id=flaw.problem.id,
                    prompt=flaw.problem.prompt,
                    prefix=flaw.prefix,
                    chosen=(step,),
                    rejected=(flaw.step,),
                    reward_chosen=1.0,
                    reward_rejected=0.0,
                    n_chosen=found.begun[step],
                    n_rejected=found.begun[flaw.step],
                    chosen_finished=found.finished[step],
                    rejected_finished=flaw.last,
                    source=source,
                )
            )
    result.ledger = engine.ledger - before
    result.dropped.update(+roller.counts)
    return result


def _prefix_ids(tokenizer: Any, step_format: StepFormat, row: Solution, steps: int) -> tuple[int, ...]:
    """The ids of the first so many steps: as they were sampled, or from the text of an imported solution."""
    if not steps:
        return ()
    if row.token_ids and row.step_ends:
        return row.token_ids[: row.step_ends[steps - 1]]
    return step_format.encode_after(tokenizer, (), row.steps[:steps]).ids
