"""Symbolic equality in a process of its own, so that its time limit holds.

math-verify parses LaTeX and asks sympy whether two expressions are equal. Model text can hold 9**9**9 or a nested factorial, which
no Python-level timeout interrupts: signals work in the main thread only and not inside big-integer arithmetic. So one worker
process compares, with its memory limited, and is killed and replaced when it takes too long. This guards against time and memory;
it is no sandbox against code, and none is run: sympy's parser sees what math-verify extracted.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import queue
import subprocess
import sys
import threading

_START_SECONDS = 120.0  # importing sympy on a busy machine; not counted against a comparison
_MEMORY_BYTES = 4 * 2**30  # address space of the worker


class _Worker:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str] = queue.Queue()

    def ask(self, gold: str, answer: str, timeout: float) -> bool | None:
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                if not self._start():
                    return None
            process = self.process
            assert process is not None and process.stdin is not None
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                return json.loads(self.lines.get(timeout=timeout))
            except (queue.Empty, OSError, ValueError):
                self.stop()
                return None

    def _start(self) -> bool:
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _SOURCE],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8",
        )  # fmt: skip
        threading.Thread(target=_pump, args=(self.process, self.lines), daemon=True).start()
        try:
            return self.lines.get(timeout=_START_SECONDS).strip() == '"ready"'
        except queue.Empty:
            self.stop()
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(OSError):
                    if pipe is not None:
                        pipe.close()
            self.process = None


def _pump(process: subprocess.Popen[str], lines: queue.Queue[str]) -> None:
    with contextlib.suppress(OSError, ValueError):
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
    lines.put("")  # the process ended: whoever waits learns it at once


# The worker knows nothing of this package: it must start fast and stay small.
_SOURCE = f"""
import json, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, ({_MEMORY_BYTES}, {_MEMORY_BYTES}))
except Exception:
    pass
from math_verify import parse, verify
out = sys.stdout
sys.stdout = sys.stderr
print(json.dumps("ready"), file=out, flush=True)
for line in sys.stdin:
    gold, answer = json.loads(line)
    try:
        wrap = lambda text: text if "$" in text or "boxed" in text else "$" + text + "$"
        left = parse(wrap(gold), parsing_timeout=None)
        right = parse(wrap(answer), parsing_timeout=None)
        same = bool(left and right and verify(left, right, timeout_seconds=None))
    except BaseException:
        same = False
    print(json.dumps(same), file=out, flush=True)
"""

_worker = _Worker()
atexit.register(_worker.stop)


@functools.lru_cache(maxsize=100_000)
def symbolically_equal(gold: str, answer: str, timeout: float) -> bool | None:
    """Whether two LaTeX answers are equal as mathematics; None if that could not be found out within `timeout` seconds."""
    return _worker.ask(gold, answer, timeout)
