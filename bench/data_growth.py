"""Memory and time of data generation at ten times the problems: memory should be flat and time linear.

    python bench/data_growth.py [--problems 200]

Solutions and their Monte-Carlo labels with the lab policy. The rate is of problems a second: a ratio of 1 is linear time; `peak_mb`
of the two arms is to be compared.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from measure import Question, Work, bench

ARMS = ("ten times the problems", "the problems")


def prepare(arm: str, args: argparse.Namespace) -> Callable[[], Work]:
    """Both stages on all problems, in this process, after a unit that loads what they need."""
    import stepladder
    from stepladder.config import build
    from stepladder.data_gen.store import read_about
    from stepladder.launch.making import make_solutions, make_step_labels
    from stepladder.launch.options_data import Solutions, StepLabelling

    common = {
        "policy": str(Path(stepladder.__path__[0]) / "models" / "lab_policy"), "max_new_tokens": 64,
        "task": {"kind": "chain", "p": 7, "min_steps": 3, "max_steps": 6, "sizes": {"train": 20000, "dev": 20, "test": 20}},
    }  # fmt: skip

    def both(problems: int) -> float:
        folder = Path(tempfile.mkdtemp())  # a new one each time: what is finished would be skipped
        solutions, labels = folder / "solutions", folder / "labels"
        make_solutions(build(Solutions, {**common, "limit": problems, "samples": 4}), solutions)
        given = {**common, "solutions": str(solutions), "per_problem": 1, "rollouts": 4}
        make_step_labels(build(StepLabelling, given), labels)
        return sum(read_about(one)["ledger"]["generated_tokens"] for one in (solutions, labels))

    both(16)
    problems = args.problems * (10 if arm == ARMS[0] else 1)

    def work() -> Work:
        return Work(units=problems, tokens=both(problems))

    return work


if __name__ == "__main__":
    bench(
        Question("data_growth", "Data generation at ten times the problems", "problems a second", ARMS, {"the problems": 1.0}),
        prepare, problems=100,
    )  # fmt: skip
