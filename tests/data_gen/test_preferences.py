"""Pairs of solutions, and corrections of first wrong steps, on toy worlds and on the lab's erring policy."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from stepladder.data_gen.preferences import Flaw, correct_flaw, first_wrong_step, solution_pairs, step_pairs
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.data_gen.solutions import sample_solutions
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Outcome, Problem, Verdict, first_error
from stepladder.tasks.chain import ChainArith

SOURCE = Source("policy", "engine", "task", 0)


def solution(problem: str, sample: int, steps: str, outcome: str = "right", stop: str = "eos") -> Solution:
    return Solution(
        problem_id=problem, prompt=f"{problem}?", gold="1", sample=sample, steps=tuple(steps), text=steps, answer="1",
        outcome=outcome, stop=stop, token_ids=(), step_ends=(), logprob=0.0, source=SOURCE,
    )  # fmt: skip


# --- whole solutions --------------------------------------------------------------------------------------------------


def test_right_solutions_are_paired_with_wrong_ones_of_the_same_problem():
    rows = [
        solution("a", 0, "xy"), solution("a", 1, "xz", "wrong"), solution("a", 2, "xy"), solution("a", 3, "q", "unparseable"),
        solution("b", 0, "x"), solution("c", 0, "x", "wrong"), solution("a", 4, "w", "wrong", "length"),
        solution("a", 5, "t", "timeout"), solution("a", 6, "", "wrong"),
    ]  # fmt: skip
    result = solution_pairs(rows, per_problem=0, seed=0)
    assert {(p.chosen, p.rejected, p.n_chosen, p.n_rejected) for p in result.rows} == {
        (("x", "y"), ("x", "z"), 2, 1),
        (("x", "y"), ("q",), 2, 1),
    }
    assert all(p.prefix == () and p.chosen_finished and p.rejected_finished for p in result.rows)
    assert result.dropped == {
        "duplicates": 1, "problems without a wrong solution": 1, "problems without a right solution": 1,
        "solutions cut at their length": 1, "solutions not checked in time": 1, "solutions without a step": 1,
    }  # fmt: skip


def test_every_solution_is_used_before_any_is_used_twice():
    rows = [solution("a", i, c, "right" if i < 3 else "wrong") for i, c in enumerate("abcdefgh")]
    for most in range(1, 16):
        pairs = solution_pairs(rows, per_problem=most, seed=1).rows
        assert len({(p.chosen, p.rejected) for p in pairs}) == most
        for side, size, apart in (([p.chosen for p in pairs], 3, 2), ([p.rejected for p in pairs], 5, 1)):
            used = Counter(side)
            assert len(used) == min(most, size)
            assert max(used.values()) - min(used.values()) <= apart
    other = [solution("a", i, c, "wrong" if i < 3 else "right") for i, c in enumerate("abcdefgh")]
    assert len({p.chosen for p in solution_pairs(other, per_problem=5, seed=1).rows}) == 5
    assert solution_pairs(rows, per_problem=3, seed=1).rows != solution_pairs(rows, per_problem=3, seed=2).rows
    assert solution_pairs(rows, per_problem=3, seed=1).dropped["pairs beyond the limit a problem"] == 12


# --- where a solution goes wrong --------------------------------------------------------------------------------------


class NoChecker:
    name, step_separator = "plain", "\n"


def labels(correct: list[int], rollouts: list[int], **fields: Any) -> StepLabels:
    known = {
        "label_source": "monte_carlo",
        "outcome": "wrong",
        "first_error": None,
        "first_error_known": False,
        **fields,
    }
    steps = tuple("abcdefg"[: len(correct)])
    return StepLabels("a", "a?", "1", 0, steps, (1, *correct), (2, *rollouts), source=SOURCE, **known)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "want"),
    [
        (labels([2, 0, 0], [4, 4, 4]), (1, "labels")),
        (labels([2, 0, 1], [4, 4, 4]), (1, "labels")),
        (labels([2, 0, 1], [4, 0, 4]), (None, "nobody")),  # nothing is known about the second step
        (labels([2, 1, 1], [4, 4, 4]), (None, "labels")),
        (labels([2, 0, 1], [4, 4, 4], first_error=2, first_error_known=True), (2, "labels")),
        (None, (None, "nobody")),
    ],
)
def test_the_first_wrong_step_by_labels(row, want):
    assert first_wrong_step(NoChecker(), Problem("a", "a?", "1"), tuple("abc"), row) == want  # type: ignore[arg-type]


def test_an_exact_checker_is_asked_before_labels():
    task = ChainArith(p=7)
    problem = Problem("a", "Start 3 ; + 5 ; * 2 \n", "2")
    steps = ("3 + 5 = 1", "1 * 2 = 3", "Answer: 3")
    assert first_wrong_step(task, problem, steps, labels([0, 0, 0], [4, 4, 4])) == (1, "checker")


# --- corrections ------------------------------------------------------------------------------------------------------


def test_a_correction_is_the_first_step_of_what_ends_right(drive, numbers_cut):
    written = [
        ((5, 1), True),
        ((6, 2), True),
        ((6, 3), True),
        ((7,), True),
        ((8, 9), False),
        ((4,), True),
        ((9, 9), True),
    ]
    run = drive(lambda prefix, number: written[number])
    flaw = Flaw(Problem("a", "a?", "1"), ("1", "2"), (1, 2), "5", False)
    found = run(correct_flaw(numbers_cut, flaw, 7, lambda steps: steps[-1] != "9"))
    assert [(ask.prefix, ask.numbers) for ask in run.asks] == [((1, 2), range(7))]
    assert found.right == {"6": 2, "7": 1, "4": 1}
    assert found.begun == {"5": 1, "6": 2, "7": 1, "8": 1, "4": 1, "9": 1}
    assert found.finished == {"6": False, "7": True, "4": True}
    assert found.counts == {"right endings through the wrong step": 1, "right endings through another wrong step": 1}


@pytest.fixture(scope="module")
def lab(erring_engine) -> Any:
    """(task, engine, step format, problems, solutions) of a policy that errs on 30 % of its steps."""
    task = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 12})
    engine = erring_engine(task, 0.3)
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")
    problems = task.problems("train")
    made = sample_solutions(
        engine, task, step_format, problems, samples=6, sampling=Sampling(64), seed=3, policy="policy"
    )
    return task, engine, step_format, {p.id: p for p in problems}, made.rows


def pairs_of(lab: Any, rows: Any = None, **over: Any) -> Any:
    task, engine, step_format, problems, solutions = lab
    how = {"labels": None, "rollouts": 8, "winners": 1, "sampling": Sampling(64), "seed": 0, "policy": "policy", **over}
    return step_pairs(engine, task, step_format, solutions if rows is None else rows, problems, **how)


def test_step_pairs_of_the_lab_correct_the_first_error(lab):
    task, _, _, problems, solutions = lab
    result = pairs_of(lab)
    flaws = {
        (row.problem_id, row.steps[:k], row.steps[k])
        for row in solutions
        if not row.right
        for k in [first_error(task.check_steps(problems[row.problem_id], row.steps))]
        if k is not None
    }
    assert result.counts["flaws"] == len(flaws) > 10
    assert len(result.rows) == len(flaws) - result.dropped["flaws without a correction"]
    for pair in result.rows:
        problem = problems[pair.problem_id]
        assert (pair.problem_id, pair.prefix, pair.rejected[0]) in flaws
        assert len(pair.chosen) == len(pair.rejected) == 1
        # What is preferred is exact: on this task there is one right next step.
        reference = task.reference_steps(problem)
        assert [*pair.prefix, *pair.chosen] == reference[: len(pair.prefix) + 1]
        assert pair.chosen_finished == pair.chosen[0].startswith("Answer")
        assert 1 <= pair.n_chosen <= 8
        assert 0 <= pair.n_rejected <= 8 - pair.n_chosen


def test_prefixes_are_sampled_on_from_their_own_ids(lab):
    _, engine, step_format, _, solutions = lab
    engine.asked.clear()
    pairs_of(lab)
    sampled = {
        step_format.encode_prompt(engine.tokenizer, row.prompt) + row.token_ids[:end]
        for row in solutions
        for end in (0, *row.step_ends)
    }
    assert engine.asked
    assert {request.prefix for request in engine.asked} <= sampled


def test_the_rows_of_a_problem_do_not_depend_on_the_others(lab):
    *_, solutions = lab
    whole = pairs_of(lab).rows
    ids = list(dict.fromkeys(row.problem_id for row in solutions))
    apart = [pair for i in ids for pair in pairs_of(lab, [row for row in solutions if row.problem_id == i]).rows]
    assert sorted(map(repr, apart)) == sorted(map(repr, whole))
    assert pairs_of(lab, seed=1).rows != whole


def test_without_a_checker_labels_say_where_and_nothing_else_is_asked(lab):
    task, engine, step_format, problems, solutions = lab

    class Blind:
        name, step_separator = task.name, task.step_separator

        def verify(self, problem: Problem, text: str) -> Verdict:
            return task.verify(problem, text)

    wrong = [row for row in solutions if row.outcome == Outcome.WRONG and len(row.steps) > 1]
    told = {
        (row.problem_id, row.sample): StepLabels(
            row.problem_id, row.prompt, row.gold, row.sample, row.steps, (1, 1) + (0,) * (len(row.steps) - 1),
            (1,) * (len(row.steps) + 1), "monte_carlo", row.outcome, None, False, SOURCE,
        )
        for row in wrong[:5]
    }  # fmt: skip
    result = pairs_of((Blind(), engine, step_format, problems, solutions), wrong, labels=told)
    assert result.counts["flaws"] <= 5
    assert {len(pair.prefix) for pair in result.rows} == {1}
    assert result.dropped["wrong solutions without labels"] == len(wrong) - 5
