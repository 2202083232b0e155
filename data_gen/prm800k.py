"""PRM800K (arXiv:2305.20050), in the shape of the release and as one row a rated step, into StepLabels and Pair rows."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..basics import UserError, fold_seed, read_jsonl
from .rows import Pair, Source, StepLabels
from .store import UnitResult


def prm800k(path: str | Path, *, neutral: str = "right", limit: int = 0, seed: int = 0) -> UnitResult[StepLabels]:
    """StepLabels of PRM800K (arXiv:2305.20050) in either of its two shapes, as human counts.

    Ratings +1 and 0 count as right and -1 as wrong, after Qwen (arXiv:2501.07301), each as a count of one. With `neutral`
    "half" a rating is a count of two, of which 0 is one: hard labels take it for right, soft ones for a half, and labels by
    a threshold of 0.5 for wrong. A solution is the chain of chosen steps of one labelling; it ends with the first step that is
    rated -1 (what people wrote in its place is another solution). Steps without a rating have a count of 0. `limit` solutions
    are drawn with the seed.
    """
    records = _records(path)
    if "label" in records[0]:
        solutions = [s for i, r in enumerate(records) for s in _nested(r, f"{path}, record {i + 1}")]
    else:
        solutions = list(_flat(records, str(path)))
    result: UnitResult[StepLabels] = UnitResult([])
    seen: set[tuple[str, tuple[str, ...]]] = set()
    source = Source("people", "none", "prm800k", seed)
    count = (lambda r: (r + 1, 2)) if neutral == "half" else (lambda r: (int(r >= 0), 1))
    for prompt, gold, steps, ratings in solutions:
        if (prompt, steps) in seen:
            result.dropped["duplicates"] += 1
            continue
        seen.add((prompt, steps))
        if not any(r is not None for r in ratings):
            result.dropped["solutions without a rating"] += 1
            continue
        bad = next((i for i, r in enumerate(ratings) if r == -1), None)
        counts = [(0, 0)] + [(0, 0) if r is None else count(r) for r in ratings]
        result.rows.append(
            StepLabels(
                problem_id=_problem_id(prompt),
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
    return _limited(result, limit, seed)


def prm800k_pairs(path: str | Path, *, limit: int = 0, seed: int = 0) -> UnitResult[Pair]:
    """A pair of each step rated -1 and the step rated +1 that stands at the same place of PRM800K, in either of its two shapes.

    The better one is the step with which the labelling goes on, which people wrote themselves where every step was wrong, or
    else the first that is rated +1. Neutral steps are in no pair. `limit` pairs are drawn with the seed.
    """
    records = _records(path)
    if "label" in records[0]:
        places = [p for i, r in enumerate(records) for p in _nested_places(r, f"{path}, record {i + 1}")]
    else:
        places = list(_flat_places(records, str(path)))
    result: UnitResult[Pair] = UnitResult([])
    seen: set[tuple[str, tuple[str, ...], str, str]] = set()
    source = Source("people", "none", "prm800k", seed)
    for place in places:
        wrong = [one for one in place.steps if one.rating == -1]
        better = next((one for one in place.steps if one.rating == 1), None)
        if better is None and wrong:
            result.dropped["wrong steps without a better one"] += len(wrong)
        if better is None:
            continue
        for worse in wrong:
            key = (place.prompt, place.prefix, better.text, worse.text)
            if key in seen or better.text == worse.text:
                result.dropped["duplicates"] += 1
                continue
            seen.add(key)
            result.rows.append(
                Pair(
                    problem_id=_problem_id(place.prompt),
                    prompt=place.prompt,
                    prefix=place.prefix,
                    chosen=(better.text,),
                    rejected=(worse.text,),
                    reward_chosen=1.0,
                    reward_rejected=0.0,
                    n_chosen=1,
                    n_rejected=1,
                    chosen_finished=better.finished,
                    rejected_finished=worse.finished,
                    source=source,
                )
            )
    return _limited(result, limit, seed)


R = TypeVar("R", StepLabels, Pair)


def _limited(result: UnitResult[R], limit: int, seed: int) -> UnitResult[R]:
    """The result with `limit` of its rows, drawn with the seed."""
    if limit and limit < len(result.rows):
        kept = sorted(random.Random(fold_seed(seed, "prm800k")).sample(range(len(result.rows)), limit))
        result.dropped["beyond the limit"] = len(result.rows) - limit
        result.rows = [result.rows[i] for i in kept]
    return result


def _problem_id(prompt: str) -> str:
    return f"prm800k/{fold_seed(0, prompt) % 10**12:012d}"


def _records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, of which the first is in one of the two shapes."""
    records = [record for _, record in read_jsonl(path)]
    if not records:
        raise UserError(f"{path}: the data set is empty")
    if "label" not in records[0] and "next_response" not in records[0]:
        raise UserError(
            f"{path}: not PRM800K: expected records with label and question, or with instruction, responses, next_response "
            f"and rating; found fields {', '.join(records[0])}"
        )
    return records


@dataclass(frozen=True)
class _Step:
    """One of the steps that people rated at a place."""

    text: str
    rating: int | None
    finished: bool  # it ends the solution


@dataclass(frozen=True)
class _Place:
    """A prefix, and the steps that were rated behind it; the one that the labelling goes on with comes first."""

    prompt: str
    prefix: tuple[str, ...]
    steps: Sequence[_Step]


def _nested_places(record: dict[str, Any], where: str) -> Iterator[_Place]:
    """The places of a record of the release's own shape, as far as its labelling goes on."""
    try:
        prompt = record["question"]["problem"]
        prefix: tuple[str, ...] = ()
        for step in record["label"]["steps"]:
            found = [
                _Step(c["text"].strip(), c.get("rating"), bool(c.get("is_solution")))
                for c in step.get("completions") or []
            ]
            chosen, written = step.get("chosen_completion"), step.get("human_completion")
            taken = found.pop(chosen) if chosen is not None else None
            if taken is None and written:
                taken = _Step(written["text"].strip(), 1, bool(written.get("is_solution")))
            yield _Place(prompt, prefix, [taken, *found] if taken is not None else found)
            if taken is None or taken.rating == -1:
                break
            prefix = (*prefix, taken.text)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{where}: not a PRM800K record ({type(error).__name__}: {error})") from None


def _flat_places(records: Sequence[dict[str, Any]], where: str) -> Iterator[_Place]:
    """The places of the one-row-a-rated-step shape: rows with one prefix, the preferred step first."""
    places: dict[tuple[str, tuple[str, ...]], list[tuple[bool, _Step]]] = {}
    for i, record in enumerate(records, 1):
        try:
            prefix = tuple(str(s).strip() for s in record["responses"])
            step = _Step(str(record["next_response"]).strip(), record.get("rating"), bool(record.get("is_solution")))
            places.setdefault((record["instruction"], prefix), []).append(
                (not record.get("is_preferred_response"), step)
            )
        except (KeyError, TypeError) as error:
            raise UserError(f"{where}, record {i}: field {error} is missing") from None
    for (prompt, prefix), steps in places.items():
        yield _Place(prompt, prefix, [step for _, step in sorted(steps, key=lambda one: one[0])])


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
