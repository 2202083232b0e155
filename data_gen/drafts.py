"""Drafts: solutions to be criticised, and what is known of their errors (AutoMathCritique, arXiv:2411.16579).

RG1 drafts are samples of a policy: natural errors, somewhere. RG2 drafts have an error planted at a told step, RG3 drafts a told
kind of error at a told step; what follows goes on from it. Where a task can plant errors (`StepPlanter`) they are exact; else a
language model writes them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..basics import UserError, fold_seed
from ..models.corrections import fill
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import HasReference, Problem, StepChecker, StepPlanter, Task, first_error
from ..tasks.chain import ERRORS
from .dialogues import meta_of
from .rows import Dialogue, Solution

# What a generator is told on text.
PLANT = """{prompt}

Write a solution, one step a line, that goes wrong at step {step} and nowhere before it, {error} Go on from the error as if it \
were right, and end with the answer that follows. Do not say that there is an error."""
PLANT_INTO = """{prompt}

A right solution:
{reference}

Rewrite it, one step a line, with this error in step {step}: {error}. Go on from the error as if it were right, and end with the \
answer that follows. Do not say that there is an error."""
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
