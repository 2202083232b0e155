"""Options of `stepladder solve` and `stepladder serve`: a policy, what judges it, and how the two are searched."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..basics import UserError
from ..config import at_least, option
from .options import FromPolicy
from .options_search import STRATEGIES, UNGUIDED, Search, budget_of, strategy_settings, with_budget

LAB = "lab"  # the name of the policy that ships with the package
_LAB_FOLDER = Path(__file__).parent.parent / "models" / "lab_policy"
_LAB_TASK = {"kind": "chain", "p": 7}

# How the answer is chosen among the finished solutions: as the search itself would, or by a vote.
Choice = Literal["", "best", "weighted", "majority"]


@dataclass
class Solving(FromPolicy):
    """What every search of one's own problems is told."""

    policy: str = option("", "the policy: a folder, a hub id, a served model's name, or lab for the one that ships")
    task: dict[str, Any] | None = option(
        None, "the task that says where steps end and reads answers: kind and its fields; null takes free text"
    )
    strategy: str = option(
        "", "one of " + ", ".join(STRATEGIES) + "; empty takes beam with a reward model, else best_of_n"
    )
    settings: dict[str, Any] = option({}, "settings of the strategy: the keywords of its function")
    reward: str = option("", "the reward model that guides and chooses; best_of_n and revisions go without one too")
    reward_dtype: str = option("float32", "precision of the reward model")
    aggregation: str = option("", "how step scores become one: last, min, prod, mean; empty takes the advised one")
    alpha: float = option(0.0, "weight of the advantage in the reward that guides (PAV); 0 guides by value alone")
    prover_k: int = option(4, "K of the Best-of-K prover whose advantage it is")
    prover: str = option("", "a reward model whose values are the prover's, in place of Best-of-K of the policy")
    choose: Choice = option(
        "",
        "the answer: best (the search's own), weighted or majority (votes); empty takes best with a reward model, else majority",
    )
    seed: int = option(0, "seed of everything drawn")
    revision_template: str = option(Search.revision_template, "prompt of a revision")
    attempt_template: str = option(Search.attempt_template, "each earlier attempt in it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy == LAB and self.backend == "transformers":
            self.policy, self.task = str(_LAB_FOLDER), _LAB_TASK if self.task is None else self.task
        self.strategy = self.strategy or ("beam" if self.reward else "best_of_n")
        if not self.reward and self.choose in ("best", "weighted"):
            raise ValueError(f"choose: {self.choose} goes by scores, and there is no reward model")
        self.choose = self.choose or ("best" if self.reward else "majority")
        self.settings = self.as_search().settings
        if not self.policy:
            raise ValueError("policy is missing: a folder, a hub id, or lab for the policy that ships")
        if self.strategy not in UNGUIDED and not self.reward:
            raise ValueError(f"reward is missing: {self.strategy} is guided by a reward model")

    def as_search(self) -> Search:
        """The same policy, scorer and strategy as a stage that searches has them."""
        shared = {f.name for f in dataclasses.fields(Search)} & {f.name for f in dataclasses.fields(self)} - {"task"}
        return Search(**{name: getattr(self, name) for name in shared})

    @property
    def budget_field(self) -> str:
        """The setting that the budget goes by."""
        return STRATEGIES[self.strategy][1]

    @property
    def own_budget(self) -> int:
        """The budget where nothing else is asked for."""
        return budget_of(self.strategy, self.settings)

    def settings_for(self, budget: int) -> Mapping[str, Any]:
        """The settings with another budget. Raises ValueError where the strategy cannot have it."""
        try:
            return strategy_settings(self.strategy, with_budget(self.strategy, self.settings, budget), "budget")
        except UserError as error:
            raise ValueError(str(error)) from None


@dataclass
class Solve(Solving):
    """Searches one problem and prints the answer, the vote, the tree and the cost."""

    budget: int = option(0, "in place of the setting that the strategy's budget goes by; 0 leaves it")
    reference: str = option("", "the right answer, if it is known: solutions are marked right or wrong")
    json: bool = option(False, "print one JSON object for machines")
    lines: int = option(60, "most lines of the tree; a larger one leaves out pruned nodes; 0 for no tree, -1 for all")
    width: int = option(0, "columns; 0 takes the terminal's")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "budget", "width")
        at_least(self, -1, "lines")
        if self.budget:
            self.settings = dict(self.settings_for(self.budget))


@dataclass
class Serve(Solving):
    """Serves a policy and a search strategy as an OpenAI-compatible chat endpoint."""

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 is open to everybody who reaches this machine")
    port: int = option(8000, "port to listen on; 0 takes a free one")
    name: str = option("", "name of the served model; empty takes the last part of the policy's")
    max_budget: int = option(0, "most budget that a request may ask for; 0 takes that of the settings")
    batch: int = option(8, "most requests that are searched together")
    queue: int = option(32, "most requests that wait; more are refused with 429")
    max_body: int = option(262144, "most bytes of a request's body; more are refused with 413")
    max_prompt_tokens: int = option(0, "most tokens of a prompt; 0 takes what the policy's context allows")
    timeout: float = option(600.0, "seconds after which a request that has no answer yet gets 504")
    grace: float = option(60.0, "seconds that accepted requests may take after SIGTERM")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "port", "max_budget", "max_prompt_tokens", "grace")
        at_least(self, 1, "batch", "queue", "max_body")
        if self.port > 65535:
            raise ValueError(f"port must be 65535 or less, found {self.port}")
        if self.timeout <= 0:
            raise ValueError(f"timeout must be more than 0 seconds, found {self.timeout}")
        self.max_budget = self.max_budget or self.own_budget
        if self.max_budget < self.own_budget:
            raise ValueError(f"max_budget {self.max_budget} is less than {self.budget_field} {self.own_budget}")
        self.name = self.name or (LAB if self.policy == str(_LAB_FOLDER) else Path(self.policy).name)
