"""Monte-Carlo step labels (Math-Shepherd, arXiv:2312.08935 section 3.3): continue every prefix, count the right endings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..models.engine import Engine, Sampling
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .growing import Ask, Roller, counted_row
from .label_sets import uses_result
from .rows import Solution, StepLabels
from .store import UnitResult


@dataclass(frozen=True)
class StopRule:
    """When the label "the share of right continuations is greater than `threshold`" needs no further continuation.

    With confidence 1 only when the continuations that are left could not change it, so that it is the label of all of them; for
    threshold 0, the hard label, one right continuation decides. With less, also when the probability that the true share lies
    on the side of the observed one, Beta(1 + right, 1 + wrong) after a uniform prior, reaches the confidence.
    """

    threshold: float = 0.0
    confidence: float = 1.0
    round_size: int = 2  # continuations of a prefix between two looks

    def decided(self, correct: int, sampled: int, rollouts: int) -> bool:
        """Whether `correct` of `sampled` continuations decide the label of `rollouts`."""
        if sampled == rollouts or correct > self.threshold * rollouts:
            return True
        if correct + rollouts - sampled <= self.threshold * rollouts:
            return True
        if self.confidence == 1 or not sampled:
            return False
        below = beta_below(self.threshold, correct, sampled)
        return (1 - below if correct > self.threshold * sampled else below) >= self.confidence


def beta_below(threshold: float, correct: int, sampled: int) -> float:
    """P(share <= threshold) under Beta(1 + correct, 1 + sampled - correct).

    For whole numbers it is the upper tail of a binomial: P(Bin(sampled + 1, threshold) >= correct + 1).
    """
    n = sampled + 1
    return sum(math.comb(n, i) * threshold**i * (1 - threshold) ** (n - i) for i in range(correct + 1, n + 1))


@dataclass
class _Prefix:
    """One prefix of one problem and what its continuations gave so far."""

    problem: Problem
    ids: tuple[int, ...]
    last_step: str
    correct: int = 0
    sampled: int = 0
    open: bool = True


def monte_carlo_labels(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    solutions: Sequence[Solution],
    problems: dict[str, Problem],
    *,
    rollouts: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    stop: StopRule | None = None,
    consistent: bool = False,
) -> UnitResult[StepLabels]:
    """Counts for every prefix of every solution, the empty one included: same arguments, same rows.

    All prefixes of all solutions share batches, and a prefix that several solutions of a problem have in common is continued
    once. A finished solution has nothing left to sample: its own verdict is the one observation of its last prefix.

    The engine's policy, the completer, may be another than the one that wrote the solutions: ids that its tokenizer reads as
    other steps are replaced by those of its step format. With `stop` a prefix gets no more continuations once its label is
    decided; its counts are the first of those that it would have, and serve that label alone. With `consistent` a right
    continuation counts only if it uses the result of the step before it (GLoRe, arXiv:2402.10963).
    """
    before = engine.ledger.copy()
    roller = Roller(engine, task, step_format, sampling, seed)
    result: UnitResult[StepLabels] = UnitResult([])
    wanted: dict[tuple[str, tuple[int, ...]], _Prefix] = {}
    prefixes_of: list[list[_Prefix]] = []
    kept = [row for row in solutions if row.steps]
    if len(kept) < len(solutions):
        result.dropped["empty solutions"] = len(solutions) - len(kept)
    for row in kept:
        ids, ends, as_sampled = _layout(roller, row)
        if row.token_ids and not as_sampled:
            result.counts["solutions encoded again, as the completer reads their ids differently"] += 1
        asked = dataclasses.replace(problems[row.problem_id], prompt=row.prompt)
        prefixes = []
        for t, end in enumerate((0, *ends[:-1])):
            last_step = row.steps[t - 1] if t else ""
            prefixes.append(
                wanted.setdefault((row.problem_id, ids[:end]), _Prefix(asked, ids[:end], last_step)),
            )
        prefixes_of.append(prefixes)

    ignoring = 0
    size = stop.round_size if stop else rollouts
    while open_ := [prefix for prefix in wanted.values() if prefix.open]:
        asks = [(p.problem, Ask(p.ids, range(p.sampled, min(p.sampled + size, rollouts)))) for p in open_]
        for prefix, found in zip(open_, roller.roll(asks), strict=True):
            right = [r for r in found if r.right]
            if consistent and right and prefix.last_step:
                suffixes = engine.tokenizer.batch_decode([r.ids[r.start :] for r in right], skip_special_tokens=True)
                used = sum(uses_result(prefix.last_step, suffix) for suffix in suffixes)
                ignoring += len(right) - used
            else:
                used = len(right)
            prefix.correct += used
            prefix.sampled += len(found)
            # A prefix without room in the context gives nothing, ever.
            prefix.open = bool(found) and prefix.sampled < rollouts
            if stop and prefix.open:
                prefix.open = not stop.decided(prefix.correct, prefix.sampled, rollouts)
    # The empty prefix is asked like the others and counted with them, but a prompt that is too long is a prefix, too.
    too_long = sum(not prefix.sampled for prefix in wanted.values())
    if too_long:
        result.dropped["prefixes longer than the context"] = too_long
    if stop:
        sampled = [prefix.sampled for prefix in wanted.values() if prefix.sampled]
        result.counts["continuations sampled"] = sum(sampled)
        result.counts["continuations saved by stopping early"] = rollouts * len(sampled) - sum(sampled)
    if consistent:
        result.counts["right continuations that do not use the result before them"] = ignoring

    for row, prefixes in zip(kept, prefixes_of, strict=True):
        counts = [*((p.correct, p.sampled) for p in prefixes), (int(row.right), 1)]
        problem = dataclasses.replace(problems[row.problem_id], prompt=row.prompt, answer=row.gold)
        result.rows.append(
            counted_row(task, problem, row.sample, row.steps, counts, row.outcome, roller.source(policy))
        )
    result.ledger = engine.ledger - before
    return result


def _layout(roller: Roller, row: Solution) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """(solution ids, step ends, as sampled): the row's own ids if they are there and the completer reads the same steps in
    them, else those of the completer's step format."""
    if row.token_ids:
        steps, ends = roller.cut(row.token_ids)
        if steps == row.steps:
            return row.token_ids, ends, True
    encoded = roller.step_format.encode_after(roller.engine.tokenizer, (), row.steps)
    return encoded.ids, tuple(end + 1 for end in encoded.step_ends), False
