"""Corrections inside a solution: where wrong steps come from, what is masked, and what is measured."""

from __future__ import annotations

import json

import pytest

from stepladder.data_gen.inline import Slip, find_slips, inline_corrections, measure_inline
from stepladder.data_gen.solutions import sample_solutions
from stepladder.models.engine import Sample, Sampling, StopReason
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith
from stepladder.trainers.sft import dialogue_example

TASK = ChainArith(p=7, min_steps=3, max_steps=4, sizes={"train": 12, "dev": 1, "test": 1})


def stopping(engine):
    """The engine, whose samples end behind a line where they are asked to."""
    whole, newline = engine.generate, engine.tokenizer("\n")["input_ids"][0]

    def generate(requests, sampling):
        found = whole(requests, sampling)
        if not sampling.stop:
            return found
        cut = lambda s: s.ids.index(newline) + 1 if newline in s.ids else 0
        short = lambda s: Sample(s.ids[: cut(s)], s.logprobs[: cut(s)], StopReason.STOP) if cut(s) else s
        return [[short(s) for s in samples] for samples in found]

    engine.generate = generate
    return engine


@pytest.fixture(scope="module")
def made(erring_engine):
    problems = {p.id: p for p in TASK.problems("train")}
    engine = stopping(erring_engine(TASK, 0.3))
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")
    rows = sample_solutions(
        engine, TASK, step_format, list(problems.values()), samples=4, sampling=Sampling(60), seed=0, policy="p"
    ).rows
    run = lambda **over: inline_corrections(
        engine, TASK, step_format, rows, problems, ["Wait", "Oops"],
        **{"slips": 1, "positions": 0, "candidates": 4, "completions": 4, "clean": 0.4, "mask": True,
           "sampling": Sampling(60), "seed": 0, **over},
    )  # fmt: skip
    return problems, rows, run


def test_wrong_steps_stand_behind_right_ones_and_are_masked_up_to_the_reflection(made):
    problems, rows, run = made
    result = run()
    words = lab_tokenizer(6, CORRECTION_WORDS)
    step_format = StepFormat.for_policy(words, "\n")
    corrected = [row for row in result.rows if row.kind == "selfcorrect"]
    assert len(result.rows) == sum(row.right for row in rows)
    assert result.counts["clean solutions"] >= 0.3 * len(result.rows)
    assert len(corrected) > 3
    for row in corrected:
        reply = row.messages[1]
        [(begin, end)] = reply.mask_spans
        [place] = json.loads(row.meta)["slips"]
        lines = reply.content.split("\n")
        assert reply.content[begin:end] == lines[place] + "\n"
        assert lines[place + 1] in ("Wait", "Oops")
        kept = lines[:place] + lines[place + 2 :]
        assert any(list(r.steps) == kept and r.right for r in rows if r.problem_id == row.problem_id)
        assert not TASK.check_steps(problems[row.problem_id], lines[: place + 1])[-1].local_ok
        example, _ = dialogue_example(row, words, step_format, 200)
        trained = [i for i in example["labels"] if i != -100]
        want = words("\n".join(lines[:place]) + ("\n" if place else "") + "\n".join(lines[place + 1 :]))["input_ids"]
        assert trained == [*want, words.eos_token_id]
    assert not any(m.mask_spans for row in run(mask=False).rows for m in row.messages)
    assert run(slips=2).counts["corrected steps"] > result.counts["corrected steps"]
    assert {row.kind for row in run(clean=1.0).rows} == {"solve"}


def test_without_a_checker_a_step_from_which_nothing_ends_right_is_wrong(drive, numbers_cut):
    # Steps are numbers; the solution is 1 2 3. In the place of the second a 7 never ends right, an 8 sometimes does.
    def write(prefix, number):
        if prefix == (1,):
            return ((7,), (8,), (2,))[number % 3], False
        return (9,), prefix[-1] == 8 and number == 2

    class Steps(drive):
        def rollout(self, prefix, number):
            made = super().rollout(prefix, number)
            return made if len(prefix) == 2 else type(made)(made.ids, made.start, "unfinished")

    found = Steps(write)(
        find_slips(numbers_cut, (1, 2, 3), (1, 2, 3), ("1", "2", "3"), [1], candidates=3, completions=4, check=None)
    )
    assert found.slips == (Slip(1, "7"),)
    assert found.counts["candidates judged by completions"] == 2


def test_what_a_solution_does_about_its_errors():
    problem = Problem("q", "Start 3 ; + 5 ; * 2 \n", "2")
    run = lambda *steps: measure_inline(TASK, problem, steps, ["Wait"])
    zero = {"steps": 0.0, "wrong": 0.0, "noticed": 0.0, "repaired": 0.0, "alarms": 0.0}
    fixed = run("3 + 5 = 4", "Wait", "3 + 5 = 1", "1 * 2 = 2", "Answer: 2")
    assert fixed == {**zero, "steps": 4, "wrong": 1, "noticed": 1, "repaired": 1}
    assert run("3 + 5 = 4", "Wait", "3 + 5 = 6") == {**zero, "steps": 2, "wrong": 2, "noticed": 1}
    assert run("3 + 5 = 1", "Wait", "3 + 5 = 1") == {**zero, "steps": 2, "alarms": 1}
    assert run("Wait", "3 + 5 = 4", "4 * 2 = 1") == {**zero, "steps": 2, "wrong": 1}  # what goes on from an error holds
