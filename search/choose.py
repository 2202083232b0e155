"""Choosing among samples: majority, best-of-N, weighted best-of-N; and exact estimators of their curves from one pool.

Answers are canonical forms; None is an answer that could not be read, and never wins a vote. Ties give expected credit: the
share of right answers among the tied ones (first-come would reward the order of sampling).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LARGEST_EXACT = 1000  # samples of a pool for `majority_of_k`: beyond, numbers of draws do not fit into a float


def tally(answers: Sequence[str | None], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Answer -> its votes, or its total weight, in the order in which the answers came up."""
    totals: dict[str, float] = {}
    for i, answer in enumerate(answers):
        if answer is not None:
            totals[answer] = totals.get(answer, 0.0) + (1.0 if weights is None else weights[i])
    return totals


def vote_credit(answers: Sequence[str | None], right: Sequence[bool], weights: Sequence[float] | None = None) -> float:
    """Expected correctness, in [0, 1], of the answer with the greatest total weight (majority if `weights` is None).

    Self-consistency (arXiv:2203.11171) and weighted best-of-N (arXiv:2206.02336).
    """
    totals = tally(answers, weights)
    if not totals:
        return 0.0
    is_right = {a: any(r for other, r in zip(answers, right, strict=True) if other == a) for a in totals}
    # Sums of floats in another order differ in the last digits: equal votes must stay ties.
    best = max(totals.values())
    winners = [a for a, total in totals.items() if np.isclose(total, best, rtol=1e-9, atol=1e-12)]
    return sum(is_right[a] for a in winners) / len(winners)


def best_credit(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Expected correctness of the sample with the highest score; tied samples share the credit."""
    if not scores:
        return 0.0
    best = max(scores)
    winners = [r for s, r in zip(scores, right, strict=True) if s == best]
    return sum(winners) / len(winners)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of them right, contain a right one: 1 - C(n-c, k) / C(n, k) (arXiv:2107.03374)."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"0 <= c <= n and 1 <= k <= n must hold, found n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def best_of_k(scores: Sequence[float], right: Sequence[float], k: int) -> float:
    """Expected correctness (or whatever `right` holds of a sample) of the best-scored of k samples drawn from n without
    replacement.

    With samples ranked by score, rank i is the best of a draw with probability C(n - i, k - 1) / C(n, k); ranks of equal score
    share their samples' mean correctness.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"1 <= k <= n must hold, found n={n}, k={k}")
    scores_, right_ = np.asarray(scores, dtype=float), np.asarray(right, dtype=float)
    shared = {s: right_[scores_ == s].mean() for s in set(scores_.tolist())}
    order = np.argsort(-scores_, kind="stable")
    probability, total = k / n, 0.0  # C(n-1, k-1) / C(n, k)
    for i in range(1, n - k + 2):
        total += probability * shared[float(scores_[order[i - 1]])]
        if n - i > 0:
            probability *= (n - i - k + 1) / (n - i)
    return float(total)


def majority_of_k(answers: Sequence[str | None], right: Sequence[bool]) -> list[float]:
    """Expected correctness [n] of the majority vote of k = 1, 2 ... n samples drawn without replacement from the n given; exact.

    Sums over the winning count m: with n_a samples of answer a, a draw in which t answers (u of them right) have m votes each and
    all others fewer contributes u / t. The numbers of such draws of size k are the coefficients of

        prod_a (sum_{c < m} C(n_a, c) x^c  +  C(n_a, m) x^m s^[a right] w^[a wrong])  prod_None (1 + x)

    and are divided by C(n, k). A draw of unreadable answers alone is wrong.
    """
    n = len(answers)
    counts: dict[str, int] = {}
    is_right: dict[str, bool] = {}
    for answer, good in zip(answers, right, strict=True):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
            is_right[answer] = is_right.get(answer, False) or good
    unread = n - sum(counts.values())
    credit = np.zeros(n + 1)
    for m in range(1, max(counts.values(), default=0) + 1):
        # An answer with fewer than m samples cannot tie, and at most `able` can.
        able = {good: sum(c >= m and is_right[a] == good for a, c in counts.items()) for good in (True, False)}
        draws = np.zeros((n + 1, able[True] + 1, able[False] + 1))  # [size of the draw, right ties, wrong ties]
        draws[:, 0, 0] = [math.comb(unread, c) for c in range(n + 1)]
        for answer, count in counts.items():
            made = np.zeros_like(draws)
            for c in range(min(m - 1, count) + 1):
                made[c:] += math.comb(count, c) * draws[: n + 1 - c]
            if count >= m:
                ways = math.comb(count, m) * draws[: n + 1 - m]
                if is_right[answer]:
                    made[m:, 1:] += ways[:, :-1]
                else:
                    made[m:, :, 1:] += ways[:, :, :-1]
            draws = made
        u, w = np.ogrid[: able[True] + 1, : able[False] + 1]
        credit += (draws * np.where(u + w, u / np.maximum(u + w, 1), 0.0)).sum((1, 2))
    return [float(credit[k] / math.comb(n, k)) for k in range(1, n + 1)]


def weighted_of_k(
    answers: Sequence[str | None],
    right: Sequence[bool],
    weights: Sequence[float],
    k: int,
    *,
    subsets: int = 200,
    seed: int = 0,
) -> float:
    """Expected correctness of the weighted vote of k of n samples: exact for k = 1 and k = n, else the mean of `vote_credit` over
    `subsets` random draws (no closed form is known; arXiv:2407.21787 takes 100)."""
    n = len(answers)
    if not 1 <= k <= n:
        raise ValueError(f"1 <= k <= n must hold, found n={n}, k={k}")
    if k == n:
        return vote_credit(answers, right, weights)
    names = sorted({a for a in answers if a is not None})
    if not names:
        return 0.0
    good = np.array([any(r for a, r in zip(answers, right, strict=True) if a == name) for name in names])
    if k == 1:
        return float(sum(good[names.index(a)] for a in answers if a is not None) / n)
    votes = np.array([[w * (a == name) for name in names] for a, w in zip(answers, weights, strict=True)])  # [n, A]
    present = np.array([[a == name for name in names] for a in answers])
    drawn = np.random.default_rng(seed).random((subsets, n)).argsort(1)[:, :k]
    mask = np.zeros((subsets, n))
    np.put_along_axis(mask, drawn, 1.0, axis=1)
    totals = np.where(mask @ present > 0, mask @ votes, -np.inf)  # [subsets, A]
    best = totals.max(1, keepdims=True)
    winners = np.isclose(totals, best, rtol=1e-9, atol=1e-12) & np.isfinite(totals)
    return float(((winners * good).sum(1) / np.maximum(winners.sum(1), 1)).mean())


def paired_bootstrap(
    values: Sequence[float], baseline: Sequence[float] | None = None, *, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean, low, high) of `values`, or of values - baseline problem by problem: a 95 % percentile bootstrap over problems."""
    x = np.asarray(values, dtype=float)
    if baseline is not None:
        x = x - np.asarray(baseline, dtype=float)
    if not len(x):
        raise ValueError("no values to resample")
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 500):  # in pieces, so that memory does not grow with the number of problems
        size = min(500, resamples - start)
        means[start : start + size] = x[rng.integers(0, len(x), (size, len(x)))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(x.mean()), float(low), float(high)
