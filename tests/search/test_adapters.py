"""Engines and reward models as what a search speaks to."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from stepladder import models
from stepladder.models.engine import Sampling
from stepladder.models.loading import load_engine
from stepladder.models.prefix_cache import PrefixCache
from stepladder.models.reward import RewardModel, aggregate
from stepladder.models.step_format import StepFormat
from stepladder.models.transformers_engine import TransformersEngine
from stepladder.search.adapters import EffectiveScorer, RevisionPolicy, RewardScorer, StepPolicy
from stepladder.search.base import State
from stepladder.search.beam import beam_search
from stepladder.search.best_of_n import best_of_n, step_best_of_n
from stepladder.search.dvts import dvts
from stepladder.search.mcts import mcts
from stepladder.search.particles import particle_filter
from stepladder.search.rebase import rebase
from stepladder.search.revisions import revisions
from stepladder.search.step_beam import step_beam
from stepladder.search.tree_of_thoughts import tot_bfs, tot_dfs
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


# --- nothing is encoded twice ------------------------------------------------------------------------------------------


def steps_of(result):
    """All steps of each node."""
    steps = [()]
    for node in result.nodes[1:]:
        steps.append(steps[node.parent] + node.steps)
    return steps


def scored_once(results, encode) -> int:
    """Tokens of the prompts, and of every different prefix that was scored beyond the one that it grew from."""
    tokens = {}
    for result in results:
        steps = steps_of(result)
        prompt = result.finals[0].prompt
        tokens[prompt, ()] = len(encode(prompt, ()).ids)
        for node, whole in zip(result.nodes[1:], steps[1:], strict=True):
            if node.score is not None:
                before = len(encode(prompt, steps[node.parent]).ids)
                tokens[prompt, whole] = len(encode(prompt, whole).ids) - before
    return sum(tokens.values())


SEARCHES = {
    "best_of_n": (best_of_n, {"n": 6}),
    "step_best_of_n": (step_best_of_n, {"n": 4}),
    "beam": (beam_search, {"beams": 6, "width": 3}),
    "dvts": (dvts, {"n": 6, "width": 3}),
    "particles": (particle_filter, {"n": 6}),
    "rebase": (rebase, {"n": 6}),
    "step_beam": (step_beam, {"beams": 2, "width": 3}),
    "tot_bfs": (tot_bfs, {"beams": 2, "width": 3}),
    "tot_dfs": (tot_dfs, {"width": 3, "threshold": 0.0, "expansions": 12, "solutions": 4}),
    "mcts": (mcts, {"simulations": 24, "width": 3}),
    "mcts, scored": (mcts, {"simulations": 12, "width": 3, "unvisited": "score"}),
}


@pytest.fixture(scope="module")
def lab_model():
    """The lab's policy: solutions of real lines."""
    return load_engine(str(Path(models.__file__).parent / "lab_policy"), device="cpu")


@pytest.fixture
def saving(lab_model, tiny_scorer):
    """(The lab's policy and a reward model that keep what they have read, the step format of both)."""
    words = lab_model.tokenizer
    step_format = StepFormat.for_policy(words, "\n")
    engine = TransformersEngine(lab_model.model, words, cache=PrefixCache())
    reward = RewardModel(tiny_scorer(words), words, step_format.for_reward("scalar", "hard"), cache=PrefixCache())
    return engine, reward, step_format


