"""What holds of every strategy: neighbours, trees, ends, ties, repeated children, one sample, full batches."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest

from stepladder.search.beam import beam_search
from stepladder.search.best_of_n import best_of_n, step_best_of_n
from stepladder.search.dvts import dvts
from stepladder.search.loop import search
from stepladder.search.mcts import mcts
from stepladder.search.particles import particle_filter
from stepladder.search.rebase import rebase
from stepladder.search.revisions import revisions
from stepladder.search.step_beam import step_beam
from stepladder.search.tree_of_thoughts import tot_bfs, tot_dfs

EVERY: dict[str, tuple[Any, dict[str, Any]]] = {
    "best_of_n": (best_of_n, {"n": 6}),
    "step_best_of_n": (step_best_of_n, {"n": 4}),
    "beam": (beam_search, {"beams": 6, "width": 3}),
    "beam, dedupe": (beam_search, {"beams": 6, "width": 3, "dedupe": True}),
    "beam, lookahead": (beam_search, {"beams": 4, "width": 2, "lookahead": 2}),
    "dvts": (dvts, {"n": 6, "width": 3}),
    "dvts, lookahead": (dvts, {"n": 4, "width": 2, "lookahead": 1, "dedupe": True}),
    "particles": (particle_filter, {"n": 6}),
    "particles, islands": (
        particle_filter,
        {"n": 6, "islands": 3, "resampling": "systematic", "weighting": "score", "resample_below": 0.7},
    ),
    "particles, finished stay": (particle_filter, {"n": 6, "weighting": "likelihood", "resample_finished": False}),
    "rebase": (rebase, {"n": 7}),
    "rebase, keep": (rebase, {"n": 7, "keep": 0.3, "temperature": 1.0}),
    "mcts": (mcts, {"simulations": 7, "width": 3, "dedupe": False}),
    "mcts, commit": (mcts, {"simulations": 3, "width": 3, "commit": True, "unvisited": "score"}),
    "step_beam": (step_beam, {"beams": 3, "width": 2}),
    "tot_bfs": (tot_bfs, {"beams": 3, "width": 3}),
    "tot_bfs, sample": (tot_bfs, {"beams": 3, "width": 3, "select": "sample"}),
    "tot_dfs": (tot_dfs, {"width": 3, "threshold": 0.4, "expansions": 6, "solutions": 2}),
    "revisions": (revisions, {"n": 6, "chains": 2, "shown": 2}),
}
# Strategies that always give as many solutions as they were told, and the field that tells it.
EXACTLY = {"best_of_n": "n", "beam": "beams", "dvts": "n", "particles": "n", "rebase": "n", "revisions": "n"}

every = pytest.mark.parametrize("name", EVERY)


def run(name: str, roots: Any, world: Any, seed: int = 0, scorer: Any = None, **more: Any) -> Any:
    strategy, settings = EVERY[name]
    return strategy(roots, world, scorer or world, **{**settings, "seed": seed, **more})


@every
@pytest.mark.parametrize("finish", [0.0, 0.3])
def test_a_result_is_whole(toy, name, finish):
    """Solutions are finished, the tree leads to them, tokens are what was sampled."""
    for seed in range(4):
        world = toy(seed=seed, finish=finish, depth=5)
        roots = [world.root(f"p{i}") for i in range(3)]
        found = run(name, roots, world, seed)
        assert sum(result.tokens for result in found) >= len(world.sampled)
        if "lookahead" not in name:
            assert sum(result.tokens for result in found) == len(world.sampled)  # a step of the toy is a token
        for root, result in zip(roots, found, strict=True):
            assert result.finals
            assert all(state.done and state.key == root.key for state in result.finals)
            if (field := EXACTLY.get(name.split(",")[0])) is not None:
                assert len(result.finals) == EVERY[name][1][field]
            assert len(result.scores) == len(result.finals) == len(result.final_nodes)
            assert list(result.scores) == [world.judge(state) for state in result.finals]
            assert result.nodes[0].parent == -1
            assert all(node.parent < i for i, node in enumerate(result.nodes))
            if "lookahead" not in name:
                assert result.tokens == sum(node.tokens for node in result.nodes)
            for state, index in zip(result.finals, result.final_nodes, strict=True):
                path = [index]
                while result.nodes[path[-1]].parent > 0 and name != "revisions":
                    path.append(result.nodes[path[-1]].parent)
                assert tuple(s for i in reversed(path) for s in result.nodes[i].steps) == state.steps
                assert sum(result.nodes[i].logprob for i in path) == pytest.approx(state.logprob)
            parents = {node.parent for node in result.nodes}
            for i, node in enumerate(result.nodes):
                want = "finished" if i in result.final_nodes else "kept" if i in parents else "pruned"
                assert node.status == want
                assert node.done or node.status != "finished"
            assert result.chosen is not None
            if not name.startswith("mcts"):
                assert result.scores[result.chosen] == max(result.scores)


@every
def test_what_is_waited_for_is_the_longest_sample_of_every_round(toy, name):
    """A round of steps is a token of the toy; a round to the end, and a look ahead, as long as its longest."""

    class Timed(toy):
        waited = 0

        def expand(self, states, seeds):
            self.waited += 1
            return super().expand(states, seeds)

        def expand_greedily(self, states):
            self.waited += 1
            return super().expand_greedily(states)

        def finish(self, states, seeds):
            ends = super().finish(states, seeds)
            self.waited += max(len(e.steps) - len(s.steps) for e, s in zip(ends, states, strict=True))
            return ends

    for seed in range(3):
        world = Timed(seed=seed, finish=0.3, depth=6)
        [result] = run(name, [world.root()], world, seed, **({"max_depth": 4} if name.startswith("beam") else {}))
        assert result.serial_tokens == world.waited
        assert max(len(state.steps) for state in result.finals) <= result.serial_tokens <= result.tokens


@every
def test_a_root_does_not_depend_on_its_neighbours(toy, name):
    """One that finishes at once, one that never does, another order, alone: the others' trees stay the same."""
    world = toy(depth=5, finish=0.2, finish_of={"early": 1.0, "late": 0.0})
    keys = ["a", "early", "b", "late", "c"]
    whole = run(name, [world.root(k) for k in keys], world)
    assert run(name, [world.root(k) for k in keys[::-1]], world) == whole[::-1]
    for key, result in zip(keys, whole, strict=True):
        assert run(name, [world.root(key)], world) == [result]
    assert run(name, [world.root("a"), world.root("a")], world) == [whole[0]] * 2
    assert run(name, [world.root(k) for k in keys], world, seed=1) != whole
    assert run(name, [], world) == []


