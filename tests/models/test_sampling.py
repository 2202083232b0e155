"""Random numbers that belong to a row, and one token drawn a row, against slow references in Python floats."""

from __future__ import annotations

import math
import random

import pytest
import torch

from stepladder.basics import fold_seed
from stepladder.models.engine import Sampling
from stepladder.models.sampling import draw, filtered_probabilities, uniforms


def split_mix(seed: int, count: int) -> list[float]:
    """SplitMix64 with Python's integers: the upper 53 bits of each number as a fraction."""
    mask, state, out = 2**64 - 1, seed, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return out


def test_uniforms_are_splitmix64():
    # The generator's published first numbers from seed 1234567.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert uniforms([1234567], 5)[0].tolist() == [(z >> 11) / 2**53 for z in published]
    seeds = [0, 1, 2**63 - 1, 2**64 - 1, fold_seed(0, "x")]
    assert uniforms(seeds, 40).tolist() == [split_mix(seed, 40) for seed in seeds]


def test_a_uniform_depends_on_its_seed_and_position_alone():
    seeds = [fold_seed(0, i) for i in range(20)]
    whole = uniforms(seeds, 30)
    assert torch.equal(uniforms(seeds[7:8], 30)[0], whole[7])
    assert torch.equal(uniforms(seeds[::-1], 12), whole.flip(0)[:, :12])


@pytest.mark.parametrize("how", ["folded seeds", "consecutive seeds", "one seed", "one position"])
def test_uniforms_are_uniform(how):
    seeds, positions = {
        "folded seeds": ([fold_seed(0, i) for i in range(500)], 40),
        "consecutive seeds": (list(range(500)), 40),
        "one seed": ([fold_seed(1)], 20_000),
        "one position": ([fold_seed(2, i) for i in range(20_000)], 1),
    }[how]
    found = uniforms(seeds, positions)
    values = found.flatten().sort().values
    n = len(values)
    assert values[0] >= 0
    assert values[-1] < 1
    steps = torch.arange(n, dtype=torch.float64)
    gap = max((values - steps / n).abs().max(), ((steps + 1) / n - values).abs().max()).item()
    assert gap < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.001

    # Neighbours along the rows and along the columns are not correlated.
    for first, second in ((found[:, :-1], found[:, 1:]), (found[:-1], found[1:])):
        if first.numel():
            product = ((first - 0.5) * (second - 0.5)).mean().item() * 12
            assert abs(product) < 4 / math.sqrt(first.numel())


def slow_probabilities(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """Temperature, then the k largest, then the smallest set whose mass reaches p; for logits without ties."""
    weights = [math.exp((x - max(logits)) / temperature) for x in logits]
    ranked = sorted(range(len(logits)), key=lambda i: -weights[i])
    if top_k:
        ranked = ranked[:top_k]
    mass = sum(weights[i] for i in ranked)
    kept, reached = [], 0.0
    for i in ranked:
        kept.append(i)
        reached += weights[i] / mass
        if reached >= top_p:
            break
    mass = sum(weights[i] for i in kept)
    return [weights[i] / mass if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.35, 1e-6])
def test_filtered_probabilities_match_a_slow_reference(temperature, top_k, top_p):
    logits = torch.randn(6, 37, generator=torch.Generator().manual_seed(0)) * 2
    found = filtered_probabilities(logits, temperature, top_k, top_p)
    want = [slow_probabilities(row, temperature, top_k if top_k < 37 else 0, top_p) for row in logits.tolist()]
    torch.testing.assert_close(found, torch.tensor(want))
    assert ((found > 0) == (torch.tensor(want) > 0)).all()


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    for top_p, kept in [(0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.95, 4)]:
        assert int((filtered_probabilities(logits, 1.0, 0, top_p) > 0).sum()) == kept


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(0, 1.0, 1.0), (4, 1.0, 0.7), (0, 0.8, 1.3), (6, 0.7, 1.0)]
)
def test_draws_follow_the_probabilities(top_k, top_p, temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 12, generator=generator)
    params = Sampling(1, temperature, top_p, top_k)
    n = 20_000
    uniform = uniforms([fold_seed(3, i) for i in range(n)], 1)[:, 0]
    ids, logprobs = draw(logits.expand(n, -1), uniform, params)
    want = slow_probabilities(logits[0].tolist(), temperature, top_k, top_p)
    counts = torch.bincount(ids, minlength=12).tolist()
    assert all(
        c == 0 for c, p in zip(counts, want, strict=True) if p == 0
    )  # a token of probability zero is never drawn
    chi_square = sum((c - n * p) ** 2 / (n * p) for c, p in zip(counts, want, strict=True) if p)
    degrees = sum(p > 0 for p in want) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(want[i]) for i in ids.tolist()]))


