"""The stages that grow trees: shards and what is read out of them, on the policy that ships with the package."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import read_json
from stepladder.data_gen import first_pit, mcts, mcts_dpo, omegaprm
from stepladder.data_gen.rows import Pair, StepLabels, Tree
from stepladder.data_gen.store import read_about, read_rows
from stepladder.launch import options_data, options_preferences, stages
from stepladder.launch.cli import main
from stepladder.launch.options import settings_of
from stepladder.models.loading import load_tokenizer
from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat

LAB = str(Path(stages.__file__).parents[1] / "models" / "lab_policy")
TASK = json.dumps({"kind": "chain", "p": 7, "min_steps": 4, "max_steps": 6, "sizes": {"train": 40, "test": 20}})
MADE: dict[str, tuple[type, list[str]]] = {
    "omegaprm": (Tree, ["--rollouts", "4", "--filter_rollouts", "8", "--search_limit", "4"]),
    "best_first": (Tree, ["--candidates", "3", "--completions", "4"]),
    "first_pit": (StepLabels, ["--seeds", "4", "--probes", "2", "--pits", "2", "--rollouts", "4"]),
    "mcts": (Tree, ["--simulations", "6", "--width", "3", "--trees", "2"]),
}


def command(stage: str, out: Path, *more: str, limit: int = 6) -> list[str]:
    return [
        "data", stage, "--policy", LAB, "--task", TASK, "--out", str(out), "--limit", str(limit), "--unit_problems", "2",
        "--max_new_tokens", "64", *MADE[stage][1], *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_scorer: Any) -> dict[str, Path]:
    """Finished rows of each stage, uninterrupted; the search has a random value model."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = load_tokenizer(LAB)
    RewardModel(tiny_scorer(tokenizer), tokenizer, StepFormat.load(LAB).for_reward("scalar", "value")).save(
        folder / "value"
    )
    MADE["mcts"][1].extend(["--value", str(folder / "value")])
    for stage in MADE:
        main(command(stage, folder / stage))
    return {stage: folder / stage for stage in MADE}


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        (omegaprm.Options, options_data.OmegaPRMTrees),
        (mcts.Options, options_data.MCTSTrees),
        (first_pit.Options, options_data.FirstPit),
        (mcts_dpo.Options, options_preferences.MCTSDPOTrees),
    ],
)
def test_the_settings_of_a_search_are_the_fields_of_its_stage(settings: type, config: type) -> None:
    assert settings_of(settings, config()) == settings()  # one default, wherever it is looked up
    chosen = next(f.name for f in dataclasses.fields(settings) if type(f.default) is int)
    assert getattr(settings_of(settings, config(**{chosen: 3})), chosen) == 3


