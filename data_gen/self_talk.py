"""Self-talk (AutoMathCritique, arXiv:2411.16579): a draft, what is wrong with it, and its correction as one train of thought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ..basics import canonical_json, fold_seed
from ..models.corrections import fill
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Problem, Task
from .dialogues import meta_of, text_of
from .rows import Dialogue, Message, Source
from .store import UnitResult

# What a model is told that makes a monologue of a chain; the example that the paper gives it is not here.
REWRITE = """{prompt}

Notes of somebody who solved this, with an attempt that went wrong and its correction:

{chain}

Rewrite the notes as one train of thought in the first person, which notices the error by itself, goes back and puts it right. \
Keep every calculation, and end with the same last line."""


def self_talk(
    refined: Sequence[Dialogue], task: Task, template: str, *, stop_at_error: bool, per_problem: int, seed: int
) -> UnitResult[Dialogue]:
    """Rows of kind `selfcorrect`: problem -> a chain in one answer: the draft, a remark on it, the right refinement.

    `template` ({draft}, {critique}, {refinement}) says how they stand together. With `stop_at_error` the draft breaks off behind
    its first wrong step: the known one, else the one that the critique names. Up to `per_problem` (0: all) of right refinements of
    wrong drafts, drawn with the seed; the whole chain trains.
    """
    result: UnitResult[Dialogue] = UnitResult([])
    grouped: dict[str, list[Dialogue]] = {}
    for row in refined:
        meta = meta_of(row)
        if meta["correct"] != [False, True]:
            result.dropped["refinements that do not put a wrong draft right"] += 1
        else:
            grouped.setdefault(row.problem_id, []).append(row)
    for own in grouped.values():
        own.sort(key=lambda r: fold_seed(seed, meta_of(r)["id"], "self-talk", meta_of(r)["refinement"]))
        seen: set[str] = set()
        for row in own:
            meta = meta_of(row)
            steps = list(meta["draft"])
            error = meta["first_error"] if meta.get("error_known") else meta.get("says_first_error")
            if stop_at_error and error is not None:
                steps = steps[: error + 1]
            refinement = task.step_separator.join([*meta.get("prefix", ()), row.messages[-1].content])
            chain = fill(
                template,
                draft=task.step_separator.join(steps),
                critique=meta.get("critique") or "",
                refinement=refinement,
            )
            if chain in seen:
                result.dropped["duplicates"] += 1
            elif per_problem and len(seen) == per_problem:
                result.dropped["beyond the limit a problem"] += 1
            else:
                seen.add(chain)
                result.rows.append(_row(row, chain, {**meta, "rewritten": False}, row.source))
    result.dropped = +result.dropped
    return result


def rewritten(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    chains: Sequence[Dialogue],
    problems: Mapping[str, Problem],
    *,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Dialogue]:
    """The rows of `self_talk` as fluent monologues by a model; those that do not end right are dropped and counted."""
    before = engine.ledger.copy()
    source = Source(policy, engine.name, task.name, seed)
    result: UnitResult[Dialogue] = UnitResult([])
    requests = []
    for row in chains:
        told = fill(REWRITE, prompt=row.messages[0].content, chain=row.messages[-1].content)
        place = fold_seed(seed, meta_of(row)["id"], "rewrite", meta_of(row)["refinement"])
        requests.append(Request(step_format.encode_prompt(engine.tokenizer, told), (place,)))
    lost: Counter[str] = Counter()
    for row, [sample] in zip(chains, engine.generate(requests, sampling), strict=True):
        text = text_of(engine, sample)
        if sample.stop in (StopReason.CONTEXT, StopReason.LENGTH):
            lost["monologues cut at their length"] += 1
        elif not task.verify(problems[row.problem_id], text).right:
            lost["monologues that end wrong"] += 1
        else:
            result.rows.append(_row(row, text, {**meta_of(row), "rewritten": True}, source))
    result.dropped = +lost
    result.ledger = engine.ledger - before
    return result


def _row(row: Dialogue, text: str, meta: Mapping[str, object], source: Source) -> Dialogue:
    messages = (Message("user", str(meta["prompt"])), Message("assistant", text, train=True))
    return Dialogue(row.problem_id, "selfcorrect", messages, canonical_json(dict(meta)), source)
