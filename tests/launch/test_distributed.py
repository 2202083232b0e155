"""Training with several processes really started: which engine is built, and that it trains what one process trains.

Each engine runs as a user would start it, with `accelerate launch` and a file of launch/accelerate, between two CPU
processes. The one-process run has the same global batch; float32 throughout.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

import stepladder
from stepladder.basics import UserError
from stepladder.config import build
from stepladder.data_gen.rows import Dialogue, Message, Pair, Source, StepLabels, to_record
from stepladder.models.loading import load_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.trainers import dpo, prm, rl, sft
from stepladder.trainers.common import StepladderTrainer, TellEngine, built_engine, engine_line, start_model
from stepladder.trainers.examples import LikeLengths
from stepladder.trainers.reward import RewardTrainer, collate

pytestmark = pytest.mark.launch

ROOT = Path(stepladder.__file__).parent
CONFIGS = ROOT / "launch" / "accelerate"
SOURCE = Source("policy", "engine", "task", 0)
ROWS, EVAL_ROWS = 36, 13
# DeepSpeed builds an operation when it first runs on a machine, which takes minutes where cores are shared.
SECONDS = 500
PRM = {
    "max_steps": 7,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "like_lengths": False,
    "save_strategy": "no",
    "disable_tqdm": True,
}
# One process with the same 8 rows in each optimiser step: 36 rows leave a step of 4 at the end of the epoch, the fifth.
ALONE = {"per_device_train_batch_size": 4, "use_cpu": True}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))}
    return {
        **kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", **more,
    }  # fmt: skip


def _run(command: list[Any], **more: str) -> tuple[int, str]:
    """(status, stdout, then stderr); a command that hangs is stopped with all its processes."""
    process = subprocess.Popen(
        [str(part) for part in command], env=_environment(**more), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # the launcher stops its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        output, errors = process.communicate()
        pytest.fail(f"no end after {SECONDS} s:\n{output}{errors[-4000:]}")
    return process.returncode, output + errors


def _launch(name: str, trainer: str, config: Path, out: Path, *arguments: str, **more: str) -> tuple[int, str]:
    status, output = _run(
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{name}.yaml",
            "--num_processes", "2", "--main_process_port", _free_port(),
            "-m", f"stepladder.trainers.{trainer}", "--config", config, "--output_dir", out, *arguments,
        ],
        **more,
    )  # fmt: skip
    print(f"{name}: " + next((line for line in output.splitlines() if line.startswith("engine: ")), "no engine"))
    return status, output


def _engines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("engine: ")]


def _logged(out: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


def _assert_same_training(out: Path, reference: Path) -> None:
    losses, expected = _logged(out, "loss"), _logged(reference, "loss")
    assert list(expected) == list(range(1, PRM["max_steps"] + 1))
    assert losses == pytest.approx(expected, abs=1e-4)
    ours, theirs = load_file(out / "model.safetensors"), load_file(reference / "model.safetensors")
    assert ours.keys() == theirs.keys()
    # Adam divides by the root of the squared gradient: where a gradient is nearly 0, rounding decides a share of the step.
    worst = max((ours[name] - theirs[name]).abs().max().item() for name in ours)
    print(f"largest difference: loss {max(abs(losses[s] - expected[s]) for s in expected):.1e}, weight {worst:.1e}")
    for weight in ours:
        torch.testing.assert_close(ours[weight], theirs[weight], atol=2e-3, rtol=0, msg=lambda m, w=weight: f"{w}: {m}")


def _write_rows(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(to_record(row)) + "\n" for row in rows))


def _step_labels(number: int, seed: int) -> list[StepLabels]:
    """Rows of 1 to 12 steps; the longer a solution, the worse its labels, so that processes with more labels differ in loss."""
    draw = random.Random(seed)
    rows = []
    for i in range(number):
        steps = [
            " ".join(map(str, (draw.randint(0, 12), "+", draw.randint(0, 12)))) for _ in range(draw.randint(1, 12))
        ]
        right = tuple(int(draw.random() < 1 / len(steps) ** 0.5) for _ in steps)
        rows.append(
            StepLabels(
                f"p{i}", f"Start {draw.randint(0, 12)} ;\n", "1", 0, tuple(steps), (1, *right), (1,) * (len(steps) + 1),
                "monte_carlo", "right", None, False, SOURCE,
            )
        )  # fmt: skip
    return rows


def _dialogues(number: int) -> list[Dialogue]:
    draw = random.Random(3)
    rows = []
    for i in range(number):
        reply = " ".join(str(draw.randint(0, 12)) for _ in range(draw.randint(1, 20)))
        messages = Message("user", f"Start {draw.randint(0, 12)} ;\n"), Message("assistant", reply, train=True)
        rows.append(Dialogue(f"p{i}", "solve", messages, "{}", SOURCE))
    return rows


def _pairs(number: int, seed: int) -> list[Pair]:
    """Pairs of one to eight steps behind none to three; those of many steps lie further from the start of training."""
    draw = random.Random(seed)
    steps = lambda least, most: tuple(
        f"{draw.randint(0, 12)} + {draw.randint(0, 12)}" for _ in range(draw.randint(least, most))
    )
    return [
        Pair(
            f"p{i}", f"Start {draw.randint(0, 12)} ;\n", steps(0, 3), steps(1, 8), steps(1, 8), 1.0, 0.0,
            draw.randint(5, 9), draw.randint(0, 4), draw.random() < 0.5, draw.random() < 0.5, SOURCE,
        )
        for i in range(number)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory: Any, tiny_policy: Any, lab_words: Any) -> Path:
    """A folder with a policy, rows and a config."""
    folder = tmp_path_factory.mktemp("ground")
    policy = tiny_policy(lab_words)
    # A new head is drawn with this width: scores spread, so that losses of different rows differ from the first step.
    policy.config.initializer_range = 0.5
    policy.save_pretrained(folder / "policy")
    lab_words.save_pretrained(folder / "policy")
    StepFormat.for_policy(lab_words, "\n").save(folder / "policy")
    _write_rows(folder / "labels.jsonl", _step_labels(ROWS, 13))
    _write_rows(folder / "eval.jsonl", _step_labels(EVAL_ROWS, 1))
    _write_rows(folder / "dialogues.jsonl", _dialogues(ROWS))
    _write_rows(folder / "pairs.jsonl", _pairs(ROWS, 2))
    _write_rows(folder / "eval_pairs.jsonl", _pairs(EVAL_ROWS, 4))
    common = {"model": str(folder / "policy"), **PRM}
    dpo_config = {**common, "rows": str(folder / "pairs.jsonl"), "eval_rows": str(folder / "eval_pairs.jsonl")}
    (folder / "dpo.yaml").write_text(yaml.safe_dump({**dpo_config, "beta": 0.5, "visit_smoothing": True}))
    prm_config = {**common, "rows": str(folder / "labels.jsonl"), "eval_rows": str(folder / "eval.jsonl")}
    (folder / "prm.yaml").write_text(yaml.safe_dump(prm_config))
    sft_config = {**common, "rows": str(folder / "dialogues.jsonl"), "reduction": "token"}
    (folder / "sft.yaml").write_text(yaml.safe_dump(sft_config))
    return folder


def _alone(module: Any, config_class: type, config: Path, out: Path, **more: Any) -> Path:
    values = yaml.safe_load(config.read_text())
    module.train(build(config_class, {**values, **ALONE, "output_dir": str(out), **more}))
    return out


@pytest.fixture(scope="module")
def one_process(ground: Path) -> Path:
    """The folder of the one-process PRM that the others must equal."""
    return _alone(prm, prm.PRMArguments, ground / "prm.yaml", ground / "alone")


def _examples(path: Path) -> list[dict[str, Any]]:
    from collections import Counter

    args = SimpleNamespace(
        labels="hard", threshold=0.0, after_first_zero=False, root=False, lambda_lm=0.0, max_length=1024
    )
    tokenizer = load_tokenizer(str(path.parent / "policy"))
    step_format = StepFormat.load(path.parent / "policy")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [StepLabels(**{**r, "source": SOURCE, "n_correct": tuple(r["n_correct"])}) for r in rows]
    made = [prm.prm_example(row, tokenizer, step_format, args, Counter()) for row in rows]
    return [example for example in made if example is not None]


def _order(examples: list[dict[str, Any]]) -> LikeLengths:
    return LikeLengths([len(e["input_ids"]) for e in examples], 8, 42, group=False)


def _nats(model: Any, example: dict[str, Any]) -> tuple[float, int]:
    """(sum of the binary cross-entropies of one example's labels, their number), written out."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0].double()
    total, count = 0.0, 0
    for position, counted in enumerate(example["target_mask"]):
        if counted:
            good = torch.softmax(logits[position], -1)[1].item()
            total -= torch.tensor(good if example["target"][position] else 1 - good, dtype=torch.float64).log().item()
            count += 1
    return total, count


@pytest.fixture(scope="module")
def first_step(ground: Path) -> list[list[tuple[float, int]]]:
    """(nats, labels) of each row of the first optimiser step, by process, from the model as it starts."""
    examples = _examples(ground / "labels.jsonl")
    args = SimpleNamespace(model=str(ground / "policy"), seed=42, dtype="float32", lora_r=0)
    model = start_model(AutoModelForTokenClassification, args, num_labels=2, classifier_dropout=0.0).eval()
    order = list(_order(examples))[:8]
    # Batches of two go round: rows 0, 1, 4, 5 to the first process and 2, 3, 6, 7 to the second.
    return [[_nats(model, examples[order[i]]) for i in share] for share in ((0, 1, 4, 5), (2, 3, 6, 7))]


def test_the_processes_see_different_numbers_of_labels(first_step: Any, one_process: Path) -> None:
    """Without this the comparisons below could not tell a mean over labels from a mean of the processes' means."""
    counts = [sum(n for _, n in share) for share in first_step]
    assert counts[0] != counts[1]
    whole = sum(nats for share in first_step for nats, _ in share) / sum(counts)
    of_means = sum(sum(nats for nats, _ in share) / n for share, n in zip(first_step, counts, strict=True)) / 2
    assert abs(whole - of_means) > 1e-2
    assert _logged(one_process, "loss")[1] == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("cpu_ddp", "DistributedDataParallel, 2 processes"),
        ("cpu_zero2", "DeepSpeedEngine, ZeRO stage 2, 2 processes"),
        ("cpu_zero3", "DeepSpeedEngine, ZeRO stage 3, 2 processes"),
    ],
)
def test_two_processes_train_what_one_trains(
    name: str, engine: str, ground: Path, one_process: Path, first_step: Any, tmp_path: Path
) -> None:
    if "zero" in name:
        pytest.importorskip("deepspeed")
    status, output = _launch(name, "prm", ground / "prm.yaml", tmp_path / "out")
    assert status == 0, output[-4000:]
    assert _engines(output) == [f"engine: {engine}"]
    built = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert engine.startswith(built["engine"])
    assert built["processes"] == 2
    assert built["zero_stage"] == (int(name[-1]) if "zero" in name else None)
    _assert_same_training(tmp_path / "out", one_process)
    # 13 evaluation rows in batches of 2 a process leave one row for the last round: none may count twice.
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "out").eval()
    nats = [_nats(model, example) for example in _examples(ground / "eval.jsonl")]
    expected = sum(n for n, _ in nats) / sum(count for _, count in nats)
    assert _logged(tmp_path / "out", "eval_loss") == {PRM["max_steps"]: pytest.approx(expected, abs=1e-5)}
    assert _logged(one_process, "eval_loss") == {PRM["max_steps"]: pytest.approx(expected, abs=1e-4)}


