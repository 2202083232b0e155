"""Chains of attempts and critiques, on a world of numbers in which the best and the worst critic are known."""

from __future__ import annotations

import dataclasses

import pytest

from stepladder.search.base import State
from stepladder.search.best_of_n import best_of_n
from stepladder.search.corrections import corrections


class World:
    """An attempt is one id, right if it is 0. The first is seed % 4; a correction of k is k - 1, of a right answer 3.

    The critic calls an attempt wrong if it is, but never those in `blind`, and always those in `alarmed`.
    """

    def __init__(self, *, criticises=True, blind=(), alarmed=(), unread=()):
        self.criticises, self.blind, self.alarmed, self.unread = criticises, blind, alarmed, unread
        self.calls: list[tuple[str, int]] = []
        self.seeds: list[int] = []

    def root(self, key="x"):
        return State(key, key, (9,), 1)

    def _child(self, state, number):
        return dataclasses.replace(state, ids=(*state.ids, number), steps=(*state.steps, str(number)), done=True)

    def finish(self, states, seeds):
        self.calls.append(("finish", len(states)))
        self.seeds += seeds
        drawn = lambda s, seed: seed % 4 if s.ids[0] == 9 else (s.ids[0] - 10 - 1) % 4
        return [self._child(s, drawn(s, seed)) for s, seed in zip(states, seeds, strict=True)]

    def before_critique(self, root, attempt):
        return State(root.key, root.prompt, (20 + attempt.ids[-1],), 1)

    def criticise(self, states, seeds):
        self.calls.append(("criticise", len(states)))
        self.seeds += seeds
        verdict = lambda k: 2 if k in self.unread else int((k != 0 and k not in self.blind) or k in self.alarmed)
        return [self._child(s, verdict(s.ids[0] - 20)) for s in states]

    def says_wrong(self, critique):
        return {0: False, 1: True, 2: None}[critique.ids[-1]]

    def before_attempt(self, root, attempts, critiques):
        assert len(attempts) == len(critiques)
        return State(root.key, root.prompt, (10 + attempts[-1].ids[-1],), 1)

    def is_right(self, attempt):
        return attempt.ids[-1] == 0


def answers(result):
    return [state.ids[-1] for state in result.finals]


def run(world, keys=("x",), **settings):
    return corrections([world.root(k) for k in keys], world, lambda states: [0.0] * len(states), **settings)


def first_answers(n, seed=0):
    world = World()
    [found] = best_of_n([world.root()], world, lambda s: [0.0] * len(s), n=n, seed=seed)
    return answers(found)


def test_the_first_attempts_are_those_of_best_of_n():
    [found] = run(World(), n=12, turns=1)
    assert answers(found) == first_answers(12)
    assert set(answers(found)) == {0, 1, 2, 3}


def test_always_corrects_what_is_right_too_and_gated_chains_end():
    first = first_answers(12)
    [always] = run(World(), n=12, turns=2)
    assert answers(always) == [(k - 1) % 4 for k in first]
    [wrong] = run(World(), n=12, turns=2, gate="wrong")
    assert answers(wrong) == [max(k - 1, 0) for k in first]
    [done] = run(World(), n=12, turns=4, gate="wrong")
    assert answers(done) == [0] * 12
    [blind] = run(World(blind=(2,), alarmed=(0,)), n=12, turns=2, gate="wrong")
    assert answers(blind) == [{0: 3, 1: 0, 2: 2, 3: 2}[k] for k in first]
    [unread] = run(World(unread=(1,)), n=12, turns=2, gate="wrong")
    assert answers(unread) == [{0: 0, 1: 1, 2: 1, 3: 2}[k] for k in first]
    [oracle] = run(World(blind=(1, 2, 3), alarmed=(0,)), n=12, turns=4, gate="oracle")
    assert answers(oracle) == [0] * 12
    [retry] = run(World(criticises=False), n=12, turns=2)
    assert answers(retry) == answers(always)
    with pytest.raises(ValueError, match="gate wrong needs a critic"):
        run(World(criticises=False), gate="wrong")


def test_all_attempts_can_be_kept_and_the_tree_holds_every_token():
    [found] = run(World(), n=3, turns=3, gate="wrong", keep="all")
    first = first_answers(3)
    want = [list(range(k, max(k - 3, -1), -1)) for k in first]
    assert answers(found) == [a for chain in want for a in chain]
    depths = [0] * len(found.nodes)
    for index, node in enumerate(found.nodes[1:], 1):
        depths[index] = depths[node.parent] + 1
    assert found.tokens == len(found.nodes) - 1  # every attempt and critique is one token
    criticised = sum(min(len(chain), 2) for chain in want)
    assert sum(d % 2 == 0 for d in depths[1:]) == criticised
    assert all(depths[node] % 2 == 1 for node in found.final_nodes)


def test_roots_share_their_calls_and_do_not_change_each_other():
    world = World()
    both = run(world, ("x", "y"), n=2, turns=3)
    assert world.calls == [("finish", 4), ("criticise", 4), ("finish", 4), ("criticise", 4), ("finish", 4)]
    assert len(set(world.seeds)) == len(world.seeds)
    for key, found in zip(("x", "y"), both, strict=True):
        assert answers(found) == answers(run(World(), (key,), n=2, turns=3)[0])


@pytest.mark.parametrize("bad", [{"n": 0}, {"turns": 0}, {"gate": "never"}, {"keep": "best"}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="must be"):
        run(World(), **bad)
