"""eval.behaviour: what is measured of solutions, by hand and through the command."""

from __future__ import annotations

from pathlib import Path

import pytest

from stepladder.basics import read_json
from stepladder.data_gen.rows import Solution, Source
from stepladder.data_gen.store import write_rows
from stepladder.launch.behaviour import measure
from stepladder.launch.cli import main
from stepladder.tasks.load import load_task

TASK = {"kind": "chain", "p": 7}
PROMPT = "Start 3 ; + 5 ; * 2 \n"
RIGHT = ("3 + 5 = 1", "1 * 2 = 2", "Answer: 2")
LUCKY = ("3 + 5 = 2", "2 * 2 = 2", "Answer: 2")
WRONG = ("3 + 5 = 1", "3 + 5 = 1", "1 * 2 = 2", "Answer: 3")


def solution(number: int, sample: int, steps: tuple[str, ...], stop: str = "eos") -> Solution:
    right = steps[-1] == "Answer: 2"
    return Solution(
        f"p{number}", PROMPT, "2", sample, steps, "\n".join(steps), steps[-1].split()[-1], "right" if right else "wrong", stop,
        tuple(range(6 * len(steps))), (), 0.0, Source("policy", "engine", "chain", 0),
    )  # fmt: skip


def test_measures_of_one_solution() -> None:
    task = load_task(TASK)
    assert measure(solution(0, 0, RIGHT), task) == {
        "accuracy": 1, "length": 18, "length_right": 18, "steps": 3, "repeated_steps": 0, "truncated": 0, "unparseable": 0,
        "flawed": 0, "flawed_and_right": 0, "flawed_right": 0,
    }  # fmt: skip
    lucky = measure(solution(0, 0, LUCKY), task)
    assert (lucky["flawed"], lucky["flawed_right"], lucky["flawed_and_right"]) == (1, 1, 1)
    wrong = measure(solution(0, 0, WRONG, "length"), task)
    assert "flawed_right" not in wrong
    assert (wrong["length_wrong"], wrong["repeated_steps"], wrong["truncated"], wrong["flawed_and_right"]) == (
        24,
        0.25,
        1,
        0,
    )
    assert "flawed" not in measure(solution(0, 0, RIGHT), object())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(
        tmp_path / "a", [solution(0, 0, RIGHT), solution(0, 1, WRONG), solution(1, 0, RIGHT), solution(1, 1, LUCKY)]
    )
    write_rows(tmp_path / "b", [solution(0, 0, RIGHT), solution(1, 0, RIGHT)])
    policies = f"{{one: {tmp_path / 'a'}, two: {tmp_path / 'b'}}}"
    main(["eval", "behaviour", "--out", str(tmp_path / "out"), f"policies={policies}", "task={kind: chain, p: 7}"])
    found = {(r["arm"], r["metric"]): r for r in read_json(tmp_path / "out" / "results.json")}
    assert found["one", "accuracy"]["value"] == 0.75
    assert found["one", "length_wrong"]["value"] == 24
    assert found["one", "length_wrong"]["n"] == 1  # of the problems that have a wrong solution
    assert found["one", "flawed_right"]["value"] == 0.25  # the mean over problems of 0 of 1 and 1 of 2
    assert ("two", "length_wrong") not in found
    values = {(v["arm"], v["metric"]): v["values"] for v in read_json(tmp_path / "out" / "values.json")}
    assert values["one", "accuracy"] == {"p0": 0.5, "p1": 1.0}
    assert ("one", "length_wrong") not in values  # not every problem has one: no paired difference
    with pytest.raises(SystemExit):
        main(["eval", "behaviour", "--out", str(tmp_path / "none")])
    assert "error: policies is missing" in capsys.readouterr().err
