"""Critiques and refinements by them (AutoMathCritique, arXiv:2411.16579): drafts, critiques, their filter, rows to learn.

A draft is a solution to be criticised. RG1 drafts are samples of a policy: natural errors, somewhere. RG2 drafts have an error
planted at a told step, RG3 drafts a told kind of error at a told step; what follows goes on from it. Where a task can plant
errors and check steps (`StepPlanter`), drafts and critiques are exact; else a language model writes them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..basics import UserError, canonical_json, fold_seed
from ..models.corrections import StepVerdict, Wording, fill, read_critique, strip_leaks, write_critique
from ..models.engine import Engine, Request, Sample, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import HasReference, Problem, StepChecker, StepPlanter, Subtracts, Task, first_error
from ..tasks.chain import ERRORS
from .rows import Dialogue, Message, Solution, Source
from .store import UnitResult

# What a generator is told on text (RG2, RG3), and an annotator. They are not what a critic is trained to answer.
PLANT = """{prompt}

Write a solution, one step a line, that goes wrong at step {step} and nowhere before it, {error} Go on from the error as if it \
were right, and end with the answer that follows. Do not say that there is an error."""
PLANT_INTO = """{prompt}

A right solution:
{reference}

Rewrite it, one step a line, with this error in step {step}: {error}. Go on from the error as if it were right, and end with the \
answer that follows. Do not say that there is an error."""
ANNOTATE = """{question}

(For your eyes alone, do not give any of this away: a right solution ends with {reference}.{hint})"""
TEXT_ERRORS = {
    "slip": "a calculation with a wrong result",
    "operand": "a number that is not the one of the problem",
    "operator": "the wrong operation",
    "skip": "a needed step is left out",
    "answer": "the answer given is not the result of the steps",
}


@dataclass(frozen=True)
class Draft:
    """A solution to be criticised, and what is known of its error."""

    problem: Problem
    steps: tuple[str, ...]
    right: bool  # its answer
    origin: str  # RG1, RG2 or RG3
    sample: int  # number among the drafts of its origin and problem
    writer: (
        str  # the policy that wrote it, or "planted": corrections learnt on others' errors transfer poorly to one's own
    )
    first_error: int | None = None
    known: bool = False
    error: str = ""  # the kind that was planted

    @property
    def key(self) -> str:
        return f"{self.problem.id}/{self.origin}/{self.sample}"


def natural_drafts(
    solutions: Sequence[Solution], task: Task, problems: Mapping[str, Problem], *, wrong: int, right: int
) -> list[Draft]:
    """RG1: the first `wrong` distinct wrong and `right` distinct right samples of each problem (a critic must learn to say so)."""
    taken: Counter[tuple[str, bool]] = Counter()
    seen: set[tuple[str, tuple[str, ...]]] = set()
    drafts = []
    for row in solutions:
        key = (row.problem_id, row.right)
        if (row.problem_id, row.steps) in seen or not row.steps or taken[key] >= (right if row.right else wrong):
            continue
        seen.add((row.problem_id, row.steps))
        taken[key] += 1
        drafts.append(_checked(task, Draft(
            problems[row.problem_id], row.steps, row.right, "RG1", row.sample, row.source.policy
        )))  # fmt: skip
    return drafts


def reference_drafts(task: Task, problems: Sequence[Problem]) -> list[Draft]:
    """The task's right solutions as drafts, where it has them: right ones are rare among samples of a weak policy."""
    found = []
    for problem in problems:
        steps = task.reference_steps(problem) if isinstance(task, HasReference) else None
        if steps:
            found.append(_checked(task, Draft(problem, tuple(steps), True, "reference", 0, "planted")))
    return found


def drafts_of_dialogues(rows: Sequence[Dialogue]) -> list[Draft]:
    """The drafts of rows that have one in their meta (kinds draft, critique, refine), each once."""
    found: dict[tuple[str, tuple[str, ...]], Draft] = {}
    for number, row in enumerate(rows):
        meta = meta_of(row)
        if "draft" not in meta:
            raise UserError(f"row {row.problem_id}: kind {row.kind} has no draft; draft, critique and refine have")
        problem = Problem(row.problem_id, meta["prompt"], meta["reference"])
        draft = Draft(
            problem, tuple(meta["draft"]), meta["correct"][0], meta["source"], number, meta["writer"], meta["first_error"],
            meta["error_known"], meta.get("error", ""),
        )  # fmt: skip
        if draft.steps:
            found.setdefault((problem.id, draft.steps), draft)
    return list(found.values())


