"""The core of a Monte-Carlo tree search with PUCT: where a simulation goes, and what it leaves behind.

How a node is expanded and judged differs between `search.mcts` (a policy and a scorer, in search of an answer) and `data_gen.mcts`
(verdicts of a task, in search of rows). What stands here is the same for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar


class Counted(Protocol):
    """A node with what is counted of it. `closed`: nothing below it is left to expand, so that no simulation goes there."""

    visits: int
    total: float  # of what was backed up; Q is total / visits
    closed: bool

    @property
    def parent(self) -> Any: ...  # a node of the same kind; None at the root

    @property
    def children(self) -> Sequence[Any]: ...  # none before the node is expanded


N = TypeVar("N", bound=Counted)


def puct(q: float, prior: float, parent_visits: int, visits: int, c_puct: float) -> float:
    """Q + c_puct P sqrt(N_parent) / (1 + N)."""
    return q + c_puct * prior * math.sqrt(parent_visits) / (1 + visits)


def select(top: N, appeal: Callable[[N], float]) -> N:
    """The node without children that a simulation from `top` ends at: down to the most appealing child that is not closed.

    The first of equals. A node that is not closed has a child that is not.
    """
    node = top
    while node.children:
        node = max((child for child in node.children if not child.closed), key=appeal)
    return node


def upwards(node: N) -> Iterator[N]:
    """The node and what is above it, up to the root."""
    at: N | None = node
    while at is not None:
        yield at
        at = at.parent


def back_up(node: N, value: float) -> None:
    """N += 1 and the value into the running mean, for the node and all above it."""
    for at in upwards(node):
        at.visits += 1
        at.total += value


def close(node: N) -> None:
    """Closes the node if all its children are closed, and then what is above it in the same way."""
    for at in upwards(node):
        if not all(child.closed for child in at.children):
            break
        at.closed = True
