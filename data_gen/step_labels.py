"""Monte-Carlo step labels (Math-Shepherd, arXiv:2312.08935 section 3.3): continue every prefix, count the right endings."""

from __future__ import annotations

from collections.abc import Sequence

from ..basics import fingerprint, fold_seed
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Problem, StepChecker, Task, first_error
from .rows import Solution, Source, StepLabels
from .store import UnitResult


def monte_carlo_labels(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    solutions: Sequence[Solution],
    problems: dict[str, Problem],
    *,
    rollouts: int,
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[StepLabels]:
    """Counts for every prefix of every solution, the empty one included: same arguments, same rows.

    All prefixes of all solutions share batches, and a prefix that several solutions of a problem have in common is continued
    once. A finished solution has nothing left to sample: its own verdict is the one observation of its last prefix.
    """
    before = engine.ledger.copy()
    source = Source(policy, engine.name, task.name, seed)
    result: UnitResult[StepLabels] = UnitResult([])
    wanted: dict[tuple[str, tuple[int, ...]], Request] = {}
    prefixes_of: list[list[tuple[str, tuple[int, ...]]]] = []
    kept = [row for row in solutions if row.steps]
    if len(kept) < len(solutions):
        result.dropped["empty solutions"] = len(solutions) - len(kept)
    for row in kept:
        prompt, ids, ends = _layout(engine, step_format, row)
        keys = []
        for end in (0, *ends[:-1]):
            key = (row.problem_id, ids[:end])
            keys.append(key)
            if key not in wanted:
                content = fingerprint(list(ids[:end]))
                seeds = tuple(fold_seed(seed, row.problem_id, "rollout", content, k) for k in range(rollouts))
                wanted[key] = Request(prompt + ids[:end], seeds)
        prefixes_of.append(keys)

    counted: dict[tuple[str, tuple[int, ...]], tuple[int, int]] = {}
    for (problem_id, ids), samples in zip(wanted, engine.generate(list(wanted.values()), sampling), strict=True):
        if samples and samples[0].stop is StopReason.CONTEXT:
            result.dropped["prefixes longer than the context"] += 1
            counted[problem_id, ids] = (0, 0)
            continue
        texts = engine.tokenizer.batch_decode([ids + s.ids for s in samples], skip_special_tokens=True)
        right = sum(task.verify(problems[problem_id], text).right for text in texts)
        counted[problem_id, ids] = (right, len(samples))

    for row, keys in zip(kept, prefixes_of, strict=True):
        counts = [*(counted[key] for key in keys), (int(row.right), 1)]
        checks = task.check_steps(problems[row.problem_id], row.steps) if isinstance(task, StepChecker) else None
        result.rows.append(
            StepLabels(
                problem_id=row.problem_id,
                prompt=row.prompt,
                gold=row.gold,
                sample=row.sample,
                steps=row.steps,
                n_correct=tuple(c for c, _ in counts),
                n_rollouts=tuple(n for _, n in counts),
                label_source="monte_carlo",
                outcome=row.outcome,
                first_error=first_error(checks) if checks is not None else None,
                first_error_known=checks is not None,
                source=source,
            )
        )
    result.ledger = engine.ledger - before
    return result


def _layout(
    engine: Engine, step_format: StepFormat, row: Solution
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(prompt ids, solution ids, step ends): the ids as sampled, or for imported text those of the step format."""
    prompt = step_format.encode_prompt(engine.tokenizer, row.prompt)
    if row.token_ids:
        return prompt, row.token_ids, row.step_ends
    encoded = step_format.encode_after(engine.tokenizer, prompt, row.steps)
    solution = encoded.ids[len(prompt) :]
    return prompt, solution, tuple(end + 1 - len(prompt) for end in encoded.step_ends)
