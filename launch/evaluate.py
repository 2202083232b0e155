"""The stages that judge: policies by their answers, process reward models by their steps. Each writes results.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError, fingerprint, fingerprint_path, fold_seed, read_json, write_json
from ..data_gen import importers
from ..data_gen.rows import Solution, StepLabels
from ..data_gen.store import read_about, read_rows
from ..models.ledger import Ledger
from ..models.reward import RewardModel, aggregate
from ..models.step_metrics import auroc, expected_calibration_error, first_error_f1, predicted_first_error
from ..search.choose import best_credit, paired_bootstrap, pass_at_k, vote_credit
from ..tasks.base import Problem, StepCheck, StepChecker, first_error
from ..tasks.chain import ChainArith, hard_label_error_rates
from ..tasks.load import load_task
from . import options_eval
from .making import tell_cut_steps
from .options import first, required

RESULTS = "results.json"
DETAILS = "details.json"  # what the report shows beside the numbers


def record(
    arm: str,
    metric: str,
    value: tuple[float, float, float] | float,
    n: int,
    seed: int,
    ledger: Ledger | None = None,
) -> dict[str, Any]:
    """One line of results.json; `value` alone, or with its 95 % interval."""
    ledger = ledger or Ledger()
    mean, *interval = value if isinstance(value, tuple) else (value,)
    return {
        "arm": arm,
        "metric": metric,
        "value": None if math.isnan(mean) else mean,
        "ci": interval if interval and not any(map(math.isnan, interval)) else None,
        "n": n,
        "tokens": ledger.generated_tokens,
        "flops": ledger.flops,
        "seconds": round(ledger.seconds, 3),
        "seed": seed,
    }


# --- policies ----------------------------------------------------------------------------------------------------------


@dataclass
class Arm:
    """Correctness of one way to answer, in [0, 1] problem by problem, and what it cost."""

    values: list[float]
    ledger: Ledger


def evaluate_policies(config: options_eval.EvaluatePolicies, out: Path) -> None:
    """Accuracy of every arm of every policy, differences from majority vote and from the first policy."""
    if not config.policies:
        raise UserError("policies is missing: name -> {greedy, samples, beam}, folders of Solution rows")
    orm = RewardModel.load(config.orm, dtype=config.dtype) if config.orm else None
    prm = RewardModel.load(config.prm, dtype=config.dtype) if config.prm else None
    pools = {name: _read_pools(name, paths) for name, paths in config.policies.items()}
    ids = sorted({row.problem_id for groups in pools.values() for pool in groups.values() for row in pool})
    records: list[dict[str, Any]] = []
    shown: list[dict[str, Any]] = []
    arms_of: dict[str, dict[str, Arm]] = {}
    checker = load_task(config.task)
    for name, groups in pools.items():
        scored = _Scored(out, name, orm, prm)
        arms = arms_of[name] = _arms(ids, groups, config.policies[name], scored)
        reference = next((a for a in arms if a.startswith("majority")), "greedy")
        for arm, found in arms.items():
            label, n = f"{name}/{arm}", len(ids)
            records.append(
                record(
                    label, "accuracy", paired_bootstrap(found.values, seed=config.seed), n, config.seed, found.ledger
                )
            )
            if reference in arms and arm not in (reference, "greedy") and not arm.startswith("pass"):
                difference = paired_bootstrap(found.values, arms[reference].values, seed=config.seed)
                records.append(record(label, "accuracy_minus_majority", difference, n, config.seed, found.ledger))
        shown += _shown(name, ids[: config.shown], groups, scored, checker)
    base, *others = arms_of
    for name in others:
        for arm, found in arms_of[name].items():
            if arm in arms_of[base]:
                difference = paired_bootstrap(found.values, arms_of[base][arm].values, seed=config.seed)
                records.append(
                    record(f"{name}/{arm}", f"accuracy_minus_{base}", difference, len(ids), config.seed, found.ledger)
                )
    write_json(out / DETAILS, {"solutions": shown})
    write_json(out / RESULTS, records)


def _read_pools(name: str, paths: Mapping[str, str]) -> dict[str, list[Solution]]:
    pools = {}
    for kind, path in paths.items():
        if kind not in ("greedy", "samples", "beam"):
            raise UserError(f"policies: {name}: expected greedy, samples or beam, found {kind!r}")
        pools[kind] = read_rows(path, Solution)
    return pools


class _Scored:
    """Solution scores by reward model, kept in a file so that a killed evaluation does not score again."""

    def __init__(self, out: Path, name: str, orm: RewardModel | None, prm: RewardModel | None) -> None:
        self.out, self.name, self.models = out, name, {"orm": orm, "prm": prm}
        self.ledgers: dict[tuple[str, str], Ledger] = {}

    def steps(self, which: str, kind: str, rows: Sequence[Solution]) -> list[list[float]] | None:
        """Step scores of each row by the model `which` (orm or prm); None without that model."""
        model = self.models[which]
        if model is None:
            return None
        key = fingerprint([_content(model.name), [(r.problem_id, r.sample, r.steps) for r in rows]])
        path = self.out / f"scores-{self.name}-{kind}-{which}.json"
        if path.is_file() and (kept := read_json(path)).get("key") == key:
            self.ledgers[which, kind] = Ledger(**kept["ledger"])
            return kept["scores"]
        before = model.ledger.copy()
        scores = model.score([(row.prompt, row.steps) for row in rows])
        tell_cut_steps(model)
        ledger = self.ledgers[which, kind] = model.ledger - before
        write_json(path, {"key": key, "ledger": ledger.to_json(), "scores": scores})
        return scores

    def totals(self, which: str, kind: str, rows: Sequence[Solution]) -> list[float] | None:
        """One score a row, aggregated as the model's step format advises."""
        steps, model = self.steps(which, kind, rows), self.models[which]
        if steps is None or model is None:
            return None
        return [aggregate(one, model.step_format.aggregation) for one in steps]

    def cost(self, which: str, kind: str) -> Ledger:
        return self.ledgers.get((which, kind), Ledger())


