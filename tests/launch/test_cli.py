"""The command line: every command once, small; help without waiting for torch."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder import __version__
from stepladder.basics import read_json, write_json
from stepladder.data_gen.rows import Dialogue, Solution, StepLabels
from stepladder.data_gen.store import read_about, read_rows
from stepladder.launch import cli, pipeline, stages
from stepladder.launch.cli import main
from stepladder.models.step_format import StepFormat

PACKAGE = Path(stages.__file__).parents[1]
LAB = str(PACKAGE / "models" / "lab_policy")
RECIPE = yaml.safe_load((PACKAGE / "recipes" / "quickstart.yaml").read_text())
TASK = {**RECIPE["defaults"]["task"], "sizes": {"train": 60, "dev": 10, "test": 20}}  # that of the tiny run


# --- help ----------------------------------------------------------------------------------------------------------------

_WITHOUT_TORCH = """
import sys
from stepladder.launch.cli import main
main(sys.argv[1:])
heavy = sorted({"torch", "transformers", "datasets", "accelerate", "trl", "pyarrow", "numpy"} & set(sys.modules))
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], [], ["--version"], ["data"], ["train", "--help"], ["data", "solutions", "--help"], ["search", "beam", "-h"],
     ["quickstart", "--help"], ["run", "--help"], ["plan", "--help"], ["solve", "--help"],
     ["serve", "--help"], ["export", "--help"], ["import-reward", "-h"]],
)  # fmt: skip
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, *arguments], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip()


def test_help_names_every_stage_that_can_be_run(capsys: Any) -> None:
    main(["--help"])
    said = capsys.readouterr().out
    for kind in stages.STAGES:
        group, _, name = kind.partition(".")
        if group in cli.GROUPS:
            # The names may go on in the lines below, up to the next command.
            listed = re.search(rf"^  {group} STAGE .*?\] +((?:.*\n(?:    .*\n)*))", said, re.MULTILINE)
            assert listed
            assert name in re.split(r"[,\s]+", listed[1])
    for group in cli.GROUPS:
        main([group])
        listed = capsys.readouterr().out
        assert all(
            name in listed for name in (k.removeprefix(f"{group}.") for k in stages.STAGES if k.startswith(group))
        )


