"""Reasoning-gym's problems are the same in every process, and its scorers cannot hang or harm."""

import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.basics import UserError
from stepladder.tasks.base import Outcome, Problem, Task
from stepladder.tasks.gym import GymTask

STARTING = 40.0
SMALL = {"train": 30, "dev": 5, "test": 10}
chain_sum = GymTask("chain_sum", sizes=SMALL)
products = GymTask("polynomial_multiplication", sizes={"test": 3}, timeout=0.5)


def test_problems_are_verified_by_the_data_set_itself():
    assert isinstance(chain_sum, Task)
    for problem in chain_sum.problems("test"):
        assert chain_sum.verify(problem, f"Adding up.\nAnswer: {problem.answer}").right
        assert chain_sum.verify(problem, f"\\boxed{{{problem.answer}}}").right
        assert chain_sum.verify(problem, f"Answer: {int(problem.answer) + 1}").outcome is Outcome.WRONG
        assert chain_sum.verify(problem, " \n").outcome is Outcome.UNPARSEABLE


def test_splits_are_disjoint_and_duplicates_are_counted():
    prompts = {split: {p.prompt for p in chain_sum.problems(split)} for split in SMALL}
    assert not prompts["train"] & prompts["test"]
    assert not prompts["train"] & prompts["dev"]
    assert not prompts["dev"] & prompts["test"]
    # One digit plus one digit: few sums exist, and training loses those that evaluation has.
    few = GymTask(
        "chain_sum",
        options={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        sizes={"train": 300, "test": 40},
    )
    train, test = few.problems("train"), few.problems("test")
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert len({p.prompt for p in train}) == len(train)
    assert few.dropped["duplicates"] == 340 - len(train) - len(test) > 0


def test_another_seed_makes_other_problems_and_options_reach_the_data_set():
    assert chain_sum.problems("test") == GymTask("chain_sum", sizes=SMALL).problems("test")
    assert chain_sum.problems("test") != GymTask("chain_sum", sizes=SMALL, seed=1).problems("test")
    long = GymTask("chain_sum", options={"min_terms": 9, "max_terms": 9}, sizes={"test": 1})
    assert long.problems("test")[0].prompt.count("+") + long.problems("test")[0].prompt.count("-") >= 8


def test_problems_do_not_depend_on_the_hash_seed_of_the_process():
    # word_ladder walks over sets of words and codeio draws from the global generators: unguarded, both differ by process.
    code = (
        "import hashlib\nfrom stepladder.tasks.gym import GymTask\nfor name in ('word_ladder', 'codeio'):\n"
        "    print(hashlib.sha256(repr(GymTask(name, sizes={'test': 20}).problems('test')).encode()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1
    assert len(next(iter(found)).split()) == 2


@pytest.mark.parametrize("dataset", ["mini_sudoku", "n_queens", "rotate_matrix", "sentence_reordering", "countdown"])
def test_grids_and_free_answers_are_read(dataset):
    task = GymTask(dataset, sizes={"test": 2})
    for problem in task.problems("test"):
        mark = "Answer:\n" if "\n" in problem.answer else "Answer: "
        assert task.verify(problem, f"Let me think.\n{mark}{problem.answer}").right
        assert task.verify(problem, f"Let me think.\n<answer>{problem.answer}</answer>").right
        assert not task.verify(problem, "Answer: no idea").right


def test_a_scorer_that_evaluates_text_is_held_in_time_and_can_do_no_harm(tmp_path):
    problem = products.problems("test")[0]
    assert products.verify(problem, f"Answer: {problem.answer}").right
    started = time.monotonic()
    assert products.verify(problem, "Answer: 9**9**9**9").outcome is Outcome.TIMEOUT
    assert time.monotonic() - started < 4 * 0.5 + 1 + STARTING
    target = tmp_path / "harm"
    verdict = products.verify(problem, f"Answer: __import__('os').system('touch {target}')")
    assert verdict.outcome is Outcome.WRONG
    assert not target.exists()
    assert products.verify(problem, f"Answer: {problem.answer}").right, "a new child scores as the old one did"


@given(st.sampled_from([chain_sum, products]), st.text(max_size=200) | st.text("x^*()+-0123456789/!.=,", max_size=30))
@settings(max_examples=60, deadline=None)
def test_no_text_makes_a_scorer_raise_or_hang(task, text):
    started = time.monotonic()
    verdict = task.verify(task.problems("test")[0], text)
    assert time.monotonic() - started < 4 * task.timeout + 1 + STARTING
    assert isinstance(verdict.outcome, Outcome)


def test_a_problem_of_another_task_is_not_scored():
    verdict = chain_sum.verify(Problem("other/1", "?", "5"), "Answer: 5")
    assert verdict.outcome is Outcome.UNPARSEABLE
    assert "no problem of this task" in verdict.reason


def test_mistakes_are_one_sentence():
    with pytest.raises(UserError, match="no data set 'chain_sums'; did you mean chain_sum"):
        GymTask("chain_sums").problems("train")
    with pytest.raises(UserError, match=r"chain_sum.*min_trms"):
        GymTask("chain_sum", options={"min_trms": 2}).problems("train")
    with pytest.raises(UserError, match="split must be one of train, dev, test, found 'eval'"):
        chain_sum.problems("eval")
    with pytest.raises(ValueError, match="sizes must give each split a number"):
        GymTask("chain_sum", sizes={"train": 0})
    with pytest.raises(ValueError, match="timeout must be more than 0"):
        GymTask("chain_sum", timeout=0)
