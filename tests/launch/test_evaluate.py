"""Evaluations against values worked out by hand, on pools of a few rows and reward models that are tables."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stepladder.basics import UserError, read_json, write_json
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.data_gen.store import write_rows
from stepladder.launch.evaluate import record
from stepladder.launch.evaluate_first_errors import best_threshold, evaluate_processbench
from stepladder.launch.evaluate_policies import evaluate_policies
from stepladder.launch.evaluate_steps import evaluate_prm, label_errors, step_right
from stepladder.launch.make_report import make_report
from stepladder.launch.options_eval import EvaluatePolicies, EvaluatePRM, EvaluateProcessBench, Report
from stepladder.models.ledger import Ledger
from stepladder.models.reward import RewardModel
from stepladder.tasks.chain import ChainArith, hard_label_error_rates

SOURCE = Source("policy", "fake", "chain", 0)
# A problem mod 11 whose reference is 3 + 5 = 8, 8 * 2 = 5, 5 - 1 = 4, Answer: 4.
PROMPT = "Start 3 ; + 5 ; * 2 ; - 1 \n"


def solution(problem: str, sample: int, answer: str | None, right: bool, steps: Sequence[str] = ()) -> Solution:
    """A row whose steps, if none are given, are one line that names it: what the table of scores is asked for."""
    return Solution(
        problem_id=problem, prompt=PROMPT, gold="4", sample=sample, steps=tuple(steps) or (f"{problem} {sample}",), text="",
        answer=answer, outcome="right" if right else "wrong" if answer else "unparseable", stop="eos", token_ids=(),
        step_ends=(), logprob=0.0, source=SOURCE,
    )  # fmt: skip


class Table:
    """A reward model that looks scores up: the last step of a solution -> its step scores. Each call costs 10 tokens."""

    def __init__(self, name: str, scores: dict[str, list[float]], aggregation: str = "last") -> None:
        self.name, self.scores, self.ledger = name, scores, Ledger()
        self.step_format, self.cut_steps, self.context = SimpleNamespace(aggregation=aggregation), 0, 99
        self.asked = 0

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        self.asked += len(solutions)
        self.ledger.add_reward(1, 10 * len(solutions))
        return [self.scores[steps[-1]] for _, steps in solutions]


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, Table]:
    """Reward models by path, in place of checkpoints."""
    known: dict[str, Table] = {}
    monkeypatch.setattr(RewardModel, "load", staticmethod(lambda path, dtype="float32": known[path]))
    return known


def found(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(arm, metric) -> record, after reading the file as strict JSON."""
    text = (out / "results.json").read_text()
    records = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    keys = [(r["arm"], r["metric"]) for r in records]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, records, strict=True))


# --- policies ------------------------------------------------------------------------------------------------------------

# problem: (answer, right, orm score, prm step scores) of each sample
POOL = {
    # The majority (2 of 4) is wrong; both reward models prefer the right one; weights: 7 -> .2 + .1, 4 -> .9
    "a": [("7", False, 0.2, [0.9, 0.2]), ("7", False, 0.1, [0.9, 0.1]), ("4", True, 0.9, [0.3, 0.9]), (None, False, 0.3, [0.3])],
    # 4 and 5 tie in the vote; the ORM prefers a wrong sample, but the two right ones together weigh more
    "b": [("4", True, 0.5, [0.5]), ("5", False, 0.6, [0.6]), ("4", True, 0.4, [0.4]), ("5", False, 0.1, [0.1])],
    # nothing is right
    "c": [("1", False, 0.9, [0.9]), ("2", False, 0.8, [0.8]), (None, False, 0.95, [0.95]), (None, False, 0.1, [0.1])],
    # unreadable answers alone: no vote, but best-of-N may still take one
    "d": [(None, False, 0.5, [0.5]), (None, False, 0.5, [0.5]), ("4", True, 0.5, [0.5]), (None, False, 0.5, [0.4])],
}  # fmt: skip
ACCURACY = {
    "sample": [1 / 4, 2 / 4, 0, 1 / 4],
    "pass@4": [1, 1, 0, 1],
    "majority@4": [0, 1 / 2, 0, 1],
    "best_of_4_orm": [1, 0, 0, 1 / 4],  # d: four tie, one of them is right
    "weighted_best_of_4_orm": [1, 1, 0, 1],
    "best_of_4_prm": [1, 0, 0, 1 / 3],  # d: three tie
    "weighted_best_of_4_prm": [1, 1, 0, 1],
    "greedy": [1, 0, 0, 0],  # d has no greedy row: it did not fit, and counts as wrong
    "beam_2_prm": [1, 1, 0, 0],
    "weighted_beam_2_prm": [1, 1, 0, 0],
}


