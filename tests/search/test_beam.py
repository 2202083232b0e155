"""Beam search on toy trees: against a slow search of one root, and against enumeration of all paths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from stepladder.basics import fold_seed
from stepladder.search.base import State
from stepladder.search.beam import beam_search


class Tree:
    """A random tree with `branching` children a node. Policy and scorer at once; a step is one id.

    A node ends its path at `depth`, or earlier with probability `finish`. Which child a seed gives depends on the node and the
    seed alone, unless `in_turn`: then the children of a call come one after another.
    """

    def __init__(
        self, *, seed: int = 0, branching: int = 3, depth: int = 4, finish: float = 0.0, in_turn: bool = False
    ):
        self.seed, self.branching, self.depth, self.finish_rate, self.in_turn = seed, branching, depth, finish, in_turn
        self.expanded: list[tuple[str, int]] = []  # (root, depth of the child) of every child that was sampled
        self.calls = self.score_calls = 0

    def root(self, key: str) -> State:
        return State(key, f"prompt of {key}", (0,), 1)

    def number(self, state: State, *keys: int | str) -> float:
        return fold_seed(self.seed, state.key, *keys, *state.ids) % 10**6 / 10**6

    def is_end(self, state: State) -> bool:
        return len(state.steps) >= self.depth or self.number(state, "end") < self.finish_rate

    def child(self, state: State, which: int) -> State:
        made = dataclasses.replace(state, ids=(*state.ids, which + 1), steps=(*state.steps, str(which)))
        return dataclasses.replace(made, done=self.is_end(made))

    def one(self, state: State, seed: int) -> State:
        return self.child(state, fold_seed(seed, *state.ids) % self.branching)

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        self.calls += 1
        assert not any(state.done for state in states)
        assert all(len(set(row)) == len(row) for row in seeds)
        self.expanded += [(s.key, len(s.steps) + 1) for s, row in zip(states, seeds, strict=True) for _ in row]
        return [
            [self.child(s, k % self.branching) if self.in_turn else self.one(s, seed) for k, seed in enumerate(row)]
            for s, row in zip(states, seeds, strict=True)
        ]

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        self.calls += 1
        made = []
        for state, seed in zip(states, seeds, strict=True):
            while not state.done:
                state = self.one(state, seed)
                self.expanded.append((state.key, len(state.steps)))
            made.append(state)
        return made

    def leaf_value(self, state: State) -> float:
        return self.number(state, "value")

    def exact(self, state: State) -> float:
        """The best value of a path through this node, by enumeration."""
        if state.done or len(state.steps) >= self.depth:
            return self.leaf_value(state)
        return max(self.exact(self.child(state, which)) for which in range(self.branching))

    def __call__(self, states: Sequence[State]) -> list[float]:
        self.score_calls += 1
        return [self.exact(state) for state in states]


class Coarse(Tree):
    """Scores in few levels, so that ties are common."""

    def __call__(self, states):
        return [float(int(self.number(state, "score") * 3)) for state in states]


def slow_beam(tree: Tree, root: State, beams: int, width: int, max_depth: int, seed: int) -> tuple[list[State], int]:
    """The search of one root, one state at a time."""
    finals: list[State] = []
    plan = [(root, beams)]
    for depth in range(1, max_depth + 1):
        number, grown = 0, []
        for state, count in plan:
            for _ in range(count):
                if depth == max_depth:
                    grown += tree.finish([state], [fold_seed(seed, root.key, "finish", depth, number)])
                else:
                    grown += tree.expand([state], [[fold_seed(seed, root.key, "beam", depth, number)]])[0]
                number += 1
        finals += [state for state in grown if state.done]
        left = [state for state in grown if not state.done]
        if not left:
            return finals, depth
        scores = tree(left)
        order: list[int] = []
        while len(order) < len(left):  # the best that is left, the earlier of equals
            rest = [i for i in range(len(left)) if i not in order]
            order.append(min(rest, key=lambda i: (-scores[i], i)))
        slots = beams - len(finals)
        kept = [left[i] for i in order[: max(1, (slots + width - 1) // width)]]
        counts = [0] * len(kept)
        for slot in range(slots):
            counts[slot % len(kept)] += 1
        plan = list(zip(kept, counts, strict=True))
    return finals, max_depth


CASES = [(1, 1), (4, 1), (4, 4), (8, 4), (8, 3), (7, 2), (16, 4), (5, 5)]


@pytest.mark.parametrize("kind", [Tree, Coarse])
@pytest.mark.parametrize(("beams", "width"), CASES)
@pytest.mark.parametrize("finish", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("max_depth", [1, 3, 10])
def test_many_roots_at_once_equal_a_slow_search_of_each(kind, beams, width, finish, max_depth):
    for seed in range(3):
        tree, slow = (kind(seed=seed, finish=finish, depth=4) for _ in range(2))
        roots = [tree.root(f"p{i}") for i in range(4)]
        found = beam_search(roots, tree, tree, beams=beams, width=width, max_depth=max_depth, seed=seed)
        for root, result in zip(roots, found, strict=True):
            finals, depth = slow_beam(slow, root, beams, width, max_depth, seed)
            assert list(result.finals) == finals
            assert result.depth == depth
            assert list(result.scores) == slow(finals)
            assert len(finals) == beams
            assert all(state.done and state.key == root.key for state in finals)
        assert sorted(tree.expanded) == sorted(slow.expanded)


@pytest.mark.parametrize(("beams", "width"), CASES)
@pytest.mark.parametrize("finish", [0.0, 0.3])
def test_it_never_costs_more_than_as_many_independent_samples(beams, width, finish):
    tree = Tree(finish=finish, depth=6, branching=4)
    roots = [tree.root(f"p{i}") for i in range(5)]
    found = beam_search(roots, tree, tree, beams=beams, width=width, max_depth=20, seed=0)
    for root, result in zip(roots, found, strict=True):
        ends = [len(state.steps) for state in result.finals]
        for depth in range(1, 7):
            sampled = tree.expanded.count((root.key, depth))
            assert sampled <= beams - sum(end < depth for end in ends)  # what has finished is not sampled any more
        assert sum(key == root.key for key, _ in tree.expanded) <= beams * max(ends)


def test_an_exact_scorer_finds_the_best_path():
    for seed in range(10):
        for beams, width, branching in [(4, 4, 4), (8, 4, 4), (6, 3, 3), (9, 3, 3), (2, 2, 2)]:
            tree = Tree(seed=seed, branching=branching, depth=5, in_turn=True)
            [result] = beam_search([tree.root("x")], tree, tree, beams=beams, width=width, max_depth=10, seed=0)
            assert max(result.scores) == tree.exact(tree.root("x"))


def test_a_wrong_scorer_does_not_find_it():
    """The control: scores turned around lead away from the best path."""
    found = 0
    for seed in range(10):
        tree = Tree(seed=seed, branching=4, depth=5, in_turn=True)
        [result] = beam_search(
            [tree.root("x")], tree, lambda s, t=tree: [-v for v in t(s)], beams=4, width=4, max_depth=10, seed=0
        )
        found += max(tree.leaf_value(s) for s in result.finals) == tree.exact(tree.root("x"))
    assert found <= 2


def test_a_constant_scorer_with_width_one_is_independent_sampling():
    tree = Tree(depth=4)
    root = tree.root("x")
    constant = lambda states: [0.0 for _ in states]
    [result] = beam_search([root], tree, constant, beams=6, width=1, max_depth=10, seed=5)
    for k, final in enumerate(result.finals):
        state = root
        for depth in range(1, 5):
            state = tree.one(state, fold_seed(5, "x", "beam", depth, k))
        assert final == state


def test_ties_keep_the_order_of_sampling():
    tree = Tree(branching=8, depth=2, in_turn=True)
    [result] = beam_search([tree.root("x")], tree, lambda s: [1.0] * len(s), beams=8, width=4, max_depth=5, seed=0)
    # Children 0..7; of equals the first two stay and have four children each.
    assert [state.steps for state in result.finals] == [(a, b) for a in "01" for b in "0123"]


def test_slots_that_do_not_divide_go_to_earlier_ranks():
    class Ranked(Tree):
        def __call__(self, states):
            return [float(state.ids[-1]) for state in states]  # the last child is best

    tree = Ranked(branching=7, depth=2, in_turn=True)
    [result] = beam_search([tree.root("x")], tree, tree, beams=7, width=3, max_depth=5, seed=0)
    # ceil(7 / 3) = 3 prefixes with 3, 2 and 2 children.
    assert [state.steps[0] for state in result.finals] == ["6"] * 3 + ["5"] * 2 + ["4"] * 2


def test_all_children_finish_at_once():
    tree = Tree(depth=1)
    [result] = beam_search([tree.root("x")], tree, tree, beams=5, width=2, max_depth=9, seed=0)
    assert (len(result.finals), result.depth) == (5, 1)
    assert (tree.calls, tree.score_calls) == (1, 1)  # nothing was open: only the finals are scored


def test_what_is_unfinished_at_the_last_depth_is_sampled_on_to_its_end():
    tree = Tree(depth=7)
    [result] = beam_search([tree.root("x")], tree, tree, beams=8, width=4, max_depth=3, seed=0)
    assert [len(state.steps) for state in result.finals] == [7] * 8
    assert result.depth == 3
    assert len({state.steps[:2] for state in result.finals}) <= 2  # two prefixes were kept
    assert len({state.steps for state in result.finals}) > 2  # and finished with seeds of their own


def test_one_call_a_depth_for_all_roots():
    tree = Tree(depth=5)
    beam_search([tree.root(f"p{i}") for i in range(7)], tree, tree, beams=4, width=2, max_depth=9, seed=0)
    assert tree.calls == 5
    assert tree.score_calls == 4 + 1  # one a depth with open states, one for the finals


def test_changing_one_root_leaves_the_others_alone():
    tree = Tree(finish=0.2)
    options = {"beams": 6, "width": 3, "max_depth": 9, "seed": 1}
    keys = ["a", "b", "c", "d"]
    whole = beam_search([tree.root(k) for k in keys], tree, tree, **options)
    other = beam_search([tree.root(k) for k in ["a", "z", "c", "d"]], tree, tree, **options)
    assert [whole[i] == other[i] for i in range(4)] == [True, False, True, True]
    assert beam_search([tree.root(k) for k in keys[::-1]], tree, tree, **options) == whole[::-1]
    assert beam_search([tree.root("c")], tree, tree, **options) == [whole[2]]
    assert beam_search([tree.root("a"), tree.root("a")], tree, tree, **options) == [whole[0]] * 2
    assert beam_search([tree.root(k) for k in keys], tree, tree, **{**options, "seed": 2}) != whole


def test_a_root_that_cannot_be_sampled_leaves_the_others_alone():
    class Failing(Tree):
        def child(self, state, which):
            if state.key == "too long":
                return dataclasses.replace(state, done=True, stop="context")
            return super().child(state, which)

    tree = Failing()
    options = {"beams": 4, "width": 2, "max_depth": 9, "seed": 0}
    good, bad, other = beam_search([tree.root("a"), tree.root("too long"), tree.root("b")], tree, tree, **options)
    assert [good, other] == beam_search([tree.root("a"), tree.root("b")], tree, tree, **options)
    assert [state.steps for state in bad.finals] == [()] * 4
    assert bad.depth == 1


def test_no_roots():
    tree = Tree()
    assert beam_search([], tree, tree, beams=2, width=1, max_depth=3, seed=0) == []


@pytest.mark.parametrize(("beams", "width"), [(2, 3), (2, 0), (0, 0)])
def test_width_and_beams_are_checked(beams, width):
    tree = Tree()
    with pytest.raises(ValueError, match="1 <= width <= beams"):
        beam_search([tree.root("x")], tree, tree, beams=beams, width=width, max_depth=3, seed=0)