def test_two_processes_prefer_what_one_prefers(ground: Path, tmp_path: Path) -> None:
    """DPO: the reference is computed in shares, and the loss is a mean over the pairs of both processes."""
    reference = _alone(dpo, dpo.DPOArguments, ground / "dpo.yaml", tmp_path / "alone")
    status, output = _launch("cpu_ddp", "dpo", ground / "dpo.yaml", tmp_path / "out")
    assert status == 0, output[-4000:]
    assert _engines(output) == ["engine: DistributedDataParallel, 2 processes"]
    _assert_same_training(tmp_path / "out", reference)
    kept = [json.loads((out / dpo.REFERENCE).read_text()) for out in (tmp_path / "out", reference)]
    for name, count in (("train", ROWS), ("eval", EVAL_ROWS)):
        flat = [[value for pair in one[name] for value in pair] for one in kept]
        assert flat[0] == pytest.approx(flat[1], abs=1e-4)
        assert len(flat[0]) == 2 * count
    ours, theirs = (_logged(out, "eval_loss") for out in (tmp_path / "out", reference))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_bf16_leaves_labels_as_they_are(ground: Path, one_process: Path, tmp_path: Path) -> None:
    """The file for GPUs as it is, between CPU processes: near the float32 losses, from the very same labels."""
    pytest.importorskip("deepspeed")
    out = tmp_path / "out"
    status, output = _launch("zero3", "prm", ground / "prm.yaml", out)
    assert status == 0, output[-4000:]
    assert _engines(output) == ["engine: DeepSpeedEngine, ZeRO stage 3, 2 processes"]
    assert _logged(out, "loss")[1] == pytest.approx(_logged(one_process, "loss")[1], rel=0.02)
    examples = _examples(ground / "labels.jsonl")
    order = list(_order(examples))[:8]
    pairs = [[examples[i] for i in order[k : k + 2]] for k in (0, 2, 4, 6)]
    means = [sum(sum(e["target"]) for e in pair) / sum(sum(e["target_mask"]) for e in pair) for pair in pairs]
    assert _logged(out, "target_mean")[1] == pytest.approx(sum(means) / 4, abs=1e-6)
    AutoModelForTokenClassification.from_pretrained(out)


