"""Outcome reward model: will this solution's answer be right, trained on final-answer checks alone (arXiv:2110.14168)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..config import option
from ..data_gen.rows import Solution
from ..data_gen.store import read_rows
from ..models.step_format import StepFormat
from .common import Examples, pick_rows, report_counts, run_trainer
from .reward import RewardArguments, finish_examples, target_example, train_reward


@dataclass
class ORMArguments(RewardArguments):
    """Trains an outcome reward model on Solution rows."""

    head: str = option("scalar", "two_class (softmax of two logits) or scalar (sigmoid of one)")
    token_level: bool = option(True, "the outcome is the target at every solution token; false: at the last one only")

    def __post_init__(self) -> None:
        super().__post_init__()


def orm_example(
    row: Solution, tokenizer: Any, step_format: StepFormat, args: ORMArguments, counts: Counter[str]
) -> dict[str, Any] | None:
    """The outcome as target at every token of the solution, or at the last separator alone."""
    if row.outcome == "timeout":
        counts["rows dropped: check timed out"] += 1  # nothing is known about its answer
        return None
    encoded = step_format.encode(tokenizer, row.prompt, row.steps)
    if not row.steps:
        counts["rows dropped: empty solution"] += 1
        return None
    if encoded.step_ends[-1] >= args.max_length:
        # The last token is where the solution is scored: a cut solution has another meaning.
        counts["rows dropped: too long"] += 1
        return None
    first = encoded.prompt_length if args.token_level else encoded.step_ends[-1]
    positions = range(first, encoded.step_ends[-1] + 1)
    return target_example(encoded, [float(row.right)] * len(positions), positions, args.max_length, counts)


def train(args: ORMArguments) -> dict[str, float]:
    """Trains an outcome reward model and writes its checkpoint; returns the final metrics."""

    def make_examples(path: str, tokenizer: Any, step_format: StepFormat) -> Examples:
        rows = pick_rows(read_rows(path, Solution), args.max_rows, args.seed)
        counts: Counter[str] = Counter()
        items = [e for row in rows if (e := orm_example(row, tokenizer, step_format, args, counts)) is not None]
        return finish_examples(path, items, counts, report_counts)

    return train_reward(args, make_examples, "outcome")


if __name__ == "__main__":
    run_trainer(ORMArguments, train, "stepladder.trainers.orm")
