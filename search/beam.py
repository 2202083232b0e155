"""PRM beam search (arXiv:2408.03314 section 5.2), for many problems at once."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics import fold_seed
from .base import Policy, Scorer, SearchResult, State


def beam_search(
    roots: Sequence[State], policy: Policy, scorer: Scorer, *, beams: int, width: int, max_depth: int, seed: int
) -> list[SearchResult]:
    """`beams` finished solutions for each root, grown step by step from the best `beams / width` prefixes.

    One expand and one score call a depth for all roots together. At each depth a root has `slots = beams - finished` children:
    the best ceil(slots / width) unfinished prefixes share them, earlier ranks taking one more where they do not divide. Ties
    keep the order of sampling. A finished solution leaves the pool at once and does not compete, so that a root always ends
    with exactly `beams` solutions and never costs more than `beams` independent samples. (Open implementations refill to
    `beams` copies instead and drop what finishes late, which costs more for the same number of solutions.) What is unfinished
    at `max_depth` is sampled on to its end without a further choice. If every child of a root has finished the root is done.
    """
    if not 1 <= width <= beams:
        raise ValueError(f"1 <= width <= beams must hold, found width {width} and beams {beams}")
    finals: list[list[State]] = [[] for _ in roots]
    depths = [0] * len(roots)
    # What is to be expanded: (root, prefix, number of children).
    plan = [(r, root, beams) for r, root in enumerate(roots)]
    for depth in range(1, max_depth + 1):
        if not plan:
            break
        if depth == max_depth:
            again = [(r, state) for r, state, count in plan for _ in range(count)]
            seeds = [fold_seed(seed, state.key, "finish", depth, k) for k, (_, state) in _ranked(again)]
            for (r, _), final in zip(again, policy.finish([s for _, s in again], seeds), strict=True):
                finals[r].append(final)
                depths[r] = depth
            break
        seeds_of, offset = [], [0] * len(roots)
        for r, state, count in plan:
            seeds_of.append([fold_seed(seed, state.key, "beam", depth, offset[r] + k) for k in range(count)])
            offset[r] += count
        grown = policy.expand([state for _, state, _ in plan], seeds_of)
        open_states: list[tuple[int, State]] = []
        for (r, _, _), children in zip(plan, grown, strict=True):
            depths[r] = depth
            for child in children:
                if child.done:
                    finals[r].append(child)
                else:
                    open_states.append((r, child))
        scores = scorer([state for _, state in open_states]) if open_states else []
        pools: dict[int, list[tuple[float, State]]] = {}
        for (r, state), score in zip(open_states, scores, strict=True):
            pools.setdefault(r, []).append((score, state))
        plan = []
        for r, pool in pools.items():
            slots = beams - len(finals[r])
            keep = sorted(pool, key=lambda pair: -pair[0])[: -(-slots // width)]
            share, more = divmod(slots, len(keep))
            plan += [(r, state, share + (rank < more)) for rank, (_, state) in enumerate(keep)]
    everything = [state for found in finals for state in found]
    final_scores = iter(scorer(everything) if everything else [])
    return [
        SearchResult(tuple(found), tuple(next(final_scores) for _ in found), depth)
        for found, depth in zip(finals, depths, strict=True)
    ]


def _ranked(items: Sequence[tuple[int, State]]) -> list[tuple[int, tuple[int, State]]]:
    """Each item with its rank among the items of the same root."""
    counts: dict[int, int] = {}
    ranked = []
    for item in items:
        rank = counts.get(item[0], 0)
        counts[item[0]] = rank + 1
        ranked.append((rank, item))
    return ranked
