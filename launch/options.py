"""What the options of all stages share. Options are dataclasses; importing them imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..basics import UserError
from ..config import at_least, option

T = TypeVar("T")


def required(config: Any, *names: str) -> None:
    """Raises UserError if one of the text fields is empty."""
    for name in names:
        if not getattr(config, name):
            raise UserError(f"{name} is missing: {type(config).__dataclass_fields__[name].metadata['help']}")


def first(items: Sequence[T], limit: int) -> Sequence[T]:
    """The first `limit` items, or all if it is 0."""
    return items[:limit] if limit else items


def chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def settings_of(cls: type[T], config: Any) -> T:
    """The dataclass `cls`, of which every field is one of `config` by the same name."""
    return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


@dataclass
class OnTask:
    """What every stage over problems is told."""

    task: dict[str, Any] = option({"kind": "chain"}, "the task: kind and its fields")
    split: str = option("train", "the split of the task")
    limit: int = option(0, "use the first so many problems; 0 for all")
    seed: int = option(0, "seed of everything drawn")
    unit_problems: int = option(64, "problems in one unit of work, which is what a kill can cost")
    shard: str = option("", "i/n: make only this share of the units; empty takes RANK and WORLD_SIZE")


@dataclass
class FromPolicy:
    """How to sample from a policy, whatever it is asked."""

    policy: str = option("", "the policy: a folder, a hub id, or a served model's name")
    backend: str = option("transformers", "transformers, vllm or openai")
    base_url: str = option("", "address of an OpenAI-compatible server, for backend openai")
    dtype: str = option("float32", "precision of the weights: float32, bfloat16, float16 or auto")
    device: str = option("auto", "cpu, cuda ...; auto takes the best there is")
    batch_size: int = option(256, "sequences sampled at once")
    temperature: float = option(1.0, "sampling temperature; 0 is greedy")
    top_p: float = option(1.0, "nucleus: the smallest set of tokens with this probability is kept")
    max_new_tokens: int = option(128, "longest solution or continuation in tokens")
    chat: bool | None = option(None, "use the chat template of a policy that has no step format; null: if it has one")
    prompt_template: str = option("{prompt}", "text around the problem, for a policy that has no step format")
    system: str | None = option(None, "system message, for a policy that has no step format")

    def __post_init__(self) -> None:
        at_least(self, 1, "max_new_tokens", "batch_size")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature must be 0 or more and top_p must lie in (0, 1]")


@dataclass
class WithPolicy(FromPolicy, OnTask):
    """How a stage samples from a policy."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "unit_problems")
        at_least(self, 0, "limit")
