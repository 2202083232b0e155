"""Monte-Carlo tree search over steps with a value model instead of rollouts (AlphaMath, arXiv:2405.03553 section 3.2)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..models.engine import Engine, Sampling
from ..models.reward import RewardModel
from ..models.step_format import StepFormat
from ..search.puct import back_up, close, puct, select
from ..tasks.base import Outcome, Problem, Task
from .growing import Ask, Cut, Growth, Roller, grown_rows
from .rows import Node, Source, Tree
from .store import UnitResult
from .tree_rows import UNFINISHED


@dataclass(frozen=True)
class Options:
    """The settings of one search; the defaults are the paper's but for the depth, which is a task's."""

    simulations: int = 40
    width: int = 5  # steps sampled at once where a leaf is expanded
    max_depth: int = 16  # a path of so many steps that has not ended counts as wrong
    c_puct: float = 1.25
    terminal_backups: bool = True  # finished children are backed up when they are found, and not selected


@dataclass(eq=False)
class _Growing:
    """A node in the making: `ids` behind the prompt, visits N, the sum of what was backed up, and the prior of its step."""

    number: int  # in `Found.nodes`
    parent: _Growing | None
    ids: tuple[int, ...]
    steps: tuple[str, ...]
    prior: float = 1.0
    logprob: float = 0.0
    visits: int = 0
    total: float = 0.0
    outcome: str | None = None
    children: list[_Growing] = field(default_factory=list)
    closed: bool = False  # nothing below it is left to expand

    @property
    def q(self) -> float:
        return self.total / self.visits if self.visits else 0.0


@dataclass
class Found:
    """What one search gave. `dropped` says why there is no tree."""

    nodes: list[_Growing]
    dropped: str = ""
    counts: Counter[str] = field(default_factory=Counter)

    def tree(self, problem: Problem, source: Source) -> Tree:
        """The finished row: visits, and Q as the value of what was visited."""
        nodes = tuple(
            Node(
                -1 if n.parent is None else n.parent.number,
                n.steps[-1] if n.steps else "",
                0,
                0,
                n.visits,
                n.q if n.visits else None,
                n.outcome,
                n.logprob,
            )
            for n in self.nodes
        )
        return Tree(problem.id, problem.prompt, problem.answer, nodes, source)


def search_tree(cut: Cut, options: Options, number: int = 0) -> Growth[Found]:
    """Grows one search tree; trees of other numbers sample other steps.

    A simulation goes down from the root by `puct` to a node that was not expanded yet, samples `width` steps there, and backs
    up the value of that node (0 without a value model) to the root: N + 1, Q the running mean. The prior of a step is exp(mean
    log-probability of its tokens), not normalised over siblings, and Q of an unvisited node is 0. Steps that are sampled twice
    are one child. A finished child has reward 1 if its answer is right and -1 otherwise; a path of `max_depth` steps that is not
    finished ends there with -1.

    With `terminal_backups`, as in the released code, each finished child is backed up at once, so that one expansion is
    1 + (finished children) backups; finished children are skipped in selection, a node whose children are all finished or closed
    is closed itself, and a tree whose root is closed is done. Without, as in textbooks, finished children are selected like
    others, each time a simulation of its own; then Q goes to the exact value of best play as simulations grow.
    """
    root = _Growing(0, None, (), ())
    nodes = [root]
    found = Found(nodes)

    def appeal(node: _Growing) -> float:
        return puct(node.q, node.prior, node.parent.visits if node.parent else 0, node.visits, options.c_puct)

    for _ in range(options.simulations):
        if root.closed:
            found.counts["trees with nothing left to expand"] += 1
            break
        leaf = select(root, appeal)
        found.counts["simulations"] += 1
        if leaf.outcome is not None:
            back_up(leaf, _reward(leaf.outcome))
            continue
        numbers = range(number * options.width, (number + 1) * options.width)
        [rollouts] = yield [Ask(leaf.ids, numbers, one_step=True)]
        if not rollouts and leaf is root:
            found.dropped = "prompts longer than the context"
            return found
        seen: set[tuple[str, ...]] = set()
        for rollout in rollouts:
            steps, _ = cut(rollout.ids)
            if len(steps) <= len(leaf.steps) or steps in seen:
                found.counts["samples that add no step"] += 1
                continue
            seen.add(steps)
            logprob, tokens = sum(rollout.logprobs), len(rollout.ids) - rollout.start
            outcome = None if rollout.outcome == UNFINISHED else rollout.outcome
            if outcome is None and len(steps) >= options.max_depth:
                found.counts["paths cut at the greatest depth"] += 1
                outcome = Outcome.UNPARSEABLE.value
            prior = math.exp(logprob / max(tokens, 1))
            child = _Growing(len(nodes), leaf, rollout.ids, steps, prior, logprob, outcome=outcome)
            child.closed = outcome is not None and options.terminal_backups
            leaf.children.append(child)
            nodes.append(child)
            found.counts["right solutions"] += outcome == Outcome.RIGHT.value
        if not leaf.children:
            # No step can be added, for want of room: the solution ends here without an answer.
            leaf.outcome, leaf.closed = Outcome.UNPARSEABLE.value, options.terminal_backups
            back_up(leaf, -1.0)
            if leaf.parent is not None:
                close(leaf.parent)
            continue
        if options.terminal_backups:
            for child in leaf.children:
                if child.outcome is not None:
                    back_up(child, _reward(child.outcome))
            close(leaf)
        value = rollouts[0].value
        back_up(leaf, 0.0 if value is None else value)
    return found


def _reward(outcome: str) -> float:
    return 1.0 if outcome == Outcome.RIGHT.value else -1.0


def mcts_trees(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    options: Options,
    trees: int,
    value: RewardModel | None,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Tree]:
    """`trees` trees of each question: same arguments, same rows, whatever questions stand beside it but for rounding of values."""
    roller = Roller(engine, task, step_format, sampling, seed, value)
    asked = [problem for problem in problems for _ in range(trees)]
    growths = [search_tree(roller.cut, options, number) for _ in problems for number in range(trees)]
    result = grown_rows(roller, asked, growths, lambda problem, found, source: [found.tree(problem, source)], policy)
    solved = {row.problem_id for row in result.rows if any(n.outcome == Outcome.RIGHT.value for n in row.nodes)}
    result.counts["questions solved"] = len(solved)
    return result
