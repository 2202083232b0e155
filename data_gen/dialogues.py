"""Dialogues with a policy: many asked in one call, and what a row of one says of itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..models.engine import Engine, Request, Sample, Sampling
from ..models.step_format import StepFormat
from .rows import Dialogue


def ask(
    engine: Engine,
    step_format: StepFormat,
    dialogues: Sequence[Sequence[tuple[str, str]]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
) -> list[list[Sample]]:
    """Answers [B][len(seeds[b])] to dialogues, in one call."""
    requests = [
        Request(step_format.encode_dialogue(engine.tokenizer, turns), tuple(own))
        for turns, own in zip(dialogues, seeds, strict=True)
    ]
    return engine.generate(requests, sampling)


def text_of(engine: Engine, sample: Sample) -> str:
    """The text of a sample, without outer white space."""
    return engine.tokenizer.decode(sample.ids, skip_special_tokens=True).strip()


def meta_of(row: Dialogue) -> dict[str, Any]:
    """What a row says of itself."""
    return json.loads(row.meta)
