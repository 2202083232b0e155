"""Engines and reward models as the policies and scorers that a search speaks to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..models.engine import Engine, Request, Sample, Sampling, StopReason
from ..models.reward import RewardModel, aggregate
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import Problem
from .base import State


class StepPolicy:
    """Samples one step at a time from an engine: a sample ends at the step separator, or finishes the solution.

    `max_new_tokens` bounds a whole solution, not a step.
    """

    def __init__(self, engine: Engine, step_format: StepFormat, separator: str, sampling: Sampling) -> None:
        self.engine, self.step_format, self.separator, self.sampling = engine, step_format, separator, sampling

    def root(self, problem: Problem) -> State:
        """The state of a problem before its first step."""
        ids = self.step_format.encode_prompt(self.engine.tokenizer, problem.prompt)
        return State(problem.id, problem.prompt, ids, len(ids))

    def expand(self, states: Sequence[State], seeds: Sequence[Sequence[int]]) -> list[list[State]]:
        """Children one step longer, [B][len(seeds[b])]."""
        return self._sample(states, seeds, (self.separator,))

    def finish(self, states: Sequence[State], seeds: Sequence[int]) -> list[State]:
        """Each state sampled on to its end, [B]."""
        return [found[0] for found in self._sample(states, [(s,) for s in seeds], ())]

    def _sample(self, states: Sequence[State], seeds: Sequence[Sequence[int]], stop: tuple[str, ...]) -> list[list[State]]:
        # Room is a property of the state, and an engine call has one limit: states with equal room go together.
        rooms: dict[int, list[int]] = {}
        children: list[list[State]] = [[] for _ in states]
        for index, state in enumerate(states):
            room = self.sampling.max_new_tokens - (len(state.ids) - state.prompt_length)
            if room < 1:
                children[index] = [dataclasses.replace(state, done=True, stop=StopReason.LENGTH.value)] * len(seeds[index])
            else:
                rooms.setdefault(self._ceiling(room) if stop else room, []).append(index)
        for room, indices in rooms.items():
            requests = [Request(states[i].ids, tuple(seeds[i])) for i in indices]
            sampling = dataclasses.replace(self.sampling, max_new_tokens=room, stop=stop)
            for i, samples in zip(indices, self.engine.generate(requests, sampling), strict=True):
                children[i] = [self._child(states[i], sample) for sample in samples]
        return children

    def _ceiling(self, room: int) -> int:
        # One step seldom comes near the limit of a solution: a common ceiling keeps batches full. It is checked in _child.
        return min(self.sampling.max_new_tokens, 64 * -(-room // 64))

    def _child(self, state: State, sample: Sample) -> State:
        room = self.sampling.max_new_tokens - (len(state.ids) - state.prompt_length)
        ids, over = sample.ids[:room], len(sample.ids) > room
        everything = state.ids[state.prompt_length :] + ids
        steps, _ = cut_steps(self.engine.tokenizer, everything, self.separator)
        stop = StopReason.LENGTH if over else sample.stop
        # A separator that ends no step (a blank line) or adds none would make the search go on for nothing.
        stuck = stop is StopReason.STOP and len(steps) <= len(state.steps)
        return State(
            key=state.key,
            prompt=state.prompt,
            ids=state.ids + ids,
            prompt_length=state.prompt_length,
            steps=steps,
            done=stop is not StopReason.STOP or stuck,
            logprob=state.logprob + float(sum(sample.logprobs[:room])),
            stop=stop.value,
        )


class RewardScorer:
    """Scores states by a reward model: step scores aggregated as its step format advises, or as told."""

    def __init__(self, reward: RewardModel, aggregation: str = "") -> None:
        self.reward, self.aggregation = reward, aggregation or reward.step_format.aggregation

    def __call__(self, states: Sequence[State]) -> list[float]:
        scores = self.reward.score([(state.prompt, state.steps) for state in states])
        return [aggregate(one, self.aggregation) for one in scores]
