"""Sequential revisions (arXiv:2408.03314 section 6): attempts that see earlier ones, in chains beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from .base import RevisingPolicy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, search


def revisions(
    roots: Sequence[State],
    policy: RevisingPolicy,
    scorer: Scorer,
    *,
    n: int = 16,
    chains: int = 1,
    shown: int = 4,
    seed: int = 0,
) -> list[SearchResult]:
    """`n` solutions for each root: `chains` chains of n / chains attempts, each shown the last `shown` attempts of its chain.

    The first attempt of a chain is a plain sample; with as many chains as solutions the search is best-of-N. Choose among
    all attempts (a revision often turns a right answer wrong), never the last. A node's parent is the attempt before it.
    """
    check(1, n=n, chains=chains, shown=shown)
    if n % chains:
        raise ValueError(f"n must be a multiple of chains, found n {n} and chains {chains}")

    def grow(tree: Tree) -> Growth:
        attempts: list[list[Node]] = [[] for _ in range(chains)]
        for number in range(n // chains):
            if number == 0:
                [first] = yield from tree.grow([(tree.root, tree.seeds(chains, "attempt", 0))], to_the_end=True)
                attempts = [[node] for node in first]
                continue
            plan = [(chain[-1], tree.seeds(1, "attempt", number, start=c)) for c, chain in enumerate(attempts)]
            bases = [policy.again(tree.root.state, [a.state for a in chain[-shown:]]) for chain in attempts]
            for chain, [node] in zip(attempts, (yield from tree.grow(plan, to_the_end=True, bases=bases)), strict=True):
                chain.append(node)
        return [node for chain in attempts for node in chain], None

    return search(roots, policy, scorer, grow, seed=seed)
