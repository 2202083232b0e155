"""The lab's model: a small Llama decoder and a tokenizer whose words are numbers and operators, both made from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..basics import UserError

LAB_SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>")


# Words of critiques and corrections (models/corrections.py). Numbers count steps.
CORRECTION_WORDS = (
    "Draft:", "Critique:", "Retry:", "Step:", "Verdict:", "Correct", "Wrong", "Explanation:", "expected", "inherits", "error",
    "from", "step", "Final", "answer", "verdict:", "Wait", "Oops", "Hmm", "[BAD]", "7", "8", "9", "10",
)  # fmt: skip
# Turns as ordinary text: an answer ends as every answer does, and a user's turn has no mark of its own. A first question and its
# answer are laid out as without a template.
_TURNS = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or m['role'] == 'user' %} {% endif %}{% endfor %}"
)


def lab_tokenizer(largest_number: int, words: Sequence[str] = ()) -> Any:
    """A fast word-level tokenizer for chain arithmetic: one token for each number up to `largest_number`.

    Words are separated by spaces and a newline is a word, so that decoding and encoding again gives the same ids. `words` come
    behind all others, whose ids stay as they are; with them the tokenizer has a chat template too, for dialogues.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    known = [*LAB_SPECIALS, "\n", "Start", ";", "+", "-", "*", "=", "Answer:", *map(str, range(largest_number + 1))]
    words_ = list(dict.fromkeys([*known, *words]))
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words_)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(Regex(" +"), "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>",
        padding_side="left", model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    if words:
        tokenizer.chat_template = _TURNS
    return tokenizer


def with_words(model: Any, tokenizer: Any, words: Sequence[str]) -> tuple[Any, Any]:
    """(the lab model with embeddings for further words, the tokenizer with them); it writes what it wrote before.

    A new word's logit begins as that of the unknown word, which no training has ever asked for.
    """
    import torch

    numbers = [int(word) for word in tokenizer.get_vocab() if word.isdigit()]
    if not numbers or tokenizer.get_vocab() != lab_tokenizer(max(numbers)).get_vocab():
        raise UserError("words can be added to a policy with the lab's own tokenizer alone")
    wider, before = lab_tokenizer(max(numbers), words), len(tokenizer)
    model.resize_token_embeddings(len(wider), mean_resizing=False)
    with torch.no_grad():
        read, write = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        noise = torch.randn(len(wider) - before, read.shape[1], generator=torch.Generator().manual_seed(0))
        read[before:] = read[:before].std() * noise
        write[before:] = write[tokenizer.unk_token_id]
    return model, wider


def lab_config(vocabulary: int, *, width: int = 128, layers: int = 3, heads: int = 4, context: int = 512) -> Any:
    """Configuration of a Llama decoder with `layers` layers of `width`; about 0.65 M parameters by default."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    )  # fmt: skip
