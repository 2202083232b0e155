"""kill -9 in every stage of the whole recipe: the same command continues, and what is made is the same, byte for byte."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepladder.basics import read_json

# In these the work is long enough for a kill to fall between two units or two checkpoints.
LONG = ("solutions", "step_labels", "orm", "prm", "improved", "base_beam", "improved_beam", "answers")


def kill_in(run: Path, stage: str, delay: float) -> Callable[[], bool]:
    """Says kill once `stage` has been at work for `delay` seconds, and at the latest when it is done."""
    started = run / stage / "started.json"
    # A stage that goes on after a kill writes the file again.
    written = lambda: started.stat().st_mtime_ns if started.exists() else 0
    before = written()
    began: list[float] = []

    def now() -> bool:
        if not began and written() != before:
            began.append(time.monotonic())
        return bool(began) and (time.monotonic() - began[0] >= delay or (run / stage / "done.json").exists())

    return now


def ledgers(run: Path) -> dict[str, Any]:
    """What each stage over problems cost and dropped, without the seconds."""
    found = {}
    for path in run.glob("*/rows.json"):
        about = read_json(path)
        about["ledger"].pop("seconds")
        found[path.parent.name] = about
    return found


def test_kill_9_in_every_stage(tiny_run: Path, tiny_recipe: list[str], starter: Any, tmp_path: Path) -> None:
    command, run = ["quickstart", "--out", "run", *tiny_recipe], tmp_path / "run"
    stages = list(read_json(tiny_run / "manifest.json")["config"]["stages"])
    rng = random.Random(time.time_ns())
    inside, plan = [], []
    for stage in stages:
        whole = read_json(tiny_run / stage / "done.json")["seconds"]
        # At once, and for long stages again somewhere in the middle, after the model was loaded a second time.
        for delay in [0.0, rng.uniform(0.3, 0.9) * whole] if stage in LONG else [rng.uniform(0, 0.7) * whole]:
            plan.append((stage, round(delay, 3)))
            ended = starter("stepladder", *command, folder=tmp_path, kill=kill_in(run, stage, delay))
            assert ended.status in (-9, 0), ended.err
            if (run / stage).is_dir() and not (run / stage / "done.json").exists():
                inside.append(stage)
    print(f"killed at {plan}, inside {inside}")  # shown when an assertion below fails
    assert set(inside) >= set(LONG), "too few kills fell into a stage for this test to mean anything"
    ended = starter("stepladder", *command, folder=tmp_path)
    assert ended.status == 0, ended.err

    assert not list(run.glob("*.old-*"))
    assert not list(run.glob("*/part-*"))
    for pattern in ("*/rows.parquet", "*/model.safetensors", "*/step_format.json"):
        wanted = {p.relative_to(tiny_run) for p in tiny_run.glob(pattern)}
        assert {p.relative_to(run) for p in run.glob(pattern)} == wanted
        assert wanted
        for path in wanted:
            assert (run / path).read_bytes() == (tiny_run / path).read_bytes(), path
    assert ledgers(run) == ledgers(tiny_run)
    results = [
        [{k: v for k, v in record.items() if k != "seconds"} for record in read_json(folder / "results.json")]
        for folder in (run, tiny_run)
    ]
    assert results[0] == results[1]


def test_a_kill_costs_no_more_than_the_unit_it_falls_into(tiny_recipe: list[str], starter: Any, tmp_path: Path) -> None:
    command, run = ["quickstart", "--out", "run", *tiny_recipe], tmp_path / "run"
    part = run / "solutions" / "part-00000-of-00001.jsonl"
    committed = lambda: part.exists() and b'"ledger"' in part.read_bytes()
    assert starter("stepladder", *command, folder=tmp_path, kill=committed).status == -9
    before = part.read_bytes()
    whole_lines = before[: before.rindex(b"\n") + 1]

    def finished_or_more() -> bool:
        # The parts are removed once all units are joined: the first unit must stand where it stood until then.
        if part.exists() and len(content := part.read_bytes()) > len(before):
            assert content.startswith(whole_lines)
            return True
        return (run / "solutions" / "rows.parquet").exists()

    assert starter("stepladder", *command, folder=tmp_path, kill=finished_or_more).status == -9
