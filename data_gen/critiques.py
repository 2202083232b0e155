"""Critiques of drafts, exact or written by a policy (AutoMathCritique, arXiv:2411.16579).

Where a task can check steps and say what should stand there (`StepPlanter`) critiques are exact; else a language model writes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..basics import canonical_json, fold_seed
from ..models.corrections import StepVerdict, Wording, fill, read_critique, strip_leaks, write_critique
from ..models.engine import Engine, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import StepPlanter, Subtracts, Task, first_error
from ..tasks.chain import ERRORS
from .dialogues import ask, text_of
from .drafts import TEXT_ERRORS, Draft
from .rows import Dialogue, Message, Source
from .store import UnitResult

# What an annotator is told. A critic is not trained to answer it.
ANNOTATE = """{question}

(For your eyes alone, do not give any of this away: a right solution ends with {reference}.{hint})"""


@dataclass(frozen=True)
class Layout:
    """What an exact critique says, and in which order.

    stop_at_error   steps behind the first error are left out
    reason_first    every step is explained by the step that should stand there, before its verdict, and by how much the result is
                    off, where the task can subtract: a critic that learns this judges by comparing, and a difference that is not 0
                    is easier to see than two numbers that are not equal
    results         without them the step that should stand there ends before its equals sign: where a solution is one line, its
                    result is the answer
    final           without it there is no verdict on the answer, which then follows from the steps
    """

    stop_at_error: bool = False
    reason_first: bool = False
    results: bool = True
    final: bool = True


def exact_critique(task: StepPlanter, draft: Draft, layout: Layout = Layout()) -> str:
    """The critique by the task's checker: a step is wrong if it does not hold given what stands before it.

    What only goes on from an error inherits it, and is no error of its own; an explanation says which step should have stood there.
    """
    verdicts: list[StepVerdict] = []
    checks = task.check_steps(draft.problem, draft.steps)
    error = first_error(checks)
    for t, (step, check) in enumerate(zip(draft.steps, checks, strict=True)):
        why = ""
        if layout.reason_first or not check.local_ok:
            why = _why(task, layout, step, task.expected_step(draft.problem, draft.steps[:t]))
        elif error is not None and t > error and not check.on_track:
            why = f"inherits error from step {error + 1}"
        verdicts.append(StepVerdict(step, check.local_ok, why))
        if layout.stop_at_error and not check.local_ok:
            break
    return write_critique(verdicts, draft.right if layout.final else None, reason_first=layout.reason_first)


def _why(task: StepPlanter, layout: Layout, step: str, expected: str | None) -> str:
    if not expected:
        return ""
    if not layout.results:
        operation, equals, _ = expected.partition("=")
        return f"expected {' '.join(operation.split())}" if equals else ""
    told = f"expected {' '.join(expected.split())}"
    line = task.difference(step, expected) if layout.reason_first and isinstance(task, Subtracts) else None
    return f"{told} error {line}" if line else told


def corrupted(task: StepPlanter, draft: Draft, seed: int, layout: Layout = Layout()) -> str:
    """An exact critique with a wrong finding: another step is called wrong, or the right one is with a wrong correction.

    It stops there. Of a draft without an error some step is called wrong.
    """
    checks = task.check_steps(draft.problem, draft.steps)
    error = first_error(checks)
    places = [t for t in range(len(draft.steps)) if t != error]
    if error is not None and (seed % 2 == 0 or not places):
        places = [error]
    place = places[(seed >> 8) % len(places)]
    verdicts = [
        StepVerdict(step, True, _why(task, layout, step, step) if layout.reason_first else "")
        for step in draft.steps[:place]
    ]
    # A wrong correction is a planted slip of the line that should stand there.
    wrong = task.planted(draft.problem, min(place, len(draft.steps) - 1), "slip", seed >> 16)
    fix = wrong[place] if place < len(wrong) else wrong[-1]
    verdicts.append(StepVerdict(draft.steps[place], False, _why(task, layout, draft.steps[place], fix)))
    return write_critique(verdicts, False if layout.final else None, reason_first=layout.reason_first)


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
    layout: Layout = Layout(),
    strip: bool = True,
) -> UnitResult[Dialogue]:
    """Rows with exact critiques, of which a share `corrupt`, drawn with the seed, is corrupted (and says so in its `mark`)."""
    texts, marks = [], []
    for draft in drafts:
        draw = fold_seed(seed, "corrupt", draft.key)
        bad = (draw >> 10) / 2**53 < corrupt
        how = fold_seed(draw, "how")
        texts.append([corrupted(task, draft, how, layout) if bad else exact_critique(task, draft, layout)])
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
