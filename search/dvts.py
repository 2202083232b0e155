"""Diverse verifier tree search: several greedy searches that never compete (search-and-learn; arXiv:2408.03314 has the beam)."""

from __future__ import annotations

from collections.abc import Sequence

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, distinct, ranked, search


def dvts(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    n: int = 16,
    width: int = 4,
    max_depth: int = 40,
    lookahead: int = 0,
    dedupe: bool = False,
    seed: int = 0,
) -> list[SearchResult]:
    """`n` solutions for each root: n / width independent trees, each of which keeps the best of `width` samples at every
    step.

    A tree ends when the sample that it keeps is finished; all `width` samples of that last round are solutions, and those
    that are not finished yet are sampled on to their end (search-and-learn hands them out unfinished, without an answer).
    At `max_depth` the samples go to the end. With `dedupe` equal steps of one prefix are scored once; in the last round
    all are kept. `lookahead` as in beam search. Ties keep the order of sampling.
    """
    check(1, width=width, max_depth=max_depth)
    check(0, lookahead=lookahead)
    if n < width or n % width:
        raise ValueError(f"n must be a multiple of width, found n {n} and width {width}")

    def grow(tree: Tree) -> Growth:
        kept = dict.fromkeys(range(n // width), tree.root)
        last_round: dict[int, list[Node]] = {}
        for depth in range(1, max_depth + 1):
            plan = [(node, tree.seeds(width, "dvts", number, depth)) for number, node in kept.items()]
            grown = yield from tree.grow(plan, to_the_end=depth == max_depth)
            judged = [distinct(children) if dedupe else children for children in grown]
            yield from tree.score([node for children in judged for node in children], lookahead=lookahead)
            going = {}
            for number, children, scored in zip(kept, grown, judged, strict=True):
                best = ranked(scored)[0]
                if best.state.done:
                    last_round[number] = children
                else:
                    going[number] = best
            kept = going
            if not kept:
                break
        finals = [node for number in sorted(last_round) for node in last_round[number]]
        left = [(i, node) for i, node in enumerate(finals) if not node.state.done]
        plan = [(node, [tree.fold("dvts rest", i)]) for i, node in left]
        for (i, _), [end] in zip(left, (yield from tree.grow(plan, to_the_end=True)), strict=True):
            finals[i] = end
        return finals, None

    return search(roots, policy, scorer, grow, seed=seed)
