"""How everything in this folder is measured: arms in turn, each repetition a process of its own, medians and ratios.

A script says what its question is, names its arms (the first is what Stepladder does) and gives a function that prepares one arm
and returns the work to be timed. Loading, compiling and a first unmeasured round are not timed. Arms alternate, so that a machine
that slows down slows all of them, and a ratio is taken within a repetition; its spread is that of the repetitions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "speed"


@dataclass
class Work:
    """What one timed piece of work did. `units` is what the question counts (labels, tokens, pairs ...)."""

    units: float
    tokens: float = 0.0  # real ones, not padding
    flops: float = 0.0  # 2 x parameters x tokens forward, three times that with a backward
    same: Any = None  # what must agree between arms where the question says "the same result"
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class Question:
    """One line of the table: what is asked, in which unit, and how much was aimed at against each other arm."""

    name: str
    asks: str
    unit: str
    arms: Sequence[str]
    targets: Mapping[str, float] = field(default_factory=dict)  # baseline -> ratio aimed at
    less_is_better: bool = False  # the unit is a cost for a fixed piece of work


def bench(question: Question, prepare: Callable[[str, argparse.Namespace], Callable[[], Work]], **options: Any) -> None:
    """Runs the script: without --arm all arms in turn, each in a process of its own; with it that arm, once."""
    parser = argparse.ArgumentParser(description=question.asks)
    parser.add_argument("--arm", choices=question.arms, help="measure this arm once, in this process")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{question.name}.json")
    for name, default in options.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    args = parser.parse_args()
    if args.arm:
        _one(prepare, args)
        return
    passed = [f"--{name}={getattr(args, name)}" for name in options]
    measured: dict[str, list[dict[str, Any]]] = {arm: [] for arm in question.arms}
    for repetition in range(args.repetitions):
        for arm in question.arms:
            found = _child(arm, args.threads, passed)
            measured[arm].append(found)
            print(f"{question.name} {repetition + 1}/{args.repetitions} {arm}: {found['seconds']:.2f} s", flush=True)
    result = summary(question, measured)
    result |= {
        "command": f"python bench/{question.name}.py " + " ".join([*passed, f"--repetitions={args.repetitions}"]),
        "machine": machine(args.threads),
        "repetitions": args.repetitions,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def _one(prepare: Callable[[str, argparse.Namespace], Callable[[], Work]], args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    work = prepare(args.arm, args)
    began = time.perf_counter()
    done = work()
    found = {"seconds": time.perf_counter() - began, **asdict(done)}
    Path(os.environ["STEPLADDER_BENCH_OUT"]).write_text(json.dumps(found))


def _child(arm: str, threads: int, passed: Sequence[str]) -> dict[str, Any]:
    """One repetition of one arm in a process of its own; its peak memory is the kernel's own count."""
    with tempfile.NamedTemporaryFile(suffix=".json") as out:
        command = [sys.executable, sys.argv[0], "--arm", arm, f"--threads={threads}", *passed]
        environment = {**os.environ, "STEPLADDER_BENCH_OUT": out.name, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{arm} ended with status {process.returncode}")
        return {**json.loads(Path(out.name).read_text()), "peak_mb": usage.ru_maxrss / 1024}


def summary(question: Question, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of each arm and the ratios of the first arm to the others, repetition by repetition."""
    rate = lambda m: m["seconds"] / m["units"] if question.less_is_better else m["units"] / m["seconds"]
    arms = {
        arm: {
            "rate": statistics.median(map(rate, found)),
            "seconds": statistics.median(m["seconds"] for m in found),
            "tokens_per_second": statistics.median(m["tokens"] / m["seconds"] for m in found),
            "flops_per_second": statistics.median(m["flops"] / m["seconds"] for m in found),
            "peak_mb": statistics.median(m["peak_mb"] for m in found),
            "extra": found[-1]["extra"],
            "same": found[-1]["same"],
        }
        for arm, found in measured.items()
    }
    ours, *others = question.arms
    ratios = {}
    for other in others:
        pairs = [rate(a) / rate(b) for a, b in zip(measured[ours], measured[other], strict=True)]
        if question.less_is_better:
            pairs = [1 / pair for pair in pairs]
        ratios[other] = {
            "ratio": statistics.median(pairs),
            "least": min(pairs),
            "most": max(pairs),
            "target": question.targets.get(other),
        }
    return {"name": question.name, "asks": question.asks, "unit": question.unit, "arms": arms, "ratios": ratios}


def table(result: Mapping[str, Any]) -> str:
    """The result as Markdown: one row an arm, then one line a ratio."""
    peak = result["machine"]["matmul_flops_per_second"]
    lines = [
        f"| {result['asks']} | {result['unit']} | tokens/s | of peak | peak memory |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, one in result["arms"].items():
        share = f"{100 * one['flops_per_second'] / peak:.1f} %" if one["flops_per_second"] else "-"
        tokens = f"{one['tokens_per_second']:,.0f}" if one["tokens_per_second"] else "-"
        lines.append(f"| {arm} | {one['rate']:,.3g} | {tokens} | {share} | {one['peak_mb']:,.0f} MB |")
    lines.append("")
    for other, one in result["ratios"].items():
        target = f", aimed at {one['target']:g}x" if one["target"] else ""
        lines.append(f"Against {other}: {one['ratio']:.2f}x [{one['least']:.2f}, {one['most']:.2f}]{target}.")
    return "\n".join(lines)


def machine(threads: int) -> dict[str, Any]:
    """What it was measured on, with the rate of a large float32 matrix product here and now."""
    code = (
        "import sys, time, torch; torch.set_num_threads(int(sys.argv[1])); a = torch.rand(2048, 2048); b = torch.rand(2048, 2048)\n"
        "def once():\n t = time.perf_counter(); a @ b; return time.perf_counter() - t\n"
        "once(); print(2 * 2048**3 / min(once() for _ in range(10)))"
    )
    peak = subprocess.run([sys.executable, "-c", code, str(threads)], check=True, capture_output=True, text=True).stdout
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processors": os.cpu_count(),
        "threads": threads,
        "matmul_flops_per_second": float(peak),
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "accelerate")},
    }
