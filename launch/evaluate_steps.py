"""The stage that judges step scores and step labels against the exact checker of a lab task."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError
from ..data_gen.rows import Solution, StepLabels
from ..data_gen.store import read_rows
from ..models.ledger import Ledger
from ..models.reward import RewardModel, aggregate
from ..models.step_metrics import (
    auroc,
    correlation,
    expected_calibration_error,
    first_error_f1,
    predicted_first_error,
    reliability,
)
from ..search.choose import paired_bootstrap
from ..tasks.base import Problem, StepCheck, StepChecker, first_error
from ..tasks.chain import ChainArith, hard_label_error_rates
from ..tasks.load import load_task
from . import options_eval
from .evaluate import bootstrap_groups, record, values_of, write_results
from .evaluate_first_errors import process_records
from .making import tell_cut_steps
from .options import first, required


def step_right(check: StepCheck) -> bool:
    """Whether a step counts as right wherever steps are judged here: it follows from the line before and its result is that of
    the reference. The first step for which it does not hold is the first error."""
    return check.local_ok and check.on_track


def up_to_first_error(scores: Sequence[float], error: int | None) -> list[tuple[float, bool]]:
    """(score, whether the step is right) of the steps up to the first error: behind it nobody says what a right step is."""
    return [(s, error is None or t < error) for t, s in enumerate(scores[: None if error is None else error + 1])]


def evaluate_prm(config: options_eval.EvaluatePRM, out: Path) -> None:
    """Step AUROC and first-error F1 against the exact checker, and label error rates beside their closed form."""
    required(config, "prm", "solutions")
    task = load_task(config.task)
    if not isinstance(task, StepChecker):
        raise UserError(f"task {config.task.get('kind')} has no exact step checker: eval prm needs one")
    rows = first(read_rows(config.solutions, Solution), config.limit)
    rows = [row for row in rows if row.steps]
    checks = [task.check_steps(Problem(row.problem_id, row.prompt, row.gold), row.steps) for row in rows]
    labels = [first_error(c) for c in checks]
    records: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    details: dict[str, Any] = {}
    exact: list[list[float]] | None = None
    if config.policy:
        exact, told = exact_values(config, task, rows)
        records += told
    for arm, path in (("prm", config.prm), ("orm", config.orm)):
        if not path:
            continue
        model = RewardModel.load(path, dtype=config.dtype)
        scores = model.score([(row.prompt, row.steps) for row in rows])
        tell_cut_steps(model)
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.problem_id, []).append(i)
        seed = config.seed
        judged = [up_to_first_error(s, e) for s, e in zip(scores, labels, strict=True)]
        step_auroc = bootstrap_groups(
            list(groups.values()),
            lambda idx, j=judged: auroc([v for i in idx for v, _ in j[i]], [good for i in idx for _, good in j[i]]),
            seed,
        )
        predicted = [predicted_first_error(s) for s in scores]
        truth = [-1 if e is None else e for e in labels]
        f1 = bootstrap_groups(
            list(groups.values()),
            lambda idx, p=predicted, t=truth: first_error_f1([p[i] for i in idx], [t[i] for i in idx])["f1"],
            seed,
        )
        n = len(rows)
        records.append(record(arm, "step_auroc", step_auroc, n, seed, model.ledger))
        records.append(record(arm, "first_error_f1", f1, n, seed, model.ledger))
        totals = [aggregate(s, model.step_format.aggregation) for s in scores]
        both = [q for q, idx in groups.items() if 0 < sum(rows[i].right for i in idx) < len(idx)]
        inside = [auroc([totals[i] for i in groups[q]], [rows[i].right for i in groups[q]]) for q in both]
        if inside:
            records.append(
                record(
                    arm, "within_question_auroc", paired_bootstrap(inside, seed=seed), len(inside), seed, model.ledger
                )
            )
        flat = [v for one in judged for v, _ in one]
        good = [float(right) for one in judged for _, right in one]
        records.append(record(arm, "step_ece", expected_calibration_error(flat, good), len(flat), seed, model.ledger))
        if arm == "prm":
            details["calibration"] = {"scores": flat[:20000], "right": [bool(g) for g in good[:20000]]}
        if inside:
            values.append(values_of(arm, "within_question_auroc", both, inside))
        if config.process:
            found = [float(p == t) for p, t in zip(predicted, truth, strict=True)]
            records.append(record(arm, "verdict_accuracy", paired_bootstrap(found, seed=seed), n, seed, model.ledger))
            values.append(values_of(arm, "verdict_accuracy", [row.problem_id for row in rows], found))
            records += process_records(arm, scores, predicted, truth, [row.right for row in rows], seed)
        if exact is not None:
            records += value_records(arm, model, rows, exact, groups, seed, details)
    if config.labels and isinstance(task, ChainArith):
        records += label_errors(task, read_rows(config.labels, StepLabels), rows, config.seed)
    write_results(out, records, values=values, details=details)


# --- exact values ------------------------------------------------------------------------------------------------------


def exact_values(
    config: options_eval.EvaluatePRM, task: Any, rows: Sequence[Solution]
) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """(V before the first step and after each, row by row; how far they can be trusted) of the policy that wrote the rows."""
    if not isinstance(task, ChainArith):
        raise UserError("exact values are known for chain tasks alone: leave out policy")
    from transformers import AutoModelForCausalLM

    from ..models.exact_value import read_facts, solution_values
    from ..models.loading import load_model, load_policy_format, load_tokenizer

    tokenizer = load_tokenizer(config.policy)
    model = load_model(AutoModelForCausalLM, config.policy, dtype="float32").train(False)
    ledger = Ledger()
    table = read_facts(
        model, tokenizer, load_policy_format(config.policy, tokenizer, task.step_separator), task,
        contexts=config.contexts, temperature=config.temperature, top_p=config.top_p, seed=config.seed, ledger=ledger,
    )  # fmt: skip
    problem = lambda row: Problem(row.problem_id, row.prompt, row.gold)
    found = [solution_values(table, task, problem(row), row.steps, row.right) for row in rows]
    n = len(table.results) * config.contexts
    records = [
        record("policy", "fact_spread", table.spread, n, config.seed, ledger),
        record("policy", "fact_mass_lost", table.lost, n, config.seed),
    ]
    # Each problem's solutions against its own value: pass@1 needs no sample.
    right: dict[str, list[float]] = {}
    value: dict[str, float] = {}
    for row, own in zip(rows, found, strict=True):
        right.setdefault(row.problem_id, []).append(float(row.right))
        value[row.problem_id] = own[0]
    sampled = [sum(v) / len(v) for v in right.values()]
    records.append(
        record("policy", "pass_at_1", paired_bootstrap(sampled, seed=config.seed), len(sampled), config.seed)
    )
    records.append(record("policy", "pass_at_1_closed_form", sum(value.values()) / len(value), len(value), config.seed))
    if config.labels:
        records += _against_counts(table, task, read_rows(config.labels, StepLabels), config.seed)
    return found, records


def _against_counts(table: Any, task: ChainArith, labels: Sequence[StepLabels], seed: int) -> list[dict[str, Any]]:
    """Exact values beside shares of sampled continuations: if they are exact, only binomial noise is between them.

    `value_bias`: mean share - value. `value_rms_gap`: root of the mean squared difference; its closed form is the root of the mean
    of V (1 - V) / K, what it is if the values are exact.
    """
    from ..models.exact_value import solution_values

    gaps, noise = [], []
    for row in labels:
        values = solution_values(table, task, Problem(row.problem_id, row.prompt, row.gold), row.steps, False)
        # Of a whole solution nothing is sampled; its last step is left out, as in `label_errors`.
        for v, c, n in list(zip(values, row.n_correct, row.n_rollouts, strict=True))[:-1]:
            if n and not math.isnan(v):
                gaps.append(c / n - v)
                noise.append(v * (1 - v) / n)
    if not gaps:
        return []
    n = len(gaps)
    return [
        record("policy", "value_bias", sum(gaps) / n, n, seed),
        record("policy", "value_rms_gap", math.sqrt(sum(g * g for g in gaps) / n), n, seed),
        record("policy", "value_rms_gap_closed_form", math.sqrt(sum(noise) / n), n, seed),
    ]


def value_records(
    arm: str,
    model: RewardModel,
    rows: Sequence[Solution],
    exact: Sequence[Sequence[float]],
    groups: Mapping[str, Sequence[int]],
    seed: int,
    details: dict[str, Any],
) -> list[dict[str, Any]]:
    """Scores against exact values: calibration, mean absolute error, correlation; and of changes with exact advantages.

    All steps count but an answer line, whose value is the verdict. The score before the first step is the one at the prompt's end.
    """
    scores = model.score_with_root([(row.prompt, row.steps) for row in rows])
    pairs: list[list[tuple[float, float]]] = []  # (score, V) of each step
    changes: list[list[tuple[float, float]]] = []
    for own, values, row in zip(scores, exact, rows, strict=True):
        last = row.prompt.count(";")  # operations: the answer line comes behind them
        known = [t for t in range(1, len(values)) if t <= last and not math.isnan(values[t])]
        pairs.append([(own[t], values[t]) for t in known])
        changes.append(
            [(own[t] - own[t - 1], values[t] - values[t - 1]) for t in known if not math.isnan(values[t - 1])]
        )
    metrics: dict[str, tuple[Any, Sequence[Sequence[tuple[float, float]]]]] = {
        "value_ece": (expected_calibration_error, pairs),
        "value_mae": (lambda s, v: sum(abs(a - b) for a, b in zip(s, v, strict=True)) / max(1, len(s)), pairs),
        "value_correlation": (correlation, pairs),
        "advantage_correlation": (correlation, changes),
    }
    records = []
    for metric, (measure, of) in metrics.items():
        value = lambda idx, measure=measure, of=of: measure(
            [a for i in idx for a, _ in of[i]], [b for i in idx for _, b in of[i]]
        )
        n = sum(map(len, of))
        records.append(record(arm, metric, bootstrap_groups(list(groups.values()), value, seed), n, seed, model.ledger))
    flat = [pair for own in pairs for pair in own]
    details.setdefault("values", {})[arm] = reliability([s for s, _ in flat], [v for _, v in flat])
    return records


def label_errors(
    task: ChainArith, labels: Sequence[StepLabels], solutions: Sequence[Solution], seed: int
) -> list[dict[str, Any]]:
    """False positive and false negative rates of the hard label against the exact checker, beside their closed form.

    Judged against `on_track` alone, unlike step scores: from a value that is the reference's again a right ending is to be
    expected, however the value came about, and that is what a continuation measures.

    The closed form (methods of the lab, `tasks.chain.hard_label_error_rates`) is that of a policy that errs uniformly; its error
    rate is the share of steps, among held-out solutions, that do not follow from the line before. The real policy errs on some
    facts more than on others, so that the two are close and not equal.
    """
    wrong_steps = total_steps = 0
    for row in solutions:
        problem = Problem(row.problem_id, row.prompt, row.gold)
        checks = task.check_steps(problem, row.steps)[: len(row.steps) - 1]
        wrong_steps += sum(not c.local_ok for c in checks)
        total_steps += len(checks)
    error_rate = wrong_steps / max(total_steps, 1)
    measured: dict[str, list[float]] = {"label_false_positive": [], "label_false_negative": []}
    expected: dict[str, list[float]] = {"label_false_positive": [], "label_false_negative": []}
    for labelled in labels:
        checks = task.check_steps(Problem(labelled.problem_id, labelled.prompt, labelled.gold), labelled.steps)
        operations = labelled.prompt.count(";")
        for t, check in enumerate(checks[:-1], 1):  # the last prefix is the finished solution: nothing was sampled
            if not labelled.n_rollouts[t] or t > operations:
                continue
            label = labelled.n_correct[t] > 0
            rates = hard_label_error_rates(task.p, error_rate, operations - t, labelled.n_rollouts[t])
            kind = "label_false_negative" if check.on_track else "label_false_positive"
            measured[kind].append(float(label != check.on_track))
            expected[kind].append(rates[1] if check.on_track else rates[0])
    records = [record("policy", "step_error_rate", error_rate, total_steps, seed)]
    for kind in measured:
        if measured[kind]:
            n = len(measured[kind])
            records.append(record("labels", kind, paired_bootstrap(measured[kind], seed=seed), n, seed))
            records.append(record("labels", f"{kind}_closed_form", sum(expected[kind]) / n, n, seed))
    return records
