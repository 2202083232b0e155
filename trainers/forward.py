"""Forward passes of policies that compute logits only where something is trained.

With a large vocabulary the logits of a long prompt cost more memory than the rest of the model, and nobody reads them.
"""

from __future__ import annotations

import inspect
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
