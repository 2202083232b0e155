"""A user's mistake ends with one sentence and exit status 2: what it was, where, and what was expected. Never a traceback."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.basics import canonical_json, read_json, write_json
from stepladder.data_gen import store
from stepladder.data_gen.rows import Solution, Source, StepLabels, to_record
from stepladder.data_gen.store import read_rows, write_rows
from stepladder.launch import stages
from stepladder.launch.cli import main

PACKAGE = Path(stages.__file__).parents[1]
QUICKSTART, LAB = PACKAGE / "recipes" / "quickstart.yaml", PACKAGE / "models" / "lab_policy"
P = yaml.safe_load(QUICKSTART.read_text())["defaults"]["task"]["p"]  # what the shipped policy was made for
SOURCE = Source("policy", "fake", "chain", 0)


def task(problems: int = 6, **changes: Any) -> str:
    sizes = {"train": problems, "test": problems}
    return json.dumps({"kind": "chain", "p": P, "min_steps": 2, "max_steps": 6, "sizes": sizes, **changes})


def sampling(out: Path, *more: Any, policy: Path | str = LAB, **changes: Any) -> list[str]:
    command = ["data", "solutions", "--policy", policy, "--out", out, "--task", task(**changes), "--samples", 2]
    return [str(part) for part in [*command, "--max_new_tokens", 40, *more]]


def solutions(count: int = 20) -> list[Solution]:
    return [
        Solution(
            f"q{i}",
            "Start 1 ; + 1 \n",
            "2",
            0,
            ("1 + 1 = 2", "Answer: 2"),
            "",
            "2",
            "right",
            "eos",
            (),
            (),
            0.0,
            SOURCE,
        )
        for i in range(count)
    ]


def labels(folder: Path, steps: Sequence[str] = ("1 + 1 = 2", "Answer: 2"), prompt: str = "Start 1 ; + 1 \n") -> Path:
    counts = (1,) * (len(steps) + 1)
    row = StepLabels("q", prompt, "2", 0, tuple(steps), counts, counts, "monte_carlo", "right", None, True, SOURCE)
    write_rows(folder, [row])
    return folder


def jsonl(path: Path, lines: Sequence[str]) -> Path:
    path.write_text("".join(line + "\n" for line in lines))
    return path


# --- recipes and command lines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run"], "stepladder run needs a recipe: stepladder run RECIPE.yaml"),
        (["run", "--out", "x"], "stepladder run needs a recipe"),
        (["run", QUICKSTART, "--out"], "--out needs a value"),
        (["run", QUICKSTART, "--seed", "one"], "--seed must be a whole number, found 'one'"),
        (["run", QUICKSTART, "solutoins.samples=3"], "override: unknown key 'solutoins'; did you mean solutions?"),
        (["run", QUICKSTART, "solutions.sampels=3"], "stage solutions: unknown key 'sampels'; did you mean samples?"),
        (["run", QUICKSTART, "solutions.samples=many"], "stage solutions: samples must be a whole number, found 'many'"),
        (["run", QUICKSTART, "solutions.samples=0"], "stage solutions: samples must be 1 or more, found 0"),
        (["run", QUICKSTART, "solutions.do=data.solution"], "did you mean data.solutions?"),
        (["run", QUICKSTART, "solutions=3"], "stage solutions: do is missing"),
        (["run", QUICKSTART, "base_beam.width=20"], "1 <= width <= beams must hold, found width 20 and beams 16"),
        (["run", QUICKSTART, "prm.labels=sotf"], "labels must be one of hard, soft, threshold, td, found 'sotf'"),
        (["run", QUICKSTART, "orm.learning_rat=1"], "stage orm: unknown key 'learning_rat'; did you mean learning_rate?"),
        (["quickstart", "here"], "expected --key value or key=value, found 'here'"),
        (["quickstrat"], "stepladder: unknown command 'quickstrat'; did you mean quickstart?"),
        (["data", "solution"], "stepladder data: unknown stage 'solution'; did you mean solutions?"),
        (["data", "solutions", "--samples", "3"], "--out DIR is missing"),
        (["data", "solutions", "--out", "x", "--smaples", "3"], "unknown key 'smaples'; did you mean samples?"),
        (["data", "solutions", "--out", "x", "--config", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["data", "solutions", "--out", "x"], "policy is missing: the policy: a folder, a hub id, or a served model's name"),
        (["data", "solutions", "--out", "x", "--shard", "2/2", "--policy", LAB], "shard must be i/n with 0 <= i < n"),
        (["data", "step_labels", "--out", "x"], "solutions is missing: Solution rows to label"),
        (["data", "demonstrations", "--out", "x", "--task", "{kind: chian}"], "unknown kind 'chian'; did you mean chain?"),
        (["data", "demonstrations", "--out", "x", "--task", "{kind: chain, q: 3}"], "task chain: unknown key 'q'"),
        (["data", "demonstrations", "--out", "x", "--task", "{kind: chain, p: 1}"], "p must lie between 3 and 9973, found 1"),
        (["data", "demonstrations", "--out", "x", "--split", "tset"], "split must be one of train, dev, test, found 'tset'"),
        (["train", "sft"], "--out DIR is missing"),
        (["train", "sft", "--out", "x"], "model is missing|no tokenizer|model"),
        (["search", "beam", "--out", "x"], "reward is missing: the reward model that guides the search"),
        (["eval", "policies", "--out", "x"], "policies is missing: name -> {greedy, samples, beam}"),
        (["eval", "prm", "--out", "x"], "prm is missing: process reward model"),
        (["eval", "processbench", "--out", "x", "--prm", "y"], "files is missing: subset -> file of ProcessBench records"),
        (["import-gguf"], "stepladder import-gguf needs FILE and --out DIR"),
    ],
)  # fmt: skip
def test_the_command_line(
    arguments: list[Any], told: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    error = refused(*arguments)
    assert any(part in error for part in told.split("|")), error


# --- data ----------------------------------------------------------------------------------------------------------------


def test_a_broken_line_is_named_by_file_and_number(tmp_path: Path, refused: Callable[..., str]) -> None:
    lines = [canonical_json(to_record(row)) for row in solutions()]
    lines[16] = lines[16][:-20]
    path = jsonl(tmp_path / "rows.jsonl", lines)
    error = refused("data", "best_solutions", "--solutions", path, "--out", tmp_path / "out")
    assert error.startswith(f"{path}, line 17: not valid JSON (")


def test_a_line_with_a_wrong_field_is_named_by_file_and_number(tmp_path: Path, refused: Callable[..., str]) -> None:
    records = [to_record(row) for row in solutions()]
    records[16]["sample"] = "first"
    path = jsonl(tmp_path / "rows.jsonl", [canonical_json(r) for r in records])
    error = refused("data", "best_solutions", "--solutions", path, "--out", tmp_path / "out")
    assert error == f"{path}, line 17, field sample: expected int, found 'first'"
    del records[16]["sample"]
    jsonl(path, [canonical_json(r) for r in records])
    error = refused("data", "best_solutions", "--solutions", path, "--out", tmp_path / "out")
    assert f"{path}, line 17" in error
    assert "sample" in error


def test_problems_with_a_broken_line_17(tmp_path: Path, refused: Callable[..., str]) -> None:
    lines = [json.dumps({"question": f"What is {i} + 1?", "answer": str(i + 1)}) for i in range(30)]
    lines[16] = '{"question": "What is'
    path = jsonl(tmp_path / "problems.jsonl", lines)
    given = json.dumps({"kind": "text", "path": str(path)})
    error = refused("data", "demonstrations", "--task", given, "--out", tmp_path / "out")
    assert error.startswith(f"{path}, line 17: not valid JSON (")


def test_an_empty_data_set(tmp_path: Path, refused: Callable[..., str]) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", [])
    for command in (
        ["data", "best_solutions", "--solutions", empty],
        ["data", "demonstrations", "--task", json.dumps({"kind": "text", "path": str(empty)})],
        ["data", "prm800k", "--file", empty],
        ["train", "orm", "--rows", empty, "--model", LAB],
    ):
        assert refused(*command, "--out", tmp_path / "out") == f"{empty}: the data set is empty"
    (tmp_path / "nothing").mkdir()
    error = refused("data", "best_solutions", "--solutions", tmp_path / "nothing", "--out", tmp_path / "out")
    assert error.startswith(f"{tmp_path / 'nothing'}: no finished rows here (rows.parquet is missing)")


def test_what_a_task_leaves_out_is_printed(tmp_path: Path, capsys: Any) -> None:
    records = [{"question": f"What is {i} + 1?", "answer": str(i + 1), "solution": str(i + 1)} for i in range(20)]
    path = jsonl(tmp_path / "problems.jsonl", [json.dumps(r) for r in [*records, *records[:3]]])
    given = json.dumps({"kind": "text", "path": str(path), "solution_field": "solution", "splits": {"train": 1.0}})
    main(["data", "demonstrations", "--task", given, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "task text: left out 3 duplicates\n" in said
    assert "out: 20 rows\n" in said


def test_rows_of_another_kind(tmp_path: Path, refused: Callable[..., str]) -> None:
    error = refused("train", "orm", "--rows", labels(tmp_path / "rows"), "--model", LAB, "--out", tmp_path / "out")
    assert str(tmp_path / "rows") in error


def test_no_solution_to_learn_from(tmp_path: Path, refused: Callable[..., str]) -> None:
    rows = [Solution(**{**vars(row), "outcome": "wrong"}) for row in solutions(3)]
    write_rows(tmp_path / "rows", rows)
    error = refused("data", "best_solutions", "--solutions", tmp_path / "rows", "--out", tmp_path / "out")
    assert "no row is left (" in error
    assert "3 dropped: answers wrong" in error


# --- models --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_policy(tmp_path: Path) -> Path:
    """The shipped policy with a context of 12 tokens: problems of two operations leave room for an answer, longer ones do not."""
    folder = tmp_path / "short"
    shutil.copytree(LAB, folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "max_position_embeddings": 12})
    return folder


def test_prompts_longer_than_the_context_are_counted_and_dropped(
    tmp_path: Path, short_policy: Path, capsys: Any
) -> None:
    main(sampling(tmp_path / "out", policy=short_policy, problems=10))
    # Operations go 2, 3, 4, 5, 6, 2, ...; a prompt has 3 tokens and 3 for each of them, and at least one must follow.
    assert "out: 4 rows (dropped: 8 prompts longer than the context)" in capsys.readouterr().out
    assert {row.prompt.count(";") for row in read_rows(tmp_path / "out", Solution)} == {2}


def test_no_prompt_fits(tmp_path: Path, short_policy: Path, refused: Callable[..., str]) -> None:
    error = refused(*sampling(tmp_path / "out", policy=short_policy, min_steps=5))
    assert error == f"{tmp_path / 'out'}: no row is left (6 dropped: prompts longer than the context)"


def test_labels_that_do_not_fit_are_counted_and_the_row_refused(
    tmp_path: Path, refused: Callable[..., str], capsys: Any
) -> None:
    rows = labels(tmp_path / "rows", steps=["1 + 1 = 2"] * 30)
    error = refused("train", "prm", "--rows", rows, "--model", LAB, "--max_length", 8, "--out", tmp_path / "out")
    assert error.startswith(f"{rows}: no row can be trained on (")
    assert "30 labels cut by max_length" in error


def test_a_folder_without_a_model(tmp_path: Path, refused: Callable[..., str]) -> None:
    missing = tmp_path / "missing"
    assert refused(*sampling(tmp_path / "out", policy=missing)) == f"{missing}: no such model folder"
    missing.mkdir()
    assert refused(*sampling(tmp_path / "out", policy=missing)).startswith(f"{missing}: no ")


def test_a_broken_checkpoint(tmp_path: Path, refused: Callable[..., str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(LAB, broken)
    (broken / "model.safetensors").write_bytes((LAB / "model.safetensors").read_bytes()[:1000])
    assert refused(*sampling(tmp_path / "out", policy=broken)).startswith(f"{broken}: no AutoModelForCausalLM model")


@pytest.fixture
def foreign_policy(tmp_path: Path, tiny_policy: Any, merging_tokenizer: Any) -> Path:
    """A policy as other tools write them: no step format, no chat template."""
    folder = tmp_path / "foreign"
    tiny_policy(merging_tokenizer).save_pretrained(folder)
    merging_tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_without_pad_and_end_of_sequence(
    tmp_path: Path, foreign_policy: Path, refused: Callable[..., str]
) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (foreign_policy / name).is_file():
            config = read_json(foreign_policy / name)
            write_json(foreign_policy / name, {k: v for k, v in config.items() if k not in ("pad_token", "eos_token")})
    assert refused(*sampling(tmp_path / "out", policy=foreign_policy)) == (
        f"{foreign_policy}: the tokenizer has neither a pad token nor an end-of-sequence token; give it one of them"
    )


def test_a_chat_template_is_asked_for_and_there_is_none(
    tmp_path: Path, foreign_policy: Path, refused: Callable[..., str]
) -> None:
    error = refused(*sampling(tmp_path / "out", "--chat", "true", policy=foreign_policy))
    assert "asks for a chat template" in error
    assert "set chat: false, or give the tokenizer a template" in error


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (("--chat", "true"), "its step_format.json says chat False, found chat True"),
        (("--prompt_template", "Solve {prompt}"), "says prompt_template '{prompt}', found prompt_template 'Solve {prompt}'"),
        (("--system", "Be brief."), "says system None, found system 'Be brief.'"),
    ],
)  # fmt: skip
def test_settings_that_a_step_format_contradicts(
    tmp_path: Path, refused: Callable[..., str], setting: Sequence[str], told: str
) -> None:
    error = refused(*sampling(tmp_path / "out", *setting))
    assert error.startswith(f"{LAB}: ")
    assert told in error


def test_a_prompt_template_without_a_place_for_the_problem(
    tmp_path: Path, foreign_policy: Path, refused: Callable[..., str]
) -> None:
    error = refused(*sampling(tmp_path / "out", "--prompt_template", "Solve it", policy=foreign_policy))
    assert "prompt_template must contain {prompt}, found 'Solve it'" in error


def test_a_step_format_that_disagrees_with_the_task(tmp_path: Path, refused: Callable[..., str]) -> None:
    error = refused(*sampling(tmp_path / "out", step_separator=";"))
    assert error == f"{LAB}: its step format ends a step with '\\n', task chain with ';'"


def test_a_policy_that_does_not_know_the_words_of_the_task(tmp_path: Path, refused: Callable[..., str]) -> None:
    error = refused(*sampling(tmp_path / "out", p=97))
    assert re.fullmatch(
        rf"{LAB}: \d of 6 prompts hold words that its tokenizer does not know; was it made for another task\?", error
    )


def test_a_broken_step_format(tmp_path: Path, refused: Callable[..., str]) -> None:
    policy = tmp_path / "policy"
    shutil.copytree(LAB, policy)
    path = policy / "step_format.json"
    whole = read_json(path)
    for broken, told in (
        ({**whole, "separator_ids": []}, "separator_ids is empty"),
        ({**whole, "aggregation": "max"}, "aggregation must be one of last, min, prod, mean, found 'max'"),
        ({**whole, "colour": "red"}, "not a step format"),
        ([], "not a step format"),
    ):
        write_json(path, broken)
        error = refused(*sampling(tmp_path / "out", policy=policy))
        assert error.startswith(f"{path}: ")
        assert told in error
    path.write_text('{"separator')
    assert refused(*sampling(tmp_path / "out", policy=policy)).startswith(f"{path}: not valid JSON")


def test_a_policy_where_a_reward_model_is_expected(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_rows(tmp_path / "rows", solutions(3))
    for command in (
        ["data", "best_solutions", "--solutions", tmp_path / "rows", "--reward", LAB],
        ["eval", "prm", "--solutions", tmp_path / "rows", "--prm", LAB, "--task", task()],
        ["search", "beam", "--policy", LAB, "--reward", LAB, "--task", task()],
    ):
        error = refused(*command, "--out", tmp_path / "out")
        assert error.startswith(f"{LAB}: its step format says head: none, so it is a policy and not a reward model")


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (("--device", "quantum"), "device 'quantum' cannot be used here"),
        (("--dtype", "float12"), "dtype must be one of float32, bfloat16, float16, auto, found 'float12'"),
        (("--backend", "tgi"), "backend must be transformers, vllm or openai, found 'tgi'"),
        (("--temperature", "-1"), "temperature must be 0 or more"),
    ],
)
def test_how_a_policy_is_run(tmp_path: Path, refused: Callable[..., str], setting: Sequence[str], told: str) -> None:
    assert told in refused(*sampling(tmp_path / "out", *setting))


def test_a_hub_id_that_does_not_exist_without_a_network(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    error = refused(*sampling(tmp_path / "out", policy="nobody/no-such-model"))
    assert error.startswith("nobody/no-such-model: ")
    error = refused("train", "sft", "--model", "nobody/no-such-model", "--rows", "x", "--out", tmp_path / "out")
    assert error.startswith("nobody/no-such-model: ")
    given = json.dumps({"kind": "text", "path": "nobody/no-such-data"})
    error = refused("data", "demonstrations", "--task", given, "--out", tmp_path / "out")
    assert error.startswith("nobody/no-such-data: no such file, and the hub gave no such data set (")


# --- folders and disks ---------------------------------------------------------------------------------------------------
# Not with permissions, which do not bind root: with a file where a folder is expected, and with writes that fail.


def test_a_file_where_a_folder_is_expected(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for command in (
        ["run", QUICKSTART, "--out", file],
        ["run", QUICKSTART, "--out", file / "below"],
        sampling(file),
        ["data", "demonstrations", "--task", task(), "--out", file / "below"],
    ):
        error = refused(*command)
        assert error.startswith("cannot write"), error
        assert str(file) in error
    assert file.read_text() == "mine"


def test_a_file_where_a_stage_wants_its_folder(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "policy").write_text("mine")
    error = refused("run", QUICKSTART, "--out", tmp_path / "run")
    assert str(tmp_path / "run" / "policy") in error
    assert (tmp_path / "run" / "policy").read_text() == "mine"


def test_a_full_disk_while_rows_are_made(
    tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["data", "demonstrations", "--task", task(), "--out", tmp_path / "out"]
    appended = 0
    fsync = store.os.fsync

    def full(handle: int) -> None:
        nonlocal appended
        appended += 1
        if appended > 1:  # the first is the empty write that tries the folder
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(store.os, "fsync", full)
    error = refused(*command)
    assert error.startswith("cannot write to ")
    assert error.endswith(" No space left on device")
    monkeypatch.setattr(store.os, "fsync", fsync)
    main([str(part) for part in command])
    main([str(part) for part in [*command[:-1], tmp_path / "fresh"]])
    assert (tmp_path / "out" / "rows.parquet").read_bytes() == (tmp_path / "fresh" / "rows.parquet").read_bytes()


def test_a_full_disk_while_a_model_is_written(tmp_path: Path, starter: Any) -> None:
    write_rows(tmp_path / "rows", solutions(8))
    command = ["train", "orm", "--model", str(LAB), "--rows", "rows", "--out", "out", "--max_steps", "1"]
    limited = (
        "import resource, signal, sys; from stepladder.launch.cli import main; "
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); "
        "main(sys.argv[1:])"
    )
    ended = subprocess.run([sys.executable, "-c", limited, *command], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    told = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert told == ["error: cannot write: File too large; free some space, and the same command continues"]
    again = starter("stepladder", *command, folder=tmp_path)
    assert again.status == 0, again.err
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_rows_of_other_settings_are_not_taken_for_finished(
    tmp_path: Path, refused: Callable[..., str], capsys: Any
) -> None:
    out = tmp_path / "out"
    main(["data", "demonstrations", "--task", task(), "--out", str(out)])
    before = (out / "rows.parquet").read_bytes()
    main(["data", "demonstrations", "--task", task(), "--out", str(out)])  # the same again is no mistake
    main(["data", "demonstrations", "--task", task(), "--out", str(out), "--shard", "0/1"])  # nor is another share
    for change in (["--seed", "1"], ["--limit", "2"]):
        error = refused("data", "demonstrations", "--task", task(), "--out", out, *change)
        assert error == f"{out}: holds rows of other settings or inputs; give another --out, or remove the folder"
    assert (out / "rows.parquet").read_bytes() == before
