"""What claims measure, against values worked out by hand on a few rows and reward models that are tables."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepladder.basics import UserError, read_json
from stepladder.config import build
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.data_gen.store import write_rows
from stepladder.launch import evaluate_claims
from stepladder.launch.evaluate_claims import (
    correlation,
    evaluate_labels,
    evaluate_pav_toy,
    evaluate_rewards,
    evaluate_values,
)
from stepladder.launch.options_claims import EvaluateLabels, EvaluatePAVToy, EvaluateRewards, EvaluateValues
from stepladder.models.ledger import Ledger

SOURCE = Source("policy", "fake", "chain", 0)
TASK = {"kind": "chain", "p": 11}
PROMPT = "Start 3 ; + 5 ; * 2 \n"  # 3 + 5 = 8, 8 * 2 = 5, Answer: 5
GOOD = ("3 + 5 = 8", "8 * 2 = 5", "Answer: 5")
LATE = ("3 + 5 = 8", "8 * 2 = 6", "Answer: 6")
EARLY = ("3 + 5 = 7", "7 * 2 = 3", "Answer: 3")


def solution(problem: str, sample: int, steps: tuple[str, ...]) -> Solution:
    right = steps[-1] == "Answer: 5"
    return Solution(
        problem_id=problem, prompt=PROMPT, gold="5", sample=sample, steps=steps, text="", answer=steps[-1].split()[-1],
        outcome="right" if right else "wrong", stop="eos", token_ids=(), step_ends=(), logprob=0.0, source=SOURCE,
    )  # fmt: skip


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Names -> function (steps) -> scores of the empty prefix and of each step, in place of checkpoints."""

    def install(known: dict[str, Any]) -> None:
        def load(path: str, **_: Any) -> Any:
            ledger = Ledger()
            model = SimpleNamespace(name=path, cut_steps=0, context=99, ledger=ledger)
            model.step_format = SimpleNamespace(aggregation="last")

            def score_with_root(solutions: Any) -> list[list[float]]:
                ledger.add_reward(1, len(solutions))
                return [list(known[path](tuple(steps))) for _, steps in solutions]

            model.score_with_root = score_with_root
            model.score = lambda solutions: [one[1:] for one in score_with_root(solutions)]
            return model

        monkeypatch.setattr(evaluate_claims, "RewardModel", SimpleNamespace(load=load))

    return install


def read(out: Path) -> dict[tuple[str, str], Any]:
    return {(r["arm"], r["metric"]): r["value"] for r in read_json(out / "results.json")}


