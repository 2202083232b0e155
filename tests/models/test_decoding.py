"""One token more for every row: buffers against a plain cache, attention against loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stepladder.models.decoding import ROOM, Buffers, Growing, decoder_of, fits_buffers, one_token_attention
from stepladder.models.engine import Request, Sampling
from stepladder.models.prefix_cache import cache_keyword, row_of
from stepladder.models.transformers_engine import TransformersEngine


def test_attention_of_one_token_is_the_softmax_over_every_head():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    query, key, value = draw(2, 6, 1, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[0, ..., :2] = float("-inf")
    found, _ = one_token_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    assert found.shape == (2, 1, 6, 4)
    for row in range(2):
        for head in range(6):
            keys, values = key[row, head // 3].tolist(), value[row, head // 3].tolist()
            q = query[row, head, 0].tolist()
            seen = range(2, 5) if row == 0 else range(5)
            weights = {t: math.exp(0.3 * sum(a * b for a, b in zip(q, keys[t], strict=True))) for t in seen}
            want = [sum(w * values[t][d] for t, w in weights.items()) / sum(weights.values()) for d in range(4)]
            # The softmax is in single precision.
            torch.testing.assert_close(found[row, 0, head].tolist(), want, atol=1e-6, rtol=1e-6)


@pytest.fixture(scope="module")
def grouped(lab_words):
    """A random Llama with two query heads for each key/value head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 256}
    config = LlamaConfig(
        vocab_size=len(lab_words), num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=2, **sizes
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.3)
    return model.eval()


def encoded(model: Any) -> tuple[Any, torch.Tensor]:
    """The cache of two prefixes of 3 and 5 tokens, padded on the left, and its mask."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    ids = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_keyword(model): cache})
    return cache, mask


@torch.inference_mode()
def test_buffers_give_what_a_growing_cache_gives(grouped):
    """Rows that repeat, more tokens than the room of a buffer, rows that leave in the middle and at the ends."""
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    plain, buffers = Growing(grouped, *encoded(grouped), rows), Buffers(grouped, *encoded(grouped), rows)
    names = [list(range(6)), list(range(6))]
    lengths = torch.tensor([3, 3, 3, 5, 5, 5])
    tokens = torch.randint(4, 15, (6, 2 * ROOM), generator=torch.Generator().manual_seed(1))
    leaving = {2: (1, 4), 9: (0,), ROOM + 3: (5,)}
    for t in range(ROOM + 6):
        one, other = (
            decoder.step(tokens[order, t], lengths[order] + t)
            for decoder, order in zip((plain, buffers), names, strict=True)
        )
        by_name = [dict(zip(order, logits, strict=True)) for order, logits in zip(names, (one, other), strict=True)]
        for name in names[0]:
            torch.testing.assert_close(by_name[0][name], by_name[1][name], atol=1e-5, rtol=1e-5)
        for decoder, order in zip((plain, buffers), names, strict=True):
            if gone := leaving.get(t):
                order[:] = [order[i] for i in decoder.leave([i for i, name in enumerate(order) if name in gone])]
        assert sorted(names[0]) == sorted(names[1])
    assert names[0] == [2, 3]
    for name in (2, 3):
        ours, theirs = buffers.row(names[1].index(name)), plain.row(names[0].index(name))
        assert ours.shape[2] == int(lengths[name]) + ROOM + 6
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_models_own_attention_is_left_as_it_was(grouped):
    before = grouped.config._attn_implementation
    cache, mask = encoded(grouped)
    decoder = decoder_of(grouped, cache, mask, torch.tensor([0, 1]))
    assert isinstance(decoder, Buffers)
    kept = row_of(cache, 0, mask[0].nonzero().squeeze(-1)).clone()
    torch.testing.assert_close(decoder.row(0), kept, atol=0, rtol=0)
    decoder.step(torch.tensor([5, 6]), torch.tensor([3, 5]))
    assert grouped.config._attn_implementation == before == "sdpa"


def test_other_models_keep_their_own_cache(lab_words):
    """A sliding window keeps other keys than those of the whole prefix, and eager attention was asked for by name."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"vocab_size": len(lab_words), "pad_token_id": 0, "eos_token_id": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    sliding = MistralForCausalLM(MistralConfig(sliding_window=4, **sizes, **ids)).eval()
    eager = LlamaForCausalLM._from_config(LlamaConfig(**sizes, **ids), attn_implementation="eager").eval()
    for model in (sliding, eager):
        with torch.inference_mode():
            cache, _ = encoded(model)
        assert not fits_buffers(model, cache)
        [[sample]] = TransformersEngine(model, lab_words).generate(
            [Request(tuple(range(4, 14)), (0,))], Sampling(8, temperature=0.0)
        )
        want = model.generate(torch.tensor([list(range(4, 14))]), do_sample=False, max_new_tokens=8)[0, 10:].tolist()
        assert list(sample.ids) == want
