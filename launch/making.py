"""The stages that make rows: they open files and models, cut work into units, and call the pure functions of data_gen."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder, told_as_user_error, write_json
from ..data_gen import importers
from ..data_gen.rows import Dialogue, Solution, StepLabels
from ..data_gen.solutions import best_solutions, demonstrations, sample_solutions
from ..data_gen.step_labels import StopRule, monte_carlo_labels
from ..data_gen.store import Shard, UnitResult, make_rows, read_about, read_rows, write_rows
from ..models.engine import Engine, Sampling
from ..models.loading import hub_folder, load_engine, load_policy_format
from ..models.reward import RewardModel, aggregate
from ..models.step_format import FILE_NAME, StepFormat
from ..tasks.base import Problem, Task
from ..tasks.load import load_task
from . import options, options_data
from .options import chunks, first, required


def _problems(config: options.OnTask) -> tuple[Task, Sequence[Problem]]:
    task = load_task(config.task)
    problems = _split(task, config.split)
    return task, first(problems, config.limit)


def _split(task: Task, split: str) -> Sequence[Problem]:
    """The problems of a split, after printing what the task left out of its data."""
    try:
        problems = task.problems(split)
    except ValueError as error:
        raise UserError(f"task {task.name}: {error}") from None
    if not problems:
        raise UserError(f"task {task.name} has no problem in split {split!r}")
    if dropped := getattr(task, "dropped", None):
        print(f"task {task.name}: left out " + ", ".join(f"{n} {what}" for what, n in dropped.items()), flush=True)
    return problems


def _policy(config: options.WithPolicy, task: Task, *, keep_prefixes: bool = False) -> tuple[Engine, StepFormat]:
    required(config, "policy")
    _check_device(config.device)
    engine = load_engine(
        config.policy,
        backend=config.backend,
        dtype=config.dtype,
        device=config.device,
        batch_size=config.batch_size,
        base_url=config.base_url,
        keep_prefixes=keep_prefixes,
    )
    step_format = load_policy_format(config.policy, engine.tokenizer, task.step_separator)
    if not Path(config.policy, "step_format.json").is_file():
        chat = step_format.chat if config.chat is None else config.chat
        try:
            step_format = dataclasses.replace(
                step_format, chat=chat, prompt_template=config.prompt_template, system=config.system
            )
        except ValueError as error:
            raise UserError(f"{config.policy}: {error}") from None
        return engine, step_format
    if step_format.separator != task.step_separator:
        raise UserError(
            f"{config.policy}: its step format ends a step with {step_format.separator!r}, "
            f"task {task.name} with {task.step_separator!r}"
        )
    # What is told for policies without a step format must not be lost on one that has its own.
    for name, unset in (("chat", None), ("prompt_template", "{prompt}"), ("system", None)):
        told, own = getattr(config, name), getattr(step_format, name)
        if told != unset and told != own:
            raise UserError(
                f"{config.policy}: its step_format.json says {name} {own!r}, found {name} {told!r}; "
                "a policy with a step format is asked as it was trained"
            )
    return engine, step_format


def _check_device(name: str) -> None:
    if name != "auto":
        import torch

        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise UserError(f"device {name!r} cannot be used here ({str(error).splitlines()[0]})") from None


_LOOKED_AT = 1000  # prompts; enough to see that a policy belongs to another task


def _check_words(policy: str, engine: Engine, step_format: StepFormat, prompts: Sequence[str]) -> None:
    """Tells of prompts with words that the tokenizer does not know; raises UserError if they are more than half."""
    tokenizer = engine.tokenizer
    unknown = tokenizer.unk_token_id
    # Byte-level tokenizers know every word, and often name a token that begins or ends a text here.
    if unknown in (None, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id):
        return
    seen = list(dict.fromkeys(prompts))[:_LOOKED_AT]
    count = sum(unknown in step_format.encode_prompt(tokenizer, prompt) for prompt in seen)
    if count:
        told = f"{policy}: {count} of {len(seen)} prompts hold words that its tokenizer does not know"
        if 2 * count > len(seen):
            raise UserError(f"{told}; was it made for another task?")
        print(told, flush=True)


def _sampling(config: options.WithPolicy) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p)


def _finish(out: Path, complete: bool) -> bool:
    """Prints what came of the rows, and says whether every shard's share is there."""
    if not complete:
        print(f"{out}: this shard is done; others are still missing", flush=True)
        return False
    about = read_about(out)
    lost = ", ".join(f"{n} {what}" for what, n in about["dropped"].items())
    print(f"{out.name}: {about['rows']} rows" + (f" (dropped: {lost})" if lost else ""), flush=True)
    if counts := about.get("counts"):
        print(f"{out.name}: " + ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
    return True


def make_demonstrations(config: options_data.Demonstrations, out: Path) -> bool:
    """One solution to learn from for each problem."""
    task, problems = _problems(config)
    units = chunks(problems, 1024)
    work = lambda unit: demonstrations(task, unit, seed=config.seed)
    return _finish(out, make_rows(out, Dialogue, units, work, shard=Shard.parse(config.shard), progress=out.name))


def make_solutions(config: options_data.Solutions, out: Path) -> bool:
    """Samples with verdicts."""
    task, problems = _problems(config)
    if config.unsolved_in:
        solved = {row.problem_id for row in read_rows(config.unsolved_in, Solution) if row.right}
        problems = [problem for problem in problems if problem.id not in solved]
        if not problems:
            raise UserError(f"{config.unsolved_in}: every problem has a right solution there")
    units = chunks(problems, config.unit_problems)
    engine_and_format: list[Any] = []

    def work(unit: Sequence[Problem]) -> UnitResult[Solution]:
        if not engine_and_format:
            engine_and_format.extend(_policy(config, task))
            _check_words(
                config.policy, engine_and_format[0], engine_and_format[1], [problem.prompt for problem in problems]
            )
            engine_and_format[1].save(make_folder(out))
        engine, step_format = engine_and_format
        return sample_solutions(
            engine, task, step_format, unit,
            samples=config.samples, sampling=_sampling(config), seed=config.seed, policy=config.policy, hint=config.hint,
        )  # fmt: skip

    return _finish(out, make_rows(out, Solution, units, work, shard=Shard.parse(config.shard), progress=out.name))


def make_step_labels(config: options_data.StepLabelling, out: Path) -> bool:
    """Monte-Carlo counts for every prefix."""
    required(config, "solutions")
    task = load_task(config.task)
    groups, problems = solution_groups(config, task)
    units = chunks(groups, config.unit_problems)
    stop = None
    if config.stop_early:
        threshold = config.threshold if config.stop_early == "threshold" else 0.0
        stop = StopRule(threshold, config.confidence, config.round_rollouts)
    engine_and_format: list[Any] = []

    def work(unit: Sequence[Sequence[Solution]]) -> UnitResult[StepLabels]:
        if not engine_and_format:
            engine_and_format.extend(_policy(config, task))
            _check_words(config.policy, engine_and_format[0], engine_and_format[1], [rows[0].prompt for rows in groups])
            # The layout is that of the solutions: the completer may have another.
            written = Path(config.solutions, FILE_NAME)
            (StepFormat.load(config.solutions) if written.is_file() else engine_and_format[1]).save(make_folder(out))
        engine, step_format = engine_and_format
        return monte_carlo_labels(
            engine, task, step_format, [row for rows in unit for row in rows], problems,
            rollouts=config.rollouts, sampling=_sampling(config), seed=config.seed, policy=config.policy,
            stop=stop, consistent=config.consistent,
        )  # fmt: skip

    return _finish(out, make_rows(out, StepLabels, units, work, shard=Shard.parse(config.shard), progress=out.name))


def solution_groups(config: Any, task: Task) -> tuple[list[Sequence[Solution]], dict[str, Problem]]:
    """The solutions of each problem, as `limit` and `per_problem` say, and the problems of their split."""
    grouped: dict[str, list[Solution]] = {}
    only = getattr(config, "only", "")
    for row in read_rows(config.solutions, Solution):
        if not only or row.right == (only == "right"):
            grouped.setdefault(row.problem_id, []).append(row)
    if not grouped:
        raise UserError(f"{config.solutions}: no solution is {only}")
    groups = [first(rows, config.per_problem) for rows in first(list(grouped.values()), config.limit)]
    problems = {problem.id: problem for problem in _split(task, config.split)}
    missing = next((rows[0].problem_id for rows in groups if rows[0].problem_id not in problems), None)
    if missing is not None:
        raise UserError(f"{config.solutions}: problem {missing} is not in split {config.split!r} of task {task.name}")
    return groups, problems


def make_best_solutions(config: options_data.BestSolutions, out: Path) -> bool:
    """Rejection sampling: what the improved policy is trained on."""
    required(config, "solutions")
    solutions = read_rows(config.solutions, Solution)
    scores = None
    if config.reward:
        reward = RewardModel.load(config.reward, dtype=config.dtype)
        how = reward.step_format.aggregation
        scored = reward.score([(row.prompt, row.steps) for row in solutions])
        tell_cut_steps(reward)
        scores = [aggregate(one, how) for one in scored]
    result = best_solutions(
        solutions, scores, per_problem=config.per_problem, separator=config.separator, seed=config.seed,
        only_right=config.only_right,
    )  # fmt: skip
    write_rows(out, result.rows, dropped=result.dropped, ledger=reward.ledger if config.reward else None)
    return _finish(out, True)


def import_prm800k(config: options_data.ImportPRM800K, out: Path) -> bool:
    """PRM800K ratings as StepLabels rows."""
    required(config, "file")
    result = importers.prm800k(config.file, neutral=config.neutral, limit=config.limit, seed=config.seed)
    write_rows(out, result.rows, dropped=result.dropped)
    return _finish(out, True)


def import_rows(config: options_data.Import, out: Path) -> bool:
    """Rows of a published format; scores.json beside them holds the step scores that some data bring."""
    required(config, "file", "format")
    found = importers.import_rows(
        config.file, config.format, limit=config.limit, seed=config.seed, rollouts=config.rollouts,
        label_source=config.label_source,
    )  # fmt: skip
    if found.scores:
        write_json(out / "scores.json", found.scores)
    write_rows(out, found.rows, dropped=found.dropped)
    return _finish(out, True)


def copy_model(config: options_data.CopyModel, out: Path) -> bool:
    """A checkpoint at its place in the run: that of the package, a folder's, or one from the hub."""
    source = Path(__file__).parent.parent / "models" / "lab_policy" if config.source == "lab" else Path(config.source)
    if not source.is_dir():
        source = hub_folder(config.source)
    with told_as_user_error(f"copy {source} to {out}"):
        shutil.copytree(source, out, dirs_exist_ok=True, copy_function=shutil.copyfile)
    if config.correction_words:
        _add_words(out)
    return True


def _add_words(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from ..models.lab import CORRECTION_WORDS, with_words
    from ..models.loading import load_model, load_tokenizer, write_checkpoint

    model, tokenizer = with_words(
        load_model(AutoModelForCausalLM, str(folder)), load_tokenizer(str(folder)), CORRECTION_WORDS
    )
    with write_checkpoint(folder) as unfinished:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)


def tell_cut_steps(reward: Any) -> None:
    """Prints how many steps a reward model could not read, if there are any."""
    if getattr(reward, "cut_steps", 0):
        print(
            f"{reward.name}: {reward.cut_steps} steps did not fit into the context of {reward.context} tokens "
            "and took the score before them",
            flush=True,
        )


def process_count() -> int:
    """How many processes `accelerate launch` or `torchrun` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))
