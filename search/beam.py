"""PRM beam search (arXiv:2408.03314 section 5.2), with lookahead, for many problems at once."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, distinct, ranked, search


def beam_search(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    beams: int = 16,
    width: int = 4,
    max_depth: int = 40,
    lookahead: int = 0,
    dedupe: bool = False,
    seed: int = 0,
) -> list[SearchResult]:
    """`beams` finished solutions for each root, grown step by step from the best `beams / width` prefixes.

    One expand and one score call a depth for all roots together. At each depth a root has `slots = beams - finished`
    children: the best ceil(slots / width) unfinished prefixes share them, earlier ranks taking one more where they do not
    divide. Ties keep the order of sampling. A finished solution leaves the pool at once and does not compete, so that a
    root always ends with exactly `beams` solutions and never costs more than `beams` independent samples. (Open
    implementations refill to `beams` copies instead and drop what finishes late, which costs more for the same number of
    solutions.) What is unfinished at `max_depth` is sampled on to its end without a further choice. If every child of a
    root has finished the root is done.

    `lookahead` k judges a prefix by the score after k greedy steps more, which costs about k + 1 times as much. With `dedupe`
    prefixes of the same steps compete once, the first of them.
    """
    if not 1 <= width <= beams:
        raise ValueError(f"1 <= width <= beams must hold, found width {width} and beams {beams}")
    check(1, max_depth=max_depth)
    check(0, lookahead=lookahead)

    def grow(tree: Tree) -> Growth:
        finals: list[Node] = []
        plan = [(tree.root, beams)]
        for depth in range(1, max_depth + 1):
            last = depth == max_depth
            shares = tree.shares(plan, "finish" if last else "beam", depth)
            children = [child for row in (yield from tree.grow(shares, to_the_end=last)) for child in row]
            finals += [child for child in children if child.state.done]
            pool = [child for child in children if not child.state.done]
            if not pool:
                break
            if dedupe:
                pool = distinct(pool)
            yield from tree.score(pool, lookahead=lookahead)
            slots = beams - len(finals)
            kept = ranked(pool)[: -(-slots // width)]
            share, more = divmod(slots, len(kept))
            plan = [(node, share + (rank < more)) for rank, node in enumerate(kept)]
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)
