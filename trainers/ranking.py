"""Ranking reward model: one scalar a step, trained on pairs of steps or paths that share a prefix (Tree-PLV, OmegaPRM)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..basics import UserError, make_folder
from ..config import at_least, option
from ..data_gen.rows import Pair
from ..models.loading import load_policy_format, load_tokenizer
from ..models.step_format import Aggregation, StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import MetricsFile, ReadsForward, StepladderTrainer, fit, run_trainer, start_model
from .examples import check_rows_layout, pad_batch, read_examples
from .joint import language_labels, save_joint, with_score_head


@dataclass
class RankingArguments(StepladderArguments):
    """Trains a ranking reward model on Pair rows."""

    compare: Literal["path", "step"] = option(
        "path", "path: at every step from where the two part; step: at the first of them alone"
    )
    target: Literal["preferred", "soft"] = option(
        "preferred", "preferred: the chosen wins; soft: wins with (1 + p - q) / 2, of shares p and q"
    )
    separator: str = option("\n", "text that ends a step, for a base model that has no step format yet")
    aggregation: Literal["", Aggregation] = option(
        "", "advised way to one score a solution: last, min, prod or mean; empty: last"
    )
    lambda_lm: float = option(
        0.0, "weight of a language-model loss on chosen sides worth over 0.5 beside it; 0 for none"
    )

    def __post_init__(self) -> None:
        self.check_given("model", "rows")
        at_least(self, 0, "lambda_lm")
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
    item: dict[str, Any] = {
        "input_ids": list(sides[0].ids[: both[-1][0] + 1]),
        "rejected_ids": list(sides[1].ids[: both[-1][1] + 1]),
        "chosen_ends": [a for a, _ in both],
        "rejected_ends": [b for _, b in both],
        "target": (1 + share) / 2 if args.target == "soft" else 1.0,
    }
    if args.lambda_lm:
        chosen = sides[0]
        labels = [-100] * chosen.prompt_length + list(chosen.ids[chosen.prompt_length :])
        if row.chosen_finished:
            labels = language_labels(chosen, len(step_format.separator_ids), tokenizer.eos_token_id)
        length = len(item["input_ids"])
        item["labels"] = labels[:length] if row.reward_chosen > 0.5 else [-100] * length
    return item


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of pairs: input_ids and attention_mask [B, 2, S], ends [B, 2, T] with compare_mask [B, T], target [B]; with
    `lambda_lm` labels of the chosen sides, as long as the longest of them."""
    both = [{"input_ids": ids} for item in items for ids in (item["input_ids"], item["rejected_ids"])]
    flat = pad_batch(both, {"input_ids": pad_id})
    most = max(len(item["chosen_ends"]) for item in items)
    padded = lambda ends: list(ends) + [0] * (most - len(ends))
    lengths = torch.tensor([len(item["chosen_ends"]) for item in items])
    batch = {
        "input_ids": flat["input_ids"].view(len(items), 2, -1),
        "attention_mask": flat["attention_mask"].view(len(items), 2, -1),
        "ends": torch.tensor([[padded(item["chosen_ends"]), padded(item["rejected_ends"])] for item in items]),
        "compare_mask": torch.arange(most) < lengths[:, None],
        "target": torch.tensor([item["target"] for item in items]).float(),
    }
    if "labels" in items[0]:
        batch["labels"] = pad_batch(items, {"labels": -100})["labels"]
    return batch


class RankingTrainer(StepladderTrainer):
    """The ranking loss summed over the compared steps of a pair, averaged over the pairs of the whole optimiser step.

    With `lambda_lm` the model has a language-model head too, and the mean cross-entropy of the chosen sides' tokens is added.
    """

    args: RankingArguments

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        pairs = torch.tensor(len(batch["target"]))
        if not self.args.lambda_lm:
            return pairs
        return torch.stack([pairs, (batch["labels"][:, 1:] != -100).sum().to(pairs.device)])

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        seen = self.padding_mask(batch)
        output = model(
            input_ids=batch["input_ids"].flatten(0, 1),
            attention_mask=None if seen is None else seen.flatten(0, 1),
            use_cache=False,
        )
        raw = output.scores if self.args.lambda_lm else output.logits
        scores = raw.float().squeeze(-1).unflatten(0, (-1, 2)).gather(2, batch["ends"])
        chosen, rejected, mask = scores[:, 0], scores[:, 1], batch["compare_mask"]
        loss = losses.step_ranking(chosen, rejected, mask, batch["target"]).sum()
        metrics = {
            "accuracy": (((chosen > rejected) & mask).sum() / mask.sum().clamp(min=1)).item(),
            "gap": (torch.where(mask, chosen - rejected, 0.0).sum() / mask.sum().clamp(min=1)).item(),
        }
        if not self.args.lambda_lm:
            return loss, metrics
        labels = batch["labels"]  # of the chosen sides, which are a pair's first
        nats, trained = losses.token_cross_entropy(output.logits[::2, : labels.shape[1]], labels)
        metrics["lm_loss"] = (nats.sum() / trained.sum().clamp(min=1)).item()
        return torch.stack([loss, self.args.lambda_lm * nats.sum()]), metrics


def train(args: RankingArguments) -> dict[str, float]:
    """Trains a ranking reward model and writes its checkpoint; returns the final metrics."""
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    tokenizer = load_tokenizer(args.model)
    step_format = load_policy_format(args.model, tokenizer, args.separator).for_reward(
        "scalar",
        "ranking",
        args.aggregation or None,
    )
    check_rows_layout(args, step_format)

    data, held_out = read_examples(
        args, Pair, lambda row, counts: ranking_example(row, tokenizer, step_format, args, counts)
    )
    make_folder(args.output_dir)
    if args.lambda_lm:
        model = start_model(AutoModelForCausalLM, args, with_score_head)
    else:
        model = start_model(AutoModelForTokenClassification, args, num_labels=1, classifier_dropout=0.0)
    trainer = RankingTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        callbacks=[MetricsFile(args.output_dir)],
    )
    trainer.add_callback(ReadsForward(trainer))
    save = functools.partial(save_joint, add_head=with_score_head) if args.lambda_lm else None
    return fit(trainer, tokenizer, step_format, save)


if __name__ == "__main__":
    run_trainer(RankingArguments, train, "stepladder.trainers.ranking")
