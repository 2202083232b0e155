"""Refinements of drafts by critiques, the critiques that they speak for, and which are learnt from (arXiv:2411.16579)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..basics import canonical_json, fold_seed
from ..models.corrections import Wording
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Problem, StepPlanter, Task
from .dialogues import ask, meta_of, text_of
from .rows import Dialogue, Message, Source
from .store import UnitResult


def filter_critiques(
    critiques: Sequence[Dialogue],
    refined: Sequence[Dialogue],
    *,
    mode: str,
    threshold: float = 0.3,
    count: int = 0,
    seed: int = 0,
) -> UnitResult[Dialogue]:
    """The critiques that pass, with `mc_success` and `mc_rollouts` in their meta; with `count` so many, drawn with the seed.

    soft   the share of right refinements is at least `threshold` (arXiv:2411.16579: useful, which is not the same as true)
    hard   the verdict on the answer is the reference's
    both   both
    none   all (a control of equal size)

    Critiques of right drafts have nothing to repair: they pass by their verdict, or a critic would learn to call everything wrong.
    The share of K refinements has a standard error of up to 1 / (2 sqrt(K)): judge what is kept by fresh ones.
    """
    if mode not in ("soft", "hard", "both", "none"):
        raise ValueError(f"mode must be soft, hard, both or none, found {mode!r}")
    tried: dict[str, list[bool]] = {}
    for row in refined:
        meta = meta_of(row)
        tried.setdefault(meta["id"], []).append(bool(meta["correct"][1]))
    result: UnitResult[Dialogue] = UnitResult([])
    for row in critiques:
        meta = meta_of(row)
        right, rollouts = meta["correct"][0], tried.get(meta["id"], [])
        share = sum(rollouts) / len(rollouts) if rollouts else None
        agrees = meta["wrong"] != right
        if mode in ("hard", "both") and not agrees:
            result.dropped["critiques whose verdict is not the reference's"] += 1
        elif mode == "soft" and right and not agrees:
            result.dropped["critiques that call a right draft wrong"] += 1
        elif mode in ("soft", "both") and not right and share is None:
            result.dropped["critiques without refinements"] += 1
        elif mode in ("soft", "both") and not right and share is not None and share < threshold:
            result.dropped["critiques that help too seldom"] += 1
        else:
            about = canonical_json({**meta, "mc_success": share, "mc_rollouts": len(rollouts)})
            result.rows.append(dataclasses.replace(row, meta=about))
    result.counts["corrupted critiques kept"] = sum(meta_of(r).get("mark") == "corrupted" for r in result.rows)
    if count and len(result.rows) > count:
        drawn = sorted(result.rows, key=lambda r: fold_seed(seed, "filter", meta_of(r)["id"]))[:count]
        keep = {id(r) for r in drawn}
        result.dropped["critiques beyond the number asked for"] += len(result.rows) - count
        result.rows = [r for r in result.rows if id(r) in keep]
    return result


_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def refinements(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    critiques: Sequence[Dialogue],
    problems: Mapping[str, Problem],
    wording: Wording,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    control: str = "",
    donors: Mapping[str, str] | None = None,
) -> UnitResult[Dialogue]:
    """`samples` refinements by each critique, as rows of kind `refine` with both verdicts in `meta.correct`: right and wrong ones.

    `control`: "empty" shows no critique, "shuffled" that of another draft (`donors`: critique id -> text). A refiner that
    does not read its critique does as well with either.
    """
    before = engine.ledger.copy()
    result: UnitResult[Dialogue] = UnitResult([])
    metas = [meta_of(row) for row in critiques]
    asked, seeds = [], []
    for meta in metas:
        # A draft without a critique is sent back with the plain request to try again.
        said = {"empty": "", "shuffled": (donors or {}).get(meta["id"], "")}.get(control, meta["critique"])
        asked.append(wording.ask_attempt(meta["prompt"], [task.step_separator.join(meta["draft"])], [said]))
        seeds.append([fold_seed(seed, meta["id"], "refinement", k) for k in range(samples)])
    source = Source(policy, engine.name, task.name, seed)
    for row, meta, turns, found in zip(
        critiques, metas, asked, ask(engine, step_format, asked, seeds, sampling), strict=True
    ):
        for number, sample in enumerate(found):
            if sample.stop is StopReason.CONTEXT:
                result.dropped["refinements without room in the context"] += 1
                continue
            result.rows.append(refined_row(
                row, meta, turns, text_of(engine, sample), task, problems[row.problem_id], source, number,
                tokens=len(sample.ids), control=control,
            ))  # fmt: skip
    result.ledger = engine.ledger - before
    return result


def repairs(
    engine: Engine,
    task: StepPlanter,
    step_format: StepFormat,
    critiques: Sequence[Dialogue],
    problems: Mapping[str, Problem],
    wording: Wording,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Dialogue]:
    """Rows of kind `refine` for a first refiner: the draft up to its first error, the step that should stand there, and what the
    policy writes behind it.

    A refiner learns from them to follow a critique, with the policy's own skill in all that the critique says nothing of. A draft
    without an error is its own refinement.
    """
    before = engine.ledger.copy()
    result: UnitResult[Dialogue] = UnitResult([])
    kept: list[tuple[Dialogue, dict[str, Any], list[str]]] = []
    requests, places = [], []
    for row in critiques:
        meta = meta_of(row)
        steps, error = list(meta["draft"]), meta["first_error"]
        fixed = steps
        if error is not None:
            expected = task.expected_step(problems[row.problem_id], steps[:error])
            if expected is None:
                result.dropped["drafts whose first error has no right step in its place"] += 1
                continue
            fixed = [*steps[:error], expected]
            if task.expected_step(problems[row.problem_id], fixed) is not None:  # a step that ends nothing
                ids = step_format.encode(engine.tokenizer, meta["prompt"], fixed).ids
                requests.append(Request(ids, tuple(fold_seed(seed, meta["id"], "repair", k) for k in range(samples))))
                places.append(len(kept))
        kept.append((row, meta, fixed))
    continued = dict(zip(places, engine.generate(requests, sampling), strict=True))
    source = Source(policy, engine.name, task.name, seed)
    for place, (row, meta, fixed) in enumerate(kept):
        texts = [task.step_separator.join(fixed)]
        if place in continued:
            texts = [task.step_separator.join([*fixed, text_of(engine, s)]) for s in continued[place]]
        turns = wording.ask_attempt(meta["prompt"], [task.step_separator.join(meta["draft"])], [meta["critique"]])
        for number, text in enumerate(texts):
            result.rows.append(refined_row(row, meta, turns, text, task, problems[row.problem_id], source, number))
    result.ledger = engine.ledger - before
    return result


def refined_row(
    row: Dialogue,
    meta: Mapping[str, Any],
    turns: Sequence[tuple[str, str]],
    text: str,
    task: Task,
    problem: Problem,
    source: Source,
    number: int,
    **more: Any,
) -> Dialogue:
    """A row of kind `refine` from the meta of its critique, with the verdicts on draft and refinement."""
    verdict = task.verify(problem, text)
    about = {k: v for k, v in meta.items() if k not in ("correct", "mark")}
    about |= {"correct": [*meta["correct"], verdict.right], "answer": verdict.answer, "refinement": number, **more}
    messages = (*(Message(role, content) for role, content in turns), Message("assistant", text, train=True))
    return Dialogue(row.problem_id, "refine", messages, canonical_json(about), source)


def derangement(ids: Sequence[str], seed: int) -> dict[str, str]:
    """Each id's partner: a cycle in an order drawn with the seed, so that none is its own (of two or more)."""
    order = sorted(ids, key=lambda i: fold_seed(seed, "shuffled", i))
    return dict(zip(order, [*order[1:], *order[:1]], strict=True))


