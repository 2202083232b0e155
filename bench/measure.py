"""How everything in this folder is measured: arms in turn, each in a process of its own, medians and ratios.

A script says what its question is, names its arms (the first is what Stepladder does) and gives a function that prepares one arm
and returns the work to be timed. The processes of all arms stay alive and work one at a time: loading, compiling and what a script
does first to warm up are not timed, arms alternate, so that a machine that slows down slows all of them, and a ratio is taken
within a repetition; its spread is that of the repetitions. Where other programs use the same cores, the ratio of processor
seconds says more than that of seconds on the clock; both are kept.

    OPTIONS = {"problems": 200}                                    # each is --problems and args.problems

    def question(args):
        return Question("name", "What is asked", "labels a second", ("stepladder", "one at a time"), {"one at a time": 8})

    def prepare(arm, args):                                        # imports torch here, not above: --help stays quick
        ...
        def work(): return Work(units=labels, tokens=tokens, flops=flops, same=labels_found)
        return work

    if __name__ == "__main__":
        bench(question, prepare, **OPTIONS)

`run_all.py` runs the scripts of its list and writes docs/speed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed"


@dataclass
class Work:
    """What one timed piece of work did. `units` is what the question counts (labels, tokens, pairs ...)."""

    units: float
    tokens: float = 0.0  # real ones, not padding
    flops: float = 0.0  # 2 x parameters x tokens forward, three times that with a backward
    same: Any = None  # what must agree between arms where the question says "the same result": a number, a list of them, or text
    cost: float | None = None  # what is compared in place of seconds: calls, bytes
    uncounted: tuple[float, float] = (
        0.0,
        0.0,
    )  # seconds on the clock and of the processor that the question leaves out
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
    dtype: str = "float32"  # of the products whose rate is the peak
    tolerance: float = 0.0  # how far numbers of `Work.same` may differ
    note: str = ""  # what bounds it, for the reader of the table


Prepare = Callable[[str, argparse.Namespace], Callable[[], Work]]


def bench(question: Question | Callable[[argparse.Namespace], Question], prepare: Prepare, **options: Any) -> None:
    """Runs the script: without --arm all arms in turn, each in a process of its own; with it that arm, once."""
    ask = question if callable(question) else lambda args: question
    args = parser(ask, options).parse_args()
    asked = ask(args)
    if args.arm:
        if args.arm not in asked.arms:
            raise SystemExit(f"--arm must be one of {', '.join(asked.arms)}, found {args.arm}")
        _serve(prepare, args)
        return
    passed = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options]
    arms = [_Arm(arm, args.threads, passed) for arm in asked.arms]
    try:
        for arm in arms:
            arm.wait_until_ready()
        for repetition in range(args.repetitions):
            for arm in arms:
                found = arm.once()
                print(
                    f"{asked.name} {repetition + 1}/{args.repetitions} {arm.name}: {found['seconds']:.2f} s",
                    file=sys.stderr,
                    flush=True,
                )
    finally:
        for arm in arms:
            arm.end()
    result = summary(asked, {arm.name: arm.measured for arm in arms})
    changed = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in options if getattr(args, name) != options[name]
    ]
    result |= {
        "command": shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *changed]),
        "machine": machine(args.threads, asked.dtype),
        "repetitions": args.repetitions,
        "date": time.strftime("%Y-%m-%d"),
    }
    out = args.out or RESULTS / f"{asked.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if result["agree"] is False:
        raise SystemExit(f"{asked.name}: the arms do not agree in their results")


def parser(question: Callable[[argparse.Namespace], Question], options: Mapping[str, Any]) -> argparse.ArgumentParser:
    """The command line of a script."""
    defaults = argparse.Namespace(**options)
    made = argparse.ArgumentParser(description=question(defaults).asks)
    made.add_argument("--arm", help="measure this arm alone, in this process: " + ", ".join(question(defaults).arms))
    made.add_argument("--repetitions", type=int, default=5)
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, help="where the record goes (docs/results/speed/NAME.json)")
    for name, default in options.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    return made


class _Arm:
    """The process of one arm: it works when it is told to. Its peak memory is the kernel's own count."""

    def __init__(self, name: str, threads: int, passed: Sequence[str]) -> None:
        self.name, self.measured = name, list[dict[str, Any]]()
        reading, writing = os.pipe()
        command = [sys.executable, sys.argv[0], "--arm", name, f"--threads={threads}", *passed]
        # A thread that waits must not spin: the other arms work meanwhile.
        quiet = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "STEPLADDER_BENCH_OUT": str(writing)}
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **quiet},
            stdin=subprocess.PIPE,
            stdout=sys.stderr,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.replies = os.fdopen(reading)

    def wait_until_ready(self) -> None:
        self._reply()

    def once(self) -> dict[str, Any]:
        """One repetition."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended: there will be no reply
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        self.measured.append(self._reply())
        return self.measured[-1]

    def end(self) -> None:
        """Ends the process and notes its peak memory."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        _, _, usage = os.wait4(self.process.pid, 0)
        self.process.returncode = 0
        for found in self.measured:
            found["peak_mb"] = usage.ru_maxrss / 1024

    def _reply(self) -> Any:
        line = self.replies.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with an error, or for want of memory")
        return json.loads(line)


