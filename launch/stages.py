"""The stages that a command or a recipe can run: a config, and a function that fills a folder from it.

Nothing heavy is imported until a stage runs: `stepladder --help` must not wait for torch.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import options_claims as claims
from . import options_corrections as corrections
from . import options_data as data
from . import options_eval as evaluation
from . import options_preferences as preferences
from . import options_search as search


def _stage(module: str, function: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return getattr(importlib.import_module(module, __package__), function)(config, out)

    return run


def _trainer(name: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return importlib.import_module(f"..trainers.{name}", __package__).train(config)

    return run


def names_of(group: str) -> list[str]:
    """The stages of a group, such as `data`, without its name."""
    return [name.removeprefix(f"{group}.") for name in STAGES if name.startswith(f"{group}.")]


def config_class(stage: str) -> type:
    """The config dataclass of a stage; a trainer's is imported only now, with torch."""
    config, _ = STAGES[stage]
    if isinstance(config, str):
        module, name = config.split(":")
        return getattr(importlib.import_module(module, __package__), name)
    return config


def summary(stage: str) -> str:
    """What a stage does, in one line; a trainer's is the first of its module, which is read and not imported."""
    config: type | str = STAGES[stage][0]
    if isinstance(config, str):
        file = Path(__file__).parent.parent / "trainers" / f"{stage.removeprefix('train.')}.py"
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    else:
        text = config.__doc__
    return (text or "").partition("\n")[0]


STAGES: dict[str, tuple[type | str, Callable[..., Any]]] = {
    "data.demonstrations": (data.Demonstrations, _stage(".making", "make_demonstrations")),
    "data.solutions": (data.Solutions, _stage(".making", "make_solutions")),
    "data.step_labels": (data.StepLabelling, _stage(".making", "make_step_labels")),
    "data.omegaprm": (data.OmegaPRMTrees, _stage(".making_trees", "make_omegaprm")),
    "data.best_first": (data.BestFirstTrees, _stage(".making_trees", "make_best_first")),
    "data.first_pit": (data.FirstPit, _stage(".making_trees", "make_first_pit")),
    "data.mcts": (data.MCTSTrees, _stage(".making_trees", "make_mcts")),
    "data.value_paths": (data.ValuePaths, _stage(".making_trees", "make_value_paths")),
    "data.tree_labels": (data.TreeLabels, _stage(".making_trees", "make_tree_labels")),
    "data.tree_pairs": (data.TreePairs, _stage(".making_trees", "make_tree_pairs")),
    "data.sorm": (data.SORMLabels, _stage(".making_trees", "make_sorm")),
    "data.checker_labels": (data.CheckerLabels, _stage(".making_trees", "make_checker_labels")),
    "data.consensus": (data.Consensus, _stage(".making_trees", "make_consensus")),
    "data.balance": (data.BalancedLabels, _stage(".making_trees", "make_balanced")),
    "data.best_solutions": (data.BestSolutions, _stage(".making", "make_best_solutions")),
    "data.solution_pairs": (preferences.SolutionPairs, _stage(".making_preferences", "make_solution_pairs")),
    "data.step_pairs": (preferences.StepPairs, _stage(".making_preferences", "make_step_pairs")),
    "data.mcts_dpo": (preferences.MCTSDPOTrees, _stage(".making_preferences", "make_mcts_dpo")),
    "data.critiques": (corrections.Critiques, _stage(".making_corrections", "make_critiques")),
    "data.refinements": (corrections.Refinements, _stage(".making_corrections", "make_refinements")),
    "data.filter_critiques": (corrections.FilterCritiques, _stage(".making_corrections", "make_filtered_critiques")),
    "data.best_refinements": (corrections.BestRefinements, _stage(".making_corrections", "make_best_refinements")),
    "data.global_refinements": (
        corrections.GlobalRefinements,
        _stage(".making_corrections", "make_global_refinements"),
    ),
    "data.local_refinements": (
        corrections.LocalRefinements,
        _stage(".making_corrections", "make_local_refinements"),
    ),
    "data.self_talk": (corrections.SelfTalk, _stage(".making_corrections", "make_self_talk")),
    "data.rise": (corrections.Rise, _stage(".making_corrections", "make_rise")),
    "data.flip_pairs": (corrections.FlipPairs, _stage(".making_corrections", "make_flip_pairs")),
    "data.inline_corrections": (corrections.InlineCorrections, _stage(".making_corrections", "make_inline")),
    "data.join": (preferences.Join, _stage(".making_preferences", "join_rows")),
    "data.import": (data.Import, _stage(".making", "import_rows")),
    "data.prm800k": (data.ImportPRM800K, _stage(".making", "import_prm800k")),
    "model.copy": (data.CopyModel, _stage(".making", "copy_model")),
    "train.sft": ("..trainers.sft:SFTArguments", _trainer("sft")),
    "train.orm": ("..trainers.orm:ORMArguments", _trainer("orm")),
    "train.prm": ("..trainers.prm:PRMArguments", _trainer("prm")),
    "train.rl": ("..trainers.rl:RLArguments", _trainer("rl")),
    "train.dpo": ("..trainers.dpo:DPOArguments", _trainer("dpo")),
    "train.ranking": ("..trainers.ranking:RankingArguments", _trainer("ranking")),
    "train.value": ("..trainers.value:ValueArguments", _trainer("value")),
    "search.run": (search.Search, _stage(".making_search", "make_search")),
    "search.compare": (search.Compare, _stage(".comparing", "compare_searches")),
    "search.beam": (search.Beam, _stage(".making_search", "make_beam")),
    "eval.policies": (evaluation.EvaluatePolicies, _stage(".evaluate_policies", "evaluate_policies")),
    "eval.best_of_n": (evaluation.EvaluateBestOfN, _stage(".evaluate_best_of_n", "evaluate_best_of_n")),
    "eval.behaviour": (evaluation.EvaluateBehaviour, _stage(".behaviour", "evaluate_behaviour")),
    "eval.correction": (
        corrections.EvaluateCorrections,
        _stage(".evaluate_corrections", "evaluate_corrections"),
    ),
    "eval.prm": (evaluation.EvaluatePRM, _stage(".evaluate_steps", "evaluate_prm")),
    "eval.processbench": (
        evaluation.EvaluateProcessBench,
        _stage(".evaluate_first_errors", "evaluate_processbench"),
    ),
    "eval.first_error": (evaluation.EvaluateFirstErrors, _stage(".evaluate_first_errors", "evaluate_first_errors")),
    "eval.prmbench": (evaluation.EvaluatePRMBench, _stage(".evaluate_first_errors", "evaluate_prmbench")),
    "eval.rewards": (claims.EvaluateRewards, _stage(".evaluate_claims", "evaluate_rewards")),
    "eval.resampling": (evaluation.EvaluateResampling, _stage(".evaluate_resampling", "evaluate_resampling")),
    "eval.values": (claims.EvaluateValues, _stage(".evaluate_claims", "evaluate_values")),
    "eval.labels": (claims.EvaluateLabels, _stage(".evaluate_claims", "evaluate_labels")),
    "eval.pav_toy": (claims.EvaluatePAVToy, _stage(".evaluate_claims", "evaluate_pav_toy")),
    "report": (evaluation.Report, _stage(".make_report", "make_report")),
}
