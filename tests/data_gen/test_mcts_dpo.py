"""MCTS-DPO on toy trees whose values are known, and on the lab's erring policy: backups, moves, judges, what rows hold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest

from stepladder.data_gen.growing import Rollout
from stepladder.data_gen.mcts_dpo import (
    SELF_EVALUATION,
    AskOpinion,
    Options,
    Step,
    back_up,
    mcts_dpo_trees,
    next_move,
    prior,
    search_question,
    tree_row,
)
from stepladder.data_gen.rows import Source
from stepladder.data_gen.tree_rows import step_pairs
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith

DEPTH = 3
PROBLEM, SOURCE = Problem("a", "a?", "1"), Source("policy", "engine", "task", 0)


def binary(right: set[tuple[int, ...]]) -> Callable[[tuple[int, ...], int], tuple[list[int], bool]]:
    """A world of three steps 0 or 1: rollout n of a prefix is its n-th completion, so that 8 rollouts are all of them."""

    def write(prefix: tuple[int, ...], number: int) -> tuple[list[int], bool]:
        left = DEPTH - len(prefix)
        rest = [number >> bit & 1 for bit in range(left)]
        return rest, (*prefix, *rest) in right

    return write


def nodes_below(step: Step) -> list[Step]:
    return [step, *(node for child in step.children or [] for node in nodes_below(child))]


def search(drive: Any, cut: Any, right: set[tuple[int, ...]], **over: Any) -> Any:
    options = Options(
        **{"value": "rollouts", "candidates": 2, "evaluations": 8, "iterations": 1, "first_factor": 1, **over}
    )
    return drive(binary(right))(search_question(cut, options))


# --- values on trees that are known ------------------------------------------------------------------------------------

LEAVES = list(itertools.product((0, 1), repeat=DEPTH))


@pytest.mark.parametrize("right", [{(0, 1, 1)}, {(1, 0, 0), (1, 0, 1)}, {(0, 0, 0), (1, 1, 1)}])
def test_q_converges_to_the_value_of_the_best_leaf(drive, numbers_cut, right):
    """Path sums telescope: Q of a step + value of its parent is the value of the leaf that is gone to below it."""
    errors = []
    for descents in (30, 300, 3000):
        found = search(drive, numbers_cut, right, iterations=descents)
        worst = 0.0
        for node in nodes_below(found.root):
            if node is found.root or node.visits < descents / 10:
                continue
            leaves = [leaf for leaf in LEAVES if leaf[: node.depth] == tuple(map(int, node.steps))]
            best = max(2.0 if leaf in right else -1.0 for leaf in leaves)
            worst = max(worst, abs(node.q + node.parent.value - best))
            if node.depth == DEPTH:  # a leaf is exact from its first visit
                assert node.q + node.parent.value == pytest.approx(best)
        errors.append(worst)
    assert errors[2] < 0.05
    assert errors[2] < errors[1] < errors[0]
    assert tuple(int(s) for s in found.path[-1].steps) in right


def test_values_are_those_of_all_completions_and_rewards_their_differences(drive, numbers_cut):
    right = {(0, 1, 1), (0, 0, 1), (1, 1, 1)}
    found, checked = search(drive, numbers_cut, right, iterations=200), 0
    for node in nodes_below(found.root):
        own = [leaf for leaf in LEAVES if leaf[: node.depth] == tuple(map(int, node.steps))]
        share = sum(leaf in right for leaf in own) / len(own)
        # The search never takes a step into account twice: its C is exact, and a leaf has its verdict beside it.
        assert node.value == pytest.approx(share + (0 if node.depth < DEPTH else 1 if own[0] in right else -1))
        if node is not found.root:
            assert node.reward == pytest.approx(node.value - node.parent.value)
        if node.children:
            weights = [max(1, child.visits) for child in node.children]
            mean = sum(w * c.q for w, c in zip(weights, node.children, strict=True)) / sum(weights)
            # Descents begin at the node moved to: what lies above it keeps what it had at the move.
            if node.visits and node not in found.path[:-2]:
                checked += 1
                assert node.v == pytest.approx(mean)
                assert node.q == pytest.approx(node.reward + mean)
    assert checked >= 4


def test_every_move_has_its_descents(drive, numbers_cut):
    found = search(drive, numbers_cut, {(0, 1, 1)}, iterations=3, first_factor=4)
    assert found.counts["descents"] == 12 + 3 + 3
    assert found.root.visits == 12
    assert [node.depth for node in found.path] == [0, 1, 2, 3]


def test_it_ends_at_the_greatest_depth_and_where_nothing_is_written(drive, numbers_cut):
    found = search(drive, numbers_cut, {(0, 1, 1)}, max_depth=2)
    assert [node.depth for node in found.path] == [0, 1, 2]
    assert found.counts["questions moved to a cut end"] == 1
    options = Options(value="rollouts", evaluations=2)
    empty = drive(lambda *_: ((), False))(search_question(numbers_cut, options))
    assert not empty.root.children
    growth = search_question(numbers_cut, options)
    next(growth)
    with pytest.raises(StopIteration) as end:
        growth.send([[]])
    assert end.value.value.dropped == "prompts longer than the context"


# --- formulas by hand ---------------------------------------------------------------------------------------------------


def step(**fields: Any) -> Step:
    made = Step(None, ("x",), (1,), fields.pop("prior", 0.5), 0.0)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def test_formulas():
    assert prior(-3.0, 4, 1.25) == pytest.approx(math.exp(-3 / 4**1.25))
    leaf, other = step(reward=0.5, visits=0), step(q=-1.0, visits=3)
    unvisited = step(q=2.0, visits=0)
    parent = step(reward=0.25, children=[leaf, other, unvisited])
    back_up([parent, leaf], 0.9)
    # The leaf: Q = 0.5; the parent: V = (1 * 0.5 + 3 * -1 + 1 * 2) / 5, Q = 0.25 + 0.9 V. A child never visited counts once.
    assert (leaf.visits, leaf.q) == (1, 0.5)
    assert parent.v == pytest.approx(-0.1)
    assert (parent.visits, parent.q) == (1, pytest.approx(0.25 - 0.9 * 0.1))


def test_the_move_is_by_visits_and_their_spread():
    spread = step(visits=4, children=[step(visits=3), step(visits=0)])  # 4 * (1 + 3)
    flat = step(visits=9, children=[step(visits=4), step(visits=4)])  # 9 * (1 + 0)
    assert next_move(step(children=[flat, spread])) is spread
    low, high = step(visits=2, q=0.1), step(visits=2, q=0.3)
    assert next_move(step(children=[low, high])) is high
    assert next_move(step(children=[flat, low])) is flat


# --- the policy's own opinion -------------------------------------------------------------------------------------------


def answered(asks: list[Any], yes: Callable[[tuple[str, ...]], int]) -> list[list[Rollout]]:
    """Next steps 0 and 1 of the binary world, and so many yes of each opinion as `yes` says."""
    found = []
    for ask in asks:
        if isinstance(ask, AskOpinion):
            found.append([Rollout(ask.prefix, 0, "right" if n < yes(ask.steps) else "wrong") for n in ask.numbers])
        else:
            assert ask.one_step
            last = len(ask.prefix) == DEPTH - 1
            outcome = lambda ids: ("right" if ids == (1, 0, 1) else "wrong") if last else "unfinished"  # noqa: B023
            found.append(
                [
                    Rollout((*ask.prefix, n % 2), len(ask.prefix), outcome((*ask.prefix, n % 2)), (-0.5,))
                    for n in ask.numbers
                ]
            )
    return found


def run_self(cut: Any, yes: Callable[[tuple[str, ...]], int], **over: Any) -> Any:
    growth = search_question(cut, Options(**{"candidates": 4, "evaluations": 4, "iterations": 20, **over}))
    answer: Any = None
    while True:
        try:
            answer = answered(growth.send(answer), yes)
        except StopIteration as end:
            return end.value


def test_the_opinion_is_a_share_and_is_divided_in_the_deep(numbers_cut):
    found = run_self(numbers_cut, lambda steps: 3 if steps[:1] == ("1",) else 1, full_confidence=0)
    for node in nodes_below(found.root)[1:]:
        share = 0.75 if node.steps[0] == "1" else 0.25
        outcome = 0 if node.outcome is None else 1 if node.outcome == "right" else -1
        assert node.value == pytest.approx(share / max(node.depth - 1, 1) + outcome)
        assert node.prior == pytest.approx(math.exp(-0.5))
    assert found.path[-1].steps == ("1", "0", "1")
    assert found.counts["candidates met again"] > 0


def test_an_opinion_that_cannot_be_read_is_the_parents(numbers_cut):
    growth = search_question(
        numbers_cut, Options(candidates=2, evaluations=2, iterations=1, first_factor=1, max_depth=2)
    )
    answer: Any = None
    try:
        while True:
            asks = growth.send(answer)
            answer = answered(asks, lambda steps: 2)
            # No room for the question about one of the steps.
            answer = [
                [] if isinstance(a, AskOpinion) and a.steps == ("1",) else r for a, r in zip(asks, answer, strict=True)
            ]
    except StopIteration as end:
        found = end.value
    values = {node.steps: node.value for node in nodes_below(found.root)}
    assert values["1",] == values[()] == 1.0


def test_gold_is_a_candidate_only_if_asked_for(numbers_cut):
    gold = [("1", (1,)), ("7", (1, 7)), ("1", (1, 7, 1))]
    growth = search_question(numbers_cut, Options(candidates=2, evaluations=2, iterations=30), gold)
    answer: Any = None
    try:
        while True:
            answer = answered(growth.send(answer), lambda steps: 2 if steps == ("1", "7") else 1)
    except StopIteration as end:
        found = end.value
    assert ("1", "7") in {node.steps for node in nodes_below(found.root)}
    assert not [n for n in nodes_below(found.root) if "7" in n.steps and n.steps[:2] != ("1", "7")]
    assert found.counts["reference steps added"] == 1


# --- rows ----------------------------------------------------------------------------------------------------------------


def test_the_row_holds_the_path_and_its_siblings_and_gives_a_pair_a_level(drive, numbers_cut):
    found = search(drive, numbers_cut, {(0, 1, 1)}, iterations=20)
    row = tree_row(found, PROBLEM, SOURCE)
    assert len(row.nodes) == 1 + 2 * DEPTH
    assert all(-1 <= node.value <= 1 and node.visits >= 1 for node in row.nodes)
    assert {node.outcome for node in row.nodes} == {None, "right", "wrong"}
    pairs = step_pairs(row, margin=0.05, extremes=True, most=8)
    assert [(p.prefix, p.chosen, p.rejected) for p in pairs] == [
        ((), ("0",), ("1",)),
        (("0",), ("1",), ("0",)),
        (("0", "1"), ("1",), ("0",)),
    ]
    # (value of the leaf + 1) / 3 of the last pair: right 2, wrong -1.
    assert (pairs[-1].reward_chosen, pairs[-1].reward_rejected) == (pytest.approx(1), pytest.approx(0))
    assert pairs[0].n_chosen > pairs[0].n_rejected >= 1
    assert [p.chosen_finished for p in pairs] == [False, False, True]


@pytest.fixture(scope="module")
def lab(erring_engine: Any) -> Any:
    task = ChainArith(p=7, min_steps=3, max_steps=4, sizes={"train": 6})
    engine = erring_engine(task, 0.3)
    return engine, task, StepFormat.for_policy(engine.tokenizer, "\n"), task.problems("train")


def trees(lab: Any, problems: Any = None, **over: Any) -> Any:
    engine, task, step_format, every = lab
    options = Options(value="rollouts", candidates=3, evaluations=4, iterations=2, **over)
    return mcts_dpo_trees(
        engine, task, step_format, every if problems is None else problems, options=options, sampling=Sampling(64), seed=0,
        policy="policy",
    )  # fmt: skip


def test_trees_of_the_lab_prefer_right_steps_and_do_not_depend_on_their_neighbours(lab):
    engine, task, _, problems = lab
    engine.asked.clear()
    result = trees(lab)
    assert len(result.rows) == len(problems)
    apart = [row for problem in problems for row in trees(lab, [problem]).rows]
    assert apart == result.rows
    pairs = [pair for row in result.rows for pair in step_pairs(row, margin=0.1, extremes=True)]
    right = lambda pair, side: (
        task.check_steps(next(p for p in problems if p.id == pair.problem_id), [*pair.prefix, *side])[-1].on_track
    )
    better = sum(right(p, p.chosen) - right(p, p.rejected) for p in pairs)
    assert better > 0.5 * len(pairs) > 5
    assert result.counts["questions with reference steps as candidates"] == 0
    assert result.counts["questions with answers told to the judge"] == 0


class Letters:
    """A task whose solutions are two lines; the second is the answer."""

    name, step_separator = "letters", "\n"

    def verify(self, problem: Problem, text: str) -> Any:
        from stepladder.tasks.base import Outcome, Verdict

        answer = text.strip().split("\n")[-1]
        return Verdict(answer, Outcome.RIGHT if answer == problem.answer else Outcome.WRONG)


@pytest.mark.parametrize("hint", [False, True])
def test_the_policy_is_asked_in_words_and_told_the_answer_only_if_wanted(fake_engine, merging_tokenizer, hint):
    """Steps are sampled one at a time, opinions in a prompt of their own; by default no prompt holds the answer."""
    tokenizer = merging_tokenizer
    eos = tokenizer.eos_token

    def write(prefix: tuple[int, ...], seed: int) -> list[int]:
        text = tokenizer.decode(prefix)
        if text.endswith("Reply:"):
            return tokenizer((" Yes." if "a1" in text else " No.") + eos)["input_ids"]
        if "\n" not in text.removeprefix("start"):
            return tokenizer(f"a{seed % 2}\nnever read")["input_ids"]
        return tokenizer(("secret" if "a1" in text else "wrong") + eos)["input_ids"]

    engine = fake_engine(tokenizer, write)
    generate = engine.generate

    def stopping(requests: Any, sampling: Sampling) -> Any:
        import dataclasses as d

        from stepladder.models.engine import StopReason

        found = generate(requests, sampling)
        if not sampling.stop:
            return found
        cut = lambda s: next(
            (d.replace(s, ids=s.ids[:n], logprobs=s.logprobs[:n], stop=StopReason.STOP)
             for n in range(1, len(s.ids) + 1) if "\n" in tokenizer.decode(s.ids[:n])), s)  # fmt: skip
        return [[cut(s) for s in samples] for samples in found]

    engine.generate = stopping
    result = mcts_dpo_trees(
        engine, Letters(), StepFormat.for_policy(tokenizer, "\n"), [Problem("a", "start", "secret")],
        options=Options(iterations=4, evaluations=3, hint_self_eval=hint), sampling=Sampling(32), seed=0, policy="p",
    )  # fmt: skip
    [row] = result.rows
    assert {(node.step, node.outcome) for node in row.nodes[1:]} == {("a0", None), ("a1", None), ("secret", "right")}
    assert [p.chosen for p in step_pairs(row, margin=0.05, extremes=True)] == [("a1",)]
    asked = [tokenizer.decode(request.prefix) for request in engine.asked]
    opinions = [text for text in asked if text.endswith("Reply:")]
    assert SELF_EVALUATION.replace("{prompt}", "start").replace("{steps}", "a1") in "".join(opinions)
    told = [text for text in opinions if "The right final answer is secret" in text]
    assert len(told) == (len(opinions) if hint else 0)
    assert not [text for text in asked if "never read" in text]
    assert result.counts["questions with answers told to the judge"] == int(hint)
