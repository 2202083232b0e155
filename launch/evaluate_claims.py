"""The stages that judge what claims are about: reward models side by side, values, labels and their cost, the toy of PAV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed, write_json
from ..data_gen.rows import Solution, StepLabels
from ..data_gen.store import read_about, read_rows
from ..models.advantage import advantages, best_of_k_value
from ..models.ledger import Ledger
from ..models.reward import RewardModel, aggregate
from ..models.step_metrics import auroc, first_error_f1, predicted_first_error
from ..search.choose import best_credit, paired_bootstrap, pass_at_k, vote_credit
from ..tasks.base import Problem, StepChecker, first_error
from ..tasks.load import load_task
from . import options_claims
from .claims import VALUES
from .evaluate import DETAILS, RESULTS, bootstrap_groups, record
from .evaluate_steps import up_to_first_error
from .making import tell_cut_steps
from .options import required


class Results:
    """Lines of results.json, and values problem by problem for those that are means over problems."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.records: list[dict[str, Any]] = []
        self.values: list[dict[str, Any]] = []

    def mean(self, arm: str, metric: str, values: dict[str, float], ledger: Ledger | None = None) -> None:
        """A mean over problems; problems without a value (NaN) are left out."""
        known = {problem: value for problem, value in values.items() if not math.isnan(value)}
        if known:
            interval = paired_bootstrap(list(known.values()), seed=self.seed)
            self.records.append(record(arm, metric, interval, len(known), self.seed, ledger))
            self.values.append({"arm": arm, "metric": metric, "values": known})

    def number(self, arm: str, metric: str, value: Any, n: int, ledger: Ledger | None = None) -> None:
        """A measure that is no mean over problems."""
        self.records.append(record(arm, metric, value, n, self.seed, ledger))

    def write(self, out: Path) -> None:
        write_json(out / DETAILS, {})
        write_json(out / VALUES, self.values)
        write_json(out / RESULTS, self.records)
        for line in self.records:
            value = "undefined" if line["value"] is None else f"{line['value']:.4g}"
            print(f"{line['arm']:32s} {line['metric']:24s} {value}")


# --- reward models -------------------------------------------------------------------------------------------------------


def evaluate_rewards(config: options_claims.EvaluateRewards, out: Path) -> None:
    """Best-of-N and weighted votes of each model and aggregation; ranking within problems; step measures against the checker."""
    required(config, "solutions")
    if not config.models:
        raise UserError("models is missing: name -> folder of a reward model")
    rows = [row for row in read_rows(config.solutions, Solution) if row.steps]
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.problem_id, []).append(i)
    cost = Ledger(**read_about(config.solutions)["ledger"]) if Path(config.solutions).is_dir() else Ledger()
    results = Results(config.seed)
    right, answers = [row.right for row in rows], [row.answer for row in rows]

    def by_problem(value: Callable[[list[int]], float]) -> dict[str, float]:
        return {problem: float(value(indices)) for problem, indices in groups.items()}

    def pick(values: Sequence[Any], indices: Sequence[int]) -> list[Any]:
        return [values[i] for i in indices]

    def choices(arm: str, totals: Sequence[float], ledger: Ledger) -> None:
        best = by_problem(lambda g: best_credit(pick(totals, g), pick(right, g)))
        vote = by_problem(lambda g: vote_credit(pick(answers, g), pick(right, g), pick(totals, g)))
        inside = by_problem(lambda g: auroc(pick(totals, g), pick(right, g)))
        results.mean(arm, "accuracy", best, ledger)
        results.mean(arm, "weighted_accuracy", vote, ledger)
        results.mean(arm, "within_question_auroc", inside, ledger)

    def share(flags: Sequence[bool]) -> dict[str, float]:
        return by_problem(lambda g: sum(pick(flags, g)) / len(g))

    results.mean("sample", "accuracy", share(right), cost)
    results.mean("majority", "accuracy", by_problem(lambda g: vote_credit(pick(answers, g), pick(right, g))), cost)
    results.mean("pass", "accuracy", by_problem(lambda g: pass_at_k(len(g), sum(pick(right, g)), len(g))), cost)
    task = load_task(config.task)
    firsts = None
    if isinstance(task, StepChecker):
        firsts = [first_error(task.check_steps(Problem(r.problem_id, r.prompt, r.gold), r.steps)) for r in rows]
    for name, path in config.models.items():
        model = RewardModel.load(path, dtype=config.dtype)
        scores = model.score([(row.prompt, row.steps) for row in rows])
        tell_cut_steps(model)
        ledger = cost + model.ledger
        for how in config.aggregations or [model.step_format.aggregation]:
            arm = f"{name}/{how}" if config.aggregations else name
            choices(arm, [aggregate(one, how) for one in scores], ledger)
        results.mean(name, "min_at_last", share([one.index(min(one)) == len(one) - 1 for one in scores]), ledger)
        if firsts is not None:
            _step_measures(results, name, scores, firsts, list(groups.values()), ledger)
    results.write(out)


