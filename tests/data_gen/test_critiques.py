"""Critiques: exact, corrupted and written ones."""

from __future__ import annotations

from collections import Counter

from stepladder.data_gen.critiques import (
    Layout,
    corrupted,
    critique_rows,
    exact_critique,
    exact_critiques,
    written_critiques,
)
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.drafts import Draft, planted_drafts
from stepladder.data_gen.rows import Source
from stepladder.models.corrections import Wording, read_critique
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

TASK = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 30, "dev": 1, "test": 1})
LAB = Wording.named("lab")
SOURCE = Source("policy", "engine", "task", 0)


def flawed(answer: str = "3") -> Draft:
    problem = Problem("q", "Start 3 ; + 5 ; * 2 ; - 1 \n", "1")  # 3 + 5 = 1, 1 * 2 = 2, 2 - 1 = 1
    return Draft(problem, ("3 + 5 = 1", "1 * 2 = 4", "4 - 1 = 3", f"Answer: {answer}"), False, "RG1", 0, "p", 1, True)


def test_the_exact_critique_names_the_step_what_was_expected_and_what_only_inherits():
    text = exact_critique(TASK, flawed())
    assert text.split("\n") == [
        "Step: 3 + 5 = 1", "Verdict: Correct", "Step: 1 * 2 = 4", "Verdict: Wrong", "Explanation: expected 1 * 2 = 2",
        "Step: 4 - 1 = 3", "Verdict: Correct", "Explanation: inherits error from step 2",
        "Step: Answer: 3", "Verdict: Correct", "Explanation: inherits error from step 2", "Final answer verdict: Wrong",
    ]  # fmt: skip
    short = exact_critique(TASK, flawed(), Layout(stop_at_error=True))
    assert short.split("\n") == [*text.split("\n")[:5], "Final answer verdict: Wrong"]
    first = exact_critique(TASK, flawed(), Layout(stop_at_error=True, reason_first=True))
    assert first.split("\n") == [
        "Step: 3 + 5 = 1", "Explanation: expected 3 + 5 = 1 error 1 - 1 = 0", "Verdict: Correct",
        "Step: 1 * 2 = 4", "Explanation: expected 1 * 2 = 2 error 4 - 2 = 2", "Verdict: Wrong", "Final answer verdict: Wrong",
    ]  # fmt: skip
    bare = exact_critique(TASK, flawed(), Layout(stop_at_error=True, reason_first=True, results=False))
    assert [line for line in bare.split("\n") if "expected" in line] == [
        "Explanation: expected 3 + 5", "Explanation: expected 1 * 2"
    ]  # fmt: skip
    open_end = exact_critique(TASK, flawed(), Layout(final=False))
    assert open_end + "\nFinal answer verdict: Wrong" == text
    assert read_critique(open_end).wrong
    assert "Final" not in corrupted(TASK, flawed(), 7, Layout(final=False))
    # An answer line has no equals sign: without results nothing is said of it.
    late = Draft(flawed().problem, ("3 + 5 = 1", "1 * 2 = 2", "2 - 1 = 1", "Answer: 3"), False, "RG1", 0, "p", 3, True)
    assert exact_critique(TASK, late, Layout(results=False)).endswith("Verdict: Wrong\nFinal answer verdict: Wrong")
    assert (
        exact_critique(TASK, flawed("5")).count("Verdict: Wrong") == 2
    )  # the answer does not repeat the last value either


def test_exact_critiques_find_every_planted_error_and_lab_texts_have_no_unknown_word(problems, words):
    drafts = [
        d for p in problems.values() for o in ("RG2", "RG3") for d in planted_drafts(TASK, p, origin=o, count=2, seed=2)
    ]
    either = [
        row
        for first in (False, True)
        for row in exact_critiques(TASK, drafts, LAB, seed=0, layout=Layout(reason_first=first)).rows
    ]
    for row in either:
        meta = meta_of(row)
        assert read_critique(row.messages[1].content).first_error == meta["first_error"]
        assert row.messages[1].train
        assert not row.messages[0].train
        assert row.kind == "critique"
        for message in row.messages:
            assert words.unk_token_id not in words(message.content)["input_ids"]


def test_a_share_is_corrupted_and_their_finding_is_wrong(problems):
    drafts = [d for p in problems.values() for d in planted_drafts(TASK, p, origin="RG2", count=8, seed=2)]
    result = exact_critiques(TASK, drafts, LAB, seed=0, corrupt=0.3)
    marks = Counter(meta_of(row)["mark"] for row in result.rows)
    assert 0.2 < marks["corrupted"] / len(drafts) < 0.4
    assert result.counts["corrupted critiques"] == marks["corrupted"]
    where = Counter()
    for seed in range(200):
        draft = drafts[seed % len(drafts)]
        reading = read_critique(corrupted(TASK, draft, seed * 7919 + 2**20))
        where["place" if reading.first_error != draft.first_error else "fix"] += 1
        said = corrupted(TASK, draft, seed * 7919 + 2**20).split("expected ")[1].split("\n")[0]
        if reading.first_error == draft.first_error:
            assert said != TASK.expected_step(draft.problem, draft.steps[: draft.first_error])
    assert min(where["place"], where["fix"]) > 50


def test_the_answer_is_cut_from_critiques_of_wrong_drafts_and_unread_ones_are_dropped(problems):
    draft = flawed()
    texts = [["Step: a\nVerdict: Wrong\nExplanation: no. The answer is 1.\nFinal answer verdict: Wrong", "I like it."]]
    result = critique_rows([draft], texts, LAB, TASK, SOURCE)
    assert [row.messages[1].content for row in result.rows] == [
        "Step: a\nVerdict: Wrong\nExplanation: no.\nFinal answer verdict: Wrong"
    ]
    assert result.counts["sentences cut that gave the answer away"] == 1
    assert result.dropped == {"critiques without a verdict": 1}
    every = critique_rows([draft], texts, LAB, TASK, SOURCE, keep_unreadable=True)
    assert len(every.rows) == len(result.rows) + 1
    assert [meta_of(row)["wrong"] for row in every.rows].count(None) == 1
    assert every.counts["critiques without a verdict"] == 1
    [kept] = critique_rows([draft], [texts[0][:1]], LAB, TASK, SOURCE, strip=False).rows
    assert "The answer is 1" in kept.messages[1].content


def test_an_annotator_is_told_and_rows_do_not_show_it(fake_engine, merging_tokenizer, plain_words):
    asked: list[str] = []

    def write(prefix, seed):
        asked.append(merging_tokenizer.decode(prefix))
        return merging_tokenizer("Verdict: Wrong<eos>")["input_ids"]

    engine = fake_engine(merging_tokenizer, write)
    draft = Draft(Problem("q", "what?", "7"), ("one", "so 5"), False, "RG3", 0, "p", 1, True, "slip")
    step_format = StepFormat.for_policy(merging_tokenizer, "\n")
    for annotate in (True, False):
        asked.clear()
        result = written_critiques(
            engine, plain_words, step_format, [draft], Wording(), samples=2, sampling=Sampling(40), seed=0, policy="p",
            annotate=annotate,
        )  # fmt: skip
        assert len(result.rows) == 2
        assert len({meta_of(row)["id"] for row in result.rows}) == 2
        assert (("ends with 7" in asked[0]) and ("error is in step 2" in asked[0])) == annotate
        assert "ends with 7" not in result.rows[0].messages[0].content
        assert result.ledger.generated_tokens > 0
