"""Forward passes of policies that compute logits only where something is trained.

With a large vocabulary the logits of a long prompt cost more memory than the rest of the model, and nobody reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.prefix_cache import cache_keyword, supports_prefix_cache
from . import losses


def takes_positions(model: Any) -> bool:
    """Whether a causal language model (not wrapped for training) can be told where to compute logits."""
    if hasattr(model, "get_base_model"):  # peft's forward takes anything
        model = model.get_base_model()
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def trained_logits(
    model: Any, batch: dict[str, torch.Tensor], *, pick: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logits [B, K, V], the labels [B, K] that they predict, columns [K] of these labels in the batch).

    K is the number of columns with a label in any row; `labels` [B, S] are -100 elsewhere and are not shifted. `pick`: the model
    takes positions (`takes_positions`); without it all logits are computed and those of the columns are taken.
    """
    labels = batch["labels"][:, 1:]
    columns = (labels != -100).any(0).nonzero().squeeze(-1)
    if not len(columns):  # a model must run in every process, whatever is trained in its share
        columns = columns.new_zeros(1)
    inputs: dict[str, torch.Tensor] = {
        name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch
    }
    if pick:
        inputs["logits_to_keep"] = columns
    logits = model(**inputs, use_cache=False).logits
    return (logits if pick else logits[:, columns]), labels[:, columns], columns + 1


