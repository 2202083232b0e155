"""Claims of papers, put to the test: a recipe with seeds and comparisons, one result file a claim, one table of all.

A claim is a recipe in ``recipes/claims`` with a few keys more:

    row: "2a"                                  # the method's place in our list of rows
    paper: "Math-Shepherd (arXiv:2312.08935)"
    claim: "what the paper says, in a sentence"
    seeds: [0, 1, 2]
    compare:
      - {what: "PRM over ORM, equal solutions", better: answers/base/best_of_16_prm, than: answers/base/best_of_16_orm}

`better` and `than` name a stage that evaluates and an arm of its results. Every seed is a run of its own. The effect of a
comparison is the mean difference over problems and seeds, with a 95 % bootstrap over problems where the stage kept its
values problem by problem (`VALUES`), and Student's t over seeds where it did not.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder, read_json, write_json
from ..config import build, option, unknown_key
from .pipeline import load_recipe, run_recipe
from .rounds import expand

RESULTS, VALUES = "results.json", "values.json"
FOLDER = Path(__file__).parent.parent / "recipes" / "claims"
_KEYS = ("name", "row", "paper", "claim", "seeds", "compare", "about", "found")
_RECIPE_KEYS = ("defaults", "stages")


@dataclass
class Comparison:
    """One thing that the claim says is more than another."""

    what: str = option("", "the comparison in words")
    better: str = option("", "stage/arm that should have more")
    than: str = option("", "stage/arm that should have less; empty compares with `margin` itself")
    metric: str = option("accuracy", "which of the arms' metrics")
    margin: float = option(0.0, "the effect must be more than this")
    ratio: bool = option(False, "compare by quotient, not by difference; the effect is then better / than")
    control: bool = option(False, "a control: reported, and left out of the verdict")

    def __post_init__(self) -> None:
        for name in ("what", "better"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing")
        if self.ratio and not self.than:
            raise ValueError("a ratio needs than")


def claim_files() -> dict[str, Path]:
    """Name -> recipe of the claims that ship with the package."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def run_claim(name: str, out: Path, results: Path, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a claim for all its seeds in folders of `out`, and writes `results`/NAME.json. Killed, it continues."""
    files = claim_files()
    if not (path := files.get(name, Path(name))).is_file():
        raise unknown_key(name, list(files), "stepladder claims run", "claim")
    recipe = load_recipe(path, {k: v for k, v in overrides.items() if k != "seeds"})
    for key in recipe:
        if key not in (*_KEYS, *_RECIPE_KEYS):
            raise unknown_key(str(key), [*_KEYS, *_RECIPE_KEYS], str(path))
    comparisons = [
        build(Comparison, one, f"{path}, compare {i}") for i, one in enumerate(recipe.get("compare") or [], 1)
    ]
    if not comparisons:
        raise UserError(f"{path}: compare is missing: what the claim says is more than what")
    seeds = overrides.get("seeds", recipe.get("seeds", [0, 1, 2]))
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds must be a list of whole numbers, found {seeds!r}")
    _check_stages(comparisons, recipe, str(path))
    began = time.perf_counter()
    runs = []
    for seed in seeds:
        print(f"== {path.stem}, seed {seed}", flush=True)
        part = {key: recipe[key] for key in _RECIPE_KEYS if key in recipe}
        run_recipe({"name": path.stem, "seed": seed, **part}, out / f"seed-{seed}", str(path))
        runs.append(out / f"seed-{seed}")
    measured = [compare(one, runs) for one in comparisons]
    stages_seconds = sum(read_json(done)["seconds"] for run in runs for done in run.glob("*/done.json"))
    found = {
        "name": path.stem,
        "row": str(recipe.get("row", "")),
        "paper": recipe.get("paper", ""),
        "claim": recipe.get("claim", ""),
        "found": recipe.get("found", ""),
        "command": f"stepladder claims run {path.stem if path.stem in files else path}",
        "seeds": list(seeds),
        "verdict": overall([one["verdict"] for one in measured if not one["control"]]),
        "comparisons": measured,
        "seconds": round(stages_seconds),
        "seconds_of_this_call": round(time.perf_counter() - began),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "versions": {package: metadata.version(package) for package in ("torch", "transformers")},
    }
    write_json(make_folder(results) / f"{path.stem}.json", found)
    print(_told(found), flush=True)
    return found


