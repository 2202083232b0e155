"""The lab: closed forms against simulation, exact step checks, disjoint splits, and texts that must not raise."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepladder.basics import fold_seed
from stepladder.tasks.base import HasReference, Outcome, Problem, StepCheck, StepChecker, Task, first_error, split_on
from stepladder.tasks.chain import (
    ChainArith,
    apply,
    flawed_share_of_right,
    hard_label_error_rates,
    value_off_track,
    value_on_track,
)

# 3 + 5 = 8; 8 * 2 = 16 = 5; 5 - 7 = -2 = 9 (mod 11)
TASK = ChainArith(p=11)
PROBLEM = Problem("x", "Start 3 ; + 5 ; * 2 ; - 7 \n", "9")
RIGHT = ["3 + 5 = 8", "8 * 2 = 5", "5 - 7 = 9", "Answer: 9"]


# --- closed forms --------------------------------------------------------------------------------------------------------


def test_closed_forms_give_the_worked_values():
    # p=10, eps=.1, r=4: lam = 1 - .1 * 10/9 = .8889, lam^4 = .6243; c = .1 + .9 * .6243 = .662, w = .1 * .3757 = .0376;
    # K=8: FP = 1 - .9624^8 = .264, FN = .338^8 = .0002
    assert value_on_track(10, 0.1, 4) == pytest.approx(0.662, abs=5e-4)
    assert value_off_track(10, 0.1, 4) == pytest.approx(0.0376, abs=5e-5)
    assert hard_label_error_rates(10, 0.1, 4, 8) == (pytest.approx(0.264, abs=5e-4), pytest.approx(0.0002, abs=5e-5))
    assert value_off_track(97, 0.1, 4) == pytest.approx(0.0036, abs=5e-5)
    assert hard_label_error_rates(97, 0.1, 4, 8)[0] == pytest.approx(0.028, abs=5e-4)
    assert value_on_track(97, 0.3, 6) == pytest.approx(0.124, abs=5e-4)
    assert hard_label_error_rates(97, 0.3, 6, 8)[1] == pytest.approx(0.348, abs=5e-4)
    # p=3, eps=.1, T=6: c = 1/3 + 2/3 * .85^6 = .58477, .9^6 = .53144, 1 - .53144 / .58477 = .0912
    assert flawed_share_of_right(3, 0.1, 6) == pytest.approx(0.0912, abs=5e-5)
    assert flawed_share_of_right(10, 0.1, 6) == pytest.approx(0.023, abs=5e-4)


def test_closed_forms_at_their_ends():
    assert (value_on_track(11, 0.2, 0), value_off_track(11, 0.2, 0)) == (1.0, 0.0)
    assert (value_on_track(11, 0.0, 9), value_off_track(11, 0.0, 9)) == (1.0, 0.0)
    assert value_on_track(11, 0.2, 500) == pytest.approx(1 / 11)
    assert value_off_track(11, 0.2, 500) == pytest.approx(1 / 11)
    assert flawed_share_of_right(11, 0.0, 5) == 0.0


@pytest.mark.parametrize(("p", "eps", "steps"), [(10, 0.1, 4), (3, 0.1, 6), (11, 0.3, 3)])
def test_closed_forms_match_a_simulation(p, eps, steps):
    task = ChainArith(p=p, min_steps=steps, max_steps=steps)
    rng = random.Random(p)
    operations = task.problem(steps, 1).meta["operations"]
    runs = 20_000

    def run(start: int) -> tuple[int, bool]:
        value, flawed = start, False
        for operation, operand in operations:
            value = apply(value, operation, operand, p)
            if rng.random() < eps:
                value = rng.choice([z for z in range(p) if z != value])
                flawed = True
        return value, flawed

    goal = 2 % p
    for operation, operand in operations:
        goal = apply(goal, operation, operand, p)
    on = [run(2 % p) for _ in range(runs)]
    off = [run(rng.choice([z for z in range(p) if z != 2 % p]))[0] == goal for _ in range(runs)]
    right = [flawed for value, flawed in on if value == goal]

    def near(share: float, n: int, want: float) -> bool:
        return abs(share - want) < 4 * (want * (1 - want) / n) ** 0.5  # four standard errors

    assert near(len(right) / runs, runs, value_on_track(p, eps, steps))
    assert near(sum(off) / runs, runs, value_off_track(p, eps, steps))
    assert near(sum(right) / len(right), len(right), flawed_share_of_right(p, eps, steps))
    rollouts = 4
    tries = [any(off[i : i + rollouts]) for i in range(0, runs, rollouts)]
    missed = [not any(v == goal for v, _ in on[i : i + rollouts]) for i in range(0, runs, rollouts)]
    positive, negative = hard_label_error_rates(p, eps, steps, rollouts)
    assert near(sum(tries) / len(tries), len(tries), positive)
    assert near(sum(missed) / len(missed), len(missed), negative)


# --- checks --------------------------------------------------------------------------------------------------------------

OK, OFF = (True, True), (False, False)


@pytest.mark.parametrize(
    ("steps", "want"),
    [
        (RIGHT, [OK, OK, OK, OK]),
        # 3 + 5 is not 7, and what follows holds but is off the track.
        (["3 + 5 = 7", "7 * 2 = 3", "3 - 7 = 7", "Answer: 7"], [OFF, (True, False), (True, False), (True, False)]),
        # Back on the track by a second error: 7 * 2 is 3 and not 5, but 5 is the reference's value.
        (["3 + 5 = 7", "7 * 2 = 5", "5 - 7 = 9", "Answer: 9"], [OFF, (False, True), OK, OK]),
        # The wrong operator and the wrong operand, with results that would be right.
        (["3 + 5 = 8", "8 + 2 = 5", "5 - 7 = 9", "Answer: 9"], [OK, (False, True), OK, OK]),
        (["3 + 5 = 8", "8 * 3 = 5", "5 - 7 = 9", "Answer: 9"], [OK, (False, True), OK, OK]),
        # A line that starts from another value than the one written before it.
        (["3 + 5 = 8", "4 * 2 = 8", "8 - 7 = 1", "Answer: 1"], [OK, OFF, (True, False), (True, False)]),
        # A missing line: everything behind it stands at another operation; the answer comes where a line is due.
        (["3 + 5 = 8", "5 - 7 = 9", "Answer: 9"], [OK, OFF, OFF]),
        # A missing last line: the answer is right and still comes too early.
        (["3 + 5 = 8", "8 * 2 = 5", "Answer: 9"], [OK, OK, OFF]),
        # An extra line, and what follows an answer.
        ([*RIGHT[:3], "9 + 1 = 10", "Answer: 10"], [OK, OK, OK, OFF, OFF]),
        ([*RIGHT, "Answer: 9"], [OK, OK, OK, OK, OFF]),
        # The answer must repeat the last value.
        ([*RIGHT[:3], "Answer: 8"], [OK, OK, OK, OFF]),
        (["3 + 5 = 8", "8 * 2 = 5", "5 - 7 = 8", "Answer: 9"], [OK, OK, OFF, (False, True)]),
        # Something that is no line at all.
        (["hello", *RIGHT[1:]], [OFF, (False, True), OK, OK]),
        # A result outside Z_p is not a residue.
        (["3 + 5 = 19", *RIGHT[1:]], [OFF, (False, True), OK, OK]),
        # Spaces around do not matter; a shortened solution is checked as far as it goes.
        ([" 3 + 5 = 8 ", "8 * 2 = 5"], [OK, OK]),
        ([], []),
    ],
)  # fmt: skip
def test_check_steps_on_hand_made_solutions(steps, want):
    assert TASK.check_steps(PROBLEM, steps) == [StepCheck(*flags) for flags in want]


def test_first_error_is_the_first_step_off_the_track_or_not_holding():
    assert first_error(TASK.check_steps(PROBLEM, RIGHT)) is None
    assert first_error([]) is None
    assert first_error(TASK.check_steps(PROBLEM, ["3 + 5 = 8", "8 + 2 = 5", "5 - 7 = 9"])) == 1


def test_reference_solutions_are_right_by_both_checks():
    for p in (3, 10, 11, 97):
        task = ChainArith(p=p, min_steps=1, max_steps=6, sizes={"train": 25})
        for problem in task.problems("train"):
            steps = task.reference_steps(problem)
            assert first_error(task.check_steps(problem, steps)) is None
            assert len(steps) == problem.meta["steps"] + 1
            assert task.verify(problem, " \n ".join(steps)).outcome is Outcome.RIGHT
            assert task.split_steps(" \n ".join(steps)) == steps
            # Every operation can be inverted, so that a wrong value stays wrong until the next error.
            for operation, operand in problem.meta["operations"]:
                assert len({apply(z, operation, operand, p) for z in range(p)}) == p


@pytest.mark.parametrize(
    ("text", "answer", "outcome"),
    [
        ("Answer: 9", "9", Outcome.RIGHT),
        ("Answer:9", "9", Outcome.RIGHT),
        ("Answer: 09", "9", Outcome.RIGHT),
        ("Answer: 8", "8", Outcome.WRONG),
        ("Answer: 8 \n Answer: 9", "9", Outcome.RIGHT),
        ("Answer: 9 \n Answer: 8", "8", Outcome.WRONG),
        ("", None, Outcome.UNPARSEABLE),
        ("9", None, Outcome.UNPARSEABLE),
        ("Answer: nine", None, Outcome.UNPARSEABLE),
        ("Answer: 0000091", None, Outcome.UNPARSEABLE),  # its first six digits say 9
        ("Answer: 9" + " " * 3000, None, Outcome.UNPARSEABLE),  # only the end of a long text is read
    ],
)
def test_verify(text, answer, outcome):
    verdict = TASK.verify(PROBLEM, text)
    assert (verdict.answer, verdict.outcome) == (answer, outcome)
    assert verdict.right == (outcome is Outcome.RIGHT)


PIECES = st.sampled_from(
    [
        "Answer:",
        "Answer",
        ":",
        "=",
        "+",
        "-",
        "*",
        "\n",
        " ",
        "3",
        "11",
        "٣",
        "²",
        "99999999999",
        "3 + 5 = 8",
        "\ud800",
        "\x00",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join)))
def test_no_text_makes_the_checks_raise(text):
    verdict = TASK.verify(PROBLEM, text)
    assert isinstance(verdict.outcome, Outcome)
    assert (verdict.answer is None) == (verdict.outcome is Outcome.UNPARSEABLE)
    steps = TASK.split_steps(text)
    assert all(step and step == step.strip() and "\n" not in step for step in steps)
    assert len(TASK.check_steps(PROBLEM, steps)) == len(steps)


def test_split_on():
    assert split_on(" a \n\n b\n \nc", "\n") == ["a", "b", "c"]
    assert split_on("", "\n") == []


# --- problems ------------------------------------------------------------------------------------------------------------


def test_splits_are_disjoint_whatever_the_sizes_and_seeds():
    prompts: dict[str, set[str]] = {"train": set(), "dev": set(), "test": set()}
    for seed in range(3):
        for sizes in ({"train": 150, "dev": 20, "test": 90}, {"train": 30, "dev": 120, "test": 10}):
            task = ChainArith(p=5, min_steps=2, max_steps=3, sizes=sizes, seed=seed)
            for split, size in sizes.items():
                found = task.problems(split)
                assert len({q.prompt for q in found}) == len(found) == size
                prompts[split] |= {q.prompt for q in found}
    assert len(prompts["train"]) > 200  # the seeds do not all give the same
    assert not prompts["train"] & prompts["dev"]
    assert not prompts["train"] & prompts["test"]
    assert not prompts["dev"] & prompts["test"]


def test_problems_are_the_same_on_each_call_and_their_number_does_not_change_the_first():
    many, few = ChainArith(sizes={"train": 60}), ChainArith(sizes={"train": 10})
    assert many.problems("train") == many.problems("train")
    assert many.problems("train")[:10] == few.problems("train")
    assert ChainArith(sizes={"train": 10}, seed=1).problems("train") != few.problems("train")
    lengths = Counter(q.meta["steps"] for q in many.problems("train"))
    assert lengths == {4: 12, 5: 12, 6: 12, 7: 12, 8: 12}
    assert [q.id for q in few.problems("train")[:2]] == ["chain/train/00000", "chain/train/00001"]


def test_too_many_problems_or_an_unknown_split_is_said():
    # One operation mod 3 on one of 3 values: + 1, + 2, - 1, - 2, * 2, so 15 problems in all splits together.
    with pytest.raises(ValueError, match="fewer than 16 distinct problems"):
        ChainArith(p=3, min_steps=1, max_steps=1, sizes={"train": 16}).problems("train")
    with pytest.raises(ValueError, match="split must be one of train"):
        ChainArith(sizes={"train": 5}).problems("tests")
    with pytest.raises(ValueError, match="p must lie between"):
        ChainArith(p=2)
    with pytest.raises(ValueError, match="min_steps"):
        ChainArith(min_steps=3, max_steps=2)


def test_a_chain_is_a_task_with_checks_and_references():
    assert isinstance(TASK, Task)
    assert isinstance(TASK, StepChecker)
    assert isinstance(TASK, HasReference)


# --- demonstrations ------------------------------------------------------------------------------------------------------


def test_noisy_facts_are_fixed_and_as_many_as_asked():
    task, again = ChainArith(p=97, noisy_share=0.15), ChainArith(p=97, noisy_share=0.15)
    facts = [(z, op, a) for z in range(97) for op in "+-" for a in range(1, 21)]
    results = {fact: task.noisy_result(*fact) for fact in facts}
    assert results == {fact: again.noisy_result(*fact) for fact in facts}
    noisy = {fact: wrong for fact, wrong in results.items() if wrong is not None}
    assert len(noisy) / len(facts) == pytest.approx(0.15, abs=4 * (0.15 * 0.85 / len(facts)) ** 0.5)
    assert all(wrong != apply(*fact, 97) and 0 <= wrong < 97 for fact, wrong in noisy.items())
    assert results != {fact: ChainArith(p=97, seed=1).noisy_result(*fact) for fact in facts}


def test_demonstrations_err_at_the_rates_asked_and_carry_errors_on():
    task = ChainArith(p=11, sizes={"train": 400})
    noisy, plain = Counter(), Counter()
    for problem in task.problems("train"):
        for draw in range(3):
            seed = fold_seed(draw, problem.id)
            steps = task.demonstration(problem, seed)
            assert steps == task.demonstration(problem, seed)
            before = problem.meta["start"]
            for line, (operation, operand) in zip(steps[:-1], problem.meta["operations"], strict=True):
                words = line.split()
                assert (int(words[0]), words[1], int(words[2])) == (before, operation, operand)
                after, right = int(words[4]), apply(before, operation, operand, 11)
                wrong = task.noisy_result(before, operation, operand)
                if wrong is None:
                    plain[after == right] += 1
                else:
                    assert after in (right, wrong)
                    noisy[after == right] += 1
                before = after
            assert steps[-1] == f"Answer: {before}"

    def near(found: Counter, want: float) -> bool:
        n = found.total()
        return abs(found[False] / n - want) < 4 * (want * (1 - want) / n) ** 0.5

    assert near(noisy, task.noisy_rate)
    assert near(plain, task.slip_rate)


def test_a_slip_is_never_the_right_result():
    task = ChainArith(p=3, sizes={"train": 50}, noisy_share=0.0, slip_rate=1.0)
    for problem in task.problems("train"):
        checks = task.check_steps(problem, task.demonstration(problem, 0))
        assert [check.local_ok for check in checks] == [False] * problem.meta["steps"] + [True]


def test_a_multiple_choice_grader_sees_the_remainder_alone():
    task = ChainArith(p=11, choices=3)  # 9 and 6 are the same letter, and steps are checked as ever
    assert [task.verify(PROBLEM, f"Answer: {n}").outcome for n in (9, 6, 0, 7)] == [Outcome.RIGHT] * 3 + [Outcome.WRONG]
    assert TASK.verify(PROBLEM, "Answer: 6").outcome is Outcome.WRONG
    assert not task.check_steps(PROBLEM, ["3 + 5 = 5"])[0].local_ok
    with pytest.raises(ValueError, match="choices must be 0 or lie between 2 and p, found 12"):
        ChainArith(p=11, choices=12)


def test_a_line_holds_whatever_was_asked():
    assert [TASK.holds(s) for s in ("3 + 5 = 8", " 9 * 9 = 4 ", "3 + 5 = 9", "Answer: 1", "so")] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_by_how_much_a_step_is_off():
    task = ChainArith(p=7)
    assert task.difference("3 - 6 = 0", "3 - 6 = 4") == "0 - 4 = 3"
    assert task.difference("Answer: 5", "Answer: 5") == "5 - 5 = 0"
    assert task.difference("Answer: 9", "Answer: 5") is None
    assert task.difference("3 -", "3 - 6 = 4") is None
