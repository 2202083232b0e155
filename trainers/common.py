"""What every trainer shares: a loss divided by what it is a mean of, exact resume, whole checkpoints, a clean end."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback

from ..basics import UserError, make_folder, write_atomic, write_json
from ..config import from_command_line
from ..models.loading import load_model
from ..models.step_format import StepFormat
from .arguments import StepladderArguments, flag
from .examples import Examples, LikeLengths

HEADS = ("score", "classifier")  # names of the head in transformers' token-classification models
FSDP2, FSDP1 = "FSDPModule (fully_shard)", "FullyShardedDataParallel"
ENGINE = "engine.json"  # in the output folder: what really trained the model
NOBODYS = "nobodys"  # in a micro-batch that another process has already trained on
WHOLE = "whole.json"  # written into a checkpoint after everything else: without it the checkpoint was cut short


class StepladderTrainer(Trainer):
    """A Trainer whose loss is a sum divided by its number of items in the whole optimiser step.

    Subclasses give `count_items` (of a micro-batch) and `loss_sum` (the loss summed over those items). The division is by the
    items of all micro-batches and all processes, so that 8 x 1 equals 1 x 8 and two processes equal one. A loss of several
    terms, each a mean of its own, gives a vector of sums and a vector of counts; the terms are divided, then added.
    """

    args: StepladderArguments
    masked = True  # whether models are told where padding is; see ReadsForward

    def __init__(self, *, train_dataset: Examples, args: StepladderArguments, **kwargs: Any) -> None:
        super().__init__(train_dataset=train_dataset, args=args, **kwargs)
        # The division below is the whole normalisation: transformers must neither divide by the accumulation steps nor leave
        # the item count out.
        self.model_accepts_loss_kwargs = True
        self._extra: dict[str, list[float]] = {}
        self._evaluated: list[torch.Tensor] = []  # (loss sum, items) of each evaluated micro-batch

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Number of items (labelled steps, sequences, tokens ...) of a micro-batch: a scalar, or [terms]."""
        raise NotImplementedError

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        """(loss summed over the micro-batch's items, a scalar or [terms]; metrics for the log)."""
        raise NotImplementedError

    def padding_mask(self, batch: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """The mask [..., S] of a batch that is padded on the right; None where the model can do without."""
        return batch["attention_mask"] if self.masked else None

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        # All micro-batches of an optimiser step are here at once, and the last of them are the last of the epoch.
        if batch_samples and (real := self._real_rows(batch_samples[-1], self.args.train_batch_size)) is not None:
            # One row at least: every process runs the model, and a row that is no one's counts nothing.
            kept = {name: value[: max(real, 1)] for name, value in batch_samples[-1].items()}
            batch_samples[-1] = {**kept, NOBODYS: torch.ones(1)} if real == 0 else kept
        items = torch.stack([self._own_items(b).to(device) for b in batch_samples]).sum(0).float()
        return self.accelerator.gather(items[None]).sum(0) if self.args.world_size > 1 else items

    def _own_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.count_items(batch) * (NOBODYS not in batch)

    def _real_rows(self, batch: dict[str, torch.Tensor], batch_size: int) -> int | None:
        """How many rows of a batch are its own; None: all of them.

        accelerate fills the last batches of the processes up with rows from the start of the epoch, so that all have one length.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        size = len(batch["input_ids"])
        real = min(max(state.remainder - self.args.process_index * batch_size, 0), size)
        return real if real < size else None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        nobodys = inputs.pop(NOBODYS, None) is not None
        total, metrics = self.loss_sum(model, inputs)
        total = total * (not nobodys)
        items = num_items_in_batch if num_items_in_batch is not None else self.count_items(inputs)
        # Gradients are averaged over processes, while `items` counts those of all of them.
        processes = self.args.world_size if num_items_in_batch is not None else 1
        loss = (total * processes / torch.as_tensor(items, device=total.device).clamp(min=1)).sum()
        if model.training:
            for name, value in metrics.items():
                self._extra.setdefault(name, []).append(value)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _prepare_input(self, data: Any) -> Any:
        # Under DeepSpeed the parent casts floats to the model's precision; soft labels and weights never enter the model.
        return data.to(self.args.device) if isinstance(data, torch.Tensor) else super()._prepare_input(data)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        real = self._real_rows(inputs, self.args.eval_batch_size)
        # One row at least: every process runs the model.
        kept = inputs if real is None else {name: value[: max(real, 1)] for name, value in inputs.items()}
        with torch.no_grad():
            total, items = self.loss_sum(model, kept)[0].float(), self.count_items(kept).to(self.args.device)
        self._evaluated.append(torch.stack([total, items.float()]) * (real != 0))
        return (total / items.clamp(min=1)).sum(), None, None

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As the parent's, with a loss that is divided by the items of all batches and processes."""
        self._evaluated = []
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total, items = self.accelerator.reduce(torch.stack(self._evaluated).sum(0))
        loss = (total / items.clamp(min=1)).sum().item()
        metrics = {**(output.metrics or {}), f"{metric_key_prefix}_loss": loss}
        return output._replace(metrics=metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            means = [sum(v) / len(v) for v in self._extra.values()]
            if self.args.world_size > 1 and means:
                means = self.accelerator.reduce(torch.tensor(means, device=self.args.device), "mean").tolist()
            logs.update(zip(self._extra, means, strict=True))
            self._extra = {}
        super().log(logs, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # transformers deletes older checkpoints before anything says that this one is whole; MetricsFile does it afterwards.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Resumed where it ended, in the middle of an epoch, transformers trains one step more before it looks.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LikeLengths(
            data.lengths, batch, self.args.seed, group=self.args.like_lengths, pool=self.args.length_window
        )


class ReadsForward(TrainerCallback):
    """Finds out before training whether padding behind a sequence can change what stands before it; lets masks go if it cannot.

    A mask of padding makes attention on most devices slower by far: it is spread over all pairs of tokens, and half of these are
    computed although nobody looks back at them. Which model needs it is for the model to show, not for a list of names to say.
    """

    def __init__(self, trainer: StepladderTrainer) -> None:
        self.trainer = trainer

    @torch.no_grad()
    def on_train_begin(self, args, state, control, **kwargs):
        trainer, model = self.trainer, self.trainer.model_wrapped
        config = trainer.accelerator.unwrap_model(trainer.model).config
        # Other attention has ways of its own with padding: some leave it out where there is a mask.
        if getattr(config, "_attn_implementation", None) != "sdpa":
            return
        ids = torch.arange(12, device=args.device)[None] % config.get_text_config().vocab_size
        other = ids.clone()
        other[0, -1] = ids[0, 0]
        was_training = model.training
        model.train(False)
        with trainer.compute_loss_context_manager():
            found, changed = (model(input_ids=one, use_cache=False).logits[0].float() for one in (ids, other))
        model.train(was_training)
        apart = (found - changed).abs().amax(1)
        # A head of zeros moves nowhere, and shows nothing.
        trainer.masked = not bool(apart[-1] > 0 and apart[:-1].max() <= 1e-3 * apart[-1])


class MetricsFile(TrainerCallback):
    """Appends what the trainer logs to metrics.jsonl, and marks checkpoints as whole.

    A checkpoint knows what was logged before it. A resumed run writes those lines again and goes on from them, so that its
    losses are those of an uninterrupted run.
    """

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / "metrics.jsonl"

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and self.path.exists():
            lines = [{"step": logs["step"], "epoch": logs.get("epoch"), **logs} for logs in state.log_history]
            write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in lines))

    def on_step_end(self, args, state, control, **kwargs):
        # What is averaged between two lines is in no checkpoint: a checkpoint in between would lose it.
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": state.global_step, "epoch": state.epoch, **logs}) + "\n")

    def on_save(self, args, state, control, **kwargs):
        args.distributed_state.wait_for_everyone()  # the others may still be writing their shares
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).write_text("{}\n")
            _drop_old_checkpoints(args.output_dir, args.save_total_limit, state.best_model_checkpoint)


