"""The stages that make pairs, through their command: what they make of the lab, shards, and mistakes."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.basics import read_json
from stepladder.data_gen.rows import Dialogue, Pair, Solution
from stepladder.data_gen.store import read_rows
from stepladder.launch.cli import main
from stepladder.launch.pipeline import run_recipe

TASK = {"kind": "chain", "p": 7, "min_steps": 4, "max_steps": 8, "sizes": {"train": 24, "dev": 5, "test": 10}}
STAGES = """
policy: {do: model.copy, source: lab}
solutions: {do: data.solutions, policy: "@policy", samples: 4}
once: {do: data.solutions, policy: "@policy", samples: 1}
unsolved: {do: data.solutions, policy: "@policy", samples: 2, unsolved_in: "@once", hint: "{prompt}Answer: {answer} \\n"}
every: {do: data.join, rows: ["@once", "@unsolved"]}
whole: {do: data.solution_pairs, solutions: "@solutions", per_problem: 1}
steps: {do: data.step_pairs, policy: "@policy", solutions: "@solutions", per_problem: 2, rollouts: 4, unit_problems: 5}
right: {do: data.best_solutions, solutions: "@solutions"}
all: {do: data.best_solutions, solutions: "@solutions", only_right: false}
labels: {do: data.step_labels, policy: "@policy", solutions: "@solutions", only: wrong, per_problem: 1, rollouts: 2, limit: 4}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    with contextlib.chdir(folder):
        defaults = {"task": TASK, "max_new_tokens": 64}
        run_recipe({"seed": 0, "defaults": defaults, "stages": yaml.safe_load(STAGES)}, Path("run"), "r")
    return folder


def test_pairs_of_the_lab(made: Path) -> None:
    solutions = read_rows(made / "run" / "solutions", Solution)
    whole, steps = (read_rows(made / "run" / name, Pair) for name in ("whole", "steps"))
    right = {(row.problem_id, row.steps) for row in solutions if row.right}
    wrong = {(row.problem_id, row.steps) for row in solutions if not row.right}
    assert {(p.problem_id, p.chosen) for p in whole} <= right
    assert {(p.problem_id, p.rejected) for p in whole} <= wrong
    for pair in steps:
        assert any(problem == pair.problem_id and s[: len(pair.prefix) + 1] == (*pair.prefix, *pair.rejected)
                   for problem, s in wrong)  # fmt: skip
    about = read_json(made / "run" / "steps" / "rows.json")
    assert about["ledger"]["generated_tokens"] > 0
    assert about["counts"]["wrong solutions"] == sum(about["dropped"].get(k, 0) for k in (
        "flaws met again", "wrong solutions in which no step is known to be wrong", "wrong solutions cut inside their wrong step",
    )) + about["counts"]["flaws"]  # fmt: skip
    assert (made / "run" / "steps" / "step_format.json").is_file()


def test_what_was_not_solved_is_asked_again_with_its_answer_and_rows_do_not_show_it(made: Path) -> None:
    once, unsolved, every = (read_rows(made / "run" / name, Solution) for name in ("once", "unsolved", "every"))
    assert {row.problem_id for row in unsolved} == {row.problem_id for row in once if not row.right}
    assert not any("Answer" in row.prompt for row in unsolved)
    counts = read_json(made / "run" / "unsolved" / "rows.json")["counts"]
    assert counts == {"problems asked with their answer told": len(unsolved) // 2}
    assert every == [*once, *unsolved]
    ledgers = [
        read_json(made / "run" / n / "rows.json")["ledger"]["generated_tokens"] for n in ("once", "unsolved", "every")
    ]
    assert ledgers[0] + ledgers[1] == ledgers[2]


def test_wrong_solutions_are_kept_only_as_a_control_and_labelled_alone_if_asked(made: Path) -> None:
    solutions = read_rows(made / "run" / "solutions", Solution)
    kept = {
        name: {(row.problem_id, row.messages[1].content) for row in read_rows(made / "run" / name, Dialogue)}
        for name in ("right", "all")
    }
    every = {(row.problem_id, "\n".join(row.steps)): row.right for row in solutions}
    assert kept["right"] == {key for key, right in every.items() if right}
    assert kept["all"] == set(every)
    labels = read_json(made / "run" / "labels" / "rows.json")
    assert labels["rows"] == 4
    from stepladder.data_gen.rows import StepLabels

    assert all(row.outcome != "right" for row in read_rows(made / "run" / "labels", StepLabels))


def test_shards_make_the_rows_of_one_process(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made)
    config = {"task": TASK, "max_new_tokens": 64, "policy": "run/policy", "solutions": "run/solutions", "per_problem": 2,
              "rollouts": 4, "unit_problems": 5}  # fmt: skip
    Path("steps.yaml").write_text(yaml.safe_dump(config))
    for shard in ("1/2", "0/2"):
        main(["data", "step_pairs", "--config", "steps.yaml", "--out", "sharded", "--shard", shard])
    assert (made / "sharded" / "rows.parquet").read_bytes() == (made / "run" / "steps" / "rows.parquet").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["solution_pairs"], "solutions is missing"),
        (["step_pairs", "--policy", "run/policy"], "solutions is missing"),
        (["step_pairs", "--policy", "run/policy", "--solutions", "run/solutions", "--task.kind", "text", "--task.path", "q.jsonl"],
         "task text cannot check steps: give labels"),
        (["step_pairs", "--policy", "run/policy", "--solutions", "run/solutions", "--config", "steps.yaml", "--split", "test"],
         "is not in split 'test'"),
        (["step_pairs", "--winners", "0"], "winners must be 1 or more"),
        (["join"], "rows is missing"),
        (["join", "--rows", "[run/whole, run/solutions]"], "rows of different kinds cannot be joined: run/whole: Pair"),
        (["mcts_dpo", "--value", "oracle"], "value must be one of self, rollouts, found 'oracle'"),
        (["mcts_dpo", "--question", "Right?"], "question must contain {prompt} and {steps}"),
        (["mcts_dpo", "--value", "rollouts", "--hint_self_eval"], "hint_self_eval is about value: self"),
        (["mcts_dpo", "--candidates", "1"], "candidates must be 2 or more"),
        (["solutions", "--hint", "the answer is {answer}"], "hint must contain {prompt}"),
        (["step_labels", "--only", "good"], "only must be one of nothing, right, wrong"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(
    made: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(made)
    Path("steps.yaml").write_text(yaml.safe_dump({"task": TASK}))
    Path("q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert message in refused("data", *arguments, "--out", tmp_path / "out")
