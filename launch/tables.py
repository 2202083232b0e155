"""The results of a run as a table for a terminal, and what the report's tables share with it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]
Row = tuple[str, int, int]

# Metrics that are shares and read best in percent.
PERCENT = (
    "accuracy", "label_", "step_error_rate", "step_accuracy", "verdict_accuracy", "pass_at_1", "flawed_right", "lowest_is_last",
    "unparseable", "minus_majority@", "oracle_gap@",
)  # fmt: skip
DIFFERENCE = "accuracy_minus_"
CLOSED_FORM = "_closed_form"
WIDTH = 100


def show(record: Record | None) -> str:
    """One value with its interval, "48.2 [44.0, 52.4]": shares in percent, everything else with three digits.

    "-" where there is no record, "undefined" where there is one whose value could not be computed.
    """
    if record is None:
        return "-"
    if record["value"] is None:
        return "undefined"
    scale, digits = (100.0, 1) if in_percent(record) else (1.0, 3)
    # Adding 0.0 turns the "-0.0" of a difference that rounds to nothing into "0.0".
    number = lambda value: f"{round(value * scale, digits) + 0.0:.{digits}f}"
    interval = f" [{number(record['ci'][0])}, {number(record['ci'][1])}]" if record["ci"] else ""
    return number(record["value"]) + interval


def in_percent(record: Record) -> bool:
    """Whether `show` writes the record in percent."""
    return record["metric"].startswith(PERCENT)


def short(count: float) -> str:
    """A count with three digits and a unit: 319046 is "319k"."""
    for size, unit in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 of a unit would read "1e+03".
        if count >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{unit}"
    return f"{count:.0f}"


class Answers:
    """The records that tell how well policies answer, arm by arm: `policies` side by side, one of `rows` for each arm.

    A row is (arm, seed, time): `time` counts records of one name, which come of joining two evaluations. `differences`
    are (policy, metric) of the differences that were measured, gains over another policy before those over another arm.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._found: dict[tuple[str, Row, str], Record] = {}
        for record in filter(is_answer, records):
            policy, arm = record["arm"].split("/", 1)
            time = 0
            while (key := (policy, (arm, record["seed"], time), record["metric"])) in self._found:
                time += 1
            self._found[key] = record
        self.policies = list(dict.fromkeys(policy for policy, _, _ in self._found))
        self.rows = list(dict.fromkeys(row for _, row, _ in self._found))
        metrics = list(dict.fromkeys(metric for _, _, metric in self._found if metric.startswith(DIFFERENCE)))
        metrics.sort(key=lambda metric: metric.removeprefix(DIFFERENCE) not in self.policies)
        pairs = {(policy, metric) for policy, _, metric in self._found}
        self.differences = [(p, metric) for metric in metrics for p in self.policies if (p, metric) in pairs]

    def label(self, row: Row) -> str:
        """The arm's name; with its seed if the records have several, and numbered if the name came before."""
        arm, seed, time = row
        many = len({s for _, s, _ in self.rows}) > 1
        return arm + (f", seed {seed}" if many else "") + (f" ({time + 1})" if time else "")

    def find(self, policy: str, row: Row, metric: str = "accuracy") -> Record | None:
        """The record of a policy in a row; None if there is none."""
        return self._found.get((policy, row, metric))

    def cost(self, policy: str, row: Row) -> Record | None:
        """A record of a policy in a row, whatever its metric, for what it cost; None if there is none."""
        return next((r for (p, at, _), r in self._found.items() if (p, at) == (policy, row)), None)


def is_answer(record: Record) -> bool:
    """Whether a record tells how well a policy answers: an arm such as base/greedy, and an accuracy or a difference."""
    metric = record["metric"]
    return "/" in record["arm"] and (metric == "accuracy" or metric.startswith(DIFFERENCE))


_AT_K = re.compile(r"(accuracy|minus_majority|oracle_gap)@([0-9]+)")
CURVES = {
    "accuracy": "accuracy@k, %",
    "minus_majority": "minus majority@k, points",
    "oracle_gap": "pass@k minus it, points",
}