@pytest.fixture
def pool(tmp_path: Path, models: dict[str, Table]) -> Callable[..., EvaluatePolicies]:
    """Writes the pool above, and a beam of two, as rows; returns the evaluation of it."""
    rows = [solution(p, k, a, r) for p, samples in POOL.items() for k, (a, r, _, _) in enumerate(samples)]
    scores = [(f"{p} {k}", orm, prm) for p, samples in POOL.items() for k, (_, _, orm, prm) in enumerate(samples)]
    # The rows of other problems lie between those of one problem: they are matched by id and not by place.
    random.Random(0).shuffle(rows)
    cost = lambda n: Ledger(generated_tokens=n, flops=2.0 * n, seconds=1.0)
    write_rows(tmp_path / "samples", rows, ledger=cost(1000))
    greedy = [
        solution(p, 0, a, r, (f"greedy {p}",)) for p, a, r in [("a", "4", True), ("b", "5", False), ("c", "1", False)]
    ]
    write_rows(tmp_path / "greedy", greedy, ledger=cost(100))
    beam = {"a": [("4", True, 0.8), ("7", False, 0.7)], "b": [("4", True, 0.6), ("5", False, 0.2)],
            "c": [("1", False, 0.4), ("2", False, 0.3)], "d": [(None, False, 0.9), ("5", False, 0.1)]}  # fmt: skip
    write_rows(
        tmp_path / "beam",
        [solution(p, k, a, r, (f"beam {p} {k}",)) for p, two in beam.items() for k, (a, r, _) in enumerate(two)],
        ledger=cost(900),
    )
    models["orm"] = Table("orm", {name: [score] for name, score, _ in scores})
    models["prm"] = Table(
        "prm",
        {name: steps for name, _, steps in scores}
        | {f"greedy {p}": [0.5] for p in "abc"}
        | {f"beam {p} {k}": [s] for p, two in beam.items() for k, (_, _, s) in enumerate(two)},
    )

    def config(**changes: Any) -> EvaluatePolicies:
        paths = {kind: str(tmp_path / kind) for kind in ("greedy", "samples", "beam")}
        return EvaluatePolicies(**{"policies": {"base": paths}, "orm": "orm", "prm": "prm", **changes})

    return config


def test_every_arm_against_values_worked_out_by_hand(tmp_path: Path, pool: Callable[..., Any]) -> None:
    evaluate_policies(pool(), tmp_path / "out")
    records = found(tmp_path / "out")
    assert {arm.removeprefix("base/") for arm, metric in records if metric == "accuracy"} == set(ACCURACY)
    for arm, values in ACCURACY.items():
        got = records[f"base/{arm}", "accuracy"]
        assert got["value"] == pytest.approx(sum(values) / 4), arm
        assert got["n"] == 4
        low, high = got["ci"]
        assert min(values) <= low <= got["value"] <= high <= max(values)


def test_what_each_arm_cost(tmp_path: Path, pool: Callable[..., Any]) -> None:
    evaluate_policies(pool(), tmp_path / "out")
    cost = {arm.removeprefix("base/"): (r["tokens"], r["flops"]) for (arm, m), r in found(tmp_path / "out").items()}
    assert cost["greedy"] == (100, 200.0)
    assert cost["sample"] == cost["majority@4"] == cost["pass@4"] == (1000, 2000.0)
    # 16 samples of 10 tokens by a model of one parameter: 2 x 160 FLOPs more, and no token of the policy.
    assert cost["best_of_4_orm"] == cost["weighted_best_of_4_prm"] == (1000, 2320.0)
    # A beam search counts its reward model among its own cost already.
    assert cost["beam_2_prm"] == (900, 1800.0)


def test_differences_are_paired_problem_by_problem(tmp_path: Path, pool: Callable[..., Any]) -> None:
    evaluate_policies(pool(), tmp_path / "out")
    records = found(tmp_path / "out")
    assert {a for a, m in records if m == "accuracy_minus_majority"} == {
        f"base/{arm}" for arm in ACCURACY if arm not in ("greedy", "majority@4", "pass@4")
    }
    got = records["base/weighted_best_of_4_orm", "accuracy_minus_majority"]
    # Differences 1, 1/2, 0, 0: never negative, which unpaired intervals of the two arms could not tell.
    assert got["value"] == pytest.approx(1.5 / 4)
    assert got["ci"][0] >= 0
    assert got["ci"][1] <= 1


