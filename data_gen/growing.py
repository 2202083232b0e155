"""Many trees at once: each tree asks for rollouts, and the asks of all trees go to the engine in one call.

A tree is a generator. It yields a list of `Ask`s, is sent the rollouts of each, and returns what it found. It never sees the
engine, the task or the other trees, so that what it grows depends on its own problem alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from ..basics import fingerprint, fold_seed
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.ledger import Ledger
from ..models.reward import RewardModel
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..search.adapters import StepPolicy
from ..search.base import State
from ..search.loop import drive
from ..tasks.base import Problem, StepChecker, Task, first_error
from .rows import Node, Source, StepLabels, Tree
from .store import UnitResult
from .tree_rows import UNFINISHED

R = TypeVar("R")


@dataclass(frozen=True)
class Ask:
    """Wanted: the rollouts `numbers` of a prefix (ids behind the prompt). Equal numbers give equal rollouts.

    With `one_step` each is sampled to the end of its next step alone, and says what a value model holds of the prefix.
    """

    prefix: tuple[int, ...]
    numbers: range
    one_step: bool = False


@dataclass(frozen=True)
class Rollout:
    """A prefix sampled on to its end, or by one step. `ids` is all of it, of which the first `start` are the prefix."""

    ids: tuple[int, ...]
    start: int
    outcome: str  # a tasks.base.Outcome; UNFINISHED for a step that ends no solution
    logprobs: tuple[float, ...] = ()  # of ids[start:], nats; of one step their sum
    value: float | None = None  # of the prefix, in [-1, 1]; None without a value model

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
    """Samples rollouts of prefixes of many problems in one engine call, and checks their answers.

    `value` is what judges prefixes from which single steps are asked; its score s becomes the value 2 s - 1.
    """

    def __init__(
        self,
        engine: Engine,
        task: Task,
        step_format: StepFormat,
        sampling: Sampling,
        seed: int,
        value: RewardModel | None = None,
    ) -> None:
        self.engine, self.task, self.step_format, self.sampling, self.seed = engine, task, step_format, sampling, seed
        self.value = value
        self.stepper = StepPolicy(engine, step_format, task.step_separator, sampling)
        self.counts: Counter[str] = Counter()
        self._prompts: dict[str, tuple[int, ...]] = {}

    def roll(self, asks: Sequence[tuple[Problem, Ask]]) -> list[list[Rollout]]:
        """The rollouts of each ask; none, and counted, where a prefix leaves no room in the context."""
        whole = iter(self._whole([pair for pair in asks if not pair[1].one_step]))
        steps = iter(self._one_step([pair for pair in asks if pair[1].one_step]))
        return [next(steps if ask.one_step else whole) for _, ask in asks]

    def _one_step(self, asks: Sequence[tuple[Problem, Ask]]) -> list[list[Rollout]]:
        if not asks:
            return []
        states, seeds = [], []
        for problem, ask in asks:
            prompt = self._prompt(problem)
            steps, _ = self.cut(ask.prefix)
            states.append(State(problem.id, problem.prompt, prompt + ask.prefix, len(prompt), steps))
            key = fingerprint(list(ask.prefix))
            seeds.append([fold_seed(self.seed, problem.id, "step", key, n) for n in ask.numbers])
        values: Sequence[float | None] = [None] * len(asks)
        if self.value is not None:
            values = [2 * s[-1] - 1 for s in self.value.score_with_root([(s.prompt, s.steps) for s in states])]
        found: list[list[Rollout]] = []
        grown = self.stepper.expand(states, seeds)
        for (problem, ask), state, children, value in zip(asks, states, grown, values, strict=True):
            if any(child.stop == StopReason.CONTEXT.value for child in children):
                self.counts["prefixes longer than the context"] += bool(ask.prefix)
                found.append([])
                continue
            rollouts = []
            for child in children:
                ids = child.ids[state.prompt_length :]
                text = self.engine.tokenizer.decode(ids, skip_special_tokens=True)
                outcome = self.task.verify(problem, text).outcome.value if child.done else UNFINISHED
                rollouts.append(Rollout(ids, len(ask.prefix), outcome, (child.logprob,), value))
            found.append(rollouts)
        return found

    def _whole(self, asks: Sequence[tuple[Problem, Ask]]) -> list[list[Rollout]]:
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
            # Rollouts of a sure policy are often equal: each text is read and checked once.
            different = list(dict.fromkeys(sample.ids for sample in samples))
            texts = tokenizer.batch_decode([ask.prefix + ids for ids in different], skip_special_tokens=True)
            outcome = {
                ids: self.task.verify(problem, text).outcome.value for ids, text in zip(different, texts, strict=True)
            }
            found.append([Rollout(ask.prefix + s.ids, len(ask.prefix), outcome[s.ids], s.logprobs) for s in samples])
        return found

    def cut(self, ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Steps and step ends of solution ids."""
        return cut_steps(self.engine.tokenizer, ids, self.task.step_separator)

    @property
    def ledger(self) -> Ledger:
        """What was spent so far, by the engine and by the value model."""
        return self.engine.ledger + (self.value.ledger if self.value is not None else Ledger())

    def source(self, policy: str) -> Source:
        """Where the rows come from."""
        return Source(policy, self.engine.name, self.task.name, self.seed)

    def _prompt(self, problem: Problem) -> tuple[int, ...]:
        if problem.prompt not in self._prompts:
            self._prompts[problem.prompt] = self.step_format.encode_prompt(self.engine.tokenizer, problem.prompt)
        return self._prompts[problem.prompt]


