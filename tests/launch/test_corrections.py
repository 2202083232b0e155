"""The stages of critiques, refinements and corrections, through their command: rows, resumption, metrics, mistakes."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder import models
from stepladder.basics import UserError, read_json
from stepladder.data_gen import critiques as critiques_
from stepladder.data_gen import self_talk
from stepladder.data_gen.dialogues import meta_of
from stepladder.data_gen.drafts import drafts_of_dialogues
from stepladder.data_gen.rows import Dialogue, Message, Pair, Solution, Source
from stepladder.data_gen.searched import read_searches
from stepladder.data_gen.store import read_about, read_rows
from stepladder.data_gen.trajectories import Attempt, Chain, Said, chains_of_dialogues
from stepladder.launch.cli import main
from stepladder.launch.evaluate_corrections import _shares, means
from stepladder.launch.pipeline import run_recipe
from stepladder.launch.report_corrections import corrections_section
from stepladder.tasks.base import Problem
from stepladder.tasks.load import load_task

LAB_POLICY = str(Path(models.__file__).parent / "lab_policy")
TASK = {"kind": "chain", "p": 7, "min_steps": 3, "max_steps": 4, "sizes": {"train": 16, "dev": 2, "test": 8}}
SEARCH = '{do: search.run, strategy: corrections, policy: "@policy", trees: -1, unit_problems: 3, critic_max_new_tokens: 20, '
STAGES = f"""
policy: {{do: model.copy, source: lab, correction_words: true}}
solutions: {{do: data.solutions, policy: "@policy", samples: 3}}
critiques: {{do: data.critiques, solutions: "@solutions", rg2: 1, rg3: 1, corrupt: 0.3, unit_problems: 5}}
repaired: {{do: data.refinements, critiques: "@critiques", policy: "@policy", repair: true, samples: 2, unit_problems: 20}}
refined: {{do: data.refinements, critiques: "@critiques", policy: "@policy", only: wrong, samples: 2, limit: 9, unit_problems: 7}}
shuffled: {{do: data.refinements, critiques: "@critiques", policy: "@policy", only: wrong, limit: 9, control: shuffled}}
soft: {{do: data.filter_critiques, critiques: "@critiques", refinements: "@repaired"}}
learnt: {{do: data.best_refinements, refinements: "@repaired", kinds: [refine, solve, critique]}}
refiner:
  {{do: train.sft, model: "@policy", rows: "@learnt", max_steps: 2, per_device_train_batch_size: 4, max_length: 300, save_steps: 9}}
parallel: {SEARCH} critic: self, settings: {{n: 3, gate: always}}}}
sequential: {SEARCH} critic: "@refiner", settings: {{n: 1, turns: 3, gate: oracle, keep: all}}}}
walks: {SEARCH} split: train, settings: {{n: 6, turns: 2, keep: all}}}}
retry: {SEARCH} settings: {{n: 2, turns: 2}}}}
talk: {{do: data.self_talk, refinements: "@repaired", template: "{{draft}}\\nWait\\n{{refinement}}"}}
labels: {{do: data.step_labels, policy: "@policy", solutions: "@solutions", rollouts: 3}}
global_rows: {{do: data.global_refinements, solutions: "@solutions", per_draft: 2}}
local_rows: {{do: data.local_refinements, policy: "@policy", labels: "@labels", samples: 3, unit_problems: 3}}
reward:
  {{do: train.prm, model: "@policy", rows: "@labels", max_steps: 1, per_device_train_batch_size: 4, max_length: 100}}
glore:
  do: search.run
  strategy: glore
  settings: {{n: 2}}
  policy: "@policy"
  reward: "@reward"
  global_refiner: "@refiner"
  local_refiner: "@refiner"
  locator: "@reward"
  trees: -1
  unit_problems: 3
