"""What the prefix cache keeps, finds and lets go."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from stepladder.models.prefix_cache import (
    Entry,
    PrefixCache,
    row_of,
    stack_left_padded,
    supports_prefix_cache,
    to_dynamic_cache,
)


def keys_values(length: int, value: float = 0.0) -> torch.Tensor:
    return torch.full((4, 2, length, 3), value)  # 2 layers, 2 heads, head size 3: 96 bytes a token


def test_the_longest_prefix_is_found():
    cache = PrefixCache()
    for length in (1, 3, 5):
        cache.put(range(length), keys_values(length), extra=length)
    cache.put((0, 1, 9), keys_values(3), extra="other")
    found = lambda ids, at_most: (lambda length, entry: (length, entry.extra if entry else None))(
        *cache.longest(ids, at_most)
    )
    assert found((0, 1, 2, 3, 4, 5), 6) == (5, 5)
    assert found((0, 1, 2, 3, 4, 5), 4) == (3, 3)
    assert found((0, 1, 9, 9), 4) == (3, "other")
    assert found((0, 2), 2) == (1, 1)
    assert found((1, 2), 2) == (0, None)
    assert found((), 0) == (0, None)


def test_the_least_recently_used_leave_first():
    cache = PrefixCache(capacity_bytes=96 * 10)
    for key in range(3):
        cache.put((key, 0, 0), keys_values(3), extra=key)
    assert cache.longest((0, 0, 0), 3)[0] == 3  # used again
    cache.put((3, 0, 0), keys_values(3))
    assert [cache.longest((key, 0, 0), 3)[0] for key in range(4)] == [3, 0, 3, 3]
    # One that is larger than all room is kept alone.
    cache.put(range(20), keys_values(20))
    assert cache.longest(range(20), 20)[0] == 20
    assert cache.longest((0, 0, 0), 3)[0] == 0
    assert cache._lengths == {20: 1}


def test_a_prefix_put_again_is_replaced():
    cache = PrefixCache()
    cache.put((1, 2), keys_values(2), extra="old")
    cache.put((1, 2), keys_values(2), extra="new")
    assert cache.longest((1, 2), 2)[1].extra == "new"
    assert cache._bytes == 96 * 2


def test_views_of_one_tensor_count_once_and_its_bytes_go_with_the_last():
    cache = PrefixCache(capacity_bytes=96 * 10)
    whole = keys_values(4)
    cache.put((1, 2), whole[:, :, :2])
    cache.put((1, 2, 3, 4), whole)
    assert cache._bytes == 96 * 4
    cache.put((5,) * 5, keys_values(5))
    assert cache._bytes == 96 * 9
    cache.put((6, 6), keys_values(2))  # the view is the oldest; without it its tensor is still held
    assert cache.longest((1, 2, 3, 4), 3)[0] == 0
    assert cache.longest((1, 2, 3, 4), 4)[0] == 0  # so the tensor's last view had to go as well
    assert cache._bytes == 96 * 7
    assert cache._shared == {e.keys_values.untyped_storage().data_ptr(): 1 for e in cache._entries.values()}


def test_ids_and_keys_must_agree():
    for ids in ((1, 2), ()):
        with pytest.raises(ValueError, match="need keys and values of that length"):
            PrefixCache().put(ids, keys_values(3))


def test_stacking_and_taking_rows_out_again(lab_words, tiny_policy):
    config = tiny_policy(lab_words).config
    one, two = torch.randn(4, 4, 2, 8), torch.randn(4, 4, 5, 8)
    stacked = stack_left_padded([Entry(one), None, Entry(two)])
    assert stacked.shape == (4, 3, 4, 5, 8)
    assert stack_left_padded([None, None]) is None
    cache = to_dynamic_cache(stacked, config)
    assert torch.equal(row_of(cache, 0, torch.tensor([3, 4])), one)
    assert torch.equal(row_of(cache, 2, torch.arange(5)), two)
    assert (stacked[:, 1] == 0).all()
    assert to_dynamic_cache(None, config).get_seq_length() == 0


def test_models_with_windows_are_not_cached(lab_words, tiny_policy):
    from transformers import MistralConfig, MistralForCausalLM

    assert supports_prefix_cache(tiny_policy(lab_words))
    config = MistralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    assert not supports_prefix_cache(MistralForCausalLM(config))


@pytest.mark.parametrize("columns", [[1, 2, 3], [0, 1, 3]])
def test_a_row_is_taken_with_and_without_a_gap(columns):
    made = [torch.randn(2, 2, 4, 3, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    layers = [SimpleNamespace(keys=made[2 * i], values=made[2 * i + 1]) for i in range(2)]
    found = row_of(SimpleNamespace(layers=layers), 1, torch.tensor(columns))
    assert found.equal(torch.stack([one[1][:, columns] for one in made]))


def test_padding_of_stacked_prefixes_is_zero():
    """What is masked still takes part in products with zero."""
    entries = [Entry(keys_values(2, 1.0)), None, Entry(keys_values(4, 2.0))]
    stacked = stack_left_padded(entries)
    assert stacked.shape == (4, 3, 2, 4, 3)
    assert not stacked[:, 0, :, :2].any()
    assert not stacked[:, 1].any()
    assert (stacked[:, 0, :, 2:] == 1).all()
    assert (stacked[:, 2] == 2).all()
