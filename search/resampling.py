"""Resampling until a verifier that errs accepts: what it can reach, and when to stop (arXiv:2411.17501).

A policy solves tasks of a type with probability r; the verifier accepts right answers with probability c (completeness) and
rejects wrong ones with probability s (soundness). In one attempt

    a = c r  right and accepted,    b = (1 - s)(1 - r)  wrong and accepted,    beta = 1 - a - b  rejected.

The first accepted answer is given; after K rejections none is. A right answer is worth 1, a wrong one -rho, none 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TaskType:
    """A share `prior` of tasks that the policy solves with probability `solve`."""

    prior: float
    solve: float
    completeness: float = 1.0
    soundness: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prior", "solve", "completeness", "soundness"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], found {getattr(self, name)}")

    @property
    def a(self) -> float:
        """Right and accepted."""
        return self.completeness * self.solve

    @property
    def b(self) -> float:
        """Wrong and accepted."""
        return (1 - self.soundness) * (1 - self.solve)

    @property
    def beta(self) -> float:
        """Rejected."""
        return 1 - self.a - self.b

    @property
    def accuracy_given_accept(self) -> float:
        """a / (a + b): it does not depend on how many attempts were made. NaN if nothing is ever accepted."""
        return self.a / (self.a + self.b) if self.a + self.b else math.nan


def ceiling(types: Sequence[TaskType]) -> float:
    """Accuracy with attempts without end: sum of p a / (a + b), over types of which something is accepted."""
    return sum(t.prior * t.accuracy_given_accept for t in types if t.a + t.b)


def accuracy_given_accept(types: Sequence[TaskType], attempts: int) -> float:
    """Share of right ones among the answers given after up to `attempts`: flat for one type, falling for a mixture.

    More attempts bring in more of the hard tasks, whose accepted answers are worse.
    """
    reach = [(t, _reached(t.beta, attempts)) for t in types]
    given = sum(t.prior * (t.a + t.b) * n for t, n in reach)
    return sum(t.prior * t.a * n for t, n in reach) / given if given else math.nan


def utility(types: Sequence[TaskType], attempts: int, rho: float) -> float:
    """U(K) = sum of p (a - rho b) (1 - beta^K) / (1 - beta)."""
    return sum(t.prior * (t.a - rho * t.b) * _reached(t.beta, attempts) for t in types)


def marginal_utility(types: Sequence[TaskType], attempt: int, rho: float) -> float:
    """g(k) = sum of p beta^(k-1) (a - rho b): what attempt k (from 1) adds."""
    return sum(t.prior * t.beta ** (attempt - 1) * (t.a - rho * t.b) for t in types)


def best_attempts(types: Sequence[TaskType], rho: float, most: int = 10_000) -> int:
    """K* in 0 .. `most` with the highest utility, the smallest of those that tie: when to stop asking."""
    best, since = 0, 0.0  # gained since the best: a tiny gain would be lost in the utility itself
    for k in range(1, most + 1):
        since += marginal_utility(types, k, rho)
        if since > 0:
            best, since = k, 0.0
    return best


def best_attempts_of_two(good: TaskType, bad: TaskType, rho: float) -> float:
    """K* in closed form where a > rho b for `good` and a < rho b for `bad`; infinite where the gain never turns.

    1 + floor(ln[p1 (a1 - rho b1) / (p2 (rho b2 - a2))] / ln(beta2 / beta1)) if the first attempt gains, else 0.
    """
    gain, loss = good.prior * (good.a - rho * good.b), bad.prior * (rho * bad.b - bad.a)
    if gain <= 0 or loss <= 0:
        raise ValueError("the closed form needs one type that is worth an attempt and one that is not")
    if gain <= loss:
        return 0
    if bad.beta <= good.beta:  # rejections do not make the bad type likelier
        return math.inf
    if good.beta == 0:
        return 1
    return 1 + math.floor(math.log(gain / loss) / math.log(bad.beta / good.beta))


def belief(types: Sequence[TaskType], rejections: int) -> list[float]:
    """Probability of each type after so many rejections: p beta^k, normalised."""
    weights = [t.prior * t.beta**rejections for t in types]
    total = sum(weights)
    return [w / total if total else math.nan for w in weights]


def _reached(beta: float, attempts: int) -> float:
    """Expected number of attempts made, (1 - beta^K) / (1 - beta)."""
    return float(attempts) if beta == 1 else (1 - beta**attempts) / (1 - beta)


@dataclass(frozen=True)
class Attempts:
    """What up to K attempts gave, over all tasks."""

    attempts: int
    utility: float
    answered: float  # share of tasks with an accepted answer
    accuracy: float  # share of tasks with a right one
    accuracy_given_accept: float  # NaN if nothing was accepted
    mean_attempts: float  # made before an answer or the end


def random_order_curve(pools: Sequence[tuple[int, int, int]], rho: float, most: int) -> list[Attempts]:
    """Measured utility for K = 1 .. `most` from pools (samples, accepted ones, right among the accepted) of the tasks.

    The paper's notebooks draw 1000 random orders of each pool and take the first accepted sample within K; this is the
    mean over all orders. With m of n accepted, P(none in K) = C(n - m, K) / C(n, K), and whichever comes first is any
    accepted one alike. Sampling is without replacement, so K beyond the smallest pool has no more to draw from there.
    """
    for n, m, right in pools:
        if not 0 <= right <= m <= n or n < 1:
            raise ValueError(f"0 <= right <= accepted <= samples must hold, found {right}, {m}, {n}")
    curve = []
    none = [1.0] * len(pools)  # P(nothing accepted so far)
    made = 0.0
    for k in range(1, most + 1):
        made += sum(p for p, (n, _, _) in zip(none, pools, strict=True) if k <= n) / len(pools)
        none = [
            p * ((n - m - k + 1) / (n - k + 1) if k <= n else 1.0) if p else 0.0
            for p, (n, m, _) in zip(none, pools, strict=True)
        ]
        answered = sum(1 - p for p in none) / len(pools)
        good = sum((1 - p) * right / m for p, (_, m, right) in zip(none, pools, strict=True) if m) / len(pools)
        curve.append(
            Attempts(
                attempts=k,
                utility=good - rho * (answered - good),
                answered=answered,
                accuracy=good,
                accuracy_given_accept=good / answered if answered else math.nan,
                mean_attempts=made,
            )
        )
    return curve
