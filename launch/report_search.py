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
        ("Accuracy over cost", curves_figures(details)),
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
        save_curves(out / f"curves-{cost}.png", curves(details, "weighted", cost), COSTS[cost], title)


def curves(details: Mapping[str, Any], rule: str, cost: str) -> dict[str, list[tuple[float, float]]]:
    """Arm -> (cost a problem, accuracy in percent) of its budgets, the cheapest first."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for run in details["runs"]:
        paid = run["flops"][rule] if cost == "flops" else run[cost]
        if paid > 0:
            lines.setdefault(run["arm"], []).append((paid, 100 * run["accuracy"][rule]))
    return {arm: sorted(points) for arm, points in lines.items()}


def curves_figures(details: Mapping[str, Any]) -> str:
    """Accuracy over FLOPs and over tokens, by the search's own choice and by weighted vote."""
    parts = []
    for rule in ("weighted", "best"):
        panels = []
        for cost, label in COSTS.items():
            lines = curves(details, rule, cost)
            if lines:
                panels.append(f"<div>{charts.curve_chart(lines, (label, 'accuracy, %'))}</div>")
        if panels:
            words = (
                "The cost axis is logarithmic. FLOPs count the policy and the reward model, forward. Tokens one after another "
                "are the longest sample of each round: what is waited for, however wide the batches are."
            )
            parts.append(page.figure(WORDS[rule].capitalize(), f'<div class="panels">{"".join(panels)}</div>', words))
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
            mark = f" <small>@{chosen[arm, budget]}</small>" if (arm, budget) in chosen else ""
            cells.append(page.cell(one) + mark if one else "-")
        cells += [page.cell(found.get((f"{arm}~{budget}", minus)), difference=True) for budget in budgets]
        rows.append([page.text(arm), *cells])
    heads = [f"{reference}@{budget}" for budget in budgets]
    if not rows:
        return ""
    heads = [f"as {reference}@{budget}" for budget in budgets]
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
    return page.table(title, [("accuracy, %", heads), ("difference, points", heads)], rows, caption)


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


def save_curves(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], cost: str, title: str) -> None:
    """Writes the curves as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=120)
    marks = "osD^vP*X<>"
    for number, (arm, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), marker=marks[number % len(marks)], label=arm, linewidth=1.5)
    axes.set_xscale("log")
    axes.set_xlabel(cost)
    axes.set_ylabel("accuracy, % (weighted vote)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
