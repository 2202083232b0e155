"""The stages that make pairs, and those that self-training needs beside them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder
from ..data_gen import mcts_dpo, preferences
from ..data_gen.rows import ROW_TYPES, Pair, Solution, StepLabels, Tree
from ..data_gen.store import Shard, UnitResult, make_rows, read_about, read_rows, write_rows
from ..models.ledger import Ledger
from ..tasks.base import StepChecker
from ..tasks.load import load_task
from . import options_preferences
from .making import _check_words, _finish, _policy, _sampling, _split
from .making_trees import _copy_step_format, _over_problems
from .options import chunks, first, required, settings_of


def make_solution_pairs(config: options_preferences.SolutionPairs, out: Path) -> bool:
    """Right over wrong solutions."""
    required(config, "solutions")
    result = preferences.solution_pairs(
        read_rows(config.solutions, Solution), per_problem=config.per_problem, seed=config.seed
    )
    _copy_step_format(config.solutions, out)
    write_rows(out, result.rows, dropped=result.dropped)
    return _finish(out, True)


def make_step_pairs(config: options_preferences.StepPairs, out: Path) -> bool:
    """Corrections of first wrong steps."""
    required(config, "solutions")
    task = load_task(config.task)
    wrong: dict[str, list[Solution]] = {}
    for row in read_rows(config.solutions, Solution):
        if not row.right:
            wrong.setdefault(row.problem_id, []).append(row)
    if not wrong:
        raise UserError(f"{config.solutions}: no solution is wrong, so there is nothing to correct")
    labels = None
    if config.labels:
        labels = {(row.problem_id, row.sample): row for row in read_rows(config.labels, StepLabels)}
    elif not isinstance(task, StepChecker):
        raise UserError(
            f"task {task.name} cannot check steps: give labels, StepLabels rows that say where {config.solutions} goes wrong"
        )
    groups = [first(rows, config.per_problem) for rows in first(list(wrong.values()), config.limit)]
    problems = {problem.id: problem for problem in _split(task, config.split)}
    missing = next((rows[0].problem_id for rows in groups if rows[0].problem_id not in problems), None)
    if missing is not None:
        raise UserError(f"{config.solutions}: problem {missing} is not in split {config.split!r} of task {task.name}")
    engine_and_format: list[Any] = []

    def work(unit: Sequence[Sequence[Solution]]) -> UnitResult[Pair]:
        if not engine_and_format:
            engine_and_format.extend(_policy(config, task))
            asked = [rows[0].prompt for rows in groups]
            _check_words(config.policy, engine_and_format[0], engine_and_format[1], asked)
            engine_and_format[1].save(make_folder(out))
        engine, step_format = engine_and_format
        return preferences.step_pairs(
            engine, task, step_format, [row for rows in unit for row in rows], problems, labels=labels,
            rollouts=config.rollouts, winners=config.winners, sampling=_sampling(config), seed=config.seed,
            policy=config.policy,
        )  # fmt: skip

    units = chunks(groups, config.unit_problems)
    return _finish(out, make_rows(out, Pair, units, work, shard=Shard.parse(config.shard), progress=out.name))


def make_mcts_dpo(config: options_preferences.MCTSDPOTrees, out: Path) -> bool:
    """Trees of MCTS-DPO."""
    generate = functools.partial(
        mcts_dpo.mcts_dpo_trees,
        options=settings_of(mcts_dpo.Options, config),
        question=config.question or mcts_dpo.SELF_EVALUATION,
        yes=config.yes,
    )
    return _over_problems(config, out, Tree, generate)


def join_rows(config: options_preferences.Join, out: Path) -> bool:
    """Rows of several folders, one behind the other, with what they cost together."""
    if not config.rows:
        raise UserError(f"rows is missing: {type(config).__dataclass_fields__['rows'].metadata['help']}")
    kinds = {folder: read_about(folder)["row_type"] for folder in config.rows}
    if len(set(kinds.values())) > 1:
        raise UserError("rows of different kinds cannot be joined: " + ", ".join(f"{f}: {k}" for f, k in kinds.items()))
    rows: list[Any] = []
    ledger = Ledger()
    for folder in config.rows:
        rows += read_rows(folder, ROW_TYPES[kinds[folder]])
        ledger = ledger + Ledger(**read_about(folder)["ledger"])
    _copy_step_format(config.rows[0], out)
    problems = len({row.problem_id for row in rows})
    write_rows(out, rows, counts=Counter(problems=problems), ledger=ledger)
    return _finish(out, True)
