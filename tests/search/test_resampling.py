"""Resampling with a verifier that errs: formulas against simulation, the worked example, and pools in random order."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest

from stepladder.search.resampling import (
    TaskType,
    accuracy_given_accept,
    belief,
    best_attempts,
    best_attempts_of_two,
    ceiling,
    marginal_utility,
    random_order_curve,
    utility,
)

EASY, HARD = TaskType(0.58, 0.87, soundness=0.75), TaskType(0.42, 0.13, soundness=0.75)


@pytest.mark.parametrize(("rho", "want"), [(0.7, 3), (1.0, 2), (2.0, 1)])
def test_when_to_stop_in_the_worked_example(rho, want):
    assert best_attempts([EASY, HARD], rho) == want
    assert best_attempts_of_two(EASY, HARD, rho) == want
    assert max(range(50), key=lambda k: utility([EASY, HARD], k, rho)) == want


def test_the_ceiling_of_the_worked_example():
    assert ceiling([EASY, HARD]) == pytest.approx(0.716, abs=5e-4)
    assert utility([EASY, HARD], 10**6, 0.0) == pytest.approx(ceiling([EASY, HARD]))


@pytest.mark.parametrize("rho", [0.1, 0.7, 1.0, 2.0, 3.0, 20.0])
@pytest.mark.parametrize("complete", [1.0, 0.6])
def test_the_closed_form_is_the_best_of_all(rho, complete):
    good, bad = TaskType(0.5, 0.8, complete, 0.9), TaskType(0.5, 0.02, complete, 0.8)
    # In exact fractions: gains far out are smaller than what a float can add to the utility.
    exact = lambda t: [Fraction(v) for v in (t.prior, t.a, t.b, 1 - Fraction(t.a) - Fraction(t.b))]
    values = [Fraction(0)]
    for k in range(1, 300):
        gain = sum(p * beta ** (k - 1) * (a - Fraction(rho) * b) for p, a, b, beta in map(exact, (good, bad)))
        values.append(values[-1] + gain)
    best = max(range(300), key=lambda k: (values[k], -k))
    assert best_attempts([good, bad], rho, 299) == best
    if good.a > rho * good.b and bad.a < rho * bad.b:
        assert best_attempts_of_two(good, bad, rho) == best
    for k in range(1, 20):
        assert utility([good, bad], k, rho) == pytest.approx(float(values[k]))
        assert float(values[k] - values[k - 1]) == pytest.approx(marginal_utility([good, bad], k, rho))


def test_without_a_bad_type_it_never_stops_and_without_a_good_one_never_begins():
    assert best_attempts([EASY], 0.5, 30) == 30
    assert best_attempts([HARD], 2.0) == 0
    with pytest.raises(ValueError, match="one type that is worth an attempt"):
        best_attempts_of_two(EASY, EASY, 0.5)
    # The bad type is accepted sooner: rejections speak for the good one.
    assert best_attempts_of_two(TaskType(0.5, 0.2, 1.0, 1.0), TaskType(0.5, 0.0, 1.0, 0.1), 0.1) == math.inf
    with pytest.raises(ValueError, match="soundness must lie"):
        TaskType(0.5, 0.5, soundness=1.5)


def test_formulas_equal_a_simulation():
    rng = random.Random(0)
    types, rho, most, runs = [TaskType(0.6, 0.5, 0.7, 0.8), TaskType(0.4, 0.1, 0.9, 0.7)], 1.5, 4, 40_000
    total, squares, right, given = 0.0, 0.0, 0, 0
    by_type = {0: [0, 0], 1: [0, 0]}
    for _ in range(runs):
        which = 0 if rng.random() < 0.6 else 1
        task = types[which]
        value = 0.0
        for _ in range(most):
            solved = rng.random() < task.solve
            if rng.random() < (task.completeness if solved else 1 - task.soundness):
                value = 1.0 if solved else -rho
                given += 1
                right += solved
                by_type[which][0] += solved
                by_type[which][1] += 1
                break
        total += value
        squares += value * value
    mean = total / runs
    error = math.sqrt((squares / runs - mean * mean) / runs)
    assert utility(types, most, rho) == pytest.approx(mean, abs=3 * error)
    assert accuracy_given_accept(types, most) == pytest.approx(right / given, abs=3 * math.sqrt(0.25 / given))
    for which, (good, count) in by_type.items():
        assert types[which].accuracy_given_accept == pytest.approx(good / count, abs=3 * math.sqrt(0.25 / count))


def test_accuracy_given_acceptance_is_flat_for_a_task_and_falls_for_a_mixture():
    alone = [accuracy_given_accept([EASY], k) for k in range(1, 20)]
    assert alone == pytest.approx([EASY.accuracy_given_accept] * 19)
    mixed = [accuracy_given_accept([EASY, HARD], k) for k in range(1, 20)]
    assert all(later < earlier for earlier, later in itertools.pairwise(mixed))
    beliefs = [belief([EASY, HARD], k)[1] for k in range(10)]
    assert beliefs[0] == pytest.approx(0.42)
    assert all(later > earlier for earlier, later in itertools.pairwise(beliefs))
    assert math.isnan(TaskType(1.0, 0.0).accuracy_given_accept)
    assert math.isnan(accuracy_given_accept([TaskType(1.0, 0.0)], 5))


def test_pools_in_random_order_equal_all_orders():
    tasks = ["RAW", "WWA", "WWW", "RRA"]  # R right and accepted, A wrong and accepted, W rejected
    rho, most = 0.7, 4
    counts = [(len(t), sum(c != "W" for c in t), t.count("R")) for t in tasks]
    curve = random_order_curve(counts, rho, most)
    for k in range(1, most + 1):
        value = answered = good = made = 0.0
        for task in tasks:
            orders = list(itertools.permutations(task))
            for order in orders:
                first = next((i for i, c in enumerate(order[:k]) if c != "W"), None)
                made += (min(k, len(task)) if first is None else first + 1) / len(orders)
                if first is not None:
                    answered += 1 / len(orders)
                    good += (order[first] == "R") / len(orders)
                    value += (1.0 if order[first] == "R" else -rho) / len(orders)
        at = curve[k - 1]
        n = len(tasks)
        assert (at.attempts, at.utility, at.answered, at.accuracy) == (
            k, pytest.approx(value / n), pytest.approx(answered / n), pytest.approx(good / n),
        )  # fmt: skip
        assert at.accuracy_given_accept == pytest.approx(good / answered)
        assert at.mean_attempts == pytest.approx(made / n)
    with pytest.raises(ValueError, match="0 <= right <= accepted <= samples"):
        random_order_curve([(3, 1, 2)], rho, 2)
    assert math.isnan(random_order_curve([(3, 0, 0)], rho, 1)[0].accuracy_given_accept)


def test_large_pools_come_near_the_formula():
    """K much smaller than the pool: without replacement is as good as with."""
    n = 4000
    pools = []
    for task, count in ((EASY, 58), (HARD, 42)):
        right, wrong = round(n * task.a), round(n * task.b)
        pools += [(n, right + wrong, right)] * count
    curve = random_order_curve(pools, 1.0, 8)
    assert [at.utility for at in curve] == pytest.approx([utility([EASY, HARD], k, 1.0) for k in range(1, 9)], abs=2e-3)
    assert max(curve, key=lambda at: at.utility).attempts == 2
