"""Many trees at once: each tree asks for rollouts, and the asks of all trees go to the engine in one call.

A tree is a generator. It yields a list of `Ask`s, is sent the rollouts of each, and returns what it found. It never sees the
engine, the task or the other trees, so that what it grows depends on its own problem alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..basics import fingerprint, fold_seed
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import Problem, Task
from .rows import Node, Source, Tree

R = TypeVar("R")


@dataclass(frozen=True)
class Ask:
    """Wanted: the rollouts `numbers` of a prefix (ids behind the prompt). Equal numbers give equal rollouts."""

    prefix: tuple[int, ...]
    numbers: range


@dataclass(frozen=True)
class Rollout:
    """A prefix sampled on to its end. `ids` is the whole solution, of which the first `start` are the prefix."""

    ids: tuple[int, ...]
    start: int
    outcome: str  # a tasks.base.Outcome
    logprobs: tuple[float, ...] = ()  # of ids[start:], nats

    @property
    def right(self) -> bool:
        return self.outcome == "right"


# Asks out, for each of them its rollouts in; no rollout where the prefix leaves no room in the context.
Growth = Generator[list[Ask], list[list[Rollout]], R]
# Step texts and step ends of solution ids, as `models.steps.cut_steps` gives them.
Cut = Callable[[Sequence[int]], tuple[tuple[str, ...], tuple[int, ...]]]


def rollout_seed(seed: int, problem_id: str, prefix: Sequence[int], number: int) -> int:
    """The seed of rollout `number` of a prefix: one meaning, whatever asks for it."""
    return fold_seed(seed, problem_id, "rollout", fingerprint(list(prefix)), number)


class Roller:
    """Samples rollouts of prefixes of many problems in one engine call, and checks their answers."""

    def __init__(self, engine: Engine, task: Task, step_format: StepFormat, sampling: Sampling, seed: int) -> None:
        self.engine, self.task, self.step_format, self.sampling, self.seed = engine, task, step_format, sampling, seed
        self.counts: Counter[str] = Counter()
        self._prompts: dict[str, tuple[int, ...]] = {}

    def roll(self, asks: Sequence[tuple[Problem, Ask]]) -> list[list[Rollout]]:
        """The rollouts of each ask; none, and counted, where a prefix leaves no room in the context."""
        if not asks:
            return []
        requests = []
        for problem, ask in asks:
            seeds = tuple(rollout_seed(self.seed, problem.id, ask.prefix, n) for n in ask.numbers)
            requests.append(Request(self._prompt(problem) + ask.prefix, seeds))
        found: list[list[Rollout]] = []
        tokenizer = self.engine.tokenizer
        for (problem, ask), samples in zip(asks, self.engine.generate(requests, self.sampling), strict=True):
            if samples and samples[0].stop is StopReason.CONTEXT:
                self.counts["prefixes longer than the context"] += bool(ask.prefix)
                found.append([])
                continue
            texts = tokenizer.batch_decode([ask.prefix + s.ids for s in samples], skip_special_tokens=True)
            found.append(
                [
                    Rollout(
                        ask.prefix + s.ids, len(ask.prefix), self.task.verify(problem, text).outcome.value, s.logprobs
                    )
                    for s, text in zip(samples, texts, strict=True)
                ]
            )
        return found

    def cut(self, ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Steps and step ends of solution ids."""
        return cut_steps(self.engine.tokenizer, ids, self.task.step_separator)

    def source(self, policy: str) -> Source:
        """Where the rows come from."""
        return Source(policy, self.engine.name, self.task.name, self.seed)

    def _prompt(self, problem: Problem) -> tuple[int, ...]:
        if problem.prompt not in self._prompts:
            self._prompts[problem.prompt] = self.step_format.encode_prompt(self.engine.tokenizer, problem.prompt)
        return self._prompts[problem.prompt]


def grow(roller: Roller, problems: Sequence[Problem], growths: Sequence[Growth[R]]) -> list[R]:
    """What each growth returns. In each round the asks of all that are not done are answered by one engine call."""
    results: list[Any] = [None] * len(growths)
    waiting: dict[int, list[Ask]] = {}

    def advance(index: int, answer: list[list[Rollout]] | None) -> None:
        try:
            waiting[index] = growths[index].send(answer)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as end:
            waiting.pop(index, None)
            results[index] = end.value

    for index in range(len(growths)):
        advance(index, None)
    while waiting:
        asked = list(waiting.items())
        answers = iter(roller.roll([(problems[index], ask) for index, asks in asked for ask in asks]))
        for index, asks in asked:
            advance(index, [next(answers) for _ in asks])
    return results


@dataclass
class _Growing:
    parent: int
    step: str
    logprob: float
    n_correct: int = 0
    n_rollouts: int = 0
    visits: int = 0
    outcome: str | None = None


@dataclass
class TreeBuilder:
    """A `Tree` in the making. Nodes are found by the steps that lead to them; one with no counts was passed but not probed."""

    nodes: list[_Growing] = field(default_factory=lambda: [_Growing(-1, "", 0.0)])
    index: dict[tuple[str, ...], int] = field(default_factory=lambda: {(): 0})

    def add(self, rollout: Rollout, steps: Sequence[str], ends: Sequence[int]) -> int:
        """The node of the first len(steps) steps of a rollout; what is missing on the way to it is made."""
        node = 0
        for depth in range(1, len(steps) + 1):
            key = tuple(steps[:depth])
            if key not in self.index:
                begin, end = ends[depth - 2] if depth > 1 else 0, ends[depth - 1]
                sampled = rollout.logprobs[max(begin - rollout.start, 0) : max(end - rollout.start, 0)]
                self.index[key] = len(self.nodes)
                self.nodes.append(_Growing(node, key[-1], float(sum(sampled))))
            node = self.index[key]
        return node

    def count(self, node: int, rollouts: Sequence[Rollout]) -> None:
        """Sets the counts of a node to those of its rollouts."""
        self.nodes[node].n_correct = sum(r.right for r in rollouts)
        self.nodes[node].n_rollouts = len(rollouts)

    def finish(self, node: int, outcome: str) -> None:
        """Marks a node as the end of a solution: its verdict is its one observation."""
        self.nodes[node].outcome = outcome
        self.nodes[node].n_correct, self.nodes[node].n_rollouts = int(outcome == "right"), 1

    def tree(self, problem: Problem, source: Source) -> Tree:
        """The finished row."""
        nodes = tuple(
            Node(n.parent, n.step, n.n_correct, n.n_rollouts, n.visits, None, n.outcome, n.logprob) for n in self.nodes
        )
        return Tree(problem.id, problem.prompt, problem.answer, nodes, source)
