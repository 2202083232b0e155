"""OmegaPRM on worlds without noise: planted errors, the number of probes, and no rollout searched twice."""

from __future__ import annotations

import math
import random

import pytest

from stepladder.data_gen.omegaprm import Options, exploration, quality, search_question

PLAIN = Options(filter_rollouts=0)
BAD = 900  # ids from here on are wrong steps, and nothing behind one can be right


def good(depth: int, length: int) -> list[int]:
    return list(range(depth, length))


def path_of(builder, steps: str | list[int]):
    return builder.nodes[builder.index[tuple(map(str, steps))]]


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8, 13, 16, 17])
def test_a_planted_error_is_found_in_log2_probes(drive, numbers_cut, length):
    for error in range(length):
        wrong = [*good(0, error), *(BAD + i for i in range(error, length))]

        def write(prefix, number, wrong=wrong):
            if not prefix and number == 0:
                return wrong, False
            if any(i >= BAD for i in prefix):
                return [BAD + i for i in range(len(prefix), length)], False
            return good(len(prefix), length), True

        run = drive(write)
        found = run(search_question(numbers_cut, PLAIN))
        probes = len(run.asks) - 1  # the first ask is the root's
        assert probes <= math.ceil(math.log2(length)), (length, error)
        assert found.counts["prefixes probed"] == probes
        assert found.counts["rollouts searched"] == found.counts["first errors found"] == 1
        builder = found.builder
        first = path_of(builder, wrong[: error + 1])
        assert first.n_correct == 0 < first.n_rollouts
        before = path_of(builder, wrong[:error])
        assert before.n_correct > 0
        # A finished solution has its own verdict, everything else k rollouts.
        assert (first.outcome, first.n_rollouts) == (("wrong", 1) if error == length - 1 else (None, 8))


def random_world(seed: int, length: int = 8, eps: float = 0.25, distinct: int = 30):
    """Each step is right with probability 1 - eps; after a wrong one all are wrong. Noise-free where it matters."""

    def write(prefix, number):
        rng = random.Random(f"{seed} {prefix} {number}")
        ids, bad = [], any(i >= BAD for i in prefix)
        for depth in range(len(prefix), length):
            bad = bad or rng.random() < eps
            ids.append(BAD + 1000 * rng.randrange(distinct) + depth if bad else depth)
        return ids, not bad

    return write


def test_twenty_selections_are_twenty_distinct_rollouts(drive, numbers_cut):
    for seed in range(5):
        cut_of = []

        def cut(ids, seen=cut_of):
            seen.append(tuple(ids))
            return numbers_cut(ids)

        run = drive(random_world(seed))
        found = run(search_question(cut, Options(search_limit=20)))
        assert found.counts["rollouts searched"] == 20
        # A rollout that comes up again below a later state is recognised, not searched.
        assert len(set(cut_of)) == 20
        assert len(cut_of) == 20 + found.counts["rollouts met again"] + found.counts["rollouts that add no step"]
        assert sum(n.visits for n in found.builder.nodes) == 20
        # No prefix is probed twice, and every probed prefix has the counts of its own rollouts.
        assert len({ask.prefix for ask in run.asks}) == len(run.asks) == 1 + found.counts["prefixes probed"]
        for ask in run.asks:
            node = path_of(found.builder, ask.prefix)
            rollouts = [run.rollout(ask.prefix, n) for n in ask.numbers]
            assert (node.n_correct, node.n_rollouts) == (sum(r.right for r in rollouts), len(rollouts))


def test_every_found_error_is_the_first(drive, numbers_cut):
    """Without noise at the good prefixes (k large) each searched rollout ends in its first wrong step."""
    found = drive(random_world(3))(search_question(numbers_cut, Options(search_limit=15, rollouts=24)))
    nodes = found.builder.nodes
    negative = [
        steps for steps, i in found.builder.index.items() if nodes[i].n_rollouts and steps and int(steps[-1]) >= BAD
    ]
    firsts = [steps for steps in negative if not any(int(s) >= BAD for s in steps[:-1])]
    assert len(firsts) >= 10
    assert all(path_of(found.builder, steps).n_correct == 0 for steps in negative)


def test_the_pool_empties(drive, numbers_cut):
    """Few distinct wrong rollouts, sampled again and again: the search ends when each was searched once."""
    texts = [[0, BAD + 1], [0, BAD + 2], [BAD + 3, BAD + 4]]

    def write(prefix, number):
        if prefix:
            return ([1], True) if prefix == (0,) else ([BAD + 4], False)
        return (texts[number % 4], False) if number % 4 < 3 else ([0, 1], True)

    run = drive(write)
    found = run(search_question(numbers_cut, PLAIN))
    assert found.counts["rollouts searched"] == 3
    assert found.counts["questions with every wrong rollout searched"] == 1
    assert {ask.prefix for ask in run.asks} == {(), (0,), (BAD + 3,)}


def test_a_rollout_met_again_below_is_not_searched_again(drive, numbers_cut):
    def write(prefix, number):
        if prefix == ():
            return ([0, 1, BAD], False) if number < 4 else ([0, 1, 2], True)
        return ([*range(len(prefix), 2), BAD], False) if number < 2 else ([*range(len(prefix), 3)], True)

    found = drive(write)(search_question(numbers_cut, PLAIN))
    assert found.counts["rollouts searched"] == 1
    assert found.counts["rollouts met again"] >= 1


