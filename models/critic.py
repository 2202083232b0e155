"""Critics: language models that read a solution paragraph by paragraph and name the first wrong one.

The protocol is that of ProcessBench (arXiv:2412.06559, section 4.1 and appendix): paragraphs in numbered tags, the index in
``\\boxed{}``, the last boxed integer counts; several samples vote.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, Protocol

from ..basics import UserError, fingerprint, fold_seed
from .engine import Engine, Request, Sampling, StopReason
from .ledger import Ledger
from .step_format import StepFormat

PROMPT = """The following is a math problem and a solution (split into paragraphs, enclosed with tags and indexed from 0):

[Math Problem]

{problem}

[Solution]

{paragraphs}

Your task is to review and critique the solution paragraph by paragraph. Once you identify an error in a paragraph, return the \
index of the paragraph where the earliest error occurs. Otherwise, return the index of -1 (which typically denotes "not found").

Please put your final answer (i.e., the index) in \\boxed{}."""

_BOXED = re.compile(r"\\boxed\{([^{}]{0,40})\}")
_INDEX = re.compile(r"-?[0-9]{1,4}")


def critic_prompt(problem: str, steps: Sequence[str], template: str = "") -> str:
    """The question put to a critic; `template` has {problem} and {paragraphs}."""
    tagged = "\n\n".join(f"<paragraph_{i}>\n{step}\n</paragraph_{i}>" for i, step in enumerate(steps))
    # In one pass: a problem may well contain {paragraphs}.
    parts = {"problem": problem, "paragraphs": tagged}
    return re.sub(r"\{(problem|paragraphs)\}", lambda match: parts[match[1]], template or PROMPT)


def read_index(text: str, steps: int) -> int | None:
    """The last boxed integer of a critique; None if there is none, or if it is not -1 or one of `steps` steps.

    What is boxed last counts even if it is no integer: a critic that ends with \\boxed{none} has not answered.
    """
    found = _BOXED.findall(text)
    if not found or not _INDEX.fullmatch(found[-1].strip()):
        return None
    index = int(found[-1])
    return index if -1 <= index < steps else None


def majority_index(votes: Sequence[int | None]) -> int | None:
    """The index that most readable votes name, the first named of those that tie; None if no vote can be read."""
    readable = [vote for vote in votes if vote is not None]
    return Counter(readable).most_common(1)[0][0] if readable else None


def vote_scores(votes: Sequence[int | None], steps: int) -> list[float]:
    """Step scores from votes: the share of readable votes by which step t and all before it are right; .5 without any.

    Never rising along a solution. With one vote 1 up to the first error, then 0: a threshold of 0.5 gives the vote back.
    """
    readable = [steps if vote == -1 else vote for vote in votes if vote is not None]
    if not readable:
        return [0.5] * steps
    return [sum(vote > t for vote in readable) / len(readable) for t in range(steps)]


class Writer(Protocol):
    """Writes answers to prompts: what is behind a critic."""

    ledger: Ledger

    def write(self, prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> list[list[str]]:
        """Answers [B][len(seeds[b])] to each prompt."""
        ...


class EngineWriter:
    """Answers by an engine, to prompts laid out as the model's step format says (its chat template, if it has one)."""

    def __init__(self, engine: Engine, step_format: StepFormat, sampling: Sampling) -> None:
        self.engine, self.step_format, self.sampling, self.ledger = engine, step_format, sampling, engine.ledger
        self.unanswered = 0  # prompts that did not fit into the context

    def write(self, prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> list[list[str]]:
        tokenizer = self.engine.tokenizer
        requests = [
            Request(self.step_format.encode_prompt(tokenizer, prompt), tuple(own))
            for prompt, own in zip(prompts, seeds, strict=True)
        ]
        found = self.engine.generate(requests, self.sampling)
        self.unanswered += sum(samples[0].stop is StopReason.CONTEXT for samples in found)
        return [[tokenizer.decode(s.ids, skip_special_tokens=True) for s in samples] for samples in found]


class Critic:
    """Finds first errors by asking a language model `samples` times; step scores come from its votes."""

    def __init__(self, writer: Writer, *, name: str, samples: int = 1, prompt: str = "", seed: int = 0) -> None:
        for part in ("{problem}", "{paragraphs}"):
            if prompt and part not in prompt:
                raise UserError(f"the critic's prompt must contain {part}, found {prompt[:80]!r}")
        self.writer, self.name, self.ledger = writer, name, writer.ledger
        self.samples, self.prompt, self.seed = samples, prompt, seed
        self.settings = [samples, prompt, seed, repr(getattr(writer, "sampling", None))]  # what its votes depend on
        self.step_format = SimpleNamespace(aggregation="min")

    def votes(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[int | None]]:
        """Votes [B][samples] for the first wrong step of each solution."""
        prompts = [critic_prompt(problem, steps, self.prompt) for problem, steps in solutions]
        # By the prompt and not by its place: an interrupted evaluation asks for the rest with the same seeds.
        seeds = [[fold_seed(self.seed, "critic", fingerprint(p), k) for k in range(self.samples)] for p in prompts]
        answers = self.writer.write(prompts, seeds)
        return [
            [read_index(answer, len(steps)) for answer in own]
            for own, (_, steps) in zip(answers, solutions, strict=True)
        ]

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        """Step scores [B][T_b], see `vote_scores`."""
        votes = self.votes(solutions)
        return [vote_scores(own, len(steps)) for own, (_, steps) in zip(votes, solutions, strict=True)]


def unreadable(votes: Sequence[Sequence[Any]]) -> int:
    """How many votes could not be read."""
    return sum(vote is None for own in votes for vote in own)
