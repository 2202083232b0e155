"""The stages that search: any strategy over the problems of a task, with its rows and its trees."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..basics import UserError, canonical_json, write_atomic, write_json
from ..data_gen.rows import Solution, Source
from ..data_gen.searched import SEARCH_FILE, found_solutions, search_record
from ..data_gen.store import Shard, UnitResult, make_rows
from ..models.engine import Engine, Sampling, StopReason
from ..models.prefix_cache import PrefixCache
from ..models.reward import RewardModel
from ..models.simulated import SimulatedReward
from ..models.step_format import StepFormat
from ..search.adapters import CorrectionPolicy, EffectiveScorer, RevisionPolicy, RewardScorer, StepPolicy
from ..search.base import Scorer
from ..tasks.base import Problem, StepChecker, Task
from . import options_search
from .making import _check_words, _finish, _policy, _problems, _sampling, tell_cut_steps
from .options import chunks, required
from .options_search import STRATEGIES, UNGUIDED

ABOUT_FILE = "search.json"  # the strategy, its settings, and the sizes of the models


def make_beam(config: options_search.Beam, out: Path) -> bool:
    """Finished solutions of PRM beam search, ranked as found."""
    required(config, "reward")
    return make_search(config.as_search(), out)


def make_search(config: options_search.Search, out: Path, loaded: Loaded | None = None) -> bool:
    """Finished solutions of a search, and a record of each search. Searches after each other may share `loaded` models."""
    if config.strategy not in UNGUIDED and config.simulated is None:
        required(config, "reward")
    task, problems = _problems(config)
    units = list(enumerate(chunks(problems, config.unit_problems)))
    parts: list[Any] = []

    def work(unit: tuple[int, Sequence[Problem]]) -> UnitResult[Solution]:
        number, some = unit
        if not parts:
            parts.extend(searchers(config, task, problems, loaded))
            write_json(out / ABOUT_FILE, _about(config, parts[0], parts[1]))
        engine, reward, policy, scorer = parts
        others = [model.ledger for model in (reward, _critic_engine(policy, engine)) if model is not None]
        spent = lambda: sum(others, engine.ledger.copy())
        before = spent()
        results = STRATEGIES[config.strategy][0](
            [policy.root(problem) for problem in some], policy, scorer, **config.settings, seed=config.seed
        )
        source = Source(config.policy, engine.name, task.name, config.seed)
        rows: list[Solution] = []
        lines: list[str] = []
        dropped: Counter[str] = Counter()
        for place, (problem, result) in enumerate(zip(some, results, strict=True), number * config.unit_problems):
            if all(state.stop == StopReason.CONTEXT.value and not state.steps for state in result.finals):
                dropped["prompts longer than the context"] += 1
                continue
            found = found_solutions(result, problem, task, engine.tokenizer, source)
            keep = config.trees < 0 or place < config.trees
            lines.append(canonical_json(search_record(result, found, config.strategy, with_tree=keep)) + "\n")
            rows += found
        # Before the rows are committed: a unit that a kill cut off here is made again, with the same lines.
        write_atomic(_part(out, number), "".join(lines))
        return UnitResult(rows, dropped, spent() - before)

    complete = make_rows(out, Solution, units, work, shard=Shard.parse(config.shard), progress=out.name)
    if parts:
        if parts[1] is not None:
            tell_cut_steps(parts[1])
        if left_out := getattr(parts[2], "left_out", 0):
            print(
                f"{out.name}: {left_out} earlier attempts did not fit into the context and were not shown", flush=True
            )
    if complete:
        _join(out, len(units))
    return _finish(out, complete)


@dataclass
class Loaded:
    """Models that several searches share, one after another. Each begins with empty caches, so that it pays its own cost."""

    policy: tuple[Engine, StepFormat] | None = None
    reward: RewardModel | SimulatedReward | None = None
    critic: tuple[Engine, StepFormat] | None = None

    def forget(self) -> None:
        """Empties the caches."""
        for model in (self.policy[0] if self.policy else None, self.reward, self.critic[0] if self.critic else None):
            if getattr(model, "cache", None) is not None:
                model.cache = PrefixCache()  # type: ignore[union-attr]


def searchers(
    config: options_search.Search, task: Task, problems: Sequence[Problem] = (), loaded: Loaded | None = None
) -> tuple[Engine, RewardModel | SimulatedReward | None, StepPolicy, Scorer]:
    """Engine, reward model (None without one), and what a search speaks to; prefixes are kept by both models."""
    loaded = loaded or Loaded()
    if loaded.policy is None:
        loaded.policy = _policy(config, task, keep_prefixes=True)
        _check_words(config.policy, *loaded.policy, [problem.prompt for problem in problems])
    if loaded.reward is None and config.simulated is not None:
        if not isinstance(task, StepChecker):
            raise UserError(f"task {task.name} has no exact step checker: a simulated reward model needs one")
        loaded.reward = SimulatedReward(config.simulated, task, {p.prompt: p for p in problems}, config.seed)
    if loaded.reward is None and config.reward:
        loaded.reward = RewardModel.load(config.reward, dtype=config.reward_dtype, keep_prefixes=True)
    if loaded.critic is None and config.strategy == "corrections" and config.critic not in ("", "self"):
        loaded.critic = _policy(dataclasses.replace(config, policy=config.critic), task, keep_prefixes=True)
    loaded.forget()
    (engine, step_format), reward = loaded.policy, loaded.reward
    arguments = (engine, step_format, task.step_separator, _sampling(config))
    policy: StepPolicy
    if config.strategy == "revisions":
        policy = RevisionPolicy(*arguments, template=config.revision_template, attempt_template=config.attempt_template)
    elif config.strategy == "corrections":
        critic = None
        if config.critic:
            critic_sampling = Sampling(config.critic_max_new_tokens, config.critic_temperature)
            critic = StepPolicy(*(loaded.critic or loaded.policy), task.step_separator, critic_sampling)
        policy = CorrectionPolicy(
            *arguments, wording=config.words(), task=task, problems={p.id: p for p in problems}, critic=critic,
            shown=config.shown,
        )  # fmt: skip
    else:
        policy = StepPolicy(*arguments)
    if reward is None:
        return engine, None, policy, lambda states: [0.0] * len(states)
    scorer: Scorer = RewardScorer(reward, config.aggregation)
    if config.alpha:
        scorer = EffectiveScorer(reward, config.aggregation, alpha=config.alpha, prover_k=config.prover_k)
    return engine, reward, policy, scorer


def _critic_engine(policy: StepPolicy, engine: Engine) -> Engine | None:
    """The critic's engine, if it is another one."""
    critic = getattr(policy, "critic", None)
    return critic.engine if critic is not None and critic.engine is not engine else None


def _about(config: options_search.Search, engine: Any, reward: RewardModel | SimulatedReward | None) -> dict[str, Any]:
    """What the results of a search do not say themselves."""
    aggregation = config.aggregation or (reward.step_format.aggregation if reward is not None else "")
    return {
        "strategy": config.strategy,
        "settings": config.settings,
        **({"critic": config.critic, "wording": config.wording} if config.strategy == "corrections" else {}),
        **({"simulated": dataclasses.asdict(config.simulated)} if config.simulated is not None else {}),
        "aggregation": aggregation,
        "alpha": config.alpha,
        "prover_k": config.prover_k,
        "parameters": {
            "policy": getattr(engine, "parameters", 0),
            "reward": reward.parameters if reward is not None else 0,
        },
    }


def _part(out: Path, number: int) -> Path:
    return out / f"search-{number:05d}.jsonl"


def _join(out: Path, units: int) -> None:
    """One search.jsonl of the files of all units, in their order."""
    parts = [_part(out, number) for number in range(units)]
    if not (out / SEARCH_FILE).is_file():
        # Another shard may be joining them as well, and remove them.
        with contextlib.suppress(FileNotFoundError):
            write_atomic(out / SEARCH_FILE, b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink(missing_ok=True)
