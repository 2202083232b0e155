"""Is `stepladder plan` right? Peak memory and seconds of real stages on a CPU at two model sizes, beside what was planned.

    python bench/plan_check.py --policy FOLDER [--threads 1] [--repetitions 3]

The larger model is that of FOLDER, the smaller one has half its layers and half its width, with weights drawn at random. A small
run of the recipe gives the rates; a run of three times as much work is planned from it, run, and measured. Memory is the resident
set of the stage's process, less what it is with everything imported and no model. The allocator is told to give memory back
(MALLOC_MMAP_THRESHOLD_): glibc's own habit is to keep what activations leave and to take new memory for gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from measure import RESULTS, machine

SMALL, LARGE = 16, 48  # problems
TASK = {"kind": "chain", "p": 7, "min_steps": 6, "max_steps": 6, "sizes": {"train": 1000, "dev": 10, "test": 10}}
IMPORTED = (
    "import stepladder.launch.making, stepladder.trainers.sft, stepladder.trainers.prm, torch, transformers, pyarrow.parquet\n"
    "from transformers import AutoModelForCausalLM, Trainer\nfrom transformers.models.llama import modeling_llama\n"
    "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')][0])"
)


def recipe(model: Path, problems: int) -> dict[str, Any]:
    """One stage of each kind of work: sampling, training with logits, training without."""
    # Fixed costs, such as writing checkpoints, do not grow with the work.
    trained = {
        "per_device_train_batch_size": 4,
        "max_steps": problems // 4,
        "logging_steps": 1,
        "max_length": 160,
        "save_strategy": "no",
    }
    return {
        "name": "plan_check",
        "seed": 0,
        "defaults": {"task": TASK},
        "stages": {
            "policy": {"do": "model.copy", "source": str(model)},
            "solutions": {"do": "data.solutions", "policy": "@policy", "limit": problems, "samples": 4,
                          "max_new_tokens": 32, "unit_problems": problems, "batch_size": 32},
            "lines": {"do": "data.demonstrations", "limit": problems},
            "sft": {"do": "train.sft", "model": "@policy", "rows": "@lines", **trained},
            "lab": {"do": "model.copy", "source": "lab"},
            "answers": {"do": "data.solutions", "policy": "@lab", "limit": problems, "samples": 1},
            "labels": {"do": "data.checker_labels", "solutions": "@answers"},
            "prm": {"do": "train.prm", "model": "@policy", "rows": "@labels/rows.parquet", "after_first_zero": True, **trained},
        },
    }  # fmt: skip


MEASURED = ("solutions", "sft", "prm")


def run(given: dict[str, Any], folder: Path, threads: int) -> dict[str, float]:
    """Runs a recipe stage by stage; the peak bytes of each stage that is measured."""
    file = folder.with_suffix(".yaml")
    peaks: dict[str, float] = {}
    names = list(given["stages"])
    for last in range(1, len(names) + 1):
        part = {**given, "stages": {name: given["stages"][name] for name in names[:last]}}
        if last < len(names) and names[last - 1] not in MEASURED:
            continue
        file.write_text(yaml.safe_dump(part, sort_keys=False))
        process = subprocess.Popen(
            [sys.executable, "-m", "stepladder.launch.cli", "run", str(file), "--out", str(folder)],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(threads),
        )  # fmt: skip
        peak = 0
        while process.poll() is None:
            peak = max(peak, _resident(process.pid))
            time.sleep(0.01)
        if process.returncode:
            raise SystemExit(process.stderr.read().decode() if process.stderr else "failed")
        peaks[names[last - 1]] = peak
    return peaks


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MALLOC_MMAP_THRESHOLD_": "262144"}


def _resident(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def smaller(model: Path, folder: Path) -> Path:
    """A model of half the layers and half the width, with the same tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(model)
    config.num_hidden_layers //= 2
    config.hidden_size //= 2
    config.intermediate_size //= 2
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.dtype = "float32"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def longest(folder: Path, model: Path) -> int:
    """Tokens of the longest row that is trained on."""
    from stepladder.data_gen.rows import Dialogue
    from stepladder.data_gen.store import read_rows
    from stepladder.models.loading import load_policy_format, load_tokenizer
    from stepladder.trainers.sft import dialogue_example

    tokenizer = load_tokenizer(str(model))
    step_format = load_policy_format(str(model), tokenizer, "\n")
    made = [dialogue_example(row, tokenizer, step_format, 4096)[0] for row in read_rows(folder / "lines", Dialogue)]
    return max(len(item["input_ids"]) for item in made if item is not None)


