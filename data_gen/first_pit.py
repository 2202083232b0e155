"""Prefixes with well-known values for PAV (arXiv:2410.08146 section 4.2, appendix D): i.i.d. seeds, or up to the first pit."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..basics import fold_seed
from ..models.engine import Engine, Sampling
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .growing import Ask, Cut, Growth, Roller, Rollout, counted_row, grown_rows
from .rows import Source, StepLabels
from .store import UnitResult
from .tree_rows import UNFINISHED


@dataclass(frozen=True)
class Options:
    """How the budget of one question is spent."""

    strategy: str = "first_pit"  # or iid
    seeds: int = 8  # n_cov: rollouts from the question
    probes: int = 4  # rollouts of a prefix while promising states and pits are looked for
    promising: float = 0.25  # a state is promising if its share is greater than this
    pits: int = 4  # wrong rollouts followed to their first pit
    rollouts: int = 20  # n_mc: rollouts of each kept prefix


@dataclass
class Kept:
    """A solution, or its part up to the first pit, whose prefixes are kept."""

    steps: tuple[str, ...]
    ends: tuple[int, ...]
    ids: tuple[int, ...]
    outcome: str  # of the solution if it is whole, else UNFINISHED


@dataclass
class Found:
    """What one question gave: kept solutions, and the counts of the prefixes of k steps as (right, rollouts)."""

    kept: list[Kept] = field(default_factory=list)
    values: dict[tuple[str, ...], tuple[int, int]] = field(default_factory=dict)
    dropped: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def explore_question(cut: Cut, options: Options, seed: int) -> Growth[Found]:
    """Chooses prefixes of one question and gives each `rollouts` rollouts.

    `iid`: all prefixes of all `seeds` rollouts from the question.
    `first_pit`: first one prefix of each seed, at a place drawn with `seed`, is probed with `probes` rollouts; states with a
    share over `promising`, the question itself among them, are promising. Their wrong rollouts, those of the best state first,
    are followed step by step, each prefix probed, to the first with no right rollout, the pit (a wrong solution ends in one). The
    prefixes up to and including it are kept. What chose a pit is not counted again: kept prefixes are valued by fresh rollouts,
    or values near a pit would be biased.
    """
    found = Found()
    [seeds] = yield [Ask((), range(options.seeds))]
    if not seeds:
        found.dropped = "prompts longer than the context"
        return found
    if options.strategy == "iid":
        for rollout in _distinct(seeds, cut, set()):
            steps, ends = cut(rollout.ids)
            found.kept.append(Kept(steps, ends, rollout.ids, rollout.outcome))
    else:
        yield from _pits(found, seeds, cut, options, seed)
    if not found.kept:
        found.dropped = found.dropped or "questions without a step"
        return found
    # Fresh numbers: those of the seeds and of the probes have been looked at.
    numbers = range(options.seeds + options.probes, options.seeds + options.probes + options.rollouts)
    wanted: dict[tuple[str, ...], Ask] = {}
    for kept in found.kept:
        last = len(kept.steps) if kept.outcome == UNFINISHED else len(kept.steps) - 1
        for depth in range(last + 1):
            prefix = kept.ids[: kept.ends[depth - 1]] if depth else ()
            wanted.setdefault(kept.steps[:depth], Ask(prefix, numbers))
    for steps, rollouts in zip(wanted, (yield list(wanted.values())), strict=True):
        found.values[steps] = (sum(r.right for r in rollouts), len(rollouts))
    found.counts["prefixes valued"] = len(found.values)
    return found


def _distinct(rollouts: Sequence[Rollout], cut: Cut, seen: set[tuple[str, ...]]) -> list[Rollout]:
    """Rollouts with steps that were not met before; `seen` grows."""
    kept = []
    for rollout in rollouts:
        steps, _ = cut(rollout.ids)
        if steps and steps not in seen:
            seen.add(steps)
            kept.append(rollout)
    return kept


def _pits(found: Found, seeds: Sequence[Rollout], cut: Cut, options: Options, seed: int) -> Growth[None]:
    shares: dict[tuple[str, ...], float] = {}
    states: list[tuple[float, int, list[Rollout]]] = [
        (sum(r.right for r in seeds) / len(seeds), 0, list(seeds)),
    ]
    asks: dict[tuple[str, ...], Ask] = {}
    probes = range(options.seeds, options.seeds + options.probes)
    for number, rollout in enumerate(seeds):
        steps, ends = cut(rollout.ids)
        if len(steps) > 1:
            depth = random.Random(fold_seed(seed, "state", number)).randrange(1, len(steps))
            asks.setdefault(steps[:depth], Ask(rollout.ids[: ends[depth - 1]], probes))
    for steps, rollouts in zip(asks, (yield list(asks.values())), strict=True):
        if rollouts:
            shares[steps] = sum(r.right for r in rollouts) / len(rollouts)
            states.append((shares[steps], len(steps), rollouts))
    promising = sorted((s for s in states if s[0] > options.promising), key=lambda s: -s[0])
    found.counts["promising states"] += len(promising)
    if not promising:
        found.dropped = "questions without a promising state"
        return
    seen: set[tuple[str, ...]] = set()
    # (rollout, its steps, its ends, how many steps are known to be no pit)
    open_: list[tuple[Rollout, tuple[str, ...], tuple[int, ...], int]] = []
    for _, depth, rollouts in promising:
        for rollout in _distinct([r for r in rollouts if not r.right], cut, seen):
            steps, ends = cut(rollout.ids)
            if len(steps) > depth and len(open_) < options.pits:
                open_.append((rollout, steps, ends, depth))
    if not open_:
        found.dropped = "questions without a wrong rollout"
        return
    ordered: dict[tuple[str, ...], Kept] = {}
    while open_:
        asks, still = {}, []
        for rollout, steps, ends, depth in open_:
            # Step depth + 1 is the pit if it ends the wrong solution or has no right probe.
            while depth + 1 < len(steps) and shares.get(steps[: depth + 1], 0.0) > 0:
                depth += 1
            whole = depth + 1 == len(steps)
            if whole or steps[: depth + 1] in shares:
                pit = Kept(steps[: depth + 1], ends[: depth + 1], rollout.ids, rollout.outcome if whole else UNFINISHED)
                ordered.setdefault(pit.steps, pit)
                continue
            asks.setdefault(steps[: depth + 1], Ask(rollout.ids[: ends[depth]], probes))
            still.append((rollout, steps, ends, depth))
        open_ = still
        if asks:
            for key, rollouts in zip(asks, (yield list(asks.values())), strict=True):
                shares[key] = sum(r.right for r in rollouts) / len(rollouts) if rollouts else 0.0
    found.counts["pits found"] += len(ordered)
    found.kept.extend(ordered.values())


def valued_prefixes(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    options: Options,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[StepLabels]:
    """StepLabels rows of every kept solution or beginning of one, the empty prefix included."""
    roller = Roller(engine, task, step_format, sampling, seed)
    growths = [explore_question(roller.cut, options, fold_seed(seed, problem.id, "first pit")) for problem in problems]

    def rows_of(problem: Problem, found: Found, source: Source) -> list[StepLabels]:
        rows = []
        for number, kept in enumerate(found.kept):
            counts = [found.values.get(kept.steps[:t], (0, 0)) for t in range(len(kept.steps) + 1)]
            if kept.outcome != UNFINISHED:
                counts[-1] = (int(kept.outcome == "right"), 1)
            rows.append(counted_row(task, problem, number, kept.steps, counts, kept.outcome, source))
        return rows

    return grown_rows(roller, problems, growths, rows_of, policy)
