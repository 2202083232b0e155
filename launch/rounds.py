"""Rounds: stages of a recipe that are repeated, each time from what the time before made.

    rounds:
      repeat: 3
      first: {improved: "@policy"}
      stages:
        samples: {do: data.solutions, policy: "@previous/improved"}
        chosen: {do: data.best_solutions, solutions: "@samples"}
        improved: {do: train.sft, model: "@policy", rows: "@chosen"}

stands for the stages samples-1, chosen-1, improved-1, samples-2 ... improved-3. Inside, ``@samples`` is that of the same round and
``@previous/improved`` that of the round before, or what `first` says in the first one. Behind the block ``@improved`` is the last
round's and ``@improved-1`` the first's. ``{round}`` in any text is the number of the round.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..basics import UserError, fold_seed
from ..config import unknown_key

PREVIOUS = "previous"


def is_block(values: Any) -> bool:
    """Whether an entry of `stages` is a block of repeated stages."""
    return isinstance(values, Mapping) and "repeat" in values


def block_of(stages: Mapping[str, Any], stage: str) -> str | None:
    """The block that has this stage; None if none has."""
    inside = lambda values: is_block(values) and stage in (values.get("stages") or {})
    return next((name for name, values in stages.items() if inside(values)), None)


def expand(stages: Mapping[str, Any], where: str, seed: int = 0) -> Iterator[tuple[str, Any, int | None]]:
    """(name, values, seed of its round) of every stage, with blocks written out; the seed is None outside of blocks."""
    last: dict[str, str] = {}  # stage of a block -> its name in the last round
    seen: set[str] = set()
    for name, values in stages.items():
        for made in _block(str(name), values, where, seed) if is_block(values) else [(str(name), values, None)]:
            if made[0] in seen:
                raise UserError(f"{where}: two stages are called {made[0]}")
            seen.add(made[0])
            yield made[0], _renamed(made[1], last), made[2]
        if is_block(values):
            for inner in values["stages"]:
                if inner in last or inner in stages:
                    raise UserError(f"{where}: two stages are called {inner}")
                last[str(inner)] = f"{inner}-{values['repeat']}"


def _block(name: str, block: Mapping[str, Any], where: str, seed: int) -> Iterator[tuple[str, Any, int | None]]:
    where = f"{where}, {name}"
    for key in block:
        if key not in ("repeat", "first", "stages"):
            raise unknown_key(str(key), ["repeat", "first", "stages"], where)
    rounds, first, stages = block["repeat"], block.get("first") or {}, block.get("stages")
    if type(rounds) is not int or rounds < 1:
        raise UserError(f"{where}: repeat must be a whole number of 1 or more, found {rounds!r}")
    if not isinstance(stages, Mapping) or not stages:
        raise UserError(f"{where}: stages is missing: the stages that are repeated")
    if not isinstance(first, Mapping) or not all(isinstance(value, str) for value in first.values()):
        raise UserError(f"{where}: first must say for a stage what it is before the first round, found {first!r}")
    for key in first:
        if key not in stages:
            raise unknown_key(str(key), list(map(str, stages)), f"{where}: first")
    for number in range(1, rounds + 1):
        own = {str(inner): f"{inner}-{number}" for inner in stages}
        for inner, values in stages.items():
            here = f"{where}, stage {inner}"
            made = _renamed(_previous(values, stages, first, number, here), own)
            yield own[str(inner)], _numbered(made, number), fold_seed(seed, name, number) % 2**31


def _each_text(value: Any, change: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _each_text(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_each_text(v, change) for v in value]
    return change(value) if isinstance(value, str) else value


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """The value with ``@name`` and ``@name/rest`` of `names` replaced."""

    def change(text: str) -> str:
        name, slash, rest = text[1:].partition("/")
        return f"@{names[name]}{slash}{rest}" if text.startswith("@") and name in names else text

    return _each_text(value, change)


def _previous(value: Any, stages: Mapping[str, Any], first: Mapping[str, str], number: int, where: str) -> Any:
    def change(text: str) -> str:
        if text != f"@{PREVIOUS}" and not text.startswith(f"@{PREVIOUS}/"):
            return text
        name, slash, rest = text.removeprefix(f"@{PREVIOUS}").removeprefix("/").partition("/")
        if name not in stages:
            raise unknown_key(
                text, [f"@{PREVIOUS}/{stage}" for stage in stages], f"{where}: reference to the round before"
            )
        if number > 1:
            return f"@{name}-{number - 1}{slash}{rest}"
        if name not in first:
            raise UserError(
                f"{where}: {text} is nothing in the first round; say `first: {{{name}: ...}}` beside `repeat`"
            )
        return first[name] + slash + rest

    return _each_text(value, change)


def _numbered(value: Any, number: int) -> Any:
    return _each_text(value, lambda text: text.replace("{round}", str(number)))
