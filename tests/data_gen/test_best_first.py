"""Best-first trees on toy worlds: the path is that of the best shares, all siblings are judged."""

from __future__ import annotations

import random

from stepladder.data_gen.best_first import best_first_tree, next_steps
from stepladder.data_gen.growing import Rollout


def world(weights, length=3, width=3):
    """A step is a digit; a solution is right with a probability that its digits give."""

    def write(prefix, number):
        rng = random.Random(f"{prefix} {number}")
        ids = [*prefix, *(rng.randrange(width) for _ in range(length - len(prefix)))]
        right = rng.random() < sum(weights[i] for i in ids) / length
        return ids[len(prefix) :], right

    return write


def test_the_path_is_that_of_the_best_shares(drive, numbers_cut):
    for seed in range(5):
        weights = random.Random(seed).sample([0.0, 0.5, 1.0], 3)
        run = drive(world(weights))
        found = run(best_first_tree(numbers_cut, candidates=3, completions=8, max_depth=9))
        nodes, index = found.builder.nodes, found.builder.index
        # Reference: counts from the world itself, and the greedy path through them.
        path: tuple[int, ...] = ()
        expanded = 0
        while len(path) < 3:
            rollouts = [run.rollout(path, n) for n in range(8)]
            assert (nodes[index[tuple(map(str, path))]].n_correct, nodes[index[tuple(map(str, path))]].n_rollouts) == (
                sum(r.right for r in rollouts),
                8,
            )
            expanded += 1
            level = list(dict.fromkeys(r.ids[len(path)] for r in rollouts))
            shares = {}
            for step in level:
                node = nodes[index[(*map(str, path), str(step))]]
                if len(path) == 2:
                    first = next(r for r in rollouts if r.ids[2] == step)
                    assert (node.outcome, node.n_correct, node.n_rollouts) == (first.outcome, int(first.right), 1)
                else:
                    one = [run.rollout((*path, step), n) for n in range(8)]
                    assert (node.outcome, node.n_correct) == (None, sum(r.right for r in one))
                shares[step] = node.n_correct / node.n_rollouts
            best = max(level, key=lambda s: shares[s])
            if shares[best] == 0:
                break
            path = (*path, best)
        assert sum(n.visits for n in nodes) == expanded
        assert run.rounds == 1 + expanded


def test_next_steps_are_distinct_and_can_be_gone_on_with(numbers_cut):
    rollouts = [Rollout(ids, 1, "wrong") for ids in [(7, 1), (7, 2, 3), (7,), (7, 1, 4), (7, 2, 5), (7, 9)]]
    found = next_steps(rollouts, numbers_cut, 1, 2)
    assert [(c.steps, c.finished) for c in found] == [(("7", "1"), False), (("7", "2"), False)]
    assert found[0].rollout.ids == (7, 1, 4)
    assert [c.steps[-1] for c in next_steps(rollouts, numbers_cut, 1, 9)] == ["1", "2", "9"]
    assert next_steps(rollouts, numbers_cut, 1, 9)[2].finished


def test_it_ends_where_nothing_can_be_solved(drive, numbers_cut):
    run = drive(world([0.0, 0.0, 0.0]))
    found = run(best_first_tree(numbers_cut, candidates=3, completions=8, max_depth=9))
    assert run.rounds == 2
    assert found.counts["questions that no step could solve"] == 1
    assert {n.n_correct for n in found.builder.nodes} == {0}


def test_it_ends_at_the_greatest_depth(drive, numbers_cut):
    run = drive(world([1.0, 1.0, 1.0]))
    found = run(best_first_tree(numbers_cut, candidates=2, completions=4, max_depth=2))
    assert max(len(steps) for steps in found.builder.index) == 2
    assert found.counts["steps judged"] <= 4


def test_an_empty_solution_gives_the_root_alone(drive, numbers_cut):
    found = drive(lambda *_: ((), False))(best_first_tree(numbers_cut, candidates=2, completions=4, max_depth=5))
    assert len(found.builder.nodes) == 1


def test_steps_that_are_not_expanded_go_on_along_their_first_completion(drive, numbers_cut):
    """Every judged sibling is part of a whole solution, and nothing that was judged before changes."""
    from stepladder.data_gen.rows import Source
    from stepladder.data_gen.tree_rows import step_labels, step_pairs
    from stepladder.tasks.base import Problem

    several = 0
    for seed in range(5):
        weights = random.Random(seed).sample([0.0, 0.5, 1.0], 3)
        grow = lambda complete, weights=weights: drive(world(weights, length=4))(
            best_first_tree(numbers_cut, candidates=3, completions=8, max_depth=9, complete=complete)
        )
        plain, whole = grow(False), grow(True)
        counts = lambda found: {
            steps: (found.builder.nodes[i].n_correct, found.builder.nodes[i].n_rollouts)
            for steps, i in found.builder.index.items()
            if found.builder.nodes[i].n_rollouts
        }
        assert counts(plain) == counts(whole)
        tree = whole.builder.tree(Problem("p", "q", "1"), Source("me", "fake", "toy", 0))
        parents = {n.parent for n in tree.nodes}
        assert {n.outcome is None for i, n in enumerate(tree.nodes) if i not in parents} == {False}
        told = lambda found: [
            (r.steps, r.n_correct, r.n_rollouts)
            for r in step_labels(found.builder.tree(Problem("p", "q", "1"), Source("me", "fake", "toy", 0)))
        ]
        assert sorted(told(plain)) == sorted(told(whole))
        for pair in step_pairs(tree, margin=0.25, whole_paths=True):
            assert len(pair.prefix) + len(pair.chosen) == len(pair.prefix) + len(pair.rejected) == 4
            assert pair.chosen_finished
            assert pair.rejected_finished
            several += len(pair.chosen) > 1
    assert several > 5
