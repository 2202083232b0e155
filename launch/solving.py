"""One's own problems through a search: models are loaded once, and problems that come together share its batches."""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..basics import UserError
from ..data_gen.rows import Solution, Source
from ..data_gen.searched import found_solutions, search_record
from ..models.engine import Sampling
from ..models.ledger import Ledger
from ..models.step_format import FILE_NAME, StepFormat
from ..search.base import SearchResult, State
from ..search.choose import tally
from ..tasks.base import Problem, Task
from ..tasks.free import FreeText
from ..tasks.load import load_task
from .making import _check_words
from .making_search import Loaded, searchers
from .options_search import STRATEGIES
from .options_solve import Solving


@dataclass(frozen=True)
class Ways:
    """How to search: what problems must have in common to be searched together."""

    budget: int
    max_new_tokens: int
    temperature: float
    top_p: float
    system: str | None = None  # in place of the step format's system message


@dataclass(frozen=True)
class Asked:
    """A problem ready to be searched: its encoded prompt, and the seed of its search in the key of the root."""

    problem: Problem
    root: State


@dataclass(frozen=True)
class Solved:
    """What a search found for one problem. `record` is its line of search.jsonl, without verdicts if there is no reference."""

    rows: tuple[Solution, ...]
    record: Mapping[str, Any]
    chosen: int
    votes: Mapping[str, tuple[int, float]]  # answer -> (solutions, sum of their scores), the most voted first
    prompt_tokens: int

    @property
    def solution(self) -> Solution:
        """The chosen solution."""
        return self.rows[self.chosen]


class TooLong(UserError):
    """A problem that the policy's context has no room for."""


class Stopped(Exception):
    """A search was given up, because nobody waits for it any more."""


class Solver:
    """Policy, reward model and strategy of a config, ready to search.

    `ask` may be called from any thread, `solve` from one at a time.
    """

    def __init__(self, config: Solving) -> None:
        self.config = config
        self.task: Task = self._task()
        self._loaded = Loaded()
        self.engine, self.reward, self.policy, self.scorer = searchers(config.as_search(), self.task, (), self._loaded)
        self.context = int(getattr(self.engine, "context", None) or 2**31)
        # Fast tokenizers break when two threads change their state: whoever asks has one of their own.
        self._tokenizer, self._lock = copy.deepcopy(self.engine.tokenizer), threading.Lock()

    def _task(self) -> Task:
        if self.config.task is not None:
            return load_task(self.config.task)
        own = Path(self.config.policy, FILE_NAME)
        return FreeText(StepFormat.load(self.config.policy).separator if own.is_file() else "\n")

    @property
    def ways(self) -> Ways:
        """How the config searches."""
        c = self.config
        return Ways(c.own_budget, c.max_new_tokens, c.temperature, c.top_p)

    def ask(self, text: str, *, seed: int = 0, reference: str = "", system: str | None = None) -> Asked:
        """The problem of a text. Raises UserError for a text that the task or the policy cannot take."""
        if not text.strip():
            raise UserError("the problem is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the problem holds half a surrogate pair, which no text can") from None
        problem = Problem("", text, "")
        if hasattr(self.task, "problem_of"):
            try:
                problem = self.task.problem_of(text)
            except ValueError as error:
                raise UserError(f"task {self.task.name}: {error}") from None
        problem = dataclasses.replace(problem, id="problem", answer=reference or problem.answer)
        step_format = self._format(system)
        with self._lock:
            ids = step_format.encode_prompt(self._tokenizer, problem.prompt)
            words: Any = SimpleNamespace(tokenizer=self._tokenizer)
            _check_words(Path(self.config.policy).name, words, step_format, [problem.prompt])
        if not 0 < len(ids) < self.context:
            raise TooLong(
                f"the problem has {len(ids)} tokens; the policy's context of {self.context} leaves no room for an answer"
            )
        return Asked(problem, State(f"{seed} {problem.prompt}", problem.prompt, ids, len(ids)))

    def _format(self, system: str | None) -> StepFormat:
        if system is None:
            return self.policy.step_format
        if not self.policy.step_format.chat:
            raise UserError("this policy has no chat template and takes no system message")
        return dataclasses.replace(self.policy.step_format, system=system)

    def solve(
        self, asked: Sequence[Asked], ways: Ways | None = None, *, goes_on: Callable[[], bool] = lambda: True
    ) -> tuple[list[Solved], Ledger]:
        """What the search finds for each problem, and what it cost for all. Raises Stopped once `goes_on` says no."""
        ways = ways or self.ways
        self._loaded.forget()
        policy = copy.copy(self.policy)
        policy.sampling = Sampling(ways.max_new_tokens, ways.temperature, ways.top_p)
        policy.step_format = self._format(ways.system)
        before = self._spent()
        results: list[SearchResult] = STRATEGIES[self.config.strategy][0](
            [one.root for one in asked],
            _Watched(policy, goes_on),
            _Watched(self.scorer, goes_on),
            **self.config.settings_for(ways.budget),
            seed=0,  # each root's key holds its seed
        )
        found = [self._solved(one, result) for one, result in zip(asked, results, strict=True)]
        return found, self._spent() - before

    def _spent(self) -> Ledger:
        judges = [model for model in (self.reward, getattr(self.scorer, "prover", None)) if model is not None]
        return sum((model.ledger for model in judges), self.engine.ledger.copy())

    def _solved(self, asked: Asked, result: SearchResult) -> Solved:
        source = Source(self.config.policy, self.engine.name, self.task.name, self.config.seed)
        rows = found_solutions(result, asked.problem, self.task, self.engine.tokenizer, source)
        record = search_record(result, rows, self.config.strategy)
        if not asked.problem.answer:
            for final in record["finals"]:
                final["outcome"] = None
        if self.reward is None:  # what stands for a score was asked of nothing
            for one in (*record["nodes"], *record["finals"]):
                one["score"] = None
        answers = [row.answer for row in rows]
        counts, weights = tally(answers), tally(answers, result.scores)
        by = weights if self.config.choose == "weighted" else counts
        order = sorted(counts, key=lambda answer: -by[answer])
        votes = {answer: (int(counts[answer]), weights[answer]) for answer in order}
        chosen = result.chosen or 0
        if self.config.choose != "best" and order:
            chosen = max((i for i, a in enumerate(answers) if a == order[0]), key=lambda i: (result.scores[i], -i))
        record["chosen"] = chosen
        return Solved(tuple(rows), record, chosen, votes, len(asked.root.ids))


class _Watched:
    """A policy or scorer that raises Stopped, in place of going on, once nobody waits any more."""

    def __init__(self, inner: Any, goes_on: Callable[[], bool]) -> None:
        self._inner, self._goes_on = inner, goes_on

    def __call__(self, *arguments: Any) -> Any:
        if not self._goes_on():
            raise Stopped
        return self._inner(*arguments)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        return _Watched(found, self._goes_on) if callable(found) else found
