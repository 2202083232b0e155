"""What all trainers are told."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from ..config import at_least, check_choices, option


@dataclass
class StepladderArguments(TrainingArguments):
    """What all trainers are told, beside everything that transformers.TrainingArguments takes.

    Defaults that differ from the parent's: no tracker unless asked, batches of like lengths, the last checkpoint kept.
    """

    model: str = option("", "the checkpoint to start from: a folder or a hub id")
    rows: str = option("", "rows to train on: a finished folder, a parquet or a JSON Lines file")
    eval_rows: str = option("", "rows to compute the evaluation loss on; empty for none")
    max_length: int = option(1024, "longest sequence in tokens; what does not fit is counted and printed")
    lora_r: int = option(0, "rank of LoRA adapters; 0 trains all weights")
    lora_alpha: int = option(32, "LoRA scale: updates are multiplied by lora_alpha / lora_r")
    lora_dropout: float = option(0.0, "dropout inside LoRA adapters")
    dtype: str = option("float32", "precision of the weights: float32, bfloat16, float16 or auto")
    max_rows: int = option(0, "use at most this many rows, drawn with the seed; 0 for all")
    like_lengths: bool = option(
        True, "put sequences of like lengths in one batch, so that padding is not what is trained"
    )
    length_window: int = option(
        50, "optimiser steps sorted by length together; 1: each holds all lengths, and only its micro-batches are alike"
    )

    output_dir: str = option("", "the folder that the checkpoint is written to")
    report_to: str | list[str] | None = option("none", "trackers: none, wandb, tensorboard ...")
    save_total_limit: int | None = option(1, "checkpoints kept while training")
    logging_steps: float = option(10, "optimiser steps between two lines of metrics.jsonl")
    remove_unused_columns: bool = option(False, "batches carry targets and weights that no model takes")
    lr_scheduler_type: Any = option("cosine", "learning-rate schedule")
    ddp_find_unused_parameters: bool | None = option(
        False, "DDP looks in every step for weights that took no part; only for models that have such"
    )

    def __post_init__(self) -> None:
        check_choices(self)
        if not self.output_dir:
            raise ValueError("output_dir is missing: the folder that the checkpoint is written to")
        at_least(self, 2, "max_length")
        at_least(self, 1, "length_window")
        at_least(self, 0, "lora_r")
        if not torch.accelerator.is_available() and (self.bf16 or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            # Not told this, transformers refuses bf16, and trains as many models as there are processes.
            self.use_cpu = True
        if self.use_cpu or not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # torch warns of it at every epoch where there is nothing to pin for
        if self.use_cpu and flag("ACCELERATE_USE_FSDP"):
            # With it only the first process loads weights; accelerate (1.15) shards nothing between CPU processes, and the
            # others would stay empty. TellEngine says what was built.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if flag("ACCELERATE_USE_DEEPSPEED") and not (self.bf16 or self.fp16):
            # transformers takes the precision of accelerate's configuration, and then refuses it for not being these.
            self.bf16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
            self.fp16 = os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16"
        super().__post_init__()

    def check_given(self, *names: str) -> None:
        """Raises ValueError for the first of the named fields that is empty."""
        for name in names:
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: {type(self).__dataclass_fields__[name].metadata['help']}")


def flag(name: str) -> bool:
    """Whether an environment variable says yes, as those that accelerate sets do."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