def check(
    model: Path, work: Path, threads: int, rates: dict[str, Path], small: int, large: int
) -> list[dict[str, Any]]:
    """One record a measured stage: planned and measured peak bytes and seconds of the larger run."""
    from stepladder.launch.options_plan import Plan
    from stepladder.launch.plan import make_plan

    base = 1024 * int(
        subprocess.run(
            [sys.executable, "-c", IMPORTED], capture_output=True, text=True, check=True, env=environment(threads)
        ).stdout
    )
    run(recipe(model, small), work / "small", threads)
    rates.setdefault("first", work / "small")
    peaks = run(recipe(model, large), work / "large", threads)
    tokens = longest(work / "large", model)
    found = []
    planned = {}
    for name, pilot in (("own", work / "small"), ("other size", rates["first"])):
        given = Plan(gpus="1x16GB", launch="run", rates=str(pilot), longest=tokens)
        planned[name] = {s.name: s for s in make_plan(recipe(model, large), "plan_check", given)[0]}
    for name in MEASURED:
        one, other = planned["own"][name], planned["other size"][name]
        folder = work / "large" / name
        if (folder / "rows.json").is_file():
            seconds = json.loads((folder / "rows.json").read_text())["ledger"]["seconds"]
        else:
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            seconds = lines[-1]["train_runtime"]
        found.append(
            {
                "stage": name, "parameters": one.shape.parameters() if one.shape else 0,
                "planned_bytes": one.memory.peak, "measured_bytes": peaks[name] - base,
                "planned_seconds": one.seconds, "planned_seconds_by_other_size": other.seconds, "measured_seconds": seconds,
            }
        )  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True, help="a folder with a Llama-like model and its tokenizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--small", type=int, default=SMALL, help="problems of the run that gives the rates")
    parser.add_argument("--large", type=int, default=LARGE, help="problems of the run that is planned")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "plan_check.json")
    args = parser.parse_args()
    records: list[list[dict[str, Any]]] = []
    for number in range(args.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            rates: dict[str, Path] = {}
            rows = []
            for name, model in (("large", args.policy), ("half", smaller(args.policy, work / "model"))):
                (work / name).mkdir()
                rows += check(model.resolve(), work / name, args.threads, rates, args.small, args.large)
            records.append(rows)
        print(f"plan_check {number + 1}/{args.repetitions}", flush=True)
    result = {
        "name": "plan_check", "command": "python bench/plan_check.py --policy FOLDER", "machine": machine(args.threads),
        "rows": [_medians([rows[i] for rows in records]) for i in range(len(records[0]))],
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("| stage | parameters | peak planned | measured | | time planned | measured | | by the other size's rate |")
    print("| --- " * 9 + "|")
    for row in result["rows"]:
        memory, seconds = row["planned_bytes"] / row["measured_bytes"], row["planned_seconds"] / row["measured_seconds"]
        other = row["planned_seconds_by_other_size"] / row["measured_seconds"]
        print(
            f"| {row['stage']} | {row['parameters'] / 1e6:.0f} M | {row['planned_bytes'] / 1e6:,.0f} MB "
            f"| {row['measured_bytes'] / 1e6:,.0f} MB | {100 * (memory - 1):+.0f} % | {row['planned_seconds']:.1f} s "
            f"| {row['measured_seconds']:.1f} s | {100 * (seconds - 1):+.0f} % | {100 * (other - 1):+.0f} % |"
        )


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        name: value if isinstance(value, str) else statistics.median(row[name] for row in rows)
        for name, value in rows[0].items()
    }


if __name__ == "__main__":
    main()