def test_lora_under_zero3_is_merged_and_resumes(ground: Path, tmp_path: Path) -> None:
    """A run that loses its last checkpoint and its end goes on from the one before, to the same model."""
    pytest.importorskip("deepspeed")
    reference = _alone(prm, prm.PRMArguments, ground / "prm.yaml", tmp_path / "alone", lora_r=4)
    arguments = ("--lora_r", "4", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "3")
    out = tmp_path / "out"
    status, output = _launch("cpu_zero3", "prm", ground / "prm.yaml", out, *arguments)
    assert status == 0, output[-4000:]
    _assert_same_training(out, reference)
    for later in (6, 7):
        (out / f"checkpoint-{later}" / "whole.json").unlink()
    (out / "model.safetensors").unlink()
    status, output = _launch("cpu_zero3", "prm", ground / "prm.yaml", out, *arguments)
    assert status == 0, output[-4000:]
    assert output.count("{'loss': ") == PRM["max_steps"] - 3  # the first three were not trained again
    _assert_same_training(out, reference)


# --- online training ---------------------------------------------------------------------------------------------------------

RL = {
    "task": {"kind": "chain", "p": 7, "min_steps": 1, "max_steps": 3, "sizes": {"train": 40, "dev": 7, "test": 7}},
    "max_new_tokens": 10, "prompts": 8, "samples": 2, "rollouts": 3, "update_epochs": 2, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "eval_problems": 7, "save_strategy": "no", "disable_tqdm": True,
    "process_reward": "checker", "process_form": "difference", "false_positives": 0.5, "whiten": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "engine", "over"),
    [
        (
            "cpu_ddp",
            "DistributedDataParallel, 2 processes",
            {"algorithm": "ppo", "save_strategy": "steps", "save_every": 2},
        ),
        (
            "cpu_zero3",
            "DeepSpeedEngine, ZeRO stage 3, 2 processes",
            {"algorithm": "ppo", "rollouts": 2, "update_epochs": 1},
        ),
    ],
)
def test_two_processes_sample_and_train_what_one_does(
    name: str, engine: str, over: dict[str, Any], ground: Path, tmp_path: Path
) -> None:
    """The same problems, samples, rewards, global whitening, losses and weights of policy and critic; split weights are sampled
    from as they are after every update."""
    if "zero" in name:
        pytest.importorskip("deepspeed")
    path = tmp_path / "rl.yaml"
    values = {"model": str(ground / "policy"), **RL, **over}
    path.write_text(yaml.safe_dump(values))
    alone = tmp_path / "alone"
    rl.train(build(rl.RLArguments, {**values, **ALONE, "output_dir": str(alone)}))
    out = tmp_path / "out"
    status, output = _launch(name, "rl", path, out)
    assert status == 0, output[-4000:]
    assert _engines(output) == [f"engine: {engine}"]
    for metric in (
        "loss",
        "reward",
        "length",
        "kl",
        "entropy",
        "explained_variance",
        "process_reward",
        "generated_tokens",
    ):
        assert _logged(out, metric) == pytest.approx(_logged(alone, metric), abs=2e-4), metric
    assert len(_logged(out, "loss")) == values["rollouts"]
    assert _logged(out, "eval_length") == _logged(alone, "eval_length")
    assert max(_logged(out, "engine_gap").values()) < 1e-4  # what is sampled from is what is trained
    for file in ("model.safetensors", "critic/model.safetensors"):
        ours, theirs = load_file(out / file), load_file(alone / file)
        assert ours.keys() == theirs.keys()
        for weight in ours:
            torch.testing.assert_close(
                ours[weight], theirs[weight], atol=1e-3, rtol=0, msg=lambda m, w=weight: f"{w}: {m}"
            )
    AutoModelForCausalLM.from_pretrained(out)
    AutoModelForTokenClassification.from_pretrained(out / "critic")


