"""Exact values: dynamic programming against the closed form and enumeration, the table against single forwards and samples."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import stepladder
from stepladder.basics import UserError, fold_seed
from stepladder.models.engine import Request, Sampling
from stepladder.models.exact_value import FactTable, chain_values, read_facts, solution_values
from stepladder.models.ledger import Ledger
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import OPERATIONS, ChainArith, apply, value_off_track, value_on_track

LAB = str(Path(stepladder.__path__[0]) / "models" / "lab_policy")


def table_of(task: ChainArith, result, answers=None) -> FactTable:
    """A table from a function (value, operation, operand) -> probabilities [p]."""
    facts = [(z, op, a) for z in range(task.p) for op in OPERATIONS for a in range(1, task.p)]
    return FactTable({f: np.array(result(*f)) for f in facts}, np.eye(task.p) if answers is None else answers, 0, 0)


def test_values_are_the_closed_form_of_a_policy_that_errs_uniformly():
    task, eps = ChainArith(p=7), 0.2

    def uniform(z, op, a):
        right = apply(z, op, a, 7)
        return [1 - eps if k == right else eps / 6 for k in range(7)]

    problem = task.problem(5, 3)
    start, operations = task.parse(problem)
    values = chain_values(table_of(task, uniform), operations, int(problem.answer))
    right = start
    for t in range(6):
        if t:
            right = apply(right, *operations[t - 1], 7)
        for z in range(7):
            of = value_on_track if z == right else value_off_track
            assert values[t, z] == pytest.approx(of(7, eps, 5 - t))


def test_values_are_the_sum_over_all_ways_to_write_the_rest():
    task, rng = ChainArith(p=3), np.random.default_rng(0)
    drawn = {}

    def result(*fact):  # nothing adds up to 1: some mass is lost, and the answer line errs too
        return drawn.setdefault(fact, rng.random(3) / 2)

    answers = rng.random((3, 3)) / 2
    table = table_of(task, result, answers)
    operations, answer = [("+", 2), ("*", 2), ("-", 1)], 1
    values = chain_values(table, operations, answer)
    for z in range(3):
        total = 0.0
        for written in itertools.product(range(3), repeat=3):
            probability, at = 1.0, z
            for (op, a), after in zip(operations, written, strict=True):
                probability *= table.results[at, op, a][after]
                at = after
            total += probability * answers[at, answer]
        assert values[0, z] == pytest.approx(total)


def test_values_along_a_solution():
    task = ChainArith(p=7)
    problem = Problem("", "Start 3 ; + 5 ; * 2 \n", "2")
    certain = table_of(task, lambda z, op, a: np.eye(7)[apply(z, op, a, 7)])
    follow = lambda steps, right: solution_values(certain, task, problem, steps, right)
    assert follow(["3 + 5 = 1", "1 * 2 = 2", "Answer: 2"], True) == [1, 1, 1, 1]
    assert follow(["3 + 5 = 2", "2 * 2 = 4", "Answer: 4"], False) == [1, 0, 0, 0]
    # An error that is made good: what counts is the value that is written last.
    assert follow(["3 + 5 = 2", "1 * 2 = 2"], False) == [1, 0, 1]
    found = follow(["so it is", "1 * 2 = 9", "Answer: 2", "more"], True)
    assert found[0] == found[3] == 1
    assert all(math.isnan(found[t]) for t in (1, 2, 4))  # no result, no residue, behind the answer


def test_the_table_is_what_the_model_says(lab_words, tiny_policy):
    """Each entry is the softmax at the "=", whatever the batch: with one context the table is a single forward."""
    task = ChainArith(p=5, min_steps=2, max_steps=4)
    model, layout = tiny_policy(lab_words, scale=3.0), StepFormat.for_policy(lab_words, "\n")
    from stepladder.models import exact_value

    asked: list[tuple[int, ...]] = []
    read = exact_value._next_token

    def watch(model, tokenizer, prefixes, *rest):
        asked.extend(prefixes)
        return read(model, tokenizer, prefixes, *rest)

    ledger = Ledger()
    exact_value._next_token = watch
    try:
        table = read_facts(model, lab_words, layout, task, contexts=1, seed=2, ledger=ledger)
    finally:
        exact_value._next_token = read
    assert len(table.results) == 5 * (4 + 4 + 3)
    assert ledger.prefilled_tokens == sum(map(len, asked))
    residues = [lab_words.convert_tokens_to_ids(str(z)) for z in range(5)]
    for row, (fact, found) in list(enumerate(table.results.items()))[::9]:
        text = lab_words.decode(asked[row])
        assert text.endswith(f"{fact[0]} {fact[1]} {fact[2]} =")
        head, *lines = text.split("\n")
        start, *operations = head.split(" ; ")
        done = [line for line in lines if line.strip()][:-1]
        assert operations[len(done)].strip() == f"{fact[1]} {fact[2]}"
        # The line before, or the start, says the value of the fact.
        assert (done[-1].split()[-1] if done else start.split()[-1]) == str(fact[0])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([asked[row]])).logits[0, -1]
        assert found == pytest.approx(logits.softmax(-1)[residues].numpy(), abs=1e-5)
    assert table.spread == pytest.approx(0)
    assert 0 < table.lost < 1
    assert table.answers.shape == (5, 5)


def test_values_of_the_shipped_policy_agree_with_samples():
    from transformers import AutoModelForCausalLM

    from stepladder.models.loading import load_engine, load_model, load_policy_format, load_tokenizer

    task = ChainArith(p=7, min_steps=3, max_steps=4, sizes={"test": 60})
    tokenizer = load_tokenizer(LAB)
    layout = load_policy_format(LAB, tokenizer, "\n")
    model = load_model(AutoModelForCausalLM, LAB).train(False)
    table = read_facts(model, tokenizer, layout, task, contexts=4)
    assert table.spread < 0.05
    assert table.lost < 0.01
    engine, problems = load_engine(LAB, batch_size=512), task.problems("test")
    requests = [
        Request(layout.encode_prompt(tokenizer, q.prompt), tuple(fold_seed(0, q.id, k) for k in range(32)))
        for q in problems
    ]
    sampled = [
        np.mean([task.verify(q, tokenizer.decode(s.ids, skip_special_tokens=True)).right for s in own])
        for q, own in zip(problems, engine.generate(requests, Sampling(64)), strict=True)
    ]
    exact = [solution_values(table, task, q, [], False)[0] for q in problems]
    noise = math.sqrt(np.mean([v * (1 - v) / 32 for v in exact]) / len(problems))
    assert np.mean(sampled) == pytest.approx(np.mean(exact), abs=4 * noise + 0.02)
    assert np.corrcoef(sampled, exact)[0, 1] > 0.8


def test_residues_of_several_tokens_are_refused(merging_tokenizer, tiny_policy):
    model = tiny_policy(merging_tokenizer)
    with pytest.raises(UserError, match="every residue is one token"):
        read_facts(model, merging_tokenizer, StepFormat.for_policy(merging_tokenizer, "\n"), ChainArith(p=11))
