"""The results of a run as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Metrics that are shares and read best in percent.
PERCENT = ("accuracy", "label_", "step_error_rate")


def show(line: Mapping[str, Any] | None) -> str:
    """One value with its interval: shares in percent, everything else with three digits; "-" for what is missing."""
    if line is None or line["value"] is None:
        return "-"
    scale, digits = (100.0, 1) if line["metric"].startswith(PERCENT) else (1.0, 3)
    text = f"{line['value'] * scale:.{digits}f}"
    if line["ci"]:
        text += f" [{line['ci'][0] * scale:.{digits}f}, {line['ci'][1] * scale:.{digits}f}]"
    return text


def policy_arms(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    """(policies, arms) in the order in which they first appear among the records."""
    names = [r["arm"].split("/", 1) for r in records if r["metric"] == "accuracy" and "/" in r["arm"]]
    return list(dict.fromkeys(n[0] for n in names)), list(dict.fromkeys(n[1] for n in names))


def find(records: Sequence[Mapping[str, Any]], arm: str, metric: str) -> Mapping[str, Any] | None:
    """The record of an arm and a metric; None if there is none."""
    return next((r for r in records if r["arm"] == arm and r["metric"] == metric), None)


def answer_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: an arm, its accuracy for each policy, its difference from majority vote, its generated tokens."""
    policies, arms = policy_arms(records)
    rows = [["accuracy, %", *policies, *(f"{p} - majority" for p in policies), "tokens"]]
    for arm in arms:
        found = [find(records, f"{p}/{arm}", "accuracy") for p in policies]
        minus = [find(records, f"{p}/{arm}", "accuracy_minus_majority") for p in policies]
        tokens = " / ".join(_short(f["tokens"]) if f else "-" for f in found)
        rows.append([arm, *map(show, found), *map(show, minus), tokens])
    return rows


def gain_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows: what each later policy gains over the first, arm by arm; empty with one policy."""
    policies, arms = policy_arms(records)
    if len(policies) < 2:
        return []
    metric = f"accuracy_minus_{policies[0]}"
    rows = [["accuracy, points", *(f"{p} - {policies[0]}" for p in policies[1:])]]
    return rows + [[arm, *(show(find(records, f"{p}/{arm}", metric)) for p in policies[1:])] for arm in arms]


def other_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and rows of everything that is not a policy's accuracy; a closed form stands beside what was measured."""
    rows = [["measure", "of", "value", "closed form", "n"]]
    for line in records:
        if line["metric"].startswith("accuracy") and "/" in line["arm"] and not line["arm"].startswith("processbench"):
            continue
        if line["metric"].endswith("_closed_form"):
            continue
        closed = find(records, line["arm"], f"{line['metric']}_closed_form")
        rows.append([line["metric"], line["arm"], show(line), show(closed) if closed else "", str(line["n"])])
    return rows if len(rows) > 1 else []


def format_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The aligned tables that a command prints."""
    tables = [t for t in (answer_rows(records), gain_rows(records), other_rows(records)) if len(t) > 1]
    return "\n\n".join(_align(table) for table in tables)


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * sum(widths, 2 * (len(widths) - 1)), *lines[1:]])


def _short(count: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return f"{count:.0f}"
