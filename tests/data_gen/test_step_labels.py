"""Monte-Carlo labels: exact counts on a scripted engine, and error rates near their closed forms."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest

from stepladder.basics import fold_seed
from stepladder.data_gen.rows import Solution, Source, step_targets
from stepladder.data_gen.solutions import sample_solutions
from stepladder.data_gen.step_labels import monte_carlo_labels
from stepladder.models.engine import Sampling
from stepladder.models.lab import lab_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.models.steps import cut_steps
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith, apply, hard_label_error_rates, value_off_track, value_on_track

TASK = ChainArith(p=11)
PROBLEM = Problem("p0", "Start 3 ; + 5 ; * 2 \n", "5")
OTHER = Problem("p1", "Start 3 ; + 5 \n", "8")
LIMIT = Sampling(100)


def solution(tokenizer, problem: Problem, text: str, number: int = 0) -> Solution:
    ids = tuple(tokenizer(text)["input_ids"])
    steps, ends = cut_steps(tokenizer, ids, "\n")
    verdict = TASK.verify(problem, text)
    return Solution(
        problem.id, problem.prompt, problem.answer, number, steps, text, verdict.answer, verdict.outcome.value, "eos",
        ids, ends, -1.0, Source("policy", "fake", "chain", 0),
    )  # fmt: skip


def label(engine, tokenizer, solutions, *, rollouts=8, seed=0, problems=(PROBLEM, OTHER), task=TASK):
    step_format = StepFormat.for_policy(tokenizer, "\n")
    return monte_carlo_labels(
        engine,
        task,
        step_format,
        solutions,
        {p.id: p for p in problems},
        rollouts=rollouts,
        sampling=LIMIT,
        seed=seed,
        policy="me",
    )


def scripted(tokenizer, fake_engine, right_of: dict[str, int], context: int = 10**6):
    """Of the continuations of a prefix (its text behind the prompt) the first `right_of` end right, whatever the seeds."""
    asked: Counter = Counter()
    prompt = tokenizer(PROBLEM.prompt)["input_ids"]

    def write(prefix, seed):
        text = tokenizer.decode(prefix[len(prompt) :])
        asked[text] += 1
        return tokenizer("Answer: 5 <eos>" if asked[text] <= right_of[text] else "Answer: 6 <eos>")["input_ids"]

    return fake_engine(tokenizer, write, context), asked


def test_counts_are_exact(lab_words, fake_engine):
    engine, asked = scripted(lab_words, fake_engine, {"": 5, "3 + 5 = 8 \n": 7, "3 + 5 = 8 \n 8 * 2 = 5 \n": 8})
    row = solution(lab_words, PROBLEM, "3 + 5 = 8 \n 8 * 2 = 5 \n Answer: 5 <eos>")
    result = label(engine, lab_words, [row])
    [labels] = result.rows
    # The empty prefix, each step but the last, and the solution's own verdict.
    assert labels.n_correct == (5, 7, 8, 1)
    assert labels.n_rollouts == (8, 8, 8, 1)
    assert set(asked.values()) == {8}
    assert (labels.steps, labels.outcome, labels.sample) == (row.steps, "right", 0)
    assert (labels.first_error, labels.first_error_known, labels.label_source) == (None, True, "monte_carlo")
    assert labels.source == Source("me", "fake", "chain", 0)
    assert result.ledger.generated_tokens == 3 * 8 * 3
    assert step_targets(labels, "soft") == [0.875, 1.0, 1.0]


def test_a_prefix_is_continued_as_it_was_sampled(lab_words, fake_engine):
    engine, _ = scripted(lab_words, fake_engine, {"": 0, "3 + 5 = 8 \n \n": 0})
    row = solution(lab_words, PROBLEM, "3 + 5 = 8 \n \n 8 * 2 = 5 <eos>")
    label(engine, lab_words, [row])
    prompt = tuple(lab_words(PROBLEM.prompt)["input_ids"])
    assert [r.prefix for r in engine.asked] == [prompt, prompt + row.token_ids[: row.step_ends[0]]]
    assert len({seed for r in engine.asked for seed in r.seeds}) == 16  # every rollout has a seed of its own


def test_shared_prefixes_are_continued_once(lab_words, fake_engine):
    engine, asked = scripted(
        lab_words, fake_engine, {"": 3, "3 + 5 = 8 \n": 6, "3 + 5 = 7 \n": 1, "3 + 5 = 8 \n 8 * 2 = 4 \n": 0}
    )
    texts = [
        "3 + 5 = 8 \n Answer: 5 <eos>", "3 + 5 = 8 \n 8 * 2 = 4 \n Answer: 4 <eos>",
        "3 + 5 = 7 \n Answer: 5 <eos>", "3 + 5 = 8 \n Answer: 5 <eos>",
    ]  # fmt: skip
    rows = [solution(lab_words, PROBLEM, text, i) for i, text in enumerate(texts)]
    found = label(engine, lab_words, rows).rows
    assert asked == dict.fromkeys(asked, 8)
    assert len(asked) == 4
    assert [r.n_correct for r in found] == [(3, 6, 1), (3, 6, 0, 0), (3, 1, 1), (3, 6, 1)]
    assert [r.first_error for r in found] == [1, 1, 0, 1]  # an answer that comes too early is an error, too
    assert [r.sample for r in found] == [0, 1, 2, 3]


def test_the_same_text_of_another_problem_is_another_prefix(lab_words, fake_engine):
    engine = fake_engine(lab_words, lambda prefix, _: lab_words("Answer: 8 <eos>")["input_ids"])
    rows = [solution(lab_words, p, "3 + 5 = 8 \n Answer: 8 <eos>") for p in (PROBLEM, OTHER)]
    found = label(engine, lab_words, rows).rows
    assert [r.n_correct for r in found] == [(0, 0, 0), (8, 8, 1)]
    assert len(engine.asked) == 4
    assert len({seed for r in engine.asked for seed in r.seeds}) == 32


def test_an_empty_solution_is_dropped_counted_and_not_continued(lab_words, fake_engine):
    engine, asked = scripted(lab_words, fake_engine, {"": 2})
    rows = [solution(lab_words, PROBLEM, text) for text in ("<eos>", "\n \n <eos>", "")]
    result = label(engine, lab_words, rows)
    assert result.rows == []
    assert result.dropped == {"empty solutions": 3}
    assert not asked


def test_the_last_count_is_the_solutions_own_verdict(lab_words, fake_engine):
    engine, _ = scripted(lab_words, fake_engine, {"": 8})
    rows = [solution(lab_words, PROBLEM, text) for text in ("Answer: 5 <eos>", "Answer: 6 <eos>", "3 + 5")]
    assert [(r.n_correct, r.n_rollouts) for r in label(engine, lab_words, rows).rows] == [
        ((8, 1), (8, 1)), ((8, 0), (8, 1)), ((8, 0), (8, 1)),
    ]  # fmt: skip


def test_prefixes_longer_than_the_context_are_counted_and_nothing_is_known_about_them(lab_words, fake_engine):
    # The prompt has 9 tokens, the first line with its newline 6.
    engine, _ = scripted(lab_words, fake_engine, {"": 4}, context=15)
    row = solution(lab_words, PROBLEM, "3 + 5 = 8 \n 8 * 2 = 5 \n Answer: 5 <eos>")
    result = label(engine, lab_words, [row])
    assert result.rows[0].n_correct == (4, 0, 0, 1)
    assert result.rows[0].n_rollouts == (8, 0, 0, 1)
    assert result.dropped == {"prefixes longer than the context": 2}
    assert step_targets(result.rows[0], "hard") == [None, None, 1.0]


def test_imported_text_takes_the_ids_of_the_step_format(lab_words, fake_engine):
    engine, _ = scripted(lab_words, fake_engine, {"": 1, "3 + 5 = 8 \n": 2})
    row = solution(lab_words, PROBLEM, "3 + 5 = 8 \n Answer: 5 <eos>")
    bare = dataclasses.replace(row, token_ids=(), step_ends=())
    assert label(engine, lab_words, [bare]).rows[0].n_correct == (1, 2, 1)
    encoded = StepFormat.for_policy(lab_words, "\n").encode(lab_words, PROBLEM.prompt, row.steps)
    assert engine.asked[1].prefix == encoded.ids[: encoded.step_ends[0] + 1]


def test_a_task_without_exact_checks_knows_no_first_error(lab_words, fake_engine):
    class Plain:
        name, step_separator = "plain", "\n"
        verify = TASK.verify

    engine, _ = scripted(lab_words, fake_engine, {"": 1})
    [row] = label(engine, lab_words, [solution(lab_words, PROBLEM, "Answer: 6 <eos>")], task=Plain()).rows
    assert (row.first_error, row.first_error_known) == (None, False)


def test_same_arguments_same_labels_whatever_stands_beside(lab_words, tiny_policy):
    task = ChainArith(p=11, min_steps=1, max_steps=2, sizes={"train": 6})
    problems = task.problems("train")
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    step_format = StepFormat.for_policy(lab_words, "\n")
    rows = sample_solutions(
        engine, task, step_format, problems, samples=2, sampling=Sampling(20), seed=0, policy="me"
    ).rows

    class ByLength(ChainArith):
        """A random model seldom writes an answer: every third length of a text counts as right."""

        def verify(self, problem, text):
            return TASK.verify(Problem("", "", "0"), f"Answer: {len(text) % 3}")

    options = {"rollouts": 4, "task": ByLength(), "problems": problems}
    whole = label(engine, lab_words, rows, **options).rows
    assert len({r.n_correct for r in whole}) > 1
    assert label(engine, lab_words, rows, **options).rows == whole
    assert label(engine, lab_words, rows[::-1], **options).rows == whole[::-1]
    some = label(engine, lab_words, rows[4:7], **options).rows
    assert some == [r for r in whole if (r.problem_id, r.sample) in {(x.problem_id, x.sample) for x in rows[4:7]}]
    assert label(engine, lab_words, rows, seed=1, **options).rows != whole


@pytest.mark.parametrize(("p", "eps", "steps", "rollouts"), [(10, 0.1, 4, 8), (11, 0.3, 3, 4)])
def test_label_errors_are_near_their_closed_forms(fake_engine, p, eps, steps, rollouts):
    """A policy that errs as the closed forms assume, step by step, with a uniformly wrong result."""
    task = ChainArith(p=p, min_steps=steps, max_steps=steps, sizes={"train": 150})
    tokenizer = lab_tokenizer(p - 1)

    def write(prefix, seed):
        rng = random.Random(seed)
        head, *lines = tokenizer.decode(prefix).split(" \n")
        start, *operations = head.split(" ; ")
        lines = [line.split() for line in lines if line.strip()]
        value = int(lines[-1][-1]) if lines else int(start.split()[1])
        words = []
        for part in operations[len(lines) :]:
            operation, operand = part.split()
            after = apply(value, operation, int(operand), p)
            if rng.random() < eps:
                after = rng.choice([z for z in range(p) if z != after])
            words += [str(value), operation, operand, "=", str(after), "\n"]
            value = after
        return tokenizer(" ".join([*words, "Answer:", str(value), "<eos>"]))["input_ids"]

    engine = fake_engine(tokenizer, write)
    problems = {q.id: q for q in task.problems("train")}
    step_format = StepFormat.for_policy(tokenizer, "\n")
    rows = sample_solutions(
        engine, task, step_format, list(problems.values()), samples=4, sampling=LIMIT, seed=0, policy="me"
    ).rows
    assert all(len(r.steps) == steps + 1 for r in rows)
    right = sum(r.right for r in rows) / len(rows)
    want = value_on_track(p, eps, steps)
    assert abs(right - want) < 4 * (want * (1 - want) / len(rows)) ** 0.5

    found = label(engine, tokenizer, rows, rollouts=rollouts, task=task, problems=problems.values())
    # Each distinct prefix is one observation: (on track, steps left) -> [right continuations, positive labels, prefixes].
    counts: dict[tuple[bool, int], list[int]] = {}
    seen = set()
    for row in found.rows:
        checks = task.check_steps(problems[row.problem_id], row.steps)
        for t in range(1, steps):
            key = (row.problem_id, row.steps[:t])
            if key not in seen:
                seen.add(key)
                entry = counts.setdefault((checks[t - 1].on_track, steps - t), [0, 0, 0])
                entry[0] += row.n_correct[t]
                entry[1] += step_targets(row, "hard")[t - 1]
                entry[2] += 1
    assert len(counts) == 2 * (steps - 1)
    for (on_track, left), (correct, positive, n) in counts.items():
        value = value_on_track(p, eps, left) if on_track else value_off_track(p, eps, left)
        false_positive, false_negative = hard_label_error_rates(p, eps, left, rollouts)
        label_rate = 1 - false_negative if on_track else false_positive
        assert n > 30
        assert abs(correct / (n * rollouts) - value) < 4 * (value * (1 - value) / (n * rollouts)) ** 0.5
        assert abs(positive / n - label_rate) < 4 * (label_rate * (1 - label_rate) / n) ** 0.5 + 1 / n


def test_seeds_are_folded_by_what_the_prefix_holds(lab_words, fake_engine):
    """Another solution beside it, or another place among the prefixes, does not change a prefix's rollouts."""
    engine = fake_engine(lab_words, lambda *_: lab_words("Answer: 5 <eos>")["input_ids"])
    one = solution(lab_words, PROBLEM, "3 + 5 = 8 \n Answer: 5 <eos>")
    two = solution(lab_words, PROBLEM, "3 + 5 = 7 \n Answer: 5 <eos>")
    label(engine, lab_words, [one])
    label(engine, lab_words, [two, one])
    seeds: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for request in engine.asked:
        seeds.setdefault(request.prefix, set()).add(request.seeds)
    assert len(seeds) == 3
    assert all(len(found) == 1 for found in seeds.values())
    assert fold_seed(0) not in {s for found in seeds.values() for one in found for s in one}
