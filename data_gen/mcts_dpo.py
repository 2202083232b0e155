"""Trees of MCTS-DPO (arXiv:2405.00451): steps judged by the policy itself or by rollouts, moves by visits, many trees at once.

The search of one question is a growth (`growing`): it yields what it wants sampled and never sees the engine. What it wants here
are also single next steps and the policy's own opinion, which `StepRoller` answers beside full rollouts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..basics import UserError, fingerprint, fold_seed
from ..models.engine import Engine, Request, Sampling, StopReason
from ..models.step_format import StepFormat
from ..search.puct import puct
from ..tasks.base import HasReference, Problem, Task
from .growing import Ask, Cut, Roller, Rollout, grown_rows
from .rows import Node, Source, Tree
from .store import UnitResult
from .tree_rows import UNFINISHED

# What a policy is asked about its own partial answer.
SELF_EVALUATION = (
    "{prompt}\n\nProposed answer so far:\n{steps}\n\n"
    "Is the proposed answer so far correct? Reply with Yes or No.\nReply:"
)
HINT = "The right final answer is {answer}.\n\n"


@dataclass(frozen=True)
class Options:
    """How one question is searched; names and defaults after the paper and its code."""

    value: str = (
        "self"  # C of a step: self (the policy's opinion of it) or rollouts (the share of completions that end right)
    )
    iterations: int = 8  # descents before each move; the first move gets `first_factor` times as many
    first_factor: int = 4
    candidates: int = 4  # next steps sampled for a node, before duplicates are dropped
    evaluations: int = 8  # answers (self) or completions (rollouts) that a step's C is a share of
    max_depth: int = 12  # most steps of a solution
    c_puct: float = 1.0
    length_exponent: float = 1.25  # lambda: prior = exp(sum of log-probabilities / tokens^lambda)
    gamma: float = 1.0
    full_confidence: int = 3  # C is divided by max(depth of the parent - this, 1)
    include_gold_candidate: bool = False  # the reference's next step is a candidate too
    hint_self_eval: bool = False  # the policy is told the answer when it is asked for its opinion


# --- what a growth may ask for, beside full rollouts -----------------------------------------------------------------------


@dataclass(frozen=True)
class AskOpinion(Ask):
    """Wanted: the policy's opinion of the steps of a prefix, as rollouts whose outcome is "right" where it says yes."""

    steps: tuple[str, ...] = ()


class StepRoller(Roller):
    """Also answers AskOpinion. All asks of one kind, of all trees, go to the engine in one call."""

    def __init__(
        self,
        engine: Engine,
        task: Task,
        step_format: StepFormat,
        sampling: Sampling,
        seed: int,
        *,
        question: str = SELF_EVALUATION,
        yes: Sequence[str] = ("yes",),
        hint: bool = False,
    ) -> None:
        super().__init__(engine, task, step_format, sampling, seed)
        self.question, self.yes, self.hint = question, tuple(word.lower() for word in yes), hint

    def roll(self, asks: Sequence[tuple[Problem, Ask]]) -> list[list[Rollout]]:
        """The rollouts of each ask, in the order asked."""
        is_opinion = [isinstance(ask, AskOpinion) for _, ask in asks]
        opinions = iter(self._opinions([pair for pair, own in zip(asks, is_opinion, strict=True) if own]))
        others = iter(super().roll([pair for pair, own in zip(asks, is_opinion, strict=True) if not own]))
        return [next(opinions if own else others) for own in is_opinion]

    def _opinions(self, asks: Sequence[tuple[Problem, Any]]) -> list[list[Rollout]]:
        if not asks:
            return []
        tokenizer = self.engine.tokenizer
        requests = []
        for problem, ask in asks:
            steps = self.task.step_separator.join(ask.steps)
            text = self.question.replace("{prompt}", problem.prompt).replace("{steps}", steps)
            if self.hint:
                text = HINT.replace("{answer}", problem.answer) + text
            seeds = tuple(
                fold_seed(self.seed, problem.id, "opinion", fingerprint(list(ask.prefix)), n) for n in ask.numbers
            )
            requests.append(Request(self.step_format.encode_prompt(tokenizer, text), seeds))
        found: list[list[Rollout]] = []
        for (_, ask), samples in zip(asks, self.engine.generate(requests, Sampling(4, 1.0)), strict=True):
            if samples and samples[0].stop is StopReason.CONTEXT:
                self.counts["questions of opinion longer than the context"] += 1
                found.append([])
                continue
            said = [tokenizer.decode(s.ids, skip_special_tokens=True).strip().lower() for s in samples]
            found.append(
                [Rollout(ask.prefix, len(ask.prefix), "right" if s.startswith(self.yes) else "wrong") for s in said]
            )
        return found


# --- the search of one question -----------------------------------------------------------------------------------------


