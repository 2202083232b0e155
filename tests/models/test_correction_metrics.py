"""Metrics of corrections against slow references and numbers worked out by hand."""

from __future__ import annotations

import math
import random
from functools import cache

import pytest

from stepladder.models.correction_metrics import (
    at_turn,
    detection,
    edit_distance,
    edit_ratio,
    flips,
    gated_gain,
    location,
    majority_answer,
)


def test_flips_add_up_and_their_rates_are_over_those_that_could():
    # 10 chains: 5 right first; one of them breaks, two of the other five are fixed.
    before = [True] * 5 + [False] * 5
    after = [True] * 4 + [False] + [True] * 2 + [False] * 3
    found = flips(before, after)
    assert found["before"] == 0.5
    assert found["after"] == 0.6
    assert found["wrong_to_right"] == 0.2
    assert found["right_to_wrong"] == 0.1
    assert found["fix_rate"] == 0.4
    assert found["break_rate"] == 0.2
    rng = random.Random(0)
    for _ in range(50):
        a, b = ([rng.random() < 0.5 for _ in range(7)] for _ in range(2))
        one = flips(a, b)
        assert one["delta"] == pytest.approx(one["wrong_to_right"] - one["right_to_wrong"])
    assert math.isnan(flips([True], [True])["fix_rate"])
    assert math.isnan(flips([False], [True])["break_rate"])


def test_a_vote_over_turns():
    assert majority_answer(["2", "1", "1", "2"]) == "2"  # of equals the first
    assert majority_answer([None, None, None, "3"]) == "3"  # what cannot be read does not vote
    assert majority_answer([None]) is None
    assert [at_turn([False, True], t) for t in range(4)] == [False, True, True, True]


def test_edit_distance_is_that_of_the_definition():
    def slow(a: str, b: str) -> int:
        @cache
        def d(i: int, j: int) -> int:
            if not i or not j:
                return i + j
            return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

        return d(len(a), len(b))

    rng = random.Random(1)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randint(0, 9))) for _ in range(2))
        assert edit_distance(a, b) == slow(a, b)
    assert edit_ratio("", "") == 0.0
    assert edit_ratio("ab", "") == 1.0
    assert edit_ratio("abcd", "abed") == 0.125


def test_verdicts_of_a_critic():
    #        flawed:  T     T      T     F      F     F
    said = [True, False, None, True, False, False]
    found = detection(said, [True, True, True, False, False, False])
    assert found["precision"] == 0.5
    assert found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == pytest.approx(2 / 5)  # 2 TP / (said + flawed)
    assert found["false_alarms"] == pytest.approx(1 / 3)
    assert found["balanced_accuracy"] == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert found["unreadable"] == pytest.approx(1 / 6)
    always = detection([True, True], [True, False])
    assert always["balanced_accuracy"] == 0.5
    assert math.isnan(detection([False], [False])["recall"])


def test_locations_of_errors():
    found = location([1, 2, None, None, 0], [1, 1, 0, None, None])
    assert found["located"] == pytest.approx(1 / 3)
    assert found["cleared"] == 0.5
    assert found["location_f1"] == pytest.approx(2 * (1 / 3) * 0.5 / (1 / 3 + 0.5))
    assert location([0], [None])["cleared"] == 0
    assert math.isnan(location([0], [None])["located"])
    assert location([0, 1], [1, None])["location_f1"] == 0


def test_the_gain_of_a_gate_is_the_sum_of_its_parts():
    rng = random.Random(2)
    for _ in range(100):
        first, after = ([rng.random() < 0.5 for _ in range(20)] for _ in range(2))
        said = [rng.choice([True, False, None]) for _ in range(20)]
        measured, parts = gated_gain(first, said, after)
        assert measured == pytest.approx(parts)
    # Four chains; the critic finds one of two wrong ones, which is fixed, and one right one, which breaks.
    assert gated_gain([False, False, True, True], [True, False, True, False], [True, True, False, False])[0] == 0.0
