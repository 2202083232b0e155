"""How corrections are measured: flips between attempts, votes over turns, edits, and what a critic finds. Numbers and texts alone.

A chain is a list of attempts at one problem, the first before any correction. A chain that ended early keeps its last answer at
every later turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def at_turn(values: Sequence[bool], turn: int) -> bool:
    """What holds of a chain at a turn (from 0)."""
    return values[min(turn, len(values) - 1)]


def flips(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """Accuracies before and after, their difference and its two parts, all over all M chains (as arXiv:2409.12917 counts them).

    delta = wrong_to_right - right_to_wrong. `fix_rate` and `break_rate` are the same flips over the chains that could have them
    (nan if there is none): 5.8 points can be a fix rate of 14.5 %.
    """
    pairs = list(zip(before, after, strict=True))
    count = len(pairs)
    first, second = sum(before), sum(after)
    fixed = sum(b and not a for a, b in pairs)
    broken = sum(a and not b for a, b in pairs)
    return {
        "before": first / count,
        "after": second / count,
        "delta": (second - first) / count,
        "wrong_to_right": fixed / count,
        "right_to_wrong": broken / count,
        "fix_rate": fixed / (count - first) if count > first else math.nan,
        "break_rate": broken / first if first else math.nan,
    }


def majority_answer(answers: Sequence[str | None]) -> str | None:
    """The answer most attempts give; of equals the one that came first. Unreadable answers (None) never vote."""
    votes: dict[str, int] = {}
    for answer in answers:
        if answer is not None:
            votes[answer] = votes.get(answer, 0) + 1
    return max(votes, key=lambda a: votes[a]) if votes else None  # max and dict keep the order of first occurrence


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements of characters that turn `a` into `b`.

    A row of the table at a time: d_j = min(c_j, d_(j-1) + 1) is a running minimum of c_j - j.
    """
    x, y = np.array([ord(c) for c in a], dtype=np.int64), np.array([ord(c) for c in b], dtype=np.int64)
    steps = np.arange(len(y) + 1)
    row = steps.copy()
    for number, character in enumerate(x, 1):
        candidates = np.empty_like(row)
        candidates[0] = number
        candidates[1:] = np.minimum(row[1:] + 1, row[:-1] + (y != character))
        row = np.minimum.accumulate(candidates - steps) + steps
    return int(row[-1])


def edit_ratio(a: str, b: str) -> float:
    """Edit distance over the lengths of both, in [0, 1]; 0 for equal texts."""
    return edit_distance(a, b) / (len(a) + len(b)) if a or b else 0.0


def detection(said_wrong: Sequence[bool | None], flawed: Sequence[bool]) -> dict[str, float]:
    """Precision, recall, F1, balanced accuracy and false-alarm rate of verdicts, where positive is a flawed response.

    A verdict that cannot be read counts as "not wrong", and its share is `unreadable`. nan where a share is of nothing.
    """
    said = [s is True for s in said_wrong]
    true = sum(s and f for s, f in zip(said, flawed, strict=True))
    positive, negative = sum(flawed), len(flawed) - sum(flawed)
    ratio = lambda a, b: a / b if b else math.nan
    alarms = sum(said) - true
    return {
        "precision": ratio(true, sum(said)),
        "recall": ratio(true, positive),
        "f1": ratio(2 * true, sum(said) + positive),
        "balanced_accuracy": (ratio(true, positive) + 1 - ratio(alarms, negative)) / 2,
        "false_alarms": ratio(alarms, negative),
        "unreadable": ratio(sum(s is None for s in said_wrong), len(said)),
    }


def location(said: Sequence[int | None], first_error: Sequence[int | None]) -> dict[str, float]:
    """Exact matches of the first error on flawed responses, "no error" on others, and their harmonic mean (ProcessBench's F1)."""
    hits = [s == e for s, e in zip(said, first_error, strict=True)]
    flawed = [h for h, e in zip(hits, first_error, strict=True) if e is not None]
    sound = [h for h, e in zip(hits, first_error, strict=True) if e is None]
    share = lambda some: sum(some) / len(some) if some else math.nan
    a, b = share(flawed), share(sound)
    return {"located": a, "cleared": b, "location_f1": 2 * a * b / (a + b) if a + b > 0 else (a + b)}


def gated_gain(first: Sequence[bool], said_wrong: Sequence[bool | None], after: Sequence[bool]) -> tuple[float, float]:
    """(gain of refining only what the critic calls wrong as measured; the same from its parts).

    (1 - Acc) recall h_TP - Acc FPR harm_FP, with h_TP the fix rate on wrong answers that the critic found and harm_FP the
    break rate on right ones that it called wrong. They are the same number if nothing was miscounted.
    """
    n = len(first)
    gated = [s is True for s in said_wrong]
    measured = sum((b if g else a) - a for a, b, g in zip(first, after, gated, strict=True)) / n
    true = [b for a, b, g in zip(first, after, gated, strict=True) if g and not a]
    false = [not b for a, b, g in zip(first, after, gated, strict=True) if g and a]
    accuracy = sum(first) / n
    part = lambda share, total, some: share * len(some) / total * (sum(some) / len(some)) if some else 0.0
    return measured, part(1 - accuracy, n - sum(first), true) - part(accuracy, sum(first), false)
