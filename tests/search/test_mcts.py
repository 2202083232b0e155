"""MCTS against a slow one over paths, and what its counts mean."""

from __future__ import annotations

import itertools
import math

import pytest

from stepladder.basics import fold_seed
from stepladder.search.mcts import appeal, mcts, priors


def slow_mcts(world, root, simulations, width, c, prior, unvisited, max_depth, seed):
    """Nodes are tuples of child numbers; every count is recomputed from the list of back-ups."""
    states, parents, kids, backed, numbers = {(): root}, {}, {}, [], {(): 0}
    value = lambda path: 2 * world.judge(states[path]) - 1
    visits = lambda path: sum(p[: len(path)] == path for p, _ in backed)
    q = lambda path: sum(v for p, v in backed if p[: len(path)] == path) / visits(path)

    def closed(path):
        return states[path].done or (path in kids and all(closed(k) for k in kids[path]))

    def p(path):
        siblings = kids[path[:-1]]
        raw = [math.exp(states[k].logprob - states[path[:-1]].logprob) for k in siblings]  # one token a step
        if prior == "uniform":
            return 1 / len(siblings)
        return raw[siblings.index(path)] / (sum(raw) if prior == "normalised" else 1)

    def urgency(path):
        first = value(path) if unvisited == "score" else 0.0
        exploit = q(path) if visits(path) else first
        return exploit + c * p(path) * math.sqrt(visits(path[:-1])) / (1 + visits(path))

    for _ in range(simulations):
        if closed(()):
            break
        at = ()
        while at in kids:
            going = [k for k in kids[at] if not closed(k)]
            best = max(urgency(k) for k in going)
            at = next(k for k in going if urgency(k) == best)
        kids[at] = []
        for k in range(width):
            seed_k = fold_seed(seed, root.key, "mcts", len(at), numbers[at], k)
            last = len(at) + 1 == max_depth
            made = world.finish([states[at]], [seed_k])[0] if last else world.expand([states[at]], [[seed_k]])[0][0]
            path = (*at, k)
            states[path], parents[path] = made, at
            numbers[path] = len(numbers)
            kids[at].append(path)
        backed.append((at, value(at)))
        backed.extend((k, value(k)) for k in kids[at] if states[k].done)
    return {number: (visits(path), q(path) if visits(path) else None) for path, number in numbers.items()}


@pytest.mark.parametrize(
    ("prior", "unvisited"), itertools.product(["logprob", "normalised", "uniform"], ["zero", "score"])
)
@pytest.mark.parametrize("finish", [0.0, 0.3])
def test_visits_and_values_equal_a_slow_search(toy, prior, unvisited, finish):
    for seed, simulations, max_depth in ((0, 1, 9), (1, 12, 9), (2, 12, 2), (3, 200, 3)):
        world = toy(seed=seed, finish=finish, depth=4)
        [found] = mcts(
            [world.root()], world, world, dedupe=False, simulations=simulations, width=3, c_puct=1.25, prior=prior,
            unvisited=unvisited, max_depth=max_depth, seed=seed,
        )  # fmt: skip
        want = slow_mcts(world, world.root(), simulations, 3, 1.25, prior, unvisited, max_depth, seed)
        counts = {i: node.visits for i, node in enumerate(found.nodes)}
        # A last sample where nothing had finished is no node of the search.
        assert {i: v for i, v in counts.items() if i in want} == {i: v for i, (v, _) in want.items()}
        assert len(counts) - len(want) == (0 if any(found.nodes[i].done for i in want) else 1)
        for i, (_, q) in want.items():
            assert found.nodes[i].value == (None if q is None else pytest.approx(q))


def test_counts_of_a_node_are_those_below_it_and_its_own(toy):
    world = toy(depth=4, finish=0.2)
    [found] = mcts([world.root()], world, world, dedupe=False, simulations=15, width=3)
    below = [0] * len(found.nodes)
    for node in found.nodes[1:]:
        below[node.parent] += node.visits
    parents = {node.parent for node in found.nodes}
    for i, node in enumerate(found.nodes):
        assert node.visits == below[i] + (i in parents) + (node.done and node.visits > 0)
        assert node.value is None or -1 <= node.value <= 1
    expanded = sum(i in parents for i in range(len(found.nodes)))
    assert expanded <= 15
    assert found.rounds == expanded


def test_a_bandit_is_answered_by_its_best_arm(toy):
    """All children finish: one visit each, nothing is visited twice, and the answer is the best value."""
    world = toy(depth=1, branching=5, in_turn=True)
    [found] = mcts([world.root()], world, world, dedupe=False, simulations=100, width=5)
    assert found.rounds == 1
    assert [node.visits for node in found.nodes] == [6, 1, 1, 1, 1, 1]
    assert found.nodes[0].value == pytest.approx(
        (2 * world.judge(world.root()) - 1 + sum(2 * s - 1 for s in found.scores)) / 6
    )
    assert found.scores[found.chosen] == max(found.scores)


