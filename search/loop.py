"""Many searches at once: each asks for steps and scores, and the asks of all go to the policy and the scorer in full batches.

A search of one root is a generator over a `Tree`: it asks with ``yield from tree.grow(...)`` and ``yield from
tree.score(...)``, and returns the finished nodes (and the chosen one, if that is not the best scored). It sees no other
root, and its seeds are folded from its own key, so that what it finds does not depend on its neighbours. A new strategy
is one such generator:

    def greedy(tree):
        node = tree.root
        while not node.state.done:
            [[node]] = yield from tree.grow([(node, tree.seeds(1, "greedy", node.depth))])
        return [node], None

    search(roots, policy, scorer, greedy, seed=0)
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..basics import fold_seed
from .base import Policy, Scorer, SearchResult, State, TreeNode

Kind = Literal["score", "final", "expand", "greedy", "locate", "criticise", "refine", "finish"]
# Scores first: whoever waits for one will want to expand next, and then together with all others. Finishing comes last for the
# same reason.
_ORDER: tuple[Kind, ...] = ("score", "final", "expand", "greedy", "locate", "criticise", "refine", "finish")


@dataclass(frozen=True)
class Ask:
    """What a search waits for: scores of states, or continuations of them."""

    kind: Kind
    states: Sequence[State]
    seeds: Sequence[Sequence[int]] = ()


@dataclass(eq=False)
class Node:
    """A node in the making. `base` is the state that it was sampled from: the parent's, or a revised prompt."""

    state: State
    parent: Node | None
    base: State
    index: int = 0  # in `Tree.nodes`
    depth: int = 0
    score: float | None = None
    visits: int = 0
    total: float = 0.0  # of what was backed up
    prior: float | None = None
    closed: bool = False  # in a search that counts visits: nothing below is left to expand
    role: str = ""
    children: list[Node] = field(default_factory=list)

    @property
    def value(self) -> float | None:
        """The mean of what was backed up."""
        return self.total / self.visits if self.visits else None


Growth = Generator[Ask, Any, tuple[list[Node], Node | None]]


class Tree:
    """The tree of one root, and how its search asks."""

    def __init__(self, root: State, seed: int) -> None:
        self.seed = seed
        self.root = Node(root, None, root)
        self.nodes = [self.root]
        self.tokens = self.rounds = self.serial_tokens = 0
        self.curves: dict[str, list[float]] = {}

    def seeds(self, count: int, *keys: int | str, start: int = 0) -> list[int]:
        """`count` seeds of this root for a meaning, numbered from `start`."""
        return [self.fold(*keys, start + k) for k in range(count)]

    def fold(self, *keys: int | str) -> int:
        """A seed of this root for a meaning."""
        return fold_seed(self.seed, self.root.state.key, *keys)

    def uniform(self, *keys: int | str) -> float:
        """A number in [0, 1) of this root for a meaning."""
        return (self.fold(*keys) >> 10) / 2**53

    def shares(self, plan: Sequence[tuple[Node, int]], *keys: int | str) -> list[tuple[Node, list[int]]]:
        """The plan (node, number of children) with seeds that are numbered through."""
        found, start = [], 0
        for node, count in plan:
            found.append((node, self.seeds(count, *keys, start=start)))
            start += count
        return found

    def grow(
        self,
        plan: Sequence[tuple[Node, Sequence[int]]],
        *,
        to_the_end: bool = False,
        bases: Sequence[State] | None = None,
        how: Kind | None = None,
        role: str = "",
    ) -> Generator[Ask, Any, list[list[Node]]]:
        """Children [len(plan)][len(seeds)] of the nodes: one step longer, or sampled to their end.

        With `bases` they are sampled from these states in place of the nodes' own. `how` "criticise" asks the policy's critic,
        "refine" its refiners. `role` is what the children are.
        """
        states = [node.state for node, _ in plan] if bases is None else list(bases)
        if not states:
            return []
        self.rounds += 1
        grown = yield Ask(how or ("finish" if to_the_end else "expand"), states, [tuple(seeds) for _, seeds in plan])
        made = []
        for (node, _), state, children in zip(plan, states, grown, strict=True):
            row = [
                Node(child, node, state, len(self.nodes) + k, node.depth + 1, role=role)
                for k, child in enumerate(children)
            ]
            node.children += row
            self.nodes += row
            self.tokens += sum(len(child.ids) - len(state.ids) for child in children)
            made.append(row)
        fresh = [len(node.state.ids) - len(node.base.ids) for row in made for node in row]
        self.serial_tokens += max(fresh, default=0)
        return made

    def score(self, nodes: Sequence[Node], *, lookahead: int = 0) -> Generator[Ask, Any, list[float]]:
        """The scores of the nodes, which keep them; with `lookahead`, those at the end of so many greedy steps more.

        The greedy steps are paid for and thrown away (arXiv:2408.03314 section 5.2).
        """
        if not nodes:
            return []
        ahead = [node.state for node in nodes]
        for _ in range(lookahead):
            going = [i for i, state in enumerate(ahead) if not state.done]
            if not going:
                break
            self.rounds += 1
            further = yield Ask("greedy", [ahead[i] for i in going])
            fresh = [len(state.ids) - len(ahead[i].ids) for i, state in zip(going, further, strict=True)]
            self.tokens += sum(fresh)
            self.serial_tokens += max(fresh)
            for i, state in zip(going, further, strict=True):
                ahead[i] = state
        scores = yield Ask("score", ahead)
        for node, score in zip(nodes, scores, strict=True):
            node.score = score
        return scores

    def note(self, name: str, value: float) -> None:
        """Adds the next number of a curve over depth."""
        self.curves.setdefault(name, []).append(value)

    def result(self, finals: Sequence[Node], scores: Sequence[float], chosen: Node | None) -> SearchResult:
        """The finished search."""
        ends = {node.index for node in finals}
        frozen = []
        for node in self.nodes:
            frozen.append(
                TreeNode(
                    parent=-1 if node.parent is None else node.parent.index,
                    steps=node.state.steps[len(node.base.steps) :],
                    score=node.score,
                    status="finished" if node.index in ends else "kept" if node.children else "pruned",
                    done=node.state.done,
                    tokens=len(node.state.ids) - len(node.base.ids),
                    logprob=node.state.logprob - node.base.logprob,
                    visits=node.visits,
                    value=node.value,
                    prior=node.prior,
                    role=node.role,
                )
            )
        best: int | None = None
        if chosen is not None:
            best = next(i for i, node in enumerate(finals) if node is chosen)
        elif finals:
            best = max(range(len(finals)), key=lambda i: (scores[i], -i))
        return SearchResult(
            finals=tuple(node.state for node in finals),
            scores=tuple(scores),
            depth=max(node.depth for node in self.nodes),
            chosen=best,
            nodes=tuple(frozen),
            final_nodes=tuple(node.index for node in finals),
            tokens=self.tokens,
            rounds=self.rounds,
            serial_tokens=self.serial_tokens,
            curves={name: tuple(values) for name, values in self.curves.items()},
        )


