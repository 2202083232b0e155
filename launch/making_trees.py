"""The stages that grow trees of rollouts, and those that read labels and pairs out of them."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..basics import UserError, make_folder
from ..data_gen import first_pit, mcts, omegaprm
from ..data_gen.best_first import best_first_trees
from ..data_gen.label_sets import balanced, checker_labels, consensus, sorm_rows
from ..data_gen.rows import Pair, R, StepLabels, Tree
from ..data_gen.store import Shard, UnitResult, make_rows, read_rows, write_rows
from ..data_gen.tree_rows import chosen_paths, flipped, step_labels, step_pairs
from ..models.prefix_cache import PrefixCache, supports_prefix_cache
from ..models.reward import RewardModel
from ..tasks.base import Problem, StepChecker
from ..tasks.load import load_task
from . import options, options_data
from .making import _check_words, _finish, _policy, _problems, _sampling, solution_groups, tell_cut_steps
from .options import chunks, required, settings_of


def _over_problems(
    config: options.WithPolicy, out: Path, row_type: type[R], generate: Callable[..., UnitResult[R]]
) -> bool:
    """Units of problems through `generate(engine, task, step_format, problems, sampling=, seed=, policy=)`."""
    task, problems = _problems(config)
    engine_and_format: list[Any] = []

    def work(unit: Sequence[Problem]) -> UnitResult[R]:
        if not engine_and_format:
            engine, step_format = _policy(config, task)
            _check_words(config.policy, engine, step_format, [problem.prompt for problem in problems])
            step_format.save(make_folder(out))
            engine_and_format.extend([engine, step_format])
        engine, step_format = engine_and_format
        return generate(
            engine, task, step_format, unit, sampling=_sampling(config), seed=config.seed, policy=config.policy
        )

    units = chunks(problems, config.unit_problems)
    return _finish(out, make_rows(out, row_type, units, work, shard=Shard.parse(config.shard), progress=out.name))


def make_omegaprm(config: options_data.OmegaPRMTrees, out: Path) -> bool:
    """Trees of OmegaPRM."""
    options = settings_of(omegaprm.Options, config)
    return _over_problems(config, out, Tree, functools.partial(omegaprm.omegaprm_trees, options=options))


def make_best_first(config: options_data.BestFirstTrees, out: Path) -> bool:
    """Best-first trees of Tree-PLV."""
    generate = functools.partial(
        best_first_trees,
        candidates=config.candidates,
        completions=config.completions,
        max_depth=config.max_depth,
        complete=config.complete,
    )
    return _over_problems(config, out, Tree, generate)


def make_mcts(config: options_data.MCTSTrees, out: Path) -> bool:
    """Search trees of AlphaMath."""
    settings = settings_of(mcts.Options, config)
    value: list[RewardModel | None] = []

    def generate(engine: Any, *arguments: Any, **sampling: Any) -> UnitResult[Tree]:
        if not value:
            value.append(RewardModel.load(config.value, dtype=config.value_dtype) if config.value else None)
        # Prefixes are kept within a unit alone: what batches hold, and so how values are rounded, must not depend on the units
        # before, or a resumed run would differ in the last digit.
        models: list[Any] = [engine, value[0]]
        for model in models:
            if hasattr(model, "cache") and supports_prefix_cache(model.model):
                model.cache = PrefixCache()
        return mcts.mcts_trees(engine, *arguments, options=settings, trees=config.trees, value=value[0], **sampling)

    complete = _over_problems(config, out, Tree, generate)
    if value and value[0] is not None:
        tell_cut_steps(value[0])
    return complete


def make_first_pit(config: options_data.FirstPit, out: Path) -> bool:
    """Valued prefixes for PAV."""
    options = settings_of(first_pit.Options, config)
    return _over_problems(config, out, StepLabels, functools.partial(first_pit.valued_prefixes, options=options))


def make_value_paths(config: options_data.ValuePaths, out: Path) -> bool:
    """Single paths with values out of trees."""
    required(config, "trees")
    of_problem: dict[str, list[Tree]] = {}
    for tree in read_rows(config.trees, Tree):
        of_problem.setdefault(tree.problem_id, []).append(tree)
    paths: list[Tree] = []
    dropped: Counter[str] = Counter()
    for trees in of_problem.values():
        found = chosen_paths(trees, right=config.right, wrong=config.wrong, seed=config.seed, likely=config.likely)
        every = sum(n.outcome is not None for tree in trees for n in tree.nodes)
        dropped["problems without a finished solution"] += not every
        dropped["duplicates, and solutions beyond the limit a problem"] += every - len(found)
        paths += found
    right = sum(path.nodes[-1].outcome == "right" for path in paths)
    _copy_step_format(config.trees, out)
    write_rows(out, paths, dropped=+dropped, counts={"right solutions": right, "other solutions": len(paths) - right})
    return _finish(out, True)


def make_tree_labels(config: options_data.TreeLabels, out: Path) -> bool:
    """Step labels out of trees."""
    required(config, "trees")
    trees = read_rows(config.trees, Tree)
    if not any(node.n_rollouts for tree in trees for node in tree.nodes):
        raise UserError(f"{config.trees}: no node of these trees has counts (n_rollouts is 0 everywhere)")
    rows: list[StepLabels] = []
    dropped: Counter[str] = Counter()
    for tree in trees:
        found = step_labels(flipped(tree, config.flip, config.seed), single_steps=config.single_steps)
        dropped["trees without a label"] += not found
        rows += found
    probed = sum(node.n_rollouts > 0 for tree in trees for node in tree.nodes[1:])
    labels = sum(n > 0 for row in rows for n in row.n_rollouts[1:])
    mixed = sum(0 < c < n for row in rows for c, n in zip(row.n_correct[1:], row.n_rollouts[1:], strict=True))
    dropped["ends of edges of several steps"] = probed - labels
    counts = {"step labels": labels, "of them neither all right nor all wrong": mixed}
    _copy_step_format(config.trees, out)
    write_rows(out, rows, dropped=+dropped, counts=counts)
    return _finish(out, True)


def make_tree_pairs(config: options_data.TreePairs, out: Path) -> bool:
    """Pairs out of trees."""
    required(config, "trees")
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for tree in read_rows(config.trees, Tree):
        tree = flipped(tree, config.flip, config.seed)
        how: dict[str, Any] = {"margin": config.margin, "whole_paths": config.whole_paths, "extremes": config.extremes}
        found = step_pairs(tree, **how)
        kept = step_pairs(tree, **how, most=config.per_problem, seed=config.seed)
        dropped["trees without a pair"] += not found
        dropped["pairs beyond the limit a problem"] += len(found) - len(kept)
        pairs += kept
    _copy_step_format(config.trees, out)
    write_rows(out, pairs, dropped=+dropped)
    return _finish(out, True)


def make_sorm(config: options_data.SORMLabels, out: Path) -> bool:
    """Labels of a stepwise outcome model."""
    required(config, "labels")
    source = read_rows(config.labels, StepLabels)
    if others := sorted({row.label_source for row in source} - {"monte_carlo"}):
        raise UserError(f"{config.labels}: SORM labels are made from Monte-Carlo counts, found labels of {others[0]}")
    rows, counts = sorm_rows(source, seed=config.seed, propagate=config.propagate, balance=config.balance)
    _copy_step_format(config.labels, out)
    write_rows(out, rows, counts=counts)
    return _finish(out, True)


def make_checker_labels(config: options_data.CheckerLabels, out: Path) -> bool:
    """Judgements of an exact checker."""
    required(config, "solutions")
    task = load_task(config.task)
    if not isinstance(task, StepChecker):
        raise UserError(f"task {config.task.get('kind')} has no exact step checker: data checker_labels needs one")
    groups, problems = solution_groups(config, task)
    solutions = [row for rows in groups for row in rows if row.steps]
    rows = checker_labels(solutions, task, problems, noise=config.noise, seed=config.seed)
    dropped = Counter({"empty solutions": sum(map(len, groups)) - len(solutions)})
    _copy_step_format(config.solutions, out)
    write_rows(out, rows, dropped=+dropped)
    return _finish(out, True)


def make_consensus(config: options_data.Consensus, out: Path) -> bool:
    """Labels on which two sources agree."""
    required(config, "labels", "judge")
    rows, dropped = consensus(read_rows(config.labels, StepLabels), read_rows(config.judge, StepLabels))
    _copy_step_format(config.labels, out)
    write_rows(out, rows, dropped=dropped)
    return _finish(out, True)


def make_balanced(config: options_data.BalancedLabels, out: Path) -> bool:
    """Step labels with two sides of equal size."""
    required(config, "labels")
    source = read_rows(config.labels, StepLabels)
    rows, counts = balanced(source, seed=config.seed, by_length=config.by_length, threshold=config.threshold)
    kept = [row for row in rows if any(row.n_rollouts)]
    counts["labels kept"] = sum(n > 0 for row in kept for n in row.n_rollouts[1:])
    _copy_step_format(config.labels, out)
    write_rows(out, kept, dropped=+Counter({"rows without a label": len(rows) - len(kept)}), counts=counts)
    return _finish(out, True)


def _copy_step_format(rows: str, out: Path) -> None:
    """The layout that the rows were sampled in goes with what is made of them: trainers check it."""
    source = Path(rows) / "step_format.json"
    if source.is_file():
        (make_folder(out) / source.name).write_bytes(source.read_bytes())