class Curves:
    """The records of curves over the number k of samples, `accuracy@8` of an arm and the like: `find` by what, arm and k.

    `arms` are (arm, seed), as they came; `ks` ascend.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._found: dict[tuple[str, tuple[str, int], int], Record] = {}
        for record in records:
            if match := _AT_K.fullmatch(record["metric"]):
                self._found[match[1], (record["arm"], record["seed"]), int(match[2])] = record
        self.arms = list(dict.fromkeys(arm for _, arm, _ in self._found))
        self.ks = sorted({k for _, _, k in self._found})
        self.kinds = [kind for kind in CURVES if any(kind == found for found, _, _ in self._found)]

    def label(self, arm: tuple[str, int]) -> str:
        """The arm's name, with its seed if the records have several."""
        return arm[0] + (f", seed {arm[1]}" if len({seed for _, seed in self.arms}) > 1 else "")

    def find(self, kind: str, arm: tuple[str, int], k: int) -> Record | None:
        return self._found.get((kind, arm, k))

    def rows(self, kind: str) -> list[tuple[str, list[Record | None]]]:
        """(label, record at each k) of the arms that have the kind."""
        found = [(self.label(arm), [self.find(kind, arm, k) for k in self.ks]) for arm in self.arms]
        return [(label, records) for label, records in found if any(records)]


def other_pairs(records: Sequence[Record]) -> list[tuple[Record | None, Record | None]]:
    """(measured, closed form) of everything that is no policy's accuracy; None where one of the two was not given."""
    others = [r for r in records if not is_answer(r) and not _AT_K.fullmatch(r["metric"])]
    key = lambda r: (r["arm"], r["metric"].removesuffix(CLOSED_FORM), r["seed"])
    closed = {key(r): r for r in others if r["metric"].endswith(CLOSED_FORM)}
    pairs: list[tuple[Record | None, Record | None]] = []
    for record in others:
        if not record["metric"].endswith(CLOSED_FORM):
            pairs.append((record, closed.pop(key(record), None)))
    return pairs + [(None, record) for record in closed.values()]


def other_name(record: Record, records: Sequence[Record]) -> tuple[str, str]:
    """(measure with its unit, of what) for a row that is no policy's accuracy; it names the seed if there are several."""
    measure = record["metric"].removesuffix(CLOSED_FORM) + (", %" if in_percent(record) else "")
    many = len({r["seed"] for r in records}) > 1
    return measure, f"{record['arm']}, seed {record['seed']}" if many else record["arm"]


def format_table(records: Sequence[Record]) -> str:
    """The aligned tables that a command prints, for a terminal of 100 columns.

    First accuracy in percent with its 95 % interval, policies side by side, and the cost in the same order; then
    differences in points; then curves over the number of samples; then everything else, a closed form beside what was measured.
    """
    answers = Answers(records)
    tables = []
    if answers.rows:
        rows = [["accuracy, %", *answers.policies, "tokens", "FLOPs"]]
        for row in answers.rows:
            paid = [answers.cost(p, row) for p in answers.policies]
            costs = [" / ".join(short(r[name]) if r else "-" for r in paid) for name in ("tokens", "flops")]
            rows.append([answers.label(row), *(show(answers.find(p, row)) for p in answers.policies), *costs])
        tables.append(rows)
    if answers.differences:
        names = [f"{p} - {metric.removeprefix(DIFFERENCE)}" for p, metric in answers.differences]
        rows = [["difference, points", *names]]
        for row in answers.rows:
            found = [answers.find(p, row, metric) for p, metric in answers.differences]
            if any(found):
                rows.append([answers.label(row), *map(show, found)])
        tables.append(rows)
    curves = Curves(records)
    for kind in curves.kinds:
        # Without their intervals, which are in results.json: a curve is read along its row.
        value = lambda record: show({**record, "ci": None}) if record else "-"
        rows = [[CURVES[kind], *(f"k = {k}" for k in curves.ks)]]
        rows += [[label, *map(value, found)] for label, found in curves.rows(kind)]
        tables.append(rows)
    if pairs := other_pairs(records):
        rows = [["measure", "of", "measured", "closed form", "n"]]
        for measured, closed in pairs:
            record = measured or closed
            assert record is not None
            cells = [show(measured), show(closed) if closed else "", str(record["n"] or "")]
            rows.append([*other_name(record, records), *cells])
        tables.append(rows)
    return "\n\n".join(_align(piece) for table in tables for piece in _fold(table))


def _fold(rows: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """The table in pieces that fit into WIDTH, each with the first column; a column that is too wide stands alone."""
    widths = _widths(rows)
    pieces: list[list[int]] = [[]]
    for column in range(1, len(widths)):
        if pieces[-1] and sum(widths[c] + 2 for c in [*pieces[-1], column]) + widths[0] > WIDTH:
            pieces.append([])
        pieces[-1].append(column)
    return [[[row[0], *(row[c] for c in piece)] for row in rows] for piece in pieces]


def _align(rows: Sequence[Sequence[str]]) -> str:
    widths = _widths(rows)
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
