"""What a search speaks: states, policies that expand them, scorers that judge them. No task, template or trainer is known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


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


class Policy(Protocol):
    """Samples next steps."""

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        """Children [B][len(seeds[b])] of each state, one step longer or done."""
        ...

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state sampled on to its end [B]."""
        ...


class Scorer(Protocol):
    """Judges states, higher is better."""

    def __call__(self, states: Sequence[State]) -> list[float]: ...


@dataclass(frozen=True)
class SearchResult:
    """What a search found for one root: finished solutions with their scores, and how deep it went."""

    finals: tuple[State, ...]
    scores: tuple[float, ...]
    depth: int