# Slurm's commands as train.sh uses them, for one machine that plays two.
_SCONTROL = """#!/bin/bash
[ "$1 $2 $3" = "show hostnames machines[0-1]" ] && echo 127.0.0.1 && echo 127.0.0.2
"""
_SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
wait $first && wait $second
"""


@pytest.fixture
def slurm(tmp_path: Path) -> str:
    """PATH with stand-ins for srun and scontrol, and with this environment's commands."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_sft_over_two_machines_started_by_slurm(slurm: str, ground: Path, tmp_path: Path) -> None:
    """launch/slurm/train.sh, one process on each of two machines (both this one): DDP, a mean over trained tokens."""
    reference = _alone(sft, sft.SFTArguments, ground / "sft.yaml", tmp_path / "alone")
    job = next(port for _ in range(100) if 20000 <= (port := _free_port()) < 40000) - 20000
    status, output = _run(
        ["bash", ROOT / "launch/slurm/train.sh", "sft", "--config", ground / "sft.yaml", "--output_dir", tmp_path / "out"],
        PATH=slurm, ACCELERATE_CONFIG=str(CONFIGS / "cpu_ddp.yaml"), SLURM_JOB_ID=str(job), SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="machines[0-1]", SLURM_GPUS_ON_NODE="1",
    )  # fmt: skip
    assert status == 0, output[-4000:]
    assert _engines(output) == ["engine: DistributedDataParallel, 2 processes"], output[-4000:]
    _assert_same_training(tmp_path / "out", reference)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_data_in_shards_started_by_slurm(tmp_path: Path) -> None:
    """launch/slurm/data.sh asks for shard i of n, 0-based, as the array's task i."""
    (tmp_path / "stepladder").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "stepladder").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "4"}
    command = ["bash", ROOT / "launch/slurm/data.sh", "solutions", "--config", "a b.yaml"]
    assert _run(command, **variables)[1].splitlines() == ["data", "solutions", "--config", "a b.yaml", "--shard", "3/4"]
    assert _run(command, **variables, SHARDS="8")[1].splitlines()[-1] == "3/8"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_file_begins_with_its_command_and_is_read_by_accelerate(path: Path) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    command = f"accelerate launch --config_file launch/accelerate/{path.name} -m stepladder.trainers.prm --config FILE"
    assert path.read_text().splitlines()[0] == f"# {command}"
    assert ClusterConfig.from_yaml_file(path).num_processes >= 1  # unknown keys are errors