def _check_stages(comparisons: Sequence[Comparison], recipe: Mapping[str, Any], where: str) -> None:
    stages = [name for name, _, _ in expand(recipe.get("stages") or {}, where)]
    for one in comparisons:
        for name in filter(None, (one.better, one.than)):
            if name.partition("/")[0] not in stages:
                raise unknown_key(name.partition("/")[0], stages, f"{where}: compare {one.what!r}", "stage")


def compare(one: Comparison, runs: Sequence[Path]) -> dict[str, Any]:
    """Effect, interval and verdict of one comparison over runs that differ in their seed alone."""
    better = [_arm(run, one.better, one.metric) for run in runs]
    than = [_arm(run, one.than, one.metric) if one.than else ({}, None) for run in runs]
    means = [record["value"] for record, _ in better]
    against = [record["value"] if one.than else 0.0 for record, _ in than]
    if any(value is None for value in (*means, *against)):
        effect, low, high, per_seed = math.nan, math.nan, math.nan, []
    else:
        per_seed = [a / b if one.ratio else a - b for a, b in zip(means, against, strict=True)]
        effect, low, high = _interval(one, better, than, per_seed)
    return {
        "what": one.what,
        "better": one.better,
        "than": one.than,
        "metric": one.metric,
        "margin": one.margin,
        "ratio": one.ratio,
        "control": one.control,
        "values": {"better": _mean(means), "than": _mean(against) if one.than else None},
        "effect": None if math.isnan(effect) else effect,
        "ci": None if math.isnan(low) else [low, high],
        "per_seed": per_seed,
        "n": better[0][0]["n"],
        "tokens": {
            "better": _mean([r["tokens"] for r, _ in better]),
            "than": _mean([r["tokens"] for r, _ in than]) if one.than else None,
        },
        "verdict": verdict(low, high, one.margin),
    }


def verdict(low: float, high: float, margin: float = 0.0) -> str:
    """What an interval of an effect says of "more than `margin`"."""
    if low > margin:
        return "reproduced"
    return "contradicted" if high < margin else "not reproduced"


def overall(verdicts: Sequence[str]) -> str:
    """The verdict of a claim of several parts: theirs if they agree, else how many were reproduced."""
    if len(set(verdicts)) == 1:
        return verdicts[0]
    return f"{verdicts.count('reproduced')} of {len(verdicts)} parts reproduced" if verdicts else "only controls"


def _arm(run: Path, name: str, metric: str) -> tuple[dict[str, Any], dict[str, float] | None]:
    """(record, value of each problem or None) of an arm of a stage's results."""
    stage, _, arm = name.partition("/")
    records = read_json(run / stage / RESULTS)
    found = [record for record in records if record["arm"] == arm and record["metric"] == metric]
    if not found:
        arms = sorted({record["arm"] for record in records if record["metric"] == metric})
        if not arms:
            raise unknown_key(metric, sorted({r["metric"] for r in records}), str(run / stage), "metric")
        raise unknown_key(arm, arms, f"{run / stage}: {metric}", "arm")
    values = None
    if (path := run / stage / VALUES).is_file():
        values = next((v["values"] for v in read_json(path) if v["arm"] == arm and v["metric"] == metric), None)
    return found[0], values


def _interval(
    one: Comparison,
    better: Sequence[tuple[dict[str, Any], dict[str, float] | None]],
    than: Sequence[tuple[dict[str, Any], dict[str, float] | None]],
    per_seed: Sequence[float],
) -> tuple[float, float, float]:
    import numpy as np

    values = [*(v for _, v in better), *(v for _, v in than if one.than)]
    if not one.ratio and all(v is not None for v in values) and len({tuple(sorted(v or {})) for v in values}) == 1:
        from ..search.choose import paired_bootstrap

        problems = sorted(better[0][1] or {})
        pooled = lambda side: np.mean([[v[p] for p in problems] for _, v in side if v is not None], axis=0).tolist()
        return paired_bootstrap(pooled(better), pooled(than) if one.than else None)
    return student(per_seed)


