"""A user's mistake is one sentence that names the file or the field, and exit status 2; never a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.models.step_format import StepFormat


def broken_models(folder: Path, policy: Path, lab_words: Any) -> None:
    """Copies of the policy, each with one thing missing or wrong."""
    for name in ("no_weights", "no_tokenizer", "no_pad", "torn", "bad_format", "pickled", "empty"):
        shutil.copytree(policy, folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "no_tokenizer" / file).unlink()
    bare = type(lab_words)(tokenizer_object=lab_words.backend_tokenizer, unk_token="<unk>")
    bare.save_pretrained(folder / "no_pad")
    weights = folder / "torn" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (folder / "bad_format" / "step_format.json").write_text('{"separator": "\\n", "separator_ids": "4"}')
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")
    shutil.rmtree(folder / "empty")
    (folder / "empty").mkdir()


MISTAKES: list[tuple[str, Callable[[Path], dict[str, Any]], str]] = [
    ("prm", lambda d: {"rows": str(d / "none")}, "none: no such file"),
    ("prm", lambda d: {"rows": ""}, "rows is missing: rows to train on"),
    ("prm", lambda d: {"model": ""}, "model is missing: the checkpoint to start from"),
    ("prm", lambda d: {"rows": str(d / "unfinished")}, "unfinished: no finished rows here"),
    ("prm", lambda d: {"rows": str(d / "empty.jsonl")}, "empty.jsonl: the data set is empty"),
    ("prm", lambda d: {"rows": str(d / "torn.jsonl")}, "torn.jsonl, line 2: not valid JSON"),
    ("prm", lambda d: {"rows": str(d / "torn.parquet")}, "torn.parquet: not a readable parquet file"),
    ("prm", lambda d: {"rows": str(d / "sft_rows")}, "row 0: field prompt of StepLabels is missing"),
    ("orm", lambda d: {"rows": str(d / "prm_rows")}, "row 0: field text of Solution is missing"),
    ("sft", lambda d: {"rows": str(d / "prm_rows")}, "row 0: field kind of Dialogue is missing"),
    ("prm", lambda d: {"eval_rows": str(d / "none")}, "none: no such file"),
    ("prm", lambda d: {"model": str(d / "nowhere")}, "nowhere: no such model folder"),
    ("prm", lambda d: {"model": str(d / "models/empty")}, "empty: no tokenizer could be loaded"),
    (
        "prm",
        lambda d: {"model": str(d / "models/no_weights")},
        "no AutoModelForTokenClassification model could be loaded",
    ),
    ("sft", lambda d: {"model": str(d / "models/torn")}, "torn: no AutoModelForCausalLM model could be loaded"),
    ("sft", lambda d: {"model": str(d / "models/pickled")}, "pickled: no AutoModelForCausalLM model could be loaded"),
    ("prm", lambda d: {"model": str(d / "models/no_tokenizer")}, "no_tokenizer: no tokenizer could be loaded"),
    ("prm", lambda d: {"model": str(d / "models/no_pad")}, "neither a pad token nor an end-of-sequence token"),
    ("prm", lambda d: {"model": str(d / "models/bad_format")}, "step_format.json: separator_ids must be token ids"),
    (
        "prm",
        lambda d: {"rows": str(d / "foreign")},
        "foreign: the step format of the data has separator ' ; ', the model's has",
    ),
    (
        "sft",
        lambda d: {"model": str(d / "models/judge")},
        "says head: scalar, so it is a reward model and not a policy",
    ),
    ("prm", lambda d: {"head": "three_class"}, "head must be one of two_class, scalar, found 'three_class'"),
    ("prm", lambda d: {"labels": "fuzzy"}, "labels must be one of hard, soft, threshold, td, found 'fuzzy'"),
    ("prm", lambda d: {"dtype": "float8"}, "dtype must be one of float32, bfloat16, float16, auto, found 'float8'"),
    ("prm", lambda d: {"learning_rte": 0.1}, "unknown key 'learning_rte'; did you mean learning_rate?"),
    ("prm", lambda d: {"max_length": 4}, "no row can be trained on"),
    ("prm", lambda d: {"output_dir": str(d / "empty.jsonl")}, "empty.jsonl"),
    ("sft", lambda d: {"max_length": 4}, "no row can be trained on"),
]


@pytest.fixture
def mistakes(settings: Any, tmp_path: Path, policy_folder: Path, lab_words: Any) -> dict[str, dict[str, Any]]:
    """Right settings for each trainer, among everything that can be wrong."""
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "torn.jsonl").write_text("\n{")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    broken_models(tmp_path / "models", policy_folder, lab_words)
    right = {kind: settings(kind, max_steps=1) for kind in ("prm", "orm", "sft")}
    shutil.copytree(right["prm"]["rows"], tmp_path / "foreign")
    StepFormat.for_policy(lab_words, " ; ").save(tmp_path / "foreign")
    shutil.copytree(policy_folder, tmp_path / "models" / "judge")
    StepFormat.for_policy(lab_words, "\n").for_reward("scalar", "soft").save(tmp_path / "models" / "judge")
    return right


def test_each_mistake_is_one_sentence(mistakes, starter, tmp_path):
    for number, (kind, wrong, message) in enumerate(MISTAKES):
        path = tmp_path / f"{number}.yaml"
        path.write_text(yaml.safe_dump({**mistakes[kind], **wrong(tmp_path)}))
        ended = starter(f"stepladder.trainers.{kind}", "--config", str(path))
        told = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert ended.status == 2, (message, ended.err)
        assert len(told) == 1, ended.err
        assert message in told[0], (message, told[0])
        assert "Traceback" not in ended.err, ended.err
        assert ended.err.splitlines()[-1] == told[0]


def test_a_config_that_is_not_there_and_a_command_without_one(starter, tmp_path):
    ended = starter("stepladder.trainers.prm", "--config", str(tmp_path / "none.yaml"))
    assert (ended.status, ended.err.splitlines()[-1]) == (2, f"error: {tmp_path / 'none.yaml'}: no such file")
    ended = starter("stepladder.trainers.prm")
    assert ended.status == 2
    assert ended.err.splitlines()[-1].startswith("error: stepladder.trainers.prm: ")


@pytest.mark.parametrize(
    ("kind", "fields"), [("prm", "after_first_zero"), ("orm", "token_level"), ("sft", "reduction")]
)
def test_help_names_every_field_of_our_own(starter, kind, fields):
    ended = starter(f"stepladder.trainers.{kind}", "--help")
    assert ended.status == 0
    for field in (fields, "model", "rows", "max_length", "lora_r", "separator"):
        assert f"  {field} (" in ended.out


def test_a_pad_token_that_is_missing_becomes_the_end_of_sequence(settings, train, policy_folder, lab_words, tmp_path):
    """Its id is shared, and still the end of the sequence is trained: padding is masked by position, not by id."""
    folder = tmp_path / "shared"
    shutil.copytree(policy_folder, folder)
    type(lab_words)(tokenizer_object=lab_words.backend_tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(
        folder
    )
    assert StepFormat.load(folder).separator_ids
    plain = train("sft", settings("sft", max_steps=3, output_dir=str(tmp_path / "plain")))
    shared = train("sft", settings("sft", max_steps=3, model=str(folder), output_dir=str(tmp_path / "shared_out")))
    losses = [[line["loss"] for line in result.lines if "loss" in line] for result in (plain, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
