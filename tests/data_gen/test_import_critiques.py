"""Published critiques and drafts on hand-made records, and on the real files where they are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.drafts import drafts_of_dialogues
from stepladder.data_gen.importers import import_rows
from stepladder.data_gen.trajectories import chains_of_dialogues
from stepladder.models.corrections import read_critique
from stepladder.tasks.base import Problem
from stepladder.tasks.free import FreeText

DATA = Path(__file__).parents[2].parent / "shared" / "data"
CRITIC = """Step sentence: 2 + 2 = 5
Correctness of the step: Wrong
Explanation: it is 4.

Step sentence: The answer is 5.
Correctness of the step: Wrong

Correctness of the final answer: Wrong
"""
MATH_CRITIQUE = {
    "instruction": "How much is 2 + 2?\n\nAssistant:Let's see:\n\n2 + 2 = 5\nThe answer is 5.\n<|end_of_text|>\nHuman: Here is a "
    f"critic.\n\n{CRITIC}",
    "input": "", "output": "2 + 2 = 4\nThe answer is 4.",
}  # fmt: skip
REAL_CRITIC = {
    "idx": 3,
    "question": "2 + 2?",
    "gt": "4",
    "reasoning": "One.\n\nSo \\boxed{5}",
    "model": "m",
    "previous_score": [False],
}
REASON = {
    "uuid": "u", "question": "q", "ground_truth_answer": 17, "model_output_steps": ["Step 1: a", "Step 2: b", "Step 3: c"],
    "model_output_answer_correctness": "wrong", "model_output_solution_first_error_step": 2,
    "model_output_solution_first_error_reason": "It is not\n17.",
}  # fmt: skip


def rows_of(tmp_path: Path, format: str, *records: dict[str, Any]) -> Any:
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return import_rows(path, format)


def test_math_critique_is_a_refinement_whose_answer_is_the_reference(tmp_path):
    right = {**MATH_CRITIQUE, "output": "Anew.\nThe answer is 5."}
    mute = {**MATH_CRITIQUE, "output": "\n \n"}
    found = rows_of(tmp_path, "math_critique", MATH_CRITIQUE, right, mute)
    row, same = found.rows
    assert [(m.role, m.train) for m in row.messages] == [
        ("user", False), ("assistant", False), ("user", False), ("assistant", True),
    ]  # fmt: skip
    assert row.messages[0].content == "How much is 2 + 2?"
    assert row.messages[1].content == "Let's see:\n\n2 + 2 = 5\nThe answer is 5."
    assert row.messages[2].content.startswith("Here is a critic.\n\nStep sentence:")
    meta = meta_of(row)
    assert (meta["draft"], meta["correct"], meta["reference"]) == (
        ["Let's see:", "2 + 2 = 5", "The answer is 5."],
        [False, True],
        "4",
    )
    assert (meta["wrong"], meta["says_first_error"]) == (True, 0)
    assert meta_of(same)["correct"] == [True, True]  # the draft gave that answer already
    assert found.dropped == {"whose refinement has no answer that can be read": 1}
    [chain] = chains_of_dialogues([row])
    assert [a.right for a in chain.attempts] == [False, True]
    assert chain.said[0].wrong


def test_real_critic_is_a_draft_that_nothing_trains_on(tmp_path):
    row, other = rows_of(tmp_path, "real_critic", REAL_CRITIC, {**REAL_CRITIC, "previous_score": [True]}).rows
    assert row.kind == "draft"
    assert not any(message.train for message in row.messages)
    assert meta_of(row)["correct"] == [False]
    assert meta_of(other)["correct"] == [True]
    assert meta_of(row)["id"] != meta_of(other)["id"]
    assert (row.problem_id, row.source.policy) == (other.problem_id, "m")
    [chain, _] = chains_of_dialogues([row, other])
    assert chain.said == (None,)
    [draft] = drafts_of_dialogues([row, other])  # the same solution twice
    assert (draft.steps, draft.right, draft.problem.answer, draft.writer) == (
        ("One.", "So \\boxed{5}"),
        False,
        "4",
        "m",
    )


def test_reasons_of_mr_gsm8k_are_critiques_up_to_the_first_wrong_step(tmp_path):
    lucky = {**REASON, "model_output_answer_correctness": "correct"}
    found = rows_of(
        tmp_path, "mr_gsm8k_reasons", REASON, lucky, {**REASON, "model_output_solution_first_error_reason": " "}
    )
    row, right = found.rows
    assert meta_of(row)["critique"] == (
        "Step: Step 1: a\nVerdict: Correct\nStep: Step 2: b\nVerdict: Wrong\nExplanation: It is not 17.\n"
        "Final answer verdict: Wrong"
    )
    reading = read_critique(row.messages[-1].content)
    assert (reading.first_error, reading.wrong) == (1, True)
    assert (meta_of(row)["first_error"], meta_of(row)["error_known"], meta_of(row)["correct"]) == (1, True, [False])
    assert read_critique(right.messages[-1].content).wrong is False  # a flawed solution with a right answer
    assert row.messages[-1].train
    assert found.dropped == {"without a reason": 1}


@pytest.mark.parametrize(
    ("format", "good", "change", "message"),
    [
        ("math_critique", MATH_CRITIQUE, {"instruction": "Solve."}, "field instruction: expected a problem, Assistant: a draft"),
        ("math_critique", MATH_CRITIQUE, {"output": 4}, "field output: expected text"),
        ("real_critic", REAL_CRITIC, {"previous_score": [1]}, "field previous_score: expected a list of one true or false"),
        ("real_critic", REAL_CRITIC, {"previous_score": []}, "field previous_score: expected a list of one"),
        ("mr_gsm8k_reasons", REASON, {"model_output_solution_first_error_step": 4}, "a whole number from 1 to 3, found 4"),
        ("mr_gsm8k_reasons", REASON, {"model_output_answer_correctness": "?"}, "expected correct, or wrong or incorrect"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_of_the_format_is_one_sentence(tmp_path, format, good, change, message):
    with pytest.raises(UserError, match=message) as error:
        rows_of(tmp_path, format, good, {**good, **change})
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}, line 2")


REAL = [  # file, format, rows, right drafts, most verdicts that this grader does not share (by answer_kind)
    ("math_critique/gsm8k_refinements.json", "math_critique", 100, 0, ("any", 0)),
    ("math_critique/math_refinements.json", "math_critique", 50, 0, ("any", 0)),
    ("real_critic/gsm8k.jsonl", "real_critic", 221, 117, ("any", 0)),
    ("real_critic/math.jsonl", "real_critic", 221, 115, ("any", 1)),
    ("real_critic/arc-challenge.jsonl", "real_critic", 263, 131, ("choice", 5)),
    ("real_critic/mmlu_stem.jsonl", "real_critic", 234, 119, ("choice", 22)),
    ("mr_gsm8k/first_error_reasons.jsonl", "mr_gsm8k_reasons", 446, 16, None),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not there")
@pytest.mark.parametrize(("file", "format", "count", "right", "graded"), REAL)
def test_the_published_files(file, format, count, right, graded):
    found = import_rows(DATA / file, format)
    metas = [meta_of(row) for row in found.rows]
    assert (len(metas), found.dropped) == (count, {})
    assert len({meta["id"] for meta in metas}) == count
    assert sum(meta["correct"][0] for meta in metas) == right
    assert all(meta["draft"] and all(step.strip() for step in meta["draft"]) for meta in metas)
    assert len(chains_of_dialogues(found.rows)) == count
    if graded is not None:
        task = FreeText(answer_kind=graded[0])
        verdicts = [
            task.verify(Problem("", meta["prompt"], meta["reference"]), row.messages[1].content).right
            for row, meta in zip(found.rows, metas, strict=True)
        ]
        assert sum(v != meta["correct"][0] for v, meta in zip(verdicts, metas, strict=True)) == graded[1]
