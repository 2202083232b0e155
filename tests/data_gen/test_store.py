"""Rows survive kills: whatever is interrupted, and over however many processes, the finished files are the same bytes."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError
from stepladder.data_gen import store
from stepladder.data_gen.rows import Pair, Source
from stepladder.data_gen.store import Shard, UnitResult, committed_units, make_rows, read_about, read_rows, write_rows
from stepladder.models.ledger import Ledger

UNITS = list(range(7))


def pair(unit: int, number: int) -> Pair:
    prompt = f"{unit} é \u2028 {'x' * unit}"
    return Pair(f"p{unit}", prompt, (), ("a",) * number, (), unit / 3, 0.0, 1, 1, True, False, Source("p", "e", "t", 0))


def work(unit: int) -> UnitResult[Pair]:
    """Units of 0 to 3 rows; unit 3 has none."""
    rows = [pair(unit, n) for n in range({3: 0}.get(unit, unit % 3 + 1))]
    return UnitResult(
        rows, Counter({"too long": unit % 2, "empty": unit}), Ledger(generated_tokens=10**unit, seconds=0.5)
    )


class Killed(Exception):
    pass


def killed_after(units: int) -> Any:
    """Works on so many units and is then interrupted."""
    left = iter(range(units))

    def one(unit: int) -> UnitResult[Pair]:
        if next(left, None) is None:
            raise Killed
        return work(unit)

    return one


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    assert make_rows(tmp_path / "whole", Pair, UNITS, work)
    return content(tmp_path / "whole")


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_rows_stand_in_the_order_of_their_units(tmp_path, whole):
    assert set(whole) == {"rows.parquet", "rows.json"}
    assert read_rows(tmp_path / "whole", Pair) == [row for unit in UNITS for row in work(unit).rows]
    about = read_about(tmp_path / "whole")
    assert about["row_type"] == "Pair"
    assert about["rows"] == sum(len(work(unit).rows) for unit in UNITS)
    assert about["dropped"] == {"empty": 0 + 1 + 2 + 3 + 4 + 5 + 6, "too long": 3}
    assert about["ledger"]["generated_tokens"] == 1111111
    assert about["ledger"]["seconds"] == 3.5


@pytest.mark.parametrize("units", range(len(UNITS) + 1))
def test_an_interruption_after_any_unit(tmp_path, whole, units):
    folder = tmp_path / "x"
    if units < len(UNITS):
        with pytest.raises(Killed):
            make_rows(folder, Pair, UNITS, killed_after(units))
        assert sorted(committed_units(folder)) == UNITS[:units]
        assert not (folder / "rows.parquet").exists()
    done = []
    assert make_rows(folder, Pair, UNITS, lambda unit: done.append(unit) or work(unit))
    assert done == UNITS[units:] if units < len(UNITS) else done == UNITS
    assert content(folder) == whole


def test_a_kill_within_any_byte(tmp_path, whole, monkeypatch):
    """The part file is cut at every length of its last unit: no row is lost, none is doubled, what was committed stays."""
    monkeypatch.setattr(store.os, "fsync", lambda _: None)
    folder = tmp_path / "x"
    folder.mkdir()
    with pytest.raises(Killed):
        make_rows(folder, Pair, UNITS, killed_after(3))
    part = folder / "part-00000-of-00001.jsonl"
    full = part.read_bytes()
    commits = [i for i, line in enumerate(full.splitlines()) if b'"rows":' in line]
    assert len(commits) == 3
    ends = [i + 1 for i, byte in enumerate(full) if byte == 10]
    first = full.index(b'{"row":', ends[commits[1]])
    assert first == ends[commits[1]]
    for length in [0, 1, 300, *range(first, len(full) + 1)]:
        shutil.rmtree(folder)
        folder.mkdir()
        part.write_bytes(full[:length])
        again = []
        assert make_rows(folder, Pair, UNITS, lambda unit, again=again: again.append(unit) or work(unit))
        assert content(folder) == whole
        # A commit line counts from its last byte on, with or without the line's end.
        kept = sum(length >= ends[commit] - 1 for commit in commits)
        assert again == UNITS[kept:]


def test_two_kills_within_the_same_unit(tmp_path, whole):
    folder = tmp_path / "x"
    part = folder / "part-00000-of-00001.jsonl"
    with pytest.raises(Killed):
        make_rows(folder, Pair, UNITS, killed_after(3))
    lines = part.read_bytes().splitlines(keepends=True)
    unit_two = [line for line in lines if b'"unit":2' in line]
    assert len(unit_two) == 4  # three rows and a commit
    before = b"".join(line for line in lines if b'"unit":2' not in line)
    # Two rows and half of one; then one row and half of one, which the second start wrote.
    torn = unit_two[0] + unit_two[1] + unit_two[2][:20] + b"\n" + unit_two[0] + unit_two[1][:-9]
    part.write_bytes(before + torn)
    assert make_rows(folder, Pair, UNITS, work)
    assert content(folder) == whole


def test_a_tail_that_is_no_text(tmp_path, whole):
    folder = tmp_path / "x"
    with pytest.raises(Killed):
        make_rows(folder, Pair, UNITS, killed_after(2))
    part = folder / "part-00000-of-00001.jsonl"
    part.write_bytes(part.read_bytes() + b"\x00\xff\xc3")
    assert make_rows(folder, Pair, UNITS, work)
    assert content(folder) == whole


def test_a_unit_that_was_made_twice_counts_once(tmp_path, whole):
    """As two processes with the same share would leave it: in one file, and over two files."""
    with pytest.raises(Killed):
        make_rows(tmp_path / "a", Pair, UNITS, killed_after(5))
    part = tmp_path / "a" / "part-00000-of-00001.jsonl"
    lines = part.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines) + b"".join(line for line in lines if b'"unit":4' in line or b'"unit":1' in line))
    shutil.copy(part, tmp_path / "a" / "part-00001-of-00002.jsonl")
    assert make_rows(tmp_path / "a", Pair, UNITS, work)
    assert content(tmp_path / "a") == whole


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_any_number_of_shards_gives_the_same_bytes(tmp_path, whole, count):
    folder = tmp_path / "x"
    done = []
    for index in reversed(range(count)):
        finished = make_rows(
            folder, Pair, UNITS, lambda unit: done.append(unit) or work(unit), shard=Shard(index, count)
        )
        assert finished == (index == 0)  # the last one joins them
    assert sorted(done) == UNITS
    assert content(folder) == whole


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2)])
def test_another_number_of_shards_after_an_interruption(tmp_path, whole, before, after):
    folder = tmp_path / "x"
    for index in range(before):
        with pytest.raises(Killed):
            make_rows(folder, Pair, UNITS, killed_after(1), shard=Shard(index, before))
    done = []
    for index in range(after):
        make_rows(folder, Pair, UNITS, lambda unit: done.append(unit) or work(unit), shard=Shard(index, after))
    assert sorted(done) == UNITS[before:]  # the first unit of each shard was there
    assert content(folder) == whole


def test_finished_rows_are_left_as_they_are(tmp_path, whole):
    assert make_rows(tmp_path / "whole", Pair, UNITS, killed_after(0))
    assert content(tmp_path / "whole") == whole


def test_a_kill_between_the_two_files(tmp_path, whole, monkeypatch):
    """rows.json is written last: without it the rows are joined again from the parts, which are still there."""
    folder = tmp_path / "x"

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_json", killed)
        with pytest.raises(Killed):
            make_rows(folder, Pair, UNITS, work)
    assert (folder / "rows.parquet").exists()
    assert make_rows(folder, Pair, UNITS, killed_after(0))
    assert content(folder) == whole


def when_first(function: Any, first: Any) -> Any:
    """`function`, but `first` runs before its first call: what another process does in between."""
    state = {"calls": 0}

    def called(*args: Any, **options: Any) -> Any:
        state["calls"] += 1
        if state["calls"] == 1:
            first()
        return function(*args, **options)

    return called


@pytest.mark.parametrize("moment", ["_part_lines", "_finish", "write_rows"])
def test_another_process_joins_the_rows_first(tmp_path, whole, monkeypatch, moment):
    """Both shards find all units done; the other one joins them and removes the parts while this one is about to."""
    folder = tmp_path / "x"
    assert not make_rows(folder, Pair, UNITS, work, shard=Shard(1, 2))
    original = getattr(store, moment)

    def other() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(store, moment, original)
            assert make_rows(folder, Pair, UNITS, work, shard=Shard(0, 2))

    last = [u for u in UNITS if u % 2 == 0][-1]

    def mine(unit: int) -> UnitResult[Pair]:
        if unit == last:
            monkeypatch.setattr(store, moment, when_first(original, other))
        return work(unit)

    assert make_rows(folder, Pair, UNITS, mine, shard=Shard(0, 2))
    assert content(folder) == whole


def test_another_process_finishes_while_this_one_starts(tmp_path, whole, monkeypatch):
    folder = tmp_path / "x"
    with pytest.raises(Killed):
        make_rows(folder, Pair, UNITS, killed_after(5))
    original = store._part_lines

    def other() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(store, "_part_lines", original)
            assert make_rows(folder, Pair, UNITS, work)

    monkeypatch.setattr(store, "_part_lines", when_first(original, other))
    assert make_rows(folder, Pair, UNITS, killed_after(0))
    assert content(folder) == whole


def test_rows_of_units_that_are_not_asked_for_do_not_count_as_done(tmp_path):
    folder = tmp_path / "x"
    with pytest.raises(Killed):
        make_rows(folder, Pair, UNITS, killed_after(2), shard=Shard(1, 2))  # units 1 and 3
    assert make_rows(folder, Pair, UNITS[:2], work)
    assert read_rows(folder, Pair) == work(0).rows + work(1).rows


def test_no_row_at_all_is_one_sentence(tmp_path):
    nothing = lambda unit: UnitResult([], Counter({"too long": 2}))
    for _ in range(2):
        with pytest.raises(UserError, match=r"no row is left \(14 dropped: too long\)"):
            make_rows(tmp_path / "x", Pair, UNITS, nothing)
    with pytest.raises(UserError, match=r"no row is left \(nothing came in\)"):
        make_rows(tmp_path / "y", Pair, [], work)
    with pytest.raises(UserError, match="no row is left"):
        write_rows(tmp_path / "z", [])


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to the folder"):
        make_rows(tmp_path / "file", Pair, UNITS, work)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write to .*part-00000-of-00001.jsonl: No space left on device"):
        make_rows(tmp_path / "x", Pair, UNITS, work)
    monkeypatch.undo()
    assert make_rows(tmp_path / "x", Pair, UNITS, work)


def test_a_file_that_the_work_misses_is_not_told_as_a_full_disk(tmp_path):
    def missing(_):
        open(tmp_path / "no" / "model")

    with pytest.raises(FileNotFoundError):
        make_rows(tmp_path / "x", Pair, UNITS, missing)


@pytest.mark.parametrize("text", ["x", "1", "2/2", "-1/2", "1/0", "1/2/3", "a/b"])
def test_a_shard_that_is_none(text):
    with pytest.raises(UserError, match=r"shard must be i/n with 0 <= i < n, for example 0/4, found"):
        Shard.parse(text)


def test_shards(monkeypatch):
    assert Shard.parse("1/4") == Shard(1, 4)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Shard.parse("") == Shard(0, 1)
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert Shard.parse("") == Shard(2, 3)


# --- real processes ----------------------------------------------------------------------------------------------------------

JOB = '''
"""Monte-Carlo labels of a tiny model: python job.py MODEL OUT SHARD SECONDS-A-UNIT"""
import dataclasses, sys, time
from stepladder.data_gen.rows import StepLabels
from stepladder.data_gen.solutions import sample_solutions
from stepladder.data_gen.step_labels import monte_carlo_labels
from stepladder.data_gen.store import Shard, make_rows
from stepladder.models.engine import Sampling
from stepladder.models.loading import load_engine, load_policy_format
from stepladder.tasks.chain import ChainArith

def main(model, out, shard, pause):
    task = ChainArith(p=11, min_steps=2, max_steps=3, sizes={"train": 12})
    problems = task.problems("train")
    engine = load_engine(model, device="cpu", batch_size=64)
    step_format = load_policy_format(model, engine.tokenizer, "\\n")
    sampling = Sampling(16)

    def work(unit):
        time.sleep(pause)
        found = sample_solutions(
            engine, task, step_format, unit, samples=2, sampling=sampling, seed=1, policy=model
        )
        result = monte_carlo_labels(
            engine, task, step_format, found.rows, {p.id: p for p in unit}, rollouts=3, sampling=sampling, seed=2, policy=model
        )
        result.ledger.seconds = 0.0
        return result

    units = [problems[i : i + 2] for i in range(0, 12, 2)]
    return make_rows(out, StepLabels, units, work, shard=Shard.parse(shard))

if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], sys.argv[3], float(sys.argv[4])))
'''


@pytest.fixture(scope="module")
def job(tmp_path_factory, lab_words, tiny_policy) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("job")
    tiny_policy(lab_words).save_pretrained(folder / "model")
    lab_words.save_pretrained(folder / "model")
    (folder / "job.py").write_text(JOB)
    main = runpy.run_path(str(folder / "job.py"))["main"]
    started: list[subprocess.Popen] = []

    def start(out: Path, shard: str, pause: float) -> subprocess.Popen:
        command = [sys.executable, str(folder / "job.py"), str(folder / "model"), str(out), shard, str(pause)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        started.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
        )
        return started[-1]

    assert main(str(folder / "model"), folder / "whole", "0/1", 0.0)
    yield folder, start, lambda out, shard: main(str(folder / "model"), out, shard, 0.0)
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.02)


def test_kill_9_and_resume(job, tmp_path):
    folder, start, here = job
    out = tmp_path / "x"
    process = start(out, "0/1", 0.3)
    wait_for(lambda: out.is_dir() and len(committed_units(out)) >= 2, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 2 <= len(committed_units(out)) < 6
    assert not (out / "rows.parquet").exists()
    assert here(out, "0/1")
    assert content(out) == content(folder / "whole")
    rows = read_about(out)["rows"]
    assert rows + sum(read_about(out)["dropped"].values()) == 24


def test_two_shards_in_two_processes_at_once(job, tmp_path):
    folder, start, _ = job
    out = tmp_path / "x"
    processes = [start(out, f"{i}/2", 0.0) for i in range(2)]
    said = [process.communicate(timeout=120)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "True" in [lines[-1] for lines in said]
    assert content(out) == content(folder / "whole")
    assert json.loads((out / "rows.json").read_text())["row_type"] == "StepLabels"
