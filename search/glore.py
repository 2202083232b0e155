"""Global and local refinements of drafts, with a scorer that chooses among them and the draft (GLoRe, arXiv:2402.10963)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from .base import Policy, Scorer, SearchResult, State
from .loop import Ask, Growth, Node, Tree, check, search

REFINES = ("both", "global", "local")


class RefiningPolicy(Policy, Protocol):
    """A policy whose drafts can be refined, and what tells where they go wrong."""

    def locate(self, states: Sequence[State]) -> list[int | None]:
        """The first wrong step of each draft [B], from 0; None where none is found."""
        ...

    def before_refinement(self, root: State, draft: State, error: int | None) -> State | None:
        """The state that a refinement goes on from: the problem, or with `error` the draft before that step.

        None if the refiner has no room for the draft.
        """
        ...

    def refine(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state [B] of `before_refinement` written to its end by the refiner that it is meant for."""
        ...


def glore(
    roots: Sequence[State], policy: RefiningPolicy, scorer: Scorer, *, n: int = 1, refine: str = "both", seed: int = 0
) -> list[SearchResult]:
    """`n` drafts beside each other, a global and a local refinement of each; the best scored of all is chosen.

    A global refinement is written anew from problem and draft; a local one goes on from before the draft's first wrong step, and is
    left out where none is found. `refine` says which are made. Equal scores go to the draft. The scorer decides *when* to refine:
    without it right drafts are broken. Refinements are children of their draft, with the role `global` or `local`.
    """
    check(1, n=n)
    if refine not in REFINES:
        raise ValueError(f"refine must be one of {', '.join(REFINES)}, found {refine!r}")

    def grow(tree: Tree) -> Growth:
        root = tree.root.state
        [drafts] = yield from tree.grow([(tree.root, tree.seeds(n, "sample"))], to_the_end=True)
        finals: list[list[Node]] = [[draft] for draft in drafts]
        for role in ("global", "local"):
            if refine not in ("both", role):
                continue
            errors: list[int | None] = [None] * n
            if role == "local":
                errors = yield Ask("locate", [draft.state for draft in drafts])
            plan, bases, places = [], [], []
            for place, (draft, error) in enumerate(zip(drafts, errors, strict=True)):
                if role == "local" and error is None:
                    continue
                base = policy.before_refinement(root, draft.state, error)
                if base is not None:
                    plan.append((draft, tree.seeds(1, role, start=place)))
                    bases.append(base)
                    places.append(place)
            for place, [node] in zip(
                places, (yield from tree.grow(plan, bases=bases, how="refine", role=role)), strict=True
            ):
                finals[place].append(node)
        return [node for own in finals for node in own], None

    return search(roots, policy, scorer, grow, seed=seed)