def _content(model: str) -> list[str]:
    """What tells a model from another one that was trained into the same folder later."""
    files = sorted(Path(model).glob("*.safetensors")) + sorted(Path(model).glob("step_format.json"))
    return [model, *(fingerprint_path(file) for file in files)]


def _by_problem(
    rows: Sequence[Solution], extra: Sequence[float] | None = None
) -> dict[str, list[tuple[Solution, float]]]:
    grouped: dict[str, list[tuple[Solution, float]]] = {}
    for i, row in enumerate(rows):
        grouped.setdefault(row.problem_id, []).append((row, extra[i] if extra is not None else 0.0))
    return grouped


def _arms(
    ids: Sequence[str], groups: Mapping[str, Sequence[Solution]], paths: Mapping[str, str], scored: _Scored
) -> dict[str, Arm]:
    """Every arm that the rows allow. A problem that an arm has no row of (its prompt did not fit) counts as wrong."""
    cost = {
        kind: Ledger(**read_about(path)["ledger"]) if Path(path).is_dir() else Ledger() for kind, path in paths.items()
    }
    arms: dict[str, Arm] = {}

    def add(name: str, kind: str, value: Any, extra: Sequence[float] | None = None, which: str = "") -> None:
        grouped = _by_problem(groups[kind], extra)
        values = [float(value(grouped[i])) if i in grouped else 0.0 for i in ids]
        arms[name] = Arm(values, cost[kind] + (scored.cost(which, kind) if which else Ledger()))

    if "greedy" in groups:
        add("greedy", "greedy", lambda found: found[0][0].right)
    if "samples" in groups:
        rows = groups["samples"]
        n = max(len(found) for found in _by_problem(rows).values())
        add("sample", "samples", lambda found: sum(r.right for r, _ in found) / len(found))
        add(f"pass@{n}", "samples", lambda found: pass_at_k(len(found), sum(r.right for r, _ in found), len(found)))
        add(
            f"majority@{n}",
            "samples",
            lambda found: vote_credit([r.answer for r, _ in found], [r.right for r, _ in found]),
        )
        for which in ("orm", "prm"):
            totals = scored.totals(which, "samples", rows)
            if totals is not None:
                best = lambda found: best_credit([s for _, s in found], [r.right for r, _ in found])
                vote = lambda found: vote_credit(
                    [r.answer for r, _ in found], [r.right for r, _ in found], [s for _, s in found]
                )
                add(f"best_of_{n}_{which}", "samples", best, totals, which)
                add(f"weighted_best_of_{n}_{which}", "samples", vote, totals, which)
    if "beam" in groups:
        totals = scored.totals("prm", "beam", groups["beam"])
        if totals is None:
            raise UserError("policies: rows of a beam search need prm, which chooses among what it found")
        n = max(len(found) for found in _by_problem(groups["beam"]).values())
        best = lambda found: best_credit([s for _, s in found], [r.right for r, _ in found])
        vote = lambda found: vote_credit(
            [r.answer for r, _ in found], [r.right for r, _ in found], [s for _, s in found]
        )
        add(f"beam_{n}_prm", "beam", best, totals)
        add(f"weighted_beam_{n}_prm", "beam", vote, totals)
    return arms


def step_right(check: StepCheck) -> bool:
    """Whether a step counts as right wherever steps are judged here: it follows from the line before and its result is that of
    the reference. The first step for which it does not hold is the first error."""
    return check.local_ok and check.on_track