def _checked(task: Task, draft: Draft) -> Draft:
    if not isinstance(task, StepChecker):
        return draft
    error = first_error(task.check_steps(draft.problem, draft.steps))
    return dataclasses.replace(draft, first_error=error, known=True)


def planted_drafts(
    task: StepPlanter,
    problem: Problem,
    *,
    origin: str,
    count: int,
    seed: int,
    kinds: Sequence[str] = tuple(ERRORS),
    more: float = 0.0,
) -> list[Draft]:
    """`count` drafts of a problem with an error planted by the task, at steps drawn without return as long as there are any.

    RG2: a slip. RG3: one of `kinds`, drawn. Steps behind the error slip too with probability `more`: a critic that sees one wrong
    step in eight learns to call all of them right first. An error whose answer comes out right all the same is kept: the draft is
    flawed.
    """
    drafts: list[Draft] = []
    length = len(task.planted(problem, 0, "slip", seed))
    for number in range(count):
        round_, place = divmod(number, length)
        order = sorted(range(length), key=lambda i: fold_seed(seed, problem.id, origin, "step", round_, i))
        kind = "slip"
        if origin == "RG3":
            kind = kinds[fold_seed(seed, problem.id, origin, "kind", number) % len(kinds)]
        index = length - 1 if kind == "answer" else order[place]
        steps = task.planted(problem, index, kind, fold_seed(seed, problem.id, origin, number), more)
        right = task.verify(problem, task.step_separator.join(steps)).right
        drafts.append(Draft(problem, tuple(steps), right, origin, number, "planted", index, True, kind))
    return drafts


def written_drafts(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    origin: str,
    count: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    references: Mapping[str, Sequence[str]],
) -> tuple[list[Draft], Counter[str]]:
    """RG2 or RG3 drafts by a language model that is told where (and, of RG3, in which way) to go wrong; what was left out.

    RG3 needs a right solution (`references`). A draft whose answer is right, or that is too short to hold its step, is left out.
    """
    counts: Counter[str] = Counter()
    asked: list[tuple[Problem, int, int, str]] = []
    requests = []
    for problem in problems:
        reference = references.get(problem.id)
        if not reference:
            counts[f"problems without a reference solution for {origin}"] += 1
            continue
        for number in range(count):
            draw = fold_seed(seed, problem.id, origin, number)
            index = draw % len(reference)
            kind = list(TEXT_ERRORS)[(draw >> 20) % len(TEXT_ERRORS)] if origin == "RG3" else ""
            told = fill(
                PLANT_INTO if kind else PLANT,
                prompt=problem.prompt, reference="\n".join(reference), step=str(index + 1),
                error=TEXT_ERRORS[kind] if kind else "in a way that is easily overlooked.",
            )  # fmt: skip
            requests.append(Request(step_format.encode_prompt(engine.tokenizer, told), (draw,)))
            asked.append((problem, number, index, kind))
    drafts = []
    for (problem, number, index, kind), [sample] in zip(asked, engine.generate(requests, sampling), strict=True):
        text = engine.tokenizer.decode(sample.ids, skip_special_tokens=True)
        steps = tuple(task.split_steps(text))
        if sample.stop in (StopReason.CONTEXT, StopReason.LENGTH):
            counts[f"{origin} drafts cut at their length"] += 1
        elif len(steps) <= index:
            counts[f"{origin} drafts too short for their error"] += 1
        elif task.verify(problem, text).right:
            counts[f"{origin} drafts that end right"] += 1
        else:
            drafts.append(Draft(problem, steps, False, origin, number, policy, index, True, kind))
    return drafts, counts


# --- critiques --------------------------------------------------------------------------------------------------------