def grow(roller: Roller, problems: Sequence[Problem], growths: Sequence[Growth[R]]) -> list[R]:
    """What each growth returns. In each round the asks of all that are not done are answered by one engine call."""

    def answer(waiting: Mapping[int, list[Ask]]) -> Iterator[tuple[int, list[list[Rollout]]]]:
        asked = list(waiting.items())
        answers = iter(roller.roll([(problems[index], ask) for index, asks in asked for ask in asks]))
        return ((index, [next(answers) for _ in asks]) for index, asks in asked)

    return drive(growths, answer)


class Grown(Protocol):
    """What a growth returns: why it has no row, if it has none, and what it counted on the way."""

    dropped: str
    counts: Counter[str]


F = TypeVar("F", bound=Grown)


def grown_rows(
    roller: Roller,
    problems: Sequence[Problem],
    growths: Sequence[Growth[F]],
    rows_of: Callable[[Problem, F, Source], Iterable[Any]],
    policy: str,
) -> UnitResult[Any]:
    """The rows of all growths that found something, with what was counted and dropped and what it cost.

    Same arguments, same rows, whatever problems stand beside a problem (but for the rounding of a value model's scores).
    """
    before, source = roller.ledger, roller.source(policy)
    result: UnitResult[Any] = UnitResult([])
    for problem, found in zip(problems, grow(roller, problems, growths), strict=True):
        result.counts.update(found.counts)
        if found.dropped:
            result.dropped[found.dropped] += 1
        else:
            result.rows += rows_of(problem, found, source)
    result.ledger = roller.ledger - before
    result.counts["policy calls"] = result.ledger.policy_calls
    result.dropped.update(+roller.counts)
    return result


def counted_row(
    task: Task,
    problem: Problem,
    sample: int,
    steps: Sequence[str],
    counts: Sequence[tuple[int, int]],
    outcome: str,
    source: Source,
) -> StepLabels:
    """A row of Monte-Carlo counts, (right, rollouts) of the prefixes of 0 .. len(steps) steps; with the first error where the task
    can check steps."""
    checks = task.check_steps(problem, steps) if isinstance(task, StepChecker) else None
    return StepLabels(
        problem_id=problem.id,
        prompt=problem.prompt,
        gold=problem.answer,
        sample=sample,
        steps=tuple(steps),
        n_correct=tuple(right for right, _ in counts),
        n_rollouts=tuple(rollouts for _, rollouts in counts),
        label_source="monte_carlo",
        outcome=outcome,
        first_error=first_error(checks) if checks is not None else None,
        first_error_known=checks is not None,
        source=source,
    )


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
