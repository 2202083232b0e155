"""Outcome reward models: the outcome at every token of the solution or at the last one, and what is dropped."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from stepladder.models.reward import RewardModel
from stepladder.models.step_format import StepFormat
from stepladder.trainers.orm import ORMArguments, orm_example

STEPS = ["3 + 5 = 8", "8 + 1 = 9"]  # the prompt has 5 tokens; the steps end at 10 and 16


@pytest.fixture
def example(tmp_path: Any, lab_words: Any, rows: Any) -> Any:
    def make(outcome: str, steps: list[str] = STEPS, **settings: Any) -> tuple[Any, dict[str, int]]:
        args = ORMArguments(model="m", rows="r", output_dir=str(tmp_path), use_cpu=True, **settings)
        counts: Counter[str] = Counter()
        row = rows.solution(3, steps, outcome)
        return orm_example(row, lab_words, StepFormat.for_policy(lab_words, "\n"), args, counts), dict(counts)

    return make


@pytest.mark.parametrize(("outcome", "target"), [("right", 1.0), ("wrong", 0.0), ("unparseable", 0.0)])
def test_the_outcome_is_the_target_of_every_token_of_the_solution(example, outcome, target):
    found, counts = example(outcome)
    assert [p for p, counted in enumerate(found["target_mask"]) if counted] == list(range(5, 17))
    assert {t for t, m in zip(found["target"], found["target_mask"], strict=True) if m} == {target}
    assert counts == {"labels": 12, "rows": 1}


def test_or_of_the_last_token_alone(example):
    found, counts = example("right", token_level=False)
    assert [p for p, counted in enumerate(found["target_mask"]) if counted] == [16]
    assert len(found["input_ids"]) == 17
    assert counts == {"labels": 1, "rows": 1}


def test_what_has_no_outcome_or_no_end_is_dropped_and_counted(example):
    assert example("timeout") == (None, {"rows dropped: check timed out": 1})
    assert example("wrong", steps=[]) == (None, {"rows dropped: empty solution": 1})
    # A cut solution has another meaning: it is dropped whole, at both levels.
    for token_level in (True, False):
        assert example("right", token_level=token_level, max_length=16) == (None, {"rows dropped: too long": 1})
        assert example("right", token_level=token_level, max_length=17)[0] is not None


def test_training_tells_what_it_dropped(rows, settings, train, capsys):
    training = [
        rows.solution(0, STEPS, "right"),
        rows.solution(1, STEPS, "timeout"),
        rows.solution(2, [], "wrong"),
        rows.solution(3, STEPS * 4, "wrong"),
    ]
    train("orm", settings("orm", training, max_length=32, max_steps=1))
    told = capsys.readouterr().out
    for what in ("12 labels", "1 rows", "1 rows dropped: check timed out", "1 rows dropped: empty solution"):
        assert what in told
    assert "1 rows dropped: too long" in told


@pytest.mark.parametrize("token_level", [True, False])
def test_an_overfitted_model_reads_back_the_outcomes(rows, settings, train, token_level):
    training = [rows.solution(n, ["1 + 1 = 2", f"2 + {n} = {2 + n}"], "right" if n % 2 else "wrong") for n in range(4)]
    values = settings("orm", training, token_level=token_level, max_steps=120, learning_rate=0.03, logging_steps=60)
    reward = RewardModel.load(str(train("orm", values).out), device="cpu")
    assert (reward.step_format.head, reward.step_format.label_kind) == ("scalar", "outcome")
    found = reward.score([(row.prompt, row.steps) for row in training])
    assert [one[-1] > 0.5 for one in found] == [False, True, False, True]
    assert all(min(one[-1], 1 - one[-1]) < 0.1 for one in found)
    if token_level:  # the prompt says which row it is, so the first step's end is trained to the outcome too
        assert [one[0] > 0.5 for one in found] == [False, True, False, True]


def test_both_levels_train_other_positions(rows, settings, train):
    """The last token's target alone gives another model than every token's."""
    weights = []
    for token_level in (True, False):
        out = train("orm", settings("orm", rows.some("orm", 8), token_level=token_level, max_steps=2)).out
        weights.append(RewardModel.load(str(out), device="cpu").model.score.weight.clone())
    assert not torch.allclose(weights[0], weights[1])
