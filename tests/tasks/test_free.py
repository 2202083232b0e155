"""Text of one's own: its answers are read like any, and compared only with what somebody gave."""

from __future__ import annotations

import pytest

from stepladder.basics import UserError
from stepladder.tasks.base import Outcome, Problem, Task
from stepladder.tasks.chain import ChainArith
from stepladder.tasks.free import FreeText
from stepladder.tasks.load import load_task


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", "any", "1/2"),
        ("The answer is 1,200 apples.", "any", "1200"),
        ("The answer is $x + 1$.", "any", "x+1"),
        ("The answer is: The North", "any", "the north"),
        ("She has 3 and then 4 apples", "any", "4"),
        ("Because of this\nParis", "any", "paris"),
        ("3 + 4 = 7", "any", "7"),
        ("Answer: 5", "any", "5"),
        ("I take (B), not (C) but (B)", "choice", "B"),
        ("no number at all", "number", None),
        ("", "any", None),
    ],
)
def test_answers_are_read_as_the_kind_says(text, kind, answer):
    task = FreeText(answer_kind=kind)
    verdict = task.verify(Problem("", "x", ""), text)
    assert verdict.answer == answer
    assert verdict.outcome is (Outcome.UNPARSEABLE if answer is None else Outcome.WRONG)
    if answer is not None:
        assert task.verify(Problem("", "x", answer), text).right
        assert not task.verify(Problem("", "x", "77"), text).right


def test_it_is_a_task_without_problems():
    task = load_task({"kind": "free", "step_separator": "\n\n"})
    assert isinstance(task, Task)
    assert task.split_steps("a\nb\n\n\n\nc") == ["a\nb", "c"]
    with pytest.raises(ValueError, match="no problems of its own"):
        task.problems("test")
    with pytest.raises(UserError, match="answer_kind must be"):
        load_task({"kind": "free", "answer_kind": "numbr"})


def test_a_typed_chain_is_the_problem_that_the_task_makes():
    task = ChainArith(p=7)
    for problem in task.problems("test")[:20]:
        found = task.problem_of(problem.prompt.strip().replace(" ; ", ";  "))
        assert (found.prompt, found.answer, dict(found.meta)) == (problem.prompt, problem.answer, dict(problem.meta))
    for text in (
        "Start 3",
        "3 ; + 5",
        "Start 3 ; + 7",
        "Start 3 ; / 2",
        "Start x ; + 1",
        "Start 3 ; + ²",
        "Start 3 ; + 5 ;",
    ):
        with pytest.raises(ValueError, match="expected a problem such as Start 3"):
            task.problem_of(text)