@every
def test_nothing_finishes_before_the_last_depth(toy, name):
    """What is unfinished then is sampled on to its end."""
    world = toy(depth=9)
    if "max_depth" not in EVERY[name][0].__kwdefaults__:
        pytest.skip("it has no depth")
    [result] = run(name, [world.root()], world, max_depth=3)
    assert result.finals
    assert all(len(state.steps) == 9 for state in result.finals)
    # One more where the budget ended before that depth, and a leaf is sampled on.
    assert result.depth == 3 or name.startswith(("mcts", "tot_dfs"))
    [result] = run(name, [world.root()], world, max_depth=1)
    assert result.depth == 1


@every
def test_all_children_finish_at_once(toy, name):
    world = toy(depth=1)
    [result] = run(name, [world.root()], world)
    assert result.finals
    assert all(state.steps in {("0",), ("1",), ("2",)} for state in result.finals)
    assert {node.parent for node in result.nodes[1:]} <= {0} or name == "revisions"


@every
def test_ties_keep_the_order_of_sampling(toy, name):
    """Where all scores are equal the first is chosen, and the run is as repeatable as any."""
    world = toy(depth=3, scores="constant", in_turn=True)
    [result] = run(name, [world.root()], world)
    if not name.startswith("mcts"):
        assert result.chosen == 0
    if name in ("step_best_of_n", "step_beam", "tot_bfs", "tot_dfs"):
        assert result.finals[0].steps == ("0", "0", "0")


@every
def test_children_repeat(toy, name):
    """One possible child: every sample is the same."""
    world = toy(depth=3, branching=1)
    [result] = run(name, [world.root()], world)
    assert {state.steps for state in result.finals} == {("0", "0", "0")}
    once = name.startswith(("tot", "step_beam")) or "mcts, commit" in name
    if once:
        assert len(result.finals) == 1
        assert sum(node.visits > 0 or node.score is not None for node in result.nodes[1:]) == 3


