"""Process reward model: one score at the end of each step, trained on labels derived from counts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..config import option
from ..data_gen.rows import StepLabels, step_targets, td_targets
from ..models.loading import load_tokenizer
from ..models.step_format import LabelKind, StepFormat
from .common import run_trainer
from .examples import picked, read_examples
from .joint import language_labels
from .reward import RewardArguments, reward_format, target_example, train_reward


@dataclass
class PRMArguments(RewardArguments):
    """Trains a process reward model on StepLabels rows."""

    labels: Literal["hard", "soft", "threshold", "td"] = option(
        "hard",
        "from counts: hard (any continuation right), soft (share right), threshold, or td (shares that look ahead)",
    )
    threshold: float = option(0.0, "with labels: threshold, positive if the share is greater than this")
    after_first_zero: bool = option(False, "train on steps after the first step labelled 0 too")
    root: bool = option(False, "train the value of the empty prefix too, at the last prompt token")

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold must lie in [0, 1), found {self.threshold}")
        super().__post_init__()


def prm_example(
    row: StepLabels, tokenizer: Any, step_format: StepFormat, args: PRMArguments, counts: Counter[str]
) -> dict[str, Any] | None:
    """Targets at the last separator token of each step that has a label, with `root` at the last prompt token too; with
    `lambda_lm` also the labels of a language model, on the steps before the first that is more likely wrong than right."""
    kind = "soft" if args.labels == "td" else args.labels
    targets = step_targets(row, kind, args.threshold, after_first_zero=args.after_first_zero, root=args.root)
    if args.labels == "td":
        ahead = [*targets[:1], *td_targets(row)] if args.root else td_targets(row)
        targets = [None if share is None else value for share, value in zip(targets, ahead, strict=True)]
    encoded = step_format.encode(tokenizer, row.prompt, row.steps)
    positions = (encoded.root, *encoded.step_ends) if args.root else encoded.step_ends
    item = target_example(encoded, targets, positions, args.max_length, counts)
    if args.lambda_lm and item is not None:
        right = right_steps(targets[1:] if args.root else targets)
        learnt = encoded.step_ends[right - 1] + 1 if right else 0
        labels = language_labels(encoded, len(step_format.separator_ids), tokenizer.eos_token_id)
        item["labels"] = [label if i < learnt else -100 for i, label in enumerate(labels[: len(item["input_ids"])])]
    return item


def right_steps(targets: Sequence[float | None]) -> int:
    """Number of steps up to the last that is labelled right, before the first that is more likely wrong."""
    before = itertools.takewhile(lambda target: target is None or target > 0.5, targets)
    return max((t for t, target in enumerate(before, 1) if target is not None), default=0)


def train(args: PRMArguments) -> dict[str, float]:
    """Trains a process reward model and writes its checkpoint; returns the final metrics."""
    # A model that never saw what follows an error says nothing of later steps: the worst step stands for the solution.
    dropped = not args.after_first_zero
    rows = picked(args, args.rows, StepLabels)
    tokenizer = load_tokenizer(args.model)
    step_format = reward_format(args, tokenizer, label_kind(rows, args.labels), "min" if dropped else None)
    make = lambda row, counts: prm_example(row, tokenizer, step_format, args, counts)
    data = read_examples(args, StepLabels, make, rows=rows)
    return train_reward(args, data, tokenizer, step_format)


def label_kind(rows: Sequence[StepLabels], labels: str) -> LabelKind:
    """What the scores will mean, for step_format.json: `human` or `checker` if all rows are, else how counts became labels."""
    sources = {row.label_source for row in rows}
    if len(sources) == 1 and sources != {"monte_carlo"}:
        return sources.pop()  # type: ignore[return-value]
    return "soft" if labels == "td" else labels  # type: ignore[return-value]


if __name__ == "__main__":
    run_trainer(PRMArguments, train, "stepladder.trainers.prm")
