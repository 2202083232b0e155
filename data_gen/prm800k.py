"""PRM800K (arXiv:2305.20050), in the shape of the release and as one row a rated step, into StepLabels rows."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed, read_jsonl
from .rows import Source, StepLabels
from .store import UnitResult


def prm800k(path: str | Path, *, limit: int = 0, seed: int = 0) -> UnitResult[StepLabels]:
    """StepLabels of PRM800K (arXiv:2305.20050) in either of its two shapes, as one human count a step.

    Ratings +1 and 0 count as right and -1 as wrong, after Qwen (arXiv:2501.07301). A solution is the chain of chosen steps of
    one labelling; it ends with the first step that is rated -1 (what people wrote in its place is another solution). Steps
    without a rating have a count of 0. `limit` solutions are drawn with the seed.
    """
    records = [record for _, record in read_jsonl(path)]
    if not records:
        raise UserError(f"{path}: the data set is empty")
    if "label" in records[0]:
        solutions = [s for i, r in enumerate(records) for s in _nested(r, f"{path}, record {i + 1}")]
    elif "next_response" in records[0]:
        solutions = list(_flat(records, str(path)))
    else:
        raise UserError(
            f"{path}: not PRM800K: expected records with label and question, or with instruction, responses, next_response "
            f"and rating; found fields {', '.join(records[0])}"
        )
    result: UnitResult[StepLabels] = UnitResult([])
    seen: set[tuple[str, tuple[str, ...]]] = set()
    source = Source("people", "none", "prm800k", seed)
    for prompt, gold, steps, ratings in solutions:
        if (prompt, steps) in seen:
            result.dropped["duplicates"] += 1
            continue
        seen.add((prompt, steps))
        if not any(r is not None for r in ratings):
            result.dropped["solutions without a rating"] += 1
            continue
        bad = next((i for i, r in enumerate(ratings) if r == -1), None)
        counts = [(0, 0)] + [(0, 0) if r is None else (int(r >= 0), 1) for r in ratings]
        result.rows.append(
            StepLabels(
                problem_id=f"prm800k/{fold_seed(0, prompt) % 10**12:012d}",
                prompt=prompt,
                gold=gold,
                sample=len(result.rows),
                steps=steps,
                n_correct=tuple(c for c, _ in counts),
                n_rollouts=tuple(n for _, n in counts),
                label_source="human",
                outcome="wrong" if bad is not None else "right",
                first_error=bad,
                first_error_known=True,
                source=source,
            )
        )
    if limit and limit < len(result.rows):
        kept = sorted(random.Random(fold_seed(seed, "prm800k")).sample(range(len(result.rows)), limit))
        result.dropped["beyond the limit"] = len(result.rows) - limit
        result.rows = [result.rows[i] for i in kept]
    return result


_Rated = tuple[str, str, tuple[str, ...], list[int | None]]


def _nested(record: dict[str, Any], where: str) -> Iterator[_Rated]:
    """Solutions of the release's own shape: label.steps[].completions[].rating; one for each alternative that was rated."""
    try:
        prompt, gold = record["question"]["problem"], str(record["question"].get("ground_truth_answer") or "")
        prefix: list[str] = []
        ratings: list[int | None] = []
        for step in record["label"]["steps"]:
            completions = step.get("completions") or []
            chosen = step.get("chosen_completion")
            for i, completion in enumerate(completions):
                if i != chosen and completion.get("rating") == -1:
                    yield prompt, gold, (*prefix, completion["text"].strip()), [*ratings, -1]
            if chosen is not None:
                taken = completions[chosen]
                prefix.append(taken["text"].strip())
                ratings.append(taken.get("rating"))
            elif step.get("human_completion"):
                prefix.append(step["human_completion"]["text"].strip())
                ratings.append(1)  # written by the labeller in place of what was wrong
            else:
                break
            if ratings[-1] == -1:
                break
        if prefix:
            yield prompt, gold, tuple(prefix), ratings
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{where}: not a PRM800K record ({type(error).__name__}: {error})") from None


def _flat(records: list[dict[str, Any]], where: str) -> Iterator[_Rated]:
    """Solutions of the one-row-a-rated-step shape: ratings of the steps before are looked up among the other rows."""
    rating_of: dict[tuple[str, ...], int | None] = {}
    extended: set[tuple[str, ...]] = set()
    chains: list[tuple[str, tuple[str, ...]]] = []
    for i, record in enumerate(records, 1):
        try:
            prompt = record["instruction"]
            before = tuple(str(s).strip() for s in record["responses"])
            chain = (*before, str(record["next_response"]).strip())
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}, record {i}: field {error} is missing") from None
        rating_of[prompt, *chain] = record.get("rating")
        extended.add((prompt, *before))
        chains.append((prompt, chain))
    for prompt, chain in chains:
        # Only the longest chains: a prefix that goes on is contained in what it goes on to.
        if (prompt, *chain) in extended:
            continue
        ratings = [rating_of.get((prompt, *chain[: k + 1])) for k in range(len(chain))]
        bad = next((k for k, r in enumerate(ratings) if r == -1), None)
        cut = len(chain) if bad is None else bad + 1
        yield prompt, "", chain[:cut], ratings[:cut]
