"""What a search speaks: states, policies that expand them, scorers that judge them. No task, template or trainer is known here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol


@dataclass(frozen=True)
class State:
    """A partial or finished solution: `prompt` and `steps` as text for scorers, `ids` (prompt included) for the policy.

    `key` names the problem, so that seeds are folded by it; `done` says that nothing more can be sampled.
    """

    key: str
    prompt: str
    ids: tuple[int, ...]
    prompt_length: int
    steps: tuple[str, ...] = ()
    done: bool = False
    logprob: float = 0.0  # nats, of everything sampled
    stop: str = ""  # why the last sample ended

    @property
    def cut(self) -> bool:
        """Whether the solution is done only because there was no room for more: it has no end of its own."""
        return self.done and self.stop in ("length", "context")


class Policy(Protocol):
    """Samples next steps."""

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        """Children [B][len(seeds[b])] of each state, one step longer or done."""
        ...

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state sampled on to its end [B]."""
        ...


class GreedyPolicy(Policy, Protocol):
    """A policy that can also take the most probable step, which a search that looks ahead needs."""

    def expand_greedily(self, states: Sequence[State]) -> list[State]:
        """Each state [B] one greedy step longer or done."""
        ...


class RevisingPolicy(Policy, Protocol):
    """A policy that can be shown earlier answers, which sequential revisions need."""

    def again(self, root: State, earlier: Sequence[State]) -> State:
        """The state before the first step of another attempt at `root`, after the finished attempts `earlier`."""
        ...


class Scorer(Protocol):
    """Judges states, higher is better.

    A scorer may have a method `final(states)` too: the scores by which finished solutions are chosen, where they differ
    from those that guide (`adapters.EffectiveScorer`).
    """

    def __call__(self, states: Sequence[State]) -> list[float]: ...


@dataclass(frozen=True)
class TreeNode:
    """A node of a finished search. `steps` is what it adds to its parent: one step, or all that a sample to the end wrote.

    `role` says what a node is in a search whose nodes are not all alike: `global` or `local` of a refinement.

    `status`: `finished` is one of the result's solutions, `kept` was gone on from, `pruned` was neither. `visits`,
    `value` (mean of what was backed up, in [-1, 1]) and `prior` are those of a search that counts them (MCTS).
    """

    parent: int  # index in `SearchResult.nodes`; -1 of the root
    steps: tuple[str, ...]
    score: float | None  # what guided the search; None where nothing was asked
    status: Literal["kept", "pruned", "finished"]
    done: bool
    tokens: int  # sampled for this node
    logprob: float  # nats, of those tokens
    visits: int = 0
    value: float | None = None
    prior: float | None = None
    role: str = ""


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one root: finished solutions with their scores, how deep it went, and its tree.

    `chosen` is the solution the strategy itself would answer with: of most, the one with the highest score, the first of
    equals. `nodes` has the root first and parents before children; `final_nodes[i]` is the node of `finals[i]`, and a
    solution that was copied (particles) stands in `finals` as often. `curves` are numbers by depth, such as a filter's
    effective sample size.
    """

    finals: tuple[State, ...]
    scores: tuple[float, ...]
    depth: int
    chosen: int | None = None
    nodes: tuple[TreeNode, ...] = ()
    final_nodes: tuple[int, ...] = ()
    tokens: int = 0  # sampled for this root, thrown-away ones included
    rounds: int = 0  # calls of the policy that had to wait for each other
    serial_tokens: int = 0  # the longest sample of every round: what is waited for, however wide the batches are
    curves: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