def shortcut(refined: str, draft: str, reference: str) -> bool:
    """Whether a refinement only states its answer: it has over 2 numbers fewer than draft and reference both (arXiv:2411.16579)."""
    numbers = lambda text: len(_NUMBER.findall(text))
    return numbers(refined) < min(numbers(reference), numbers(draft)) - 2


def best_refinements(
    refined: Sequence[Dialogue],
    wording: Wording,
    *,
    per_critique: int,
    seed: int,
    separator: str,
    kinds: Sequence[str] = ("refine",),
    references: Mapping[str, str] | None = None,
    repair_only: bool = True,
    only_right: bool = True,
) -> UnitResult[Dialogue]:
    """Rows to learn from: up to `per_critique` right and distinct refinements of each critique.

    `kinds`: "refine" (problem, draft, critique -> refinement), "solve" (problem -> refinement: the main effect of critique
    in the loop),
    "critique" (problem, draft -> the critique that helped). With `repair_only` drafts that are right already give nothing. Without
    `only_right` what ends wrong is learnt too: a refiner that shall do what it is told, and be no better a solver than the policy.
    """
    for kind in kinds:
        if kind not in ("refine", "solve", "critique"):
            raise ValueError(f"kinds must be some of refine, solve and critique, found {kind!r}")
    result: UnitResult[Dialogue] = UnitResult([])
    by_critique: dict[str, list[tuple[Dialogue, dict[str, Any]]]] = {}
    for row in refined:
        meta = meta_of(row)
        if repair_only and meta["correct"][0]:
            result.dropped["refinements of right drafts"] += 1
        elif only_right and not meta["correct"][1]:
            result.dropped["refinements that end wrong"] += 1
        elif shortcut(
            row.messages[-1].content, separator.join(meta["draft"]),
            (references or {}).get(row.problem_id, separator.join(meta["draft"])),
        ):  # fmt: skip
            result.dropped["refinements that only state their answer"] += 1
        else:
            by_critique.setdefault(meta["id"], []).append((row, meta))
    for own in by_critique.values():
        seen: set[str] = set()
        own.sort(key=lambda pair: fold_seed(seed, pair[1]["id"], pair[1]["refinement"]))
        for row, meta in own:
            text = row.messages[-1].content
            if text in seen:
                result.dropped["duplicates"] += 1
            elif len(seen) == per_critique:
                result.dropped["beyond the limit a critique"] += 1
            else:
                seen.add(text)
                if "refine" in kinds:
                    result.rows.append(row)
                if "solve" in kinds:
                    plain = (Message("user", meta["prompt"]), Message("assistant", text, train=True))
                    result.rows.append(dataclasses.replace(row, kind="solve", messages=plain))
        if "critique" in kinds and seen:
            row, meta = own[0]
            [(role, asked)] = wording.ask_critique(meta["prompt"], separator.join(meta["draft"]))
            own_words = (Message(role, asked), Message("assistant", meta["critique"], train=True))
            result.rows.append(dataclasses.replace(row, kind="critique", messages=own_words))
    result.dropped = +result.dropped
    return result
