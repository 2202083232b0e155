"""Every trainer between two CPU processes: under DDP, ZeRO-2 and ZeRO-3 it trains what one process trains.

Starting processes and engines costs more than these models do, so each engine is launched once, and its two processes train one
model after the other. tests/launch/test_distributed.py has what a user starts: single trainers, resuming, bf16, SLURM.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import stepladder
from stepladder.config import build

pytestmark = pytest.mark.launch

ENGINES = {
    "cpu_ddp": {"engine": "DistributedDataParallel", "zero_stage": None, "processes": 2},
    "cpu_zero2": {"engine": "DeepSpeedEngine", "zero_stage": 2, "processes": 2},
    "cpu_zero3": {"engine": "DeepSpeedEngine", "zero_stage": 3, "processes": 2},
}
# 17 rows in steps of 8 leave a last step of one row: one process has it and another row that is not its own, the other has none.
ROWS, EVAL_ROWS = 17, 7
COMMON = {
    "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "gradient_accumulation_steps": 2, "save_strategy": "no",
    "disable_tqdm": True,
}  # fmt: skip
OFFLINE = {"num_train_epochs": 1, "learning_rate": 1e-2, "logging_steps": 1, **COMMON}
ONLINE = {
    "task": {"kind": "chain", "p": 7, "min_steps": 1, "max_steps": 3, "sizes": {"train": 40, "dev": 7, "test": 7}},
    "max_new_tokens": 10, "prompts": 8, "samples": 2, "rollouts": 2, "update_epochs": 1, "learning_rate": 1e-3,
    "process_reward": "checker", "process_form": "difference", "eval_problems": 7, **COMMON,
}  # fmt: skip
# One process with the same 8 rows in each optimiser step.
ALONE = {"per_device_train_batch_size": 4, "use_cpu": True}
# name: (trainer, its config, what its rows are, options). A Q-model of PAV is a PRM with soft labels and the root's value.
TRAININGS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "pav": ("prm", "PRMArguments", "prm", {"labels": "soft", "root": True}),
    "orm": ("orm", "ORMArguments", "orm", {}),
    "orm_lm": ("orm", "ORMArguments", "orm", {"lambda_lm": 1.0}),
    "ranking": ("ranking", "RankingArguments", "ranking", {}),
    "ranking_step": ("ranking", "RankingArguments", "ranking", {"compare": "step"}),
    "value": ("value", "ValueArguments", "value", {}),
    "value_lora": ("value", "ValueArguments", "value", {"lora_r": 4}),
    "dpo": ("dpo", "DPOArguments", "dpo", {"beta": 0.5, "visit_smoothing": True, "share_prefix": True}),
    "sft_packed": ("sft", "SFTArguments", "sft", {"packing": True, "max_length": 100, "num_train_epochs": 2}),
    "ppo": ("rl", "RLArguments", "", {"algorithm": "ppo"}),
    "grpo_lora": ("rl", "RLArguments", "", {"algorithm": "grpo", "lora_r": 4}),
}
WATCHED = ("loss", "eval_loss", "reward", "kl", "entropy", "accuracy", "eval_length")


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, policy_folder: Path, rows: SimpleNamespace) -> Any:
    """Writes the file that tells the processes what to train into a folder: (folder, further settings) -> its path."""
    from stepladder.data_gen.rows import to_record

    ground = tmp_path_factory.mktemp("ground")
    for kind in {kind for _, _, kind, _ in TRAININGS.values() if kind}:
        for name, count, seed in (("rows", ROWS, 1), ("eval_rows", EVAL_ROWS, 2)):
            lines = [json.dumps(to_record(row)) + "\n" for row in rows.some(kind, count, seed)]
            (ground / f"{kind}.{name}.jsonl").write_text("".join(lines))

    def write(folder: Path, more: dict[str, Any]) -> Path:
        told = []
        for name, (trainer, config, kind, options) in TRAININGS.items():
            values = {"model": str(policy_folder), "output_dir": str(folder / name)}
            if kind:
                values |= {which: str(ground / f"{kind}.{which}.jsonl") for which in ("rows", "eval_rows")}
            told.append([trainer, config, {**(OFFLINE if kind else ONLINE), **values, **options, **more}])
        (folder / "jobs.json").write_text(json.dumps(told))
        return folder / "jobs.json"

    return write


def _train_all(jobs: Path) -> None:
    for trainer, config, values in json.loads(jobs.read_text()):
        module = importlib.import_module(f"stepladder.trainers.{trainer}")
        module.train(build(getattr(module, config), values))


@pytest.fixture(scope="module")
def alone(jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    _train_all(jobs(folder, ALONE))
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def launched(request: pytest.FixtureRequest, jobs: Any, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The folder that two processes under one engine have trained everything into, and what they printed."""
    if "zero" in request.param:
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(request.param)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = Path(stepladder.__file__).parent / "launch" / "accelerate" / f"{request.param}.yaml"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2",
        "--main_process_port", port, __file__, jobs(folder, {}),
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    told = {
        "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run([str(part) for part in command], env={**kept, **told}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return SimpleNamespace(folder=folder, engine=ENGINES[request.param], output=done.stdout + done.stderr)


def _logged(folder: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {f"{name}, step {line['step']}": line[name] for line in lines for name in WATCHED if name in line}


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_train_what_one_trains(name: str, alone: Path, launched: SimpleNamespace) -> None:
    """Losses of every step and of held-out rows, and the weights of every checkpoint; by the engine that was asked for."""
    ours, reference = launched.folder / name, alone / name
    assert json.loads((ours / "engine.json").read_text()) == launched.engine
    expected = _logged(reference)
    assert len([key for key in expected if key.startswith("loss")]) >= 2
    # An accuracy is a mean of the processes' means here, while a loss is divided by the items of all.
    kept = {key: value for key, value in expected.items() if not (TRAININGS[name][2] and key.startswith("accuracy"))}
    found = _logged(ours)
    assert {key: found[key] for key in kept} == pytest.approx(kept, abs=1e-5)
    checkpoints = [path.relative_to(reference) for path in reference.rglob("model.safetensors")]
    assert len(checkpoints) == (2 if name.startswith(("value", "ppo")) else 1)
    for path in checkpoints:
        weights, others = load_file(ours / path), load_file(reference / path)
        assert weights.keys() == others.keys()
        for weight in weights:
            if name.startswith("ranking") and weight == "score.bias":
                continue  # no difference of scores depends on it: its gradients are rounding, and Adam enlarges them
            # Adam divides by the root of the squared gradient: where that is nearly 0, rounding decides a share of the step.
            torch.testing.assert_close(weights[weight], others[weight], atol=1e-3, rtol=0)


def test_no_weight_is_looked_for_that_took_no_part(launched: SimpleNamespace) -> None:
    """DDP would walk the graph in every step; torch warns of it where there was nothing to find."""
    assert "find_unused_parameters" not in launched.output


if __name__ == "__main__":
    from stepladder.trainers.common import end_process

    _train_all(Path(sys.argv[1]))
    end_process()
