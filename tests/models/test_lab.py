"""The lab's tokenizer and model configuration."""

from __future__ import annotations

import random

import pytest
from transformers import AutoTokenizer, LlamaForCausalLM

from stepladder.models.lab import LAB_SPECIALS, lab_config, lab_tokenizer
from stepladder.tasks.chain import ChainArith


def test_decoding_and_encoding_again_gives_the_same_ids(lab_words):
    rng = random.Random(0)
    for length in (1, 5, 40):
        ids = [rng.randrange(len(LAB_SPECIALS), len(lab_words)) for _ in range(length)]
        assert lab_words(lab_words.decode(ids), add_special_tokens=False)["input_ids"] == ids


def test_lab_texts_have_no_unknown_word_and_no_hidden_token():
    task = ChainArith(p=11, sizes={"train": 30})
    tokenizer = lab_tokenizer(task.p - 1)
    for problem in task.problems("train"):
        for text in (problem.prompt, *task.reference_steps(problem)):
            ids = tokenizer(text)["input_ids"]
            assert not set(ids) & set(tokenizer.all_special_ids)
            assert tokenizer.decode(ids).split() == text.split()
            assert len(ids) == len(text.replace("\n", " n ").split())
    assert tokenizer("11")["input_ids"] == [tokenizer.unk_token_id]


def test_spaces_around_a_newline_do_not_change_the_ids(lab_words):
    assert lab_words("8\n8")["input_ids"] == lab_words("8 \n 8")["input_ids"] == lab_words("8  \n8")["input_ids"]


def test_the_tokenizer_survives_saving(tmp_path, lab_words):
    lab_words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "Start 3 ; + 5 \n 3 + 5 = 8 \n Answer: 8"
    assert again(text)["input_ids"] == lab_words(text)["input_ids"]
    assert again.decode(again(text)["input_ids"]) == lab_words.decode(lab_words(text)["input_ids"])
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2, 3)
    assert again.padding_side == "left"


def test_the_default_size_is_the_one_promised():
    model = LlamaForCausalLM(lab_config(len(lab_tokenizer(10))))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(0.65e6, rel=0.05)