def test_an_exhausted_tree_ends_the_search(toy):
    world = toy(depth=3, branching=2, in_turn=True)
    [found] = mcts([world.root()], world, world, dedupe=False, simulations=10**6, width=2)
    assert found.rounds == 1 + 2 + 4  # every inner node once
    assert len(found.finals) == 8
    assert all(node.visits == 1 for node in found.nodes if node.done)


def test_nothing_finishes_within_the_simulations(toy):
    """The budget ends in the middle: the leaf of the best Q is sampled on."""
    world = toy(depth=9)
    [found] = mcts([world.root()], world, world, dedupe=False, simulations=3, width=2)
    assert len(found.finals) == 1
    assert found.finals[0].done
    assert found.chosen == 0
    assert found.nodes[found.final_nodes[0]].visits == 0
    assert len(found.finals[0].steps) == 9


def test_a_solution_cut_for_length_is_worth_nothing(toy):
    import dataclasses

    class Short(toy):
        def child(self, state, which):
            made = super().child(state, which)
            return dataclasses.replace(made, done=True, stop="length") if which == 0 else made

    world = Short(depth=3, in_turn=True, scores="constant")
    [found] = mcts([world.root()], world, world, dedupe=False, simulations=1, width=3)
    assert [node.value for node in found.nodes[1:4]] == [-1.0, None, None]


def test_the_search_commits_and_keeps_the_subtree(toy):
    """With as many simulations below each step as before, but those that came before are not made again."""
    world = toy(depth=4, in_turn=True, scores="exact")
    whole = {"width": 3, "unvisited": "score", "c_puct": 0.3}
    [once] = mcts([world.root()], world, world, dedupe=False, simulations=6, **whole)
    [steps] = mcts([world.root()], world, world, dedupe=False, simulations=6, commit=True, **whole)
    # The first 19 nodes are the root and three children of each of six: the search goes on from them.
    assert [node.steps for node in steps.nodes[:19]] == [node.steps for node in once.nodes[:19]]
    assert 6 < steps.rounds < 6 * 4
    parents = {node.parent for node in steps.nodes}

    def below(i):  # expanded nodes of a subtree
        inside = {i}
        for j, node in enumerate(steps.nodes):
            if node.parent in inside:
                inside.add(j)
        return len(inside & parents)

    top, path = 0, []
    while top in parents:
        kids = [i for i, node in enumerate(steps.nodes) if node.parent == top]
        top = max(kids, key=lambda i: (steps.nodes[i].visits, -i))
        path.append(top)
    # Each node that was committed to has its simulations, or all that can be below it: 4 and 1 inner nodes at depth 2 and 3.
    assert [below(i) >= most for i, most in zip((0, *path), (6, 6, 4, 1), strict=False)] == [True] * 4
    assert below(0) > 6
    assert steps.finals[steps.chosen].steps[0] == steps.nodes[path[0]].steps[0]


def test_dropped_duplicates_are_not_searched(toy):
    world = toy(depth=3, branching=2)
    [found] = mcts([world.root()], world, world, simulations=50, width=6, prior="uniform")
    assert len({state.steps for state in found.finals}) == len(found.finals) <= 8
    assert {node.prior for node in found.nodes[1:]} <= {None, 0.5, 1.0}


def test_puct_and_priors_by_hand(toy):
    from stepladder.search.loop import Tree

    world = toy(depth=3)
    tree = Tree(world.root(), 0)
    grow = tree.grow([(tree.root, [1, 2])])
    grow.send(None)
    with pytest.raises(StopIteration):
        grow.send([[world.child(world.root(), 0), world.child(world.root(), 1)]])
    a, b = tree.root.children
    assert priors([a, b], "logprob") == pytest.approx([math.exp(-0.25), math.exp(-0.5)])
    assert sum(priors([a, b], "normalised")) == pytest.approx(1)
    assert priors([a, b], "uniform") == [0.5, 0.5]
    tree.root.visits, a.visits, a.total, a.prior, b.prior, b.score = 9, 2, 1.0, 0.5, 0.25, 0.75
    assert appeal(a, 1.5) == pytest.approx(0.5 + 1.5 * 0.5 * 3 / 3)
    assert appeal(b, 1.5) == pytest.approx(1.5 * 0.25 * 3)
    assert appeal(b, 1.5, "score") == pytest.approx(0.5 + 1.5 * 0.25 * 3)
