"""RISE: which states are visited, which answers are learnt there, and with which weight."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from stepladder.data_gen.rise import Action, chosen, repeats, reward, rise_rows, weight
from stepladder.models.corrections import Wording
from stepladder.models.engine import Sampling
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

TASK = ChainArith(p=7)
LAB = Wording.named("lab")
WORDS = lab_tokenizer(6, CORRECTION_WORDS)
FORMAT = StepFormat.for_policy(WORDS, "\n")
PROBLEMS = [Problem(f"q{i}", f"Start {i} ; + 0 \n", str(i)) for i in range(3)]


def counting(fake_engine: Any, right_from: int) -> Any:
    """An engine whose attempt in turn t is right from `right_from` on; a sixth of the answers cannot be read."""

    def write(prefix, seed):
        text = WORDS.decode(prefix)
        turn = text.count("Retry:") + 1
        number = int(text.split()[1])
        answer = number if turn >= right_from and seed % 3 else (number + 1 + seed % 5) % 7
        return WORDS(f"Answer: {answer} <eos>" if seed % 6 else "Start <eos>")["input_ids"]

    return fake_engine(WORDS, write)


def made(engine: Any, **over: Any) -> Any:
    settings: dict[str, Any] = {
        "samples": 4, "turns": 3, "best_of": 5, "tau": 0.4, "select": "all", "shown": 1, "sampling": Sampling(10), "seed": 0,
        "policy": "p", **over,
    }  # fmt: skip
    return rise_rows(engine, TASK, FORMAT, PROBLEMS, LAB, **settings)


def test_rewards_and_weights():
    assert [reward(o) for o in ("right", "wrong", "unparseable", "timeout")] == [1, 0, -1, 0]
    assert weight(1, 0.4) == pytest.approx(12.18, abs=0.01)
    assert weight(0, 0.4) == 1
    assert weight(-1, 0.4) == pytest.approx(0.082, abs=1e-3)
    assert weight(1, 0) == weight(-1, 0) == 1


def test_rows_have_one_trained_turn_their_weight_and_the_visited_states(fake_engine):
    result = made(counting(fake_engine, 2))
    turns = set()
    for row in result.rows:
        meta = json.loads(row.meta)
        turns.add(meta["turn"])
        assert row.kind == "selfcorrect"
        assert [m.train for m in row.messages] == [False] * (len(row.messages) - 1) + [True]
        assert row.weight == pytest.approx(math.exp(meta["reward"] / 0.4))
        assert meta["reward"] == reward(
            TASK.verify(PROBLEMS[int(row.problem_id[1])], row.messages[-1].content).outcome.value
        )
        assert 1 not in meta["rewards_before"][:1]  # a trajectory ends at its first right attempt
        # With one shown attempt a state is the problem, one attempt and the request to try again, at every turn.
        assert len(row.messages) == (2 if meta["turn"] == 1 else 4)
    assert turns == {1, 2, 3}
    later = [json.loads(row.meta)["reward"] for row in result.rows if json.loads(row.meta)["turn"] > 1]
    assert sum(r == 1 for r in later) > 0.9 * len(later)  # the best of five
    assert sum(result.counts.values()) == len(result.rows)
    assert made(counting(fake_engine, 2)).rows == result.rows
    worse = [
        json.loads(r.meta)["reward"]
        for r in made(counting(fake_engine, 2), best_of=1).rows
        if json.loads(r.meta)["turn"] > 1
    ]
    assert sum(worse) / len(worse) < sum(later) / len(later)


def test_better_answers_come_from_the_teacher_or_from_the_problem_alone(fake_engine):
    never, always = counting(fake_engine, 9), counting(fake_engine, 1)
    rewards = lambda result: {json.loads(r.meta)["reward"] for r in result.rows if json.loads(r.meta)["turn"] > 1}
    assert 1 not in rewards(made(never))
    taught = made(never, teacher=(always, FORMAT), best_of=20)
    assert rewards(taught) == {1.0}
    assert taught.ledger.policy_calls == 0  # the fake engine counts tokens alone
    assert taught.ledger.generated_tokens > made(never, best_of=20, turns=1).ledger.generated_tokens
    asked = len(always.asked)
    made(never, teacher=(always, FORMAT), from_problem=True, turns=2)
    assert {request.prefix for request in always.asked[asked:]} <= {
        FORMAT.encode_prompt(WORDS, p.prompt) for p in PROBLEMS
    }


def test_drafts_take_the_place_of_first_attempts(fake_engine):
    drafts = {p.id: ["Answer: 6"] * 4 for p in PROBLEMS}
    rows = made(counting(fake_engine, 2), drafts=drafts, turns=2).rows
    assert {r.messages[1].content for r in rows} == {"Answer: 6"}


def test_which_answers_are_learnt():
    act = lambda turn, r: Action(turn, (), f"{turn}", r)
    path = [act(1, 0.0), act(2, 0.0), act(3, 1.0), act(4, 0.0)]
    turns = lambda select, p=path: [a.turn for a in chosen(p, select)]
    assert turns("all") == [1, 2, 3, 4]
    assert turns("better") == [1, 3]
    assert turns("best") == [1, 2, 3]
    assert turns("success") == [3]
    assert turns("success", [act(1, 1.0)]) == [1]
    assert turns("better", [act(1, -1.0), act(2, 0.0)]) == [1, 2]
    with pytest.raises(ValueError, match="select must be"):
        chosen(path, "some")


def test_what_got_stuck():
    line = "so we add three and four again"
    assert repeats("\n".join([line] * 4))
    assert not repeats("\n".join([line] * 3))
    assert not repeats("\n".join(["1 + 1 = 2"] * 9))  # short lines come back in honest work
