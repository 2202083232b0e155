"""What the stages that judge share: records of results, their files, and intervals over whole problems."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import fingerprint_path, fold_seed, write_json
from ..models.ledger import Ledger

RESULTS = "results.json"
VALUES = "values.json"  # values problem by problem, for those records that are means over problems
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


def values_of(arm: str, metric: str, problems: Sequence[str], values: Sequence[float]) -> dict[str, Any]:
    """One entry of values.json: what the record of `arm` and `metric` is the mean of, problem by problem.

    A claim bootstraps over these (`launch.claims`). A problem that stands several times, with several solutions, has their mean.
    """
    grouped: dict[str, list[float]] = {}
    for problem, value in zip(problems, values, strict=True):
        grouped.setdefault(problem, []).append(float(value))
    return {"arm": arm, "metric": metric, "values": {p: sum(v) / len(v) for p, v in grouped.items()}}


def write_results(
    out: Path,
    records: Sequence[Mapping[str, Any]],
    *,
    values: Sequence[Mapping[str, Any]] = (),
    details: Mapping[str, Any] | None = None,
) -> None:
    """Writes details.json, values.json and, last, results.json."""
    write_json(out / DETAILS, details or {})
    write_json(out / VALUES, list(values))
    write_json(out / RESULTS, list(records))


def content_of(model: str) -> list[str]:
    """What tells a model from another one that was trained into the same folder later."""
    files = sorted(Path(model).glob("*.safetensors")) + sorted(Path(model).glob("step_format.json"))
    return [model, *(fingerprint_path(file) for file in files)]


def bootstrap_groups(
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
