"""Keys and values of prefixes already encoded, so that a prefix that grows is never encoded twice."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Entry:
    """`keys_values` is [2 x layers, heads, length, head size] for the ids of one prefix; `extra` belongs to the owner."""

    keys_values: torch.Tensor
    extra: Any = None


class PrefixCache:
    """The most recently used prefixes of one model, up to `capacity_bytes` in all.

    Entries may be views of one tensor, as a solution and what it begins with are: its bytes count once, and are given back with
    the last of them.
    """

    def __init__(self, capacity_bytes: int = 2 * 2**30) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[tuple[int, ...], Entry] = OrderedDict()
        self._lengths: dict[int, int] = {}  # length -> how many entries have it, so that lookups try few prefixes
        self._bytes = 0
        self._shared: dict[int, int] = {}  # address of a storage -> how many entries are views of it

    def longest(self, ids: Sequence[int], at_most: int) -> tuple[int, Entry | None]:
        """(length, entry) of the longest stored prefix of `ids` that has `at_most` tokens; (0, None) if there is none."""
        ids = tuple(ids)
        for length in sorted(self._lengths, reverse=True):
            if length <= at_most:
                entry = self._entries.get(ids[:length])
                if entry is not None:
                    self._entries.move_to_end(ids[:length])
                    return length, entry
        return 0, None

    def put(self, ids: Sequence[int], keys_values: torch.Tensor, extra: Any = None) -> None:
        """Stores a prefix; the least recently used ones leave when the capacity is passed."""
        key = tuple(ids)
        if not key or keys_values.shape[2] != len(key):
            raise ValueError(f"{len(key)} ids need keys and values of that length, found {tuple(keys_values.shape)}")
        if key in self._entries:
            self._forget(key)
        self._entries[key] = Entry(keys_values, extra)
        self._lengths[len(key)] = self._lengths.get(len(key), 0) + 1
        storage = keys_values.untyped_storage()
        views = self._shared.get(storage.data_ptr(), 0)
        self._shared[storage.data_ptr()] = views + 1
        self._bytes += 0 if views else storage.nbytes()
        while self._bytes > self.capacity_bytes and len(self._entries) > 1:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: tuple[int, ...]) -> None:
        storage = self._entries.pop(key).keys_values.untyped_storage()
        views = self._shared.pop(storage.data_ptr()) - 1
        if views:
            self._shared[storage.data_ptr()] = views
        else:
            self._bytes -= storage.nbytes()
        self._lengths[len(key)] -= 1
        if not self._lengths[len(key)]:
            del self._lengths[len(key)]


def stack_left_padded(entries: Sequence[Entry | None], like: torch.Tensor | None = None) -> torch.Tensor | None:
    """[2 x layers, B, heads, longest, head size], each prefix against the right edge; None if no row has an entry."""
    some = next((e.keys_values for e in entries if e is not None), None)
    if some is None:
        return None
    longest = max(e.keys_values.shape[2] for e in entries if e is not None)
    out = some.new_empty(some.shape[0], len(entries), some.shape[1], longest, some.shape[3])
    for row, entry in enumerate(entries):
        padding = longest - (0 if entry is None else entry.keys_values.shape[2])
        out[:, row, :, :padding] = 0.0  # masked, but a product with zero must be zero
        if entry is not None:
            out[:, row, :, padding:] = entry.keys_values
    return out


def to_dynamic_cache(stacked: torch.Tensor | None, config: Any) -> Any:
    """A transformers `DynamicCache` over `stacked` [2 x layers, B, heads, length, head size], or an empty one."""
    from transformers import DynamicCache

    cache = DynamicCache(config=config)
    if stacked is not None:
        for layer in range(stacked.shape[0] // 2):
            cache.update(stacked[2 * layer], stacked[2 * layer + 1], layer)
    return cache


def cache_keyword(model: Any) -> str:
    """What `model.forward` calls its key/value cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def row_of(cache: Any, row: int, columns: torch.Tensor) -> torch.Tensor:
    """[2 x layers, heads, len(columns), head size]: one row's keys and values at the columns that hold real tokens."""
    first, end = int(columns[0]), int(columns[-1]) + 1
    # Without a gap they need no copy of their own before they are stacked.
    where = slice(first, end) if end - first == len(columns) else columns
    parts = []
    for layer in cache.layers:
        parts += [layer.keys[row][:, where], layer.values[row][:, where]]
    return torch.stack(parts)


def supports_prefix_cache(model: Any) -> bool:
    """Whether every layer keeps plain keys and values of the whole prefix (no sliding window, no linear attention)."""
    from transformers import DynamicCache

    return all(type(layer).__name__ == "DynamicLayer" for layer in DynamicCache(config=model.config).layers)
