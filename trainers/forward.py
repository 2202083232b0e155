"""Forward passes of policies that compute logits only where something is trained.

With a large vocabulary the logits of a long prompt cost more memory than the rest of the model, and nobody reads them.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch

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