# Quantiles 0.975 of Student's t for 1, 2 ... 9 degrees of freedom; beyond, `student` expands around the normal's.
_T = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def student(values: Sequence[float]) -> tuple[float, float, float]:
    """(mean, low, high): a 95 % interval of Student's t; without bounds for a single value."""
    mean, n = sum(values) / len(values), len(values)
    if n < 2:
        return mean, -math.inf, math.inf
    z, freedom = 1.959964, n - 1
    expanded = (  # Cornish-Fisher
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    quantile = _T[freedom - 1] if freedom <= len(_T) else expanded
    half = quantile * math.sqrt(sum((v - mean) ** 2 for v in values) / freedom / n)
    return mean, mean - half, mean + half


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _told(found: Mapping[str, Any]) -> str:
    lines = [f"{found['name']}: {found['verdict']} ({found['seconds']} s of stages, {len(found['seeds'])} seeds)"]
    for one in found["comparisons"]:
        lines.append(f"  {one['what']}: {effect_text(one)}, {one['verdict']}{' (control)' if one['control'] else ''}")
    return "\n".join(lines)


def effect_text(one: Mapping[str, Any]) -> str:
    """An effect as a reader wants it: shares in points, quotients with a sign of multiplication."""
    if one["effect"] is None:
        return "undefined"
    metric = one["metric"].partition("@")[0]
    points = (metric in ("f1", "step_accuracy", "verdict_accuracy") or metric.startswith("accuracy")) and not one[
        "ratio"
    ]
    scale, unit = (100.0, " points") if points else (1.0, "x" if one["ratio"] else "")
    number = lambda value: f"{value * scale:{'' if one['ratio'] else '+'}.{1 if points else 3}f}"
    if one["ci"] is None or not all(map(math.isfinite, one["ci"])):
        return f"{number(one['effect'])}{unit} (one seed: no interval)"
    return f"{number(one['effect'])}{unit} [{number(one['ci'][0])}, {number(one['ci'][1])}]"


def claims_table(results: Path, out: Path) -> str:
    """Writes the page of all claims from their result files, and returns it."""
    files = sorted(results.glob("*.json"))
    if not files:
        raise UserError(f"{results}: no result file of a claim; `stepladder claims run NAME` makes one")
    found = sorted((read_json(path) for path in files), key=lambda one: (one["row"], one["name"]))
    lines = [
        "# Claims",
        "",
        "What papers say, measured on the lab at a small size. Made by `stepladder claims table` from the files in "
        f"[{results.name}/]({results.name}/), which `stepladder claims run NAME` writes; do not edit. Effects are means over "
        "problems and seeds with 95 % intervals (bootstrap over problems; Student's t over seeds where there are no values "
        "problem by problem). *Reproduced*: the interval lies above the margin; *contradicted*: below it; *not "
        "reproduced*: it holds the margin.",
        "",
        "| row | paper | claim | compared | effect | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    cell = lambda text: str(text).replace("|", "\\|").replace("\n", " ").strip()
    for one in found:
        for number, part in enumerate(one["comparisons"]):
            head = [one["row"], one["paper"], f"{one['claim']} (`{one['name']}`)"] if number == 0 else ["", "", ""]
            margin = f" > {part['margin']:g}" if part["margin"] else ""
            control = "control: " if part["control"] else ""
            row = [*head, f"{control}{part['what']}{margin}", effect_text(part), part["verdict"]]
            lines.append("| " + " | ".join(map(cell, row)) + " |")
    for one in found:
        lines += [
            "",
            f"## {one['name']}",
            "",
            f"{one['verdict'].capitalize()}. `{one['command']}`, seeds {', '.join(map(str, one['seeds']))}, "
            f"{one['seconds'] / 60:.0f} minutes of stages, {one['date']}, torch {one['versions']['torch']}, "
            f"transformers {one['versions']['transformers']}.",
        ]
        if one["found"]:
            lines += ["", one["found"].strip()]
        lines += ["", "| compared | better | than | per seed | n |", "| --- | --- | --- | --- | --- |"]
        for part in one["comparisons"]:
            value = lambda v: "-" if v is None else f"{v:.3f}"
            seeds = ", ".join(f"{v:+.3f}" for v in part["per_seed"])
            arms = [f"{part[k] or 'margin'}: {value(part['values'][k])}" for k in ("better", "than")]
            lines.append("| " + " | ".join(map(cell, [part["what"], *arms, seeds, part["n"]])) + " |")
    page = "\n".join(lines) + "\n"
    make_folder(out.parent)
    out.write_text(page)
    return page