def search(
    roots: Sequence[State], policy: Policy, scorer: Scorer, grow: Callable[[Tree], Growth], *, seed: int
) -> list[SearchResult]:
    """What `grow` finds for each root. In each round all that wait for the same thing are answered by one call."""
    growths = [_whole(Tree(root, seed), grow, hasattr(scorer, "final")) for root in roots]

    def answer(waiting: Mapping[int, Ask]) -> Iterator[tuple[int, list[Any]]]:
        kind = next(k for k in _ORDER if any(ask.kind == k for ask in waiting.values()))
        asked = sorted((index, ask) for index, ask in waiting.items() if ask.kind == kind)
        answers = iter(_answer(kind, [ask for _, ask in asked], policy, scorer))
        return ((index, [next(answers) for _ in ask.states]) for index, ask in asked)

    return drive(growths, answer)


A = TypeVar("A")
R = TypeVar("R")


def drive(
    growths: Sequence[Generator[A, Any, R]], answer: Callable[[Mapping[int, A]], Iterable[tuple[int, Any]]]
) -> list[R]:
    """What each of the generators returns; in between they wait, each for the answer to what it asked.

    `answer` is shown all that wait (index -> what it asked) and answers some or all of them: pairs of index and answer.
    """
    results: list[Any] = [None] * len(growths)
    waiting: dict[int, A] = {}

    def advance(index: int, reply: Any) -> None:
        try:
            waiting[index] = growths[index].send(reply)
        except StopIteration as end:
            waiting.pop(index, None)
            results[index] = end.value

    for index in range(len(growths)):
        advance(index, None)
    while waiting:
        for index, reply in answer(waiting):
            advance(index, reply)
    return results


def _whole(tree: Tree, grow: Callable[[Tree], Growth], scored_apart: bool) -> Generator[Ask, Any, SearchResult]:
    """The search of one root with the scores of what it found."""
    finals, chosen = yield from grow(tree)
    once = {node.index: node for node in finals}  # a filter may hold copies of one solution
    known = {} if scored_apart else {i: node.score for i, node in once.items() if node.score is not None}
    missing = [node for i, node in once.items() if i not in known]
    if missing:
        scores = yield Ask("final" if scored_apart else "score", [node.state for node in missing])
        for node, score in zip(missing, scores, strict=True):
            known[node.index] = score
            node.score = score if node.score is None else node.score
    return tree.result(finals, [known[node.index] for node in finals], chosen)


def _answer(kind: Kind, asks: Sequence[Ask], policy: Any, scorer: Any) -> Sequence[Any]:
    """One answer for each state of the asks."""
    states = [state for ask in asks for state in ask.states]
    if kind == "score":
        return scorer(states)
    if kind == "final":
        return scorer.final(states)
    if kind == "greedy":
        return policy.expand_greedily(states)
    if kind == "locate":
        return policy.locate(states)
    seeds = [row for ask in asks for row in ask.seeds]
    if kind == "expand":
        return policy.expand(states, seeds)
    flat = [(state, seed) for state, row in zip(states, seeds, strict=True) for seed in row]
    ends = iter(getattr(policy, kind)([state for state, _ in flat], [seed for _, seed in flat]))
    return [[next(ends) for _ in row] for row in seeds]


# --- what strategies share ---------------------------------------------------------------------------------------------


def check(least: int, **values: float) -> None:
    """Raises ValueError if one of the values is less than `least`."""
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, found {value}")


def ranked(nodes: Sequence[Node]) -> list[Node]:
    """Scored nodes, the best first; equals in their order."""
    return sorted(nodes, key=lambda node: -(node.score or 0.0))


def distinct(nodes: Sequence[Node]) -> list[Node]:
    """The nodes without those whose steps (and whether they are done) an earlier one has."""
    first: dict[tuple[tuple[str, ...], bool], Node] = {}
    for node in nodes:
        first.setdefault((node.state.steps, node.state.done), node)
    return list(first.values())