def _serve(prepare: Prepare, args: argparse.Namespace) -> None:
    """What the process of an arm does: prepares, then works once for every line that comes in."""
    import torch

    torch.set_num_threads(args.threads)
    work = prepare(args.arm, args)
    told = os.environ.pop("STEPLADDER_BENCH_OUT", None)
    if told is None:  # by hand
        print(json.dumps(once(work)))
        return
    with os.fdopen(int(told), "w") as replies:
        print("{}", file=replies, flush=True)
        for _ in sys.stdin:
            print(json.dumps(once(work)), file=replies, flush=True)


def once(work: Callable[[], Work]) -> dict[str, Any]:
    """One timed piece of work: seconds on the clock, processor seconds (of ended child processes too), and what it did."""
    began = now()
    done = work()
    spent = [end - start - less for start, end, less in zip(began, now(), done.uncounted, strict=True)]
    return {"seconds": spent[0], "cpu_seconds": spent[1], **asdict(done)}


def now() -> tuple[float, float]:
    """Seconds on the clock, and of the processor by this process and its ended children."""
    return time.perf_counter(), sum(os.times()[:4])


def summary(question: Question, measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Medians of each arm and the ratios of the first arm to the others, repetition by repetition; over 1 is better."""

    def rate(one: Mapping[str, Any], clock: str = "seconds") -> float:
        cost = one[clock] if one["cost"] is None else one["cost"]
        return cost / one["units"] if question.less_is_better else one["units"] / cost

    arms = {
        arm: {
            "rate": statistics.median(map(rate, found)),
            "seconds": statistics.median(m["seconds"] for m in found),
            "cpu_seconds": statistics.median(m["cpu_seconds"] for m in found),
            "tokens_per_second": statistics.median(m["tokens"] / m["seconds"] for m in found),
            "flops_per_second": statistics.median(m["flops"] / m["seconds"] for m in found),
            "peak_mb": statistics.median(m["peak_mb"] for m in found),
            "extra": found[-1]["extra"],
        }
        for arm, found in measured.items()
    }
    ours, *others = question.arms
    ratios = {}
    for other in others:
        pairs = list(zip(measured[ours], measured[other], strict=True))
        turn = -1 if question.less_is_better else 1
        found = [(rate(a) / rate(b)) ** turn for a, b in pairs]
        cpu = [(rate(a, "cpu_seconds") / rate(b, "cpu_seconds")) ** turn for a, b in pairs if b["cpu_seconds"]]
        ratios[other] = {
            "ratio": statistics.median(found),
            "least": min(found),
            "most": max(found),
            "cpu_ratio": statistics.median(cpu) if cpu else None,
            "target": question.targets.get(other),
        }
    sames = [found[-1]["same"] for found in measured.values() if found[-1]["same"] is not None]
    return {
        "name": question.name,
        "asks": question.asks,
        "unit": question.unit,
        "dtype": question.dtype,
        "counted": all(m["cost"] is not None for found in measured.values() for m in found),
        "note": question.note,
        "arms": arms,
        "ratios": ratios,
        "agree": all(agrees(sames[0], one, question.tolerance) for one in sames[1:]) if len(sames) > 1 else None,
    }


def agrees(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two results are equal, numbers to within `tolerance`."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(agrees(a, b, tolerance) for a, b in zip(one, other, strict=True))
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=0.0, abs_tol=tolerance)
    return bool(one == other)


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
        lines.append(f"| {arm} | {one['rate']:,.4g} | {tokens} | {share} | {one['peak_mb']:,.0f} MB |")
    lines.append("")
    for other, one in result["ratios"].items():
        target = f", aimed at {one['target']:g}x" if one["target"] else ""
        cpu = "" if result["counted"] or not one["cpu_ratio"] else f"; by processor seconds {one['cpu_ratio']:.2f}x"
        lines.append(f"Against {other}: {one['ratio']:.2f}x [{one['least']:.2f}, {one['most']:.2f}]{target}{cpu}.")
    for arm, one in result["arms"].items():
        if one["extra"]:
            lines.append(f"{arm}: " + ", ".join(f"{name} {_told(value)}" for name, value in one["extra"].items()) + ".")
    if result["agree"] is not None:
        lines.append("The arms' results are equal." if result["agree"] else "THE ARMS' RESULTS DIFFER.")
    if result["note"]:
        lines.append(result["note"])
    return "\n".join(lines)


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def machine(threads: int, dtype: str = "float32") -> dict[str, Any]:
    """What it was measured on, with the rate of a large matrix product in `dtype` here and now."""
    code = (
        "import sys, time, torch; torch.set_num_threads(int(sys.argv[1])); kind = getattr(torch, sys.argv[2])\n"
        "a, b = torch.rand(2048, 2048).to(kind), torch.rand(2048, 2048).to(kind)\n"
        "def once():\n t = time.perf_counter(); a @ b; return time.perf_counter() - t\n"
        "once(); print(2 * 2048**3 / min(once() for _ in range(10)))"
    )
    command = [sys.executable, "-c", code, str(threads), dtype]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processors": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "matmul_flops_per_second": float(peak),
        "python": platform.python_version(),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "trl", "accelerate")},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vectors = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in found.get("flags", "").split()
    ]
    return f"{found.get('model name', platform.processor())} ({', '.join(vectors) or 'no vector units named'})"
