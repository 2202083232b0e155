"""The table that a command prints: exact text on small examples, nothing wider than a terminal, nothing lost."""

from __future__ import annotations

from typing import Any

from stepladder.launch.tables import WIDTH, Answers, format_table, short, show


def record(arm: str, metric: str, value: float | None, ci: list[float] | None = None, **rest: Any) -> dict[str, Any]:
    known = {"n": 500, "tokens": 319046, "flops": 4.26e11, "seconds": 16.1, "seed": 0, **rest}
    return {"arm": arm, "metric": metric, "value": value, "ci": ci, **known}


def test_format_table_exactly():
    records = [
        record("base/greedy", "accuracy", 0.482, [0.44, 0.524], tokens=19806, flops=3.91e10),
        record("base/beam_prm", "accuracy", 0.61, [0.57, 0.65]),
        record("base/beam_prm", "accuracy_minus_majority", 0.1, [0.05, 0.15]),
        record("improved/greedy", "accuracy", 0.734, [0.694, 0.772], tokens=19938, flops=3.93e10),
        record("improved/greedy", "accuracy_minus_base", 0.252, [0.2, 0.3]),
        record("prm", "step_auroc", 0.9312, [0.911, 0.95], n=2000),
        record("labels", "label_false_positive", 0.14, [0.131, 0.149], n=6535),
        record("labels", "label_false_positive_closed_form", 0.208, n=6535),
    ]
    want = """\
accuracy, %  base               improved           tokens         FLOPs
-------------------------------------------------------------------------------
greedy       48.2 [44.0, 52.4]  73.4 [69.4, 77.2]  19.8k / 19.9k  39.1G / 39.3G
beam_prm     61.0 [57.0, 65.0]  -                  319k / -       426G / -

difference, points  improved - base    base - majority
-------------------------------------------------------
greedy              25.2 [20.0, 30.0]  -
beam_prm            -                  10.0 [5.0, 15.0]

measure                  of      measured              closed form  n
------------------------------------------------------------------------
step_auroc               prm     0.931 [0.911, 0.950]               2000
label_false_positive, %  labels  14.0 [13.1, 14.9]     20.8         6535"""
    assert format_table(records) == want
    assert format_table([]) == ""


def test_a_table_that_is_too_wide_is_folded():
    policies = ["base", "round_one", "round_two", "round_three", "round_four", "round_five"]
    records = [
        record(f"{p}/weighted_best_of_16_prm", "accuracy", 0.5 + i / 100, [0.4, 0.6]) for i, p in enumerate(policies)
    ]
    text = format_table(records)
    assert max(map(len, text.split("\n"))) <= WIDTH
    assert all(p in text for p in policies)
    assert all(f"{50 + i}.0 [40.0" in text for i in range(6))
    assert text.count("weighted_best_of_16_prm") > 1  # every piece says whose row it is


def test_seeds_and_second_records_of_a_name_have_rows_of_their_own():
    seeds = [record("base/greedy", "accuracy", 0.4 + s / 10, seed=s) for s in range(3)]
    text = format_table(seeds)
    assert [f"greedy, seed {s}" in text for s in range(3)] == [True] * 3
    assert "50.0" in text
    assert "60.0" in text
    twice = format_table([record("base/greedy", "accuracy", 0.4), record("base/greedy", "accuracy", 0.7)])
    assert "40.0" in twice
    assert "greedy (2)   70.0" in twice


def test_a_closed_form_that_nothing_was_measured_against_is_shown():
    text = format_table([record("labels", "label_false_negative_closed_form", 0.013)])
    assert text.split("\n")[-1].split() == ["label_false_negative,", "%", "labels", "-", "1.3", "500"]


def test_an_accuracy_of_no_policy_is_a_measure():
    answers = Answers([record("prm", "accuracy", 0.9), record("processbench/gsm8k", "accuracy_error", 0.5)])
    assert not answers.rows
    assert not answers.policies
    text = format_table([record("prm", "accuracy", 0.9), record("processbench/gsm8k", "accuracy_error", 0.5)])
    assert "90.0" in text
    assert "processbench/gsm8k" in text


def test_show():
    assert show(None) == "-"
    assert show(record("a", "accuracy", None)) == "undefined"
    assert show(record("a", "accuracy_minus_base", -0.0001)) == "0.0"
    assert show(record("a", "step_auroc", 0.5)) == "0.500"


def test_short_keeps_three_digits():
    want = {
        0: "0",
        999: "999",
        1000: "1.00k",
        9996: "10.0k",
        19806: "19.8k",
        99960: "100k",
        999_600: "1.00M",
        1.05e12: "1.05T",
    }
    assert {count: short(count) for count in want} == want


def test_curves_have_a_row_an_arm_and_a_column_a_size():
    records = [
        record("pool/pass", "accuracy@1", 0.5, [0.4, 0.6]),
        record("pool/pass", "accuracy@16", 0.95),
        record("pool/pass", "accuracy@2", 0.7),
        record("pool/best_prm_min", "accuracy@16", 0.6),
        record("pool/best_prm_min", "minus_majority@16", -0.0004),
        record("pool/best_prm_min", "oracle_gap@16", 0.35),
        record("prm", "step_auroc", 0.5, n=7),
    ]
    want = """\
accuracy@k, %      k = 1  k = 2  k = 16
---------------------------------------
pool/pass          50.0   70.0   95.0
pool/best_prm_min  -      -      60.0

minus majority@k, points  k = 1  k = 2  k = 16
----------------------------------------------
pool/best_prm_min         -      -      0.0

pass@k minus it, points  k = 1  k = 2  k = 16
---------------------------------------------
pool/best_prm_min        -      -      35.0

measure     of   measured  closed form  n
-----------------------------------------
step_auroc  prm  0.500                  7"""
    assert format_table(records) == want


def test_curves_of_several_seeds_name_them():
    text = format_table([record("pool/pass", "accuracy@1", s / 10, seed=s) for s in range(2)])
    assert "pool/pass, seed 0" in text
    assert "pool/pass, seed 1" in text