def answer_logprobs(model: Any, batch: dict[str, torch.Tensor], *, pick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probability [B] of the labelled tokens in nats, summed; their number [B])."""
    logits, labels, _ = trained_logits(model, batch, pick=pick)
    nats, mask = losses.aligned_cross_entropy(logits, labels)
    return -nats.sum(1), mask.sum(1)


# --- many responses to one prompt ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedPrompts:
    """Rows [B, S] as the prompts that they begin with, each of them once, and what stands behind: the same tokens, read once.

    Row b is `prompts[which[b]]` without its padding, then `rest[b]`. Both are padded on the right. `rest` begins with the last
    token of the prompt, which predicts the first of the response; `columns` [B, R] are the places of its tokens in the row.
    """

    prompts: torch.Tensor  # [U, P]
    prompt_mask: torch.Tensor
    which: torch.Tensor  # [B]
    rest: torch.Tensor  # [B, R]
    rest_mask: torch.Tensor
    columns: torch.Tensor

    def inputs(self, model: Any) -> dict[str, Any]:
        """What the model is given to read `rest`, once it has read the prompts. Gradients flow through their keys and values."""
        from transformers import DynamicCache

        keyword = cache_keyword(_base(model))
        caches: list[Any] = [DynamicCache(config=_base(model).config) for _ in range(2)]
        skip = {"logits_to_keep": 1} if takes_positions(model) else {}
        model(input_ids=self.prompts, attention_mask=self.prompt_mask, use_cache=True, **{keyword: caches[0]}, **skip)
        for number, layer in enumerate(caches[0].layers):
            caches[1].update(layer.keys.index_select(0, self.which), layer.values.index_select(0, self.which), number)
        return {
            "input_ids": self.rest,
            "attention_mask": torch.cat([self.prompt_mask[self.which], self.rest_mask], 1),
            "position_ids": self.columns,
            "use_cache": True,
            keyword: caches[1],
        }


def shared_cost(prompts: Sequence[int], lengths: Sequence[int], groups: Sequence[int]) -> tuple[int, int]:
    """(tokens of rows as they are, tokens with the prompt of each group read once), padding included, of one micro-batch.

    `prompts` and `lengths` are the tokens of each row's prompt, and of all of it; rows of one group have one prompt.
    """
    apart = len(lengths) * max(lengths)
    rests = max(length - prompt for prompt, length in zip(prompts, lengths, strict=True)) + 1
    return apart, len(set(groups)) * (max(prompts) - 1) + len(lengths) * rests


def share_prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor, mask: torch.Tensor) -> SharedPrompts | None:
    """The rows with what several begin with once; None where that is not less to read.

    `mask` [B, S-1]: what is wanted of them, in action coordinates: a row's prompt ends where its first action is taken.
    """
    starts = mask.int().argmax(1)
    if not len(starts) or not bool((mask.any(1) & (starts > 0)).all()):
        return None
    firsts = starts.tolist()
    widths = attention_mask.sum(1).tolist()
    texts = [tuple(row[:start]) for row, start in zip(input_ids.tolist(), firsts, strict=True)]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    which = [numbers[text] for text in texts]
    apart, together = shared_cost([start + 1 for start in firsts], widths, which)
    # Keys and values are copied to every row, and short forwards are less efficient than long ones.
    if together > 0.9 * apart:
        return None
    device = input_ids.device
    rows = torch.tensor([which.index(number) for number in range(len(numbers))], device=device)
    longest = max(firsts)
    prompt_mask = (torch.arange(longest, device=device) < starts[rows, None]).to(attention_mask.dtype)
    columns = starts[:, None] + torch.arange(max(w - f for w, f in zip(widths, firsts, strict=True)), device=device)
    there = columns < attention_mask.sum(1, keepdim=True)
    columns = torch.where(there, columns, 0)
    return SharedPrompts(
        input_ids[rows, :longest], prompt_mask, torch.tensor(which, device=device), input_ids.gather(1, columns),
        there.to(attention_mask.dtype), columns,
    )  # fmt: skip


def reads_on(model: Any) -> bool:
    """Whether a model can read behind keys and values and pass gradients back through them.

    Where activations are computed again no keys are kept in training; split weights (ZeRO-3) and other kinds of attention are
    not tried.
    """
    base = _base(model)
    new = hasattr(base, "is_activation_checkpointing")  # from transformers 5.24 on
    checkpointing = base.is_activation_checkpointing if new else base.is_gradient_checkpointing
    return (
        not checkpointing
        and base.config.get_text_config()._attn_implementation in ("sdpa", "eager")
        and supports_prefix_cache(base)
        and not any(hasattr(weight, "ds_id") for weight in base.parameters())
    )


def masked_logits(
    model: Any,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    mask: torch.Tensor,
    shared: SharedPrompts | None = None,
) -> torch.Tensor:
    """Logits [M, classes] at the M places of `mask` [B, S-1], row after row; computed in its columns alone where the model can.

    With `shared`, `share_prompts` of the same arguments, prompts are read once if the model reads on.
    """
    if shared is not None and reads_on(model):
        whole = torch.nn.functional.pad(mask, (0, 1))  # no action is taken at the last token
        inputs, mask = shared.inputs(model), whole.gather(1, shared.columns) & shared.rest_mask.bool()
    else:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
    columns = mask.any(0).nonzero().squeeze(-1)
    if not len(columns):  # a model must run in every process, whatever is trained in its share
        columns = columns.new_zeros(1)
    if takes_positions(model):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    return logits[mask[:, columns]]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# --- two continuations of one prefix in one row -------------------------------------------------------------------------


def fork(pairs: Sequence[tuple[Sequence[Sequence[int]], int]], pad_id: int) -> dict[str, torch.Tensor]:
    """A batch in which each prefix stands once, with both of its continuations behind it.

    A pair is (ids of both sides, tokens that they share). Columns are [prefixes | first sides | second sides], prefixes padded on
    the left and sides on the right, so that all that is trained lies in the same columns; positions are those that a side would
    have alone. All [B, S]: `input_ids`, `position_ids`, `labels` (-100 on prefixes and padding), `attention_mask` (where there is a
    token) and `branch` (0, 1, 2: prefix, first, second).
    """
    widths = [
        max(max((start, len(sides[0]) - start, len(sides[1]) - start)[k] for sides, start in pairs), 1)
        for k in range(3)
    ]
    shape = (len(pairs), sum(widths))
    batch = {"input_ids": torch.full(shape, pad_id), "position_ids": torch.zeros(shape, dtype=torch.long)}
    batch["labels"] = torch.full(shape, -100)
    batch["attention_mask"] = torch.zeros(shape, dtype=torch.long)
    batch["branch"] = torch.repeat_interleave(torch.arange(3), torch.tensor(widths)).expand(shape).clone()
    for row, (sides, start) in enumerate(pairs):
        here = widths[0] - start
        parts = [(here, sides[0][:start], 0, False)]
        parts += [(widths[0], sides[0][start:], start, True), (widths[0] + widths[1], sides[1][start:], start, True)]
        for column, ids, position, trained in parts:
            place = slice(column, column + len(ids))
            batch["input_ids"][row, place] = torch.tensor(ids, dtype=torch.long)
            batch["position_ids"][row, place] = torch.arange(position, position + len(ids))
            batch["attention_mask"][row, place] = 1
            if trained:
                batch["labels"][row, place] = batch["input_ids"][row, place]
    return batch


def in_pieces(batch: dict[str, torch.Tensor], overhead: float) -> list[tuple[list[int], dict[str, torch.Tensor]]]:
    """[(rows, their own batch)]: a forked batch cut where that leaves out more padding than `overhead` tokens a forward.

    Rows are sorted by the length of their prefix, and of all cuts of that order into pieces the cheapest is taken.
    """
    branch, present = batch["branch"][0], batch["attention_mask"]
    first, second = (branch < 1).sum(), (branch < 2).sum()  # where the sides begin
    lengths = torch.stack([(present * (branch == side)).sum(1) for side in range(3)], 1)  # [B, 3]
    order = sorted(range(len(lengths)), key=lambda row: tuple(lengths[row].tolist()))
    best: list[tuple[float, int]] = [(0.0, 0)]  # of the first n rows: (cost, where their last piece begins)
    for end in range(1, len(order) + 1):
        widest, found = lengths.new_zeros(3), []
        for begin in range(end - 1, -1, -1):
            widest = torch.maximum(widest, lengths[order[begin]])
            found.append((best[begin][0] + (end - begin) * int(widest.sum()) + overhead, begin))
        best.append(min(found))
    pieces, end = [], len(order)
    while end:
        begin = best[end][1]
        rows = order[begin:end]
        kept = present[rows].bool().any(0)
        # One column of each part at least, as in `fork`: prefixes end where sides begin.
        kept[torch.stack([first - 1, first, second])] = True
        cut = {
            name: value[rows][:, kept] if value.shape == present.shape else value[rows] for name, value in batch.items()
        }
        pieces.append((rows, cut))
        end = begin
    return pieces[::-1]


def fork_mask(present: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    """Which token attends to which [B, 1, S, S]: to what stands before it in the prefix and on its own side.

    Padding attends to itself: a row of a softmax that may attend to nothing is NaN, and NaN times 0 is NaN again.
    """
    size = present.shape[1]
    before = torch.ones(size, size, dtype=torch.bool, device=present.device).tril()
    own = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    seen = before & own & present.bool()[:, None, :]
    return (seen | torch.eye(size, dtype=torch.bool, device=present.device))[:, None]


def fork_logprobs(model: Any, batch: dict[str, torch.Tensor], *, pick: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [B, 2] of both sides in nats, summed over their tokens; numbers of tokens [B, 2]) of a forked batch.

    The last token of the prefix predicts the first of both sides.
    """
    branch = batch["branch"][0]
    prefix, first, second = (int((branch == side).sum()) for side in range(3))
    columns = torch.arange(prefix - 1, len(branch), device=branch.device)
    inputs: dict[str, torch.Tensor] = {
        "input_ids": batch["input_ids"],
        "attention_mask": fork_mask(batch["attention_mask"], batch["branch"]),
        "position_ids": batch["position_ids"],
    }
    if pick:
        inputs["logits_to_keep"] = columns
    logits = model(**inputs, use_cache=False).logits
    logits = logits if pick else logits[:, columns]
    place = columns - columns[0]
    reads = torch.cat([place[:first], place[:1], place[first + 1 : first + second]])  # which logits predict which label
    labels = batch["labels"][:, prefix:]
    rows, at = (labels != -100).nonzero(as_tuple=True)
    nats = torch.nn.functional.cross_entropy(logits[rows, reads[at]].float(), labels[rows, at], reduction="none")
    side = (branch[prefix:] == 2).long()
    index = 2 * rows + side[at]
    found = nats.new_zeros(2 * len(labels)).index_add(0, index, -nats)
    tokens = torch.zeros_like(found, dtype=torch.long).index_add(0, index, torch.ones_like(index))
    return found.view(-1, 2), tokens.view(-1, 2)
