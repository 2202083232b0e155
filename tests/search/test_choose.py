"""Choosing among samples against enumeration of all subsets."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from stepladder.search.choose import (
    best_credit,
    best_of_k,
    majority_of_k,
    paired_bootstrap,
    pass_at_k,
    vote_credit,
    weighted_of_k,
)


@pytest.mark.parametrize(
    ("answers", "right", "weights", "credit"),
    [
        (["a", "a", "b"], [True, True, False], None, 1.0),
        (["a", "b", "b"], [True, False, False], None, 0.0),
        (["a", "b"], [True, False], None, 0.5),  # a tie gives expected credit, whichever came first
        (["b", "a"], [False, True], None, 0.5),
        (["a", "b", "c"], [True, False, False], None, 1 / 3),
        (["a", "a", "b", "b", "c"], [True, True, False, False, False], None, 0.5),
        # None never wins, however often it comes, and gives no credit alone.
        ([None, None, None, "a"], [False, False, False, True], None, 1.0),
        ([None, None], [False, False], None, 0.0),
        ([], [], None, 0.0),
        # Weights.
        (["a", "b", "b"], [True, False, False], [0.9, 0.4, 0.4], 1.0),
        (["a", "b", "b"], [True, False, False], [0.7, 0.4, 0.4], 0.0),
        ([None, "a"], [False, True], [1.0, 0.0], 1.0),
        (["a", "b"], [True, False], [0.0, 0.0], 0.5),
        # .1 + .2 is not .3 in floats, and still a tie.
        (["a", "a", "b"], [True, True, False], [0.1, 0.2, 0.3], 0.5),
    ],
)
def test_votes(answers, right, weights, credit):
    assert vote_credit(answers, right, weights) == pytest.approx(credit)


def test_votes_do_not_depend_on_the_order_of_sampling():
    rng = random.Random(0)
    for _ in range(100):
        n = rng.randint(1, 8)
        answers = [rng.choice(["a", "b", "c", None]) for _ in range(n)]
        rows = [(a, a == "a", rng.choice([0.25, 0.5])) for a in answers]
        credits = set()
        for _ in range(5):
            rng.shuffle(rows)
            credits.add(round(vote_credit(*zip(*rows, strict=True)), 12))
        assert len(credits) == 1


@pytest.mark.parametrize(
    ("scores", "right", "credit"),
    [
        ([0.1, 0.9], [True, False], 0.0),
        ([0.9, 0.1], [True, False], 1.0),
        ([0.5, 0.5], [True, False], 0.5),
        ([0.5, 0.5, 0.5, 0.1], [True, False, False, True], 1 / 3),
        ([0.0], [True], 1.0),
        ([], [], 0.0),
    ],
)
def test_best(scores, right, credit):
    assert best_credit(scores, right) == pytest.approx(credit)


def test_pass_at_k_equals_the_share_of_subsets():
    for n in range(1, 9):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([i < c for i in range(n)], k))
                assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4), (0, 0, 1)])
def test_pass_at_k_checks_its_numbers(n, c, k):
    with pytest.raises(ValueError, match="must hold"):
        pass_at_k(n, c, k)


def test_pass_at_k_of_many_samples_is_stable():
    # 1 - C(9900, 100) / C(10000, 100) by products of fractions.
    want = 1.0
    for i in range(100):
        want *= (9900 - i) / (10000 - i)
    assert pass_at_k(10_000, 100, 100) == pytest.approx(1 - want)


@pytest.mark.parametrize("levels", [2, 3, 100])
def test_best_of_k_equals_enumeration(levels):
    rng = random.Random(levels)
    for _ in range(20):
        n = rng.randint(1, 8)
        scores = [rng.randrange(levels) / levels for _ in range(n)]
        right = [rng.random() < 0.5 for _ in range(n)]
        for k in range(1, n + 1):
            credits = []
            for chosen in itertools.combinations(range(n), k):
                top = max(scores[i] for i in chosen)
                tied = [right[i] for i in chosen if scores[i] == top]
                credits.append(sum(tied) / len(tied))
            assert best_of_k(scores, right, k) == pytest.approx(sum(credits) / len(credits))


def test_best_of_k_at_its_ends():
    scores, right = [0.3, 0.9, 0.5, 0.9], [True, False, True, True]
    assert best_of_k(scores, right, 1) == pytest.approx(np.mean(right))  # best of one is a sample
    assert best_of_k(scores, right, 4) == pytest.approx(best_credit(scores, right))
    assert best_of_k([0.5] * 4, right, 3) == pytest.approx(np.mean(right))  # a constant score chooses nothing
    with pytest.raises(ValueError, match="1 <= k <= n"):
        best_of_k(scores, right, 5)


def test_equal_arms_differ_by_nothing():
    values = np.random.default_rng(0).random(200)
    assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0)
    assert paired_bootstrap(values, list(values), seed=3) == (0.0, 0.0, 0.0)


def test_the_bootstrap_is_paired():
    # The arms vary far more over problems than they differ on any one.
    rng = np.random.default_rng(0)
    hard = rng.random(300) * 10
    arm = hard + 0.1 + 0.01 * rng.standard_normal(300)
    mean, low, high = paired_bootstrap(arm, hard)
    assert mean == pytest.approx(0.1, abs=0.01)
    assert 0.09 < low < mean < high < 0.11
    _, low, high = paired_bootstrap(arm)
    assert high - low > 0.5


def test_the_bootstrap_is_near_the_normal_interval_and_repeats():
    values = np.random.default_rng(1).random(400) < 0.3
    mean, low, high = paired_bootstrap(values)
    assert mean == values.mean()
    half = 1.96 * (mean * (1 - mean) / 400) ** 0.5
    assert (low, high) == (pytest.approx(mean - half, abs=0.006), pytest.approx(mean + half, abs=0.006))
    assert paired_bootstrap(values) == (mean, low, high)
    noisy = np.random.default_rng(2).random(50)
    assert paired_bootstrap(noisy, seed=1) != paired_bootstrap(noisy, seed=2)
    assert paired_bootstrap([1.0]) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="no values"):
        paired_bootstrap([])
    with pytest.raises(ValueError, match="broadcast"):
        paired_bootstrap([1.0, 2.0, 3.0], [1.0, 2.0])


def test_the_bootstrap_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(300):
        arm, baseline = rng.random(60) < 0.6, rng.random(60) < 0.4
        _, low, high = paired_bootstrap(arm, baseline, resamples=500)
        covered += low <= 0.2 <= high
    assert 0.90 < covered / 300 < 0.99


def subsets(n, k):
    return list(itertools.combinations(range(n), k))


@pytest.mark.parametrize("good", [{"b"}, {"a", "c"}, set()])
def test_the_majority_of_k_is_the_mean_over_all_draws(good):
    """Also with two right answers, answers that cannot be read, and votes that tie."""
    rng = random.Random(len(good))
    for n in (1, 2, 5, 8):
        for _ in range(8):
            answers = [rng.choice(["a", "b", "c", "d", None]) for _ in range(n)]
            right = [a in good for a in answers]
            found = majority_of_k(answers, right)
            want = [
                np.mean([vote_credit([answers[i] for i in s], [right[i] for i in s]) for s in subsets(n, k)])
                for k in range(1, n + 1)
            ]
            assert found == pytest.approx(want), answers


def test_the_majority_of_a_pool_without_an_answer_is_wrong():
    assert majority_of_k([None, None], [False, False]) == [0.0, 0.0]
    assert majority_of_k([], []) == []


def test_a_weighted_vote_of_k_is_near_the_mean_over_all_draws_and_exact_at_both_ends():
    rng = random.Random(1)
    for _ in range(10):
        n = 7
        answers = [rng.choice(["a", "b", None]) for _ in range(n)]
        right, weights = [a == "a" for a in answers], [rng.choice([0.1, 0.5, 0.9, 0.9]) for _ in range(n)]
        for k in range(1, n + 1):
            draws = [
                vote_credit([answers[i] for i in s], [right[i] for i in s], [weights[i] for i in s])
                for s in subsets(n, k)
            ]
            found = weighted_of_k(answers, right, weights, k, subsets=2000, seed=3)
            # Four standard errors of a mean of 2000 draws.
            near = 1e-9 if k in (1, n) else 4 * np.std(draws) / 2000**0.5 + 1e-9
            assert found == pytest.approx(np.mean(draws), abs=near), (answers, k)
    assert weighted_of_k(answers, right, weights, 3, seed=5) == weighted_of_k(answers, right, weights, 3, seed=5)


def test_weights_of_one_make_a_majority():
    answers = ["a", "a", "b", "c", "b", None]
    right = [a == "a" for a in answers]
    exact = majority_of_k(answers, right)
    assert weighted_of_k(answers, right, [1.0] * 6, 4, subsets=4000) == pytest.approx(exact[3], abs=0.03)
    # A vote of weight 0 is a vote still: it wins where nothing else was drawn.
    assert weighted_of_k(["a", None], [True, False], [0.0, 9.0], 2) == 1.0
    with pytest.raises(ValueError, match="1 <= k <= n"):
        weighted_of_k(["a"], [True], [1.0], 2)