@every
def test_one_sample_of_anything_is_one_sample(toy, name):
    """N = 1: as many tokens as a solution has, whatever the strategy."""
    strategy, settings = EVERY[name]
    ones = {key: 1 for key in settings if key in ("n", "beams", "width", "simulations", "chains", "islands")}
    ones |= {key: settings[key] for key in ("weighting", "resampling") if key in settings}
    if strategy is mcts:
        ones["simulations"] = 100
    if strategy is tot_dfs:
        ones |= {"threshold": 0.0}
    for seed in range(5):
        world = toy(depth=4, finish=0.2, seed=seed)
        [result] = strategy([world.root()], world, world, **ones, seed=seed)
        assert len(result.finals) == 1
        assert result.tokens == len(result.finals[0].steps) == len(world.sampled)


@pytest.mark.parametrize("name", [n for n in EVERY if "lookahead" not in n and not n.startswith(("mcts", "tot_dfs"))])
def test_all_roots_share_their_calls(toy, name):
    """Roots of equal depth cost as many calls of the policy as one root does, each with all of them."""
    calls = []
    for count in (1, 6):
        world = toy(depth=4)
        found = run(name, [world.root(f"p{i}") for i in range(count)], world)
        calls.append(Counter(kind for kind, _ in world.calls))
        assert max(result.rounds for result in found) == calls[-1]["expand"] + calls[-1]["finish"]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("name", ["mcts", "tot_dfs"])
def test_uneven_searches_share_their_calls_as_well(toy, name):
    world = toy(depth=4, finish=0.1)
    found = run(name, [world.root(f"p{i}") for i in range(8)], world)
    calls = sum(kind != "score" for kind, _ in world.calls)
    assert calls <= max(result.rounds for result in found) + 1
    assert calls < sum(result.rounds for result in found) / 4


# Strategies that follow the scores; a search needs as many samples a step as there are children to see all of them.
GUIDED = {
    "step_best_of_n": {"n": 3},
    "beam": {"beams": 3, "width": 3},
    "dvts": {"n": 3, "width": 3},
    "rebase": {"n": 3, "temperature": 1e-4},
    "step_beam": {"beams": 1, "width": 3},
    "tot_bfs": {"beams": 1, "width": 3},
    "tot_dfs": {"width": 3, "threshold": 0.0, "expansions": 9, "solutions": 1},
    "mcts": {"simulations": 4, "width": 3, "c_puct": 0.0, "unvisited": "score"},
    "particles": {"n": 3, "temperature": 1e-3, "resampling": "systematic"},
}


@pytest.mark.parametrize("name", GUIDED)
def test_an_exact_scorer_leads_to_the_best_path(toy, name):
    """Against enumeration; scores turned around are the control."""
    found = turned = 0
    for seed in range(8):
        world = toy(seed=seed, depth=4, in_turn=True, scores="exact")
        root = world.root()
        [result] = run(name, [root], world, **GUIDED[name])
        assert result.chosen is not None
        found += world.judge(result.finals[result.chosen]) == world.exact(root)
        [result] = run(
            name, [root], world, scorer=lambda states, w=world: [1 - w.exact(s) for s in states], **GUIDED[name]
        )
        turned += world.judge(result.finals[result.chosen]) == world.exact(root)
    assert found == 8
    assert turned <= 2


def test_lookahead_judges_by_what_lies_ahead(toy):
    """A scorer that only knows finished solutions sees nothing without lookahead, and the greedy end with it."""
    hits = {0: 0, 3: 0}
    for lookahead in hits:
        for seed in range(10):
            world = toy(seed=seed, depth=4, in_turn=True)
            blind = lambda states, w=world: [w.judge(s) if s.done else 0.0 for s in states]
            [result] = beam_search([world.root()], world, blind, beams=3, width=3, lookahead=lookahead, seed=0)
            first = [world.child(world.root(), k) for k in range(3)]
            ends = []
            for state in first:
                while not state.done:
                    state = world.child(state, 0)  # the greedy step
                ends.append(world.judge(state))
            hits[lookahead] += result.finals[0].steps[0] == str(ends.index(max(ends)))
            thrown = Counter(kind for kind, _ in world.calls)["greedy"]
            assert thrown == (0 if lookahead == 0 else 3 + 2 + 1)
            assert result.tokens == len(world.sampled) + (0 if lookahead == 0 else 3 * (3 + 2 + 1))
    assert hits[3] == 10
    assert hits[0] < 8


