"""What every trainer shares: batches of like lengths, a loss divided by what it is a mean of, exact resume, whole checkpoints."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..basics import UserError, fold_seed, make_folder
from ..config import from_command_line, option
from ..models.loading import load_model, load_tokenizer
from ..models.step_format import StepFormat

HEADS = ("score", "classifier")  # names of the head in transformers' token-classification models
WHOLE = "whole.json"  # written into a checkpoint after everything else: without it the checkpoint was cut short


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

    output_dir: str = option("", "the folder that the checkpoint is written to")
    report_to: str | list[str] | None = option("none", "trackers: none, wandb, tensorboard ...")
    save_total_limit: int | None = option(1, "checkpoints kept while training")
    logging_steps: float = option(10, "optimiser steps between two lines of metrics.jsonl")
    remove_unused_columns: bool = option(False, "batches carry targets and weights that no model takes")
    lr_scheduler_type: Any = option("cosine", "learning-rate schedule")

    def __post_init__(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is missing: the folder that the checkpoint is written to")
        if self.max_length < 2:
            raise ValueError(f"max_length must be 2 or more, found {self.max_length}")
        if self.lora_r < 0:
            raise ValueError(f"lora_r must be 0 or more, found {self.lora_r}")
        super().__post_init__()


class Examples(Dataset):
    """Tokenised examples in memory, each a mapping with `input_ids`."""

    def __init__(self, items: Sequence[dict[str, Any]]) -> None:
        self.items = list(items)
        self.lengths = [len(item["input_ids"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]


class LikeLengths(Sampler[int]):
    """All indices once an epoch, shuffled, with like lengths beside each other; the order is a function of (seed, epoch).

    transformers' own length-grouped sampler draws from the global generator, so that a resumed epoch has another order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, *, group: bool = True, pool: int = 50) -> None:
        self.lengths, self.batch, self.seed, self.group, self.pool = lengths, batch, seed, group, pool
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(fold_seed(self.seed, "epoch", self.epoch) % 2**62)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.group:
            return iter(order)
        size = self.batch * self.pool
        grouped = [
            i
            for start in range(0, len(order), size)
            for i in sorted(order[start : start + size], key=lambda j: self.lengths[j])
        ]
        batches = [grouped[s : s + self.batch] for s in range(0, len(grouped), self.batch)]
        # The short last batch stays last; the others are shuffled so that a step's length says nothing about its time.
        whole = [b for b in batches if len(b) == self.batch]
        rest = [b for b in batches if len(b) < self.batch]
        shuffled = torch.randperm(len(whole), generator=generator).tolist()
        return iter([i for b in [*(whole[k] for k in shuffled), *rest] for i in b])


class StepladderTrainer(Trainer):
    """A Trainer whose loss is a sum divided by its number of items in the whole optimiser step.

    Subclasses give `count_items` (of a micro-batch) and `loss_sum` (the loss summed over those items). The division is by the
    items of all micro-batches and all processes, so that 8 x 1 equals 1 x 8 and two processes equal one.
    """

    args: StepladderArguments

    def __init__(self, *, train_dataset: Examples, args: StepladderArguments, **kwargs: Any) -> None:
        super().__init__(train_dataset=train_dataset, args=args, **kwargs)
        # The division below is the whole normalisation: transformers must neither divide by the accumulation steps nor leave
        # the item count out.
        self.model_accepts_loss_kwargs = True
        self._extra: dict[str, list[float]] = {}

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of items (labelled steps, sequences, tokens ...) of a micro-batch, a scalar."""
        raise NotImplementedError

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss summed over the micro-batch's items, metrics for the log)."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        items = torch.stack([self.count_items(b).to(device) for b in batch_samples]).sum().float()
        return self.accelerator.gather(items.reshape(1)).sum() if self.args.world_size > 1 else items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, metrics = self.loss_sum(model, inputs)
        items = num_items_in_batch if num_items_in_batch is not None else self.count_items(inputs)
        # Gradients are averaged over processes, while `items` counts those of all of them.
        processes = self.args.world_size if num_items_in_batch is not None else 1
        loss = total * processes / torch.as_tensor(items, device=total.device).clamp(min=1)
        if model.training:
            for name, value in metrics.items():
                self._extra.setdefault(name, []).append(value)
        return (loss, {"loss": loss}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update({name: sum(v) / len(v) for name, v in self._extra.items() if v})
            self._extra = {}
        super().log(logs, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths(data.lengths, batch, self.args.seed, group=self.args.like_lengths)


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl; after a resume, lines of steps that are trained again are dropped."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _step_of(line) <= state.global_step]
            self.path.write_text("".join(line + "\n" for line in lines if state.global_step))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).write_text("{}\n")


def _step_of(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a torn line belongs to no step


def newest_whole_checkpoint(folder: str) -> str | None:
    """The latest checkpoint in `folder` that was written to its end; None if there is none."""
    found = [p for p in Path(folder).glob("checkpoint-*") if (p / WHOLE).is_file()]
    return str(max(found, key=lambda p: int(p.name.split("-")[1]))) if found else None


def pad_batch(items: Sequence[dict[str, Any]], fill: dict[str, float]) -> dict[str, torch.Tensor]:
    """Tensors [B, longest] of the per-token fields in `fill`, padded on the right with its values, and `attention_mask`."""
    longest = max(len(item["input_ids"]) for item in items)
    batch = {}
    for name, value in fill.items():
        rows = [list(item[name]) + [value] * (longest - len(item[name])) for item in items]
        batch[name] = torch.tensor(rows)
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


def pick_rows(rows: Sequence[Any], limit: int, seed: int) -> list[Any]:
    """`limit` rows drawn with the seed, in their order; all if `limit` is 0."""
    if not limit or limit >= len(rows):
        return list(rows)
    generator = torch.Generator().manual_seed(fold_seed(seed, "rows") % 2**62)
    return [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:limit].tolist())]


def report_counts(what: str, counts: dict[str, int]) -> None:
    """Prints one line with what was kept and what was lost, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{what}: " + ", ".join(f"{n} {name}" for name, n in counts.items()), flush=True)


