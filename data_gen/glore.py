"""Rows that refiners learn from (GLoRe, arXiv:2402.10963): wrong drafts with right solutions, or with right ends of their own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..basics import canonical_json, fold_seed
from ..models.corrections import Wording, mark_step
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .dialogues import text_of
from .label_sets import positive_prefixes, uses_result
from .rows import Dialogue, Message, Solution, Source, StepLabels
from .store import UnitResult


def global_refinements(
    solutions: Sequence[Solution], wording: Wording, *, per_draft: int, per_problem: int, separator: str, seed: int
) -> UnitResult[Dialogue]:
    """Rows of kind `refine`: each distinct wrong draft with `per_draft` right solutions of its problem, drawn with the seed.

    `per_problem` bounds the drafts of a problem (0: all), those sampled first. Right solutions are distinct by their steps.
    """
    result: UnitResult[Dialogue] = UnitResult([])
    grouped: dict[str, list[Solution]] = {}
    for row in solutions:
        grouped.setdefault(row.problem_id, []).append(row)
    for own in grouped.values():
        right = list({row.steps: row for row in reversed(own) if row.right and row.steps}.values())
        wrong = list({row.steps: row for row in reversed(own) if not row.right and row.steps}.values())[::-1]
        result.dropped["empty drafts"] += sum(not row.steps for row in own)
        if not right:
            result.dropped["drafts of problems without a right solution"] += len(wrong)
            continue
        kept = wrong[:per_problem] if per_problem else wrong
        result.dropped["drafts beyond the limit a problem"] += len(wrong) - len(kept)
        for draft in kept:
            key = f"{draft.problem_id}/draft/{draft.sample}"
            order = sorted(right, key=lambda row: fold_seed(seed, key, "global", *row.steps))
            for number, target in enumerate(order[:per_draft]):
                meta = _meta(key, draft, draft.source.policy, number, answer=target.answer)
                text = separator.join(draft.steps)
                result.rows.append(_row(draft, wording, text, separator.join(target.steps), meta, target.source))
    result.dropped = +result.dropped
    return result


def first_wrong(row: StepLabels, positive: set[tuple[str, tuple[str, ...]]]) -> int | None:
    """The step E behind the longest prefix that is positive, if E is labelled and negative; None if that is not known.

    `positive` are prefixes from which a right answer was reached (`label_sets.positive_prefixes`). The empty prefix counts as
    positive where nothing is said of it.
    """
    known = [t for t in range(len(row.steps) + 1) if (row.problem_id, row.steps[:t]) in positive]
    if not known and row.n_rollouts[0]:
        return None  # the policy cannot solve the problem at all
    error = max(known, default=0)
    return error if error < len(row.steps) and row.n_rollouts[error + 1] else None


def local_refinements(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    drafts: Sequence[tuple[StepLabels, int]],
    problems: Mapping[str, Problem],
    wording: Wording,
    *,
    samples: int,
    per_draft: int,
    consistent: bool,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Dialogue]:
    """Rows of kind `refine`: drafts with `BAD` before their first wrong step, and right ends from that step on.

    Of each draft (its labels, its first wrong step E) `samples` continuations of the steps before E are sampled, and up to
    `per_draft` distinct ones that end right become targets. With `consistent` they must use the result of the step before E. One
    that begins with the very step that is called wrong shows that its label was wrong, and is left out. `meta.prefix` holds the
    steps before E.
    """
    before = engine.ledger.copy()
    result: UnitResult[Dialogue] = UnitResult([])
    requests = []
    for row, error in drafts:
        ids = step_format.encode(engine.tokenizer, row.prompt, row.steps[:error]).ids
        seeds = tuple(fold_seed(seed, row.problem_id, "local", row.sample, k) for k in range(samples))
        requests.append(Request(ids, seeds))
    source = Source(policy, engine.name, task.name, seed)
    for (row, error), found in zip(drafts, engine.generate(requests, sampling), strict=True):
        prefix, kept = list(row.steps[:error]), 0
        seen: set[str] = set()
        lost: Counter[str] = Counter()
        for sample in found:
            steps = task.split_steps(text_of(engine, sample))
            suffix = task.step_separator.join(steps)
            verdict = task.verify(problems[row.problem_id], task.step_separator.join([*prefix, *steps]))
            if sample.stop in (StopReason.CONTEXT, StopReason.LENGTH) or not verdict.right or not steps:
                continue
            if suffix in seen or kept == per_draft:
                continue
            if steps[0] == row.steps[error]:
                lost["right ends that take the step called wrong"] += 1
            elif consistent and error and not uses_result(row.steps[error - 1], suffix):
                lost["right ends that do not use the step before them"] += 1
            else:
                seen.add(suffix)
                key = f"{row.problem_id}/draft/{row.sample}"
                meta = _meta(key, row, row.source.policy, kept, answer=verdict.answer)
                meta |= {"prefix": prefix, "located": error, "first_error": row.first_error,
                         "error_known": row.first_error_known}  # fmt: skip
                marked = mark_step(row.steps, error, task.step_separator)
                result.rows.append(_row(row, wording, marked, suffix, meta, source))
                kept += 1
        result.dropped.update(lost)
        result.dropped["drafts without a right end"] += not kept
    result.dropped = +result.dropped
    result.ledger = engine.ledger - before
    return result


def wrong_drafts(labels: Sequence[StepLabels]) -> tuple[list[tuple[StepLabels, int]], Counter[str]]:
    """(wrong drafts with their first wrong step by their labels, what was left out), each draft once."""
    counts: Counter[str] = Counter()
    _, positive = positive_prefixes(labels)
    found: dict[tuple[str, tuple[str, ...]], tuple[StepLabels, int]] = {}
    for row in labels:
        if row.outcome == "right":
            counts["right solutions"] += 1
        elif (error := first_wrong(row, positive)) is None:
            counts["drafts whose first wrong step is not known"] += 1
        elif (row.problem_id, row.steps) in found:
            counts["duplicates"] += 1
        else:
            found[row.problem_id, row.steps] = row, error
    return list(found.values()), counts


def _meta(key: str, row: Solution | StepLabels, writer: str, number: int, *, answer: str | None) -> dict[str, Any]:
    return {
        "id": key, "prompt": row.prompt, "reference": row.gold, "draft": list(row.steps), "correct": [False, True],
        "source": "RG1", "writer": writer, "first_error": None, "error_known": False, "critique": None, "answer": answer,
        "refinement": number,
    }  # fmt: skip


def _row(
    row: Solution | StepLabels, wording: Wording, draft: str, target: str, meta: Mapping[str, Any], source: Source
) -> Dialogue:
    turns = [Message(role, content) for role, content in wording.ask_attempt(row.prompt, [draft], [None])]
    messages = (*turns, Message("assistant", target, train=True))
    return Dialogue(row.problem_id, "refine", messages, canonical_json(meta), source)
