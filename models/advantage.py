"""Values of prefixes into progress: the best-of-K prover, advantages, effective rewards (PAV, arXiv:2410.08146). Pure functions.

`values` are those of the empty prefix and of each step's end, [1 + T] as `RewardModel.score_with_root` gives them, all of one
model and one layout: differences of scores of different models, or of one that never saw an empty prefix, say nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def best_of_k_value(value: float, k: int) -> float:
    """The value under the best of k attempts of a policy whose own value is `value`: 1 - (1 - Q)^k, for Q in [0, 1].

    arXiv:2410.08146 section 3.4: the prover BoK(pi), which needs no model of its own. k = 1 is the policy itself.
    """
    if k < 1:
        raise ValueError(f"k must be 1 or more, found {k}")
    if not 0 <= value <= 1:
        raise ValueError(f"a value must lie in [0, 1], found {value}")
    return 1.0 - (1.0 - value) ** k


def advantages(values: Sequence[float]) -> list[float]:
    """The progress of each step, [T] from values [1 + T]: A_t = V_t - V_(t-1).

    Their sum telescopes to V_T - V_0: summed over a solution they are the outcome again, so each step takes its own alone
    (arXiv:2410.08146 Eq. 4). A step that changes no value, such as a line written twice, has advantage 0.
    """
    return [after - before for before, after in itertools.pairwise(values)]


def effective_rewards(
    values: Sequence[float], *, alpha: float, k: int = 4, prover: Sequence[float] | None = None
) -> list[float]:
    """Q_t + alpha A^mu_t for each step, [T] from values [1 + T] of the policy (arXiv:2410.08146 Eq. 5).

    The prover mu is the best of `k` attempts of the policy, or another policy whose values are `prover` [1 + T].
    """
    if prover is None:
        prover = [best_of_k_value(value, k) for value in values]
    if len(prover) != len(values):
        raise ValueError(f"the prover's values must be as many as the policy's, found {len(prover)} and {len(values)}")
    return [q + alpha * a for q, a in zip(values[1:], advantages(prover), strict=True)]
