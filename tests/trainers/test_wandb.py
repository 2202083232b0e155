"""Tracking with wandb, offline: what a run's file holds when it is read back."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.data_gen.store import write_rows


def records_of(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log of 32 KiB blocks, in which a record may lie in several pieces."""
    data = path.read_bytes()
    identifier, magic, _ = struct.unpack("<4sHB", data[:7])
    assert (identifier, magic) == (b":W&B", 0xBEE1)
    position, pieces = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<LHB", data[position : position + 7])
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield pieces
            pieces = b""


def read_back(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(history rows, config) of an offline run."""
    from wandb.proto import wandb_internal_pb2

    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    values = lambda items: {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
    for data in records_of(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(values(record.history.item))
        elif kind in ("run", "config"):
            config.update(values((record.run.config if kind == "run" else record.config).update))
    return history, config


def test_an_offline_run_holds_losses_and_config(starter, settings, rows, tmp_path):
    write_rows(tmp_path / "held_out", rows.some("prm", 5, seed=2))
    values = settings(
        "prm", labels="soft", threshold=0.25, max_steps=4, report_to="wandb", run_name="offline", project="stepladder-test",
        eval_rows=str(tmp_path / "held_out"), eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    ended = starter("stepladder.trainers.prm", "--config", str(path), environment=environment)
    assert ended.status == 0, ended.err

    [file] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    history, config = read_back(file)
    lines = [json.loads(line) for line in Path(values["output_dir"], "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "accuracy", "grad_norm", "learning_rate"):
        logged = {line["step"]: line[name] for line in lines if "loss" in line}
        tracked = {row["train/global_step"]: row[f"train/{name}"] for row in history if f"train/{name}" in row}
        assert sorted(tracked) == [1, 2, 3, 4]
        assert tracked == pytest.approx(logged)
    evaluated = {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}
    tracked = {row["train/global_step"]: row["eval/loss"] for row in history if "eval/loss" in row}
    assert sorted(tracked) == [2, 4]
    assert tracked == pytest.approx(evaluated)

    # What was asked for and what the scores will mean: a run explains itself.
    for name in ("labels", "threshold", "head", "loss", "rows", "model", "max_length", "learning_rate", "lora_r"):
        assert name in config
    assert (config["labels"], config["threshold"], config["head"]) == ("soft", 0.25, "two_class")
    expected = json.loads(Path(values["output_dir"], "step_format.json").read_text())
    assert config["step_format"] == expected
    assert expected["label_kind"] == "soft"


def test_nothing_is_tracked_unless_asked(settings, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train("prm", settings("prm", max_steps=1))
    assert not (tmp_path / "wandb").exists()
