"""Every recipe is checked key by key, and those for real models run whole, scaled down, on data of the real shape made here."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from stepladder.basics import read_json
from stepladder.data_gen import critiques
from stepladder.launch import stages
from stepladder.launch.cli import main
from stepladder.launch.pipeline import load_recipe, plan
from stepladder.models.corrections import read_critique
from stepladder.models.lab import lab_config
from stepladder.tasks.load import load_task

FOLDER = Path(stages.__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("**/*.yaml"))
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_recipe_begins_with_its_command_and_every_key_is_known(path: Path, tmp_path: Path) -> None:
    first_line = path.read_text().splitlines()[0]
    if path.parent.name == "claims":
        assert first_line == f"# stepladder claims run {path.stem}"
    else:
        assert first_line.startswith("# stepladder "), first_line
        assert f"recipes/{path.relative_to(FOLDER).as_posix()}" in first_line
    planned = plan(load_recipe(path, {}), tmp_path, str(path))
    assert planned
    for _, config in planned.values():
        task = config.get("task")
        if isinstance(task, dict) and task.get("kind", "chain") == "chain":
            assert load_task({"kind": "chain", **task})  # a recipe's settings of a task are merged with its defaults


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory, merging_tokenizer: Any) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a chat template: what a model from the hub looks like."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("chat")
    torch.manual_seed(0)
    LlamaForCausalLM(lab_config(len(merging_tokenizer), width=64, layers=2, heads=4, context=512)).save_pretrained(
        folder
    )
    merging_tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": CHAT}))
    return folder


def word_problems(folder: Path, count: int = 48) -> None:
    """Additions of small numbers in the files and fields of MultiArith, SingleEq, AddSub and SVAMP."""
    rng = random.Random(0)
    facts = [(rng.randint(1, 3), rng.randint(1, 3)) for _ in range(count * 4)]
    asked = lambda number, a, b: f"Box {number} holds {a} pens and {b} more."
    for position, name in enumerate(("multiarith", "singleeq", "addsub")):
        (folder / "mawps").mkdir(exist_ok=True)
        some = list(enumerate(facts))[position * count : (position + 1) * count]
        lines = [{"input": asked(n, a, b) + " How many?", "target": a + b} for n, (a, b) in some]
        (folder / "mawps" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "svamp").mkdir()
    records = [
        {
            "ID": f"chal-{n}",
            "Body": asked(n, a, b),
            "Question": "How many?",
            "Equation": f"( {a}.0 + {b}.0 )",
            "Answer": float(a + b),
            "Type": "Addition",
        }
        for n, (a, b) in list(enumerate(facts))[3 * count :]
    ]
    (folder / "svamp" / "SVAMP.json").write_text(json.dumps(records))


def test_smollm2_word_problems_scaled_down(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    word_problems(tmp_path)
    run = tmp_path / "run"
    recipe = next(path for path in RECIPES if path.stem == "smollm2_word_problems")
    trained = [f"{stage}.max_steps=2" for stage in ("orm", "prm", "improved")]
    sampled = [f"{policy}_{arm}.limit=12" for policy in ("policy", "improved") for arm in ("greedy", "samples", "beam")]
    command = [
        "run", str(recipe), "--out", str(run), f"pretrained.source={chat_model}", f"defaults.task.folder={tmp_path}",
        "defaults.dtype=float32", "defaults.max_length=512", "defaults.max_new_tokens=24",
        # A random model learns the one kind of line that is here; with adapters alone it would not.
        "policy.lora_r=0", "policy.learning_rate=3e-3", "policy.num_train_epochs=30", "policy.save_steps=1000",
        "solutions.limit=16", "solutions.samples=4", "step_labels.limit=8", "step_labels.rollouts=2",
        "policy_beam.beams=4", "policy_beam.width=2", "improved_beam.beams=4", "improved_beam.width=2",
        "policy_samples.samples=4", "improved_samples.samples=4", "pretrained_greedy.limit=12",
        *trained, *sampled,
    ]  # fmt: skip
    main(command)
    accuracy = {r["arm"]: r for r in read_json(run / "results.json") if r["metric"] == "accuracy"}
    arms = {"greedy", "sample", "pass@4", "majority@4", "best_of_4_orm", "best_of_4_prm", "beam_4_prm"}
    assert {f"{policy}/{arm}" for policy in ("policy", "improved") for arm in arms} <= set(accuracy)
    assert accuracy["pretrained/greedy"]["n"] == accuracy["policy/greedy"]["n"] == 12
    assert accuracy["pretrained/greedy"]["value"] == 0 < accuracy["policy/pass@4"]["value"]
    assert (run / "report.html").is_file()
    assert (run / "improved" / "model.safetensors").is_file()
    # Nothing of the evaluation set is in what the models learnt from.
    import pyarrow.parquet as parquet

    ids = lambda stage: set(parquet.read_table(run / stage / "rows.parquet").column("problem_id").to_pylist())
    assert not ids("policy_samples") & (ids("lines") | ids("solutions") | ids("step_labels") | ids("chosen"))
    capsys.readouterr()
    main(command)
    assert capsys.readouterr().out.count("already there, inputs unchanged") == 18
    compare_searches_of(run, tmp_path)


def compare_searches_of(run: Path, folder: Path) -> None:
    """The recipe that compares searches, on the policy and the reward model that a run of the one above left."""
    out = folder / "compare"
    main([
        "run", str(next(path for path in RECIPES if path.stem == "smollm2_search_compare")), "--out", str(out),
        f"compare.policy={run / 'policy'}", f"compare.reward={run / 'prm'}", f"defaults.task.folder={folder}",
        "defaults.dtype=float32", "compare.reward_dtype=float32", "compare.limit=4", "compare.unit_problems=4",
        "compare.budgets=[2, 4]", "defaults.max_new_tokens=24", "compare.levels=2",
    ])  # fmt: skip
    found = {(r["arm"], r["metric"]): r for r in read_json(out / "compare" / "results.json")}
    arms = ("best_of_n", "step_best_of_n", "beam", "dvts", "particles", "rebase")
    for arm in arms:
        for budget in (2, 4):
            one = found[f"weighted/{arm}@{budget}", "accuracy"]
            assert one["n"] == 4
            assert one["ci"][0] <= one["value"] <= one["ci"][1]
            assert one["flops"] > 0
            for cost in ("flops", "tokens"):
                assert (f"weighted/{arm}~{budget}", f"accuracy_at_equal_{cost}") in found
    assert found["best/greedy@1", "accuracy"]["tokens"] < found["best/best_of_n@4", "accuracy"]["tokens"]
    # The problems are the first of those that the other recipe tests on: held out from what both models learnt from.
    import pyarrow.parquet as parquet

    ids = lambda path: set(parquet.read_table(path / "rows.parquet").column("problem_id").to_pylist())
    assert ids(out / "compare" / "beam@4") < ids(run / "policy_beam")


def test_smollm2_self_improve_scaled_down(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    """Two rounds on additions of small numbers: what is sampled, learnt and preferred goes through every stage."""
    word_problems(tmp_path)
    asked = lambda n: f"Tin {n} holds {n % 3 + 1} nails and {n % 2 + 1} more are put in. How many?"
    lines = [{"input": asked(n), "target": n % 3 + n % 2 + 2} for n in range(20)]
    (tmp_path / "mawps" / "singleop.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = tmp_path / "run"
    recipe = next(path for path in RECIPES if path.stem == "smollm2_self_improve")
    tested = (
        "tuned_greedy",
        "greedy",
        "policy_greedy",
        "policy_samples",
        "improved_samples",
        "policy_unseen",
        "improved_unseen",
    )
    command = [
        "run", str(recipe), "--out", str(run), f"pretrained.source={chat_model}", f"defaults.task.folder={tmp_path}",
        "defaults.dtype=float32", "defaults.max_length=512", "defaults.max_new_tokens=24",
        "policy.lora_r=0", "policy.learning_rate=3e-3", "policy.num_train_epochs=24", "policy.save_steps=1000",
        "samples.limit=16", "samples.samples=4", "tuned.max_steps=1", "improved.max_steps=2", "improved.max_rows=8",
        "drafts.limit=16", "labels.limit=8", "labels.rollouts=2", "pairs.limit=8",
        *(f"{stage}.limit=8" for stage in tested), "policy_samples.samples=2", "improved_samples.samples=2",
    ]  # fmt: skip
    main(command)
    accuracy = {r["arm"]: r for r in read_json(run / "results.json") if r["metric"] == "accuracy"}
    arms = {"policy", "tuned_1", "round_1", "tuned_2", "round_2", "policy_unseen", "round_2_unseen"}
    assert {f"{policy}/greedy" for policy in arms} <= set(accuracy)
    assert accuracy["round_2/greedy"]["n"] == accuracy["round_2_unseen/greedy"]["n"] == 8
    import pyarrow.parquet as parquet

    rows = lambda stage: parquet.read_table(run / stage / "rows.parquet").to_pylist()
    ids = lambda stage: {row["problem_id"] for row in rows(stage)}
    assert all(i.startswith("word_problems/singleop/") for i in ids("improved_unseen"))
    learnt = set().union(*(ids(f"{stage}-{n}") for stage in ("chosen", "pairs") for n in (1, 2)), ids("lines"))
    assert not learnt & (ids("greedy-2") | ids("improved_unseen") | ids("improved_samples"))
    # Each round goes on from the one before: other samples, other pairs, another policy.
    assert rows("samples-1") != rows("samples-2")
    for number in (1, 2):
        assert {row["source"]["policy"] for row in rows(f"pairs-{number}")} == {str(run / f"tuned-{number}")}
        assert not any(row["label_source"] == "checker" for row in rows(f"labels-{number}"))
        lines = (run / f"improved-{number}" / "metrics.jsonl").read_text()
        assert '"chosen_drift"' in lines
    weights = [(run / f"improved-{n}" / "model.safetensors").read_bytes() for n in (1, 2)]
    assert weights[0] != weights[1]
    capsys.readouterr()
    main(command)
    assert "done in" not in capsys.readouterr().out


def rated_additions(folder: Path) -> tuple[Path, dict[str, str]]:
    """PRM800K records in which the wrong step is always the same words, with a neutral and a better one beside it; and ProcessBench
    subsets with that step."""
    rng = random.Random(0)
    rated = lambda *steps: {
        "completions": [{"text": text, "rating": rating} for text, rating in steps], "chosen_completion": 0
    }  # fmt: skip
    records = []
    for number in range(24):
        steps = [rated((f"{n} + 1 = {n + 1}", 1)) for n in range(rng.randint(1, 4))]
        wrong, right = ("so 1 + 1 = 9", -1), ("so it is 5", 1)
        steps.append(rated(wrong, right, ("so", 0)) if number % 2 else rated(right, wrong))
        question = {"problem": f"What is {number} and one?", "ground_truth_answer": str(number + 1)}
        records.append({"question": question, "label": {"steps": steps}})
    labels = folder / "phase1.jsonl"
    labels.write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {}
    for subset in ("gsm8k", "math"):
        bench = [
            {
                "id": f"{subset}-{n}",
                "generator": "none",
                "problem": f"What is {n} and two?",
                "steps": ["1 + 1 = 2", "so 1 + 1 = 9" if n % 2 else "so it is 5"],
                "final_answer_correct": n % 2 == 0,
                "label": 1 if n % 2 else -1,
            }
            for n in range(10)
        ]
        (folder / f"{subset}.json").write_text(json.dumps(bench))
        files[subset] = str(folder / f"{subset}.json")
    return labels, files


def test_smollm2_prm800k_scaled_down(chat_model: Path, tmp_path: Path) -> None:
    labels, files = rated_additions(tmp_path)
    recipe = next(path for path in RECIPES if path.stem == "smollm2_prm800k")
    run = tmp_path / "run"
    main([
        "run", str(recipe), "--out", str(run), f"backbone.source={chat_model}", f"labels.file={labels}",
        "defaults.dtype=float32", "prm.max_length=512", "prm.lora_r=0", "prm.num_train_epochs=20", "prm.save_steps=1000",
        "prm.gradient_accumulation_steps=1", "prm.per_device_train_batch_size=4", "prm.learning_rate=3e-3",
        f"bench.files={json.dumps(files)}",
    ])  # fmt: skip
    found = {(r["arm"], r["metric"]): r["value"] for r in read_json(run / "results.json")}
    # The wrong step is always the same words: a model that reads its labels where they stand finds it.
    for subset in ("gsm8k", "math"):
        assert found[f"processbench/{subset}", "f1"] > 0.9
    assert (run / "report.html").is_file()


def test_smollm2_prm800k_labels_scaled_down(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    labels, files = rated_additions(tmp_path)
    recipe = next(path for path in RECIPES if path.stem == "smollm2_prm800k_labels")
    run = tmp_path / "run"
    kinds = ("hard", "soft", "threshold", "ranking")
    small = [
        f"{kind}.{setting}" for kind in kinds for setting in
        ("lora_r=0", "num_train_epochs=10", "save_steps=1000", "per_device_train_batch_size=4",
         "gradient_accumulation_steps=1", "learning_rate=3e-3")
    ]  # fmt: skip
    main([
        "run", str(recipe), "--out", str(run), f"backbone.source={chat_model}", f"defaults.file={labels}",
        f"defaults.files={json.dumps(files)}", "defaults.dtype=float32", *small,
    ])  # fmt: skip
    found = {(r["arm"], r["metric"]): r["value"] for r in read_json(run / "results.json")}
    for kind in kinds:
        for subset in files:
            assert found[f"{kind}_tuned/{subset}", "f1"] > 0.9, (kind, subset)
    assert "ranking_tuned/math" in capsys.readouterr().out  # one table of all kinds


SMALL = [
    "defaults.dtype=float32", "defaults.max_length=512", "defaults.max_new_tokens=24", "defaults.lora_r=0",
    "defaults.save_steps=1000", "defaults.batch_size=32",
    # A random model learns the one kind of line that is here.
    "policy.learning_rate=3e-3", "policy.num_train_epochs=24",
]  # fmt: skip


def run_small(recipe: str, chat_model: Path, folder: Path, *settings: str) -> tuple[Path, dict[tuple[str, str], Any]]:
    """(run folder, records by arm and metric) of a recipe on additions of small numbers, of which it learns no test problem."""
    word_problems(folder)
    path = next(path for path in RECIPES if path.stem == recipe)
    command = ["run", str(path), "--out", str(folder / "run"), f"pretrained.source={chat_model}"]
    command += [f"defaults.task.folder={folder}", *SMALL, *settings]
    main(command)
    tested = [problem.id for problem in load_task({"kind": "word_problems", "folder": str(folder)}).problems("test")]
    learnt = set()
    for rows in (folder / "run").glob("*/rows.parquet"):
        made = read_json(rows.parent / "rows.json")["row_type"]
        if made in ("Dialogue", "StepLabels"):
            learnt |= set(pyarrow.parquet.read_table(rows).column("problem_id").to_pylist())
    assert learnt
    assert not learnt & set(tested)
    records = read_json(folder / "run" / "results.json")
    return folder / "run", {(r["arm"], r["metric"]): r for r in records}


def test_smollm2_critique_scaled_down(
    chat_model: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = critiques.critique_rows

    def readable(drafts: Any, texts: Any, *rest: Any, **more: Any) -> Any:
        """The rows with the right verdict behind what cannot be read: two steps of training make no critic."""
        said = {True: "\nFinal answer verdict: Correct", False: "\nFinal answer verdict: Wrong"}
        ended = [
            [text if read_critique(text).wrong is not None else text + said[draft.right] for text in own]
            for draft, own in zip(drafts, texts, strict=True)
        ]
        return made(drafts, ended, *rest, **more)

    monkeypatch.setattr(critiques, "critique_rows", readable)
    run, found = run_small(
        "smollm2_critique", chat_model, tmp_path, "drafts.limit=24", "drafts.samples=2", "exact.limit=16",
        "corrector.max_steps=2", "written.limit=8", "written.max_new_tokens=40", "tried.samples=2",
        "critic.max_steps=2", "policy_greedy.limit=8", "corrector_greedy.limit=8",
        *(f"{stage}.limit=8" for stage in ("gated", "own", "always", "oracle", "retry", "samples")),
        *(f"{stage}.critic_max_new_tokens=30" for stage in ("gated", "own", "always", "oracle")),
    )  # fmt: skip
    assert found["policy/greedy", "accuracy"]["n"] == 8
    for arm in ("gated", "own_critic", "always", "oracle_peeks", "retry"):
        assert found[arm, "accuracy@t1"]["value"] == found["gated", "accuracy@t1"]["value"], arm  # the same drafts
        assert found[arm, "accuracy"]["ci"]
    assert found["exact", "critic_recall"]["value"] == 1
    page = (run / "report.html").read_text()
    assert "<b>collected</b>" in page
    assert "The critic says" in page


def test_smollm2_rise_scaled_down(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    stages = ("policy", "boosted", "rise_1", "rise_2")
    run, found = run_small(
        "smollm2_rise", chat_model, tmp_path, "rows_1.limit=12", "rows_1.best_of=3", "rows_2.limit=12", "rows_2.best_of=3",
        "rows_boosted.limit=12", "rows_boosted.samples=3", *(f"{stage}.max_steps=2" for stage in stages[1:]),
        *(f"{stage}_turns.limit=6" for stage in stages), *(f"{s}_samples.limit=6" for s in ("policy", "boosted", "rise_2")),
        "oracle.limit=6",
    )  # fmt: skip
    for arm in ("policy", "boosted", "round_1", "round_2", "round_2_oracle_peeks"):
        assert found[arm, "accuracy"]["n"] == 6
        assert found[arm, "any"]["value"] >= found[arm, "accuracy@t1"]["value"]
    for arm in ("policy", "boosted", "round_2"):
        assert found[f"{arm}_parallel", "majority"]["n"] == 6
    assert found["round_2_oracle_peeks", "turns"]["value"] <= found["round_2", "turns"]["value"] == 5
    assert "<b>rows_2</b>" in (run / "report.html").read_text()


def test_smollm2_glore_scaled_down(chat_model: Path, tmp_path: Path, capsys: Any) -> None:
    trained = [f"{stage}.max_steps=2" for stage in ("student", "orm", "sorm", "global", "local", "solver")]
    greedy = [f"{stage}_greedy.limit=6" for stage in ("student", "policy", "solver")]
    run, found = run_small(
        "smollm2_glore", chat_model, tmp_path, "draws.limit=16", "draws.samples=4", "samples.limit=32", "samples.samples=4",
        "labels.limit=12", "labels.rollouts=3", "wrong_labels.limit=32", "wrong_labels.rollouts=3", "local_rows.samples=12",
        "local_rows.consistent=false", "local_rows.max_new_tokens=60", "policy.num_train_epochs=24", *trained, *greedy,
        "glore.limit=6", "random.limit=6", "three.limit=6",
    )  # fmt: skip
    drafts = found["glore", "accuracy@t1"]["value"]
    assert drafts == found["student/greedy", "accuracy"]["value"]
    assert found["glore/global", "accuracy@t1"]["value"] == drafts
    assert found["glore", "accuracy"]["n"] == found["student/best_of_3_orm", "accuracy"]["n"] == 6
    assert "<b>local_rows</b>" in (run / "report.html").read_text()
