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
    """Rows that are doubled, more tokens than the room of a buffer, rows that leave in the middle and at the ends."""
    plain, buffers = Growing(grouped, *encoded(grouped), 6), Buffers(grouped, *encoded(grouped), 6)
    generator = torch.Generator().manual_seed(1)
    rows = {"a": (0, 3), "b": (1, 5)}  # name -> row and position, equal for both at first
    places = [{name: row for name, (row, _) in rows.items()} for _ in range(2)]
    positions = {name: position for name, (_, position) in rows.items()}
    become = {
        0: "aabb",
        2: "abcd",
        3: "aabcd",
        ROOM: "bcde",
        ROOM + 2: "cbb",
    }  # from which row each goes on, by its name now
    for t in range(ROOM + 6):
        if t in become:
            names = sorted(positions)
            sources = [name for name in become[t] if name in names]
            assert len(sources) == len(become[t])
            for side, decoder in enumerate((plain, buffers)):
                found = decoder.become([places[side][name] for name in sources])
                assert sorted(found) == list(range(len(sources)))
                places[side] = dict(zip("abcdef", found, strict=False))
            positions = dict(zip("abcdef", [positions[name] for name in sources], strict=False))
        tokens = {name: int(torch.randint(4, 15, (1,), generator=generator)) for name in positions}
        logits = []
        for side, decoder in enumerate((plain, buffers)):
            order = sorted(positions, key=places[side].__getitem__)
            out = decoder.step(
                torch.tensor([tokens[name] for name in order]), torch.tensor([positions[name] for name in order])
            )
            logits.append(dict(zip(order, out, strict=True)))
        for name in positions:
            torch.testing.assert_close(logits[0][name], logits[1][name], atol=1e-5, rtol=1e-5)
        positions = {name: position + 1 for name, position in positions.items()}
    assert len(positions) == 3
    for name, position in positions.items():
        ours, theirs = buffers.row(places[1][name]), plain.row(places[0][name])
        assert ours.shape[2] == position
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_the_models_own_attention_is_left_as_it_was(grouped):
    before = grouped.config._attn_implementation
    cache, mask = encoded(grouped)
    decoder = decoder_of(grouped, cache, mask, most=2)
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
