"""Attempts that follow what was said of the one before: critique and refinement, retries, Self-Refine, Reflexion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .base import Policy, Scorer, SearchResult, State
from .loop import Growth, Node, Tree, check, search

GATES = ("always", "wrong", "oracle")


class CorrectingPolicy(Policy, Protocol):
    """A policy that can be told what is wrong with an attempt, and what tells it."""

    criticises: bool  # whether there is a critic; without one a policy is asked to try again

    def before_critique(self, root: State, attempt: State) -> State:
        """The state before the first token of a critique of an attempt."""
        ...

    def criticise(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state sampled on to its end [B], by the critic."""
        ...

    def says_wrong(self, critique: State) -> bool | None:
        """Whether a critique calls its attempt wrong; None if it cannot be read."""
        ...

    def before_attempt(self, root: State, attempts: Sequence[State], critiques: Sequence[State | None]) -> State:
        """The state before the first step of another attempt, after attempts of which this was said (None: nothing)."""
        ...

    def is_right(self, attempt: State) -> bool:
        """Whether the answer of an attempt is the reference's: for the oracle, which peeks."""
        ...


def corrections(
    roots: Sequence[State],
    policy: CorrectingPolicy,
    scorer: Scorer,
    *,
    n: int = 1,
    turns: int = 2,
    gate: str = "always",
    keep: str = "last",
    seed: int = 0,
) -> list[SearchResult]:
    """`n` chains beside each other of up to `turns` attempts, each criticised and corrected by the next.

    `gate` says which attempts go on: `always` all of them, `wrong` those that the critic calls wrong (a chain ends at the
    first that
    it does not, or of which nothing can be read), `oracle` those whose answer is wrong by the reference: an upper bound that PEEKS.
    Parallel scaling is n > 1, sequential scaling is turns > 2; the solutions to vote among are the `last`
    attempt of each chain, or `all` (`keep`). In the tree a critique is a child of its attempt, and an attempt of the
    critique before it.
    """
    check(1, n=n, turns=turns)
    if gate not in GATES or keep not in ("last", "all"):
        raise ValueError(f"gate must be one of {', '.join(GATES)} and keep last or all, found {gate!r} and {keep!r}")
    if gate == "wrong" and roots and not policy.criticises:
        raise ValueError("gate wrong needs a critic that says so")

    def grow(tree: Tree) -> Growth:
        root = tree.root.state
        [first] = yield from tree.grow([(tree.root, tree.seeds(n, "sample"))], to_the_end=True)
        chains: list[list[Node]] = [[node] for node in first]
        said: list[list[Node | None]] = [[] for _ in chains]
        going = list(range(n))
        for turn in range(1, turns):
            if gate == "oracle":
                going = [c for c in going if not policy.is_right(chains[c][-1].state)]
            if policy.criticises:
                plan = [(chains[c][-1], tree.seeds(1, "critique", turn, start=c)) for c in going]
                bases = [policy.before_critique(root, chains[c][-1].state) for c in going]
                for c, [critique] in zip(
                    going, (yield from tree.grow(plan, bases=bases, how="criticise")), strict=True
                ):
                    said[c].append(critique)
            else:
                for c in going:
                    said[c].append(None)
            if gate == "wrong":
                going = [c for c in going if (found := said[c][-1]) and policy.says_wrong(found.state) is True]
            plan = [(said[c][-1] or chains[c][-1], tree.seeds(1, "attempt", turn, start=c)) for c in going]
            bases = [
                policy.before_attempt(
                    root, [a.state for a in chains[c]], [None if s is None else s.state for s in said[c]]
                )
                for c in going
            ]
            for c, [node] in zip(going, (yield from tree.grow(plan, to_the_end=True, bases=bases)), strict=True):
                chains[c].append(node)
        return [node for chain in chains for node in (chain if keep == "all" else chain[-1:])], None

    return search(roots, policy, scorer, grow, seed=seed)
