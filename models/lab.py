"""The lab's model: a small Llama decoder and a tokenizer whose words are numbers and operators, both made from scratch."""

from __future__ import annotations

from typing import Any

LAB_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


def lab_tokenizer(largest_number: int) -> Any:
    """A fast word-level tokenizer for chain arithmetic: one token for each number up to `largest_number`.

    Words are separated by spaces and a newline is a word, so that decoding and encoding again gives the same ids.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*LAB_SPECIALS, "\n", "Start", ";", "+", "-", "*", "=", "Answer:", *map(str, range(largest_number + 1))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def lab_config(vocabulary: int, *, width: int = 128, layers: int = 3, heads: int = 4, context: int = 512) -> Any:
    """Configuration of a Llama decoder with `layers` layers of `width`; about 0.65 M parameters by default."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    )  # fmt: skip
