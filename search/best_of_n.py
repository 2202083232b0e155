"""Independent samples, and the step-level form of best-of-N: greedy by the scorer."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Tree, check, distinct, ranked, search


def best_of_n(
    roots: Sequence[State], policy: Policy, scorer: Scorer, *, n: int = 16, seed: int = 0
) -> list[SearchResult]:
    """`n` independent solutions for each root, the best scored chosen; their answers can be voted on as well.

    Best-of-N and self-consistency (arXiv:2110.14168, arXiv:2203.11171). The prefix that all samples share is encoded
    once. With `n` 1 it is plain sampling, with a policy at temperature 0 greedy decoding.
    """
    check(1, n=n)

    def grow(tree: Tree) -> Growth:
        [finals] = yield from tree.grow([(tree.root, tree.seeds(n, "sample"))], to_the_end=True)
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)


def step_best_of_n(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    n: int = 16,
    max_depth: int = 40,
    dedupe: bool = False,
    seed: int = 0,
) -> list[SearchResult]:
    """One solution for each root: at each step the best scored of `n` samples is gone on from, until that is finished.

    Step-level best-of-N (arXiv:2410.13639): beam search of one beam in which finished solutions compete with unfinished
    ones. At `max_depth` the `n` samples go to the end. Ties keep the order of sampling; with `dedupe` equal steps are
    scored once.
    """
    check(1, n=n, max_depth=max_depth)

    def grow(tree: Tree) -> Growth:
        node = tree.root
        for depth in range(1, max_depth + 1):
            seeds = tree.seeds(n, "step", depth)
            [children] = yield from tree.grow([(node, seeds)], to_the_end=depth == max_depth)
            if dedupe:
                children = distinct(children)
            yield from tree.score(children)
            node = ranked(children)[0]
            if node.state.done:
                break
        return [node], node

    return search(roots, policy, scorer, grow, seed=seed)
