"""The stages that make critiques, refinements and corrections."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, fold_seed, make_folder
from ..data_gen import flips, glore, inline, rise, self_talk
from ..data_gen.critiques import Layout, exact_critiques, written_critiques
from ..data_gen.dialogues import meta_of
from ..data_gen.drafts import (
    Draft,
    drafts_of_dialogues,
    natural_drafts,
    planted_drafts,
    reference_drafts,
    written_drafts,
)
from ..data_gen.refinements import best_refinements, derangement, filter_critiques, refinements, repairs
from ..data_gen.rows import Dialogue, Solution, StepLabels
from ..data_gen.store import Shard, UnitResult, make_rows, read_rows, write_rows
from ..models.engine import Engine
from ..models.step_format import StepFormat
from ..tasks.base import HasReference, Problem, StepPlanter, Task
from ..tasks.free import FreeText
from ..tasks.load import load_task
from . import options_corrections as options
from .evaluate_corrections import read_chains
from .making import _check_words, _finish, _policy, _problems, _sampling, _split
from .options import chunks, first, required


class Asked:
    """A policy that is loaded when it is first asked, with its step format saved beside the rows."""

    def __init__(self, config: Any, task: Task, out: Path, prompts: Sequence[str]) -> None:
        self.config, self.task, self.out, self.prompts = config, task, out, prompts
        self._loaded: tuple[Engine, StepFormat] | None = None

    def __call__(self) -> tuple[Engine, StepFormat]:
        """Engine and step format."""
        if self._loaded is None:
            self._loaded = _policy(self.config, self.task)
            _check_words(self.config.policy, *self._loaded, self.prompts)
            self._loaded[1].save(make_folder(self.out))
        return self._loaded


def make_critiques(config: options.Critiques, out: Path) -> bool:
    """Drafts and their critiques."""
    if config.drafts:
        return _criticise_drafts(config, out)
    task, problems = _problems(config)
    exact = config.writer == "checker" or (not config.writer and isinstance(task, StepPlanter))
    if exact and not isinstance(task, StepPlanter):
        raise UserError(f"task {task.name} cannot check steps and plant errors: set writer: policy, and give a policy")
    if config.references and not isinstance(task, HasReference):
        raise UserError(f"task {task.name} has no reference solutions: leave out references")
    if not (config.solutions or config.rg2 or config.rg3 or config.references):
        raise UserError("nothing to criticise: give solutions or drafts, rg2 or rg3 of 1 or more, or references: true")
    if config.corrupt and not exact:
        raise UserError("corrupt is about the checker's critiques")
    wording = config.words()
    rows: dict[str, list[Solution]] = {}
    if config.solutions:
        for row in read_rows(config.solutions, Solution):
            rows.setdefault(row.problem_id, []).append(row)
        known = {problem.id for problem in problems}
        if not known & rows.keys():
            raise UserError(
                f"{config.solutions}: no problem of split {config.split!r} of task {task.name} has a solution there"
            )
    policy = Asked(config, task, out, [p.prompt for p in problems])
    layout = Layout(config.stop_at_error, config.reason_first, config.results, config.final)

    def work(unit: Sequence[Problem]) -> UnitResult[Dialogue]:
        drafts, dropped, by_id = [], Counter[str](), {p.id: p for p in unit}
        samples = [row for p in unit for row in rows.get(p.id, [])]
        drafts += natural_drafts(samples, task, by_id, wrong=config.wrong, right=config.right)
        if config.references:
            drafts += reference_drafts(task, unit)
        before = None
        for origin, count in (("RG2", config.rg2), ("RG3", config.rg3)):
            if not count:
                continue
            if isinstance(task, StepPlanter):
                for problem in unit:
                    drafts += planted_drafts(
                        task, problem, origin=origin, count=count, seed=config.seed, more=config.more_errors
                    )
            else:
                engine, step_format = policy()
                before = before or engine.ledger.copy()
                found, lost = written_drafts(
                    engine, task, step_format, unit, origin=origin, count=count, sampling=_sampling(config),
                    seed=config.seed, policy=config.policy, references=_references(task, unit),
                )  # fmt: skip
                drafts += found
                dropped.update(lost)
        if exact and isinstance(task, StepPlanter):
            result = exact_critiques(
                task, drafts, wording, seed=config.seed, corrupt=config.corrupt, layout=layout, strip=config.strip
            )
        else:
            engine, step_format = policy()
            before = before or engine.ledger.copy()
            result = written_critiques(
                engine, task, step_format, drafts, wording, samples=config.samples, sampling=_sampling(config),
                seed=config.seed, policy=config.policy, annotate=config.annotate, strip=config.strip,
                keep_unreadable=config.keep_unreadable,
            )  # fmt: skip
            result.ledger = engine.ledger - before
        result.dropped.update(dropped)
        result.counts.update(Counter(f"drafts of {d.origin}, {'right' if d.right else 'wrong'}" for d in drafts))
        return result

    units = chunks(problems, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def _criticise_drafts(config: options.Critiques, out: Path) -> bool:
    """Critiques, by a policy, of the drafts of Dialogue rows."""
    if config.solutions or config.rg2 or config.rg3 or config.references or config.writer == "checker":
        raise UserError(
            "drafts are criticised by a policy, and alone: leave out solutions, rg2, rg3, references and writer: checker"
        )
    task = load_task(config.task)
    drafts = first(drafts_of_dialogues(read_rows(config.drafts, Dialogue)), config.limit)
    policy, wording = Asked(config, task, out, [draft.problem.prompt for draft in drafts]), config.words()

    def work(unit: Sequence[Draft]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        return written_critiques(
            engine, task, step_format, unit, wording, samples=config.samples, sampling=_sampling(config), seed=config.seed,
            policy=config.policy, annotate=config.annotate, strip=config.strip,
            keep_unreadable=config.keep_unreadable,
        )  # fmt: skip

    units = chunks(drafts, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def _references(task: Task, problems: Sequence[Problem]) -> dict[str, list[str]]:
    if not isinstance(task, HasReference):
        return {}
    found = {problem.id: task.reference_steps(problem) for problem in problems}
    return {key: steps for key, steps in found.items() if steps}


def read_dialogues(path: str, *kinds: str) -> list[Dialogue]:
    """The rows, which must be of these kinds."""
    rows = read_rows(path, Dialogue)
    other = next((row.kind for row in rows if row.kind not in kinds), None)
    if other is not None:
        raise UserError(f"{path}: expected rows of kind {' or '.join(kinds)}, found {other}")
    return rows


def problems_of(config: Any, task: Task, rows: Sequence[Any], path: str) -> Mapping[str, Problem]:
    """The problems of the split, or for free text those that the rows state; raises UserError if a row is of another."""
    if isinstance(task, FreeText):
        metas = [meta_of(row) if isinstance(row, Dialogue) else None for row in rows]
        return {
            row.problem_id: Problem(row.problem_id, meta["prompt"], meta["reference"])
            if meta
            else Problem(row.problem_id, row.prompt, row.gold)
            for row, meta in zip(rows, metas, strict=True)
        }
    problems = {problem.id: problem for problem in _split(task, config.split)}
    missing = next((row.problem_id for row in rows if row.problem_id not in problems), None)
    if missing is not None:
        raise UserError(f"{path}: problem {missing} is not in split {config.split!r} of task {task.name}")
    return problems


def make_refinements(config: options.Refinements, out: Path) -> bool:
    """Refinements by critiques."""
    required(config, "critiques", "policy")
    task = load_task(config.task)
    if config.repair and not isinstance(task, StepPlanter):
        raise UserError(f"task {task.name} cannot say what a step should be: repair needs that")
    rows = read_dialogues(config.critiques, "critique", "draft")
    if any(row.kind == "draft" for row in rows) and (config.repair or config.control == "shuffled"):
        raise UserError(f"{config.critiques}: rows of kind draft have no critique to repair or to shuffle")
    if config.only:
        rows = [row for row in rows if meta_of(row)["correct"][0] == (config.only == "right")]
    if config.limit:
        kept = set(list(dict.fromkeys(row.problem_id for row in rows))[: config.limit])
        rows = [row for row in rows if row.problem_id in kept]
    if not rows:
        raise UserError(f"{config.critiques}: no critique of a draft that is {config.only}")
    problems = problems_of(config, task, rows, config.critiques)
    said = {meta_of(row)["id"]: meta_of(row)["critique"] for row in rows}
    partners = derangement(list(said), fold_seed(config.seed, "shuffled"))
    donors = {key: said[other] for key, other in partners.items()}
    policy, wording = Asked(config, task, out, [row.messages[0].content for row in rows]), config.words()

    def work(unit: Sequence[Dialogue]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        drawn: Any = {
            "samples": config.samples,
            "sampling": _sampling(config),
            "seed": config.seed,
            "policy": config.policy,
        }
        if config.repair and isinstance(task, StepPlanter):
            return repairs(engine, task, step_format, unit, problems, wording, **drawn)
        return refinements(
            engine, task, step_format, unit, problems, wording, **drawn, control=config.control, donors=donors
        )

    units = chunks(rows, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def make_filtered_critiques(config: options.FilterCritiques, out: Path) -> bool:
    """Critiques that help."""
    required(config, "critiques")
    if config.mode in ("soft", "both"):
        required(config, "refinements")
    refined = read_dialogues(config.refinements, "refine") if config.refinements else []
    result = filter_critiques(
        read_dialogues(config.critiques, "critique"), refined, mode=config.mode, threshold=config.threshold,
        count=config.count, seed=config.seed,
    )  # fmt: skip
    write_rows(out, result.rows, dropped=result.dropped, counts=result.counts)
    return _finish(out, True)


def make_best_refinements(config: options.BestRefinements, out: Path) -> bool:
    """Refinements to learn from."""
    required(config, "refinements")
    result = best_refinements(
        read_dialogues(config.refinements, "refine"), config.words(), per_critique=config.per_critique, seed=config.seed,
        separator=config.separator, kinds=config.kinds, repair_only=config.repair_only,
        only_right=config.only_right,
    )  # fmt: skip
    write_rows(out, result.rows, dropped=result.dropped, counts=result.counts)
    return _finish(out, True)


def make_self_talk(config: options.SelfTalk, out: Path) -> bool:
    """Trains of thought, as they were put together or rewritten by a model."""
    required(config, "refinements")
    task = load_task(config.task)
    rows = read_dialogues(config.refinements, "refine")
    if config.limit:
        kept = set(list(dict.fromkeys(row.problem_id for row in rows))[: config.limit])
        rows = [row for row in rows if row.problem_id in kept]
    chains = self_talk.self_talk(
        rows,
        task,
        config.template,
        stop_at_error=config.stop_at_error,
        per_problem=config.per_problem,
        seed=config.seed,
    )
    if not config.policy:
        write_rows(out, chains.rows, dropped=chains.dropped)
        return _finish(out, True)
    problems = problems_of(config, task, chains.rows, config.refinements)
    policy = Asked(config, task, out, [row.messages[0].content for row in chains.rows])

    def work(unit: Sequence[Dialogue]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        return self_talk.rewritten(
            engine,
            task,
            step_format,
            unit,
            problems,
            sampling=_sampling(config),
            seed=config.seed,
            policy=config.policy,
        )

    print(
        f"{out.name}: {len(chains.rows)} chains" + "".join(f", {n} {what}" for what, n in chains.dropped.items()),
        flush=True,
    )
    units = chunks(chains.rows, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def make_global_refinements(config: options.GlobalRefinements, out: Path) -> bool:
    """Wrong drafts with right solutions."""
    required(config, "solutions")
    result = glore.global_refinements(
        read_rows(config.solutions, Solution), config.words(), per_draft=config.per_draft, per_problem=config.per_problem,
        separator=config.separator, seed=config.seed,
    )  # fmt: skip
    if not result.rows:
        raise UserError(f"{config.solutions}: no problem has both a wrong and a right solution")
    write_rows(out, result.rows, dropped=result.dropped, counts=result.counts)
    return _finish(out, True)


def make_local_refinements(config: options.LocalRefinements, out: Path) -> bool:
    """Wrong drafts with right ends from their first wrong step on."""
    required(config, "labels", "policy")
    task = load_task(config.task)
    drafts, left_out = glore.wrong_drafts(read_rows(config.labels, StepLabels))
    grouped: dict[str, list[Any]] = {}
    for draft in drafts:
        grouped.setdefault(draft[0].problem_id, []).append(draft)
    groups = [first(own, config.per_problem) for own in first(list(grouped.values()), config.limit)]
    if not groups:
        raise UserError(f"{config.labels}: no wrong solution has a first wrong step ({dict(left_out)})")
    print(f"{out.name}: {len(drafts)} drafts" + "".join(f", {n} {what}" for what, n in left_out.items()), flush=True)
    problems = problems_of(config, task, [own[0][0] for own in groups], config.labels)
    policy, wording = Asked(config, task, out, [own[0][0].prompt for own in groups]), config.words()

    def work(unit: Sequence[Sequence[Any]]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        return glore.local_refinements(
            engine, task, step_format, [draft for own in unit for draft in own], problems, wording, samples=config.samples,
            per_draft=config.per_draft, consistent=config.consistent, sampling=_sampling(config), seed=config.seed,
            policy=config.policy,
        )  # fmt: skip

    units = chunks(groups, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def make_rise(config: options.Rise, out: Path) -> bool:
    """Rows of RISE."""
    required(config, "policy")
    task, problems = _problems(config)
    policy, wording = Asked(config, task, out, [p.prompt for p in problems]), config.words()
    drafts: dict[str, list[str]] = {}
    for row in read_rows(config.drafts, Solution) if config.drafts else ():
        drafts.setdefault(row.problem_id, []).append(task.step_separator.join(row.steps))
    teacher: list[Any] = []

    def work(unit: Sequence[Problem]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        if config.teacher and not teacher:
            teacher.extend(_policy(dataclasses.replace(config, policy=config.teacher), task))
        return rise.rise_rows(
            engine, task, step_format, unit, wording, samples=config.samples, turns=config.turns, best_of=config.best_of,
            tau=config.tau, select=config.select, shown=config.shown, sampling=_sampling(config), seed=config.seed,
            policy=config.policy, teacher=tuple(teacher) or None, drafts=drafts, from_problem=config.from_problem,
        )  # fmt: skip

    units = chunks(problems, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)


def make_flip_pairs(config: options.FlipPairs, out: Path) -> bool:
    """Pairs of attempts whose verdict was turned round."""
    required(config, "source")
    task = load_task(config.task)
    problems = {problem.id: problem for problem in _split(task, config.split)}
    chains, ledger = read_chains(config.source, task, problems)
    source = read_rows(config.source, Solution)[0].source
    result = flips.flip_pairs(chains, task, problems, per_problem=config.per_problem, seed=config.seed, source=source)
    write_rows(out, result.rows, dropped=result.dropped, counts=result.counts, ledger=ledger)
    return _finish(out, True)


def make_inline(config: options.InlineCorrections, out: Path) -> bool:
    """Right solutions with a wrong step that is put right."""
    required(config, "solutions", "policy")
    task = load_task(config.task)
    right: dict[str, list[Solution]] = {}
    for row in read_rows(config.solutions, Solution):
        if row.right:
            right.setdefault(row.problem_id, []).append(row)
    if not right:
        raise UserError(f"{config.solutions}: no solution is right")
    groups = [first(rows, config.per_problem) for rows in first(list(right.values()), config.limit)]
    problems = problems_of(config, task, [rows[0] for rows in groups], config.solutions)
    policy = Asked(config, task, out, [rows[0].prompt for rows in groups])

    def work(unit: Sequence[Sequence[Solution]]) -> UnitResult[Dialogue]:
        engine, step_format = policy()
        return inline.inline_corrections(
            engine, task, step_format, [row for rows in unit for row in rows], problems, config.reflections,
            slips=config.slips, positions=config.positions, candidates=config.candidates, completions=config.completions,
            clean=config.clean, mask=config.mask, sampling=_sampling(config), seed=config.seed,
        )  # fmt: skip

    units = chunks(groups, config.unit_problems)
    complete = make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name)
    return _finish(out, complete)
