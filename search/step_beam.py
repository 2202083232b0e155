"""Step-level beam search SBS(B1, B2) of AlphaMath (arXiv:2405.03553, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, distinct, ranked, search


def step_beam(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    beams: int = 3,
    width: int = 5,
    max_depth: int = 40,
    dedupe: bool = True,
    seed: int = 0,
) -> list[SearchResult]:
    """Up to `beams` solutions for each root: of all children, finished or not, the best `beams` are kept.

    The first round samples beams * width steps, later ones `width` of each kept prefix. A finished solution among the
    best is a result and takes its place in the beam with it; a search ends when no place is left. Unlike beam search,
    finished solutions compete when they appear, and children are scored on their own, without accumulation. With
    `dedupe`, as in the paper, equal siblings count once. At `max_depth` the children go to the end. Ties keep the order
    of sampling.
    """
    check(1, beams=beams, width=width, max_depth=max_depth)

    def grow(tree: Tree) -> Growth:
        finals: list[Node] = []
        plan = [(tree.root, beams * width)]
        for depth in range(1, max_depth + 1):
            shares = tree.shares(plan, "step beam", depth)
            grown = yield from tree.grow(shares, to_the_end=depth == max_depth)
            children = [child for row in grown for child in (distinct(row) if dedupe else row)]
            yield from tree.score(children)
            best = ranked(children)[: beams - len(finals)]
            finals += [node for node in best if node.state.done]
            plan = [(node, width) for node in best if not node.state.done]
            if not plan:
                break
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)
