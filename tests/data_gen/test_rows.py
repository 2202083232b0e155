"""Rows in and out of records, labels from counts, and exports."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest

from stepladder.basics import UserError
from stepladder.data_gen.rows import (
    ROW_TYPES,
    Dialogue,
    Message,
    Node,
    Pair,
    Solution,
    Source,
    StepLabels,
    Tree,
    from_record,
    step_targets,
    td_targets,
    to_messages,
    to_record,
    to_trl_preference,
    to_trl_stepwise,
)
from stepladder.data_gen.store import read_rows, write_rows

SOURCE = Source("policy", "fake", "chain", 3)


def solution(**changes: Any) -> Solution:
    made = Solution(
        "p1", "1 + 1?\n", "2", 0, ("1 + 1 = 2", "Answer: 2"), "1 + 1 = 2\nAnswer: 2", "2", "right", "eos",
        (4, 5, 6), (2, 3), -1.25, SOURCE,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def labels(n_correct: tuple[int, ...], n_rollouts: tuple[int, ...], **changes: Any) -> StepLabels:
    steps = tuple(f"s{i}" for i in range(len(n_correct) - 1))
    made = StepLabels(
        "p1", "1 + 1?\n", "2", 0, steps, n_correct, n_rollouts, "monte_carlo", "right", None, False, SOURCE
    )
    return dataclasses.replace(made, **changes)


ROWS = [
    solution(),
    solution(answer=None, outcome="unparseable", steps=(), token_ids=(), step_ends=(), text="é\u2028"),
    labels((3, 8, 1), (8, 8, 1), first_error=1, first_error_known=True),
    labels((0,), (0,)),
    Tree(
        "p1", "q", "2",
        (Node(-1, "", 3, 8, 0, None, None, 0.0), Node(0, "a", 1, 2, 4, 0.5, "right", -0.5)), SOURCE,
    ),
    Pair("p1", "q", ("a",), ("b", "c"), ("d",), 0.75, 0.0, 6, 0, True, False, SOURCE),
    Dialogue("p1", "solve", (Message("user", "q"), Message("assistant", "a", True, 0.5, ((0, 1), (3, 9)))), "{}", SOURCE),
    Dialogue("p1", "solve", (), '{"k": [1]}', SOURCE),
]  # fmt: skip


def test_every_row_type_has_an_example():
    assert {type(row) for row in ROWS} == set(ROW_TYPES.values())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_records_give_back_their_rows(row, tmp_path):
    assert from_record(type(row), to_record(row)) == row
    assert from_record(type(row), json.loads(json.dumps(to_record(row)))) == row
    write_rows(tmp_path, [row, row])
    assert read_rows(tmp_path, type(row)) == [row, row]
    (tmp_path / "rows.jsonl").write_text(json.dumps(to_record(row)) + "\n\n" + json.dumps(to_record(row)) + "\n")
    assert read_rows(tmp_path / "rows.jsonl", type(row)) == [row, row]


@pytest.mark.parametrize("row_type", ROW_TYPES.values(), ids=ROW_TYPES.keys())
def test_load_dataset_reads_both_kinds_of_files(row_type, tmp_path):
    import datasets

    rows = [row for row in ROWS if type(row) is row_type]
    write_rows(tmp_path, rows)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(to_record(row)) + "\n" for row in rows))
    cache = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    parquet = datasets.load_dataset("parquet", data_files=str(tmp_path / "rows.parquet"), **cache)
    lines = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), **cache)
    assert [from_record(row_type, record) for record in parquet] == rows
    assert parquet.column_names == lines.column_names == [f.name for f in dataclasses.fields(row_type)]
    assert [from_record(row_type, record) for record in lines] == rows


def test_columns_keep_their_types_when_everything_is_empty(tmp_path):
    import pyarrow.parquet as pq

    write_rows(tmp_path, [solution(answer=None, steps=(), token_ids=(), step_ends=())])
    schema = pq.read_schema(tmp_path / "rows.parquet")
    assert [str(schema.field(n).type) for n in ("answer", "token_ids", "logprob")] == [
        "string",
        "list<element: int64>",
        "double",
    ]


def broken(field: str, value: Any, row: Any = None) -> dict[str, Any]:
    return {**to_record(row or solution()), field: value}


@pytest.mark.parametrize(
    ("row_type", "record", "message"),
    [
        (Solution, {"problem_id": "x"}, r"line 17: field prompt of Solution is missing \(found problem_id\)"),
        (Solution, broken("sample", "0"), "line 17, field sample: expected int, found '0'"),
        (Solution, broken("sample", True), "field sample: expected int, found True"),
        (Solution, broken("sample", 1.5), "field sample: expected int, found 1.5"),
        (Solution, broken("answer", 3), "field answer: expected str, found 3"),
        (Solution, broken("logprob", "x"), "field logprob: expected float, found 'x'"),
        (Solution, broken("logprob", True), "field logprob: expected float, found True"),
        (Solution, broken("steps", "a\nb"), "field steps: expected a list, found str"),
        (Solution, broken("steps", ["a", 1]), "field steps: expected str, found 1"),
        (Solution, broken("steps", {"a": 1}), "field steps: expected a list, found dict"),
        (Solution, broken("source", "me"), "field source: expected a Source object, found str"),
        (Solution, broken("source", {"policy": "x"}), "field source: field engine of Source is missing"),
        (Solution, ["a"], "line 17: expected a Solution object, found list"),
        (StepLabels, broken("label_source", "guess", labels((0,), (0,))), "one of monte_carlo, human, checker, found 'guess'"),
        (StepLabels, broken("label_source", ["human"], labels((0,), (0,))), "expected one of monte_carlo, human, checker"),
        (StepLabels, broken("n_correct", [1], labels((1, 1), (1, 1))), "line 17: 1 steps need 2 counts .* found 1 n_correct and 2"),
        (StepLabels, broken("n_correct", [2, 1], labels((1, 1), (1, 1))), "line 17: every n_correct must lie between 0 and"),
        (StepLabels, broken("n_correct", [-1, 1], labels((1, 1), (1, 1))), "every n_correct must lie between"),
        (StepLabels, broken("first_error_known", 1, labels((1, 1), (1, 1))), "field first_error_known: expected bool, found 1"),
        (Dialogue, broken("messages", [{"role": "user"}], ROWS[-1]), "field messages: field content of Message is missing"),
        (Message, {"role": "a", "content": "b", "mask_spans": [[1, 2, 3]]}, "field mask_spans: expected 2 values, found 3"),
        (Message, {"role": "a", "content": "b", "mask_spans": [5]}, "field mask_spans: expected a list, found int"),
    ],
)  # fmt: skip
def test_a_broken_record_names_the_field(row_type, record, message):
    with pytest.raises(UserError, match=message):
        from_record(row_type, record, "line 17")


def test_whole_numbers_become_floats_where_floats_are_meant():
    assert from_record(Solution, broken("logprob", -1)).logprob == -1.0
    assert isinstance(from_record(Solution, broken("logprob", -1)).logprob, float)


# --- labels from counts ----------------------------------------------------------------------------------------------------

COUNTS = labels((7, 8, 3, 0, 0, 1), (8, 8, 8, 0, 8, 1))


@pytest.mark.parametrize(
    ("kind", "threshold", "want"),
    [
        ("soft", 0.0, [1.0, 0.375, None, 0.0, 1.0]),
        ("hard", 0.0, [1.0, 1.0, None, 0.0, 1.0]),
        ("human", 0.0, [1.0, 1.0, None, 0.0, 1.0]),
        ("checker", 0.0, [1.0, 1.0, None, 0.0, 1.0]),
        ("threshold", 0.0, [1.0, 1.0, None, 0.0, 1.0]),
        ("threshold", 0.374, [1.0, 1.0, None, 0.0, 1.0]),
        ("threshold", 0.375, [1.0, 0.0, None, 0.0, 1.0]),  # greater than, and not equal to
        ("threshold", 1.0, [0.0, 0.0, None, 0.0, 0.0]),
    ],
)
def test_targets(kind, threshold, want):
    assert step_targets(COUNTS, kind, threshold) == want


@pytest.mark.parametrize(
    ("kind", "threshold", "want"),
    [
        ("soft", 0.0, [1.0, 0.375, None, 0.0, None]),
        ("hard", 0.0, [1.0, 1.0, None, 0.0, None]),
        ("threshold", 0.5, [1.0, 0.0, None, None, None]),
        ("threshold", 1.0, [0.0, None, None, None, None]),
    ],
)
def test_targets_after_the_first_zero_can_be_dropped(kind, threshold, want):
    assert step_targets(COUNTS, kind, threshold, after_first_zero=False) == want


def test_without_a_zero_nothing_is_dropped():
    row = labels((1, 4, 5), (8, 8, 8))
    assert step_targets(row, "soft", after_first_zero=False) == [0.5, 0.625]


def test_soft_labels_are_never_cut_to_whole_numbers():
    row = labels((10, 9), (10, 10))
    assert step_targets(row, "soft") == [0.9]
    assert to_trl_stepwise(row, "soft")["labels"] == [0.9]


def test_targets_match_their_definition():
    rng = random.Random(0)
    for _ in range(200):
        n = rng.randint(1, 6)
        rollouts = tuple(rng.choice([0, 1, 8]) for _ in range(n))
        row = labels(tuple(rng.randint(0, k) for k in rollouts), rollouts)
        threshold = rng.choice([0.0, 0.25, 0.5])
        for i, (soft, hard, cut) in enumerate(
            zip(*(step_targets(row, kind, threshold) for kind in ("soft", "hard", "threshold")), strict=True)
        ):
            c, k = row.n_correct[i + 1], row.n_rollouts[i + 1]  # the empty prefix is left out
            assert (soft, hard, cut) == ((c / k, float(c >= 1), float(c > threshold * k)) if k else (None, None, None))


def test_an_unknown_kind_is_refused_also_where_nothing_is_known():
    for row in (COUNTS, labels((0, 0), (0, 0))):
        with pytest.raises(
            ValueError, match="label kind must be hard, soft, threshold, human or checker, found 'warm'"
        ):
            step_targets(row, "warm")


# --- exports ---------------------------------------------------------------------------------------------------------------


def test_trl_stepwise():
    row = labels((7, 8, 3, 0), (8, 8, 8, 8))
    assert to_trl_stepwise(row) == {
        "prompt": row.prompt,
        "completions": ["s0", "s1", "s2"],
        "labels": [True, True, False],
    }
    assert to_trl_stepwise(row, "soft")["labels"] == [1.0, 0.375, 0.0]
    # From the first unknown label on, steps are left out.
    assert to_trl_stepwise(COUNTS) == {"prompt": row.prompt, "completions": ["s0", "s1"], "labels": [True, True]}


def test_trl_preference_moves_the_shared_prefix_into_the_prompt():
    pair = next(row for row in ROWS if isinstance(row, Pair))
    assert to_trl_preference(pair, "\n") == {"prompt": "qa\n", "chosen": "b\nc\n", "rejected": "d\n"}


def test_messages():
    assert to_messages(ROWS[-2]) == {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }


def test_rows_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        ROWS[0].sample = 3
    assert solution().right
    assert not solution(outcome="timeout").right


# --- reading ---------------------------------------------------------------------------------------------------------------


def test_read_rows_names_the_file_and_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(to_record(solution()))
    path.write_text("\n".join([good] * 16 + [json.dumps(broken("sample", "x"))]) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 17, field sample: expected int"):
        read_rows(path, Solution)
    path.write_text("\n".join([good] * 16 + [good[:50]]) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 17: not valid JSON"):
        read_rows(path, Solution)
    path.write_text("")
    with pytest.raises(UserError, match="the data set is empty"):
        read_rows(path, Solution)
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "nothing.jsonl", Solution)
    with pytest.raises(UserError, match="no finished rows here"):
        read_rows(tmp_path, Solution)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_rows(tmp_path, Solution)
    write_rows(tmp_path, [labels((1, 1), (1, 1))])
    with pytest.raises(UserError, match="row 0: field text of Solution is missing"):
        read_rows(tmp_path, Solution)


def slow_td(shares: list[float | None], t: int, alpha: float, horizon: int, tolerance: float) -> float | None:
    """The look-ahead of step t written as a recursion: v(i) = r_i + alpha (v(i + 1) - r_i) while the shares rise."""

    def value(i: int, left: int) -> float:
        here = shares[i]
        assert here is not None
        following = shares[i + 1] if i + 1 < len(shares) else None
        if not left or following is None or following - here < tolerance:
            return here
        return here + alpha * (value(i + 1, left - 1) - here)

    return None if shares[t] is None else value(t, horizon)


@pytest.mark.parametrize("seed", range(20))
def test_td_targets_match_a_recursion(seed):
    rng = random.Random(seed)
    size = rng.randint(1, 8)
    counts = sorted(rng.randint(0, 8) for _ in range(size)) if seed % 2 else [rng.randint(0, 8) for _ in range(size)]
    known = [8 if rng.random() < 0.8 else 0 for _ in range(size)]
    made = labels((4, *(c if n else 0 for c, n in zip(counts, known, strict=True))), (8, *known))
    alpha, horizon, shallow = rng.choice([0.25, 0.5, 1.0]), rng.randint(1, 4), rng.randint(0, 4)
    soft = step_targets(made, "soft")
    want = [slow_td(soft, t, alpha, horizon, 0.05) if t < shallow else soft[t] for t in range(size)]
    assert td_targets(made, alpha=alpha, horizon=horizon, shallow=shallow) == pytest.approx(want)


def test_td_targets_by_hand():
    # 1/8, 3/8, 5/8, 5/8: from the first step the rise goes on for two steps, the third adds nothing.
    made = labels((0, 1, 3, 5, 5), (8,) * 5)
    assert td_targets(made) == [0.125 + 0.5 * (0.375 + 0.5 * 0.25 - 0.125), 0.5, 0.625, 0.625]
    assert td_targets(made, alpha=0.0) == step_targets(made, "soft")
    assert td_targets(labels((0, 5, 2, 8), (8,) * 4)) == [0.625, 0.625, 1.0]  # a fall ends the look-ahead at once


def test_the_empty_prefix_has_a_target_if_asked_for():
    made = labels((0, 2, 0, 4), (8, 8, 8, 8))
    assert step_targets(made, "soft", root=True) == [0.0, 0.25, 0.0, 0.5]
    # It is no step: a root that nothing solved drops nothing behind it.
    assert step_targets(made, "hard", root=True, after_first_zero=False) == [0.0, 1.0, 0.0, None]
    assert step_targets(labels((0, 1), (0, 1)), "soft", root=True) == [None, 1.0]
