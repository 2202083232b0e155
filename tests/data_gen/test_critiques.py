"""Drafts with planted errors, exact and written critiques, their filter, and rows to learn from."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from stepladder.data_gen.critiques import (
    Draft,
    best_refinements,
    corrupted,
    critique_rows,
    derangement,
    exact_critique,
    exact_critiques,
    filter_critiques,
    meta_of,
    natural_drafts,
    planted_drafts,
    reference_drafts,
    refinements,
    repairs,
    shortcut,
    written_critiques,
    written_drafts,
)
from stepladder.data_gen.rows import Dialogue, Message, Source
from stepladder.data_gen.solutions import sample_solutions
from stepladder.models.corrections import Wording, read_critique
from stepladder.models.engine import Sample, Sampling, StopReason
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.models.ledger import Ledger
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Outcome, Problem, Verdict, first_error
from stepladder.tasks.chain import ERRORS, ChainArith
from stepladder.tasks.load import load_task

TASK = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 30, "dev": 1, "test": 1})
LAB = Wording.named("lab")
SOURCE = Source("policy", "engine", "task", 0)


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {problem.id: problem for problem in TASK.problems("train")}


@pytest.fixture(scope="module")
def words() -> Any:
    return lab_tokenizer(6, CORRECTION_WORDS)


# --- drafts -----------------------------------------------------------------------------------------------------------


def test_planted_errors_are_first_errors_at_every_step_and_what_follows_holds(problems):
    kinds: Counter[str] = Counter()
    for problem in problems.values():
        for index in range(len(TASK.reference_steps(problem))):
            for kind in ERRORS:
                steps = TASK.planted(problem, index, kind, 5)
                checks = TASK.check_steps(problem, steps)
                assert first_error(checks) == index
                if kind in ("slip", "operand", "operator", "copy"):
                    assert len(steps) == len(TASK.reference_steps(problem))
                    assert all(check.local_ok for check in checks[index + 1 :])
                    assert [t for t, check in enumerate(checks) if not check.local_ok] == [index]
                kinds[kind] += len(steps) < len(TASK.reference_steps(problem))
    assert kinds["skip"] > 50
    assert sum(kinds.values()) == kinds["skip"]


def test_planted_drafts_spread_over_all_steps_before_any_comes_twice(problems):
    problem = next(iter(problems.values()))
    length = len(TASK.reference_steps(problem))
    drafts = planted_drafts(TASK, problem, origin="RG2", count=2 * length, seed=1)
    assert Counter(d.first_error for d in drafts) == dict.fromkeys(range(length), 2)
    assert {d.error for d in drafts} == {"slip"}
    assert drafts == planted_drafts(TASK, problem, origin="RG2", count=2 * length, seed=1)
    kinds = {d.error for p in problems.values() for d in planted_drafts(TASK, p, origin="RG3", count=4, seed=1)}
    assert kinds == set(ERRORS)


def test_steps_behind_a_planted_error_slip_as_often_as_asked(problems):
    wrong, behind = 0, 0
    for problem in problems.values():
        for draft in planted_drafts(TASK, problem, origin="RG2", count=6, seed=0, more=0.5):
            checks = TASK.check_steps(problem, draft.steps)
            assert first_error(checks) == draft.first_error
            # The answer line repeats the value before it, right or wrong.
            lines = [check.local_ok for check in checks[draft.first_error + 1 : -1]]
            wrong, behind = wrong + lines.count(False), behind + len(lines)
    assert abs(wrong / behind - 0.5) < 4 * (0.25 / behind) ** 0.5
    assert behind > 200


def test_references_are_right_drafts(problems):
    drafts = reference_drafts(TASK, list(problems.values()))
    assert [d.problem.id for d in drafts] == list(problems)
    assert all(d.right and d.known and d.first_error is None and d.origin == "reference" for d in drafts)
    assert {meta_of(row)["wrong"] for row in exact_critiques(TASK, drafts, LAB, seed=0).rows} == {False}


def test_natural_drafts_are_distinct_and_known_by_the_checker(problems, erring_engine):
    engine = erring_engine(TASK, 0.3)
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")
    rows = sample_solutions(
        engine, TASK, step_format, list(problems.values()), samples=6, sampling=Sampling(80), seed=0, policy="p"
    ).rows
    drafts = natural_drafts(rows, TASK, problems, wrong=2, right=1)
    for problem_id in problems:
        own = [d for d in drafts if d.problem.id == problem_id]
        assert sum(d.right for d in own) <= 1
        assert sum(not d.right for d in own) <= 2
        assert len({d.steps for d in own}) == len(own)
    for draft in drafts:
        assert draft.known
        assert draft.origin == "RG1"
        assert draft.writer == "p"
        assert draft.first_error == first_error(TASK.check_steps(draft.problem, draft.steps))
    assert {d.right for d in drafts} == {True, False}


# --- critiques --------------------------------------------------------------------------------------------------------


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
    short = exact_critique(TASK, flawed(), stop_at_error=True)
    assert short.split("\n") == [*text.split("\n")[:5], "Final answer verdict: Wrong"]
    first = exact_critique(TASK, flawed(), stop_at_error=True, reason_first=True)
    assert first.split("\n") == [
        "Step: 3 + 5 = 1", "Explanation: expected 3 + 5 = 1 error 1 - 1 = 0", "Verdict: Correct",
        "Step: 1 * 2 = 4", "Explanation: expected 1 * 2 = 2 error 4 - 2 = 2", "Verdict: Wrong", "Final answer verdict: Wrong",
    ]  # fmt: skip
    bare = exact_critique(TASK, flawed(), stop_at_error=True, reason_first=True, results=False)
    assert [line for line in bare.split("\n") if "expected" in line] == [
        "Explanation: expected 3 + 5", "Explanation: expected 1 * 2"
    ]  # fmt: skip
    open_end = exact_critique(TASK, flawed(), final=False)
    assert open_end + "\nFinal answer verdict: Wrong" == text
    assert read_critique(open_end).wrong
    assert "Final" not in corrupted(TASK, flawed(), 7, final=False)
    # An answer line has no equals sign: without results nothing is said of it.
    late = Draft(flawed().problem, ("3 + 5 = 1", "1 * 2 = 2", "2 - 1 = 1", "Answer: 3"), False, "RG1", 0, "p", 3, True)
    assert exact_critique(TASK, late, results=False).endswith("Verdict: Wrong\nFinal answer verdict: Wrong")
    assert (
        exact_critique(TASK, flawed("5")).count("Verdict: Wrong") == 2
    )  # the answer does not repeat the last value either


def test_exact_critiques_find_every_planted_error_and_lab_texts_have_no_unknown_word(problems, words):
    drafts = [
        d for p in problems.values() for o in ("RG2", "RG3") for d in planted_drafts(TASK, p, origin=o, count=2, seed=2)
    ]
    either = [
        row for first in (False, True) for row in exact_critiques(TASK, drafts, LAB, seed=0, reason_first=first).rows
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


# --- written by a model -----------------------------------------------------------------------------------------------


class Words:
    """A task on plain text."""

    name, step_separator = "words", "\n"

    def split_steps(self, text: str) -> list[str]:
        return [line for line in text.split("\n") if line.strip()]

    def verify(self, problem: Problem, text: str) -> Verdict:
        answer = text.strip().split(" ")[-1]
        return Verdict(answer, Outcome.RIGHT if answer == problem.answer else Wrong)


Wrong = Outcome.WRONG


def test_a_model_is_told_where_to_go_wrong_and_what_does_not_is_left_out(fake_engine, merging_tokenizer):
    asked: list[str] = []
    texts = ["one\ntwo\nso 5", "one\ntwo\nso 7", "so 5"]

    def write(prefix, seed):
        asked.append(merging_tokenizer.decode(prefix))
        return merging_tokenizer(texts[(len(asked) - 1) % 3] + "<eos>")["input_ids"]

    engine = fake_engine(merging_tokenizer, write)
    step_format = StepFormat.for_policy(merging_tokenizer, "\n")
    some = [Problem(f"q{i}", f"question {i}?", "7") for i in range(9)]
    references = {p.id: ["a", "b", "so 7"] for p in some[:8]}
    for origin in ("RG2", "RG3"):
        asked.clear()
        drafts, counts = written_drafts(
            engine, Words(), step_format, some, origin=origin, count=3, sampling=Sampling(60), seed=0, policy="p",
            references=references,
        )  # fmt: skip
        assert len(asked) == 24
        assert counts[f"{origin} drafts that end right"] == 8
        assert counts[f"problems without a reference solution for {origin}"] == 1
        assert len(drafts) + counts[f"{origin} drafts too short for their error"] == 16
        for draft in drafts:
            assert draft.first_error is not None
            assert not draft.right
            assert draft.known
        assert all(f"step {d.first_error + 1}" in text for d, text in zip(drafts[:1], asked[:1], strict=True))
        assert ("A right solution" in asked[0]) == (origin == "RG3")


def test_an_annotator_is_told_and_rows_do_not_show_it(fake_engine, merging_tokenizer):
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
            engine, Words(), step_format, [draft], Wording(), samples=2, sampling=Sampling(40), seed=0, policy="p",
            annotate=annotate,
        )  # fmt: skip
        assert len(result.rows) == 2
        assert len({meta_of(row)["id"] for row in result.rows}) == 2
        assert (("ends with 7" in asked[0]) and ("error is in step 2" in asked[0])) == annotate
        assert "ends with 7" not in result.rows[0].messages[0].content
        assert result.ledger.generated_tokens > 0


# --- refinements ------------------------------------------------------------------------------------------------------


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
