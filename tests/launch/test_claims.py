"""Claims: effects and verdicts by hand, one small claim run whole, and the page made of result files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError, read_json, write_json
from stepladder.launch.claims import (
    Comparison,
    claim_files,
    claims_table,
    compare,
    effect_text,
    overall,
    run_claim,
    student,
    verdict,
)
from stepladder.launch.cli import main


def a_run(folder: Path, arms: dict[str, list[float]], *, metric: str = "accuracy", kept: bool = True) -> Path:
    """A run whose stage `answers` has these values problem by problem."""
    records = [
        {"arm": arm, "metric": metric, "value": sum(v) / len(v), "n": len(v), "tokens": 10 * len(v)}
        for arm, v in arms.items()
    ]
    (folder / "answers").mkdir(parents=True)
    write_json(folder / "answers" / "results.json", records)
    if kept:
        values = [
            {"arm": arm, "metric": metric, "values": {f"p{i}": x for i, x in enumerate(v)}} for arm, v in arms.items()
        ]
        write_json(folder / "answers" / "values.json", values)
    return folder


def test_the_effect_is_the_mean_over_problems_and_seeds_with_a_paired_interval(tmp_path: Path) -> None:
    rng = random.Random(0)
    runs, pooled = [], [0.0] * 200
    for seed in range(3):
        a = [float(rng.random() < 0.7) for _ in range(200)]
        b = [float(rng.random() < 0.5) for _ in range(200)]
        pooled = [p + (x - y) / 3 for p, x, y in zip(pooled, a, b, strict=True)]
        runs.append(a_run(tmp_path / str(seed), {"a": a, "b": b}))
    found = compare(Comparison(what="a over b", better="answers/a", than="answers/b"), runs)
    mean = sum(pooled) / 200
    assert found["effect"] == pytest.approx(mean)
    # The bootstrap of a mean of many agrees with the normal's interval.
    half = 1.96 * math.sqrt(sum((p - mean) ** 2 for p in pooled) / 200 / 200)
    assert found["ci"] == pytest.approx([mean - half, mean + half], abs=0.1 * half)
    assert found["verdict"] == "reproduced"
    assert len(found["per_seed"]) == 3
    assert sum(found["per_seed"]) / 3 == pytest.approx(mean)
    assert (found["n"], found["tokens"]["better"]) == (200, 2000)
    backwards = compare(Comparison(what="b over a", better="answers/b", than="answers/a"), runs)
    assert backwards["verdict"] == "contradicted"
    assert backwards["effect"] == pytest.approx(-mean)


def test_without_values_the_interval_is_students_over_seeds(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / str(i), {"a": [a], "b": [b]}, metric="calls", kept=False)
        for i, (a, b) in enumerate([(8.0, 2.0), (9.0, 3.0), (12.0, 4.0)])
    ]
    one = Comparison(what="calls", better="answers/a", than="answers/b", metric="calls", ratio=True, margin=2.0)
    found = compare(one, runs)
    # Quotients 4, 3, 3: mean 10/3, standard deviation 1/sqrt(3), 4.302653 / 3 standard errors.
    assert found["effect"] == pytest.approx(10 / 3)
    assert found["ci"] == pytest.approx([10 / 3 - 4.302653 / 3, 10 / 3 + 4.302653 / 3])
    assert found["verdict"] == "not reproduced"
    assert effect_text(found) == "3.333x [1.899, 4.768]"


def test_one_arm_against_a_number(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(i), {"a": [v]}, metric="auroc", kept=False) for i, v in enumerate((0.80, 0.81, 0.79))]
    found = compare(Comparison(what="value AUROC", better="answers/a", metric="auroc", margin=0.75), runs)
    assert found["effect"] == pytest.approx(0.80)
    assert found["verdict"] == "reproduced"
    assert found["values"]["than"] is None


# Quantiles of t for 2, 10 and 30 degrees of freedom, from tables.
@pytest.mark.parametrize(("n", "quantile"), [(3, 4.3027), (11, 2.2281), (31, 2.0423)])
def test_students_interval(n: int, quantile: float) -> None:
    values = [float(i * i % 7) for i in range(n)]
    mean = sum(values) / n
    half = quantile * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    assert student(values) == pytest.approx((mean, mean - half, mean + half), abs=2e-4 * half)


def test_one_seed_decides_nothing() -> None:
    assert student([3.0]) == (3.0, -math.inf, math.inf)
    assert verdict(-math.inf, math.inf) == "not reproduced"
    assert [verdict(0.1, 0.2), verdict(-0.1, 0.2), verdict(-0.2, -0.1), verdict(0.1, 0.2, 0.15)] == [
        "reproduced", "not reproduced", "contradicted", "not reproduced",
    ]  # fmt: skip
    assert overall(["reproduced"] * 2) == "reproduced"
    assert overall(["reproduced", "contradicted"]) == "1 of 2 parts reproduced"


CLAIM = """# stepladder claims run small
row: "0"
paper: "nobody"
claim: "sixteen samples cover more than | one"
seeds: [0, 1]
compare:
  - {what: "pass@4 over one sample", better: answers/base/pass@4, than: answers/base/sample}
  - {what: "one sample over pass@4", better: answers/base/sample, than: answers/base/pass@4, control: true}
