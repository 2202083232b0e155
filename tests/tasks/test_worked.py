"""Word problems whose equations are known: checks of lines, what a step should be, and errors that are planted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stepladder.basics import UserError
from stepladder.tasks.base import Problem, StepCheck, StepChecker, StepPlanter, first_error
from stepladder.tasks.chain import ERRORS
from stepladder.tasks.load import load_task
from stepladder.tasks.worked import WorkedTask

PLAN = ["12 - 4 = 8", "3 * 5 = 15", "8 + 15 = 23", "The answer is 23"]  # (12 - 4) + 3 * 5


def problem(lines: list[str] = PLAN) -> Problem:
    answer = lines[-1].split()[-1]
    return Problem("p", "12 pens, 4 lost, then 3 boxes of 5. How many?", answer, {"solution": "\n".join(lines)})


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> WorkedTask:
    file = tmp_path_factory.mktemp("worked") / "problems.jsonl"
    records = [
        {"question": "12 pens, 4 lost, then 3 boxes of 5. How many?", "answer": 23, "equation": "(12 - 4) + 3 * 5"},
        {"question": "Ten divided among three, how much each?", "answer": 4, "equation": "10 / 3"},  # is not the answer
        {"question": "Seven birds and two more sit there. How many?", "answer": 9, "equation": "7 + 2"},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"kind": "text", "path": str(file), "equation_field": "equation|", "splits": {"train": 1.0}}
    assert not isinstance(load_task(config), StepChecker)
    made = load_task({**config, "checked": True})
    assert isinstance(made, WorkedTask)
    return made


def test_problems_are_those_with_a_worked_solution_and_keep_their_ids(task: WorkedTask) -> None:
    assert [one.id for one in task.problems("train")] == ["text/00000", "text/00002"]
    assert isinstance(task, StepPlanter)


def test_a_task_without_equations_says_so(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"question": "q?", "answer": 1}\n')
    config = {"kind": "text", "path": str(tmp_path / "p.jsonl"), "splits": {"train": 1.0}, "checked": True}
    with pytest.raises(UserError, match="checked needs problems with an equation"):
        load_task(config).problems("train")
    with pytest.raises(UserError, match="checked"):
        load_task({"kind": "chain", "checked": True})


@pytest.mark.parametrize(
    ("steps", "holds", "on_track"),
    [
        (PLAN, "yyyy", "yyyy"),
        # Commuted where that is the same, and not where it is not.
        (["12 - 4 = 8", "5 * 3 = 15", "15 + 8 = 23", "The answer is 23"], "yyyy", "yyyy"),
        (["4 - 12 = -8", "3 * 5 = 15", "-8 + 15 = 7", "The answer is 7"], "nyyy", "nynn"),
        # A wrong value, on which later lines go on: they hold, and are off the track.
        (["12 - 4 = 9", "3 * 5 = 15", "9 + 15 = 24", "The answer is 24"], "nyyy", "nynn"),
        # Another number, another operation, an answer that no line gave.
        (["12 - 3 = 9", "3 + 5 = 8", "9 + 8 = 17", "The answer is 18"], "nnyn", "nnnn"),
        # The right value by a wrong operation.
        (["4 + 4 = 8", "3 * 5 = 15", "8 + 15 = 23", "The answer is 22"], "nyyn", "yyyn"),
        # Too short, too long, and words.
        (["12 - 4 = 8", "The answer is 8"], "yn", "yn"),
        ([*PLAN, "The answer is 23"], "yyyyn", "yyyyn"),
        (["Twelve less four is eight.", "3 * 5 = 15", "8 + 15 = 23"], "nyn", "nyy"),
    ],
)
def test_checks_of_lines(task: WorkedTask, steps: list[str], holds: str, on_track: str) -> None:
    expected = [StepCheck(h == "y", o == "y") for h, o in zip(holds, on_track, strict=True)]
    assert task.check_steps(problem(), steps) == expected


def test_another_way_is_right_if_all_of_it_is(task: WorkedTask) -> None:
    other = ["12 + 15 = 27", "27 - 4 = 23", "The answer is 23"]
    assert first_error(task.check_steps(problem(), other)) is None
    # False equations that end right by chance are no other way, nor is an answer out of the blue.
    assert first_error(task.check_steps(problem(), ["12 + 10 = 23", "The answer is 23"])) == 0
    assert first_error(task.check_steps(problem(), ["12 + 15 = 27", "The answer is 23"])) == 0


def test_the_step_that_is_expected_goes_on_from_what_is_written(task: WorkedTask) -> None:
    expected = lambda *steps: task.expected_step(problem(), steps)
    assert [expected(*PLAN[:t]) for t in range(4)] == PLAN
    assert expected("12 - 4 = 9", "3 * 5 = 15") == "9 + 15 = 24"
    assert expected("12 - 4 = 9", "3 * 5 = 15", "9 + 15 = 24") == "The answer is 24"
    assert expected(*PLAN) is None
    assert expected("so") is None


def test_by_how_much_a_line_is_off(task: WorkedTask) -> None:
    assert task.difference("12 - 4 = 9", PLAN[0]) == "9 - 8 = 1"
    assert task.difference("The answer is 23", PLAN[3]) == "23 - 23 = 0"
    assert task.difference("7 / 2 = 3.5", "7 - 2 = 5") == "3.5 - 5 = -1.5"
    assert task.difference("so", PLAN[0]) is None


def test_operands_that_are_results_are_told_from_numbers_of_the_problem(task: WorkedTask) -> None:
    # 20 - (6 - 2): the second line's right operand is the first one's result; 9 - 5 - 4 begins with it.
    for lines, wrong, goes_on in (
        (["6 - 2 = 4", "20 - 4 = 16", "The answer is 16"], "6 - 2 = 3", "20 - 3 = 17"),
        (["9 - 5 = 4", "4 - 4 = 0", "The answer is 0"], "9 - 5 = 6", "4 - 6 = -2"),
    ):
        assert task.expected_step(problem(lines), [wrong]) == goes_on


def test_planted_errors_are_first_errors_at_every_line(task: WorkedTask) -> None:
    for one in (*task.problems("train"), problem(["7 / 2 = 3.5", "3.5 * 4 = 14", "The answer is 14"])):
        length = len(task.reference_steps(one) or [])
        for index in range(length):
            for kind in ERRORS:
                for seed in range(5):
                    lines = task.planted(one, index, kind, seed)
                    assert lines == task.planted(one, index, kind, seed)
                    checks = task.check_steps(one, lines)
                    assert first_error(checks) == index
                    assert all(check.local_ok for check in checks[index + 1 :]) or kind == "skip"
                    assert not task.verify(one, lines[-1]).right or not checks[index].local_ok
    slipped = [task.check_steps(problem(), task.planted(problem(), 0, "slip", seed, 0.5)) for seed in range(60)]
    assert all(first_error(checks) == 0 for checks in slipped)
    assert 20 < sum(not check.local_ok for checks in slipped for check in checks[1:3]) < 100
    assert len({tuple(task.planted(problem(), 1, "operand", seed)) for seed in range(20)}) > 1
    with pytest.raises(ValueError, match="index must lie between 0 and 3"):
        task.planted(problem(), 4, "slip", 0)
