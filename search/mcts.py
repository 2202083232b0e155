"""Monte-Carlo tree search over steps with PUCT and a value at the leaf, after AlphaMath (arXiv:2405.03553)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any, Literal

from .base import Policy, Scorer, SearchResult, State
from .loop import Ask, Growth, Node, Tree, check, distinct, search

Prior = Literal["logprob", "normalised", "uniform"]


def mcts(
    roots: Sequence[State],
    policy: Policy,
    scorer: Scorer,
    *,
    simulations: int = 40,
    width: int = 5,
    c_puct: float = 1.25,
    prior: Prior = "logprob",
    unvisited: Literal["zero", "score"] = "zero",
    commit: bool = False,
    max_depth: int = 40,
    dedupe: bool = True,
    seed: int = 0,
) -> list[SearchResult]:
    """All solutions that the tree of each root finished, and the tree with visits and values; `chosen` is where the best
    Q leads.

    A simulation goes down from the root to the child with the highest

        Q + c_puct * P * sqrt(N_parent) / (1 + N)

    (ties: the first), until a node without children. That one gets `width` children and its own value, which is backed
    up: N += 1, Q the running mean. The value is 2 r - 1 of the score r in (0, 1), so that 0 is neutral. A child that is
    finished is backed up once, when it is made, with the value of its own score: the search never asks whether an answer
    is right. A solution that was cut for length has value -1. Finished children are not gone down to again, and a node
    whose children all are is done itself; the search ends when the root is, or after `simulations`.

    P is exp(mean log-probability of the step's tokens) (`logprob`, as the official code: siblings do not sum to 1), the
    same divided by the sum over siblings (`normalised`) or 1 / siblings (`uniform`). Q of an unvisited child is 0, or
    with `unvisited: score` the value of its own score, at the price of scoring every child. With `commit` the search
    settles for the child with the most visits once `simulations` have ended below a node, keeps its subtree with all
    counts, and goes on from there. At `max_depth` children go to the end. With `dedupe` equal siblings are one child
    (an option in the official code).

    The answer walks from the root by the highest Q among children with a finished solution below. If nothing has
    finished, the leaf that the walk ends at is sampled on to its end.
    """
    check(1, simulations=simulations, width=width, max_depth=max_depth)
    check(0, c_puct=c_puct)
    if prior not in ("logprob", "normalised", "uniform"):
        raise ValueError(f"prior must be logprob, normalised or uniform, found {prior!r}")
    if unvisited not in ("zero", "score"):
        raise ValueError(f"unvisited must be zero or score, found {unvisited!r}")

    def grow(tree: Tree) -> Growth:
        children_of: dict[Node, list[Node]] = {}  # without duplicates
        closed: set[Node] = set()  # finished, or nothing but finished below
        below: Counter[Node] = Counter()  # simulations that ended at a node or below it
        top = tree.root
        while True:
            while below[top] < simulations and top not in closed:
                leaf = top
                while leaf in children_of:
                    going = [child for child in children_of[leaf] if child not in closed]
                    leaf = max(going, key=lambda child: puct(child, c_puct, unvisited))  # the first of equals
                yield from simulate(tree, leaf, children_of, closed)
                below.update(_path(leaf))
            if not commit or top in closed:
                break
            top = max(children_of[top], key=lambda child: child.visits)
            if top in closed:
                break  # nothing is left to find below
        finals = [node for node in tree.nodes if node.state.done and node.visits]
        if not finals:
            leaf = tree.root
            while leaf in children_of:
                leaf = max(children_of[leaf], key=lambda child: -math.inf if child.value is None else child.value)
            [finals] = yield from tree.grow([(leaf, [tree.fold("mcts rest")])], to_the_end=True)
            return finals, finals[0]
        leading = {node for final in finals for node in _path(final)}
        node = top if top in leading else tree.root
        while not node.state.done:
            some = [child for child in children_of[node] if child in leading]
            node = max(some, key=lambda child: -math.inf if child.value is None else child.value)
        return finals, node

    def simulate(
        tree: Tree, leaf: Node, children_of: dict[Node, list[Node]], closed: set[Node]
    ) -> Generator[Ask, Any, None]:
        """The end of one simulation: children, values, and what is backed up."""
        seeds = tree.seeds(width, "mcts", leaf.depth, leaf.index)
        [grown] = yield from tree.grow([(leaf, seeds)], to_the_end=leaf.depth + 1 == max_depth)
        children = children_of[leaf] = distinct(grown) if dedupe else grown
        for child, p in zip(children, priors(children, prior), strict=True):
            child.prior = p
        judged = [leaf] if leaf.score is None else []
        yield from tree.score(judged + [c for c in children if c.state.done or unvisited == "score"])
        _back_up(leaf)
        for child in children:
            if child.state.done:
                _back_up(child)
                closed.add(child)
        for node in _path(leaf):
            if any(child not in closed for child in children_of[node]):
                break
            closed.add(node)

    return search(roots, policy, scorer, grow, seed=seed)


def puct(node: Node, c_puct: float, unvisited: str = "zero") -> float:
    """Q + c_puct * P * sqrt(N_parent) / (1 + N)."""
    if node.value is not None:
        q = node.value
    else:
        q = _value(node) if unvisited == "score" else 0.0
    parent = node.parent.visits if node.parent is not None else 0
    return q + c_puct * (node.prior or 0.0) * math.sqrt(parent) / (1 + node.visits)


def priors(children: Sequence[Node], kind: Prior) -> list[float]:
    """P of siblings, from the log-probabilities of the tokens that each adds."""
    if kind == "uniform":
        return [1 / len(children)] * len(children)
    found = []
    for child in children:
        tokens = len(child.state.ids) - len(child.base.ids)
        found.append(math.exp((child.state.logprob - child.base.logprob) / max(tokens, 1)))
    total = sum(found)
    return [p / total for p in found] if kind == "normalised" and total else found


def _value(node: Node) -> float:
    """The score moved to [-1, 1]; -1 for a solution without an end of its own."""
    return -1.0 if node.state.cut else 2 * (node.score or 0.0) - 1


def _back_up(node: Node) -> None:
    value = _value(node)
    for at in _path(node):
        at.visits += 1
        at.total += value


def _path(node: Node) -> list[Node]:
    """The node and what is above it, up to the root."""
    path = [node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path
