"""Sampled solutions, demonstrations, and the best solutions to fine-tune on."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from stepladder.basics import UserError, fold_seed
from stepladder.data_gen.rows import Message, Solution, Source
from stepladder.data_gen.solutions import best_solutions, demonstrations, sample_solutions, to_dialogue
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

TASK = ChainArith(p=11, min_steps=1, max_steps=2, sizes={"train": 8})
SOURCE = Source("policy", "fake", "chain", 0)


def sample(engine, tokenizer, problems, samples=3, seed=5, limit=30):
    step_format = StepFormat.for_policy(tokenizer, "\n")
    return sample_solutions(
        engine, TASK, step_format, problems, samples=samples, sampling=Sampling(limit), seed=seed, policy="me"
    )


def test_rows_hold_what_was_sampled_and_its_verdict(lab_words, fake_engine):
    problem = Problem("p0", "Start 3 ; + 5 \n", "8")
    texts = ["3 + 5 = 8 \n Answer: 8 <eos>", "3 + 5 = 9 \n Answer: 9 <eos>", "3 + 5 = 8 \n 3", ""]
    seeds = [fold_seed(5, "p0", "solution", k) for k in range(4)]
    engine = fake_engine(lab_words, lambda _, seed: lab_words(texts[seeds.index(seed)])["input_ids"])
    result = sample(engine, lab_words, [problem], samples=4)
    right, _wrong, cut, empty = result.rows
    assert [r.sample for r in result.rows] == [0, 1, 2, 3]
    assert [r.outcome for r in result.rows] == ["right", "wrong", "unparseable", "unparseable"]
    assert [r.answer for r in result.rows] == ["8", "9", None, None]
    assert [r.stop for r in result.rows] == ["eos", "eos", "length", "length"]
    assert (right.steps, right.step_ends) == (("3 + 5 = 8", "Answer: 8"), (6, 8))
    assert right.text == "3 + 5 = 8 \n Answer: 8"
    assert right.token_ids == tuple(lab_words(texts[0])["input_ids"])
    assert right.logprob == -0.5 * 9
    assert (right.problem_id, right.prompt, right.gold) == ("p0", problem.prompt, "8")
    assert right.source == Source("me", "fake", "chain", 5)
    assert (cut.steps, cut.step_ends) == (("3 + 5 = 8", "3"), (6, 7))
    assert (empty.steps, empty.step_ends, empty.token_ids, empty.text) == ((), (), (), "")
    assert result.ledger.generated_tokens == 9 + 9 + 7
    assert engine.asked[0].prefix == tuple(lab_words(problem.prompt)["input_ids"])


def test_prompts_longer_than_the_context_are_dropped_and_counted(lab_words, fake_engine):
    problems = TASK.problems("train")
    engine = fake_engine(lab_words, lambda _, __: [7], context=7)  # one operation makes 6 tokens, two make 9
    result = sample(engine, lab_words, problems)
    short = [p.id for p in problems if p.meta["steps"] == 1]
    assert Counter(r.problem_id for r in result.rows) == dict.fromkeys(short, 3)
    assert result.dropped == {"prompts longer than the context": len(problems) - len(short)}


def test_same_arguments_same_rows_whatever_ran_before_and_beside(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    problems = TASK.problems("train")
    first = sample(engine, lab_words, problems)
    assert sample(engine, lab_words, problems).rows == first.rows
    assert sample(engine, lab_words, problems, seed=6).rows != first.rows
    # More samples do not change the first ones; other problems beside do not either, but for rounding of log-probabilities.
    ids = lambda rows: [(r.problem_id, r.sample, r.token_ids) for r in rows]
    more = sample(engine, lab_words, problems, samples=5).rows
    assert ids(r for r in more if r.sample < 3) == ids(first.rows)
    assert ids(sample(engine, lab_words, problems[3:5]).rows) == ids(first.rows[9:15])


def test_the_ledger_is_that_of_the_call_alone(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    ledgers = [sample(engine, lab_words, TASK.problems("train")).ledger for _ in range(2)]
    assert ledgers[0].generated_tokens == ledgers[1].generated_tokens > 0
    assert (ledgers[0] + ledgers[1]).generated_tokens == engine.ledger.generated_tokens


# --- demonstrations --------------------------------------------------------------------------------------------------------


def test_demonstrations_of_the_lab_are_noisy_and_repeat():
    problems = TASK.problems("train")
    result = demonstrations(TASK, problems, seed=3)
    assert [r.problem_id for r in result.rows] == [p.id for p in problems]
    for row, problem in zip(result.rows, problems, strict=True):
        steps = TASK.demonstration(problem, fold_seed(3, problem.id, "demonstration"))
        assert row.messages == (Message("user", problem.prompt), Message("assistant", "\n".join(steps), train=True))
        assert row.kind == "solve"
    assert demonstrations(TASK, problems, seed=3).rows == result.rows


def test_reference_solutions_where_there_are_some():
    class References:
        name, step_separator = "refs", "\n"

        def reference_steps(self, problem):
            return ["a", "b"] if problem.id != "p1" else None

    problems = [Problem(f"p{i}", f"q{i}", "1") for i in range(3)]
    result = demonstrations(References(), problems, seed=0)
    assert [r.problem_id for r in result.rows] == ["p0", "p2"]
    assert result.dropped == {"problems without a reference solution": 1}
    with pytest.raises(UserError, match="task refs: no problem has a reference solution"):
        demonstrations(References(), problems[1:2], seed=0)


# --- the best solutions ----------------------------------------------------------------------------------------------------


def row(problem: str, number: int, steps: str, outcome: str = "right") -> Solution:
    return Solution(
        problem,
        f"prompt of {problem}",
        "1",
        number,
        tuple(steps.split()),
        steps,
        "1",
        outcome,
        "eos",
        (),
        (),
        -1.0,
        SOURCE,
    )


def chosen(result) -> list[tuple[str, str]]:
    return [(r.problem_id, r.messages[1].content.replace("\n", " ")) for r in result.rows]


SOLUTIONS = [
    row("p", 0, "a"), row("p", 1, "b", "wrong"), row("q", 0, "c", "unparseable"), row("p", 2, "a"),
    row("p", 3, "d e"), row("p", 4, "f"), row("r", 0, "a"), row("q", 1, "g", "wrong"),
]  # fmt: skip


def test_the_highest_scores_come_first():
    scores = [0.1, 0.9, 0.9, 0.5, 0.7, 0.3, 0.0, 0.9]
    result = best_solutions(SOLUTIONS, scores, per_problem=2, separator="\n", seed=0)
    # Of p the ranking is d e (.7), a (.5), f (.3), a (.1): the second a is a duplicate, f is beyond two.
    assert chosen(result) == [("p", "d e"), ("p", "a"), ("r", "a")]
    assert result.dropped == {
        "answers wrong": 2, "answers unparseable": 1, "duplicates": 1, "beyond the limit a problem": 1,
        "problems without a right solution": 1,
    }  # fmt: skip
    assert len(result.rows) + 5 == len(SOLUTIONS)  # every solution is kept or counted
    assert result.rows[0].messages == (Message("user", "prompt of p"), Message("assistant", "d\ne", train=True))
    assert result.rows[0].source == SOURCE


def test_equal_scores_keep_the_order_of_sampling():
    result = best_solutions(SOLUTIONS, [0.5] * 8, per_problem=2, separator="\n", seed=0)
    assert chosen(result) == [("p", "a"), ("p", "d e"), ("r", "a")]
    backwards = best_solutions(SOLUTIONS[::-1], [0.5] * 8, per_problem=2, separator="\n", seed=0)
    assert chosen(backwards) == [("r", "a"), ("p", "f"), ("p", "d e")]


def test_without_scores_the_choice_is_drawn_with_the_seed():
    many = [row("p", i, f"s{i}") for i in range(10)]
    picks = Counter()
    for seed in range(400):
        result = best_solutions(many, None, per_problem=2, separator="\n", seed=seed)
        assert len(result.rows) == 2
        assert chosen(result) == chosen(best_solutions(many, None, per_problem=2, separator="\n", seed=seed))
        picks.update(text for _, text in chosen(result))
    assert set(picks) == {f"s{i}" for i in range(10)}
    assert all(abs(n - 80) < 4 * (400 * 0.2 * 0.8) ** 0.5 for n in picks.values())


def test_a_limit_above_what_there_is_keeps_all_that_differ():
    result = best_solutions(SOLUTIONS, None, per_problem=100, separator="\n", seed=0)
    assert sorted(chosen(result)) == [("p", "a"), ("p", "d e"), ("p", "f"), ("r", "a")]
    assert best_solutions([], None, per_problem=1, separator="\n", seed=0).rows == []


def test_what_is_learnt_reads_as_what_was_sampled(lab_words):
    """The dialogue's text gives the ids of the steps as a policy samples them, between newline tokens."""
    steps = ["3 + 5 = 8", "Answer: 8"]
    dialogue = to_dialogue("p", "Start 3 ; + 5 \n", steps, "\n", SOURCE)
    assert lab_words(dialogue.messages[1].content)["input_ids"] == lab_words("3 + 5 = 8 \n Answer: 8")["input_ids"]
    assert dataclasses.is_dataclass(dialogue)
