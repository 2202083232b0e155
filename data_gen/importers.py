"""Imports of published step-labelled data into rows, one record at a time.

A format is a small function from one record to rows; `import_rows` reads the file, counts what is left out and keeps a random
share if that is asked for. A record that is not of the format ends the import with one sentence that names it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed
from ..tasks.records import read_records
from .import_critiques import math_critique, mr_gsm8k_reasons, real_critic
from .import_errors import big_bench_mistake, mr_ben, mr_gsm8k, prmbench, processbench
from .import_samples import gsm8k_solutions, math_best_of_8
from .import_values import math_aps, math_shepherd, stepwise
from .imported import LeftOut, Record, process_bench_record
from .prm800k import prm800k, prm800k_pairs
from .rows import Dialogue, Pair, Solution, StepLabels, Tree
from .store import UnitResult

Reader = Callable[[Record], Iterator[Any]]

# format -> (what its rows are, how one record is read)
FORMATS: dict[str, tuple[type, Reader]] = {
    "math_shepherd": (StepLabels, math_shepherd),
    "stepwise": (StepLabels, stepwise),
    "math_aps": (Tree, math_aps),
    "processbench": (StepLabels, processbench),
    "prmbench": (StepLabels, prmbench),
    "mr_gsm8k": (StepLabels, mr_gsm8k),
    "mr_ben": (StepLabels, mr_ben),
    "big_bench_mistake": (StepLabels, big_bench_mistake),
    "gsm8k_solutions": (Solution, gsm8k_solutions),
    "math_best_of_8": (Solution, math_best_of_8),
    "math_critique": (Dialogue, math_critique),
    "real_critic": (Dialogue, real_critic),
    "mr_gsm8k_reasons": (Dialogue, mr_gsm8k_reasons),
}
NAMES = ("prm800k", "prm800k_pairs", *FORMATS)


@dataclass
class Imported(UnitResult[Any]):
    """Rows with what was left out, and step scores of each row where the data bring some."""

    scores: list[list[float]] = field(default_factory=list)


def import_rows(
    path: str | Path,
    format: str,
    *,
    limit: int = 0,
    seed: int = 0,
    rollouts: int = 0,
    label_source: str = "monte_carlo",
    row_type: type | None = None,
) -> Imported:
    """The rows of a file or hub data set of a published format; `limit` of them, drawn with the seed, if it is not 0.

    `rollouts` is how many continuations a share stands for (math_aps, stepwise; 0 takes the format's own), `label_source` what
    labels of the format stepwise are. Raises UserError for an unknown format, for a record that is not of the format, and if the
    rows are not of `row_type`.
    """
    if format not in NAMES:
        from ..config import unknown_key

        raise unknown_key(format, NAMES, "import", "format")
    whole: dict[str, tuple[type, Any]] = {"prm800k": (StepLabels, prm800k), "prm800k_pairs": (Pair, prm800k_pairs)}
    made = {**whole, **FORMATS}[format][0]
    if row_type is not None and made is not row_type:
        raise UserError(f"format {format} gives {made.__name__} rows, {row_type.__name__} rows are needed")
    if format in whole:  # a solution's steps lie in several records
        found = whole[format][1](path, limit=limit, seed=seed)
        return Imported(found.rows, found.dropped)
    read = FORMATS[format][1]
    dropped: Counter[str] = Counter()
    drawn = random.Random(fold_seed(seed, "import", format))
    kept: list[tuple[int, Any, list[float]]] = []
    seen = 0
    for number, (where, values) in enumerate(read_records(str(path))):
        record = Record(
            values, where, number, Path(str(path)).name.split(".")[0], seed, dropped, rollouts, label_source
        )
        try:
            rows = list(read(record))
        except LeftOut as reason:
            dropped[str(reason)] += 1
            continue
        for position, row in enumerate(rows):
            one = (seen, row, record.scores[position] if record.scores else [])
            seen += 1
            # A reservoir: every row has the same chance, whatever the length of the file, and no more are held.
            if not limit or len(kept) < limit:
                kept.append(one)
            elif (place := drawn.randrange(seen)) < limit:
                kept[place] = one
    if limit and seen > limit:
        dropped["beyond the limit"] += seen - limit
    kept.sort(key=lambda one: one[0])
    scores = [scores for _, _, scores in kept]
    return Imported([row for _, row, _ in kept], dropped, scores=scores if any(scores) else [])


def process_bench(path: str | Path) -> list[dict[str, Any]]:
    """ProcessBench records of a file or hub split: id, problem, steps, label (-1: no error), final_answer_correct."""
    return [process_bench_record(dict(record), f"{path}, record {i}") for i, (_, record) in enumerate(_read(path), 1)]


def _read(path: str | Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    return read_records(str(path))
