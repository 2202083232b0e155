"""How good step scores are: AUROC, first-error F1, calibration. Pure functions of numbers."""

from __future__ import annotations

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


def first_error_f1(predicted: Sequence[int], label: Sequence[int]) -> dict[str, float]:
    """ProcessBench's F1 (arXiv:2412.06559): harmonic mean of the two accuracies, 0 where both are 0.

    `accuracy_error`: share of flawed solutions (label != -1) whose first error is found exactly; `accuracy_correct`: share of
    sound ones (label == -1) with prediction -1. An empty group has accuracy 0.
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
