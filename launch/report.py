"""report.html: one self-contained file with the tables, the plots, and solutions to browse."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import write_atomic
from .tables import answer_rows, find, gain_rows, other_rows, policy_arms

# Okabe and Ito's palette: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def write_run_report(
    path: str | Path,
    title: str,
    command: str,
    manifest: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    costs: Mapping[str, Mapping[str, float]],
    details: Mapping[str, Any],
) -> None:
    """Writes the report of a run: results, plots, training curves, cost by stage, and solutions to browse.

    `curves` are the metrics.jsonl of training stages, `costs` the ledgers of the stages that made rows, `details` what the
    evaluation stages kept to be shown (`solutions`, `calibration`).
    """
    seed = (manifest.get("config") or {}).get("seed", "")
    intro = f"<p>Made by <code>{_text(command)}</code>, seed {_text(seed)}, stepladder {_text(manifest.get('stepladder', ''))}.</p>"
    sections = [
        ("Results", intro + results_section(records)),
        ("Training", curves_section(curves)),
        ("Step scores", calibration_section(details.get("calibration"))),
        ("Cost by stage", costs_section(costs)),
        ("Solutions", solutions_section(details.get("solutions") or [])),
        ("Versions", _table([["package", "version"], *([k, str(v)] for k, v in (manifest.get("versions") or {}).items())])),
    ]
    write_report(path, title, [(name, body) for name, body in sections if body])


def write_report(path: str | Path, title: str, sections: Sequence[tuple[str, str]]) -> None:
    """Writes a page of (heading, HTML) sections; it asks nothing of the network."""
    here = Path(__file__).parent
    page = (here / "report.html").read_text(encoding="utf-8")
    links = "".join(f'<a href="#s{i}">{_text(name)}</a>' for i, (name, _) in enumerate(sections))
    body = "".join(f'<section id="s{i}"><h2>{_text(name)}</h2>{part}</section>' for i, (name, part) in enumerate(sections))
    for mark, value in (("{{title}}", _text(title)), ("{{links}}", links), ("{{body}}", body)):
        page = page.replace(mark, value)
    write_atomic(path, page)


def results_section(records: Sequence[Mapping[str, Any]]) -> str:
    """The tables, the accuracy of every arm with its interval, and accuracy over generated tokens."""
    parts = []
    for rows, caption in (
        (answer_rows(records), "Accuracy with 95 % intervals, bootstrapped over problems; differences are paired."),
        (gain_rows(records), "What the later policies gain, arm by arm, on the same problems."),
        (other_rows(records), "Everything else that was measured; closed forms hold for a policy that errs uniformly."),
    ):
        if len(rows) > 1:
            parts.append(_table(rows, caption))
    policies, arms = policy_arms(records)
    if policies:
        parts.append(_figure(_plot_arms(records, policies, arms), "Accuracy of each arm with its 95 % interval"))
        parts.append(_figure(_plot_cost(records, policies, arms), "Accuracy over generated tokens"))
    return "".join(parts)


def curves_section(curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Training loss of each stage over its optimiser steps."""
    drawn = {name: [(p["step"], p["loss"]) for p in points if "loss" in p] for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return ""
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(drawn), figsize=(3.4 * len(drawn), 2.6), squeeze=False)
    for axis, (name, points), colour in zip(axes[0], drawn.items(), COLOURS * len(drawn), strict=False):
        axis.plot(*zip(*points, strict=True), color=colour)
        axis.set(title=name, xlabel="optimiser step", ylabel="loss, nats")
        axis.set_ylim(bottom=0)
    return _figure(_png(figure), f"Training loss of {', '.join(drawn)}")


def calibration_section(data: Mapping[str, Sequence[Any]] | None) -> str:
    """Reliability of step scores, and their histogram for steps on and off the track."""
    if not data or not data["scores"]:
        return ""
    scores, right = data["scores"], data["right"]
    plt = _pyplot()
    figure, (left, axis) = plt.subplots(1, 2, figsize=(8.4, 3.2))
    bins: list[list[bool]] = [[] for _ in range(10)]
    for score, good in zip(scores, right, strict=True):
        bins[min(int(score * 10), 9)].append(good)
    middle = [(i + 0.5) / 10 for i in range(10) if bins[i]]
    left.plot([0, 1], [0, 1], color="#888888", linewidth=1, linestyle="--")
    left.plot(middle, [sum(b) / len(b) for b in bins if b], marker="o", color=COLOURS[0])
    left.set(xlabel="step score", ylabel="share of steps on track", title="reliability", xlim=(0, 1), ylim=(0, 1))
    edges = [i / 20 for i in range(21)]
    for name, wanted, colour in (("on track", True, COLOURS[0]), ("off track", False, COLOURS[1])):
        axis.hist([s for s, g in zip(scores, right, strict=True) if g is wanted], bins=edges, alpha=0.65, color=colour, label=name)
    axis.set(xlabel="step score", ylabel="steps", title="step scores of held-out solutions")
    axis.legend(frameon=False)
    return _figure(_png(figure), "Reliability and histogram of the process reward model's step scores")