@dataclass
class Step:
    """A node: a step, with the ids of everything up to it."""

    parent: Step | None
    steps: tuple[str, ...]
    ids: tuple[int, ...]
    prior: float
    logprob: float
    outcome: str | None = None  # of a solution that ends here
    value: float = 0.0  # C / max(depth of the parent - full_confidence, 1) + O
    reward: float = 0.0  # value - value of the parent
    visits: int = 0
    q: float = 0.0
    v: float = 0.0
    children: list[Step] | None = None  # None: not expanded
    rollouts: list[Rollout] = field(default_factory=list)  # completions from here, with value: rollouts

    @property
    def depth(self) -> int:
        return len(self.steps)

    @property
    def open(self) -> bool:
        """Whether a descent can go on below it."""
        return self.outcome is None and self.children != []


@dataclass
class Found:
    """What one question gave. `dropped` says why there is no tree."""

    root: Step
    path: list[Step]  # the nodes moved to
    dropped: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def prior(logprob: float, tokens: int, exponent: float) -> float:
    """p(a) = exp(sum log pi / |a|^lambda)."""
    return math.exp(logprob / max(tokens, 1) ** exponent)


def back_up(path: Sequence[Step], gamma: float) -> None:
    """Updates a descent from its end to its start: V = sum_c max(1, N_c) Q_c / sum_c max(1, N_c), N += 1, Q = r + gamma V."""
    for node in reversed(path):
        if node.children:
            weights = [max(1, child.visits) for child in node.children]
            node.v = sum(w * child.q for w, child in zip(weights, node.children, strict=True)) / sum(weights)
        node.visits += 1
        node.q = node.reward + gamma * node.v


def next_move(node: Step) -> Step:
    """The child with the largest N (1 + spread), ties by Q; spread is the range of the visit counts of its own children."""

    def rank(child: Step) -> tuple[float, float]:
        visits = [c.visits for c in child.children or []]
        return child.visits * (1 + (max(visits) - min(visits) if visits else 0)), child.q

    return max(node.children or [], key=rank)  # the first among equals


def search_question(
    cut: Cut, options: Options, gold: Sequence[tuple[str, tuple[int, ...]]] = ()
) -> Generator[list[Any], list[list[Rollout]], Found]:
    """Grows the tree of one question and moves down it.

    A descent goes from the node moved to by PUCT to a finished solution or `max_depth`, and expands every node on its way: there is
    no separate rollout. Children are distinct next steps; a child's C comes from `evaluations` opinions or completions, and its
    first Q is its reward. With `value: rollouts` next steps are those of the completions that gave a node its C: they are samples
    of the policy and cost nothing.

    `gold`: (step, ids behind the prompt up to it) of the reference, for `include_gold_candidate`.
    """
    root = Step(None, (), (), 1.0, 0.0)
    found = Found(root, [root])
    by_rollouts = options.value == "rollouts"
    if not (yield from _judge([root], options)):
        found.dropped = "prompts longer than the context"
        return found
    node = root
    while node.open and node.depth < options.max_depth:
        budget = options.iterations * (options.first_factor if node is root else 1)
        for _ in range(budget):
            path = [node]
            while path[-1].outcome is None and path[-1].depth < options.max_depth:
                here = path[-1]
                if here.children is None:
                    if by_rollouts:
                        sampled = here.rollouts
                    else:
                        [sampled] = yield [Ask(here.ids, range(options.candidates), one_step=True)]
                    here.children = _children(here, sampled, cut, options, gold, found.counts)
                    yield from _judge(here.children, options)
                    for child in here.children:
                        child.reward = child.q = child.value - here.value
                if not here.children:
                    break
                path.append(max(here.children, key=lambda c: puct(c.q, c.prior, here.visits, c.visits, options.c_puct)))
            back_up(path, options.gamma)
            found.counts["descents"] += 1
        if not node.children:
            break
        node = next_move(node)
        found.path.append(node)
    if not root.children:
        found.dropped = "questions without a step"
    found.counts[f"questions moved to a {node.outcome or 'cut'} end"] += 1
    return found


def _children(
    here: Step,
    sampled: Sequence[Rollout],
    cut: Cut,
    options: Options,
    gold: Sequence[tuple[str, tuple[int, ...]]],
    counts: Counter[str],
) -> list[Step]:
    """Up to `candidates` distinct next steps, in order of sampling, and the reference's if it is wanted and fits."""
    made: dict[str, Step] = {}
    for rollout in sampled:
        steps, ends = cut(rollout.ids)
        if len(steps) <= here.depth:
            counts["samples without a step"] += 1
            continue
        text, end = steps[here.depth], ends[here.depth]
        last = len(steps) == here.depth + 1 and rollout.outcome != UNFINISHED
        if text in made:
            counts["candidates met again"] += 1
            if not last and made[text].outcome is not None:  # what some sample goes on behind is no end
                made[text].outcome, made[text].ids = None, rollout.ids[:end]
            continue
        if len(made) == options.candidates:
            continue
        begin = max(len(here.ids) - rollout.start, 0)
        logprob = float(sum(rollout.logprobs[begin : end - rollout.start]))
        made[text] = Step(
            here, (*here.steps, text), rollout.ids[:end], prior(logprob, end - len(here.ids), options.length_exponent), logprob,
            outcome=rollout.outcome if last else None,
        )  # fmt: skip
    if here.depth < len(gold) and here.steps == tuple(step for step, _ in gold[: here.depth]):
        text, ids = gold[here.depth]
        if text not in made:
            counts["reference steps added"] += 1
            # It was not sampled, so that it has no log-probability: it gets the mean prior of the others.
            mean = sum(s.prior for s in made.values()) / len(made) if made else 1.0
            whole = here.depth + 1 == len(gold)
            made[text] = Step(here, (*here.steps, text), ids, mean, 0.0, outcome="right" if whole else None)
    return list(made.values())


