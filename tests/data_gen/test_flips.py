"""Pairs out of attempts whose verdict a correction turned round."""

from __future__ import annotations

from stepladder.data_gen.flips import flip_pairs
from stepladder.data_gen.rows import Source
from stepladder.data_gen.trajectories import Attempt, Chain
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

SOURCE = Source("p", "e", "t", 0)
PROBLEMS = {name: Problem(name, f"{name}?", "1") for name in "abcd"}


def at(text: str, right: bool, answer: str | None = "1") -> Attempt:
    return Attempt(text, answer, right)


def chain(problem: str, *attempts: Attempt, number: int = 0) -> Chain:
    return Chain(problem, number, attempts, (None,) * len(attempts))


def test_only_flips_become_pairs_and_the_right_side_is_chosen():
    chains = [
        chain("a", at("w\n1", False), at("r\n2", True)),
        chain("b", at("r", True), at("w", False)),
        chain("c", at("x", False), at("y", False), at("z", True), at("z2", True)),
        chain("a", at("w\n1", False), at("r\n2", True), number=1),
        chain("d", at("w", False, None), at("r", True)),
        chain("d", at("w", False), at("My previous answer was wrong. r", True)),
    ]
    result = flip_pairs(chains, ChainArith(), PROBLEMS, per_problem=0, seed=0, source=SOURCE)
    assert {(p.problem_id, p.chosen, p.rejected) for p in result.rows} == {
        ("a", ("r", "2"), ("w", "1")),
        ("b", ("r",), ("w",)),
        ("c", ("z",), ("y",)),
    }
    assert all(p.prefix == () and p.prompt == f"{p.problem_id}?" and p.chosen_finished for p in result.rows)
    assert result.counts == {"wrong to right": 2, "right to wrong": 1}
    assert result.dropped == {
        "attempts that stay wrong": 1, "attempts that stay right": 1, "duplicates": 1, "flips with an unreadable answer": 1,
        "flips that speak of an earlier answer": 1,
    }  # fmt: skip


def test_a_limit_draws_with_the_seed():
    chains = [chain("a", at(f"w{k}", False), at(f"r{k}", True), number=k) for k in range(8)]
    some = lambda seed: flip_pairs(chains, ChainArith(), PROBLEMS, per_problem=3, seed=seed, source=SOURCE)
    assert len(some(0).rows) == 3
    assert some(0).rows == some(0).rows != some(1).rows
    assert some(0).dropped == {"pairs beyond the limit a problem": 5}
