"""Labelling that stops early: the rule against integration and enumeration, and that no decided label ever changes."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest

from stepladder.data_gen.rows import step_targets
from stepladder.data_gen.solutions import sample_solutions
from stepladder.data_gen.step_labels import StopRule, beta_below, monte_carlo_labels
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.chain import ChainArith


@pytest.mark.parametrize(("correct", "sampled"), [(0, 0), (0, 4), (1, 4), (4, 4), (3, 10), (16, 32)])
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3, 0.5, 0.9])
def test_the_tail_of_the_beta_is_its_integral(correct, sampled, threshold):
    """Simpson's rule over the density x^c (1 - x)^(n - c), normalised by the same rule over [0, 1]."""

    def integral(high: float) -> float:
        x = np.linspace(0.0, high, 20_001)
        y = x**correct * (1 - x) ** (sampled - correct)
        return float((y[0] + y[-1] + 4 * y[1:-1:2].sum() + 2 * y[2:-1:2].sum()) * high / 60_000) if high else 0.0

    assert beta_below(threshold, correct, sampled) == pytest.approx(integral(threshold) / integral(1.0), abs=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.7])
def test_at_confidence_one_a_decided_label_is_that_of_every_ending(threshold):
    """All sequences of six continuations: decided exactly when every completion of what was seen gives one label."""
    rule, n = StopRule(threshold), 6
    for sampled in range(n + 1):
        for seen in itertools.product([0, 1], repeat=sampled):
            labels = {(sum(seen) + sum(rest)) / n > threshold for rest in itertools.product([0, 1], repeat=n - sampled)}
            assert rule.decided(sum(seen), sampled, n) == (len(labels) == 1), (seen, labels)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_with_less_confidence_labels_are_wrong_no_more_often_than_it_says(confidence):
    """True shares drawn from the prior that the rule assumes."""
    rng = random.Random(0)
    rule = StopRule(0.5, confidence, 1)
    wrong = total = 0
    for _ in range(4000):
        share, correct, sampled = rng.random(), 0, 0
        while not rule.decided(correct, sampled, 32):
            correct, sampled = correct + (rng.random() < share), sampled + 1
        # Decided by confidence, and not by the rest being too few: near the threshold those say little of the true share.
        if correct <= 16 < 32 - sampled + correct:
            total += 1
            wrong += (correct > 0.5 * sampled) != (share > 0.5)
    assert total > 1500
    assert wrong / total <= 1 - confidence + 3 * (confidence * (1 - confidence) / total) ** 0.5


@pytest.mark.parametrize(("kind", "threshold", "size"), [("hard", 0.0, 1), ("hard", 0.0, 3), ("threshold", 0.5, 2)])
def test_stopping_early_changes_no_label_and_saves_continuations(erring_engine, kind, threshold, size):
    task = ChainArith(p=7, min_steps=3, max_steps=5, sizes={"train": 20})
    engine = erring_engine(task, 0.25)
    problems = task.problems("train")
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")
    solutions = sample_solutions(
        engine, task, step_format, problems, samples=2, sampling=Sampling(80), seed=0, policy="me"
    ).rows

    def label(stop):
        asked = len(engine.asked)
        result = monte_carlo_labels(
            engine, task, step_format, solutions, {p.id: p for p in problems},
            rollouts=8, sampling=Sampling(80), seed=0, policy="me", stop=stop,
        )  # fmt: skip
        return result, sum(len(r.seeds) for r in engine.asked[asked:])

    (whole, all_calls), (some, calls) = label(None), label(StopRule(threshold, 1.0, size))
    for full, early in zip(whole.rows, some.rows, strict=True):
        assert step_targets(full, kind, threshold) == step_targets(early, kind, threshold)
        assert (full.n_correct[0] > 8 * threshold) == (early.n_correct[0] > early.n_rollouts[0] * threshold)
        # What was sampled is the beginning of what would have been.
        assert all(e <= f for e, f in zip(early.n_correct, full.n_correct, strict=True))
    assert some.counts["continuations sampled"] == calls < 0.8 * all_calls
    assert some.counts["continuations saved by stopping early"] == all_calls - calls


def test_consistent_labels_count_only_continuations_that_use_the_result(lab_words, fake_engine):
    task = ChainArith(p=11)
    from stepladder.data_gen.rows import Solution, Source
    from stepladder.models.steps import cut_steps
    from stepladder.tasks.base import Problem

    problem = Problem("p0", "Start 3 ; + 5 ; * 2 \n", "5")
    texts = iter(["8 * 2 = 5 \n Answer: 5 <eos>", "3 * 2 = 6 \n Answer: 5 <eos>"] * 2)
    prompt = len(lab_words(problem.prompt)["input_ids"])

    def write(prefix, seed):
        return lab_words(next(texts) if len(prefix) > prompt else "Answer: 5 <eos>")["input_ids"]

    ids = tuple(lab_words("3 + 5 = 8 \n Answer: 5 <eos>")["input_ids"])
    steps, ends = cut_steps(lab_words, ids, "\n")
    row = Solution(
        "p0", problem.prompt, "5", 0, steps, "", "5", "right", "eos", ids, ends, 0.0, Source("me", "fake", "chain", 0)
    )
    engine = fake_engine(lab_words, write)
    result = monte_carlo_labels(
        engine, task, StepFormat.for_policy(lab_words, "\n"), [row], {"p0": problem},
        rollouts=4, sampling=Sampling(40), seed=0, policy="me", consistent=True,
    )  # fmt: skip
    assert result.rows[0].n_correct == (4, 2, 1)
    assert result.rows[0].n_rollouts == (4, 4, 1)
    assert result.counts["right continuations that do not use the result before them"] == 2
