"""Ranking reward model: one scalar a step, trained on pairs of steps or paths that share a prefix (Tree-PLV, OmegaPRM)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch

from ..basics import UserError, make_folder
from ..config import option
from ..data_gen.rows import Pair
from ..models.loading import load_policy_format, load_tokenizer
from ..models.step_format import Aggregation, StepFormat
from . import losses
from .common import (
    MetricsFile,
    ReadsForward,
    StepladderArguments,
    StepladderTrainer,
    check_rows_layout,
    fit,
    pad_batch,
    read_examples,
    run_trainer,
    start_model,
)


@dataclass
class RankingArguments(StepladderArguments):
    """Trains a ranking reward model on Pair rows."""

    compare: str = option("path", "path: at every step from where the two part; step: at the first of them alone")
    target: str = option("preferred", "preferred: the chosen wins; soft: wins with (1 + p - q) / 2, of shares p and q")
    separator: str = option("\n", "text that ends a step, for a base model that has no step format yet")
    aggregation: str = option("", "advised way to one score a solution: last, min, prod or mean; empty: last")

    def __post_init__(self) -> None:
        self.check_given("model", "rows")
        if self.compare not in ("path", "step"):
            raise ValueError(f"compare must be path or step, found {self.compare!r}")
        if self.target not in ("preferred", "soft"):
            raise ValueError(f"target must be preferred or soft, found {self.target!r}")
        if self.aggregation not in ("", *get_args(Aggregation)):
            raise ValueError(
                f"aggregation must be {', '.join(get_args(Aggregation))} or empty, found {self.aggregation!r}"
            )
        super().__post_init__()


def ranking_example(
    row: Pair, tokenizer: Any, step_format: StepFormat, args: RankingArguments, counts: Counter[str]
) -> dict[str, Any] | None:
    """Both sides of a pair, and the positions at which their scores are compared; None if none is left.

    Compared are the ends of the steps from the first that differs, up to the end of the shorter side.
    """
    first = next((i for i, (a, b) in enumerate(zip(row.chosen, row.rejected, strict=False)) if a != b), None)
    if first is None:
        counts["rows dropped: the two never part"] += 1
        return None
    share = row.reward_chosen - row.reward_rejected
    if args.target == "soft" and abs(share) > 1:
        raise UserError(
            f"row {row.problem_id}: target: soft takes shares in [0, 1], "
            f"found rewards {row.reward_chosen:g} and {row.reward_rejected:g}"
        )
    sides = [step_format.encode(tokenizer, row.prompt, (*row.prefix, *side)) for side in (row.chosen, row.rejected)]
    ends = [one.step_ends[len(row.prefix) + first :] for one in sides]
    shared = min(map(len, ends)) if args.compare == "path" else 1
    both = [(a, b) for a, b in zip(ends[0][:shared], ends[1][:shared], strict=True) if max(a, b) < args.max_length]
    counts["comparisons"] += len(both)
    if len(both) < shared:
        counts["comparisons cut by max_length"] += shared - len(both)
    if not both:
        counts["rows dropped: every comparison cut"] += 1
        return None
    counts["rows"] += 1
    return {
        "input_ids": list(sides[0].ids[: both[-1][0] + 1]),
        "rejected_ids": list(sides[1].ids[: both[-1][1] + 1]),
        "chosen_ends": [a for a, _ in both],
        "rejected_ends": [b for _, b in both],
        "target": (1 + share) / 2 if args.target == "soft" else 1.0,
    }


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of pairs: input_ids and attention_mask [B, 2, S], ends [B, 2, T] with compare_mask [B, T], target [B]."""
    both = [{"input_ids": ids} for item in items for ids in (item["input_ids"], item["rejected_ids"])]
    flat = pad_batch(both, {"input_ids": pad_id})
    most = max(len(item["chosen_ends"]) for item in items)
    padded = lambda ends: list(ends) + [0] * (most - len(ends))
    lengths = torch.tensor([len(item["chosen_ends"]) for item in items])
    return {
        "input_ids": flat["input_ids"].view(len(items), 2, -1),
        "attention_mask": flat["attention_mask"].view(len(items), 2, -1),
        "ends": torch.tensor([[padded(item["chosen_ends"]), padded(item["rejected_ends"])] for item in items]),
        "compare_mask": torch.arange(most) < lengths[:, None],
        "target": torch.tensor([item["target"] for item in items]).float(),
    }


class RankingTrainer(StepladderTrainer):
    """The ranking loss summed over the compared steps of a pair, averaged over the pairs of the whole optimiser step."""

    args: RankingArguments

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(len(batch["target"]))

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        seen = self.padding_mask(batch)
        logits = model(
            input_ids=batch["input_ids"].flatten(0, 1),
            attention_mask=None if seen is None else seen.flatten(0, 1),
            use_cache=False,
        ).logits
        scores = logits.float().squeeze(-1).unflatten(0, (-1, 2)).gather(2, batch["ends"])
        chosen, rejected, mask = scores[:, 0], scores[:, 1], batch["compare_mask"]
        loss = losses.step_ranking(chosen, rejected, mask, batch["target"])
        return loss.sum(), {
            "accuracy": (((chosen > rejected) & mask).sum() / mask.sum().clamp(min=1)).item(),
            "gap": (torch.where(mask, chosen - rejected, 0.0).sum() / mask.sum().clamp(min=1)).item(),
        }


def train(args: RankingArguments) -> dict[str, float]:
    """Trains a ranking reward model and writes its checkpoint; returns the final metrics."""
    from transformers import AutoModelForTokenClassification

    tokenizer = load_tokenizer(args.model)
    step_format = load_policy_format(args.model, tokenizer, args.separator).for_reward(
        "scalar",
        "ranking",
        args.aggregation or None,  # type: ignore[arg-type]  # checked when it was given
    )
    check_rows_layout(args, step_format)

    data, held_out = read_examples(
        args, Pair, lambda row, counts: ranking_example(row, tokenizer, step_format, args, counts)
    )
    make_folder(args.output_dir)
    trainer = RankingTrainer(
        model=start_model(AutoModelForTokenClassification, args, num_labels=1, classifier_dropout=0.0),
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        callbacks=[MetricsFile(args.output_dir)],
    )
    trainer.add_callback(ReadsForward(trainer))
    return fit(trainer, tokenizer, step_format)


if __name__ == "__main__":
    run_trainer(RankingArguments, train, "stepladder.trainers.ranking")
