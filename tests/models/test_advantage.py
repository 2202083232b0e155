"""Best-of-K provers, advantages and effective rewards: identities, simulation, and the exact values of the lab."""

from __future__ import annotations

import itertools
import random

import pytest

from stepladder.models.advantage import advantages, best_of_k_value, effective_rewards
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith, value_off_track, value_on_track

SOME = [[random.Random(seed).random() for _ in range(size)] for seed, size in enumerate([1, 2, 5, 9])]


@pytest.mark.parametrize("q", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_best_of_one_is_the_policy_and_more_attempts_never_hurt(q):
    assert best_of_k_value(q, 1) == pytest.approx(q, abs=1e-15)
    values = [best_of_k_value(q, k) for k in range(1, 40)]
    assert all(0 <= a <= b <= 1 for a, b in itertools.pairwise(values))
    assert (values[0] < values[1]) == (0 < q < 1)


@pytest.mark.parametrize("k", [1, 2, 4, 32])
def test_best_of_k_keeps_the_order_of_values(k):
    grid = [i / 50 for i in range(51)]
    values = [best_of_k_value(q, k) for q in grid]
    assert values == sorted(values)
    assert (values[0], values[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(("q", "k"), [(0.1, 4), (0.4, 2), (0.02, 16)])
def test_best_of_k_is_what_k_attempts_reach(q, k):
    rng = random.Random(0)
    n = 20_000
    reached = sum(any(rng.random() < q for _ in range(k)) for _ in range(n)) / n
    want = best_of_k_value(q, k)
    assert abs(reached - want) < 4 * (want * (1 - want) / n) ** 0.5


@pytest.mark.parametrize("values", SOME)
def test_advantages_telescope(values):
    found = advantages(values)
    assert len(found) == len(values) - 1
    assert sum(found) == pytest.approx(values[-1] - values[0])
    for t in range(len(found)):
        assert values[0] + sum(found[: t + 1]) == pytest.approx(values[t + 1])


@pytest.mark.parametrize("values", SOME)
@pytest.mark.parametrize("k", [1, 3])
def test_effective_rewards_are_the_sum_of_their_parts(values, k):
    found = effective_rewards(values, alpha=0.5, k=k)
    for t, reward in enumerate(found, 1):
        gain = (1 - (1 - values[t]) ** k) - (1 - (1 - values[t - 1]) ** k)
        assert reward == pytest.approx(values[t] + 0.5 * gain)
    assert effective_rewards(values, alpha=0.0, k=k) == values[1:]
    stronger = [value**0.5 for value in values]
    assert effective_rewards(values, alpha=2.0, prover=stronger) == pytest.approx(
        [q + 2 * a for q, a in zip(values[1:], advantages(stronger), strict=True)]
    )


def test_a_filler_step_makes_no_progress_and_an_error_makes_negative_progress():
    """With exact values of the lab's policy, whose future depends on the value written last and on the operations left."""
    task = ChainArith(p=11)
    problem = Problem("", "Start 3 ; + 5 ; * 2 ; - 1 \n", "4")
    lines = ["3 + 5 = 8", "3 + 5 = 8", "8 * 2 = 6", "6 - 1 = 5"]  # the second line says the first again, the third errs

    def value(steps: list[str]) -> float:
        done = list(dict.fromkeys(steps))
        track = not done or task.check_steps(problem, done)[-1].on_track
        left = 3 - len(done)
        return value_on_track(11, 0.1, left) if track else value_off_track(11, 0.1, left)

    values = [value(lines[:t]) for t in range(len(lines) + 1)]
    progress = advantages(values)
    assert progress[0] > 0
    assert progress[1] == 0
    assert progress[2] < -0.5
    for k in (1, 4, 16):
        assert effective_rewards(values, alpha=3.0, k=k)[1] == values[2]


def test_what_cannot_be():
    for wrong in (0, -1):
        with pytest.raises(ValueError, match="k must be 1 or more"):
            best_of_k_value(0.5, wrong)
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match="must lie in"):
            best_of_k_value(wrong, 2)
    with pytest.raises(ValueError, match="found 2 and 3"):
        effective_rewards([0.1, 0.2, 0.3], alpha=1.0, prover=[0.1, 0.2])