def _step_measures(
    results: Results,
    name: str,
    scores: Sequence[Sequence[float]],
    firsts: Sequence[int | None],
    groups: Sequence[Sequence[int]],
    ledger: Ledger,
) -> None:
    """Steps up to the first error, which is where a label of a step is beyond doubt."""
    judged = [
        [(s, t, good) for t, (s, good) in enumerate(up_to_first_error(one, error))]
        for one, error in zip(scores, firsts, strict=True)
    ]
    steps = lambda idx: [step for i in idx for step in judged[i]]

    def step_auroc(idx: Sequence[int]) -> float:
        found = steps(idx)
        return auroc([s for s, _, _ in found], [good for _, _, good in found])

    def length_auroc(idx: Sequence[int]) -> float:
        """Mean over numbers of steps of the AUROC among prefixes of that length, by pairs: no credit for "early is good"."""
        by_length: dict[int, list[tuple[float, bool]]] = {}
        for s, t, good in steps(idx):
            by_length.setdefault(t, []).append((s, good))
        total = weight = 0.0
        for found in by_length.values():
            positive = sum(good for _, good in found)
            pairs = positive * (len(found) - positive)
            if pairs:
                total += pairs * auroc([s for s, _ in found], [good for _, good in found])
                weight += pairs
        return total / weight if weight else math.nan

    def accuracy(idx: Sequence[int]) -> float:
        found = steps(idx)
        return sum((s >= 0.5) == good for s, _, good in found) / len(found)

    def f1(idx: Sequence[int]) -> float:
        truth = [-1 if firsts[i] is None else firsts[i] for i in idx]
        return first_error_f1([predicted_first_error(scores[i]) for i in idx], truth)["f1"]  # type: ignore[arg-type]

    measures = {
        "step_auroc": step_auroc,
        "length_auroc": length_auroc,
        "step_accuracy": accuracy,
        "first_error_f1": f1,
    }
    for metric, measure in measures.items():
        results.number(name, metric, bootstrap_groups(groups, measure, results.seed, 100), len(scores), ledger)


# --- values ----------------------------------------------------------------------------------------------------------------


def evaluate_values(config: options_claims.EvaluateValues, out: Path) -> None:
    """Squared error and correlation of scores with shares of right continuations, and of their best-of-k advantages."""
    required(config, "labels")
    if not config.models:
        raise UserError("models is missing: name -> folder of a reward model")
    rows = read_rows(config.labels, StepLabels)
    results = Results(config.seed)
    for name, path in config.models.items():
        model = RewardModel.load(path, dtype=config.dtype)
        scores = model.score_with_root([(row.prompt, row.steps) for row in rows])
        tell_cut_steps(model)
        errors: dict[str, list[float]] = {}
        values: dict[str, list[tuple[float, float]]] = {}
        progress: dict[str, list[tuple[float, float]]] = {}
        for row, found in zip(rows, scores, strict=True):
            shares = [c / n if n > 1 else None for c, n in zip(row.n_correct, row.n_rollouts, strict=True)]
            for t, share in enumerate(shares):
                if share is None:
                    continue  # the verdict of a finished solution is one observation, and no value
                values.setdefault(row.problem_id, []).append((found[t], share))
                errors.setdefault(row.problem_id, []).append((found[t] - share) ** 2)
                if t and (before := shares[t - 1]) is not None:
                    provers = [best_of_k_value(v, config.k) for v in (found[t - 1], found[t], before, share)]
                    [told], [true] = advantages(provers[:2]), advantages(provers[2:])
                    progress.setdefault(row.problem_id, []).append((told, true))
        results.mean(name, "value_mse", {p: sum(e) / len(e) for p, e in errors.items()}, model.ledger)
        for metric, pairs in (("value_correlation", values), ("advantage_correlation", progress)):
            groups = list(pairs.values())
            flat, places, at = [pair for group in groups for pair in group], [], 0
            for group in groups:
                places.append(list(range(at, at + len(group))))
                at += len(group)
            measure = lambda idx, flat=flat: correlation([flat[i][0] for i in idx], [flat[i][1] for i in idx])
            interval = bootstrap_groups(places, measure, config.seed, 100)
            results.number(name, metric, interval, len(flat), model.ledger)
    results.write(out)


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's correlation; NaN if one of the two is constant."""
    n = len(x)
    mean_x, mean_y = sum(x) / n, sum(y) / n
    xy = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    xx, yy = sum((a - mean_x) ** 2 for a in x), sum((b - mean_y) ** 2 for b in y)
    return xy / math.sqrt(xx * yy) if xx and yy else math.nan


