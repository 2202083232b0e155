"""kill -9 in the middle of a training: the same command goes on, and losses and weights are those of a run left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepladder.data_gen.store import write_rows
from stepladder.trainers.common import WHOLE

TIMING = ("train_runtime", "eval_runtime", "_per_second", "train_loss", "total_flos")


@pytest.fixture
def commands(tmp_path: Path, rows: Any, settings: Any) -> Callable[..., Any]:
    """Writes a config of 24 steps over two epochs and a half, with a checkpoint every three steps."""

    def make(kind: str, **over: Any) -> Callable[[str], list[str]]:
        values = settings(
            kind, rows.some(kind, 40), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=24,
            save_strategy="steps", save_steps=3, logging_steps=2, lr_scheduler_type="constant", learning_rate=0.003, **over,
        )  # fmt: skip
        write_rows(tmp_path / "held_out", rows.some(kind, 6, seed=3))
        values["eval_rows"] = str(tmp_path / "held_out")
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if k != "output_dir"}))
        return lambda out: ["--config", str(path), "--output_dir", str(tmp_path / out)]

    return make


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[dict[str, Any]]:
    """What was logged, without what depends on the clock; the summary of a call covers that call's steps alone."""
    kept = [line for line in lines_of(out) if "loss" in line or "eval_loss" in line]
    return [{k: v for k, v in line.items() if not k.startswith("eval_") or k == "eval_loss"} for line in kept]


def same_weights(a: Path, b: Path) -> None:
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def being_written(out: Path, step: int) -> Callable[[], bool]:
    """True from when a checkpoint's folder is there: kills fall into the writing of it."""
    return lambda: (out / f"checkpoint-{step}").exists()


def written(out: Path, step: int) -> Callable[[], bool]:
    return lambda: (out / f"checkpoint-{step}" / WHOLE).exists()


CASES = [
    ("prm", {"labels": "soft"}),
    ("sft", {"lora_r": 2, "lora_dropout": 0.2}),
    ("prm", {"lora_r": 2, "lora_dropout": 0.2, "save_total_limit": None}),
    ("dpo", {"lora_r": 2, "lora_dropout": 0.2, "visit_smoothing": True}),
]


@pytest.mark.parametrize(("kind", "over"), CASES)
def test_a_killed_training_equals_one_left_alone(commands, starter, tmp_path, kind, over):
    command, module, out = commands(kind, **over), f"stepladder.trainers.{kind}", tmp_path / "killed"
    alone = starter(module, *command("alone"))
    assert alone.status == 0, alone.err

    # Killed before the first checkpoint is whole, right after one is, and while another is being written.
    told = []
    for kill in (being_written(out, 3), written(out, 9), being_written(out, 15)):
        ended = starter(module, *command("killed"), kill=kill)
        assert ended.status == -9, ended.err
        assert not (out / "model.safetensors").exists()
        told.append(sorted(int(p.parent.name.split("-")[1]) for p in out.glob(f"checkpoint-*/{WHOLE}")))
    assert told[1]
    assert told[1][-1] >= 9, told
    assert told[2], "a whole checkpoint is lost while the next one is written"
    # Whatever the last kill left: a checkpoint without its mark is not continued from, nor is a torn line of metrics.
    for newest in (out / "checkpoint-15", out / "checkpoint-18"):
        (newest / WHOLE).unlink(missing_ok=True)
        if (newest / "model.safetensors").exists():
            (newest / "model.safetensors").write_bytes(b"torn")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "loss": 0.')
    went_on_from = max([0, *(int(p.parent.name.split("-")[1]) for p in out.glob(f"checkpoint-*/{WHOLE}"))])
    again = starter(module, *command("killed"))
    assert again.status == 0, again.err

    assert losses(out) == losses(tmp_path / "alone")
    steps = [line["step"] for line in losses(out) if "loss" in line]
    # Every second step, and every checkpoint's: what is averaged between two lines is in no checkpoint.
    assert steps == [2, 3, 4, 6, 8, 9, 10, 12, 14, 15, 16, 18, 20, 21, 22, 24]
    assert again.out.count("'loss':") == sum(step > went_on_from for step in steps)  # it did not begin again
    same_weights(out, tmp_path / "alone")


def test_a_kill_after_training_and_before_the_model_is_written(commands, starter, tmp_path):
    command, out = commands("prm"), tmp_path / "killed"
    alone = starter("stepladder.trainers.prm", *command("alone"))
    assert alone.status == 0, alone.err
    ended = starter("stepladder.trainers.prm", *command("killed"), kill=written(out, 24))
    assert ended.status == -9
    again = starter("stepladder.trainers.prm", *command("killed"))
    assert again.status == 0, again.err
    same_weights(out, tmp_path / "alone")
    assert losses(out) == losses(tmp_path / "alone")


def test_the_command_line_itself(commands, starter, tmp_path):
    """`python -m` in a process of its own gives what the forked ones above give."""
    command = commands("prm")
    forked = starter("stepladder.trainers.prm", *command("forked"))
    assert forked.status == 0, forked.err
    subprocess.run(
        [sys.executable, "-m", "stepladder.trainers.prm", *command("own")],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    same_weights(tmp_path / "own", tmp_path / "forked")
