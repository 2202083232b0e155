"""Supervised fine-tuning of a policy on dialogues, with weights for samples and tokens and masked spans.

The loss is that of methods with critiques and self-correction too: one weighted, masked cross-entropy. TRL's SFT trainer (1.16)
has no weights, so this one stands on transformers' Trainer; without weights and with `reduction: token` both give the same
loss, which a test shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainerCallback

from ..basics import UserError, make_folder
from ..config import option
from ..data_gen.rows import Dialogue
from ..models.loading import load_tokenizer
from ..models.step_format import StepFormat
from . import losses
from .arguments import StepladderArguments
from .common import MetricsFile, ReadsForward, StepladderTrainer, fit, run_trainer, start_model
from .examples import Examples, check_rows_layout, counted, pad_batch, policy_format, read_examples, report_counts
from .forward import takes_positions, trained_logits


@dataclass
class SFTArguments(StepladderArguments):
    """Fine-tunes a policy on Dialogue rows."""

    reduction: Literal["sequence", "token"] = option(
        "sequence", "mean over sequence (each sequence weighs the same) or token"
    )
    packing: bool = option(False, "several dialogues in one sequence of up to max_length, none of which sees another")
    separator: str = option("\n", "text that ends a step, for a policy that has no step format yet")
    lab_model: dict[str, int] = option(
        {}, "start from a new lab model instead of `model`: width, layers, heads, largest_number"
    )

    def __post_init__(self) -> None:
        if not self.lab_model:
            self.check_given("model")
        self.check_given("rows")
        super().__post_init__()


def dialogue_example(
    row: Dialogue, tokenizer: Any, step_format: StepFormat, max_length: int
) -> tuple[dict[str, Any] | None, str]:
    """(example with input_ids, labels, token_weight and weight; what happened to the row).

    A one-turn dialogue (user, assistant) is laid out as the generator lays it out: the step format's prompt ids, the reply, the
    end-of-sequence token. Longer dialogues go through the chat template, and masks come from the offsets of the rendered text.
    A row that is too long gives (None, "too long").
    """
    if [m.role for m in row.messages] == ["user", "assistant"]:
        ids, labels, weights = _plain(row, tokenizer, step_format)
    else:
        ids, labels, weights = _chat(row, tokenizer, step_format)
    if len(ids) > max_length:
        return None, "too long"
    if all(label == -100 for label in labels[1:]):
        return None, "without a trained token"
    return {"input_ids": ids, "labels": labels, "token_weight": weights, "weight": row.weight}, "kept"


def _plain(row: Dialogue, tokenizer: Any, step_format: StepFormat) -> tuple[list[int], list[int], list[float]]:
    prompt = list(step_format.encode_prompt(tokenizer, row.messages[0].content))
    reply = row.messages[1]
    encoded = tokenizer(reply.content, add_special_tokens=False, return_offsets_mapping=True)
    ids = prompt + encoded["input_ids"] + [tokenizer.eos_token_id]
    labels, weights = [-100] * len(prompt), [0.0] * len(prompt)
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        trained = reply.train and not _masked(reply, start, end)
        labels.append(token if trained else -100)
        weights.append(reply.weight if trained else 0.0)
    labels.append(tokenizer.eos_token_id if reply.train else -100)
    weights.append(reply.weight if reply.train else 0.0)
    return ids, labels, weights


def _chat(row: Dialogue, tokenizer: Any, step_format: StepFormat) -> tuple[list[int], list[int], list[float]]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            f"row {row.problem_id}: a dialogue of {len(row.messages)} turns needs a chat template, and the tokenizer has none"
        )
    messages = [{"role": m.role, "content": m.content} for m in row.messages]
    turns = list(row.messages)
    if step_format.system is not None and turns[0].role != "system":
        messages.insert(0, {"role": "system", "content": step_format.system})
    shift = len(messages) - len(turns)
    if step_format.prompt_template != "{prompt}" and turns[0].role == "user":
        messages[shift]["content"] = step_format.prompt_template.replace("{prompt}", turns[0].content)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    labels, weights = [-100] * len(ids), [0.0] * len(ids)
    for number, turn in enumerate(turns):
        if not turn.train:
            continue
        # Where this turn's text begins: after everything before it, rendered with the header of an assistant turn.
        head = tokenizer.apply_chat_template(messages[: number + shift], tokenize=False, add_generation_prompt=True)
        place = _place(text[len(head) :], turn.content) if text.startswith(head) else None
        if place is None:
            raise UserError(
                f"row {row.problem_id}: the chat template does not keep turn {number} as written; it cannot be masked"
            )
        origin, content_end = len(head) + place[0], len(head) + place[1]
        # The template's end-of-turn token right behind the text is trained with it: it is how a policy learns to stop.
        closing = next((k for k, (s, _) in enumerate(offsets) if s >= content_end), None)
        for k, (start, end) in enumerate(offsets):
            # From the end of the header on, where a policy begins to write, be it with a space of the template's.
            inside = start >= len(head) and end <= content_end and end > start
            if (inside and not _masked(turn, start - origin, end - origin)) or (
                k == closing and ids[k] in _stops(tokenizer)
            ):
                labels[k], weights[k] = ids[k], turn.weight
    return ids, labels, weights


def _place(rendered: str, content: str) -> tuple[int, int] | None:
    """(where the content's first character lies or would lie, where the content ends) in what follows a turn's header.

    Templates may strip a turn, and put white space of their own before it. None if the content is not there.
    """
    if rendered.startswith(content):
        return 0, len(content)
    gap = len(rendered) - len(rendered.lstrip())
    origin = gap - (len(content) - len(content.lstrip()))
    kept = next((text for text in (content.lstrip(), content.strip()) if rendered[gap:].startswith(text)), None)
    return None if kept is None else (origin, gap + len(kept))


def _stops(tokenizer: Any) -> set[int]:
    return {i for i in (tokenizer.eos_token_id, *tokenizer.all_special_ids) if i is not None}


def _masked(message: Any, start: int, end: int) -> bool:
    return any(start < stop and end > begin for begin, stop in message.mask_spans)


def pack(items: Sequence[dict[str, Any]], size: int, reduction: str) -> list[dict[str, Any]]:
    """The examples in as few sequences of up to `size` tokens as best-fit decreasing finds, with positions that begin again.

    The divisors of the loss are those of the examples: with `sequence` each token's weight is divided by the trained tokens of its
    own example, so that a mean over packed tokens is the mean over examples.
    """
    # free[r]: the packs with room for r tokens; bit r of `rooms` says whether there are any.
    free: list[list[int]] = [[] for _ in range(size + 1)]
    packs: list[list[int]] = []
    rooms = 0
    for index in sorted(range(len(items)), key=lambda i: (-len(items[i]["input_ids"]), i)):
        length = len(items[index]["input_ids"])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = free[room].pop()
            if not free[room]:
                rooms ^= 1 << room
        else:
            room, number = size, len(packs)
            packs.append([])
        packs[number].append(index)
        free[room - length].append(number)
        rooms |= 1 << (room - length)
    return [_packed([items[i] for i in one], reduction) for one in packs]


def _packed(items: Sequence[dict[str, Any]], reduction: str) -> dict[str, Any]:
    made: dict[str, Any] = {"input_ids": [], "labels": [], "token_weight": [], "position_ids": []}
    for item in items:
        # What stands before the first token is another example: it does not predict it.
        labels = [-100, *item["labels"][1:]]
        trained = sum(label != -100 for label in labels)
        scale = item["weight"] / (trained if reduction == "sequence" else 1)
        made["input_ids"] += item["input_ids"]
        made["labels"] += labels
        made["token_weight"] += [scale * weight for weight in item["token_weight"]]
        made["position_ids"] += range(len(labels))
    return {**made, "weight": 1.0, "examples": len(items)}


class SFTTrainer(StepladderTrainer):
    """Weighted, masked cross-entropy (losses.weighted_sft)."""

    args: SFTArguments

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.pick = takes_positions(self.model)

    def count_items(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch["examples"].sum() if self.args.reduction == "sequence" else (batch["labels"][:, 1:] != -100).sum()

    def loss_sum(self, model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        if not self.masked:
            batch = {name: value for name, value in batch.items() if name != "attention_mask"}
        logits, labels, columns = trained_logits(model, batch, pick=self.pick)
        nats, mask = losses.aligned_cross_entropy(logits, labels)
        # In packs the weights hold the division by each example's own tokens.
        reduction = "token" if self.args.packing else self.args.reduction
        total = losses.weighted_sft(nats, mask, batch["weight"], batch["token_weight"][:, columns], reduction)
        correct = (logits.argmax(-1) == labels) & mask
        return total, {"token_accuracy": (correct.sum() / mask.sum().clamp(min=1)).item()}


def collate(items: Sequence[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch of SFT examples or packs, padded on the right."""
    fill = {"input_ids": pad_id, "labels": -100, "token_weight": 0.0}
    if "position_ids" in items[0]:
        # Attention finds the borders of a pack where positions begin again, if there is no mask; padding is beyond the last one.
        batch = pad_batch(items, {**fill, "position_ids": 0})
        del batch["attention_mask"]
    else:
        batch = pad_batch(items, fill)
    batch["weight"] = torch.tensor([item["weight"] for item in items])
    batch["examples"] = torch.tensor([item.get("examples", 1) for item in items])
    return batch


class PackingIsRight(TrainerCallback):
    """Compares logits of packed and of single examples before training, and stops if examples of a pack see each other.

    Which attention (or recurrence) keeps them apart is for the model to show, not for a list of names to say.
    """

    def __init__(self, trainer: SFTTrainer, items: Sequence[dict[str, Any]], pad_id: int) -> None:
        self.trainer, self.pad_id = trainer, pad_id
        self.items = sorted(items, key=lambda item: len(item["input_ids"]))[:2]

    def on_train_begin(self, args, state, control, **kwargs):
        model, alone = self.trainer.model_wrapped, []
        was_training = model.training
        model.train(False)
        run = lambda items: {n: v.to(args.device) for n, v in collate(items, self.pad_id).items()}
        with torch.no_grad(), self.trainer.compute_loss_context_manager():
            for item in self.items:
                batch = run([_packed([item], "token")])
                alone.append(
                    model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
                )
            batch = run([_packed(self.items, "token")])
            together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        model.train(was_training)
        expected = torch.cat(alone, 1).float()
        apart = (together.float() - expected).abs().max().item() / max(expected.abs().max().item(), 1.0)
        exact = together.dtype == torch.float32 and not (args.bf16 or args.fp16)
        if apart > (1e-3 if exact else 5e-2):
            name = type(self.trainer.accelerator.unwrap_model(self.trainer.model)).__name__
            raise UserError(
                f"packing: {name} does not keep packed dialogues apart (logits differ by {apart:.1%}): set packing: false"
            )


def train(args: SFTArguments) -> dict[str, float]:
    """Trains a policy and writes its checkpoint; returns the final metrics."""
    from transformers import AutoModelForCausalLM

    if args.lab_model:
        _new_lab_model(args)
    tokenizer = load_tokenizer(args.model)
    step_format = policy_format(args, tokenizer, args.separator)
    check_rows_layout(args, step_format)
    data, held_out = read_examples(
        args,
        Dialogue,
        lambda row, counts: counted(dialogue_example(row, tokenizer, step_format, args.max_length), counts),
    )
    singles = data.items
    if args.packing:
        data, held_out = _in_packs(data, args), held_out and _in_packs(held_out, args)
    trainer = SFTTrainer(
        model=start_model(AutoModelForCausalLM, args),
        args=args,
        train_dataset=data,
        eval_dataset=held_out,
        data_collator=lambda items: collate(items, tokenizer.pad_token_id),
        callbacks=_callbacks(args),
    )
    if args.packing and len(singles) > 1:
        trainer.add_callback(PackingIsRight(trainer, singles, tokenizer.pad_token_id))
    trainer.add_callback(ReadsForward(trainer))
    return fit(trainer, tokenizer, step_format)


def _in_packs(data: Examples, args: SFTArguments) -> Examples:
    packed = Examples(pack(data.items, args.max_length, args.reduction))
    report_counts("packing", {f"dialogues in {len(packed)} sequences": len(data)})
    return packed


def _callbacks(args: StepladderArguments) -> list[Any]:
    make_folder(args.output_dir)
    return [MetricsFile(args.output_dir)]


def _new_lab_model(args: SFTArguments) -> None:
    from transformers import LlamaForCausalLM

    from ..models.lab import lab_config, lab_tokenizer

    folder = Path(args.output_dir) / "start"
    sizes = dict(args.lab_model)
    if "largest_number" not in sizes:
        raise UserError("lab_model needs largest_number, the largest number the tokenizer knows (p - 1 for chain)")
    tokenizer = lab_tokenizer(sizes.pop("largest_number"))
    args.model = str(folder)
    # One process of a machine writes the files that all of them read.
    with args.main_process_first():
        if args.local_process_index == 0:
            torch.manual_seed(args.seed)
            LlamaForCausalLM(lab_config(len(tokenizer), **sizes)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            StepFormat.for_policy(tokenizer, args.separator).save(folder)


if __name__ == "__main__":
    run_trainer(SFTArguments, train, "stepladder.trainers.sft")
