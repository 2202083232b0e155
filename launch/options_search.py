"""Options of the stages that search, and the strategies by name."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ..basics import UserError
from ..config import build, option, unknown_key
from ..search.beam import beam_search
from ..search.best_of_n import best_of_n, step_best_of_n
from ..search.dvts import dvts
from ..search.mcts import mcts
from ..search.particles import particle_filter
from ..search.rebase import rebase
from ..search.revisions import revisions
from ..search.step_beam import step_beam
from ..search.tree_of_thoughts import tot_bfs, tot_dfs
from .options import WithPolicy, at_least

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
}
# These grow without a score: without a reward model their solutions can still be voted on.
UNGUIDED = ("best_of_n", "revisions")


def strategy_settings(strategy: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a strategy, checked by name, type and value. Raises UserError."""
    if strategy not in STRATEGIES:
        raise unknown_key(strategy, list(STRATEGIES), f"{where}: strategy")
    function = STRATEGIES[strategy][0]
    hints = typing.get_type_hints(function)
    known = [
        (name, hints[name], dataclasses.field(default=parameter.default))
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "seed"
    ]
    made = build(dataclasses.make_dataclass(strategy, known), settings, f"{where}: settings of {strategy}")
    values = {name: getattr(made, name) for name in settings}
    try:
        function([], None, None, **values)  # no roots: only the values are looked at
    except ValueError as error:
        raise UserError(f"{where}: settings of {strategy}: {error}") from None
    return values


def _aggregation(value: str) -> None:
    if value not in ("", "last", "min", "prod", "mean"):
        raise ValueError(f"aggregation must be last, min, prod, mean or empty, found {value!r}")


@dataclass
class Search(WithPolicy):
    """Searches with any strategy (Solution rows, and what was searched in search.jsonl)."""

    split: str = option("test", "the split of the task")
    strategy: str = option("beam", "one of " + ", ".join(STRATEGIES))
    settings: dict[str, Any] = option({}, "settings of the strategy: the keywords of its function")
    reward: str = option("", "the reward model that guides and chooses; best_of_n and revisions go without one too")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: str = option("", "how step scores become one: last, min, prod, mean; empty takes the advised one")
    alpha: float = option(0.0, "weight of the advantage in the reward that guides (PAV); 0 guides by value alone")
    prover_k: int = option(4, "K of the Best-of-K prover whose advantage it is")
    trees: int = option(100, "keep the trees of the first so many problems; 0 for none, -1 for all")
    revision_template: str = option(
        "{prompt}\n\nEarlier attempts, which may be wrong:\n\n{attempts}", "prompt of a revision"
    )
    attempt_template: str = option("Attempt {number}:\n{attempt}\n\n", "each earlier attempt in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "prover_k")
        at_least(self, -1, "trees")
        _aggregation(self.aggregation)
        self.settings = _as_value_error(strategy_settings, self.strategy, self.settings, "search")


@dataclass
class Beam(WithPolicy):
    """PRM beam search (Solution rows, one a finished solution); the same as run with strategy beam."""

    split: str = option("test", "the split of the task")
    reward: str = option("", "the reward model that guides the search")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: str = option("", "how step scores become one: last, min, prod, mean; empty takes the advised one")
    beams: int = option(16, "finished solutions of each problem")
    width: int = option(4, "children of each kept prefix")
    max_depth: int = option(40, "most steps of a solution")
    trees: int = option(100, "keep the trees of the first so many problems; 0 for none, -1 for all")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "max_depth")
        at_least(self, -1, "trees")
        _aggregation(self.aggregation)
        if not 1 <= self.width <= self.beams:
            raise ValueError(f"1 <= width <= beams must hold, found width {self.width} and beams {self.beams}")

    def as_search(self) -> Search:
        """The same search, with strategy beam."""
        shared = {f.name for f in dataclasses.fields(self)} & {f.name for f in dataclasses.fields(Search)}
        settings = {name: getattr(self, name) for name in ("beams", "width", "max_depth")}
        return Search(**{name: getattr(self, name) for name in shared}, strategy="beam", settings=settings)


def _as_value_error(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns; its UserError as a ValueError, to which a config adds its place."""
    try:
        return function(*arguments)
    except UserError as error:
        raise ValueError(str(error).removeprefix("search: ")) from None
