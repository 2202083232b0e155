"""Judging published data and pools of samples: against values worked out by hand, with judges that are tables."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stepladder.basics import UserError, read_json, write_json
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.data_gen.store import read_rows, write_rows
from stepladder.launch import evaluate_first_errors as judging
from stepladder.launch.claims import Comparison, compare
from stepladder.launch.cli import main
from stepladder.launch.evaluate_best_of_n import draw_sizes, evaluate_best_of_n
from stepladder.launch.evaluate_first_errors import (
    evaluate_first_errors,
    evaluate_prmbench,
    evaluate_processbench,
    process_records,
)
from stepladder.launch.evaluate_steps import evaluate_prm, exact_values
from stepladder.launch.options_eval import (
    EvaluateBestOfN,
    EvaluateFirstErrors,
    EvaluatePRM,
    EvaluatePRMBench,
    EvaluateProcessBench,
)
from stepladder.models.critic import Critic
from stepladder.models.ledger import Ledger
from stepladder.models.reward import RewardModel
from stepladder.search.choose import best_credit, vote_credit

SOURCE = Source("policy", "fake", "chain", 0)


class Table:
    """A reward model that looks scores up by the last step of a solution."""

    def __init__(self, scores: dict[str, list[float]]) -> None:
        self.scores, self.name, self.ledger, self.asked = scores, "table", Ledger(), 0
        self.step_format, self.cut_steps, self.context = SimpleNamespace(aggregation="last"), 0, 99

    def score(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        self.asked += len(solutions)
        return [self.scores[steps[-1]] for _, steps in solutions]

    def score_with_root(self, solutions: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
        return [[0.5, *own] for own in self.score(solutions)]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[float]]], Table]:
    """Puts a table of scores in place of every reward model."""

    def put(scores: dict[str, list[float]]) -> Table:
        made = Table(scores)
        monkeypatch.setattr(RewardModel, "load", staticmethod(lambda path, dtype="float32": made))
        return made

    return put


@pytest.fixture
def critic(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimpleNamespace]:
    """Puts a critic in place of every judge, whose answer a function of the prompt and the number of the sample writes."""

    def put(answer: Callable[[str, int], str], samples: int = 1) -> SimpleNamespace:
        writer = SimpleNamespace(ledger=Ledger(), prompts=0)

        def write(prompts: Sequence[str], seeds: Sequence[Sequence[int]]) -> list[list[str]]:
            writer.prompts += len(prompts)
            return [[answer(p, k) for k in range(len(own))] for p, own in zip(prompts, seeds, strict=True)]

        writer.write = write
        monkeypatch.setattr(judging, "judge_of", lambda config: Critic(writer, name="c", samples=samples))
        return writer

    return put


def found(out: Path) -> dict[tuple[str, str], Any]:
    """(arm, metric) -> value, after reading the file as strict JSON."""
    records = json.loads((out / "results.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert len({(r["arm"], r["metric"]) for r in records}) == len(records)
    return {(r["arm"], r["metric"]): r["value"] for r in records}


def values(out: Path) -> dict[tuple[str, str], dict[str, float]]:
    return {(v["arm"], v["metric"]): v["values"] for v in read_json(out / "values.json")}


def case(name: str, label: int, right: bool, steps: int = 3) -> dict[str, Any]:
    """A ProcessBench record whose last step is its name."""
    return {
        "id": name,
        "problem": "q",
        "steps": [*["s"] * (steps - 1), name],
        "label": label,
        "final_answer_correct": right,
    }


# label, whether the answer is right, scores -> verdict at 0.5
CASES = {
    "a": (-1, True, [0.9, 0.8, 0.7]),  # none: right
    "b": (-1, True, [0.9, 0.4, 0.9]),  # 1: a false alarm
    "c": (1, True, [0.9, 0.2, 0.9]),  # 1: found, in spite of the right answer
    "d": (2, True, [0.9, 0.8, 0.6]),  # none: missed; its last step alone is the lowest
    "e": (0, False, [0.6, 0.3, 0.2]),  # 1: named at the wrong place; the last is the lowest
}


def records() -> list[dict[str, Any]]:
    return [case(name, label, right) for name, (label, right, _) in CASES.items()]


def test_first_errors_of_a_reward_model_by_hand(tmp_path: Path, table: Callable[..., Table]) -> None:
    table({name: scores for name, (_, _, scores) in CASES.items()})
    write_json(tmp_path / "x.json", records())
    config = EvaluateFirstErrors(model="m", files={"x": str(tmp_path / "x.json")}, format="processbench")
    evaluate_first_errors(config, tmp_path / "out")
    got = found(tmp_path / "out")
    of = lambda metric: got["first_error/x", metric]
    assert (of("accuracy_correct"), of("accuracy_error")) == (1 / 2, pytest.approx(1 / 3))
    assert of("f1") == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    # "No wrong step" said of a and d, true of a and b: TP 1, FP 1, FN 1, TN 2.
    mcc = (1 * 2 - 1 * 1) / np.sqrt(2 * 2 * 3 * 3)
    assert of("mcc") == pytest.approx(mcc)
    assert of("mr_score_without_reasons") == pytest.approx(0.2 * mcc + 0.3 / 3)
    # Right answers with a wrong step: c is found at its place, d not at all.
    assert (of("flawed_right_detected"), of("flawed_right_located")) == (0.5, 0.5)
    assert of("lowest_is_last") == pytest.approx(3 / 5)  # a, d and e
    # Steps up to the first wrong one: right 9 (a 3, b 3, c 1, d 2), wrong .2, .6, .6.
    right, wrong = [0.9, 0.8, 0.7, 0.9, 0.4, 0.9, 0.9, 0.9, 0.8], [0.2, 0.6, 0.6]
    pairs = [(r > w) + (r == w) / 2 for r in right for w in wrong]
    assert of("step_auroc") == pytest.approx(sum(pairs) / len(pairs))
    # Bins: .9 five times and right; .8 twice, .7 and .4, right; .2 and .6 twice, wrong.
    gaps = [5 * 0.1, 2 * 0.2, 0.3, 0.6, 0.2, 2 * 0.6]
    assert of("step_ece") == pytest.approx(sum(gaps) / 12)
    assert got["first_error", "threshold"] == 0.5
    kept = values(tmp_path / "out")
    assert kept["first_error/x", "accuracy_error"] == {"c": 1.0, "d": 0.0, "e": 0.0}
    assert kept["first_error/x", "accuracy_correct"] == {"a": 1.0, "b": 0.0}


def test_what_tells_a_process_from_an_outcome_is_left_out_where_it_is_not_defined() -> None:
    made = process_records("m", [[0.5]], [0], [0], [None], 0)
    assert made == []  # no answer is known to be right, and a single step is always the last
    (one,) = process_records("m", [[0.5, 0.4]], [None], [0], [False], 0)
    assert (one["metric"], one["value"]) == ("lowest_is_last", 1.0)
    detected = process_records("m", [[0.5]] * 3, [0, None, -1], [1, 1, 1], [True] * 3, 0)[0]
    assert detected["value"] == pytest.approx(1 / 3)  # a verdict that cannot be read detects nothing


def test_rows_and_formats_are_read_alike(tmp_path: Path, table: Callable[..., Table], capsys: Any) -> None:
    table({name: scores for name, (_, _, scores) in CASES.items()})
    write_json(tmp_path / "x.json", records())
    main(
        [
            "data",
            "import",
            "--format",
            "processbench",
            "--file",
            str(tmp_path / "x.json"),
            "--out",
            str(tmp_path / "rows"),
        ]
    )
    rows = read_rows(tmp_path / "rows", StepLabels)
    unknown = dataclasses.replace(rows[0], problem_id="z", first_error_known=False)
    write_rows(tmp_path / "more", [*rows, unknown])
    results = {}
    for name, form in (("x.json", "processbench"), ("rows", "rows"), ("more", "rows")):
        config = EvaluateFirstErrors(model="m", files={"x": str(tmp_path / name)}, format=form)
        evaluate_first_errors(config, tmp_path / f"out-{name}")
        results[name] = found(tmp_path / f"out-{name}")
    assert results["x.json"] == results["rows"] == results["more"]
    assert "left out 1 rows whose first error is not known" in capsys.readouterr().out
    write_rows(tmp_path / "none", [unknown])
    with pytest.raises(UserError, match="no row says which step is the first wrong one"):
        evaluate_first_errors(EvaluateFirstErrors(model="m", files={"x": str(tmp_path / "none")}), tmp_path / "out")


def test_a_critic_is_judged_by_its_votes_and_asked_once(
    tmp_path: Path, critic: Callable[..., Any], capsys: Any
) -> None:
    said = {"a": [-1, -1, 1], "b": ["?", "?", -1], "c": [1, 0, 1], "d": ["?", "?", "?"], "e": [2, 2, 0]}

    def answer(prompt: str, sample: int) -> str:
        name = prompt.split("<paragraph_2>\n")[1][0]
        return f"\\boxed{{{said[name][sample]}}}"

    writer = critic(answer, samples=3)
    write_json(tmp_path / "x.json", records())
    files = {"x": str(tmp_path / "x.json")}
    config = EvaluateProcessBench(kind="critic", model="c", samples=3, temperature=1.0, files=files, threshold=None)
    evaluate_processbench(config, tmp_path / "out")
    got = found(tmp_path / "out")
    # Right of a, b and c; d cannot be read and e is named at the wrong place.
    assert got["processbench/x", "accuracy_correct"] == 1.0
    assert got["processbench/x", "accuracy_error"] == pytest.approx(1 / 3)
    assert got["processbench/x", "unparseable"] == pytest.approx(1 / 5)
    assert ("processbench", "threshold") not in got  # votes need none, and none is tuned
    assert "x: 5 of 15 critiques name no step" in capsys.readouterr().out
    assert writer.prompts == 5
    evaluate_processbench(config, tmp_path / "out")
    assert writer.prompts == 5
    # A kill after the first two: the rest is asked for.
    kept = read_json(tmp_path / "out" / "votes-x.json")
    write_json(tmp_path / "out" / "votes-x.json", {**kept, "votes": kept["votes"][:2]})
    evaluate_processbench(config, tmp_path / "out")
    assert (writer.prompts, found(tmp_path / "out")) == (8, got)
    # "No wrong step": said of a and b, not of c and e; d, which cannot be read, counts as what it is not: TP 2, FP 1, TN 2.
    general = EvaluateFirstErrors(
        kind="critic", model="c", samples=3, temperature=1.0, files=files, format="processbench"
    )
    evaluate_first_errors(general, tmp_path / "general")
    assert found(tmp_path / "general")["first_error/x", "mcc"] == pytest.approx(4 / 6)
    assert writer.prompts == 13
    # Other settings are other verdicts.
    evaluate_processbench(dataclasses.replace(config, temperature=0.7), tmp_path / "out")
    assert writer.prompts == 18


def test_a_critic_runs_from_the_command_line(tmp_path: Path, capsys: Any) -> None:
    """With the lab policy for a critic, which knows no word of the question: every verdict is unreadable, and counts as wrong."""
    import stepladder

    lab = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
    write_json(tmp_path / "x.json", records()[:2])
    main(
        ["eval", "processbench", "--kind", "critic", "--model", lab, "--max_new_tokens", "4", "--samples", "2",
         "--files", json.dumps({"x": str(tmp_path / "x.json")}), "--out", str(tmp_path / "out")]
    )  # fmt: skip
    got = found(tmp_path / "out")
    assert (got["processbench/x", "unparseable"], got["processbench/mean", "f1"]) == (1.0, 0.0)
    assert "x: 4 of 4 critiques name no step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["--kind", "oracle"], "kind must be one of prm, critic, served_prm, served_critic, found 'oracle'"),
        (["--kind", "served_critic"], "kind served_critic needs base_url"),
        (["--samples", "0"], "samples must be 1 or more"),
        (["--files", "{}"], "files is missing"),
        (["--prm", '""'], "model is missing: the judge's folder"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, refused: Callable[..., str], changes: list[str], told: str) -> None:
    files = ["--files", json.dumps({"x": "nowhere.json"})]
    given = dict(zip(*[iter(["--prm", "m", *files, *changes])] * 2, strict=True))
    flat = [part for pair in given.items() for part in pair]
    assert told in refused("eval", "processbench", *flat, "--out", tmp_path / "out")


def test_prmbench_by_hand(tmp_path: Path, table: Callable[..., Table], capsys: Any) -> None:
    planted = lambda idx, kind, wrong: {
        "original_question": "q", "modified_question": "q", "original_process": ["s", f"right {idx}"],
        "modified_process": ["s", "s", f"{kind} {idx}"], "error_steps": wrong, "idx": str(idx), "classification": kind,
    }  # fmt: skip
    write_json(
        tmp_path / "p.json",
        [planted(0, "redundency", [2]), planted(1, "redundency", [1, 3]), planted(0, "circular", [3]),
         planted(1, "circular", [7])],
    )  # fmt: skip
    table({
        "right 0": [0.9, 0.9], "right 1": [0.9, 0.1], "redundency 0": [0.9, 0.2, 0.9], "redundency 1": [0.1, 0.9, 0.9],
        "circular 0": [0.9, 0.4, 0.5],
    })  # fmt: skip
    evaluate_prmbench(EvaluatePRMBench(model="m", file=str(tmp_path / "p.json")), tmp_path / "out")
    got = found(tmp_path / "out")
    assert got["prmbench/correct", "step_accuracy"] == pytest.approx((1 + 1 / 2) / 2)
    # redundency: right steps 1 0 1 | 0 1 0, said 1 0 1 | 0 1 1: TP 3, FP 1, FN 0; of the wrong TP 2, FP 0, FN 1.
    assert got["prmbench/redundency", "f1"] == pytest.approx(6 / 7)
    assert got["prmbench/redundency", "negative_f1"] == pytest.approx(4 / 5)
    assert got["prmbench/redundency", "prm_score"] == pytest.approx((6 / 7 + 4 / 5) / 2)
    # circular: right 1 1 0, said 1 0 1 (0.5 is not under the threshold).
    assert got["prmbench/circular", "f1"] == pytest.approx(2 / 4)
    assert got["prmbench/circular", "negative_f1"] == 0.0
    # All: TP 4, FP 2, FN 1; of the wrong TP 2, FP 1, FN 2. The unchanged solutions are not among them.
    assert got["prmbench/all", "f1"] == pytest.approx(8 / 11)
    assert got["prmbench/all", "negative_f1"] == pytest.approx(4 / 7)
    assert "left out 1 with a wrong step behind the last" in capsys.readouterr().out
    with pytest.raises(UserError, match="a critic names one"):
        evaluate_prmbench(EvaluatePRMBench(kind="critic", model="m", file="x"), tmp_path / "two")


# --- curves --------------------------------------------------------------------------------------------------------------

# answer, right, step scores
POOL: dict[str, list[tuple[str | None, bool, list[float]]]] = {
    "p": [("4", True, [0.9, 0.3]), ("5", False, [0.2, 0.8]), ("5", False, [0.4, 0.4]), (None, False, [0.1, 0.9])],
    "q": [("1", True, [0.5, 0.5]), ("1", True, [0.6, 0.1]), ("2", False, [0.9, 0.9]), ("2", False, [0.3, 0.2])],
}


def pool(folder: Path) -> tuple[str, str]:
    """Folder of the rows above, and a file of their scores."""
    rows = [
        Solution(q, "q", "4", k, (f"{q} {k}",), "", answer, "right" if right else "wrong", "eos", (), (), 0.0, SOURCE)
        for q, samples in POOL.items()
        for k, (answer, right, _) in enumerate(samples)
    ]
    write_rows(folder / "rows", rows, ledger=Ledger(generated_tokens=800, flops=80.0))
    write_json(folder / "scores.json", [scores for samples in POOL.values() for *_, scores in samples])
    return str(folder / "rows"), str(folder / "scores.json")


def test_curves_are_the_means_over_all_draws(tmp_path: Path) -> None:
    rows, scores = pool(tmp_path)
    evaluate_best_of_n(EvaluateBestOfN(samples=rows, scores={"m": scores}, subsets=4000), tmp_path / "out")
    got = found(tmp_path / "out")
    how = {"last": lambda s: s[-1], "min": min, "prod": np.prod, "mean": np.mean}
    answers, right = lambda d: [a for a, _, _ in d], lambda d: [r for _, r, _ in d]
    totals = lambda d, one: [float(one(s)) for *_, s in d]
    for k in (1, 2, 4):
        draws = {
            q: [[samples[i] for i in s] for s in itertools.combinations(range(4), k)] for q, samples in POOL.items()
        }
        mean = lambda value, draws=draws: np.mean([np.mean([value(d) for d in own]) for own in draws.values()])
        majority = mean(lambda d: vote_credit(answers(d), right(d)))
        passed = mean(lambda d: float(any(right(d))))
        assert got["pool/majority", f"accuracy@{k}"] == pytest.approx(majority)
        assert got["pool/pass", f"accuracy@{k}"] == pytest.approx(passed)
        for name, one in how.items():
            best = mean(lambda d, one=one: best_credit(totals(d, one), right(d)))
            vote = mean(lambda d, one=one: vote_credit(answers(d), right(d), totals(d, one)))
            assert got[f"pool/best_m_{name}", f"accuracy@{k}"] == pytest.approx(best)
            assert got[f"pool/best_m_{name}", f"minus_majority@{k}"] == pytest.approx(best - majority)
            assert got[f"pool/best_m_{name}", f"oracle_gap@{k}"] == pytest.approx(passed - best)
            assert got[f"pool/weighted_m_{name}", f"accuracy@{k}"] == pytest.approx(vote, abs=0.02 if k == 2 else 1e-9)
    # p: .3 right, .8, .4 and .9 wrong; q: .5 and .1 right, .9 and .2 wrong.
    assert got["pool/m_last", "within_question_auroc"] == pytest.approx((0 / 3 + 1 / 4) / 2)
    tokens = {(r["arm"], r["metric"]): r["tokens"] for r in read_json(tmp_path / "out" / "results.json")}
    assert [tokens["pool/majority", f"accuracy@{k}"] for k in (1, 2, 4)] == [200, 400, 800]
    assert values(tmp_path / "out")["pool/pass", "accuracy@1"] == {"p": 0.25, "q": 0.5}


def test_curves_of_a_model_keep_its_scores_and_serve_a_claim(tmp_path: Path, table: Callable[..., Table]) -> None:
    rows, _ = pool(tmp_path)
    model = table({f"{q} {k}": s for q, samples in POOL.items() for k, (*_, s) in enumerate(samples)})
    config = EvaluateBestOfN(samples=rows, models={"m": "m"}, ks=[4], aggregations=["min"])
    evaluate_best_of_n(config, tmp_path / "run" / "curves")
    evaluate_best_of_n(config, tmp_path / "run" / "curves")
    assert model.asked == 8
    one = Comparison("min over majority", "curves/pool/best_m_min", "curves/pool/majority", metric="accuracy@4")
    # p: .4 and wrong, against 5 5 4; q: .9 and wrong, against a tie.
    measured = compare(one, [tmp_path / "run"])
    assert measured["effect"] == pytest.approx((0 - 0 + 0 - 0.5) / 2)
    assert measured["ci"] == [-0.5, 0.0]  # bootstrapped over the two problems


def test_a_pool_is_ranked_by_any_judge(
    tmp_path: Path, critic: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stepladder.launch import evaluate_best_of_n as curves

    rows, _ = pool(tmp_path)
    writer = critic(lambda prompt, _: "\\boxed{-1}" if "q 0" in prompt or "p 0" in prompt else "\\boxed{0}")
    monkeypatch.setattr(curves, "judge_of", judging.judge_of)
    config = EvaluateBestOfN(samples=rows, models={"c": {"kind": "critic", "model": "x"}}, ks=[4], aggregations=["min"])
    evaluate_best_of_n(config, tmp_path / "out")
    evaluate_best_of_n(config, tmp_path / "out")
    assert writer.prompts == 8
    assert found(tmp_path / "out")["pool/best_c_min", "accuracy@4"] == 1.0
    for told, message in (
        ({"kind": "oracle"}, "models.c: kind must be one of"),
        (3, "models.c must be a folder or keys"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_best_of_n(dataclasses.replace(config, models={"c": told}), tmp_path / "two")


def test_sizes_of_draws() -> None:
    assert draw_sizes([], [16, 20]) == [1, 2, 4, 8, 16]
    assert draw_sizes([], [6]) == [1, 2, 4, 6]
    assert draw_sizes([3, 1, 3], [6]) == [1, 3]
    with pytest.raises(UserError, match=r"ks must lie between 1 and 6, .* found 7"):
        draw_sizes([7], [6, 9])


def test_scores_that_are_not_those_of_the_rows_are_told(tmp_path: Path) -> None:
    rows, _ = pool(tmp_path)
    bad = {"short": [[1.0]], "kind": {"a": 1}, "entry": [[1.0]] * 7 + [["x"]]}
    told = {
        "short": "for each of 8 rows, found 1",
        "kind": "found dict",
        "entry": "entry 8: expected a list of numbers",
    }
    for name, value in bad.items():
        write_json(tmp_path / f"{name}.json", value)
        with pytest.raises(UserError, match=told[name]):
            evaluate_best_of_n(
                EvaluateBestOfN(samples=rows, scores={"m": str(tmp_path / f"{name}.json")}), tmp_path / "out"
            )


def test_scores_that_data_bring_are_ranked_by(tmp_path: Path) -> None:
    """MATH best-of-8 from the command line: import, then curves from the scores beside the rows."""
    record = {
        "question": "q",
        "gt": "1",
        "code": ["\\boxed{1}", "\\boxed{2}"],
        "pred": ["1", "2"],
        "score": [True, False],
    }
    lines = [{**record, "idx": i, "pred_score": [[2.0 if i else -2.0], [0.0]]} for i in range(4)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    out = tmp_path / "rows"
    main(["data", "import", "--format", "math_best_of_8", "--file", str(tmp_path / "b.jsonl"), "--out", str(out)])
    main(["eval", "best_of_n", "--samples", str(out), "--scores", json.dumps({"rm": str(out / "scores.json")}),
          "--aggregations", '["last"]', "--out", str(tmp_path / "out")])  # fmt: skip
    got = found(tmp_path / "out")
    assert (got["pool/best_rm_last", "accuracy@2"], got["pool/best_rm_last", "accuracy@1"]) == (0.75, 0.5)


# --- reward models of the lab --------------------------------------------------------------------------------------------

PROMPT = "Start 3 ; + 5 ; * 2 ; - 1 \n"  # mod 7: 3 + 5 = 1, 1 * 2 = 2, 2 - 1 = 1
SOUND = ("3 + 5 = 1", "1 * 2 = 2", "2 - 1 = 1", "Answer: 1")
FLAWED = ("3 + 5 = 3", "3 * 2 = 2", "2 - 1 = 1", "Answer:  1")  # two wrong lines, and a right answer


def lab_rows(folder: Path) -> str:
    rows = [
        Solution("q", PROMPT, "1", k, steps, "", "1", "right", "eos", (), (), 0.0, SOURCE)
        for k, steps in enumerate((SOUND, FLAWED))
    ]
    write_rows(folder, rows)
    return str(folder)


LAB_SCORES = {"Answer: 1": [0.9, 0.8, 0.9, 0.7], "Answer:  1": [0.8, 0.4, 0.6, 0.5]}


def test_process_measures_of_a_reward_model_on_the_lab(tmp_path: Path, table: Callable[..., Table]) -> None:
    table(LAB_SCORES)
    config = EvaluatePRM(prm="m", solutions=lab_rows(tmp_path / "rows"), task={"kind": "chain", "p": 7})
    evaluate_prm(config, tmp_path / "plain")
    evaluate_prm(dataclasses.replace(config, process=True), tmp_path / "more")
    plain, more = found(tmp_path / "plain"), found(tmp_path / "more")
    assert {k: v for k, v in more.items() if k in plain} == plain
    assert {metric for _, metric in set(more) - set(plain)} == {
        "verdict_accuracy", "flawed_right_detected", "flawed_right_located", "lowest_is_last",
    }  # fmt: skip
    # The flawed one's first error is line 0; line 1 is named.
    assert (more["prm", "flawed_right_detected"], more["prm", "flawed_right_located"]) == (1.0, 0.0)
    assert (more["prm", "verdict_accuracy"], more["prm", "lowest_is_last"]) == (0.5, 0.5)
    assert values(tmp_path / "more")["prm", "verdict_accuracy"] == {"q": 0.5}


def test_scores_beside_exact_values(
    tmp_path: Path, table: Callable[..., Table], monkeypatch: pytest.MonkeyPatch
) -> None:
    import stepladder
    from stepladder.models import exact_value

    table(LAB_SCORES)
    # Every fact is written right with probability 0.8, else wrong uniformly: values are those of the closed form.
    from stepladder.tasks.chain import apply, value_off_track, value_on_track

    facts = {(z, op, a): np.full(7, 0.2 / 6) for z in range(7) for op in "+-*" for a in range(1, 7)}
    for (z, op, a), row in facts.items():
        row[apply(z, op, a, 7)] = 0.8
    made = exact_value.FactTable(facts, np.eye(7), 0.0, 0.0)
    monkeypatch.setattr(exact_value, "read_facts", lambda *_, **__: made)
    on, off = (lambda left: value_on_track(7, 0.2, left)), (lambda left: value_off_track(7, 0.2, left))
    counts = StepLabels(
        "q", PROMPT, "1", 0, SOUND, (5, 6, 7, 8, 0), (8, 8, 8, 8, 0), "monte_carlo", "right", None, True, SOURCE
    )
    write_rows(tmp_path / "counts", [counts])
    lab = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")
    config = EvaluatePRM(
        prm="m", solutions=lab_rows(tmp_path / "rows"), labels=str(tmp_path / "counts"), policy=lab,
        task={"kind": "chain", "p": 7},
    )  # fmt: skip
    evaluate_prm(config, tmp_path / "out")
    got = found(tmp_path / "out")
    assert got["policy", "pass_at_1"] == 1.0
    assert got["policy", "pass_at_1_closed_form"] == pytest.approx(on(3))
    shares, exact = [5 / 8, 6 / 8, 7 / 8, 1.0], [on(3), on(2), on(1), on(0)]
    gaps = [s - v for s, v in zip(shares, exact, strict=True)]
    assert got["policy", "value_bias"] == pytest.approx(np.mean(gaps))
    assert got["policy", "value_rms_gap"] == pytest.approx(np.sqrt(np.mean(np.square(gaps))))
    assert got["policy", "value_rms_gap_closed_form"] == pytest.approx(
        np.sqrt(np.mean([v * (1 - v) / 8 for v in exact]))
    )
    # The flawed one is off the track after its first line and on it again after its second.
    values = [on(2), on(1), on(0), off(2), on(1), on(0)]
    scores = [0.9, 0.8, 0.9, 0.8, 0.4, 0.6]
    before, root = [on(3), on(2), on(1), on(3), off(2), on(1)], [0.5, 0.9, 0.8, 0.5, 0.8, 0.4]
    assert got["prm", "value_mae"] == pytest.approx(np.mean(np.abs(np.subtract(scores, values))))
    assert got["prm", "value_correlation"] == pytest.approx(np.corrcoef(scores, values)[0, 1])
    changes = np.subtract(scores, root), np.subtract(values, before)
    assert got["prm", "advantage_correlation"] == pytest.approx(np.corrcoef(*changes)[0, 1])
    assert 0 < got["prm", "value_ece"] < 1
    bins = read_json(tmp_path / "out" / "details.json")["values"]["prm"]
    assert sum(n for *_, n in bins) == 6
    with pytest.raises(UserError, match="exact values are known for chain tasks alone"):
        exact_values(config, SimpleNamespace(), [])