@pytest.mark.parametrize("name", SEARCHES)
def test_a_growing_prefix_is_never_encoded_twice(saving, name):
    """Prefill: the prompt once and one token a node that is gone on from. Reward model: what is new of every prefix, once."""
    task = ChainArith(p=7, min_steps=4, max_steps=6, sizes={"test": 3})
    engine, reward, step_format = saving
    policy, scorer = StepPolicy(engine, step_format, "\n", Sampling(64)), RewardScorer(reward, "last")
    strategy, settings = SEARCHES[name]
    roots = [policy.root(problem) for problem in task.problems("test")]
    results = strategy(roots, policy, scorer, **settings)
    assert name == "best_of_n" or max(result.depth for result in results) >= 4
    assert engine.ledger.generated_tokens >= sum(result.tokens for result in results)
    prompts = sum(len(root.ids) for root in roots)
    grown = {
        (result.finals[0].prompt, steps)
        for result in results
        for node, steps in zip(result.nodes, steps_of(result), strict=True)
        if node.status == "kept" and steps
    }
    # The newest token of a prefix has not been through the model when the prefix is gone on from.
    assert engine.ledger.prefilled_tokens == prompts + len(grown)
    assert reward.ledger.reward_tokens <= scored_once(
        results, lambda p, steps: step_format.encode(engine.tokenizer, p, steps)
    )
    # What was scored is known: choosing among the solutions costs nothing more.
    before = reward.ledger.reward_tokens
    scorer([state for result in results for state in result.finals])
    assert reward.ledger.reward_tokens == before > 0


@pytest.mark.parametrize("lookahead", [1, 3])
@pytest.mark.parametrize("name", ["beam", "dvts"])
def test_looking_ahead_encodes_nothing_twice(saving, name, lookahead):
    """What is judged lies ahead, and what is gone on from within it: still every step of every prefix is read once."""
    task = ChainArith(p=7, min_steps=6, max_steps=7, sizes={"test": 3})
    engine, reward, step_format = saving
    policy, judge = StepPolicy(engine, step_format, "\n", Sampling(64)), RewardScorer(reward, "last")
    asked: list[tuple[int, ...]] = []
    judged: set[tuple[str, tuple[str, ...]]] = set()

    def generate(requests, sampling, real=engine.generate):
        asked.extend(request.prefix for request in requests)
        return real(requests, sampling)

    def scorer(states):
        judged.update((state.prompt, state.steps[:t]) for state in states for t in range(len(state.steps) + 1))
        return judge(states)

    engine.generate = generate
    strategy, settings = SEARCHES[name]
    roots = [policy.root(problem) for problem in task.problems("test")]
    strategy(roots, policy, scorer, **settings, lookahead=lookahead)
    prompts = {root.ids for root in roots}
    # The newest token of a prefix is encoded each time that the prefix is gone on from: greedily, and then by the search.
    gone_on = [ids for ids in asked if ids not in prompts]
    assert engine.ledger.prefilled_tokens == sum(map(len, prompts)) + len(gone_on)
    length = {key: len(step_format.encode(engine.tokenizer, *key).ids) for key in judged}
    once = sum(n - (length[prompt, steps[:-1]] if steps else 0) for (prompt, steps), n in length.items())
    assert reward.ledger.reward_tokens == once


def test_the_cost_of_a_search_is_linear_in_its_steps(lab_words, markov_policy, tiny_scorer):
    """A line of six tokens again and again: every further step costs the same; without caches it costs more and more."""
    costs = {}
    for cached in (True, False):
        costs[cached] = []
        for length in (30, 60, 90):
            policy = table_policy(lab_words, markov_policy, "3 + 5 = 8 \n", limit=length, context=256)
            ids = lab_words("3 + 5 = 8 \n")["input_ids"]
            policy.engine.model.lm_head.weight.data[:, ids[-1]] = 0
            policy.engine.model.lm_head.weight.data[ids[0], ids[-1]] = 10.0
            step_format = policy.step_format.for_reward("scalar", "hard")
            cache = PrefixCache() if cached else None
            policy.engine.cache = cache
            reward = RewardModel(
                tiny_scorer(lab_words), lab_words, step_format, cache=PrefixCache() if cached else None
            )
            root = State("x", "3 + 5 = 8 \n", tuple(ids), len(ids))
            step_best_of_n([root], policy, RewardScorer(reward, "last"), n=2)
            costs[cached].append((policy.engine.ledger.prefilled_tokens, reward.ledger.reward_tokens))
    for which in (0, 1):
        saved, plain = ([cost[which] for cost in costs[cached]] for cached in (True, False))
        assert saved[2] - saved[1] == saved[1] - saved[0]  # linear
        assert plain[2] - plain[1] > 1.4 * (plain[1] - plain[0])  # quadratic
        assert saved[2] < plain[2] / 4


