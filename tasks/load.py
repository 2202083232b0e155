"""Tasks from configs: `kind` says which, the other keys are its fields."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ..basics import UserError
from ..config import build, coerce, unknown_key
from .base import Task
from .text import TextTask, gsm8k, math_problems, multiple_choice, word_problems

PRESETS: dict[str, Callable[..., TextTask]] = {
    "gsm8k": gsm8k,
    "math": math_problems,
    "word_problems": word_problems,
    "multiple_choice": multiple_choice,
}
KINDS = ("chain", "text", *PRESETS, "reasoning_gym", "free")


def load_task(config: Mapping[str, Any]) -> Task:
    """The task that a config names by its `kind`, filled with its other keys.

    Raises UserError for an unknown kind or field, naming the nearest known one, and for a value of the wrong type. Data is
    read at the first call of `problems`.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"task must be keys and values, found {config!r}")
    values = dict(config)
    if "kind" not in values:
        raise UserError(f"task: kind is missing; known kinds are {', '.join(KINDS)}")
    kind = values.pop("kind")
    where = f"task {kind}"
    checked = coerce(values.pop("checked", False), bool, f"{where}: checked") if kind in ("text", *PRESETS) else False
    if kind == "text":
        return typing.cast(
            "Task", _checked(build(TextTask, values, where)) if checked else build(TextTask, values, where)
        )
    if kind == "chain":
        from .chain import ChainArith

        return typing.cast("Task", build(ChainArith, values, where))
    if kind == "reasoning_gym":
        from .gym import GymTask

        return typing.cast("Task", build(GymTask, values, where))
    if kind == "free":
        from .free import FreeText

        return typing.cast("Task", build(FreeText, values, where))
    if kind not in PRESETS:
        raise unknown_key(str(kind), KINDS, "task", "kind")
    preset = PRESETS[kind]
    hints = typing.get_type_hints(TextTask) | typing.get_type_hints(preset)
    known = [name for name in inspect.signature(preset).parameters if name != "overrides"]
    known += [name for name in TextTask.__dataclass_fields__ if name not in known]
    for key in values:
        if key not in known:
            raise unknown_key(str(key), known, where)
    try:
        made = preset(**{key: coerce(value, hints[key], f"{where}: {key}") for key, value in values.items()})
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {error}") from error
    return typing.cast("Task", _checked(made) if checked else made)


def _checked(task: TextTask) -> TextTask:
    """The task's problems that have a worked solution, with an exact check of each line."""
    from .worked import WorkedTask

    return WorkedTask(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
