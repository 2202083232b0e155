"""Repeated stages: what they stand for, what runs again, and mistakes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.basics import UserError, read_json
from stepladder.launch.cli import main
from stepladder.launch.pipeline import load_recipe, plan
from stepladder.launch.rounds import expand

RECIPE: dict[str, Any] = yaml.safe_load("""
name: rounds
seed: 5
defaults: {task: {kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 24, dev: 5, test: 10}}, max_new_tokens: 64}
stages:
  policy: {do: model.copy, source: lab}
  rounds:
    repeat: 2
    first: {improved: "@policy"}
    stages:
      samples: {do: data.solutions, policy: "@previous/improved", samples: 4}
      chosen: {do: data.best_solutions, solutions: "@samples"}
      improved: {do: train.sft, model: "@policy", rows: "@chosen", max_steps: 1, per_device_train_batch_size: 8}
  greedy: {do: data.solutions, policy: "@improved", split: test, samples: 1, temperature: 0}
  before: {do: data.solutions, policy: "@improved-1", split: test, samples: 1, temperature: 0}
  answers: {do: eval.policies, policies: {last: {greedy: "@greedy"}, first: {greedy: "@before"}}}
  report: {do: report, results: ["@answers"], title: "after {round}"}
""")


def changed(**over: Any) -> dict[str, Any]:
    recipe = copy.deepcopy(RECIPE)
    recipe["stages"]["rounds"].update(over)
    return recipe


def test_a_block_stands_for_its_stages_written_out(tmp_path: Path) -> None:
    planned = plan(RECIPE, tmp_path, "r")
    at = lambda name: str(tmp_path / name)
    assert list(planned) == [
        "policy", "samples-1", "chosen-1", "improved-1", "samples-2", "chosen-2", "improved-2", "greedy", "before", "answers",
        "report",
    ]  # fmt: skip
    values = {name: config for name, (_, config) in planned.items()}
    assert values["samples-1"]["policy"] == at("policy")
    assert values["samples-2"]["policy"] == at("improved-1")
    assert [values[f"chosen-{n}"]["solutions"] for n in (1, 2)] == [at("samples-1"), at("samples-2")]
    assert [values[f"improved-{n}"]["model"] for n in (1, 2)] == [at("policy")] * 2
    assert values["greedy"]["policy"] == at("improved-2")
    assert values["before"]["policy"] == at("improved-1")
    assert values["report"]["title"] == "after {round}"  # outside of a block it is text
    # Every round has a seed of its own, and the stages of one round have the same.
    assert values["samples-1"]["seed"] == values["chosen-1"]["seed"] != values["samples-2"]["seed"]
    assert values["greedy"]["seed"] == 5
    other = {name: config for name, (_, config) in plan({**RECIPE, "seed": 6}, tmp_path, "r").items()}
    assert other["samples-1"]["seed"] != values["samples-1"]["seed"]


def test_the_number_of_the_round_and_files_of_stages(tmp_path: Path) -> None:
    stages = {
        "start": {"do": "model.copy"},
        "loop": {
            "repeat": 2,
            "first": {"b": "@start"},
            "stages": {"a": {"x": ["@previous/b/config.json", "{round} of {prompt}"]}, "b": {"y": "@a/rows.parquet"}},
        },
        "end": {"z": {"w": "@b/file"}},
    }
    assert [(name, values) for name, values, _ in expand(stages, "r")] == [
        ("start", {"do": "model.copy"}),
        ("a-1", {"x": ["@start/config.json", "1 of {prompt}"]}),
        ("b-1", {"y": "@a-1/rows.parquet"}),
        ("a-2", {"x": ["@b-1/config.json", "2 of {prompt}"]}),
        ("b-2", {"y": "@a-2/rows.parquet"}),
        ("end", {"z": {"w": "@b-2/file"}}),
    ]


def test_more_rounds_keep_those_that_are_done(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    command = ["run", str(path), "--out", str(tmp_path / "run"), "samples.samples=6"]
    main([*command, "rounds.repeat=1", "before.policy=@improved"])
    samples = read_json(tmp_path / "run" / "samples-1" / "rows.json")
    assert samples["rows"] == 24 * 6  # an override reaches a stage of a block by its name
    capsys.readouterr()
    main(command)
    said = capsys.readouterr().out
    for name in ("policy", "samples-1", "chosen-1", "improved-1", "before"):
        assert f"{name}: already there" in said
    for name in ("samples-2", "improved-2"):
        assert f"{name}: done" in said
    assert "greedy: its inputs or settings changed" in said  # it is that of the last round
    main(command)
    assert capsys.readouterr().out.count("already there") == 11


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"repeat": 0}, "r, rounds: repeat must be a whole number of 1 or more, found 0"),
        ({"repeat": True}, "repeat must be a whole number"),
        ({"stages": {}}, "r, rounds: stages is missing"),
        ({"first": {}}, "rounds, stage samples: @previous/improved is nothing in the first round; say `first: {improved: ...}`"),
        ({"first": {"improvd": "@policy"}}, "did you mean improved"),
        ({"first": {"improved": 3}}, "first must say for a stage what it is before the first round"),
        ({"until": 3}, "unknown key 'until'"),
        ({"stages": {"samples": {"do": "data.solutions", "policy": "@previous/improve"}}, "first": {}}, "the round before"),
        ({"stages": {"policy": {"do": "model.copy"}}, "first": {}}, "two stages are called policy"),
        ({"stages": {"samples": {"do": "data.solutions", "policy": "@later"}}, "first": {}}, "unknown reference '@later'"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(tmp_path: Path, over: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        plan(changed(**over), tmp_path, "r")
    assert message in str(told.value)


def test_an_override_of_what_is_not_there_names_the_stages_of_blocks(tmp_path: Path) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    with pytest.raises(UserError, match="did you mean samples"):
        load_recipe(path, {"sample": {"samples": 3}})
