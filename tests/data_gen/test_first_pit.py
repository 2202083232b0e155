"""First-pit prefixes on toy worlds: the pit is where a slow walk finds it, and no count is used twice."""

from __future__ import annotations

import random

import pytest

from stepladder.data_gen.first_pit import Options, explore_question, valued_prefixes
from stepladder.models.engine import Sampling
from stepladder.models.step_format import StepFormat
from stepladder.tasks.chain import ChainArith, value_off_track, value_on_track

BAD = 900  # ids from here on are wrong steps


def world(seed: int, length: int = 6, eps: float = 0.2, repair: float = 0.0):
    """Each step is right with probability 1 - eps; a wrong one is made good with probability `repair`, at the end."""

    def write(prefix, number):
        rng = random.Random(f"{seed} {prefix} {number}")
        ids, bad = [], any(i >= BAD for i in prefix)
        for depth in range(len(prefix), length):
            bad = bad or rng.random() < eps
            ids.append(BAD + 100 * rng.randrange(20) + depth if bad else depth)
        return ids, not bad or rng.random() < repair

    return write


def strings(ids):
    return tuple(map(str, ids))


@pytest.mark.parametrize("seed", range(6))
def test_iid_values_every_prefix_of_every_seed_with_fresh_rollouts(drive, numbers_cut, seed):
    run = drive(world(seed))
    options = Options(strategy="iid", seeds=4, rollouts=5)
    found = run(explore_question(numbers_cut, options, seed))
    solutions = list(dict.fromkeys(run.rollout((), n).ids for n in range(4)))
    assert [kept.steps for kept in found.kept] == [strings(ids) for ids in solutions]
    prefixes = {ids[:t] for ids in solutions for t in range(len(ids))}
    assert set(found.values) == {strings(p) for p in prefixes}
    # The seeds and probes have numbers 0 to 7: what is counted is sampled anew.
    for prefix in prefixes:
        fresh = [run.rollout(prefix, n) for n in range(8, 13)]
        assert found.values[strings(prefix)] == (sum(r.right for r in fresh), 5)
    assert run.rounds == 2


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("repair", [0.0, 0.3])
def test_the_pit_is_the_first_step_without_a_right_probe(drive, numbers_cut, seed, repair):
    run = drive(world(seed, repair=repair))
    options = Options(seeds=6, probes=3, pits=3, rollouts=4)
    found = run(explore_question(numbers_cut, options, seed))
    if found.dropped:
        assert not found.kept
        return
    assert 1 <= len(found.kept) <= 3
    for kept in found.kept:
        # A slow walk along the kept wrong rollout: what is probed is probed with the numbers 6, 7 and 8.
        depth = len(kept.steps)
        probes = lambda t, ids=kept.ids: sum(run.rollout(ids[:t], n).right for n in range(6, 9))
        if kept.outcome == "unfinished":
            assert depth < len(kept.ids)
            assert probes(depth) == 0
        else:
            assert (kept.outcome, depth) == ("wrong", len(kept.ids))
        asked = {ask.prefix for ask in run.asks if ask.numbers == range(6, 9)}
        looked_at = [t for t in range(1, depth) if kept.ids[:t] in asked]
        # The walk begins at a promising state: a prefix above it may have had no right probe by bad luck.
        assert all(probes(t) > 0 or any(probes(later) > 0 for later in looked_at if later > t) for t in looked_at)
    for steps, (right, n) in found.values.items():
        prefix = tuple(map(int, steps))
        assert (right, n) == (sum(run.rollout(prefix, k).right for k in range(9, 13)), 4)
    ends = {kept.steps for kept in found.kept if kept.outcome == "unfinished"}
    assert set(found.values) == {k.steps[:t] for k in found.kept for t in range(len(k.steps))} | ends


def test_what_cannot_be_explored_says_why(drive, numbers_cut):
    def why(write, **changes):
        return drive(write)(explore_question(numbers_cut, Options(seeds=4, **changes), 0)).dropped

    assert why(lambda prefix, number: ([1, 2], False)) == "questions without a promising state"
    assert why(lambda prefix, number: ([1, 2], True)) == "questions without a wrong rollout"
    assert why(lambda prefix, number: ([], True), strategy="iid") == "questions without a step"


def test_rows_are_the_same_whatever_stands_beside_and_their_values_are_those_of_the_closed_form(erring_engine):
    task = ChainArith(p=11, min_steps=3, max_steps=3, sizes={"train": 40})
    engine = erring_engine(task, 0.3)
    problems = task.problems("train")
    step_format = StepFormat.for_policy(engine.tokenizer, "\n")

    def make(some, **changes):
        return valued_prefixes(
            engine, task, step_format, some,
            options=Options(seeds=4, probes=3, rollouts=20, **changes), sampling=Sampling(60), seed=0, policy="me",
        )  # fmt: skip

    for strategy in ("iid", "first_pit"):
        whole = make(problems, strategy=strategy)
        assert make(problems[5:9], strategy=strategy).rows == [
            r for r in whole.rows if r.problem_id in {p.id for p in problems[5:9]}
        ]
        assert whole.counts["prefixes valued"] > 100
        groups: dict[tuple[bool, int], list[int]] = {}
        for row in whole.rows:
            problem = next(p for p in problems if p.id == row.problem_id)
            checks = task.check_steps(problem, row.steps)
            # A step off the track may come back on it later by chance, so the state is what the last line says.
            for t in range(1, min(len(row.steps), 3) + (row.outcome == "unfinished")):
                if t < len(row.n_rollouts) and row.n_rollouts[t] == 20 and t <= 3:
                    entry = groups.setdefault((checks[t - 1].on_track, 3 - t), [0, 0])
                    entry[0] += row.n_correct[t]
                    entry[1] += 20
        assert len(groups) >= 4
        for (on_track, left), (right, n) in groups.items():
            value = value_on_track(11, 0.3, left) if on_track else value_off_track(11, 0.3, left)
            # Shared prefixes stand in several rows: their rollouts are not independent, so the bound is wide.
            assert abs(right / n - value) < 8 * (value * (1 - value) / n) ** 0.5 + 1e-9, (on_track, left)
