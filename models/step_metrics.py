"""How good step scores and verdicts are: AUROC, first errors, F1, correlation, calibration. Pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive scores above a negative, ties counting half; NaN if one of the classes is empty."""
    s, y = np.asarray(scores, dtype=float), np.asarray(positive, dtype=bool)
    n_pos, n_neg = int(y.sum()), int((~y).sum())
    if not n_pos or not n_neg:
        return float("nan")
    _, inverse, counts = np.unique(s, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mean rank of tied scores, from 1
    return float((ranks[y].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def predicted_first_error(scores: Sequence[float], threshold: float = 0.5) -> int:
    """0-based index of the first step whose score is under `threshold`; -1 if there is none (ProcessBench's protocol)."""
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def first_error_f1(predicted: Sequence[int | None], label: Sequence[int]) -> dict[str, float]:
    """ProcessBench's F1 (arXiv:2412.06559): harmonic mean of the two accuracies, 0 where both are 0.

    `accuracy_error`: share of flawed solutions (label != -1) whose first error is found exactly; `accuracy_correct`: share of
    sound ones (label == -1) with prediction -1. An empty group has accuracy 0. None, a verdict that could not be read, is wrong.
    """
    flawed = [p == t for p, t in zip(predicted, label, strict=True) if t != -1]
    sound = [p == t for p, t in zip(predicted, label, strict=True) if t == -1]
    error = sum(flawed) / len(flawed) if flawed else 0.0
    correct = sum(sound) / len(sound) if sound else 0.0
    f1 = 2 * error * correct / (error + correct) if error + correct else 0.0
    return {"f1": f1, "accuracy_error": error, "accuracy_correct": correct}


def expected_calibration_error(scores: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> float:
    """Mean over equal-width bins, weighted by their counts, of |mean score - mean outcome|; NaN of nothing."""
    if not len(scores):
        return float("nan")
    s, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    index = np.minimum((s * bins).astype(int), bins - 1)
    gaps = [
        abs(s[index == b].mean() - y[index == b].mean()) * (index == b).sum() for b in range(bins) if (index == b).any()
    ]
    return float(sum(gaps) / len(s))


def reliability(scores: Sequence[float], outcomes: Sequence[float], bins: int = 10) -> list[tuple[float, float, int]]:
    """(mean score, mean outcome, count) of each equal-width bin of [0, 1] that holds a score: what the ECE sums up."""
    s, y = np.asarray(scores, dtype=float), np.asarray(outcomes, dtype=float)
    index = np.clip((s * bins).astype(int), 0, bins - 1)
    return [
        (float(s[index == b].mean()), float(y[index == b].mean()), int((index == b).sum()))
        for b in range(bins)
        if (index == b).any()
    ]


def binary_f1(predicted: Sequence[bool], truth: Sequence[bool]) -> float:
    """F1 of the class True: 2 TP / (2 TP + FP + FN); 0 without a true positive, NaN of nothing."""
    if not len(predicted):
        return float("nan")
    p, y = np.asarray(predicted, dtype=bool), np.asarray(truth, dtype=bool)
    hits = int((p & y).sum())
    return 2 * hits / (int(p.sum()) + int(y.sum())) if hits else 0.0


def prm_score(step_right: Sequence[bool], truth: Sequence[bool]) -> dict[str, float]:
    """PRMBench's scores over steps (arXiv:2501.03124): `f1` of right steps, `negative_f1` of wrong ones, and `prm_score`,
    0.5 f1 + 0.5 negative_f1."""
    f1 = binary_f1(step_right, truth)
    negative = binary_f1([not s for s in step_right], [not t for t in truth])
    return {"f1": f1, "negative_f1": negative, "prm_score": 0.5 * f1 + 0.5 * negative}


def matthews(predicted: Sequence[bool], truth: Sequence[bool]) -> float:
    """Matthews' correlation: (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)); 0 where a factor is 0, NaN of nothing."""
    if not len(predicted):
        return float("nan")
    p, y = np.asarray(predicted, dtype=bool), np.asarray(truth, dtype=bool)
    tp, tn, fp, fn = (int(x.sum()) for x in (p & y, ~p & ~y, p & ~y, ~p & y))
    below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN if one side is constant or there are fewer than two pairs."""
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values cannot be paired")
    if len(a) < 2 or not a.std() or not b.std():
        return float("nan")
    return float(((a - a.mean()) * (b - b.mean())).mean() / (a.std() * b.std()))


def lowest_is_last(scores: Sequence[float]) -> bool:
    """Whether the last step alone has the lowest score: the sign of a process model that judges outcomes (arXiv:2501.07301)."""
    return len(scores) > 1 and scores[-1] < min(scores[:-1])