def test_differences_from_the_first_policy(tmp_path: Path, pool: Callable[..., Any]) -> None:
    base = pool().policies["base"]
    # The same rows under another name: every difference is exactly 0, with an interval of no width.
    evaluate_policies(pool(policies={"base": base, "same": base, "less": {"greedy": base["greedy"]}}), tmp_path / "out")
    records = found(tmp_path / "out")
    same = [r for (arm, m), r in records.items() if m == "accuracy_minus_base" and arm.startswith("same/")]
    assert len(same) == len(ACCURACY)
    assert all((r["value"], r["ci"]) == (0.0, [0.0, 0.0]) for r in same)
    assert {a for a, m in records if m == "accuracy_minus_base" and a.startswith("less/")} == {"less/greedy"}


def test_scores_are_kept_for_the_next_try(tmp_path: Path, pool: Callable[..., Any], models: dict[str, Table]) -> None:
    evaluate_policies(pool(), tmp_path / "out")
    first = found(tmp_path / "out")
    asked = models["prm"].asked
    assert asked == 16 + 3 + 8
    evaluate_policies(pool(), tmp_path / "out")
    assert models["prm"].asked == asked
    assert found(tmp_path / "out") == first
    # Another model under the same name of arm is not answered with the old one's scores.
    models["other"] = Table("other", {name: [1 - s for s in steps] for name, steps in models["prm"].scores.items()})
    evaluate_policies(pool(prm="other"), tmp_path / "out")
    assert models["other"].asked == 27
    assert found(tmp_path / "out")["base/best_of_4_prm", "accuracy"] != first["base/best_of_4_prm", "accuracy"]