def test_a_draw_inverts_the_cumulative_distribution():
    p = [0.125, 0.0, 0.5, 0.25, 0.0, 0.125, 0.0]  # exact in binary
    logits = torch.tensor([p]).log()
    edges = [
        (0.0, 0),
        (0.1249, 0),
        (0.125, 2),
        (0.6249, 2),
        (0.625, 3),
        (0.8749, 3),
        (0.875, 5),
        (1 - 2**-24, 5),
        (1 - 2**-53, None),
    ]
    for uniform, want in edges:
        ids, logprobs = draw(logits, torch.tensor([uniform], dtype=torch.float64), Sampling(1))
        # A target that rounding puts at the total falls on the most probable token.
        assert ids.item() == (2 if want is None else want)
        assert logprobs.item() == pytest.approx(math.log(p[ids.item()]))


def test_no_rounding_of_the_sums_draws_a_token_of_probability_zero(monkeypatch):
    # Parallel prefix sums add in another order, so that they may rise where nothing was added.
    exact = torch.Tensor.cumsum

    def jittered(self, dim):
        total = exact(self, dim)
        return total + 0.02 * torch.rand(total.shape, generator=torch.Generator().manual_seed(0))

    rng = random.Random(0)
    logits = torch.full((2000, 64), float("-inf"))
    for row in logits:
        row[rng.sample(range(64), 3)] = 0.0
    uniform = uniforms(range(2000), 1)[:, 0]
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cumsum", jittered)
        ids, logprobs = draw(logits, uniform, Sampling(1))
    assert (logits.gather(-1, ids[:, None]) == 0.0).all()
    assert logprobs.isfinite().all()


def test_greedy_is_the_argmax_with_log_probabilities_at_temperature_one():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(2))
    ids, logprobs = draw(logits, None, Sampling(1, 0.0))
    for row, token, value in zip(logits.tolist(), ids.tolist(), logprobs.tolist(), strict=True):
        assert row[token] == max(row)
        assert value == pytest.approx(row[token] - math.log(sum(math.exp(x) for x in row)))


def test_permuting_the_batch_permutes_the_draws():
    logits = torch.randn(50, 20, generator=torch.Generator().manual_seed(3))
    uniform = uniforms(range(50), 1)[:, 0]
    order = torch.randperm(50, generator=torch.Generator().manual_seed(4))
    ids, logprobs = draw(logits, uniform, Sampling(1, 0.8, 0.9, 10))
    shuffled_ids, shuffled = draw(logits[order], uniform[order], Sampling(1, 0.8, 0.9, 10))
    assert torch.equal(shuffled_ids, ids[order])
    assert torch.equal(shuffled, logprobs[order])
    alone = torch.stack(
        [draw(logits[i : i + 1], uniform[i : i + 1], Sampling(1, 0.8, 0.9, 10))[0][0] for i in range(50)]
    )
    assert torch.equal(alone, ids)


def test_half_precision_logits_are_drawn_in_single_precision():
    logits = torch.randn(4, 500, generator=torch.Generator().manual_seed(5)).bfloat16()
    uniform = uniforms(range(4), 1)[:, 0]
    half, single = draw(logits, uniform, Sampling(1)), draw(logits.float(), uniform, Sampling(1))
    assert torch.equal(half[0], single[0])
    assert torch.equal(half[1], single[1])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, found 0"),
        ({"temperature": -0.1}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p must lie in"),
        ({"top_k": -1}, "top_k must be 0"),
    ],
)
def test_sampling_parameters_are_checked(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**{"max_new_tokens": 1, **values})


@pytest.mark.parametrize("params", [Sampling(1), Sampling(1, temperature=0.7, top_k=3), Sampling(1, temperature=0.0)])
def test_samples_that_share_a_row_are_drawn_as_if_each_had_its_own(params):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 9, generator=generator)
    rows = torch.tensor([2, 0, 2, 3, 0, 2, 3])  # row 1 has none
    uniform = torch.rand(7, dtype=torch.float64, generator=generator) if params.temperature else None
    found, want = draw(logits, uniform, params, rows), draw(logits[rows], uniform, params)
    assert torch.equal(found[0], want[0])
    assert torch.equal(found[1], want[1])
