"""The toy of PAV: exact values against enumeration and simulation, its gradient against differences, its claim's direction."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from stepladder.trainers import pav_toy as toy


@pytest.mark.parametrize("matched", range(5))
@pytest.mark.parametrize("token", range(15))
def test_the_automaton_is_the_longest_suffix(matched, token):
    written = [*toy.PLANTED[:matched], token]
    want = max(k for k in range(6) if k <= len(written) and written[len(written) - k :] == list(toy.PLANTED[:k]))
    assert toy.next_matched(matched, token) == want


@pytest.mark.parametrize(
    ("gamma", "want"),
    [(2, 0.0001), (5, 0.0054), (8, 0.0245), (10, 0.0455), (15, 0.1181), (30, 0.3626), (100, 0.8151), (1000, 0.9926)],
)
def test_success_of_the_provers(gamma, want):
    assert round(toy.success(toy.weighted_policy(gamma)), 4) == want


def holds(tokens) -> bool:
    """Whether the planted sequence occurs before the end token."""
    tokens = list(tokens)
    tokens = tokens[: tokens.index(toy.END)] if toy.END in tokens else tokens
    return any(tuple(tokens[i : i + 5]) == toy.PLANTED for i in range(len(tokens) - 4))


def random_policy(seed: int, sharpness: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return toy.softmax(np.log(toy.weighted_policy(60)) + sharpness * rng.normal(size=(10, 5, 15)))


def test_samples_are_judged_as_by_hand_and_their_share_is_the_exact_value():
    policy = random_policy(0)
    states, tokens, alive, reward = toy.sample(policy, 20_000, np.random.default_rng(1))
    for row in range(3000):
        assert holds(tokens[row][alive[row]]) == bool(reward[row])
        matched = 0
        for t in range(10):
            if not alive[row, t]:
                break
            assert states[row, t] == matched
            matched = toy.next_matched(matched, tokens[row, t])
    want = toy.success(policy)
    assert 0.1 < want < 0.9
    assert abs(reward.mean() - want) < 4 * math.sqrt(want * (1 - want) / 20_000)


def test_values_of_the_last_positions_by_enumeration():
    """Two tokens are left and three of the planted ones stand: all 225 endings."""
    policy = random_policy(2)
    value, quality = toy.exact_values(policy)
    total = 0.0
    for a, b in itertools.product(range(15), repeat=2):
        p = policy[8, 3, a]
        matched = toy.next_matched(3, a)
        if a == toy.END:
            continue
        total += p * policy[9, matched, b] * holds([*toy.PLANTED[:3], a, b])
    assert value[8, 3] == pytest.approx(total, rel=1e-12)
    assert quality[9, 4, 5] == 1.0
    assert (quality[:, :, toy.END] == 0).all()


def test_advantages_average_to_nothing_under_their_own_policy_and_best_of_k_is_the_closed_form():
    policy = random_policy(3)
    assert np.allclose((policy * toy.exact_advantages(policy)).sum(-1), 0, atol=1e-12)
    value, quality = toy.exact_values(policy)
    want = (1 - (1 - quality) ** 4) - (1 - (1 - value[..., None]) ** 4)
    assert np.allclose(toy.exact_advantages(policy, 4), want)


def test_the_expected_gradient_is_that_of_the_exact_success():
    """Weighted by exact Q instead of sampled returns, over many samples, against finite differences of the exact value."""
    logits = np.log(random_policy(4, 0.3))
    policy = toy.softmax(logits)
    _, quality = toy.exact_values(policy)
    states, tokens, alive, _ = toy.sample(policy, 200_000, np.random.default_rng(0))
    returns = np.where(alive, quality[np.arange(10)[None], states, tokens], 0.0)
    found = toy.policy_gradient(logits, returns, states, tokens)
    for place in [(0, 0, 3), (0, 0, 7), (2, 1, 6), (4, 3, 3), (5, 2, 14)]:
        up, down = logits.copy(), logits.copy()
        up[place] += 1e-5
        down[place] -= 1e-5
        want = (toy.success(toy.softmax(up)) - toy.success(toy.softmax(down))) / 2e-5
        assert found[place] == pytest.approx(want, abs=6e-3), place


def test_progress_of_a_middling_prover_learns_in_fewer_iterations_than_the_outcome():
    start = toy.weighted_policy(2)
    outcome = toy.train_policy(start, None, iterations=700, seed=0)
    prover = toy.train_policy(start, toy.exact_advantages(toy.weighted_policy(10)), iterations=700, seed=0)
    assert 1.5 * prover.iterations_to(0.9) < outcome.iterations_to(0.9) < 700
    assert prover.mean > outcome.mean
    again = toy.train_policy(start, toy.exact_advantages(toy.weighted_policy(10)), iterations=20, seed=0)
    assert again.accuracy == prover.accuracy[:20]
