"""Start-up: what a person waits for `stepladder --help`, beside importing torch. Prints seconds; no torch may be imported."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable

from measure import Question, Work, bench

_MAIN = (
    "import sys; sys.argv = ['stepladder', *{}]\n"
    "from stepladder.launch.cli import main; main(); assert 'torch' not in sys.modules"
)
CODE = {
    "stepladder --help": _MAIN.format(["--help"]),
    "stepladder search --help": _MAIN.format(["search", "--help"]),
    "stepladder search beam --help": _MAIN.format(["search", "beam", "--help"]),
    "import torch": "import torch",
}
OPTIONS = {"starts": 5}


def question(args: argparse.Namespace) -> Question:
    asks = "Start-up of the command"
    return Question("startup", asks, "seconds a start", list(CODE), {"import torch": 1.0}, less_is_better=True)


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """Starts of a fresh interpreter."""

    def work() -> Work:
        for _ in range(args.starts):
            subprocess.run([sys.executable, "-c", CODE[arm]], check=True, capture_output=True)
        return Work(units=args.starts)

    subprocess.run(
        [sys.executable, "-c", CODE[arm]], check=True, capture_output=True
    )  # compiled files, the disk's cache
    return work


if __name__ == "__main__":
    bench(question, prepare, **OPTIONS)
