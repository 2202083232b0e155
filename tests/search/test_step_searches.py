"""Step-level searches against slow searches of one root, state by state, and particles against the exact distribution."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import pytest

from stepladder.basics import fold_seed
from stepladder.search.beam import beam_search
from stepladder.search.best_of_n import best_of_n, step_best_of_n
from stepladder.search.dvts import dvts
from stepladder.search.particles import ancestors, effective_size, log_weights, particle_filter, softmax
from stepladder.search.rebase import balanced_shares, rebase
from stepladder.search.revisions import revisions
from stepladder.search.step_beam import step_beam
from stepladder.search.tree_of_thoughts import tot_bfs, tot_dfs


def child(world, state, last, *keys):
    seed = fold_seed(*keys)
    return world.finish([state], [seed])[0] if last else world.expand([state], [[seed]])[0][0]


def best_first(world, states):
    """The best scored first, equals in their order."""
    left, order = list(states), []
    while left:
        top = max(world.judge(state) for state in left)
        order.append(left.pop(next(i for i, state in enumerate(left) if world.judge(state) == top)))
    return order


def slow_dvts(world, root, n, width, max_depth, seed):
    finals = []
    for tree in range(n // width):
        state = root
        for depth in range(1, max_depth + 1):
            made = [
                child(world, state, depth == max_depth, seed, root.key, "dvts", tree, depth, k) for k in range(width)
            ]
            state = best_first(world, made)[0]
            if state.done:
                finals += made
                break
    return [s if s.done else child(world, s, True, seed, root.key, "dvts rest", i) for i, s in enumerate(finals)]


def slow_step_beam(world, root, beams, width, max_depth, seed):
    finals, open_states = [], [(root, beams * width)]
    for depth in range(1, max_depth + 1):
        made, number = [], 0
        for state, count in open_states:
            siblings = []
            for _ in range(count):
                one = child(world, state, depth == max_depth, seed, root.key, "step beam", depth, number)
                number += 1
                if one.steps not in [s.steps for s in siblings]:
                    siblings.append(one)
            made += siblings
        best = best_first(world, made)[: beams - len(finals)]
        finals += [s for s in best if s.done]
        open_states = [(s, width) for s in best if not s.done]
        if not open_states:
            return finals
    return finals


def slow_rebase(world, root, n, temperature, max_depth, seed):
    finals, plan = [], [(root, n)]
    for depth in range(1, max_depth + 1):
        made, number = [], 0
        for state, count in plan:
            for _ in range(count):
                made.append(child(world, state, depth == max_depth, seed, root.key, "rebase", depth, number))
                number += 1
        finals += [s for s in made if s.done]
        left = best_first(world, [s for s in made if not s.done])
        if not left:
            return finals
        width, plan = n - len(finals), []
        weights = [math.exp(world.judge(s) / temperature) for s in left]
        while left and width:
            count = math.ceil(width * weights[0] / sum(weights) - 1e-9)
            plan.append((left.pop(0), count))
            weights.pop(0)
            width -= count
    return finals


def slow_tot_bfs(world, root, beams, width, max_depth, seed):
    kept = [root]
    for depth in range(1, max_depth + 1):
        pool, number = [s for s in kept if s.done], 0
        for state in kept:
            if state.done:
                continue
            for _ in range(width):
                one = child(world, state, depth == max_depth, seed, root.key, "tot", depth, number)
                number += 1
                if (one.steps, one.done) not in [(s.steps, s.done) for s in pool]:
                    pool.append(one)
        kept = best_first(world, pool)[:beams]
        if all(s.done for s in kept):
            break
    return kept


@pytest.mark.parametrize("finish", [0.0, 0.3])
@pytest.mark.parametrize("max_depth", [1, 3, 10])
@pytest.mark.parametrize("seed", range(4))
def test_step_searches_equal_slow_ones(toy, finish, max_depth, seed):
    world = toy(seed=seed, finish=finish, depth=5)
    more = {"max_depth": max_depth, "seed": seed}
    for root in (world.root("a"), world.root("b")):
        found = lambda strategy, root=root, **settings: list(
            strategy([root], world, world, **settings, **more)[0].finals
        )
        for n, width in ((6, 3), (4, 4), (4, 1), (1, 1)):
            assert found(dvts, n=n, width=width) == slow_dvts(world, root, n, width, max_depth, seed)
        for beams, width in ((1, 5), (3, 2), (2, 1)):
            assert found(step_beam, beams=beams, width=width) == slow_step_beam(
                world, root, beams, width, max_depth, seed
            )
            assert found(tot_bfs, beams=beams, width=width) == slow_tot_bfs(world, root, beams, width, max_depth, seed)
        for n, temperature in ((7, 0.2), (12, 1.0), (3, 100.0)):
            assert found(rebase, n=n, temperature=temperature) == slow_rebase(
                world, root, n, temperature, max_depth, seed
            )


def test_step_level_best_of_n_is_the_narrowest_step_beam(toy):
    """SBS(1, N) samples as many, keeps one, and ends with it; only the seeds are others, so the children come in turn."""
    for seed in range(6):
        world = toy(seed=seed, finish=0.2, depth=5, in_turn=True)
        [one] = step_best_of_n([world.root()], world, world, n=3)
        [other] = step_beam([world.root()], world, world, beams=1, width=3)
        [tree] = dvts([world.root()], world, world, n=3, width=3)
        assert one.finals == other.finals
        assert one.finals[0] in tree.finals
        assert (one.tokens, one.rounds) == (other.tokens, other.rounds)


def test_samples_are_those_of_the_policy(toy):
    world = toy(depth=4)
    [result] = best_of_n([world.root()], world, world, n=3, seed=5)
    assert list(result.finals) == [world.finish([world.root()], [fold_seed(5, "x", "sample", k)])[0] for k in range(3)]
    assert result.chosen == max(range(3), key=lambda i: world.judge(result.finals[i]))


# --- REBASE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 5, 16, 33])
def test_rebase_spends_the_width(width):
    for scores in ([0.5], [0.1, 0.9], [0.2, 0.2, 0.2], [0.9, 0.1, 0.5, 0.5], [0.0] * 7, [1e-9, 1.0]):
        for temperature in (1e-4, 0.2, 1e4):
            counts = balanced_shares(scores, width, temperature)
            assert sum(counts) == width
            assert all(c >= 0 for c in counts)
            order = sorted(range(len(scores)), key=lambda i: -scores[i])
            assert all(counts[a] >= counts[b] - 1 for a, b in itertools.pairwise(order))


def test_rebase_shares_by_hand():
    # Shares e^(.9/.2), e^(.5/.2), e^(.1/.2) over their sum: .867, .117, .016. ceil(8 * .867) = 7, ceil(1 * .117 / .133) = 1, 0.
    assert balanced_shares([0.1, 0.9, 0.5], 8, 0.2) == [0, 7, 1]
    # Equal scores split evenly, the first ones taking what does not divide.
    assert balanced_shares([0.3, 0.3, 0.3], 8, 0.2) == [3, 3, 2]
    assert balanced_shares([0.3, 0.3, 0.3, 0.3], 8, 0.2) == [2, 2, 2, 2]


# --- particles ---------------------------------------------------------------------------------------------------------


def test_three_readings_of_the_weight():
    r = [0.9, 0.5, 0.1]
    assert softmax(log_weights(r, "likelihood")) == pytest.approx([0.6, 1 / 3, 0.1 / 1.5])
    odds = [9.0, 1.0, 1 / 9]
    assert softmax(log_weights(r, "odds")) == pytest.approx([o / sum(odds) for o in odds])
    exp = [math.exp(v) for v in r]
    assert softmax(log_weights(r, "score")) == pytest.approx([e / sum(exp) for e in exp])
    assert log_weights([0.0, 1.0], "odds") == pytest.approx([math.log(1e-7 / (1 - 1e-7)), math.log((1 - 1e-7) / 1e-7)])
    # .999 against .9: odds of 111 to 1, one reading being sharp where the other is flat.
    sharp, flat = (softmax(log_weights([0.999, 0.9], how)) for how in ("odds", "score"))
    assert sharp[0] / sharp[1] == pytest.approx(111)
    assert flat[0] / flat[1] < math.e


def test_effective_size():
    assert effective_size([0.25] * 4) == pytest.approx(4)
    assert effective_size([1.0, 0.0]) == 1
    assert effective_size([0.5, 0.25, 0.25]) == pytest.approx(1 / (0.25 + 0.125))


def test_ancestors_are_drawn_by_weight():
    weights = [0.5, 0.0, 0.3, 0.2]
    n = 1000
    grid = [(k + 0.5) / n for k in range(n)]
    assert Counter(ancestors(weights, n, grid, "multinomial")) == {0: 500, 2: 300, 3: 200}
    for u in (0.0, 0.1, 0.5, 0.999):
        for size in (1, 3, 8, 10):
            counts = Counter(ancestors(weights, size, [u], "systematic"))
            assert sum(counts.values()) == size
            for i, w in enumerate(weights):
                assert math.floor(size * w - 1e-9) <= counts[i] <= math.ceil(size * w + 1e-9)
    assert ancestors([1 / 3] * 3, 1, [1 - 2**-53], "multinomial") == [2]  # the sum is just under 1
    assert ancestors([1.0, 0.0], 1, [1 - 2**-53], "multinomial") == [0]


@pytest.mark.parametrize("weighting", ["score", "odds", "likelihood"])
@pytest.mark.parametrize("resampling", ["multinomial", "systematic"])
def test_particles_follow_the_exact_distribution(toy, weighting, resampling):
    """Two steps, two branches, both sampled once in turn: who survives the one draw is softmax(l / tau)."""
    tau, n = 1.7, 2
    world = toy(depth=2, branching=2, in_turn=True)
    first = [world.child(world.root(), k) for k in range(2)]
    want = softmax([v / tau for v in log_weights([world.judge(s) for s in first], weighting)])
    # In turn: both first steps are there, once each, before the draw.
    counts: Counter[str] = Counter()
    for seed in range(1500):
        [result] = particle_filter(
            [world.root()], world, world, n=n, weighting=weighting, resampling=resampling, temperature=tau, seed=seed
        )
        counts.update(state.steps[0] for state in result.finals)
    share = counts["0"] / sum(counts.values())
    assert share == pytest.approx(want[0], abs=4 * math.sqrt(want[0] * want[1] / (n * 1500)))


def test_without_a_difference_between_scores_particles_are_independent_samples(toy):
    """tau to infinity, or equal scores, with a comb: nobody is lost. tau to 0: all copy the best."""
    world = toy(depth=4, branching=50)
    loose = {"n": 8, "resampling": "systematic", "seed": 3}
    [flat] = particle_filter([world.root()], world, world, temperature=1e9, **loose)
    [same] = particle_filter([world.root()], world, toy(scores="constant"), **loose)
    plain = []
    for i in range(8):
        state = world.root()
        for depth in range(1, 5):
            state = world.pick(state, fold_seed(3, "x", "particle", depth, i))
        plain.append(state)
    assert list(flat.finals) == list(same.finals) == plain
    assert flat.curves["distinct"] == (8.0, 8.0, 8.0)
    assert flat.curves["ess"] == pytest.approx([8.0] * 3)
    [sharp] = particle_filter([world.root()], world, world, temperature=1e-6, **loose)
    assert sharp.curves["distinct"] == (1.0, 1.0, 1.0)
    assert len({state.steps[:3] for state in sharp.finals}) == 1


def test_finished_particles_take_part_in_the_draw_or_stay(toy):
    world = toy(depth=6, finish=0.4)
    for seed in range(30):
        for stay in (True, False):
            [result] = particle_filter(
                [world.root()], world, world, n=6, temperature=0.05, resample_finished=not stay, seed=seed
            )
            ends = [node for node in result.nodes if node.done]
            lost = [node for node in ends if node.status != "finished"]
            copies = len(result.final_nodes) - len(set(result.final_nodes))
            if stay:
                assert not lost
                assert not copies
            elif lost and copies:
                return
    pytest.fail("no finished particle was ever copied or lost")


def test_weights_add_up_while_nothing_is_drawn(toy):
    """A threshold of 0 never draws; between, the draw comes when the sizes fall under it, from the sum of the steps since."""
    world = toy(depth=5)
    [never] = particle_filter([world.root()], world, world, n=4, resample_below=0.0, seed=1)
    assert never.curves["distinct"] == (4.0,) * 4
    logs = [0.0] * 4
    sizes = []
    for depth in range(1, 5):
        for i, final in enumerate(never.finals):
            prefix = world.root()
            for step in final.steps[:depth]:
                prefix = world.child(prefix, int(step))
            logs[i] += log_weights([world.judge(prefix)], "odds")[0]
        sizes.append(effective_size(softmax(logs)))
    assert never.curves["ess"] == pytest.approx(sizes)
    [some] = particle_filter([world.root()], world, world, n=4, resample_below=0.5, seed=1)
    drawn = [size <= 2 for size in some.curves["ess"]]
    assert any(drawn)
    assert not all(drawn)
    assert [d < 4 for d in some.curves["distinct"]][drawn.index(True)]


def test_the_temperature_runs_to_its_end(toy):
    world = toy(depth=6, branching=50)
    [cold] = particle_filter([world.root()], world, world, n=8, temperature=1e9, end_temperature=1e-6, anneal_steps=4)
    assert cold.curves["ess"][0] == pytest.approx(8)
    assert cold.curves["ess"][3:] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_islands_never_meet(toy):
    """With a sharp temperature one filter has one lineage, three islands have three."""
    world = toy(depth=4, branching=50)
    for islands in (1, 3):
        [result] = particle_filter([world.root()], world, world, n=9, islands=islands, temperature=1e-6)
        assert result.curves["lineages"] == (float(islands),) * 3


# --- depth first, revisions --------------------------------------------------------------------------------------------


def test_depth_first_goes_back_where_all_children_score_low(toy):
    scores = {("0",): 0.9, ("1",): 0.6, ("0", "0"): 0.1, ("0", "1"): 0.2, ("1", "0"): 0.3, ("1", "1"): 0.8}
    world = toy(depth=2, branching=2, in_turn=True)
    judge = lambda states: [scores[s.steps] for s in states]
    [result] = tot_dfs([world.root()], world, judge, width=2, threshold=0.5, expansions=9)
    assert [state.steps for state in result.finals] == [("1", "1")]
    assert result.rounds == 3  # the root, "0", and back to "1"
    # The budget ends before: the best state that was not gone on from.
    [result] = tot_dfs([world.root()], world, judge, width=2, threshold=0.5, expansions=1)
    assert result.finals[0].steps[0] == "0"
    [result] = tot_dfs([world.root()], world, judge, width=2, threshold=0.5, expansions=2)
    assert result.finals[0].steps[0] == "1"
    assert result.finals[0].done
    # Everything pruned: the best of what was pruned.
    [result] = tot_dfs([world.root()], world, judge, width=2, threshold=0.95, expansions=9)
    assert result.finals[0].steps[0] == "0"
    # More solutions than one, the first found first; a second needs a lower threshold.
    [result] = tot_dfs([world.root()], world, judge, width=2, threshold=0.15, expansions=9, solutions=2)
    assert [state.steps for state in result.finals] == [("0", "1"), ("1", "1")]


def test_states_drawn_by_score(toy):
    """A first step with three times the score is kept three times as often; with no score at all everyone alike."""
    world = toy(depth=1, branching=2, in_turn=True)
    for scores, want in (({"0": 0.2, "1": 0.6}, 0.25), ({"0": 0.0, "1": 0.0}, 0.5)):
        judge = lambda states, scores=scores: [scores[s.steps[-1]] for s in states]
        kept = Counter(
            tot_bfs([world.root()], world, judge, beams=1, width=2, select="sample", seed=seed)[0].finals[0].steps[0]
            for seed in range(1000)
        )
        assert kept["0"] / 1000 == pytest.approx(want, abs=0.055)
    with pytest.raises(ValueError, match="needs scores of 0 or more"):
        tot_bfs([world.root()], world, lambda states: [-1.0] * len(states), beams=1, width=2, select="sample")


def test_revisions_see_the_last_attempts_of_their_chain(toy):
    class Watched(toy):
        def __init__(self, **settings):
            super().__init__(**settings)
            self.seen = []

        def again(self, root, earlier):
            self.seen.append([state.steps for state in earlier])
            return super().again(root, earlier)

    world = Watched(depth=3, branching=40)
    [result] = revisions([world.root()], world, world, n=8, chains=2, shown=2)
    chains = [[s.steps for s in result.finals[:4]], [s.steps for s in result.finals[4:]]]
    assert world.seen == [chains[c][max(0, number - 2) : number] for number in (1, 2, 3) for c in (0, 1)]
    assert result.rounds == 4
    assert all(state.prompt == "prompt of x" for state in result.finals)
    assert [result.nodes[i].parent for i in result.final_nodes[1:4]] == list(result.final_nodes[:3])
    # As many chains as attempts: nothing is shown to anyone.
    world.seen.clear()
    [plain] = revisions([world.root()], world, world, n=4, chains=4)
    assert not world.seen
    assert plain.rounds == 1


def test_beam_of_width_one_and_particles_without_draw_are_plain_sampling(toy):
    """M = 1: as many tokens as independent samples, and a solution for each."""
    world = toy(depth=5, finish=0.2)
    for strategy, settings in (
        (beam_search, {"beams": 5, "width": 1}),
        (particle_filter, {"n": 5, "resample_below": 0.0}),
        (dvts, {"n": 5, "width": 1}),
    ):
        [result] = strategy([world.root()], world, world, **settings)
        assert result.tokens == sum(len(state.steps) for state in result.finals)
        assert len(result.final_nodes) == len(set(result.final_nodes)) == 5
