"""Step-DPO: pairs a second on PRM800K, beside TRL's DPO trainer with its defaults, on the same token ids.

    python bench/step_dpo.py --policy FOLDER --file phase1_train_step_pairs.jsonl.gz [--pairs 32] [--precision bf16|no]

Every optimiser step holds all pairs, so that both arms see the same rows whatever their order: their losses, in `same`, must agree
(to 1e-4 with --precision no). Ours shares prefixes, groups lengths, reads references once and logits at answers alone.

Rows with both sides behind a prefix are padded in three parts. In batches of 8 of like lengths, 8 pairs (up to 512 tokens), 16
(768) and 32 (1024) are 4472, 8200 and 23408 tokens, of which 2486, 5251 and 16315 are real. Smaller batches alone do not mend
that: with 4 rows they are still 3264, 6840 and 19800. So on a CPU a batch is read in several forwards (`forward.in_pieces`):
2510 tokens for the first, 24.1 processor seconds a forward and backward in float32 instead of 40.7. Not tried: packing pairs
into one row, whose mask would hold all pairs of their tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from typing import Any

from measure import Question, Work, bench

ARMS = ("stepladder", "trl")


def pairs_of(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Any, Any]:
    """(examples of `--pairs` step pairs drawn from the file, tokenizer, step format)."""
    from stepladder.basics import read_jsonl
    from stepladder.config import build
    from stepladder.data_gen.rows import Pair, Source
    from stepladder.models.loading import load_policy_format, load_tokenizer
    from stepladder.trainers.dpo import DPOArguments, pair_example
    from stepladder.trainers.examples import pick_rows

    records = [record for _, record in read_jsonl(args.file)]
    source = Source("humans", "none", "prm800k", 0)
    rows = [
        Pair(str(i), r["prompt"], tuple(r["initial_reason_steps"]), (r["chosen"],), (r["rejected"],), 1.0, 0.0, 1, 0,
             False, False, source)
        for i, r in enumerate(records)
    ]  # fmt: skip
    tokenizer = load_tokenizer(args.policy)
    step_format = load_policy_format(args.policy, tokenizer, "\n")
    about = build(DPOArguments, {"model": "m", "rows": "r", "output_dir": "o", "max_length": args.max_length})
    made = [pair_example(row, tokenizer, step_format, about)[0] for row in pick_rows(rows, 2 * args.pairs, 0)]
    return [item for item in made if item is not None][: args.pairs], tokenizer, step_format


def schedule(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": args.batch, "max_steps": args.steps, "beta": 0.1,
        "gradient_accumulation_steps": args.pairs // args.batch, "learning_rate": 1e-5, "logging_steps": 1,
        "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "bf16": args.precision == "bf16", "use_cpu": True, "seed": 0,
    }  # fmt: skip


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """`--steps` optimiser steps, each on all pairs."""
    from transformers import AutoModelForCausalLM

    from stepladder.models.loading import load_model

    items, tokenizer, _ = pairs_of(args)
    folder = tempfile.mkdtemp()
    model = load_model(AutoModelForCausalLM, args.policy)
    trainer: Any
    if arm == "stepladder":
        from stepladder.config import build
        from stepladder.trainers.dpo import Collator, DPOArguments, DPOTrainer, Reference, forking_saves
        from stepladder.trainers.examples import Examples

        about = build(DPOArguments, {"model": args.policy, "rows": "r", **schedule(args, folder)})
        data = Examples(items)
        collator = Collator(tokenizer.pad_token_id, forking_saves(items, model.config.hidden_size))
        trainer = DPOTrainer(model=model, args=about, train_dataset=data, data_collator=collator)
        trainer.add_callback(Reference(trainer, {"train": data}, args.policy))
    else:
        from datasets import Dataset
        from trl import DPOConfig
        from trl import DPOTrainer as TRLTrainer

        class OfIds(TRLTrainer):
            """Takes rows that are token ids already: TRL's own tokenisation appends an end-of-sequence token to every step."""

            def _prepare_dataset(self, dataset: Any, *args: Any, **options: Any) -> Any:
                return dataset

        rows = [
            {
                "prompt_ids": item["input_ids"][0][: item["start"]],
                "chosen_ids": item["input_ids"][0][item["start"] :],
                "rejected_ids": item["input_ids"][1][item["start"] :],
            }
            for item in items
        ]
        trainer = OfIds(
            model=model,
            args=DPOConfig(max_length=None, **schedule(args, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    tokens = sum(sum(map(len, item["input_ids"])) for item in items)
    once = sum(sum(map(len, item["input_ids"])) - item["start"] for item in items)
    # The policy goes forward and backward in every step, the reference forward: there in every step, here once.
    read = 3 * args.steps * once + once if arm == "stepladder" else 4 * args.steps * tokens
    parameters = sum(p.numel() for p in model.parameters())

    def work() -> Work:
        trainer.train()
        losses = [round(log["loss"], 6) for log in trainer.state.log_history if "loss" in log]
        return Work(
            units=args.steps * len(items),
            tokens=args.steps * tokens,
            flops=2.0 * read * parameters,
            same=losses,
        )

    return work


if __name__ == "__main__":
    bench(
        Question("step_dpo", "Step-DPO on PRM800K pairs, SmolLM2-135M", "pairs a second", ARMS, targets={"trl": 4.0}),
        prepare, policy="models/smollm2", file="phase1_train_step_pairs.jsonl.gz", pairs=32, batch=8, steps=3,
        max_length=1024, precision="bf16",
    )  # fmt: skip
