"""Pairs from corrections (SCL, arXiv:2410.04055): what a second attempt turned round, as preferences on the plain problem."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from ..basics import fold_seed
from ..tasks.base import Problem, Task
from .rows import Pair, Source
from .store import UnitResult
from .trajectories import Chain

# An answer that speaks of an earlier one makes no sense on the plain problem.
_SPEAKS_OF_BEFORE = re.compile(
    r"\b(previous|earlier|first|original|last) (answer|attempt|solution|response)|\bapologi[sz]e|\bmy mistake\b|\bI made an? "
    r"(error|mistake)",
    re.IGNORECASE,
)


def flip_pairs(
    chains: Sequence[Chain], task: Task, problems: Mapping[str, Problem], *, per_problem: int, seed: int, source: Source
) -> UnitResult[Pair]:
    """Up to `per_problem` pairs of each problem (0: all) from attempts that follow each other and differ in their verdict.

    Wrong to right: the second is chosen; right to wrong: the first is. The pair stands on the plain problem, and the
    dialogue of the
    correction appears nowhere. What stays right or wrong is left out, and so are unreadable answers, and answers that speak of an
    earlier one.
    """
    result: UnitResult[Pair] = UnitResult([])
    counts: Counter[str] = Counter()
    found: dict[str, dict[tuple[tuple[str, ...], tuple[str, ...]], bool]] = {}
    for chain in chains:
        for before, after in zip(chain.attempts, chain.attempts[1:], strict=False):
            if before.right == after.right:
                counts[f"attempts that stay {'right' if after.right else 'wrong'}"] += 1
            elif before.answer is None or after.answer is None:
                counts["flips with an unreadable answer"] += 1
            elif _SPEAKS_OF_BEFORE.search(before.text) or _SPEAKS_OF_BEFORE.search(after.text):
                counts["flips that speak of an earlier answer"] += 1
            else:
                better, worse = (after, before) if after.right else (before, after)
                key = tuple(task.split_steps(better.text)), tuple(task.split_steps(worse.text))
                own = found.setdefault(chain.problem_id, {})
                counts["duplicates"] += key in own
                own.setdefault(key, after.right)
    for problem_id, own in found.items():
        order = sorted(own, key=lambda key: fold_seed(seed, problem_id, "flip", *key[0], "", *key[1]))
        kept = order[:per_problem] if per_problem else order
        counts["pairs beyond the limit a problem"] += len(order) - len(kept)
        for chosen, rejected in kept:
            result.counts["wrong to right" if own[chosen, rejected] else "right to wrong"] += 1
            result.rows.append(
                Pair(
                    problem_id=problem_id, prompt=problems[problem_id].prompt, prefix=(), chosen=chosen, rejected=rejected,
                    reward_chosen=1.0, reward_rejected=0.0, n_chosen=1, n_rejected=1, chosen_finished=True,
                    rejected_finished=True, source=source,
                )
            )  # fmt: skip
    result.dropped = +counts
    return result
