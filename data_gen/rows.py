"""Rows: the frozen records that generators write and trainers read, with their exports to other libraries' formats.

Schemas are the dataclasses below. Rows are JSON lines while they are being made and parquet when finished
(`data_gen.store`), and `datasets.load_dataset` reads both.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..basics import UserError


@dataclass(frozen=True)
class Source:
    """Where a row comes from: enough to explain itself a year later."""

    policy: str  # the checkpoint's folder or hub id
    engine: str
    task: str
    seed: int


@dataclass(frozen=True)
class Solution:
    """One sampled (or reference) solution of one problem, with its verdict.

    `token_ids` are the ids as sampled, prompt excluded, and `step_ends[t]` counts those up to and including the separator
    of step t, so that any prefix can be continued without tokenising text again. Both are empty for imported solutions.
    """

    problem_id: str
    prompt: str
    gold: str
    sample: int  # which sample of this problem, from 0
    steps: tuple[str, ...]
    text: str
    answer: str | None
    outcome: str  # a tasks.base.Outcome
    stop: str  # a models.engine.StopReason
    token_ids: tuple[int, ...]
    step_ends: tuple[int, ...]
    logprob: float  # sum over the sampled tokens, nats, under the sampling distribution
    source: Source

    @property
    def right(self) -> bool:
        return self.outcome == "right"


@dataclass(frozen=True)
class StepLabels:
    """Counts of right continuations from every prefix of a solution; every label is derived from them.

    `n_correct[t]` of `n_rollouts[t]` continuations from the prefix of t steps ended right; index 0 is the empty prefix, so
    both have len(steps) + 1 entries. `n_rollouts[t] == 0` means that nothing is known about that prefix. One human or
    checker judgement of a step is a count of one.
    """

    problem_id: str
    prompt: str
    gold: str
    sample: int
    steps: tuple[str, ...]
    n_correct: tuple[int, ...]
    n_rollouts: tuple[int, ...]
    label_source: Literal["monte_carlo", "human", "checker"]
    outcome: str  # a tasks.base.Outcome, or "unfinished" for the beginning of a solution
    first_error: int | None  # 0-based, by an exact checker or a person; None if there is none or it is not known
    first_error_known: bool
    source: Source

    def __post_init__(self) -> None:
        if not len(self.n_correct) == len(self.n_rollouts) == len(self.steps) + 1:
            raise ValueError(
                f"{len(self.steps)} steps need {len(self.steps) + 1} counts (the empty prefix is the first), "
                f"found {len(self.n_correct)} n_correct and {len(self.n_rollouts)} n_rollouts"
            )
        if any(not 0 <= c <= n for c, n in zip(self.n_correct, self.n_rollouts, strict=True)):
            raise ValueError("every n_correct must lie between 0 and its n_rollouts")


@dataclass(frozen=True)
class Node:
    """A node of a `Tree`: one step. The root has parent -1 and an empty step."""

    parent: int
    step: str
    n_correct: int
    n_rollouts: int
    visits: int
    value: float | None  # running mean of what was backed up, in the tree's own scale
    outcome: str | None  # of a finished solution that ends here
    logprob: float


@dataclass(frozen=True)
class Tree:
    """A search tree over steps of one problem; `nodes[0]` is the root and parents come before children."""

    problem_id: str
    prompt: str
    gold: str
    nodes: tuple[Node, ...]
    source: Source


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prefix, the first preferred. An empty prefix makes it a pair of whole solutions.

    `reward_*` are on the scale of whatever judged them. `chosen_finished`: the continuation ends the solution, so that an
    end-of-sequence token belongs after it; an intermediate step must not learn to stop.
    """

    problem_id: str
    prompt: str
    prefix: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    reward_chosen: float
    reward_rejected: float
    n_chosen: int
    n_rejected: int
    chosen_finished: bool
    rejected_finished: bool
    source: Source


@dataclass(frozen=True)
class Message:
    """One turn. `train`: it contributes labels, `weight` multiplies its loss, `mask_spans` are character spans [start, end)
    inside it that do not train."""

    role: str
    content: str
    train: bool = False
    weight: float = 1.0
    mask_spans: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Dialogue:
    """Messages for the one weighted, masked fine-tuning loss: plain solutions, critiques, refinements, self-correction."""

    problem_id: str
    kind: str  # solve, draft (nothing trains), critique, refine, revise, selfcorrect
    messages: tuple[Message, ...]
    meta: str  # free JSON, kept as text so that every row has one schema
    source: Source
    weight: float = 1.0  # multiplies the loss of the whole dialogue

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise ValueError(f"weight must be 0 or more, found {self.weight}")


Row = Solution | StepLabels | Tree | Pair | Dialogue
ROW_TYPES: dict[str, type] = {t.__name__: t for t in (Solution, StepLabels, Tree, Pair, Dialogue)}
R = TypeVar("R")


def to_record(row: Any) -> dict[str, Any]:
    """The row as plain JSON values."""
    return dataclasses.asdict(row)


