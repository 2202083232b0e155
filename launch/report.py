"""report.html: one self-contained file with the tables, the plots, and solutions to browse.

A page is a list of (heading, HTML) sections. Each `..._section` function below makes the HTML of one from plain data, and
gives "" where there is nothing to show, which leaves the section out; a page of another kind brings functions of its own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..basics import finite, write_atomic
from ..data_gen.rows import Dialogue
from . import charts, page
from .report_corrections import corrections_section
from .report_dialogues import dialogues_section
from .report_trees import LEAST_ROOM, ROOM, trees_section
from .tables import CURVES, DIFFERENCE, Answers, Curves, Record, other_name, other_pairs, short

# Of metrics.jsonl; each beside its eval_ twin.
SHOWN_METRICS = (
    "loss",
    "accuracy",
    "token_accuracy",
    "reward",
    "kl",
    "entropy",
    "clip_fraction",
    "explained_variance",
    "length",
)


def write_run_report(
    path: str | Path,
    title: str,
    command: str,
    manifest: Mapping[str, Any],
    records: Sequence[Record],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, float]],
    details: Mapping[str, Any],
    searches: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
    dialogues: Mapping[str, Sequence[Dialogue]] | None = None,
) -> None:
    """Writes the report of a run: results, plots, training curves, cost by stage, and solutions to browse.

    `curves` are the metrics.jsonl of training stages, `costs` the ledgers of the stages that made rows, `details` what the
    evaluation stages kept to be shown (`solutions`, `calibration`, `values`, `corrections`), `searches` the records of search
    stages, of which as many trees are shown as a page has room for, `dialogues` the rows of stages, of which some are shown.
    """
    sections = [
        ("Results", results_section(records)),
        ("Choosing among k samples", pool_section(records)),
        ("Step scores", calibration_section(details.get("calibration"))),
        ("Step scores and exact values", values_section(details.get("values"))),
        ("Solutions", solutions_section(details.get("solutions") or [])),
        ("Corrections", corrections_section(details.get("corrections") or [])),
        ("Dialogues", dialogues_section(dialogues or {})),
        ("Training", curves_section(curves)),
        ("Cost by stage", costs_section(costs)),
        ("How it was made", provenance_section(manifest)),
    ]
    room = max(LEAST_ROOM, ROOM - sum(len(body) for _, body in sections))
    sections.insert(5, ("Search trees", trees_section(searches or {}, room)))
    write_report(path, title, sections, intro=f"<p>Made by <code>{page.text(command)}</code></p>" if command else "")


def write_report(path: str | Path, title: str, sections: Sequence[tuple[str, str]], intro: str = "") -> None:
    """Writes a page of (heading, HTML) sections under an introduction in HTML; it asks nothing of the network."""
    kept = [(name, body) for name, body in sections if body]
    # The number keeps two sections of one name apart.
    ids = [f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{i}" for i, (name, _) in enumerate(kept, 1)]
    links = "".join(f'<a href="#{i}">{page.text(name)}</a>' for i, (name, _) in zip(ids, kept, strict=True))
    body = "".join(
        f'<section aria-labelledby="{i}"><h2 id="{i}">{page.text(name)}</h2>{part}</section>'
        for i, (name, part) in zip(ids, kept, strict=True)
    )
    whole = (Path(__file__).parent / "report.html").read_text(encoding="utf-8")
    parts = {"title": page.text(title), "intro": intro, "links": links, "body": body}
    # In one pass: a model may well write {{body}}.
    whole = re.sub(r"\{\{(title|intro|links|body)\}\}", lambda match: parts[match[1]], whole)
    # Model text may hold half a surrogate pair, which UTF-8 has no bytes for.
    write_atomic(path, whole.encode("utf-8", "replace"))


# --- results -----------------------------------------------------------------------------------------------------------


def results_section(records: Sequence[Record]) -> str:
    """The tables, the accuracy of every arm with its interval, and accuracy over generated tokens."""
    answers = Answers(records)
    return "".join([_answers_plots(answers), _answers_table(answers), _others_table(records)])


def _answers_table(answers: Answers) -> str:
    if not answers.rows:
        return ""
    policies, differences = answers.policies, answers.differences
    groups = [("accuracy, %", policies)]
    if differences:
        groups.append(("difference, points", [f"{p} - {metric.removeprefix(DIFFERENCE)}" for p, metric in differences]))
    groups += [(name, policies) for name in ("generated tokens", "FLOPs", "seconds")]
    rows = []
    for row in answers.rows:
        cells = [page.cell(answers.find(p, row)) for p in policies]
        cells += [page.cell(answers.find(p, row, metric), difference=True) for p, metric in differences]
        paid = [answers.cost(p, row) for p in policies]
        cells += [f"{r['tokens']:,}" if r else "-" for r in paid]
        cells += [short(r["flops"]) if r else "-" for r in paid]
        cells += [f"{r['seconds']:,.1f}" if r else "-" for r in paid]
        rows.append([page.text(answers.label(row)), *cells])
    found = [answers.cost(p, row) for p in policies for row in answers.rows]
    counts = sorted({r["n"] for r in found if r})
    caption = (
        f"{' or '.join(f'{n:,}' for n in counts)} problems. Small: 95 % intervals, bootstrapped over problems; differences are "
        "paired, and bold where the interval leaves out 0. pass@N asks whether any of N samples is right: no way to choose "
        "can exceed it. FLOPs are 2 x parameters x tokens, forward, of the policy and of the reward model that chose."
    )
    return page.table("How well each policy answers", groups, rows, caption)


def _others_table(records: Sequence[Record]) -> str:
    rows = []
    for measured, closed in other_pairs(records):
        record = measured or closed
        assert record is not None
        cells = [page.cell(measured), page.cell(closed) if closed else "", f"{record['n']:,}" if record["n"] else ""]
        costs = [
            short(record["flops"]) if record["flops"] else "",
            f"{record['seconds']:,.1f}" if record["seconds"] else "",
        ]
        measure, of = other_name(record, records)
        rows.append([page.text(f"{of}: {measure}"), *cells, *costs])
    if not rows:
        return ""
    caption = (
        "A closed form of label errors holds for a policy that errs uniformly; beside pass_at_1 stands the policy's exact "
        "value, and beside value_rms_gap what the sampling of the counts alone makes it."
    )
    heads = ["measured", "closed form", "n", "FLOPs", "seconds"]
    return page.table("Reward models and labels", [("", heads)], rows, caption)


def _answers_plots(answers: Answers) -> str:
    rows, points = [], {}
    for row in answers.rows:
        found = [answers.find(p, row) for p in answers.policies]
        rows.append((answers.label(row), [_interval(r) if r else None for r in found]))
    for policy in answers.policies:
        values = []
        for row in answers.rows:
            record = answers.find(policy, row)
            drawn = _interval(record) if record and record["tokens"] > 0 else None
            if record and drawn:
                values.append((answers.label(row), float(record["tokens"]), drawn[0]))
        if values:
            points[policy] = values
    if not any(any(values) for _, values in rows):
        return ""
    parts = [
        page.figure(
            "Accuracy of each arm",
            charts.interval_chart(rows, answers.policies, "accuracy, %"),
            "Bars: 95 % intervals.",
        )
    ]
    heights = [value for drawn in points.values() for _, _, value in drawn]
    if heights:
        y = (max(0.0, min(heights) - 5), min(102.0, max(heights) + 5))
        panels = "".join(
            f"<div><h4>{page.text(p)}</h4>{charts.cost_chart(points[p], s, y, ('generated tokens', 'accuracy, %'))}</div>"
            for s, p in enumerate(answers.policies)
            if p in points
        )
        parts.append(
            page.figure(
                "Accuracy over what it cost", f'<div class="panels">{panels}</div>', "The cost axis is logarithmic."
            )
        )
    return "".join(parts)


def _interval(record: Record) -> charts.Interval | None:
    """(value, low, high) in percent, the interval no wider than the value if there is none; None if undefined."""
    if record["value"] is None or not math.isfinite(record["value"]):
        return None
    low, high = record["ci"] or (record["value"], record["value"])
    return 100 * record["value"], 100 * low, 100 * high


def pool_section(records: Sequence[Record]) -> str:
    """Accuracy over the number of samples, a panel for each reward model and aggregation, and the tables of all curves."""
    curves = Curves(records)
    if not curves.arms:
        return ""
    series = {"pass@k": "pass", "majority@k": "majority", "best-of-k": "best", "weighted best-of-k": "weighted"}
    groups: dict[tuple[str, int], dict[str, str]] = {}  # (pool/model_aggregation, seed) -> rule -> arm
    for arm, seed in curves.arms:
        pool, _, name = arm.rpartition("/")
        rule, _, of = name.partition("_")
        if of and rule in series.values():
            groups.setdefault((f"{pool}/{of}", seed), {})[rule] = arm
    panels = []
    for (name, seed), arms in groups.items() or {("", curves.arms[0][1]): {}}.items():
        pool, _, of = name.rpartition("/")
        arms = {"pass": f"{pool or 'pool'}/pass", "majority": f"{pool or 'pool'}/majority", **arms}
        drawn = {}
        for words, rule in series.items():
            found = [(k, curves.find("accuracy", (arms.get(rule, ""), seed), k)) for k in curves.ks]
            points = [(float(k), 100 * r["value"]) for k, r in found if r and r["value"] is not None]
            if points:
                drawn[words] = points
        if drawn:
            panels.append(f"<div><h4>{page.text(of)}</h4>{charts.pool_chart(drawn, 'samples k', 'accuracy, %')}</div>")
    tables = []
    for kind in curves.kinds:
        groups_of_columns = [("", [f"k = {k}" for k in curves.ks])]
        rows = [
            [page.text(label), *(page.cell(r, difference=kind == "minus_majority") for r in found)]
            for label, found in curves.rows(kind)
        ]
        if kind == "accuracy":
            tables.append(page.table(CURVES[kind], groups_of_columns, rows))
        else:
            table = page.table("", groups_of_columns, rows)
            tables.append(f"<details><summary>{page.text(CURVES[kind])}</summary>{table}</details>")
    figure = ""
    if panels:
        words = (
            "Expected accuracy of k samples drawn from the pool. pass@k asks whether any is right, and no choice can exceed it; "
            "majority needs no model. How step scores become one number is named behind the model."
        )
        figure = page.figure("", charts.legend(list(series)) + f'<div class="panels">{"".join(panels)}</div>', words)
    return figure + "".join(tables)


def values_section(data: Mapping[str, Sequence[Sequence[float]]] | None) -> str:
    """Mean exact value of the policy over mean step score, in ten bins, for each model."""
    panels = []
    for arm, bins in (data or {}).items():
        points = [(score, (value, value, value)) for score, value, _ in bins]
        if points:
            chart = charts.reliability_chart(points, ("step score", "exact value of the policy"))
            panels.append(f"<div><h4>{page.text(arm)}</h4>{chart}</div>")
    words = "The probability that the policy ends right from a step, computed and not sampled. On the dashed line a score is it."
    return page.figure("", f'<div class="panels">{"".join(panels)}</div>', words) if panels else ""


# --- training and step scores ------------------------------------------------------------------------------------------


def curves_section(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Loss and accuracy of each training stage over its optimiser steps, one small plot each."""
    panels, lost, evaluated = [], 0, False
    for stage, lines in curves.items():
        for metric in SHOWN_METRICS:
            drawn = {}
            for name in (metric, f"eval_{metric}"):
                points = [(p["step"], p[name]) for p in lines if isinstance(p.get(name), (int, float)) and "step" in p]
                kept = [p for p in points if math.isfinite(p[1])]
                lost += len(points) - len(kept)
                if kept:
                    drawn[name] = kept
            if drawn:
                chart = charts.line_chart(drawn, "optimiser step", metric.replace("_", " "))
                panels.append(f"<div><h4>{page.text(stage)}</h4>{chart}</div>")
                evaluated |= len(drawn) > 1
    if not panels and not lost:
        return ""
    words = "The number is the last value. A loss is in nats where it is a cross-entropy."
    if lost:
        words += f" {lost} values are not finite and were left out."
    names = charts.legend(["training", "evaluation"]) if evaluated else ""
    return page.figure("", f'{names}<div class="panels small">{"".join(panels)}</div>', words)


