"""Estimators, the coverage law, difficulty, cross-fitted choice and FLOPs, against enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stepladder.basics import fold_seed
from stepladder.search.analysis import (
    answers_by_luck,
    chance_coverage,
    compute_optimal,
    coverage,
    difficulty_levels,
    fit_power_law,
    forward_flops,
    inference_exchange,
    log_spaced,
    samples_flops,
    scored_tokens,
)


def test_coverage_is_the_mean_of_pass_at_k():
    assert coverage([(4, 1), (4, 0), (4, 4)], 1) == pytest.approx((0.25 + 0 + 1) / 3)
    assert coverage([(4, 1), (4, 0)], 4) == pytest.approx(0.5)
    assert chance_coverage([0.5, 0.0], 2) == pytest.approx(0.375)


@pytest.mark.parametrize(("a", "b"), [(-1.5, -0.4), (-0.3, -1.0), (-4.0, -0.2)])
def test_the_law_is_found_again(a, b):
    ks = log_spaced(1000)
    law = fit_power_law(ks, [math.exp(a * k**b) for k in ks])
    assert (law.a, law.b) == (pytest.approx(a, rel=1e-5), pytest.approx(b, rel=1e-5))
    assert law.rmse < 1e-8
    assert law(10) == pytest.approx(math.exp(a * 10**b))


def test_the_fit_is_the_least_squares_one():
    """Against a fine grid around it, on noisy points with ends that must be left out."""
    rng = np.random.default_rng(0)
    ks = log_spaced(500, 25)
    values = [float(np.clip(math.exp(-1.2 * k**-0.5) + rng.normal(0, 0.02), 0, 1)) for k in ks]
    values[-1], values[0] = 1.0, 0.0
    law = fit_power_law(ks, values)
    assert law.left_out == 2
    assert law.points == len(ks) - 2
    error = lambda a, b: sum((math.exp(a * k**b) - c) ** 2 for k, c in zip(ks, values, strict=True) if 0 < c < 1)
    best = error(law.a, law.b)
    assert law.rmse == pytest.approx(math.sqrt(best / law.points))
    assert law.worst >= law.rmse
    for da, db in itertools.product(np.linspace(-0.05, 0.05, 11), repeat=2):
        assert error(law.a + da, law.b + db) >= best - 1e-12


def test_a_curve_that_is_no_power_law_says_so():
    ks = log_spaced(256, 20)
    good = fit_power_law(ks, [1 - 0.8 * k**-0.6 for k in ks])
    bad = fit_power_law(ks, [0.1 + 0.8 * (i % 2) for i, _ in enumerate(ks)])
    assert good.rmse < 0.02 < 0.15 < bad.rmse
    with pytest.raises(ValueError, match="three or more k, found 1"):
        fit_power_law([1, 2, 4], [0.5, 1.0, 1.0])


def test_the_share_of_variance_that_the_law_explains():
    ks = log_spaced(200, 20)
    rng = np.random.default_rng(3)
    values = [float(np.clip(math.exp(-1.2 * k**-0.5) + rng.normal(0, 0.05), 0.01, 0.99)) for k in ks]
    law = fit_power_law(ks, values)
    rest = sum((law(k) - c) ** 2 for k, c in zip(ks, values, strict=True))
    assert law.r2 == pytest.approx(1 - rest / sum((c - np.mean(values)) ** 2 for c in values))
    assert fit_power_law(ks, [math.exp(-(k**-0.4)) for k in ks]).r2 == pytest.approx(1)
    assert math.isnan(fit_power_law([1, 2, 4], [0.5, 0.5, 0.5]).r2)


def test_luck_is_what_answers_to_other_problems_reach():
    answers = {"a": ["1", "2", None, "1"], "b": ["1", "3"], "c": ["2", "2", "1", "1"]}
    gold = {"a": "1", "b": "2", "c": "9"}
    # Of b half, of c half answer 1; of a a quarter, of c half answer 2; nobody answers 9.
    assert answers_by_luck(answers, gold) == pytest.approx({"a": 0.5, "b": 0.375, "c": 0.0})
    assert answers_by_luck({"a": ["1"]}, {"a": "1"}) == {"a": 0.0}


def test_log_spaced():
    assert log_spaced(1) == [1]
    ks = log_spaced(1000)
    assert (ks[0], ks[-1]) == (1, 1000)
    assert len(ks) <= 40
    assert ks == sorted(set(ks))


# --- difficulty and choice ----------------------------------------------------------------------------------------------


def test_levels_are_quantiles():
    easiness = {f"p{i}": i / 10 for i in range(10)}  # .0 .. .9
    # The cuts are the quantiles of code in use: under q20 5, under q40 4, ... else 1.
    cuts = np.quantile(list(easiness.values()), [0.2, 0.4, 0.6, 0.8])
    want = {
        name: 5 if v < cuts[0] else 4 if v < cuts[1] else 3 if v < cuts[2] else 2 if v < cuts[3] else 1
        for name, v in easiness.items()
    }
    found = difficulty_levels(easiness)
    assert found == want
    assert sorted(found.values()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert set(difficulty_levels(dict.fromkeys("abc", 0.5)).values()) == {1}  # nothing tells them apart
    assert difficulty_levels({"a": 0.0, "b": 1.0}, 1) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="levels must be 1"):
        difficulty_levels({})


def test_the_choice_is_that_of_the_other_fold():
    levels = {f"p{i:02d}": 1 + i % 2 for i in range(20)}
    rng = np.random.default_rng(1)
    outcomes = {name: {p: float(rng.integers(0, 2)) for p in levels} for name in ("a", "b", "c")}
    found = compute_optimal(outcomes, levels, seed=4)
    assert set(found.values) == set(levels)
    assert set(found.choices) == {(fold, level) for fold in (0, 1) for level in (1, 2)}
    for level in (1, 2):
        group = sorted((p for p in levels if levels[p] == level), key=lambda p: fold_seed(4, "fold", p))
        for fold in (0, 1):
            inside, outside = group[fold::2], group[1 - fold :: 2]
            means = {name: sum(values[p] for p in outside) for name, values in outcomes.items()}
            best = max(means, key=means.get)
            assert found.choices[fold, level] == best
            assert [found.values[p] for p in inside] == [outcomes[best][p] for p in inside]
    # Strategies that are best at one level each: the choice is theirs, everywhere.
    outcomes = {
        "easy": {p: float(v == 1) for p, v in levels.items()},
        "hard": {p: float(v == 2) for p, v in levels.items()},
    }
    found = compute_optimal(outcomes, levels)
    assert found.choices == {(0, 1): "easy", (1, 1): "easy", (0, 2): "hard", (1, 2): "hard"}
    assert set(found.values.values()) == {1.0}


def test_without_cross_fitting_noise_would_flatter():
    """Twenty strategies of the same accuracy: chosen and measured on the same problems they look better than they are."""
    rng = np.random.default_rng(2)
    fair, biased = [], []
    for seed in range(60):
        levels = {f"p{i:02d}": 1 + i % 5 for i in range(50)}
        outcomes = {f"s{j}": {p: float(rng.random() < 0.5) for p in levels} for j in range(20)}
        fair.append(np.mean(list(compute_optimal(outcomes, levels, seed=seed).values.values())))
        best = {
            level: max(np.mean([outcomes[s][p] for p in levels if levels[p] == level]) for s in outcomes)
            for level in range(1, 6)
        }
        biased.append(np.mean(list(best.values())))
    assert abs(np.mean(fair) - 0.5) < 4 * np.std(fair) / math.sqrt(60)
    assert np.mean(biased) > 0.7


def test_the_folds_of_a_level_are_even_and_seeded():
    levels = {f"p{i:02d}": 1 for i in range(11)}
    outcomes = {"a": dict.fromkeys(levels, 1.0), "b": dict.fromkeys(levels, 0.0)}
    assert compute_optimal(outcomes, levels).choices == {(0, 1): "a", (1, 1): "a"}
    one = compute_optimal({"a": {"x": 1.0}}, {"x": 1})  # a single problem has nothing to be chosen on but itself
    assert one.values == {"x": 1.0}
    with pytest.raises(ValueError, match="no strategy"):
        compute_optimal({}, levels)


# --- cost ------------------------------------------------------------------------------------------------------------------


def test_flops_equal_a_sum_over_tokens():
    parameters, layers, width, context = 1000, 3, 16, 7
    want = sum(2 * parameters + 4 * layers * width * (context + i + 1) for i in range(5))
    assert forward_flops(parameters, 5, context, layers, width) == want
    assert forward_flops(parameters, 5) == 2 * parameters * 5
    # Encoding in pieces costs what encoding at once does.
    assert forward_flops(10, 4, 0, 2, 8) + forward_flops(10, 6, 4, 2, 8) == forward_flops(10, 10, 0, 2, 8)
    assert samples_flops(10, 3, [2, 4], 1, 2) == (
        forward_flops(10, 3, 0, 1, 2) + forward_flops(10, 2, 3, 1, 2) + forward_flops(10, 4, 3, 1, 2)
    )


def test_the_same_n_is_not_the_same_cost():
    """Policy 1 B, reward model 7 B, 64 solutions of 512 tokens and ten steps: 6.6e13, 4.6e14 and 2.5e15 FLOPs."""
    policy = samples_flops(1e9, 0, [512] * 64)
    cached, fresh = (forward_flops(7e9, 64 * int(scored_tokens(512, 10, cached=c))) for c in (True, False))
    assert policy == pytest.approx(6.6e13, rel=0.01)
    assert cached == pytest.approx(4.6e14, rel=0.01)
    assert fresh == pytest.approx(2.5e15, rel=0.02)
    assert (round(cached / policy), round(fresh / policy, 1)) == (7, 38.5)


def test_the_exchange_of_size_for_inference():
    # Equal FLOPs: 6 M P D_pre + 2 M P D_inf = 6 P D_pre + 2 P D_inf x.
    ratio, size = 1 / 0.79, 14.0
    x = inference_exchange(size, ratio)
    assert 6 * size * ratio + 2 * size == pytest.approx(6 * ratio + 2 * x)
