"""Engines and reward models as the policies and scorers that a search speaks to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..basics import fold_seed
from ..models.engine import Engine, Request, Sample, Sampling, StopReason
from ..models.reward import StepScorer, aggregate
from ..models.step_format import StepFormat
from ..models.steps import cut_steps
from ..tasks.base import Problem
from .base import State

# So many blank lines in a row are the end of a solution.
_MOST_BLANK_LINES = 4


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

    def _sample(
        self, states: Sequence[State], seeds: Sequence[Sequence[int]], stop: tuple[str, ...]
    ) -> list[list[State]]:
        # Room is a property of the state, and an engine call has one limit: states with equal room go together.
        rooms: dict[int, list[int]] = {}
        children: list[list[State]] = [[] for _ in states]
        for index, state in enumerate(states):
            room = self.sampling.max_new_tokens - (len(state.ids) - state.prompt_length)
            if room < 1:
                children[index] = [dataclasses.replace(state, done=True, stop=StopReason.LENGTH.value)] * len(
                    seeds[index]
                )
            else:
                rooms.setdefault(self._ceiling(room), []).append(index)
        for room, indices in rooms.items():
            requests = [Request(states[i].ids, tuple(seeds[i])) for i in indices]
            sampling = dataclasses.replace(self.sampling, max_new_tokens=room, stop=stop)
            for i, samples in zip(indices, self.engine.generate(requests, sampling), strict=True):
                children[i] = [self._child(states[i], sample) for sample in samples]
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


class RewardScorer:
    """Scores states by a reward model: step scores aggregated as its step format advises, or as told."""

    def __init__(self, reward: StepScorer, aggregation: str = "") -> None:
        self.reward, self.aggregation = reward, aggregation or reward.step_format.aggregation

    def __call__(self, states: Sequence[State]) -> list[float]:
        scores = self.reward.score([(state.prompt, state.steps) for state in states])
        return [aggregate(one, self.aggregation) for one in scores]