def exact_critique(
    task: StepPlanter,
    draft: Draft,
    *,
    stop_at_error: bool = False,
    reason_first: bool = False,
    results: bool = True,
    final: bool = True,
) -> str:
    """The critique by the task's checker: a step is wrong if it does not hold given what stands before it.

    What only goes on from an error inherits it, and is no error of its own; an explanation says which step should have stood there.
    With `stop_at_error` steps behind the first error are left out. With `reason_first` every step is explained by the step that
    should stand there, before its verdict, and by how much the result is off, where the task can subtract: a critic that learns
    this judges by comparing, and a difference that is not 0 is easier to see than two numbers that are not equal. Without `results`
    the step that should stand there ends before its equals sign: where a solution is one line, its result is the answer. Without
    `final` there is no verdict on the answer, which then follows from the steps.
    """
    verdicts: list[StepVerdict] = []
    checks = task.check_steps(draft.problem, draft.steps)
    error = first_error(checks)
    for t, (step, check) in enumerate(zip(draft.steps, checks, strict=True)):
        why = ""
        if reason_first or not check.local_ok:
            expected = task.expected_step(draft.problem, draft.steps[:t])
            why = _expected(expected, results)
            if reason_first and expected and results:
                why += _off(task, step, expected)
        elif error is not None and t > error and not check.on_track:
            why = f"inherits error from step {error + 1}"
        verdicts.append(StepVerdict(step, check.local_ok, why))
        if stop_at_error and not check.local_ok:
            break
    return write_critique(verdicts, draft.right if final else None, reason_first=reason_first)


def _expected(step: str | None, results: bool) -> str:
    if not results:
        step = step.partition("=")[0].strip() if step and "=" in step else None
    return f"expected {' '.join(step.split())}" if step else ""


def _off(task: StepPlanter, step: str, expected: str) -> str:
    line = task.difference(step, expected) if isinstance(task, Subtracts) else None
    return f" error {line}" if line else ""


def corrupted(
    task: StepPlanter,
    draft: Draft,
    seed: int,
    *,
    reason_first: bool = False,
    results: bool = True,
    final: bool = True,
) -> str:
    """An exact critique with a wrong finding: another step is called wrong, or the right one is with a wrong correction.

    It stops there. Of a draft without an error some step is called wrong.
    """
    checks = task.check_steps(draft.problem, draft.steps)
    error = first_error(checks)
    places = [t for t in range(len(draft.steps)) if t != error]
    if error is not None and (seed % 2 == 0 or not places):
        places = [error]
    place = places[(seed >> 8) % len(places)]

    def told(step: str, expected: str) -> str:
        return _expected(expected, results) + (_off(task, step, expected) if reason_first and results else "")

    verdicts = [StepVerdict(step, True, told(step, step) if reason_first else "") for step in draft.steps[:place]]
    # A wrong correction is a planted slip of the line that should stand there.
    wrong = task.planted(draft.problem, min(place, len(draft.steps) - 1), "slip", seed >> 16)
    fix = wrong[place] if place < len(wrong) else wrong[-1]
    verdicts.append(StepVerdict(draft.steps[place], False, told(draft.steps[place], fix)))
    return write_critique(verdicts, False if final else None, reason_first=reason_first)


def critique_rows(
    drafts: Sequence[Draft],
    texts: Sequence[Sequence[str]],
    wording: Wording,
    task: Task,
    source: Source,
    *,
    strip: bool = True,
    marks: Sequence[str] | None = None,
    keep_unreadable: bool = False,
) -> UnitResult[Dialogue]:
    """A row of kind `critique` for each text about each draft. Texts without a verdict are dropped, leaks of the answer cut.

    With `keep_unreadable` they stay, and say nothing: to judge a critic, not to learn from.

    `meta` says: id, prompt, reference, draft (its steps), correct, source (RG1 ...), writer, first_error, error, critique,
    wrong (what it says), and in `mark` how it was made if that is told. An answer that a right draft gives already is no leak.
    """
    result: UnitResult[Dialogue] = UnitResult([])
    for position, (draft, own) in enumerate(zip(drafts, texts, strict=True)):
        problem, text = draft.problem, task.step_separator.join(draft.steps)
        for number, critique in enumerate(own):
            if strip and not draft.right:
                critique, cut = strip_leaks(critique, problem.answer, problem.prompt + text)
                result.counts["sentences cut that gave the answer away"] += cut
            reading = read_critique(critique)
            if reading.wrong is None:
                if not keep_unreadable:
                    result.dropped["critiques without a verdict"] += 1
                    continue
                result.counts["critiques without a verdict"] += 1
            else:
                # By the answer: a flawed draft with a right answer is called right.
                result.counts["critiques that agree with the answer"] += reading.wrong != draft.right
            meta = {
                "id": f"{draft.key}/{number}", "prompt": problem.prompt, "reference": problem.answer,
                "draft": list(draft.steps), "correct": [draft.right], "source": draft.origin, "writer": draft.writer,
                "first_error": draft.first_error, "error_known": draft.known, "error": draft.error, "critique": critique,
                "wrong": reading.wrong, "says_first_error": reading.first_error,
                **({"mark": marks[position]} if marks is not None else {}),
            }  # fmt: skip
            [(role, asked)] = wording.ask_critique(problem.prompt, text)
            messages = (Message(role, asked), Message("assistant", critique, train=True))
            result.rows.append(Dialogue(problem.id, "critique", messages, canonical_json(meta), source))
    return result


