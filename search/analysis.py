"""What is read out of samples and searches: curves from one pool, the coverage law, difficulty, the choice of a strategy,
FLOPs.

Pure functions of numbers. A pool is the samples of one problem: answers (None unreadable), whether each is right, scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..basics import fold_seed
from .choose import pass_at_k

# --- coverage -----------------------------------------------------------------------------------------------------------


def coverage(counts: Sequence[tuple[int, int]], k: int) -> float:
    """Mean over problems (n samples, c right) of the probability that k samples contain a right one."""
    return sum(pass_at_k(n, c, k) for n, c in counts) / len(counts)


def chance_coverage(chances: Sequence[float], k: int) -> float:
    """Coverage of k blind guesses, each right with the problem's chance: mean of 1 - (1 - p)^k.

    Where answers can be guessed coverage grows by luck alone; what counts is how far it is above this.
    """
    return sum(1 - (1 - p) ** k for p in chances) / len(chances)


def answers_by_luck(answers: Mapping[str, Sequence[str | None]], gold: Mapping[str, str]) -> dict[str, float]:
    """Problem -> how often an answer to another problem is the right one here: the chance of a guess that knows the form alone.

    Every other problem counts once, whatever the number of its samples; 0 for a single problem.
    """
    share: dict[str, dict[str, float]] = {}
    total: dict[str, float] = {}
    for problem, some in answers.items():
        share[problem] = {a: some.count(a) / len(some) for a in set(some) if a is not None}
        for answer, part in share[problem].items():
            total[answer] = total.get(answer, 0.0) + part
    others = max(len(answers) - 1, 1)
    return {p: (total.get(gold[p], 0.0) - share[p].get(gold[p], 0.0)) / others for p in answers}


@dataclass(frozen=True)
class PowerLaw:
    """c(k) = exp(a k^b) with a, b < 0 (arXiv:2407.21787 Eq. 2), and how well it fits."""

    a: float
    b: float
    rmse: float  # of coverage, over the points used
    worst: float  # largest distance
    points: int
    left_out: int  # points with coverage 0 or 1, whose log(-log c) does not exist
    r2: float  # share of the variance of coverage over the points that it explains; NaN if coverage does not vary

    def __call__(self, k: float) -> float:
        return math.exp(self.a * k**self.b)


def fit_power_law(ks: Sequence[int], values: Sequence[float], iterations: int = 200) -> PowerLaw:
    """The law c(k) = exp(a k^b) with the least squares of coverage `values` at `ks`.

    Starts at the line through log(-log c) over log k and goes on by Levenberg-Marquardt in (log(-a), b). Raises
    ValueError where fewer than three points lie strictly between 0 and 1. Read `rmse` before you believe it: the paper
    reports tasks that do not follow the law.
    """
    kept = [(k, c) for k, c in zip(ks, values, strict=True) if 0 < c < 1]
    if len({k for k, _ in kept}) < 3:
        raise ValueError(f"a fit needs coverage strictly between 0 and 1 at three or more k, found {len(kept)}")
    x = np.log([k for k, _ in kept])
    y = np.array([c for _, c in kept])
    b, level = np.polyfit(x, np.log(-np.log(y)), 1)
    theta = np.array([level, b])  # level = log(-a)

    def predict(theta: np.ndarray) -> np.ndarray:
        return np.exp(-np.exp(theta[0] + theta[1] * x))

    damping, error = 1e-3, float(((predict(theta) - y) ** 2).sum())
    for _ in range(iterations):
        c = predict(theta)
        # d exp(-e^u) / du = c log c, with u = log(-a) + b log k.
        slope = c * np.log(np.maximum(c, 1e-300))
        jacobian = np.stack([slope, slope * x], axis=1)
        normal = jacobian.T @ jacobian
        step = np.linalg.lstsq(normal + damping * np.diag(np.diag(normal)), jacobian.T @ (y - c), rcond=None)[0]
        new = float(((predict(theta + step) - y) ** 2).sum())
        if new <= error:
            theta, damping = theta + step, damping / 3
            if error - new < 1e-16:
                break
            error = new
        else:
            damping *= 3
    distance = np.abs(predict(theta) - y)
    rmse = float(np.sqrt((distance**2).mean()))
    spread = float(((y - y.mean()) ** 2).mean())
    return PowerLaw(
        a=-math.exp(theta[0]),
        b=float(theta[1]),
        rmse=rmse,
        worst=float(distance.max()),
        points=len(kept),
        left_out=len(values) - len(kept),
        r2=1 - rmse**2 / spread if spread else math.nan,
    )


def log_spaced(most: int, points: int = 40) -> list[int]:
    """Up to `points` different whole numbers from 1 to `most`, evenly spaced on a logarithmic axis."""
    return sorted({round(most ** (i / max(points - 1, 1))) for i in range(points)})


# --- difficulty, and the strategy for each --------------------------------------------------------------------------------


def difficulty_levels(easiness: Mapping[str, float], levels: int = 5) -> dict[str, int]:
    """Problem -> level, 1 the easiest: quantiles of how easy the problems are (arXiv:2408.03314 section 3.2).

    With `easiness` the share of right samples these are oracle levels, with the mean score of a verifier predicted ones.
    A problem on a boundary belongs to the easier side; many equal values make levels of unequal size.
    """
    if levels < 1 or not easiness:
        raise ValueError(f"levels must be 1 or more, of some problems; found {levels} of {len(easiness)}")
    bounds = np.quantile(list(easiness.values()), [i / levels for i in range(1, levels)]).tolist()
    return {name: levels - sum(value >= bound for bound in bounds) for name, value in easiness.items()}


@dataclass(frozen=True)
class Chosen:
    """The cross-fitted choice: correctness of each problem under the strategy chosen for its level on the other fold."""

    values: dict[str, float]
    choices: dict[tuple[int, int], str]  # (fold that was measured, level) -> strategy


def compute_optimal(
    outcomes: Mapping[str, Mapping[str, float]], levels: Mapping[str, int], *, folds: int = 2, seed: int = 0
) -> Chosen:
    """Each level's best strategy, chosen on one fold of its problems and measured on the other (arXiv:2408.03314 Eq. 1).

    `outcomes` is strategy -> problem -> correctness in [0, 1], all at one budget. For every fold the strategy with the
    highest mean over the level's problems outside it is taken (the first of equals; over all problems outside the fold
    where the level has none there). Choosing and measuring on the same problems would take the maximum of noisy means,
    and flatter.
    """
    if not outcomes:
        raise ValueError("no strategy to choose from")
    names = list(outcomes)
    problems = sorted(levels)
    of_level: dict[int, list[str]] = {}
    for problem in problems:
        of_level.setdefault(levels[problem], []).append(problem)
    fold_of: dict[str, int] = {}
    for group in of_level.values():
        # Dealt out in a random order, so that every level has problems in every fold.
        for place, problem in enumerate(sorted(group, key=lambda p: fold_seed(seed, "fold", p))):
            fold_of[problem] = place % folds
    values: dict[str, float] = {}
    choices: dict[tuple[int, int], str] = {}
    for level, group in sorted(of_level.items()):
        for fold in range(folds):
            inside = [p for p in group if fold_of[p] == fold]
            outside = [p for p in group if fold_of[p] != fold] or [p for p in problems if fold_of[p] != fold]
            if not inside:
                continue
            mean = lambda name, some=outside or inside: sum(outcomes[name][p] for p in some) / len(some)
            best = choices[fold, level] = max(names, key=mean)
            values.update({p: outcomes[best][p] for p in inside})
    return Chosen(values, choices)


# --- cost ------------------------------------------------------------------------------------------------------------------


def forward_flops(parameters: float, tokens: int, context: int = 0, layers: int = 0, width: int = 0) -> float:
    """FLOPs of a forward pass over `tokens` tokens behind `context` that are cached: sum of 2 P + 4 L d (tokens seen).

    The second term is attention's: per layer 2 d for the scores and 2 d for the sum, for every token attended to, itself
    included. With `layers` or `width` 0 it is left out, as in the ledger.
    """
    attended = tokens * context + tokens * (tokens + 1) // 2
    return 2.0 * parameters * tokens + 4.0 * layers * width * attended


def samples_flops(parameters: float, prompt: int, generated: Sequence[int], layers: int = 0, width: int = 0) -> float:
    """FLOPs of sampling solutions of `generated` tokens each from one prompt, encoded once (arXiv:2407.21787 section 2.3)."""
    prefill = forward_flops(parameters, prompt, 0, layers, width)
    return prefill + sum(forward_flops(parameters, tokens, prompt, layers, width) for tokens in generated)


def scored_tokens(length: int, steps: int, *, cached: bool) -> float:
    """Tokens a reward model encodes while one solution of `length` tokens grows by `steps` equal steps, scored at each.

    With cached prefixes every token once; without, each prefix again: length (steps + 1) / 2.
    """
    return length if cached else length * (steps + 1) / 2


def inference_exchange(size_ratio: float, pretraining_over_inference: float) -> float:
    """How many times more inference a model may spend that a `size_ratio` times larger one would match in FLOPs.

    M + 3 (D_pre / D_inf)(M - 1) (arXiv:2408.03314 section 7): pretraining 6 P D_pre, inference 2 P D_inf.
    """
    return size_ratio + 3 * pretraining_over_inference * (size_ratio - 1)
