"""What all importers share: a record with its place, fields that say what is wrong with them, rows from a first error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ..basics import UserError, fold_seed
from .rows import Source, StepLabels

T = TypeVar("T")

UNKNOWN = "unknown"  # the outcome of a row whose data do not say whether the answer is right


class LeftOut(Exception):
    """A record of the format that gives no row; the message is what is counted."""


@dataclass
class Record:
    """One record, where it stands, and what an importer may need to read it."""

    values: Mapping[str, Any]
    where: str
    number: int  # from 0
    file: str  # the file's name without its ending
    seed: int
    dropped: Counter[str]
    rollouts: int = 0
    label_source: str = "monte_carlo"
    scores: list[list[float]] = field(default_factory=list)  # step scores of its rows, if the data bring some

    def take(self, name: str, kind: type[T], *, default: T | None = None) -> T:
        """The field `name`, of type `kind`. Raises UserError if it is missing or of another type."""
        if name not in self.values:
            if default is not None:
                return default
            raise UserError(f"{self.where}: field {name} is missing (found {', '.join(self.values)})")
        value = self.values[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            names = {
                "str": "text",
                "int": "a whole number",
                "bool": "true or false",
                "list": "a list",
                "dict": "an object",
            }
            raise self.wrong(name, names.get(kind.__name__, kind.__name__), value)
        return value

    def texts(self, name: str) -> list[str]:
        """The field `name`, a list of texts with at least one."""
        found = self.take(name, list)
        if not found or not all(isinstance(one, str) for one in found):
            raise self.wrong(name, "a list of texts", found)
        return found

    def wrong(self, name: str, expected: str, value: Any) -> UserError:
        """The sentence about a field that is not as expected."""
        return UserError(f"{self.where}, field {name}: expected {expected}, found {value!r:.80}")

    def source(self, policy: str, task: str) -> Source:
        """Where a row comes from: what wrote the steps, and the data set."""
        return Source(policy or "unknown", "none", task, self.seed)


def prompt_id(task: str, prompt: str) -> str:
    """An id that solutions of one problem share, for data without ids of problems."""
    return f"{task}/{fold_seed(0, prompt) % 10**12:012d}"


def labelled(
    record: Record,
    *,
    problem_id: str,
    prompt: str,
    steps: Sequence[str],
    wrong: Sequence[int],
    outcome: str,
    policy: str,
    task: str,
    gold: str = "",
    sample: int = 0,
    all_known: bool = False,
    label_source: Literal["monte_carlo", "human", "checker"] = "human",
) -> StepLabels:
    """A row from the 0-based indices of wrong steps, as one judgement a step.

    Of steps behind the first wrong one nothing is known, unless `all_known`: then those that are not named are right.
    """
    first = min(wrong, default=None)
    counts = [(0, 0)]
    for t in range(len(steps)):
        known = first is None or t <= first or all_known
        counts.append((int(t not in wrong), 1) if known else (0, 0))
    return StepLabels(
        problem_id=problem_id,
        prompt=prompt,
        gold=gold,
        sample=sample,
        steps=tuple(steps),
        n_correct=tuple(c for c, _ in counts),
        n_rollouts=tuple(n for _, n in counts),
        label_source=label_source,
        outcome=outcome,
        first_error=first,
        first_error_known=True,
        source=record.source(policy, task),
    )


def process_bench_record(record: dict[str, Any], where: str) -> dict[str, Any]:
    """The record, if it is one of ProcessBench's. Raises UserError saying what is wrong with it."""
    missing = [k for k in ("problem", "steps", "label") if k not in record]
    if missing:
        raise UserError(f"{where}: field {missing[0]} is missing (found {', '.join(record)})")
    if not isinstance(record["steps"], list) or not all(isinstance(s, str) for s in record["steps"]):
        raise UserError(f"{where}: steps must be a list of texts, found {record['steps']!r:.80}")
    if not isinstance(record["label"], int) or not -1 <= record["label"] < len(record["steps"]):
        raise UserError(f"{where}: label must lie between -1 and the last step, found {record['label']!r}")
    return record
