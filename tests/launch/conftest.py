"""The tiny recipe that the tests of the command share, one finished run of it, and a way to start commands without imports."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stepladder.launch.cli import main

# recipes/quickstart.yaml, so small that it runs in seconds. Units are small so that each stage over problems has several,
# and checkpoints frequent so that training has something to continue from.
_SAMPLED = "samples=4", "limit=20", "unit_problems=8"
TINY = [
    "defaults.task={kind: chain, p: 7, min_steps: 4, max_steps: 8, sizes: {train: 60, dev: 10, test: 20}}",
    "solutions.limit=40",
    "solutions.samples=4",
    "solutions.unit_problems=16",
    "step_labels.limit=12",
    "step_labels.per_problem=2",
    "step_labels.rollouts=2",
    "step_labels.unit_problems=4",
    *(f"{stage}.{setting}" for stage in ("orm", "prm", "improved") for setting in ("save_steps=1", "logging_steps=1")),
    *(f"{stage}.{setting}" for stage in ("orm", "prm") for setting in ("max_rows=48", "warmup_steps=1")),
    "orm.per_device_train_batch_size=16",
    "prm.per_device_train_batch_size=8",
    "prm.num_train_epochs=1",
    "improved.per_device_train_batch_size=16",
    "improved.num_train_epochs=1",
    *(f"{policy}_greedy.{setting}" for policy in ("base", "improved") for setting in ("limit=20", "unit_problems=20")),
    *(f"{policy}_samples.{setting}" for policy in ("base", "improved") for setting in _SAMPLED),
    *(
        f"{policy}_beam.{setting}"
        for policy in ("base", "improved")
        for setting in ("beams=4", "width=2", "limit=20", "unit_problems=8")
    ),
]

# One process imports what a command needs, and forks for each command: a command starts in a tenth of a second, and is a
# process of its own that can be killed.
_STARTER = """
import json, os, sys, traceback
from stepladder.launch import cli, evaluate, making, pipeline, report, tables
from stepladder.trainers import orm, prm, sft
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification
import accelerate.state, pyarrow.parquet, tqdm

print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if not child:
        os.chdir(job["folder"])
        os.environ.update(job["environment"])
        for number, path in ((1, job["out"]), (2, job["err"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        status = 0
        try:
            cli.main(job["arguments"])
        except SystemExit as error:
            status = error.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Ended:
    """How a command ended; a status of -9 is a kill."""

    status: int
    out: str
    err: str


class Starter:
    """Runs commands as forked processes, one at a time."""

    def __init__(self, logs: Path) -> None:
        self.logs, self.count = logs, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", _STARTER],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(
        self,
        arguments: Sequence[str],
        folder: Path,
        *,
        kill: Callable[[], bool] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Ended:
        """Runs `stepladder *arguments` in a folder; with `kill` it is killed (SIGKILL) as soon as that says so."""
        self.count += 1
        out, err = self.logs / f"{self.count}.out", self.logs / f"{self.count}.err"
        out.touch(), err.touch()  # a kill may come before the child has opened them
        job = {"arguments": [str(a) for a in arguments], "folder": str(folder), "out": str(out), "err": str(err)}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({**job, "environment": environment or {}}) + "\n")
        self.process.stdin.flush()
        child = int(self._line())
        if kill is not None:
            # The child may end first; until its status line is read its number cannot belong to another process.
            while _runs(child):
                if kill():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(child, signal.SIGKILL)
                    break
                time.sleep(0.002)
        status = int(self._line())
        return Ended(status, out.read_text(), err.read_text())


def _runs(process: int) -> bool:
    try:
        # A child that has ended and was not waited for yet is a zombie, which no signal tells from a running one.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture(scope="session")
def starter(tmp_path_factory: Any) -> Iterator[Starter]:
    made = Starter(tmp_path_factory.mktemp("logs"))
    yield made
    made.process.stdin.close()
    made.process.wait(timeout=60)


@pytest.fixture(scope="session")
def tiny_recipe() -> list[str]:
    """Overrides that make the quickstart recipe tiny."""
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: Any) -> Path:
    """The folder of one finished, uninterrupted run of the tiny quickstart, seed 0. To be read only."""
    folder = tmp_path_factory.mktemp("tiny")
    with contextlib.chdir(folder):
        main(["quickstart", "--out", "run", *TINY])
    return folder / "run"


@pytest.fixture
def refused(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that must end with status 2 and one sentence on stderr; returns that sentence."""

    # Libraries keep the stderr of the test that imported them, which is closed by now; logging would tell of that at length.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def run(*arguments: Any) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2, error
        assert "Traceback" not in error
        # Progress bars and the library's loading notes may stand before it; the sentence is the last line, and one line.
        lines = error.strip().splitlines()
        assert lines[-1].startswith("error: "), error
        assert sum(line.startswith("error: ") for line in lines) == 1
        return lines[-1].removeprefix("error: ")

    return run