def calibration_section(data: Mapping[str, Sequence[Any]] | None) -> str:
    """Reliability of step scores, and their histogram for right and wrong steps: `scores` and `right`, step by step."""
    found = [(s, bool(r)) for s, r in zip(data["scores"], data["right"], strict=True) if r is not None] if data else []
    pairs = [(min(max(s, 0.0), 1.0), r) for s, r in found if s is not None and math.isfinite(s)]
    if not pairs:
        return ""
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(10)]
    bars = {True: [0] * 20, False: [0] * 20}
    for score, right in pairs:
        bins[min(int(score * 10), 9)].append((score, right))
        bars[right][min(int(score * 20), 19)] += 1
    reliability = [(sum(s for s, _ in b) / len(b), wilson(sum(r for _, r in b), len(b))) for b in bins if b]
    shares = {right: [100 * count / max(1, sum(counts)) for count in counts] for right, counts in bars.items()}
    names = (f"right steps, {sum(bars[True]):,}", f"wrong steps, {sum(bars[False]):,}")
    left = charts.reliability_chart(reliability, ("step score", "share of steps that are right"))
    histogram = charts.mirror_chart(
        shares[True], shares[False], names, ("step score", "% of the right, and of the wrong")
    )
    panels = f"<div><h4>Is a score a probability?</h4>{left}</div><div><h4>Do scores part right from wrong?</h4>{histogram}</div>"
    words = (
        f"{len(pairs):,} steps of held-out solutions; right and wrong after the exact checker. On the dashed line a score "
        "is the share of right steps it foretells; bars are 95 % Wilson intervals, which take steps as independent."
    )
    if len(pairs) < len(data["scores"] if data else []):
        words += f" {len(data['scores'] if data else []) - len(pairs):,} steps have no score or no verdict."
    return page.figure("", f'<div class="panels">{panels}</div>', words)