def start_model(auto_class: Any, args: StepladderArguments, **settings: Any) -> Any:
    """The model to train, from `args.model`, with `settings` of its configuration and LoRA adapters if asked."""
    if not args.model:
        raise UserError("model is missing: the checkpoint to start from")
    torch.manual_seed(args.seed)  # a new head is drawn when the model is loaded
    model = load_model(auto_class, args.model, dtype=args.dtype, settings=settings)
    if not args.lora_r:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    task = TaskType.TOKEN_CLS if "TokenClassification" in auto_class.__name__ else TaskType.CAUSAL_LM
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear",
        # A new head is trained in full (peft does that for its task type): adapters on it would be no head at all.
        exclude_modules=list(HEADS) if task == TaskType.TOKEN_CLS else None,
        task_type=task,
    )
    torch.manual_seed(args.seed)
    return get_peft_model(model, lora)


def fit(trainer: StepladderTrainer, tokenizer: Any, step_format: StepFormat) -> dict[str, float]:
    """Trains, continuing from the newest whole checkpoint, and writes the model, tokenizer and step format to output_dir.

    LoRA adapters are merged, so that the folder is a plain Hugging Face checkpoint either way.
    """
    args = trainer.args
    make_folder(args.output_dir)
    if trainer.args.report_to and "wandb" in trainer.args.report_to:
        _track_config(trainer, step_format)
    result = trainer.train(resume_from_checkpoint=newest_whole_checkpoint(args.output_dir))
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    save_final(trainer, tokenizer, step_format)
    return metrics


def _track_config(trainer: StepladderTrainer, step_format: StepFormat) -> None:
    import dataclasses

    class Config(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                import wandb

                if wandb.run is not None:
                    wandb.run.config.update({"step_format": dataclasses.asdict(step_format)}, allow_val_change=True)

    trainer.add_callback(Config())


def save_final(trainer: StepladderTrainer, tokenizer: Any, step_format: StepFormat) -> None:
    """Writes the finished checkpoint to output_dir."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        trainer.save_model(str(folder / "adapter"))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            _merge_adapter(trainer.args, type(model.get_base_model()), folder, model.get_base_model().config)
    else:
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        tokenizer.save_pretrained(folder)
        step_format.save(folder)
    trainer.accelerator.wait_for_everyone()


def _merge_adapter(args: StepladderArguments, model_class: Any, folder: Path, config: Any) -> None:
    # From disk and not from the trained object: under ZeRO-3 and FSDP no process holds whole weights.
    from peft import PeftModel

    torch.manual_seed(args.seed)
    base = load_model(model_class, args.model, dtype=args.dtype, config=config)
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder)


def run_trainer(config_class: type, train: Callable[[Any], Any], prog: str) -> None:
    """The main function of a trainer module, for `accelerate launch -m stepladder.trainers.NAME --config FILE`."""
    try:
        train(from_command_line(config_class, sys.argv[1:], prog))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


__all__ = [
    "Examples",
    "StepladderArguments",
    "StepladderTrainer",
    "fit",
    "load_tokenizer",
    "pad_batch",
    "pick_rows",
    "report_counts",
    "run_trainer",
    "start_model",
]
