"""The scripts of bench/ at a size that says nothing of speed: they run, their arms agree, and the page is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stepladder

ROOT = Path(stepladder.__path__[0])
TINY = {
    "startup": ["--starts=1"],
    "labels": ["--problems=2", "--alone=1", "--rollouts=2", "--max-new-tokens=8"],
    "packing": ["--rows=8", "--batch=4"],
    "two_processes": ["--work=data", "--problems=8"],
    "data_growth": ["--problems=2"],
    "first_error": ["--problems=4", "--steps=4", "--tolerance=1"],
    "growing_solution": ["--steps=3", "--layers=1", "--step-tokens=4"],
    "ppo": ["--prompts=4", "--samples=2", "--rollouts=1", "--batch=4", "--max-new-tokens=8"],
}


@pytest.mark.parametrize("script", TINY)
def test_a_script_measures_its_arms(script: str, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    ended = subprocess.run(
        [sys.executable, ROOT / "bench" / f"{script}.py", *TINY[script], "--repetitions=1", f"--out={out}"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    record = json.loads(out.read_text())
    assert record["ratios"]
    assert all(one["ratio"] > 0 for one in record["ratios"].values())
    assert record["agree"] is not False
    assert {"threads", "versions", "matmul_flops_per_second"} <= set(record["machine"])


def test_the_list_names_every_script_that_measures() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "bench" / "run_all.py", "--list", "--smollm2=m", "--word-problems=w", "--prm800k=p"],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = {line.split("bench/")[1].split(".py")[0] for line in ended.stdout.splitlines()}
    measuring = {
        path.stem for path in (ROOT / "bench").glob("*.py") if "from measure import Question" in path.read_text()
    }
    assert listed == measuring


def test_the_page_shows_commands_without_the_folders_of_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import run_all

    given = {name: f"/home/somebody/{name}" for name in run_all.GIVEN}
    shown = {name: run_all.public(row, given) for name, row in run_all.ROWS.items()}
    assert not [command for command in shown.values() if "/home" in command]
    assert "--policy=SMOLLM2" in shown["labels_smollm2"]
    assert "folder: WORD_PROBLEMS" in shown["labels_smollm2"]
    assert "--file=PRM800K/phase1_train_nested.jsonl.gz" in shown["prm_training"]
    assert "vllm" not in run_all.public(run_all.ROWS["decode_64"], {"smollm2": "/home/m"})