def _shown(
    name: str, ids: Sequence[str], groups: Mapping[str, Sequence[Solution]], scored: _Scored, task: Any
) -> list[dict[str, Any]]:
    """Solutions that some arm chose, with step scores and exact checks, for the report."""
    chosen: dict[tuple[str, int, str], tuple[Solution, list[float], list[str]]] = {}

    def add(row: Solution, kind: str, steps: Sequence[float], arm: str) -> None:
        chosen.setdefault((row.problem_id, row.sample, kind), (row, list(steps), []))[2].append(arm)

    for kind, rows in groups.items():
        step_scores = scored.steps("prm", kind, rows) or [[] for _ in rows]
        prm, orm = scored.totals("prm", kind, rows), scored.totals("orm", kind, rows) if kind == "samples" else None
        position = {id(row): i for i, row in enumerate(rows)}
        n = max(len(found) for found in _by_problem(rows).values())
        for problem_id, found in _by_problem(rows).items():
            if problem_id not in set(ids):
                continue
            where = [position[id(row)] for row, _ in found]
            if kind == "greedy":
                add(rows[where[0]], kind, step_scores[where[0]], "greedy")
                continue
            for arm, totals in (("prm", prm), ("orm", orm)):
                if totals is not None:
                    best = max(where, key=lambda i: (totals[i], -i))
                    add(
                        rows[best],
                        kind,
                        step_scores[best],
                        f"beam_{n}_{arm}" if kind == "beam" else f"best_of_{n}_{arm}",
                    )
            if kind == "samples":
                votes: dict[str, int] = {}
                for i in where:
                    if rows[i].answer is not None:
                        votes[str(rows[i].answer)] = votes.get(str(rows[i].answer), 0) + 1
                if votes:
                    winner = max(votes, key=lambda a: votes[a])
                    i = next(i for i in where if rows[i].answer == winner)
                    add(rows[i], kind, step_scores[i], f"majority@{n}")
    lines = []
    for row, scores, arms in chosen.values():
        checks = None
        if isinstance(task, StepChecker):
            checks = task.check_steps(Problem(row.problem_id, row.prompt, row.gold), row.steps)
        lines.append(
            {
                "problem_id": row.problem_id,
                "prompt": row.prompt,
                "gold": row.gold,
                "policy": name,
                "steps": list(row.steps),
                "scores": scores,
                "step_right": [step_right(c) for c in checks] if checks else [None] * len(row.steps),
                "answer": row.answer,
                "outcome": row.outcome,
                "selected_by": arms,
            }
        )
    return lines


# --- process reward models ---------------------------------------------------------------------------------------------


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
    details: dict[str, Any] = {}
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
        step_auroc = _bootstrap_groups(
            list(groups.values()),
            lambda idx, s=scores: auroc(
                [v for i in idx for v in s[i]], [step_right(c) for i in idx for c in checks[i]]
            ),
            seed,
        )
        predicted = [predicted_first_error(s) for s in scores]
        truth = [-1 if e is None else e for e in labels]
        f1 = _bootstrap_groups(
            list(groups.values()),
            lambda idx, p=predicted, t=truth: first_error_f1([p[i] for i in idx], [t[i] for i in idx])["f1"],
            seed,
        )
        n = len(rows)
        records.append(record(arm, "step_auroc", step_auroc, n, seed, model.ledger))
        records.append(record(arm, "first_error_f1", f1, n, seed, model.ledger))
        totals = [aggregate(s, model.step_format.aggregation) for s in scores]
        inside = [
            auroc([totals[i] for i in idx], [rows[i].right for i in idx])
            for idx in groups.values()
            if 0 < sum(rows[i].right for i in idx) < len(idx)
        ]
        if inside:
            records.append(
                record(
                    arm, "within_question_auroc", paired_bootstrap(inside, seed=seed), len(inside), seed, model.ledger
                )
            )
        flat = [v for s in scores for v in s]
        good = [float(step_right(c)) for check in checks for c in check]
        records.append(record(arm, "step_ece", expected_calibration_error(flat, good), len(flat), seed, model.ledger))
        if arm == "prm":
            details["calibration"] = {"scores": flat[:20000], "right": [bool(g) for g in good[:20000]]}
    if config.labels and isinstance(task, ChainArith):
        records += label_errors(task, read_rows(config.labels, StepLabels), rows, config.seed)
    write_json(out / DETAILS, details)
    write_json(out / RESULTS, records)


def _bootstrap_groups(
    groups: Sequence[Sequence[int]], value: Any, seed: int, resamples: int = 200
) -> tuple[float, float, float]:
    """(value, low, high): a 95 % bootstrap that draws whole problems, for values that are no means over problems."""
    import numpy as np

    rng = np.random.default_rng(fold_seed(seed, "groups"))
    draws = []
    for _ in range(resamples):
        draws.append(value([i for g in rng.integers(0, len(groups), len(groups)) for i in groups[g]]))
    low, high = np.nanpercentile(draws, [2.5, 97.5]) if not np.isnan(draws).all() else (math.nan, math.nan)
    return float(value([i for g in groups for i in g])), float(low), float(high)


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


