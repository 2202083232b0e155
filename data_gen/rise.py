"""RISE (arXiv:2407.18219): better answers at the states that a policy visits by itself, weighted by their reward."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..basics import canonical_json, fold_seed
from ..models.corrections import Turn, Wording
from ..models.engine import Engine, Sampling, StopReason
from ..models.step_format import StepFormat
from ..tasks.base import Outcome, Problem, Task
from .dialogues import ask, text_of
from .rows import Dialogue, Message, Source
from .store import UnitResult

SELECTIONS = ("all", "better", "best", "success")


@dataclass(frozen=True)
class Action:
    """An answer at a state: what was asked before it, its text and its reward."""

    turn: int  # from 1
    asked: tuple[Turn, ...]
    text: str
    reward: float


@dataclass
class Walk:
    """One trajectory in the making: the attempts that the policy made itself, and the actions that may be learnt."""

    problem: Problem
    number: int
    attempts: list[str] = field(default_factory=list)
    actions: list[Action] = field(default_factory=list)
    going: bool = True


def reward(outcome: str) -> float:
    """1 of a right answer, 0 of a wrong one, -1 of one that cannot be read (what could not be checked in time counts as wrong)."""
    return {Outcome.RIGHT.value: 1.0, Outcome.UNPARSEABLE.value: -1.0}.get(outcome, 0.0)


def weight(value: float, tau: float) -> float:
    """exp(r / tau), the weight of an example in reward-weighted regression; 1 with tau 0, which stands for an infinite one.

    With tau 0.4: 12.2 for a right answer, 1 for a wrong one, .082 for an unreadable one. They are not normalised.
    """
    return math.exp(value / tau) if tau else 1.0


def chosen(actions: Sequence[Action], select: str) -> list[Action]:
    """The actions of a trajectory that are learnt.

    all       every one
    better    r_t > r_(t-1)
    best      no earlier turn has a higher reward
    success   r = 1
    Under the first three a first action is kept even if it is wrong, under `success` it is not.
    """
    if select not in SELECTIONS:
        raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, found {select!r}")
    kept = []
    for place, action in enumerate(actions):
        before = [earlier.reward for earlier in actions[:place] if earlier.turn < action.turn]
        if (
            select == "all"
            or (select == "success" and action.reward == 1)
            or (select == "better" and (not before or action.reward > before[-1]))
            or (select == "best" and all(action.reward >= r for r in before))
        ):
            kept.append(action)
    return kept


def repeats(text: str, *, shortest: int = 20, times: int = 4) -> bool:
    """Whether a line of at least `shortest` characters stands there `times` times or more: a generation that got stuck."""
    lines = Counter(line.strip() for line in text.split("\n"))
    return any(count >= times for line, count in lines.items() if len(line) >= shortest)


def rise_rows(
    engine: Engine,
    task: Task,
    step_format: StepFormat,
    problems: Sequence[Problem],
    wording: Wording,
    *,
    samples: int,
    turns: int,
    best_of: int,
    tau: float,
    select: str,
    shown: int,
    sampling: Sampling,
    seed: int,
    policy: str,
    teacher: tuple[Engine, StepFormat] | None = None,
    drafts: Mapping[str, Sequence[str]] | None = None,
    from_problem: bool = False,
) -> UnitResult[Dialogue]:
    """Rows of kind `selfcorrect`, one for each learnt action of `samples` trajectories of each problem.

    The policy's own attempts lead from state to state; a trajectory ends at its first right one. At each state behind the first the
    action to learn is the best by reward of `best_of` samples: of the policy itself (self-distillation), or of a `teacher`.
    The earlier
    turns are shown and not trained; the weight of a row is exp(r / tau). `meta` says turn, reward and the rewards before it.

    `drafts` take the place of the policy's first attempts (off-policy prefixes: a control). With `from_problem` better answers are
    sampled from the problem alone: a first round for policies that have never seen a second turn.
    """
    ledgers = [engine.ledger, *([teacher[0].ledger] if teacher is not None and teacher[0] is not engine else [])]
    before = [ledger.copy() for ledger in ledgers]
    result: UnitResult[Dialogue] = UnitResult([])
    walks = [Walk(problem, k) for problem in problems for k in range(samples)]
    judge = lambda walk, text: reward(task.verify(walk.problem, text).outcome.value)
    writer, its_format = teacher if teacher is not None else (engine, step_format)
    for turn in range(1, turns + 1):
        going = [walk for walk in walks if walk.going]
        asked = [wording.ask_attempt(w.problem.prompt, w.attempts, [None] * len(w.attempts), shown) for w in going]
        seeds = [[fold_seed(seed, w.problem.id, "walk", w.number, turn)] for w in going]
        given = [(drafts or {}).get(w.problem.id, ()) if turn == 1 else () for w in going]
        own: list[str | None] = [
            one[w.number] if len(one) > w.number else None for one, w in zip(given, going, strict=True)
        ]
        missing = [i for i, text in enumerate(own) if text is None]
        found = ask(engine, step_format, [asked[i] for i in missing], [seeds[i] for i in missing], sampling)
        for i, [sample] in zip(missing, found, strict=True):
            if sample.stop is not StopReason.CONTEXT:
                own[i] = text_of(engine, sample)
        if turn > 1:
            states = [[("user", w.problem.prompt)] for w in going] if from_problem else asked
            many = [
                [fold_seed(seed, w.problem.id, "improve", w.number, turn, k) for k in range(best_of)] for w in going
            ]
            better = ask(writer, its_format, states, many, sampling)
            for walk, turns_, pool in zip(going, asked, better, strict=True):
                texts = [text_of(writer, s) for s in pool if s.stop is not StopReason.CONTEXT]
                if not texts:
                    result.dropped["states without room in the context"] += 1
                    continue
                rewards = [judge(walk, text) for text in texts]
                best = max(range(len(texts)), key=lambda i: (rewards[i], -i))
                walk.actions.append(Action(turn, tuple(turns_), texts[best], rewards[best]))
        for walk, turns_, text in zip(going, asked, own, strict=True):
            if text is None:
                walk.going = False
                result.dropped["states without room in the context"] += turn == 1
                continue
            value = judge(walk, text)
            if turn == 1:
                walk.actions.append(Action(turn, tuple(turns_), text, value))
            walk.attempts.append(text)
            walk.going = value < 1
    for ledger, start in zip(ledgers, before, strict=True):
        result.ledger = result.ledger + (ledger - start)
    source = Source(policy, engine.name, task.name, seed)
    for walk in walks:
        seen: set[str] = set()
        actions = []
        for action in walk.actions:
            if not action.text:
                result.dropped["empty answers"] += 1
            elif action.text in seen:
                result.dropped["answers that the trajectory has already"] += 1
            elif repeats(action.text):
                result.dropped["answers that repeat themselves"] += 1
            else:
                seen.add(action.text)
                actions.append(action)
        kept = chosen(actions, select)
        result.dropped["answers that are not better"] += len(actions) - len(kept)
        for action in kept:
            meta = {
                "id": f"{walk.problem.id}/{walk.number}/{action.turn}", "turn": action.turn, "reward": action.reward,
                "reference": walk.problem.answer, "rewards_before": [a.reward for a in walk.actions if a.turn < action.turn],
            }  # fmt: skip
            messages = (
                *(Message(role, content) for role, content in action.asked),
                Message("assistant", action.text, train=True),
            )
            share = weight(action.reward, tau)
            result.rows.append(Dialogue(walk.problem.id, "selfcorrect", messages, canonical_json(meta), source, share))
            result.counts[f"rows of turn {action.turn}, {_NAMES[action.reward]}"] += 1
    result.dropped = +result.dropped
    return result


_NAMES = {1.0: "right", 0.0: "wrong", -1.0: "unreadable"}
