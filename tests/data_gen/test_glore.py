"""Rows for global and local refiners: pairs, first wrong steps from labels, right ends from there."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.glore import first_wrong, global_refinements, local_refinements, wrong_drafts
from stepladder.data_gen.label_sets import positive_prefixes
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.data_gen.trajectories import chains_of_dialogues
from stepladder.models.corrections import Wording, mark_step
from stepladder.models.engine import Sampling
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

LAB = Wording.named("lab")
SOURCE = Source("policy", "engine", "chain", 0)
TASK = ChainArith(p=7, min_steps=3, max_steps=3, sizes={"train": 1, "dev": 1, "test": 1})
PROBLEM = Problem("x", "Start 3 ; + 5 ; * 2 ; - 1 \n", "1")
WRONG = ("3 + 5 = 1", "1 * 2 = 3", "3 - 1 = 2", "Answer: 2")


def solution(problem: str, sample: int, right: bool, *steps: str) -> Solution:
    return Solution(problem, "Q", "7", sample, steps, "\n".join(steps), steps[-1] if steps else None,
                    "right" if right else "wrong", "eos", (), (), 0.0, SOURCE)  # fmt: skip


def labels(correct: tuple[int, ...], steps: tuple[str, ...] = WRONG, outcome: str = "wrong", **more: Any) -> StepLabels:
    rollouts = more.pop("rollouts", (1,) * len(correct))
    return StepLabels("x", PROBLEM.prompt, "1", more.pop("sample", 0), steps, correct, rollouts, "monte_carlo", outcome,
                      1, True, SOURCE)  # fmt: skip


def test_wrong_drafts_are_paired_with_right_solutions_of_the_same_problem_alone():
    rows = [
        solution("p", 0, False, "a", "b"), solution("p", 1, False, "a", "b"), solution("p", 2, False, "c"),
        solution("p", 3, True, "r1"), solution("p", 4, True, "r1"), solution("p", 5, True, "r2"), solution("p", 6, False),
        solution("q", 0, False, "d"), solution("s", 0, True, "r3"),
    ]  # fmt: skip
    found = global_refinements(rows, LAB, per_draft=5, per_problem=0, separator="\n", seed=0)
    pairs = [(meta_of(row)["draft"], row.messages[-1].content) for row in found.rows]
    assert sorted(map(str, pairs)) == sorted(
        map(str, [(["a", "b"], "r1"), (["a", "b"], "r2"), (["c"], "r1"), (["c"], "r2")])
    )
    assert found.dropped == {"empty drafts": 1, "drafts of problems without a right solution": 1}
    assert [(m.role, m.content, m.train) for m in found.rows[0].messages] == [
        ("user", "Q", False), ("assistant", "a\nb", False), ("user", "Retry: \n Q", False),
        ("assistant", pairs[0][1], True),
    ]  # fmt: skip
    one = global_refinements(rows, LAB, per_draft=1, per_problem=1, separator="\n", seed=3)
    assert [meta_of(row)["draft"] for row in one.rows] == [["a", "b"]]
    assert one.dropped["drafts beyond the limit a problem"] == 1
    targets = {
        seed: global_refinements(rows, LAB, per_draft=1, per_problem=1, separator="\n", seed=seed).rows[0].messages[-1]
        for seed in range(12)
    }
    assert {message.content for message in targets.values()} == {"r1", "r2"}


@pytest.mark.parametrize(
    ("correct", "rollouts", "error"),
    [
        ((1, 1, 0, 0, 0), (1,) * 5, 1),
        ((1, 0, 1, 0, 0), (1,) * 5, 2),  # a positive prefix makes those before it positive
        ((1, 0, 0, 0, 0), (1,) * 5, 0),
        ((0, 0, 0, 0, 0), (1,) * 5, None),  # not solved at all
        ((0, 0, 0, 0, 0), (0, 1, 0, 0, 0), 0),  # nothing is known of the empty prefix
        ((1, 1, 0, 0, 0), (1, 1, 0, 0, 0), None),  # no label behind the last positive prefix
        ((1, 1, 1, 1, 1), (1,) * 5, None),
    ],
)
def test_the_first_wrong_step_stands_behind_the_longest_positive_prefix(correct, rollouts, error):
    row = labels(correct, rollouts=rollouts)
    assert first_wrong(row, positive_prefixes([row])[1]) == error


def test_a_prefix_that_another_solution_shows_to_be_positive_is_so_everywhere():
    other = labels((1, 1, 1, 1), (*WRONG[:2], "x"), outcome="right", sample=1)
    row = labels((1, 0, 0, 0, 0))
    drafts, counts = wrong_drafts([row, other, row])
    assert [(draft.steps, error) for draft, error in drafts] == [(WRONG, 2)]
    assert counts == {"right solutions": 1, "duplicates": 1}


@pytest.fixture(scope="module")
def words() -> Any:
    return lab_tokenizer(8, CORRECTION_WORDS)


def rows_of(words: Any, fake_engine: Any, endings: list[str], **more: Any) -> Any:
    engine = fake_engine(words, lambda prefix, seed: [*words(endings.pop(0))["input_ids"], words.eos_token_id])
    settings = {"samples": len(endings), "per_draft": 9, "consistent": True, "error": 1, **more}
    error = settings.pop("error")
    found = local_refinements(
        engine, TASK, StepFormat.for_policy(words, "\n"), [(labels((1, 1, 0, 0, 0)), error)], {"x": PROBLEM}, LAB,
        sampling=Sampling(40), seed=0, policy="p", **settings,
    )  # fmt: skip
    return found, engine


def test_right_ends_from_the_first_wrong_step_on_become_targets(words, fake_engine):
    right = "1 * 2 = 2 \n 2 - 1 = 1 \n Answer: 1"
    found, engine = rows_of(words, fake_engine, [
        right, "1 * 2 = 2 \n 2 - 1 = 3 \n Answer: 3", right, "1 * 2 = 3 \n 3 - 1 = 1 \n Answer: 1", "5 * 2 = 2 \n Answer: 1",
    ])  # fmt: skip
    [row] = found.rows[:1]
    assert words.decode(engine.asked[0].prefix) == words.decode(words(PROBLEM.prompt + "3 + 5 = 1 \n")["input_ids"])
    # The marker stands before the wrong step, and the target begins with what should be there.
    assert row.messages[1].content == "3 + 5 = 1\n[BAD] 1 * 2 = 3\n3 - 1 = 2\nAnswer: 2"
    assert row.messages[-1].content == "1 * 2 = 2\n2 - 1 = 1\nAnswer: 1"
    assert [m.train for m in row.messages] == [False, False, False, True]
    # The one that does not use the 1 of the step before holds a 1 in its answer, which is enough.
    assert len(found.rows) == 2
    assert found.dropped == {"right ends that take the step called wrong": 1}
    [chain] = chains_of_dialogues(found.rows[:1])
    assert chain.attempts[1].text == "3 + 5 = 1\n1 * 2 = 2\n2 - 1 = 1\nAnswer: 1"
    assert [a.right for a in chain.attempts] == [False, True]
    assert chain.said == (None, None)


def test_ends_that_ignore_the_step_before_are_left_out_and_drafts_without_an_end_counted(words, fake_engine):
    ignoring = "5 * 2 = 8 \n 8 - 3 = 2 \n Answer: 1"
    problem_step = labels((1, 1, 1, 0, 0))  # the step before the error ends with 3
    assert problem_step.steps[1].endswith("3")
    kept, _ = rows_of(words, fake_engine, ["4 - 3 = 1 \n Answer: 1"], error=2)
    assert len(kept.rows) == 1
    lost, _ = rows_of(words, fake_engine, ["2 - 1 = 1 \n Answer: 1"], error=2)
    assert not lost.rows
    assert lost.dropped == {"right ends that do not use the step before them": 1, "drafts without a right end": 1}
    plain, _ = rows_of(words, fake_engine, ["2 - 1 = 1 \n Answer: 1", ignoring], error=2, consistent=False, per_draft=1)
    assert len(plain.rows) == 1


def test_the_marker_stands_before_its_step():
    assert mark_step(["a", "b", "c"], 0, "\n") == "[BAD] a\nb\nc"
    assert mark_step(["a", "b", "c"], 2, "\n\n") == "a\n\nb\n\n[BAD] c"
    for error in (-1, 3):
        with pytest.raises(ValueError, match="none of 3 steps"):
            mark_step(["a", "b", "c"], error, "\n")
