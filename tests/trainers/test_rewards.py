"""What a response earns: outcomes, steps in their six forms, the tokens they lie on, and the traps that make rewards hackable."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from stepladder.tasks.base import Outcome, Problem, Verdict
from stepladder.trainers import rewards
from stepladder.trainers.rewards import Reward, Rollout, step_reward

SCORES = [0.6, 0.9, 0.8, 0.3, 0.7]  # of the prompt and of four steps


def rollout(
    length: int = 6, steps: tuple[str, ...] = ("a", "b"), outcome: Outcome = Outcome.RIGHT, **fields: Any
) -> Rollout:
    known: dict[str, Any] = {
        "problem": Problem("p", "?", "1"), "prompt_ids": (1, 2), "ids": tuple(range(length)), "logprobs": (0.0,) * length,
        "text": "\n".join(steps), "steps": steps, "step_ends": tuple(range(2, 2 * len(steps) + 1, 2)), "truncated": False,
        "verdict": Verdict(None if outcome is Outcome.UNPARSEABLE else "1", outcome),
    }  # fmt: skip
    return Rollout(**{**known, **fields})


@pytest.mark.parametrize(
    ("outcome", "answer", "earned"),
    [
        (Outcome.RIGHT, "1", 1.0),
        (Outcome.WRONG, "2", 0.1),
        (Outcome.UNPARSEABLE, None, 0.0),
        (Outcome.TIMEOUT, None, 0.0),
    ],
)
def test_partial_credit_is_for_answers_that_could_be_read(outcome: Outcome, answer: str | None, earned: float) -> None:
    assert rewards.outcome_reward(Verdict(answer, outcome), 0.1) == earned


def test_the_forms_by_hand() -> None:
    found = lambda form, **more: step_reward(SCORES, form, coefficient=2.0, **more)[0]
    assert found("sum") == pytest.approx([1.8, 1.6, 0.6, 1.4])
    assert found("difference") == pytest.approx([0.6, -0.2, -1.0, 0.8])
    assert found("clip", margin=0.75) == pytest.approx([0.0, 0.0, -0.9, -0.1])
    assert found("delta") == pytest.approx([0.2, 1.0, -0.8, 1.4])
    p = [0.8, 0.6, -0.4, 0.4]
    w = [math.exp(-x / 0.1) for x in p]
    assert found("min") == pytest.approx([2 * a / sum(w) * x for a, x in zip(w, p, strict=True)])
    assert sum(found("min", temperature=0.01)) == pytest.approx(2 * min(p))
    assert step_reward(SCORES, "none") == step_reward([0.6], "sum") == ((), ())
    with pytest.raises(ValueError, match="found 'max'"):
        step_reward(SCORES, "max")


def test_pav_is_the_advantage_of_the_best_of_k_and_each_steps_own() -> None:
    future, own = step_reward(SCORES, "pav", coefficient=3.0, prover_k=4)
    q = [1 - (1 - p) ** 4 for p in SCORES]
    assert future == ()
    assert own == pytest.approx([3 * (b - a) for a, b in itertools.pairwise(q)])
    # Nothing changes, nothing is earned: a filler step has no advantage under any prover.
    assert step_reward([0.4, 0.4, 0.4], "pav", prover_k=4)[1] == (0.0, 0.0)
    # Very strong provers see no difference.
    assert max(map(abs, step_reward(SCORES, "pav", prover_k=1000)[1])) < 1e-9


# --- padding attacks: what another step of score p earns -------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.2, 0.7, 1.0])
def test_appending_a_step_pays_under_the_sum_and_not_under_the_difference(p: float) -> None:
    total = lambda scores, form: sum(step_reward(scores, form)[0])
    assert total([*SCORES, p], "sum") - total(SCORES, "sum") == pytest.approx(p)
    assert total([*SCORES, p], "difference") == pytest.approx(p - SCORES[0])
    # Ten repetitions of the last step: the sum pays for each, the difference for none.
    padded = [*SCORES, *[SCORES[-1]] * 10]
    assert total(padded, "sum") - total(SCORES, "sum") == pytest.approx(7.0)
    assert total(padded, "difference") == pytest.approx(total(SCORES, "difference"))
    assert total(padded, "delta") == pytest.approx(total(SCORES, "delta"))


@pytest.mark.parametrize(("n", "gain"), [(1, 0.014), (5, 0.06), (20, 0.15), (100, 0.25)])
def test_the_soft_minimum_can_still_be_padded_by_the_closed_form(n: int, gain: float) -> None:
    """d n e^(-d/T) / (1 + n e^(-d/T)) for one step and n better ones; the values are those of the table for T 0.1, d 0.3."""
    low, d, temperature = 0.2, 0.3, 0.1
    total = lambda p: sum(step_reward([0.0, *((x + 1) / 2 for x in p)], "min", temperature=temperature)[0])
    found = total([low] + [low + d] * n) - total([low])
    closed = d * n * math.exp(-d / temperature) / (1 + n * math.exp(-d / temperature))
    assert found == pytest.approx(closed)
    assert found == pytest.approx(gain, abs=0.006)


def test_one_more_step_gains_little_under_the_minimum() -> None:
    gains = []
    for k in range(1, 200):
        d = k / 100
        p = [-1.0, min(-1.0 + d, 1.0)]
        before = sum(step_reward([0.0, 0.0], "min")[0])
        gains.append(sum(step_reward([0.0, *((x + 1) / 2 for x in p)], "min")[0]) - before)
    assert max(gains) <= 0.28 * 0.1
    assert max(gains) > 0.27 * 0.1


# --- the tokens that rewards lie on ----------------------------------------------------------------------------------------


def test_rewards_lie_on_step_ends_and_the_outcome_on_the_last_token() -> None:
    found, own = rewards.on_tokens(Reward(1.0, (0.3, -0.2)), (2, 5), 6)
    assert found == pytest.approx([0, 0.3, 0, 0, -0.2, 1.0])
    assert own == [0.0] * 6
    # Truncated: the last step ends where the tokens end, and both fall on the last action.
    found, _ = rewards.on_tokens(Reward(0.1, (0.3, -0.2)), (2, 5), 5)
    assert found == pytest.approx([0, 0.3, 0, 0, -0.1])


def test_a_steps_own_reward_is_on_all_of_its_tokens_and_no_others() -> None:
    found, own = rewards.on_tokens(Reward(1.0, (), (0.5, -0.5)), (2, 5), 6)
    assert found == [0, 0, 0, 0, 0, 1.0]
    assert own == [0.5, 0.5, -0.5, -0.5, -0.5, -0.5]  # the end of the sequence belongs to the last step
    assert rewards.on_tokens(Reward(1.0), (), 1) == ([1.0], [0.0])


# --- transforms and what is watched ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "penalty"), [(10, 0.0), (16, 0.0), (18, 0.5), (20, 1.0)])
def test_overlong_responses_are_penalised_linearly(length: int, penalty: float) -> None:
    earned = rewards.overlong(20, 4)(rollout(length), Reward(1.0, (0.1, 0.2)))
    assert earned == Reward(1.0 - penalty, (0.1, 0.2))


def test_repetition_overrides_a_right_answer() -> None:
    transform = rewards.refuse_repetition(0.5)
    assert transform(rollout(steps=("a", "b", "a")), Reward(1.0)) == Reward(1.0)
    assert transform(rollout(steps=("a", "a", "a", "b", "a")), Reward(1.0)) == Reward(-1.0)


def test_means_are_over_the_responses_that_have_a_number() -> None:
    some = [
        rewards.summary(rollout(6, ("a", "a")), Reward(1.0, (0.5, 0.25)), flawed=True),
        rewards.summary(rollout(4, ("a",)), Reward(1.0), flawed=False),
        rewards.summary(
            rollout(8, ("a", "b", "a", "a"), Outcome.UNPARSEABLE, truncated=True), Reward(0.0), flawed=True
        ),
    ]
    found = rewards.means(some)
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert (found["length"], found["length_right"], found["length_wrong"]) == (6.0, 5.0, 8.0)
    assert found["flawed_right"] == 0.5  # of right answers alone
    assert found["repeated_steps"] == pytest.approx((0.5 + 0 + 0.5) / 3)
    assert (found["truncated"], found["unparseable"]) == pytest.approx((1 / 3, 1 / 3))
    assert found["reward"] == pytest.approx((1.75 + 1.0 + 0.0) / 3)
    assert found["process_reward"] == 0.75
    assert found["steps"] == pytest.approx(7 / 3)
    assert rewards.repetition(()) == 0.0
