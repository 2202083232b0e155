"""SORM labels and balance against slow references on random rows."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from stepladder.data_gen.label_sets import balanced, checker_labels, consensus, sorm_rows, uses_result
from stepladder.data_gen.rows import Solution, Source, StepLabels
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

SOURCE = Source("policy", "fake", "chain", 0)


def row(problem: str, steps: str, n_correct: list[int], n_rollouts: list[int], sample: int = 0) -> StepLabels:
    return StepLabels(
        problem, "q", "1", sample, tuple(steps), tuple(n_correct), tuple(n_rollouts), "monte_carlo", "wrong", None, False,
        SOURCE,
    )  # fmt: skip


def some_rows(seed: int, count: int = 30) -> list[StepLabels]:
    """Rows that share prefixes, whose shared prefixes have the same counts, with some unknown ones."""
    rng = random.Random(seed)
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    rows = []
    for number in range(count):
        problem = f"p{rng.randrange(6)}"
        steps = "".join(rng.choice("ab") for _ in range(rng.randint(1, 5)))
        pairs = []
        for t in range(len(steps) + 1):
            known = rng.random() < 0.85
            pairs.append(
                counts.setdefault(
                    (problem, steps[:t]), (rng.choice([0, 0, 0, 1, 3]) if known else 0, 3 if known else 0)
                )
            )
        rows.append(row(problem, steps, [c for c, _ in pairs], [n for _, n in pairs], number))
    return rows


@pytest.mark.parametrize(
    ("step", "suffix", "uses"),
    [
        ("3 + 5 = 8", "8 * 2 = 5", True),
        ("3 + 5 = 8", "3 * 2 = 6", False),
        ("so we have 1,200 eggs", "1200 / 12 = 100", True),
        ("it costs 2.50", "2.5 * 4", True),
        ("12 - 7 = 5", "12-5", True),  # the 5 stands behind a sign
        ("3 + 5 = 8", "18 * 2 = 36", False),
        ("we begin", "anything", True),
        ("3 + 5 = 8", "", False),
    ],
)
def test_a_continuation_uses_the_result_before_it(step, suffix, uses):
    assert uses_result(step, suffix) is uses


@pytest.mark.parametrize("seed", range(8))
def test_sorm_labels_match_their_definition(seed):
    rows = some_rows(seed)
    found, counts = sorm_rows(rows, seed=0, balance=False)
    # By definition: a prefix is positive if it, or any known prefix of any row of its problem that it begins, had success.
    successes = {(r.problem_id, r.steps[:t]) for r in rows for t in range(len(r.steps) + 1) if r.n_correct[t]}
    positive = lambda problem, steps: any(p == problem and s[: len(steps)] == steps for p, s in successes)
    known = {(r.problem_id, r.steps[:t]) for r in rows for t in range(len(r.steps) + 1) if r.n_rollouts[t]}
    want = {
        (r.problem_id, r.steps[:t]): int(positive(r.problem_id, r.steps[:t]))
        for r in rows
        for t in range(len(r.steps) + 1)
        if (r.problem_id, r.steps[:t]) in known or positive(r.problem_id, r.steps[:t])
    }
    got: Counter = Counter()
    for r in found:
        assert set(r.n_rollouts) <= {0, 1}
        for t in range(len(r.steps) + 1):
            if r.n_rollouts[t]:
                got[r.problem_id, r.steps[:t]] += 1
                assert r.n_correct[t] == want[r.problem_id, r.steps[:t]]
    assert set(got.values()) == {1}, "a prefix is labelled once"
    assert {k for k in want if k[1]} == {k for k in got if k[1]}
    raised = [k for k in known if want[k] and k not in successes]
    assert counts["labels made positive by a later step"] == len(raised) > 0


def test_without_propagation_a_label_is_that_of_its_own_prefix():
    rows = some_rows(1)
    found, counts = sorm_rows(rows, seed=0, propagate=False, balance=False)
    own = {
        (r.problem_id, r.steps[:t]): r.n_correct[t] > 0
        for r in rows
        for t in range(len(r.steps) + 1)
        if r.n_rollouts[t]
    }
    labelled = {
        (r.problem_id, r.steps[:t]): bool(r.n_correct[t])
        for r in found
        for t in range(1, len(r.steps) + 1)
        if r.n_rollouts[t]
    }
    assert labelled == {key: value for key, value in own.items() if key[1]}
    assert counts["labels made positive by a later step"] == 0


@pytest.mark.parametrize("seed", range(4))
def test_labels_along_a_solution_are_monotone(seed):
    """Even over the rows of a problem together: a positive prefix has positive prefixes alone."""
    found, _ = sorm_rows(some_rows(seed), seed=0, balance=False)
    label = {
        (r.problem_id, r.steps[:t]): r.n_correct[t] for r in found for t in range(len(r.steps) + 1) if r.n_rollouts[t]
    }
    for (problem, steps), value in label.items():
        if value:
            assert all(label.get((problem, steps[:t]), 1) == 1 for t in range(len(steps)))


@pytest.mark.parametrize("by_length", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_balance_keeps_as_many_of_both_and_nothing_changes_but_what_is_dropped(seed, by_length):
    rows = some_rows(seed, 60)
    found, counts = balanced(rows, seed=seed, by_length=by_length)
    sizes: dict[int, Counter] = {}
    before: dict[int, Counter] = {}
    for old, new in zip(rows, found, strict=True):
        assert (old.steps, old.n_correct[0], old.n_rollouts[0]) == (new.steps, new.n_correct[0], new.n_rollouts[0])
        for t in range(1, len(old.steps) + 1):
            key = t if by_length else 0
            if old.n_rollouts[t]:
                before.setdefault(key, Counter())[old.n_correct[t] / old.n_rollouts[t] >= 0.5] += 1
            if new.n_rollouts[t]:
                assert (new.n_correct[t], new.n_rollouts[t]) == (old.n_correct[t], old.n_rollouts[t])
                sizes.setdefault(key, Counter())[new.n_correct[t] / new.n_rollouts[t] >= 0.5] += 1
    for key, sides in before.items():
        least = min(sides[True], sides[False])
        assert sizes.get(key, Counter()) == +Counter({True: least, False: least})
    lost = sum(n > 0 for r in rows for n in r.n_rollouts[1:]) - sum(n > 0 for r in found for n in r.n_rollouts[1:])
    assert counts == {"labels dropped for balance": lost}
    assert balanced(rows, seed=seed, by_length=by_length)[0] == found
    if lost:
        assert any(balanced(rows, seed=other, by_length=by_length)[0] != found for other in range(90, 95))


def test_the_draw_does_not_depend_on_the_order_of_rows():
    rows = [row(f"p{i}", "a", [0, i % 3 == 0], [0, 1]) for i in range(30)]
    kept = lambda found: {r.problem_id for r in found if r.n_rollouts[1]}
    assert kept(balanced(rows, seed=3)[0]) == kept(balanced(rows[::-1], seed=3)[0])
    assert len(kept(balanced(rows, seed=3)[0])) == 20


# --- a checker's labels, and where two sources agree ---------------------------------------------------------------------

CHAIN = ChainArith(p=11)
ASKED = Problem("p", "Start 3 ; + 5 ; * 2 \n", "5")


def chain_solution(steps: tuple[str, ...], sample: int = 0) -> Solution:
    return Solution("p", ASKED.prompt, "5", sample, steps, "", None, "wrong", "eos", (), (), 0.0, SOURCE)


LATE = ("3 + 5 = 8", "8 * 2 = 6", "Answer: 6")
GOOD = ("3 + 5 = 8", "8 * 2 = 5", "Answer: 5")


def test_a_checker_judges_every_step_until_the_first_error():
    late, good = checker_labels([chain_solution(LATE), chain_solution(GOOD)], CHAIN, {"p": ASKED}, noise=0.0, seed=0)
    assert (late.n_correct, late.n_rollouts, late.first_error) == ((1, 1, 0, 0), (1, 1, 1, 1), 1)
    assert (good.n_correct, good.first_error, good.first_error_known) == ((1, 1, 1, 1), None, True)
    assert {late.label_source, good.label_source} == {"checker"}


def test_a_noisy_judge_errs_as_often_as_told_and_stays_monotone():
    solutions = [chain_solution(GOOD, sample) for sample in range(2000)]
    rows = checker_labels(solutions, CHAIN, {"p": ASKED}, noise=0.15, seed=0)
    assert all(list(r.n_correct) == sorted(r.n_correct, reverse=True) for r in rows)
    for t in range(1, 4):  # right so far: none of t judgements was turned round
        share = sum(r.n_correct[t] for r in rows) / 2000
        assert abs(share - 0.85**t) < 4 * (0.25 / 2000) ** 0.5
    assert all(r.first_error is None for r in rows)  # what the checker knows is kept beside what the judge says
    assert checker_labels(solutions[5:9], CHAIN, {"p": ASKED}, noise=0.15, seed=0) == rows[5:9]


def test_consensus_keeps_what_two_sources_agree_on():
    judged = checker_labels([chain_solution(LATE), chain_solution(GOOD, 1)], CHAIN, {"p": ASKED}, noise=0.0, seed=0)
    counts = lambda steps, sample, right: StepLabels(
        "p", ASKED.prompt, "5", sample, steps, right, (8, 8, 8, 1), "monte_carlo", "wrong", None, False, SOURCE
    )
    same, late, other = counts(LATE, 0, (4, 5, 0, 0)), counts(GOOD, 1, (4, 8, 0, 1)), counts(LATE, 7, (4, 5, 0, 0))
    found, lost = consensus([same, late, other], judged)
    assert found == [same]
    assert lost == {"rows whose first error the judge puts elsewhere": 1, "rows that the judge has not seen": 1}