@pytest.mark.parametrize("stage", MADE)
def test_shards_together_are_the_whole(stage: str, whole: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for shard in ("1/2", "0/2"):
        main(command(stage, tmp_path / "out", "--shard", shard))
    assert (tmp_path / "out" / "rows.parquet").read_bytes() == (whole[stage] / "rows.parquet").read_bytes()
    assert "this shard is done; others are still missing" in capsys.readouterr().out


def test_what_is_lost_is_told(whole: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    for stage in MADE:
        about = read_about(whole[stage])
        assert about["counts"]["policy calls"] > 0
    about = read_about(whole["omegaprm"])
    assert about["rows"] + sum(about["dropped"].values()) == 6
    rows = read_rows(whole["first_pit"], StepLabels)
    assert all(row.n_rollouts[0] == 4 for row in rows)
    assert (whole["omegaprm"] / "step_format.json").is_file()


def test_labels_pairs_and_sorm_rows_out_of_trees(whole: dict[str, Path], tmp_path: Path, capsys: Any) -> None:
    trees = read_rows(whole["best_first"], Tree)
    main(["data", "tree_labels", "--trees", str(whole["best_first"]), "--out", str(tmp_path / "labels")])
    labels = read_rows(tmp_path / "labels", StepLabels)
    judged = sum(n.n_rollouts > 0 for tree in trees for n in tree.nodes[1:])
    given = sum(n > 0 for row in labels for n in row.n_rollouts[1:])
    about = read_about(tmp_path / "labels")
    assert given == about["counts"]["step labels"]
    assert given + about["dropped"].get("ends of edges of several steps", 0) == judged
    main(["data", "tree_pairs", "--trees", str(whole["best_first"]), "--out", str(tmp_path / "pairs"),
          "--margin", "0.25", "--whole_paths", "true", "--per_problem", "2"])  # fmt: skip
    pairs = read_rows(tmp_path / "pairs", Pair)
    assert all(pair.reward_chosen - pair.reward_rejected >= 0.25 for pair in pairs)
    main(["data", "sorm", "--labels", str(tmp_path / "labels"), "--out", str(tmp_path / "sorm")])
    sorm = read_rows(tmp_path / "sorm", StepLabels)
    counts = read_about(tmp_path / "sorm")["counts"]
    assert counts["positive labels"] == counts["negative labels"] == sum(sum(row.n_correct[1:]) for row in sorm) > 0
    for made in ("labels", "pairs", "sorm"):
        assert (tmp_path / made / "step_format.json").read_bytes() == (
            whole["best_first"] / "step_format.json"
        ).read_bytes()
        assert read_json(tmp_path / made / "started.json")


def test_paths_and_balanced_labels(whole: dict[str, Path], tmp_path: Path) -> None:
    trees = read_rows(whole["mcts"], Tree)
    assert len(trees) == 12
    assert read_about(whole["mcts"])["ledger"]["reward_tokens"] > 0
    values = {n.value for tree in trees for n in tree.nodes if n.value is not None}
    assert len(values) > 20
    main(["data", "value_paths", "--trees", str(whole["mcts"]), "--out", str(tmp_path / "paths"), "--wrong", "2"])
    paths = read_rows(tmp_path / "paths", Tree)
    about = read_about(tmp_path / "paths")
    right = sum(path.nodes[-1].outcome == "right" for path in paths)
    assert about["counts"] == {"right solutions": right, "other solutions": len(paths) - right}
    finished = sum(n.outcome is not None for tree in trees for n in tree.nodes)
    assert len(paths) + about["dropped"]["duplicates, and solutions beyond the limit a problem"] == finished
    main(["train", "value", "--model", LAB, "--rows", str(tmp_path / "paths"), "--out", str(tmp_path / "trained"),
          "--max_steps", "2", "--per_device_train_batch_size", "4"])  # fmt: skip
    # What was trained grows the next round's trees: a policy and its value model.
    main([
        "data", "mcts", "--policy", str(tmp_path / "trained"), "--value", str(tmp_path / "trained" / "value"),
        "--task", TASK, "--out", str(tmp_path / "next"), "--limit", "1", "--simulations", "3", "--max_new_tokens", "64",
    ])  # fmt: skip
    assert read_rows(tmp_path / "next", Tree)[0].source.policy == str(tmp_path / "trained")
    main(["data", "balance", "--labels", str(whole["first_pit"]), "--out", str(tmp_path / "even")])
    counts = [(r.n_correct, r.n_rollouts) for r in read_rows(tmp_path / "even", StepLabels)]
    shares = [c / n for right, rollouts in counts for c, n in zip(right[1:], rollouts[1:], strict=True) if n]
    assert sum(s >= 0.5 for s in shares) == sum(s < 0.5 for s in shares) > 0
    assert read_about(tmp_path / "even")["counts"]["labels kept"] == len(shares)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["data", "tree_labels", "--out", "out"], "trees is missing"),
        (["data", "sorm", "--labels", "nowhere", "--out", "out"], "nowhere: no such file"),
        (["data", "tree_pairs", "--trees", "x", "--margin", "2", "--out", "out"], "margin must lie in (0, 1], found 2"),
        (["data", "omegaprm", "--alpha", "0", "--out", "out"], "alpha and beta must lie in (0, 1]"),
        (["data", "mcts", "--simulations", "0", "--out", "out"], "simulations must be 1 or more, found 0"),
        (
            ["data", "mcts", "--value", LAB, "--policy", LAB, "--task", TASK, "--out", "out"],
            "it is a policy and not a reward",
        ),
        (["data", "value_paths", "--out", "out"], "trees is missing"),
        (
            ["data", "balance", "--labels", "x", "--threshold", "0", "--out", "out"],
            "threshold must lie in (0, 1], found 0",
        ),
        (["data", "tree_labels", "--trees", "x", "--flip", "2", "--out", "out"], "flip must lie in [0, 1], found 2"),
        (["data", "best_first", "--candidates", "1", "--out", "out"], "candidates must be 2 or more, found 1"),
        (["data", "first_pit", "--strategy", "greedy", "--out", "out"], "strategy must be one of first_pit, iid"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], told: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert told in refused(*arguments)