def test_fsdp_that_was_not_built_is_told(ground: Path, tmp_path: Path) -> None:
    """Between CPU processes accelerate 1.15 takes an FSDP configuration and builds DDP: that must not pass for FSDP."""
    status, output = _launch("fsdp2", "prm", ground / "prm.yaml", tmp_path / "out")
    assert status != 0, output[-4000:]
    if _engines(output) == ["engine: FSDPModule (fully_shard), 2 processes"]:
        pytest.fail("accelerate shards between CPU processes now: compare it with one process as the others above")
    assert _engines(output) == ["engine: DistributedDataParallel, 2 processes"], output[-4000:]
    assert "error: FSDP was asked for, but the model is not sharded (DistributedDataParallel, 2 processes)" in output
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ACCELERATE_USE_FSDP", "true", r"FSDP was asked for, but the model is not sharded \(Linear, 1 process\)"),
        ("ACCELERATE_USE_DEEPSPEED", "true", r"DeepSpeed was asked for, but not built \(Linear, 1 process\)"),
        ("WORLD_SIZE", "2", r"2 processes were started, but each would train a model of its own \(Linear, 1 process\)"),
    ],
)
def test_what_was_asked_for_and_not_built_is_told(
    variable: str, value: str, sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tell = TellEngine(SimpleNamespace(model_wrapped=torch.nn.Linear(1, 1)))
    args = SimpleNamespace(output_dir=str(tmp_path), fsdp=None, deepspeed=None)
    state = SimpleNamespace(is_world_process_zero=True)
    tell.on_train_begin(args, state, None)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=sentence):
        tell.on_train_begin(args, state, None)


