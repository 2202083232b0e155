"""Two processes against one, one thread each: sampling in shards, and a PRM trained under DDP at the same global batch.

    python bench/two_processes.py [--work data|training] [--problems 256]

Work is that of the lab policy. Every process starts Python and loads its model within the time that is measured, as it does for a
user; with more `--problems` that counts less.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import yaml
from measure import Question, Work, bench

ARMS = ("two processes", "one process")
TASK = {"kind": "chain", "p": 7, "min_steps": 3, "max_steps": 6, "sizes": {"train": 20000, "dev": 20, "test": 20}}


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """One stage on all problems, with what it reads made before."""
    import stepladder
    from stepladder.data_gen.store import read_about
    from stepladder.launch.cli import main

    package = Path(stepladder.__path__[0])
    folder, lab = Path(tempfile.mkdtemp()), str(package / "models" / "lab_policy")
    processes = 2 if arm == "two processes" else 1
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    problems = ["--task", yaml.safe_dump(TASK, default_flow_style=True).strip(), "--limit", str(args.problems)]

    def run(commands: list[list[str]]) -> None:
        started = [subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) for command in commands]
        if any(process.wait() for process in started):
            raise SystemExit("a process failed")

    if args.work == "data":
        command = [sys.executable, "-m", "stepladder.launch.cli", "data", "solutions", "--policy", lab, *problems]
        command += ["--samples", "16", "--max_new_tokens", "64", "--unit_problems", str(max(args.problems // 8, 1))]

        def work() -> Work:
            out = Path(tempfile.mkdtemp(dir=folder))  # what is finished would be skipped
            run([[*command, "--out", str(out), "--shard", f"{i}/{processes}"] for i in range(processes)])
            ledger = read_about(out)["ledger"]
            return Work(units=ledger["generated_tokens"], tokens=ledger["generated_tokens"], flops=ledger["flops"])

        return work
    answers, labels = folder / "answers", folder / "labels"
    sampling = ["--samples", "4", "--max_new_tokens", "64", "--out", str(answers)]
    main(["data", "solutions", "--policy", lab, *problems, *sampling])
    main(["data", "checker_labels", "--solutions", str(answers), *problems[:2], "--out", str(labels)])
    settings = {
        "model": lab, "rows": str(labels), "output_dir": str(folder / "prm"), "max_length": 160, "use_cpu": True,
        "per_device_train_batch_size": 64 // processes, "num_train_epochs": 4, "learning_rate": 1e-4,
        "save_strategy": "no", "after_first_zero": True, "disable_tqdm": True,
    }  # fmt: skip
    (folder / "prm.yaml").write_text(yaml.safe_dump(settings))
    trainer = ["-m", "stepladder.trainers.prm", "--config", str(folder / "prm.yaml")]
    if processes == 2:
        layout = str(package / "launch" / "accelerate" / "cpu_ddp.yaml")
        trainer = ["-m", "accelerate.commands.launch", "--config_file", layout, *trainer]

    def train() -> Work:
        run([[sys.executable, *trainer]])
        return Work(units=4 * read_about(labels)["rows"])

    return train


if __name__ == "__main__":
    bench(
        Question("two_processes", "Two processes, one thread each", "tokens or rows a second", ARMS, {"one process": 1.7}),
        prepare, work="data", problems=4096,
    )  # fmt: skip