def built_engine(model: torch.nn.Module) -> dict[str, Any]:
    """What trains `model`, read from the wrapped object itself: `engine` (class), `zero_stage` and `processes`."""
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    found: dict[str, Any] = {"engine": type(model).__name__, "zero_stage": None}
    stage: Any = getattr(model, "zero_optimization_stage", None)  # a DeepSpeedEngine's; DeepSpeed need not be installed
    if stage is not None:
        found["zero_stage"] = stage()
    elif any(isinstance(part, FSDPModule) for part in model.modules()):
        found["engine"] = FSDP2
    elif any(isinstance(part, FullyShardedDataParallel) for part in model.modules()):
        found["engine"] = FSDP1
    return {**found, "processes": torch.distributed.get_world_size() if parallel else 1}


def engine_line(found: dict[str, Any]) -> str:
    """What `built_engine` found, in words: `DeepSpeedEngine, ZeRO stage 3, 2 processes`."""
    stage = f", ZeRO stage {found['zero_stage']}" if found["zero_stage"] is not None else ""
    return f"{found['engine']}{stage}, {found['processes']} process{'es' if found['processes'] > 1 else ''}"


class TellEngine(TrainerCallback):
    """Prints what really trains the model and writes it to engine.json; stops if that is not what was asked for.

    accelerate and transformers go on in silence without what they cannot build: between CPU processes FSDP becomes plain data
    parallelism, and processes that found no backend train a model each.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        found = built_engine(self.trainer.model_wrapped)
        built = engine_line(found)
        if state.is_world_process_zero:
            print(f"engine: {built}", flush=True)
            write_json(Path(args.output_dir) / ENGINE, found)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > found["processes"]:
            raise UserError(
                f"{started} processes were started, but each would train a model of its own ({built}): "
                "to train on CPUs, set use_cpu: true"
            )
        if (flag("ACCELERATE_USE_FSDP") or args.fsdp) and found["engine"] not in (FSDP1, FSDP2):
            raise UserError(
                f"FSDP was asked for, but the model is not sharded ({built}): accelerate does so on GPUs only"
            )
        if (flag("ACCELERATE_USE_DEEPSPEED") or args.deepspeed) and found["zero_stage"] is None:
            raise UserError(f"DeepSpeed was asked for, but not built ({built}): unset ACCELERATE_USE_CPU")


def newest_whole_checkpoint(folder: str) -> str | None:
    """The latest checkpoint in `folder` that was written to its end; None if there is none."""
    found = [p for p in _checkpoints(folder) if (p / WHOLE).is_file()]
    return str(found[-1]) if found else None


def _checkpoints(folder: str) -> list[Path]:
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def _drop_old_checkpoints(folder: str, limit: int | None, best: str | None) -> None:
    if not limit or limit < 0:
        return
    for old in _checkpoints(folder)[:-limit]:
        if best is None or old.name != Path(best).name:
            (old / WHOLE).unlink(missing_ok=True)  # first: what is half deleted is not whole
            shutil.rmtree(old, ignore_errors=True)


def start_model(
    auto_class: Any, args: StepladderArguments, prepare: Callable[[Any], Any] | None = None, **settings: Any
) -> Any:
    """The model to train, from `args.model`, with `settings` of its configuration and LoRA adapters if asked.

    `prepare` may add a head to the model that was loaded, which trains in full beside adapters.
    """
    torch.manual_seed(args.seed)  # a new head is drawn when the model is loaded
    model = load_model(auto_class, args.model, dtype=args.dtype, settings=settings, new=HEADS)
    if prepare is not None:
        model = prepare(model)
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
        exclude_modules=list(HEADS) if task == TaskType.TOKEN_CLS or prepare is not None else None,
        modules_to_save=[name for name in HEADS if hasattr(model, name)] if prepare is not None else None,
        task_type=task,
    )
    torch.manual_seed(args.seed)
    return get_peft_model(model, lora)


def fit(
    trainer: StepladderTrainer,
    tokenizer: Any,
    step_format: StepFormat,
    save: Callable[[StepladderTrainer, Any, StepFormat], None] | None = None,
) -> dict[str, float]:
    """Trains, continuing from the newest whole checkpoint, and writes the model, tokenizer and step format to output_dir.

    LoRA adapters are merged, so that the folder is a plain Hugging Face checkpoint either way. `save` replaces `save_final`.
    """
    args = trainer.args
    make_folder(args.output_dir)
    if trainer.args.report_to and "wandb" in trainer.args.report_to:
        _track_config(trainer, step_format)
    trainer.add_callback(TellEngine(trainer))
    result = trainer.train(resume_from_checkpoint=newest_whole_checkpoint(args.output_dir))
    metrics = dict(result.metrics)
    if trainer.eval_dataset is not None:
        metrics.update(trainer.evaluate())
    (save or save_final)(trainer, tokenizer, step_format)
    return metrics


def _track_config(trainer: StepladderTrainer, step_format: StepFormat) -> None:

    class Config(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if state.is_world_process_zero:
                import wandb

                if wandb.run is not None:
                    wandb.run.config.update({"step_format": step_format.to_json()}, allow_val_change=True)

    trainer.add_callback(Config())


def save_final(trainer: StepladderTrainer, tokenizer: Any, step_format: StepFormat) -> None:
    """Writes the finished checkpoint to output_dir."""
    folder = Path(trainer.args.output_dir)
    model = trainer.accelerator.unwrap_model(trainer.model)
    if hasattr(model, "merge_and_unload"):
        trainer.save_model(str(folder / "adapter"))
        trainer.accelerator.wait_for_everyone()
        if trainer.is_world_process_zero():
            merge_adapter(trainer.args, plain_class(model.get_base_model()), folder, model.get_base_model().config)
    else:
        trainer.save_model(str(folder))
    if trainer.is_world_process_zero():
        for written in (folder, folder / "adapter"):
            (written / "training_args.bin").unlink(missing_ok=True)  # a pickle, and everything in it is in the recipe
        tokenizer.save_pretrained(folder)
        step_format.save(folder)
    trainer.accelerator.wait_for_everyone()


def plain_class(model: Any) -> Any:
    """The model's class as transformers wrote it: fully_shard puts a class of its own before it."""
    from torch.distributed.fsdp import FSDPModule

    return next(c for c in type(model).__mro__ if not issubclass(c, FSDPModule))


def merge_adapter(args: StepladderArguments, model_class: Any, folder: Path, config: Any) -> None:
    # From disk and not from the trained object: under ZeRO-3 and FSDP no process holds whole weights.
    from peft import PeftModel
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Under ZeRO-3 transformers would split what is loaded among all processes, and wait for the others for ever.
    unset_hf_deepspeed_config()
    torch.manual_seed(args.seed)
    base = load_model(model_class, args.model, dtype=args.dtype, config=config, new=HEADS)  # the adapter holds the head
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder)


def run_trainer(config_class: type, train: Callable[[Any], Any], prog: str) -> None:
    """The main function of a trainer module, for `accelerate launch -m stepladder.trainers.NAME --config FILE`."""
    try:
        train(from_command_line(config_class, sys.argv[1:], prog))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    end_process()


def end_process() -> None:
    """Ends one of several processes well once all is written, without the interpreter's own end; a process alone goes on.

    There, threads of distributed backends (seen with gloo under ZeRO-3, about once in ten runs) abort a process whose training
    went well, and the launcher calls the whole training failed.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    torch.distributed.barrier()
    # Trackers finish their runs here, and a vLLM takes leave of its process groups, for which they must be there still.
    atexit._run_exitfuncs()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
