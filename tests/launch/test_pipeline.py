"""Recipes: what runs, what is skipped, what runs again, and that two runs of one recipe give the same results."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.basics import UserError, read_json, write_json
from stepladder.config import option
from stepladder.launch import stages
from stepladder.launch.cli import main
from stepladder.launch.pipeline import load_recipe, plan, run_recipe

QUICKSTART = Path(stages.__file__).parents[1] / "recipes" / "quickstart.yaml"
STAGES = list(yaml.safe_load(QUICKSTART.read_text())["stages"])
ARMS = (
    "greedy", "sample", "pass@4", "majority@4", "best_of_4_orm", "best_of_4_prm", "weighted_best_of_4_orm",
    "weighted_best_of_4_prm", "beam_4_prm", "weighted_beam_4_prm",
)  # fmt: skip


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_json(run / "results.json")]


def heads(text: str) -> dict[str, str]:
    """Stage -> what the run said about it first."""
    found: dict[str, str] = {}
    for name, said in re.findall(r"^\[\d+/\d+\] (\w+)(?:: | )(.*)$", text, re.MULTILINE):
        found.setdefault(name, said)
    return found


# --- a whole run ---------------------------------------------------------------------------------------------------------


def test_results_have_every_arm_of_both_policies_with_all_fields(tiny_run: Path) -> None:
    records = read_json(tiny_run / "results.json")
    for record in records:
        assert list(record) == ["arm", "metric", "value", "ci", "n", "tokens", "flops", "seconds", "seed"]
    accuracy = {r["arm"]: r for r in records if r["metric"] == "accuracy"}
    assert set(accuracy) == {f"{policy}/{arm}" for policy in ("base", "improved") for arm in ARMS}
    for name, record in accuracy.items():
        low, high = record["ci"]
        assert 0 <= low <= record["value"] <= high <= 1, name
        assert (record["n"], record["seed"]) == (20, 0)
        assert record["tokens"] > 0
        assert record["flops"] > 0
        assert record["seconds"] > 0
    assert accuracy["base/pass@4"]["value"] >= max(
        accuracy[f"base/{a}"]["value"] for a in ARMS if "of_4" in a or "majority" in a
    )
    # A reward model that chooses costs FLOPs, and no policy tokens.
    assert accuracy["base/best_of_4_prm"]["tokens"] == accuracy["base/majority@4"]["tokens"]
    assert accuracy["base/best_of_4_prm"]["flops"] > accuracy["base/majority@4"]["flops"]
    gains = {r["arm"] for r in records if r["metric"] == "accuracy_minus_base"}
    assert gains == {f"improved/{arm}" for arm in ARMS}
    measured = {(r["arm"], r["metric"]) for r in records}
    assert {
        ("prm", "step_auroc"),
        ("prm", "first_error_f1"),
        ("labels", "label_false_positive_closed_form"),
    } <= measured


def test_the_recorded_cost_is_that_of_the_rows(tiny_run: Path) -> None:
    accuracy = {r["arm"]: r for r in read_json(tiny_run / "results.json") if r["metric"] == "accuracy"}
    for policy in ("base", "improved"):
        for kind, arm in (("greedy", "greedy"), ("samples", "majority@4"), ("beam", "beam_4_prm")):
            ledger = read_json(tiny_run / f"{policy}_{kind}" / "rows.json")["ledger"]
            assert accuracy[f"{policy}/{arm}"]["tokens"] == ledger["generated_tokens"]


class Loads(HTMLParser):
    """Every attribute of a page that makes a browser fetch something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "srcset", "href", "data", "poster", "action") and not (value or "").startswith(
                ("#", "data:")
            ):
                self.found.append(f"{tag} {name}={value}")


def test_the_report_asks_nothing_of_the_network(tiny_run: Path) -> None:
    page = (tiny_run / "report.html").read_text()
    loads = Loads()
    loads.feed(page)
    assert loads.found == []
    assert not re.search(r"@import|url\((?!['\"]?(?:#|data:))", page)
    assert "beam_4_prm" in page
    assert "stepladder" in page


def test_the_report_names_arms_as_the_results_do(tiny_run: Path) -> None:
    arms = {r["arm"].partition("/")[2] for r in read_json(tiny_run / "results.json") if r["metric"] == "accuracy"}
    shown = {arm for s in read_json(tiny_run / "answers" / "details.json")["solutions"] for arm in s["selected_by"]}
    assert shown == {"greedy", "majority@4", "best_of_4_orm", "best_of_4_prm", "beam_4_prm"}
    assert shown <= arms