rise: {{do: data.rise, policy: "@refiner", best_of: 3, from_problem: true, unit_problems: 8, max_new_tokens: 30}}
flips: {{do: data.flip_pairs, source: "@walks"}}
inline: {{do: data.inline_corrections, policy: "@policy", solutions: "@solutions", positions: 0, unit_problems: 9}}
first: {{do: data.solutions, policy: "@policy", split: test, samples: 2}}
second: {{do: data.solutions, policy: "@policy", split: test, samples: 2, temperature: 0.5}}
correction:
  do: eval.correction
  sources: {{critiques: "@critiques", refined: "@refined", parallel: "@parallel", sequential: "@sequential", retry: "@retry",
            turns: ["@first", "@second"], shuffled: "@shuffled", alone: "@first", glore: "@glore",
            local_rows: "@local_rows"}}
  reflections: [Wait]
report: {{do: report, results: ["@correction"]}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corrections")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *a, **k: None)
        defaults = {"task": TASK, "max_new_tokens": 40, "wording": "lab", "unit_problems": 64, "use_cpu": True}
        run_recipe({"seed": 0, "defaults": defaults, "stages": yaml.safe_load(STAGES)}, Path("run"), "r")
    return folder / "run"


def rows_of(made: Path, name: str) -> list[Dialogue]:
    return read_rows(made / name, Dialogue)


def test_critiques_are_of_every_origin_and_say_what_they_are(made: Path) -> None:
    metas = [meta_of(row) for row in rows_of(made, "critiques")]
    origins = Counter(meta["source"] for meta in metas)
    assert origins["RG2"] == origins["RG3"] == 16
    assert 0 < origins["RG1"] <= 32
    assert {meta["mark"] for meta in metas} == {"exact", "corrupted"}
    counts = read_about(made / "critiques")["counts"]
    assert sum(v for k, v in counts.items() if k.startswith("drafts of")) == len(metas)
    assert len({meta["id"] for meta in metas}) == len(metas)


def test_refinements_and_what_is_learnt(made: Path) -> None:
    repaired = [meta_of(row) for row in rows_of(made, "repaired")]
    kept = {meta_of(row)["id"] for row in rows_of(made, "soft")}
    for meta in (meta_of(row) for row in rows_of(made, "critiques")):
        own = [m["correct"][1] for m in repaired if m["id"] == meta["id"]]
        if not meta["correct"][0]:
            assert (meta["id"] in kept) == (sum(own) >= 0.3 * len(own) > 0)
    kinds = Counter(row.kind for row in rows_of(made, "learnt"))
    assert kinds["refine"] == kinds["solve"] == kinds["critique"] > 0
    assert (made / "refiner" / "model.safetensors").is_file()
    for name in ("refined", "shuffled"):
        assert all(not meta_of(row)["correct"][0] for row in rows_of(made, name))
    plain = {meta_of(row)["id"]: row.messages[2].content for row in rows_of(made, "refined")}
    other = {meta_of(row)["id"]: row.messages[2].content for row in rows_of(made, "shuffled")}
    assert plain.keys() == other.keys()
    assert any(plain[key] != other[key] for key in plain)


def test_searches_hold_their_chains_and_pay_for_both_models(made: Path) -> None:
    for name, most in (("parallel", 3), ("sequential", 3), ("retry", 2)):
        records = list(read_searches(made / name))
        assert len(records) == 8
        tokens = read_about(made / name)["ledger"]["generated_tokens"]
        assert tokens >= sum(r["tokens"] for r in records) > 0
        assert all(len(r["finals"]) <= most for r in records)
    assert read_json(made / "sequential" / "search.json")["critic"].endswith("refiner")
    for record in read_searches(made / "sequential"):
        outcomes = [final["outcome"] == "right" for final in record["finals"]]
        assert not any(outcomes[:-1])  # the oracle ends a chain with its first right answer
    # The oracle pays for a critique of each answer that it sends back.
    flops = read_about(made / "parallel")["ledger"]
    assert flops["policy_calls"] == 8 * 3 * 3


def test_metrics_of_every_source(made: Path) -> None:
    found = {(r["arm"], r["metric"]): r for r in read_json(made / "correction" / "results.json")}
    value = lambda arm, metric: found[arm, metric]["value"]
    for arm in ("refined", "parallel", "retry", "turns"):
        assert value(arm, "delta") == pytest.approx(value(arm, "wrong_to_right") - value(arm, "right_to_wrong"))
        assert value(arm, "accuracy") == pytest.approx(value(arm, "accuracy@t1") + value(arm, "delta"))
    assert value("critiques", "critic_recall") > 0.6
    assert ("critiques", "accuracy") not in found
    assert value("sequential", "accuracy@t1") <= value("sequential", "accuracy@t3") == value("sequential", "any")
    first = read_rows(made / "first", Solution)
    assert value("turns", "accuracy@t1") == pytest.approx(sum(r.right for r in first) / len(first))
    assert found["parallel", "tokens_critiques"]["value"] > 0
    assert ("retry", "tokens_critiques") not in found
    assert found["parallel", "delta"]["tokens"] == read_about(made / "parallel")["ledger"]["generated_tokens"]
    values = {(v["arm"], v["metric"]): v["values"] for v in read_json(made / "correction" / "values.json")}
    assert len(values["parallel", "accuracy"]) == 8
    assert sum(values["parallel", "accuracy"].values()) / 8 == pytest.approx(value("parallel", "accuracy"))


def test_drafts_of_rows_are_criticised_and_refined_without_the_task_that_they_are_of(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    config = {"task": {"kind": "free", "answer_kind": "number"}, "policy": "run/refiner", "wording": "lab"}
    config |= {"max_new_tokens": 30, "unit_problems": 9}
    Path("freely.yaml").write_text(yaml.safe_dump({**config, "drafts": "run/critiques", "limit": 7}))
    with monkeypatch.context() as patch:  # two steps of training make no critic
        patch.setattr(critiques_, "text_of", lambda engine, sample: "Final answer verdict: Wrong")
        main(["data", "critiques", "--config", "freely.yaml", "--out", "run/free_critiques"])
    Path("freely.yaml").write_text(yaml.safe_dump({**config, "critiques": "run/critiques", "limit": 4}))
    main(["data", "refinements", "--config", "freely.yaml", "--out", "run/free_refinements"])
    given = list(dict.fromkeys((r.problem_id, tuple(meta_of(r)["draft"])) for r in rows_of(made, "critiques")))
    found = rows_of(made, "free_critiques")
    assert [(r.problem_id, tuple(meta_of(r)["draft"])) for r in found] == given[:7]
    assert all(row.messages[0].content.endswith("Critique: \n ") for row in found)
    task = load_task(TASK)
    rows = rows_of(made, "free_refinements")
    assert len({row.problem_id for row in rows}) == 4
    for row in rows:
        problem = Problem(row.problem_id, meta_of(row)["prompt"], meta_of(row)["reference"])
        text = row.messages[-1].content
        if "Answer:" in text:
            assert meta_of(row)["correct"][1] == task.verify(problem, text).right


def test_self_talk_as_it_is_put_together_and_as_a_model_rewrites_it(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made.parent)
    task, rows = load_task(TASK), rows_of(made, "talk")
    assert len({row.problem_id for row in rows}) == len(rows) > 3
    for row in rows:
        problem = Problem(row.problem_id, meta_of(row)["prompt"], meta_of(row)["reference"])
        first, second = row.messages[1].content.split("\nWait\n")
        assert len(first.split("\n")) == meta_of(row)["first_error"] + 1
        assert task.verify(problem, second).right
    config = {
        "task": TASK,
        "policy": "run/policy",
        "refinements": "run/repaired",
        "unit_problems": 2,
        "max_new_tokens": 90,
    }
    Path("talk.yaml").write_text(yaml.safe_dump(config))
    texts = iter([f"Answer: {meta_of(row)['reference']}" if number % 2 else "No." for number, row in enumerate(rows)])
    monkeypatch.setattr(self_talk, "text_of", lambda engine, sample: next(texts))
    main(["data", "self_talk", "--config", "talk.yaml", "--out", "run/monologues"])
    found, about = rows_of(made, "monologues"), read_about(made / "monologues")
    assert about["rows"] + sum(about["dropped"].values()) == len(rows)
    assert about["dropped"]["monologues that end wrong"] > 0
    assert {row.problem_id for row in found} <= {row.problem_id for row in rows[1::2]}
    assert all(row.messages[1].content == f"Answer: {meta_of(row)['reference']}" for row in found)


def test_refinements_of_glore_are_arms_beside_the_choice_and_pay_for_every_model(made: Path) -> None:
    found = {(r["arm"], r["metric"]): r["value"] for r in read_json(made / "correction" / "results.json")}
    rows = {(r.problem_id, r.sample): r for r in read_rows(made / "glore", Solution)}
    chosen, fixed = [], {"global": 0, "local": 0, "either": 0}
    for record in read_searches(made / "glore"):
        right = {f["node"]: f["outcome"] == "right" for f in record["finals"]}
        chosen.append(record["finals"][record["chosen"]]["outcome"] == "right")
        for place, node in enumerate(record["nodes"]):
            if node["parent"] == 0:
                after = {n["role"]: right[p] for p, n in enumerate(record["nodes"]) if n["parent"] == place}
                assert "global" in after
                if not right[place]:
                    fixed["either"] += any(after.values())
                    for role in after:
                        fixed[role] += after[role]
        for final in record["finals"]:
            row = rows[record["problem_id"], final["sample"]]
            node = record["nodes"][final["node"]]
            if node.get("role") == "local":  # a whole solution, which begins as its draft does
                draft = record["nodes"][node["parent"]]["steps"]
                kept = len(row.steps) - len(node["steps"])
                assert list(row.steps[:kept]) == draft[:kept]
                assert row.text.strip()
    assert found["glore", "accuracy"] == pytest.approx(sum(chosen) / len(chosen))
    drafts = found["glore/global", "accuracy@t1"]
    for arm in fixed:
        assert found[f"glore/{arm}", "accuracy@t1"] == drafts
        assert found[f"glore/{arm}", "wrong_to_right"] == pytest.approx(fixed[arm] / 16)
    ledger = read_about(made / "glore")["ledger"]
    assert ledger["generated_tokens"] == sum(r["tokens"] for r in read_searches(made / "glore"))
    assert ledger["reward_tokens"] > 0
    assert found["local_rows", "accuracy"] == 1
    metas = [meta_of(row) for row in rows_of(made, "local_rows")]
    assert all(len(m["prefix"]) == m["located"] for m in metas)
    assert read_about(made / "local_rows")["ledger"]["generated_tokens"] > 0


def test_a_search_with_refiners_says_what_it_lacks(refused: Any, made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    config = {"task": TASK, "policy": "run/policy", "strategy": "glore", "reward": "run/reward"}
    config |= {"global_refiner": "run/refiner"}
    for more, told in (
        ({}, "strategy glore with refine both needs local_refiner"),
        ({"local_refiner": "run/refiner"}, "a local refiner needs a locator"),
        ({"settings": {"refine": "none"}}, "refine must be one of both, global, local"),
        ({"local_refiner": LAB_POLICY, "locator": "checker", "wording": "lab"}, "needs the vocabulary of the policy"),
    ):
        Path("glore.yaml").write_text(yaml.safe_dump({**config, **more}))
        assert told in refused("search", "run", "--config", "glore.yaml", "--out", "out")
    Path("local.yaml").write_text(yaml.safe_dump({"task": TASK, "policy": "run/policy", "labels": "run/empty.jsonl"}))
    assert "empty.jsonl" in refused("data", "local_refinements", "--config", "local.yaml", "--out", "out")


def test_rows_of_rise_flips_and_inline_corrections(made: Path) -> None:
    weights = {json.loads(row.meta)["reward"]: row.weight for row in rows_of(made, "rise")}
    assert all(w == pytest.approx(math.exp(r / 0.4)) for r, w in weights.items())
    assert {json.loads(row.meta)["turn"] for row in rows_of(made, "rise")} == {1, 2}
    searched = {(row.problem_id, row.steps): row.right for row in read_rows(made / "walks", Solution)}
    for pair in read_rows(made / "flips", Pair):
        assert searched[pair.problem_id, pair.chosen]
        assert not searched[pair.problem_id, pair.rejected]
    kinds = Counter(row.kind for row in rows_of(made, "inline"))
    assert set(kinds) == {"solve", "selfcorrect"}
    found = {(r["arm"], r["metric"]): r["value"] for r in read_json(made / "correction" / "results.json")}
    assert 0 < found["alone", "wrong_steps"] < 1
    assert found["alone", "inline_repair"] == 0


def test_a_critic_that_finds_nothing_wrong_corrects_nothing() -> None:
    said = Said("Final answer verdict: Correct", False, None, False)
    chains = [Chain(f"p{i}", 0, (Attempt("x", "1", i < 2),), (said,)) for i in range(3)]
    assert "accuracy" not in means(chains)
    found = {metric: sum(values) / len(values) for metric, (_, values) in means(chains, planned=2).items()}
    assert found["accuracy"] == found["accuracy@t2"] == found["majority"] == pytest.approx(2 / 3)
    assert found["delta"] == found["helpfulness"] == found["harm"] == 0
    assert "changed" not in found


def test_chains_can_be_browsed(made: Path) -> None:
    page = (made / "report.html").read_text()
    details = read_json(made / "correction" / "details.json")["corrections"]
    assert {one["source"] for one in details} >= {"parallel", "sequential", "retry", "turns", "refined"}
    assert page.count("<summary>chain/") == len(details)
    assert "The critic says: wrong" in page
    odd = {
        "source": "<s>",
        "problem_id": "p",
        "prompt": "",
        "attempts": [{"text": "<b>", "right": True}],
        "said": [None],
    }
    assert "&lt;b&gt;" in corrections_section([odd])
    assert "<b>" not in corrections_section([odd])


def test_shards_and_a_second_run_give_the_same_bytes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(made.parent)
    config = {"task": TASK, "max_new_tokens": 40, "wording": "lab", "critiques": "run/critiques", "policy": "run/policy",
              "only": "wrong", "samples": 2, "limit": 9, "unit_problems": 7}  # fmt: skip
    Path("refined.yaml").write_text(yaml.safe_dump(config))
    for shard in ("1/2", "0/2"):
        main(["data", "refinements", "--config", "refined.yaml", "--out", "sharded", "--shard", shard])
    assert Path("sharded/rows.parquet").read_bytes() == (made / "refined" / "rows.parquet").read_bytes()
    local = {
        "task": TASK,
        "max_new_tokens": 40,
        "wording": "lab",
        "labels": "run/labels",
        "policy": "run/policy",
        "samples": 3,
    }
    Path("local.yaml").write_text(yaml.safe_dump({**local, "unit_problems": 3}))
    for shard in ("1/2", "0/2"):
        main(["data", "local_refinements", "--config", "local.yaml", "--out", "sharded_local", "--shard", shard])
    assert Path("sharded_local/rows.parquet").read_bytes() == (made / "local_rows" / "rows.parquet").read_bytes()


def test_votes_over_turns_and_chains() -> None:
    a = lambda answer: Attempt(f"t{answer}", answer, answer == "1")
    chains = [
        Chain("p", 0, (a("2"), a("1"), a("1")), (None,) * 3),
        Chain("p", 1, (a("2"), a("2")), (None,) * 2),
        Chain("q", 0, (a("1"),), (Said("", False, None, False),)),
    ]
    found = means(chains)
    assert found["majority"] == (["p", "q"], [0.0, 1.0])  # 2 2 1 2 1 of p
    assert found["majority@t1"][1] == [0.0, 1.0]
    assert found["majority@t3"][1] == [1.0, 1.0]  # 1 and 2 of p: of equals the first chain's
    assert found["accuracy@t2"] == (["p", "p", "q"], [1.0, 0.0, 1.0])
    assert found["any"][1] == [1.0, 0.0, 1.0]
    assert found["helpfulness"] == (["p", "p"], [1.0, 0.0])
    assert found["harm"] == (["q"], [0.0])
    assert found["changed"] == (["p", "p"], [0.0, 0.0])


def test_late_errors_are_told_apart_and_what_cannot_be_read_finds_and_clears_nothing() -> None:
    def chain(problem: str, error: int | None, says: int | None, wrong: bool | None) -> Chain:
        about = Attempt("a\nb\nc\nd", None, error is None, error, True)
        return Chain(problem, 0, (about,), (Said("", wrong, says, False),))

    chains = [
        chain("p", 0, 0, True), chain("q", 1, 1, True), chain("r", 2, 2, True), chain("s", 3, 2, True),
        chain("t", None, None, False),
        chain("u", None, None, None), chain("v", 2, None, None),
    ]  # fmt: skip
    found = {metric: (n, value[0]) for metric, (n, value) in _shares(chains, 0).items()}
    assert found["critic_located_late"] == (3, pytest.approx(1 / 3))  # r, s and v
    assert found["critic_located"] == (7, pytest.approx(3 / 5))
    assert found["critic_cleared"] == (7, pytest.approx(1 / 2))  # t, and not u


def test_rows_of_other_kinds_have_no_attempts() -> None:
    row = Dialogue("q", "solve", (Message("user", "?"),), "{}", Source("p", "e", "t", 0))
    with pytest.raises(UserError, match="kind solve has no attempts"):
        chains_of_dialogues([row])
    with pytest.raises(UserError, match="kind solve has no draft"):
        drafts_of_dialogues([row])


MISTAKES: list[tuple[list[str], str]] = [
    (["data", "critiques"], "nothing to criticise: give solutions"),
    (["data", "critiques", "--solutions", "run/solutions", "--wording", "odd"], "wording must be one of text, lab"),
    (["data", "critiques", "--rg2", "1", "--task.kind", "text", "--task.path", "q.jsonl", "--writer", "checker"],
     "task text cannot check steps and plant errors"),
    (["data", "critiques", "--rg2", "1", "--writer", "policy", "--corrupt", "0.1"], "corrupt is about the checker"),
    (["data", "refinements", "--policy", "run/policy"], "critiques is missing"),
    (["data", "refinements", "--critiques", "run/refined", "--policy", "run/policy"], "of kind critique or draft, found refine"),
    (["data", "refinements", "--critiques", "run/critiques", "--policy", "run/policy", "--config", "task.yaml", "--split", "test"],
     "is not in split 'test'"),
    (["data", "refinements", "--repair", "--control", "empty"], "repair asks no refiner"),
    (["data", "filter_critiques", "--critiques", "run/critiques"], "refinements is missing"),
    (["data", "filter_critiques", "--mode", "odd"], "mode must be one of soft, hard, both, none"),
    (["data", "best_refinements", "--kinds", "[odd]"], "kinds must be some of refine, solve and critique"),
    (["search", "run", "--strategy", "corrections", "--settings", json.dumps({"gate": "wrong"})], "gate wrong needs a critic"),
    (["search", "run", "--strategy", "corrections", "--settings", json.dumps({"gate": "odd"})], "gate must be one of always"),
    (["eval", "correction"], "sources is missing"),
    (["eval", "correction", "--sources", json.dumps({"a": 3}), "--config", "task.yaml"], "expected a folder or a list of folders"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_sentence(
    made: Path, refused: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(made.parent)
    Path("task.yaml").write_text(yaml.safe_dump({"task": TASK}))
    Path("q.jsonl").write_text('{"question": "1 + 1?", "answer": "2"}\n')
    assert message in refused(*arguments, "--out", tmp_path / "out")
