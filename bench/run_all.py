"""Runs the measurements of this folder one after another and writes docs/speed.md and docs/results/speed.json.

    python bench/run_all.py                                      # all of them, under half an hour on two cores
    python bench/run_all.py --only labels_lab startup            # these again; the others keep what they have
    python bench/run_all.py --smollm2 FOLDER --word-problems DATA --vllm-python vllm-env/bin/python
    python bench/run_all.py --list

A row is written as soon as it is measured. Rows that need something that was not given (a model, data, another environment) are
named and left out. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure import RESULTS, table

BENCH = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Row:
    """One measurement: a script of this folder and its options."""

    script: str
    options: str = ""  # {smollm2}, {word_problems}, {prm800k} and {vllm_python} are replaced by what was given
    repetitions: int = 5
    also: str = ""  # options that are left out where they name something that was not given


WORD_PROBLEMS = "'--task={{kind: word_problems, folder: {word_problems}}}'"
ROWS: dict[str, Row] = {
    "startup": Row("startup.py", repetitions=3),
    "labels_lab": Row("labels.py", repetitions=3),
    "labels_smollm2": Row(
        "labels.py",
        f"--policy={{smollm2}} {WORD_PROBLEMS} --dtype=bfloat16 --problems=24 --alone=6 --batch-size=128 "
        "--max-new-tokens=48 --problem-target=4 --sorted-target=0",
        repetitions=2,
    ),
    "decode_64": Row("decode.py", "--model={smollm2} --batch=64", also="--vllm-python={vllm_python}", repetitions=3),
    "decode_128": Row("decode.py", "--model={smollm2} --batch=128", also="--vllm-python={vllm_python}", repetitions=3),
    "packing": Row("packing.py", repetitions=3),
    "prm_training": Row(
        "prm_training.py",
        "--policy={smollm2} --file={prm800k}/phase1_train_nested.jsonl.gz --rows=32 --max-length=768",
        repetitions=2,
    ),
    "step_dpo": Row(
        "step_dpo.py",
        "--policy={smollm2} --file={prm800k}/phase1_train_step_pairs.jsonl.gz --pairs=16 --steps=2 --max-length=768",
        repetitions=2,
    ),
    "step_dpo_float32": Row(
        "step_dpo.py",
        "--policy={smollm2} --file={prm800k}/phase1_train_step_pairs.jsonl.gz --pairs=8 --steps=2 --max-length=512 "
        "--precision=no",
        repetitions=1,
    ),
    "ppo_lab": Row("ppo.py", "--prompts=32 --batch=32 --rollouts=4", repetitions=5),
    "ppo_smollm2": Row(
        "ppo.py", f"--policy={{smollm2}} {WORD_PROBLEMS} --prompts=4 --rollouts=1 --max-new-tokens=48", repetitions=2
    ),
    "first_error": Row("first_error.py"),
    "first_error_noisy": Row("first_error.py", "--p=11 --tolerance=1 --target=0"),
    "first_error_tree": Row("first_error.py", "--searches=8 --problems=50 --target=0"),
    "first_error_lab": Row("first_error.py", "--policy=lab --steps=7 --tolerance=1 --target=0", repetitions=3),
    "growing_8": Row("growing_solution.py", repetitions=3),
    "growing_16": Row("growing_solution.py", "--steps=16 --target=7", repetitions=3),
    "growing_32": Row("growing_solution.py", "--steps=32 --target=10", repetitions=2),
    "two_processes_data": Row("two_processes.py", "--work=data", repetitions=3),
    "two_processes_training": Row("two_processes.py", "--work=training --problems=1024", repetitions=3),
    "data_growth": Row("data_growth.py", repetitions=2),
}

_PREFACE = """\
# Speed, measured beside what people use instead

