"""Engines and reward models as the policies and scorers that a search speaks to."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..basics import UserError, fold_seed
from ..models.advantage import effective_rewards
from ..models.corrections import Wording, mark_step, read_critique
from ..models.engine import Engine, Request, Sample, Sampling, StopReason
from ..models.reward import StepScorer, ValueScorer, aggregate
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import Problem, StepChecker, Task, first_error
from .base import State

# So many blank lines in a row are the end of a solution.
_MOST_BLANK_LINES = 4


class StepPolicy:
    """Samples one step at a time from an engine: a sample ends at the step separator, or finishes the solution.

    `max_new_tokens` bounds a whole solution, not a step.
    """

    def __init__(self, engine: Engine, step_format: StepFormat, separator: str, sampling: Sampling) -> None:
        self.engine, self.step_format, self.separator, self.sampling = engine, step_format, separator, sampling

    @property
    def prompt_room(self) -> int:
        """Most tokens of a prompt behind which the context still has room for a whole solution."""
        return int(getattr(self.engine, "context", 2**31)) - self.sampling.max_new_tokens

    def root(self, problem: Problem) -> State:
        """The state of a problem before its first step."""
        ids = self.step_format.encode_prompt(self.engine.tokenizer, problem.prompt)
        return State(problem.id, problem.prompt, ids, len(ids))

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        """Children one step longer or done, [B][len(seeds[b])].

        A separator that ends no step (a blank line) is sampled on from, so that models that write blank lines between their
        steps are searched step by step as well.
        """
        children = self._sample(states, seeds, (self.separator,))
        for line in range(_MOST_BLANK_LINES + 1):
            blank = [
                (b, k)
                for b, row in enumerate(children)
                for k, child in enumerate(row)
                if not child.done and len(child.steps) <= len(states[b].steps)
            ]
            if not blank:
                break
            if line == _MOST_BLANK_LINES:
                for b, k in blank:
                    children[b][k] = dataclasses.replace(children[b][k], done=True)
                break
            more = [(fold_seed(seeds[b][k], "blank line", line),) for b, k in blank]
            grown = self._sample([children[b][k] for b, k in blank], more, (self.separator,))
            for (b, k), [child] in zip(blank, grown, strict=True):
                children[b][k] = child
        return children

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state sampled on to its end, [B]."""
        return [found[0] for found in self._sample(states, [(s,) for s in seeds], ())]

    def expand_greedily(self, states: Sequence[State]) -> list[State]:
        """Each state [B] one step longer or done, by its most probable tokens."""
        greedy = copy.copy(self)
        greedy.sampling = dataclasses.replace(self.sampling, temperature=0.0)
        return [row[0] for row in greedy.expand(states, [(0,)] * len(states))]

    def _sample(
        self, states: Sequence[State], seeds: Sequence[Sequence[int]], stop: tuple[str, ...]
    ) -> list[list[State]]:
        # Room is a property of the state, and an engine call has one limit: states with equal room go together. States of equal
        # ids are one request, so that their prefix is encoded once.
        rooms: dict[int, dict[tuple[int, ...], list[int]]] = {}
        children: list[list[State]] = [[] for _ in states]
        for index, state in enumerate(states):
            room = self.sampling.max_new_tokens - (len(state.ids) - state.prompt_length)
            if room < 1:
                children[index] = [dataclasses.replace(state, done=True, stop=StopReason.LENGTH.value)] * len(
                    seeds[index]
                )
            else:
                rooms.setdefault(self._ceiling(room), {}).setdefault(state.ids, []).append(index)
        for room, prefixes in rooms.items():
            requests = [Request(ids, tuple(s for i in where for s in seeds[i])) for ids, where in prefixes.items()]
            sampling = dataclasses.replace(self.sampling, max_new_tokens=room, stop=stop)
            for where, samples in zip(prefixes.values(), self.engine.generate(requests, sampling), strict=True):
                rest = iter(samples)
                for i in where:
                    children[i] = [self._child(states[i], next(rest)) for _ in seeds[i]]
        return children

    def _ceiling(self, room: int) -> int:
        # States seldom have equal room: a common ceiling keeps batches full. What is above a state's own room is cut in _child.
        return min(self.sampling.max_new_tokens, 64 * -(-room // 64))

    def _child(self, state: State, sample: Sample) -> State:
        room = self.sampling.max_new_tokens - (len(state.ids) - state.prompt_length)
        ids, over = sample.ids[:room], len(sample.ids) > room
        everything = state.ids[state.prompt_length :] + ids
        steps, _ = cut_steps(self.engine.tokenizer, everything, self.separator)
        stop = StopReason.LENGTH if over else sample.stop
        return State(
            key=state.key,
            prompt=state.prompt,
            ids=state.ids + ids,
            prompt_length=state.prompt_length,
            steps=steps,
            done=stop is not StopReason.STOP,
            logprob=state.logprob + float(sum(sample.logprobs[:room])),
            stop=stop.value,
        )


class RevisionPolicy(StepPolicy):
    """A step policy that is shown the earlier attempts of a chain, for a model that was trained to revise them.

    The problem's text becomes `template` with ``{prompt}`` and ``{attempts}`` filled in, where each attempt is
    `attempt_template` with its number and text, the oldest first. Attempts that do not fit into the context with room for
    a whole solution are left out, the oldest first. Scorers still see the problem itself.
    """

    def __init__(
        self,
        engine: Engine,
        step_format: StepFormat,
        separator: str,
        sampling: Sampling,
        *,
        template: str = "{prompt}\n\nEarlier attempts, which may be wrong:\n\n{attempts}",
        attempt_template: str = "Attempt {number}:\n{attempt}\n\n",
    ) -> None:
        super().__init__(engine, step_format, separator, sampling)
        if "{prompt}" not in template or "{attempts}" not in template or "{attempt}" not in attempt_template:
            raise ValueError("a revision template needs {prompt} and {attempts}, an attempt template {attempt}")
        self.template, self.attempt_template = template, attempt_template
        self.left_out = 0  # attempts that did not fit

    def again(self, root: State, earlier: Sequence[State]) -> State:
        """The state before the first step of another attempt at `root`, after the finished attempts `earlier`."""
        for first in range(len(earlier) + 1):
            shown = [
                self.attempt_template.replace("{number}", str(number)).replace(
                    "{attempt}", self.separator.join(state.steps)
                )
                for number, state in enumerate(earlier[first:], 1)
            ]
            if not shown:
                break
            # Piece by piece: a model may well write {prompt}.
            parts = {"{prompt}": root.prompt, "{attempts}": "".join(shown)}
            pieces = re.split(r"(\{prompt\}|\{attempts\})", self.template)
            text = "".join(parts.get(piece, piece) for piece in pieces)
            ids = self.step_format.encode_prompt(self.engine.tokenizer, text)
            if len(ids) <= self.prompt_room:
                self.left_out += first
                return State(root.key, root.prompt, ids, len(ids))
        self.left_out += len(earlier)
        return root


class CorrectionPolicy(StepPolicy):
    """A step policy whose attempts are criticised by a critic (another policy, or itself) and corrected.

    `wording` says what both are asked. `critic` None is no critic: the policy is asked to try again. `problems` by id are for the
    oracle, which asks the `task`. What does not fit into the context with room for a whole attempt is left out, the oldest first.
    """

    def __init__(
        self,
        engine: Engine,
        step_format: StepFormat,
        separator: str,
        sampling: Sampling,
        *,
        wording: Wording,
        task: Task,
        problems: Mapping[str, Problem],
        critic: StepPolicy | None = None,
        shown: int = 1,
    ) -> None:
        super().__init__(engine, step_format, separator, sampling)
        self.wording, self.critic, self.shown = wording, critic, shown
        self.task, self.problems = task, problems
        self.criticises = critic is not None
        self.left_out = 0  # attempts that did not fit

    def before_critique(self, root: State, attempt: State) -> State:
        """The state before the first token of a critique."""
        assert self.critic is not None
        turns = self.wording.ask_critique(root.prompt, self._text(attempt))
        ids = self.critic.step_format.encode_dialogue(self.critic.engine.tokenizer, turns)
        return State(root.key, root.prompt, ids, len(ids))

    def criticise(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Critiques [B]."""
        assert self.critic is not None
        return self.critic.finish(states, seeds)

    def critique_text(self, critique: State) -> str:
        """What the critic wrote."""
        assert self.critic is not None
        ids = critique.ids[critique.prompt_length :]
        return self.critic.engine.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def says_wrong(self, critique: State) -> bool | None:
        """What the critique says of its attempt."""
        return read_critique(self.critique_text(critique)).wrong

    def before_attempt(self, root: State, attempts: Sequence[State], critiques: Sequence[State | None]) -> State:
        """The state before the first step of another attempt."""
        texts = [self._text(attempt) for attempt in attempts]
        said = [None if one is None else self.critique_text(one) for one in critiques]
        most = min(self.shown, len(texts)) if self.shown else len(texts)
        for shown in range(most, 0, -1):
            turns = self.wording.ask_attempt(root.prompt, texts, said, shown)
            ids = self.step_format.encode_dialogue(self.engine.tokenizer, turns)
            if len(ids) <= self.prompt_room:
                self.left_out += most - shown
                return State(root.key, root.prompt, ids, len(ids))
        self.left_out += most
        return root

    def is_right(self, attempt: State) -> bool:
        """Whether the task calls the attempt right."""
        return self.task.verify(self.problems[attempt.key], self._text(attempt)).right

    def _text(self, state: State) -> str:
        ids = state.ids[state.prompt_length :]
        return self.engine.tokenizer.decode(ids, skip_special_tokens=True).strip()


@dataclass(frozen=True)
class Refined(State):
    """The state that a refinement goes on from: `asked` are the ids put to the refiner, which are no part of the solution."""

    asked: tuple[int, ...] = ()
    local: bool = False


class RefinementPolicy(StepPolicy):
    """A step policy whose finished drafts are written anew by a global refiner, or from their first wrong step on by a local one.

    `refiners` (global, local) are step policies with the policy's own vocabulary: a local refinement is spliced to the draft's ids.
    `locator` finds first wrong steps. Drafts for which a refiner's context has no room are not refined.
    """

    def __init__(
        self,
        engine: Engine,
        step_format: StepFormat,
        separator: str,
        sampling: Sampling,
        *,
        wording: Wording,
        refiners: tuple[StepPolicy | None, StepPolicy | None],
        locator: Callable[[Sequence[State]], list[int | None]],
    ) -> None:
        super().__init__(engine, step_format, separator, sampling)
        self.wording, self.refiners, self.locate = wording, refiners, locator
        self.left_out = 0  # drafts that did not fit

    def before_refinement(self, root: State, draft: State, error: int | None) -> State | None:
        """The state that a refinement goes on from; None if the refiner has no room for the draft."""
        refiner = self._refiner(error is not None)
        ids = draft.ids[root.prompt_length :]
        steps, ends = cut_steps(self.engine.tokenizer, ids, self.separator)
        text = self.separator.join(steps) if error is None else mark_step(steps, error, self.separator)
        asked = refiner.step_format.encode_dialogue(
            refiner.engine.tokenizer, self.wording.ask_attempt(root.prompt, [text], [None])
        )
        if len(asked) > refiner.prompt_room:
            self.left_out += 1
            return None
        kept = ends[error - 1] if error else 0
        return Refined(
            root.key, root.prompt, root.ids + ids[:kept], root.prompt_length, steps[: error or 0], asked=asked,
            local=error is not None,
        )  # fmt: skip

    def refine(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state written to its end by its refiner [B]."""
        found: dict[int, State] = {}
        for local in (False, True):
            places = [i for i, s in enumerate(states) if isinstance(s, Refined) and s.local == local]
            if not places:
                continue
            asked = [
                State(s.key, s.prompt, s.asked, len(s.asked))
                for s in (states[i] for i in places)
                if isinstance(s, Refined)
            ]
            ends = self._refiner(local).finish(asked, [seeds[i] for i in places])
            for i, end in zip(places, ends, strict=True):
                ids = states[i].ids + end.ids[end.prompt_length :]
                steps, _ = cut_steps(self.engine.tokenizer, ids[states[i].prompt_length :], self.separator)
                found[i] = dataclasses.replace(end, ids=ids, prompt_length=states[i].prompt_length, steps=steps)
        return [found[i] for i in range(len(states))]

    def _refiner(self, local: bool) -> StepPolicy:
        refiner = self.refiners[local]
        if refiner is None:
            raise UserError(f"this search needs a {'local' if local else 'global'} refiner")
        return refiner


class RewardLocator:
    """Finds the first step of a draft with a score under `threshold`, by a reward model of steps (SORM, PRM)."""

    def __init__(self, reward: StepScorer, threshold: float = 0.5) -> None:
        self.reward, self.threshold = reward, threshold

    def __call__(self, states: Sequence[State]) -> list[int | None]:
        scores = self.reward.score([(state.prompt, state.steps) for state in states])
        return [next((t for t, score in enumerate(own) if score < self.threshold), None) for own in scores]


class CheckerLocator:
    """Finds first wrong steps by a task's exact checker, which PEEKS at no reference but is no model either."""

    def __init__(self, task: StepChecker, problems: Mapping[str, Problem]) -> None:
        self.task, self.problems = task, problems

    def __call__(self, states: Sequence[State]) -> list[int | None]:
        return [first_error(self.task.check_steps(self.problems[s.key], s.steps)) for s in states]


class RandomLocator:
    """Names a step of every draft at random: a control. Drawn with the seed and the draft, whatever stands beside it."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, states: Sequence[State]) -> list[int | None]:
        return [fold_seed(self.seed, s.key, "locate", *s.steps) % len(s.steps) if s.steps else None for s in states]


class RewardScorer:
    """Scores states by a reward model: step scores aggregated as its step format advises, or as told."""

    def __init__(self, reward: StepScorer, aggregation: str = "") -> None:
        self.reward, self.aggregation = reward, aggregation or reward.step_format.aggregation

    def __call__(self, states: Sequence[State]) -> list[float]:
        scores = self.reward.score([(state.prompt, state.steps) for state in states])
        return [aggregate(one, self.aggregation) for one in scores]


class EffectiveScorer:
    """Guides by Q + alpha A, progress beside value (PAV, arXiv:2410.08146 section 3), and chooses among finished
    solutions by Q.

    Q_t is the reward model's score after t steps, Q_0 that of the empty prefix. The prover is Best-of-K of the policy, in
    closed form: mu_t = 1 - (1 - Q_t)^K, and A_t = mu_t - mu_(t-1); or mu_t is the score of a model of its own, `prover`.
    With `aggregation` last, as in the paper, the newest step counts.
    """

    def __init__(
        self,
        reward: ValueScorer,
        aggregation: str = "",
        *,
        alpha: float = 0.5,
        prover_k: int = 4,
        prover: ValueScorer | None = None,
    ) -> None:
        if prover_k < 1:
            raise ValueError(f"prover_k must be 1 or more, found {prover_k}")
        self.reward, self.aggregation = reward, aggregation or reward.step_format.aggregation
        self.alpha, self.prover_k, self.prover = alpha, prover_k, prover

    def __call__(self, states: Sequence[State]) -> list[float]:
        solutions = [(state.prompt, state.steps) for state in states]
        values = self.reward.score_with_root(solutions)
        provers = [None] * len(values) if self.prover is None else self.prover.score_with_root(solutions)
        return [
            aggregate(effective_rewards(one, alpha=self.alpha, k=self.prover_k, prover=prover), self.aggregation)
            for one, prover in zip(values, provers, strict=True)
        ]

    def final(self, states: Sequence[State]) -> list[float]:
        """Q alone."""
        scores = self.reward.score([(state.prompt, state.steps) for state in states])
        return [aggregate(one, self.aggregation) for one in scores]
