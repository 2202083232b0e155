"""Self-talk: what stands in a chain, and which monologues are kept."""

from __future__ import annotations

from typing import Any

import pytest

from stepladder.basics import canonical_json
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.rows import Dialogue, Message, Source
from stepladder.data_gen.self_talk import rewritten, self_talk
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

TASK = ChainArith(p=7, min_steps=3, max_steps=3, sizes={"train": 1, "dev": 1, "test": 1})
SOURCE = Source("policy", "engine", "chain", 0)
TEMPLATE = "{draft}|{critique}|{refinement}"
DRAFT = ["3 + 5 = 1", "1 * 2 = 3", "3 - 1 = 2", "Answer: 2"]
RIGHT = "3 + 5 = 1\n1 * 2 = 2\n2 - 1 = 1\nAnswer: 1"


def refined(number: int = 0, correct: tuple[bool, bool] = (False, True), text: str = RIGHT, **more: Any) -> Dialogue:
    meta = {"id": "x/RG1/0/0", "prompt": "Start 3 ; + 5 ; * 2 ; - 1 \n", "reference": "1", "draft": DRAFT, "correct": list(correct),
            "first_error": None, "error_known": False, "critique": "no {draft}", "refinement": number, **more}  # fmt: skip
    messages = (Message("user", "q"), Message("assistant", text, train=True))
    return Dialogue("x", "refine", messages, canonical_json(meta), SOURCE)


def chains(*rows: Dialogue, **more: Any) -> Any:
    return self_talk(rows, TASK, TEMPLATE, **{"stop_at_error": True, "per_problem": 0, "seed": 0, **more})


@pytest.mark.parametrize(
    ("about", "kept"),
    [
        ({"first_error": 1, "error_known": True, "says_first_error": 3}, 2),  # the checker's word counts
        ({"says_first_error": 2}, 3),
        ({}, 4),
    ],
)
def test_a_chain_is_draft_critique_and_refinement_in_one_answer(about, kept):
    [row] = chains(refined(**about)).rows
    assert [(m.role, m.train) for m in row.messages] == [("user", False), ("assistant", True)]
    assert row.messages[0].content == "Start 3 ; + 5 ; * 2 ; - 1 \n"
    # A critique may well hold {draft}: nothing is filled in twice.
    assert row.messages[1].content == "\n".join(DRAFT[:kept]) + "|no {draft}|" + RIGHT
    assert row.kind == "selfcorrect"
    [whole] = chains(refined(**about), stop_at_error=False).rows
    assert whole.messages[1].content.startswith("\n".join(DRAFT) + "|")


def test_only_wrong_drafts_that_were_put_right_and_each_chain_once():
    rows = [refined(0), refined(1), refined(2, (True, True)), refined(3, (False, False)), refined(4, text="Answer: 1")]
    found = chains(*rows)
    assert len(found.rows) == 2
    assert found.dropped == {"refinements that do not put a wrong draft right": 2, "duplicates": 1}
    one = chains(*rows, per_problem=1)
    assert len(one.rows) == 1
    local = chains(refined(0, text="1 * 2 = 2\n2 - 1 = 1\nAnswer: 1", prefix=DRAFT[:1]))
    assert local.rows[0].messages[1].content.endswith("|" + RIGHT)  # a local refinement is told whole


def test_monologues_that_do_not_end_right_are_dropped(lab_words, fake_engine):
    rows = chains(refined(0), refined(1, text="Answer: 1"), refined(2, text="2 - 1 = 1\nAnswer: 1")).rows
    texts = ["Answer: 1", "Answer: 3", "Answer: 1 " * 30]
    engine = fake_engine(lab_words, lambda p, s: [*lab_words(texts.pop(0))["input_ids"], lab_words.eos_token_id])
    found = rewritten(
        engine, TASK, StepFormat.for_policy(lab_words, "\n"), rows, {"x": Problem("x", "q", "1")}, sampling=Sampling(40), seed=0,
        policy="writer",
    )  # fmt: skip
    [row] = found.rows
    assert (row.messages[1].content, row.source.policy) == ("Answer: 1", "writer")
    assert meta_of(row)["rewritten"]
    assert row.messages[0].content == rows[0].messages[0].content
    assert found.dropped == {"monologues that end wrong": 1, "monologues cut at their length": 1}
    assert found.ledger.generated_tokens > 0
