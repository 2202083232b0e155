"""Engines and reward models as what a search speaks to."""

from __future__ import annotations

import pytest

from stepladder.models.engine import Sampling
from stepladder.models.prefix_cache import PrefixCache
from stepladder.models.reward import RewardModel, aggregate
from stepladder.models.step_format import StepFormat
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.search.adapters import RewardScorer, StepPolicy
from stepladder.search.base import State
from stepladder.search.beam import beam_search
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

PROBLEM = Problem("x", "Start 3 ; + 5 \n", "8")


def table_policy(tokenizer, markov_policy, chain: str, limit: int = 40, context: int = 64) -> StepPolicy:
    """A policy that goes on with the words of `chain`, in which no word stands twice."""
    ids = tokenizer(chain)["input_ids"]
    model = markov_policy(tokenizer, dict(zip(ids, [*ids[1:], tokenizer.eos_token_id], strict=True)), context)
    return StepPolicy(
        TransformersEngine(model, tokenizer),
        StepFormat.for_policy(tokenizer, "\n"),
        "\n",
        Sampling(limit, temperature=0.0),
    )


def test_a_child_is_one_step_longer(lab_words, markov_policy):
    policy = table_policy(lab_words, markov_policy, "3 + 5 = 8 \n")
    root = policy.root(PROBLEM)
    assert root.ids == tuple(lab_words("Start 3 ; + 5 \n")["input_ids"])
    assert (root.key, root.prompt, root.prompt_length, root.steps, root.done) == ("x", PROBLEM.prompt, 6, (), False)
    first = State("x", PROBLEM.prompt, (*root.ids, lab_words("3")["input_ids"][0]), root.prompt_length)
    [[child, other]] = policy.expand([first], [[0, 1]])
    assert child == other
    assert child.steps == ("3 + 5 = 8",)
    assert (child.done, child.stop) == (False, "stop")
    assert child.ids == root.ids + tuple(lab_words("3 + 5 = 8 \n")["input_ids"])
    assert child.logprob == pytest.approx(0.0, abs=0.1)


def test_the_end_of_the_sequence_finishes_a_solution(lab_words, markov_policy):
    policy = table_policy(lab_words, markov_policy, "; Answer: 8")
    [[child]] = policy.expand([State("x", "p", (lab_words(";")["input_ids"][0],), 1)], [[0]])
    assert (child.steps, child.done, child.stop) == (("Answer: 8",), True, "eos")
    assert child.ids[-1] == lab_words.eos_token_id


def test_the_length_is_that_of_a_whole_solution(lab_words, markov_policy):
    # A line of 6 tokens, again and again.
    policy = table_policy(lab_words, markov_policy, "3 + 5 = 8 \n", limit=20)
    ids = lab_words("3 + 5 = 8 \n")["input_ids"]
    model = policy.engine.model
    model.lm_head.weight.data[:, ids[-1]] = 0
    model.lm_head.weight.data[ids[0], ids[-1]] = 10.0
    state = State("x", "p", (ids[-1],), 1)
    lengths = []
    while not state.done:
        [[state]] = policy.expand([state], [[0]])
        lengths.append(len(state.ids) - 1)
    assert lengths == [6, 12, 18, 20]
    assert state.stop == "length"
    assert state.steps == ("3 + 5 = 8",) * 3 + ("3 +",)
    # A state without room is done at once and costs nothing.
    before = policy.engine.ledger.generated_tokens
    open_state = State("x", "p", state.ids, 1, state.steps)
    [[full, again]] = policy.expand([open_state], [[0, 1]])
    assert full == again
    assert (full.done, full.stop, full.ids) == (True, "length", state.ids)
    assert policy.engine.ledger.generated_tokens == before
    # To the end: as many tokens as there is room for, and none above.
    [end] = policy.finish([State("x", "p", (ids[-1],), 1)], [0])
    assert (len(end.ids) - 1, end.done, end.stop) == (20, True, "length")


