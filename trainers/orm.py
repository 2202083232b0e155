"""Outcome reward model: will this solution's answer be right, trained on final-answer checks alone (arXiv:2110.14168)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from ..config import option
from ..data_gen.rows import Solution
from ..models.loading import load_tokenizer
from ..models.step_format import StepFormat
from .common import run_trainer
from .examples import read_examples
from .joint import language_labels
from .reward import RewardArguments, reward_format, target_example, train_reward


@dataclass
class ORMArguments(RewardArguments):
    """Trains an outcome reward model on Solution rows."""

    head: Literal["two_class", "scalar"] = option(
        "scalar", "two_class (softmax of two logits) or scalar (sigmoid of one)"
    )
    token_level: bool = option(True, "the outcome is the target at every solution token; false: at the last one only")


def orm_example(
    row: Solution, tokenizer: Any, step_format: StepFormat, args: ORMArguments, counts: Counter[str]
) -> dict[str, Any] | None:
    """The outcome as target at every token of the solution, or at the last separator alone; with `lambda_lm` also the labels of
    a language model, on right solutions."""
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
    item = target_example(encoded, [float(row.right)] * len(positions), positions, args.max_length, counts)
    if args.lambda_lm and item is not None:
        labels = language_labels(encoded, len(step_format.separator_ids), tokenizer.eos_token_id)
        # Of wrong solutions a language model would learn the errors. The paper has the gold solutions here.
        item["labels"] = labels if row.right else [-100] * len(labels)
    return item


def train(args: ORMArguments) -> dict[str, float]:
    """Trains an outcome reward model and writes its checkpoint; returns the final metrics."""

    tokenizer = load_tokenizer(args.model)
    step_format = reward_format(args, tokenizer, "outcome")
    data = read_examples(args, Solution, lambda row, counts: orm_example(row, tokenizer, step_format, args, counts))
    return train_reward(args, data, tokenizer, step_format)


if __name__ == "__main__":
    run_trainer(ORMArguments, train, "stepladder.trainers.orm")