@pytest.mark.parametrize("kind", [k for k in stages.STAGES if k.partition(".")[0] in cli.GROUPS])
def test_the_help_of_a_stage_lists_its_fields(kind: str, capsys: Any) -> None:
    group, _, name = kind.partition(".")
    main([group, name, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: stepladder {group} {name} --config FILE")
    classes = [c for c in stages.config_class(kind).__mro__ if c.__module__.startswith("stepladder")]
    own = [field for c in classes for field in vars(c).get("__annotations__", {})]
    assert own
    for field in own:
        assert f"\n  {field} (" in said


def test_the_version(capsys: Any) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"stepladder {__version__}\n"


def test_the_installed_command_and_the_module_are_the_same() -> None:
    ended = [
        subprocess.run(command, capture_output=True, text=True)
        for command in (["stepladder", "nothing"], [sys.executable, "-m", "stepladder", "nothing"])
    ]
    assert [e.returncode for e in ended] == [2, 2]
    assert ended[0].stderr == ended[1].stderr
    assert len(ended[0].stderr.splitlines()) == 1
    assert ended[0].stderr.startswith("error: stepladder: unknown command 'nothing'")


# --- stages by themselves ------------------------------------------------------------------------------------------------


def config(path: Path, **values: Any) -> str:
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_data_demonstrations(tmp_path: Path) -> None:
    main(["data", "demonstrations", "--out", str(tmp_path / "out"), "--task", json.dumps(TASK), "--limit", "5"])
    rows = read_rows(tmp_path / "out", Dialogue)
    assert [row.problem_id for row in rows] == [f"chain/train/{i:05d}" for i in range(5)]
    assert rows[0].messages[1].content.splitlines()[-1].startswith("Answer: ")


def test_data_solutions_from_a_file_and_overrides(tmp_path: Path) -> None:
    file = config(
        tmp_path / "s.yaml", task=TASK, policy=LAB, samples=5, limit=3, max_new_tokens=50, out=str(tmp_path / "unused")
    )
    main(["data", "solutions", "--config", file, "--samples", "2", "--out", str(tmp_path / "out"), "--seed=7"])
    rows = read_rows(tmp_path / "out", Solution)
    assert [(row.problem_id[-1], row.sample) for row in rows] == [(str(i), k) for i in range(3) for k in range(2)]
    assert {row.source.seed for row in rows} == {7}
    assert not (tmp_path / "unused").exists()
    assert StepFormat.load(tmp_path / "out") == StepFormat.load(LAB)
    main(["data", "solutions", "--config", file, "--samples", "2", "--seed", "7"])  # `out` may stand in the file
    assert (tmp_path / "unused" / "rows.parquet").read_bytes() == (tmp_path / "out" / "rows.parquet").read_bytes()
    main(["data", "solutions", "--config", file, "--samples=2", "--seed=8", f"--out={tmp_path / 'other'}"])
    assert [r.text for r in read_rows(tmp_path / "other", Solution)] != [r.text for r in rows]


def test_shards_together_are_the_whole(tmp_path: Path, capsys: Any) -> None:
    sharded, whole = tmp_path / "sharded", tmp_path / "whole"
    common = ["--task", json.dumps(TASK), "--policy", LAB, "--limit", "10", "--unit_problems", "3", "--samples", "2"]
    main(["data", "solutions", *common, "--out", str(whole)])
    for shard in ("2/3", "0/3"):
        main(["data", "solutions", *common, "--out", str(sharded), "--shard", shard])
        assert f"{sharded}: this shard is done; others are still missing" in capsys.readouterr().out
    assert not (sharded / "rows.parquet").exists()
    main(["data", "solutions", *common, "--out", str(sharded), "--shard", "1/3"])
    assert (sharded / "rows.parquet").read_bytes() == (whole / "rows.parquet").read_bytes()


def test_data_step_labels(tmp_path: Path, tiny_run: Path) -> None:
    main(["data", "step_labels", "--policy", LAB, "--solutions", str(tiny_run / "solutions"), "--task", json.dumps(TASK),
          "--limit", "2", "--per_problem", "1", "--rollouts", "3", "--max_new_tokens", "64",
          "--out", str(tmp_path / "out")])  # fmt: skip
    rows = read_rows(tmp_path / "out", StepLabels)
    assert len(rows) == 2
    for row in rows:
        assert row.n_rollouts == (3,) * len(row.steps) + (1,)
        assert row.first_error_known


def test_data_best_solutions(tmp_path: Path, tiny_run: Path) -> None:
    out = tmp_path / "out"
    main(
        ["data", "best_solutions", "--solutions", str(tiny_run / "solutions"), "--per_problem", "1", "--out", str(out)]
    )
    solutions = read_rows(tiny_run / "solutions", Solution)
    with_right = {row.problem_id for row in solutions if row.right}
    rows = read_rows(out, Dialogue)
    assert [row.problem_id for row in rows] == sorted(with_right)
    dropped = read_about(out)["dropped"]
    assert dropped["problems without a right solution"] == 40 - len(with_right)
    assert len(rows) + dropped["answers wrong"] + dropped.get("answers unparseable", 0) + dropped.get(
        "duplicates", 0
    ) + dropped.get("beyond the limit a problem", 0) == len(solutions)
    # Without a reward model the choice is drawn: another seed, another choice; the same one, the same bytes.
    made = {}
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}"
        main(["data", "best_solutions", "--solutions", str(tiny_run / "solutions"), "--per_problem", "1",
              "--seed", str(seed), "--out", str(folder)])  # fmt: skip
        made[seed] = (folder / "rows.parquet").read_bytes()
    assert made[0] == (out / "rows.parquet").read_bytes() != made[1]


def test_data_prm800k(tmp_path: Path) -> None:
    record = {
        "question": {"problem": "1 + 1?", "ground_truth_answer": "2"},
        "label": {
            "steps": [
                {"completions": [{"text": "One and one.", "rating": 1}], "chosen_completion": 0},
                {"completions": [{"text": "So 3.", "rating": -1}], "chosen_completion": None},
            ]
        },
    }
    with gzip.open(tmp_path / "labels.jsonl.gz", "wt") as file:
        file.write(json.dumps(record) + "\n")
    main(["data", "prm800k", "--file", str(tmp_path / "labels.jsonl.gz"), "--out", str(tmp_path / "out")])
    row, *_ = read_rows(tmp_path / "out", StepLabels)
    assert row.steps[0] == "One and one."
    assert row.label_source == "human"


SMALL = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--max_rows", "8", "--learning_rate", "1e-3"]


def test_train_sft(tmp_path: Path, tiny_run: Path) -> None:
    from transformers import AutoModelForCausalLM

    file = config(tmp_path / "sft.yaml", model=LAB, rows=str(tiny_run / "chosen"), output_dir=str(tmp_path / "unused"))
    main(["train", "sft", "--config", file, "--out", str(tmp_path / "out"), "--reduction", "token", *SMALL])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    start = AutoModelForCausalLM.from_pretrained(LAB).state_dict()
    assert any((trained[name] != start[name]).any() for name in start)
    assert StepFormat.load(tmp_path / "out") == StepFormat.load(LAB)
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize(("stage", "rows", "kind"), [("orm", "solutions", "outcome"), ("prm", "step_labels", "soft")])
def test_train_a_reward_model(tmp_path: Path, tiny_run: Path, stage: str, rows: str, kind: str) -> None:
    from stepladder.models.reward import RewardModel

    labels = ["--labels", "soft"] if stage == "prm" else []
    main(
        [
            "train",
            stage,
            "--model",
            LAB,
            "--rows",
            str(tiny_run / rows),
            "--out",
            str(tmp_path / "out"),
            *SMALL,
            *labels,
        ]
    )
    model = RewardModel.load(str(tmp_path / "out"))
    assert model.step_format.label_kind == kind
    [scores] = model.score([("Start 1 ; + 1 \n", ["1 + 1 = 2", "Answer: 2"])])
    assert all(0 < score < 1 for score in scores)
    assert [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]


def test_search_beam(tmp_path: Path, tiny_run: Path) -> None:
    main(["search", "beam", "--policy", LAB, "--reward", str(tiny_run / "prm"), "--task", json.dumps(TASK), "--limit", "3",
          "--beams", "3", "--width", "2", "--max_new_tokens", "64", "--out", str(tmp_path / "out")])  # fmt: skip
    rows = read_rows(tmp_path / "out", Solution)
    assert [(row.problem_id, row.sample) for row in rows] == [
        (f"chain/test/{i:05d}", k) for i in range(3) for k in range(3)
    ]
    assert read_about(tmp_path / "out")["ledger"]["reward_tokens"] > 0


def test_eval_policies(tmp_path: Path, tiny_run: Path) -> None:
    policies = {"lab": {"greedy": str(tiny_run / "base_greedy"), "samples": str(tiny_run / "base_samples")}}
    file = config(tmp_path / "e.yaml", task=TASK, policies=policies)
    main(["eval", "policies", "--config", file, "--prm", str(tiny_run / "prm"), "--out", str(tmp_path / "out")])
    same = ("greedy", "majority@4", "best_of_4_prm")
    here, run = (
        {r["arm"]: r["value"] for r in read_json(folder / "results.json") if r["metric"] == "accuracy"}
        for folder in (tmp_path / "out", tiny_run / "answers")
    )
    assert [here[f"lab/{arm}"] for arm in same] == [run[f"base/{arm}"] for arm in same]
    assert "lab/best_of_4_orm" not in here


def test_eval_prm(tmp_path: Path, tiny_run: Path) -> None:
    main(["eval", "prm", "--prm", str(tiny_run / "prm"), "--solutions", str(tiny_run / "base_samples"), "--limit", "10",
          "--task", json.dumps(TASK), "--out", str(tmp_path / "out")])  # fmt: skip
    records = {(r["arm"], r["metric"]): r for r in read_json(tmp_path / "out" / "results.json")}
    assert records["prm", "step_auroc"]["n"] == 10


def test_eval_processbench(tmp_path: Path, tiny_run: Path, capsys: Any) -> None:
    cases = [{"problem": "Start 1 ; + 1 \n", "steps": ["1 + 1 = 2", "Answer: 2"], "label": label} for label in (-1, 0)]
    write_json(tmp_path / "gsm8k.json", cases)
    files = json.dumps({"gsm8k": str(tmp_path / "gsm8k.json")})
    main(["eval", "processbench", "--prm", str(tiny_run / "prm"), "--files", files, "--out", str(tmp_path / "out")])
    assert {r["metric"] for r in read_json(tmp_path / "out" / "results.json")} >= {"f1", "accuracy_error", "threshold"}
    assert "processbench/gsm8k" in capsys.readouterr().out


# --- runs ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keeps (recipe, folder) of each run instead of running it."""
    found: list[Any] = []
    monkeypatch.setattr(pipeline, "run_recipe", lambda recipe, out, where: found.append((recipe, out)))
    return found


def test_seed_and_out_of_a_run(tmp_path: Path, runs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: named\nseed: 1\nstages: {a: {do: model.copy}}")
    for arguments in ([], ["--seed", "5"], ["--out=there", "--seed=6"], ["seed=7", "--out", "there"]):
        main(["run", str(path), *arguments])
    assert [(recipe["seed"], str(out)) for recipe, out in runs] == [
        (1, "runs/named"), (5, "runs/named"), (6, "there"), (7, "there"),
    ]  # fmt: skip
    path.write_text("stages: {a: {do: model.copy}}")
    main(["run", str(path)])
    assert str(runs[-1][1]) == "runs/mine"


def test_quickstart_is_its_recipe(runs: list[Any]) -> None:
    main(["quickstart", "--seed", "3", "solutions.samples=2"])
    [(recipe, out)] = runs
    want = {
        **RECIPE,
        "seed": 3,
        "stages": {**RECIPE["stages"], "solutions": {**RECIPE["stages"]["solutions"], "samples": 2}},
    }
    assert (recipe, str(out)) == (want, "runs/quickstart")


def test_quickstart_from_scratch_trains_the_policy_first(runs: list[Any], tmp_path: Path) -> None:
    main(["quickstart", "--from-scratch"])
    [(recipe, _)] = runs
    lab = yaml.safe_load((PACKAGE / "recipes" / "lab_policy.yaml").read_text())
    assert list(recipe["stages"]) == [*lab["stages"], *(name for name in RECIPE["stages"] if name != "policy")]
    assert recipe["stages"]["policy"]["do"] == "train.sft"
    assert pipeline.plan(recipe, tmp_path, "quickstart")


# --- the examples of the docs --------------------------------------------------------------------------------------------


def examples() -> list[Any]:
    """(page, command line, file name, YAML) of every block whose first line is a command."""
    found = []
    for page in sorted((PACKAGE / "docs").glob("*.md")):
        for block in re.findall(r"^```yaml\n(# stepladder .*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            arguments = block.splitlines()[0].removeprefix("# stepladder ").split()
            file = next(a for a in arguments if a.endswith(".yaml"))
            found.append(pytest.param(arguments, file, block, id=f"{page.stem}-{Path(file).stem}"))
    return found


SMALLER = {
    "data": ["--limit", "3", "--task.sizes.train", "60", "--task.sizes.test", "20"],
    "search": ["--limit", "3", "--task.sizes.train", "60", "--task.sizes.test", "20"],
    "train": ["--max_steps", "2"],
    "eval": [],
    "run": ["defaults.task.sizes={train: 40, dev: 5, test: 10}"],
}


@pytest.mark.parametrize(("arguments", "file", "block"), examples())
def test_the_examples_of_the_docs_run(
    arguments: list[str], file: str, block: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/quickstart").symlink_to(tiny_run)  # the pages take up what `stepladder quickstart` left
    Path(file).write_text(block)
    group = arguments[0]
    if "Qwen/" in block:  # needs the hub: the fields are checked, and nothing is run
        from stepladder.config import build

        assert build(stages.config_class(".".join(arguments[:2])), yaml.safe_load(block))
        return
    main([*arguments, *SMALLER[group]])
    out = Path(arguments[arguments.index("--out") + 1])
    made = {"data": "rows.parquet", "search": "rows.parquet", "train": "model.safetensors"}
    assert (out / ("results.json" if arguments[1] == "compare" else made.get(group, "results.json"))).is_file()


def test_every_page_has_an_example_that_runs() -> None:
    pages = {param.id.rpartition("-")[0] for param in examples()}
    assert {"recipes", "rejection_sampling", "step_labels", "search", "step_format"} <= pages


def test_the_docs_name_every_field_of_the_stages() -> None:
    pages = "".join(path.read_text() for path in (PACKAGE / "docs").glob("*.md"))
    named = set(re.findall(r"`([a-z_0-9]+)(?:`|:)", pages))
    for kind, (config_class, _) in stages.STAGES.items():
        if kind.partition(".")[0] in cli.GROUPS and isinstance(config_class, type):
            assert not set(config_class.__dataclass_fields__) - named, kind
