"""`stepladder plan`: what stages ask of models, the rates of a finished run, and what the command prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.basics import write_json
from stepladder.config import build
from stepladder.data_gen.rows import Solution, Source
from stepladder.data_gen.step_labels import monte_carlo_labels
from stepladder.launch import planning, stages
from stepladder.launch.cli import main
from stepladder.launch.options_plan import Plan
from stepladder.launch.pipeline import load_recipe
from stepladder.launch.plan import make_plan, plan_text
from stepladder.launch.planned_work import Asked, Lengths, Rows, work_of
from stepladder.models.engine import Sampling
from stepladder.models.ledger import Ledger
from stepladder.models.step_format import StepFormat
from stepladder.tasks.chain import ChainArith

PACKAGE = Path(stages.__file__).parents[1]
LENGTHS = Lengths(prompt=10, solution=40, steps=4, right=0.25)
TASK = {"kind": "chain", "p": 7, "min_steps": 3, "max_steps": 6, "sizes": {"train": 60, "dev": 10, "test": 20}}
RECIPE: dict[str, Any] = {
    "name": "tiny",
    "defaults": {"task": TASK, "max_new_tokens": 40},
    "stages": {
        "policy": {"do": "model.copy", "source": "lab"},
        "solutions": {"do": "data.solutions", "policy": "@policy", "limit": 20, "samples": 4, "unit_problems": 5},
        "chosen": {"do": "data.best_solutions", "solutions": "@solutions", "per_problem": 1},
        "tuned": {"do": "train.sft", "model": "@policy", "rows": "@chosen", "max_length": 100,
                  "per_device_train_batch_size": 8, "num_train_epochs": 2},
        "greedy": {"do": "data.solutions", "policy": "@tuned", "split": "test", "samples": 1},
    },
}  # fmt: skip


def asked(problems: float = 20, **rows: Rows) -> Asked:
    return Asked(problems, rows, list(rows.values()), LENGTHS)


def config(kind: str, **values: Any) -> Any:
    known = stages.config_class(kind)
    task = {"task": TASK} if "task" in known.__dataclass_fields__ else {}
    return build(known, {**task, **values}, "here")


# --- what stages ask of models ------------------------------------------------------------------------------------------


def test_step_labels_ask_for_what_the_labeller_asks_for(fake_engine: Any, lab_words: Any) -> None:
    task = ChainArith(**{key: value for key, value in TASK.items() if key != "kind"})
    problems = {one.id: one for one in task.problems("train")[:5]}
    steps = ("1 + 1 = 2", "2 + 1 = 3", "3 + 1 = 4", "Answer: 4")
    engine = fake_engine(lab_words, lambda prefix, seed: [5] * 9 + [lab_words.eos_token_id])
    rows = [
        Solution(one.id, one.prompt, one.answer, 0, steps, "\n".join(steps), "4", "right", "eos", (), (), 0.0,
                 Source("policy", "engine", "chain", 0))
        for one in problems.values()
    ]  # fmt: skip
    monte_carlo_labels(
        engine, task, StepFormat.for_policy(lab_words, "\n"), rows, problems, rollouts=3, sampling=Sampling(40), seed=0,
        policy="policy",
    )  # fmt: skip
    lengths = Lengths(prompt=10, solution=20, steps=4, right=0.5)
    given = {"solutions": Rows(5, 1, 10, 20)}
    work, made = work_of("data.step_labels", config("data.step_labels", rollouts=3), Asked(5, given, [], lengths))
    assert work.calls == sum(len(request.seeds) for request in engine.asked)
    assert work.generated == engine.ledger.generated_tokens  # ten each: half a solution
    assert made.count == len(rows)


def test_what_limits_a_source_limits_the_work() -> None:
    source = Rows(20, 8, 10, 40)
    some = config("data.step_labels", rollouts=2, limit=5, per_problem=2)
    whole, _ = work_of("data.step_labels", config("data.step_labels", rollouts=2), asked(solutions=source))
    part, rows = work_of("data.step_labels", some, asked(solutions=source))
    assert rows.count == 10
    assert whole.calls / part.calls == 160 / 10


def test_samples_are_problems_times_samples_and_prompts_are_read_once() -> None:
    work, rows = work_of("data.solutions", config("data.solutions", samples=8), asked(20))
    assert (work.calls, work.generated, work.prefilled) == (160, 160 * 40, 20 * 10)
    assert (rows.count, rows.tokens) == (160, 50)


def test_only_right_solutions_are_kept_and_only_wrong_ones_corrected() -> None:
    source = Rows(20, 8, 10, 40)
    _, kept = work_of("data.best_solutions", config("data.best_solutions", per_problem=9), asked(solutions=source))
    assert kept.count == 20 * 8 * 0.25
    work, pairs = work_of("data.step_pairs", config("data.step_pairs", rollouts=3), asked(solutions=source))
    assert work.calls == 20 * 8 * 0.75 * 3
    assert pairs.sides == 2


@pytest.mark.parametrize(
    ("kind", "values", "trained", "reference"),
    [
        ("train.sft", {"num_train_epochs": 3}, 3 * 40 * 50, 0),
        ("train.prm", {"num_train_epochs": 1, "max_rows": 10}, 10 * 50, 0),
        ("train.prm", {"max_length": 30, "num_train_epochs": 1}, 40 * 30, 0),  # what is longer is cut
        ("train.sft", {"max_steps": 5, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 40 * 50, 0),
        ("train.dpo", {"num_train_epochs": 2}, 2 * 40 * 50, 40 * 50),
    ],
)
def test_tokens_of_training(kind: str, values: dict[str, Any], trained: float, reference: float) -> None:
    given = {"model": "m", "rows": "r", "output_dir": "o", "use_cpu": True, **values}
    made = build(stages.config_class(kind), given, "here")
    work, _ = work_of(kind, made, asked(rows=Rows(10, 4, 10, 40)))
    assert (work.trained, work.reference) == (trained, reference)


def test_tokens_of_online_training() -> None:
    values = {
        "model": "m", "output_dir": "o", "use_cpu": True, "rollouts": 3, "prompts": 4, "samples": 2, "update_epochs": 2,
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    work, _ = work_of("train.rl", build(stages.config_class("train.rl"), values, "here"), asked())
    assert (work.calls, work.generated, work.prefilled) == (24, 24 * 40, 12 * 10)
    assert (work.trained, work.reference) == (2 * 24 * 50, 24 * 50)


def test_every_strategy_and_every_stage_can_be_planned() -> None:
    """Between them these recipes have nearly every stage that asks a model for something."""
    names = ("quickstart", "lab_policy", "star", "search_compare", "claims/alphamath", "claims/mcts_dpo", "claims/pav_rl",
             "claims/first_pit", "claims/rise", "claims/s3c", "claims/step_dpo", "claims/tree_plv", "claims/sorm")  # fmt: skip
    seen = set()
    for file in (PACKAGE / "recipes" / f"{name}.yaml" for name in names):
        made, _, _ = make_plan(load_recipe(file, {}), file.name, Plan(prompt_tokens=16, solution_tokens=30))
        for stage in made:
            seen.add(stage.kind)
            assert stage.memory.peak >= 0
            assert stage.seconds >= 0
            if stage.work.tokens:
                assert stage.memory.peak > 0, (file, stage.name)
                assert stage.seconds > 0, (file, stage.name)
    assert {"data.solutions", "data.step_labels", "train.sft", "train.prm", "search.compare", "eval.policies"} <= seen


# --- a finished run ------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A run folder with what `plan` reads of it: ledgers of two stages and the log of a third."""
    write_json(tmp_path / "manifest.json", {"config": RECIPE})
    for name, ledger in (
        ("solutions", Ledger(generated_tokens=2000, prefilled_tokens=300, policy_calls=80, seconds=4.0)),
        ("greedy", Ledger(generated_tokens=500, prefilled_tokens=300, policy_calls=20, seconds=2.0)),
    ):
        write_json(tmp_path / name / "rows.json", {"row_type": "Solution", "rows": 1, "ledger": ledger.to_json()})
    shape = planning.read_shape(PACKAGE / "models" / "lab_policy")
    flos = 6.0 * 3000 * (shape.parameters() - shape.embedding)  # as transformers counts 3000 tokens
    (tmp_path / "tuned").mkdir()
    lines = [{"step": 1, "loss": 0.5}, {"step": 2, "train_runtime": 6.0, "total_flos": flos}]
    (tmp_path / "tuned" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def planned(recipe: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {stage.name: stage for stage in make_plan(recipe, "tiny", Plan(launch="run", **values))[0]}


def test_the_plan_of_a_finished_run_is_that_run(finished: Path) -> None:
    found = planned(RECIPE, rates=str(finished))
    assert (found["solutions"].work.generated, found["solutions"].work.prefilled) == pytest.approx((2000, 300))
    assert found["tuned"].work.trained == pytest.approx(3000)
    for name, seconds in (("solutions", 4.0), ("tuned", 6.0), ("greedy", 2.0)):
        assert found[name].seconds == pytest.approx(seconds)


def test_a_larger_recipe_costs_as_many_times_more(finished: Path) -> None:
    larger = json.loads(json.dumps(RECIPE))
    larger["stages"]["solutions"].update(limit=60)
    larger["stages"]["tuned"]["num_train_epochs"] = 5
    found = planned(larger, rates=str(finished))
    assert found["solutions"].work.generated == pytest.approx(2000 * 3)
    assert found["solutions"].seconds == pytest.approx(4.0 * 3)
    # One right solution of each problem is kept, of three times the problems, and read 5 epochs and not 2.
    assert found["tuned"].work.trained == pytest.approx(3000 * 3 * 5 / 2)
    larger["stages"]["solutions"].update(samples=8)
    again = planned(larger, rates=str(finished))["solutions"].work
    assert (again.generated, again.prefilled) == pytest.approx(
        (2000 * 6, 300 * 3)
    )  # prompts are read once for all samples


def test_a_larger_model_costs_as_many_flops_more(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    config = json.loads((PACKAGE / "models" / "lab_policy" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 30, "hidden_size": 1280}))
    larger = json.loads(json.dumps(RECIPE))
    larger["stages"]["policy"]["source"] = str(folder)
    found = planned(larger, rates=str(finished), prompt_tokens=15)["solutions"]
    small = planned(RECIPE, rates=str(finished), prompt_tokens=15)["solutions"]
    flops = [
        planning.forward_flops(s.shape, s.work.generated, context=27.5)
        + planning.forward_flops(s.shape, s.work.prefilled, context=27.5, logits=0)
        for s in (found, small)
    ]
    assert found.work == small.work
    assert found.seconds / small.seconds == pytest.approx(flops[0] / flops[1])
    assert flops[0] > 50 * flops[1]


# --- the command -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return tmp_path / "tiny.yaml"


def test_the_table_and_the_object_say_the_same(recipe_file: Path, capsys: Any) -> None:
    arguments = ["plan", str(recipe_file), "--gpus", "8x80GB", "--nodes", "4", "--solutions.samples", "16"]
    main([*arguments, "--json", "true"])
    found = json.loads(capsys.readouterr().out)
    stages_of = {stage["stage"]: stage for stage in found["stages"]}
    assert stages_of["solutions"]["rows"] == 20 * 16
    assert found["layout"]["engine"] == "zero3"
    assert stages_of["tuned"]["processes"] == 32
    assert stages_of["solutions"]["processes"] == 4  # units of work
    main(arguments)
    told = capsys.readouterr().out
    assert "4 x 8 GPUs of 80 GB" in told
    line = next(line for line in told.splitlines() if line.startswith("solutions "))
    assert f"{stages_of['solutions']['memory']['peak'] / 1e9:.3g}" in line.split()
    assert "max_new_tokens" in told  # lengths are upper bounds, and it says so


def test_what_does_not_fit_is_told_with_what_would(tmp_path: Path) -> None:
    sizes = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    recipe = json.loads(json.dumps(RECIPE))
    recipe["stages"]["policy"]["source"] = "someone/eight-billion"
    given = {"gpus": "8x80GB", "model_config": str(tmp_path), "prompt_tokens": 100}
    told = plan_text(recipe, "tiny", Plan(**given))
    # 8 G parameters: 16 bytes each, and DDP's buckets, on one GPU; 16 / 8 under ZeRO-3.
    assert "tuned needs 1" in told
    assert "it fits with --launch zero" in told
    assert "it fits with" not in plan_text(recipe, "tiny", Plan(**given, launch="zero3"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--gpus", "eight"], "gpus must be how many of which memory, for example 8x80GB, found 'eight'"),
        (["--nodes", "0"], "nodes must be 1 or more, found 0"),
        (["--launch", "zero9"], "a file of accelerate's, run, or one of"),
        (["--rates", "nowhere"], "nowhere is no finished run"),
        (["--policy.source", "someone/model"], "give its config.json with --model_config FILE"),
        (["--gpu", "8x80GB"], "unknown key 'gpu'"),
        (["--right", "2"], "right must lie in [0, 1], found 2"),
    ],
)
def test_mistakes_are_one_sentence(recipe_file: Path, refused: Any, arguments: list[str], told: str) -> None:
    assert told in refused("plan", recipe_file, *arguments)


def test_a_recipe_comes_first(refused: Any) -> None:
    assert "needs a recipe first" in refused("plan", "--gpus", "8x80GB")
