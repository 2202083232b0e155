"""Best-first trees (Tree-PLV, arXiv:2407.00390): at every level sibling steps are compared, and the best is gone on with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models.engine import Engine, Sampling
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .growing import Ask, Cut, Growth, Roller, Rollout, TreeBuilder, grown_rows
from .rows import Tree
from .store import UnitResult


@dataclass
class Found:
    """What one question gave. `dropped` says why there is no tree."""

    builder: TreeBuilder
    dropped: str = ""
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Candidate:
    """A next step, as it stands in the first rollout that has it. `finished`: no rollout goes on behind it."""

    rollout: Rollout
    steps: tuple[str, ...]
    ends: tuple[int, ...]
    finished: bool


def next_steps(rollouts: Sequence[Rollout], cut: Cut, depth: int, most: int) -> list[Candidate]:
    """Up to `most` distinct next steps of a prefix of `depth` steps: those of its own completions, in order of sampling."""
    found: dict[tuple[str, ...], Candidate] = {}
    for rollout in rollouts:
        steps, ends = cut(rollout.ids)
        if len(steps) <= depth:
            continue
        key, last = steps[: depth + 1], len(steps) == depth + 1
        # The rollout that goes on is kept: its ids can be sampled on from.
        if key not in found or (found[key].finished and not last):
            found[key] = Candidate(rollout, key, ends[: depth + 1], last)
    return list(found.values())[:most]


def best_first_tree(
    cut: Cut, *, candidates: int, completions: int, max_depth: int, complete: bool = False
) -> Growth[Found]:
    """Grows one path of best steps with all their siblings.

    The reward of a prefix is the share of its `completions` that end right (the paper's N), that of a finished solution its
    verdict. At each level up to `candidates` next steps get their reward; the best, the first sampled among equals, is expanded,
    until it is finished or `max_depth` is reached. Next steps are drawn from the completions that gave the prefix its own reward:
    they are samples of the policy and cost nothing. A level whose best reward is 0 is the last: nothing below it differs.

    With `complete` each step that is judged and not expanded goes on along its first completion, by steps that are not judged, so
    that it is part of a whole solution as the expanded ones are.
    """
    builder = TreeBuilder()
    found = Found(builder)
    [rollouts] = yield [Ask((), range(completions))]
    if not rollouts:
        found.dropped = "prompts longer than the context"
        return found
    builder.count(0, rollouts)
    node = 0
    for depth in range(max_depth):
        level = next_steps(rollouts, cut, depth, candidates)
        if not level:
            break
        builder.nodes[node].visits += 1
        growing = [c for c in level if not c.finished]
        answers = iter((yield [Ask(c.rollout.ids[: c.ends[-1]], range(completions)) for c in growing]))
        best: tuple[float, int, list[Rollout]] | None = None
        siblings: dict[int, Rollout] = {}
        for candidate in level:
            child = builder.add(candidate.rollout, candidate.steps, candidate.ends)
            below: list[Rollout] = []
            if candidate.finished:
                builder.finish(child, candidate.rollout.outcome)
            else:
                below = next(answers)
                builder.count(child, below)
                if below:
                    siblings[child] = below[0]
            counted = builder.nodes[child]
            if counted.n_rollouts:
                found.counts["steps judged"] += 1
                share = counted.n_correct / counted.n_rollouts
                if best is None or share > best[0]:
                    best = (share, child, below)
        hopeless = best is None or best[0] == 0
        for child, rollout in siblings.items():
            if complete and (hopeless or best is None or child != best[1]):
                last = builder.nodes[builder.add(rollout, *cut(rollout.ids))]
                if not last.n_rollouts and last is not builder.nodes[child]:
                    last.outcome = rollout.outcome
        if best is None or hopeless:
            found.counts["questions that no step could solve"] += 1
            break
        _, node, rollouts = best
        if not rollouts:
            found.counts["questions solved"] += 1
            break
    return found


def best_first_trees(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    candidates: int,
    completions: int,
    max_depth: int,
    complete: bool = False,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Tree]:
    """One tree for each question: same arguments, same rows, whatever questions stand beside it."""
    roller = Roller(engine, task, step_format, sampling, seed)
    growths = [
        best_first_tree(
            roller.cut, candidates=candidates, completions=completions, max_depth=max_depth, complete=complete
        )
        for _ in problems
    ]
    return grown_rows(
        roller, problems, growths, lambda problem, found, source: [found.builder.tree(problem, source)], policy
    )