def from_record(row_type: type[R], record: Mapping[str, Any], where: str = "row") -> R:
    """The row of `row_type` in a JSON record. Raises UserError naming `where`, the field, what was found and expected."""
    return _build(row_type, record, where)


def _build(row_type: type[R], record: Any, where: str) -> R:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: expected a {row_type.__name__} object, found {type(record).__name__}")
    hints = typing.get_type_hints(row_type)
    values = {}
    for field in dataclasses.fields(row_type):  # type: ignore[arg-type]
        if field.name in record:
            values[field.name] = _convert(hints[field.name], record[field.name], f"{where}, field {field.name}")
        elif field.default is dataclasses.MISSING:
            raise UserError(
                f"{where}: field {field.name} of {row_type.__name__} is missing (found {', '.join(record) or 'nothing'})"
            )
    try:
        return row_type(**values)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, where)
    if origin is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise UserError(f"{where}: expected a list, found {type(value).__name__}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], item, where) for item in value)
        if len(value) != len(args):
            raise UserError(f"{where}: expected {len(args)} values, found {len(value)}")
        return tuple(_convert(a, item, where) for a, item in zip(args, value, strict=True))
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}: expected one of {', '.join(map(str, args))}, found {value!r}")
        return value
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}: expected {hint.__name__}, found {value!r}")
    return value


# --- labels from counts ------------------------------------------------------------------------------------------------


def step_targets(
    row: StepLabels, kind: str, threshold: float = 0.0, *, after_first_zero: bool = True, root: bool = False
) -> list[float | None]:
    """Training targets in [0, 1] for each step, with `root` that of the empty prefix in front; None where nothing is known.

    `soft`: n_correct / n_rollouts (Math-Shepherd SE, arXiv:2312.08935). `hard`: 1 if any continuation ended right (HE).
    `threshold`: 1 if the share is greater than `threshold`. `human` and `checker` counts are one judgement, so all three
    give the same. With `after_first_zero` False, targets after the first 0 are dropped, as Qwen's PRM does
    (arXiv:2501.07301 section 2). The empty prefix is no
    step: its target is never dropped, and drops none.
    """
    if kind not in ("soft", "hard", "threshold", "human", "checker"):
        raise ValueError(f"label kind must be hard, soft, threshold, human or checker, found {kind!r}")
    targets: list[float | None] = []
    for correct, rollouts in zip(row.n_correct, row.n_rollouts, strict=True):
        share = correct / rollouts if rollouts else None
        if share is None:
            targets.append(None)
        elif kind == "soft":
            targets.append(share)
        elif kind == "threshold":
            targets.append(float(share > threshold))
        else:
            targets.append(float(correct > 0))
    if not after_first_zero and 0.0 in targets[1:]:
        keep = targets.index(0.0, 1) + 1
        targets[keep:] = [None] * (len(targets) - keep)
    return targets if root else targets[1:]


def td_targets(
    row: StepLabels, *, alpha: float = 0.5, horizon: int = 3, shallow: int = 3, tolerance: float = 0.05
) -> list[float | None]:
    """Soft targets in which early steps look ahead (ReARTeR's TD look-ahead, arXiv:2501.07861); None where nothing is known.

    With r_t the share of step t, a target of one of the first `shallow` steps is r_t moved towards what follows: from the last of
    up to `horizon` further steps backwards, v <- r_i + alpha (v - r_i). The look-ahead ends early before the first step whose share
    rises by less than `tolerance` over the one before (a fall is such a step), and before a step of which nothing is known. The
    other targets are `soft`. The paper does this to scores at test time; here the counts take their place.
    """
    shares = step_targets(row, "soft")
    targets = list(shares)
    for t, share in enumerate(shares[:shallow]):
        if share is None:
            continue
        chain = [share]
        for following in shares[t + 1 : t + 1 + horizon]:
            if following is None or following - chain[-1] < tolerance:
                break
            chain.append(following)
        value = chain.pop()
        while chain:
            here = chain.pop()
            value = here + alpha * (value - here)
        targets[t] = value
    return targets


# --- exports -----------------------------------------------------------------------------------------------------------


def to_trl_stepwise(row: StepLabels, kind: str = "hard") -> dict[str, Any]:
    """TRL's stepwise format: prompt, completions, labels. Steps from the first unknown label on are left out."""
    targets = step_targets(row, kind)
    known = targets.index(None) if None in targets else len(targets)
    return {
        "prompt": row.prompt,
        "completions": list(row.steps[:known]),
        "labels": [t == 1.0 if kind != "soft" else t for t in targets[:known]],
    }


def to_trl_preference(row: Pair, separator: str) -> dict[str, str]:
    """TRL's preference format: prompt, chosen, rejected. A shared prefix moves into the prompt."""
    joined = lambda steps: "".join(step + separator for step in steps)
    return {
        "prompt": row.prompt + joined(row.prefix),
        "chosen": joined(row.chosen),
        "rejected": joined(row.rejected),
    }


def to_messages(row: Dialogue) -> dict[str, Any]:
    """TRL's conversational format: messages with role and content."""
    return {"messages": [{"role": m.role, "content": m.content} for m in row.messages]}
