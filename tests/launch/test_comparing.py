"""search.compare: costs, matched budgets, the choice by difficulty, files; checked against its own rows."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from stepladder import models
from stepladder.basics import read_json
from stepladder.data_gen.rows import Solution
from stepladder.data_gen.searched import read_searches
from stepladder.data_gen.store import read_about, read_rows
from stepladder.launch import charts, comparing
from stepladder.launch.cli import main
from stepladder.launch.options_search import Compare
from stepladder.models.ledger import Ledger
from stepladder.models.loading import load_tokenizer
from stepladder.models.reward import RewardModel, aggregate
from stepladder.models.step_format import StepFormat
from stepladder.tasks.chain import ChainArith

POLICY = str(Path(models.__file__).parent / "lab_policy")
TASK = {"kind": "chain", "p": 7, "min_steps": 4, "max_steps": 5, "sizes": {"test": 12}}
ARMS = {
    "best_of_n": {"strategy": "best_of_n", "budgets": [1, 4, 8]},
    "beam": {"strategy": "beam"},
    "pav": {"strategy": "beam", "alpha": 1.0, "settings": {"max_depth": 6}},
    "mcts": {"strategy": "mcts", "settings": {"width": 2}, "budgets": [3, 6]},
}


def compare(out: Path, prm: str, *more: str, arms: Any = None) -> Path:
    main([
        "search", "compare", "--out", str(out), "--task", json.dumps(TASK), "--policy", POLICY, "--reward", f"'{prm}'",
        "--arms", json.dumps(ARMS if arms is None else arms), "--budgets", "[2, 4]", "--max_new_tokens", "64",
        "--unit_problems", "6", "--levels", "2", "--device", "cpu", *more,
    ])  # fmt: skip
    return out


@pytest.fixture(scope="module")
def prm(tmp_path_factory: pytest.TempPathFactory, tiny_scorer: Any) -> str:
    folder = tmp_path_factory.mktemp("prm")
    words = load_tokenizer(POLICY)
    with torch.random.fork_rng():
        RewardModel(tiny_scorer(words), words, StepFormat.load(POLICY).for_reward("scalar", "hard"), name="prm").save(
            folder
        )
    return str(folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, prm: str) -> Path:
    return compare(tmp_path_factory.mktemp("compare") / "out", prm)


def records_of(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["arm"], r["metric"]): r for r in read_json(out / "results.json")}


def test_every_arm_at_every_budget_is_measured(done):
    found = records_of(done)
    names = ["best_of_n@1", "best_of_n@4", "best_of_n@8", "beam@2", "beam@4", "pav@2", "pav@4", "mcts@3", "mcts@6"]
    for rule in comparing.RULES:
        for name in names:
            assert found[f"{rule}/{name}", "accuracy"]["n"] == 12
    # Independent samples are drawn once, for the largest budget.
    assert sorted(p.name for p in done.glob("*@*")) == [
        "beam@2", "beam@4", "best_of_n@8", "mcts@3", "mcts@6", "pav@2", "pav@4",
    ]  # fmt: skip
    rows: dict[str, list[bool]] = {}
    for row in read_rows(done / "beam@4", Solution):
        rows.setdefault(row.problem_id, []).append(row.right)
    assert found["pass/beam@4", "accuracy"]["value"] == pytest.approx(sum(map(any, rows.values())) / 12)
    # One sample needs no choice: all rules agree, but for what the reward model costs.
    one = [found[f"{rule}/best_of_n@1", "accuracy"] for rule in comparing.RULES]
    assert one[0]["value"] == one[3]["value"] == pytest.approx(one[1]["value"], abs=0.06)
    assert found["pass/best_of_n@8", "accuracy"]["value"] >= found["best/best_of_n@8", "accuracy"]["value"]


def test_right_in_every_step_and_by_luck_stand_beside_coverage(done):
    found = records_of(done)
    task = ChainArith(p=7, min_steps=4, max_steps=5, sizes={"test": 12})
    problems = {problem.id: problem for problem in task.problems("test")}
    whole: dict[str, list[bool]] = {}
    answers: dict[str, list[str | None]] = {}
    for row in read_rows(done / "best_of_n@8", Solution):
        whole.setdefault(row.problem_id, []).append(row.steps == tuple(task.reference_steps(problems[row.problem_id])))
        answers.setdefault(row.problem_id, []).append(row.answer)
    assert found["sound/best_of_n@8", "accuracy"]["value"] == pytest.approx(sum(map(any, whole.values())) / 12)
    want = [comparing.pass_at_k(8, sum(one), 4) for one in whole.values()]
    assert found["sound/best_of_n@4", "accuracy"]["value"] == pytest.approx(sum(want) / 12)
    assert found["sound/best_of_n@4", "accuracy"]["flops"] == found["pass/best_of_n@4", "accuracy"]["flops"]
    # A guess: any answer to any other problem.
    luck = []
    for name, problem in problems.items():
        others = [a for other, some in answers.items() if other != name for a in some]
        luck.append(sum(a == problem.answer for a in others) / len(others))
    for k in (1, 4, 8):
        want = [1 - (1 - p) ** k for p in luck]
        assert found[f"chance/best_of_n@{k}", "accuracy"]["value"] == pytest.approx(sum(want) / 12)


def test_what_is_waited_for(done):
    """Independent samples are one round, as long as the longest; a step-wise search has a round for every step."""
    runs = {(r["arm"], r["budget"]): r for r in read_json(done / "details.json")["search"]["runs"]}
    lengths: dict[str, list[int]] = {}
    for row in read_rows(done / "best_of_n@8", Solution):
        lengths.setdefault(row.problem_id, []).append(len(row.token_ids))
    assert runs["best_of_n", 8]["serial"] == pytest.approx(sum(map(max, lengths.values())) / 12)
    pairs = [[max(pair) for pair in itertools.combinations(some, 4)] for some in lengths.values()]
    assert runs["best_of_n", 4]["serial"] == pytest.approx(sum(sum(p) / len(p) for p in pairs) / 12)
    assert {runs["best_of_n", n]["about"]["rounds"] for n in (1, 4, 8)} == {1.0}
    assert runs["beam", 4]["about"]["rounds"] > 4
    assert runs["mcts", 6]["serial"] > runs["mcts", 3]["serial"]


def test_costs_are_those_of_the_ledgers(done):
    found = records_of(done)
    about = read_about(done / "beam@4")["ledger"]
    assert found["best/beam@4", "accuracy"]["flops"] == about["flops"] == found["majority/beam@4", "accuracy"]["flops"]
    assert found["best/beam@4", "accuracy"]["tokens"] == about["generated_tokens"]
    # Votes among independent samples ask no reward model.
    sizes = read_json(done / "best_of_n@8" / "search.json")["parameters"]
    pool = read_about(done / "best_of_n@8")["ledger"]
    assert pool["reward_tokens"] > 0
    voted = found["majority/best_of_n@8", "accuracy"]["flops"]
    assert voted == pytest.approx(2 * sizes["policy"] * (pool["generated_tokens"] + pool["prefilled_tokens"]))
    assert found["best/best_of_n@8", "accuracy"]["flops"] == pytest.approx(
        voted + 2 * sizes["reward"] * pool["reward_tokens"]
    )


def test_a_share_of_a_pool_pays_the_prompts_whole():
    sizes = {"policy": 10, "reward": 100}
    whole = Ledger(generated_tokens=80, prefilled_tokens=7, reward_tokens=47, policy_calls=8, seconds=4.0)
    whole.flops = 2 * 10 * 87 + 2 * 100 * 47
    # Half of the samples hold three quarters of what the reward model reads behind the prompts: 7 + 0.75 * 40.
    half = comparing.scaled(whole, 0.5, 0.75, sizes)
    assert (half.generated_tokens, half.prefilled_tokens, half.reward_tokens, half.policy_calls) == (40, 7, 37, 4)
    assert half.flops == 2 * 10 * 47 + 2 * 100 * 37
    assert comparing.scaled(whole, 1.0, 1.0, sizes) == whole
    assert comparing.without_reward(whole, sizes).flops == 2 * 10 * 87
    unscored = Ledger(generated_tokens=80, prefilled_tokens=7, policy_calls=8)
    assert comparing.scaled(unscored, 0.5, 0.75, sizes).reward_tokens == 0


def test_equal_solutions_are_scored_once_however_few_are_drawn():
    """Against all draws of k: tokens of the different solutions among them."""
    texts, tokens = "aabbbc", {"a": 3, "b": 5, "c": 11}
    pool = comparing.Pool(list(texts), [False] * 6, [0.0] * 6, 0, [1] * 6, [(2, 3), (3, 5), (1, 11)])
    for k in range(1, 7):
        draws = [sum(tokens[t] for t in set(draw)) for draw in itertools.combinations(texts, k)]
        assert comparing.scored_share([pool], k) == pytest.approx(sum(draws) / len(draws) / 19)
    assert comparing.scored_share([pool, pool], 9) == 1.0


def test_what_a_share_of_a_pool_would_cost_is_what_so_few_samples_cost(prm, tmp_path):
    """Two samples searched alone, and read off a pool of twelve that holds many equal ones."""
    found = []
    for name, budgets in (("alone", [2]), ("read", [2, 12])):
        arms = {"best_of_n": {"strategy": "best_of_n", "budgets": budgets}}
        out = compare(tmp_path / name, prm, "--temperature", "0.3", arms=arms)
        scored, voted = (records_of(out)[f"{rule}/best_of_n@2", "accuracy"] for rule in ("best", "majority"))
        found.append((scored["tokens"], scored["flops"] - voted["flops"]))  # the policy's and the reward model's part
    assert found[1] == (pytest.approx(found[0][0], rel=0.06), pytest.approx(found[0][1], rel=0.06))


def test_at_equal_cost_nobody_pays_more_than_the_reference_and_its_slack(done):
    found = records_of(done)
    details = read_json(done / "details.json")["search"]
    assert details["reference"] == "best_of_n"
    checked = 0
    for one in details["matched"]:
        metric, cost = f"accuracy_at_equal_{one['cost']}", one["cost"]
        if one["rule"] == "majority":
            assert found[f"majority/best_of_n~{one['at']}", metric]["flops"] <= (
                found[f"best/best_of_n@{one['at']}", "accuracy"]["flops"] * 1.001
            )
            assert one["budget"] >= one["at"]  # the reward model's share buys more samples
            continue
        arm = found[f"{one['rule']}/{one['arm']}~{one['at']}", metric]
        allowed = found[f"{one['rule']}/best_of_n@{one['at']}", "accuracy"][cost] * 1.05
        assert one["allowed"] == pytest.approx(allowed)
        assert arm[cost] <= allowed * (1 + 1e-9)
        larger = [
            r[cost]
            for (name, m), r in found.items()
            if m == "accuracy" and name.startswith(f"{one['rule']}/{one['arm']}@")
        ]
        assert arm[cost] == max(f for f in larger if f <= allowed * (1 + 1e-9))
        if one["arm"] != "best_of_n":
            checked += 1
            minus = found[f"{one['rule']}/{one['arm']}~{one['at']}", f"{metric}_minus_best_of_n"]
            base = found[f"{one['rule']}/best_of_n@{one['at']}", "accuracy"]["value"]
            assert minus["value"] == pytest.approx(arm["value"] - base)
            assert minus["ci"][0] <= minus["value"] <= minus["ci"][1]
    metric = comparing.MATCHED
    assert {one["cost"] for one in details["matched"]} == {"flops", "tokens"}
    assert checked >= 4
    # Where even the least budget of an arm is dearer there is no number, and it is told.
    for rule in ("best", "weighted"):
        dear = [r for (name, m), r in found.items() if m == metric and name == f"{rule}/mcts~1"]
        assert [r["value"] for r in dear] == [None]
    for kind in ("oracle", "predicted"):
        assert ("weighted/compute_optimal_" + kind + "~8", metric) in found
    levels = [found["weighted/beam@4", f"accuracy_level_{level}"] for level in (1, 2)]
    assert sum(r["n"] for r in levels) == 12
    assert sum(r["n"] * r["value"] for r in levels) / 12 == pytest.approx(found["weighted/beam@4", "accuracy"]["value"])


def test_values_problem_by_problem_go_with_the_records(done):
    found = records_of(done)
    for one in read_json(done / "values.json"):
        assert sum(one["values"].values()) / 12 == pytest.approx(found[one["arm"], one["metric"]]["value"])
    metrics = {one["metric"] for one in read_json(done / "values.json")}
    assert metrics == {"accuracy", "accuracy_at_equal_flops", "accuracy_at_equal_tokens"}


def test_curves_and_page_are_written(done):
    page = (done / "report.html").read_text()
    for words in (
        "Accuracy over cost",
        "At equal FLOPs",
        "At equal sampled tokens",
        "By difficulty",
        "Repeated sampling",
        "weighted/pav",
    ):
        assert words in page
    for cost in ("flops", "tokens", "serial"):
        assert (done / f"curves-{cost}.png").read_bytes().startswith(b"\x89PNG")
    coverage = read_json(done / "details.json")["search"]["coverage"]
    assert coverage["k"][0] == 1
    assert coverage["k"][-1] == 8
    assert coverage["coverage"] == sorted(coverage["coverage"])
    assert all(luck > 0 for luck in coverage["chance"])
    assert all(a <= b for a, b in zip(coverage["sound"], coverage["coverage"], strict=True))
    assert sum(coverage["right_share_histogram"]) == 12


def test_again_nothing_is_searched_and_the_results_are_the_same(done, prm, monkeypatch):
    before = [(done / name).read_bytes() for name in ("results.json", "values.json", "details.json", "report.html")]
    monkeypatch.setattr("stepladder.launch.making_search._policy", lambda *a, **k: pytest.fail("a policy was loaded"))
    compare(done, prm)
    assert [(done / n).read_bytes() for n in ("results.json", "values.json", "details.json", "report.html")] == before


def test_without_matplotlib_the_page_has_the_curves(tmp_path, monkeypatch, capsys):
    from stepladder.launch import report_search

    monkeypatch.setattr(report_search.importlib.util, "find_spec", lambda name: None)
    run = {
        "arm": "beam", "budget": 4, "accuracy": dict.fromkeys(comparing.RULES, 0.5), "tokens": 10.0, "serial": 5.0,
        "flops": dict.fromkeys(comparing.RULES, 1e6), "ledger": Ledger().to_json(), "about": {},
    }  # fmt: skip
    details = {"reference": "beam", "runs": [run], "matched": [], "choices": {}, "coverage": None}
    report_search.write_comparison(tmp_path, [], details, "t")
    assert "need matplotlib" in capsys.readouterr().out
    assert (tmp_path / "report.html").is_file()
    assert not list(tmp_path.glob("*.png"))


def test_searches_that_share_models_pay_their_own_cost(done, prm, tmp_path):
    """The last search alone costs what it cost after all others: caches are not handed on."""
    alone = compare(tmp_path / "alone", prm, arms={"mcts": {**ARMS["mcts"], "budgets": [6]}})
    left, right = (read_about(out / "mcts@6")["ledger"] for out in (alone, done))
    assert {k: v for k, v in left.items() if k != "seconds"} == {k: v for k, v in right.items() if k != "seconds"}
    assert not any("compute_optimal" in arm for arm, _ in records_of(alone))  # no pool, no levels


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"arms": {"a/b": {}}}, "a name is made of letters, digits"),
        ({"arms": {"a": {"strategy": "bean"}}}, "arms.a: unknown strategy 'bean'; did you mean beam?"),
        ({"arms": {"a": {"settings": {"beams": 3}}}}, "arms.a: beams is what the budgets set"),
        (
            {"arms": {"a": {"settings": {"max_depht": 3}}}},
            "arms.a, budget 1: settings of beam: unknown key 'max_depht'",
        ),
        ({"arms": {"a": {"budgets": [2, 2]}}}, "budgets must be different numbers of 1 or more"),
        ({"arms": {"a": {"strategy": "particles", "settings": {"islands": 3}}}}, "n must be a multiple of islands"),
        ({"arms": {"a": {}}, "reference": "b"}, "reference must be one of the arms a, found 'b'"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path, refused, settings, told):
    more = [f"--{key}={json.dumps(value)}" for key, value in settings.items()]
    assert told in refused("search", "compare", "--out", tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_arms_and_a_reward_model_are_needed(tmp_path, refused):
    assert refused("search", "compare", "--out", tmp_path / "a").startswith("arms is missing")
    assert refused("search", "compare", "--out", tmp_path / "b", "--arms", "{a: {}}").startswith("reward is missing")


def test_an_arm_may_have_a_reward_model_of_its_own(done, prm, tiny_scorer, tmp_path):
    words = load_tokenizer(POLICY)
    with torch.random.fork_rng():
        other = RewardModel(tiny_scorer(words, seed=7), words, StepFormat.load(POLICY).for_reward("scalar", "hard"))
        other.save(tmp_path / "other")
    theirs = {**ARMS["beam"], "reward": str(tmp_path / "other"), "budgets": [4]}
    out = compare(tmp_path / "out", prm, arms={"theirs": theirs, "beam": {**ARMS["beam"], "budgets": [4]}})
    read = lambda folder: (folder / "search.jsonl").read_text()
    assert read(out / "beam@4") == read(done / "beam@4")
    assert read(out / "theirs@4") != read(out / "beam@4")
    found = next(iter(read_searches(out / "theirs@4")))["finals"]
    rows = read_rows(out / "theirs@4", Solution)[: len(found)]
    scores = RewardModel.load(str(tmp_path / "other")).score([(row.prompt, row.steps) for row in rows])
    assert [f["score"] for f in found] == pytest.approx([aggregate(one, "last") for one in scores], abs=1e-4)


def test_an_arm_may_have_a_temperature_of_its_own(done, prm, tmp_path):
    """Greedy decoding beside searches that sample: one solution, always the same, as the policy writes it at temperature 0."""
    from stepladder.launch.options_search import ComparedArm

    config = Compare(arms={"a": ComparedArm("beam"), "greedy": ComparedArm("best_of_n", temperature=0.0, budgets=[1])})
    assert {name: search.temperature for (name, _), search in config.searches().items()} == {"a": 1.0, "greedy": 0.0}
    greedy = {"strategy": "best_of_n", "temperature": 0, "budgets": [1]}
    out = compare(tmp_path / "out", prm, arms={"greedy": greedy, "best_of_n": {**ARMS["best_of_n"], "budgets": [4]}})
    main([
        "data", "solutions", "--out", str(tmp_path / "plain"), "--task", json.dumps(TASK), "--policy", POLICY, "--split", "test",
        "--samples", "1", "--temperature", "0", "--max_new_tokens", "64", "--device", "cpu",
    ])  # fmt: skip
    texts = lambda folder: {row.problem_id: row.steps for row in read_rows(folder, Solution)}
    assert texts(out / "greedy@1") == texts(tmp_path / "plain")
    # The pool and the reference are those of the first best_of_n, which samples.
    assert read_json(out / "details.json")["search"]["reference"] == "best_of_n"
    drawn = lambda folder: (folder / "best_of_n@4" / "search.jsonl").read_text()
    assert drawn(out) == drawn(
        compare(tmp_path / "sampled", prm, arms={"best_of_n": {**ARMS["best_of_n"], "budgets": [4]}})
    )


def test_a_width_above_the_budget_is_cut_to_it():
    from stepladder.launch.options_search import ComparedArm

    config = Compare(arms={"a": ComparedArm("beam"), "b": ComparedArm("dvts", {"width": 2})}, budgets=[1, 2, 8])
    found = {key: search.settings["width"] for key, search in config.searches().items()}
    assert found == {("a", 1): 1, ("a", 2): 2, ("a", 8): 4, ("b", 1): 1, ("b", 2): 2, ("b", 8): 2}


def test_a_pool_gives_every_rule_its_credit():
    pool = comparing.Pool(["1", "2", "2", None], [True, False, False, False], [0.9, 0.3, 0.4, 0.1], 0, [3, 3, 2, 1])
    assert [pool.credit(rule) for rule in comparing.RULES] == [1.0, 1.0, 0.0, 1.0]
    assert [pool.credit_of(rule, 1, 0) for rule in comparing.RULES] == pytest.approx([0.25] * 4)
    # Of the six pairs {1, None} is right and the two {1, 2} are ties.
    assert pool.credit_of("majority", 2, 0) == pytest.approx((1 + 0.5 + 0.5) / 6)
    # By weight 1 wins in the three pairs that hold it.
    assert pool.credit_of("weighted", 2, 0) == pytest.approx(3 / 6, abs=0.15)
    assert [pool.credit_of(rule, 4, 0) for rule in comparing.RULES] == [1.0, 1.0, 0.0, 1.0]
    tie = comparing.Pool(["1", "2"], [True, False], [0.5, 0.5], 0, [1, 1])
    assert tie.credit("best") == 0.5  # first come is not better
    walked = comparing.Pool(["1", "2"], [True, False], [0.9, 0.5], 1, [1, 1])
    assert walked.credit("best") == 0.0  # a search that chose by something else than the score


def test_more_searches_than_colours_have_a_chart_each_with_intervals():
    line = lambda i: [(1.0, (10.0 + i, 5.0, 20.0)), (100.0, (50.0 + i, 40.0, 60.0 + i))]
    lines = {f"arm{i}": line(i) for i in range(12)}
    made = charts.apart_charts(lines, "arm0", ("FLOPs", "accuracy, %"))
    assert list(made) == list(lines)
    for i, (name, chart) in enumerate(made.items()):
        assert f"{name}: {50 + i:.1f} [40.0, {60 + i:.1f}] for 100" in chart
        assert chart.count('class="path thin') == 2  # an interval at each budget
        assert chart.count('class="path rest"') == (11 if name == "arm0" else 10)
        assert chart.count('class="path k1"') == 1  # the reference, whatever the heading is
        assert chart.count('class="path k0"') == (name != "arm0")
    # All charts share their axes: the same cost stands at the same place.
    assert len({re.search(r'<polyline class="path k1" points="[^"]*"', chart)[0] for chart in made.values()}) == 1
    assert charts.apart_charts({"one": [(5.0, (0.0, 0.0, 0.0))]}, "none", ("x", "y"))


def test_the_page_changes_its_charts_with_the_number_of_searches():
    from stepladder.launch import report_search

    def details(arms: int) -> dict[str, Any]:
        run = lambda arm: {
            "arm": arm, "budget": 4, "accuracy": dict.fromkeys(comparing.RULES, 0.5), "tokens": 10.0, "serial": 5.0,
            "flops": dict.fromkeys(comparing.RULES, 1e6), "ledger": Ledger().to_json(), "about": {},
        }  # fmt: skip
        return {"reference": "arm0", "runs": [run(f"arm{i}") for i in range(arms)]}

    found = [{"arm": "weighted/arm3@4", "metric": "accuracy", "ci": [0.41, 0.59]}]
    few, many = (report_search.curves_figures(found, details(n)) for n in (4, 5))
    assert few.count("<svg role") == 6  # two rules, three costs
    assert many.count("<svg role") == 6 * 5
    assert many.count("<details>") == 4  # tokens, and tokens one after another
    assert "arm3: 50.0 [41.0, 59.0] for 1M" in many
    assert "arm2: 50.0 [50.0, 50.0] for 1M" in many


def test_the_page_draws_trees_that_a_person_can_read(done):
    """The largest budget up to LEGIBLE; of independent samples the pool, which is all there is."""
    told = re.search(r"Trees shown: ([^<]*)", (done / "report.html").read_text())[1]
    assert [one.split(":")[0] for one in told.split("; ")] == ["best_of_n@8", "beam@4", "pav@4", "mcts@6"]


def test_a_tree_of_a_smaller_budget_is_drawn_where_the_largest_is_too_wide(done, prm, monkeypatch, tmp_path):
    monkeypatch.setattr(comparing, "LEGIBLE", 3)
    page = (compare(shutil.copytree(done, tmp_path / "out"), prm) / "report.html").read_text()
    told = re.search(r"Trees shown: ([^<]*)", page)[1]
    assert [one.split(":")[0] for one in told.split("; ")] == ["best_of_n@8", "beam@2", "pav@2", "mcts@3"]


def test_curves_have_a_name_at_their_end():
    lines = {f"arm{i}": [(1.0, 10.0 + i), (100.0, 50.0 + i)] for i in range(9)}
    picture = charts.curve_chart(lines, ("FLOPs", "accuracy, %"))
    assert all(f">arm{i}</text>" in picture for i in range(9))
    assert "arm3: 13.0 for 1" in picture
    assert math.isfinite(float(picture.split('height="')[1].split('"')[0]))
    assert charts.curve_chart({"one": [(5.0, 0.0)]}, ("x", "y"))