defaults: {task: {kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 20, dev: 5, test: 20}}, max_new_tokens: 64}
stages:
  policy: {do: model.copy, source: lab}
  samples: {do: data.solutions, policy: "@policy", split: test, samples: 4}
  answers: {do: eval.policies, policies: {base: {samples: "@samples"}}}
"""


def test_a_claim_runs_for_every_seed_and_the_page_shows_it(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(CLAIM)
    main(["claims", "run", "small.yaml", "--out", "runs", "--results", "claims", "samples.samples=4"])
    found = read_json(tmp_path / "claims" / "small.json")
    assert found["verdict"] == "reproduced"
    assert [one["verdict"] for one in found["comparisons"]] == ["reproduced", "contradicted"]
    seeds = [read_json(tmp_path / "runs" / f"seed-{seed}" / "answers" / "results.json") for seed in (0, 1)]
    accuracy = [{r["arm"]: r["value"] for r in records if r["metric"] == "accuracy"} for records in seeds]
    assert found["comparisons"][0]["per_seed"] == pytest.approx([a["base/pass@4"] - a["base/sample"] for a in accuracy])
    assert accuracy[0] != accuracy[1]
    capsys.readouterr()
    main(["claims", "table", "--results", "claims"])
    page = (tmp_path / "claims.md").read_text()
    assert "sixteen samples cover more than \\| one (`small`)" in page
    assert "control: one sample over pass@4" in page
    assert page.count("reproduced") >= 2
    # Again: nothing is made twice, and what is found is the same.
    capsys.readouterr()
    main(["claims", "run", "small.yaml", "--out", "runs", "--results", "claims", "samples.samples=4"])
    assert capsys.readouterr().out.count("already there") == 6
    assert read_json(tmp_path / "claims" / "small.json")["comparisons"] == found["comparisons"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("better: answers/base/pass@4", "better: answer/base/pass@4", "'answer'"),
        ('what: "pass@4 over one sample", better', 'what: "x", beter', "'beter'"),
        ("seeds: [0, 1]", "seeds: 3", "seeds must be a list of whole numbers, found 3"),
        ("paper:", "papier:", "'papier'"),
    ],
)
def test_mistakes_are_one_sentence_before_anything_runs(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in CLAIM
    (tmp_path / "bad.yaml").write_text(CLAIM.replace(old, new))
    with pytest.raises(UserError) as told:
        run_claim(str(tmp_path / "bad.yaml"), tmp_path / "runs", tmp_path / "claims", {})
    assert message in str(told.value)
    assert not (tmp_path / "runs").exists()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no result file of a claim"):
        claims_table(tmp_path / "none", tmp_path / "page.md")
    with pytest.raises(UserError, match="no_such_claim"):
        run_claim("no_such_claim", tmp_path, tmp_path, {})
    run = a_run(tmp_path / "run", {"a": [1.0]})
    for arm, metric, message in [("b", "accuracy", "accuracy: unknown arm 'b'"), ("a", "f1", "unknown metric 'f1'")]:
        with pytest.raises(UserError, match=message):
            compare(Comparison(what="x", better=f"answers/{arm}", metric=metric), [run])


def test_every_claim_of_the_package_can_be_read() -> None:
    for path in claim_files().values():
        assert path.read_text().startswith(f"# stepladder claims run {path.stem}\n"), path
    json.dumps(sorted(claim_files()))
