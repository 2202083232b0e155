"""The stages that judge on published data: the first wrong step of a solution, by reward models and by critics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError, fingerprint
from ..data_gen import importers
from ..data_gen.rows import StepLabels, step_targets
from ..data_gen.store import read_rows
from ..models.critic import majority_index, unreadable, vote_scores
from ..models.engine import Sampling
from ..models.judges import ErrorFinder, StepScorer, load_judge
from ..models.step_metrics import (
    auroc,
    expected_calibration_error,
    first_error_f1,
    lowest_is_last,
    matthews,
    predicted_first_error,
    prm_score,
)
from ..search.choose import paired_bootstrap
from . import options_eval
from .evaluate import bootstrap_groups, content_of, record, values_of, write_results
from .making import tell_cut_steps
from .options import first, required
from .scoring import kept_scores, kept_votes


@dataclass
class Case:
    """A solution whose first wrong step is known: `label` is its 0-based index, -1 without one."""

    id: str
    prompt: str
    steps: Sequence[str]
    label: int
    answer_right: bool | None  # None: the data do not say


@dataclass
class Findings:
    """What a judge says of each case. Scores of a critic are the shares of its votes."""

    scores: list[list[float]]
    votes: list[list[int | None]] | None = None

    def first_errors(self, threshold: float) -> list[int | None]:
        """The named first error of each case: a critic's vote, else the first step under the threshold."""
        if self.votes is not None:
            return [majority_index(own) for own in self.votes]
        return [predicted_first_error(one, threshold) for one in self.scores]


def judge_of(config: options_eval.Judged) -> StepScorer:
    """The judge that the options name."""
    required(config, "model")
    try:
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    except ValueError as error:
        raise UserError(str(error)) from None
    return load_judge(
        config.kind, config.model, dtype=config.dtype, backend=config.backend, base_url=config.base_url,
        layout=config.layout, samples=config.samples, sampling=sampling, batch_size=config.batch_size,
        prompt=config.prompt, seed=config.seed,
    )  # fmt: skip


def judged(
    config: options_eval.Judged, subsets: Mapping[str, Sequence[Case]], contents: Mapping[str, Any], out: Path
) -> dict[str, Findings]:
    """Findings on every subset; what was asked before a kill is read from files. `contents` says what the cases are."""
    judge = judge_of(config)
    found = {}
    for subset, cases in subsets.items():
        asked = [(case.prompt, case.steps) for case in cases]
        if isinstance(judge, ErrorFinder):
            how = [config.kind, config.samples, config.temperature, config.top_p, config.max_new_tokens]
            key = fingerprint([content_of(config.model), how, config.prompt, config.seed, contents[subset]])
            votes = kept_votes(out / f"votes-{subset}.json", key, judge, asked)
            scores = [vote_scores(own, len(case.steps)) for own, case in zip(votes, cases, strict=True)]
            found[subset] = Findings(scores, votes)
            if lost := unreadable(votes):
                print(f"{subset}: {lost} of {sum(map(len, votes))} critiques name no step; a case without any is wrong")
        else:
            key = fingerprint([content_of(config.model), contents[subset]])
            found[subset] = Findings(kept_scores(out / f"scores-{subset}.json", key, judge, asked))
    tell_cut_steps(judge)
    return found


def threshold_of(
    config: options_eval.Judged, subsets: Mapping[str, Sequence[Case]], found: Mapping[str, Findings]
) -> float:
    """The threshold that is given, or the best on the subset `tune_on`."""
    if config.threshold is not None or any(one.votes is not None for one in found.values()):
        return 0.5 if config.threshold is None else config.threshold
    if config.tune_on not in subsets:
        raise UserError(f"tune_on must be one of {', '.join(subsets)}, found {config.tune_on!r}")
    return best_threshold(found[config.tune_on].scores, [case.label for case in subsets[config.tune_on]])


