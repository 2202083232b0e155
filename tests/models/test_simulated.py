"""Simulated reward models: verdicts of the checker, errors of the size and share that were asked for."""

from __future__ import annotations

import math
import statistics

import pytest

from stepladder.models.simulated import Errors, SimulatedReward
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

TASK = ChainArith(p=11)
PROBLEM = Problem("p", "Start 3 ; + 5 ; * 2 \n", "5")
GOOD = ("3 + 5 = 8", "8 * 2 = 5", "Answer: 5")
LATE = ("3 + 5 = 8", "8 * 2 = 6", "Answer: 6")
logit = lambda p: math.log(p / (1 - p))


def model(seed: int = 0, **errors: float) -> SimulatedReward:
    return SimulatedReward(Errors(**errors), TASK, {PROBLEM.prompt: PROBLEM}, seed)


def test_without_errors_a_score_says_whether_the_prefix_is_right():
    exact = model(margin=2.0, noise=0.0)
    good, late = (
        [logit(v) for v in one] for one in exact.score_with_root([(PROBLEM.prompt, GOOD), (PROBLEM.prompt, LATE)])
    )
    assert good == pytest.approx([2.0] * 4)
    assert late == pytest.approx([2.0, 2.0, -2.0, -2.0])  # the answer repeats a wrong value, and stays wrong
    assert exact.score([(PROBLEM.prompt, LATE)]) == [[pytest.approx(1 / (1 + math.exp(-v))) for v in late[1:]]]
    assert exact.score([(PROBLEM.prompt, ())]) == [[]]
    assert exact.ledger.flops == 0


def test_noise_is_drawn_once_for_each_prefix():
    noisy = model(margin=1.0, noise=2.0)
    assert noisy.score([(PROBLEM.prompt, GOOD)]) == noisy.score([(PROBLEM.prompt, GOOD)])
    draws = []
    for value in range(2000):
        steps = ("3 + 5 = 8", f"8 * 2 = {value + 11}")  # wrong, each another line
        draws.append(logit(noisy.score([(PROBLEM.prompt, steps)])[0][1]))
    assert statistics.mean(draws) == pytest.approx(-1.0, abs=4 * 2 / 2000**0.5)
    assert statistics.stdev(draws) == pytest.approx(2.0, rel=0.07)
    first = {noisy.score([(PROBLEM.prompt, ("3 + 5 = 8", f"8 * 2 = {v}"))])[0][0] for v in range(9)}
    assert len(first) == 1  # what is behind a prefix does not change its score
    assert model(1, margin=1.0, noise=2.0).score([(PROBLEM.prompt, GOOD)]) != noisy.score([(PROBLEM.prompt, GOOD)])


def test_liked_errors_are_always_the_same_and_preferred():
    fooled = model(margin=1.0, noise=0.0, liked=0.4, liked_margin=3.0)
    levels = {}
    for value in range(500):
        steps = ("3 + 5 = 8", f"8 * 2 = {value + 11}", f"Answer: {value + 11}")
        one = [round(logit(v), 6) for v in fooled.score([(PROBLEM.prompt, steps)])[0]]
        assert one[0] == 1.0
        assert one[1] == one[2]  # an answer that repeats the wrong value is no error of its own
        levels[steps[1]] = one[1]
    assert set(levels.values()) == {3.0, -1.0}
    assert sum(v == 3.0 for v in levels.values()) / 500 == pytest.approx(0.4, abs=0.09)
    # A second error that is not liked is seen; none makes up for one that was seen.
    liked, seen = (next(s for s, v in levels.items() if v == level) for level in (3.0, -1.0))
    other = next(s for s, v in levels.items() if v == 3.0 and s != liked)
    assert [round(logit(v)) for v in fooled.score([(PROBLEM.prompt, (liked, seen))])[0]] == [3, -1]
    assert [round(logit(v)) for v in fooled.score([(PROBLEM.prompt, (seen, other))])[0]] == [-1, -1]
    assert [round(logit(v)) for v in fooled.score([(PROBLEM.prompt, GOOD)])[0]] == [1, 1, 1]


def test_settings_that_cannot_be():
    with pytest.raises(ValueError, match="margin must be more than 0"):
        Errors(margin=0.0)
    with pytest.raises(ValueError, match=r"liked must lie in \[0, 1\]"):
        Errors(liked=1.5)