def costs_section(costs: Mapping[str, Mapping[str, float]]) -> str:
    """What each stage that made rows cost."""
    if not costs:
        return ""
    rows = [["stage", "generated tokens", "prefilled tokens", "reward-model tokens", "samples", "FLOPs", "seconds"]]
    for name, c in costs.items():
        counts = [f"{c[k]:,.0f}" for k in ("generated_tokens", "prefilled_tokens", "reward_tokens", "policy_calls")]
        rows.append([name, *counts, f"{c['flops']:.3g}", f"{c['seconds']:,.1f}"])
    return _table(rows, "FLOPs are 2 x parameters x tokens, forward.")


def solutions_section(solutions: Sequence[Mapping[str, Any]]) -> str:
    """Solutions that some arm chose, problem by problem, with the score of each step, right and wrong marked."""
    if not solutions:
        return ""
    # Inside a script element only "</" could end it early: every "<" is written as an escape.
    data = json.dumps(list(solutions), ensure_ascii=False).replace("<", "\\u003c")
    return (
        '<div class="browse"><div class="controls">'
        '<label>Show <select id="filter"><option value="all">all problems</option>'
        '<option value="disagree">problems where arms disagree</option>'
        '<option value="right">problems that some arm solves</option>'
        '<option value="wrong">problems that no arm solves</option></select></label>'
        '<label>Problem <select id="problem"></select></label>'
        '<button id="previous" type="button">previous</button><button id="next" type="button">next</button></div>'
        '<p class="hint">A bar and a number are the process reward model\'s score of a step; ✓ and ✗ are the exact checker\'s '
        "verdict where the task has one.</p>"
        '<div id="prompt" class="prompt"></div><div id="cards" class="cards" aria-live="polite"></div></div>'
        f'<script type="application/json" id="solutions">{data}</script>'
    )


def _plot_arms(records: Sequence[Mapping[str, Any]], policies: Sequence[str], arms: Sequence[str]) -> str:
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(8.4, 0.42 * len(arms) + 1.1))
    height = 0.8 / len(policies)
    for p, (policy, colour) in enumerate(zip(policies, COLOURS * len(policies), strict=False)):
        for a, arm in enumerate(arms):
            line = find(records, f"{policy}/{arm}", "accuracy")
            if line is None or not line["ci"]:
                continue
            y, value, (low, high) = a + (p - (len(policies) - 1) / 2) * height, 100 * line["value"], line["ci"]
            axis.plot([100 * low, 100 * high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
            axis.plot([value], [y], marker="o", color=colour, label=policy if a == 0 else None, linestyle="none")
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, %", xlim=(0, 102))
    axis.grid(axis="x", color="#dddddd", linewidth=0.6)
    axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(policies))
    return _png(figure)


def _plot_cost(records: Sequence[Mapping[str, Any]], policies: Sequence[str], arms: Sequence[str]) -> str:
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(policies), figsize=(4.2 * len(policies), 3.6), sharey=True, squeeze=False)
    for axis, policy, colour in zip(axes[0], policies, COLOURS * len(policies), strict=False):
        points = [(arm, line) for arm in arms if (line := find(records, f"{policy}/{arm}", "accuracy")) and line["tokens"]]
        # Many arms share one pool of samples: labels of one cost stand below each other, highest first.
        points.sort(key=lambda point: -point[1]["value"])
        last: dict[int, float] = {}
        for arm, line in points:
            column, value = round(line["tokens"] / 1e4), 100 * line["value"]
            y = min(value, last.get(column, 1e9) - 3.4)
            last[column] = y
            axis.plot(line["tokens"], value, marker="o", color=colour)
            axis.annotate(arm, (line["tokens"], value), (line["tokens"] * 1.12, y), fontsize=7, va="center")
        axis.set(title=policy, xlabel="generated tokens", xscale="log")
        costs = [line["tokens"] for _, line in points]
        if costs:
            axis.set_xlim(min(costs) / 1.6, max(costs) * 9)
    axes[0][0].set_ylabel("accuracy, %")
    return _png(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 150})
    return plt


def _png(figure: Any) -> str:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight", facecolor="white", metadata={"Software": None})
    plt.close(figure)
    return base64.b64encode(buffer.getvalue()).decode()


def _figure(png: str, words: str) -> str:
    return f'<figure><img src="data:image/png;base64,{png}" alt="{_text(words)}"><figcaption>{_text(words)}</figcaption></figure>'


def _table(rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head, *body = rows
    cells = "".join(f'<th scope="col">{_text(c)}</th>' for c in head)
    lines = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>' + "".join(f"<td>{_text(c)}</td>" for c in row[1:]) + "</tr>" for row in body
    )
    words = f"<caption>{_text(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{words}<thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table></div>'


def _text(value: Any) -> str:
    return html.escape(str(value))