def test_scores_of_a_model_that_was_trained_again_are_not_kept(
    tmp_path: Path, pool: Callable[..., Any], models: dict[str, Table]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    models[str(folder)] = models["prm"]
    models["prm"].name = str(folder)
    for weights in (b"one", b"one", b"two"):
        (folder / "model.safetensors").write_bytes(weights)
        evaluate_policies(pool(prm=str(folder)), tmp_path / "out")
    assert models["prm"].asked == 2 * 27


def test_arms_are_those_that_the_rows_and_models_allow(tmp_path: Path, pool: Callable[..., Any]) -> None:
    base = pool().policies["base"]
    evaluate_policies(
        pool(policies={"p": {"samples": base["samples"]}}, orm="", prm=""), tmp_path / "votes"
    )  # fmt: skip
    assert {a for a, _ in found(tmp_path / "votes")} == {"p/sample", "p/pass@4", "p/majority@4"}
    evaluate_policies(pool(policies={"p": {"greedy": base["greedy"]}}, orm="", prm=""), tmp_path / "greedy-only")
    assert set(found(tmp_path / "greedy-only")) == {("p/greedy", "accuracy")}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"policies": {}}, "policies is missing"),
        ({"policies": {"p": {"sampels": "x"}}}, "p: expected greedy, samples or beam, found 'sampels'"),
        ({"policies": {"p": {"samples": "nowhere"}}}, "nowhere: no such file"),
        ({"prm": ""}, "rows of a beam search need prm"),
    ],
)
def test_what_cannot_be_compared_is_told(
    tmp_path: Path, pool: Callable[..., Any], changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        evaluate_policies(pool(**changes), tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_solutions_of_the_report_are_those_that_arms_chose(tmp_path: Path, pool: Callable[..., Any]) -> None:
    evaluate_policies(pool(shown=2), tmp_path / "out")
    shown = read_json(tmp_path / "out" / "details.json")["solutions"]
    assert {s["problem_id"] for s in shown} == {"a", "b"}
    by_arm = {(s["problem_id"], arm): s for s in shown for arm in s["selected_by"]}
    assert by_arm["a", "best_of_4_orm"] is by_arm["a", "best_of_4_prm"]
    assert by_arm["a", "best_of_4_orm"]["steps"] == ["a 2"]
    assert by_arm["a", "best_of_4_orm"]["scores"] == [0.3, 0.9]
    assert by_arm["a", "majority@4"]["answer"] == "7"
    assert by_arm["b", "best_of_4_orm"]["steps"] == ["b 1"]
    assert by_arm["b", "beam_2_prm"]["steps"] == ["beam b 0"]
    assert by_arm["b", "greedy"]["outcome"] == "wrong"


# --- process reward models -----------------------------------------------------------------------------------------------

# Right; wrong from its second line on (an error that is carried on is on no line but the first wrong); an error that a
# second error makes good, so that the last two lines are on the track again.
STEPS = {
    "right": ["3 + 5 = 8", "8 * 2 = 5", "5 - 1 = 4", "Answer: 4"],
    "wrong": ["3 + 5 = 8", "8 * 2 = 6", "6 - 1 = 5", "Answer: 5"],
    "mended": ["3 + 5 = 7", "7 * 2 = 5", "5 - 1 = 4", "Answer: 4 "],
}
RIGHT = {"right": [1, 1, 1, 1], "wrong": [1, 0, 0, 0], "mended": [0, 0, 1, 1]}


def test_a_step_is_right_if_it_holds_and_is_on_the_track() -> None:
    from stepladder.tasks.base import Problem, first_error

    for name, steps in STEPS.items():
        checks = ChainArith(p=11).check_steps(Problem(name, PROMPT, "4"), steps)
        assert [int(step_right(c)) for c in checks] == RIGHT[name]
        assert first_error(checks) == (RIGHT[name].index(0) if 0 in RIGHT[name] else None)


def rows_with_steps(folder: Path, names: Sequence[str]) -> str:
    rows = [
        solution("q", k, steps[-1][8:], steps[-1] == "Answer: 4", steps)
        for k, steps in enumerate(map(STEPS.get, names))
    ]
    write_rows(folder, rows)
    return str(folder)


def test_step_scores_against_the_checker(tmp_path: Path, models: dict[str, Table]) -> None:
    models["prm"] = Table(
        "prm",
        {"Answer: 4": [0.9, 0.8, 0.7, 0.95], "Answer: 5": [0.6, 0.62, 0.3, 0.1], "Answer: 4 ": [0.2, 0.55, 0.6, 0.75]},
    )
    rows = rows_with_steps(tmp_path / "rows", ["right", "wrong", "mended"])
    config = EvaluatePRM(prm="prm", solutions=rows, task={"kind": "chain", "p": 11})
    evaluate_prm(config, tmp_path / "out")
    records = found(tmp_path / "out")
    scores, truth = [0.9, 0.8, 0.7, 0.95, 0.6, 0.62, 0.2], [1, 1, 1, 1, 1, 0, 0]  # up to the first error of each
    pairs = [
        (s, t) for s, a in zip(scores, truth, strict=True) if a for t, b in zip(scores, truth, strict=True) if not b
    ]
    auroc = sum((s > t) + (s == t) / 2 for s, t in pairs) / len(pairs)
    assert records["prm", "step_auroc"]["value"] == pytest.approx(auroc)
    assert auroc < 1
    # First score under 0.5: none, 2 and 0; the second is one too late, so that one of two errors is found.
    assert records["prm", "first_error_f1"]["value"] == pytest.approx(2 * 0.5 * 1 / (0.5 + 1))
    # Last scores .95 and .75 of right answers against .1: every pair in order.
    assert records["prm", "within_question_auroc"]["value"] == 1.0
    # Ten bins: one score each but [.6, .7) with .6 and .62, which is wrong, and [.9, 1] with .9 and .95.
    gaps = [.2 - 0, .6 + .62 - 1, 1 - .7, 1 - .8, (1 - .9) + (1 - .95)]  # fmt: skip
    assert records["prm", "step_ece"]["value"] == pytest.approx(sum(gaps) / 7)
    details = read_json(tmp_path / "out" / "details.json")["calibration"]
    assert details == {"scores": scores, "right": [bool(t) for t in truth]}


def test_what_is_undefined_is_null_and_no_nan(tmp_path: Path, models: dict[str, Table]) -> None:
    models["prm"] = Table("prm", {"Answer: 4": [0.9, 0.8, 0.7, 0.95]})
    config = EvaluatePRM(
        prm="prm", solutions=rows_with_steps(tmp_path / "rows", ["right"]), task={"kind": "chain", "p": 11}
    )
    evaluate_prm(config, tmp_path / "out")
    records = found(tmp_path / "out")
    assert (records["prm", "step_auroc"]["value"], records["prm", "step_auroc"]["ci"]) == (None, None)
    assert records["prm", "first_error_f1"]["value"] == 0.0
    assert ("prm", "within_question_auroc") not in records


def test_label_error_rates_beside_their_closed_form() -> None:
    task = ChainArith(p=11)

    def labels(name: str, correct: Sequence[int], rollouts: Sequence[int]) -> StepLabels:
        counts = tuple(correct), tuple(rollouts)
        return StepLabels("q", PROMPT, "4", 0, tuple(STEPS[name]), *counts, "monte_carlo", "", None, True, SOURCE)

    solutions = [solution("q", k, None, False, STEPS[n]) for k, n in enumerate(["right", "wrong", "mended"])]
    # Operations that do not follow: one in `wrong`, two in `mended`, of nine.
    rows = [
        labels("right", (5, 4, 0, 8, 1), (8, 8, 8, 8, 1)),  # steps on the track: labels 1, 0, 1
        labels("wrong", (5, 3, 2, 0, 0), (8, 8, 8, 4, 1)),  # on: 1; off: 1, 0
        labels("mended", (5, 0, 3, 0, 1), (8, 8, 8, 0, 1)),  # off: 0; on: 1; the third was never continued
    ]
    records = {(r["arm"], r["metric"]): r for r in label_errors(task, rows, solutions, seed=0)}
    assert records["policy", "step_error_rate"]["value"] == pytest.approx(3 / 9)
    assert records["policy", "step_error_rate"]["n"] == 9
    # A line that is on the track again after two errors counts as on the track: right endings are to be expected from it.
    assert records["labels", "label_false_negative"]["value"] == pytest.approx(1 / 5)
    assert records["labels", "label_false_negative"]["n"] == 5
    assert records["labels", "label_false_positive"]["value"] == pytest.approx(1 / 3)
    rate = lambda left, rollouts: hard_label_error_rates(11, 3 / 9, left, rollouts)
    negative = [rate(2, 8)[1], rate(1, 8)[1], rate(0, 8)[1], rate(2, 8)[1], rate(1, 8)[1]]
    positive = [rate(1, 8)[0], rate(0, 4)[0], rate(2, 8)[0]]
    assert records["labels", "label_false_negative_closed_form"]["value"] == pytest.approx(sum(negative) / 5)
    assert records["labels", "label_false_positive_closed_form"]["value"] == pytest.approx(sum(positive) / 3)


def test_a_task_without_a_checker_is_told(tmp_path: Path) -> None:
    config = EvaluatePRM(prm="prm", solutions="rows", task={"kind": "gsm8k"})
    with pytest.raises(UserError, match="no exact step checker"):
        evaluate_prm(config, tmp_path / "out")


# --- ProcessBench --------------------------------------------------------------------------------------------------------

# name of the last step: step scores, label
BENCH = {
    "easy": {
        "e1": ([0.9, 0.9], -1),  # sound, found
        "e2": ([0.9, 0.4], -1),  # sound, accused
        "e3": ([0.9, 0.2, 0.9], 1),  # found
        "e4": ([0.3, 0.2], 1),  # accused one step early
        "e5": ([0.9, 0.8], 0),  # missed
    },
    "hard": {"h1": ([0.55], -1), "h2": ([0.9, 0.52], 1)},
}


def bench(folder: Path, models: dict[str, Table]) -> dict[str, str]:
    models["prm"] = Table("prm", {name: scores for cases in BENCH.values() for name, (scores, _) in cases.items()})
    files = {}
    for subset, cases in BENCH.items():
        files[subset] = str(folder / f"{subset}.json")
        write_json(
            files[subset],
            [
                {"id": name, "problem": "?", "steps": ["x"] * (len(scores) - 1) + [name], "label": label}
                for name, (scores, label) in cases.items()
            ],
        )
    return files


def test_processbench_f1_by_hand(tmp_path: Path, models: dict[str, Table]) -> None:
    files = bench(tmp_path, models)
    evaluate_processbench(EvaluateProcessBench(prm="prm", files=files), tmp_path / "out")
    records = found(tmp_path / "out")
    value = lambda subset, metric: records[f"processbench/{subset}", metric]["value"]
    assert value("easy", "accuracy_correct") == pytest.approx(1 / 2)
    assert value("easy", "accuracy_error") == pytest.approx(1 / 3)
    assert value("easy", "f1") == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert (value("hard", "accuracy_correct"), value("hard", "accuracy_error"), value("hard", "f1")) == (1.0, 0.0, 0.0)
    assert value("mean", "f1") == pytest.approx(0.4 / 2)
    assert records["processbench", "threshold"]["value"] == 0.5
    # Steps up to the first wrong one: .55 and .9 are right, .52 is wrong.
    assert value("hard", "step_auroc") == 1.0


def test_a_threshold_is_tuned_on_one_subset_and_used_on_all(tmp_path: Path, models: dict[str, Table]) -> None:
    files = bench(tmp_path, models)
    evaluate_processbench(
        EvaluateProcessBench(prm="prm", files=files, threshold=None, tune_on="hard"), tmp_path / "out"
    )
    records = found(tmp_path / "out")
    # Under .55 both cases of `hard` come out right: only .52 is accused.
    assert records["processbench", "threshold"]["value"] == 0.55
    assert records["processbench/hard", "f1"]["value"] == 1.0
    assert records["processbench/easy", "f1"]["value"] == pytest.approx(0.4)
    with pytest.raises(UserError, match="tune_on must be one of easy, hard, found 'gsm8k'"):
        evaluate_processbench(EvaluateProcessBench(prm="prm", files=files, threshold=None), tmp_path / "two")


def test_the_best_threshold_is_the_smallest_of_those_that_tie() -> None:
    # Any threshold in (.2, .6] separates the two; of the scores themselves that is .6 alone, and .9 accuses the sound one.
    assert best_threshold([[0.6, 0.9], [0.9, 0.2]], [-1, 1]) == 0.6
    assert best_threshold([[0.4], [0.3]], [-1, -1]) == 0.3  # F1 is 0 whatever the threshold: no flawed case


def test_processbench_scores_are_kept_for_the_next_try(tmp_path: Path, models: dict[str, Table]) -> None:
    files = bench(tmp_path, models)
    config = EvaluateProcessBench(prm="prm", files=files)
    evaluate_processbench(config, tmp_path / "out")
    first, asked = found(tmp_path / "out"), models["prm"].asked
    evaluate_processbench(config, tmp_path / "out")
    assert (models["prm"].asked, found(tmp_path / "out")) == (asked, first)
    models["prm"].scores["e5"] = [0.1, 0.8]
    records = read_json(files["easy"])
    write_json(files["easy"], [*records[:4], {**records[4], "problem": "changed"}])
    evaluate_processbench(config, tmp_path / "out")
    assert found(tmp_path / "out")["processbench/easy", "accuracy_error"]["value"] == pytest.approx(2 / 3)


# --- records and the report ----------------------------------------------------------------------------------------------


def test_a_record_writes_no_nan() -> None:
    nan = float("nan")
    assert record("a", "m", nan, 3, 1)["value"] is None
    assert record("a", "m", (nan, nan, nan), 3, 1)["ci"] is None
    assert record("a", "m", (0.5, 0.25, 0.75), 3, 1, Ledger(generated_tokens=4, flops=8.0, seconds=0.12345)) == {
        "arm": "a", "metric": "m", "value": 0.5, "ci": [0.25, 0.75], "n": 3, "tokens": 4, "flops": 8.0, "seconds": 0.123, "seed": 1,
    }  # fmt: skip


def test_the_report_joins_evaluations(tmp_path: Path, pool: Callable[..., Any], capsys: Any) -> None:
    evaluate_policies(pool(), tmp_path / "run" / "answers")
    files = {"easy": str(tmp_path / "easy.json")}
    write_json(files["easy"], [{"problem": "?", "steps": ["a 2"], "label": -1}])
    evaluate_processbench(EvaluateProcessBench(prm="prm", files=files), tmp_path / "run" / "bench")
    folders = [str(tmp_path / "run" / name) for name in ("answers", "bench")]
    make_report(Report(results=folders, title="Joined"), tmp_path / "run" / "report")
    joined = read_json(tmp_path / "run" / "results.json")
    assert joined == [r for folder in folders for r in read_json(Path(folder) / "results.json")]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<title>Joined</title>" in page
    assert "best_of_4_prm" in page
    said = capsys.readouterr().out
    assert "majority@4" in said
    assert str(tmp_path / "run" / "report.html") in said
    with pytest.raises(UserError, match="results is missing"):
        make_report(Report(), tmp_path / "run" / "report")
