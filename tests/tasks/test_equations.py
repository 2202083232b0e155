"""Worked solutions from expressions: right lines or none at all."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepladder.basics import write_atomic
from stepladder.tasks.equations import worked_solution
from stepladder.tasks.load import load_task


@pytest.mark.parametrize(
    ("expression", "answer", "lines"),
    [
        ("( 76.0 - 25.0 )", "51", ["76 - 25 = 51", "The answer is 51"]),
        ("( ( 3 + 4 ) * 2.5 )", "17.5", ["3 + 4 = 7", "7 * 2.5 = 17.5", "The answer is 17.5"]),
        ("1 - ( 2 - 3 )", "2", ["2 - 3 = -1", "1 - -1 = 2", "The answer is 2"]),
        ("8", "8", ["The answer is 8"]),
    ],
)
def test_lines(expression: str, answer: str, lines: list[str]) -> None:
    assert worked_solution(expression, answer) == lines


@pytest.mark.parametrize(
    ("expression", "answer"),
    [("1 / 0", "1"), ("1 / 3", "0.333"), ("2 + 2", "5"), ("x + 2", "3"), ("2 ** 9", "512"), ("f(2)", "2"), ("", "0"),
     ("True + 1", "2"), ("1" * 400, "1"), ("2 + 2", "four")],
)  # fmt: skip
def test_none_for_what_is_no_solution(expression: str, answer: str) -> None:
    assert worked_solution(expression, answer) is None


@given(st.text(alphabet="0123456789.+-*/() e", max_size=40), st.text(alphabet="0123456789.-/", max_size=6))
def test_no_text_makes_it_raise_and_every_line_holds(expression: str, answer: str) -> None:
    for line in (worked_solution(expression, answer) or [])[:-1]:
        left, result = line.split(" = ")
        first, sign, second = left.split(" ")
        a, b = Fraction(first), Fraction(second)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[sign] == Fraction(result)


def test_a_task_takes_references_from_an_equation_field_and_mixes_its_sources(tmp_path) -> None:
    rows = {
        "one": [
            f'{{"question": "what is {i} plus {i * 7}?", "answer": {i * 8}, "eq": "({i} + {i * 7})"}}'
            for i in range(30)
        ],
        "two": [f'{{"question": "tell {i * 3} times two", "answer": {i * 6}}}' for i in range(30)],
    }
    for name, lines in rows.items():
        write_atomic(tmp_path / f"{name}.jsonl", "\n".join(lines) + "\n")
    task = load_task(
        {
            "kind": "text",
            "sources": {n: str(tmp_path / f"{n}.jsonl") for n in rows},
            "equation_field": "eq|",
            "near_duplicates": 0,
            "splits": {"train": 1.0},
        }
    )
    problems = task.problems("train")
    first = next(p for p in problems if p.prompt == "what is 2 plus 14?")
    assert task.reference_steps(first) == ["2 + 14 = 16", "The answer is 16"]
    assert task.verify(first, "\n".join(task.reference_steps(first))).right
    assert all(task.reference_steps(p) is None for p in problems if p.meta["source"] == "two")
    assert {p.meta["source"] for p in problems[:15]} == {"one", "two"}, "the first problems stand for all sources"
    assert [p.id for p in problems] == [p.id for p in task.problems("train")]
