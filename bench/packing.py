"""Packing: trained tokens a second of fine-tuning with dialogues packed, grouped by length, and one a row as drawn.

    python bench/packing.py [--rows 384] [--max_length 256] [--batch 32]

All arms train the same dialogues with about as many tokens in a step. Padding is not counted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

from measure import Question, Work, bench

ARMS = ("packed", "like lengths", "as drawn")
OPTIONS = {"rows": 384, "max_length": 256, "batch": 32}


def question(args: argparse.Namespace) -> Question:
    return Question("packing", "Fine-tuning on dialogues", "tokens a second", ARMS)


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """One epoch of a lab model on solutions of one to twelve steps."""
    import torch
    from transformers import LlamaForCausalLM

    from stepladder.data_gen.solutions import demonstrations
    from stepladder.models.lab import lab_config, lab_tokenizer
    from stepladder.models.step_format import StepFormat
    from stepladder.tasks.chain import ChainArith
    from stepladder.trainers.examples import LikeLengths
    from stepladder.trainers.forward import trained_logits
    from stepladder.trainers.losses import aligned_cross_entropy
    from stepladder.trainers.sft import collate, dialogue_example, pack

    task = ChainArith(p=7, min_steps=1, max_steps=12, sizes={"train": args.rows})
    tokenizer = lab_tokenizer(6)
    step_format = StepFormat.for_policy(tokenizer, "\n")
    rows = demonstrations(task, task.problems("train"), seed=0).rows
    made = [dialogue_example(row, tokenizer, step_format, args.max_length)[0] for row in rows]
    items = [item for item in made if item is not None]
    tokens = sum(len(item["input_ids"]) for item in items)
    batch = args.batch
    if arm == "packed":
        singles, items = len(items), pack(items, args.max_length, "sequence")
        batch = max(round(batch * len(items) / singles), 1)
    torch.manual_seed(0)
    model = LlamaForCausalLM(lab_config(len(tokenizer)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def work() -> Work:
        lengths = [len(item["input_ids"]) for item in items]
        order = list(LikeLengths(lengths, batch, 0, group=arm == "like lengths"))
        for start in range(0, len(order), batch):
            inputs = collate([items[i] for i in order[start : start + batch]], tokenizer.pad_token_id)
            logits, labels, _ = trained_logits(model, inputs, pick=True)
            aligned_cross_entropy(logits, labels)[0].sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return Work(units=tokens, tokens=tokens, flops=6 * tokens * sum(p.numel() for p in model.parameters()))

    work()
    return work


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
