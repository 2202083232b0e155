"""What each stage of a recipe asks of models, in tokens: pure functions of its settings and of the rows that come in.

Where a search decides for itself how much it samples, the estimate is of its settings' upper end. A finished small run of the same
recipe (`stepladder plan --rates`) replaces the lengths, and scales with the same formulas.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .options import WithPolicy
from .options_search import budget_of, with_budget


@dataclass(frozen=True)
class Lengths:
    """Averages over the solutions of a task."""

    prompt: float
    solution: float  # tokens behind the prompt
    steps: float
    right: float  # share of solutions that are right

    @property
    def step(self) -> float:
        return self.solution / self.steps


@dataclass(frozen=True)
class Rows:
    """Rows that a stage leaves: `each` of every problem, with `answer` tokens behind the prompt."""

    problems: float = 0.0
    each: float = 1.0
    prompt: float = 0.0
    answer: float = 0.0
    sides: int = 1  # a pair has two

    @property
    def count(self) -> float:
        return self.problems * self.each

    @property
    def tokens(self) -> float:
        """Tokens of one row, both sides."""
        return self.sides * (self.prompt + self.answer)


@dataclass(frozen=True)
class Work:
    """Tokens that models read and write in one stage. Reading is forward; `trained` goes backward too, in all epochs."""

    calls: float = 0.0
    generated: float = 0.0
    prefilled: float = 0.0
    reward: float = 0.0
    trained: float = 0.0
    reference: float = 0.0  # read by the starting policy, for DPO and KL

    def __add__(self, other: Work) -> Work:
        return Work(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)})

    def scaled(self, to: Work, of: Work) -> Work:
        """This work, each kind of tokens as many times as it is more in `to` than in `of`; all together where `of` has none."""
        overall = to.tokens / of.tokens if of.tokens else 1.0
        made = {}
        for field in dataclasses.fields(self):
            more, less = getattr(to, field.name), getattr(of, field.name)
            made[field.name] = getattr(self, field.name) * (more / less if less else overall)
        return Work(**made)

    @property
    def tokens(self) -> float:
        return self.generated + self.prefilled + self.reward + self.trained + self.reference


NOTHING = Rows()


@dataclass(frozen=True)
class Asked:
    """What a stage works on: problems of its task, rows of the stages it names, and lengths."""

    problems: float
    rows: dict[str, Rows]  # option -> rows of the stage that it names
    listed: Sequence[Rows]  # those of options that hold lists or mappings
    lengths: Lengths

    @property
    def first(self) -> Rows:
        return next(iter(self.rows.values()), self.listed[0] if self.listed else NOTHING)


def _limited(rows: Rows, config: Any) -> Rows:
    """The rows of a source as `limit`, `per_problem` and `only` leave them."""
    problems = min(rows.problems, config.limit) if getattr(config, "limit", 0) else rows.problems
    each = min(rows.each, config.per_problem) if getattr(config, "per_problem", 0) else rows.each
    return dataclasses.replace(rows, problems=problems, each=each)


def _sampled(asked: Asked, calls: float, tokens: float, *, prefixes: float, prefix: float) -> Work:
    """`calls` samples of `tokens` each, from so many different prefixes of `prefix` tokens, each read once."""
    return Work(calls=calls, generated=calls * tokens, prefilled=prefixes * prefix)


def _solutions(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    calls = asked.problems * config.samples
    work = _sampled(asked, calls, length.solution, prefixes=asked.problems, prefix=length.prompt)
    return work, Rows(asked.problems, config.samples, length.prompt, length.solution)


def _demonstrations(config: Any, asked: Asked) -> tuple[Work, Rows]:
    return Work(), Rows(asked.problems, 1, asked.lengths.prompt, asked.lengths.solution)


def _continued(rows: Rows, asked: Asked, rollouts: float, prefixes: float) -> Work:
    """`rollouts` from each of so many prefixes of every row: they are cut half-way on average."""
    length, count = asked.lengths, rows.count * prefixes
    return _sampled(
        asked, count * rollouts, length.solution / 2, prefixes=count, prefix=length.prompt + length.solution / 2
    )


def _step_labels(config: Any, asked: Asked) -> tuple[Work, Rows]:
    rows = _limited(asked.rows.get("solutions", NOTHING), config)
    # From the prompt and from behind every step but the last, which the verifier judges.
    return _continued(rows, asked, config.rollouts, asked.lengths.steps), rows


def _omegaprm(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    probes = config.search_limit * max(math.log2(max(length.steps, 2)), 1)
    filtered = Work(
        calls=asked.problems * config.filter_rollouts,
        generated=asked.problems * config.filter_rollouts * length.solution,
        prefilled=asked.problems * length.prompt,
    )
    trees = Rows(asked.problems, 1, length.prompt, length.solution)
    return filtered + _continued(trees, asked, config.rollouts, probes), trees


def _best_first(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    trees = Rows(asked.problems, 1, length.prompt, length.solution)
    steps = asked.problems * min(config.max_depth, length.steps) * config.candidates
    return Work(calls=steps, generated=steps * length.step) + _continued(
        trees, asked, config.completions, min(config.max_depth, length.steps) * config.candidates
    ), trees


def _first_pit(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    seeds = Rows(asked.problems, config.seeds, length.prompt, length.solution)
    kept = length.steps if config.strategy == "iid" else length.steps * min(config.pits / config.seeds, 1)
    first = _sampled(asked, seeds.count, length.solution, prefixes=asked.problems, prefix=length.prompt)
    looked = 0.0 if config.strategy == "iid" else length.steps / 2
    return first + _continued(seeds, asked, config.probes, looked) + _continued(
        seeds, asked, config.rollouts, kept
    ), seeds


def _mcts(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    trees = Rows(asked.problems, config.trees, length.prompt, length.solution)
    steps = trees.count * config.simulations * config.width
    read = steps * length.step if config.value else 0.0
    return Work(steps, steps * length.step, asked.problems * length.prompt, reward=read), trees


def _mcts_dpo(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    descents = config.iterations * (config.first_factor + min(config.max_depth, length.steps) - 1)
    trees = Rows(asked.problems, 1, length.prompt, length.solution)
    steps = asked.problems * descents * config.candidates
    grown = Work(calls=steps, generated=steps * length.step, prefilled=asked.problems * length.prompt)
    if config.value == "rollouts":
        return grown + _continued(trees, asked, config.evaluations, descents * config.candidates), trees
    said = steps * config.evaluations
    return grown + Work(said, 2.0 * said, steps * (length.prompt + length.solution / 2)), trees


def _step_pairs(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    rows = asked.rows.get("solutions", NOTHING)
    rows = _limited(dataclasses.replace(rows, each=rows.each * (1 - length.right)), config)
    pairs = Rows(rows.problems, rows.each * config.winners, length.prompt, length.solution / 2 + length.step, sides=2)
    return _continued(rows, asked, config.rollouts, 1), pairs


def _solution_pairs(config: Any, asked: Asked) -> tuple[Work, Rows]:
    rows = _limited(asked.first, config)
    return Work(), dataclasses.replace(rows, sides=2)


def _tree_pairs(config: Any, asked: Asked) -> tuple[Work, Rows]:
    rows = asked.first
    each = config.per_problem or asked.lengths.steps
    answer = asked.lengths.solution if config.whole_paths else asked.lengths.solution / 2
    return Work(), Rows(rows.problems, rows.each * each, asked.lengths.prompt, answer, sides=2)


def _best_solutions(config: Any, asked: Asked) -> tuple[Work, Rows]:
    rows = asked.rows.get("solutions", NOTHING)
    read = rows.count * rows.tokens if config.reward else 0.0
    right = rows.each * (asked.lengths.right if config.only_right else 1)
    return Work(reward=read), dataclasses.replace(rows, each=min(right, config.per_problem))


def _critiques(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    drafts = asked.problems * (config.wrong + config.right + config.rg2 + config.rg3)
    rows = Rows(asked.problems, drafts / max(asked.problems, 1) * config.samples, length.prompt, length.solution * 2)
    if config.writer == "checker":
        return Work(), rows
    calls = drafts * config.samples
    return _sampled(asked, calls, length.solution, prefixes=drafts, prefix=length.prompt + length.solution), rows


def _refinements(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length, rows = asked.lengths, asked.first
    calls = rows.count * config.samples
    made = dataclasses.replace(rows, each=rows.each * config.samples)
    return _sampled(asked, calls, length.solution, prefixes=rows.count, prefix=rows.tokens), made


def _rise(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    turns = asked.problems * config.samples * config.turns
    work = _sampled(
        asked, turns * (1 + config.best_of), length.solution, prefixes=turns, prefix=length.prompt + length.solution
    )
    return work, Rows(asked.problems, config.samples * config.turns, length.prompt, 2 * length.solution)


def _inline(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    rows = _limited(dataclasses.replace(asked.first, each=asked.first.each * length.right), config)
    places = rows.count * (config.positions or length.steps)
    steps = places * config.candidates
    work = Work(steps, steps * length.step, places * (length.prompt + length.solution / 2))
    return work + _continued(
        rows, asked, config.candidates * config.completions, config.positions or length.steps
    ), rows


def _searched(strategy: str, settings: Any, asked: Asked, reward: bool) -> Work:
    """One search of every problem. A step search writes `budget` paths and drops those it prunes, with its `width` kept."""
    length, budget = asked.lengths, budget_of(strategy, settings)
    if strategy == "mcts":
        steps = asked.problems * budget * settings.get("width", 5)
        generated = steps * length.step
    elif strategy in ("step_beam", "tot_bfs"):
        steps = asked.problems * length.steps * budget * settings.get("width", 4)
        generated = steps * length.step
    elif strategy == "tot_dfs":
        steps = asked.problems * budget * settings.get("width", 4)
        generated = steps * length.step
    else:
        steps = asked.problems * budget
        generated = steps * length.solution
    read = generated + asked.problems * length.prompt if reward else 0.0
    return Work(steps, generated, asked.problems * length.prompt, reward=read)


def _search(config: Any, asked: Asked) -> tuple[Work, Rows]:
    made = config.as_search() if hasattr(config, "as_search") else config
    budget = budget_of(made.strategy, made.settings)
    rows = Rows(asked.problems, budget, asked.lengths.prompt, asked.lengths.solution)
    return _searched(made.strategy, made.settings, asked, bool(made.reward)), rows


def _compare(config: Any, asked: Asked) -> tuple[Work, Rows]:
    work = Work()
    for arm in config.arms.values():
        for budget in config.budgets_of(arm):
            settings = with_budget(arm.strategy, arm.settings, budget)
            work = work + _searched(arm.strategy, settings, asked, bool(config.reward))
    return work, NOTHING


def _evaluated(config: Any, asked: Asked) -> tuple[Work, Rows]:
    """Every reward model that is named reads every row that is named."""
    named = [getattr(config, name, "") for name in ("orm", "prm", "model")]
    models = sum(map(bool, named)) or len(getattr(config, "models", {}) or {})
    read = sum(rows.count * rows.tokens for rows in (*asked.rows.values(), *asked.listed))
    return Work(reward=models * read), NOTHING


def _joined(config: Any, asked: Asked) -> tuple[Work, Rows]:
    count = sum(rows.count for rows in asked.listed)
    if not count:
        return Work(), NOTHING
    mean = lambda name: sum(getattr(rows, name) * rows.count for rows in asked.listed) / count
    problems = max(rows.problems for rows in asked.listed)
    return Work(), Rows(problems, count / problems, mean("prompt"), mean("answer"), asked.listed[0].sides)


def _kept(config: Any, asked: Asked) -> tuple[Work, Rows]:
    """Rows that are read, chosen or written anew without a model."""
    return Work(), _limited(asked.first, config) if asked.first.count else NOTHING


def trained_rows(config: Any, asked: Asked) -> Rows:
    """The rows that a trainer sees once an epoch."""
    rows = asked.rows.get("rows", NOTHING)
    if config.max_rows and rows.count > config.max_rows:
        rows = dataclasses.replace(rows, problems=rows.problems * config.max_rows / rows.count)
    over = max(rows.prompt + rows.answer - config.max_length, 0)
    return dataclasses.replace(rows, answer=rows.answer - over)


def _trained(config: Any, asked: Asked) -> tuple[Work, Rows]:
    rows = trained_rows(config, asked)
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    epochs = config.max_steps * batch / rows.count if config.max_steps > 0 and rows.count else config.num_train_epochs
    tokens = rows.count * rows.tokens
    return Work(trained=tokens * epochs, reference=tokens if hasattr(config, "beta") else 0.0), NOTHING


def _online(config: Any, asked: Asked) -> tuple[Work, Rows]:
    length = asked.lengths
    calls = config.rollouts * config.prompts * config.samples
    tokens = calls * (length.prompt + length.solution)
    return Work(
        calls=calls,
        generated=calls * length.solution,
        prefilled=config.rollouts * config.prompts * length.prompt,
        reward=tokens if config.process_reward not in ("", "checker", "facts") else 0.0,
        trained=tokens * config.update_epochs,
        reference=tokens,
    ), NOTHING


WORK: dict[str, Callable[[Any, Asked], tuple[Work, Rows]]] = {
    "data.demonstrations": _demonstrations,
    "data.solutions": _solutions,
    "data.step_labels": _step_labels,
    "data.omegaprm": _omegaprm,
    "data.best_first": _best_first,
    "data.first_pit": _first_pit,
    "data.mcts": _mcts,
    "data.mcts_dpo": _mcts_dpo,
    "data.step_pairs": _step_pairs,
    "data.solution_pairs": _solution_pairs,
    "data.tree_pairs": _tree_pairs,
    "data.best_solutions": _best_solutions,
    "data.critiques": _critiques,
    "data.refinements": _refinements,
    "data.rise": _rise,
    "data.inline_corrections": _inline,
    "data.join": _joined,
    "search.run": _search,
    "search.beam": _search,
    "search.compare": _compare,
    "train.rl": _online,
}


def work_of(kind: str, config: Any, asked: Asked) -> tuple[Work, Rows]:
    """(what the stage asks of models, the rows that it leaves)."""
    if kind in WORK:
        return WORK[kind](config, asked)
    if kind.startswith("train."):
        return _trained(config, asked)
    if kind.startswith("eval."):
        return _evaluated(config, asked)
    return _kept(config, asked)


def units_of(config: Any, asked: Asked) -> float:
    """How many processes a stage can be spread over: its units of work; 1 where it has none."""
    if not isinstance(config, WithPolicy):
        return 1
    return max(math.ceil((asked.problems or asked.first.problems) / config.unit_problems), 1)