def test_blank_lines_between_steps_do_not_end_a_solution(lab_words, markov_policy):
    """A step and the blank line before it are one child: "\\n \\n 3 + 5 = 8 \\n" after a first line."""
    policy = table_policy(lab_words, markov_policy, "; \n")
    newline, semicolon = lab_words("\n ;")["input_ids"]
    eight = lab_words("8")["input_ids"][0]
    weight = policy.engine.model.lm_head.weight.data
    weight[:, newline] = 0
    weight[newline, newline] = 1.0  # after a newline: mostly another one, often something else
    weight[eight, newline] = 1.0
    weight[newline, eight] = 40.0
    policy.sampling = Sampling(60, temperature=0.02)
    start = State("x", "p", (semicolon, newline), 1)
    children = policy.expand([start], [list(range(60))])[0]
    blank = [c for c in children if c.ids[2:4] == (newline, newline)]
    assert len(blank) > 5
    stepped = [c for c in children if c.steps]
    assert len(stepped) > 50
    assert all(c.steps == ("8",) and not c.done and c.ids[-2:] == (eight, newline) for c in stepped)
    # Nothing but blank lines is the end, instead of a search that goes on for nothing.
    weight[eight, newline] = 0.0
    before = policy.engine.ledger.generated_tokens
    [[child]] = policy.expand([start], [[0]])
    assert child.done
    assert child.steps == ()
    assert policy.engine.ledger.generated_tokens - before < 10


def test_a_prompt_longer_than_the_context_is_done_at_once(lab_words, markov_policy):
    policy = table_policy(lab_words, markov_policy, "3 + 5", context=8)
    [[child]] = policy.expand([State("x", "p", (5,) * 9, 9)], [[0]])
    assert (child.done, child.stop, child.steps) == (True, "context", ())


def test_states_of_unequal_room_are_sampled_as_if_alone(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    policy = StepPolicy(engine, StepFormat.for_policy(lab_words, "\n"), "\n", Sampling(40))
    states = [State(f"p{i}", "p", tuple([5] + [6 + i] * i * 9), 1) for i in range(5)]
    seeds = [[i, 100 + i] for i in range(5)]
    together = policy.expand(states, seeds)
    finished = policy.finish(states, [row[0] for row in seeds])
    for i, state in enumerate(states):
        [alone] = policy.expand([state], [seeds[i]])
        assert [(c.ids, c.done, c.steps) for c in alone] == [(c.ids, c.done, c.steps) for c in together[i]]
        [end] = policy.finish([state], [seeds[i][0]])
        assert end.ids == finished[i].ids
        assert end.done
        assert len(end.ids) - 1 <= 40
        assert all(len(c.ids) - 1 <= 40 for c in alone)


@pytest.mark.parametrize("aggregation", ["", "min"])
def test_states_are_scored_as_the_step_format_advises_or_as_told(lab_words, tiny_scorer, aggregation):
    step_format = StepFormat.for_policy(lab_words, "\n").for_reward("scalar", "soft")
    reward = RewardModel(tiny_scorer(lab_words), lab_words, step_format)
    states = [
        State("x", PROBLEM.prompt, (), 0, ("3 + 5 = 8", "Answer: 8")),
        State("x", PROBLEM.prompt, (), 0, ("3 + 5 = 9",)),
        State("x", PROBLEM.prompt, (), 0, ()),
    ]
    want = [aggregate(one, aggregation or "last") for one in reward.score([(s.prompt, s.steps) for s in states])]
    assert RewardScorer(reward, aggregation)(states) == pytest.approx(want)
    assert want[2] == 0.0


def test_a_search_with_caches_equals_one_without(lab_words, tiny_policy, tiny_scorer):
    """Engine, reward model and beam search together: caches save work and change no solution."""
    task = ChainArith(p=11, min_steps=2, max_steps=3, sizes={"test": 6})
    model, judge = tiny_policy(lab_words, scale=2.0), tiny_scorer(lab_words)
    step_format = StepFormat.for_policy(lab_words, "\n")
    found, ledgers = [], []
    for cached in (False, True):
        engine = TransformersEngine(model, lab_words, cache=PrefixCache() if cached else None)
        reward = RewardModel(
            judge, lab_words, step_format.for_reward("scalar", "hard"), cache=PrefixCache() if cached else None
        )
        policy = StepPolicy(engine, step_format, "\n", Sampling(60))
        roots = [policy.root(problem) for problem in task.problems("test")]
        results = beam_search(roots, policy, RewardScorer(reward), beams=8, width=4, max_depth=5, seed=0)
        found.append([[state.ids for state in one.finals] for one in results])
        ledgers.append(engine.ledger + reward.ledger)
        assert all(len(one.finals) == 8 and all(s.done for s in one.finals) for one in results)
    same = sum(a == b for one, other in zip(*found, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 47  # of 48: rounding may turn one
    plain, saving = ledgers
    assert saving.prefilled_tokens < 0.5 * plain.prefilled_tokens
    assert saving.reward_tokens < plain.reward_tokens
