"""Tree of Thoughts (arXiv:2305.10601): breadth first with a fixed number of states, and depth first with backtracking."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, distinct, ranked, search


def tot_bfs(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    beams: int = 5,
    width: int = 4,
    select: Literal["greedy", "sample"] = "greedy",
    max_depth: int = 40,
    seed: int = 0,
) -> list[SearchResult]:
    """Up to `beams` solutions for each root: at each step `beams` of all states are kept, finished ones among them.

    A kept state has `width` children. `select` takes the best scored, or draws without replacement in proportion to the
    scores (which must not be negative then). A finished state is carried along and can be outdone; the search ends when
    all kept states are finished. Equal states count once, as in the paper. At `max_depth` the children go to the end.
    """
    check(1, beams=beams, width=width, max_depth=max_depth)
    if select not in ("greedy", "sample"):
        raise ValueError(f"select must be greedy or sample, found {select!r}")

    def grow(tree: Tree) -> Growth:
        kept = [tree.root]
        for depth in range(1, max_depth + 1):
            going = [(node, width) for node in kept if not node.state.done]
            grown = yield from tree.grow(tree.shares(going, "tot", depth), to_the_end=depth == max_depth)
            children = [child for row in grown for child in row]
            pool = distinct([*(node for node in kept if node.state.done), *children])
            yield from tree.score([node for node in pool if node.score is None])
            kept = ranked(pool)[:beams] if select == "greedy" else _drawn(tree, pool, beams, depth)
            if all(node.state.done for node in kept):
                break
        return kept, None

    return search(roots, policy, scorer, grow, seed=seed)


def _drawn(tree: Tree, pool: Sequence[Node], count: int, depth: int) -> list[Node]:
    """`count` of the nodes, drawn one after another in proportion to their scores."""
    left, drawn = list(pool), list[Node]()
    while left and len(drawn) < count:
        scores = [node.score or 0.0 for node in left]
        if min(scores) < 0:
            raise ValueError(f"select: sample needs scores of 0 or more, found {min(scores):g}")
        steps = list(itertools.accumulate(scores if any(scores) else [1.0] * len(left)))
        point = tree.uniform("tot draw", depth, len(drawn)) * steps[-1]
        i = next((i for i, step in enumerate(steps) if point < step), len(left) - 1)
        drawn.append(left.pop(i))
    return drawn


def tot_dfs(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    width: int = 4,
    threshold: float = 0.5,
    expansions: int = 20,
    solutions: int = 1,
    max_depth: int = 40,
    seed: int = 0,
) -> list[SearchResult]:
    """Up to `solutions` solutions for each root: the best scored child first, back where all children score under
    `threshold`.

    Ends after `solutions` finished ones or `expansions` expanded states. If nothing has finished then, the best scored
    state that was not gone on from, pruned or not, is sampled on to its end. Equal children count once. At `max_depth`
    the children go to the end. Ties keep the order of sampling.
    """
    check(1, width=width, expansions=expansions, solutions=solutions, max_depth=max_depth)

    def grow(tree: Tree) -> Growth:
        stack, finals, expanded = [tree.root], list[Node](), 0
        while stack and len(finals) < solutions:
            node = stack.pop()
            if node.state.done:
                finals.append(node)
                continue
            if expanded == expansions:
                continue  # what is finished and still on the stack counts
            seeds = tree.seeds(width, "tot dfs", expanded)
            expanded += 1
            [children] = yield from tree.grow([(node, seeds)], to_the_end=node.depth + 1 == max_depth)
            children = distinct(children)
            yield from tree.score(children)
            stack += reversed([child for child in ranked(children) if (child.score or 0.0) >= threshold])
        if not finals:
            left = [node for node in tree.nodes if not node.children and node.score is not None]
            best = ranked(left)[0]
            if not best.state.done:
                [[best]] = yield from tree.grow([(best, [tree.fold("tot dfs rest")])], to_the_end=True)
            finals.append(best)
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)
