"""A toy world for searches: a random tree whose policy, scorer and exact values are one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest

from stepladder.basics import fold_seed
from stepladder.search.base import State


class Toy:
    """A random tree with `branching` children a node. Policy and scorer at once; a step is one id.

    A path ends at `depth`, or earlier with probability `finish`. Which child a seed gives depends on node and seed alone, unless
    `in_turn`: then the children of one call come one after another. Scores are the best value below a node (`exact`), or numbers
    drawn for each node (`drawn`), or all equal (`constant`).
    """

    def __init__(
        self, *, seed: int = 0, branching: int = 3, depth: int = 4, finish: float = 0.0, in_turn: bool = False,
        scores: str = "drawn", finish_of: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        self.seed, self.branching, self.depth, self.finish_rate, self.in_turn = seed, branching, depth, finish, in_turn
        self.scores, self.finish_of = scores, finish_of or {}
        self.sampled: list[State] = []
        self.calls: list[tuple[str, int]] = []  # what was asked for, and of how many states

    def root(self, key: str = "x") -> State:
        return State(key, f"prompt of {key}", (0,), 1)

    def number(self, state: State, what: str) -> float:
        return fold_seed(self.seed, state.key, what, *state.steps) % 10**6 / 10**6

    def child(self, state: State, which: int) -> State:
        made = dataclasses.replace(
            state, ids=(*state.ids, which + 1), steps=(*state.steps, str(which)),
            logprob=state.logprob - 0.25 * (which + 1),
        )  # fmt: skip
        early = self.number(made, "end") < self.finish_of.get(state.key, self.finish_rate)
        return dataclasses.replace(made, done=early or len(made.steps) >= self.depth)

    def pick(self, state: State, seed: int) -> State:
        return self.child(state, fold_seed(seed, *state.ids) % self.branching)

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        assert states
        assert not any(state.done for state in states)
        assert all(len(set(row)) == len(row) for row in seeds)
        self.calls.append(("expand", len(states)))
        grown = [
            [self.child(s, k % self.branching) if self.in_turn else self.pick(s, seed) for k, seed in enumerate(row)]
            for s, row in zip(states, seeds, strict=True)
        ]
        self.sampled += [child for row in grown for child in row]
        return grown

    def expand_greedily(self, states: Sequence[State]) -> list[State]:
        assert states
        self.calls.append(("greedy", len(states)))
        return [self.child(state, 0) for state in states]

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        assert not any(state.done for state in states)
        self.calls.append(("finish", len(states)))
        made = []
        for state, seed in zip(states, seeds, strict=True):
            while not state.done:
                state = self.pick(state, seed)
                self.sampled.append(state)
            made.append(state)
        return made

    def again(self, root: State, earlier: Sequence[State]) -> State:
        """The earlier answers, as ids of a longer prompt."""
        shown = tuple(100 + i for state in earlier for i in state.ids[state.prompt_length :])
        return dataclasses.replace(root, ids=(*shown, 0), prompt_length=len(shown) + 1)

    def exact(self, state: State) -> float:
        """The best value of a path through this node, by enumeration."""
        if state.done:
            return self.number(state, "value")
        return max(self.exact(self.child(state, which)) for which in range(self.branching))

    def judge(self, state: State) -> float:
        if self.scores == "exact":
            return self.exact(state)
        return 0.5 if self.scores == "constant" else self.number(state, "value")

    def __call__(self, states: Sequence[State]) -> list[float]:
        assert states
        self.calls.append(("score", len(states)))
        return [self.judge(state) for state in states]


@pytest.fixture(scope="session")
def toy() -> Any:
    """The class of toy worlds."""
    return Toy
