"""Search trees against a slow search that recomputes everything from the list of backups, and against exact values."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import stepladder
from stepladder.data_gen.growing import Ask, Roller, Rollout
from stepladder.data_gen.mcts import Options, mcts_trees, search_tree
from stepladder.data_gen.rows import Source
from stepladder.data_gen.tree_rows import UNFINISHED, chosen_paths, flipped, value_paths
from stepladder.models.engine import Sampling
from stepladder.models.loading import load_engine, load_policy_format
from stepladder.models.reward import RewardModel
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

LAB = str(Path(stepladder.__file__).parent / "models" / "lab_policy")
Path_ = tuple[int, ...]


class World:
    """Steps are digits below `branch`; a path of `length` digits is finished, and right if it is in `right`.

    `steps` may end earlier: those in `ends` are finished and wrong. The log-probability of a step depends on its digit.
    """

    def __init__(self, length: int, branch: int, right: set[Path_], ends: set[Path_] = frozenset()) -> None:  # type: ignore[assignment]
        self.length, self.branch, self.right, self.ends = length, branch, right, ends

    def outcome(self, path: Path_) -> str:
        if path in self.right:
            return "right"
        return "wrong" if len(path) == self.length or path in self.ends else UNFINISHED

    def best(self, path: Path_) -> float:
        """Exact value of best play in [-1, 1]."""
        return 1.0 if any(r[: len(path)] == path for r in self.right) else -1.0

    def uniform(self, path: Path_) -> float:
        """Exact value of uniformly random play."""
        outcome = self.outcome(path)
        if outcome != UNFINISHED:
            return 1.0 if outcome == "right" else -1.0
        return sum(self.uniform((*path, d)) for d in range(self.branch)) / self.branch


def play(growth: Any, world: World, value: Callable[[Path_], float] | None, digits: Any = None) -> Any:
    """Runs a search; sample n of a prefix is digit n, or what `digits(prefix, n)` says."""
    answer: Any = None
    while True:
        try:
            asks = growth.send(answer)
        except StopIteration as end:
            return end.value
        answer = []
        for ask in asks:
            assert ask.one_step
            rollouts = []
            for n in ask.numbers:
                digit = n % world.branch if digits is None else digits(ask.prefix, n)
                ids = (*ask.prefix, digit)
                logprob = math.log(0.9 - 0.1 * digit)
                known = value(ask.prefix) if value else None
                rollouts.append(Rollout(ids, len(ask.prefix), world.outcome(ids), (logprob,), known))
            answer.append(rollouts)


def random_world(seed: int) -> World:
    rng = random.Random(seed)
    branch = rng.choice([2, 3])
    length = rng.choice([3, 4])
    leaves = list(itertools.product(range(branch), repeat=length))
    inner = [p for k in range(1, length) for p in itertools.product(range(branch), repeat=k) if rng.random() < 0.15]
    return World(length, branch, set(rng.sample(leaves, 2)), set(inner))


def slow_search(world: World, options: Options, value: Callable[[Path_], float]) -> dict[Path_, list[float]]:
    """Path -> everything that was backed up through it. Visits and means are recomputed from the list each time."""
    through: dict[Path_, list[float]] = {(): []}
    expanded: set[Path_] = set()
    children = lambda path: [(*path, d) for d in range(world.branch)]
    finished = lambda path: world.outcome(path) != UNFINISHED
    reward = lambda path: 1.0 if world.outcome(path) == "right" else -1.0

    def closed(path: Path_) -> bool:
        if finished(path):
            return options.terminal_backups
        return path in expanded and all(closed(c) for c in children(path))

    def backup(path: Path_, result: float) -> None:
        for k in range(len(path) + 1):
            through.setdefault(path[:k], []).append(result)

    def appeal(path: Path_) -> float:
        seen = through.get(path, [])
        q = sum(seen) / len(seen) if seen else 0.0
        prior = math.exp(math.log(0.9 - 0.1 * path[-1]))
        return q + options.c_puct * prior * math.sqrt(len(through[path[:-1]])) / (1 + len(seen))

    for _ in range(options.simulations):
        if closed(()):
            break
        path: Path_ = ()
        while path in expanded:
            path = max((c for c in children(path) if not closed(c)), key=appeal)
        if finished(path):
            backup(path, reward(path))
            continue
        expanded.add(path)
        if options.terminal_backups:
            for child in children(path):
                if finished(child):
                    backup(child, reward(child))
        backup(path, value(path))
    return through


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("terminal_backups", [True, False])
def test_visits_and_values_are_those_of_a_slow_search(seed, terminal_backups):
    world = random_world(seed)
    noise = lambda path: random.Random(f"{seed} {path}").uniform(-1, 1)
    options = Options(simulations=25, width=world.branch, terminal_backups=terminal_backups)
    found = play(search_tree(lambda ids: (tuple(map(str, ids)), ids), options), world, noise)
    want = slow_search(world, options, noise)
    got = {tuple(map(int, n.steps)): n for n in found.nodes}
    assert {p for p, n in got.items() if n.visits} == set(want)
    for path, values in want.items():
        assert got[path].visits == len(values)
        assert got[path].q == pytest.approx(sum(values) / len(values))
    assert all(n.outcome == (None if world.outcome(p) == UNFINISHED else world.outcome(p)) for p, n in got.items())


def cut(ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    return tuple(map(str, ids)), tuple(range(1, len(ids) + 1))


@pytest.mark.parametrize("seed", range(6))
def test_with_an_exact_value_the_right_solution_is_found_with_few_expansions(seed):
    rng = random.Random(seed)
    target = tuple(rng.randrange(4) for _ in range(6))
    world = World(6, 4, {target})
    # Priors are near 1 for every step here, so that a small c_puct is what lets the values speak.
    options = Options(simulations=50, width=4, c_puct=0.1)
    found = play(search_tree(cut, options), world, world.best)
    assert found.counts["right solutions"] == 1
    # One of 4096 solutions; without the value a search of so many expansions does not find it.
    blind = play(search_tree(cut, options), world, lambda path: 0.0)
    assert blind.counts["right solutions"] == 0


def test_values_converge_to_those_of_best_play():
    world = World(4, 3, {(2, 1, 0, 1)})
    errors = []
    for simulations in (30, 300, 3000):
        options = Options(simulations=simulations, width=3, c_puct=0.1, terminal_backups=False)
        nodes = play(search_tree(cut, options), world, world.best).nodes
        on_path = [n for n in nodes if n.visits and world.best(tuple(map(int, n.steps))) == 1]
        errors.append(abs(nodes[0].q - 1))
        assert all(n.q > 0 for n in on_path) or simulations < 300
        off = [n for n in nodes if n.visits and world.best(tuple(map(int, n.steps))) == -1]
        assert all(n.q == -1 for n in off)
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.02


def test_values_of_even_exploration_converge_to_those_of_even_play():
    """With exact values at the leaves and selection by the prior alone, Q is an average of exact values of the policy."""
    world = World(4, 3, {(0, 1, 2, 0), (1, 0, 0, 0), (1, 0, 2, 1)})
    options = Options(simulations=4000, width=3, c_puct=1e9, terminal_backups=False)
    growth = search_tree(cut, options)
    world_even = SimpleNamespace(branch=3, outcome=world.outcome)
    # Every step as likely as the others: the prior is the same.
    answer: Any = None
    while True:
        try:
            [ask] = growth.send(answer)
        except StopIteration as end:
            nodes = end.value.nodes
            break
        answer = [
            [
                Rollout(
                    (*ask.prefix, d),
                    len(ask.prefix),
                    world_even.outcome((*ask.prefix, d)),
                    (0.0,),
                    world.uniform(ask.prefix),
                )
                for d in range(3)
            ]
        ]
    for node in nodes:
        if node.visits > 100:
            assert node.q == pytest.approx(world.uniform(tuple(map(int, node.steps))), abs=0.03)


def test_one_expansion_is_one_backup_and_one_for_each_finished_child():
    world = World(2, 3, {(1, 2)})
    found = play(search_tree(cut, Options(simulations=2, width=3)), world, None)
    # The root's own value 0, then a child's own value 0 and its three finished children.
    assert found.nodes[0].visits == 1 + 1 + 3
    done = play(search_tree(cut, Options(simulations=40, width=3)), world, None)
    assert done.nodes[0].visits == 1 + 3 * 4
    assert done.nodes[0].q == pytest.approx((1 - 8) / 13)
    assert (done.counts["simulations"], done.counts["trees with nothing left to expand"]) == (4, 1)


def test_equal_steps_are_one_child_and_other_trees_sample_other_steps():
    world = World(3, 10, set())
    digits = lambda prefix, n: (n // 2) % 10
    first = play(search_tree(cut, Options(simulations=1, width=4), 0), world, None, digits)
    second = play(search_tree(cut, Options(simulations=1, width=4), 1), world, None, digits)
    assert [n.steps for n in first.nodes[1:]] == [("0",), ("1",)]
    assert [n.steps for n in second.nodes[1:]] == [("2",), ("3",)]
    assert first.counts["samples that add no step"] == 2


def test_paths_that_are_too_deep_end_wrong():
    world = World(9, 2, set())
    found = play(search_tree(cut, Options(simulations=50, width=2, max_depth=3)), world, None)
    deepest = [n for n in found.nodes if len(n.steps) == 3]
    assert {n.outcome for n in deepest} == {"unparseable"}
    assert {n.q for n in deepest} == {-1.0}
    assert max(len(n.steps) for n in found.nodes) == 3
    assert found.counts["paths cut at the greatest depth"] == 8


@pytest.mark.parametrize("terminal_backups", [True, False])
def test_where_no_step_can_be_added_the_solution_ends_without_an_answer(terminal_backups):
    growth = search_tree(cut, Options(simulations=9, width=2, terminal_backups=terminal_backups))
    next(growth)
    answer = [[Rollout((d,), 0, UNFINISHED, (-0.1,)) for d in (0, 1)]]
    while True:
        try:
            [_ask] = growth.send(answer)
        except StopIteration as end:
            found = end.value
            break
        answer = [[]]
    assert [(n.outcome, n.q) for n in found.nodes[1:]] == [("unparseable", -1.0)] * 2
    growth = search_tree(cut, Options())
    next(growth)
    with pytest.raises(StopIteration) as end:
        growth.send([[]])
    assert end.value.value.dropped == "prompts longer than the context"


# --- paths -----------------------------------------------------------------------------------------------------------------


def test_paths_of_trees_are_distinct_limited_and_keep_their_values():
    world = World(3, 2, {(0, 0, 0), (1, 1, 1)})
    problem, source = Problem("p", "q", "1"), Source("me", "fake", "toy", 0)
    trees = [
        play(search_tree(cut, Options(simulations=n, width=2)), world, None).tree(problem, source) for n in (4, 40)
    ]
    paths = chosen_paths(trees, right=9, wrong=9, seed=0)
    every = {steps: (values, outcome) for tree in trees[::-1] for steps, values, outcome in value_paths(tree)}
    finished = {steps for steps, (_, outcome) in every.items() if outcome != UNFINISHED}
    assert {tuple(n.step for n in p.nodes[1:]) for p in paths} == finished
    for path in paths:
        assert [n.parent for n in path.nodes] == list(range(-1, len(path.nodes) - 1))
        values, outcome = every[tuple(n.step for n in path.nodes[1:])]
        assert tuple(n.value for n in path.nodes) == pytest.approx(values)
        assert (path.nodes[-1].outcome, path.nodes[-1].value) == (outcome, 1.0 if outcome == "right" else -1.0)
    logprob = lambda path: sum(n.logprob for n in path.nodes)
    [most] = chosen_paths(trees, right=1, wrong=0, seed=0, likely=True)
    assert logprob(most) == max(logprob(p) for p in paths if p.nodes[-1].outcome == "right")
    assert len({logprob(p) for p in paths if p.nodes[-1].outcome == "right"}) == 2
    outcomes = [p.nodes[-1].outcome == "right" for p in chosen_paths(trees, right=1, wrong=2, seed=3)]
    assert outcomes == [True, False, False]
    assert chosen_paths(trees, right=1, wrong=2, seed=3) == chosen_paths(trees, right=1, wrong=2, seed=3)
    assert any(
        chosen_paths(trees, right=1, wrong=2, seed=s) != chosen_paths(trees, right=1, wrong=2, seed=3) for s in range(9)
    )


def test_flips_turn_a_share_of_the_counts_round():
    from stepladder.data_gen.rows import Node, Tree

    nodes = (Node(-1, "", 5, 8, 0, None, None, 0.0), *(Node(0, str(i), 1, 8, 0, None, None, 0.0) for i in range(400)))
    tree = Tree("p", "q", "1", nodes, Source("me", "fake", "toy", 0))
    found = flipped(tree, 0.2, 1)
    turned = sum(n.n_correct == 7 for n in found.nodes[1:])
    assert 50 < turned < 110
    assert found.nodes[0].n_correct == 5
    assert flipped(tree, 0.0, 1) == tree
    assert {n.n_correct for n in flipped(tree, 1.0, 1).nodes[1:]} == {7}
    # A larger share turns the same steps and more.
    more = flipped(tree, 0.4, 1)
    assert all(m.n_correct == 7 for n, m in zip(found.nodes, more.nodes, strict=True) if n.n_correct == 7)


# --- with an engine ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab() -> Any:
    engine = load_engine(LAB, device="cpu")
    task = ChainArith(p=7, min_steps=4, max_steps=5, sizes={"train": 6})
    return SimpleNamespace(engine=engine, task=task, format=load_policy_format(LAB, engine.tokenizer, "\n"))


def test_single_steps_are_steps_and_their_values_are_the_value_models(lab, tiny_scorer):
    value = RewardModel(
        tiny_scorer(lab.engine.tokenizer), lab.engine.tokenizer, lab.format.for_reward("scalar", "value")
    )
    roller = Roller(lab.engine, lab.task, lab.format, Sampling(60), 0, value)
    problem = lab.task.problems("train")[0]
    [first, whole] = roller.roll([(problem, Ask((), range(3), one_step=True)), (problem, Ask((), range(2)))])
    assert [len(roller.cut(r.ids)[0]) for r in first] == [1, 1, 1]
    assert {r.outcome for r in first} == {UNFINISHED}
    assert all(len(roller.cut(r.ids)[0]) > 1 and r.outcome != UNFINISHED for r in whole)
    [[second]] = roller.roll([(problem, Ask(first[0].ids, range(1), one_step=True))])
    assert second.start == len(first[0].ids)
    assert second.logprobs[0] < 0
    root, one = value.score_with_root([(problem.prompt, roller.cut(first[0].ids)[0])])[0]
    assert (first[0].value, second.value) == pytest.approx((2 * root - 1, 2 * one - 1), abs=1e-6)
    assert whole[0].value is None


def test_rows_do_not_depend_on_what_stands_beside(lab):
    problems = lab.task.problems("train")

    def make(some: Sequence[Problem], **changes: Any) -> Any:
        return mcts_trees(
            lab.engine, lab.task, lab.format, some, options=Options(simulations=6, width=3), trees=2, value=None,
            sampling=Sampling(60), seed=0, policy="me", **changes,
        )  # fmt: skip

    whole = make(problems)
    assert len(whole.rows) == 12
    # The steps and the visits are the same; log-probabilities may be rounded otherwise in another batch.
    told = lambda trees: [[(n.parent, n.step, n.visits, n.value, n.outcome) for n in tree.nodes] for tree in trees]
    assert told(make(problems[2:4]).rows) == told(whole.rows[4:8])
    assert any(a.nodes != b.nodes for a, b in zip(whole.rows[::2], whole.rows[1::2], strict=True))
    assert whole.counts["policy calls"] > 0
    for tree in whole.rows:
        assert all(n.value is None or -1 <= n.value <= 1 for n in tree.nodes)
