"""OmegaPRM (arXiv:2406.06592 section 3): the first error of wrong rollouts by binary search, in a tree that reuses rollouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models.engine import Engine, Sampling
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .growing import Ask, Cut, Growth, Roller, Rollout, TreeBuilder, grown_rows
from .rows import Tree
from .store import UnitResult


@dataclass(frozen=True)
class Options:
    """The settings of one search; the defaults are the paper's (section 4, appendix A)."""

    rollouts: int = 8  # k: rollouts of each probed prefix
    filter_rollouts: int = 32  # drop a question of whose so many rollouts none or all are right; 0: no filter
    search_limit: int = 100  # wrong rollouts searched in one question
    alpha: float = 0.5
    beta: float = 0.9
    length_scale: float = 500.0  # L, tokens
    c_puct: float = 0.125
    min_tokens: int = 0  # a span of fewer tokens is not split any further
    doubt: int = 0  # a middle with so few right rollouts, or fewer, is probed once more


@dataclass
class State:
    """A probed prefix: its counts, and N(s), how often a rollout of it was selected."""

    node: int
    steps: tuple[str, ...]
    n_correct: int
    n_rollouts: int
    good: bool  # whether the search takes it for right so far, and looks for the error behind it
    visits: int = 0

    @property
    def mc(self) -> float:
        return self.n_correct / self.n_rollouts


@dataclass
class Found:
    """What the search of one question gave. `dropped` says why there is no tree."""

    builder: TreeBuilder
    dropped: str = ""
    counts: Counter[str] = field(default_factory=Counter)
    # Each rollout that was searched, with how many of its steps are good and how many end in an error: one more if it was located.
    spans: list[tuple[Rollout, int, int]] = field(default_factory=list)


def quality(mc: float, tokens: int, options: Options) -> float:
    """Q(s, r) = alpha^(1 - MC(s)) beta^(len(r) / L): short wrong rollouts of states that are mostly solved come first."""
    return options.alpha ** (1 - mc) * options.beta ** (tokens / options.length_scale)


def exploration(visits: int, all_visits: int, options: Options) -> float:
    """U(s) = c_puct sqrt(sum_i N(s_i)) / (1 + N(s))."""
    return options.c_puct * math.sqrt(all_visits) / (1 + visits)


def search_question(cut: Cut, options: Options) -> Growth[Found]:
    """Grows the tree of one question (the paper's algorithm, section 3.3).

    The pool holds the wrong rollouts of every state with 0 < MC < 1. The one with the greatest Q + U is taken out for good and
    searched: the middle of the span between its last prefix known to be good (MC > 0) and its first known to be bad (MC = 0) is
    probed with k rollouts until the span is one step. Prefixes that were probed before are not probed again. Two rollouts with
    the same steps are one.

    Follows the paper but for two things: steps are those of the task instead of spans of equal length, and the root keeps all
    rollouts that the filter sampled instead of drawing k more.

    Beyond the paper, with `doubt` d a middle of which only 1 .. d rollouts were right gets k rollouts more, and is good if one
    of these is right, too: one lucky rollout behind an error would send the search past it. Its counts are those of all of them.
    """
    builder = TreeBuilder()
    found = Found(builder)
    [rollouts] = yield [Ask((), range(max(options.filter_rollouts, options.rollouts)))]
    if not rollouts:
        found.dropped = "prompts longer than the context"
        return found
    builder.count(0, rollouts)
    right = builder.nodes[0].n_correct
    if options.filter_rollouts and right in (0, len(rollouts)):
        found.dropped = "questions without a right rollout" if right == 0 else "questions without a wrong rollout"
        return found

    states: dict[tuple[str, ...], State] = {}
    pool: dict[tuple[int, ...], tuple[State, Rollout]] = {}
    searched: set[tuple[str, ...]] = set()

    def open_state(node: int, steps: tuple[str, ...], rollouts: Sequence[Rollout], good: bool = True) -> State:
        builder.count(node, rollouts)
        right = sum(r.right for r in rollouts)
        state = State(node, steps, right, len(rollouts), good and right > 0)
        states[steps] = state
        if state.good:
            for rollout in rollouts:
                if not rollout.right:
                    pool.setdefault(rollout.ids, (state, rollout))
        return state

    open_state(0, (), rollouts)
    while pool and found.counts["rollouts searched"] < options.search_limit:
        total = sum(s.visits for s in states.values())
        best = max(
            pool,
            key=lambda ids: (
                quality(pool[ids][0].mc, len(ids) - pool[ids][1].start, options)
                + exploration(pool[ids][0].visits, total, options)
            ),
        )
        state, rollout = pool.pop(best)
        steps, ends = cut(rollout.ids)
        if len(steps) <= len(state.steps):
            found.counts["rollouts that add no step"] += 1
            continue
        if steps in searched:
            found.counts["rollouts met again"] += 1
            continue
        searched.add(steps)
        found.counts["rollouts searched"] += 1
        state.visits += 1
        builder.nodes[state.node].visits += 1
        good, bad = len(state.steps), len(steps)
        while bad - good > 1 and _tokens(ends, good, bad) >= options.min_tokens:
            middle = (good + bad) // 2
            probed = states.get(steps[:middle])
            if probed is None:
                prefix, k = rollout.ids[: ends[middle - 1]], options.rollouts
                [rollouts] = yield [Ask(prefix, range(k))]
                if not rollouts:
                    break  # no room to sample on from there: the span stays as it is
                found.counts["prefixes probed"] += 1
                more: list[Rollout] = []
                if 0 < sum(r.right for r in rollouts) <= options.doubt:
                    [more] = yield [Ask(prefix, range(k, 2 * k))]
                    found.counts["prefixes probed once more"] += 1
                node = builder.add(rollout, steps[:middle], ends)
                sure = not more or any(r.right for r in more)
                probed = open_state(node, steps[:middle], [*rollouts, *more], sure)
            good, bad = (middle, bad) if probed.good else (good, middle)
        found.spans.append((rollout, good, bad))
        node = builder.add(rollout, steps[:bad], ends)
        if bad == len(steps) and not builder.nodes[node].n_rollouts:
            builder.finish(node, rollout.outcome)
        last = states.get(steps[:bad])
        if bad - good == 1 and (last is None or not last.good):
            found.counts["first errors found"] += 1
    if not pool:
        found.counts["questions with every wrong rollout searched"] += 1
    return found


def _tokens(ends: Sequence[int], good: int, bad: int) -> int:
    return ends[bad - 1] - (ends[good - 1] if good else 0)


def omegaprm_trees(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    options: Options,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Tree]:
    """One tree for each question that passes the filter: same arguments, same rows, whatever questions stand beside it."""
    roller = Roller(engine, task, step_format, sampling, seed)
    growths = [search_question(roller.cut, options) for _ in problems]
    return grown_rows(
        roller, problems, growths, lambda problem, found, source: [found.builder.tree(problem, source)], policy
    )
