"""One token more for every row of a batch: keys and values in buffers that are filled in place, rows that leave.

A plain transformers cache concatenates every layer's keys and values at every token, and copies all of them when a row leaves.
Here a layer's keys and values lie in a buffer with room for the next tokens, a row that leaves is overwritten by the last one, and
attention of one token over many is two matrix products a layer, in groups over the key/value heads, in place of repeated heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .prefix_cache import cache_keyword, row_of, supports_prefix_cache

# Columns by which buffers grow. Attention runs over all columns, the empty ones masked.
ROOM = 32
ATTENTION = "stepladder_one_token"


class Growing:
    """Any transformers cache, which grows by concatenation: for layers that keep something else than plain keys and values."""

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, rows: torch.Tensor) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.keyword = cache_keyword(model)
        if len(rows) > len(mask):
            self._keep(rows)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the next token behind `tokens` [B], which stand at `positions` [B]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self.model(
            input_ids=tokens[:, None],
            attention_mask=self.mask,
            position_ids=positions[:, None],
            use_cache=True,
            logits_to_keep=1,
            **{self.keyword: self.cache},
        ).logits[:, -1]

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Rows leave; which of the old rows now stands in each place."""
        out = set(gone)
        left = [row for row in range(len(self.mask)) if row not in out]
        self._keep(torch.tensor(left, device=self.mask.device))
        return left

    def row(self, row: int) -> torch.Tensor:
        """[2 x layers, heads, tokens, head size]: keys and values of what a row has encoded."""
        return row_of(self.cache, row, self.mask[row].nonzero().squeeze(-1))

    def _keep(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.mask = self.mask[rows]


class Buffers:
    """Keys and values [2 x layers, B, heads, columns, head size] in one tensor with room for tokens to come.

    `cache` is the cache of the encoded prefixes, padded on the left as `mask` [b, columns] says; `rows` [B] says which of them
    each row begins with.
    """

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, rows: torch.Tensor) -> None:
        self.model, self.keyword = model, cache_keyword(model)
        self.count, self.columns = len(rows), mask.shape[1]
        first = cache.layers[0].keys
        self.kept = first.new_zeros(
            2 * len(cache.layers), len(rows), first.shape[1], self.columns + ROOM, first.shape[3]
        )
        for index, layer in enumerate(cache.layers):
            self.kept[2 * index, :, :, : self.columns] = layer.keys[rows]
            self.kept[2 * index + 1, :, :, : self.columns] = layer.values[rows]
        self.mask = first.new_full((len(rows), 1, 1, self.columns + ROOM), float("-inf"))
        self.mask[:, 0, 0, : self.columns].masked_fill_(mask[rows].bool(), 0.0)
        self.cache = _cache_over(self, cache)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the next token behind `tokens` [B], which stand at `positions` [B]."""
        if self.columns == self.kept.shape[3]:
            self.kept = torch.nn.functional.pad(self.kept[:, : self.count], (0, 0, 0, ROOM))
            self.mask = torch.nn.functional.pad(self.mask[: self.count], (0, ROOM), value=float("-inf"))
        self.mask[: self.count, :, :, self.columns] = 0.0
        with _attention(self.model):
            logits = self.model(
                input_ids=tokens[:, None],
                attention_mask=self.mask[: self.count],
                position_ids=positions[:, None],
                use_cache=True,
                logits_to_keep=1,
                **{self.keyword: self.cache},
            ).logits[:, -1]
        self.columns += 1
        return logits

    def leave(self, gone: Sequence[int]) -> list[int]:
        """Rows leave; which of the old rows now stands in each place: the last ones fill the gaps."""
        out, left = set(gone), self.count - len(gone)
        holes = [row for row in gone if row < left]
        movers = [row for row in range(left, self.count) if row not in out]
        order = list(range(left))
        if holes:
            to, source = torch.tensor(holes, device=self.mask.device), torch.tensor(movers, device=self.mask.device)
            self.kept[:, to] = self.kept[:, source]
            self.mask[to] = self.mask[source]
            for hole, mover in zip(holes, movers, strict=True):
                order[hole] = mover
        self.count = left
        return order

    def row(self, row: int) -> torch.Tensor:
        """[2 x layers, heads, tokens, head size]: keys and values of what a row has encoded."""
        return self.kept[:, row, :, (self.mask[row, 0, 0] == 0).nonzero().squeeze(-1)]


def decoder_of(model: Any, cache: Any, mask: torch.Tensor, rows: torch.Tensor) -> Growing | Buffers:
    """What decodes behind the prefixes in `cache`, with `rows` [B] of them: `Buffers` where the model allows it, on a CPU."""
    return (Buffers if fits_buffers(model, cache) else Growing)(model, cache, mask, rows)


def fits_buffers(model: Any, cache: Any) -> bool:
    """Whether attention of one token can be replaced: plain scaled dot products over keys and values of one shape.

    On a CPU only: elsewhere the model's own kernels are not the brake.
    """
    if model.device.type != "cpu" or not getattr(model, "_supports_attention_backend", False):
        return False
    if model.config.get_text_config()._attn_implementation != "sdpa" or not supports_prefix_cache(model):
        return False
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return all(t is not None and t.shape == tensors[0].shape and t.dtype == tensors[0].dtype for t in tensors)


def one_token_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(q K^T scaling + mask) V of one query a row, [B, 1, heads, D]: products over [heads of one key/value head, D].

    query [B, heads, 1, D]; key, value [B, key/value heads, L, D]; mask [B, 1, 1, L], added. The softmax is in float32.
    """
    batch, heads, _, size = query.shape
    scaling = size**-0.5 if scaling is None else scaling
    grouped = (query * scaling).reshape(batch, key.shape[1], heads // key.shape[1], size)
    scores = torch.matmul(grouped, key.transpose(2, 3))
    if attention_mask is not None:
        scores += attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return torch.matmul(weights, value).reshape(batch, 1, heads, value.shape[-1]), None


@contextlib.contextmanager
def _attention(model: Any) -> Iterator[None]:
    """Lets the model attend by `one_token_attention`; afterwards its configuration is what it was."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, one_token_attention)
    config = model.config.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before


def _cache_over(buffers: Buffers, cache: Any) -> Any:
    """A transformers cache whose layers write one token into the buffers and give all their columns."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    class Layer(DynamicLayer):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index, self.is_initialized = index, True

        def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any, **__: Any) -> tuple[Any, Any]:
            both = buffers.kept[2 * self.index : 2 * self.index + 2, : buffers.count]
            both[0, :, :, buffers.columns] = keys[:, :, 0]
            both[1, :, :, buffers.columns] = values[:, :, 0]
            return both[0], both[1]

        def get_seq_length(self, *_: Any) -> int:
            return buffers.columns

    over = DynamicCache()
    over.layers = [Layer(index) for index in range(len(cache.layers))]
    return over
