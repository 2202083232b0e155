"""Toy worlds for growing trees: growths answered by a function, and an engine that errs as the closed forms of the lab assume."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from typing import Any

import pytest

from stepladder.data_gen.growing import Ask, Rollout
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.tasks.base import Outcome, Problem, Verdict
from stepladder.tasks.chain import ChainArith, apply


def number_steps(ids: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every id is a step of its own."""
    return tuple(map(str, ids)), tuple(range(1, len(ids) + 1))


class Drive:
    """Runs a growth to its end; `rollouts(prefix, number)` gives (ids behind the prefix, right)."""

    def __init__(self, write: Callable[[tuple[int, ...], int], tuple[Sequence[int], bool]]) -> None:
        self.write, self.rounds = write, 0
        self.asks: list[Ask] = []

    def __call__(self, growth: Generator[list[Ask], list[list[Rollout]], Any]) -> Any:
        answer: Any = None
        while True:
            try:
                asks = growth.send(answer)
            except StopIteration as end:
                return end.value
            self.rounds += 1
            self.asks += asks
            answer = [[self.rollout(ask.prefix, n) for n in ask.numbers] for ask in asks]

    def rollout(self, prefix: tuple[int, ...], number: int) -> Rollout:
        ids, right = self.write(prefix, number)
        return Rollout(prefix + tuple(ids), len(prefix), "right" if right else "wrong", (-0.25,) * len(ids))


@pytest.fixture(scope="session")
def drive() -> type[Drive]:
    return Drive


@pytest.fixture(scope="session")
def numbers_cut() -> Any:
    return number_steps


@pytest.fixture(scope="session")
def erring_engine(fake_engine) -> Callable[..., Any]:
    """Makes an engine that solves chains and errs on each step with probability eps, with a uniformly wrong result."""

    def make(task: ChainArith, eps: float) -> Any:
        tokenizer = lab_tokenizer(task.p - 1)

        def write(prefix, seed):
            rng = random.Random(seed)
            head, *lines = tokenizer.decode(prefix).split(" \n")
            start, *operations = head.split(" ; ")
            lines = [line.split() for line in lines if line.strip()]
            value = int(lines[-1][-1]) if lines else int(start.split()[1])
            words = []
            for part in operations[len(lines) :]:
                operation, operand = part.split()
                after = apply(value, operation, int(operand), task.p)
                if rng.random() < eps:
                    after = rng.choice([z for z in range(task.p) if z != after])
                words += [str(value), operation, operand, "=", str(after), "\n"]
                value = after
            return tokenizer(" ".join([*words, "Answer:", str(value), "<eos>"]))["input_ids"]

        return fake_engine(tokenizer, write)

    return make


# --- drafts, critiques, refinements -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def problems() -> dict[str, Problem]:
    """Thirty short chains mod 7, by id."""
    task = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 30, "dev": 1, "test": 1})
    return {problem.id: problem for problem in task.problems("train")}


@pytest.fixture(scope="session")
def words() -> Any:
    """The lab's tokenizer with the words of corrections."""
    return lab_tokenizer(6, CORRECTION_WORDS)


@pytest.fixture
def plain_words() -> Any:
    """A task on plain text whose answer is the last word."""

    class Words:
        name, step_separator = "words", "\n"

        def split_steps(self, text: str) -> list[str]:
            return [line for line in text.split("\n") if line.strip()]

        def verify(self, problem: Problem, text: str) -> Verdict:
            answer = text.strip().split(" ")[-1]
            return Verdict(answer, Outcome.RIGHT if answer == problem.answer else Outcome.WRONG)

    return Words()
