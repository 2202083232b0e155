"""Value model and policy in one training: a language model with a value head, from the paths of search trees (AlphaMath)."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..basics import UserError
from ..config import at_least, option
from ..data_gen.rows import Tree
from ..models.loading import load_tokenizer
from ..models.step_format import StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import run_trainer
from .examples import check_rows_layout, policy_format, read_examples
from .joint import language_labels, train_joint
from .reward import target_example


@dataclass
class ValueArguments(StepladderArguments):
    """Trains a policy and its value head on single paths of search trees (Tree rows of data.value_paths)."""

    # Long solutions are wrong more often: batches of one length would be batches of like values.
    length_window: int = option(1, "optimiser steps sorted by length together; 1: each holds all lengths")

    beta: float = option(0.1, "weight of the value loss beside the language-model loss; 0 trains the policy alone")
    root: bool = option(True, "train the value of the empty prefix too, at the last prompt token")
    separator: str = option("\n", "text that ends a step, for a policy that has no step format yet")

    def __post_init__(self) -> None:
        self.check_given("model", "rows")
        at_least(self, 0, "beta")
        super().__post_init__()


def value_example(
    row: Tree, tokenizer: Any, step_format: StepFormat, args: ValueArguments, counts: Counter[str]
) -> dict[str, Any] | None:
    """Values at the end of each step that was judged, language-model labels if the solution is right; None if too long."""
    if any(node.parent != i - 1 for i, node in enumerate(row.nodes)):
        raise UserError(f"{row.problem_id}: its tree has branches; data.value_paths makes rows of one path each")
    steps = [node.step for node in row.nodes[1:]]
    if not steps:
        counts["rows dropped: empty solution"] += 1
        return None
    encoded = step_format.encode(tokenizer, row.prompt, steps)
    if encoded.step_ends[-1] >= args.max_length:
        # Cut, a right solution would teach the policy to stop early, and a wrong one would lose where it went wrong.
        counts["rows dropped: too long"] += 1
        return None
    targets = [node.value for node in row.nodes]
    positions = (encoded.root, *encoded.step_ends)
    chosen = slice(0 if args.root else 1, None)
    right = row.nodes[-1].outcome == "right"
    item = target_example(encoded, targets[chosen], positions[chosen], args.max_length, counts)
    if item is None:
        return None
    counts["right solutions"] += right
    length = len(item["input_ids"])
    labels = language_labels(encoded, len(step_format.separator_ids), tokenizer.eos_token_id)
    if right and length < len(encoded.ids):  # the last step was not judged: the solution is still learnt whole
        item["input_ids"] = list(encoded.ids)
        item["target"] += [0.0] * (len(encoded.ids) - length)
        item["target_mask"] += [False] * (len(encoded.ids) - length)
        length = len(encoded.ids)
    item["labels"] = labels if right else [-100] * length
    return item


def train(args: ValueArguments) -> dict[str, float]:
    """Trains a policy with a value head; writes the policy to output_dir and the value model to output_dir/value."""
    tokenizer = load_tokenizer(args.model)
    layout = policy_format(args, tokenizer, args.separator)
    check_rows_layout(args, layout)

    data, held_out = read_examples(args, Tree, lambda row, counts: value_example(row, tokenizer, layout, args, counts))
    return train_joint(
        args,
        data,
        held_out,
        tokenizer,
        score_format=layout.for_reward("scalar", "value"),
        score_loss=losses.value_mse,
        score_weight=args.beta,
        lm_weight=1.0,
        policy_format=layout,
    )


if __name__ == "__main__":
    run_trainer(ValueArguments, train, "stepladder.trainers.value")
