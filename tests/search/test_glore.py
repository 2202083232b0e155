"""GLoRe's search: which refinements are made and chosen on a world of numbers, and how they are spliced to their drafts' ids."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from stepladder.models.corrections import Wording
from stepladder.models.engine import Sampling
from stepladder.models.lab import CORRECTION_WORDS, lab_tokenizer
from stepladder.models.step_format import StepFormat
from stepladder.search.adapters import CheckerLocator, RandomLocator, RefinementPolicy, RewardLocator, StepPolicy
from stepladder.search.base import State
from stepladder.search.best_of_n import best_of_n
from stepladder.search.glore import glore
from stepladder.tasks.base import Problem
from stepladder.tasks.chain import ChainArith


class World:
    """A draft is one id, seed % 4, and wrong at step 0 unless it is 0 (nothing located) or in `unfit` (no room).

    A global refinement of k is 10 + k, a local one 20 + k. Scores are those of the last id.
    """

    def __init__(self, scores: dict[int, float], unfit: tuple[int, ...] = ()) -> None:
        self.scores, self.unfit = scores, unfit
        self.calls: list[tuple[str, int]] = []

    def root(self, key: str = "x") -> State:
        return State(key, key, (9,), 1)

    def finish(self, states: Any, seeds: Any) -> list[State]:
        self.calls.append(("finish", len(states)))
        return [
            dataclasses.replace(s, ids=(*s.ids, k % 4), steps=(str(k % 4),), done=True)
            for s, k in zip(states, seeds, strict=True)
        ]

    def locate(self, states: Any) -> list[int | None]:
        self.calls.append(("locate", len(states)))
        return [0 if s.ids[-1] else None for s in states]

    def before_refinement(self, root: State, draft: State, error: int | None) -> State | None:
        if draft.ids[-1] in self.unfit:
            return None
        return State(root.key, root.prompt, (*root.ids, draft.ids[-1] + (10 if error is None else 20)), 1)

    def refine(self, states: Any, seeds: Any) -> list[State]:
        self.calls.append(("refine", len(states)))
        return [dataclasses.replace(s, ids=(*s.ids, s.ids[-1]), steps=(str(s.ids[-1]),), done=True) for s in states]

    def __call__(self, states: Any) -> list[float]:
        return [self.scores.get(s.ids[-1], 0.0) for s in states]


def drawn(n: int) -> list[int]:
    world = World({})
    [found] = best_of_n([world.root()], world, world, n=n, seed=0)
    return [s.ids[-1] for s in found.finals]


def test_each_draft_has_both_refinements_behind_it_and_what_is_found_right_has_no_local_one():
    world = World({})
    [found] = glore([world.root()], world, world, n=8)
    wanted = [[k, 10 + k, 20 + k] if k else [k, 10] for k in drawn(8)]
    assert [s.ids[-1] for s in found.finals] == [k for own in wanted for k in own]
    assert {0} < set(drawn(8))
    nodes = [found.nodes[i] for i in found.final_nodes]
    assert [n.role for n in nodes] == [r for own in wanted for r in ("", "global", "local")[: len(own)]]
    parents = [found.nodes[n.parent].steps for n in nodes if n.role]
    assert parents == [(str(own[0]),) for own in wanted for _ in own[1:]]
    assert found.chosen == 0  # equal scores go to the first draft
    assert [f[0] for f in world.calls] == ["finish", "refine", "locate", "refine"]


@pytest.mark.parametrize(("refine", "roles"), [("global", {"", "global"}), ("local", {"", "local"})])
def test_one_kind_alone(refine, roles):
    world = World({})
    [found] = glore([world.root()], world, world, n=8, refine=refine)
    assert {node.role for node in found.nodes} == roles
    assert (("locate", 8) in world.calls) == (refine == "local")


def test_the_scorer_chooses_and_searches_share_calls():
    first = drawn(1)[0]
    keys = list("abcdefgh")
    world = World({10: 1.0, 11: 1.0, 12: 1.0, 13: 1.0, 20: 2.0, 21: 0.5, 22: 0.5, 23: 0.5})
    results = glore([world.root(k) for k in keys], world, world)
    for result in results:
        assert result.finals[result.chosen].ids[-1] >= 10
        alone = glore([world.root(result.finals[0].key)], world, world)
        assert alone == [result]
    assert world.calls[0] == ("finish", 8)
    assert world.calls[1] == ("refine", 8)
    best = World({first: 5.0, 10 + first: 4.0})
    [kept] = glore([best.root()], best, best)
    assert kept.finals[kept.chosen].ids[-1] == first  # a draft that scores best is left as it is


def test_drafts_without_room_are_not_refined_and_odd_settings_are_refused():
    world = World({}, unfit=(0, 1, 2, 3))
    [found] = glore([world.root()], world, world, n=3)
    assert len(found.finals) == 3
    with pytest.raises(ValueError, match="refine must be one of"):
        glore([], world, world, refine="all")
    with pytest.raises(ValueError, match="n must be 1 or more"):
        glore([], world, world, n=0)


# --- on engines -------------------------------------------------------------------------------------------------------

TASK = ChainArith(p=7, min_steps=3, max_steps=3, sizes={"train": 1, "dev": 1, "test": 1})
PROBLEM = Problem("x", "Start 3 ; + 5 ; * 2 ; - 1 \n", "1")
DRAFT = "3 + 5 = 1 \n 1 * 2 = 3 \n 3 - 1 = 2 \n Answer: 2"
ENDING = "1 * 2 = 2 \n 2 - 1 = 1 \n Answer: 1"


@pytest.fixture(scope="module")
def words() -> Any:
    return lab_tokenizer(8, CORRECTION_WORDS)


def policy_of(words: Any, fake_engine: Any, locator: Any, context: int = 10**6) -> tuple[RefinementPolicy, Any, Any]:
    """A policy that writes DRAFT; a global refiner that writes all anew, and a local one that writes ENDING."""
    ids = lambda text: [*words(text)["input_ids"], words.eos_token_id]
    step_format, sampling = StepFormat.for_policy(words, "\n"), Sampling(40)
    step_policy = lambda text: StepPolicy(fake_engine(words, lambda p, s: ids(text)), step_format, "\n", sampling)
    writer, globally, locally = step_policy(DRAFT), step_policy("3 + 5 = 1 \n " + ENDING), step_policy(ENDING)
    locally.engine.context = context
    policy = RefinementPolicy(
        writer.engine, step_format, "\n", sampling,
        wording=Wording.named("lab"), refiners=(globally, locally), locator=locator,
    )  # fmt: skip
    return policy, globally.engine, locally.engine


def test_a_local_refinement_is_spliced_to_the_ids_before_the_error(words, fake_engine):
    policy, globally, locally = policy_of(words, fake_engine, CheckerLocator(TASK, {"x": PROBLEM}))
    [found] = glore([policy.root(PROBLEM)], policy, lambda states: [0.0] * len(states))
    draft, new, local = found.finals
    whole = ("3 + 5 = 1", "1 * 2 = 2", "2 - 1 = 1", "Answer: 1")
    assert new.steps == local.steps == whole
    asked = words.decode(locally.asked[0].prefix)
    assert "3 + 5 = 1 \n [BAD] 1 * 2 = 3 \n" in asked  # before the step, and only there
    assert asked.count("[BAD]") == 1
    assert "[BAD]" not in words.decode(globally.asked[0].prefix)
    cut = len(words(PROBLEM.prompt)["input_ids"]) + len(words("3 + 5 = 1 \n")["input_ids"])
    assert local.ids[:cut] == draft.ids[:cut]
    assert local.ids[cut:] == (*words(ENDING)["input_ids"], words.eos_token_id)
    assert local.prompt_length == draft.prompt_length == new.prompt_length
    node = found.nodes[found.final_nodes[2]]
    assert (node.role, node.steps, node.tokens) == ("local", whole[1:], len(local.ids) - cut)
    assert found.tokens == sum(n.tokens for n in found.nodes)


def test_an_error_in_the_first_step_keeps_nothing_and_a_full_context_refines_nothing(words, fake_engine):
    policy, _, locally = policy_of(words, fake_engine, lambda states: [0] * len(states))
    [found] = glore([policy.root(PROBLEM)], policy, lambda states: [0.0] * len(states), refine="local")
    assert found.finals[1].steps == ("1 * 2 = 2", "2 - 1 = 1", "Answer: 1")
    assert "[BAD] 3 + 5 = 1" in words.decode(locally.asked[0].prefix)
    full, *_ = policy_of(words, fake_engine, lambda states: [0] * len(states), context=50)
    [found] = glore([full.root(PROBLEM)], full, lambda states: [0.0] * len(states))
    assert [n.role for n in found.nodes] == ["", "", "global"]
    assert full.left_out == 1


def test_what_locates_errors():
    state = lambda *steps: State("x", PROBLEM.prompt, (), 0, steps)
    steps = ("3 + 5 = 1", "1 * 2 = 3", "3 - 1 = 2", "Answer: 2")

    class Scores:
        def score(self, solutions: Any) -> list[list[float]]:
            return [[0.9, 0.5, 0.4, 0.1][: len(own)] for _, own in solutions]

    assert RewardLocator(Scores(), 0.5)([state(*steps), state(*steps[:2]), state()]) == [2, None, None]  # type: ignore[arg-type]
    assert RewardLocator(Scores(), 0.6)([state(*steps)]) == [1]  # type: ignore[arg-type]
    assert CheckerLocator(TASK, {"x": PROBLEM})([state(*steps), state(steps[0])]) == [1, None]
    random = RandomLocator(0)
    places = random([state(*steps, str(i)) for i in range(200)])
    assert set(places) == {0, 1, 2, 3, 4}
    assert random([state(*steps, "7")]) == [places[7]]  # whatever stands beside it
    assert random([state()]) == [None]
