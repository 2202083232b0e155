"""Solutions: samples of a policy with their verdicts, and demonstrations to start a policy from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..basics import UserError, fold_seed
from ..models.engine import Engine, Request, Sample, Sampling, StopReason
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import HasReference, Problem, Task
from .rows import Dialogue, Message, Solution, Source
from .store import UnitResult


def sample_solutions(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    samples: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    hint: str = "",
) -> UnitResult[Solution]:
    """`samples` solutions of each problem with verdicts: same arguments, same rows.

    A problem whose prompt does not fit into the model's context is dropped and counted. `hint` is a text with {prompt} and {answer}
    that is asked instead of the prompt (STaR's rationalisation, arXiv:2203.14465); rows have the prompt without it.
    """
    before = engine.ledger.copy()
    told = lambda p: hint.replace("{prompt}", p.prompt).replace("{answer}", p.answer) if hint else p.prompt
    prompts = [step_format.encode_prompt(engine.tokenizer, told(problem)) for problem in problems]
    requests = [
        Request(ids, tuple(fold_seed(seed, problem.id, "solution", i) for i in range(samples)))
        for ids, problem in zip(prompts, problems, strict=True)
    ]
    result: UnitResult[Solution] = UnitResult([])
    source = Source(policy, engine.name, task.name, seed)
    for problem, found in zip(problems, engine.generate(requests, sampling), strict=True):
        if found and found[0].stop is StopReason.CONTEXT:
            result.dropped["prompts longer than the context"] += 1
            continue
        for number, sample in enumerate(found):
            result.rows.append(solution_row(engine.tokenizer, task, problem, number, sample, source))
    if hint:
        result.counts["problems asked with their answer told"] += len(problems)
    result.ledger = engine.ledger - before
    return result


def solution_row(tokenizer: Any, task: Task, problem: Problem, number: int, sample: Sample, source: Source) -> Solution:
    """The row of one sample, with its verdict."""
    text = tokenizer.decode(sample.ids, skip_special_tokens=True)
    steps, ends = cut_steps(tokenizer, sample.ids, task.step_separator)
    verdict = task.verify(problem, text)
    return Solution(
        problem_id=problem.id,
        prompt=problem.prompt,
        gold=problem.answer,
        sample=number,
        steps=steps,
        text=text,
        answer=verdict.answer,
        outcome=verdict.outcome.value,
        stop=sample.stop.value,
        token_ids=sample.ids,
        step_ends=ends,
        logprob=float(sum(sample.logprobs)),
        source=source,
    )


def demonstrations(task: Task, problems: Sequence[Problem], *, seed: int) -> UnitResult[Dialogue]:
    """One solution to learn from for each problem: a lab task's noisy demonstration, else the task's reference solution."""
    result: UnitResult[Dialogue] = UnitResult([])
    source = Source("reference", "none", task.name, seed)
    write = getattr(task, "demonstration", None)
    for problem in problems:
        steps = None
        if write is not None:
            steps = write(problem, fold_seed(seed, problem.id, "demonstration"))
        elif isinstance(task, HasReference):
            steps = task.reference_steps(problem)
        if steps is None:
            result.dropped["problems without a reference solution"] += 1
            continue
        result.rows.append(to_dialogue(problem.id, problem.prompt, steps, task.step_separator, source))
    if not result.rows:
        raise UserError(f"task {task.name}: no problem has a reference solution to learn from")
    return result


def to_dialogue(problem_id: str, prompt: str, steps: Sequence[str], separator: str, source: Source) -> Dialogue:
    """A solution as a dialogue of one question and one trained answer."""
    # Around an empty-looking separator (a newline) words stay apart: the lab's tokenizer splits on spaces.
    text = separator.join(steps)
    messages = (Message("user", prompt), Message("assistant", text, train=True))
    return Dialogue(problem_id, "solve", messages, "{}", source)


def best_solutions(
    solutions: Sequence[Solution],
    scores: Sequence[float] | None,
    *,
    per_problem: int,
    separator: str,
    seed: int,
    only_right: bool = True,
) -> UnitResult[Dialogue]:
    """Rejection sampling: up to `per_problem` distinct right solutions of each problem, as dialogues to fine-tune on.

    Without `only_right` wrong ones are kept like right ones: the control that shows what the verdicts are worth.
    With `scores` (one a solution, from a reward model) the highest come first, ties in order of sampling; without, the choice
    is drawn with the seed. Steps decide what is a duplicate.
    """
    by_problem: dict[str, list[int]] = {}
    counts: Counter[str] = Counter()
    for index, row in enumerate(solutions):
        by_problem.setdefault(row.problem_id, [])
        if row.right or not only_right:
            by_problem[row.problem_id].append(index)
        else:
            counts[f"answers {row.outcome}"] += 1
    result: UnitResult[Dialogue] = UnitResult([])
    for problem_id, indices in by_problem.items():
        if not indices:
            counts["problems without a right solution"] += 1
        rank = {
            i: -scores[i] if scores is not None else fold_seed(seed, problem_id, solutions[i].sample) for i in indices
        }
        seen: set[tuple[str, ...]] = set()
        for i in sorted(indices, key=lambda i: (rank[i], i)):
            if solutions[i].steps in seen:
                counts["duplicates"] += 1
            elif len(seen) == per_problem:
                counts["beyond the limit a problem"] += 1
            else:
                seen.add(solutions[i].steps)
                row = solutions[i]
                result.rows.append(to_dialogue(problem_id, row.prompt, row.steps, separator, row.source))
    result.dropped = counts
    return result