def test_without_lookahead_beam_search_is_the_one_it_was(toy):
    world = toy(depth=5, finish=0.2)
    roots = [world.root(f"p{i}") for i in range(4)]
    plain = beam_search(roots, world, world, beams=6, width=3, seed=3)
    assert beam_search(roots, world, world, beams=6, width=3, lookahead=0, dedupe=False, seed=3) == plain
    assert beam_search(roots, world, world, beams=6, width=3, lookahead=1, seed=3) != plain


def test_equal_prefixes_compete_once_in_a_beam_that_drops_repeats(toy):
    """Two children in turn, four samples: without dedupe the best fills both places."""
    for dedupe, prefixes in ((False, 1), (True, 2)):
        world = toy(depth=3, branching=2, in_turn=True)
        [result] = beam_search([world.root()], world, world, beams=4, width=2, dedupe=dedupe, max_depth=2)
        assert len({state.steps[0] for state in result.finals}) == prefixes
        assert len(result.finals) == 4


def test_a_scorer_may_choose_by_other_scores_than_it_guides(toy):
    class Two(toy):
        def final(self, states):
            self.calls.append(("final", len(states)))
            return [float(state.steps[-1]) for state in states]

    for name in EVERY:
        world = Two(depth=3, finish=0.2)
        [result] = run(name, [world.root()], world)
        assert list(result.scores) == [float(state.steps[-1]) for state in result.finals]
        assert [kind for kind, _ in world.calls].count("final") == 1
        assert all(
            node.score in (None, world.judge(dataclasses.replace(state)), float(state.steps[-1]))
            for state, node in zip(result.finals, (result.nodes[i] for i in result.final_nodes), strict=True)
        )


def test_a_strategy_of_ones_own(toy):
    """The one that the module's text shows."""

    def greedy(tree):
        node = tree.root
        while not node.state.done:
            [[node]] = yield from tree.grow([(node, tree.seeds(1, "greedy", node.depth))])
        return [node], None

    world = toy(depth=4)
    found = search([world.root("a"), world.root("b")], world, world, greedy, seed=0)
    assert [len(result.finals[0].steps) for result in found] == [4, 4]
    assert [kind for kind, _ in world.calls] == ["expand"] * 4 + ["score"]


@pytest.mark.parametrize(
    ("strategy", "settings", "told"),
    [
        (best_of_n, {"n": 0}, "n must be 1 or more, found 0"),
        (step_best_of_n, {"n": 0}, "n must be 1"),
        (beam_search, {"beams": 2, "width": 3}, "1 <= width <= beams"),
        (beam_search, {"max_depth": 0}, "max_depth"),
        (beam_search, {"lookahead": -1}, "lookahead must be 0 or more"),
        (dvts, {"n": 7, "width": 3}, "multiple of width"),
        (dvts, {"n": 2, "width": 4}, "multiple of width"),
        (particle_filter, {"n": 6, "islands": 4}, "multiple of islands"),
        (particle_filter, {"temperature": 0.0}, "temperature must be more than 0"),
        (particle_filter, {"resample_below": 1.5}, r"resample_below must lie in \[0, 1\]"),
        (particle_filter, {"weighting": "x"}, "weighting must be"),
        (particle_filter, {"resampling": "x"}, "resampling must be"),
        (rebase, {"temperature": 0.0}, "temperature must be more than 0"),
        (rebase, {"keep": 0.0}, "keep must lie"),
        (step_beam, {"width": 0}, "width must be 1"),
        (tot_bfs, {"select": "x"}, "select must be"),
        (tot_dfs, {"expansions": 0}, "expansions must be 1"),
        (mcts, {"simulations": 0}, "simulations must be 1"),
        (mcts, {"prior": "x"}, "prior must be"),
        (mcts, {"unvisited": "x"}, "unvisited must be"),
        (revisions, {"n": 5, "chains": 2}, "multiple of chains"),
    ],
)
def test_settings_are_checked_before_any_work(strategy, settings, told):
    with pytest.raises(ValueError, match=told):
        strategy([], None, None, **settings)