def _judge(nodes: Sequence[Step], options: Options) -> Generator[list[Any], list[list[Rollout]], bool]:
    """Sets the values of new nodes; False if the first one leaves no room in the context."""
    by_rollouts = options.value == "rollouts"
    numbers = range(options.evaluations)
    # A finished solution has no completions: its verdict is all that rollouts could say.
    asked = [n for n in nodes if not (by_rollouts and n.outcome is not None)]
    answers = (
        []
        if not asked
        else (yield [Ask(n.ids, numbers) if by_rollouts else AskOpinion(n.ids, numbers, steps=n.steps) for n in asked])
    )
    for node, rollouts in zip(asked, answers, strict=True):
        node.rollouts = rollouts if by_rollouts else []
        _set_value(node, sum(r.right for r in rollouts) / len(rollouts) if rollouts else None, options)
    for node in nodes:
        if by_rollouts and node.outcome is not None:
            _set_value(node, float(node.outcome == "right"), options)
    return bool(answers[0]) if answers else True


def _set_value(node: Step, confidence: float | None, options: Options) -> None:
    if confidence is None:  # it could not be read: the parent's value stands for it
        node.value = node.parent.value if node.parent is not None else 0.0
        return
    depth = node.parent.depth if node.parent is not None else 0
    outcome = 0.0 if node.outcome is None else (1.0 if node.outcome == "right" else -1.0)
    node.value = confidence / max(depth - options.full_confidence, 1) + outcome


def tree_row(found: Found, problem: Problem, source: Source) -> Tree:
    """The row of a search: the nodes moved to and their siblings, which is what pairs are read from.

    `value` is what was backed up, Q + value(parent), moved from [-1, 2] to [-1, 1]: siblings are in the order of their Q.
    A child that no descent went through was judged once, when it was made, and counts as visited once, as in the backup.
    """
    nodes: list[Node] = []
    index = {id(found.root): 0}
    nodes.append(Node(-1, "", 0, 0, found.root.visits, _scaled(found.root.v + found.root.value), None, 0.0))
    for moved in found.path:
        for child in moved.children or []:
            index[id(child)] = len(nodes)
            absolute = child.q + moved.value
            nodes.append(
                Node(
                    index[id(moved)],
                    child.steps[-1],
                    0,
                    0,
                    max(child.visits, 1),
                    _scaled(absolute),
                    child.outcome,
                    child.logprob,
                )
            )
    return Tree(problem.id, problem.prompt, problem.answer, tuple(nodes), source)


def _scaled(value: float) -> float:
    return min(max((2 * value - 1) / 3, -1.0), 1.0)


def _gold(task: Task, problem: Problem, step_format: StepFormat, tokenizer: Any) -> list[tuple[str, tuple[int, ...]]]:
    steps = task.reference_steps(problem) if isinstance(task, HasReference) else None
    if not steps:
        return []
    encoded = step_format.encode_after(tokenizer, (), steps)
    return [(step, encoded.ids[: end + 1]) for step, end in zip(steps, encoded.step_ends, strict=True)]


def mcts_dpo_trees(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    *,
    options: Options,
    question: str = SELF_EVALUATION,
    yes: Sequence[str] = ("yes",),
    sampling: Sampling,
    seed: int,
    policy: str,
) -> UnitResult[Tree]:
    """One tree for each question: same arguments, same rows, whatever questions stand beside it."""
    if options.include_gold_candidate and not isinstance(task, HasReference):
        raise UserError(f"include_gold_candidate: task {task.name} has no reference solutions")
    roller = StepRoller(
        engine, task, step_format, sampling, seed, question=question, yes=yes, hint=options.hint_self_eval
    )
    gold = [
        _gold(task, problem, step_format, engine.tokenizer) if options.include_gold_candidate else []
        for problem in problems
    ]
    growths = [search_question(roller.cut, options, one) for one in gold]
    result = grown_rows(
        roller, problems, growths, lambda problem, found, source: [tree_row(found, problem, source)], policy
    )
    for name, used in (
        ("reference steps as candidates", options.include_gold_candidate),
        ("answers told to the judge", options.hint_self_eval),
    ):
        result.counts[f"questions with {name}"] = len(problems) if used else 0
    return result
