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
ROOM = 16
ATTENTION = "stepladder_one_token"


class Growing:
    """Any transformers cache, which grows by concatenation: for layers that keep something else than plain keys and values."""

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, most: int) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.keyword = cache_keyword(model)

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

    def become(self, sources: Sequence[int]) -> list[int]:
        """Rows leave and are doubled: for each row to come the old one that it goes on from. Returns their places."""
        if list(sources) != list(range(len(self.mask))):
            rows = torch.tensor(sources, device=self.mask.device)
            self.cache.batch_select_indices(rows)
            self.mask = self.mask[rows]
        return list(range(len(sources)))

    def row(self, row: int) -> torch.Tensor:
        """[2 x layers, heads, tokens, head size]: keys and values of what a row has encoded."""
        return row_of(self.cache, row, self.mask[row].nonzero().squeeze(-1))


class Buffers:
    """Keys and values of each layer [2, B, heads, columns, head size] in one tensor with room for tokens and rows to come.

    `cache` is the cache of the encoded prefixes, padded on the left as `mask` [b, columns] says; `most` is how many rows there
    may ever be.
    """

    def __init__(self, model: Any, cache: Any, mask: torch.Tensor, most: int) -> None:
        self.model, self.keyword = model, cache_keyword(model)
        self.count, self.columns = mask.shape
        first = cache.layers[0].keys
        self.kept: list[torch.Tensor] = []
        for layer in cache.layers:
            self.kept.append(self._room(first.new_empty(2, most, first.shape[1], 0, first.shape[3])))
            self.kept[-1][0, : self.count, :, : self.columns] = layer.keys
            self.kept[-1][1, : self.count, :, : self.columns] = layer.values
        self.mask = first.new_full((most, 1, 1, self.columns + ROOM), float("-inf"))
        self.mask[: self.count, 0, 0, : self.columns].masked_fill_(mask.bool(), 0.0)
        self.cache = _cache_over(self, cache)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [B, V] of the next token behind `tokens` [B], which stand at `positions` [B]."""
        if self.columns == self.kept[0].shape[3]:
            for index, before in enumerate(self.kept):  # one after another: only one layer is held twice
                self.kept[index] = self._room(before)
                self.kept[index][:, : self.count, :, : self.columns] = before[:, : self.count]
            self.mask = torch.nn.functional.pad(self.mask, (0, ROOM), value=float("-inf"))
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

    def become(self, sources: Sequence[int]) -> list[int]:
        """Rows leave and are doubled: for each row to come the old one that it goes on from. Returns their places.

        A row stays where it is if it can; what comes otherwise is copied to where nothing stays.
        """
        places, stay = [-1] * len(sources), set()
        for i, source in enumerate(sources):
            if source < len(sources) and source not in stay:
                places[i] = source
                stay.add(source)
        free = iter([place for place in range(len(sources)) if place not in stay])
        copies = [i for i, place in enumerate(places) if place < 0]
        for i in copies:
            places[i] = next(free)
        if copies:
            to = torch.tensor([places[i] for i in copies], device=self.mask.device)
            origins = torch.tensor([sources[i] for i in copies], device=self.mask.device)
            for layer in self.kept:
                layer.index_copy_(1, to, layer.index_select(1, origins))
            self.mask[to] = self.mask[origins]
        self.count = len(sources)
        return places

    def _room(self, like: torch.Tensor) -> torch.Tensor:
        """A buffer with room behind the columns; memory of rows that never come is never touched."""
        made = like.new_empty(*like.shape[:3], self.columns + ROOM, like.shape[4])
        # What is masked still takes part in products with zero, so that it must be a number.
        made[:, : self.count, :, self.columns :] = 0.0
        return made

    def row(self, row: int) -> torch.Tensor:
        """[2 x layers, heads, tokens, head size]: keys and values of what a row has encoded."""
        columns = (self.mask[row, 0, 0] == 0).nonzero().squeeze(-1)
        return torch.cat([layer[:, row, :, columns] for layer in self.kept])


def decoder_of(model: Any, cache: Any, mask: torch.Tensor, most: int) -> Growing | Buffers:
    """What decodes behind the prefixes in `cache`, up to `most` rows: `Buffers` where the model allows it, on a CPU."""
    return (Buffers if fits_buffers(model, cache) else Growing)(model, cache, mask, most)


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

        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            both = buffers.kept[self.index][:, : buffers.count]
            both[0, :, :, buffers.columns] = key_states[:, :, 0]
            both[1, :, :, buffers.columns] = value_states[:, :, 0]
            return both[0], both[1]

        def get_seq_length(self, *args: Any) -> int:
            return buffers.columns

    over = DynamicCache()
    over.layers = [Layer(index) for index in range(len(cache.layers))]
    return over