def exact_critiques(
    task: StepPlanter,
    drafts: Sequence[Draft],
    wording: Wording,
    *,
    seed: int,
    corrupt: float = 0.0,
    stop_at_error: bool = False,
    reason_first: bool = False,
    results: bool = True,
    final: bool = True,
    strip: bool = True,
) -> UnitResult[Dialogue]:
    """Rows with exact critiques, of which a share `corrupt`, drawn with the seed, is corrupted (and says so in its `mark`)."""
    texts, marks = [], []
    how: Any = {"reason_first": reason_first, "results": results, "final": final}
    for draft in drafts:
        draw = fold_seed(seed, "corrupt", draft.key)
        bad = (draw >> 10) / 2**53 < corrupt
        if bad:
            text = corrupted(task, draft, fold_seed(draw, "how"), **how)
        else:
            text = exact_critique(task, draft, stop_at_error=stop_at_error, **how)
        texts.append([text])
        marks.append("corrupted" if bad else "exact")
    source = Source("checker", "none", task.name, seed)
    result = critique_rows(drafts, texts, wording, task, source, strip=strip, marks=marks)
    result.counts["corrupted critiques"] += marks.count("corrupted")
    return result


def written_critiques(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    drafts: Sequence[Draft],
    wording: Wording,
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    annotate: bool,
    strip: bool = True,
    keep_unreadable: bool = False,
) -> UnitResult[Dialogue]:
    """Rows with `samples` critiques of each draft by a language model.

    With `annotate` it is told the reference answer, and what is known of the error, as an annotator is; rows hold the plain
    question.
    """
    before = engine.ledger.copy()
    asked = []
    for draft in drafts:
        [(role, question)] = wording.ask_critique(draft.problem.prompt, task.step_separator.join(draft.steps))
        if annotate:
            hint = ""
            if draft.known and draft.first_error is not None:
                kind = TEXT_ERRORS.get(draft.error, ERRORS.get(draft.error, ""))
                hint = f" The first error is in step {draft.first_error + 1}" + (f": {kind}." if kind else ".")
            question = fill(ANNOTATE, question=question, reference=draft.problem.answer, hint=hint)
        asked.append([(role, question)])
    seeds = [[fold_seed(seed, draft.key, "critique", k) for k in range(samples)] for draft in drafts]
    found = ask(engine, step_format, asked, seeds, sampling)
    texts = [[text_of(engine, s) for s in own if s.stop is not StopReason.CONTEXT] for own in found]
    source = Source(policy, engine.name, task.name, seed)
    result = critique_rows(drafts, texts, wording, task, source, strip=strip, keep_unreadable=keep_unreadable)
    result.dropped["drafts longer than the context"] += sum(not own for own in texts)
    result.dropped = +result.dropped
    result.ledger = engine.ledger - before
    return result


def ask(
    engine: Engine,
    step_format: StepFormat,
    dialogues: Sequence[Sequence[tuple[str, str]]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[list[Sample]]:
    """Answers [B][len(seeds[b])] to dialogues, in one call."""
    requests = [
        Request(step_format.encode_dialogue(engine.tokenizer, turns), tuple(own))
        for turns, own in zip(dialogues, seeds, strict=True)
    ]
    return engine.generate(requests, sampling)


def text_of(engine: Engine, sample: Sample) -> str:
    """The text of a sample, without outer white space."""
    return engine.tokenizer.decode(sample.ids, skip_special_tokens=True).strip()


# --- refinements ------------------------------------------------------------------------------------------------------


def meta_of(row: Dialogue) -> dict[str, Any]:
    """What a row says of itself."""
    return json.loads(row.meta)


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
