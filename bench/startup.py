"""Start-up: what a person waits for `stepladder --help`, beside importing torch. Prints seconds; no torch may be imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from measure import Question, Work, bench

_MAIN = "import sys; sys.argv = ['stepladder', {}]; from stepladder.launch.cli import main; main()"
CODE = {
    "stepladder --help": _MAIN.format("'--help'"),
    "stepladder search --help": _MAIN.format("'search', '--help'"),
    "import torch": "import torch",
}


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """Ten starts of a fresh interpreter."""

    def work() -> Work:
        for _ in range(10):
            check = "; import sys; assert 'torch' not in sys.modules" if arm != "import torch" else ""
            subprocess.run([sys.executable, "-c", CODE[arm] + check], check=True, capture_output=True)
        return Work(units=10)

    work()  # compiled files and the disk's cache
    return work


if __name__ == "__main__":
    asks = "Start-up of the command"
    bench(Question("startup", asks, "seconds a start", list(CODE), {"import torch": 1.0}, less_is_better=True), prepare)
