"""Monte-Carlo tree search over steps with PUCT and a value at the leaf, after AlphaMath (arXiv:2405.03553)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any, Literal

from .base import Policy, Scorer, SearchResult, State
from .loop import Ask, Growth, Node, Tree, check, distinct, search
from .puct import back_up, close, puct, select, upwards

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
        below: Counter[Node] = Counter()  # simulations that ended at a node or below it
        top = tree.root
        while True:
            while below[top] < simulations and not top.closed:
                leaf = select(top, lambda child: appeal(child, c_puct, unvisited))
                yield from simulate(tree, leaf)
                below.update(upwards(leaf))
            if not commit or top.closed:
                break
            top = max(top.children, key=lambda child: child.visits)
            if top.closed:
                break  # nothing is left to find below
        best = lambda nodes: max(nodes, key=lambda child: -math.inf if child.value is None else child.value)
        finals = [node for node in tree.nodes if node.state.done and node.visits]
        if not finals:
            leaf = tree.root
            while leaf.children:
                leaf = best(leaf.children)
            [finals] = yield from tree.grow([(leaf, [tree.fold("mcts rest")])], to_the_end=True)
            return finals, finals[0]
        leading = {node for final in finals for node in upwards(final)}
        node = top if top in leading else tree.root
        while not node.state.done:
            node = best([child for child in node.children if child in leading])
        return finals, node

    def simulate(tree: Tree, leaf: Node) -> Generator[Ask, Any, None]:
        """The end of one simulation: children, values, and what is backed up."""
        seeds = tree.seeds(width, "mcts", leaf.depth, leaf.index)
        [grown] = yield from tree.grow([(leaf, seeds)], to_the_end=leaf.depth + 1 == max_depth)
        children = distinct(grown) if dedupe else grown
        for child in grown:
            child.closed = child.state.done or child not in children  # a repeated child is never gone down to
        for child, p in zip(children, priors(children, prior), strict=True):
            child.prior = p
        judged = [leaf] if leaf.score is None else []
        yield from tree.score(judged + [c for c in children if c.state.done or unvisited == "score"])
        for node in (leaf, *(child for child in children if child.state.done)):
            back_up(node, _value(node))
        close(leaf)

    return search(roots, policy, scorer, grow, seed=seed)


def appeal(node: Node, c_puct: float, unvisited: str = "zero") -> float:
    """PUCT of a node; Q is 0, or the value of its score, before its first visit."""
    q = node.value
    if q is None:
        q = _value(node) if unvisited == "score" else 0.0
    parent = node.parent.visits if node.parent is not None else 0
    return puct(q, node.prior or 0.0, parent, node.visits, c_puct)


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
