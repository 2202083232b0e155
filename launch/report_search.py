"""The page of a comparison of searches, and its curves as pictures."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import charts, page
from .report import costs_section, write_report
from .report_trees import LEAST_ROOM, ROOM, trees_section
from .tables import Record, short

COSTS = {
    "flops": "FLOPs a problem",
    "tokens": "generated tokens a problem",
    "serial": "tokens a problem one after another",
}
WORDS = {
    "best": "the search's own choice",
    "weighted": "weighted vote",
    "majority": "majority vote",
    "pass": "any of them (no choice)",
    "sound": "any right in every step",
}


def write_comparison(
    out: Path,
    records: Sequence[Record],
    details: Mapping[str, Any],
    title: str,
    searches: Mapping[str, Iterable[Mapping[str, Any]]] | None = None,
) -> None:
    """Writes report.html and, where matplotlib is installed, curves-flops.png, curves-tokens.png and curves-serial.png.

    `searches` are the records of searches whose trees are shown.
    """
    sections = [
        ("Accuracy over cost", curves_figures(records, details)),
        ("At equal cost", matched_section(records, details, "flops") + matched_section(records, details, "tokens")),
        ("By difficulty", levels_section(records, details)),
        ("Repeated sampling", coverage_section(details.get("coverage"))),
        ("All searches", runs_section(records, details)),
        ("Cost of the searches", costs_section({f"{r['arm']}@{r['budget']}": r["ledger"] for r in details["runs"]})),
    ]
    room = max(LEAST_ROOM, ROOM - sum(len(body) for _, body in sections))
    sections.append(("Search trees", trees_section(searches or {}, room)))
    write_report(out / "report.html", title, sections)
    if importlib.util.find_spec("matplotlib") is None:
        print("curves as PNG need matplotlib (the extra `plots`); they are in report.html", flush=True)
        return
    for cost in COSTS:
        save_curves(out / f"curves-{cost}.png", curves(records, details, "weighted", cost), COSTS[cost], title)


def curves(
    records: Sequence[Record], details: Mapping[str, Any], rule: str, cost: str
) -> dict[str, list[tuple[float, charts.Interval]]]:
    """Arm -> (cost a problem, accuracy in percent with its interval) of its budgets, the cheapest first."""
    intervals = {r["arm"]: r["ci"] for r in records if r["metric"] == "accuracy"}
    lines: dict[str, list[tuple[float, charts.Interval]]] = {}
    for run in details["runs"]:
        paid = run["flops"][rule] if cost == "flops" else run[cost]
        value = run["accuracy"][rule]
        low, high = intervals.get(f"{rule}/{run['arm']}@{run['budget']}") or (value, value)
        if paid > 0:
            lines.setdefault(run["arm"], []).append((paid, (100 * value, 100 * low, 100 * high)))
    return {arm: sorted(points) for arm, points in lines.items()}


def curves_figures(records: Sequence[Record], details: Mapping[str, Any]) -> str:
    """Accuracy over each cost, by weighted vote and by the search's own choice.

    A few searches share one chart; more than there are colours have one each, with its intervals, before all others.
    """
    words = (
        "The cost axis is logarithmic. FLOPs count the policy and the reward model, forward. Tokens one after another "
        "are the longest sample of each round: what is waited for, however wide the batches are."
    )
    reference = details["reference"]
    apart = (
        f"The search of the heading with its 95 % intervals, {reference} in its own colour, and all others in grey, "
        "on the same axes. "
    )
    parts = []
    for rule in ("weighted", "best"):
        title = WORDS[rule].capitalize()
        found = {cost: lines for cost in COSTS if (lines := curves(records, details, rule, cost))}
        if not found:
            continue
        if max(map(len, found.values())) <= charts.SERIES:
            panels = [
                charts.curve_chart(
                    {arm: [(x, value) for x, (value, _, _) in points] for arm, points in lines.items()},
                    (COSTS[cost], "accuracy, %"),
                )
                for cost, lines in found.items()
            ]
            body = "".join(f"<div>{panel}</div>" for panel in panels)
            parts.append(page.figure(title, f'<div class="panels">{body}</div>', words))
            continue
        for cost, lines in found.items():
            made = charts.apart_charts(lines, reference, (COSTS[cost], "accuracy, %"))
            body = "".join(f"<div><h4>{page.text(arm)}</h4>{chart}</div>" for arm, chart in made.items())
            figure = page.figure(
                f"{title}, over {COSTS[cost]}", f'<div class="panels small">{body}</div>', apart + words
            )
            # FLOPs are what a comparison goes by; the other two are a click away.
            summary = f"<summary>{page.text(title)}, over {page.text(COSTS[cost])}</summary>"
            parts.append(figure if cost == "flops" else f"<details>{summary}{figure}</details>")
    return "".join(parts)


def matched_section(records: Sequence[Record], details: Mapping[str, Any], cost: str) -> str:
    """Accuracy of every arm at its largest budget that costs no more (`flops` or `tokens`) than the reference."""
    found = {(r["arm"], r["metric"]): r for r in records}
    reference = details["reference"]
    matched = [one for one in details["matched"] if one["cost"] == cost]
    budgets = sorted({one["at"] for one in matched})
    metric, minus = f"accuracy_at_equal_{cost}", f"accuracy_at_equal_{cost}_minus_{reference}"
    arms = list(dict.fromkeys(a.rpartition("~")[0] for a, m in found if m == metric))
    chosen = {(f"{one['rule']}/{one['arm']}", one["at"]): one["budget"] for one in matched}
    rows = []
    for arm in arms:
        cells = []
        for budget in budgets:
            one = found.get((f"{arm}~{budget}", metric))
            mark = f'<span class="tag">@{chosen[arm, budget]}</span> ' if (arm, budget) in chosen else ""
            cells.append(mark + page.cell(one) if one else "-")
        cells += [page.cell(found.get((f"{arm}~{budget}", minus)), difference=True) for budget in budgets]
        rows.append([page.text(arm), *cells])
    heads = [f"{reference}@{budget}" for budget in budgets]
    if not rows:
        return ""
    heads = [str(budget) for budget in budgets]
    paid = {"flops": "FLOPs, policy and reward model together,", "tokens": "tokens, sampled by the policy,"}[cost]
    caption = (
        f"Each column allows the {paid} of {reference} at that budget and the slack of the comparison; @ is the largest budget "
        "of the arm that keeps within it, a line where even its least does not. Bold differences have an interval without 0."
    )
    if cost == "flops":
        caption += (
            " Majority vote asks no reward model and buys more samples. compute_optimal takes each level of difficulty's best "
            "arm on one half of its problems and is measured on the other; what it costs to tell the level is not charged."
        )
    title = {"flops": "At equal FLOPs", "tokens": "At equal sampled tokens"}[cost]
    at = f"at the {'FLOPs' if cost == 'flops' else 'tokens'} of {reference}@"
    return page.table(title, [(f"accuracy, %, {at}", heads), (f"difference, points, {at}", heads)], rows, caption)


def levels_section(records: Sequence[Record], details: Mapping[str, Any]) -> str:
    """Accuracy of every run by level of difficulty, and what was chosen for the levels."""
    found = {(r["arm"], r["metric"]): r for r in records if r["metric"].startswith("accuracy_level_")}
    levels = sorted({metric.rpartition("_")[2] for _, metric in found})
    if not levels:
        return ""
    arms = list(dict.fromkeys(arm for arm, _ in found))
    counts = {level: next(r["n"] for (_, m), r in found.items() if m.endswith(f"_{level}")) for level in levels}
    rows = [
        [page.text(arm), *(page.cell(found.get((arm, f"accuracy_level_{level}"))) for level in levels)] for arm in arms
    ]
    heads = [f"level {level} (n = {counts[level]})" for level in levels]
    caption = "Levels are quantiles of the share of right samples (oracle), 1 the easiest. Weighted vote."
    parts = [page.table("Accuracy by level, %", [("", heads)], rows, caption)]
    lines = [[page.text(name), *(page.text(" / ".join(one.get(level, []))) for level in levels)] for name, one in
             details["choices"].items()]  # fmt: skip
    if lines:
        table = page.table(
            "", [("", [f"level {level}" for level in levels])], lines, "What each half of the problems chose."
        )
        parts.append(f"<details><summary>Which arm was chosen for which level</summary>{table}</details>")
    return "".join(parts)


def coverage_section(data: Mapping[str, Any] | None) -> str:
    """Coverage over the number of samples, with the fitted law."""
    if not data or len(data["k"]) < 2:
        return ""
    lines = {"measured": [(float(k), 100 * c) for k, c in zip(data["k"], data["coverage"], strict=True)]}
    words = "Share of problems of which any of k samples is right, from one pool."
    if law := data["law"]:
        lines["exp(a k^b)"] = [(float(k), 100 * math.exp(law["a"] * k ** law["b"])) for k in data["k"]]
        words += f" The law: a = {law['a']:.3g}, b = {law['b']:.3g}, off by {100 * law['rmse']:.2f} points (root mean square)"
        words += f" and {100 * law['worst']:.2f} at most."
    if "chance" in data:
        lines["by luck"] = [(float(k), 100 * c) for k, c in zip(data["k"], data["chance"], strict=True)]
        words += " By luck: answers to other problems, tried here."
    if "sound" in data:
        lines["right in every step"] = [(float(k), 100 * c) for k, c in zip(data["k"], data["sound"], strict=True)]
        words += " Right in every step: solutions that the exact checker finds no error in."
    shares = [page.text(str(n)) for n in data["right_share_histogram"]]
    heads = [f"{i / 10:.1f}" for i in range(10)]
    table = page.table("Problems by their share of right samples, from", [("", heads)], [["problems", *shares]])
    return page.figure("", charts.curve_chart(lines, ("samples k", "coverage, %")), words) + table


def runs_section(records: Sequence[Record], details: Mapping[str, Any]) -> str:
    """Every run: accuracy by rule, cost, and how the search behaved."""
    found = {(r["arm"], r["metric"]): r for r in records}
    rows = []
    number = lambda value: "-" if value is None else f"{value:.1f}"
    for run in details["runs"]:
        name = f"{run['arm']}@{run['budget']}"
        cells = [page.cell(found.get((f"{rule}/{name}", "accuracy"))) for rule in WORDS]
        about = run["about"]
        behaviour = [number(about.get(key)) for key in ("solutions", "steps_of_the_chosen", "different_answers")]
        paid = [
            f"{run['tokens']:,.0f}",
            short(run["flops"]["best"]),
            number(about.get("rounds")),
            f"{run['serial']:,.0f}",
        ]
        rows.append([page.text(name), *cells, *paid, *behaviour])
    groups = [
        ("accuracy, %", [WORDS[rule] for rule in WORDS]),
        ("cost a problem", ["generated tokens", "FLOPs", "rounds", "tokens one after another"]),
        ("mean a problem", ["solutions", "steps of the chosen", "different answers"]),
    ]
    caption = (
        "Chosen solutions that get shorter, or answers that get fewer, as the budget grows are signs of a search that exploits "
        "its reward model."
    )
    return page.table("", groups, rows, caption)


def save_curves(
    path: Path, lines: Mapping[str, Sequence[tuple[float, charts.Interval]]], cost: str, title: str
) -> None:
    """Writes the curves as a PNG: every arm with a colour and mark of its own, and its intervals; the best at the end first."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 5.5), dpi=120)
    marks = "osD^vP*X<>pdh8"
    tab20 = pyplot.get_cmap("tab20")
    colours = [tab20(i) for i in (*range(0, 20, 2), *range(1, 20, 2))]  # the ten dark ones, then their light sisters
    ordered = sorted(enumerate(lines.items()), key=lambda one: -one[1][1][-1][1][0])
    for number, (arm, points) in ordered:
        costs = [x for x, _ in points]
        values = [value for _, (value, _, _) in points]
        colour = colours[number % len(colours)]
        spans = [[value - low for _, (value, low, _) in points], [high - value for _, (value, _, high) in points]]
        axes.errorbar(costs, values, spans, fmt="none", ecolor=colour, elinewidth=1, alpha=0.4)
        axes.plot(
            costs, values, color=colour, marker=marks[number % len(marks)], label=arm, linewidth=1.5, markersize=6
        )
    axes.set_xscale("log")
    axes.set_xlabel(cost)
    axes.set_ylabel("accuracy by weighted vote, %")
    axes.set_title(f"{title}, with 95 % intervals")
    axes.grid(alpha=0.3)
    # Beside the lines, not over them.
    axes.legend(fontsize=9, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
