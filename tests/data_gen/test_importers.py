"""Published formats on hand-made records, and on the real files where they are there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from stepladder.basics import UserError, read_jsonl
from stepladder.data_gen.importers import FORMATS, import_rows, prm800k, prm800k_pairs, process_bench
from stepladder.data_gen.rows import Solution, StepLabels, Tree, step_targets
from stepladder.data_gen.tree_rows import step_labels
from stepladder.tasks.answers import canonical

DATA = Path(__file__).parents[2].parent / "shared" / "data"


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


def test_neutral_ratings_may_be_a_half(tmp_path):
    path = lines(tmp_path / "x.jsonl", [nested("q", step(("a", 1), chosen=0), step(("b", 0), chosen=0),
                                               step(("c", None), chosen=0), step(("d", -1), chosen=0))])  # fmt: skip
    [row] = prm800k(path, neutral="half").rows
    assert (row.n_correct, row.n_rollouts) == ((0, 2, 1, 0, 0), (0, 2, 2, 0, 2))
    assert step_targets(row, "hard") == [1.0, 1.0, None, 0.0]
    assert step_targets(row, "soft") == [1.0, 0.5, None, 0.0]
    assert step_targets(row, "threshold", 0.5) == [1.0, 0.0, None, 0.0]
    assert step_targets(prm800k(path).rows[0], "soft") == [1.0, 1.0, None, 0.0]


def test_pairs_of_steps_at_one_place(tmp_path):
    pairs = lambda result: [(p.prompt, p.prefix, p.chosen, p.rejected, p.chosen_finished) for p in result.rows]
    end = {"text": "so 7", "rating": 1, "is_solution": True}
    record = nested(
        "q1",
        step(("a", 1), ("bad a", -1), ("odd a", 0), ("worse a", -1), chosen=0),
        step(("b", 1), ("other b", 1), ("bad b", -1), chosen=1),  # what the labelling goes on with is the better one
        step(("c", -1), ("unrated c", None), human="c right"),
        step(("bad d", -1), ("d", 0), chosen=1),  # nothing is rated +1
        {"completions": [{"text": "so 8", "rating": -1, "is_solution": True}, end], "chosen_completion": 1},
    )
    result = prm800k_pairs(lines(tmp_path / "x.jsonl", [record, record]))
    assert pairs(result) == [
        ("q1", (), ("a",), ("bad a",), False),
        ("q1", (), ("a",), ("worse a",), False),
        ("q1", ("a",), ("other b",), ("bad b",), False),
        ("q1", ("a", "other b"), ("c right",), ("c",), False),
        ("q1", ("a", "other b", "c right", "d"), ("so 7",), ("so 8",), True),
    ]
    assert result.dropped == {"wrong steps without a better one": 2, "duplicates": 5}
    row = lambda responses, text, rating, **more: {
        "instruction": "q", "responses": responses, "next_response": text, "rating": rating, **more
    }  # fmt: skip
    flat = [
        row([], "x", 1), row([], "y", 1, is_preferred_response=True), row([], "z", -1), row(["y"], "w", -1),
        row(["y"], "v", None), row(["y"], "u", 1, is_solution=True),
    ]  # fmt: skip
    found = prm800k_pairs(lines(tmp_path / "y.jsonl", flat))
    assert pairs(found) == [("q", (), ("y",), ("z",), False), ("q", ("y",), ("u",), ("w",), True)]
    assert len(prm800k_pairs(tmp_path / "y.jsonl", limit=1).rows) == 1
    assert import_rows(tmp_path / "y.jsonl", "prm800k_pairs").rows == found.rows


@pytest.mark.skipif(not (DATA / "prm800k").is_dir(), reason="the shared data are not here")
def test_pairs_of_real_ratings_hold_those_that_others_made():
    ours = {
        (p.prompt.strip(), *p.chosen, *p.rejected)
        for p in prm800k_pairs(DATA / "prm800k/phase1_train_steps.jsonl.gz").rows
    }
    theirs = [r for _, r in read_jsonl(DATA / "prm800k/phase1_train_step_pairs.jsonl.gz")]
    assert len(theirs) == 2422
    assert {(r["prompt"].strip(), r["chosen"].strip(), r["rejected"].strip()) for r in theirs} <= ours


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


# --- one record of each format -------------------------------------------------------------------------------------------

SHEPHERD = {
    "input": "How many? Step 1: 2 + 2 = 4 ки\nStep 2: 4 + 1 = 6 ки\nStep 3: The answer is: 6 ки",
    "label": "How many? Step 1: 2 + 2 = 4 +\nStep 2: 4 + 1 = 6 -\nStep 3: The answer is: 6 -",
    "task": "GSM8K",
}
FLAT_APS = {
    "question": "Q?",
    "final_answer": "3",
    "question_id": 5,
    "reasoning_steps": [
        {"solution_prefix": "Q?", "mc_value": 0.75},
        {"solution_prefix": "Q?\nFirst.", "mc_value": 0.5},
        {"solution_prefix": "Q?\nFirst.\nSo \\boxed{3}", "mc_value": 1.0},
        {"solution_prefix": "Q?\nFirst.\nSo \\boxed{4}", "mc_value": 0.0},
        {"solution_prefix": "Q?\nOther", "mc_value": 0.03125},
        {"solution_prefix": "Q?\nFirst.", "mc_value": 0.5},
    ],
}
TREE_APS = {
    "question": "Q?",
    "final_answer": "3",
    "reasoning_steps": {
        "text": "Q?", "mc_value": 0.75, "children": [
            {"text": "First.", "mc_value": 0.5, "children": [
                {"text": "So \\boxed{3}", "mc_value": 1.0, "children": []},
                {"text": "So \\boxed{4}", "mc_value": 0.0, "children": []},
            ]},
            {"text": "Other", "mc_value": 0.03125, "children": []},
        ],
    },
}  # fmt: skip
BENCH = {
    "id": "x-1",
    "generator": "m",
    "problem": "q",
    "steps": ["a", "b", "c"],
    "label": 1,
    "final_answer_correct": True,
}
PRMBENCH = {
    "original_question": "q", "modified_question": "q'", "original_process": ["a", "b"],
    "modified_process": ["a", "x", "b", "y"], "error_steps": [2, 4], "idx": "i7", "classification": "redundency",
}  # fmt: skip
MR_RAW = {
    "uuid": "u", "question": "q", "ground_truth_answer": 17, "model_output_steps": ["Step 1: a", "Step 2: b", "Step 3: c"],
    "model_output_answer_correctness": "correct", "model_output_solution_correctness": "wrong",
    "model_output_solution_first_error_step": 2,
}  # fmt: skip
MR_BEN = {
    "Question_UUID": "u", "Subject": "math", "Question": "q", "Options": "A: 1 B: 2", "Ground_Truth_Answer": "B",
    "Sampled_Model": "m", "Model_Solution_Steps": ["Step 1: a", " ", "Step 2: b", "Solution: Choice_B"],
    "Model_Solution_Correctness": "incorrect", "Model_Solution_First_Error_Step": "3",
}  # fmt: skip
MR_CODE = {
    "Question_UUID": "u", "Subject": "coding", "Question": "q", "Ground_Truth_Answer": "", "Sampled_Model": "m",
    "Model_Solution_Steps": "def f():\n    x = 1\n\n    return x\n", "Model_Solution_Correctness": "incorrect",
    "Model_Solution_First_Error_Step": "    return x",
}  # fmt: skip
MISTAKE = {"input": "q", "steps": ["a", "b"], "target": "(E)", "answer": "(D)", "mistake_index": 1}
_OF_THREE = {"is_correct": False, "solution": "1 + 1 = <<1+1=3>>3\nA: 3"}
GSM = {
    "question": "q", "ground_truth": "x = <<1+1=2>>2\nA: 2",
    "6b_finetuning": _OF_THREE, "6b_verification": _OF_THREE, "175b_finetuning": _OF_THREE,
    "175b_verification": {"is_correct": True, "solution": "so 1,000\nA: 1,000"},
}  # fmt: skip
BEST = {
    "idx": 3, "question": "q", "gt": "\\frac{1}{2}", "code": ["one\n\ntwo \\boxed{0.5}", "three"], "pred": ["0.5", ""],
    "score": [True, False], "pred_score": [[0.0], [-1e9]],
}  # fmt: skip


def rows_of(tmp_path, format, *records, name="x.jsonl", **options):
    return import_rows(lines(tmp_path / name, records), format, **options)


def test_math_shepherd(tmp_path):
    (row,) = rows_of(tmp_path, "math_shepherd", SHEPHERD).rows
    assert row.prompt == "How many?"
    assert row.steps == ("Step 1: 2 + 2 = 4", "Step 2: 4 + 1 = 6", "Step 3: The answer is: 6")
    assert (row.n_correct, row.n_rollouts) == ((0, 1, 0, 0), (0, 1, 1, 1))
    assert (row.outcome, row.label_source, row.first_error_known) == ("wrong", "monte_carlo", False)
    assert step_targets(row, "hard") == [1.0, 0.0, 0.0]


def test_stepwise_records_of_trl(tmp_path):
    record = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}
    (row,) = rows_of(tmp_path, "stepwise", record).rows
    assert (row.n_correct, row.n_rollouts, row.outcome) == ((0, 1, 0), (0, 1, 1), "unknown")
    (row,) = rows_of(tmp_path, "stepwise", {**record, "labels": [0.75, 0.5]}, rollouts=8).rows
    assert (row.n_correct, row.n_rollouts) == ((0, 6, 4), (0, 8, 8))
    (row,) = rows_of(tmp_path, "stepwise", record, label_source="human").rows
    assert (row.label_source, row.first_error, row.first_error_known) == ("human", 1, True)
    found = rows_of(tmp_path, "stepwise", {**record, "labels": [0.7, 0.5]}, rollouts=8)
    assert found.rows[0].n_correct == (0, 6, 4)
    assert found.dropped == {"shares rounded to 8 continuations (kept)": 1}


def test_math_aps_is_the_same_tree_in_both_shapes(tmp_path):
    flat = rows_of(tmp_path, "math_aps", FLAT_APS)
    (tree,) = rows_of(tmp_path, "math_aps", TREE_APS).rows
    assert flat.dropped == {"prefixes that were listed before": 1}
    shown = lambda t: sorted(
        (n.step, n.n_correct, n.n_rollouts, n.outcome, t.nodes[n.parent].step) for n in t.nodes[1:]
    )
    assert (
        shown(flat.rows[0])
        == shown(tree)
        == [
            ("First.", 16, 32, None, ""),
            ("Other", 1, 32, None, ""),
            ("So \\boxed{3}", 1, 1, "right", "First."),
            ("So \\boxed{4}", 0, 1, "wrong", "First."),
        ]
    )
    assert (tree.nodes[0].n_correct, tree.nodes[0].n_rollouts, tree.nodes[0].parent) == (24, 32, -1)
    assert all(n.parent < i for i, n in enumerate(tree.nodes))
    assert (tree.gold, flat.rows[0].problem_id) == ("3", "math_aps/x/5")
    first = step_labels(tree)[0]
    assert (first.steps, first.n_correct, first.n_rollouts) == (
        ("First.", "So \\boxed{3}"),
        (24, 16, 1),
        (32, 32, 1),
    )


def test_a_tree_may_be_deeper_than_pythons_stack(tmp_path):
    deep = {"text": "x", "mc_value": 0.5, "children": []}
    for _ in range(400):
        deep = {"text": "x", "mc_value": 0.5, "children": [deep]}
    (tree,) = rows_of(tmp_path, "math_aps", {**TREE_APS, "reasoning_steps": deep}).rows
    assert [n.parent for n in tree.nodes] == list(range(-1, 400))


def test_processbench_counts_from_0(tmp_path):
    sound = {**BENCH, "label": -1, "final_answer_correct": False}
    one, two = rows_of(tmp_path, "processbench", BENCH, sound).rows
    # Behind the first wrong step nothing is known.
    assert (one.n_correct, one.n_rollouts, one.first_error) == ((0, 1, 0, 0), (0, 1, 1, 0), 1)
    assert (one.outcome, one.problem_id, one.source.policy) == ("right", "x-1", "m")
    assert (two.n_correct, two.n_rollouts, two.first_error, two.outcome) == ((0, 1, 1, 1), (0, 1, 1, 1), None, "wrong")
    del sound["final_answer_correct"]
    assert rows_of(tmp_path, "processbench", sound).rows[0].outcome == "unknown"


def test_prmbench_counts_from_1_and_knows_all_steps(tmp_path):
    plain = {**PRMBENCH, "classification": "circular"}
    behind = {**plain, "error_steps": [2, 9]}
    found = rows_of(tmp_path, "prmbench", PRMBENCH, plain, behind, {**plain, "error_steps": []})
    correct, one, two = found.rows
    assert (correct.problem_id, correct.steps, correct.n_correct) == ("prmbench/correct/i7", ("a", "b"), (0, 1, 1))
    assert (correct.prompt, correct.first_error) == ("q", None)
    assert (one.prompt, one.n_correct, one.n_rollouts) == ("q'", (0, 1, 0, 1, 0), (0, 1, 1, 1, 1))
    assert (one.first_error, one.problem_id, two.problem_id) == (1, "prmbench/redundency/i7", "prmbench/circular/i7")
    assert found.dropped == {"with a wrong step behind the last": 1, "without a wrong step": 1}


def test_mr_gsm8k_counts_from_1_as_released_and_from_0_in_processbenchs_fields(tmp_path):
    sound = {**MR_RAW, "model_output_solution_correctness": "correct", "model_output_solution_first_error_step": None}
    one, two = rows_of(tmp_path, "mr_gsm8k", MR_RAW, sound).rows
    assert (one.first_error, one.n_correct, one.n_rollouts) == (1, (0, 1, 0, 0), (0, 1, 1, 0))
    assert (one.gold, one.outcome, two.first_error) == ("17", "right", None)
    (three,) = rows_of(tmp_path, "mr_gsm8k", {**BENCH, "id": 4}).rows
    assert (three.first_error, three.problem_id, three.source.task) == (1, "mr_gsm8k/4", "mr_gsm8k")


def test_mr_ben_counts_from_1_and_skips_blank_steps(tmp_path):
    (row,) = rows_of(tmp_path, "mr_ben", MR_BEN).rows
    assert row.steps == ("Step 1: a", "Step 2: b", "Solution: Choice_B")
    assert (row.first_error, row.n_correct, row.outcome) == (1, (0, 1, 0, 0), "right")
    assert row.prompt == "q\nA: 1 B: 2"
    sound = {**MR_BEN, "Model_Solution_Correctness": "correct", "Model_Solution_First_Error_Step": "N/A"}
    assert rows_of(tmp_path, "mr_ben", sound).rows[0].first_error is None
    modified = {**MR_BEN, "Ground_Truth_Answer_Modified": "A"}
    assert rows_of(tmp_path, "mr_ben", modified).rows[0].outcome == "wrong"
    assert rows_of(tmp_path, "mr_ben", MR_BEN, {**MR_BEN, "Model_Solution_First_Error_Step": "2"}).dropped == {
        "whose first wrong step is blank": 1
    }


def test_mr_ben_marks_a_line_of_code(tmp_path):
    twice = {**MR_CODE, "Model_Solution_Steps": "x\ny\nx", "Model_Solution_First_Error_Step": "x"}
    loose = {**MR_CODE, "Model_Solution_First_Error_Step": "return x  "}
    found = rows_of(tmp_path, "mr_ben", MR_CODE, twice, loose, {**MR_CODE, "Model_Solution_First_Error_Step": ""})
    assert [(r.steps, r.first_error) for r in found.rows] == [(("def f():", "    x = 1", "    return x"), 2)] * 2
    assert found.dropped == {"whose first wrong line is in doubt": 2}


def test_big_bench_mistake_counts_from_0(tmp_path):
    records = MISTAKE, {**MISTAKE, "mistake_index": None, "answer": "(E)"}, {**MISTAKE, "answer": None}
    found = rows_of(tmp_path, "big_bench_mistake", *records, name="words.jsonl").rows
    assert [(r.first_error, r.outcome) for r in found] == [(1, "wrong"), (None, "right"), (1, "unparseable")]
    assert found[2].problem_id == "big_bench_mistake/words/00002"


def test_gsm8k_solutions(tmp_path):
    rows = rows_of(tmp_path, "gsm8k_solutions", GSM).rows
    assert [(r.sample, r.answer, r.outcome) for r in rows] == [(k, "3", "wrong") for k in range(3)] + [
        (3, "1000", "right")
    ]
    assert rows[0].steps == ("1 + 1 = 3", "A: 3")
    assert "<<1+1=3>>" in rows[0].text
    assert (rows[0].gold, rows[3].source.policy) == ("2", "175b_verification")
    assert len({r.problem_id for r in rows}) == 1


def test_math_best_of_8(tmp_path):
    found = rows_of(tmp_path, "math_best_of_8", BEST)
    assert [(r.steps, r.outcome) for r in found.rows] == [
        (("one", "two \\boxed{0.5}"), "right"),
        (("three",), "unparseable"),
    ]
    assert found.rows[0].answer == canonical("1/2", "math")
    assert found.scores == [[0.5], [pytest.approx(0.0)]]  # the sigmoid of a logit that is too small for a float too
    few = rows_of(tmp_path, "math_best_of_8", *[{**BEST, "idx": i} for i in range(9)], limit=5, seed=1)
    assert len(few.rows) == len(few.scores) == 5
    assert all((score == [0.5]) == row.right for row, score in zip(few.rows, few.scores, strict=True))


def test_a_limit_draws_with_the_seed_and_counts(tmp_path):
    records = [{**BENCH, "id": str(i)} for i in range(40)]
    draws = {}
    for seed in range(3):
        found = rows_of(tmp_path, "processbench", *records, limit=7, seed=seed)
        assert (len(found.rows), found.dropped) == (7, {"beyond the limit": 33})
        draws[seed] = [r.problem_id for r in found.rows]
        assert draws[seed] == sorted(draws[seed], key=int)
    assert draws[0] != draws[1] != draws[2]
    assert rows_of(tmp_path, "processbench", *records, limit=7, seed=2).rows[0].problem_id == draws[2][0]
    assert len(rows_of(tmp_path, "processbench", *records, limit=40).rows) == 40


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        ("math_shepherd", {"input": "Step 1: a ки"}, "field label is missing"),
        ("math_shepherd", {**SHEPHERD, "input": "Step 1: a ки and on"}, "field input: expected steps that each end with ки"),
        ("math_shepherd", {**SHEPHERD, "label": SHEPHERD["label"].replace("4 +", "4 *")}, "field label: expected the text"),
        ("math_shepherd", {"input": "a ки", "label": "a +"}, 'field input: expected a question and then "Step 1:"'),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": []}, "field labels: expected one for each of 1"),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [0.5]}, "rollouts: N"),
        ("stepwise", {"prompt": "q", "completions": ["a"], "labels": [2]}, "shares between 0 and 1"),
        ("math_aps", {**FLAT_APS, "reasoning_steps": 5}, "field reasoning_steps: expected a list of prefixes or a tree"),
        ("math_aps", {**FLAT_APS, "reasoning_steps": [{"solution_prefix": "R"}]}, "begins with the question"),
        ("math_aps", {**TREE_APS, "reasoning_steps": {"text": "Q?", "mc_value": 1.5}}, "mc_value: expected a share"),
        ("processbench", {**BENCH, "label": 3}, "label must lie between -1 and the last step, found 3"),
        ("prmbench", {**PRMBENCH, "error_steps": [0]}, "error_steps: expected whole numbers from 1"),
        ("prmbench", {**PRMBENCH, "modified_process": "a"}, "modified_process: expected a list"),
        ("mr_gsm8k", {**MR_RAW, "model_output_solution_first_error_step": 4}, "a whole number from 1 to 3, found 4"),
        ("mr_gsm8k", {**MR_RAW, "model_output_solution_correctness": "?"}, "expected correct, or wrong or incorrect"),
        ("mr_ben", {**MR_BEN, "Model_Solution_First_Error_Step": "N/A"}, "a whole number from 1 to 4, found 'N/A'"),
        ("big_bench_mistake", {**MISTAKE, "mistake_index": 2}, "null or a whole number from 0 to 1, found 2"),
        ("big_bench_mistake", {**MISTAKE, "steps": []}, "steps: expected a list of texts"),
        ("gsm8k_solutions", {**GSM, "6b_finetuning": {"solution": "x"}}, "an object with solution and is_correct"),
        ("math_best_of_8", {**BEST, "score": [True]}, "field score: expected a list with an entry for each of 2 samples"),
        ("math_best_of_8", {**BEST, "score": [True, 1]}, "true or false for each sample"),
        ("math_best_of_8", {**BEST, "pred_score": [["x"], [1]]}, "pred_score: expected numbers"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_of_the_format_is_one_sentence(tmp_path, format, record, message):
    good = {"math_shepherd": SHEPHERD, "math_aps": FLAT_APS, "processbench": BENCH, "prmbench": PRMBENCH, "mr_gsm8k": MR_RAW,
            "mr_ben": MR_BEN, "big_bench_mistake": MISTAKE, "gsm8k_solutions": GSM, "math_best_of_8": BEST,
            "stepwise": {"prompt": "q", "completions": ["a"], "labels": [1]}}[format]  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        rows_of(tmp_path, format, good, record)
    assert str(error.value).startswith(f"{tmp_path / 'x.jsonl'}, line 2")
    assert "\n" not in str(error.value)


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"unknown format .*did you mean math_shepherd"):
        rows_of(tmp_path, "math_sheperd", SHEPHERD)
    with pytest.raises(UserError, match="format gsm8k_solutions gives Solution rows, StepLabels rows are needed"):
        rows_of(tmp_path, "gsm8k_solutions", GSM, row_type=StepLabels)


# --- the real files ------------------------------------------------------------------------------------------------------

REAL = [  # file, format, rows, rows without a wrong step (None: no such thing)
    ("prm_format_samples/math_shepherd.jsonl", "math_shepherd", 7, None),
    ("prm_format_samples/math_aps.jsonl", "math_aps", 3, None),
    ("prm_format_samples/math_aps_tree.jsonl", "math_aps", 3, None),
    ("prm_format_samples/prm800k.jsonl", "prm800k", 2, 2),
    ("processbench/gsm8k.json", "processbench", 200, 88),
    ("processbench/math.json", "processbench", 495, 193),
    ("prmbench/train_p1_first400.jsonl.gz", "prmbench", 3529, 399),
    ("mr_gsm8k/processed.json", "mr_gsm8k", 1098, 554),
    ("mr_gsm8k/first_error_reasons.jsonl", "mr_gsm8k", 446, 0),
    ("mr_ben/math.jsonl", "mr_ben", 441, 73),
    ("mr_ben/biology.jsonl", "mr_ben", 1035, 617),
    ("mr_ben/coding.jsonl", "mr_ben", 219, 74),
    ("big_bench_mistake/word_sorting.jsonl", "big_bench_mistake", 300, 34),
    ("gsm8k/example_model_solutions.jsonl", "gsm8k_solutions", 4076, None),
    ("math_best_of_8/math_cot.jsonl", "math_best_of_8", 728, None),
]


@pytest.mark.skipif(not DATA.is_dir(), reason="the published files are not there")
@pytest.mark.parametrize(("file", "format", "count", "sound"), REAL)
def test_the_published_files(file, format, count, sound):
    found = import_rows(DATA / file, format)
    assert len(found.rows) == count
    # A blank step of PRMBench keeps its number; elsewhere there is none left.
    assert format == "prmbench" or all(step.strip() for row in found.rows for step in getattr(row, "steps", ()))
    row_type = StepLabels if format == "prm800k" else FORMATS[format][0]
    assert {type(row) for row in found.rows} == {row_type}
    if row_type is StepLabels:
        keys = Counter((row.problem_id, row.sample) for row in found.rows)
        assert max(keys.values()) == 1
        if sound is not None:
            assert sum(row.first_error is None for row in found.rows) == sound
        for row in found.rows:
            wrong = [
                t for t, (c, n) in enumerate(zip(row.n_correct[1:], row.n_rollouts[1:], strict=True)) if n and not c
            ]
            assert not row.first_error_known or min(wrong, default=None) == row.first_error
    elif row_type is Tree:
        assert all(n.parent < i for row in found.rows for i, n in enumerate(row.nodes))
        assert "shares rounded to 32 continuations (kept)" not in found.dropped
        assert all(step_labels(row) for row in found.rows)
    else:
        assert row_type is Solution
        kind = "number" if format == "gsm8k_solutions" else "math"
        other = sum((canonical(row.gold, kind) == row.answer) != row.right for row in found.rows)
        assert other <= 1  # one verdict of the published file is another than that of this grader's canonical forms