@pytest.mark.parametrize("limit", [6, 10])
@pytest.mark.parametrize("name", [*SEARCHES, "beam, lookahead", "revisions"])
def test_the_tokens_of_a_solution_end_after_or_within_its_second_line(saving, name, limit):
    """No solution ends by itself: all that is found is cut there, scored, and paid for to the token; one of it is chosen."""
    task = ChainArith(p=7, min_steps=4, max_steps=6, sizes={"test": 2})
    engine, reward, step_format = saving
    more = {"beam, lookahead": (beam_search, {"beams": 4, "width": 2, "lookahead": 2})}
    if name == "revisions":
        problem_again = {"template": "{prompt}{attempts}", "attempt_template": "{attempt} \n "}
        policy: StepPolicy = RevisionPolicy(engine, step_format, "\n", Sampling(limit), **problem_again)
        more["revisions"] = (revisions, {"n": 4, "chains": 2, "shown": 1})
    else:
        policy = StepPolicy(engine, step_format, "\n", Sampling(limit))
    strategy, settings = {**SEARCHES, **more}[name]
    roots = [policy.root(problem) for problem in task.problems("test")]
    results = strategy(roots, policy, RewardScorer(reward, "last"), **settings)
    for root, result in zip(roots, results, strict=True):
        assert result.finals
        assert result.chosen is not None
        assert all(state.cut and len(state.ids) - state.prompt_length == limit for state in result.finals)
        assert all(0 < score < 1 for score in result.scores)
        assert all(len(state.steps) == (1 if limit == 6 else 2) for state in result.finals)
        if exactly := settings.get("n", settings.get("beams")):
            at_most = name in ("step_best_of_n", "step_beam", "tot_bfs")
            assert len(result.finals) <= exactly if at_most else len(result.finals) == exactly
        assert result.nodes[0].tokens == 0
        spent = sum(node.tokens for node in result.nodes)
        assert result.tokens >= spent if "lookahead" in name else result.tokens == spent
        assert root.prompt_length + limit == len(result.finals[0].ids) or name == "revisions"
    # To keep batches full an engine may sample beyond the room of a solution that was half through: the ledger has that too.
    found, sampled = sum(result.tokens for result in results), engine.ledger.generated_tokens
    assert sampled == found if limit == 6 else found <= sampled < 2 * found


# --- effective reward and revisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["", "mean"])
def test_the_effective_scorer_guides_by_progress_and_chooses_by_value(lab_words, tiny_scorer, aggregation):
    step_format = StepFormat.for_policy(lab_words, "\n").for_reward("scalar", "soft")
    reward = RewardModel(tiny_scorer(lab_words), lab_words, step_format)
    scorer = EffectiveScorer(reward, aggregation, alpha=0.5, prover_k=4)
    states = [
        State("x", PROBLEM.prompt, (), 0, ("3 + 5 = 8", "Answer: 8"), done=True),
        State("x", PROBLEM.prompt, (), 0, ("3 + 5 = 9",)),
        State("x", PROBLEM.prompt, (), 0, ()),
    ]
    values = reward.score_with_root([(s.prompt, s.steps) for s in states])
    # Best of 4 in closed form, and its progress over the step before.
    mu = lambda q: 1 - (1 - q) ** 4
    steps = [[q + 0.5 * (mu(q) - mu(before)) for before, q in itertools.pairwise(one)] for one in values]
    want = [aggregate(one, aggregation or "last") for one in steps]
    assert scorer(states) == pytest.approx(want)
    assert scorer.final(states) == pytest.approx(RewardScorer(reward, aggregation)(states))
    assert scorer(states)[1] != pytest.approx(scorer.final(states)[1])
    assert scorer(states)[2] == 0.0
    # A prover of its own: the progress of its scores beside the values of the model that guides.
    theirs = RewardModel(tiny_scorer(lab_words, seed=5), lab_words, reward.step_format)
    other = EffectiveScorer(reward, aggregation, alpha=2.0, prover=theirs)
    provers = theirs.score_with_root([(s.prompt, s.steps) for s in states])
    steps = [
        [q + 2.0 * (after - before) for q, (before, after) in zip(one[1:], itertools.pairwise(mu), strict=True)]
        for one, mu in zip(values, provers, strict=True)
    ]
    assert other(states) == pytest.approx([aggregate(one, aggregation or "last") for one in steps])
    assert other(states)[1] != pytest.approx(scorer(states)[1])
    assert other.final(states) == scorer.final(states)
    with pytest.raises(ValueError, match="prover_k must be 1"):
        EffectiveScorer(reward, prover_k=0)


