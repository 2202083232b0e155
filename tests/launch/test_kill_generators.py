"""kill -9 in every stage that makes rows from a policy: two shards go on, and their rows are those of a run left alone."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.data_gen.store import read_about
from stepladder.launch.cli import main
from stepladder.launch.options import WithPolicy
from stepladder.launch.pipeline import run_recipe
from stepladder.launch.stages import STAGES

TASK = {"kind": "chain", "p": 7, "min_steps": 3, "max_steps": 4, "sizes": {"train": 16, "dev": 2, "test": 8}}
INPUTS = """
policy: {do: model.copy, source: lab, correction_words: true}
solutions: {do: data.solutions, policy: "@policy", samples: 3}
critiques: {do: data.critiques, solutions: "@solutions", rg2: 1, rg3: 1, corrupt: 0.3}
labels: {do: data.step_labels, policy: "@policy", solutions: "@solutions", rollouts: 2, limit: 4}
refined: {do: data.refinements, policy: "@policy", critiques: "@critiques", repair: true}
rewards: {do: train.prm, model: "@policy", rows: "@labels", max_steps: 1, per_device_train_batch_size: 8, use_cpu: true}
"""
SOLUTIONS, CRITIQUES = {"solutions": "run/solutions"}, {"critiques": "run/critiques"}
# What each generator reads, and settings that make it small. One problem a unit, so that a kill falls between two units.
GENERATORS: dict[str, dict[str, Any]] = {
    "data.solutions": {"samples": 3},
    "data.step_labels": {**SOLUTIONS, "rollouts": 2},
    "data.omegaprm": {"rollouts": 4, "filter_rollouts": 8, "search_limit": 4},
    "data.best_first": {"candidates": 3, "completions": 4},
    "data.first_pit": {"seeds": 4, "probes": 2, "pits": 2, "rollouts": 4},
    "data.mcts": {"simulations": 6, "width": 3, "value": "run/rewards"},
    "data.step_pairs": {**SOLUTIONS, "rollouts": 4},
    "data.mcts_dpo": {"value": "rollouts", "iterations": 2, "candidates": 2, "evaluations": 2},
    # Written by rule, in no time: more of them, or the kill would come too late.
    "data.critiques": {**SOLUTIONS, "rg2": 1, "rg3": 1, "corrupt": 0.3, "wording": "lab", "limit": 12},
    "data.refinements": {**CRITIQUES, "samples": 2, "wording": "lab"},
    "data.local_refinements": {"labels": "run/labels", "samples": 4, "wording": "lab"},
    "data.self_talk": {"refinements": "run/refined", "template": "{draft}\n{refinement}"},
    "data.rise": {"best_of": 2, "wording": "lab"},
    "data.inline_corrections": {**SOLUTIONS, "positions": 0},
    "search.run": {"strategy": "beam", "settings": {"beams": 4, "width": 2}, "reward": "run/rewards", "split": "train"},
}


def test_every_generator_is_here() -> None:
    # search.beam is search.run by another name, and search.compare runs it in folders.
    units = {
        name for name, (config, _) in STAGES.items() if isinstance(config, type) and issubclass(config, WithPolicy)
    }
    assert units - {"search.beam", "search.compare"} == set(GENERATORS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the generators read."""
    made = tmp_path_factory.mktemp("generators")
    with contextlib.chdir(made):
        defaults = {"task": TASK, "max_new_tokens": 40, "wording": "lab"}
        run_recipe({"seed": 0, "defaults": defaults, "stages": yaml.safe_load(INPUTS)}, Path("run"), "r")
    return made


@pytest.mark.parametrize("stage", GENERATORS)
def test_kill_9_in_a_generator(stage: str, folder: Path, starter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    settings = {
        "task": TASK, "policy": "run/policy", "max_new_tokens": 40, "limit": 3, "unit_problems": 1, **GENERATORS[stage]
    }  # fmt: skip
    config = Path(f"{stage}.yaml")
    config.write_text(json.dumps(settings))
    whole, killed = Path(f"{stage}.whole"), Path(f"{stage}.killed")
    command = [*stage.split("."), "--config", str(config), "--out"]
    main([*command, str(whole)])

    part = folder / killed / "part-00000-of-00001.jsonl"
    committed = lambda: part.exists() and b'"ledger"' in part.read_bytes()
    ended = starter("stepladder", *command, str(killed), folder=folder, kill=committed)
    assert ended.status == -9, ended.err
    assert not (killed / "rows.parquet").exists()
    with part.open("ab") as file:
        file.write(b'{"row": {"problem_id": "ch')  # as if the kill had come in the middle of a write
    for shard in ("1/2", "0/2"):  # and two go on where one was killed
        main([*command, str(killed), "--shard", shard])
    for name in ("rows.parquet", *(path.name for path in whole.glob("search.jsonl"))):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    about = [read_about(out) for out in (whole, killed)]
    for one in about:
        one["ledger"].pop("seconds")
    assert about[0] == about[1]
    assert about[0]["rows"] > 0
