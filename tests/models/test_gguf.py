"""GGUF files made here come back weight for weight; the real SmolLM2 file when STEPLADDER_SMOLLM2_GGUF names it."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from stepladder.basics import UserError
from stepladder.models.gguf import import_gguf

CHAT = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_llama(tied: bool) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=270, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=tied,
            rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        )
    )  # fmt: skip


def words() -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-level vocabulary with three special tokens in front."""
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["t h", "th e", "i n", "Ġ the", "a n", "o n", "e r", "r e", "a t", "Ġ a", "Ġ s"]
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, *(m.replace(" ", "") for m in merges)], merges


def write_gguf(path: Path, model: Any, *, pad: bool) -> None:
    """Writes `model` in single precision, laid out as llama.cpp lays out a Llama."""
    import gguf

    config = model.config
    tokens, merges = words()
    assert len(tokens) == config.vocab_size
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if pad:
        writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, weight in model.state_dict().items():
        name = name.removesuffix(".weight").removeprefix("model.")
        if name == "lm_head" and config.tie_word_embeddings:
            continue
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            name = f"blk.{layer}.{names[part]}"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name]
        if name.endswith(("attn_q", "attn_k")):
            # llama.cpp rotates neighbouring channels, transformers the two halves of a head.
            heads = config.num_attention_heads if name.endswith("q") else config.num_key_value_heads
            weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_tokenizer_come_back(tied: bool, tmp_path: Path) -> None:
    model = tiny_llama(tied)
    write_gguf(tmp_path / "tiny.gguf", model, pad=False)
    out = tmp_path / "deep" / "out"
    import_gguf(str(tmp_path / "tiny.gguf"), str(out), dtype="float32")
    (tmp_path / "tiny.gguf").unlink()  # nothing may look for it again

    loaded = AutoModelForCausalLM.from_pretrained(out, use_safetensors=True)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.dtype is torch.float32
    want = model.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    for name, weight in loaded.state_dict().items():
        torch.testing.assert_close(weight, want[name], rtol=0, atol=0)
    assert (loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()) == tied
    ids = torch.arange(20)[None] * 7
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert loaded.config.rope_parameters["rope_theta"] == 5000.0
    assert loaded.config.rms_norm_eps == 1e-5  # not 9.999999747378752e-06

    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert (loaded.config.eos_token_id, loaded.generation_config.eos_token_id) == (2, 2)
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == CHAT
    text = "the cat\n in 12 hats"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_end|>", add_special_tokens=False)["input_ids"] == [2]
    assert sorted(p.name for p in out.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


def test_bfloat16_is_the_default_and_a_pad_token_is_kept(tmp_path: Path) -> None:
    model = tiny_llama(True)
    write_gguf(tmp_path / "tiny.gguf", model, pad=True)
    for _ in range(2):  # into a folder that has an older import
        import_gguf(str(tmp_path / "tiny.gguf"), str(tmp_path / "out"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype is torch.bfloat16
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name].bfloat16())
    assert AutoTokenizer.from_pretrained(tmp_path / "out").pad_token_id == 0


def test_mistakes_get_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"missing\.gguf: no such file$"):
        import_gguf(str(tmp_path / "missing.gguf"), out)
    other, cut = tmp_path / "other.gguf", tmp_path / "cut.gguf"
    other.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(UserError, match=r"other\.gguf: not a GGUF file"):
        import_gguf(str(other), out)
    write_gguf(cut, tiny_llama(True), pad=False)
    with pytest.raises(UserError, match="dtype must be one of bfloat16, float16, float32, found 'int8'"):
        import_gguf(str(cut), out, dtype="int8")
    assert not Path(out).exists()
    with pytest.raises(UserError, match="cannot write to the folder"):
        import_gguf(str(cut), str(other / "inside"))
    whole = cut.read_bytes()
    for length in (4, 20, 2000, len(whole) // 2):
        cut.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"cut\.gguf: transformers cannot read this GGUF file"):
            import_gguf(str(cut), out)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else real(name, *rest))
    with pytest.raises(UserError, match=r"needs the gguf package: pip install 'stepladder\[gguf\]'"):
        import_gguf(str(cut), out)


@pytest.mark.skipif("STEPLADDER_SMOLLM2_GGUF" not in os.environ, reason="STEPLADDER_SMOLLM2_GGUF names no file")
def test_smollm2_answers(tmp_path: Path) -> None:
    import_gguf(os.environ["STEPLADDER_SMOLLM2_GGUF"], str(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (576, 30, 9)
    assert (config.num_key_value_heads, config.vocab_size, config.tie_word_embeddings) == (3, 49152, True)
    assert config.rope_parameters["rope_theta"] == 100000
    assert model.num_parameters() == 134_515_008
    for token, number in (("<|im_start|>", 1), ("<|im_end|>", 2)):
        assert tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    question = {"role": "user", "content": "Tom has 3 apples and buys 4 more. How many apples does he have now?"}
    ids = tokenizer.apply_chat_template([question], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**ids, max_new_tokens=60, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "7" in tokenizer.decode(written)
    assert written[-1] == tokenizer.eos_token_id
