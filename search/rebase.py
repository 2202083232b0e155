"""REBASE, reward-balanced tree search (arXiv:2408.00724): the width of each depth is split by a softmax of scores."""

from __future__ import annotations

import math
from collections.abc import Sequence

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, ranked, search
from .particles import softmax


def rebase(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    n: int = 16,
    temperature: float = 0.2,
    keep: float = 1.0,
    max_depth: int = 40,
    seed: int = 0,
) -> list[SearchResult]:
    """`n` solutions for each root. At each depth n - finished children are split over the unfinished nodes by
    `balanced_shares`.

    `temperature` is on the scale of scores in (0, 1): large recovers independent sampling, small a greedy tree. `keep` is
    the share of the best nodes that take part (1: all). A finished solution takes one of the width with it, so that there
    are exactly `n`. At `max_depth` the children go to the end. Ties keep the order of sampling.
    """
    check(1, n=n, max_depth=max_depth)
    if temperature <= 0:
        raise ValueError(f"temperature must be more than 0, found {temperature}")
    if not 0 < keep <= 1:
        raise ValueError(f"keep must lie in (0, 1], found {keep}")

    def grow(tree: Tree) -> Growth:
        finals: list[Node] = []
        plan = [(tree.root, n)]
        for depth in range(1, max_depth + 1):
            shares = tree.shares(plan, "rebase", depth)
            grown = yield from tree.grow(shares, to_the_end=depth == max_depth)
            children = [child for row in grown for child in row]
            finals += [child for child in children if child.state.done]
            pool = [child for child in children if not child.state.done]
            if not pool:
                break
            yield from tree.score(pool)
            pool = ranked(pool)[: max(1, math.ceil(keep * len(pool) - 1e-9))]
            counts = balanced_shares([node.score or 0.0 for node in pool], n - len(finals), temperature)
            plan = [(node, count) for node, count in zip(pool, counts, strict=True) if count]
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)


def balanced_shares(scores: Sequence[float], width: int, temperature: float) -> list[int]:
    """How many of `width` children each node has, by softmax(score / temperature); they sum to `width`.

    From the best score down, n_j = ceil(width left * share_j / share left), as in the official code (the paper rounds):
    nodes of low score may have none.
    """
    weights = softmax([score / temperature for score in scores])
    counts = [0] * len(scores)
    left, mass = width, 1.0
    for j in sorted(range(len(scores)), key=lambda j: -scores[j]):
        if left <= 0:
            break
        # What rounding adds to a whole number must not become a child.
        counts[j] = min(left, math.ceil(left * weights[j] / mass - 1e-9)) if mass > 0 else left
        left, mass = left - counts[j], mass - weights[j]
    if left > 0:
        counts[max(range(len(scores)), key=lambda j: (scores[j], -j))] += left
    return counts
