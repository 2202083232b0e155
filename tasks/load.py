"""Tasks from configs: `kind` says which, the other keys are its fields."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from ..basics import UserError
from ..config import build, unknown_key
from .base import Task
from .chain import ChainArith
from .gym import GymTask
from .text import TextTask, gsm8k, math_problems, multiple_choice, word_problems

CLASSES: dict[str, type] = {"chain": ChainArith, "text": TextTask, "reasoning_gym": GymTask}
PRESETS: dict[str, Callable[..., TextTask]] = {
    "gsm8k": gsm8k,
    "math": math_problems,
    "word_problems": word_problems,
    "multiple_choice": multiple_choice,
}


def load_task(config: Mapping[str, Any]) -> Task:
    """The task that a config names by its `kind`. Raises UserError for an unknown kind or field, naming the nearest known."""
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind in CLASSES:
        return build(CLASSES[kind], fields, f"task {kind}")  # type: ignore[return-value]
    if kind not in PRESETS:
        raise unknown_key(str(kind), [*CLASSES, *PRESETS], "task: kind")
    known = [*inspect.signature(PRESETS[kind]).parameters, *TextTask.__dataclass_fields__]
    known.remove("fields")
    for key in fields:
        if key not in known:
            raise unknown_key(key, known, f"task {kind}")
    try:
        return PRESETS[kind](**fields)
    except (ValueError, TypeError) as error:
        raise UserError(f"task {kind}: {error}") from error
