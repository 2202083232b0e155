"""eval.resampling: ceilings, curves and stopping rules, against values worked out by hand and by simulation."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from stepladder.basics import UserError, read_json
from stepladder.data_gen.rows import Solution, Source
from stepladder.data_gen.store import write_rows
from stepladder.launch import evaluate_resampling as stage
from stepladder.launch.options_eval import EvaluateResampling

SOURCE = Source("policy", "fake", "chain", 0)


def solution(problem: str, sample: int, right: bool, text: str = "") -> Solution:
    return Solution(
        problem_id=problem, prompt="p", gold="1", sample=sample, steps=(text or f"{sample}",), text="",
        answer="1" if right else "0", outcome="right" if right else "wrong", stop="eos", token_ids=(), step_ends=(),
        logprob=0.0, source=SOURCE,
    )  # fmt: skip


def measured(out: Path, rows: list[Solution], **settings: Any) -> dict[tuple[str, str], Any]:
    write_rows(out / "rows", rows)
    config = EvaluateResampling(policies={"weak": str(out / "rows")}, **settings)
    stage.evaluate_resampling(config, out / "results")
    return {(r["arm"], r["metric"]): r["value"] for r in read_json(out / "results" / "results.json")}


def test_two_problems_by_hand(tmp_path, monkeypatch):
    """Easy: 4 of 8 right, 2 wrong accepted. Hard: none right, 4 wrong accepted, all of them in the half that makes the rule."""
    easy, hard = "RRRRAAWW", "AWAWAWAW"  # R right, A wrong and accepted, W rejected; every second one is measured on
    rows = [
        solution(name, i, c == "R", c) for name, text in (("easy", easy), ("hard", hard)) for i, c in enumerate(text)
    ]
    monkeypatch.setattr(stage, "_accepted", lambda config, rows, verifier: [row.steps[0] != "W" for row in rows])
    found = measured(tmp_path, rows, accept_wrong=0.5, attempts=2, rhos=[0.1, 0.5, 3.0])
    assert found["weak/sample", "accuracy"] == 0.25
    assert found["weak/ceiling", "accuracy"] == pytest.approx((4 / 6 + 0) / 2)
    assert (found["weak", "accepted_right"], found["weak", "accepted_wrong"]) == (1.0, pytest.approx((0.5 + 0.5) / 2))
    # One attempt: 6/8 and 4/8 answered, 4/8 and 0 right. Two: 1 - C(2,2)/C(8,2) = 27/28 and 1 - C(4,2)/C(8,2) = 11/14.
    assert found["weak/up_to_1", "answered"] == pytest.approx(5 / 8)
    assert found["weak/up_to_1", "accuracy_given_accept"] == pytest.approx(0.5 / 1.25)
    good, answered = 27 / 28 * 4 / 6, 27 / 28 + 11 / 14
    assert found["weak/up_to_2", "accuracy"] == pytest.approx(good / 2)
    assert found["weak/up_to_2", "accuracy_given_accept"] == pytest.approx(good / answered)
    # Types a, b = 1/2, 1/4 and 0, 1: 2 g(1) = .5 - .25 rho - rho and 2 g(2) = .25 (.5 - .25 rho). On the other half the hard
    # problem is never answered: attempts are worth it while .5 > .25 rho.
    for rho, told, best in ((0.1, 2.0, 2.0), (0.5, 0.0, 2.0), (3.0, 0.0, 0.0)):
        assert found[f"weak/rho_{rho:g}/formula", "best_attempts"] == told
        assert found[f"weak/rho_{rho:g}/measured", "best_attempts"] == best
    assert found["weak", "stops_near"] == pytest.approx(2 / 3)
    assert found["weak/rho_0.5/formula", "utility"] == 0.0
    assert found["weak/rho_0.5/once", "utility"] == pytest.approx((0.5 - 0.25 * 0.5) / 2)
    assert found["weak/rho_0.5/never_stop", "utility"] == pytest.approx(
        (2 / 3 - 0.5 / 3) / 2
    )  # 2 of 4 right, 1 accepted
    once = measured(tmp_path / "once", rows, accept_wrong=0.5, attempts=1, rhos=[0.5])
    assert once["weak/rho_0.5/measured", "best_attempts"] == 1.0
    assert once["weak", "stops_near"] == 1.0  # one off


def test_a_simulated_verifier_accepts_the_same_wrong_solutions_always(tmp_path):
    rng = random.Random(0)
    rows = [solution(f"p{p}", i, rng.random() < p / 60, str(rng.randrange(30))) for p in range(60) for i in range(24)]
    config = EvaluateResampling(accept_wrong=0.3)
    took = stage._accepted(config, rows, None)
    assert all(t for row, t in zip(rows, took, strict=True) if row.right)
    wrong = [t for row, t in zip(rows, took, strict=True) if not row.right]
    assert sum(wrong) / len(wrong) == pytest.approx(0.3, abs=0.05)
    verdicts: dict[Any, set[bool]] = {}
    for row, t in zip(rows, took, strict=True):
        if not row.right:
            verdicts.setdefault((row.problem_id, row.steps), set()).add(t)
    assert all(len(v) == 1 for v in verdicts.values())
    found = measured(tmp_path, rows, accept_wrong=0.3)
    assert found["weak", "accepted_right"] == 1.0
    # Accuracy of what is accepted falls with attempts: they bring in more of the hard problems.
    assert found["weak/up_to_1", "accuracy_given_accept"] > found["weak/up_to_6", "accuracy_given_accept"]
    assert found["weak/up_to_6", "answered"] > found["weak/up_to_1", "answered"]
    # At most a quarter of 24.
    assert ("weak/up_to_6", "answered") in found
    assert ("weak/up_to_8", "answered") not in found


def test_a_problem_as_a_type():
    made = stage.task_type([(True, True), (True, False), (False, True), (False, False), (False, False)], 0.5)
    assert (made.prior, made.solve, made.completeness) == (0.5, 0.4, 0.5)
    assert made.soundness == pytest.approx(2 / 3)
    only = stage.task_type([(True, True)], 1.0)
    assert (only.completeness, only.soundness) == (1.0, 1.0)


def test_a_reward_model_as_verifier(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from stepladder.models.ledger import Ledger

    model = SimpleNamespace(
        ledger=Ledger(), cut_steps=0, name="rm", context=9, step_format=SimpleNamespace(aggregation="last"),
        score=lambda pairs: [[0.9, 0.2] if steps[0] == "low" else [0.1, 0.6] for _, steps in pairs],
    )  # fmt: skip
    monkeypatch.setattr(stage.RewardModel, "load", lambda *a, **k: model)
    rows = [solution("p", i, i % 2 == 0, "low" if i < 4 else "high") for i in range(8)]
    found = measured(tmp_path, rows, reward="rm")
    assert (found["weak", "accepted_right"], found["weak", "accepted_wrong"]) == (0.5, 0.5)
    assert (
        stage._accepted(EvaluateResampling(reward="rm", aggregation="min", threshold=0.15), rows, model)
        == [True] * 4 + [False] * 4
    )


def test_mistakes(tmp_path):
    with pytest.raises(UserError, match="policies is missing"):
        stage.evaluate_resampling(EvaluateResampling(), tmp_path)
    with pytest.raises(UserError, match="reward is missing"):
        stage.evaluate_resampling(EvaluateResampling(policies={"a": "b"}), tmp_path)
    with pytest.raises(UserError, match="has 2, and attempts"):
        measured(tmp_path, [solution("p", i, True) for i in range(2)], accept_wrong=0.1, attempts=2)
    with pytest.raises(ValueError, match="two verifiers"):
        EvaluateResampling(reward="x", accept_wrong=0.1)
    with pytest.raises(ValueError, match="rhos must be 0 or more"):
        EvaluateResampling(rhos=[-1.0])