# --- labels ----------------------------------------------------------------------------------------------------------------


def evaluate_labels(config: options_claims.EvaluateLabels, out: Path) -> None:
    """Error rates of hard labels, first errors located, and both in calls of the policy.

    A first error is located where a prefix has no right continuation and the prefix before it has one; it is exact if the checker
    names that step. Labels are judged, like those of `eval.prm`, against whether the written value is the reference's.
    """
    task = load_task(config.task)
    if not isinstance(task, StepChecker):
        raise UserError(f"task {config.task.get('kind')} has no exact step checker: eval labels needs one")
    if not config.labels:
        raise UserError("labels is missing: name -> StepLabels rows")
    if unknown := sorted(set(config.costs) - set(config.labels)):
        raise UserError(f"costs: {unknown[0]!r} is not among the labels ({', '.join(config.labels)})")
    results = Results(config.seed)
    for name, path in config.labels.items():
        rows = read_rows(path, StepLabels)
        cost = Ledger()
        for folder in config.costs.get(name, [path] if Path(path).is_dir() else []):
            cost = cost + Ledger(**read_about(folder)["ledger"])
        counts: dict[tuple[str, tuple[str, ...]], tuple[int, int]] = {}
        problems: dict[str, Problem] = {}
        longest: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
        for row in rows:
            problems[row.problem_id] = Problem(row.problem_id, row.prompt, row.gold)
            for t, (c, n) in enumerate(zip(row.n_correct, row.n_rollouts, strict=True)):
                key = (row.problem_id, row.steps[:t])
                longest.setdefault(key, row.steps)
                if n and n >= counts.get(key, (0, 0))[1]:
                    counts[key] = (c, n)
        wrong: dict[bool, dict[str, list[float]]] = {True: {}, False: {}}
        exact: list[float] = []
        located = 0
        for (problem_id, steps), (c, _) in counts.items():
            if not steps:
                continue
            checks = task.check_steps(problems[problem_id], steps)
            good = checks[-1].on_track
            wrong[good].setdefault(problem_id, []).append(float((c > 0) != good))
            if not c and counts.get((problem_id, steps[:-1]), (0, 0))[0]:
                located += 1
                exact.append(float(first_error(checks) == len(steps) - 1))
        every = {p: wrong[True].get(p, []) + wrong[False].get(p, []) for p in problems}
        judged = {p: v for p, v in every.items() if v}
        mean = lambda values: sum(values) / len(values)
        results.mean(name, "label_accuracy", {p: 1 - mean(v) for p, v in judged.items()}, cost)
        for good, metric in ((False, "label_false_positive"), (True, "label_false_negative")):
            results.mean(name, metric, {p: mean(v) for p, v in wrong[good].items()}, cost)
        labels = sum(map(len, judged.values()))
        informative = sum(0 < c < n for (_, steps), (c, n) in counts.items() if steps)
        calls = cost.policy_calls
        results.number(name, "labels", float(labels), labels, cost)
        results.number(name, "informative_labels", float(informative), labels, cost)
        results.number(name, "first_errors", float(located), labels, cost)
        if exact:
            results.number(name, "first_errors_exact", mean(exact), located, cost)
        if calls:
            results.number(name, "calls", float(calls), labels, cost)
            results.number(name, "informative_per_1000_calls", 1000 * informative / calls, labels, cost)
            results.number(name, "calls_per_first_error", calls / located if located else math.nan, located, cost)
    results.write(out)


# --- the toy of PAV --------------------------------------------------------------------------------------------------------


def evaluate_pav_toy(config: options_claims.EvaluatePAVToy, out: Path) -> None:
    """Iterations to a level of success, and success over the whole training, of each prover and of the outcome alone."""
    from ..trainers import pav_toy

    start = pav_toy.weighted_policy(config.start_gamma)
    arms: dict[str, Any] = {"outcome": None}
    for gamma in config.gammas:
        arms[f"gamma_{gamma:g}"] = pav_toy.exact_advantages(pav_toy.weighted_policy(gamma))
    for k in config.best_of:
        arms[f"best_of_{k}"] = pav_toy.exact_advantages(start, k)
    results = Results(config.seed)
    for arm, advantage in arms.items():
        runs = [
            pav_toy.train_policy(
                start,
                advantage,
                alpha=config.alpha,
                iterations=config.iterations,
                batch=config.batch,
                learning_rate=config.learning_rate,
                seed=fold_seed(config.seed, "pav toy", number),
            )
            for number in range(config.runs)
        ]
        results.number(arm, "iterations", sum(r.iterations_to(config.level) for r in runs) / len(runs), len(runs))
        results.number(arm, "mean_success", sum(r.mean for r in runs) / len(runs), len(runs))
    results.write(out)
