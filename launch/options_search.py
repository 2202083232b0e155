"""Options of the stages that search, and the strategies by name."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..basics import UserError
from ..config import at_least, build, option, unknown_key
from ..models.simulated import Errors
from ..models.step_format import Aggregation
from ..search.beam import beam_search
from ..search.best_of_n import best_of_n, step_best_of_n
from ..search.corrections import corrections
from ..search.dvts import dvts
from ..search.glore import glore
from ..search.mcts import mcts
from ..search.particles import particle_filter
from ..search.rebase import rebase
from ..search.revisions import revisions
from ..search.step_beam import step_beam
from ..search.tree_of_thoughts import tot_bfs, tot_dfs
from .options import WithPolicy
from .options_corrections import Correcting, Refining

# Name -> function, and the setting that its budget goes by.
STRATEGIES: dict[str, tuple[Callable[..., Any], str]] = {
    "best_of_n": (best_of_n, "n"),
    "step_best_of_n": (step_best_of_n, "n"),
    "beam": (beam_search, "beams"),
    "dvts": (dvts, "n"),
    "particles": (particle_filter, "n"),
    "rebase": (rebase, "n"),
    "step_beam": (step_beam, "beams"),
    "mcts": (mcts, "simulations"),
    "tot_bfs": (tot_bfs, "beams"),
    "tot_dfs": (tot_dfs, "expansions"),
    "revisions": (revisions, "n"),
    "corrections": (corrections, "n"),
    "glore": (glore, "n"),
}
# These grow without a score: without a reward model their solutions can still be voted on.
UNGUIDED = ("best_of_n", "revisions", "corrections")


def strategy_settings(strategy: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a strategy, checked by name, type and value. Raises UserError."""
    if strategy not in STRATEGIES:
        raise unknown_key(strategy, list(STRATEGIES), where, "strategy")
    function = STRATEGIES[strategy][0]
    hints = typing.get_type_hints(function)
    known = [
        (name, hints[name], dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "seed"
    ]
    made: Any = build(dataclasses.make_dataclass(strategy, known), settings, f"{where}: settings of {strategy}")
    values = {name: getattr(made, name) for name in settings}
    try:
        function([], None, None, **values)  # no roots: only the values are looked at
    except ValueError as error:
        raise UserError(f"{where}: settings of {strategy}: {error}") from None
    return values


def budget_of(strategy: str, settings: Mapping[str, Any]) -> int:
    """The budget that a strategy has with these settings."""
    function, field = STRATEGIES[strategy]
    return settings.get(field, inspect.signature(function).parameters[field].default)


def with_budget(strategy: str, settings: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """The settings with another budget. A `width` above it is cut to it."""
    function, field = STRATEGIES[strategy]
    made = {**settings, field: budget}
    if strategy in ("beam", "dvts"):
        default = inspect.signature(function).parameters["width"].default
        made["width"] = min(budget, settings.get("width", default))
    return made


@dataclass
class Search(Refining, Correcting, WithPolicy):
    """Searches with any strategy (Solution rows, and what was searched in search.jsonl)."""

    split: str = option("test", "the split of the task")
    strategy: str = option("beam", "one of " + ", ".join(STRATEGIES))
    settings: dict[str, Any] = option({}, "settings of the strategy: the keywords of its function")
    reward: str = option(
        "", "the reward model that guides and chooses; best_of_n, revisions and corrections go without one too"
    )
    reward_dtype: str = option("float32", "precision of the reward model")
    simulated: Errors | None = option(
        None, "in place of a reward model: the task's exact checker with errors (margin, noise, liked, liked_margin)"
    )
    aggregation: Literal["", Aggregation] = option(
        "", "how step scores become one: last, min, prod, mean; empty takes the advised one"
    )
    alpha: float = option(0.0, "weight of the advantage in the reward that guides (PAV); 0 guides by value alone")
    prover_k: int = option(4, "K of the Best-of-K prover whose advantage it is")
    prover: str = option("", "a reward model whose values are the prover's, in place of Best-of-K of the policy")
    trees: int = option(100, "keep the trees of the first so many problems; 0 for none, -1 for all")
    revision_template: str = option(
        "{prompt}\n\nEarlier attempts, which may be wrong:\n\n{attempts}", "prompt of a revision"
    )
    attempt_template: str = option("Attempt {number}:\n{attempt}\n\n", "each earlier attempt in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "prover_k")
        at_least(self, -1, "trees")
        at_least(self, 0, "shown", "critic_temperature", "refiner_temperature")
        at_least(self, 1, "critic_max_new_tokens")
        self.words()
        if self.reward and self.simulated:
            raise ValueError("reward and simulated are two reward models: give one of them")
        if self.settings.get("gate") == "wrong" and not self.critic:
            raise ValueError("gate wrong needs a critic that says which attempts are wrong: give critic")
        self.settings = _as_value_error(strategy_settings, self.strategy, self.settings, "search")
        if self.strategy == "glore":
            refine = self.settings.get("refine", "both")
            for name in ("global", "local"):
                if refine in ("both", name) and not getattr(self, f"{name}_refiner"):
                    raise ValueError(f"strategy glore with refine {refine} needs {name}_refiner")
            if refine != "global" and not self.locator:
                raise ValueError("a local refiner needs a locator: a reward model of steps, checker or random")
        weighting = self.settings.get("weighting", "odds")
        if self.alpha and self.strategy == "particles" and weighting != "score":
            raise ValueError(
                f"weighting {weighting} needs scores in (0, 1), and with alpha they leave it: take weighting score"
            )
        if self.alpha and self.settings.get("select") == "sample":
            raise ValueError("select: sample draws by scores of 0 or more; with alpha a score can be negative")
        if self.prover and not self.alpha:
            raise ValueError("prover is a second model that alpha 0 never asks: give alpha")


@dataclass
class Beam(WithPolicy):
    """PRM beam search (Solution rows, one a finished solution); the same as run with strategy beam."""

    split: str = option("test", "the split of the task")
    reward: str = option("", "the reward model that guides the search")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: Literal["", Aggregation] = option(
        "", "how step scores become one: last, min, prod, mean; empty takes the advised one"
    )
    beams: int = option(16, "finished solutions of each problem")
    width: int = option(4, "children of each kept prefix")
    max_depth: int = option(40, "most steps of a solution")
    trees: int = option(100, "keep the trees of the first so many problems; 0 for none, -1 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_depth")
        at_least(self, -1, "trees")
        if not 1 <= self.width <= self.beams:
            raise ValueError(f"1 <= width <= beams must hold, found width {self.width} and beams {self.beams}")

    def as_search(self) -> Search:
        """The same search, with strategy beam."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(Search)}
        settings = {name: getattr(self, name) for name in ("beams", "width", "max_depth")}
        return Search(**{name: getattr(self, name) for name in shared}, strategy="beam", settings=settings)


@dataclass
class ComparedArm:
    """One strategy of a comparison."""

    strategy: str = option("beam", "one of " + ", ".join(STRATEGIES))
    settings: dict[str, Any] = option({}, "settings of the strategy, without the one that its budget goes by")
    budgets: list[int] | None = option(None, "budgets of this strategy in place of the common ones")
    reward: str | None = option(None, "in place of the common one")
    aggregation: Aggregation | None = option(None, "in place of the common one")
    temperature: float | None = option(
        None, "in place of the common one; best_of_n at 0 and budget 1 is greedy decoding"
    )
    alpha: float = option(0.0, "weight of the advantage in the reward that guides")
    prover_k: int = option(4, "K of the Best-of-K prover")
    prover: str = option("", "a reward model whose values are the prover's, in place of Best-of-K")


@dataclass
class Compare(Refining, Correcting, WithPolicy):
    """Compares search strategies at several budgets and at equal cost (results.json, curves, report.html)."""

    split: str = option("test", "the split of the task")
    reward: str = option("", "the reward model that guides and chooses")
    reward_dtype: str = option("float32", "precision of the reward model")
    simulated: Errors | None = option(
        None, "in place of a reward model: the task's exact checker with errors (margin, noise, liked, liked_margin)"
    )
    aggregation: Literal["", Aggregation] = option(
        "", "how step scores become one: last, min, prod, mean; empty takes the advised one"
    )
    arms: dict[str, ComparedArm] = option(
        {}, "name -> strategy, settings, budgets, reward, aggregation, temperature, alpha, prover_k, prover"
    )
    budgets: list[int] = option([1, 4, 16, 64], "what the budget setting of each strategy is set to")
    reference: str = option(
        "",
        "the arm whose costs are the ones to meet; empty takes the first best_of_n that samples, or the first of all",
    )
    slack: float = option(0.05, "at equal cost an arm may cost so much more than the reference, as a share")
    levels: int = option(5, "levels of difficulty, each with a choice of its own; 0 leaves that out")
    trees: int = option(20, "keep the trees of the first so many problems of each search; 0 for none, -1 for all")
    revision_template: str = option(Search.revision_template, "prompt of a revision")
    attempt_template: str = option(Search.attempt_template, "each earlier attempt in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "levels", "slack")
        at_least(self, -1, "trees")
        for name, arm in self.arms.items():
            if not re.fullmatch(r"[\w.+-]+", name):
                raise ValueError(f"arms: a name is made of letters, digits and _ . + -, found {name!r}")
            budgets = self.budgets_of(arm)
            if not budgets or any(budget < 1 for budget in budgets) or len(set(budgets)) < len(budgets):
                raise ValueError(f"arms.{name}: budgets must be different numbers of 1 or more, found {budgets}")
        if self.reference and self.reference not in self.arms:
            raise ValueError(f"reference must be one of the arms {', '.join(self.arms)}, found {self.reference!r}")
        self.searches()

    def budgets_of(self, arm: ComparedArm) -> list[int]:
        """The budgets of an arm, the smallest first."""
        return sorted(self.budgets if arm.budgets is None else arm.budgets)

    def searches(self) -> dict[tuple[str, int], Search]:
        """(arm, budget) -> its search. A `width` above the budget is cut to it."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(Search)}
        found = {}
        for name, arm in self.arms.items():
            if arm.strategy not in STRATEGIES:
                raise ValueError(str(unknown_key(arm.strategy, list(STRATEGIES), f"arms.{name}", "strategy")))
            field = STRATEGIES[arm.strategy][1]
            if field in arm.settings:
                raise ValueError(f"arms.{name}: {field} is what the budgets set; give budgets")
            for budget in self.budgets_of(arm):
                settings = with_budget(arm.strategy, arm.settings, budget)
                values = {key: getattr(self, key) for key in shared}
                own = ("reward", "aggregation", "temperature")
                values |= {k: v for k in own if (v := getattr(arm, k)) is not None}
                values |= {k: getattr(arm, k) for k in ("strategy", "alpha", "prover_k", "prover")}
                try:
                    found[name, budget] = Search(**values, settings=settings)
                except ValueError as error:
                    raise ValueError(f"arms.{name}, budget {budget}: {error}") from None
        return found


def _as_value_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; its UserError as a ValueError, to which a config adds its place."""
    try:
        return function(*arguments)
    except UserError as error:
        raise ValueError(str(error).removeprefix("search: ")) from None
