"""The tiny recipe that the tests of the command share, and one finished run of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stepladder.launch.cli import main

# recipes/quickstart.yaml, so small that it runs in seconds. Units are small so that each stage over problems has several,
# and checkpoints frequent so that training has something to continue from.
_SAMPLED = "samples=4", "limit=20", "unit_problems=8"
TINY = [
    "defaults.task={kind: chain, p: 7, min_steps: 3, max_steps: 6, sizes: {train: 60, dev: 10, test: 20}}",
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