def test_reward_models_side_by_side(tmp_path: Path, tables: Any) -> None:
    rows = [solution(p, i, s) for p in ("a", "b") for i, s in enumerate([GOOD, LATE, EARLY])]
    write_rows(tmp_path / "pool", rows, ledger=Ledger(generated_tokens=70))
    exact = {GOOD: [1, 0.9, 0.9, 0.8], LATE: [1, 0.9, 0.1, 0.2], EARLY: [1, 0.2, 0.3, 0.3]}
    fooled = {GOOD: [1, 0.9, 0.4, 0.3], LATE: [1, 0.9, 0.8, 0.7], EARLY: [1, 0.6, 0.6, 0.9]}
    tables({"exact": exact.get, "fooled": fooled.get})
    config = EvaluateRewards(
        models={"e": "exact", "f": "fooled"}, solutions=str(tmp_path / "pool"), aggregations=["last", "min"], task=TASK
    )
    evaluate_rewards(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["sample", "accuracy"] == pytest.approx(1 / 3)
    assert found["majority", "accuracy"] == pytest.approx(1 / 3)  # three answers tie
    assert found["pass", "accuracy"] == 1
    assert (found["e/last", "accuracy"], found["e/min", "accuracy"]) == (1, 1)
    # Of the fooled model the worst steps are 0.3, 0.7 and 0.6, the last ones 0.3, 0.7 and 0.9.
    assert (found["f/last", "accuracy"], found["f/min", "accuracy"]) == (0, 0)
    assert found["f/last", "weighted_accuracy"] == 0
    assert (found["e/last", "within_question_auroc"], found["f/last", "within_question_auroc"]) == (1, 0)
    # The lowest score stands last in one of three solutions of the first model (0.8), and of the second (0.3), and in LATE (0.7).
    assert found["e", "min_at_last"] == pytest.approx(1 / 3)
    assert found["f", "min_at_last"] == pytest.approx(2 / 3)
    # Up to the first error: good scores of GOOD (3) and LATE (1), bad ones 0.1 and 0.2.
    assert (found["e", "step_auroc"], found["e", "step_accuracy"], found["e", "first_error_f1"]) == (1, 1, 1)
    # Fooled: good 0.9 0.4 0.3 0.9, bad 0.8 and 0.6: 4 of 8 pairs; right at 0.5: two of six.
    assert found["f", "step_auroc"] == pytest.approx(4 / 8)
    assert found["f", "step_accuracy"] == pytest.approx(2 / 6)
    # Within a length: first steps 0.9 0.9 over 0.6 (2 of 2), second steps 0.4 under 0.8 (0 of 1), per problem pairs add up.
    assert found["f", "length_auroc"] == pytest.approx((8 * 1.0 + 4 * 0.0) / 12)
    records = {(r["arm"], r["metric"]): r for r in read_json(tmp_path / "out" / "results.json")}
    assert records["e/last", "accuracy"]["tokens"] == 70
    values = {(v["arm"], v["metric"]): v["values"] for v in read_json(tmp_path / "out" / "values.json")}
    assert values["e/last", "accuracy"] == {"a": 1.0, "b": 1.0}


def labels(problem: str, steps: tuple[str, ...], right: tuple[int, ...], rollouts: tuple[int, ...]) -> StepLabels:
    return StepLabels(
        problem, PROMPT, "5", 0, steps, right, rollouts, "monte_carlo", "wrong", None, False, SOURCE
    )  # fmt: skip


def test_values_beside_counts(tmp_path: Path, tables: Any) -> None:
    rows = [labels("a", GOOD, (4, 6, 7, 1), (8, 8, 8, 1)), labels("b", LATE, (2, 8, 0, 0), (8, 8, 8, 1))]
    write_rows(tmp_path / "labels", rows)
    truth = {GOOD: [4 / 8, 6 / 8, 7 / 8, 0.0], LATE: [2 / 8, 1.0, 0.0, 0.5]}
    tables({"true": truth.get, "off": lambda s: [v * 0.5 + 0.3 for v in truth[s]], "flat": lambda s: [0.5] * 4})
    config = EvaluateValues(models={n: n for n in ("true", "off", "flat")}, labels=str(tmp_path / "labels"), k=1)
    evaluate_values(config, tmp_path / "out")
    found = read(tmp_path / "out")
    # The last prefixes are verdicts: what the model says of them does not count.
    assert found["true", "value_mse"] == 0
    assert found["true", "value_correlation"] == pytest.approx(1)
    assert found["off", "value_correlation"] == pytest.approx(1)
    assert found["off", "advantage_correlation"] == pytest.approx(1)
    squares = [[(0.3 - 0.5 * v) ** 2 for v in truth[s][:3]] for s in (GOOD, LATE)]
    assert found["off", "value_mse"] == pytest.approx(sum(map(sum, squares)) / 6)
    assert found["flat", "value_correlation"] is None
    config.k = 4
    evaluate_values(config, tmp_path / "four")
    assert read(tmp_path / "four")["off", "advantage_correlation"] < 0.999


def test_correlation_is_pearsons() -> None:
    rng = random.Random(0)
    x, y = [rng.random() for _ in range(50)], [rng.random() for _ in range(50)]
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert math.isnan(correlation([1.0, 1.0], [0.0, 1.0]))


def test_labels_beside_the_checker_and_their_cost(tmp_path: Path) -> None:
    rows = [
        labels("a", LATE, (4, 6, 0, 0), (8, 8, 8, 1)),  # the first error is found where it is
        labels("b", EARLY, (4, 2, 0, 0), (8, 8, 8, 1)),  # a wrong step had two right endings: found one step late
        labels("c", GOOD, (4, 8, 8, 1), (8, 8, 8, 1)),
    ]
    write_rows(tmp_path / "labels", rows, ledger=Ledger(policy_calls=50))
    write_rows(tmp_path / "more", rows, ledger=Ledger(policy_calls=150))
    config = EvaluateLabels(
        labels={"own": str(tmp_path / "labels"), "paid": str(tmp_path / "labels")},
        costs={"paid": [str(tmp_path / "labels"), str(tmp_path / "more")]},
        task=TASK,
    )
    evaluate_labels(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert found["own", "labels"] == 9
    assert found["own", "label_accuracy"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert found["own", "label_false_positive"] == pytest.approx(
        (0 + 1 / 3) / 2
    )  # means over problems with wrong steps
    assert found["own", "label_false_negative"] == 0
    assert (found["own", "first_errors"], found["own", "first_errors_exact"]) == (2, 0.5)
    assert found["own", "informative_labels"] == 2
    assert (found["own", "calls"], found["paid", "calls"]) == (50, 200)
    assert (found["own", "calls_per_first_error"], found["paid", "calls_per_first_error"]) == (25, 100)
    assert found["own", "informative_per_1000_calls"] == 40


def test_counts_of_a_prefix_in_several_rows_are_one_label(tmp_path: Path) -> None:
    """Rows read out of a tree hold each count once, with the parent's in another row."""
    rows = [
        labels("a", LATE, (4, 6, 0, 0), (8, 8, 0, 0)),
        labels("a", LATE, (0, 0, 0, 0), (0, 0, 8, 0)),
        labels("a", LATE, (0, 6, 0, 0), (0, 8, 0, 0)),
    ]
    write_rows(tmp_path / "labels", rows)
    evaluate_labels(EvaluateLabels(labels={"own": str(tmp_path / "labels")}, task=TASK), tmp_path / "out")
    found = read(tmp_path / "out")
    assert (found["own", "labels"], found["own", "first_errors"], found["own", "first_errors_exact"]) == (2, 1, 1)
    assert ("own", "calls") not in found  # nothing was paid


def test_the_toy_of_pav_as_a_stage(tmp_path: Path) -> None:
    config = EvaluatePAVToy(gammas=[10.0], best_of=[2], iterations=5, runs=2, batch=8)
    evaluate_pav_toy(config, tmp_path / "out")
    found = read(tmp_path / "out")
    assert {arm for arm, _ in found} == {"outcome", "gamma_10", "best_of_2"}
    assert found["outcome", "iterations"] == 5  # not reached: all of them
    assert 0 < found["gamma_10", "mean_success"] < 0.01


@pytest.mark.parametrize(
    ("stage", "config", "told"),
    [
        (evaluate_rewards, EvaluateRewards(models={"a": "b"}), "solutions is missing"),
        (evaluate_rewards, EvaluateRewards(solutions="x"), "models is missing"),
        (evaluate_values, EvaluateValues(models={"a": "b"}), "labels is missing"),
        (evaluate_labels, EvaluateLabels(), "labels is missing"),
        (evaluate_labels, EvaluateLabels(labels={"a": "x"}, costs={"b": []}), "costs: 'b' is not among the labels"),
    ],
)
def test_what_is_missing_is_one_sentence(stage: Any, config: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        stage(config, tmp_path)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"aggregations\[0\] must be one of last, min, prod, mean, found 'sum'"):
        build(EvaluateRewards, {"aggregations": ["sum"]})
    with pytest.raises(ValueError, match="best_of 1 or more"):
        EvaluatePAVToy(best_of=[0])
