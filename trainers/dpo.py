"""Preference training (DPO and step-DPO) of a policy on pairs of solutions or of single steps.

TRL's DPO trainer (1.16) tokenises joined text, ends every completion with an end-of-sequence token, has one label smoothing for
all pairs (and none for its sigmoid loss), and averages over micro-batches. Each of these is wrong for steps, so this one stands
on transformers' Trainer; on whole solutions both give the same losses, which a test shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from ..basics import UserError, fingerprint, fingerprint_path, make_folder, read_json, write_json
from ..config import option
from ..data_gen.rows import Pair
from ..models.loading import load_tokenizer
from ..models.step_format import StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import MetricsFile, ReadsForward, StepladderTrainer, fit, run_trainer, start_model
from .examples import Examples, check_rows_layout, counted, pad_batch, policy_format, read_examples, report_counts
from .forward import answer_logprobs, fork, fork_logprobs, in_pieces, takes_positions

REFERENCE = (
    "reference.json"  # in the output folder: log-probabilities of all pairs under the model that training starts from
)
# What a forward of its own costs, in tokens: some, before its products are large enough, and more the smaller the model's width.
FORWARD_TOKENS, FORWARD_WORK = 32, 1e6


@dataclass
class DPOArguments(StepladderArguments):
    """Trains a policy on Pair rows: the chosen side becomes more probable against the rejected one."""

    beta: float = option(0.1, "how much a nat of difference to the starting model counts; small values let it move far")
    loss: Literal["sigmoid", "ipo"] = option("sigmoid", "sigmoid (DPO) or ipo")
    label_smoothing: float = option(0.0, "chance that a preference is the wrong way round, in [0, 0.5)")
    visit_smoothing: bool = option(
        False, "take that chance from each pair's counts: min(n_rejected / (n_rejected + max(1, n_chosen)), 0.5)"
    )
    sft_weight: float = option(0.0, "weight of the chosen side's mean cross-entropy (iterative RPO's alpha)")
    margin: float = option(0.0, "leave out pairs whose rewards differ by less than this")
    separator: str = option("\n", "text that ends a step, for a policy that has no step format yet")
    share_prefix: bool | None = option(
        None, "read what both sides of a pair share once for both; null: where that is less work and the model can"
    )

    def __post_init__(self) -> None:
        self.check_given("model", "rows")
        if self.beta <= 0:
            raise ValueError(f"beta must be greater than 0, found {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must lie in [0, 0.5), found {self.label_smoothing}")
        if self.visit_smoothing and self.label_smoothing:
            raise ValueError("give label_smoothing or visit_smoothing, not both")
        if self.loss == "ipo" and (self.visit_smoothing or self.label_smoothing):
            raise ValueError("label smoothing belongs to the sigmoid loss")
        if self.sft_weight < 0 or self.margin < 0:
            raise ValueError("sft_weight and margin must be 0 or more")
        super().__post_init__()


def pair_example(
    row: Pair, tokenizer: Any, step_format: StepFormat, args: DPOArguments
) -> tuple[dict[str, Any] | None, str]:
    """(example with the ids of both sides, where they begin and the pair's smoothing; what happened to the row).

    Prompt and prefix are encoded once and the steps' ids are appended, so that both sides part exactly behind the prefix. A step
    that is not the last ends with the separator's ids; a finished side ends as the generator ends a solution, with the
    end-of-sequence token and no separator.
    """
    if abs(row.reward_chosen - row.reward_rejected) < args.margin - 1e-9:
        return None, "below the margin"
    if not row.chosen or not row.rejected:
        return None, "without a step on one side"
    shared = step_format.encode(tokenizer, row.prompt, row.prefix).ids
    sides = []
    for steps, finished in ((row.chosen, row.chosen_finished), (row.rejected, row.rejected_finished)):
        ids = step_format.encode_after(tokenizer, shared, steps).ids
        if finished:
            ids = (*ids[: -len(step_format.separator_ids)], tokenizer.eos_token_id)
        sides.append(ids)
    if sides[0] == sides[1]:
        return None, "alike on both sides"
    if max(map(len, sides)) > args.max_length:
        return None, "too long"
    smoothing = args.label_smoothing
    if args.visit_smoothing:
        smoothing = losses.visit_smoothing(row.n_chosen, row.n_rejected)
        if smoothing == 0.5:
            return None, "whose counts leave it open which side is better"
    return {"input_ids": [list(ids) for ids in sides], "start": len(shared), "smoothing": smoothing}, "kept"


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of B pairs: `input_ids`, `labels` and `attention_mask` [B, 2, S], chosen first, and what belongs to a pair [B]."""
    sides = [
        {"input_ids": ids, "labels": [-100] * item["start"] + ids[item["start"] :]}
        for item in items
        for ids in item["input_ids"]
    ]
    padded = pad_batch(sides, {"input_ids": pad_id, "labels": -100})
    batch = {name: value.unflatten(0, (len(items), 2)) for name, value in padded.items()}
    return _of_pairs(batch, items)


def collate_forked(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """The same pairs with what their sides share once: see `forward.fork`; and what belongs to a pair [B]."""
    return _of_pairs(fork([(item["input_ids"], item["start"]) for item in items], pad_id), items)


def _of_pairs(batch: dict[str, torch.Tensor], items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch["smoothing"] = torch.tensor([item["smoothing"] for item in items])
    if "reference" in items[0]:
        batch["reference"] = torch.tensor([item["reference"] for item in items])
    return batch


def forking_saves(items: Sequence[dict[str, Any]], width: int) -> bool:
    """Whether it is less work to read shared prefixes once, for a model of this width.

    With s shared tokens and sides of c and r it saves s tokens of about 24 width^2 FLOPs a layer, and s^2 of the 4 width FLOPs that
    a layer's attention spends on two tokens; it costs 2 c r of them, for each side is in the other's row.
    """
    saved = cost = 0.0
    for item in items:
        start = item["start"]
        chosen, rejected = (len(ids) - start for ids in item["input_ids"])
        saved += 6 * width * start + start**2
        cost += 2 * chosen * rejected
    return saved > cost


class DPOTrainer(StepladderTrainer):
    """A mean of losses.preference_loss or losses.ipo_loss over the pairs of an optimiser step."""

    args: DPOArguments

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pick = takes_positions(self.model)

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.tensor(len(batch["input_ids"]))

    def logprobs(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """(log-probabilities [B, 2] of the chosen and the rejected side, summed over their tokens; numbers of tokens [B, 2])."""
        if "branch" in batch:
            if self.args.world_size > 1 or self.args.device.type != "cpu":
                return fork_logprobs(model, batch, pick=self.pick)
            return self._in_pieces(model, batch)
        flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "labels", "attention_mask")}
        if not self.masked:
            del flat["attention_mask"]
        found, tokens = answer_logprobs(model, flat, pick=self.pick)
        return found.unflatten(0, (-1, 2)), tokens.unflatten(0, (-1, 2))

    def _in_pieces(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from several forwards. Rows are padded in each of their three parts, to twice their length and more; and on a
        CPU a forward of few rows takes no longer a token than one of many, unless the model is small."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        pieces = in_pieces(batch, FORWARD_TOKENS + FORWARD_WORK / config.get_text_config().hidden_size ** 2)
        parts = [fork_logprobs(model, piece, pick=self.pick) for _, piece in pieces]
        back = torch.tensor([row for rows, _ in pieces for row in rows]).argsort()
        found, tokens = (torch.cat(of_all)[back] for of_all in zip(*parts, strict=True))
        return found, tokens

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        found, tokens = self.logprobs(model, batch)
        ratio = found - batch["reference"]
        chosen, rejected = ratio.unbind(1)
        if self.args.loss == "sigmoid":
            loss = losses.preference_loss(chosen, rejected, self.args.beta, batch["smoothing"])
        else:
            loss = losses.ipo_loss(chosen, rejected, self.args.beta, *tokens.unbind(1))
        if self.args.sft_weight:
            loss = loss - self.args.sft_weight * found[:, 0] / tokens[:, 0]
        return loss.sum(), {
            "chosen_logprob": found[:, 0].mean().item(),
            "rejected_logprob": found[:, 1].mean().item(),
            "chosen_drift": chosen.mean().item(),
            "rejected_drift": rejected.mean().item(),
            "reward_margin": self.args.beta * (chosen - rejected).mean().item(),
            "accuracy": (chosen > rejected).float().mean().item(),
        }


class Collator:
    """Batches of pairs, with what the sides of a pair share once (`forked`) or twice."""

    def __init__(self, pad_id: int, forked: bool) -> None:
        self.pad_id, self.forked = pad_id, forked

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return (collate_forked if self.forked else collate)(items, self.pad_id)


class ForkingIsRight(TrainerCallback):
    """Before training, compares some pairs with shared prefixes and without, and no longer shares where the model makes it differ.

    Which attention takes a mask of its own is for the model to show, not for a list of names to say.
    """

    def __init__(self, trainer: DPOTrainer, collator: Collator, items: Sequence[dict[str, Any]]) -> None:
        self.trainer, self.collator, self.pairs = trainer, collator, len(items)
        self.items = sorted(items, key=lambda item: max(map(len, item["input_ids"])))[:3]

    def on_train_begin(self, args, state, control, **kwargs):
        told = self._difference(args)
        if not told:
            return
        if args.share_prefix:
            raise UserError(f"share_prefix: this model cannot read a prefix once for both sides ({told})")
        report_counts("pairs", {f"whose prefixes are read twice: {told}": self.pairs})
        self.collator.forked = False

    def _difference(self, args: DPOArguments) -> str:
        """What is wrong with shared prefixes; "" if nothing is."""
        trainer, model, found = self.trainer, self.trainer.model_wrapped, []
        was_training = model.training
        model.train(False)
        try:
            with torch.no_grad(), trainer.compute_loss_context_manager():
                for make in (collate, collate_forked):
                    batch = {n: v.to(args.device) for n, v in make(self.items, self.collator.pad_id).items()}
                    values, tokens = trainer.logprobs(model, batch)
                    found.append(values.float() / tokens)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:  # how a model refuses a mask
            return (str(error).splitlines() or [type(error).__name__])[0][:100]
        finally:
            model.train(was_training)
        apart = (found[0] - found[1]).abs().max().item()
        exact = next(model.parameters()).dtype == torch.float32 and not (args.bf16 or args.fp16)
        return "" if apart <= (1e-3 if exact else 0.1) else f"log-probabilities of a token differ by {apart:.2g} nats"


class Reference(TrainerCallback):
    """Gives every pair its log-probabilities under the starting model, computed once and kept in reference.json.

    They are computed by the model as it is built for training (sharded or not), before its first step; a resumed training, whose
    model has moved, reads them. With LoRA the reference is the base: adapters are off.
    """

    def __init__(self, trainer: DPOTrainer, datasets: dict[str, Examples], model: str) -> None:
        self.trainer, self.datasets = trainer, datasets
        content = fingerprint_path(model) if Path(model).is_dir() else model
        ids = {name: [[item["input_ids"], item["start"]] for item in data.items] for name, data in datasets.items()}
        self.key = fingerprint([content, ids])

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / REFERENCE
        kept = read_json(path) if path.is_file() else {}
        args.distributed_state.wait_for_everyone()  # nobody may write before all have looked
        if kept.get("key") != self.key:
            if state.global_step:
                raise UserError(
                    f"{path}: not of these rows and this model, and checkpoint {state.global_step} has moved away from its start; "
                    "remove the checkpoints to begin again"
                )
            kept = {"key": self.key, **{name: self._compute(data) for name, data in self.datasets.items()}}
            if state.is_world_process_zero:
                write_json(path, kept)
        for name, data in self.datasets.items():
            for item, values in zip(data.items, kept[name], strict=True):
                item["reference"] = values

    def _compute(self, data: Examples) -> list[list[float]]:
        trainer, args = self.trainer, self.trainer.args
        order = sorted(range(len(data)), key=lambda i: (data.lengths[i], i))
        size = args.per_device_eval_batch_size
        # Batches are the same for any number of processes; each has as many, for a sharded model runs in all of them at once.
        batches = [order[s : s + size] for s in range(0, len(order), size)]
        rounds = -(-len(batches) // args.world_size)
        mine = [batches[(r * args.world_size + args.process_index) % len(batches)] for r in range(rounds)]
        model = trainer.model_wrapped
        plain = trainer.accelerator.unwrap_model(trainer.model)
        off = plain.disable_adapter() if hasattr(plain, "disable_adapter") else contextlib.nullcontext()
        was_training = model.training
        model.train(False)
        found: dict[int, list[float]] = {}
        with torch.no_grad(), off:
            for indices in mine:
                batch = trainer.data_collator([data[i] for i in indices])
                batch = {name: value.to(args.device) for name, value in batch.items()}
                with trainer.compute_loss_context_manager():
                    values, _ = trainer.logprobs(model, batch)
                found.update(zip(indices, values.float().tolist(), strict=True))
        model.train(was_training)
        if args.world_size > 1:
            everything: list[Any] = [None] * args.world_size
            torch.distributed.all_gather_object(everything, found)
            found = {index: values for share in everything for index, values in share.items()}
        return [found[i] for i in range(len(data))]


def train(args: DPOArguments) -> dict[str, float]:
    """Trains a policy and writes its checkpoint; returns the final metrics."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(args.model)
    step_format = policy_format(args, tokenizer, args.separator)
    check_rows_layout(args, step_format)
    data, held_out = read_examples(
        args, Pair, lambda row, counts: counted(pair_example(row, tokenizer, step_format, args), counts)
    )
    make_folder(args.output_dir)
    model = start_model(AutoModelForCausalLM, args)
    width = model.config.get_text_config().hidden_size
    share = forking_saves(data.items, width) if args.share_prefix is None else args.share_prefix
    collator = Collator(tokenizer.pad_token_id, share)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=collator,
        callbacks=[MetricsFile(args.output_dir)],
    )
    if share:
        trainer.add_callback(ForkingIsRight(trainer, collator, data.items))
    trainer.add_callback(ReadsForward(trainer))  # before the reference is computed, in the same way
    datasets = {"train": data, **({"eval": held_out} if held_out is not None else {})}
    trainer.add_callback(Reference(trainer, datasets, args.model))
    return fit(trainer, tokenizer, step_format)


if __name__ == "__main__":
    run_trainer(DPOArguments, train, "stepladder.trainers.dpo")
