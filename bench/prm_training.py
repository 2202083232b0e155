"""PRM training: real tokens a second on PRM800K, beside batches as drawn, padded to the longest, with gradient checkpointing.

    python bench/prm_training.py --policy FOLDER --file phase1_train_nested.jsonl.gz [--rows 64] [--precision bf16|no]

The baseline is transformers' Trainer with its own collator for token classification, as TRL's PRM trainer was. Every optimiser step
holds all rows, so that both arms see the same rows whatever their order: their losses, in `same`, must agree. The third arm has
batches as drawn without checkpointing: how much of the difference padding is.

What a micro-batch takes (4 solutions, 476 to 584 tokens, bf16, one thread, processor seconds, forward and backward): 11.0 with
a mask of padding; 8.8 without one, which is how it trains, with the same loss. Of the 8.8, products of matrices are about half and
attention 36 %: 106 ms a layer. Tried and not kept:

- One row a forward, so that nothing is padded: 8.6. Batches of like lengths hold only 6 to 14 % of padding, and small models lose.
- Attention in float32 inside bf16: 106 ms; torch's kernel for CPUs gains nothing from bf16. Keys and values repeated for their
  groups: 114 ms; with a mask 143 ms.
- Attention as plain products: 93 ms, but it keeps all pairs of tokens for the backward, 0.75 to 1.5 GB for these four solutions.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

from measure import Question, Work, bench

ARMS = ("stepladder", "padded, checkpointed", "padded")


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """`--steps` optimiser steps, each on all rows."""
    import torch
    from transformers import (
        AutoModelForTokenClassification,
        DataCollatorForTokenClassification,
        Trainer,
        TrainingArguments,
    )

    from stepladder.config import build
    from stepladder.data_gen.importers import prm800k
    from stepladder.models.loading import load_model, load_tokenizer
    from stepladder.trainers.common import ReadsForward
    from stepladder.trainers.examples import Examples
    from stepladder.trainers.prm import PRMArguments, prm_example
    from stepladder.trainers.reward import RewardTrainer, collate, reward_format

    folder = tempfile.mkdtemp()
    common = {
        "output_dir": folder, "per_device_train_batch_size": args.batch, "max_steps": args.steps, "learning_rate": 1e-5,
        "gradient_accumulation_steps": args.rows // args.batch, "logging_steps": 1, "lr_scheduler_type": "constant",
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0,
        "bf16": args.precision == "bf16", "use_cpu": True,
    }  # fmt: skip
    about = build(
        PRMArguments,
        {"model": args.policy, "rows": "r", "max_length": args.max_length, "after_first_zero": True, "separator": "\n\n",
         **common},
    )  # fmt: skip
    tokenizer = load_tokenizer(args.policy)
    step_format = reward_format(about, tokenizer, "human")
    rows = prm800k(args.file, limit=2 * args.rows, seed=0).rows
    made = [prm_example(row, tokenizer, step_format, about, Counter()) for row in rows]
    items = [item for item in made if item is not None][: args.rows]
    torch.manual_seed(0)
    model = load_model(
        AutoModelForTokenClassification,
        args.policy,
        settings={"num_labels": 2, "classifier_dropout": 0.0},
        new=("score",),
    )
    trainer: Any
    if arm == "stepladder":
        trainer = RewardTrainer(
            model=model,
            args=about,
            train_dataset=Examples(items),
            data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        )
        trainer.positive_class = step_format.positive_class
        trainer.add_callback(ReadsForward(trainer))
    else:
        if step_format.positive_class != 1:
            raise SystemExit("the baseline's labels are classes: the positive class must be 1")
        data = [
            {
                "input_ids": item["input_ids"],
                "labels": [int(t) if m else -100 for t, m in zip(item["target"], item["target_mask"], strict=True)],
            }
            for item in items
        ]
        tokenizer.padding_side = "right"

        def over_all(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
            """The mean over the labels of the whole step. transformers' own is a mean of each micro-batch, and with accumulation
            their sum (5.24): another loss on the same rows."""
            logits = outputs["logits"].float().flatten(0, 1)
            return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch

        trainer = Trainer(
            model=model,
            args=TrainingArguments(gradient_checkpointing="checkpointed" in arm, **common),
            train_dataset=data,
            compute_loss_func=over_all,
            data_collator=DataCollatorForTokenClassification(tokenizer),
        )
    tokens = sum(len(item["input_ids"]) for item in items)
    parameters = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)

    def work() -> Work:
        trainer.train()
        losses = [round(log["loss"], 6) for log in trainer.state.log_history if "loss" in log]
        return Work(
            units=args.steps * tokens,
            tokens=args.steps * tokens,
            flops=6.0 * args.steps * tokens * parameters,
            same=losses,
        )

    return work


if __name__ == "__main__":
    bench(
        Question(
            "prm_training", "PRM training on PRM800K, SmolLM2-135M", "real tokens a second", ARMS,
            targets={"padded, checkpointed": 2.2},
        ),
        prepare, policy="models/smollm2", file="phase1_train_nested.jsonl.gz", rows=64, batch=8, steps=2, max_length=1024,
        precision="bf16",
    )  # fmt: skip
