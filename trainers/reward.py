"""What the outcome and the process reward trainers share: examples with a target at some positions, and one trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..basics import make_folder
from ..config import at_least, option
from ..models.loading import load_policy_format
from ..models.step_format import Aggregation, Encoded, Head, LabelKind, StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import MetricsFile, ReadsForward, StepladderTrainer, fit, start_model
from .examples import Examples, check_rows_layout, pad_batch
from .joint import train_joint


@dataclass
class RewardArguments(StepladderArguments):
    """Trains a reward model: a token-classification head on a language model."""

    # Solutions are trained up to their first error: lengths, and so batches of one length, tell the labels.
    length_window: int = option(1, "optimiser steps sorted by length together; 1: each holds all lengths")

    head: Literal["two_class", "scalar"] = option(
        "two_class", "two_class (softmax of two logits) or scalar (sigmoid of one)"
    )
    loss: Literal["bce", "mse"] = option(
        "bce", "bce (cross-entropy, hard or soft targets) or mse (squared error of the probability)"
    )
    separator: str = option("\n", "text that ends a step, for a base model that has no step format yet")
    aggregation: Literal["", Aggregation] = option(
        "", "advised way to one score a solution: last, min, prod or mean; empty: what suits the labels"
    )
    lambda_lm: float = option(0.0, "weight of a language-model loss on what is right beside it; 0 for none")

    def __post_init__(self) -> None:
        self.check_given("model", "rows")
        at_least(self, 0, "lambda_lm")
        super().__post_init__()


def target_example(
    encoded: Encoded, targets: Sequence[float | None], positions: Sequence[int], max_length: int, counts: Counter[str]
) -> dict[str, Any] | None:
    """An example with targets[i] at positions[i], cut to max_length at a step's end; None if no target is left.

    Truncation drops whole steps, so that no labelled step loses its end token; lost labels are counted.
    """
    labelled = [(p, t) for p, t in zip(positions, targets, strict=True) if t is not None]
    kept = [(p, t) for p, t in labelled if p < max_length]
    counts["labels"] += len(kept)
    if len(kept) < len(labelled):
        counts["labels cut by max_length"] += len(labelled) - len(kept)
    if not kept:
        counts["rows dropped: every label cut" if labelled else "rows dropped: no label"] += 1
        return None
    counts["rows"] += 1
    length = kept[-1][0] + 1  # nothing behind the last label can be trained: it is not encoded
    target, mask = [0.0] * length, [False] * length
    for position, value in kept:
        target[position], mask[position] = value, True
    return {"input_ids": list(encoded.ids[:length]), "target": target, "target_mask": mask}


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of reward examples, padded on the right."""
    batch = pad_batch(items, {"input_ids": pad_id, "target": 0.0, "target_mask": False})
    batch["target"] = batch["target"].float()
    return batch


def score_loss(args: RewardArguments) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """The loss of log-odds, targets and mask that `args` name."""
    return losses.step_bce if args.loss == "bce" else losses.step_mse


class RewardTrainer(StepladderTrainer):
    """A loss at the labelled positions, read without a shift, averaged over the labels of the whole optimiser step."""

    args: RewardArguments
    positive_class: int | None = None

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["target_mask"].sum()

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        seen = self.padding_mask(batch)
        logits = model(input_ids=batch["input_ids"], attention_mask=seen, use_cache=False).logits
        mask, targets = batch["target_mask"], batch["target"]
        log_odds = losses.step_logit(logits.float(), self.positive_class)
        loss = score_loss(self.args)
        agree = ((log_odds > 0) == (targets > 0.5)) & mask
        labels = mask.sum().clamp(min=1)
        return loss(log_odds, targets, mask).sum(), {
            "accuracy": (agree.sum() / labels).item(),
            "target_mean": ((targets * mask).sum() / labels).item(),
        }


def reward_format(
    args: RewardArguments, tokenizer: Any, label_kind: LabelKind, aggregation: Aggregation | None = None
) -> StepFormat:
    """The layout of the model to start from, with the head and the labels; checked against that of the rows."""
    head: Head = "two_class" if args.head == "two_class" else "scalar"
    step_format = load_policy_format(args.model, tokenizer, args.separator).for_reward(
        head,
        label_kind,
        args.aggregation or aggregation,
    )
    check_rows_layout(args, step_format)
    return step_format


def train_reward(
    args: RewardArguments, data: tuple[Examples, Examples | None], tokenizer: Any, step_format: StepFormat
) -> dict[str, float]:
    """Trains a reward model on examples (and held-out ones) and writes its checkpoint; returns the final metrics."""
    from transformers import AutoModelForTokenClassification

    if args.lambda_lm:
        return train_joint(
            args,
            *data,
            tokenizer,
            score_format=step_format,
            score_loss=score_loss(args),
            score_weight=1.0,
            lm_weight=args.lambda_lm,
        )
    # Dropout on the head would make scores of the same text differ between training and use.
    labels: dict[str, Any] = {"num_labels": 2 if args.head == "two_class" else 1, "classifier_dropout": 0.0}
    make_folder(args.output_dir)
    trainer = RewardTrainer(
        model=start_model(AutoModelForTokenClassification, args, **labels),
        args=args,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        callbacks=[MetricsFile(args.output_dir)],
    )
    trainer.add_callback(ReadsForward(trainer))
    trainer.positive_class = step_format.positive_class
    return fit(trainer, tokenizer, step_format)
