"""Data with Monte-Carlo labels: Math-Shepherd, MATH-APS (flat and as trees), and the stepwise records of TRL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from ..basics import UserError
from .imported import Record, labelled, prompt_id
from .rows import Node, StepLabels, Tree

TAG = "ки"  # Math-Shepherd writes it behind every step


def math_shepherd(record: Record) -> Iterator[StepLabels]:
    """Math-Shepherd (arXiv:2312.08935): `input` with a tag behind each step, `label` the same text with + or - in its place.

    The labels are hard ones of 8 continuations a step whose counts were not published: a count of one stands for each, so that
    soft labels of these rows are the hard ones. The last label says whether the answer is right.
    """
    text, marked = record.take("input", str), record.take("label", str)
    *pieces, rest = text.split(TAG)
    if not pieces or rest.strip():
        raise record.wrong("input", f"steps that each end with {TAG}", text[-80:])
    labels, at = [], 0
    for piece in pieces:
        sign = marked[at + len(piece) : at + len(piece) + 1]
        if marked[at : at + len(piece)] != piece or sign not in ("+", "-"):
            raise record.wrong(
                "label", f"the text of input with + or - for each {TAG}", marked[at : at + len(piece) + 1]
            )
        labels.append(sign == "+")
        at += len(piece) + 1
    question, found, first = pieces[0].partition("Step 1:")
    if not found:
        raise record.wrong("input", 'a question and then "Step 1:"', text[:80])
    steps = [(found + first).strip(), *(piece.strip() for piece in pieces[1:])]
    task = record.take("task", str, default="")
    yield _counted(record, prompt_id("math_shepherd", question.strip()), question.strip(), steps, labels, task)


def _counted(
    record: Record, problem_id: str, prompt: str, steps: list[str], labels: list[bool], task: str
) -> StepLabels:
    return StepLabels(
        problem_id=problem_id,
        prompt=prompt,
        gold="",
        sample=record.number,
        steps=tuple(steps),
        n_correct=(0, *map(int, labels)),
        n_rollouts=(0, *(1 for _ in labels)),
        label_source="monte_carlo",
        outcome="right" if labels[-1] else "wrong",
        first_error=None,
        first_error_known=False,
        source=record.source("Math-Shepherd", f"math_shepherd {task}".strip()),
    )


def stepwise(record: Record) -> Iterator[StepLabels]:
    """TRL's stepwise records (trl-lib/math_shepherd, trl-lib/prm800k): prompt, completions, and a label for each.

    Labels are true or false, or shares in [0, 1], which `rollouts` turns into counts. `label_source` says what they are.
    """
    steps, labels = record.texts("completions"), record.take("labels", list)
    prompt = record.take("prompt", str)
    if len(labels) != len(steps):
        raise record.wrong("labels", f"one for each of {len(steps)} completions", labels)
    if not all(isinstance(v, (bool, int, float)) and 0 <= v <= 1 for v in labels):
        raise record.wrong("labels", "true, false or shares between 0 and 1", labels)
    n = record.rollouts or 1
    if n == 1 and any(v not in (0, 1) for v in labels):
        raise UserError(f"{record.where}: labels are shares: say of how many continuations with rollouts: N")
    if record.label_source == "monte_carlo":
        counts = [_count(record, float(v), n) for v in labels]
        yield StepLabels(
            problem_id=prompt_id("stepwise", prompt), prompt=prompt, gold="", sample=record.number, steps=tuple(steps),
            n_correct=(0, *counts), n_rollouts=(0, *(n for _ in counts)), label_source="monte_carlo",
            outcome="unknown", first_error=None, first_error_known=False, source=record.source("", "stepwise"),
        )  # fmt: skip
        return
    known = get_args(get_type_hints(StepLabels)["label_source"])
    if record.label_source not in known:
        raise UserError(f"label_source must be one of {', '.join(known)}, found {record.label_source!r}")
    yield labelled(
        record, problem_id=prompt_id("stepwise", prompt), prompt=prompt, steps=steps, sample=record.number,
        wrong=[t for t, v in enumerate(labels) if v < 1], outcome="unknown", policy="", task="stepwise",
        all_known=True, label_source=record.label_source,  # type: ignore[arg-type]
    )  # fmt: skip


def math_aps(record: Record) -> Iterator[Tree]:
    """MATH-APS of OpenR (OmegaPRM's data, arXiv:2406.06592), flat or as a tree, as a Tree; `data.tree_labels` makes labels of it.

    `mc_value` is a share of 32 continuations. A flat record lists prefixes with their values: the parent of one is the longest
    other prefix that it goes on from. A node without children whose text has a boxed answer is a finished solution, of which its
    value is the verdict.
    """
    question, gold = record.take("question", str), str(record.take("final_answer", str))
    written = record.values.get("reasoning_steps")
    if isinstance(written, Mapping):
        nodes = _nested(record, written)
    elif isinstance(written, list):
        nodes = _flat(record, question, written)
    else:
        raise record.wrong("reasoning_steps", "a list of prefixes or a tree", written)
    own = record.values.get("question_id", record.number)
    yield Tree(f"math_aps/{record.file}/{own}", question, gold, tuple(nodes), record.source("", "math_aps"))


def _nested(record: Record, tree: Mapping[str, Any]) -> list[Node]:
    nodes: list[Node] = []
    # A stack and not recursion: trees may be deeper than Python's own stack. Children keep their order, behind their parents.
    waiting: list[tuple[int, Any]] = [(-1, tree)]
    while waiting:
        parent, one = waiting.pop()
        if not isinstance(one, Mapping) or not isinstance(one.get("text"), str):
            raise record.wrong("reasoning_steps", "nodes with text, mc_value and children", one)
        children = one.get("children") or []
        nodes.append(_node(record, parent, one["text"], one.get("mc_value"), leaf=not children))
        waiting += [(len(nodes) - 1, child) for child in reversed(children)]
    return nodes


def _flat(record: Record, question: str, listed: list[Any]) -> list[Node]:
    shares: dict[str, Any] = {}
    for one in listed:
        if not isinstance(one, Mapping) or not isinstance(one.get("solution_prefix"), str):
            raise record.wrong("reasoning_steps", "prefixes with solution_prefix and mc_value", one)
        prefix = one["solution_prefix"]
        if not prefix.startswith(question):
            raise record.wrong("solution_prefix", "a text that begins with the question", prefix)
        if prefix in shares:
            record.dropped["prefixes that were listed before"] += 1
        shares.setdefault(prefix, one.get("mc_value"))
    shares.setdefault(question, None)
    prefixes = sorted(shares, key=len)
    parents = [
        max((i for i in range(k) if prefixes[k].startswith(prefixes[i])), key=lambda i: len(prefixes[i]), default=-1)
        for k in range(len(prefixes))
    ]
    return [
        _node(
            record,
            parent,
            prefix[len(prefixes[parent]) :] if parent >= 0 else prefix,
            shares[prefix],
            leaf=k not in parents,
        )
        for k, (prefix, parent) in enumerate(zip(prefixes, parents, strict=True))
    ]


def _node(record: Record, parent: int, text: str, value: Any, *, leaf: bool) -> Node:
    finished = leaf and parent >= 0 and value in (0, 1) and "\\boxed" in text
    rollouts = 0 if value is None else 1 if finished else record.rollouts or 32
    correct = 0 if value is None else _count(record, value, rollouts)
    outcome = ("right" if value == 1 else "wrong") if finished else None
    return Node(parent, text.strip() if parent >= 0 else "", correct, rollouts, 0, None, outcome, 0.0)


def _count(record: Record, value: Any, rollouts: int) -> int:
    """How many of `rollouts` a share stands for; a share that is no such fraction is rounded, and counted."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise record.wrong("mc_value", "a share between 0 and 1", value)
    count = round(value * rollouts)
    if abs(count - value * rollouts) > 1e-6:
        record.dropped[f"shares rounded to {rollouts} continuations (kept)"] += 1
    return count