def evaluate_processbench(config: options_eval.EvaluateProcessBench, out: Path) -> None:
    """F1 of the first wrong step on each subset (arXiv:2412.06559), and their mean."""
    required(config, "prm")
    if not config.files:
        raise UserError("files is missing: subset -> file of ProcessBench records")
    model = RewardModel.load(config.prm, dtype=config.dtype)
    scores: dict[str, list[list[float]]] = {}
    labels: dict[str, list[int]] = {}
    for subset, path in config.files.items():
        records = first(importers.process_bench(path), config.limit)
        labels[subset] = [r["label"] for r in records]
        kept = out / f"scores-{subset}.json"
        key = fingerprint([_content(config.prm), records])
        if kept.is_file() and read_json(kept).get("key") == key:
            scores[subset] = read_json(kept)["scores"]
        else:
            scores[subset] = model.score([(r["problem"], r["steps"]) for r in records])
            write_json(kept, {"key": key, "scores": scores[subset]})
    tell_cut_steps(model)
    threshold = config.threshold
    if threshold is None:
        if config.tune_on not in scores:
            raise UserError(f"tune_on must be one of {', '.join(scores)}, found {config.tune_on!r}")
        threshold = best_threshold(scores[config.tune_on], labels[config.tune_on])
    lines = []
    values = []
    for subset in scores:
        predicted = [predicted_first_error(s, threshold) for s in scores[subset]]
        groups = [[i] for i in range(len(predicted))]
        for name in ("f1", "accuracy_error", "accuracy_correct"):
            one = lambda idx, p=predicted, y=labels[subset], name=name: first_error_f1(
                [p[i] for i in idx], [y[i] for i in idx]
            )[name]
            lines.append(
                record(
                    f"processbench/{subset}",
                    name,
                    _bootstrap_groups(groups, one, config.seed),
                    len(predicted),
                    config.seed,
                )
            )
        flat = [v for s, y in zip(scores[subset], labels[subset], strict=True) for v in s[: y + 1 if y >= 0 else None]]
        good = [
            k != y
            for s, y in zip(scores[subset], labels[subset], strict=True)
            for k in range(len(s[: y + 1 if y >= 0 else None]))
        ]
        lines.append(record(f"processbench/{subset}", "step_auroc", auroc(flat, good), len(flat), config.seed))
        values.append(lines[-4]["value"])
    lines.append(record("processbench/mean", "f1", sum(values) / len(values), len(values), config.seed))
    lines.append(record("processbench", "threshold", threshold, 0, config.seed))
    write_json(out / DETAILS, {})
    write_json(out / RESULTS, lines)
    for line in lines:
        print(f"{line['arm']:28s} {line['metric']:18s} {line['value']}")


def best_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold with the greatest F1 among the scores themselves; the smallest of those that tie."""
    candidates = sorted({s for one in scores for s in one})
    candidates = candidates[:: max(1, len(candidates) // 500)]
    f1 = lambda t: first_error_f1([predicted_first_error(s, t) for s in scores], labels)["f1"]
    return max(candidates, key=lambda t: (f1(t), -t))


# --- report ------------------------------------------------------------------------------------------------------------


def make_report(config: options_eval.Report, out: Path) -> None:
    """One results.json and report.html beside the run's folders, and the table on the terminal."""
    from .report import write_run_report
    from .tables import format_table

    if not config.results:
        raise UserError("results is missing: folders of evaluation stages")
    records = [r for folder in config.results for r in read_json(Path(folder) / RESULTS)]
    details: dict[str, Any] = {}
    for folder in config.results:
        details.update(read_json(Path(folder) / DETAILS))
    curves = {name: _curve(Path(folder) / "metrics.jsonl") for name, folder in config.curves.items()}
    run = out.parent
    write_json(run / RESULTS, records)
    manifest = read_json(run / "manifest.json") if (run / "manifest.json").is_file() else {}
    costs = {}
    for path in sorted(run.glob("*/rows.json")):
        costs[path.parent.name] = read_json(path)["ledger"]
    write_run_report(
        run / "report.html",
        config.title,
        config.command or manifest.get("command", ""),
        manifest,
        records,
        curves,
        costs,
        details,
    )
    print(format_table(records))
    print(f"\nresults: {run / RESULTS}\nreport:  {run / 'report.html'}")


def _curve(path: Path) -> list[dict[str, Any]]:
    from ..basics import read_jsonl

    return [line for _, line in read_jsonl(path)] if path.is_file() else []