This page is written by `python bench/run_all.py`, from `docs/results/speed.json`. Each script of `bench/` runs Stepladder
and its baselines in turn, on the same model, problems and seeds, each in a process of its own that stays; loading and
warming up are not timed. Ratios are medians over repetitions, with the least and the most of them in brackets; over 1 is in
Stepladder's favour. Where other work ran beside (see the load), the ratio of processor seconds says more. Tokens are real
ones, not padding; FLOPs are 2 x parameters x tokens (three times that with a backward), as a share of what one large matrix
product in the same precision reaches here, on as many threads. `python bench/run_all.py --list` prints every command;
`--only ROW` measures one again."""

GIVEN = ("smollm2", "word_problems", "prm800k", "vllm_python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="ROW", help="measure these rows alone")
    parser.add_argument("--list", action="store_true", help="print the rows and their commands")
    parser.add_argument("--repetitions", type=int, help="of every row; left out: each row's own")
    parser.add_argument("--threads", type=int, default=1, help="of every arm's process")
    parser.add_argument("--smollm2", default="", help="folder of SmolLM2-135M-Instruct (stepladder import-gguf)")
    parser.add_argument("--word-problems", default="", help="folder of the word problems")
    parser.add_argument("--prm800k", default="", help="folder of PRM800K")
    parser.add_argument("--vllm-python", default="", help="the interpreter of an environment that has vllm")
    parser.add_argument("--results", type=Path, default=RESULTS.with_suffix(".json"))
    parser.add_argument("--page", type=Path, default=BENCH.parent / "docs" / "speed.md")
    given = parser.parse_args()
    failed = []
    for name in given.only or ROWS:
        command, missing = command_of(ROWS[name], vars(given))
        if missing:
            print(f"{name}: left out, --{missing.replace('_', '-')} was not given")
            continue
        if given.list:
            print(f"{name}: python bench/{shlex.join(command)}")
            continue
        began = time.perf_counter()
        record = measured(name, given)
        if record is None:
            failed.append(name)
            continue
        record["minutes"] = (time.perf_counter() - began) / 60
        kept(given.results, name, record)
        given.page.write_text(page(json.loads(given.results.read_text())))
        print(f"== {name}: {record['minutes']:.1f} minutes\n{table(record)}\n", flush=True)
    if failed:
        raise SystemExit(f"no result from {', '.join(failed)}")


def command_of(row: Row, given: Mapping[str, Any]) -> tuple[list[str], str]:
    """(script and options with what was given filled in, the first that is missing)."""
    options = shlex.split(row.options)
    missing = next((name for name in GIVEN if f"{{{name}}}" in row.options and not given.get(name)), "")
    if not any(f"{{{name}}}" in row.also and not given.get(name) for name in GIVEN):
        options += shlex.split(row.also)
    filled = [option.format(**{name: given.get(name, "") for name in GIVEN}) for option in options]
    return [row.script, *filled], missing


def measured(name: str, given: argparse.Namespace) -> dict[str, Any] | None:
    """The record of one row, or None if its script ended with an error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        (script, *options), _ = command_of(ROWS[name], vars(given))
        options += [f"--repetitions={given.repetitions or ROWS[name].repetitions}", f"--threads={given.threads}"]
        ended = subprocess.run(
            [sys.executable, str(BENCH / script), *options, f"--out={out}"], stdout=subprocess.DEVNULL
        )
        if ended.returncode or not out.is_file():
            print(f"{name}: ended with status {ended.returncode}", flush=True)
            return None
        return {**json.loads(out.read_text()), "name": name, "command": public(ROWS[name], vars(given))}


def public(row: Row, given: Mapping[str, Any]) -> str:
    """The command as another machine would have it: SMOLLM2, WORD_PROBLEMS ... in place of what was given for them."""
    command, _ = command_of(row, {name: name.upper() for name in GIVEN if given.get(name)})
    return shlex.join(["python", f"bench/{command[0]}", *command[1:]])


def kept(results: Path, name: str, record: Mapping[str, Any]) -> None:
    """Puts a record among those measured before."""
    known = json.loads(results.read_text()) if results.is_file() else {}
    known[name] = record
    order = [*(row for row in ROWS if row in known), *(row for row in known if row not in ROWS)]
    results.parent.mkdir(parents=True, exist_ok=True)
    unfinished = results.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({row: known[row] for row in order}, indent=1) + "\n")
    unfinished.replace(results)


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """docs/speed.md: how it was measured, one summary line a ratio, then each record."""
    lines = [
        *_PREFACE.splitlines(),
        "",
        "| row | against | ratio | by processor seconds | aimed at |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, record in records.items():
        for other, one in record["ratios"].items():
            cpu = "-" if record["counted"] or not one["cpu_ratio"] else f"{one['cpu_ratio']:.2f}x"
            aimed = f"{one['target']:g}x" if one["target"] else "-"
            spread = f"{one['ratio']:.2f}x [{one['least']:.2f}, {one['most']:.2f}]"
            lines.append(f"| [{name}](#{name}) | {other} | {spread} | {cpu} | {aimed} |")
    for name, record in records.items():
        machine = record["machine"]
        versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
        lines += [
            "",
            f"## {name}",
            "",
            f"    {record['command']}",
            "",
            table(record).replace("\n", "\n\n").replace("|\n\n|", "|\n|"),
            "",
            f"{record['repetitions']} repetitions, {record['date']}, {record['minutes']:.1f} minutes; "
            f"{machine['processors']} x {machine['processor']}, {machine['threads']} thread(s) an arm, load {machine['load']:.1f}, "
            f"{machine['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s in {record['dtype']}; "
            f"Python {machine['python']}, {versions}.",
        ]
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    main()
