"""The stage that asks what resampling until a verifier accepts can reach, and when to stop (arXiv:2411.17501)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ..basics import UserError, fold_seed
from ..data_gen.rows import Solution
from ..data_gen.store import read_about, read_rows
from ..models.ledger import Ledger
from ..models.reward import RewardModel, aggregate
from ..search.resampling import Attempts, TaskType, best_attempts, random_order_curve
from . import options_eval
from .evaluate import bootstrap_groups
from .evaluate_claims import Results
from .making import tell_cut_steps
from .options import required


def evaluate_resampling(config: options_eval.EvaluateResampling, out: Path) -> None:
    """Accuracy of what is accepted by attempts, ceilings, and stopping by the formula against never stopping."""
    if not config.policies:
        raise UserError("policies is missing: name -> Solution rows, several of each problem")
    if not config.accept_wrong:
        required(config, "reward")
    verifier = RewardModel.load(config.reward, dtype=config.dtype) if config.reward else None
    results = Results(config.seed)
    for name, path in config.policies.items():
        rows = read_rows(path, Solution)
        cost = Ledger(**read_about(path)["ledger"]) if Path(path).is_dir() else Ledger()
        before = verifier.ledger.copy() if verifier is not None else Ledger()
        accepted = _accepted(config, rows, verifier)
        if verifier is not None:
            cost = cost + (verifier.ledger - before)
        pools: dict[str, list[tuple[bool, bool]]] = {}
        for row, took in zip(rows, accepted, strict=True):
            pools.setdefault(row.problem_id, []).append((row.right, took))
        _measure(config, results, name, path, pools, cost)
    if verifier is not None:
        tell_cut_steps(verifier)
    results.write(out)


def _accepted(
    config: options_eval.EvaluateResampling, rows: Sequence[Solution], verifier: RewardModel | None
) -> list[bool]:
    """Whether the verifier accepts each row; equal solutions of a problem always alike."""
    if verifier is None:
        drawn = [fold_seed(config.seed, "accept", row.problem_id, *row.steps) / 2**63 for row in rows]
        return [row.right or d < config.accept_wrong for row, d in zip(rows, drawn, strict=True)]
    how = config.aggregation or verifier.step_format.aggregation
    scores = verifier.score([(row.prompt, row.steps) for row in rows])
    return [aggregate(one, how) >= config.threshold for one in scores]


def counted(pool: Sequence[tuple[bool, bool]]) -> tuple[int, int, int]:
    """(samples, accepted ones, right among the accepted) of (right, accepted) pairs."""
    return len(pool), sum(took for _, took in pool), sum(right and took for right, took in pool)


def task_type(pool: Sequence[tuple[bool, bool]], prior: float) -> TaskType:
    """A problem as a type of its own: the policy's rate of right samples and the verifier's two rates, as counted.

    Where there is nothing to count, no right sample or no wrong one, the verifier is taken to make no error.
    """
    right = [took for good, took in pool if good]
    wrong = [took for good, took in pool if not good]
    return TaskType(
        prior,
        len(right) / len(pool),
        sum(right) / len(right) if right else 1.0,
        1 - sum(wrong) / len(wrong) if wrong else 1.0,
    )


def _measure(
    config: options_eval.EvaluateResampling,
    results: Results,
    name: str,
    path: str,
    pools: dict[str, list[tuple[bool, bool]]],
    cost: Ledger,
) -> None:
    fewest = min(map(len, pools.values()))
    most = config.attempts or fewest // 4
    if fewest < 2 or not 1 <= most <= fewest // 2:
        raise UserError(
            f"{path}: its problem with the fewest samples has {fewest}, and attempts ({most}) must lie between 1 and half of them"
        )
    counts = {problem: counted(pool) for problem, pool in pools.items()}
    results.mean(
        f"{name}/sample", "accuracy", {p: sum(r for r, _ in pool) / len(pool) for p, pool in pools.items()}, cost
    )
    # With attempts without end a problem of which anything is accepted is answered, with a / (a + b) right.
    results.mean(f"{name}/ceiling", "accuracy", {p: good / m if m else 0.0 for p, (_, m, good) in counts.items()}, cost)
    for good, metric in ((True, "accepted_right"), (False, "accepted_wrong")):
        shares = {p: [took for right, took in pool if right is good] for p, pool in pools.items()}
        results.mean(name, metric, {p: sum(s) / len(s) for p, s in shares.items() if s}, cost)
    curves = {p: random_order_curve([one], 0.0, most) for p, one in counts.items()}
    for k in sorted({2**i for i in range(most.bit_length()) if 2**i <= most} | {most}):
        arm, at = f"{name}/up_to_{k}", [curve[k - 1] for curve in curves.values()]
        results.mean(arm, "accuracy", {p: curve[k - 1].accuracy for p, curve in curves.items()}, cost)
        results.mean(arm, "answered", {p: curve[k - 1].answered for p, curve in curves.items()}, cost)

        def given(some: Sequence[int], at: Sequence[Attempts] = at) -> float:
            answered = sum(at[i].answered for i in some)
            return sum(at[i].accuracy for i in some) / answered if answered else math.nan

        interval = bootstrap_groups([[i] for i in range(len(at))], given, results.seed)
        results.number(arm, "accuracy_given_accept", interval, len(at), cost)
    # The rule is made of one half of the samples and measured on the other.
    types = [task_type(pool[::2], 1 / len(pools)) for pool in pools.values()]
    fresh = {p: random_order_curve([counted(pool[1::2])], 0.0, most) for p, pool in pools.items()}
    near = []
    for rho in config.rhos:
        value = lambda curve, k, rho=rho: curve[k - 1].accuracy * (1 + rho) - rho * curve[k - 1].answered if k else 0.0
        means = [sum(value(curve, k) for curve in fresh.values()) for k in range(most + 1)]
        told, found = best_attempts(types, rho, most), max(range(most + 1), key=means.__getitem__)
        near.append(abs(told - found) <= 1)
        arm = f"{name}/rho_{rho:g}"
        for rule, k in (("formula", told), ("measured", found)):
            results.number(f"{arm}/{rule}", "best_attempts", float(k), len(fresh), cost)
        for rule, k in (("formula", told), ("once", 1), ("never_stop", most)):
            results.mean(f"{arm}/{rule}", "utility", {p: value(curve, k) for p, curve in fresh.items()}, cost)
    if near:
        results.number(name, "stops_near", sum(near) / len(near), len(near), cost)