# --- FSDP2 by torch's own fully_shard ------------------------------------------------------------------------------------


def _one_step(model: Any, batch: dict[str, torch.Tensor], items: int, processes: int) -> torch.Tensor:
    """The loss of a process's share, after one step of gradient descent with the trainer's own loss and division."""
    stub = SimpleNamespace(
        args=SimpleNamespace(loss="bce", world_size=processes), positive_class=1, _extra={},
        count_items=lambda b: b["target_mask"].sum(), padding_mask=lambda b: b["attention_mask"],
    )  # fmt: skip
    stub.loss_sum = lambda m, b: RewardTrainer.loss_sum(stub, m, b)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    loss = StepladderTrainer.compute_loss(stub, model, batch, num_items_in_batch=torch.tensor(items))
    loss.backward()
    optimizer.step()
    return loss.detach()


def _batch(ground: Path, rows: tuple[int, ...]) -> dict[str, torch.Tensor]:
    examples = _examples(ground / "labels.jsonl")
    return collate([examples[i] for i in rows], 0)


SHARES = (0, 1), (2, 3, 4, 5, 6)


def _sharded_process(ground: Path, scorer: Path, out: Path) -> None:
    """One process of two: shards the model, takes a step on its share, writes what the first process can see of the whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = AutoModelForTokenClassification.from_pretrained(scorer)
    whole = sum(weight.numel() for weight in model.parameters())
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, DTensor) for weight in model.parameters())
    held = sum(weight.to_local().numel() for weight in model.parameters())
    batches = [_batch(ground, share) for share in SHARES]
    items = sum(int(b["target_mask"].sum()) for b in batches)
    loss = _one_step(model, batches[dist.get_rank()], items, 2)
    dist.all_reduce(loss)
    weights = {name: weight.full_tensor() for name, weight in model.named_parameters()}
    gradients = {name: weight.grad.full_tensor() for name, weight in model.named_parameters()}
    if dist.get_rank() == 0:
        line = engine_line(built_engine(model))
        torch.save(
            {"loss": loss / 2, "weights": weights, "gradients": gradients, "engine": line, "held": held / whole}, out
        )
    dist.destroy_process_group()


def test_fully_shard_takes_the_step_of_one_process(
    ground: Path, tiny_scorer: Any, lab_words: Any, tmp_path: Path
) -> None:
    """Loss, gradients and weights after a step on unequal shares, against one process with all rows in one batch."""
    tiny_scorer(lab_words, labels=2).save_pretrained(tmp_path / "scorer")
    port = str(_free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, ground, tmp_path / "scorer", tmp_path / "sharded.pt"],
            env=_environment(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    sharded = torch.load(tmp_path / "sharded.pt")
    print(f"fully_shard: engine: {sharded['engine']}")
    assert sharded["engine"] == "FSDPModule (fully_shard), 2 processes"
    assert 0.4 < sharded["held"] < 0.6

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "scorer")
    batch = _batch(ground, SHARES[0] + SHARES[1])
    shares = [int(_batch(ground, share)["target_mask"].sum()) for share in SHARES]
    assert shares[0] != shares[1]
    loss = _one_step(model, batch, int(batch["target_mask"].sum()), 1)
    torch.testing.assert_close(sharded["loss"], loss)
    for name, weight in model.named_parameters():
        torch.testing.assert_close(sharded["gradients"][name], weight.grad, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sharded["weights"][name], weight.detach(), atol=1e-5, rtol=1e-4)


if __name__ == "__main__":
    _sharded_process(*map(Path, sys.argv[1:]))
