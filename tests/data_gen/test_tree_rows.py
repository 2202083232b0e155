"""What is read out of trees, by hand and against a slow reference."""

from __future__ import annotations

import itertools
import random

import pytest

from stepladder.data_gen.rows import Node, Source, Tree
from stepladder.data_gen.tree_rows import (
    UNFINISHED,
    node_share,
    path_to,
    step_labels,
    step_pairs,
    steps_of,
    value_paths,
)

SOURCE = Source("policy", "fake", "chain", 0)


def node(parent: int, step: str, correct: int = 0, rollouts: int = 0, **changes) -> Node:
    given = {"visits": 0, "value": None, "outcome": None, "logprob": 0.0, **changes}
    return Node(parent, step, correct, rollouts, **given)


def tree(*nodes: Node) -> Tree:
    return Tree("p", "q", "1", nodes, SOURCE)


#        root 4/8
#   a 6/8      b 0/8       (c passed, not probed)
#  d right e 3/8            f 0/8, behind an edge of two steps
#          g wrong
HAND = tree(
    node(-1, "", 4, 8), node(0, "a", 6, 8), node(0, "b", 0, 8), node(0, "c"), node(1, "d", 1, 1, outcome="right"),
    node(1, "e", 3, 8), node(3, "f", 0, 8), node(5, "g", 0, 1, outcome="wrong"),
)  # fmt: skip


def random_tree(seed: int, size: int = 25) -> Tree:
    rng = random.Random(seed)
    nodes = [node(-1, "", rng.randint(0, 8), 8)]
    for i in range(1, size):
        counted = rng.random() < 0.8
        nodes.append(
            node(rng.randrange(i), rng.choice("abcd"), rng.randint(0, 8) if counted else 0, 8 if counted else 0)
        )
    return tree(*nodes)


def test_labels_of_a_tree_by_hand():
    found = step_labels(HAND)
    assert [(r.steps, r.n_correct, r.n_rollouts, r.outcome) for r in found] == [
        (("b",), (4, 0), (8, 8), UNFINISHED),
        (("a", "d"), (0, 6, 1), (0, 8, 1), "right"),
        (("a", "e", "g"), (0, 0, 3, 0), (0, 0, 8, 1), "wrong"),
    ]
    # The edge of two steps, c then f, labels no step; told otherwise it labels its end.
    assert (("c", "f"), (0, 0, 0), (0, 0, 8)) in [
        (r.steps, r.n_correct, r.n_rollouts) for r in step_labels(HAND, single_steps=False)
    ]
    assert [r.sample for r in found] == [0, 1, 2]
    assert {(r.label_source, r.first_error, r.first_error_known) for r in found} == {("monte_carlo", None, False)}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("single", [True, False])
def test_every_count_stands_in_one_row_and_nothing_else(seed, single):
    one = random_tree(seed)
    given: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for row in step_labels(one, single_steps=single):
        assert row.n_rollouts[-1]
        for t, pair in enumerate(zip(row.n_correct, row.n_rollouts, strict=True)):
            if pair[1]:
                given.setdefault(row.steps[:t], []).append(pair)
    want: dict[tuple[str, ...], list[tuple[int, int]]] = {}
    for i, n in enumerate(one.nodes):
        if n.n_rollouts and (not single or i == 0 or one.nodes[n.parent].n_rollouts):
            want.setdefault(steps_of(one, path_to(one, i)), []).append((n.n_correct, n.n_rollouts))
    assert {k: sorted(v) for k, v in given.items() if k} == {k: sorted(v) for k, v in want.items() if k}


def test_a_node_is_read_by_its_counts_then_its_value_then_its_verdict():
    assert node_share(node(0, "a", 3, 8, visits=2, value=1.0)) == 3 / 8
    assert node_share(node(0, "a", visits=2, value=-0.5)) == 0.25
    assert node_share(node(0, "a", value=0.5)) is None  # a value that nothing was backed up into
    assert (node_share(node(0, "a", outcome="right")), node_share(node(0, "a", outcome="unparseable"))) == (1.0, 0.0)


def test_values_along_paths():
    assert value_paths(HAND) == [
        (("b",), (0.0, -1.0), UNFINISHED),
        (("a", "d"), (0.0, 0.5, 1.0), "right"),
        (("c", "f"), (0.0, None, -1.0), UNFINISHED),
        (("a", "e", "g"), (0.0, 0.5, -0.25, -1.0), "wrong"),
    ]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("margin", [0.125, 0.375, 1.0])
def test_pairs_are_all_siblings_that_differ_enough(seed, margin):
    one = random_tree(seed, 40)
    want = []
    for i, j in itertools.permutations(range(1, 40), 2):
        a, b = one.nodes[i], one.nodes[j]
        siblings = a.parent == b.parent and a.n_rollouts and b.n_rollouts and a.step != b.step
        if siblings and a.n_correct - b.n_correct >= margin * 8:  # whole numbers: nothing to round
            want.append((steps_of(one, path_to(one, a.parent)), a.step, b.step, a.n_correct / 8, b.n_correct / 8))
    found = step_pairs(one, margin=margin)
    assert sorted((p.prefix, *p.chosen, *p.rejected, p.reward_chosen, p.reward_rejected) for p in found) == sorted(want)
    assert {(p.n_chosen, p.n_rejected) for p in found} <= {(8, 8)}
    few = step_pairs(one, margin=margin, most=3, seed=1)
    assert len(few) == min(3, len(found))
    assert [p for p in found if p in few] == few
    assert step_pairs(one, margin=margin, most=3, seed=1) == few


def test_paths_go_on_along_the_best_judged_child_and_say_whether_they_ended():
    [pair] = [p for p in step_pairs(HAND, margin=0.375, whole_paths=True) if p.prefix == ()]
    assert (pair.chosen, pair.rejected) == (("a", "d"), ("b",))
    assert (pair.chosen_finished, pair.rejected_finished) == (True, False)
    [pair] = [p for p in step_pairs(HAND, margin=0.375, whole_paths=True) if p.prefix == ("a",)]
    assert (pair.chosen, pair.rejected, pair.rejected_finished) == (("d",), ("e", "g"), True)
    single = step_pairs(HAND, margin=0.375)
    assert [(p.chosen, p.chosen_finished) for p in single] == [(("a",), False), (("d",), True)]


def test_only_the_extremes():
    one = tree(node(-1, "", 4, 8), *(node(0, s, c, 8) for s, c in [("a", 2), ("b", 8), ("c", 5), ("d", 0)]))
    assert [(p.chosen, p.rejected) for p in step_pairs(one, margin=0.1, extremes=True)] == [(("b",), ("d",))]
    assert len(step_pairs(one, margin=0.1)) == 6


@pytest.mark.parametrize("margin", [0.0, -0.1, 1.5])
def test_a_margin_that_cannot_be(margin):
    with pytest.raises(ValueError, match="margin must lie in"):
        step_pairs(HAND, margin=margin)
