"""Refinements by critiques and without them, repairs, and rows to learn from."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from stepladder.data_gen.critiques import (
    exact_critiques,
)
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.drafts import Draft, planted_drafts
from stepladder.data_gen.refinements import (
    best_refinements,
    derangement,
    filter_critiques,
    refinements,
    repairs,
    shortcut,
)
from stepladder.data_gen.rows import Dialogue, Message, Source
from stepladder.models.corrections import Wording, read_critique
from stepladder.models.engine import Sample, Sampling, StopReason
from stepladder.models.ledger import Ledger
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith
from stepladder.tasks.load import load_task

TASK = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 30, "dev": 1, "test": 1})
LAB = Wording.named("lab")
SOURCE = Source("policy", "engine", "task", 0)


@pytest.fixture(scope="module")
def criticised(problems) -> list[Dialogue]:
    drafts = [d for p in problems.values() for d in planted_drafts(TASK, p, origin="RG2", count=2, seed=3)]
    rights = [
        Draft(p, tuple(TASK.reference_steps(p)), True, "RG1", 0, "p", None, True) for p in list(problems.values())[:5]
    ]
    return exact_critiques(TASK, [*drafts, *rights], LAB, seed=0, strip=False).rows


def follower(fake_engine, words):
    """An engine that repairs a draft only as its critique says: it reads the expected line and goes on without errors."""

    def write(prefix, seed):
        text = words.decode(prefix)
        head, _, said = text.partition("Critique:")
        prompt = head.split(" \n")[0] + " \n"
        problem = Problem("", prompt, "0")
        draft = [line.strip() for line in head.split("<eos>")[0].split("\n")[1:] if line.strip()]
        place = read_critique(said.replace(" \n ", "\n")).first_error
        fix = said.split("expected ")[1].split(" \n")[0].strip() if "expected" in said else None
        steps = draft if place is None or fix is None else [*draft[:place], fix]
        while place is not None and fix is not None and (more := TASK.expected_step(problem, steps)):
            steps = [*steps, more]
        return words(" \n ".join(steps) + " <eos>")["input_ids"]

    return fake_engine(words, write)


def test_refinements_follow_their_critique_and_controls_take_it_away(fake_engine, words, criticised, problems):
    engine = follower(fake_engine, words)
    step_format = StepFormat.for_policy(words, "\n")
    said = {meta_of(row)["id"]: meta_of(row)["critique"] for row in criticised}
    partners = derangement(list(said), 0)
    assert sorted(partners.values()) == sorted(said)
    assert all(a != b for a, b in partners.items())
    share = {}
    for control in ("", "empty", "shuffled"):
        result = refinements(
            engine, TASK, step_format, criticised, problems, LAB, samples=2, sampling=Sampling(120), seed=0, policy="p",
            control=control, donors={a: said[b] for a, b in partners.items()},
        )  # fmt: skip
        assert len(result.rows) == 2 * len(criticised)
        verdicts = [meta_of(row)["correct"] for row in result.rows]
        share[control] = sum(after for before, after in verdicts if not before) / sum(not b for b, _ in verdicts)
        assert all(
            row.kind == "refine" and [m.train for m in row.messages] == [False, False, False, True]
            for row in result.rows
        )
        for row in result.rows[:4]:  # what was asked is what is learnt
            turns = [(m.role, m.content) for m in row.messages[:-1]]
            assert step_format.encode_dialogue(words, turns) in {request.prefix for request in engine.asked}
    assert share[""] == 1.0
    assert share["empty"] < 0.2
    assert share["shuffled"] < 0.5


def test_repairs_put_the_expected_step_at_the_first_error(problems, criticised, erring_engine, words):
    engine = erring_engine(TASK, 0.0)
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")
    rows = repairs(
        engine, TASK, step_format, criticised, problems, LAB, samples=1, sampling=Sampling(80), seed=0, policy="p"
    ).rows
    assert len(rows) == len(criticised)
    for row in rows:
        meta = meta_of(row)
        steps = [line.strip() for line in row.messages[-1].content.split("\n")]
        error = meta["first_error"]
        assert steps[:error] == meta["draft"][:error]
        assert steps == TASK.reference_steps(problems[row.problem_id])  # this engine does not err
        assert meta["correct"] == [error is None, True]


def test_a_repair_in_words_goes_on_to_its_answer_though_its_line_holds_a_number(tmp_path, merging_tokenizer):
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"question": "17 less 9?", "answer": 8, "equation": "17 - 9"}) + "\n")
    config = {
        "kind": "text",
        "path": str(file),
        "equation_field": "equation",
        "splits": {"train": 1.0},
        "checked": True,
    }
    task = load_task(config)
    [problem] = task.problems("train")

    class Ends:
        ledger, name, tokenizer = Ledger(), "ends", merging_tokenizer

        def generate(self, requests, sampling):
            ids = tuple(merging_tokenizer("The answer is 8")["input_ids"])
            return [[Sample(ids, (0.0,) * len(ids), StopReason.EOS)] * len(r.seeds) for r in requests]

    text = Wording.named("text")
    slips = planted_drafts(task, problem, origin="RG2", count=2, seed=0)
    rows = exact_critiques(task, slips, text, seed=0).rows
    step_format = StepFormat.for_policy(merging_tokenizer, "\n")
    how = {"samples": 1, "sampling": Sampling(20), "seed": 0, "policy": "p"}
    made = repairs(Ends(), task, step_format, rows, {problem.id: problem}, text, **how).rows
    assert {d.first_error for d in slips} == {0, 1}
    assert [row.messages[-1].content for row in made] == ["17 - 9 = 8\nThe answer is 8"] * 2
    assert all(meta_of(row)["correct"] == [False, True] for row in made)


def told(
    identity: str, right: bool, wrong: bool, refined: list[bool], mark: str = "exact"
) -> tuple[Dialogue, list[Dialogue]]:
    meta = {
        "id": identity,
        "correct": [right],
        "wrong": wrong,
        "mark": mark,
        "draft": ["1 + 1 = 3"],
        "prompt": "q",
        "critique": identity,
    }
    row = Dialogue(
        "q", "critique", (Message("user", "?"), Message("assistant", identity, train=True)), json.dumps(meta), SOURCE
    )
    after = []
    for k, ok in enumerate(refined):
        about = json.dumps({**meta, "correct": [right, ok], "refinement": k})
        after.append(
            Dialogue(
                "q",
                "refine",
                (Message("user", "q"), Message("assistant", f"{identity} 1 + 1 = {k % 2}")),
                about,
                SOURCE,
            )
        )
    return row, after


def test_soft_and_hard_filters():
    made = [
        told("helps", False, True, [True, False, False]), told("seldom", False, True, [True] + [False] * 9),
        told("lucky", False, False, [True, True]), told("untried", False, True, []),
        told("fine", True, False, [True]), told("alarm", True, True, [True]),
    ]  # fmt: skip
    rows, refined = [m[0] for m in made], [r for m in made for r in m[1]]
    kept = lambda mode, **k: {meta_of(r)["id"] for r in filter_critiques(rows, refined, mode=mode, **k).rows}
    assert kept("soft") == {"helps", "lucky", "fine"}
    assert kept("hard") == {"helps", "seldom", "untried", "fine"}
    assert kept("both") == {"helps", "fine"}
    assert kept("none") == {"helps", "seldom", "lucky", "untried", "fine", "alarm"}
    assert kept("soft", threshold=0.1) == {"helps", "seldom", "lucky", "fine"}
    result = filter_critiques(rows, refined, mode="soft")
    assert sum(result.dropped.values()) == 3
    assert meta_of(result.rows[0])["mc_success"] == pytest.approx(1 / 3)
    assert meta_of(result.rows[0])["mc_rollouts"] == 3
    assert len(filter_critiques(rows, refined, mode="none", count=4, seed=1).rows) == 4


def test_what_is_learnt_from_refinements():
    _, refined = told("a", False, True, [True, True, False, True])
    _, rights = told("b", True, False, [True])
    result = best_refinements(
        [*refined, *rights], LAB, per_critique=5, seed=0, separator="\n", kinds=["refine", "solve", "critique"]
    )
    assert Counter(row.kind for row in result.rows) == {"refine": 2, "solve": 2, "critique": 1}
    assert result.dropped == {"refinements of right drafts": 1, "refinements that end wrong": 1, "duplicates": 1}
    [critique] = [row for row in result.rows if row.kind == "critique"]
    assert critique.messages[0].content == LAB.ask_critique("q", "1 + 1 = 3")[0][1]
    assert critique.messages[1].content == "a"
    assert critique.messages[1].train
    solved = next(row for row in result.rows if row.kind == "solve")
    assert [m.role for m in solved.messages] == ["user", "assistant"]
    every = best_refinements(refined, LAB, per_critique=9, seed=0, separator="\n", only_right=False)
    assert {meta_of(row)["correct"][1] for row in every.rows} == {True, False} or "duplicates" in every.dropped
    assert "refinements that end wrong" not in every.dropped
    both = best_refinements([*refined, *rights], LAB, per_critique=1, seed=0, separator="\n", repair_only=False)
    assert len(both.rows) == 2


def test_a_refinement_that_only_states_its_answer_is_a_shortcut():
    assert shortcut("Answer: 4", "1 2 3 4 5", "1 2 3 4")
    assert not shortcut("Answer: 4", "1 2 3 4 5", "1 2 3")  # two fewer are allowed
    assert not shortcut("1 2 3", "1 2 3 4 5", "1 2 3 4 5 6")
