"""What a sampled solution earns: its outcome, its steps, and what is watched because rewards are hacked. No tensors, no models.

A reward has three parts. `outcome` lies on the last token. `steps` lie on the last token of each step and are summed over the
future, as rewards are. `own` belong to one step alone: they are added to the advantages of its tokens and to no other's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..tasks.base import Outcome, Problem, Verdict

Form = Literal["none", "sum", "difference", "clip", "delta", "min", "pav"]
FORMS = get_args(Form)


@dataclass(frozen=True)
class Rollout:
    """One sampled response. `step_ends[k]` counts its ids up to and including the separator of step k."""

    problem: Problem
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]  # of the engine, under the sampling distribution
    text: str
    steps: tuple[str, ...]
    step_ends: tuple[int, ...]
    truncated: bool
    verdict: Verdict


@dataclass(frozen=True)
class Reward:
    """Of one response: `steps` and `own` have one entry a step, or none."""

    outcome: float
    steps: tuple[float, ...] = ()
    own: tuple[float, ...] = ()


# Later methods are one of these: calibrated rewards (InfAlign), stated confidence (SaySelf), penalties (T1).
RewardTransform = Callable[[Rollout, Reward], Reward]


def outcome_reward(verdict: Verdict, partial: float) -> float:
    """1 for a right answer, `partial` for one that was read and is wrong, 0 if none was read (ReFT, arXiv:2401.08967).

    A check that ran out of time says nothing and earns nothing.
    """
    if verdict.right:
        return 1.0
    return partial if verdict.outcome is Outcome.WRONG else 0.0


def step_reward(
    scores: Sequence[float],
    form: str,
    *,
    coefficient: float = 1.0,
    temperature: float = 0.1,
    margin: float = 0.5,
    prover_k: int = 1,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(rewards on step ends [K], rewards of each step's own [K]) from scores P_0 (of the prompt), P_1 ... P_K in [0, 1].

    `sum`          r_k = c P_k: the return grows with the number of steps, which a policy finds out.
    `difference`   r_k = c (P_k - P_{k-1}): sums to c (P_K - P_0) whatever the number of steps.
    `clip`         r_k = c min(P_k - margin, 0): a step can only cost (arXiv:2410.15115; formula not checked against the paper).
    `delta`        r_k = c (P_k - P_{k+1}), r_K = c P_K: the return to go is c P_k (likewise).
    `min`          r_k = c w_k p_k, p = 2P - 1, w = softmax(-p / temperature): the sum is near c min p (PURE, arXiv:2504.15275).
    `pav`          own_k = c (Q_k - Q_{k-1}), Q = 1 - (1 - P)^prover_k, the closed form of the best of K samples: the advantage of
                   a prover (arXiv:2410.08146 Eq. 5). It is not summed over the future: that sum would be the outcome again.
    """
    after = list(scores[1:])
    if form == "none" or not after:
        return (), ()
    if form == "pav":
        q = [1 - (1 - p) ** prover_k for p in scores]
        return (), tuple(coefficient * (b - a) for a, b in itertools.pairwise(q))
    if form == "sum":
        found = after
    elif form == "difference":
        found = [b - a for a, b in itertools.pairwise(scores)]
    elif form == "clip":
        found = [min(p - margin, 0.0) for p in after]
    elif form == "delta":
        found = [a - b for a, b in zip(after, [*after[1:], 0.0], strict=True)]
    elif form == "min":
        p = [2 * s - 1 for s in after]
        least = min(p)
        weights = [math.exp((least - x) / temperature) for x in p]
        found = [w / sum(weights) * x for w, x in zip(weights, p, strict=True)]
    else:
        raise ValueError(f"process_form must be one of {', '.join(FORMS)}, found {form!r}")
    return tuple(coefficient * r for r in found), ()


def on_tokens(reward: Reward, step_ends: Sequence[int], length: int) -> tuple[list[float], list[float]]:
    """(rewards [length], own [length]) of each token of a response.

    The outcome lies on the last token, truncated or not. What follows the last step (the end of the sequence) belongs to it.
    """
    rewards, own = [0.0] * length, [0.0] * length
    if length:
        rewards[-1] += reward.outcome
    begin = 0
    for k, end in enumerate(step_ends[: max(len(reward.steps), len(reward.own))]):
        if reward.steps:
            rewards[end - 1] += reward.steps[k]
        if reward.own:
            last = length if k == len(step_ends) - 1 else end
            own[begin:last] = [reward.own[k]] * (last - begin)
        begin = end
    return rewards, own


# --- transforms that ship --------------------------------------------------------------------------------------------------


def overlong(longest: int, buffer: int) -> RewardTransform:
    """DAPO's soft penalty (arXiv:2503.14476 Eq. 13): 0 up to longest - buffer tokens, then linear down to -1 at `longest`."""

    def transform(rollout: Rollout, reward: Reward) -> Reward:
        over = len(rollout.ids) - (longest - buffer)
        return dataclasses.replace(reward, outcome=reward.outcome - min(max(over / buffer, 0.0), 1.0))

    return transform


def refuse_repetition(most: float) -> RewardTransform:
    """An outcome of -1, right or not, if more than the share `most` of the steps repeat an earlier one (T1, arXiv:2501.11651)."""

    def transform(rollout: Rollout, reward: Reward) -> Reward:
        return dataclasses.replace(reward, outcome=-1.0) if repetition(rollout.steps) > most else reward

    return transform


# --- what is watched -------------------------------------------------------------------------------------------------------


def repetition(steps: Sequence[str]) -> float:
    """The share of steps that are equal to an earlier one; 0 of nothing."""
    return 1 - len(set(steps)) / len(steps) if steps else 0.0


def summary(rollout: Rollout, reward: Reward, flawed: bool | None) -> dict[str, float]:
    """The numbers of one response from which a rollout's metrics are means. `flawed`: an exact checker found a wrong step."""
    found = {
        "reward": reward.outcome + sum(reward.steps),
        "outcome_reward": reward.outcome,
        "accuracy": float(rollout.verdict.right),
        "length": float(len(rollout.ids)),
        "steps": float(len(rollout.steps)),
        "repeated_steps": repetition(rollout.steps),
        "truncated": float(rollout.truncated),
        "unparseable": float(rollout.verdict.answer is None),
    }
    found["length_right" if rollout.verdict.right else "length_wrong"] = found["length"]
    if reward.steps or reward.own:
        found["process_reward"] = sum(reward.steps) + sum(reward.own)
    if flawed is not None and rollout.verdict.right:
        found["flawed_right"] = float(flawed)
    return found


def means(summaries: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the responses that have it, in the order in which the names are sorted."""
    names = sorted({name for one in summaries for name in one})
    values = {name: [one[name] for one in summaries if name in one] for name in names}
    return {name: sum(v) / len(v) for name, v in values.items()}
