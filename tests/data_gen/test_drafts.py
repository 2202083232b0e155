"""Drafts: planted, natural and written errors, and what is known of them."""

from __future__ import annotations

from collections import Counter

from stepladder.data_gen.critiques import (
    exact_critiques,
)
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.drafts import natural_drafts, planted_drafts, reference_drafts, written_drafts
from stepladder.data_gen.solutions import sample_solutions
from stepladder.models.corrections import Wording
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem, first_error
from stepladder.tasks.chain import ERRORS, ChainArith

TASK = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 30, "dev": 1, "test": 1})


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
    assert {meta_of(row)["wrong"] for row in exact_critiques(TASK, drafts, Wording.named("lab"), seed=0).rows} == {
        False
    }


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


def test_a_model_is_told_where_to_go_wrong_and_what_does_not_is_left_out(fake_engine, merging_tokenizer, plain_words):
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
            engine, plain_words, step_format, some, origin=origin, count=3, sampling=Sampling(60), seed=0, policy="p",
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