def test_the_manifest_says_how_it_was_made(tiny_run: Path) -> None:
    manifest = read_json(tiny_run / "manifest.json")
    assert manifest["config"]["stages"]["solutions"]["samples"] == 4
    assert {"torch", "transformers", "trl"} <= set(manifest["versions"])
    assert manifest["config"]["seed"] == 0


def test_the_same_seed_in_another_folder_gives_the_same_results(
    tiny_run: Path, tiny_recipe: list[str], starter: Any, tmp_path: Path
) -> None:
    ended = starter("stepladder", "run", QUICKSTART, "--out", "elsewhere", "--seed", "0", *tiny_recipe, folder=tmp_path)
    assert ended.status == 0, ended.err
    assert "\nresults: elsewhere/results.json\nreport:  elsewhere/report.html\n" in ended.out
    tables = ended.out.partition("\naccuracy, %")[2].splitlines()
    assert len(tables) > 30
    assert max(len(line) for line in tables) <= 100
    assert without_seconds(tmp_path / "elsewhere") == without_seconds(tiny_run)
    for stage in ("orm", "prm", "improved"):
        weights = [run / stage / "model.safetensors" for run in (tiny_run, tmp_path / "elsewhere")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_finished_run_is_skipped_wherever_it_was_moved_to(
    tiny_run: Path, tiny_recipe: list[str], tmp_path: Path, capsys: Any
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(tiny_run, moved)
    before = {p: p.read_bytes() for p in moved.rglob("*") if p.is_file() and p.name != "manifest.json"}
    main(["quickstart", "--out", str(moved), *tiny_recipe])
    said = heads(capsys.readouterr().out)
    assert list(said) == STAGES
    assert set(said.values()) == {"already there, inputs unchanged"}
    assert {p: p.read_bytes() for p in moved.rglob("*") if p.is_file() and p.name != "manifest.json"} == before


def test_a_changed_setting_runs_its_stage_and_those_behind_it_again(
    tiny_run: Path, tiny_recipe: list[str], tmp_path: Path, capsys: Any
) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(tiny_run, changed)
    main(["quickstart", "--out", str(changed), *tiny_recipe, "base_beam.width=1"])
    said = heads(capsys.readouterr().out)
    again = {name for name, what in said.items() if what != "already there, inputs unchanged"}
    assert again == {"base_beam", "answers", "report"}
    for name in again:
        assert said[name] == f"its inputs or settings changed; what was there is kept in {name}.old-1"
    kept = changed / "base_beam.old-1" / "rows.parquet"
    assert kept.read_bytes() == (tiny_run / "base_beam" / "rows.parquet").read_bytes()
    assert (changed / "base_beam" / "rows.parquet").read_bytes() != kept.read_bytes()
    results = {r["arm"]: r["tokens"] for r in read_json(changed / "results.json") if r["metric"] == "accuracy"}
    ledger = read_json(changed / "base_beam" / "rows.json")["ledger"]
    assert results["base/beam_4_prm"] == ledger["generated_tokens"]


# --- toy stages ----------------------------------------------------------------------------------------------------------


@dataclass
class Toy:
    """Copies a number."""

    number: int = option(0, "a number")
    text: str = option("", "a text or a path")
    seed: int = option(0, "seed")
    device: str = option("auto", "where")
    shard: str = option("", "i/n")


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes `toy` a stage; returns the names of the folders it ran in, in order."""
    ran: list[str] = []

    def work(config: Toy, out: Path) -> Any:
        ran.append(out.name)
        if config.number == 13:
            raise UserError("13 is refused")
        write_json(out / "made.json", [config.number, config.seed])
        return config.shard != "0/2"

    monkeypatch.setitem(stages.STAGES, "toy", (Toy, work))
    return ran


def recipe(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


CHAIN = """
seed: 3
stages:
  one: {do: toy, number: 1}
  two: {do: toy, number: 2, text: "@one/made.json"}
  three: {do: toy, number: 3}
  four: {do: toy, text: "@two"}
"""


def run(path: Path, out: Path | str, *overrides: str) -> None:
    main(["run", str(path), "--out", str(out), *overrides])


def test_stages_run_in_order_with_the_seed_of_the_recipe(tmp_path: Path, toy: list[str]) -> None:
    run(recipe(tmp_path / "r.yaml", CHAIN), tmp_path / "out")
    assert toy == ["one", "two", "three", "four"]
    assert read_json(tmp_path / "out" / "two" / "made.json") == [2, 3]


@pytest.mark.parametrize(
    ("override", "again"),
    [
        ("one.number=7", ["one", "two", "four"]),
        ("two.number=7", ["two", "four"]),
        ("three.number=7", ["three"]),
        ("seed=4", ["one", "two", "three", "four"]),
        ("one.seed=4", ["one", "two", "four"]),
        ("two.device=cpu", []),  # where a stage runs does not change what it makes
        ("two.shard=0/1", []),
    ],
)
def test_what_runs_again(tmp_path: Path, toy: list[str], override: str, again: list[str]) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN)
    run(path, tmp_path / "out")
    toy.clear()
    run(path, tmp_path / "out", override)
    assert toy == again
    for name in again:
        assert (tmp_path / "out" / f"{name}.old-1" / "made.json").is_file()
    toy.clear()
    run(path, tmp_path / "out", override)
    assert toy == []


def test_going_back_keeps_every_older_folder(tmp_path: Path, toy: list[str]) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN)
    for number in (7, 8, 9):
        run(path, tmp_path / "out", f"three.number={number}")
    kept = {p.name: read_json(p / "made.json")[0] for p in (tmp_path / "out").glob("three*")}
    assert kept == {"three": 9, "three.old-1": 7, "three.old-2": 8}


def test_the_content_of_an_input_file_counts_and_not_its_name_or_date(tmp_path: Path, toy: list[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("1\n")
    path = recipe(tmp_path / "r.yaml", f"stages: {{one: {{do: toy, text: {data}}}}}")
    run(path, tmp_path / "out")
    data.write_text("1\n")
    run(path, tmp_path / "out")
    assert toy == ["one"]
    data.write_text("2\n")
    run(path, tmp_path / "out")
    assert toy == ["one", "one"]


@pytest.mark.parametrize("text", ["Solve it. " * 60, "See p. 3/4. " * 60, "a/" * 3000, "x\u0000/y", "name.with.dots"])
def test_a_text_that_is_no_path_is_not_taken_for_one(tmp_path: Path, toy: list[str], text: str) -> None:
    made = {"stages": {"one": {"do": "toy", "text": text}}}
    run_recipe(made, tmp_path / "out", "test")
    run_recipe(made, tmp_path / "out", "test")
    assert toy == ["one"]


def test_the_current_folder_can_be_the_run(tmp_path: Path, toy: list[str]) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN.replace("number: 3", "text: transformers"))
    with contextlib.chdir(tmp_path):
        run(path, ".")
        run(path, ".")
    assert toy == ["one", "two", "three", "four"]
    assert (tmp_path / "three" / "done.json").is_file()


def test_a_stage_that_failed_goes_on_in_its_folder(tmp_path: Path, toy: list[str], refused: Callable[..., str]) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN)
    assert refused("run", path, "--out", tmp_path / "out", "two.number=13") == "13 is refused"
    (tmp_path / "out" / "two" / "half").touch()
    refused("run", path, "--out", tmp_path / "out", "two.number=13")
    assert toy == ["one", "two", "two"]
    assert (tmp_path / "out" / "two" / "half").is_file()
    run(path, tmp_path / "out")
    assert (tmp_path / "out" / "two.old-1" / "half").is_file()
    assert not (tmp_path / "out" / "two" / "half").exists()


def test_a_share_waits_for_the_others(tmp_path: Path, toy: list[str], refused: Callable[..., str]) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN)
    told = refused("run", path, "--out", tmp_path / "out", "two.shard=0/2")
    assert told == f"{tmp_path / 'out' / 'two'}: other shards are not finished yet; run this again when they are"
    assert not (tmp_path / "out" / "two" / "done.json").exists()
    run(path, tmp_path / "out", "two.shard=1/2")  # the last share finishes, and the run goes on
    assert toy == ["one", "two", "two", "three", "four"]


class Killed(BaseException):
    """What a kill is to a process, in process."""


def test_a_kill_at_any_write_of_the_pipeline(tmp_path: Path, toy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path / "r.yaml", CHAIN)
    run(path, tmp_path / "whole")
    wanted = {p.relative_to(tmp_path / "whole"): p.read_bytes() for p in (tmp_path / "whole").rglob("made.json")}
    from stepladder import basics

    replace = basics.os.replace
    for last in range(100):
        left = last

        def until_killed(*paths: Any) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            replace(*paths)

        monkeypatch.setattr(basics.os, "replace", until_killed)
        out = tmp_path / f"killed-{last}"
        try:
            run(path, out)
        except Killed:
            monkeypatch.setattr(basics.os, "replace", replace)
            run(path, out)
            assert {p.relative_to(out): p.read_bytes() for p in out.rglob("made.json")} == wanted
            assert not list(out.glob("*.old-*"))
        else:
            break
    assert last == 1 + 4 * 3  # the manifest; started.json, made.json and done.json of each stage


# --- recipes -------------------------------------------------------------------------------------------------------------


def test_overrides_reach_stages_and_merge_mappings(tmp_path: Path) -> None:
    text = "seed: 1\ndefaults: {task: {kind: chain, p: 11}}\nstages: {one: {do: toy, task: {p: 5}}}"
    loaded = load_recipe(
        recipe(tmp_path / "r.yaml", text), {"one": {"task": {"seed": 2}}, "seed": 9, "defaults": {"task": {"p": 7}}}
    )
    assert loaded["stages"]["one"] == {"do": "toy", "task": {"p": 5, "seed": 2}}
    assert (loaded["seed"], loaded["defaults"]) == (9, {"task": {"kind": "chain", "p": 7}})


def test_defaults_go_to_the_stages_that_have_the_field(tmp_path: Path) -> None:
    made = {
        "seed": 5,
        "defaults": {"task": {"kind": "chain", "p": 7}, "temperature": 0.5},
        "stages": {
            "a": {"do": "data.demonstrations", "task": {"p": 5}},
            "b": {"do": "data.solutions", "policy": "@a", "seed": 1},
            "c": {"do": "model.copy"},
        },
    }
    planned = plan(made, tmp_path, "test")
    assert planned["a"] == ("data.demonstrations", {"task": {"kind": "chain", "p": 5}, "seed": 5})
    assert planned["b"][1] == {
        "task": {"kind": "chain", "p": 7}, "temperature": 0.5, "seed": 1, "policy": str(tmp_path / "a"),
    }  # fmt: skip
    assert planned["c"][1] == {}


def test_every_recipe_of_the_package_is_planned(tmp_path: Path) -> None:
    paths = sorted(QUICKSTART.parent.glob("*.yaml"))
    assert len(paths) >= 2
    for path in paths:
        assert plan(load_recipe(path, {}), tmp_path, str(path))
        first = path.read_text().splitlines()[0]
        assert first.startswith(f"# stepladder run recipes/{path.name} "), "the first line is the command"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("stages: {}", "stages is missing: a recipe names its stages there"),
        ("stages: {a: {number: 1}}", "stage a: do is missing"),
        ("stages: {a: 3}", "stage a: do is missing"),
        ("stages: {a: {do: toi}}", "stage a: do: unknown kind 'toi'; did you mean toy?"),
        ("stages: {a: {do: toy, numbr: 1}}", "stage a: unknown key 'numbr'; did you mean number?"),
        ("stages: {a: {do: toy, number: one}}", "stage a: number must be a whole number, found 'one' (str)"),
        ("stages: {a: {do: toy, text: '@b'}, b: {do: toy}}", "unknown reference '@b'"),
        ("stages: {ab: {do: toy}, b: {do: toy, text: '@abc'}}", "unknown reference '@abc'; did you mean @ab?"),
        ("steges: {a: {do: toy}}", "unknown key 'steges'; did you mean stages?"),
        (
            "defaults: {nmber: 1}\nstages: {a: {do: toy}}",
            "nmber is set for all stages, but no stage has a field of that",
        ),
        ("stages: {a: {do: toy}, a: {do: toy}}", "line 1: not valid YAML (key 'a' is given twice)"),
        ("stages: [a, b]", "stages is missing"),
        ("defaults: 3\nstages: {a: {do: toy}}", "defaults must be keys and values"),
        ("- a\n- b", "expected keys and values, found list"),
        ("", "expected keys and values, found nothing"),
        ("stages: {a: {do: toy}", "not valid YAML"),
    ],
)
def test_a_recipe_that_cannot_be_run(
    tmp_path: Path, toy: list[str], refused: Callable[..., str], text: str, told: str
) -> None:
    path = recipe(tmp_path / "r.yaml", text)
    error = refused("run", path, "--out", tmp_path / "out")
    assert error.startswith(str(path))
    assert told in error
    assert not (tmp_path / "out").exists(), "nothing is made before the whole recipe was checked"


def test_results_and_details_are_json_that_any_reader_takes(tiny_run: Path) -> None:
    refuse = lambda name: pytest.fail(f"{name} is no JSON")
    for path in [tiny_run / "results.json", *tiny_run.glob("*/details.json")]:
        json.loads(path.read_text(), parse_constant=refuse)