@pytest.mark.parametrize(
    ("right", "dropped"),
    [(0, "questions without a right rollout"), (32, "questions without a wrong rollout"), (1, "")],
)
def test_the_filter(drive, numbers_cut, right, dropped):
    run = drive(lambda prefix, number: ([0], True) if number < right else ([BAD], False))
    found = run(search_question(numbers_cut, Options()))
    assert found.dropped == dropped
    assert [len(ask.numbers) for ask in run.asks] == [32]
    assert found.counts["rollouts searched"] == (0 if dropped else 1)


def test_without_the_filter_a_hopeless_question_has_an_empty_pool(drive, numbers_cut):
    run = drive(lambda prefix, number: ([BAD + number], False))
    found = run(search_question(numbers_cut, PLAIN))
    assert (found.dropped, found.counts["rollouts searched"], len(run.asks)) == ("", 0, 1)


def test_an_empty_rollout_names_no_step(drive, numbers_cut):
    found = drive(lambda prefix, number: ([], False) if number else ([0], True))(search_question(numbers_cut, PLAIN))
    assert found.counts == {"rollouts that add no step": 1, "questions with every wrong rollout searched": 1}
    assert len(found.builder.nodes) == 1


def test_spans_under_min_tokens_stay_whole(drive, numbers_cut):
    wrong = [0, 1, 2, 3, 4, 5, 6, BAD]
    write = lambda prefix, number: (wrong[len(prefix) :], False) if number == 0 else (good(len(prefix), 8), True)
    found = drive(write)(search_question(numbers_cut, Options(filter_rollouts=0, min_tokens=4, search_limit=1)))
    # 0..8 is split at 4; 4..8 has 4 tokens and is split at 6; 6..8 stays.
    assert found.counts["prefixes probed"] == 2
    assert found.counts["first errors found"] == 0
    assert [path_of(found.builder, wrong[:t]).n_rollouts for t in range(9)] == [8, 0, 0, 0, 8, 0, 8, 0, 1]


def test_selection_prefers_solved_states_and_short_rollouts(drive, numbers_cut):
    options = Options()
    # 0.5^(1 - 6/8) 0.9^(100/500) = 0.84090 * 0.97915
    assert quality(0.75, 100, options) == pytest.approx(0.5**0.25 * 0.9**0.2)
    assert quality(0.75, 100, options) > quality(0.5, 100, options) > quality(0.5, 200, options)
    # 0.125 sqrt(9) / (1 + 2)
    assert exploration(2, 9, options) == pytest.approx(0.125)
    order = []

    def cut(ids):
        order.append(len(ids))
        return numbers_cut(ids)

    lengths = [5, 3, 7, 2]

    def write(prefix, number):
        if number < 4 and not prefix:
            return [BAD + i for i in range(lengths[number])], False
        return [0], not prefix

    drive(write)(search_question(cut, PLAIN))
    assert order == sorted(lengths)


def test_binary_search_needs_a_third_of_the_probes_of_brute_force(drive, numbers_cut):
    """The paper's claim in miniature: T = 16, K rollouts a probe, against probing every prefix."""
    calls = []
    for error in range(16):
        wrong = [*good(0, error), *(BAD + i for i in range(error, 16))]
        write = lambda prefix, number, wrong=wrong: (
            (wrong, False) if not prefix and not number
            else ([BAD], False) if any(i >= BAD for i in prefix) else (good(len(prefix), 16), True)
        )  # fmt: skip
        run = drive(write)
        run(search_question(numbers_cut, PLAIN))
        calls.append(8 * (len(run.asks) - 1))
    assert 8 * 15 / (sum(calls) / len(calls)) >= 3


def test_a_lucky_rollout_behind_an_error_is_doubted(drive, numbers_cut):
    """The error is step 3 of 16, and rollout 0 of the first middle, 8 steps, ends right all the same."""
    wrong = [*good(0, 3), *(BAD + i for i in range(3, 16))]

    def write(prefix, number):
        if not prefix and not number:
            return wrong, False
        if any(i >= BAD for i in prefix):
            return [BAD + 50 + number], len(prefix) == 8 and number == 0
        return good(len(prefix), 16), True

    past = drive(write)(search_question(numbers_cut, Options(filter_rollouts=0, search_limit=1)))
    assert [(begin, end) for _, begin, end in past.spans] == [(8, 9)]

    run = drive(write)
    found = run(search_question(numbers_cut, Options(filter_rollouts=0, search_limit=9, doubt=1)))
    assert [(rollout.ids, begin, end) for rollout, begin, end in found.spans] == [(tuple(wrong), 3, 4)]
    assert found.counts["first errors found"] == found.counts["prefixes probed once more"] == 1
    assert [(len(ask.prefix), ask.numbers) for ask in run.asks if ask.numbers.start] == [(8, range(8, 16))]
    doubted = path_of(found.builder, wrong[:8])
    assert (doubted.n_correct, doubted.n_rollouts) == (1, 16)
    # Its wrong rollouts are no candidates: nothing behind an error is searched.
    assert found.counts["questions with every wrong rollout searched"] == 1


def test_a_hard_prefix_that_is_solved_again_is_no_longer_doubted(drive, numbers_cut):
    wrong = [*good(0, 12), *(BAD + i for i in range(12, 16))]

    def write(prefix, number):
        if not prefix and not number:
            return wrong, False
        right = not any(i >= BAD for i in prefix) and (len(prefix) != 8 or number in (5, 14))
        return (good(len(prefix), 16) if right else [BAD]), right

    run = drive(write)
    found = run(search_question(numbers_cut, Options(filter_rollouts=0, search_limit=1, doubt=1)))
    assert [(begin, end) for _, begin, end in found.spans] == [(12, 13)]
    assert (path_of(found.builder, wrong[:8]).n_correct, path_of(found.builder, wrong[:8]).n_rollouts) == (2, 16)
