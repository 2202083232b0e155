"""The stages that search: any strategy over the problems of a task, with its rows and its trees."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from ..search.adapters import (
    CheckerLocator,
    CorrectionPolicy,
    EffectiveScorer,
    RandomLocator,
    RefinementPolicy,
    RevisionPolicy,
    RewardLocator,
    RewardScorer,
    StepPolicy,
)
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
        others = [model.ledger for model in _others(policy, engine, reward, getattr(scorer, "prover", None))]
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
        for judge in (parts[1], getattr(parts[3], "prover", None)):
            if judge is not None:
                tell_cut_steps(judge)
        if left_out := getattr(parts[2], "left_out", 0):
            print(
                f"{out.name}: {left_out} earlier attempts did not fit into the context and were not shown or refined",
                flush=True,
            )
    if complete:
        _join(out, len(units))
    return _finish(out, complete)


@dataclass
class Loaded:
    """Models that several searches share, one after another. Each begins with empty caches, so that it pays its own cost."""

    policy: tuple[Engine, StepFormat] | None = None
    rewards: dict[str, RewardModel | SimulatedReward] = field(
        default_factory=dict
    )  # by folder: those that guide, and provers
    critic: tuple[Engine, StepFormat] | None = None
    refiners: dict[str, tuple[Engine, StepFormat]] = field(default_factory=dict)  # by their folder
    locator: RewardModel | None = None

    def reward(self, path: str, dtype: str) -> RewardModel | SimulatedReward:
        """The reward model of a folder, loaded once."""
        if path not in self.rewards:
            self.rewards[path] = RewardModel.load(path, dtype=dtype, keep_prefixes=True)
        return self.rewards[path]

    def forget(self) -> None:
        """Empties the caches."""
        engines: list[Any] = [pair[0] for pair in (self.policy, self.critic, *self.refiners.values()) if pair]
        for model in (*engines, *self.rewards.values(), self.locator):
            if getattr(model, "cache", None) is not None:
                model.cache = PrefixCache()


def searchers(
    config: options_search.Search, task: Task, problems: Sequence[Problem] = (), loaded: Loaded | None = None
) -> tuple[Engine, RewardModel | SimulatedReward | None, StepPolicy, Scorer]:
    """Engine, reward model (None without one), and what a search speaks to; prefixes are kept by both models."""
    loaded = loaded or Loaded()
    if loaded.policy is None:
        loaded.policy = _policy(config, task, keep_prefixes=True)
        _check_words(config.policy, *loaded.policy, [problem.prompt for problem in problems])
    reward = loaded.reward(config.reward, config.reward_dtype) if config.reward else None
    prover = loaded.reward(config.prover, config.reward_dtype) if config.prover else None
    if prover is not None and prover is reward:
        raise UserError(f"prover: {config.prover} guides already; the policy as its own prover is prover_k 1")
    if config.simulated is not None:
        if not isinstance(task, StepChecker):
            raise UserError(f"task {task.name} has no exact step checker: a simulated reward model needs one")
        reward = loaded.rewards.setdefault(
            "simulated", SimulatedReward(config.simulated, task, {p.prompt: p for p in problems}, config.seed)
        )
    if loaded.critic is None and config.strategy == "corrections" and config.critic not in ("", "self"):
        loaded.critic = _policy(dataclasses.replace(config, policy=config.critic), task, keep_prefixes=True)
    loaded.forget()
    engine, step_format = loaded.policy
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
    elif config.strategy == "glore":
        policy = _refining(config, task, problems, loaded, arguments)
    else:
        policy = StepPolicy(*arguments)
    if reward is None:
        return engine, None, policy, lambda states: [0.0] * len(states)
    scorer: Scorer = RewardScorer(reward, config.aggregation)
    if config.alpha:
        how: Any = {"alpha": config.alpha, "prover_k": config.prover_k, "prover": prover}
        scorer = EffectiveScorer(reward, config.aggregation, **how)
    return engine, reward, policy, scorer


def _refining(
    config: options_search.Search, task: Task, problems: Sequence[Problem], loaded: Loaded, arguments: tuple[Any, ...]
) -> RefinementPolicy:
    """The policy of a search with strategy glore, its refiners and what says where a draft goes wrong."""
    refine = config.settings.get("refine", "both")
    engine = arguments[0]
    refiners: list[StepPolicy | None] = []
    for name, folder in (("global", config.global_refiner), ("local", config.local_refiner)):
        if refine not in ("both", name):
            refiners.append(None)
            continue
        if folder not in loaded.refiners:
            loaded.refiners[folder] = _policy(dataclasses.replace(config, policy=folder), task, keep_prefixes=True)
        if loaded.refiners[folder][0].tokenizer.get_vocab() != engine.tokenizer.get_vocab():
            raise UserError(f"{folder}: a refiner needs the vocabulary of the policy {config.policy}")
        sampling = dataclasses.replace(arguments[3], temperature=config.refiner_temperature)
        refiners.append(StepPolicy(*loaded.refiners[folder], task.step_separator, sampling))
    locator: Any = None
    if refine == "global":
        pass
    elif config.locator == "random":
        locator = RandomLocator(config.seed)
    elif config.locator == "checker":
        if not isinstance(task, StepChecker):
            raise UserError(f"task {task.name} has no exact step checker: locator must be a reward model or random")
        locator = CheckerLocator(task, {problem.id: problem for problem in problems})
    else:
        if loaded.locator is None:
            loaded.locator = RewardModel.load(config.locator, dtype=config.reward_dtype, keep_prefixes=True)
        locator = RewardLocator(loaded.locator, config.locator_threshold)
    return RefinementPolicy(*arguments, wording=config.words(), refiners=(refiners[0], refiners[1]), locator=locator)


def _others(policy: StepPolicy, engine: Engine, reward: Any, prover: Any) -> list[Any]:
    """The models beside the policy's engine that a search pays for, each once."""
    asked = [getattr(policy, "critic", None), *getattr(policy, "refiners", ())]
    found = [reward, prover, getattr(getattr(policy, "locate", None), "reward", None)]
    found += [one.engine for one in asked if one is not None and one.engine is not engine]
    return list({id(model): model for model in found if model is not None}.values())


def _about(config: options_search.Search, engine: Any, reward: RewardModel | SimulatedReward | None) -> dict[str, Any]:
    """What the results of a search do not say themselves."""
    aggregation = config.aggregation or (reward.step_format.aggregation if reward is not None else "")
    return {
        "strategy": config.strategy,
        "settings": config.settings,
        **({"critic": config.critic, "wording": config.wording} if config.strategy == "corrections" else {}),
        **({"locator": config.locator} if config.strategy == "glore" else {}),
        **({"simulated": dataclasses.asdict(config.simulated)} if config.simulated is not None else {}),
        "aggregation": aggregation,
        "alpha": config.alpha,
        "prover_k": config.prover_k,
        **({"prover": config.prover} if config.prover else {}),
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
