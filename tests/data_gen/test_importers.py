"""PRM800K in both of its shapes, and ProcessBench."""

from __future__ import annotations

import json

import pytest

from stepladder.basics import UserError
from stepladder.data_gen.importers import prm800k, process_bench
from stepladder.data_gen.rows import step_targets


def lines(path, records) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def step(*completions, chosen=None, human=None):
    return {
        "completions": [{"text": text, "rating": rating} for text, rating in completions],
        "chosen_completion": chosen,
        "human_completion": {"text": human} if human else None,
    }


def nested(problem, *steps):
    return {"question": {"problem": problem, "ground_truth_answer": "7"}, "label": {"steps": list(steps)}}


def found(result):
    return [(r.steps, r.n_correct, r.n_rollouts, r.first_error, r.outcome) for r in result.rows]


def test_the_releases_own_shape(tmp_path):
    record = nested(
        "q1",
        step(("a", 1), ("bad a", -1), chosen=0),
        step(("b", 0), chosen=0),
        step(("c wrong", -1), ("c odd", None), human="c right"),
        step(("d", None), chosen=0),
        step(("e", -1), chosen=0),
        step(("never", 1), chosen=0),
    )
    result = prm800k(lines(tmp_path / "x.jsonl", [record]))
    assert found(result) == [
        (("bad a",), (0, 0), (0, 1), 0, "wrong"),
        (("a", "b", "c wrong"), (0, 1, 1, 0), (0, 1, 1, 1), 2, "wrong"),
        (("a", "b", "c right", "d", "e"), (0, 1, 1, 1, 0, 0), (0, 1, 1, 1, 0, 1), 4, "wrong"),
    ]
    assert step_targets(result.rows[2], "human") == [1.0, 1.0, 1.0, None, 0.0]
    assert all(r.gold == "7" and r.first_error_known and r.label_source == "human" for r in result.rows)
    assert len({r.problem_id for r in result.rows}) == 1


def test_the_flat_shape(tmp_path):
    rows = [
        {"instruction": "q", "responses": [], "next_response": "a", "rating": 1},
        {"instruction": "q", "responses": ["a"], "next_response": "b", "rating": -1},
        {"instruction": "q", "responses": ["a"], "next_response": "c", "rating": 0},
        {"instruction": "q", "responses": ["a", "c"], "next_response": "d", "rating": 1},
        {"instruction": "r", "responses": ["x"], "next_response": "y", "rating": 1},
    ]
    result = prm800k(lines(tmp_path / "x.jsonl", rows))
    assert found(result) == [
        (("a", "b"), (0, 1, 0), (0, 1, 1), 1, "wrong"),
        (("a", "c", "d"), (0, 1, 1, 1), (0, 1, 1, 1), None, "right"),
        (("x", "y"), (0, 0, 1), (0, 0, 1), None, "right"),
    ]
    assert result.rows[0].problem_id == result.rows[1].problem_id != result.rows[2].problem_id


def test_duplicates_unrated_and_limited_solutions_are_counted(tmp_path):
    records = [nested("q", step(("a", 1), chosen=0))] * 3 + [nested("r", step(("b", None), chosen=0))]
    records += [nested(f"s{i}", step(("c", 1), chosen=0)) for i in range(9)]
    path = lines(tmp_path / "x.jsonl", records)
    result = prm800k(path)
    assert len(result.rows) == 10
    assert result.dropped == {"duplicates": 2, "solutions without a rating": 1}
    few = prm800k(path, limit=4, seed=1)
    assert (len(few.rows), few.dropped["beyond the limit"]) == (4, 6)
    assert few.rows == prm800k(path, limit=4, seed=1).rows != prm800k(path, limit=4, seed=2).rows
    assert prm800k(path, limit=50).rows == result.rows


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the data set is empty"),
        ([{"a": 1}], "not PRM800K: .* found fields a"),
        ([{"label": {}, "question": {"problem": "q"}}], "record 1: not a PRM800K record"),
        ([nested("q", step(("a", 1), chosen=3))], "record 1: not a PRM800K record"),
        (
            [{"instruction": "q", "responses": [], "next_response": "a"}, {"responses": []}],
            "record 2: field 'instruction' is missing",
        ),
    ],
)
def test_what_is_no_prm800k_is_one_sentence(tmp_path, records, message):
    with pytest.raises(UserError, match=message):
        prm800k(lines(tmp_path / "x.jsonl", records))


GOOD = {"id": "x", "problem": "q", "steps": ["a", "b"], "label": -1}


def test_process_bench_in_both_kinds_of_files(tmp_path):
    lines(tmp_path / "a.jsonl", [GOOD, {**GOOD, "label": 1}])
    (tmp_path / "a.json").write_text(json.dumps([GOOD, {**GOOD, "label": 1}]))
    assert process_bench(tmp_path / "a.jsonl") == process_bench(tmp_path / "a.json")
    assert [r["label"] for r in process_bench(tmp_path / "a.json")] == [-1, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "the data set is empty"),
        ({"a": 1}, "expected a list of records, found an object"),
        ([GOOD, {"problem": "q", "label": 0}], "record 2: field steps is missing"),
        ([{**GOOD, "label": 2}], "record 1: label must lie between -1 and the last step, found 2"),
        ([{**GOOD, "label": -2}], "label must lie between"),
        ([{**GOOD, "label": "0"}], "label must lie between"),
        ([GOOD, "x"], "record 2: expected an object, found str"),
        ([{**GOOD, "steps": 5}], "record 1: steps must be a list of texts"),
        ([{**GOOD, "steps": ["a", 5]}], "record 1: steps must be a list of texts"),
    ],
)
def test_what_is_no_process_bench_is_one_sentence(tmp_path, value, message):
    (tmp_path / "a.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        process_bench(tmp_path / "a.json")
