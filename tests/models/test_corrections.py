"""What is said in corrections: critiques are written and read, answers are cut, dialogues are laid out as they are learnt."""

from __future__ import annotations

import pytest
import torch

from stepladder.basics import UserError
from stepladder.data_gen.rows import Dialogue, Message, Source
from stepladder.models.corrections import (
    StepVerdict,
    Wording,
    fill,
    leaks,
    read_critique,
    strip_leaks,
    write_critique,
)
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer, with_words
from stepladder.models.step_format import StepFormat
from stepladder.trainers.sft import dialogue_example


def test_a_critique_is_read_as_it_was_written():
    text = write_critique([StepVerdict("a\n b", True), StepVerdict("c", False, "expected d")], False)
    assert text.split("\n")[0] == "Step: a b"
    first = write_critique([StepVerdict("c", False, "expected d")], False, reason_first=True)
    assert first.split("\n") == ["Step: c", "Explanation: expected d", "Verdict: Wrong", "Final answer verdict: Wrong"]
    found = read_critique(text)
    assert (found.steps, found.answer, found.wrong, found.first_error) == ((True, False), False, True, 1)
    right = read_critique(write_critique([StepVerdict("a", True)], True))
    assert (right.wrong, right.first_error) == (False, None)


@pytest.mark.parametrize(
    ("text", "steps", "answer"),
    [
        ("Correctness of the step: Wrong\nCorrectness of the final answer: Wrong", (False,), False),
        ("**Verdict**: Correct\n**Verdict:** incorrect", (True, False), None),
        (" Verdict: Right\nFinal answer verdict: Correct\nFinal answer verdict: Wrong", (True,), False),
        ("The verdict: Wrong", (), None),  # in the middle of a line it is talk
        ("Verdict: Wrongly put", (), None),
        ("", (), None),
    ],
)
def test_verdicts_in_other_words(text, steps, answer):
    found = read_critique(text)
    assert (found.steps, found.answer) == (steps, answer)


def test_without_a_verdict_on_the_answer_a_wrong_step_decides():
    assert read_critique("Verdict: Correct\nVerdict: Wrong").wrong is True
    assert read_critique("Verdict: Correct").wrong is False
    assert read_critique("nothing").wrong is None
    assert read_critique("Verdict: Wrong\nFinal answer verdict: Correct").wrong is False


@pytest.mark.parametrize(
    ("critique", "shown", "want"),
    [
        ("Explanation: no. It should be 28.", "has 53 and 5", "Explanation: no."),
        ("Explanation: It should be 28.", "has 53", ""),  # nothing is left: the label goes too
        ("Explanation: It should be 28.", "has 28", "Explanation: It should be 28."),  # known from the problem
        ("Explanation: The answer is 28.", "has 28", ""),
        ("Step: so 28", "has 53", "Step: so 28"),  # a step of the draft is repeated, not told
        ("Explanation: 280 or 1.28 or 28.5 are far.", "x", "Explanation: 280 or 1.28 or 28.5 are far."),
    ],
)
def test_sentences_that_give_the_answer_away_are_cut(critique, shown, want):
    assert strip_leaks(critique, "28", shown)[0] == want
    assert leaks(critique, "28", shown) == (want != critique)


def test_an_answer_of_one_character_stands_anywhere_by_chance():
    assert not leaks("Explanation: expected 3 + 5 = 1", "1", "Start 3 ; + 5")
    assert leaks("Explanation: expected Answer: 1", "1", "Start 3 ; + 5")


def test_turns_of_a_correction():
    wording = Wording(critique="{prompt}|{draft}", refine="R {critique}", retry="again {prompt}")
    asked = wording.ask_attempt("q", ["a", "b", "c"], ["x", None, "{prompt}"], shown=2)
    assert asked == [("user", "q"), ("assistant", "b"), ("user", "again q"), ("assistant", "c"), ("user", "R {prompt}")]
    assert len(wording.ask_attempt("q", ["a", "b", "c"], ["x", None, "y"], shown=0)) == 7
    assert wording.ask_attempt("q", [], []) == [("user", "q")]
    reflexion = Wording.named("reflexion")
    [(role, text)] = reflexion.ask_attempt("q?", ["a", "b", "c"], ["x", "y", "z"], shown=2)
    assert role == "user"
    assert "q?" in text
    assert "y\nz" in text
    assert "x" not in text.split("failed:")[1]
    assert fill("{a} {b} {c}", a="{b}", b="2") == "{b} 2 {c}"
    with pytest.raises(ValueError, match=r"critique_prompt must contain \{draft\}"):
        Wording.named("text", critique="{prompt}")
    with pytest.raises(ValueError, match="wording must be one of"):
        Wording.named("lisp")


def test_lab_turns_are_ordinary_text_and_learnt_as_they_are_asked():
    words = lab_tokenizer(6, CORRECTION_WORDS)
    plain = lab_tokenizer(6)
    step_format = StepFormat.for_policy(words, "\n")
    lab = Wording.named("lab")
    turns = lab.ask_attempt("Start 3 ; + 5 \n", ["3 + 5 = 1\nAnswer: 1"], ["Step: 3 + 5 = 1\nVerdict: Correct"])
    answer = "3 + 5 = 1\nAnswer: 1"
    messages = [*(Message(r, c) for r, c in turns), Message("assistant", answer, train=True)]
    example, what = dialogue_example(
        Dialogue("q", "refine", tuple(messages), "{}", Source("p", "e", "t", 0)), words, step_format, 200
    )
    assert what == "kept"
    asked = step_format.encode_dialogue(words, turns)
    ids = words(answer)["input_ids"] + [words.eos_token_id]
    assert tuple(example["input_ids"][: len(asked)]) == asked
    assert [i for i in example["labels"] if i != -100] == ids
    assert example["labels"][: len(asked)] == [-100] * len(asked)
    assert words.unk_token_id not in example["input_ids"]
    # The first turn is laid out as ever.
    assert step_format.encode_dialogue(words, turns[:1]) == tuple(plain(turns[0][1])["input_ids"])
    with pytest.raises(UserError, match="a dialogue of 3 turns needs a chat template"):
        StepFormat.for_policy(plain, "\n").encode_dialogue(plain, turns)


def test_a_policy_with_further_words_writes_what_it_wrote(tiny_policy):
    old = lab_tokenizer(6)
    model = tiny_policy(old, scale=3.0)
    with torch.no_grad():
        model.lm_head.weight[old.unk_token_id] = -model.lm_head.weight.mean(0)
    ids = torch.tensor([old("Start 3 ; + 5 \n 3 + 5 = 1")["input_ids"]])
    before = model(ids).logits
    wider, words = with_words(model, old, CORRECTION_WORDS)
    after = wider(ids).logits
    torch.testing.assert_close(after[..., : len(old)], before)
    torch.testing.assert_close(
        after[..., len(old) :], before[..., old.unk_token_id, None].expand_as(after[..., len(old) :])
    )
    assert words("Start 3")["input_ids"] == old("Start 3")["input_ids"]
    with pytest.raises(UserError, match="lab's own tokenizer"):
        with_words(wider, words, ["more"])