def best_threshold(scores: Sequence[Sequence[float]], labels: Sequence[int]) -> float:
    """The threshold with the greatest F1 among the scores themselves; the smallest of those that tie."""
    candidates = sorted({s for one in scores for s in one})
    candidates = candidates[:: max(1, len(candidates) // 500)]
    f1 = lambda t: first_error_f1([predicted_first_error(s, t) for s in scores], labels)["f1"]
    return max(candidates, key=lambda t: (f1(t), -t))


def _f1_records(
    arm: str, cases: Sequence[Case], found: Findings, predicted: Sequence[int | None], seed: int
) -> list[dict[str, Any]]:
    """F1, its two accuracies with intervals, and the AUROC of steps up to the first wrong one."""
    labels = [case.label for case in cases]
    groups = [[i] for i in range(len(cases))]
    lines = []
    for name in ("f1", "accuracy_error", "accuracy_correct"):
        one = lambda idx, name=name: first_error_f1([predicted[i] for i in idx], [labels[i] for i in idx])[name]
        lines.append(record(arm, name, bootstrap_groups(groups, one, seed), len(cases), seed))
    flat, good = _known_steps(cases, found)
    lines.append(record(arm, "step_auroc", auroc(flat, good), len(flat), seed))
    if found.votes is not None:
        missing = [float(p is None) for p in predicted]
        lines.append(record(arm, "unparseable", sum(missing) / len(missing), len(missing), seed))
    return lines


def _known_steps(cases: Sequence[Case], found: Findings) -> tuple[list[float], list[bool]]:
    """(scores, whether the step is right) of the steps up to the first wrong one."""
    known = [case.label + 1 if case.label >= 0 else len(case.steps) for case in cases]
    scores = [v for s, n in zip(found.scores, known, strict=True) for v in s[:n]]
    return scores, [k != case.label for case, n in zip(cases, known, strict=True) for k in range(n)]


def _values(arm: str, cases: Sequence[Case], predicted: Sequence[int | None]) -> list[dict[str, Any]]:
    entries = []
    for metric, flawed in (("accuracy_error", True), ("accuracy_correct", False)):
        kept = [(c.id, float(p == c.label)) for c, p in zip(cases, predicted, strict=True) if (c.label >= 0) == flawed]
        if kept:
            entries.append(values_of(arm, metric, [i for i, _ in kept], [v for _, v in kept]))
    return entries


def process_records(
    arm: str,
    scores: Sequence[Sequence[float]],
    predicted: Sequence[int | None],
    labels: Sequence[int],
    answer_right: Sequence[bool | None],
    seed: int,
) -> list[dict[str, Any]]:
    """What tells a model of processes from one of outcomes (arXiv:2501.07301 section 3): three shares, where they are defined.

    `flawed_right_detected`: of right answers with a wrong step, those with an error named anywhere; `flawed_right_located`: at the
    right place; `lowest_is_last`: solutions (of two steps or more) whose last step alone has the lowest score.
    """
    flawed = [i for i, (y, right) in enumerate(zip(labels, answer_right, strict=True)) if right and y >= 0]
    shares = {
        "flawed_right_detected": [float((predicted[i] or 0) >= 0 and predicted[i] is not None) for i in flawed],
        "flawed_right_located": [float(predicted[i] == labels[i]) for i in flawed],
        "lowest_is_last": [float(lowest_is_last(s)) for s in scores if len(s) > 1],
    }
    return [
        record(arm, metric, paired_bootstrap(values, seed=seed), len(values), seed)
        for metric, values in shares.items()
        if values
    ]


# --- ProcessBench ------------------------------------------------------------------------------------------------------


def evaluate_processbench(config: options_eval.EvaluateProcessBench, out: Path) -> None:
    """F1 of the first wrong step on each subset (arXiv:2412.06559), and their mean."""
    if config.prm:
        config = dataclasses.replace(config, kind="prm", model=config.prm)
    required(config, "model")
    if not config.files:
        raise UserError("files is missing: subset -> file of ProcessBench records")
    records = {subset: first(importers.process_bench(path), config.limit) for subset, path in config.files.items()}
    subsets = {
        subset: [
            Case(str(r.get("id", i)), r["problem"], r["steps"], r["label"], r.get("final_answer_correct"))
            for i, r in enumerate(own)
        ]
        for subset, own in records.items()
    }
    found = judged(config, subsets, records, out)
    thresholds = {config.arm: threshold_of(config, subsets, found)}
    if config.tuned_too:
        thresholds[f"{config.arm}_tuned"] = threshold_of(dataclasses.replace(config, threshold=None), subsets, found)
    lines: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for name, threshold in thresholds.items():
        f1s = []
        for subset, cases in subsets.items():
            arm = f"{name}/{subset}"
            predicted = found[subset].first_errors(threshold)
            own = _f1_records(arm, cases, found[subset], predicted, config.seed)
            f1s.append(own[0]["value"])
            lines += own
            values += _values(arm, cases, predicted)
        lines.append(record(f"{name}/mean", "f1", sum(f1s) / len(f1s), len(f1s), config.seed))
        if all(one.votes is None for one in found.values()):
            lines.append(record(name, "threshold", threshold, 0, config.seed))
    write_results(out, lines, values=values)
    for line in lines:
        print(f"{line['arm']:28s} {line['metric']:18s} {line['value']}")


# --- any data with first errors ----------------------------------------------------------------------------------------


def evaluate_first_errors(config: options_eval.EvaluateFirstErrors, out: Path) -> None:
    """First errors of any imported data or StepLabels rows: F1, correlation of verdicts, and what tells processes from outcomes."""
    if not config.files:
        raise UserError("files is missing: subset -> file or folder of rows")
    rows = {subset: _known_errors(config, path) for subset, path in config.files.items()}
    subsets = {subset: [_case(row) for row in own] for subset, own in rows.items()}
    contents = {subset: [(c.prompt, c.steps) for c in cases] for subset, cases in subsets.items()}
    found = judged(config, subsets, contents, out)
    threshold = threshold_of(config, subsets, found)
    lines: list[dict[str, Any]] = []
    values: list[dict[str, Any]] = []
    for subset, cases in subsets.items():
        arm, one = f"first_error/{subset}", found[subset]
        predicted = one.first_errors(threshold)
        lines += _f1_records(arm, cases, one, predicted, config.seed)
        flat, good = _known_steps(cases, one)
        ece = expected_calibration_error(flat, [float(g) for g in good])
        lines.append(record(arm, "step_ece", ece, len(flat), config.seed))
        lines += _verdict_records(arm, cases, predicted, config.seed)
        labels, right = [c.label for c in cases], [c.answer_right for c in cases]
        lines += process_records(arm, one.scores, predicted, labels, right, config.seed)
        values += _values(arm, cases, predicted)
    if len(subsets) > 1:
        mean = [line["value"] for line in lines if line["metric"] == "f1"]
        lines.append(record("first_error/mean", "f1", sum(mean) / len(mean), len(mean), config.seed))
    if all(one.votes is None for one in found.values()):
        lines.append(record("first_error", "threshold", threshold, 0, config.seed))
    write_results(out, lines, values=values)
    for line in lines:
        print(f"{line['arm']:28s} {line['metric']:24s} {line['value']}")


def _known_errors(config: options_eval.EvaluateFirstErrors, path: str) -> list[StepLabels]:
    if config.format == "rows":
        rows = read_rows(path, StepLabels)
    else:
        imported = importers.import_rows(path, config.format, row_type=StepLabels)
        rows = imported.rows
        if imported.dropped:
            print(f"{path}: left out " + ", ".join(f"{n} {what}" for what, n in imported.dropped.items()))
    known = [row for row in rows if row.first_error_known and row.steps]
    if not known:
        raise UserError(f"{path}: no row says which step is the first wrong one")
    if len(known) < len(rows):
        print(f"{path}: left out {len(rows) - len(known)} rows whose first error is not known")
    return list(first(known, config.limit))


def _case(row: StepLabels) -> Case:
    right = {"right": True, "wrong": False, "unparseable": False}.get(row.outcome)
    return Case(row.problem_id, row.prompt, row.steps, -1 if row.first_error is None else row.first_error, right)


def _verdict_records(
    arm: str, cases: Sequence[Case], predicted: Sequence[int | None], seed: int
) -> list[dict[str, Any]]:
    """Matthews' correlation of "no wrong step", and the part of the MR-Score that needs no judge of reasons."""
    sound = [case.label == -1 for case in cases]
    # A verdict that could not be read is the wrong one.
    said = [(not truth) if p is None else p == -1 for p, truth in zip(predicted, sound, strict=True)]
    groups = [[i] for i in range(len(cases))]
    mcc = lambda idx: matthews([said[i] for i in idx], [sound[i] for i in idx])
    located = lambda idx: first_error_f1([predicted[i] for i in idx], [cases[i].label for i in idx])["accuracy_error"]
    score = lambda idx: 0.2 * max(0.0, mcc(idx)) + 0.3 * located(idx)
    return [
        record(arm, metric, bootstrap_groups(groups, value, seed), len(cases), seed)
        for metric, value in (("mcc", mcc), ("mr_score_without_reasons", score))
    ]


# --- PRMBench ----------------------------------------------------------------------------------------------------------


def evaluate_prmbench(config: options_eval.EvaluatePRMBench, out: Path) -> None:
    """PRMBench (arXiv:2501.03124) by class of error and over all: every step of the modified solutions is judged."""
    required(config, "file")
    if "critic" in config.kind:
        raise UserError("PRMBench asks for a score of every step, and a critic names one: use kind prm or served_prm")
    imported = importers.import_rows(config.file, "prmbench", row_type=StepLabels)
    if imported.dropped:
        print(f"{config.file}: left out " + ", ".join(f"{n} {what}" for what, n in imported.dropped.items()))
    classes: dict[str, list[StepLabels]] = {}
    for row in imported.rows:
        classes.setdefault(row.problem_id.split("/")[1], []).append(row)
    classes = {name: list(first(own, config.limit)) for name, own in sorted(classes.items())}
    subsets = {name: [_case(row) for row in own] for name, own in classes.items()}
    contents = {name: [(c.prompt, c.steps) for c in cases] for name, cases in subsets.items()}
    found = judged(config, subsets, contents, out)
    threshold = threshold_of(config, subsets, found)
    lines: list[dict[str, Any]] = []
    pooled: list[tuple[list[bool], list[bool]]] = []
    for name, own in classes.items():
        pairs = [
            ([s >= threshold for s in scores], [t == 1.0 for t in step_targets(row, "human")])
            for scores, row in zip(found[name].scores, own, strict=True)
        ]
        lines += _prm_scores(f"prmbench/{name}", pairs, config.seed)
        if name != "correct":  # the whole leaves out the unchanged solutions, as the paper does
            pooled += pairs
    if pooled:
        lines += _prm_scores("prmbench/all", pooled, config.seed)
    lines.append(record("prmbench", "threshold", threshold, 0, config.seed))
    write_results(out, lines)
    for line in lines:
        print(f"{line['arm']:32s} {line['metric']:18s} {line['value']}")


def _prm_scores(arm: str, pairs: Sequence[tuple[list[bool], list[bool]]], seed: int) -> list[dict[str, Any]]:
    flat = lambda idx, side: [v for i in idx for v in pairs[i][side]]
    groups = [[i] for i in range(len(pairs))]
    if all(t for _, truth in pairs for t in truth):  # without a wrong step only one question is left
        values = [sum(said) / len(said) for said, _ in pairs]
        return [record(arm, "step_accuracy", paired_bootstrap(values, seed=seed), len(values), seed)]
    return [
        record(
            arm,
            metric,
            bootstrap_groups(groups, lambda idx, m=metric: prm_score(flat(idx, 0), flat(idx, 1))[m], seed),
            len(pairs),
            seed,
        )
        for metric in ("prm_score", "f1", "negative_f1")
    ]
