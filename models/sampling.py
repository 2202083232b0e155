"""Sampling one token for each row of a batch, with random numbers that belong to the row and not to the batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def uniforms(seeds: Sequence[int], positions: int) -> torch.Tensor:
    """Uniform numbers [len(seeds), positions] in [0, 1): entry (b, t) depends on seed b and t alone.

    A counter-based generator (SplitMix64, Steele et al. 2014): no state to save, the same on every machine and in every
    batch, which is what makes a sample independent of the samples beside it.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(seeds, dtype=np.uint64)[:, None] + np.arange(1, positions + 1, dtype=np.uint64) * np.uint64(
            0x9E3779B97F4A7C15
        )
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return torch.from_numpy((z >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def filtered_probabilities(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Probabilities [B, V] after temperature, then top-k, then top-p (the smallest set that reaches top_p is kept)."""
    logits = logits.float()
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = logits.softmax(-1)
    if top_p < 1.0:
        ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # mass ahead of each token: the first is always kept
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, index, ordered)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def draw(
    logits: torch.Tensor, uniform: torch.Tensor | None, params: Any, rows: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [S], log-probabilities [S] in nats) of one token a sample, by inverting the cumulative distribution at `uniform` [S].

    `rows` [S] says which row of logits [B, V] each sample reads; None is one sample a row. `uniform` None is greedy, with
    log-probabilities at temperature 1. A token of probability zero is never drawn.
    """
    rows = torch.arange(len(logits), device=logits.device) if rows is None else rows
    if uniform is None:
        logprobs = logits.float().log_softmax(-1)
        best = logprobs.argmax(-1)
        return best[rows], logprobs.gather(-1, best[:, None]).squeeze(-1)[rows]
    probabilities = filtered_probabilities(logits, params.temperature, params.top_k, params.top_p)
    cumulative = probabilities.cumsum(-1)
    # The samples of a row stand side by side, so that a row's distribution is made once and copied for none of them.
    ordered, order = rows.sort(stable=True)
    column = torch.empty_like(rows)  # of a sample among those of its row
    column[order] = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    target = cumulative.new_zeros(len(logits), int(column.max()) + 1)
    target[rows, column] = uniform.to(cumulative.device, torch.float32) * cumulative[rows, -1]
    ids = torch.searchsorted(cumulative, target, right=True)[rows, column]
    # Rounding can put the target at the total itself, and a parallel sum can rise where nothing was added: fall back on the
    # most probable token.
    inside = ids.clamp(max=logits.shape[-1] - 1)
    good = (inside == ids) & (probabilities[rows, inside] > 0)
    ids = inside if bool(good.all()) else torch.where(good, inside, probabilities.argmax(-1)[rows])
    return ids, probabilities[rows, ids].log()
