"""What an engine is: token-id prefixes and sampling parameters in, samples out. It knows no chat template and no task.

Backends: `transformers_engine` (the embedded default), `vllm_engine` (in process), `openai_engine` (any compatible server).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from .ledger import Ledger


class StopReason(StrEnum):
    """Why a sample ended."""

    EOS = "eos"  # the model wrote an end-of-sequence token, which is the last id of the sample
    STOP = "stop"  # a stop string was completed; it is kept in the sample
    LENGTH = "length"  # max_new_tokens, or the end of the model's context, was reached
    CONTEXT = "context"  # the prefix left no room in the model's context: nothing was sampled


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy and ignores seeds.

    `top_p` in (0, 1] keeps the smallest set of tokens whose probability reaches it; `top_k` 0 keeps all. `stop`: strings
    that end a sample as soon as its text contains one of them.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be 1 or more, found {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1], found {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be 0 (all tokens) or more, found {self.top_k}")


@dataclass(frozen=True)
class Request:
    """A prefix and one seed for each sample wanted of it. The prefix is encoded once for all its samples."""

    prefix: tuple[int, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Sampled ids (the prefix is not repeated), their log-probabilities in nats and why sampling ended.

    `logprobs` are taken under the sampling distribution, that is after temperature, top-k and top-p; with temperature 0
    they are those of temperature 1.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason


class Engine(Protocol):
    """Samples continuations. Same requests, same parameters: same samples, whatever ran before."""

    name: str  # backend, model and precision, written into every row
    tokenizer: Any
    ledger: Ledger

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[list[Sample]]:
        """Samples [len(requests)][len(request.seeds)], in the order asked."""
        ...
