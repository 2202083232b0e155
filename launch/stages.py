"""The stages that a command or a recipe can run: a config, and a function that fills a folder from it.

Nothing heavy is imported until a stage runs: `stepladder --help` must not wait for torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import options_data as data
from . import options_eval as evaluation
from . import options_search as search


def _stage(module: str, function: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return getattr(importlib.import_module(module, __package__), function)(config, out)

    return run


def _trainer(name: str) -> Callable[..., Any]:
    def run(config: Any, out: Path) -> Any:
        return importlib.import_module(f"..trainers.{name}", __package__).train(config)

    return run


def config_class(stage: str) -> type:
    """The config dataclass of a stage; a trainer's is imported only now, with torch."""
    config, _ = STAGES[stage]
    if isinstance(config, str):
        module, name = config.split(":")
        return getattr(importlib.import_module(module, __package__), name)
    return config


STAGES: dict[str, tuple[type | str, Callable[..., Any]]] = {
    "data.demonstrations": (data.Demonstrations, _stage(".making", "make_demonstrations")),
    "data.solutions": (data.Solutions, _stage(".making", "make_solutions")),
    "data.step_labels": (data.StepLabelling, _stage(".making", "make_step_labels")),
    "data.omegaprm": (data.OmegaPRMTrees, _stage(".making_trees", "make_omegaprm")),
    "data.best_first": (data.BestFirstTrees, _stage(".making_trees", "make_best_first")),
    "data.first_pit": (data.FirstPit, _stage(".making_trees", "make_first_pit")),
    "data.tree_labels": (data.TreeLabels, _stage(".making_trees", "make_tree_labels")),
    "data.tree_pairs": (data.TreePairs, _stage(".making_trees", "make_tree_pairs")),
    "data.sorm": (data.SORMLabels, _stage(".making_trees", "make_sorm")),
    "data.best_solutions": (data.BestSolutions, _stage(".making", "make_best_solutions")),
    "data.prm800k": (data.ImportPRM800K, _stage(".making", "import_prm800k")),
    "model.copy": (data.CopyModel, _stage(".making", "copy_model")),
    "train.sft": ("..trainers.sft:SFTArguments", _trainer("sft")),
    "train.orm": ("..trainers.orm:ORMArguments", _trainer("orm")),
    "train.prm": ("..trainers.prm:PRMArguments", _trainer("prm")),
    "train.rl": ("..trainers.rl:RLArguments", _trainer("rl")),
    "search.beam": (search.Beam, _stage(".making", "make_beam")),
    "eval.policies": (evaluation.EvaluatePolicies, _stage(".evaluate", "evaluate_policies")),
    "eval.behaviour": (evaluation.EvaluateBehaviour, _stage(".behaviour", "evaluate_behaviour")),
    "eval.prm": (evaluation.EvaluatePRM, _stage(".evaluate", "evaluate_prm")),
    "eval.processbench": (evaluation.EvaluateProcessBench, _stage(".evaluate", "evaluate_processbench")),
    "report": (evaluation.Report, _stage(".evaluate", "make_report")),
}