def wilson(right: int, n: int) -> charts.Interval:
    """(share, low, high) of a 95 % Wilson score interval."""
    z, share = 1.959964, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, max(0.0, middle - half), min(1.0, middle + half)


# --- cost and provenance -----------------------------------------------------------------------------------------------


def costs_section(costs: Mapping[str, Mapping[str, float]]) -> str:
    """What each stage that made rows cost, and the sum."""
    if not costs:
        return ""
    columns = {
        "generated_tokens": "generated tokens",
        "prefilled_tokens": "prefilled tokens",
        "reward_tokens": "reward-model tokens",
        "policy_calls": "samples",
        "flops": "FLOPs",
        "seconds": "seconds",
    }
    total = {key: sum(cost.get(key, 0) for cost in costs.values()) for key in columns}
    rows = []
    for name, cost in [*costs.items(), ("together", total)]:
        counts = [f"{cost.get(key, 0):,.0f}" for key in list(columns)[:4]]
        rows.append([page.text(name), *counts, short(cost.get("flops", 0)), f"{cost.get('seconds', 0):,.1f}"])
    caption = "FLOPs are 2 x parameters x tokens, forward; a prefix that samples share is prefilled once."
    return page.table("", [("", list(columns.values()))], rows, caption)


def provenance_section(manifest: Mapping[str, Any]) -> str:
    """Versions, seed and machine as a table, nested fields named by their path; a `config` as YAML that can be opened."""
    flat: list[list[str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}: {key}" if name else str(key), inner)
        else:
            flat.append([page.text(name), page.text(value)])

    config = manifest.get("config")
    if isinstance(config, Mapping) and "seed" in config:
        add("seed", config["seed"])
    add("", {key: value for key, value in manifest.items() if key not in ("config", "command")})
    parts = [page.table("", [("", ["value"])], flat)] if flat else []
    if config:
        text = yaml.safe_dump(json.loads(json.dumps(config, default=str)), sort_keys=False, allow_unicode=True)
        parts.append(f"<details><summary>The recipe</summary><pre>{page.text(text)}</pre></details>")
    return "".join(parts)


# --- solutions ---------------------------------------------------------------------------------------------------------


def solutions_section(solutions: Sequence[Mapping[str, Any]]) -> str:
    """Solutions that some arm chose, problem by problem, with the score of each step, right and wrong marked.

    A solution is {problem_id, prompt, gold, policy, steps, scores, step_right, answer, outcome, selected_by}. It travels
    as JSON, and the page's script writes it as text, never as HTML.
    """
    if not solutions:
        return ""
    data = page.embedded(finite(solutions))
    exact = any(right is not None for s in solutions for right in s["step_right"])
    marks = (
        "✓ and ✗ are the exact checker's verdict on the step. "
        if exact
        else "This task has no exact checker of steps. "
    )
    return (
        '<div class="browse"><div class="controls">'
        '<label>Show <select class="filter">'
        '<option value="all">all problems</option>'
        '<option value="disagree">arms disagree: some right, some not</option>'
        '<option value="right">some arm is right</option>'
        '<option value="wrong">no arm is right</option></select></label>'
        '<label>Problem <select class="problem"></select></label>'
        '<span class="pair"><button class="previous" type="button">← previous</button> '
        '<button class="next" type="button">next →</button></span>'
        '<span class="status" role="status"></span></div>'
        f'<p class="hint">Bar and number: the process reward model\'s score of the step. {marks}'
        "Every solution here was chosen by the arms it names.</p>"
        '<div class="prompt"></div><div class="cards"></div>'
        "<noscript><p>The solutions need JavaScript; they are in this file as JSON.</p></noscript>"
        f'<script type="application/json" class="solutions">{data}</script></div>'
    )
