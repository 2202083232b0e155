"""Solutions that notice a wrong step, say so and put it right (S3c-Math, arXiv:2409.01524): rows, and how often it works."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..basics import canonical_json, fold_seed
from ..models.engine import Engine, Sampling
from ..models.step_format import StepFormat
from ..tasks.base import Problem, StepChecker, Task
from .growing import Ask, Cut, Growth, Roller, grow
from .rows import Dialogue, Message, Solution
from .solutions import to_dialogue
from .store import UnitResult


@dataclass(frozen=True)
class Slip:
    """A wrong step that a policy wrote behind right ones, and the steps of the solution that it stands in."""

    position: int  # 0-based, of the step that should stand there
    step: str


@dataclass(frozen=True)
class Found:
    """What was found in one solution."""

    slips: tuple[Slip, ...]
    counts: Counter[str]


def find_slips(
    cut: Cut,
    ids: Sequence[int],
    ends: Sequence[int],
    steps: Sequence[str],
    positions: Sequence[int],
    *,
    candidates: int,
    completions: int,
    check: Callable[[Sequence[str]], bool] | None,
) -> Growth[Found]:
    """Wrong steps that the policy writes in place of step `t` of a right solution, for each t of `positions`; one a position.

    A candidate is wrong if `check` (of the steps up to and including it) says so; without a check, if none of `completions`
    from it ends right (pass@k = 0) while the solution itself, which goes on from the same prefix, does.
    """
    counts: Counter[str] = Counter()
    slips: list[Slip] = []
    prefixes = [tuple(ids[: ends[t - 1]]) if t else () for t in positions]
    sampled = yield [Ask(prefix, range(candidates), one_step=True) for prefix in prefixes]
    asked: list[tuple[int, str]] = []
    asks: list[Ask] = []
    for t, rollouts in zip(positions, sampled, strict=True):
        seen: set[str] = {steps[t]}
        for rollout in rollouts:
            written, _ = cut(rollout.ids)
            if len(written) != t + 1 or written[t] in seen or rollout.right:
                continue
            seen.add(written[t])
            if check is not None:
                if not check(written):
                    slips.append(Slip(t, written[t]))
                    break
            elif rollout.outcome == "wrong":  # it has ended the solution: its verdict is known
                slips.append(Slip(t, written[t]))
                break
            else:
                asked.append((t, written[t]))
                asks.append(Ask(rollout.ids, range(completions)))
    done = {slip.position for slip in slips}
    answers = (yield asks) if asks else []
    for (t, step), rollouts in zip(asked, answers, strict=True):
        counts["candidates judged by completions"] += 1
        if t not in done and rollouts and not any(r.right for r in rollouts):
            done.add(t)
            slips.append(Slip(t, step))
    counts["positions without a wrong step"] += len(positions) - len(done)
    return Found(tuple(sorted(slips, key=lambda s: s.position)), counts)


def inline_row(
    row: Solution, slips: Sequence[Slip], reflections: Sequence[str], separator: str, *, mask: bool
) -> Dialogue:
    """A solution with wrong steps, each followed by a reflection and the right step.

    With `mask` the wrong step, up to and including its separator, is read and not trained; the reflection is.
    """
    text, spans = "", []
    by_place = {slip.position: slip for slip in slips}
    for t, step in enumerate(row.steps):
        if t in by_place:
            begin = len(text)
            text += by_place[t].step + separator
            spans.append((begin, len(text)))
            text += reflections[fold_seed(0, row.problem_id, row.sample, t) % len(reflections)] + separator
        text += step + (separator if t + 1 < len(row.steps) else "")
    meta = {"slips": [s.position for s in slips], "sample": row.sample, "masked": mask}
    answer = Message("assistant", text, train=True, mask_spans=tuple(spans) if mask else ())
    return Dialogue(
        row.problem_id, "selfcorrect", (Message("user", row.prompt), answer), canonical_json(meta), row.source
    )


def inline_corrections(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    solutions: Sequence[Solution],
    problems: Mapping[str, Problem],
    reflections: Sequence[str],
    *,
    slips: int,
    positions: int,
    candidates: int,
    completions: int,
    clean: float,
    mask: bool,
    sampling: Sampling,
    seed: int,
) -> UnitResult[Dialogue]:
    """Rows of kind `selfcorrect` with up to `slips` corrected steps each, and of kind `solve` for a share of at least `clean`.

    Wrong steps are looked for at `positions` drawn places of each right solution (0: all), in what the policy itself would
    write there. If every solution had an error the policy would learn to err on purpose: a drawn share stays as it is, and so
    do those in which no wrong step was found.
    """
    before = engine.ledger.copy()
    result: UnitResult[Dialogue] = UnitResult([])
    roller = Roller(engine, task, step_format, sampling, seed)
    plain = lambda row: to_dialogue(row.problem_id, row.prompt, row.steps, task.step_separator, row.source)
    chosen: list[tuple[Solution, list[int]]] = []
    order: list[tuple[Solution, int | None]] = []
    for row in solutions:
        if not row.right or not row.steps:
            result.dropped["solutions that are not right"] += 1
            continue
        if (fold_seed(seed, row.problem_id, row.sample, "clean") >> 10) / 2**53 < clean:
            order.append((row, None))
            continue
        places = sorted(range(len(row.steps)), key=lambda t: fold_seed(seed, row.problem_id, row.sample, "place", t))
        order.append((row, len(chosen)))
        chosen.append((row, sorted(places[:positions] if positions else places)))

    def check(problem: Problem) -> Callable[[Sequence[str]], bool] | None:
        if not isinstance(task, StepChecker):
            return None
        return lambda steps: task.check_steps(problem, steps)[-1].local_ok

    growths = []
    for row, places in chosen:
        encoded = step_format.encode_after(engine.tokenizer, (), row.steps)
        ids, ends = (
            (row.token_ids, row.step_ends) if row.token_ids else (encoded.ids, [e + 1 for e in encoded.step_ends])
        )
        growths.append(
            find_slips(
                roller.cut, ids, ends, row.steps, places, candidates=candidates, completions=completions,
                check=check(problems[row.problem_id]),
            )
        )  # fmt: skip
    found = grow(roller, [problems[row.problem_id] for row, _ in chosen], growths)
    for row, place in order:
        kept: list[Slip] = []
        if place is not None:
            result.counts.update(found[place].counts)
            kept = list(found[place].slips[:slips])
        if kept:
            result.rows.append(inline_row(row, kept, reflections, task.step_separator, mask=mask))
            result.counts["corrected steps"] += len(kept)
        else:
            result.rows.append(plain(row))
        result.counts["solutions with a correction" if kept else "clean solutions"] += 1
    result.ledger = engine.ledger - before
    result.dropped.update(+roller.counts)
    result.dropped = +result.dropped
    result.counts = +result.counts
    return result


def measure_inline(
    task: StepChecker, problem: Problem, steps: Sequence[str], reflections: Sequence[str]
) -> dict[str, float]:
    """What a solution does about its own wrong steps: how many `steps`, how many `wrong` when they were written, `repaired` (a
    reflection and a step that holds follow a wrong one), `noticed` (a reflection follows a wrong one), and `alarms` (one follows a
    step that holds).

    A reflection takes back the step before it: what follows is judged behind the steps that still stand.
    """
    standing: list[str] = []
    found = {"steps": 0.0, "wrong": 0.0, "noticed": 0.0, "repaired": 0.0, "alarms": 0.0}
    last_ok: bool | None = None
    owed = False  # the step that comes next replaces a wrong one
    for step in steps:
        if step in reflections:
            if last_ok is None:
                continue
            found["alarms" if last_ok else "noticed"] += 1
            owed, last_ok = not last_ok, None
            standing.pop()
            continue
        standing.append(step)
        last_ok = task.check_steps(problem, standing)[-1].local_ok
        found["steps"] += 1
        found["wrong"] += not last_ok
        found["repaired"] += owed and last_ok
        owed = False
    return found
