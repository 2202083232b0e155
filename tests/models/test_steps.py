"""Where steps end in sampled ids."""

from __future__ import annotations

import random

import pytest

from stepladder.models.steps import cut_steps


def ids_of(tokenizer, *pieces: str) -> list[int]:
    """One token for each piece."""
    ids = [tokenizer(piece, add_special_tokens=False)["input_ids"] for piece in pieces]
    assert all(len(one) == 1 for one in ids)
    return [one[0] for one in ids]


def test_lines_of_the_lab(lab_words):
    text = "3 + 5 = 8 \n 8 * 2 = 5 \n Answer: 5"
    ids = lab_words(text)["input_ids"]
    steps, ends = cut_steps(lab_words, [*ids, lab_words.eos_token_id], "\n")
    assert steps == ("3 + 5 = 8", "8 * 2 = 5", "Answer: 5")
    assert ends == (6, 12, 14)  # a step without a separator ends where the text ends, the end of the sequence excluded


@pytest.mark.parametrize(
    ("pieces", "separator", "steps", "ends"),
    [
        (["a", "\n", "b", "\n"], "\n", ["a", "b"], [2, 4]),
        (["a", "\n", "b"], "\n", ["a", "b"], [2, 3]),
        # Merged tokens end a step as well as the separator alone does.
        (["a", ".\n", "b", "\n\n", "c"], "\n", ["a.", "b", "c"], [2, 4, 5]),
        (["a", ".\n", "\n", "b"], "\n", ["a.", "b"], [3, 4]),
        # Blank lines belong to the step before them, leading ones to the first step.
        (["a", "\n", "\n", "\n", "b"], "\n", ["a", "b"], [4, 5]),
        (["\n", "\n", "a", "\n"], "\n", ["a"], [4]),
        (["a", "\n", " ", "\n", "b"], "\n", ["a", "b"], [4, 5]),
        (["a", "\n", " "], "\n", ["a"], [3]),
        (["a", "\n\n", "\n", "\n"], "\n\n", ["a"], [4]),
        # A separator of two tokens, and half of one.
        (["a", "\n", "\n", "b", "\n", "c"], "\n\n", ["a", "b\nc"], [3, 6]),
        (["a", ".\n", "\n", "b"], "\n\n", ["a.", "b"], [3, 4]),
        (["a", ".\n", "b"], "\n\n", ["a.\nb"], [3]),
        # No step at all.
        ([], "\n", [], []),
        (["\n", "\n"], "\n", [], []),
        # A separator that can be seen is no part of the step either: the step format appends it.
        (["a", ";", "b"], ";", ["a", "b"], [2, 3]),
        (["a", " ", ";", ";", "b"], ";", ["a", "b"], [4, 5]),
    ],
)  # fmt: skip
def test_cuts(merging_tokenizer, pieces, separator, steps, ends):
    ids = ids_of(merging_tokenizer, *pieces)
    assert cut_steps(merging_tokenizer, ids, separator) == (tuple(steps), tuple(ends))
    closed = [*ids, merging_tokenizer.eos_token_id, merging_tokenizer.eos_token_id]
    assert cut_steps(merging_tokenizer, closed, separator) == (tuple(steps), tuple(ends))


@pytest.mark.parametrize("separator", ["\n", "\n\n", ";"])
def test_slices_between_the_ends_give_back_the_ids(merging_tokenizer, separator):
    rng = random.Random(0)
    pool = ids_of(merging_tokenizer, "a", "b", "4", "4\n", ".\n", "\n", "\n\n", ";", " ", "c")
    for _ in range(300):
        ids = [rng.choice(pool) for _ in range(rng.randint(0, 12))]
        steps, ends = cut_steps(merging_tokenizer, ids, separator)
        if not steps:
            assert not ends
            assert not merging_tokenizer.decode(ids).strip(" \n" + separator)
            continue
        slices = [ids[a:b] for a, b in zip((0, *ends), ends, strict=False)]
        assert [i for part in slices for i in part] == ids
        assert [merging_tokenizer.decode(part).strip(" \n" + separator) for part in slices] == list(steps)
        for step, part in zip(steps, slices, strict=True):
            assert step
            # A step ends at the first token that completes the separator: none is left inside.
            assert separator not in step
            text = merging_tokenizer.decode(part)
            assert separator in text[text.index(step) + len(step) :] or part is slices[-1]


def test_characters_split_over_tokens(merging_tokenizer):
    ids = merging_tokenizer("é = 4\nü")["input_ids"]
    steps, ends = cut_steps(merging_tokenizer, ids, "\n")
    assert steps == ("é = 4", "ü")
    assert ends[-1] == len(ids)