def test_the_most_probable_step(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    policy = StepPolicy(engine, StepFormat.for_policy(lab_words, "\n"), "\n", Sampling(30, temperature=1.5))
    state = policy.root(PROBLEM)
    cold = StepPolicy(engine, policy.step_format, "\n", Sampling(30, temperature=0.0))
    want = cold.expand([state], [[7]])[0][0]
    assert [found.ids for found in policy.expand_greedily([state, state])] == [want.ids] * 2
    assert policy.sampling.temperature == 1.5


def test_states_that_are_finished_several_times_are_encoded_once(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words), lab_words)
    policy = StepPolicy(engine, StepFormat.for_policy(lab_words, "\n"), "\n", Sampling(20))
    a, b = (policy.root(Problem(key, f"Start {n} ; + 5 \n", "8")) for key, n in (("a", 3), ("b", 4)))
    ends = policy.finish([a, b, a, a], [1, 2, 3, 1])
    assert engine.ledger.prefilled_tokens == len(a.ids) + len(b.ids)
    alone = [policy.finish([state], [seed])[0] for state, seed in ((a, 1), (b, 2), (a, 3))]
    assert [s.ids for s in ends] == [s.ids for s in (*alone, alone[0])]
    assert [s.key for s in ends] == ["a", "b", "a", "a"]


def test_a_revision_is_shown_earlier_attempts(lab_words, tiny_policy):
    engine = TransformersEngine(tiny_policy(lab_words, context=50), lab_words)
    policy = RevisionPolicy(
        engine, StepFormat.for_policy(lab_words, "\n"), "\n", Sampling(20),
        template="{attempts}{prompt}", attempt_template="{number} ; {attempt} \n",
    )  # fmt: skip
    root = policy.root(PROBLEM)
    earlier = [State("x", PROBLEM.prompt, (), 0, ("3 + 5 = 9", "Answer: 9"), done=True)] * 2
    state = policy.again(root, earlier)
    text = "1 ; 3 + 5 = 9 \n Answer: 9 \n 2 ; 3 + 5 = 9 \n Answer: 9 \n Start 3 ; + 5 \n"
    assert state.ids == tuple(lab_words(text)["input_ids"])
    assert (state.prompt, state.steps, state.prompt_length) == (PROBLEM.prompt, (), len(state.ids))
    [end] = policy.finish([state], [0])
    assert end.steps
    assert end.prompt_length == len(state.ids)
    # 50 tokens of context, 20 of them for a solution: the oldest attempts are left out, and counted.
    many = policy.again(root, earlier * 3)
    assert many.ids == state.ids
    assert policy.left_out == 4
    assert policy.again(root, []) == root
    found = revisions([root], policy, lambda states: [0.5] * len(states), n=3)
    assert len(found[0].finals) == 3
    with pytest.raises(ValueError, match=r"needs \{prompt\} and \{attempts\}"):
        RevisionPolicy(engine, policy.step_format, "\n", Sampling(20), template="{prompt}")
